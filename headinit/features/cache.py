"""Features kept on disk: computed once for the same weights, preprocessing and data, then memory-mapped.

An entry is a folder named by a digest of all that the features depend on. It holds shards, one safetensors file each,
which follow one another by the number of their first batch. Every shard carries the digest of its own content, so a
damaged one is found when it is read, and an extraction that was interrupted goes on after the last whole shard.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from headinit.errors import ConfigError, DataError
from headinit.heads.record import HeadSite

logger = logging.getLogger(__name__)

_LAYOUT = "1"  # part of every key: raise it when shards of an older layout must not be read
_COMPLETE = "complete.json"


@dataclass(frozen=True)
class FeatureBatch:
    """Features of some examples, with the places of their rows in the data.

    Attributes:
        features: `(B, d)`, float32, on the CPU.
        labels: `(B,)` or `(B, K)`.
        index: `(B,)` int64: row i belongs to example `index[i]`.
        batches: how many batches of the data these are.
        examples: how many examples these are (rows, but for token tasks).
        precision: what they were computed in, ``"fp32"`` or ``"bf16"``.
    """

    features: Tensor
    labels: Tensor
    index: Tensor
    batches: int = 1
    examples: int = 0
    precision: str = "fp32"


# --- the store --------------------------------------------------------------------------------------------------------


class FeatureCache:
    """A folder of extracted features, bounded in size; the entries used longest ago go first.

    Args:
        folder: made if it is not there.
        max_bytes: the most that all entries together may take.
        shard_rows: rows of one file; an extraction that is interrupted loses at most these, or `flush_seconds`.
        flush_seconds: a shard is also closed after this long, for slow models.

    Raises:
        ConfigError: a number is not above 0, or the folder is a file.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     FeatureCache(folder).entry("ab12").complete
        False
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        max_bytes: int = 20 << 30,
        shard_rows: int = 2048,
        flush_seconds: float = 30.0,
    ) -> None:
        if max_bytes <= 0 or shard_rows <= 0 or flush_seconds <= 0:
            raise ConfigError(
                f"The feature cache needs numbers above 0, not max_bytes={max_bytes}, shard_rows={shard_rows}, "
                f"flush_seconds={flush_seconds}."
            )
        self.folder = Path(folder).expanduser()
        self.max_bytes, self.shard_rows, self.flush_seconds = max_bytes, shard_rows, flush_seconds
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f"The feature cache {self.folder} is a file. Give a folder.")

    def entry(self, key: str) -> CacheEntry:
        """The entry of this key, whether it is there or not."""
        return CacheEntry(self, self.folder / key)

    def entries(self) -> list[CacheEntry]:
        """All entries, the one used longest ago first."""
        if not self.folder.is_dir():
            return []
        found = [CacheEntry(self, path) for path in self.folder.iterdir() if path.is_dir()]
        return sorted(found, key=lambda entry: entry.used)

    def size(self) -> int:
        """Bytes of all entries together."""
        return sum(entry.size() for entry in self.entries())

    def evict(self, keep: CacheEntry | None = None) -> None:
        """Remove the entries used longest ago until the rest fits; `keep` and those being written stay."""
        entries = self.entries()
        total = sum(entry.size() for entry in entries)
        for entry in entries:
            if total <= self.max_bytes:
                return
            if keep is not None and entry.folder == keep.folder:
                continue
            with entry.locked() as free:
                if free:
                    total -= entry.size()
                    entry.remove()


class CacheEntry:
    """The features of one key: `FeatureCache.entry` makes it.

    Attributes:
        folder: where its shards are.
    """

    def __init__(self, cache: FeatureCache, folder: Path) -> None:
        self.cache, self.folder = cache, folder

    @property
    def used(self) -> float:
        """When it was last read or written."""
        for path in (self.folder / _COMPLETE, self.folder):
            with suppress(OSError):
                return path.stat().st_mtime
        return 0.0

    @property
    def complete(self) -> bool:
        """Whether all shards are there; their content is checked when they are read."""
        return self._batches() is not None

    def size(self) -> int:
        """Bytes on disk."""
        return sum(_bytes_of(path) for path in self.folder.glob("*")) if self.folder.is_dir() else 0

    def remove(self) -> None:
        """Delete it; whoever has a shard mapped keeps what was read."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def check(self) -> bool:
        """Whether it is complete and every shard has the content that was written; marks the entry as used."""
        wanted = self._batches()
        if wanted is None or sum(shard.batches for shard in self.shards()) != wanted:
            return False
        with suppress(OSError):
            os.utime(self.folder / _COMPLETE)
        return True

    def shards(self) -> Iterator[FeatureBatch]:
        """The whole shards from the first on, memory-mapped; ends before the first one that is missing or damaged."""
        first = 0
        while (shard := _read_shard(self._path(first), self.folder.name, first)) is not None:
            yield shard
            first += shard.batches

    @contextmanager
    def locked(self) -> Iterator[bool]:
        """Hold the entry for writing; gives False if another process or stream holds it. Ends with the process."""
        try:
            import fcntl
        except ImportError:  # no such locks on Windows: writers there overwrite each other with the same content
            yield True
            return
        path = self.cache.folder / f"{self.folder.name}.lock"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("w")
        except OSError as error:  # what is there can still be read
            logger.warning("The feature cache cannot be written, going on without it: %s", error)
            yield False
            return
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield False
                return
            yield True

    def _path(self, first: int) -> Path:
        return self.folder / f"shard-{first:08d}.safetensors"

    def _batches(self) -> int | None:
        try:
            return int(json.loads((self.folder / _COMPLETE).read_text())["batches"])
        except (OSError, ValueError, KeyError, TypeError):
            return None


class ShardWriter:
    """Collects batches into shards of an entry, after `first` batches that are there already.

    Trouble with the disk is no reason to lose an extraction: it is logged, and nothing more is written.
    """

    def __init__(self, entry: CacheEntry, first: int = 0) -> None:
        self.entry, self.first = entry, first
        self.waiting: list[FeatureBatch] = []
        self.since = time.monotonic()
        self.failed = False

    def add(self, batch: FeatureBatch) -> None:
        """Take a batch; write a shard if it is time."""
        self.waiting.append(batch)
        rows = sum(len(waiting.index) for waiting in self.waiting)
        cache = self.entry.cache
        if rows >= cache.shard_rows or time.monotonic() - self.since >= cache.flush_seconds:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting as one shard."""
        waiting, self.waiting, self.since = self.waiting, [], time.monotonic()
        if not waiting or self.failed:
            return
        shard = joined(waiting)
        try:
            _write_shard(self.entry._path(self.first), self.entry.folder.name, self.first, shard)
            self._bound()
        except OSError as error:
            self.failed = True
            logger.warning("The feature cache cannot be written, going on without it: %s", error)
        self.first += shard.batches

    def finish(self) -> None:
        """Write the rest and mark the entry complete."""
        self.flush()
        if self.failed:
            return
        try:
            text = json.dumps({"batches": self.first, "layout": _LAYOUT})
            _write_atomically(self.entry.folder / _COMPLETE, lambda path: path.write_text(text))
        except OSError as error:
            logger.warning("The feature cache cannot be written, going on without it: %s", error)

    def _bound(self) -> None:
        cache = self.entry.cache
        if self.entry.size() > cache.max_bytes:
            self.failed = True
            self.entry.remove()
            logger.warning(
                "These features alone need more than the %d bytes of the feature cache, so they are not kept. "
                "Raise max_bytes.",
                cache.max_bytes,
            )
        else:
            cache.evict(keep=self.entry)


def joined(parts: list[FeatureBatch]) -> FeatureBatch:
    """Several batches as one, in this order."""
    if len(parts) == 1:
        return parts[0]
    return FeatureBatch(
        torch.cat([part.features for part in parts]),
        torch.cat([part.labels for part in parts]),
        torch.cat([part.index for part in parts]),
        batches=sum(part.batches for part in parts),
        examples=sum(part.examples for part in parts),
        precision=parts[0].precision,
    )


def _write_shard(path: Path, key: str, first: int, shard: FeatureBatch) -> None:
    tensors = {
        "features": shard.features.contiguous(),
        "labels": shard.labels.contiguous(),
        "index": shard.index.contiguous(),
    }
    facts = {
        "key": key,
        "first": str(first),
        "batches": str(shard.batches),
        "examples": str(shard.examples),
        "precision": shard.precision,
    }
    facts["sha256"] = _shard_digest(facts, tensors)
    _write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=facts))


def _read_shard(path: Path, key: str, first: int) -> FeatureBatch | None:
    """A shard whose content is what was written; None if it is missing, damaged, or another's."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in ("features", "labels", "index")}
        stated = facts.pop("sha256")
        if (facts["key"], facts["first"]) != (key, str(first)) or _shard_digest(facts, tensors) != stated:
            return None
        batches, examples = int(facts["batches"]), int(facts["examples"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    return FeatureBatch(**tensors, batches=batches, examples=examples, precision=facts["precision"])


def _shard_digest(facts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    sha = hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode())
    for name in sorted(tensors):
        _add_tensor(sha, name, tensors[name])
    return sha.hexdigest()


def _write_atomically(path: Path, write: Any) -> None:
    """Under a temporary name in the same folder, then renamed: a file is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".tmp-")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _bytes_of(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_size
    return 0


# --- what features depend on ------------------------------------------------------------------------------------------


def cache_key(
    model: nn.Module,
    site: HeadSite,
    batches: Iterable[Any],
    *,
    precision: str = "fp32",
    speed: str = "auto",
    epoch: int = 0,
    fingerprint: str | None = None,
) -> str:
    """Digest of weights, architecture, preprocessing, the place the features are taken at, precision and data.

    The head itself, and all after it, is left out: another head sees the same features.

    Args:
        model: the whole model.
        site: its head.
        batches: what `as_batches` gives.
        precision, speed: as in `extract_features`.
        epoch: which view of augmented data.
        fingerprint: digest of the data where `batches` has none.

    Raises:
        DataError: nothing says what the data are.
    """
    facts = {
        "layout": _LAYOUT,
        "weights": weights_digest(model, site),
        "site": [site.path, site.kind, site.in_features],
        "precision": precision,
        "speed": speed,
        "data": fingerprint or data_digest(batches, epoch),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def weights_digest(model: nn.Module, site: HeadSite) -> str:
    """SHA-256 over the structure, parameters and buffers of everything but the head.

    Example:
        >>> first, second = (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(2))
        >>> second[0] = first[0]
        >>> head = HeadSite("1", "linear", 2, 2)
        >>> weights_digest(first, head) == weights_digest(second, head)
        True
    """
    sha = hashlib.sha256()
    for path, module in model.named_modules():
        if _inside(path, site.path):
            continue
        # Module names and settings tell apart what has equal tensors: ReLU or GELU, an epsilon, a stride.
        sha.update(f"{path}\0{type(module).__qualname__}\0{module.extra_repr()}\0".encode())
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in own:
            _add_tensor(sha, name, tensor)
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    if to_dict is not None:
        sha.update(json.dumps(_without_labels(to_dict()), sort_keys=True, default=str).encode())
    return sha.hexdigest()


def _inside(path: str, parent: str) -> bool:
    return path == parent or path.startswith(f"{parent}.")


def _without_labels(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a transformers model that reach the features; the rest changes with the head and its origin."""
    aside = {
        "id2label",
        "label2id",
        "num_labels",
        "problem_type",
        "_name_or_path",
        "transformers_version",
        "architectures",
    }
    return {name: value for name, value in config.items() if name not in aside}


def data_digest(batches: Any, epoch: int = 0) -> str:
    """What is read: the fingerprint of the split and all that shapes its batches, or the tensors themselves.

    Raises:
        DataError: the batches do not say what they hold.
    """
    if hasattr(batches, "digest"):
        return batches.digest()
    found = getattr(getattr(batches, "split", None), "fingerprint", "")
    if not found:
        raise DataError(
            f"Cannot cache features of data of type {type(batches).__name__}: nothing tells one data set from another. "
            "Give fingerprint='...' that changes with the data, a pair of tensors, or headinit's Batches."
        )
    augmentation = getattr(batches, "augmentation", "none")
    facts = {
        "split": found,
        "preprocessing": describe_setting(getattr(batches, "preprocessing", None)),
        "augmentation": [augmentation] if augmentation == "none" else [augmentation, batches.shuffle_seed, epoch],
        "drop_last": [batches.shuffle_seed, epoch] if getattr(batches, "drop_last", False) else None,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def describe_setting(value: Any) -> Any:
    """A preprocessing setting as JSON: dataclasses by their fields, tokenizers by their whole definition.

    Raises:
        DataError: the value has no description of its own (its `repr` is an address).

    Example:
        >>> describe_setting((1, "bicubic", None))
        [1, 'bicubic', None]
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return [describe_setting(item) for item in value]
    if isinstance(value, Mapping):
        return {str(name): describe_setting(item) for name, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: describe_setting(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__qualname__, **fields}
    backend = getattr(value, "backend_tokenizer", None)
    if backend is not None:  # a fast tokenizer: vocabulary, merges, normaliser, special tokens
        state = json.loads(backend.to_str())
        state.pop("truncation", None), state.pop("padding", None)  # left behind by whoever called it last
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest() + f" {value.padding_side}"
    if hasattr(value, "get_vocab"):  # a slow tokenizer
        return [type(value).__qualname__, describe_setting(value.get_vocab()), str(getattr(value, "init_kwargs", ""))]
    described = repr(value)
    if " at 0x" in described:
        raise DataError(
            f"Cannot cache features: the preprocessing setting {type(value).__name__} does not say what it does. "
            "Give fingerprint='...' that changes with it, or a dataclass."
        )
    return described


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes.

    Example:
        >>> a, b = torch.zeros(2, 3), torch.zeros(3, 2)
        >>> tensors_digest({"x": a}) == tensors_digest({"x": b})
        False
    """
    sha = hashlib.sha256()
    for name in sorted(tensors):
        _add_tensor(sha, name, tensors[name])
    return sha.hexdigest()


def _add_tensor(sha: Any, name: str, tensor: Tensor) -> None:
    sha.update(f"{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
    plain = tensor.detach().cpu().contiguous()
    if plain.numel():
        sha.update(plain.flatten().view(torch.uint8).numpy().data)
