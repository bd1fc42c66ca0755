"""Finding the pictures that cannot be decoded, before a run starts rather than in its third epoch."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

from headinit.data.images import to_rgb
from headinit.data.splits import Split
from headinit.errors import DataError

logger = logging.getLogger(__name__)

_SHOWN = 5


def unreadable_pictures(split: Split) -> dict[int, str]:
    """Which pictures of a split cannot be decoded: their positions and the reasons. Every picture is tried.

    Example:
        >>> import torch
        >>> split = Split([Image.new("RGB", (4, 4)), Path("absent.jpg")], torch.tensor([0, 1]), ["a", "b"], "")
        >>> list(unreadable_pictures(split))
        [1]
    """
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        reasons = pool.map(lambda i: _reason(split, i), range(len(split)))
        return {i: reason for i, reason in enumerate(reasons) if reason is not None}


def refuse_unreadable(
    splits: Mapping[str, Split | None], *, skip_unreadable: bool = False, check_pictures: bool = True
) -> dict[str, Split | None]:
    """The splits without their undecodable pictures, which are dropped only when `skip_unreadable` says so.

    Args:
        splits: by name ("train", ...); None where there is none.
        skip_unreadable: drop them with a warning instead of stopping.
        check_pictures: False trusts the files until they are read (`skip_unreadable` checks all the same).

    Raises:
        DataError: some pictures cannot be decoded and `skip_unreadable` is False; all are counted, the first are named.
    """
    if not (check_pictures or skip_unreadable):
        return dict(splits)
    bad = {name: unreadable_pictures(split) for name, split in splits.items() if split is not None}
    total = sum(len(split) for split in splits.values() if split is not None)
    listed = [f"{splits[name].names[i]} ({why})" for name, found in bad.items() for i, why in found.items()]  # type: ignore[union-attr]
    if not listed:
        return dict(splits)
    shown = "; ".join(listed[:_SHOWN]) + (f"; and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else "")
    if not skip_unreadable:
        raise DataError(
            f"Cannot read {len(listed)} of {total} pictures: {shown}. "
            "Repair or delete them, or leave them out with data.skip_unreadable=true."
        )
    logger.warning("Left out %d of %d pictures that cannot be read: %s.", len(listed), total, shown)
    return {name: _without(split, bad[name]) if split is not None else None for name, split in splits.items()}


def _without(split: Split, bad: Mapping[int, str]) -> Split:
    return split.select([i for i in range(len(split)) if i not in bad]) if bad else split


def _reason(split: Split, index: int) -> str | None:
    try:
        item: Any = split.items[index]
        if isinstance(item, (str, Path)):
            _decode_small(Path(item))
        else:
            to_rgb(item)
    except Exception as error:  # a foreign decoder may raise anything; whatever it is, the picture cannot be used
        return (
            "not a picture" if isinstance(error, Image.UnidentifiedImageError) else str(error) or type(error).__name__
        )
    return None


def _decode_small(path: Path) -> None:
    """Decode a file at an eighth of its size: all of its bytes are parsed, most of the arithmetic is saved."""
    with Image.open(path) as picture:
        picture.draft(None, (max(1, picture.width // 8), max(1, picture.height // 8)))
        to_rgb(picture)
