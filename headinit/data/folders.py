"""Folders of pictures: one folder for each class."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from headinit.data.picture_checks import refuse_unreadable
from headinit.data.splits import DataSplits, Split, check_class_count, divide
from headinit.errors import DataError

logger = logging.getLogger(__name__)

# What torchvision's ImageFolder takes for a picture.
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
SPLIT_FOLDERS = {"train": ("train",), "validation": ("val", "valid", "validation", "dev"), "test": ("test",)}


def load_imagefolder(
    root: str | Path | None = None,
    *,
    validation_root: str | Path | None = None,
    test_root: str | Path | None = None,
    skip_unreadable: bool = False,
    check_pictures: bool = True,
    validation: float | int = 0.2,
    seed: int = 0,
) -> DataSplits:
    """Pictures in ``root/class/*`` or ``root/{train,val,test}/class/*``; classes are the sorted folder names.

    Pictures stay on disk until they are used. Files that are not pictures by their suffix are left out and reported.

    Args:
        root: the folder.
        validation_root, test_root: folders ``class/*`` of other pictures of the same classes (another domain, say).
        skip_unreadable: leave out pictures that cannot be decoded, instead of stopping.
        check_pictures: decode every picture once before anything else.
        validation: share (float) or number (int) of training pictures that select, where no folder is given for it.
        seed: decides which.

    Raises:
        DataError: no such folder, an empty class folder, one class only, a class unknown to the training folder,
            pictures that cannot be decoded.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png"):
        ...         (Path(folder) / name).parent.mkdir(exist_ok=True)
        ...         Image.new("RGB", (4, 4)).save(Path(folder) / name)
        ...     splits = load_imagefolder(folder, validation=0.5)
        >>> splits.class_names, len(splits.train), len(splits.validation)
        (('cat', 'dog'), 2, 2)
    """
    if root is None:
        raise DataError(
            "data=imagefolder needs data.root=FOLDER: a folder that holds one folder of pictures per class."
        )
    top = _folder(root, "data.root")
    folders = _split_folders(top)
    if validation_root is not None:
        folders["validation"] = _folder(validation_root, "data.validation_root")
    if test_root is not None:
        folders["test"] = _folder(test_root, "data.test_root")
    found = {part: _scan(folder) for part, folder in folders.items()}
    class_names = tuple(sorted(found["train"]))
    for part, classes in found.items():
        unknown = sorted(set(classes) - set(class_names))
        if unknown:
            raise DataError(
                f"{folders[part]} has the classes {', '.join(map(repr, unknown[:10]))}, unknown to {folders['train']}, "
                f"which has {', '.join(map(repr, class_names[:10]))}{' ...' if len(class_names) > 10 else ''}. "
                "Training must see every class."
            )
    splits, digests = {}, {}
    for part, classes in found.items():
        splits[part], digests[part] = _split_of(folders[part], classes, class_names)
    name = top.name if top.name not in SPLIT_FOLDERS["train"] else top.parent.name
    report_shared(name, digests)
    checked = refuse_unreadable(splits, skip_unreadable=skip_unreadable, check_pictures=check_pictures)
    return _finish(checked, class_names, name, validation, seed)


def report_shared(name: str, digests: dict[str, list[str]]) -> None:
    """Warn where validation or test examples stand in the training data too: scores would be too good."""
    known = set(digests["train"])
    for part, others in digests.items():
        shared = sum(digest in known for digest in others) if part != "train" else 0
        if shared:
            logger.warning(
                "%s: %d of %d %s examples are identical to a training example.", name, shared, len(others), part
            )


def _finish(
    parts: dict[str, Split | None], class_names: tuple[str, ...], name: str, validation: float | int, seed: int
) -> DataSplits:
    train, held_out = parts["train"], parts.get("validation")
    assert train is not None
    present = torch.bincount(train.labels, minlength=len(class_names)).tolist()
    lost = [class_names[k] for k, count in enumerate(present) if count == 0]
    if lost:
        raise DataError(f"No readable training picture is left of {', '.join(map(repr, lost))}.")
    check_class_count(train.labels, class_names, name)
    if held_out is None:
        train, held_out = divide(train, validation, seed)
    return DataSplits(train, held_out, parts.get("test"), class_names, "image", name)


def _folder(path: str | Path, option: str) -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise DataError(f"{option}={path} is {'a file' if folder.exists() else 'not there'}: give a folder.")
    return Path(os.path.normpath(folder))


def _subfolders(folder: Path) -> list[Path]:
    hidden = ("__MACOSX", "__pycache__")
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".") and p.name not in hidden)


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURE_SUFFIXES and not path.name.startswith(".") and path.is_file()


def _split_folders(top: Path) -> dict[str, Path]:
    """`{"train": top}`, or the folders of the splits. A class may be called "train": then it holds pictures itself."""
    by_name: dict[str, Path] = {}
    for folder in _subfolders(top):
        if _subfolders(folder) and not any(map(_is_picture, folder.iterdir())):
            by_name[folder.name.lower()] = folder
    found: dict[str, Path] = {}
    for part, names in SPLIT_FOLDERS.items():
        present = [by_name[name] for name in names if name in by_name]
        if len(present) > 1:
            raise DataError(f"{top} has several {part} folders ({', '.join(p.name for p in present)}): keep one.")
        if present:
            found[part] = present[0]
    if not found:
        return {"train": top}
    if "train" not in found:
        raise DataError(f"{top} has {', '.join(p.name for p in found.values())} but no folder 'train'.")
    others = [p.name for p in _subfolders(top) if p not in found.values()]
    if others:
        logger.warning("%s: left out the folders %s, which are no split.", top, ", ".join(others))
    return found


def _scan(folder: Path) -> dict[str, list[Path]]:
    """The pictures of each class folder, sorted by name; what is left out is reported."""
    classes = _subfolders(folder)
    if not classes:
        raise DataError(f"{folder} has no class folders: expected {folder.name}/CLASS/*.jpg.")
    found, ignored = {}, []
    for class_folder in classes:
        entries = sorted(class_folder.iterdir())
        pictures = [path for path in entries if _is_picture(path)]
        others = [path for path in entries if path not in set(pictures)]
        if not pictures:
            held = ", ".join(p.name for p in others[:5]) or "nothing"
            deeper = f"Is the root one level too high? Try {class_folder}."
            hint = deeper if _subfolders(class_folder) else "Fill it or delete it."
            raise DataError(
                f"Class folder {class_folder} holds no picture ({'/'.join(PICTURE_SUFFIXES)}); it holds {held}. {hint}"
            )
        found[class_folder.name] = pictures
        ignored += others
    if ignored:
        shown = ", ".join(str(p.relative_to(folder)) for p in ignored[:5]) + (" ..." if len(ignored) > 5 else "")
        logger.warning(
            "%s: left out %d entries that are not pictures by their suffix: %s.", folder, len(ignored), shown
        )
    return found


def _split_of(folder: Path, classes: dict[str, list[Path]], class_names: Sequence[str]) -> tuple[Split, list[str]]:
    paths = [path for name in class_names for path in classes.get(name, [])]
    labels = [k for k, name in enumerate(class_names) for _ in classes.get(name, [])]
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(digest_of_file, paths))
    total = hashlib.sha256()
    for path, label, digest in zip(paths, labels, digests, strict=True):
        line = (path.relative_to(folder).as_posix(), str(path.stat().st_size), digest, class_names[label])
        total.update(("\x00".join(line) + "\n").encode("utf-8", "surrogateescape"))
    split = Split(paths, torch.tensor(labels, dtype=torch.int64), [str(p) for p in paths], total.hexdigest())
    return split, digests


def digest_of_file(path: Path) -> str:
    """SHA-256 of a file's content, read in chunks."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror or error}.") from error
    return digest.hexdigest()
