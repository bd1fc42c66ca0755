"""Schedules of freezing: phases are what `finetune` by hand gives, and frozen stages do not move before theirs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headinit.analysis.metrics import metrics_for
from headinit.attach import attach_head
from headinit.data.loading import TensorBatches
from headinit.errors import ConfigError, HeadError
from headinit.features.extract import extract_features
from headinit.seeding import derived_seed
from headinit.training.drift import DriftWatch
from headinit.training.evaluation import predict
from headinit.training.finetune import _Run, finetune
from headinit.training.freezing import freeze, freeze_state
from headinit.training.phases import Phase, finetune_in_phases, gradual_phases, lp_ft_phases
from headinit.training.recipe import Recipe

from .models import bert_inputs, record_head, tiny_bert

RECIPE = Recipe(epochs=2, lr=0.02, seed=3)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def network() -> nn.Module:
    torch.manual_seed(4)
    stages = [nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.GELU(), nn.Dropout(0.2)) for _ in range(3)]
    return record_head(nn.Sequential(*stages, nn.Linear(6, 3)), "3")


def batches(count: int = 48, seed: int | None = 7) -> TensorBatches:
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(1))
    return TensorBatches(x, (x[:, :3] + 0.5 * x[:, 3:]).argmax(1), 8, shuffle_seed=seed)


def assert_equal_bits(first: nn.Module, second: nn.Module) -> None:
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)


def later(train: TensorBatches, epochs: int) -> Any:
    """The same batches, beginning with a later epoch."""
    shifted = copy.copy(train)
    shifted.epoch = lambda epoch, start=0: train.epoch(epoch + epochs, start)  # type: ignore[method-assign]
    return shifted


def test_lp_ft_is_two_runs_by_hand() -> None:
    train, validation = batches(), batches(24, None)
    phases = lp_ft_phases(RECIPE, probe_epochs=3)
    model = network()
    outcome = finetune_in_phases(model, train, validation, RECIPE, phases, cpu=True)

    by_hand = freeze(network(), "all")
    probe = finetune(by_hand, train, validation, replace(RECIPE, epochs=3, lr=0.2), cpu=True)
    freeze(by_hand, "none")
    second = replace(RECIPE, backbone_lr=0.001, seed=derived_seed(3, "phase/1"))
    rest = finetune(by_hand, later(train, 3), validation, second, cpu=True)
    assert_equal_bits(model, by_hand)
    assert [row["nll"] for row in outcome.history] == [row["nll"] for row in [*probe.history, *rest.history[1:]]]
    assert [row["epoch"] for row in outcome.history] == [0, 1, 2, 3, 4, 5]
    assert [row["step"] for row in outcome.history] == [0, 6, 12, 18, 24, 30]
    assert [row["phase"] for row in outcome.history] == ["probe"] * 4 + ["everything"] * 2
    assert outcome.steps == 30
    assert outcome.best == outcome.history[outcome.best_epoch]


def test_the_probe_on_features_is_the_probe_through_the_network() -> None:
    train, validation = batches(), batches(24, None)
    phases = lp_ft_phases(RECIPE, probe_epochs=3)
    through, on_features = network(), network()
    finetune_in_phases(through, train, validation, RECIPE, phases, cpu=True)
    sets = [extract_features(on_features, (data.features, data.labels)) for data in (train, validation)]
    seeds = (train.shuffle_seed, None)
    features = tuple(
        TensorBatches(found.features, found.labels, 8, shuffle_seed=seed)
        for found, seed in zip(sets, seeds, strict=True)
    )
    finetune_in_phases(on_features, train, validation, RECIPE, phases, features=features, cpu=True)
    torch.testing.assert_close(on_features.state_dict(), through.state_dict(), rtol=1e-4, atol=1e-5)


TARGETS: dict[str, Callable[[Tensor], Tensor]] = {
    "multi_label": lambda x: (x[..., :3] > 0).float(),
    "regression": lambda x: x[..., :3] * 0.5 + 1.0,
    "token": lambda x: torch.where(x[..., 3] > 1.5, -100, x[..., :3].argmax(-1)),
}


@pytest.mark.parametrize("task", TARGETS)
def test_phases_of_other_tasks_are_two_runs_by_hand(task: str) -> None:
    def tokens_network() -> nn.Module:
        torch.manual_seed(4)
        return record_head(nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 3)), "3")

    def data(count: int, seed: int | None) -> TensorBatches:
        shape = (count, 5, 6) if task == "token" else (count, 6)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(count))
        return TensorBatches(x, TARGETS[task](x), 8, shuffle_seed=seed)

    train, validation = data(48, 7), data(24, None)
    recipe = replace(RECIPE, monitor=MONITORS[task])
    model, by_hand = tokens_network(), freeze(tokens_network(), "all")
    phases = lp_ft_phases(recipe, probe_epochs=2)
    outcome = finetune_in_phases(model, train, validation, recipe, phases, task=task, cpu=True)
    finetune(by_hand, train, validation, replace(recipe, epochs=2, lr=0.2), task=task, cpu=True)
    second = replace(recipe, backbone_lr=0.001, seed=derived_seed(3, "phase/1"))
    rest = finetune(freeze(by_hand, "none"), later(train, 2), validation, second, task=task, cpu=True)
    assert_equal_bits(model, by_hand)
    assert outcome.history[3:] == [{**row, **_counted(row, 2, 12)} for row in rest.history[1:]]
    assert outcome.history[-1]["train_loss"] < outcome.history[1]["train_loss"]


MONITORS = {"multi_label": "map", "regression": "mse", "token": "accuracy"}


def _counted(row: dict[str, Any], epochs: int, steps: int) -> dict[str, Any]:
    return {"epoch": row["epoch"] + epochs, "step": row["step"] + steps, "phase": "everything"}


def test_averaged_weights_are_what_each_phase_keeps() -> None:
    """The scores of the best row are those of the weights that the model has in the end."""
    train, validation = batches(), batches(24, None)
    recipe = replace(RECIPE, ema=0.5)
    averaged, plain = network(), network()
    outcome = finetune_in_phases(averaged, train, validation, recipe, lp_ft_phases(recipe, probe_epochs=2), cpu=True)
    finetune_in_phases(plain, train, validation, RECIPE, lp_ft_phases(RECIPE, probe_epochs=2), cpu=True)
    found = metrics_for("single_label")(*predict(averaged, validation))
    assert found == {name: outcome.best[name] for name in found}
    assert not torch.equal(averaged[3].weight, plain[3].weight)


def test_without_epochs_for_the_probe_it_is_plain_fine_tuning() -> None:
    train, validation = batches(), batches(24, None)
    model, plain = network(), network()
    phases = lp_ft_phases(RECIPE, probe_epochs=0)
    outcome = finetune_in_phases(model, train, validation, RECIPE, phases, cpu=True)
    expected = finetune(plain, train, validation, replace(RECIPE, backbone_lr=0.05 * RECIPE.lr), cpu=True)
    assert_equal_bits(model, plain)
    assert [row["nll"] for row in outcome.history] == [row["nll"] for row in expected.history]


@pytest.mark.parametrize("init", ["he", "ridge"])
@pytest.mark.parametrize(
    ("given", "share"),
    [({}, 0.01), ({"optimizer": "sgd"}, 0.05), ({"backbone_share": 0.02}, 0.02), ({"backbone_lr": 1e-4}, None)],
)
def test_lp_ft_takes_a_rate_that_suits_a_finished_head(init: str, given: dict[str, Any], share: float | None) -> None:
    torch.manual_seed(0)
    labels = torch.arange(16) % 2
    pictures = torch.randn(16, 3, 5, 5) + labels[:, None, None, None]
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))
    model = attach_head(network, 2, init=init, data=(pictures, labels) if init == "ridge" else None)
    recipe = replace(RECIPE, epochs=1, lr=1e-2, **given)
    phases = lp_ft_phases(recipe, probe_epochs=0)
    data = TensorBatches(pictures, labels, 8)
    outcome = finetune_in_phases(model, data, data, recipe, phases, cpu=True)
    assert outcome.rates == {"backbone": pytest.approx(1e-4 if share is None else share * 1e-2), "head": 1e-2}


def test_frozen_stages_do_not_move_before_their_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: parameters, BatchNorm statistics; and no optimizer state for what is frozen."""
    model = network()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moved: dict[str, set[str]] = {}
    stages_with_state: dict[str, set[str]] = {}
    phase = ["head"]
    original = _Run.step

    def watched(self: _Run, examples: list[Any]) -> float:
        loss = original(self, examples)
        state = self.bare.state_dict()
        moved.setdefault(phase[0], set()).update(n[0] for n, t in state.items() if not torch.equal(t, start[n]))
        names = {id(p): name for name, p in self.bare.named_parameters()}
        stages_with_state.setdefault(phase[0], set()).update(names[id(p)][0] for p in self.optimizer.state)
        return loss

    monkeypatch.setattr(_Run, "step", watched)
    phases = gradual_phases(replace(RECIPE, epochs=6), stages=2)
    names = [chosen.name for chosen in phases]
    calls = iter(names)
    original_init = _Run.__init__

    def began(self: _Run, *arguments: Any) -> None:
        phase[0] = next(calls)
        original_init(self, *arguments)

    monkeypatch.setattr(_Run, "__init__", began)
    outcome = finetune_in_phases(model, batches(), batches(24, None), RECIPE, phases, cpu=True)
    assert stages_with_state == {"head": {"3"}, "last 1": set("23"), "last 2": set("123"), "everything": set("0123")}
    assert moved["head"] == {"3"}
    assert moved["last 1"] <= {"2", "3"}
    assert moved["last 2"] <= {"1", "2", "3"}
    assert moved["everything"] == {"0", "1", "2", "3"}
    assert [row["phase"] for row in outcome.history] == ["head", *names[:3], *["everything"] * 3]
    assert freeze_state(model)["policy"] == "none"  # type: ignore[index]


def test_every_epoch_has_an_order_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    original = TensorBatches.epoch

    def watched(self: TensorBatches, epoch: int, start: int = 0) -> Any:
        if self.shuffle_seed is not None:
            seen.append(torch.cat(self.order(epoch)))
        return original(self, epoch, start)

    monkeypatch.setattr(TensorBatches, "epoch", watched)
    phases = [Phase(str(k), "none", 1) for k in range(4)]
    finetune_in_phases(network(), batches(), batches(24, None), RECIPE, phases, cpu=True)
    assert len(seen) == 4
    assert len({tuple(order.tolist()) for order in seen}) == 4


def test_batchnorm_statistics_can_be_held_in_every_phase() -> None:
    model = network()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    recipe = replace(RECIPE, select="last")
    finetune_in_phases(model, batches(), batches(24, None), recipe, lp_ft_phases(recipe), norm="eval", cpu=True)
    torch.testing.assert_close(dict(model.named_buffers()), before, rtol=0, atol=0)
    assert not torch.equal(model[0][0].weight, network()[0][0].weight)


def test_text_models_go_through_all_phases() -> None:
    train = [(bert_inputs(), torch.tensor([0, 1, 2, 0]))] * 2
    recipe = Recipe(epochs=4, lr=1e-3)
    torch.manual_seed(0)
    outcome = finetune_in_phases(
        tiny_bert(), train, train, recipe, gradual_phases(recipe, stages=2), drift=DriftWatch(), cpu=True
    )
    assert [row["epoch"] for row in outcome.history] == [0, 1, 2, 3, 4]
    drifts = [row["feature_drift"] for row in outcome.history[2:]]
    assert all(0 < drift < 1 for drift in drifts)


def test_drift_is_measured_from_before_the_first_phase() -> None:
    model, validation = network(), batches(24, None)
    before = extract_features(model, (validation.features, validation.labels)).features
    phases = gradual_phases(replace(RECIPE, epochs=5), stages=2)
    outcome = finetune_in_phases(
        model, batches(), validation, replace(RECIPE, select="last"), phases, drift=DriftWatch(24), cpu=True
    )
    after = extract_features(model, (validation.features, validation.labels)).features
    expected = ((after.double() - before.double()).norm() / before.double().norm()).item()
    assert outcome.history[-1]["feature_drift"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gradual_phases(Recipe(epochs=4)), r"leaves 0 of 4 .* at least 5 epochs"),
        (lambda: gradual_phases(Recipe(), stages=0), "stages=0 is out of range"),
        (lambda: gradual_phases(Recipe(), stage_epochs=1.5), "stage_epochs=1.5"),  # type: ignore[arg-type]
        (lambda: lp_ft_phases(Recipe(), probe_epochs=-1), "probe_epochs=-1"),
        (lambda: finetune_in_phases(network(), batches(), batches(), RECIPE, [], cpu=True), "no phase"),
        (
            lambda: finetune_in_phases(
                network(), batches(), batches(), replace(RECIPE, steps=9), lp_ft_phases(RECIPE), cpu=True
            ),
            "steps=9 does not say how long each phase is",
        ),
    ],
)
def test_mistakes_are_said(call: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


def test_too_many_stages_are_refused_before_anything_is_trained() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(HeadError, match="last 4 stages trainable"):
        finetune_in_phases(model, batches(), batches(), RECIPE, gradual_phases(Recipe(), stages=4), cpu=True)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_only_the_start_is_evaluated_without_epochs() -> None:
    recipe = replace(RECIPE, epochs=0)
    outcome = finetune_in_phases(network(), batches(), batches(), recipe, gradual_phases(recipe), cpu=True)
    assert [row["epoch"] for row in outcome.history] == [0]
    assert outcome.steps == 0


def test_a_phase_of_one_step_is_not_spent_on_the_warm_up() -> None:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    batch = [(x, x[:, :3].argmax(1))]
    phases = [Phase("head", "all", 1), Phase("everything", "none", 1)]
    outcome = finetune_in_phases(network(), batch, batch, replace(RECIPE, select="last"), phases, cpu=True)
    assert len({row["nll"] for row in outcome.history}) == 3
