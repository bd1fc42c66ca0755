"""What is new in a model, how it started, what is frozen, and what is wrong: for a person to read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headinit.errors import HeadError
from headinit.heads.locate import find_head, relu_follows
from headinit.heads.modules import hidden_part, output_layer
from headinit.heads.record import HeadRecord, HeadSite, call_model, has_record, record_of, unwrap

_SHOWN = 12


@dataclass(frozen=True)
class ParameterLine:
    """One new parameter.

    Attributes:
        name: as in `model.named_parameters()`.
        shape: its shape.
        scheme: what started it.
        intended_std: the std that was intended; None where values come from data or from the library.
        measured_std: the std that it has now, over all entries, around their mean.
        trainable: whether it receives a gradient.
    """

    name: str
    shape: tuple[int, ...]
    scheme: str
    intended_std: float | None
    measured_std: float
    trainable: bool


@dataclass(frozen=True)
class Description:
    """What `describe` found; `str()` of it is a text for a person.

    Attributes:
        model: class of the model.
        sites: its heads.
        parameters: the new parameters.
        new, trainable, frozen: numbers of scalar parameters; the three overlap (new ones are usually trainable).
        frozen_modules: outermost modules whose parameters are all frozen, and the mode that they are in.
        start: ``loss``, ``chance_loss`` (ln K), ``feature_gradient`` and ``logit_std`` on the data; None without data.
        warnings: what is wrong, one sentence each.
        notes: facts from the attachment.
        kept_tensors: number of tensors checked to be untouched at the attachment.
    """

    model: str
    sites: tuple[HeadSite, ...]
    parameters: tuple[ParameterLine, ...]
    new: int
    trainable: int
    frozen: int
    frozen_modules: tuple[tuple[str, str], ...] = ()
    start: Mapping[str, float] | None = None
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    kept_tensors: int = 0
    head: str = field(default="", repr=False)

    def __str__(self) -> str:
        """The description as a text of several lines."""
        lines = [f"{self.model}: {self.head}"]
        for site in self.sites:
            lines.append(
                f"  {site.role} head at {site.path!r}: {site.kind}, {site.in_features} -> {site.out_features}"
                f"{'' if site.bias else ', no bias'}"
            )
        width = max([len(line.name) for line in self.parameters], default=4)
        lines.append(
            f"  {'new parameter':<{width}}  {'shape':<14} {'scheme':<14} {'std intended':>12} {'measured':>10}"
        )
        for line in self.parameters:
            intended = "from values" if line.intended_std is None else f"{line.intended_std:.4g}"
            shape = "x".join(map(str, line.shape))
            state = "" if line.trainable else "  frozen"
            lines.append(
                f"  {line.name:<{max(width, 13)}}  {shape:<14} {line.scheme:<14} {intended:>12} "
                f"{line.measured_std:>10.4g}{state}"
            )
        lines.append(f"  parameters: {self.new:,} new, {self.trainable:,} trainable, {self.frozen:,} frozen")
        if self.kept_tensors:
            lines.append(f"  {self.kept_tensors:,} other tensors were checked to be untouched")
        for path, mode in self.frozen_modules[:_SHOWN]:
            lines.append(f"  frozen: {path} ({mode})")
        if len(self.frozen_modules) > _SHOWN:
            lines.append(f"  frozen: ... {len(self.frozen_modules) - _SHOWN} more modules")
        if self.start:
            lines.append(
                f"  start: loss {self.start['loss']:.4f} (ln K = {self.start['chance_loss']:.4f}), logit std "
                f"{self.start['logit_std']:.3g}, gradient into the features {self.start['feature_gradient']:.3g}"
            )
        lines += [f"  note: {note}" for note in self.notes]
        lines += [f"  WARNING: {warning}" for warning in self.warnings]
        return "\n".join(lines)


def describe(model: nn.Module, data: Any = None, *, max_batches: int = 8) -> Description:
    """What is new in a model, how it was started, what is frozen and how, and what is wrong.

    Args:
        model: a model with a head, attached by headinit or not.
        data: optional pair `(inputs, labels)` or iterable of batches; gives the initial loss against ln K and the
            gradient that reaches the features.
        max_batches: number of batches of `data` to look at.

    Raises:
        HeadError: the model has no head.

    Example:
        >>> from headinit.attach import attach_head
        >>> model = attach_head(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5)), 3, init="zeros")
        >>> print(str(describe(model)).splitlines()[0])
        Sequential: linear head, init=zeros, seed 0
    """
    root = unwrap(model)
    sites = find_head(root)
    record = record_of(root) if has_record(root) else None
    names = record.new_parameters if record else _parameters_of(root, sites)
    parameters = tuple(_line(root, name, record) for name in names)
    start = None if data is None else _measured_start(root, sites[0], record, data, max_batches)
    head = "the head that the model came with"
    if record is not None:
        options = "".join(f", {k}={v}" for k, v in record.init.items() if k != "name")
        pooling = "" if record.pooling in ("native", "none") else f" on {record.pooling} tokens"
        head = f"{record.head} head{pooling}, init={record.init.get('name')}{options}, seed {record.seed}"
    return Description(
        model=type(root).__name__,
        sites=sites,
        parameters=parameters,
        new=sum(root.get_parameter(name).numel() for name in names),
        trainable=sum(p.numel() for p in root.parameters() if p.requires_grad),
        frozen=sum(p.numel() for p in root.parameters() if not p.requires_grad),
        frozen_modules=tuple(_frozen_modules(root)),
        start=start,
        warnings=tuple(_warnings(root, sites, record)),
        notes=record.notes if record else (),
        kept_tensors=record.kept_tensors if record else 0,
        head=head,
    )


def _parameters_of(root: nn.Module, sites: tuple[HeadSite, ...]) -> tuple[str, ...]:
    return tuple(
        f"{site.path}.{name}" for site in sites for name, _ in root.get_submodule(site.path).named_parameters()
    )


def _line(root: nn.Module, name: str, record: HeadRecord | None) -> ParameterLine:
    parameter = root.get_parameter(name)
    std = parameter.detach().float().std(correction=0).item() if parameter.numel() else 0.0
    intended = record.intended_std.get(name) if record else None
    return ParameterLine(name, tuple(parameter.shape), _scheme_of(name, record), intended, std, parameter.requires_grad)


def _scheme_of(name: str, record: HeadRecord | None) -> str:
    if record is None:
        return "unknown"
    if not any(name.startswith(f"{site.path}.") for site in record.sites):
        return "library"
    return "hidden" if ".hidden." in name else str(record.init.get("name"))


def _frozen_modules(root: nn.Module) -> list[tuple[str, str]]:
    """Outermost modules that hold parameters and train none, with the mode in which they run."""
    found: list[tuple[str, str]] = []
    for path, module in root.named_modules():
        if any(path.startswith(f"{outer}.") or not outer for outer, _ in found):
            continue
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            modes = {child.training for child in module.modules()}
            # A module that freezing has pinned goes back to evaluation mode by a hook, whatever mode it is put in.
            held = any("_headinit_held" in vars(child) for child in module.modules())
            mode = "held in evaluation mode" if held else "evaluation mode" if modes == {False} else "training mode"
            found.append((path, mode))
    return [(path or "(whole model)", mode) for path, mode in found]


# --- what is wrong ----------------------------------------------------------------------------------------------------


def _warnings(root: nn.Module, sites: tuple[HeadSite, ...], record: HeadRecord | None) -> list[str]:
    found = []
    if record is not None:
        if not record.pretrained:
            found.append("the backbone's weights are random, not pretrained.")
        frozen = [n for n in record.new_parameters if not root.get_parameter(n).requires_grad]
        if frozen:
            found.append(
                f"{frozen[0]!r} is new and frozen: it stays as random as it is. Unfreeze it, or freeze by "
                "headinit.freeze, which never freezes new parameters."
            )
    elif _unfilled(root, sites):
        names = _unfilled(root, sites)
        found.append(
            f"{names[0]!r} was not filled by the checkpoint and is random"
            f"{', and it is frozen' if not root.get_parameter(names[0]).requires_grad else ''}. Attach a head by "
            "headinit, which counts it as new."
        )
    for site in sites:
        found += _site_warnings(root, site)
    for path, mode in _frozen_modules(root):
        if mode == "training mode" and _drifts(root, path):
            found.append(
                f"{path} is frozen but in training mode: its BatchNorm statistics or dropout still act. Use "
                "headinit.freeze."
            )
    return found


def _unfilled(root: nn.Module, sites: tuple[HeadSite, ...]) -> list[str]:
    """What `from_pretrained` left open, outside the head: transformers marks what it has filled."""
    marks = {name: getattr(p, "_is_hf_initialized", False) for name, p in root.named_parameters()}
    if not any(marks.values()):
        return []
    return [n for n, m in marks.items() if not m and not any(n.startswith(f"{s.path}.") for s in sites)]


def _drifts(root: nn.Module, path: str) -> bool:
    module = root if path == "(whole model)" else root.get_submodule(path)
    return any(
        isinstance(child, nn.modules.batchnorm._BatchNorm | nn.modules.dropout._DropoutNd)
        and child.training
        and getattr(child, "p", 1.0) > 0
        for child in module.modules()
    )


def _site_warnings(root: nn.Module, site: HeadSite) -> list[str]:
    head = root.get_submodule(site.path)
    layer: Any = output_layer(head)
    found: list[str] = []
    weight = getattr(layer, "weight", None)
    if weight is None:
        return found
    if weight.dtype in (torch.float16, torch.bfloat16):
        found.append(
            f"the head at {site.path!r} is {str(weight.dtype).removeprefix('torch.')}: small updates are lost. Use "
            "float32."
        )
    part = hidden_part(head)
    for name, parameter in part.named_parameters() if part is not None else []:
        if parameter.ndim > 1 and not parameter.any():
            found.append(
                f"the hidden layer {site.path}.hidden.{name} is all zeros: its units stay equal for ever. "
                "Re-initialise it."
            )
    bias = getattr(layer, "bias", None)
    if relu_follows(root, site.path) and not weight.any() and (bias is None or bool((bias <= 0).all())):
        found.append(f"the head at {site.path!r} is zero before a ReLU: its gradient is exactly 0, so it never moves.")
    return found


# --- the start, measured ----------------------------------------------------------------------------------------------


def _measured_start(
    root: nn.Module, site: HeadSite, record: HeadRecord | None, data: Any, max_batches: int
) -> dict[str, float]:
    """Mean loss, ln K, std of the logits, and mean norm over examples of the gradient into the features."""
    from headinit.features.extract import as_batches, split_batch

    losses, gradients, spreads = [], [], []
    task = record.task if record else "single_label"
    modes = [(module, module.training) for module in root.modules()]
    root.eval()
    try:
        for batch in islice(as_batches(data, 32), max_batches):
            inputs, labels, _ = split_batch(batch)
            loss, gradient, spread = _one_batch(root, site, inputs, labels, task)
            losses.append(loss)
            gradients.append(gradient)
            spreads.append(spread)
    finally:
        for module, mode in modes:
            module.training = mode
    if not losses:
        raise HeadError("describe was given data without a batch. Leave data out, or give some examples.")
    size = sum(len(loss) for loss in losses)
    chance = math.log(site.out_features) if task in ("single_label", "token") else math.log(2.0)
    return {
        "loss": torch.cat(losses).double().mean().item(),
        "chance_loss": chance if task != "regression" else math.nan,
        "feature_gradient": torch.cat(gradients).double().mean().item(),
        "logit_std": sum(spreads) / len(spreads),
        "examples": float(size),
    }


def _one_batch(root: nn.Module, site: HeadSite, inputs: Any, labels: Tensor, task: str) -> tuple[Tensor, Tensor, float]:
    caught: list[Tensor] = []

    def detach(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        caught.append(args[0].detach().requires_grad_())
        return (caught[-1], *args[1:])

    handle = root.get_submodule(site.path).register_forward_pre_hook(detach)
    try:
        with torch.enable_grad():
            logits = call_model(root, inputs).float()
            losses = example_losses(logits, labels.to(logits.device), task)
            gradient = torch.autograd.grad(losses.sum(), caught[-1])[0]
    finally:
        handle.remove()
    norms = gradient.flatten(1).float().norm(dim=1)
    return losses.detach(), norms, logits.detach().std(correction=0).item()


def example_losses(logits: Tensor, labels: Tensor, task: str) -> Tensor:
    """One loss per example `(B,)`: cross-entropy, binary cross-entropy (mean over labels) or squared error."""
    if task == "regression":
        return F.mse_loss(logits, labels.to(logits.dtype).view(logits.shape), reduction="none").mean(-1)
    if task == "multi_label":
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none").mean(-1)
    if logits.ndim == 3:
        loss = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
        return loss.sum(1) / (labels != -100).sum(1).clamp(min=1)
    return F.cross_entropy(logits, labels, reduction="none")


__all__ = ["Description", "ParameterLine", "describe", "example_losses"]
