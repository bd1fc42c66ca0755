"""The sweep over all models, run here on one model per family; `python scripts/sweep_models.py` runs it on all."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


@pytest.fixture(scope="module")
def sweep() -> Iterator[Any]:
    sys.path.insert(0, str(SCRIPTS))
    try:
        import sweep_models

        yield sweep_models
    finally:
        sys.path.remove(str(SCRIPTS))


PARTS = 4  # of each sweep, so that several processes share it


def run(sweep: Any, library: str, wanted: Any, limit: float) -> list[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [sweep.check(candidate, limit) for candidate in sweep.LIBRARIES[library]() if wanted(candidate)]


def one_per_family(sweep: Any, library: str, part: int, limit: float) -> list[Any]:
    """Outcomes of every `PARTS`-th of the models that come first in their family."""
    first = {candidate.family: candidate for candidate in reversed(list(sweep.LIBRARIES[library]()))}
    chosen = {candidate.name for number, candidate in enumerate(first.values()) if number % PARTS == part}
    groups = {candidate.name: candidate.group for candidate in first.values()}
    return run(sweep, library, lambda c: c.name in chosen and c.group == groups[c.name], limit)


def wrong(outcomes: list[Any]) -> list[str]:
    return [f"{o.library}/{o.name}: {o.status}, {o.reason}" for o in outcomes if o.status != "attached"]


def test_some_layouts_of_each_library(sweep: Any) -> None:
    layouts = {"squeezenet1_1", "mnasnet0_5", "efficientvit_b0", "levit_128s", "repvit_m0_9", "resnet10t", "test_vit"}
    layouts |= {"BertForSequenceClassification", "BartForSequenceClassification", "XLNetForSequenceClassification"}
    layouts |= {"PoolFormerForImageClassification", "LevitForImageClassificationWithTeacher", "BertModel", "SwinModel"}
    layouts |= {"PPLCNetForImageClassification", "PerceiverForSequenceClassification", "T5ForTokenClassification"}
    for library in sweep.LIBRARIES:
        outcomes = run(sweep, library, lambda candidate: candidate.name in layouts, 12)
        assert outcomes
        assert wrong(outcomes) == []
        assert {outcome.checked for outcome in outcomes} == {"full"}


def test_a_wrong_head_is_found_out(sweep: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks can fail: each wrong result of attach_head is a failure of the sweep."""
    from torch import nn

    candidate = next(c for c in sweep.timm_models("test_resnet"))
    honest = sweep.attach_head

    def touching(model: nn.Module, *args: Any, **options: Any) -> nn.Module:
        nn.init.ones_(next(model.parameters()))
        return honest(model, *args, **options)

    def rescaled(model: nn.Module, *args: Any, **options: Any) -> nn.Module:
        attached = honest(model, *args, **options)
        attached.fc.weight.data *= 3
        return attached

    def squashed(model: nn.Module, *args: Any, **options: Any) -> nn.Module:
        attached = honest(model, *args, **options)
        attached.register_forward_hook(lambda module, inputs, output: output.tanh())
        return attached

    cases = ((touching, "has changed"), (rescaled, "std of fc.weight"), (squashed, "not what makes the logits"))
    for fake, reason in cases:
        monkeypatch.setattr(sweep, "attach_head", fake)
        outcome = sweep.check(candidate, 30)
        assert outcome.status == "failed"
        assert reason in outcome.reason


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_one_model_per_family(sweep: Any, library: str, part: int) -> None:
    outcomes = one_per_family(sweep, library, part, 8)
    assert outcomes
    assert wrong(outcomes) == []


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_one_class_per_family_of_transformers(sweep: Any, part: int) -> None:
    outcomes = one_per_family(sweep, "transformers", part, 400)
    assert outcomes
    assert not [outcome for outcome in outcomes if outcome.status == "failed"]
    for outcome in outcomes:
        if outcome.status == "unbuilt":
            assert "ImportError" in outcome.reason  # an optional library that is not installed
        if outcome.status == "refused":
            assert "two towers" in outcome.reason or "not a classifier" in outcome.reason
