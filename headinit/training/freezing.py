"""Freezing that holds: gradient, normalisation statistics and dropout of the frozen part are pinned together.

A frozen module is kept in evaluation mode by a forward hook that is a function of this file, so that it survives
`model.train()`, copying, pickling, DistributedDataParallel, `torch.compile` and trainers written by others.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from headinit.errors import HeadError, TrainingError, unknown_name
from headinit.heads.record import has_record, is_adapted, record_of, unwrap
from headinit.training.depth import parameter_depths

_STATE = "headinit_freeze"
_HELD = "_headinit_held"
_NORM_NAME = re.compile(r"norm|affine|FilterResponse|^Evo", re.IGNORECASE)


def freeze(model: nn.Module, policy: str | int | Sequence[str], *, norm: str | None = None) -> nn.Module:
    """Freeze a part of the pretrained network; new parameters are never frozen.

    What is frozen keeps its parameters (no gradient), its normalisation statistics and its output (no dropout, no
    stochastic depth), whatever mode the model is put in. Another call replaces the policy.

    Args:
        model: a model with a head attached; policies ``"none"``, ``"norm"`` and patterns also take any `nn.Module`.
        policy:

            - ``"all"``: everything but the new parameters. Every module outside the new ones runs in evaluation mode.
            - ``"none"``: nothing.
            - ``"norm"``: the normalisation layers alone: their weights and statistics stay, all else trains.
            - an integer k: all but the last k stages, what follows them, and the new parameters. Embeddings and stem
              are no stage. What acts before the first trainable stage runs in evaluation mode.
            - patterns: parameters whose names match are frozen: globs (``"layer1.*"``), module paths
              (``"bert.embeddings"``) or, if a pattern matches nothing that way, regular expressions.
        norm: ``"eval"`` also holds the statistics of the BatchNorm layers that train (those of a new head excepted);
            ``"train"`` or None lets them move.

    Returns:
        The model.

    Raises:
        HeadError: the policy does not fit the model: no record of new parameters, too many stages, a pattern that
            matches nothing.
        TrainingError: the model is already wrapped in DistributedDataParallel, which fixes what it synchronises, or it
            holds adapters of PEFT, which freezes what it does not train.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        >>> [name for name, p in freeze(model, ["0", "1"]).named_parameters() if p.requires_grad]
        ['2.weight', '2.bias']
        >>> _ = model.train()(torch.randn(8, 4))
        >>> model[1].training, model[1].running_mean.abs().sum().item()
        (False, 0.0)
    """
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise TrainingError(
            f"Cannot freeze a model inside {type(model).__name__}: it has fixed which gradients it synchronises. "
            "Call freeze on the bare model, then wrap it."
        )
    bare = unwrap(model)
    _refuse_adapters(bare)
    if norm not in (None, "eval", "train"):
        raise unknown_name("freeze.norm", norm, ("eval", "train"))
    if policy == "norm" and norm == "train":
        raise HeadError(
            "freeze('norm') holds the normalisation layers, norm='train' lets them move: drop one of the two."
        )
    frozen = _frozen_names(bare, policy)
    held = _held_modules(bare, frozen, policy, norm)
    _release(bare)
    pinned = _pin(bare, frozen, held)
    asked = policy if isinstance(policy, str | int) else list(policy)
    setattr(bare, _STATE, {"policy": asked, "norm": norm, "parameters": pinned})
    if bare is not model:
        torch.compiler.reset()  # a compiled graph does not look again at hooks or at requires_grad
    return model


def _refuse_adapters(model: nn.Module) -> None:
    """PEFT has decided what trains, under names of its own: freezing afterwards would freeze adapters and head."""
    path = next((path for path, module in model.named_modules() if is_adapted(module)), None)
    if path is not None:
        raise TrainingError(
            f"Cannot freeze {type(model).__name__}: PEFT's adapters are in it ({path or 'the model itself'}), and PEFT "
            "has frozen all else. Call headinit.freeze(model, ...) first, then get_peft_model(model, "
            "LoraConfig(..., modules_to_save=list(record_of(model).new_modules)))."
        )


def freeze_state(model: nn.Module) -> dict[str, Any] | None:
    """What `freeze` was last asked for: ``{"policy", "norm", "parameters"}`` (JSON values), or None.

    Example:
        >>> freeze_state(freeze(nn.Linear(2, 2), "none"))
        {'policy': 'none', 'norm': None, 'parameters': []}
    """
    return getattr(unwrap(model), _STATE, None)


def frozen_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and value of everything that must not change: parameters without gradient, buffers of held modules."""
    bare = unwrap(model)
    for name, parameter in bare.named_parameters():
        if not parameter.requires_grad:
            yield name, parameter.detach()
    for path, module in bare.named_modules():
        if _HELD in vars(module):
            for name, buffer in module.named_buffers(prefix=path, recurse=False):
                yield name, buffer


def frozen_digest(model: nn.Module) -> str:
    """SHA-256 over the names, types, shapes and bytes of the frozen parameters and the buffers of the frozen part.

    Equal before and after training, or the frozen part was not frozen.

    Example:
        >>> model = freeze(nn.Linear(2, 2), ["*"])
        >>> before = frozen_digest(model)
        >>> before == frozen_digest(model.train())
        True
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(frozen_tensors(model)):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name}\x00{values.dtype}\x00{tuple(values.shape)}\x00".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def frozen_summary(model: nn.Module) -> dict[str, Any]:
    """What is frozen, in numbers that a report can show.

    Returns:
        ``policy`` and ``norm`` as asked (None without `freeze`), ``frozen``, ``trainable`` and ``new``: counts of
        parameter values (new ones count as trainable too), ``held_modules``: modules kept in evaluation mode.

    Example:
        >>> summary = frozen_summary(freeze(nn.Linear(2, 2), ["weight"]))
        >>> summary["frozen"], summary["trainable"]
        (4, 2)
    """
    bare = unwrap(model)
    state = freeze_state(bare) or {"policy": None, "norm": None}
    new = set(record_of(bare).new_parameters) if has_record(bare) else set()
    sizes = [(name, p.numel(), p.requires_grad) for name, p in bare.named_parameters()]
    return {
        "policy": state["policy"],
        "norm": state["norm"],
        "frozen": sum(n for _, n, trains in sizes if not trains),
        "trainable": sum(n for _, n, trains in sizes if trains),
        "new": sum(n for name, n, _ in sizes if name in new),
        "held_modules": sum(_HELD in vars(module) for module in bare.modules()),
    }


def _frozen_names(model: nn.Module, policy: str | int | Sequence[str]) -> list[str]:
    """Names of the parameters that the policy freezes, in the model's order."""
    if isinstance(policy, str) and policy not in ("all", "none", "norm"):
        raise unknown_name("freeze policy", policy, ("all", "none", "norm", "<number of stages>", "<list of patterns>"))
    if policy == "none":
        return []
    kept = _new_parameters(model, required=isinstance(policy, int) or policy == "all")
    candidates = [name for name, parameter in model.named_parameters() if id(parameter) not in kept]
    if policy == "all":
        return candidates
    if policy == "norm":
        return _norm_parameters(model, candidates)
    if isinstance(policy, int):
        return _early_parameters(model, candidates, policy)
    return _matching(candidates, [name for name, _ in model.named_parameters()], policy)


def _new_parameters(model: nn.Module, required: bool) -> set[int]:
    """Identities of the new parameters: a tied parameter is new under all of its names."""
    if not required and not has_record(model):
        return set()
    names = set(record_of(model).new_parameters)
    return {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in names}


def _early_parameters(model: nn.Module, candidates: list[str], stages: int) -> list[str]:
    if isinstance(stages, bool) or stages < 0:
        raise HeadError(f"freeze was asked to leave {stages!r} stages trainable. Give a whole number from 0 on.")
    new = {name for name, _ in model.named_parameters()} - set(candidates)
    depths = parameter_depths(model, new, coarse=True)
    if stages > depths.count:
        raise HeadError(
            f"freeze was asked to leave the last {stages} stages trainable, but {type(model).__name__} has "
            f"{depths.count}. Give a number from 0 to {depths.count}, or freeze='none'."
        )
    return [name for name in candidates if depths.of[name] <= depths.count - stages]


def _norm_parameters(model: nn.Module, candidates: list[str]) -> list[str]:
    owners = {path for path, module in model.named_modules() if is_norm(module)}
    return [name for name in candidates if name.rpartition(".")[0] in owners]


def is_norm(module: nn.Module) -> bool:
    """Normalisation layers of torch, and those of timm and transformers, which are known by the name of their class."""
    if isinstance(module, _STATISTICS | nn.LayerNorm | nn.GroupNorm | nn.RMSNorm):
        return True
    own = any(True for _ in module.parameters(recurse=False)) or any(True for _ in module.buffers(recurse=False))
    inner = any(True for child in module.children() for _ in child.parameters())
    return own and not inner and bool(_NORM_NAME.search(type(module).__name__))


_STATISTICS = nn.modules.batchnorm._BatchNorm | nn.modules.instancenorm._InstanceNorm


def _has_statistics(module: nn.Module) -> bool:
    """Whether a normalisation layer keeps running statistics (SyncBatchNorm and timm's BatchNormAct2d included)."""
    return is_norm(module) and any(name.startswith("running_") for name, _ in module.named_buffers(recurse=False))


def _matching(candidates: list[str], all_names: list[str], patterns: Sequence[str]) -> list[str]:
    matched: set[str] = set()
    for pattern in patterns:
        found = _matches(pattern, all_names)
        if not found:
            modules = {name.rpartition(".")[0] for name in all_names} - {""}
            near = get_close_matches(pattern, [*all_names, *sorted(modules)], n=5, cutoff=0.4) or all_names[:5]
            raise HeadError(
                f"The freeze pattern {pattern!r} matches none of the {len(all_names)} parameters. "
                f"Near names: {', '.join(near)}."
            )
        matched.update(found)
    return [name for name in candidates if name in matched]


def _matches(pattern: str, names: list[str]) -> list[str]:
    found = [name for name in names if fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")]
    if found:
        return found
    try:
        return [name for name in names if re.fullmatch(pattern, name)]
    except re.error:
        return []


def _held_modules(model: nn.Module, frozen: list[str], policy: Any, norm: str | None) -> list[str]:
    """Paths of the modules that must run in evaluation mode."""
    prefixes = tuple(record_of(model).new_modules) if has_record(model) else ()
    outside = [
        (path, module)
        for path, module in model.named_modules()
        if not any(path == prefix or path.startswith(f"{prefix}.") for prefix in prefixes)
    ]
    held = set() if norm != "eval" else {path for path, module in outside if _has_statistics(module)}
    if policy == "norm":
        return [path for path, module in outside if path in held or is_norm(module)]
    if policy != "none":
        held |= _frozen_modules(model, outside, frozen, policy)
    return [path for path, _ in outside if path in held]


def _frozen_modules(model: nn.Module, outside: list[tuple[str, nn.Module]], frozen: list[str], policy: Any) -> set[str]:
    """Modules all of whose pretrained parameters are frozen, with the dropout and pooling modules that go with them.

    For a number of stages, also the modules that hold frozen and trainable stages (their own randomness, such as
    dropping whole layers, would reach the frozen ones), and what acts before the first trainable stage.
    """
    named = dict(model.named_parameters())
    pinned = {id(named[name]) for name in frozen}
    new = _new_parameters(model, required=False)
    earlier = set((freeze_state(model) or {"parameters": []})["parameters"])
    trainable = {id(p) for name, p in named.items() if p.requires_grad or name in earlier}
    trains = trainable - pinned - new
    held: set[str] = set()
    reached = False  # the first trainable stage, in the order in which modules were registered
    for path, module in outside:
        ids = {id(p) for p in module.parameters()} - new
        reached = reached or any(id(p) in trains for p in module.parameters(recurse=False))
        parent_held = path.rpartition(".")[0] in held and path != ""
        if ids:
            mixed = isinstance(policy, int) and bool(ids & pinned)
            hold = not ids & trains or mixed
        elif isinstance(policy, int):
            hold = not reached or (parent_held and not _subtree_trains(model, path, trains))
        else:
            hold = policy == "all" or parent_held
        if hold:
            held.add(path)
    return held


def _subtree_trains(model: nn.Module, path: str, trains: set[int]) -> bool:
    parent = model.get_submodule(path.rpartition(".")[0])
    return any(id(p) in trains for p in parent.parameters())


def _pin(model: nn.Module, frozen: list[str], held: list[str]) -> list[str]:
    """Freeze; returns the names of the parameters that were trainable before, which a release must give back."""
    named = dict(model.named_parameters())
    pinned = [name for name in frozen if named[name].requires_grad]
    for name in frozen:
        named[name].grad = None  # an optimizer would go on moving a parameter that still holds a gradient
        named[name].requires_grad_(False)
    for path in held:
        module = model.get_submodule(path)
        setattr(module, _HELD, module.training)
        module.training = False
    for path in {"", *held} if held else ():
        # Before other hooks: the old spectral norm, itself a hook, also asks whether it is training.
        model.get_submodule(path).register_forward_pre_hook(_keep_in_eval, prepend=True)
    return pinned


def _release(model: nn.Module) -> None:
    """Undo the earlier policy: hooks, modes and gradients as they were."""
    for module in model.modules():
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is _keep_in_eval]:
            del hooks[key]
        if _HELD in vars(module):
            module.training = getattr(module, _HELD)
            delattr(module, _HELD)
    named = dict(model.named_parameters())
    for name in (freeze_state(model) or {"parameters": []})["parameters"]:
        if name in named:  # a head replaced since then may have taken some away
            named[name].requires_grad_(True)


def _keep_in_eval(module: nn.Module, _: tuple[Any, ...]) -> None:
    """Forward hook: put the held modules below back into evaluation mode if somebody called `train()`."""
    if module.training:
        for part in module.modules():
            if _HELD in vars(part):
                part.training = False


_keep_in_eval.idle_in_evaluation = True  # type: ignore[attr-defined]  # read by features.acceleration
