"""A hopeless run ends early and says why; a run that can still learn is left alone."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headinit.errors import TrainingError
from headinit.training.finetune import finetune
from headinit.training.freezing import freeze
from headinit.training.health import DIVERGED_STEPS, Health
from headinit.training.recipe import Recipe

from .models import record_head

RECIPE = Recipe(epochs=3, lr=0.01, warmup=0.2)


def data(count: int = 32) -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(1))
    return [(x[i : i + 8], x[i : i + 8, :3].argmax(1)) for i in range(0, count, 8)]


def network(head: nn.Module, *, zero: tuple[str, ...] = (), relu: bool = False) -> nn.Module:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(6, 8), nn.GELU())
    model = record_head(nn.Sequential(body, head, *([nn.ReLU()] if relu else [])), "1")
    with torch.no_grad():
        for name in zero:
            model.get_parameter(name).zero_()
    return model


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize("policy", ["none", "all"])
def test_a_zero_head_before_a_relu_is_dead(policy: str) -> None:
    """SqueezeNet's: convolution, ReLU, pooling."""
    model = freeze(network(nn.Linear(8, 3), zero=("1.weight", "1.bias"), relu=True), policy)
    with pytest.raises(TrainingError, match=r"new head was exactly zero .* cannot learn.*1\.weight is all zero"):
        finetune(model, data(), data(), RECIPE, cpu=True)


def test_an_mlp_of_zeros_is_dead_though_its_last_bias_moves() -> None:
    zero = ("1.0.weight", "1.0.bias", "1.2.weight", "1.2.bias")
    with pytest.raises(TrainingError, match=r"cannot learn.*1\.0\.weight, 1\.2\.weight are all zero"):
        finetune(network(mlp(), zero=zero), data(), data(), RECIPE, cpu=True)


class Cut(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


def test_a_backbone_without_gradient_is_a_warning() -> None:
    model = network(nn.Linear(8, 3))
    model[0].append(Cut())
    with pytest.warns(UserWarning, match="No gradient has reached the backbone in the first 5 steps"):
        finetune(model, data(), data(), RECIPE, cpu=True)


@pytest.mark.parametrize(
    ("head", "zero"),
    [
        (nn.Linear(8, 3), ("1.weight", "1.bias")),  # no gradient into the backbone at the first two steps
        (mlp(), ("1.2.weight", "1.2.bias")),
        (nn.Linear(8, 3), ()),
    ],
)
def test_heads_that_learn_are_left_alone(head: nn.Module, zero: tuple[str, ...]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        finetune(network(head, zero=zero), data(), data(), RECIPE, cpu=True)


def test_what_has_been_learnt_needs_no_gradient() -> None:
    """All probabilities are exactly 1: every gradient is zero, and nothing is wrong."""
    model = nn.Linear(3, 3, bias=False)
    nn.init.eye_(model.weight)
    with torch.no_grad():
        model.weight *= 1e4
    batches = [(torch.eye(3), torch.arange(3))] * 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        finetune(model, batches, batches, RECIPE, cpu=True)


@pytest.mark.filterwarnings("ignore:The loss has been over")  # on the way, while a few predictions are right
def test_a_diverged_run_ends_with_the_cause() -> None:
    recipe = Recipe(epochs=400, lr=1e3, schedule="constant", warmup=0.0, weight_decay=0.0, evaluate_every=100)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(32, 6, generator=generator)
    noise = [(x[i : i + 8], torch.randint(3, (8,), generator=generator)) for i in range(0, 32, 8)]
    with pytest.raises(TrainingError, match=r"over 10 times .* has diverged.*learning rate that is too high"):
        finetune(nn.Linear(6, 3), noise, noise, recipe, cpu=True)


def judged(task: str, outputs: Tensor, labels: Tensor, losses: list[float]) -> None:
    health = Health(task, [], [], {})
    for step, loss in enumerate(losses):
        health.check_loss(loss, step + 1, lambda: (outputs, labels))


HIGH = [1.0, *[50.0] * DIVERGED_STEPS]


def test_a_high_loss_with_right_predictions_is_a_warning() -> None:
    labels = torch.tensor([0, 1, 2, 0])
    with pytest.warns(UserWarning, match="though the predictions are still of use"):
        judged("single_label", 1e3 * torch.eye(3)[labels], labels, HIGH)
    with pytest.warns(UserWarning, match="still of use"):
        judged("multi_label", torch.ones(4, 2), torch.ones(4, 2), HIGH)


@pytest.mark.parametrize(
    ("task", "outputs", "labels"),
    [
        ("single_label", torch.tensor([[9.0, 0.0]] * 4), torch.tensor([0, 0, 0, 1])),  # always the most frequent class
        ("token", torch.tensor([[[9.0, 0.0], [0.0, 9.0]]]), torch.tensor([[1, -100]])),
        ("regression", torch.full((4, 1), 30.0), torch.tensor([[0.0], [1.0], [2.0], [1.0]])),
    ],
)
def test_constant_predictions_at_a_high_loss_have_diverged(task: str, outputs: Tensor, labels: Tensor) -> None:
    with pytest.raises(TrainingError, match="no better than a constant"):
        judged(task, outputs, labels, HIGH)


@pytest.mark.parametrize("losses", [HIGH[:-1], [1.0, *([50.0] * 60 + [2.0]) * 3], [6.0, *[50.0] * 200]])
def test_spikes_and_high_starts_are_survived(losses: list[float]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        judged("single_label", torch.zeros(2, 2), torch.tensor([0, 1]), losses)


def test_a_resumed_run_counts_on() -> None:
    first = Health("single_label", [], [], {})
    useless: Any = lambda: (torch.zeros(2, 2), torch.tensor([0, 1]))  # noqa: E731
    for step, loss in enumerate(HIGH[:-1]):
        first.check_loss(loss, step + 1, useless)
    second = Health("single_label", [], [], {})
    second.restore(first.state())
    with pytest.raises(TrainingError, match="has diverged"):
        second.check_loss(50.0, len(HIGH), useless)
