"""A model with its head on disk: safetensors and JSON, digests, nothing that is run when it is read.

A folder holds ``headinit.json`` (format version, digests of all files, record, preprocessing) and the weights. A linear
head in the model's own class is written as its library writes it, so that `from_pretrained` and timm's `create_model`
read the folder too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor, nn

from headinit.errors import CheckpointError, HeadInitError
from headinit.heads.locate import library_of
from headinit.heads.pooled import HeadedBackbone
from headinit.heads.record import HeadRecord, HeadSite, is_adapted, record_of, set_record, unwrap

FORMAT = 1
MANIFEST = "headinit.json"
_NATIVE_WEIGHTS = "model.safetensors"
_OWN_WEIGHTS = "headinit.safetensors"  # another name, so that no library takes it for a checkpoint it understands
_TOKENIZER = "tokenizer"
_MANIFEST_LIMIT = 64 * 2**20


# --- save -------------------------------------------------------------------------------------------------------------


def save(model: nn.Module, folder: str | os.PathLike, *, preprocessing: Any = None) -> Path:
    """Write a model with its head to a folder, all of it or nothing.

    Args:
        model: a model with a head attached by headinit.
        folder: where to; an earlier headinit model there is replaced, anything else is left alone and refused.
        preprocessing: an `ImagePreprocessing` or `TextPreprocessing`; by default the one that the model was loaded
            with.

    Raises:
        HeadError: the model has no head attached by headinit.
        CheckpointError: the folder holds something else, or cannot be written; or PEFT's adapters are around the model.

    Example:
        >>> from headinit.attach import attach_head
        >>> model = attach_head(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 5)), 3)
        >>> with tempfile.TemporaryDirectory() as place:
        ...     path = save(model, Path(place) / "model")
        ...     copy = load(path, model=nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 5)))
        >>> torch.equal(copy(torch.ones(1, 4)), model(torch.ones(1, 4)))
        True
    """
    root, target = unwrap(model), Path(folder)
    record = record_of(root)
    if is_adapted(root):
        raise CheckpointError(
            "The model is inside PEFT's adapters, which headinit.load cannot build again: save "
            "model.merge_and_unload(), or keep the adapters with the model's own save_pretrained."
        )
    if preprocessing is None:
        preprocessing = getattr(root, "headinit_preprocessing", None)
    _refuse_foreign(target)
    from safetensors import SafetensorError  # what a full disk is to safetensors

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise CheckpointError(f"Cannot write the model to {target}: {error}") from error
    try:
        manifest = _write_files(root, record, preprocessing, staging)
        manifest["files"] = {name: _digest(staging / name) for name in _files_in(staging)}
        (staging / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True), encoding="utf-8")
        _swap_in(staging, target)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"Cannot write the model to {target}: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def _refuse_foreign(target: Path) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise CheckpointError(f"Cannot save to {target}: it is not a folder. Name a new one.")
    if target.is_dir() and any(target.iterdir()) and not (target / MANIFEST).is_file():
        raise CheckpointError(
            f"Cannot save to {target}: it holds files that headinit did not write. Name a new folder."
        )


def _write_files(root: nn.Module, record: HeadRecord, preprocessing: Any, staging: Path) -> dict[str, Any]:
    from headinit import __version__

    native = record.head == "linear" and record.pooling == "native" and not record.head_options.get("dropout")
    library = library_of(root.backbone if isinstance(root, HeadedBackbone) else root)  # type: ignore[arg-type]
    aliases: dict[str, str] = {}
    if native and library == "transformers":
        from headinit.backbones.load import quiet_transformers

        with quiet_transformers():
            root.save_pretrained(staging)  # type: ignore[operator]
    else:
        aliases = _write_weights(root, staging / (_NATIVE_WEIGHTS if native else _OWN_WEIGHTS))
        if native and library == "timm":
            _write_timm_config(root, record, staging)
    return {
        "format": FORMAT,
        "headinit": __version__,
        "library": library,
        "native": native,
        "architecture": _architecture(root, record, library),
        "aliases": aliases,
        "record": _record_to_json(record),
        "preprocessing": _write_preprocessing(preprocessing, staging),
        "freeze": _plain(getattr(root, "headinit_freeze", None)),
    }


def _write_weights(root: nn.Module, path: Path) -> dict[str, str]:
    """The state dict; of tensors that share memory one is written, and the others are named as aliases."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}
    for name, tensor in root.state_dict().items():
        key = (tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()))
        if tensor.numel() and key in first:
            aliases[name] = first[key]
            continue
        first[key] = name
        tensors[name] = tensor.detach().contiguous().clone() if tensor.is_inference() else tensor.detach().contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    return aliases


def _write_timm_config(root: Any, record: HeadRecord, staging: Path) -> None:
    """timm's own config.json, which `create_model("local-dir:FOLDER")` reads."""
    cfg = getattr(root, "pretrained_cfg", None)
    if not isinstance(cfg, Mapping) or not cfg.get("architecture"):
        return
    kept = {key: value for key, value in cfg.items() if key not in ("state_dict", "file", "url", "hf_hub_id")}
    config = {
        "architecture": cfg["architecture"],
        "num_classes": record.num_classes,
        "num_features": getattr(root, "num_features", None),
        "label_names": list(record.class_names) if record.class_names else None,
        "pretrained_cfg": {**_plain(kept), "num_classes": record.num_classes},
    }
    (staging / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _architecture(root: nn.Module, record: HeadRecord, library: str) -> dict[str, Any] | None:
    """What rebuilds the model without weights; None if only the user can."""
    if library == "transformers":
        inner: Any = root.backbone if isinstance(root, HeadedBackbone) else root
        config = json.loads(inner.config.to_json_string(use_diff=False))
        return {"library": library, "class": type(inner).__name__, "module": type(inner).__module__, "config": config}
    if record.source is not None:
        return _plain(dict(record.source))
    inner = root.backbone if isinstance(root, HeadedBackbone) else root
    cfg = getattr(inner, "pretrained_cfg", None)
    if isinstance(cfg, Mapping) and cfg.get("architecture"):
        return {"library": "timm", "name": cfg["architecture"], "options": {}}
    return None


def _record_to_json(record: HeadRecord) -> dict[str, Any]:
    return _plain(dataclasses.asdict(record))


def _plain(value: Any) -> Any:
    """A value as JSON can hold it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return str(value)


def _write_preprocessing(preprocessing: Any, staging: Path) -> dict[str, Any] | None:
    if preprocessing is None:
        return None
    tokenizer = getattr(preprocessing, "tokenizer", None)
    if tokenizer is not None:
        tokenizer.save_pretrained(staging / _TOKENIZER)
    kind = "text" if tokenizer is not None else "image"
    return {"kind": kind, **_plain(preprocessing.to_dict())}


def _files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _digest(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return {"sha256": digest.hexdigest(), "bytes": path.stat().st_size}


def _swap_in(staging: Path, target: Path) -> None:
    """Rename into place; an earlier model steps aside first and is removed only after that."""
    os.chmod(staging, 0o755)
    if not target.exists():
        os.rename(staging, target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
    os.rename(target, aside / "old")
    try:
        os.rename(staging, target)
    except OSError:
        os.rename(aside / "old", target)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


# --- load -------------------------------------------------------------------------------------------------------------


def load(folder: str | os.PathLike, *, model: nn.Module | None = None) -> nn.Module:
    """Rebuild a saved model: backbone, head, record and preprocessing, in evaluation mode.

    Every file is checked against its digest first, nothing outside the folder is read, and no code in it is run.

    Args:
        folder: what `save` wrote.
        model: the architecture with any weights, for a model that is neither of timm, torchvision by name, nor of
            transformers; it is changed in place.

    Returns:
        The model. `record_of(model)` has its class names, `preprocessing_of(model)` how to prepare inputs.

    Raises:
        CheckpointError: the folder is damaged, was changed, climbs out of itself, holds anything but safetensors, or is
            of a newer format.
    """
    place = Path(folder)
    manifest = read_manifest(place)
    record = _record_from_json(manifest)
    try:
        root = _rebuild(manifest, record, model, place)
    except CheckpointError:
        raise
    except HeadInitError as error:
        raise CheckpointError(f"Cannot rebuild the model in {place}: {error}") from error
    set_record(root, record)
    preprocessing = _read_preprocessing(manifest.get("preprocessing"), place)
    if preprocessing is not None:
        root.headinit_preprocessing = preprocessing  # type: ignore[assignment]
    return root.eval()


def preprocessing_of(model: nn.Module) -> Any:
    """How to prepare inputs for a loaded model: `ImagePreprocessing`, `TextPreprocessing`, or None if unknown."""
    return getattr(unwrap(model), "headinit_preprocessing", None)


def read_manifest(folder: str | os.PathLike) -> dict[str, Any]:
    """The checked contents of ``headinit.json``: every file it names is there and has its digest.

    Raises:
        CheckpointError: as `load`.
    """
    place = Path(folder)
    path = place / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{place} is not a model that headinit saved: it has no {MANIFEST}.")
    if path.stat().st_size > _MANIFEST_LIMIT:
        raise CheckpointError(f"{path} is larger than any that headinit writes.")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise CheckpointError(f"{path} names no format version, so it is not a model that headinit saved.")
    if version > FORMAT:
        raise CheckpointError(
            f"{place} has format {version}, and this headinit reads up to {FORMAT}. Update headinit to read it."
        )
    missing = {"files", "record", "library", "native"} - manifest.keys()
    if missing or not isinstance(manifest["files"], dict) or not manifest["files"]:
        raise CheckpointError(f"{path} is incomplete: it lacks {', '.join(sorted(missing)) or 'its list of files'}.")
    for name, expected in manifest["files"].items():
        _check_file(place, name, expected)
    return manifest


def _check_file(place: Path, name: str, expected: Any) -> None:
    pure = PurePosixPath(name)
    climbs = pure.is_absolute() or ".." in pure.parts or "\\" in name or ":" in name or not pure.parts
    if climbs or not (place / name).resolve().is_relative_to(place.resolve()):
        raise CheckpointError(f"{place} names a file outside itself ({name!r}). Do not trust this folder.")
    path = place / name
    if not path.is_file():
        raise CheckpointError(
            f"{place} lacks {name!r}, which its list of files names. It is incomplete: copy it again."
        )
    if not isinstance(expected, dict) or path.stat().st_size != expected.get("bytes"):
        raise CheckpointError(
            f"{path} has {path.stat().st_size} bytes, and "
            f"{expected.get('bytes') if isinstance(expected, dict) else '?'} were written. It is truncated or was "
            "changed: copy it again."
        )
    if _digest(path)["sha256"] != expected.get("sha256"):
        raise CheckpointError(f"{path} has another SHA-256 than when it was written. It was changed: copy it again.")


def _record_from_json(manifest: Mapping[str, Any]) -> HeadRecord:
    values = dict(manifest["record"])
    try:
        sites = tuple(HeadSite(**site) for site in values.pop("sites"))
        for name in ("new_parameters", "new_modules", "notes"):
            values[name] = tuple(values.get(name) or ())
        names = values.get("class_names")
        values["class_names"] = None if names is None else tuple(names)
        return HeadRecord(sites=sites, **values)
    except (TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"The record of the saved model is damaged: {error}") from error


def _rebuild(manifest: Mapping[str, Any], record: HeadRecord, model: nn.Module | None, place: Path) -> nn.Module:
    from headinit.attach import rebuild_heads

    native, library = bool(manifest["native"]), manifest["library"]
    if native and library == "transformers":
        if model is not None:
            raise CheckpointError("This folder rebuilds its model by itself; leave model= out.")
        return _native_transformers(manifest, place)
    state = _read_weights(place, _NATIVE_WEIGHTS if native else _OWN_WEIGHTS, manifest)
    base = model if model is not None else _fresh(manifest, record, place)
    root = rebuild_heads(base, record)
    _fill_from(root, state, place)
    return root


def _fresh(manifest: Mapping[str, Any], record: HeadRecord, place: Path) -> nn.Module:
    architecture = manifest.get("architecture")
    if not isinstance(architecture, dict):
        raise CheckpointError(
            f"{place} holds the weights of a model whose code only you have. Give the architecture: "
            "headinit.load(folder, model=MyModel())."
        )
    from headinit.seeding import global_generators_kept

    with global_generators_kept(0):
        if architecture.get("library") == "transformers":
            cls, config = _transformers_class(architecture)
            try:
                return cls._from_config(config)
            except Exception as error:  # each architecture has its own way to refuse
                raise CheckpointError(
                    f"The configuration in {place} does not build a {cls.__name__}: {error}"
                ) from error
        from headinit.backbones.load import build_library_model

        return build_library_model(architecture, record.num_classes)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _transformers_class(architecture: Mapping[str, Any]) -> tuple[Any, Any]:
    """A class of the installed transformers, by name, and its configuration without anything that is fetched or run."""
    import transformers

    from headinit.backbones.load import config_of

    name, module = str(architecture.get("class")), str(architecture.get("module"))
    known = bool(re.fullmatch(r"transformers\.models(\.\w+)+", module)) and _is_installed(module)
    cls = getattr(importlib.import_module(module), name, None) if known else None
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel) and cls.__module__ == module):
        raise CheckpointError(
            f"The saved model is of class {name!r}, which transformers {transformers.__version__} does not have. No "
            "code from the folder is run; install the version of transformers that it was made with."
        )
    config = config_of(dict(architecture.get("config") or {}), name)
    return cls, config


def _native_transformers(manifest: Mapping[str, Any], place: Path) -> nn.Module:
    from headinit.backbones.load import quiet_transformers

    architecture = manifest.get("architecture")
    if not isinstance(architecture, dict):
        raise CheckpointError(f"{place / MANIFEST} does not say of which class the model is.")
    cls, config = _transformers_class(architecture)
    names = sorted(n for n in manifest["files"] if n.endswith(".safetensors") and "/" not in n)
    state: dict[str, Tensor] = {}
    for name in names:
        state |= _read_weights(place, name, manifest)
    config.dtype = next((t.dtype for t in state.values() if t.is_floating_point()), torch.float32)
    try:
        with quiet_transformers():
            model, info = cls.from_pretrained(
                None, config=config, state_dict=state, dtype=config.dtype, output_loading_info=True
            )
    except Exception as error:  # each architecture has its own way to refuse
        raise CheckpointError(f"The weights in {place} do not fit {cls.__name__}: {error}") from error
    absent = sorted(info["missing_keys"])
    if absent or info["mismatched_keys"] or info["unexpected_keys"]:
        wrong = (absent or sorted(map(str, info["mismatched_keys"])) or sorted(info["unexpected_keys"]))[0]
        raise CheckpointError(
            f"The weights in {place} do not fit {cls.__name__}: {wrong} is missing, extra or of another shape."
        )
    return model


def _read_weights(place: Path, name: str, manifest: Mapping[str, Any]) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if name not in manifest["files"]:
        raise CheckpointError(f"{place} lists no {name!r}: headinit reads weights from safetensors alone.")
    try:
        state = load_file(place / name)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{place / name} is not a safetensors file ({error}). headinit reads nothing else: a pickle can run code."
        ) from error
    for alias, original in (manifest.get("aliases") or {}).items():
        if original not in state:
            raise CheckpointError(f"{place / name} lacks {original!r}, which {alias!r} is a copy of.")
        state[alias] = state[original]
    return state


def _fill_from(root: nn.Module, state: Mapping[str, Tensor], place: Path) -> None:
    own = root.state_dict()
    wrong = sorted(own.keys() ^ state.keys()) or [n for n in own if own[n].shape != state[n].shape]
    if wrong:
        raise CheckpointError(
            f"The weights in {place} do not fit {type(root).__name__}: {wrong[0]!r} is missing, extra or of another "
            f"shape ({len(wrong)} in all). Give the architecture that was saved: headinit.load(folder, model=...)."
        )
    for name, parameter in root.named_parameters():
        if name in state:
            parameter.data = parameter.data.to(state[name].dtype)
    for name in own:  # the model's own mapping also holds the versions that some modules ask for
        own[name] = state[name]
    root.load_state_dict(own)


def _read_preprocessing(saved: Any, place: Path) -> Any:
    if not isinstance(saved, dict):
        return None
    values = {key: value for key, value in saved.items() if key != "kind"}
    try:
        if saved.get("kind") == "image":
            from headinit.data.images import ImagePreprocessing

            return ImagePreprocessing.from_dict(values)
        from headinit.backbones.preprocessing import read_tokenizer
        from headinit.data.text import TextPreprocessing

        return TextPreprocessing(read_tokenizer(place / _TOKENIZER), int(values["max_length"]))
    except (HeadInitError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"The preprocessing saved in {place} cannot be read: {error}") from error
