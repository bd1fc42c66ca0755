"""The data sets that torchvision knows by class name."""

from __future__ import annotations

import hashlib
import inspect
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from headinit.data.folders import digest_of_file
from headinit.data.images import to_rgb
from headinit.data.picture_checks import refuse_unreadable
from headinit.data.splits import DataSplits, LazyItems, Split, check_class_count, divide
from headinit.errors import DataError, unknown_name

logger = logging.getLogger(__name__)

# The names under which torchvision's classes offer a part of the data, in the order of preference.
SPLIT_NAMES = {
    "train": ("train", "trainval", "train-standard"),
    "validation": ("val", "valid", "validation"),
    "test": ("test",),
}


def load_torchvision(
    dataset: str | None = None,
    *,
    root: str | Path | None = None,
    download: bool = False,
    skip_unreadable: bool = False,
    check_pictures: bool = True,
    validation: float | int = 0.2,
    seed: int = 0,
) -> DataSplits:
    """A data set of torchvision by its class name ("Flowers102", "CIFAR10", "OxfordIIITPet").

    Each offers its own splits; all that it has are used. A part is split off for validation where it has none, and
    ImageNet-like sets that have `val` alone are reported on it.

    Args:
        dataset: the class name.
        root: the folder that holds (or, with `download`, will hold) its files.
        download: let torchvision fetch the files.
        skip_unreadable, check_pictures: as for folders of pictures.
        validation: share (float) or number (int) of training pictures that select, where there is no such split.
        seed: decides which.

    Raises:
        DataError: an unknown name, files that are not there, a data set that is not for classification.

    Example:
        >>> load_torchvision("CIFAR1")
        Traceback (most recent call last):
        ...
        headinit.errors.DataError: Unknown torchvision data set 'CIFAR1'. Did you mean 'CIFAR10' or ...
    """
    import torchvision

    known = [n for n in torchvision.datasets.__all__ if inspect.isclass(getattr(torchvision.datasets, n))]
    if dataset is None:
        raise DataError("data=torchvision needs data.dataset=CLASS, such as Flowers102, and data.root=FOLDER.")
    if dataset not in known:
        raise unknown_name("torchvision data set", dataset, known, DataError)
    kind = getattr(torchvision.datasets, dataset)
    parts = _build_parts(kind, dataset, root, download)
    train_labels = _labels_of(parts["train"], dataset)
    class_names = _class_names(parts["train"], train_labels)
    splits: dict[str, Split | None] = {}
    for part, data in parts.items():
        labels = train_labels if part == "train" else _labels_of(data, dataset)
        splits[part] = _split_of(data, labels, f"{dataset} {part}")
    checked = refuse_unreadable(splits, skip_unreadable=skip_unreadable, check_pictures=check_pictures)
    train, held_out = checked["train"], checked.get("validation")
    assert train is not None
    check_class_count(train.labels, class_names, dataset)
    if held_out is None:
        train, held_out = divide(train, validation, seed)
    return DataSplits(train, held_out, checked.get("test"), class_names, "image", dataset)


def _build_parts(kind: Any, dataset: str, root: str | Path | None, download: bool) -> dict[str, Any]:
    """The parts that the class offers: by `split=`, by `train=`, or the whole as training data."""
    accepted = inspect.signature(kind).parameters
    common: dict[str, Any] = {}
    if "root" in accepted:
        if root is None:
            raise DataError(f"data=torchvision data.dataset={dataset} needs data.root=FOLDER, where its files are.")
        common["root"] = str(Path(root).expanduser())
    if "download" in accepted:
        common["download"] = download
    if "split" in accepted:
        built = {}
        for part, names in SPLIT_NAMES.items():
            data = next((d for n in names if (d := _build(kind, dataset, {**common, "split": n})) is not None), None)
            if data is not None:
                built[part] = data
        if "train" not in built:
            raise DataError(f"torchvision's {dataset} offers none of the splits {', '.join(SPLIT_NAMES['train'])}.")
        return built
    if "train" in accepted:
        return {
            "train": _build(kind, dataset, {**common, "train": True}),
            "test": _build(kind, dataset, {**common, "train": False}),
        }
    return {"train": _build(kind, dataset, common)}


def _build(kind: Any, dataset: str, arguments: dict[str, Any]) -> Any:
    """The data set, or None where it has no such split (torchvision says so with a ValueError)."""
    try:
        return kind(**arguments)
    except ValueError as error:
        if "split" in arguments and "split" in str(error):
            return None
        raise DataError(f"torchvision's {dataset} refuses {arguments}: {error}") from error
    except ModuleNotFoundError as error:
        raise DataError(f"torchvision's {dataset} needs another package: {error}.") from error
    except TypeError as error:
        raise DataError(f"torchvision's {dataset} is not a data set that loads by name alone: {error}.") from error
    except (RuntimeError, OSError) as error:  # files missing, damaged, or the download failed
        way = "" if arguments.get("download") else " or let torchvision fetch it with data.download=true"
        raise DataError(
            f"Cannot load torchvision's {dataset} from {arguments.get('root')}: {str(error).strip()[:300]} "
            f"Put its files there (data.root=FOLDER){way}."
        ) from error


def _labels_of(data: Any, dataset: str) -> torch.Tensor:
    """`(N,)` int64 class numbers, without decoding pictures where the data set keeps them in a list."""
    values: Any = None
    for name in ("targets", "_labels", "labels"):
        values = getattr(data, name, None)
        if values is not None and len(values) == len(data):
            break
        values = None
    if values is None:
        pairs = next((p for n in ("samples", "_samples", "imgs") if (p := getattr(data, n, None))), None)
        values = [pair[1] for pair in pairs] if pairs else [data[i][1] for i in range(len(data))]
    try:
        labels = torch.as_tensor(np.asarray([int(v) for v in values]), dtype=torch.int64)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"torchvision's {dataset} has no class number for each picture, so it cannot be classified."
        ) from error
    return labels


def _class_names(data: Any, labels: torch.Tensor) -> tuple[str, ...]:
    names = getattr(data, "classes", None)
    if names is not None and len(names) > int(labels.max()):
        return tuple(", ".join(name) if isinstance(name, tuple) else str(name) for name in names)
    return tuple(str(k) for k in range(int(labels.max()) + 1))


def _paths_of(data: Any) -> list[Path] | None:
    for name in ("_image_files", "_images", "samples", "_samples", "imgs"):
        held: Sequence[Any] | None = getattr(data, name, None)
        if held is not None and len(held) == len(data) > 0:
            first = [h[0] if isinstance(h, tuple) else h for h in held]
            if all(isinstance(p, (str, Path)) and Path(p).is_file() for p in first):
                return [Path(p) for p in first]
    return None


def _split_of(data: Any, labels: torch.Tensor, where: str) -> Split:
    digest = hashlib.sha256(labels.numpy().astype("<i8").tobytes())
    paths = _paths_of(data)
    if paths is not None:
        for path in paths:
            digest.update(f"{path.name}\x00{digest_of_file(path)}\n".encode("utf-8", "surrogateescape"))
        return Split(paths, labels, [str(p) for p in paths], digest.hexdigest())
    items = LazyItems(lambda i: data[i][0], range(len(data)))
    for item in items:
        image = to_rgb(item)
        digest.update(f"{image.size}".encode() + image.tobytes())
    return Split(items, labels, [f"{where} example {i}" for i in range(len(data))], digest.hexdigest())
