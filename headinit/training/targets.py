"""Regression targets: standardised for training, and put back into the head's last layer afterwards."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headinit.data.splits import DataSplits, Split
from headinit.errors import HeadError
from headinit.heads.locate import relu_follows
from headinit.heads.modules import output_layer
from headinit.heads.record import record_of


@dataclass(frozen=True)
class Standardisation:
    """Targets with mean 0 and standard deviation 1 over the training examples.

    Learning rates and initial heads then mean the same whatever the targets' unit is. The head learns z = W x + b; in
    the units of the targets that is std (W x + b) + mean, again a linear layer: `fold` writes it into the model.

    Attributes:
        mean, std: `(T,)` float64, one for each target; a constant target has std 1.

    Example:
        >>> scale = Standardisation.of(torch.tensor([[10.0], [14.0]]))
        >>> scale.standardise(torch.tensor([[12.0], [14.0]])).tolist()
        [[0.0], [1.0]]
    """

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, targets: Tensor) -> Standardisation:
        """The standardisation of `(N, T)` training targets."""
        values = targets.double()
        std = values.std(dim=0, correction=0)
        return cls(values.mean(dim=0), torch.where(std > 0, std, torch.ones_like(std)))

    def standardise(self, targets: Tensor) -> Tensor:
        """Targets `(N, T)` in units of their spread, float32."""
        return ((targets.double() - self.mean) / self.std).float()

    def restore(self, outputs: Tensor) -> Tensor:
        """Outputs or standardised targets `(N, T)` in their own units: as they are if float32, computed in float64."""
        return outputs.double() * self.std.to(outputs.device) + self.mean.to(outputs.device)

    def standardised(self, splits: DataSplits) -> DataSplits:
        """The same examples with standardised targets, under fingerprints of their own.

        Example:
            >>> split = Split(["a", "b"], torch.tensor([[1.0], [3.0]]), ["1", "2"], "f00d")
            >>> splits = DataSplits(split, split, None, ("size",), "text", "demo", "regression")
            >>> Standardisation.of(split.labels).standardised(splits).train.labels.tolist()
            [[-1.0], [1.0]]
        """

        def changed(split: Split) -> Split:
            facts = f"{split.fingerprint}|standardised|{self.mean.tolist()}|{self.std.tolist()}"
            digest = hashlib.sha256(facts.encode()).hexdigest()
            return dataclasses.replace(split, labels=self.standardise(split.labels), fingerprint=digest)

        test = None if splits.test is None else changed(splits.test)
        return dataclasses.replace(
            splits, train=changed(splits.train), validation=changed(splits.validation), test=test
        )

    @torch.no_grad()
    def fold(self, model: nn.Module) -> None:
        """Let a model that learnt standardised targets predict in their own units: W <- std W, b <- std b + mean.

        Raises:
            HeadError: as `predicting_layers`; the model is as it was.

        Example:
            >>> from headinit.attach import attach_head
            >>> model = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 9))
            >>> model = attach_head(model, 1, init="zeros", task="regression")
            >>> Standardisation(torch.tensor([5.0]), torch.tensor([2.0])).fold(model)
            >>> model(torch.ones(1, 2)).item()
            5.0
        """
        for layer in predicting_layers(model):
            std, mean = self.std.to(layer.weight.device), self.mean.to(layer.weight.device)
            rows = std.reshape(-1, *[1] * (layer.weight.ndim - 1))
            layer.weight.copy_(layer.weight.double() * rows)
            layer.bias.copy_(layer.bias.double() * std + mean)


def predicting_layers(model: nn.Module) -> list[Any]:
    """The layers that make the predictions of a model for regression, those of auxiliary heads too.

    Raises:
        HeadError: one has no bias to hold the mean of the targets, what follows it lets no negative number through, or
            the model joins the outputs of two heads.
    """
    sites = record_of(model).sites
    if any(site.role == "distilled" for site in sites):
        raise HeadError(
            f"{type(model).__name__} joins the outputs of two heads, and some models add them, which would count the "
            "mean of the targets twice. Use another model for regression."
        )
    return [_layer_with_bias(model, site.path) for site in sites]


def _layer_with_bias(model: nn.Module, path: str) -> Any:
    if relu_follows(model, path):
        raise HeadError(
            f"{type(model).__name__} puts a ReLU behind its head, so it cannot predict negative numbers. Use another "
            "model for regression."
        )
    layer = output_layer(model.get_submodule(path))
    if getattr(layer, "bias", None) is None or not isinstance(layer, nn.Linear | nn.Conv2d):
        raise HeadError(
            f"A {type(layer).__name__} without bias cannot predict numbers around a mean other than 0. Use head=linear "
            "or head=mlp for regression."
        )
    return layer
