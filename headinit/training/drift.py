"""How far training moves the features: watched during the evaluations, which run the network anyway."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from headinit.analysis.diagnostics import feature_drift
from headinit.heads.locate import capture_head_input
from headinit.heads.record import record_of


class DriftWatch:
    """Compares the features of some validation examples with what they were at the first evaluation.

    The examples are the first few of every validation batch, so that they are spread over the data also where these are
    sorted by class. The batches must come in the same order each time.

    Args:
        examples: about how many are watched; 256 settle both measures, and one comparison takes milliseconds.

    Attributes:
        reference: `(N, d)` float32, the features at the first evaluation; None before it.

    Example:
        >>> from headinit.attach import attach_head
        >>> model = attach_head(nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)), 2, pretrained=True)
        >>> watch = DriftWatch()
        >>> for _ in range(2):
        ...     with watch.watching(model, batches=1):
        ...         _ = model(torch.ones(3, 2))
        ...     scores = watch.scores()
        >>> scores
        {'feature_drift': 0.0, 'feature_cka': 1.0}
    """

    def __init__(self, examples: int = 256) -> None:
        self.examples = examples
        self.reference: Tensor | None = None
        self._seen: list[Tensor] = []

    @contextmanager
    def watching(self, model: nn.Module, batches: int) -> Iterator[None]:
        """Collect what the head receives in the forward passes of this block.

        Args:
            model: with a record of its head.
            batches: about how many forward passes there will be.
        """
        self._seen = []
        share = math.ceil(self.examples / max(1, batches))
        site = record_of(model).sites[0]
        with capture_head_input(model, site) as seen:

            def keep(*_: object) -> None:
                value = seen.tensor[:share].detach()
                if value.ndim == 4:
                    value = value.mean((2, 3))  # a map, which a convolution takes as its input
                elif value.ndim > 2:
                    value = value.flatten(1, -2).mean(1)  # a feature for each token
                self._seen.append(value.float().cpu())

            handle = model.get_submodule(site.path).register_forward_hook(keep)
            try:
                yield
            finally:
                handle.remove()

    def scores(self) -> dict[str, float | None]:
        """``feature_drift``, the relative change, and ``feature_cka``, the linear CKA, of the latest block.

        Raises:
            DataError: a feature is NaN or infinite.
        """
        features, self._seen = torch.cat(self._seen)[: self.examples].clone(), []
        if self.reference is None:
            self.reference = features
        drift = feature_drift(self.reference, features)
        return {"feature_drift": drift["relative_frobenius"], "feature_cka": drift["linear_cka"]}
