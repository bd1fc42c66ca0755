"""Gradients of depthwise convolutions under bfloat16, against float64 and against torch's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from headinit.training import depthwise
from headinit.training.depthwise import fast_depthwise_gradients
from headinit.training.finetune import finetune
from headinit.training.recipe import Recipe


def gradients(model: nn.Module, x: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    """Output, gradients into the input and into the parameters of `(model(x) * weights).sum()`."""
    x = x.clone().requires_grad_()
    output = model(x)
    return output, *torch.autograd.grad((output.double() * weights).sum(), [x, *model.parameters()])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 5, "padding": 2},
        {"kernel_size": 3, "stride": 2},
        {"kernel_size": 5, "stride": (2, 1), "padding": (1, 2), "bias": True},
        {"kernel_size": 3, "stride": 2, "dilation": 2, "padding": 2, "padding_mode": "circular"},
        {"kernel_size": 7, "padding": "same"},
    ],
)
def test_output_and_gradients(options: dict[str, Any], layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(8, 8, groups=8, **{"bias": False, **options})
    x = torch.randn(4, 8, 11, 11).bfloat16().contiguous(memory_format=layout)
    model.weight.data = model.weight.data.bfloat16().float()  # so that nothing is lost in rounding the weight
    weights = torch.randn_like(model(x.float()), dtype=torch.float64).bfloat16().double()
    with torch.autocast("cpu", torch.bfloat16):
        plain = gradients(model, x, weights)
        with fast_depthwise_gradients(model):
            found = gradients(model, x, weights)
    exact = gradients(copy.deepcopy(model).double(), x.double(), weights)
    assert torch.equal(found[0], plain[0])
    for ours, theirs, expected in zip(found, plain, exact, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - expected).norm() <= 0.01 * expected.norm()


def test_only_the_slow_gradients_are_computed_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions without a slow gradient, other precisions and everything after the block are torch's."""
    taken: list[Any] = []
    original = depthwise._Convolution.apply
    monkeypatch.setattr(depthwise._Convolution, "apply", lambda *args: (taken.append(args[3]), original(*args))[1])
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 8, 5, groups=4, padding=2),
        nn.Conv2d(8, 8, 3, groups=8, stride=2),
    )
    own = model[3].forward = model[3].forward  # an own forward must be there afterwards
    x = torch.randn(2, 4, 15, 15)
    with fast_depthwise_gradients(model):
        assert not any("forward" in vars(module) for module in model[:3])
        model(x)
        assert not taken
        with torch.autocast("cpu", torch.float16):
            model(x)
        assert not taken
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
        assert taken == [(2, 2)]
    assert vars(model[3])["forward"] is own
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    assert len(taken) == 1


def test_a_network_of_timm_trains_as_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorFlow's padding is around its convolutions; the curve is that of torch's gradients, to their rounding."""
    batches = [(torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3)]
    taken: list[int] = []
    original = depthwise._Convolution.apply
    monkeypatch.setattr(depthwise._Convolution, "apply", lambda *args: (taken.append(1), original(*args))[1])
    curves, calls = [], []
    for slow in (depthwise._is_slow, lambda module: False):
        monkeypatch.setattr(depthwise, "_is_slow", slow)
        torch.manual_seed(0)
        model = timm.create_model("tf_efficientnet_lite0", num_classes=3)
        outcome = finetune(model, batches, batches, Recipe(epochs=2, lr=1e-4, precision="bf16"), cpu=True)
        curves.append([row["nll"] for row in outcome.history])
        calls.append(len(taken))
        assert not any("forward" in vars(module) for module in model.modules())
    assert calls[0] == calls[1] > 0
    assert curves[0][0] == curves[1][0]  # nothing has been trained: the outputs are the same bits
    assert curves[0] == pytest.approx(curves[1], rel=0.05)


def test_float32_runs_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> Any:
        raise AssertionError("this run is in float32")

    monkeypatch.setattr(depthwise, "_forward", refused)
    model = nn.Sequential(nn.Conv2d(4, 4, 5, groups=4), nn.Flatten(), nn.Linear(4, 3))
    batch = [(torch.randn(8, 4, 5, 5), torch.arange(8) % 3)]
    finetune(model, batch, batch, Recipe(epochs=1), cpu=True)
