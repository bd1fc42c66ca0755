"""`torch.compile` for training steps, where it is asked for or pays, and the ordinary way where it fails."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from headinit.heads.record import unwrap

logger = logging.getLogger(__name__)

CONVOLUTION_STEPS = 2000
"""Steps of a convolutional network on a CPU from which on ``"auto"`` compiles. Compiling a ResNet-50 takes about 90 s
on two cores and saves about a tenth of each step of a second; text became slower by it."""


def pays(model: nn.Module, device: torch.device, steps: int) -> bool:
    """Whether compiling is worth its time: on a GPU, and for long runs of convolutional networks on a CPU.

    Example:
        >>> pays(nn.Linear(2, 2), torch.device("cpu"), 10**6), pays(nn.Conv2d(3, 8, 3), torch.device("cpu"), 10**6)
        (False, True)
    """
    if device.type != "cpu":
        return True
    return steps >= CONVOLUTION_STEPS and any(isinstance(module, nn.Conv2d) for module in model.modules())


class Compiled:
    """A model whose calls are compiled, until that fails; then it is called as it is, with a message.

    The model itself is not touched: its parameters keep their names, and evaluation runs it uncompiled.

    Args:
        model: the model, or its DistributedDataParallel.

    Example:
        >>> import unittest.mock
        >>> model = nn.Linear(2, 2)
        >>> with unittest.mock.patch("torch.compile", side_effect=RuntimeError("no compiler")):
        ...     Compiled(model)(torch.zeros(1, 2)).shape
        torch.Size([1, 2])
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._run: Callable[..., Any] | None = None
        self._failed = False

    def __call__(self, *args: Any, **options: Any) -> Any:
        """As the model."""
        if self._failed:
            return self.model(*args, **options)
        try:
            # Random numbers as torch draws them without compiling, so that dropout is the same.
            self._run = self._run or torch.compile(self.model, options={"fallback_random": True})
            return self._run(*args, **options)
        except Exception as reason:  # no C++ compiler, an operation that it does not know, ...
            self._failed = True
            name, why = type(unwrap(self.model)).__name__, str(reason).splitlines()[:1]
            logger.warning("%s cannot be compiled here and trains uncompiled: %s", name, " ".join(why))
            return self.model(*args, **options)
