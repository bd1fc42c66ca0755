"""Every scheme that is computed from data, on data that are hard on numbers: a right answer or a clear error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from headinit import schemes
from headinit.errors import SchemeError
from headinit.features.extract import FeatureSet
from headinit.heads.modules import pool_proxies
from headinit.schemes.prototypes import Source
from headinit.schemes.scheme import HeadShape, HeadWeights

NAMES = tuple(name for name in schemes.available() if schemes.needs_data(name))
WIDTH, CLASSES = 24, 5
# These learn what tells the classes apart; lsuv is random, source knows only what its old classifier does.
LEARNED = tuple(name for name in NAMES if name not in ("lsuv", "source"))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clusters(size: int = 200, width: int = WIDTH, classes: int = CLASSES, distance: float = 1.5) -> FeatureSet:
    labels = torch.arange(size) % classes
    centres = distance * torch.randn(classes, width, generator=generator(7))
    return FeatureSet(centres[labels] + torch.randn(size, width, generator=generator(1)), labels, classes)


def constant(data: FeatureSet) -> FeatureSet:
    return replace(data, features=data.features.index_fill(1, torch.tensor([3, 4]), 5.0))


def all_constant(data: FeatureSet) -> FeatureSet:
    return replace(data, features=torch.full_like(data.features, 2.5))


def duplicated(data: FeatureSet) -> FeatureSet:
    return replace(data, features=data.features[:, torch.arange(WIDTH) % (WIDTH // 2)])


def float16(data: FeatureSet) -> FeatureSet:
    return replace(data, features=(data.features * 1000).half())  # squares are beyond float16


def far_from_zero(data: FeatureSet) -> FeatureSet:
    return replace(data, features=data.features + 1e4)


def one_each(data: FeatureSet) -> FeatureSet:
    return replace(data, features=data.features[:CLASSES], labels=data.labels[:CLASSES])


def one_to_a_thousand(data: FeatureSet) -> FeatureSet:
    large = clusters(4000 + CLASSES)
    labels = torch.cat([torch.zeros(4000, dtype=torch.int64), torch.arange(CLASSES)])
    signal = 3.0 * torch.nn.functional.one_hot(labels, WIDTH)
    return replace(data, features=torch.randn(large.features.shape, generator=generator(2)) + signal, labels=labels)


def fewer_than_features(data: FeatureSet) -> FeatureSet:
    return clusters(CLASSES * 3)


def thousand_classes(data: FeatureSet) -> FeatureSet:
    return clusters(2000, WIDTH, 1000, 3.0)


CASES: tuple[Callable[[FeatureSet], FeatureSet], ...] = (
    constant,
    all_constant,
    duplicated,
    float16,
    far_from_zero,
    one_each,
    one_to_a_thousand,
    fewer_than_features,
    thousand_classes,
)


def head_of(name: str, data: FeatureSet) -> tuple[HeadWeights, Tensor]:
    """The head and its class logits on the data."""
    scheme, proxies = schemes.build(name), 1
    if isinstance(scheme, Source):
        scheme = scheme.with_source(torch.randn(50, WIDTH, generator=generator(3)), torch.zeros(50))
    if name == "multi_proxy":
        proxies = 2
    head = scheme(HeadShape(WIDTH, data.num_classes * proxies), generator(), data)
    scores = data.features.double() @ head.weight.double().T + head.bias.double()
    return head, pool_proxies(scores, proxies)


SLOW = {(name, thousand_classes) for name in ("auto", "early_probe", "probe")}


@pytest.mark.parametrize(
    ("name", "case"),
    [
        pytest.param(name, case, id=f"{name}-{case.__name__}", marks=[pytest.mark.slow] if (name, case) in SLOW else [])
        for name in NAMES
        for case in CASES
    ],
)
def test_a_right_answer_or_a_clear_error(name: str, case: Callable[[FeatureSet], FeatureSet]) -> None:
    data = case(clusters())
    try:
        head, logits = head_of(name, data)
    except SchemeError as error:
        assert str(error).startswith("init=")  # noqa: PT017
        assert name == "lsuv"
        return
    assert head.weight.isfinite().all()
    assert head.bias.isfinite().all()
    assert logits.isfinite().all()
    right = (logits.argmax(1) == data.labels).double().mean().item()
    if name not in LEARNED:
        return
    if case is one_to_a_thousand:
        # Imprinted rows have the same length and no bias: they know nothing of the shares of the classes.
        assert right > (0.9 if name == "imprint" else 0.98)
    elif case is one_each and name in ("auto", "early_probe"):
        assert right >= 1 / CLASSES  # auto falls back on the class shares
    elif case is not all_constant:
        assert right > 0.9
