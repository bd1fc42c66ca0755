"""What a run leaves behind and how it is read back: `result.json`, `metrics.jsonl`, the flat rows of a comparison."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import platform
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from headinit.errors import CheckpointError, ConfigError, DataError

RESULT_FILE = "result.json"
METRICS_FILE = "metrics.jsonl"
FORMAT = 1
"""Version of the layout of result.json."""

_LIBRARIES = (
    *("headinit", "torch", "torchvision", "timm", "transformers", "accelerate", "hydra-core"),
    *("scikit-learn", "scipy", "numpy", "safetensors"),
)
# Columns of their own, or without a bearing on the result.
_NO_OPTIONS = frozenset(
    {*(f"{group}.name" for group in ("init", "data", "model", "head", "optim", "schedule", "trainer"))}
    | {"optim.lr", "optim.weight_decay", "data.per_class"}
    | {"trainer.workers", "trainer.progress", "trainer.save_every_steps", "trainer.cache", "trainer.drift"}
    | {"freeze.policy", "freeze.stages", "freeze.patterns", "freeze.head_lr", "freeze.epochs"}
)
_NOT_RUNS = frozenset({"checkpoint", "model", ".hydra", "__pycache__"})


@dataclass(frozen=True)
class RunRecord:
    """Everything worth keeping of one finished run: the contents of `result.json`.

    Attributes:
        config: the resolved configuration, plain dicts and lists.
        seeds: ``{"head", "order", "split"}``.
        versions: version of Python and of each library, see `library_versions`.
        fingerprints: SHA-256 of the data splits (``train``, ``validation``, ``test``) and of the ``weights`` file.
        init: how the head started, as `start_diagnostics` gives it: ``loss``, ``chance_loss``, ``accuracy``,
            ``logit_std``, ``feature_gradient``, ``warnings``, ...
        val: metrics on the validation split at the best epoch.
        test: metrics on the test split, None where there is none.
        best_epoch: epoch that validation chose; 0 is the head as it started.
        steps: optimizer steps taken.
        seconds: wall-clock seconds by phase.
        samples_per_second: examples per second of the training phase.
        parameters: counts of ``new``, ``trainable`` and ``frozen`` parameters.
        frozen_digest: SHA-256 of the frozen part ``before`` and ``after`` training.
        pretrained: False where the backbone was random.
        weights_source: ``"file"``, ``"bundled"``, ``"cache"``, ``"download"`` or ``"random"``.
        class_names: K names in label order.
        history: pairs (step, value of the selecting metric on validation), one per evaluation.
        rates: peak learning rate of the ``head`` and the ``backbone`` (or ``backbone/<depth>``), in the last phase.
        found_lr: the learning rate that `optim.lr=find` took.
        drift: of the features of some validation examples at the best epoch, where pretrained parameters trained:
            ``feature_drift`` (relative change) and ``feature_cka`` (linear CKA with the pretrained ones).
        status: ``"finished"``, or why it stopped, such as ``"diverged"``.
        data, task: name of the data set and its task.
        folder: where it was read from; not saved.
    """

    config: Mapping[str, Any]
    seeds: Mapping[str, int]
    init: Mapping[str, Any]
    val: Mapping[str, float | None]
    test: Mapping[str, float | None] | None = None
    best_epoch: int | None = None
    steps: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    samples_per_second: float | None = None
    parameters: Mapping[str, int] = field(default_factory=dict)
    frozen_digest: Mapping[str, str | None] = field(default_factory=dict)
    fingerprints: Mapping[str, str | None] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    pretrained: bool = True
    weights_source: str = ""
    class_names: Sequence[str] = ()
    history: Sequence[tuple[int, float]] = ()
    rates: Mapping[str, float] = field(default_factory=dict)
    found_lr: float | None = None
    drift: Mapping[str, float | None] | None = None
    status: str = "finished"
    data: str = ""
    task: str = "single_label"
    folder: str | None = field(default=None, compare=False)


@dataclass(frozen=True)
class RunRow:
    """One run of a comparison, flat: what the statistics, plots and report read.

    Attributes:
        init: name of the scheme.
        lr, weight_decay, freeze, per_class, data: the other factors; `per_class` is None where all examples are used.
        seed, split_seed: seed of head and order, seed of the split. Runs that share them (and the data) are paired.
        val, test: metrics at the chosen epoch.
        best_epoch, steps: the chosen epoch; optimizer steps taken.
        history: pairs (step, validation accuracy).
        init_loss, feature_gradient: loss at the start; mean norm of dL/dx there.
        seconds: wall-clock seconds of the run.
        backbone_lr: highest learning rate of the pretrained layers; None where none trained.
        status: ``"finished"``, or why it stopped.
        majority: share of the most frequent class in the validation split, None if unknown.
    """

    init: str
    lr: float
    seed: int
    val: Mapping[str, float | None]
    test: Mapping[str, float | None] = field(default_factory=dict)
    weight_decay: float = 0.0
    split_seed: int = 0
    freeze: str = "all"
    per_class: int | None = None
    data: str = ""
    best_epoch: int | None = None
    steps: int = 0
    history: Sequence[tuple[int, float]] = ()
    init_loss: float | None = None
    feature_gradient: float | None = None
    seconds: float = 0.0
    backbone_lr: float | None = None
    status: str = "finished"
    majority: float | None = None

    @classmethod
    def from_record(cls, record: RunRecord) -> RunRow:
        """The row of a recorded run; the factors come from its configuration.

        A group of the configuration may be a plain name (``init: he``) or a mapping with a ``name`` (``freeze``: a
        ``policy``). Options of the scheme are not in its label; `rows_from` puts those there that differ between runs.

        Raises:
            ConfigError: the configuration has no init or no learning rate.
        """
        config = record.config
        lr = _setting(config, "optim", "lr") if record.found_lr is None else record.found_lr
        init = _name(config, "init")
        if lr is None or init is None:
            raise ConfigError(
                f"The run in {record.folder or 'memory'} has no {'optim.lr' if lr is None else 'init'} in its "
                "configuration, so it cannot be compared. Repeat the run."
            )
        split_seed = record.seeds.get("split", 0)
        return cls(
            init=init,
            lr=float(lr),
            weight_decay=float(_setting(config, "optim", "weight_decay") or 0.0),
            seed=int(record.seeds.get("head", 0)),
            split_seed=int(split_seed),
            freeze=_freeze_label(config),
            per_class=_setting(config, "data", "per_class"),
            data=record.data or _name(config, "data") or "",
            val=dict(record.val),
            test=dict(record.test or {}),
            best_epoch=record.best_epoch,
            steps=record.steps,
            history=tuple((int(step), float(value)) for step, value in record.history if value is not None),
            init_loss=record.init.get("loss"),
            feature_gradient=record.init.get("feature_gradient"),
            seconds=float(sum(record.seconds.values())),
            backbone_lr=max((rate for name, rate in record.rates.items() if name != "head"), default=None),
            status=record.status,
            majority=record.init.get("majority"),
        )


def rows_from(records: Iterable[RunRecord]) -> list[RunRow]:
    """Comparable rows of finished runs.

    Whatever differs between the runs and has no column of its own goes into a label, so that no two settings are taken
    for one: options of the data into `data`, those of everything else into `init`.

    Example:
        >>> def run(gain, epochs):
        ...     config = {"init": {"name": "he", "gain": gain}, "optim": {"lr": 0.1}, "trainer": {"epochs": epochs}}
        ...     return RunRecord(config=config, seeds={}, init={}, val={})
        >>> [row.init for row in rows_from([run(1, 5), run(2, 5), run(2, 9)])]
        ['he gain=1 epochs=5', 'he gain=2 epochs=5', 'he gain=2 epochs=9']
    """
    kept = list(records)
    rows = [RunRow.from_record(record) for record in kept]
    inits, datas = [[row.init] for row in rows], [[row.data] for row in rows]
    for group in ("init", "data", "model", "head", "freeze", "optim", "schedule", "trainer"):
        for label, found in zip(datas if group == "data" else inits, _differences(kept, group), strict=True):
            label.extend(found)
    return [
        dataclasses.replace(row, init=" ".join(init), data=" ".join(data))
        for row, init, data in zip(rows, inits, datas, strict=True)
    ]


def plain(value: Any) -> Any:
    """A value as strict JSON knows it: tensors and arrays become lists, NaN and infinity None, paths strings.

    Example:
        >>> plain({"a": torch.tensor([1, 2]), "b": float("nan"), 3: Path("x")})
        {'a': [1, 2], 'b': None, '3': 'x'}
    """
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return plain(value.tolist())
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, (set, frozenset)):
        return sorted((plain(entry) for entry in value), key=repr)
    if isinstance(value, (os.PathLike, torch.dtype, torch.device)):
        return str(value)
    raise TypeError(f"Cannot write a {type(value).__name__} as JSON: {value!r}.")


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Write a value as strict JSON, atomically: a reader finds the old file or the new one, never a part of it.

    Example:
        >>> folder = tempfile.mkdtemp()
        >>> print(write_json(Path(folder, "x.json"), {"a": 1}).read_text().strip())
        {
         "a": 1
        }
    """
    return write_text(path, json.dumps(plain(value), indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a text file atomically, in UTF-8, making its folder if need be.

    Example:
        >>> write_text(Path(tempfile.mkdtemp(), "new", "x.txt"), "hello").read_text()
        'hello'
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            # A lone surrogate (from a file name that is not UTF-8) must not lose the whole file.
            file.write(text.encode("utf-8", "backslashreplace").decode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    return target


def write_result(folder: str | os.PathLike[str], record: RunRecord) -> Path:
    """Write `result.json` into a run's folder, atomically. Its presence means that the run is finished.

    Example:
        >>> folder = tempfile.mkdtemp()
        >>> record = RunRecord(config={}, seeds={"head": 0}, init={"loss": 2.3}, val={"accuracy": 0.5})
        >>> _ = write_result(folder, record)
        >>> read_result(folder) == record
        True
    """
    content = {f.name: getattr(record, f.name) for f in dataclasses.fields(record) if f.name != "folder"}
    return write_json(Path(folder) / RESULT_FILE, {"format": FORMAT, **content})


def read_result(folder: str | os.PathLike[str]) -> RunRecord:
    """The record of a finished run.

    Raises:
        CheckpointError: there is no `result.json`, or it is damaged, or of a newer headinit.
    """
    path = Path(folder) / RESULT_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"No finished run in {folder}: it has no {RESULT_FILE}. Run it again to finish it."
        ) from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"Cannot read {path}: {error}. Delete it and repeat the run.") from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"Cannot read {path}: it holds a {type(content).__name__}, not an object. Repeat the run."
        )
    if content.get("format") != FORMAT:
        raise CheckpointError(
            f"Cannot read {path}: its format is {content.get('format')!r}, this headinit reads {FORMAT}. "
            "Use the headinit that wrote it, or repeat the run."
        )
    return _record_from(content, path)


def _record_from(content: dict[str, Any], path: Path) -> RunRecord:
    fields = {f.name: f for f in dataclasses.fields(RunRecord) if f.name != "folder"}
    needed = {name for name in ("config", "seeds", "init", "val") if not isinstance(content.get(name), dict)}
    if needed:
        raise CheckpointError(f"Cannot read {path}: {', '.join(sorted(needed))} missing or damaged. Repeat the run.")
    values = {name: content[name] for name in fields if name in content}
    try:
        values["history"] = tuple((int(step), value) for step, value in values.get("history", ()))
        values["class_names"] = tuple(values.get("class_names", ()))
        return RunRecord(**values, folder=str(path.parent))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"Cannot read {path}: {error}. Repeat the run.") from error


def read_runs(root: str | os.PathLike[str]) -> list[RunRecord]:
    """The records of every finished run below a folder, in the order of their paths.

    Runs without `result.json` (still running, or stopped) are skipped; a damaged one is skipped with a warning that
    names it.

    Raises:
        DataError: there is no such folder.

    Example:
        >>> read_runs(tempfile.mkdtemp())
        []
    """
    if not Path(root).is_dir():
        raise DataError(f"Cannot read runs from {root}: there is no such folder.")
    records = []
    for folder in _run_folders(root):
        try:
            records.append(read_result(folder))
        except CheckpointError as error:
            if (folder / RESULT_FILE).exists():  # else it went away while we looked
                warnings.warn(f"Skipped a damaged run. {error}", stacklevel=2)
    return records


def unfinished_runs(root: str | os.PathLike[str]) -> list[Path]:
    """The folders below a folder where a run has begun and not (yet) finished: metrics or checkpoints, and no result.

    Example:
        >>> root = tempfile.mkdtemp()
        >>> append_metrics(Path(root, "run"), {"epoch": 0})
        >>> [folder.name for folder in unfinished_runs(root)]
        ['run']
    """
    found = []
    for folder, subfolders, files in os.walk(root):
        if RESULT_FILE not in files and (METRICS_FILE in files or "checkpoint" in subfolders):
            found.append(Path(folder))
        subfolders[:] = sorted(name for name in subfolders if name not in _NOT_RUNS)
    return found


def _run_folders(root: str | os.PathLike[str]) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in _NOT_RUNS)
        if RESULT_FILE in files:
            yield Path(folder)


def append_metrics(folder: str | os.PathLike[str], line: Mapping[str, Any]) -> None:
    """Add one evaluation to `metrics.jsonl`. A half-written last line, left by a killed run, is cut off first.

    Example:
        >>> folder = tempfile.mkdtemp()
        >>> append_metrics(folder, {"step": 10, "val": {"accuracy": 0.5}})
        >>> read_metrics(folder)
        [{'step': 10, 'val': {'accuracy': 0.5}}]
    """
    path = Path(folder) / METRICS_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(plain(line), allow_nan=False, ensure_ascii=False) + "\n"
    with open(path, "a+b") as file:
        file.seek(0)
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
        file.write(text.encode("utf-8", "backslashreplace"))


def read_metrics(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The evaluations of a run, oldest first; lines that are not whole are left out, a missing file gives []."""
    path = Path(folder) / METRICS_FILE
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict):
                lines.append(line)
    return lines


def library_versions() -> dict[str, str]:
    """Versions of Python, the platform and the libraries that decide a result; none of them is imported for it.

    Example:
        >>> library_versions()["torch"] == metadata.version("torch")
        True
    """
    versions = {"python": platform.python_version(), "platform": f"{sys.platform}-{platform.machine()}"}
    for name in _LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def _setting(config: Mapping[str, Any], group: str, key: str) -> Any:
    section = config.get(group)
    return section.get(key) if isinstance(section, Mapping) else None


def _differences(records: Sequence[RunRecord], group: str) -> list[list[str]]:
    """Per run, what sets a group of its configuration apart: its name, and options that differ under that name."""
    names = [_name(record.config, group) for record in records]
    options = [_options(record.config, group) for record in records]
    peers: dict[str | None, list[dict[str, str]]] = {}
    for name, own in zip(names, options, strict=True):
        peers.setdefault(name, []).append(own)
    varying = {
        name: sorted(key for key in set().union(*found) if len({own.get(key) for own in found}) > 1)
        for name, found in peers.items()
    }
    named = group not in ("init", "data", "freeze") and len(peers) > 1
    return [
        [*([f"{group}={name}"] if named else []), *(f"{key}={own.get(key)}" for key in varying[name])]
        for name, own in zip(names, options, strict=True)
    ]


def _options(config: Mapping[str, Any], group: str) -> dict[str, str]:
    section = config.get(group)
    entries = section.items() if isinstance(section, Mapping) else ()
    return {str(key): str(value) for key, value in entries if f"{group}.{key}" not in _NO_OPTIONS}


def _freeze_label(config: Mapping[str, Any]) -> str:
    section = config.get("freeze")
    if not isinstance(section, Mapping):
        return "all" if section is None else str(section)
    policy = str(section.get("policy") or section.get("name") or "all")
    detail = section.get({"stages": "stages", "patterns": "patterns", "gradual": "stages"}.get(policy, ""))
    return policy if detail is None else f"{policy}({detail})"


def _name(config: Mapping[str, Any], group: str) -> str | None:
    section = config.get(group)
    if isinstance(section, Mapping):
        section = section.get("name")
    return None if section is None else str(section)
