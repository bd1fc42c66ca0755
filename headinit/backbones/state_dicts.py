"""State dicts from files: read as data, unwrapped, matched with a model by name and shape."""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headinit.backbones.weights import shards_of
from headinit.errors import WeightsError

# Under which names training scripts store the model's own state dict, the most specific first.
_WRAPPINGS = ("state_dict", "model_state_dict", "model_state", "model", "net", "module", "state_dict_ema", "model_ema")
_COUNTER = "num_batches_tracked"


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file by name, unwrapped; no code in the file is ever run.

    Args:
        path: ``.safetensors``, anything that ``torch.save`` wrote, or the index of a sharded checkpoint.

    Raises:
        WeightsError: the file is damaged, holds pickled code, or holds no state dict.
    """
    if path.name.endswith(".index.json"):
        state: dict[str, Tensor] = {}
        for shard in shards_of(path):
            state.update(read_state_dict(shard))
        return state
    raw = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    return _without_prefixes(_innermost(raw, path))


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise WeightsError(
            f"The weights file {path} is damaged or not a safetensors file ({error}). Fetch it again."
        ) from error


def _read_pickle(path: Path) -> Any:
    try:
        # timm's training script stores its argparse.Namespace beside the weights; it holds settings, no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"(?:GLOBAL|global:?)\s+([\w.]+\.\w+)", str(error))
        if refused is None:
            raise WeightsError(f"The weights file {path} is damaged ({_first_line(error)}). Fetch it again.") from error
        raise WeightsError(
            f"The weights file {path} holds pickled code or objects ({refused.group(1)}), not only tensors; nothing "
            "in it was run. Where you trust it, save its state dict again: "
            "safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')."
        ) from error
    except Exception as error:  # a damaged file fails in as many ways as there are bytes
        raise WeightsError(
            f"The weights file {path} is damaged or not written by torch.save ({_first_line(error)}). Fetch it again."
        ) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _innermost(raw: Any, path: Path) -> dict[str, Tensor]:
    """The state dict inside what training scripts wrap it in."""
    for _ in range(4):
        if not isinstance(raw, Mapping):
            break
        tensors = {str(key): value for key, value in raw.items() if isinstance(value, Tensor)}
        if tensors:
            return tensors
        inner = next((raw[key] for key in _WRAPPINGS if isinstance(raw.get(key), Mapping)), None)
        if inner is None:
            break
        raw = inner
    found = f"a mapping with the keys {sorted(map(str, raw))[:6]}" if isinstance(raw, Mapping) else type(raw).__name__
    raise WeightsError(
        f"The weights file {path} holds no state dict (found {found}). Expected names with tensors, plain or under one "
        f"of {', '.join(_WRAPPINGS)}."
    )


def _without_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undo what DistributedDataParallel and torch.compile put before, and inside, names; take MoCo's encoder out."""
    state = {name.replace("_orig_mod.", ""): value for name, value in state.items()}
    while state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    if any(name.startswith("encoder_q.") for name in state):  # beside its key encoder and queue; fc is the projection
        own = {name.removeprefix("encoder_q."): value for name, value in state.items() if name.startswith("encoder_q.")}
        return {name: value for name, value in own.items() if not name.startswith("fc.")}
    return state


def align_prefix(state: Mapping[str, Tensor], wanted: Iterable[str]) -> dict[str, Tensor]:
    """Drop the prefix ``model.`` or ``backbone.`` that a training framework's own module adds to every name.

    It is dropped only where the model has no such names itself and the shorter ones are its own.

    Example:
        >>> align_prefix({"model.fc.bias": torch.zeros(2)}, ["fc.bias"])
        {'fc.bias': tensor([0., 0.])}
    """
    names = set(wanted)
    for prefix in ("model.", "backbone.", "net."):
        if any(name.startswith(prefix) for name in names):
            continue
        if state and all(name.startswith(prefix) for name in state):
            short = {name.removeprefix(prefix): value for name, value in state.items()}
            if names & set(short):
                return short
    return dict(state)


def require_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse weights that hold NaN or infinity: training on them fails much later, for no visible reason.

    Raises:
        WeightsError: names the first such tensor and how many values are bad.
    """
    for name, value in tensors.items():
        # NaN and infinity survive in a sum, which is several times as quick; a finite overflow is told apart after.
        if not value.is_floating_point() or bool(torch.isfinite(value.sum(dtype=torch.float32))):
            continue
        bad = int((~torch.isfinite(value)).sum())
        if bad:
            raise WeightsError(f"The weights file {path} is damaged: {name} holds {bad} values that are not finite.")


def classifier_paths(model: nn.Module, num_classes: int | None, declared: Sequence[str] = ()) -> tuple[str, ...]:
    """Dotted paths of the modules that make logits: those the library declares, and every Linear or Conv2d as wide
    as there are classes (ImageNet's 1,000 is no hidden width of any model in the registries).
    """
    wide = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and module.weight.shape[0] == num_classes
    ]
    return tuple(dict.fromkeys([*declared, *wide]))


def fill(model: nn.Module, state: Mapping[str, Tensor], classifiers: Sequence[str], path: Path) -> tuple[str, ...]:
    """Copy a state dict into a model by name and shape; only a classifier may stay as it was.

    Args:
        model: changed in place; its dtype is kept, whatever that of the file.
        state: tensors by name.
        classifiers: dotted paths of the modules that may differ.
        path: the file, for messages.

    Returns:
        The names in the model's state dict that were not filled.

    Raises:
        WeightsError: any other name is missing, unexpected or of another shape. The model is unchanged then.
    """
    missing, unexpected, mismatched = compare_names(model, state)
    prefixes = tuple(f"{name}." for name in classifiers)
    wrong = [name for name in (*missing, *unexpected, *mismatched) if not name.startswith(prefixes)]
    if wrong:
        raise WeightsError(describe_mismatch(model, state, path))
    require_finite(state, path)
    usable = {name: value for name, value in state.items() if name not in (*unexpected, *mismatched)}
    model.load_state_dict(usable, strict=False)
    return tuple(sorted({*missing, *mismatched}))


def compare_names(model: nn.Module, state: Mapping[str, Tensor]) -> tuple[list[str], list[str], list[str]]:
    """Names that only the model has, that only the state dict has, and those of another shape.

    BatchNorm's step counters are left out: files older than torch 0.4.1 have none, and nothing reads them.
    """
    target = model.state_dict()
    missing = [name for name in target if name not in state and not name.endswith(_COUNTER)]
    unexpected = [name for name in state if name not in target and not name.endswith(_COUNTER)]
    mismatched = [name for name in state if name in target and state[name].shape != target[name].shape]
    return missing, unexpected, mismatched


def describe_mismatch(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> str:
    """Why a file does not fit an architecture: counts and the first few names of each kind."""
    target = model.state_dict()
    missing, unexpected, mismatched = compare_names(model, state)
    parts = [
        f"{len(missing)} of {len(target)} names missing{_few(missing)}",
        f"{len(unexpected)} unexpected{_few(unexpected)}",
    ]
    if mismatched:
        name = mismatched[0]
        shapes = f"{name}: {tuple(state[name].shape)} in the file, {tuple(target[name].shape)} in the model"
        parts.append(f"{len(mismatched)} of another shape ({shapes})")
    return (
        f"The weights file {path} does not fit {type(model).__name__}: {'; '.join(parts)}. Only the classifier may "
        "differ. Name the architecture that the file was saved from, or another file."
    )


def _few(names: Sequence[str]) -> str:
    if not names:
        return ""
    return f" ({', '.join(list(names)[:3])}{', ...' if len(names) > 3 else ''})"


def rename_lite0(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's names for the bundled EfficientNet-Lite0, whose file numbers its 16 blocks in one row.

    timm groups them in stages, and numbers the norms of a block from 1 in the order in which they are used.
    A file that has timm's names already comes back as it is.

    Example:
        >>> list(rename_lite0({"_blocks.1._expand_conv.weight": 0, "_bn1.bias": 0, "_fc.bias": 0}))
        ['blocks.1.0.conv_pw.weight', 'bn2.bias', 'classifier.bias']
    """
    if not any(name.startswith("_") for name in state):
        return dict(state)
    places = [(stage, block) for stage, depth in enumerate((1, 2, 2, 3, 3, 4, 1)) for block in range(depth)]
    return {_lite0_name(name, places): value for name, value in state.items()}


_LITE0_OUTER = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_LITE0_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
# The first block does not expand: it has two convolutions and two norms.
_LITE0_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}


def _lite0_name(name: str, places: Sequence[tuple[int, int]]) -> str:
    outer, *rest = name.split(".")
    if outer != "_blocks":
        return ".".join([_LITE0_OUTER.get(outer, outer), *rest])
    number, part, *leaf = rest
    stage, block = places[int(number)]
    names = _LITE0_FIRST if int(number) == 0 else _LITE0_BLOCK
    return ".".join(["blocks", str(stage), str(block), names.get(part, part), *leaf])
