"""A faster copy of a convolutional network: the same float32 features, on a CPU.

Three things make the plain pass slow, none of them arithmetic: activations of a whole batch do not fit the processor's
caches, NCHW tensors are reordered around every convolution, and batch norm, activation and addition each read and
write the whole map again. So the copy works on a few pictures at a time, in channels-last order, with batch norm folded
into the convolutions and pointwise operations fused into them by oneDNN's graph compiler, which is part of torch and
needs seconds (inductor gives the same speed, but needs a C++ compiler and about half a minute).
"""

from __future__ import annotations

import copy
import itertools
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

# Pictures that go through the copy at a time: their activations stay in the caches, the convolutions are still busy.
MICRO_BATCH = 8

# Pixels of input (128 pictures of 224 x 224) from which on the copy pays for the two or three seconds of its making.
PIXELS_THAT_PAY = 128 * 224 * 224

PictureRunner = Callable[[Any], Tensor]

_KEPT: ContextVar[dict[tuple[Any, ...], PictureRunner] | None] = ContextVar("_KEPT", default=None)


@contextmanager
def copies_kept() -> Iterator[None]:
    """Within the block a faster copy is made once for all data that go through the same model.

    The weights must not change in it.

    Example:
        >>> with copies_kept():
        ...     pass
    """
    token = _KEPT.set({})
    try:
        yield
    finally:
        _KEPT.reset(token)


def pays(model: nn.Module, inputs: object, batches: int | None) -> bool:
    """Whether a faster copy can be made and is worth it: by the model and the amount of data, never by a clock.

    Args:
        model: the network.
        inputs: the first batch.
        batches: how many there are; None (unknown) never pays.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
        >>> pays(model, torch.zeros(8, 3, 224, 224), 16), pays(model, torch.zeros(8, 3, 224, 224), 15)
        (True, False)
    """
    if batches is None or not isinstance(inputs, Tensor) or inputs.ndim != 4:
        return False
    if inputs.device.type != "cpu" or inputs.dtype != torch.float32:
        return False
    if len(inputs) * inputs.shape[2] * inputs.shape[3] * batches < PIXELS_THAT_PAY:
        return False
    # A hook may look at or change what passes through; in a traced copy it would never run. Those of `freeze` say that
    # they do nothing in evaluation mode, in which features are extracted.
    modules = list(model.modules())
    hooks = (hook for m in modules for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values()))
    unknown = any(not getattr(hook, "idle_in_evaluation", False) for hook in hooks)
    return any(isinstance(m, nn.Conv2d) for m in modules) and not unknown


def accelerate(
    model: nn.Module,
    features_of: Callable[[nn.Module], PictureRunner],
    inputs: Tensor,
    tolerance: float,
    name: str | None = None,
) -> PictureRunner | None:
    """A faster runner for pictures of this shape, or None if none was found that gives the same features.

    The user's model is not touched: the copy shares its tensors, but for convolution weights in channels-last order and
    what the compiler makes of them (about twice the size of the weights, for as long as the runner lives).

    Args:
        model: the network, in any mode.
        features_of: gives the plain runner of a network.
        inputs: the first batch, `(B, C, H, W)`.
        tolerance: largest relative error of the features of some pictures of this batch.
        name: of the features; within `copies_kept` a copy that was made for the same name serves again.
    """
    kept = _KEPT.get()
    copies = {} if kept is None or name is None else kept
    sample = inputs[: MICRO_BATCH // 2]  # the rest is filled with zeros, which must not reach the others
    expected = features_of(model)(sample)
    for make in (_compiled, _channels_last):
        try:
            key = (id(model), name, make.__name__, sample.shape[1:])
            if (run := copies.get(key)) is None:
                run = _in_micro_batches(make(model, features_of, sample), sample.shape[1:], features_of(model))
            error = ((run(sample) - expected).double().norm() / expected.double().norm().clamp_min(1e-300)).item()
        except Exception as reason:  # whatever foreign code a tracer meets: the plain way is always there
            logger.info("No faster copy of %s by %s: %s", type(model).__name__, make.__name__, reason)
            continue
        if error <= tolerance:
            copies[key] = run
            return run
        logger.info("A faster copy of %s is %.1e off, so it is not used.", type(model).__name__, error)
    return None


class _Features(nn.Module):
    """A network up to its head, as a module that can be traced."""

    def __init__(self, network: nn.Module, run: PictureRunner) -> None:
        super().__init__()
        self.network = network
        self.run = run

    def forward(self, pictures: Tensor) -> Tensor:
        """Features of pictures."""
        return self.run(pictures)


def _channels_last(
    model: nn.Module, features_of: Callable[[nn.Module], PictureRunner], sample: Tensor
) -> PictureRunner:
    return features_of(_shared_copy(model))


def _compiled(model: nn.Module, features_of: Callable[[nn.Module], PictureRunner], sample: Tensor) -> PictureRunner:
    network = _shared_copy(model)
    run = features_of(network)
    pictures = _filled(sample).contiguous(memory_format=torch.channels_last)
    run(pictures[:1])  # settles how the features are taken, before anything is traced
    with torch.no_grad(), _graph_fusion(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*to a Python boolean", category=torch.jit.TracerWarning)
        traced = torch.jit.trace(_Features(network, run).eval(), pictures, check_trace=False)
        frozen = torch.jit.freeze(traced)
        for _ in range(3):  # the executor profiles, then compiles; afterwards the switch is not read again
            frozen(pictures)
    return frozen


def _shared_copy(model: nn.Module) -> nn.Module:
    """New modules around the same tensors, to evaluate; convolution weights are copied into channels-last order."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    network = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors}).eval()
    for module in network.modules():
        # A parametrised weight is no parameter; setting it would write to the original, which is shared.
        if isinstance(module, nn.Conv2d) and "weight" in module._parameters:
            weight = module.weight.detach().contiguous(memory_format=torch.channels_last)
            module.weight = nn.Parameter(weight, requires_grad=False)
    return network


def _in_micro_batches(run: PictureRunner, shape: torch.Size, plain: PictureRunner) -> PictureRunner:
    """Run a few pictures at a time, always as many; pictures of another shape go the plain way."""

    def in_micro_batches(pictures: Tensor) -> Tensor:
        if pictures.shape[1:] != shape:
            return plain(pictures)
        parts = []
        with torch.no_grad():
            for part in pictures.split(MICRO_BATCH):
                full = _filled(part).contiguous(memory_format=torch.channels_last)
                parts.append(run(full)[: len(part)])
        return torch.cat(parts)

    return in_micro_batches


def _filled(pictures: Tensor) -> Tensor:
    """A whole micro-batch: a compiled network knows one shape."""
    missing = MICRO_BATCH - len(pictures)
    return torch.cat([pictures, pictures.new_zeros(missing, *pictures.shape[1:])]) if missing else pictures


@contextmanager
def _graph_fusion() -> Iterator[None]:
    """oneDNN's graph compiler, switched on for a block: the switch is global, so it is put back."""
    before = torch.jit.onednn_fusion_enabled()
    torch.jit.enable_onednn_fusion(True)
    try:
        yield
    finally:
        torch.jit.enable_onednn_fusion(before)
