"""Two data sets that need no network and no files: real digits, and sentences from the libraries that are installed."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from headinit.data.splits import DataSplits, Split, divide
from headinit.errors import DataError

TEST_SHARE = 0.2

# Dependencies of headinit, so that they are there wherever it runs.
DOCUMENTED_LIBRARIES = ("matplotlib", "numpy", "scipy", "sklearn", "torch", "transformers")
_SKIPPED_FOLDERS = {
    "tests",
    "testing",
    "test",
    "__pycache__",
    "_vendor",
    "vendor",
    "externals",
    "third_party",
    "include",
}
_FILE_BYTES = (2_000, 40_000)
_BYTES_PER_QUOTE = 1200
_PER_FILE = 20  # sentences, so that no single file marks its library
_NAMES = (
    "scikit-learn scikit numpy np scipy sklearn pytorch torchvision torch transformers timm matplotlib mpl pyplot plt "
    "hugging face huggingface"
)
_GIVE_AWAY = re.compile(
    r"\b(?:hugging ?face|"
    + "|".join(re.escape(n) for n in _NAMES.split() if n not in ("hugging", "face"))
    + r")(?:\.\w+)*\b",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"[A-Z][A-Za-z0-9 ,;:'()\-/]+[.]")


def load_digits(*, validation: float | int = 0.2, seed: int = 0) -> DataSplits:
    """1,797 handwritten digits, 8x8 grey (E. Alpaydin and C. Kaynak, UCI 1998, as scikit-learn brings them).

    Pictures are uint8 `(8, 8)`: the values 0..16 scaled to 0..255. A fifth of all is the test split.

    Args:
        validation: share (float) of all examples, or number (int), that selects.
        seed: decides which examples go into which split.

    Example:
        >>> splits = load_digits()
        >>> len(splits.train), len(splits.validation), len(splits.test)
        (1079, 359, 359)
    """
    table = np.loadtxt(_digits_file(), delimiter=",")
    pictures = np.rint(table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    labels = torch.from_numpy(table[:, -1].astype(np.int64))
    digest = hashlib.sha256(pictures.tobytes() + labels.numpy().astype("<i8").tobytes()).hexdigest()
    whole = Split(list(pictures), labels, [f"digits example {i}" for i in range(len(labels))], digest)
    return _divided(whole, tuple(str(k) for k in range(10)), "image", "digits", validation, seed)


def _digits_file() -> Path:
    """The table that scikit-learn brings, without the second that importing scikit-learn takes."""
    spec = importlib.util.find_spec("sklearn")
    if spec is None or not spec.submodule_search_locations:
        raise DataError("data=digits reads a file of scikit-learn, which is not installed: pip install scikit-learn.")
    return Path(next(iter(spec.submodule_search_locations)), "datasets", "data", "digits.csv.gz")


def load_pydocs(*, sentences_per_library: int = 400, validation: float | int = 0.2, seed: int = 0) -> DataSplits:
    """Sentences of the docstrings of six installed libraries; the class is the library. Made at run time by reading.

    Source files are parsed, never imported. Names of the libraries, dotted paths that begin with them, code and
    markup are taken out; a sentence that two libraries share is dropped. The same installation gives the same data;
    other versions of the libraries give other data, and another fingerprint. A fifth of all is the test split.

    Args:
        sentences_per_library: how many of each; all libraries give the same number.
        validation: share (float) of all examples, or number (int), that selects.
        seed: decides which examples go into which split.

    Raises:
        DataError: a library yields too few sentences (its sources are not installed as files).
    """
    if sentences_per_library < 10:
        raise DataError(f"sentences_per_library must be at least 10, got {sentences_per_library}.")
    # A quarter more than needed: sentences that libraries share are dropped afterwards.
    found = {name: _library_sentences(name, sentences_per_library * 5 // 4) for name in DOCUMENTED_LIBRARIES}
    owners: dict[str, set[str]] = {}
    for name, sentences in found.items():
        for sentence in sentences:
            owners.setdefault(_normal_form(sentence), set()).add(name)
    own = {name: [s for s in sentences if len(owners[_normal_form(s)]) == 1] for name, sentences in found.items()}
    count = min(sentences_per_library, *(len(sentences) for sentences in own.values()))
    if count < 10:
        few = min(own, key=lambda name: len(own[name]))
        raise DataError(f"data=pydocs found {count} sentences in {few}: its source files are not installed.")
    items = [sentence for name in DOCUMENTED_LIBRARIES for sentence in own[name][:count]]
    labels = torch.arange(len(DOCUMENTED_LIBRARIES)).repeat_interleave(count)
    digest = hashlib.sha256("".join(json.dumps([s, int(k)]) for s, k in zip(items, labels, strict=True)).encode())
    names = [f"pydocs {DOCUMENTED_LIBRARIES[k]} sentence {i % count}" for i, k in enumerate(labels.tolist())]
    whole = Split(items, labels, names, digest.hexdigest())
    return _divided(whole, DOCUMENTED_LIBRARIES, "text", "pydocs", validation, seed)


def _divided(
    whole: Split, class_names: tuple[str, ...], modality: str, name: str, validation: float | int, seed: int
) -> DataSplits:
    """Train, validation and test, stratified; both shares count from the whole."""
    rest, test = divide(whole, TEST_SHARE, seed, "test")
    if isinstance(validation, float) and 0 < validation < 1 - TEST_SHARE:
        validation = round(validation * len(whole))
    train, held_out = divide(rest, validation, seed)
    return DataSplits(train, held_out, test, class_names, modality, name)


@lru_cache(maxsize=16)
def _library_sentences(library: str, count: int) -> tuple[str, ...]:
    """The first `count` distinct sentences, files taken in an order that mixes the parts of the library."""
    found: dict[str, str] = {}
    for path in _source_files(library):
        sentences = (s for docstring in _docstrings(path) for s in _sentences(docstring))
        for sentence in islice(sentences, _PER_FILE):
            found.setdefault(_normal_form(sentence), sentence)
        if len(found) >= count:
            break
    return tuple(found.values())[:count]


def _source_files(library: str) -> list[Path]:
    spec = importlib.util.find_spec(library)
    if spec is None or spec.origin is None:
        raise DataError(f"data=pydocs reads the docstrings of {library}, which is not installed: pip install it.")
    root = Path(spec.origin).parent
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    keyed = [(hashlib.sha256(path.relative_to(root).as_posix().encode()).digest(), path) for path in files]
    return [path for _, path in sorted(keyed) if _FILE_BYTES[0] < path.stat().st_size < _FILE_BYTES[1]]


def _docstrings(path: Path) -> Iterator[str]:
    try:
        source = path.read_text(encoding="utf-8")
        if source.count('"""') * _BYTES_PER_QUOTE < len(source):
            return  # parsing is what takes the time: files with few docstrings are not worth it
        tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return
    # Not ast.walk: classes and functions stand in the bodies of modules and classes, no expression need be visited.
    waiting: list[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef] = [tree]
    while waiting:
        node = waiting.pop()
        docstring = ast.get_docstring(node)
        if docstring:
            yield docstring
        if isinstance(node, (ast.Module, ast.ClassDef)):
            inside = [n for n in node.body if isinstance(n, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))]
            waiting += reversed(inside)


def _sentences(docstring: str) -> Iterator[str]:
    """Plain sentences of 6 to 40 words, without names of libraries, code and markup."""
    for paragraph in re.split(r"\n\s*\n", docstring):
        if ">>>" in paragraph or "::" in paragraph or "---" in paragraph or paragraph.isupper():
            continue
        text = re.sub(r":[\w:]+:`~?([^`<]*)(?:<[^`]*>)?`", r"\1", " ".join(paragraph.split()))
        text = re.sub(r"[`*]", "", text)
        text = re.sub(r" +([,.;:)])", r"\1", " ".join(_GIVE_AWAY.sub(" ", text).split()))
        for sentence in re.split(r"(?<=[.])\s+(?=[A-Z])", text):
            if 6 <= len(sentence.split()) <= 40 and _SENTENCE.fullmatch(sentence):
                yield sentence


def _normal_form(sentence: str) -> str:
    return re.sub(r"[^a-z0-9]+", " ", sentence.lower()).strip()
