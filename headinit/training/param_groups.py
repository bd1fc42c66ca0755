"""Optimizer groups with absolute learning rates: the head at its own, the backbone at a lower one or one by depth."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from headinit.errors import ConfigError, TrainingError
from headinit.heads.record import has_record, is_adapted, record_of, unwrap
from headinit.training.depth import parameter_depths
from headinit.training.freezing import is_norm

BACKBONE_SHARE = 0.1
"""Backbone learning rate as a share of the head's where none is given: Long et al. (2015), "Learning Transferable
Features with Deep Adaptation Networks", train the new classifier at 10 times the rate of the pretrained layers, and
transfer-learning libraries (TLlib) have kept that ratio."""

FINISHED_START_SHARE = 0.01
"""The same for AdamW in a network for pictures whose head is finished: computed from data, or probed. Adam moves a
weight by the rate however small its gradient is, so that a tenth takes the features away from a head with little left
to learn; SGD does not (docs/choosing.md has the measurement)."""

# Raw parameters that are tokens or positions: decaying them pulls the input of every layer towards zero.
_TOKEN = re.compile(
    r"(^|\.)(cls_token|class_token|dist_token|mask_token|reg_token|pos_embed\w*|position_embeddings?"
    r"|distillation_token|relative_position_bias_table|rel_pos\w*)$"
)

# What PEFT puts into the names of a model that it wraps; it trains its own copy of a module in `modules_to_save`.
_PEFT = re.compile(r"^base_model\.model\.|(?<=\.)modules_to_save\.[^.]+\.")


def param_groups(
    model: nn.Module,
    *,
    lr: float,
    backbone_lr: float | None = None,
    layer_decay: float | None = None,
    weight_decay: float = 0.0,
    optimizer: str = "adamw",
) -> list[dict[str, Any]]:
    """Groups for any `torch.optim` optimizer, holding every trainable parameter exactly once.

    The deepest block trains at `backbone_lr`, the block below at ``backbone_lr * layer_decay``, and so on down to the
    embeddings (Howard and Ruder, 2018; Clark et al., 2020). Biases, norms, other 1-D parameters, position and class
    tokens, and what timm lists in `no_weight_decay()` are not decayed.

    Args:
        model: a model with a head attached. Without a record of a head, every parameter counts as head.
        lr: learning rate of the new parameters.
        backbone_lr: learning rate of the pretrained ones; None for the share of `lr` that `backbone_share` says.
        layer_decay: factor in (0, 1] from one block to the one below; None for the same rate everywhere.
        weight_decay: of the parameters that are decayed.
        optimizer: what the groups are for, ``"adamw"`` or ``"sgd"``; matters where `backbone_lr` is None.

    Returns:
        Groups with ``params``, ``lr``, ``weight_decay`` and ``name``: ``"head"``, ``"backbone"`` or
        ``"backbone/<depth>"``, each also with ``"/no_decay"``.

    Raises:
        TrainingError: nothing is trainable.
        ConfigError: a rate out of range, or one for the backbone of a model whose head is not recorded.

    Example:
        >>> head = nn.Linear(4, 2)
        >>> [(g["name"], g["lr"], g["weight_decay"]) for g in param_groups(head, lr=1e-3, weight_decay=0.01)]
        [('head', 0.001, 0.01), ('head/no_decay', 0.001, 0.0)]
    """
    bare = unwrap(model)
    _check_rates(bare, lr, backbone_lr, layer_decay, weight_decay)
    backbone_lr = backbone_share(bare, optimizer) * lr if backbone_lr is None else backbone_lr
    trainable = [(name, parameter) for name, parameter in bare.named_parameters() if parameter.requires_grad]
    if not trainable:
        raise TrainingError(
            f"None of the {sum(1 for _ in bare.parameters())} parameters of {type(bare).__name__} is trainable. "
            "Attach a head, or freeze less."
        )
    new = _new_names(bare)
    depths = parameter_depths(bare, new) if layer_decay is not None else None
    undecayed = _undecayed_names(bare)
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in trainable:
        group, rate = "head", lr
        if name not in new:
            group, rate = "backbone", backbone_lr
        if depths is not None and name in depths.of and layer_decay is not None:
            depth = depths.of[name]
            group, rate = f"backbone/{depth:02d}", backbone_lr * layer_decay ** (depths.count - depth)
        decay = 0.0 if name in undecayed or parameter.ndim <= 1 else weight_decay
        group = f"{group}/no_decay" if name in undecayed or parameter.ndim <= 1 else group
        entry = groups.setdefault(group, {"params": [], "lr": rate, "weight_decay": decay, "name": group})
        entry["params"].append(parameter)
    return [groups[name] for name in sorted(groups, key=lambda n: (n.startswith("head"), n))]


def backbone_share(model: nn.Module, optimizer: str = "adamw", *, probed: bool = False) -> float:
    """The learning rate of pretrained layers, as a share of the head's, where none is given.

    Args:
        model: with or without a head of headinit's.
        optimizer: ``"adamw"`` or ``"sgd"``.
        probed: whether the head has been trained before.

    Returns:
        .1; with AdamW, in a network for pictures (one with two-dimensional convolutions) whose head was computed from
        data or probed, .01. Adapters that PEFT put into it are not pretrained: they get .1.

    Example:
        >>> backbone_share(nn.Linear(4, 2))
        0.1
    """
    bare = unwrap(model)
    if optimizer != "adamw" or is_adapted(bare) or not has_record(bare):
        return BACKBONE_SHARE
    finished = (probed or record_of(bare).from_data) and record_of(bare).pretrained
    pictures = any(isinstance(module, nn.Conv2d) for module in bare.modules())
    return FINISHED_START_SHARE if finished and pictures else BACKBONE_SHARE


def _check_rates(
    model: nn.Module, lr: float, backbone_lr: float | None, layer_decay: float | None, weight_decay: float
) -> None:
    for what, value in (("lr", lr), ("backbone_lr", backbone_lr), ("weight_decay", weight_decay)):
        if value is not None and not 0 <= value < float("inf"):
            raise ConfigError(f"{what} is {value}. Give a finite number from 0 on.")
    if layer_decay is not None and not 0 < layer_decay <= 1:
        raise ConfigError(f"layer_decay is {layer_decay}. Give a factor above 0 and up to 1, such as 0.75.")
    if not has_record(model) and (backbone_lr is not None or layer_decay is not None):
        raise ConfigError(
            f"backbone_lr and layer_decay need to know which parameters of {type(model).__name__} are new, and "
            "headinit has attached no head to it. Call headinit.attach_head first, or leave both out."
        )


def _new_names(model: nn.Module) -> set[str]:
    """Names, as `named_parameters` gives them, of the new parameters; all of them where there is no record."""
    if not has_record(model):
        return {name for name, _ in model.named_parameters()}
    recorded = set(record_of(model).new_parameters)
    new = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if _PEFT.sub("", name) in recorded}
    return {name for name, parameter in model.named_parameters() if id(parameter) in new}


def _undecayed_names(model: nn.Module) -> set[str]:
    """Parameters without weight decay, whatever their shape; 1-D ones are left out too."""
    norms = {path for path, module in model.named_modules() if is_norm(module)}
    listed = set()
    for prefix, owner in (("", model), ("backbone.", getattr(model, "backbone", None))):
        ask = getattr(owner, "no_weight_decay", None)
        listed |= {f"{prefix}{name}" for name in ask()} if callable(ask) else set()
    return {
        name
        for name, _ in model.named_parameters()
        if name in listed or name.endswith("bias") or name.rpartition(".")[0] in norms or _TOKEN.search(name)
    }
