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


def test_a_model_cut_short_has_the_head_and_the_kinds_of_layers_of_the_whole_one(sweep: Any) -> None:
    import short_models
    import timm
    import torch

    for name in ("test_vit", "resnet18", "regnetx_002", "levit_128s"):
        candidate = next(c for c in sweep.timm_models(name) if c.name == name)
        outcome = sweep.check(candidate, 0.001)
        assert (outcome.status, outcome.checked) == ("attached", "cut"), outcome.reason
        whole = timm.create_model(name)
        short, plan = short_models.build_short(candidate.build, lambda model: True, 1e3)
        again = plan.build(candidate.build)
        assert {type(m) for m in short.modules()} == {type(m) for m in whole.modules()}
        assert short_models.sites_of(short) == short_models.sites_of(whole)
        assert sum(1 for _ in short.modules()) < sum(1 for _ in whole.modules())
        shapes = {key: tensor.shape for key, tensor in short.state_dict().items()}
        assert {key: tensor.shape for key, tensor in again.state_dict().items()} == shapes
        assert all(torch.isfinite(parameter).all() for parameter in short.parameters())


def test_a_model_that_needs_all_of_its_blocks_stays_whole(sweep: Any) -> None:
    import short_models
    import timm

    model, plan = short_models.build_short(lambda: timm.create_model("test_vit"), lambda model: False, 1e3)
    assert plan == short_models.Shortening()
    assert len(model.state_dict()) == len(timm.create_model("test_vit").state_dict())


def test_records_of_several_runs_make_one_report(
    sweep: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sweep of one library does not overwrite the report on all of them; the last part writes it."""

    def models(library: str, *names: str) -> Any:
        return lambda: (sweep.Candidate(library, "kind", name, name, lambda: None, lambda m: None) for name in names)

    monkeypatch.setattr(
        sweep, "LIBRARIES", {"timm": models("timm", "a", "b"), "torchvision": models("torchvision", "c")}
    )
    monkeypatch.setattr(sweep, "check", lambda c, limit: sweep.Outcome(c.library, c.group, c.name, "attached", "full"))
    monkeypatch.setattr(sweep, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    report = tmp_path / "docs" / "models.md"

    def sweep_with(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["sweep_models.py", *arguments])
        assert sweep.main() == 0
        return capsys.readouterr().out

    first, second = (f"--records={tmp_path / name}.jsonl" for name in ("first", "second"))
    assert "No report" in sweep_with("--library=timm", "--part=1/2", first)
    assert "No report" in sweep_with("--library=timm", "--part=2/2", second)
    assert not report.exists()
    assert "3 models, 3 attached" in sweep_with(first, second)
    assert "| timm | kind | 2 | 2 | 2 | 0 | 0 | 0 | 0 |" in report.read_text()
    assert len((tmp_path / "first.jsonl").read_text().splitlines()) == 2


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
