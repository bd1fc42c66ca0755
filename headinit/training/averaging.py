"""Averages of weights: over the steps of a run (EMA), and over the runs of several seeds (a soup)."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from headinit.errors import TrainingError


class WeightAverage:
    """An exponential moving average of weights: a <- d a + (1 - d) w after every optimizer step.

    The decay starts low, d_t = min(decay, (1 + t) / (10 + t)) after step t, as in TensorFlow and timm: a short run
    would otherwise end near where it started. Averaging goes back to Polyak and Juditsky (1992).

    Args:
        weights: by name, as they train.
        decay: the share of the average that stays, such as 0.999.

    Attributes:
        values: the average, by name.
        own: the weights as they train, while `in_place` holds the average in the model; else nothing.

    Example:
        >>> weight = torch.zeros(1)
        >>> average = WeightAverage({"w": weight}, decay=0.999)
        >>> weight += 1
        >>> average.update(step=1)  # decay 2 / 11
        >>> round(average.values["w"].item(), 4)
        0.8182
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        self.weights = {name: weight.detach() for name, weight in weights.items()}
        self.values = {name: weight.clone() for name, weight in self.weights.items()}
        self.decay = decay
        self.own: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a step, counted from 1."""
        move = get_ema_multi_avg_fn(min(self.decay, (1 + step) / (10 + step)))
        move(tuple(self.values.values()), tuple(self.weights.values()), step)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block the model has the averaged weights; afterwards its own again, to the bit."""
        self.own = {name: weight.clone() for name, weight in self.weights.items()}
        try:
            for name, weight in self.weights.items():
                weight.copy_(self.values[name])
            yield
        finally:
            for name, weight in self.weights.items():
                weight.copy_(self.own[name])
            self.own = {}


def soup(models: Sequence[nn.Module]) -> nn.Module:
    """One model whose weights are the means of several, trained from the same pretrained network.

    A uniform soup (Wortsman et al., 2022, https://arxiv.org/abs/2203.05482): often better than each of its models, and
    no slower than one. Their heads should have started alike (``seed`` the same and ``order_seed`` another, or a
    closed-form scheme): means of heads that started apart lie between their valleys. Running statistics are averaged
    too.

    Args:
        models: as `headinit.load` gives them.

    Returns:
        A new model of the class of the first.

    Raises:
        TrainingError: there is none, or they differ in their tensors.

    Example:
        >>> first, second = nn.Linear(1, 1), nn.Linear(1, 1)
        >>> mean = (first.weight + second.weight).item() / 2
        >>> abs(soup([first, second]).weight.item() - mean) < 1e-6
        True
    """
    if not models:
        raise TrainingError("A soup needs models: give at least one.")
    mixed = copy.deepcopy(models[0])
    states = [model.state_dict() for model in models]
    shapes = [{name: tensor.shape for name, tensor in state.items()} for state in states]
    for number, own in enumerate(shapes[1:], start=2):
        if own != shapes[0]:
            name = next(n for n in sorted({*own, *shapes[0]}) if own.get(n) != shapes[0].get(n))
            raise TrainingError(
                f"Models 1 and {number} cannot be averaged: {name} is {_shape(shapes[0].get(name))} in the first and "
                f"{_shape(own.get(name))} in the other. Give runs of one model, head and data set."
            )
    mixed.load_state_dict({name: _mean([state[name] for state in states]) for name in states[0]})
    return mixed


def _mean(tensors: list[Tensor]) -> Tensor:
    """In float64, so that equal tensors stay what they are; whole numbers (counters) are those of the first."""
    if not tensors[0].is_floating_point():
        return tensors[0]
    return torch.stack([tensor.double() for tensor in tensors]).mean(0).to(tensors[0].dtype)


def _shape(shape: torch.Size | None) -> str:
    return "missing" if shape is None else str(tuple(shape))
