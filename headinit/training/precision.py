"""Reduced precision where the hardware has it and the model bears it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from headinit.heads.record import call_model, has_record, record_of
from headinit.training.losses import split_batch

TOLERANCE = 0.05
"""Greatest relative error of the features at which bfloat16 counts as safe. MiniLM is at 0.6 %, ResNet-50 on noise at
0.5 %, EfficientNet-Lite0 on photographs at 3 to 5 %. With an error of 2 % on photographs and of 6 % on satellite tiles
(its depthwise convolutions in float32) it was fine-tuned through the accuracies (within 2 points) and losses (within
0.02) that the same seeds had in float32."""

SAMPLE = 8
"""Examples of the first batch on which bfloat16 is checked."""


def chosen_precision(asked: str, model: nn.Module, batches: Iterable[Any], *, cpu: bool | None = None) -> str:
    """The precision to train in: as asked, or for ``"auto"`` bfloat16 if it is fast here and right on the first batch.

    Args:
        asked: ``"fp32"``, ``"bf16"``, ``"fp16"`` or ``"auto"``.
        model: the model; its mode is put back.
        batches: its first batch is the sample.
        cpu: True if the CPU is used although there may be a GPU.

    Example:
        >>> chosen_precision("fp32", nn.Linear(2, 2), [])
        'fp32'
    """
    if asked != "auto":
        return asked
    if not _is_fast(cpu):
        return "fp32"
    inputs, _ = split_batch(next(iter(batches)))
    sample = {n: v[:SAMPLE] for n, v in inputs.items()} if isinstance(inputs, Mapping) else inputs[:SAMPLE]
    return "bf16" if bfloat16_error(model, sample, "cpu" if cpu else None) <= TOLERANCE else "fp32"


def bfloat16_error(model: nn.Module, inputs: Any, device: str | None = None) -> float:
    """Relative error of what the head receives (of the logits, where no head is recorded) under bfloat16 autocast.

    ``||f_bf16 - f_fp32|| / ||f_fp32||`` over the batch.

    Example:
        >>> 0 < bfloat16_error(nn.Linear(64, 8), torch.randn(4, 64)) < 0.05
        True
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        exact, reduced = (_head_input(model, inputs, device, enabled) for enabled in (False, True))
    finally:
        for module, mode in modes:
            module.training = mode
    scale = exact.norm().item()
    return (reduced - exact).norm().item() / scale if scale else 0.0


@torch.inference_mode()
def _head_input(model: nn.Module, inputs: Any, device: str, reduced: bool) -> Tensor:
    from accelerate.utils import send_to_device

    taken: list[Tensor] = []
    handle = None
    if has_record(model):
        head = model.get_submodule(record_of(model).sites[0].path)
        handle = head.register_forward_pre_hook(lambda _, args: taken.append(args[0]) if args else None)
    place = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        with torch.autocast(place.type if place.type != "cpu" else device, torch.bfloat16, enabled=reduced):
            logits = call_model(model, send_to_device(inputs, place))
    finally:
        if handle is not None:
            handle.remove()
    return (taken[0] if taken else logits).double()


def _is_fast(cpu: bool | None) -> bool:
    if torch.cuda.is_available() and not cpu:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
