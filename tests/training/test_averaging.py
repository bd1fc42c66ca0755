from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from headinit.errors import ConfigError, TrainingError
from headinit.training.averaging import WeightAverage, soup
from headinit.training.finetune import finetune
from headinit.training.recipe import Recipe

from . import killable

AVERAGED = replace(killable.RECIPE, ema=0.9)


def test_the_average_against_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, generator=generator)
    expected = weight.double()
    average = WeightAverage({"w": weight}, 0.5)
    for step in range(1, 12):
        weight.copy_(torch.randn(3, generator=generator))
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight.double()
        average.update(step)
    torch.testing.assert_close(average.values["w"].double(), expected, rtol=1e-6, atol=1e-6)
    own = weight.clone()
    with average.in_place():
        assert torch.equal(weight, average.values["w"])
        assert torch.equal(average.own["w"], own)
    assert torch.equal(weight, own)
    assert not average.own


def test_the_average_is_evaluated_and_kept_and_training_goes_on_without_it() -> None:
    raw, averaged = killable.build(1), killable.build(1)
    plain = killable.run(raw, None, recipe=replace(killable.RECIPE, patience=None, select="last"))
    found = killable.run(averaged, None, recipe=replace(AVERAGED, patience=None, select="last"))
    assert [row["train_loss"] for row in found.history] == [row["train_loss"] for row in plain.history]
    assert found.history[-1]["nll"] != plain.history[-1]["nll"]
    frozen = {name for name, p in raw.named_parameters() if not p.requires_grad}
    for (name, own), mean in zip(raw.named_parameters(), averaged.parameters(), strict=True):
        assert torch.equal(own, mean) == (name in frozen)


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    whole = killable.build("none")
    expected = killable.run(whole, None, recipe=AVERAGED)

    class Killed(Exception):
        pass

    def kill(row: dict[str, Any]) -> None:
        if row["epoch"] == 2:
            raise Killed

    with pytest.raises(Killed):
        killable.run(killable.build("none"), str(tmp_path), recipe=AVERAGED, save_every_steps=1, on_evaluation=kill)
    again = killable.build("none")
    found = killable.run(again, str(tmp_path), recipe=AVERAGED)
    assert killable.fingerprint(again, found) == killable.fingerprint(whole, expected)


def test_a_stop_while_the_average_is_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint holds the weights as they train, not the average that is in their place."""
    from headinit.training import finetune as module

    whole = killable.build("none")
    expected = killable.run(whole, None, recipe=AVERAGED)
    evaluations: list[int] = []
    predict = module.predict

    def stopping(*args: Any, **options: Any) -> Any:
        evaluations.append(1)
        if len(evaluations) == 3:
            stops[0].asked = True
        return predict(*args, **options)

    stops: list[Any] = []

    class Stop(module.StopRequest):
        def __init__(self) -> None:
            super().__init__()
            stops.insert(0, self)

    monkeypatch.setattr("headinit.training.checkpoint.StopRequest", Stop)
    monkeypatch.setattr(module, "predict", stopping)
    with pytest.raises(SystemExit):
        killable.run(killable.build("none"), str(tmp_path), recipe=AVERAGED)
    monkeypatch.undo()
    again = killable.build("none")
    found = killable.run(again, str(tmp_path), recipe=AVERAGED)
    assert killable.fingerprint(again, found) == killable.fingerprint(whole, expected)


@pytest.mark.parametrize("ema", [1.0, -0.1, float("nan")])
def test_decay_out_of_range(ema: float) -> None:
    with pytest.raises(ConfigError, match="ema="):
        Recipe(ema=ema)


def test_soup() -> None:
    models = [nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)) for _ in range(3)]
    for number, model in enumerate(models):
        model.train()(torch.randn(4, 2, generator=torch.Generator().manual_seed(number)))
    before = [model[0].weight.detach().clone() for model in models]
    mixed = soup(models)
    assert torch.equal(mixed[0].weight, torch.stack(before).double().mean(0).float())
    means = torch.stack([model[1].running_mean for model in models]).double().mean(0).float()
    assert torch.equal(mixed[1].running_mean, means)
    assert all(torch.equal(model[0].weight, own) for model, own in zip(models, before, strict=True))
    assert torch.equal(soup([models[0]] * 3)[0].weight, before[0])
    with pytest.raises(TrainingError, match="at least one"):
        soup([])
    with pytest.raises(TrainingError, match=r"Models 1 and 2 cannot be averaged: 0.bias is \(3,\)"):
        soup([models[0], nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4))])


def test_compiling_falls_back(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    plain, asked = killable.build(1), killable.build(1)
    expected = killable.run(plain, None)

    def none_here(*_: Any, **__: Any) -> Any:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", none_here)
    found = killable.run(asked, None, recipe=replace(killable.RECIPE, compile=True))
    assert found.history == expected.history
    assert "trains uncompiled: No working C++ compiler" in caplog.text
    with pytest.raises(ConfigError, match="compile='always'"):
        Recipe(compile="always")


@pytest.mark.slow
def test_compiled_steps_are_the_same_to_rounding() -> None:
    plain, compiled = nn.Linear(6, 3), nn.Linear(6, 3)
    compiled.load_state_dict(plain.state_dict())
    data = killable.data()
    recipe = Recipe(epochs=2, lr=1e-2)
    expected = finetune(plain, data, data, recipe, cpu=True)
    found = finetune(compiled, data, data, replace(recipe, compile=True), cpu=True)
    assert [row["train_loss"] for row in found.history[1:]] == pytest.approx(
        [row["train_loss"] for row in expected.history[1:]], rel=1e-5
    )
    assert list(compiled.state_dict()) == ["weight", "bias"]
