"""One thread for small steps, and the threads of before afterwards."""

from __future__ import annotations

import pytest
import torch

from headinit.features.extract import FeatureSet
from headinit.schemes import linear_probe
from headinit.schemes.linear_probe import Probe
from headinit.schemes.scheme import HeadShape
from headinit.threads import SMALL_STEP, one_thread_if_small


@pytest.fixture(autouse=True)
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_small_steps_only_and_put_back_after_an_error():
    with one_thread_if_small(SMALL_STEP):
        assert torch.get_num_threads() == 2
    with one_thread_if_small(SMALL_STEP - 1):
        assert torch.get_num_threads() == 1
    with pytest.raises(ZeroDivisionError), one_thread_if_small(1):
        _ = 1 / 0
    assert torch.get_num_threads() == 2


def test_a_small_probe_is_solved_on_one_thread(monkeypatch):
    seen = []
    plain = torch.log_softmax
    monkeypatch.setattr(
        linear_probe.torch,
        "log_softmax",
        lambda *args, **options: seen.append(torch.get_num_threads()) or plain(*args, **options),
    )
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    Probe()(HeadShape(5, 2), torch.Generator().manual_seed(0), FeatureSet(x, (x[:, 0] > 0).long(), 2))
    assert set(seen) == {1}
    assert torch.get_num_threads() == 2
