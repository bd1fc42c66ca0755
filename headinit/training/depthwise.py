"""Depthwise convolutions in bfloat16 on a CPU, with some of their gradients in float32.

oneDNN has no fast bfloat16 kernel for two of them: into the input where the convolution has a stride, and into the
weight where the kernel is larger than 3 x 3. They take up to 60 times as long as in float32, so that a training step of
EfficientNet-Lite0 took as long in bfloat16 as in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

LARGEST_FAST_KERNEL = 3


@contextmanager
def fast_depthwise_gradients(model: nn.Module) -> Iterator[None]:
    """Within the block those gradients are computed in float32 and rounded, under bfloat16 autocast on a CPU.

    What the convolutions give is what they gave before, to the bit.

    Example:
        >>> model = nn.Conv2d(4, 4, 5, groups=4)
        >>> with fast_depthwise_gradients(model), torch.autocast("cpu", torch.bfloat16):
        ...     model(torch.randn(1, 4, 5, 5)).dtype
        torch.bfloat16
    """
    slow = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1 and _is_slow(m)]
    own = [vars(module).get("forward") for module in slow]
    for module in slow:
        vars(module)["forward"] = partial(_forward, module.forward)
    try:
        yield
    finally:
        for module, forward in zip(slow, own, strict=True):
            vars(module).pop("forward")
            if forward is not None:
                vars(module)["forward"] = forward


def _is_slow(module: nn.Conv2d) -> bool:
    return max(module.stride) > 1 or max(module.kernel_size) > LARGEST_FAST_KERNEL


def _forward(forward: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """The module's own forward, whatever it does around its convolution (TensorFlow's padding, say)."""
    if inputs.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return forward(inputs)
    with _Convolutions():
        return forward(inputs)


class _Convolutions(TorchFunctionMode):
    """Puts `_Convolution` in the place of torch's."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_convolved if func is torch.conv2d else func)(*args, **(kwargs or {}))


def _convolved(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    dtype = torch.get_autocast_dtype("cpu")
    geometry = [(value, value) if isinstance(value, int) else tuple(value) for value in (stride, padding, dilation)]
    if isinstance(padding, str) or dtype != torch.bfloat16:
        return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
    bias = None if bias is None else bias.to(dtype)
    return _Convolution.apply(input.to(dtype), weight.to(dtype), bias, *geometry, groups)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.geometry = geometry
        return torch.conv2d(inputs, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        inputs, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry

        def gradient_into(position: int, slow: bool) -> Tensor:
            dtype = torch.float32 if slow else inputs.dtype
            # The gradient into the input does not read the input: its shape is enough.
            known = inputs.to(dtype) if position else torch.empty_like(inputs, dtype=dtype)
            wanted = [position == 0, position == 1, False]
            found = torch.ops.aten.convolution_backward(
                gradients[0].to(dtype), known, weight.to(dtype), None,
                stride, padding, dilation, False, (0, 0), groups, wanted,
            )  # fmt: skip
            return found[position].to(inputs.dtype)

        into_inputs = gradient_into(0, max(stride) > 1) if ctx.needs_input_grad[0] else None
        slow = max(weight.shape[2:]) > LARGEST_FAST_KERNEL
        into_weight = gradient_into(1, slow) if ctx.needs_input_grad[1] else None
        into_bias = gradients[0].sum((0, 2, 3)) if ctx.needs_input_grad[2] else None
        return into_inputs, into_weight, into_bias, None, None, None, None
