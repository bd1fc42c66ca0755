"""Data sets of the Hugging Face hub, or local copies of them, through `datasets`."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from headinit.data.labels import check_task, encode_classes, label_text, require_labels, sorted_names
from headinit.data.picture_checks import refuse_unreadable
from headinit.data.splits import DataSplits, LazyItems, Split, check_class_count, divide
from headinit.data.tables import Table, choose_columns, require_column, splits_of_tables
from headinit.errors import DataError

logger = logging.getLogger(__name__)

VALIDATION_NAMES = ("validation", "dev", "val", "valid", "validation_matched")
LABELS = ("label", "labels", "fine_label", "target", "class", "coarse_label")


def load_hub(
    path: str | None = None,
    *,
    config: str | None = None,
    revision: str | None = None,
    train_split: str = "train",
    validation_split: str | None = None,
    test_split: str | None = None,
    text: str | None = None,
    text_pair: str | None = None,
    image: str | None = None,
    label: str | None = None,
    task: str = "single_label",
    label_separator: str = ",",
    skip_unreadable: bool = False,
    check_pictures: bool = True,
    validation: float | int = 0.2,
    seed: int = 0,
) -> DataSplits:
    """A data set by its name on the hub, or from a folder that `datasets` can read; no code of it is run.

    Args:
        path: the name on the hub ("nyu-mll/glue"), or a local folder (of data files, or written by `save_to_disk`).
        config: which of its configurations ("rte").
        revision: a branch, tag or commit, so that the data stay as they are.
        train_split, validation_split, test_split: names of its splits; validation and test are looked for by their
            usual names where none is given, and a test split without labels is left out.
        text, text_pair, label: names of columns; the usual ones are looked for.
        image: name of the column of pictures; without it, a column of type Image is looked for.
        task, label_separator: as for tables.
        skip_unreadable, check_pictures: as for folders of pictures.
        validation: share (float) or number (int) of training examples that select, where there is no such split.
        seed: decides which.

    Raises:
        DataError: it cannot be had (the message says what was tried), or a split, column or label is missing.
    """
    if path is None:
        raise DataError(
            "data=hub needs data.path=NAME (such as nyu-mll/glue, with data.config=rte) or data.path=FOLDER."
        )
    check_task(task)
    loaded = _load(path, config, revision)
    parts = _choose_splits(loaded, path, train_split, validation_split, test_split)
    name = "-".join([Path(path).name, *([config] if config else [])])
    features = parts["train"].features
    pictures = image or _image_column(features, text)
    if pictures is None:
        return _texts(parts, text, text_pair, label, task, label_separator, name, validation, seed, test_split is None)
    if task != "single_label":
        raise DataError(f"task={task} is for text; pictures of data=hub have one class each (task=single_label).")
    splits, class_names = _pictures(parts, pictures, label, test_split is None)
    checked = refuse_unreadable(splits, skip_unreadable=skip_unreadable, check_pictures=check_pictures)
    train, held_out = checked["train"], checked.get("validation")
    assert train is not None
    check_class_count(train.labels, class_names, name)
    if held_out is None:
        train, held_out = divide(train, validation, seed)
    return DataSplits(train, held_out, checked.get("test"), class_names, "image", name)


def _load(path: str, config: str | None, revision: str | None) -> Mapping[str, Any]:
    try:
        import datasets
    except ImportError as error:
        raise DataError("data=hub needs the package datasets: pip install 'headinit[tables]'.") from error
    folder = Path(path).expanduser()
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            loaded = datasets.load_from_disk(str(folder))
        else:
            loaded = datasets.load_dataset(str(folder) if folder.is_dir() else path, config, revision=revision)
    except Exception as error:  # `datasets` raises many kinds: offline, unknown name, scripts, damaged files
        tried = f"datasets.load_dataset({path!r}{f', {config!r}' if config else ''})"
        raise DataError(
            f"Cannot load the data set: {tried} said {type(error).__name__}: {str(error).strip()[:400]} "
            "Check the name, the configuration (data.config) and the network; or use local files: data.path=FOLDER, or "
            "data=csv data.train_file=FILE, or data=imagefolder data.root=FOLDER."
        ) from error
    return loaded if isinstance(loaded, Mapping) else {"train": loaded}


def _choose_splits(
    loaded: Mapping[str, Any], path: str, train: str, validation: str | None, test: str | None
) -> dict[str, Any]:
    wanted = {"train": train, "validation": validation, "test": test}
    for part, name in wanted.items():
        if name is not None and name not in loaded:
            raise DataError(f"data.{part}_split={name}: {path} has the splits {', '.join(loaded)}.")
    chosen = {part: loaded[name] for part, name in wanted.items() if name is not None}
    usual = next((name for name in VALIDATION_NAMES if name in loaded), None)
    if validation is None and usual is not None:
        chosen["validation"] = loaded[usual]
    if test is None and "test" in loaded:
        chosen["test"] = loaded["test"]
    return chosen


def _image_column(features: Mapping[str, Any], text: str | None) -> str | None:
    found = [name for name, feature in features.items() if type(feature).__name__ == "Image"]
    return found[0] if found and text is None else None


def _label_names(features: Mapping[str, Any], column: str) -> tuple[str, ...] | None:
    feature = features.get(column)
    return tuple(feature.names) if feature is not None and type(feature).__name__ == "ClassLabel" else None


def _named_labels(values: list[Any], class_names: tuple[str, ...] | None) -> list[Any]:
    """Numbers of a ClassLabel as its names; -1, the hub's mark of a hidden label, as missing."""
    if class_names is None:
        return values
    return [class_names[v] if isinstance(v, int) and 0 <= v < len(class_names) else None for v in values]


def _texts(
    parts: dict[str, Any],
    text: str | None,
    text_pair: str | None,
    label: str | None,
    task: str,
    label_separator: str,
    name: str,
    validation: float | int,
    seed: int,
    test_may_go: bool,
) -> DataSplits:
    raw = {part: Table(f"{name} split {part}", tuple(data.column_names), [], []) for part, data in parts.items()}
    columns = choose_columns(raw["train"], text, text_pair, label)
    class_names = _label_names(parts["train"].features, columns.label)
    names = [columns.text, *([columns.text_pair] if columns.text_pair else []), columns.label]
    tables = {}
    for part, data in parts.items():
        for option, column in zip(
            ("text", "text_pair" if columns.text_pair else "label", "label"), names, strict=False
        ):
            require_column(raw[part], column, option)
        values = [list(data[column]) for column in names]
        values[-1] = _named_labels(values[-1], class_names)
        if part == "test" and test_may_go and all(label_text(v) is None for v in values[-1]):
            logger.info("%s: the test split has no labels: left out.", name)
            continue
        where = [f"{name} split {part} row {i}" for i in range(len(data))]
        tables[part] = Table(raw[part].name, tuple(names), list(zip(*values, strict=True)), where)
    return splits_of_tables(tables, columns, task, label_separator, name, validation, seed, class_names)


def _pictures(
    parts: dict[str, Any], image: str, label: str | None, test_may_go: bool
) -> tuple[dict[str, Split | None], tuple[str, ...]]:
    train = parts["train"]
    available = Table("the train split", tuple(train.column_names), [], [])
    require_column(available, image, "image")
    if label is None:
        label = next((name for name in LABELS if name in train.column_names), None)
    if label is None:
        raise DataError(
            f"Cannot tell which column holds the label: set data.label=COLUMN. It has: {', '.join(train.column_names)}."
        )
    require_column(available, label, "label")
    class_names = _label_names(train.features, label)
    splits: dict[str, Split | None] = {}
    for part, data in parts.items():
        values = [label_text(v) for v in _named_labels(list(data[label]), class_names)]
        if part == "test" and test_may_go and not any(values):
            continue
        where = [f"{part} row {i}" for i in range(len(data))]
        known = class_names or sorted_names(require_labels(values, where, label))
        class_names = known
        labels = encode_classes(values, where, label, known)
        items = LazyItems(lambda i, data=data: data[int(i)][image], range(len(data)))  # type: ignore[misc]
        splits[part] = Split(items, labels, where, _picture_fingerprint(data, image, labels))
    assert class_names is not None
    return splits, class_names


def _picture_fingerprint(data: Any, image: str, labels: torch.Tensor) -> str:
    """SHA-256 over the encoded pictures, without decoding them."""
    import datasets

    digest = hashlib.sha256(labels.numpy().astype("<i8").tobytes())
    for row in data.select_columns([image]).cast_column(image, datasets.Image(decode=False)):
        stored = row[image]
        content = stored["bytes"] if stored["bytes"] is not None else Path(stored["path"]).read_bytes()
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()
