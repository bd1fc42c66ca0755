"""Whether the weights and data of a published row are there, and what to put where when they are not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from headinit.backbones.load import load_backbone
from headinit.config import Settings, as_mapping
from headinit.data.splits import DataSplits
from headinit.errors import ConfigError, DataError, HeadInitError, RequirementError
from headinit.experiment import load_splits
from headinit.reproduction.baselines import Row

# Where things are and how a run shows itself: these differ from machine to machine and change no number.
_PLACES = frozenset(
    {"seed", "order_seed", "model.weights", "data.root", "data.path", "data.revision", "data.download"}
    | {f"data.{part}_{kind}" for part in ("train", "validation", "test") for kind in ("file", "root")}
    | {"data.skip_unreadable", "data.check_pictures", "data.modality"}
    | {f"trainer.{name}" for name in ("workers", "progress", "save_every_steps", "cache", "drift")}
)
# What of the data is part of a recipe even where the examples are counted.
_RECIPE_OF_DATA = ("augmentation", "per_class", "train_size", "validation", "test", "join_validation", "split_seed")


class Requirements:
    """Looks for weights and data; what several rows share is looked for once."""

    def __init__(self) -> None:
        self._data: dict[str, str | tuple[int, ...]] = {}
        self._weights: dict[str, str | None] = {}

    def check(self, row: Row, settings: Settings, *, other_data: bool = False) -> tuple[int, ...]:
        """Whether a row can be run here.

        Args:
            row: the row.
            settings: its recipe with the user's own settings.
            other_data: the user has chosen the data set, so that its size is not the row's to say.

        Returns:
            The number of examples in each split.

        Raises:
            RequirementError: it cannot; the message lists everything that is missing, and where it belongs.
        """
        problems = [] if row.unsupported is None else [f"headinit cannot run it: {row.unsupported}"]
        given = _flat(as_mapping(settings))
        problems += [
            f"{name} is not set, and no library fetches what it names." for name in row.needs if not given[name]
        ]
        counts = self._find_data(settings)
        if isinstance(counts, str):
            problems.append(f"data: {counts}{_archive_of(settings.data)}")
        elif not other_data and not _are_the_rows(row, counts):
            problems.append(
                f"data: found {_counted(counts)} examples, and the published row has {_counted(row.examples or ())}: "
                "these are other data."
            )
        missing = None if "model.weights" in row.needs and not given["model.weights"] else self._find_weights(settings)
        if missing is not None:
            problems.append(f"weights: {missing}{_size_of(settings.model)}")
        if problems:
            where = [f"  - {file}" for file in row.files] if len(problems) > (row.unsupported is not None) else []
            listed = ["What belongs where:", *where] if where else []
            raise RequirementError("\n".join([f"Cannot run {row.name} ({row.title}) here.", *problems, *listed]))
        assert not isinstance(counts, str)
        return counts

    def _find_data(self, settings: Settings) -> str | tuple[int, ...]:
        """The number of examples in each split, or why there are none."""
        key = repr((settings.data, settings.seed))
        if key not in self._data:
            try:
                self._data[key] = _sizes(load_splits(settings))
            except (DataError, ConfigError) as error:
                self._data[key] = str(error)
        return self._data[key]

    def _find_weights(self, settings: Settings) -> str | None:
        options = {k: v for k, v in settings.model.items() if k not in ("name", "pooling") and v is not None}
        key = repr((settings.model["name"], options))
        if key not in self._weights:
            try:
                load_backbone(settings.model["name"], seed=settings.seed, **options)
                self._weights[key] = None
            except HeadInitError as error:
                self._weights[key] = str(error)
        return self._weights[key]


def differences(row: Row, own: Settings, asked: Settings, counts: tuple[int, ...] = ()) -> tuple[str, ...]:
    """What the user's settings change in a recipe, beyond where things are: a run with such changes is a stand-in.

    The same data read in another way (local files in place of the hub) are known by the number of examples.

    Args:
        row, own: the row and its recipe.
        asked: the settings that are run.
        counts: the number of examples in each split that was found.
    """
    same_data = row.examples is not None and _are_the_rows(row, counts)
    mine, theirs = _flat(as_mapping(asked)), _flat(as_mapping(own))
    changed = []
    for key in sorted({*mine, *theirs}):
        group, _, name = key.partition(".")
        counted = group == "data" and same_data and name not in _RECIPE_OF_DATA
        if key in _PLACES or counted or mine.get(key) == theirs.get(key):
            continue
        changed.append(f"{key}={mine.get(key)} in place of {theirs.get(key)}")
    first = [text for text in changed if text.startswith(("model.name=", "data.name="))]
    # Another backbone or data set brings options of its own along; its name says it all.
    groups = tuple(f"{text.partition('.')[0]}." for text in first)
    return tuple(first + [text for text in changed if not text.startswith(groups)] if groups else changed)


def _are_the_rows(row: Row, counts: tuple[int, ...]) -> bool:
    return row.examples is None or tuple(counts[: len(row.examples)]) == row.examples


def _sizes(splits: DataSplits) -> tuple[int, ...]:
    test = () if splits.test is None else (len(splits.test),)
    return (len(splits.train), len(splits.validation), *test)


def _counted(counts: tuple[int, ...]) -> str:
    return " + ".join(
        f"{count:,} {part}" for count, part in zip(counts, ("training", "validation", "test"), strict=False)
    )


def _flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _archive_of(data: Mapping[str, Any]) -> str:
    """The archives that torchvision would fetch for a data set, with the MD5 that it checks them against."""
    if data.get("name") != "torchvision" or not data.get("dataset"):
        return ""
    import torchvision

    kind = getattr(torchvision.datasets, data["dataset"], None)
    pairs = [
        (getattr(kind, address, None), getattr(kind, digest, None))
        for address, digest in (("url", "tgz_md5"), ("_URL", "_MD5"), ("_DATASET_URL", "_DATASET_MD5"))
    ]
    pairs += list(getattr(kind, "_RESOURCES", ()))
    prefix = getattr(kind, "_download_url_prefix", "")
    pairs += [(prefix + name, md5) for name, md5 in dict(getattr(kind, "_file_dict", {})).values()]
    known = [f"{address} (MD5 {md5})" if md5 else str(address) for address, md5 in pairs if address]
    return f" Its archives: {', '.join(known)}." if known else ""


def _size_of(model: Mapping[str, Any]) -> str:
    """The size of a file of torchvision, and the digest that its name promises."""
    name, _, tag = str(model["name"]).partition(".")
    if model.get("weights") is not None or model.get("library") not in ("torchvision", "auto") or not tag:
        return ""
    from torchvision.models import get_model_weights

    weights = get_model_weights(name)[tag]
    file = weights.url.rpartition("/")[2]
    digest = re.search(r"-([0-9a-f]{8})\.", file)
    begins = f", SHA-256 begins with {digest.group(1)}" if digest else ""
    return f"\n  {file}: {weights.meta['_file_size']} MiB{begins}."
