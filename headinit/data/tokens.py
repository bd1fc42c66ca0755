"""Sentences whose words have tags: CoNLL files and jsonl."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headinit.data.folders import report_shared
from headinit.data.labels import label_text, named
from headinit.data.splits import DataSplits, Split, divide
from headinit.data.tables import find_files, name_of, numbered_lines, read_text
from headinit.data.text import IGNORED_LABEL, Words
from headinit.errors import DataError

SUFFIXES = (".conll", ".txt", ".tsv", ".iob", ".iob2", ".bio", ".jsonl", ".ndjson", ".json")
WORD_KEYS = ("tokens", "words")
TAG_KEYS = ("tags", "ner_tags", "pos_tags", "labels")
OUTSIDE = "O"


@dataclass(frozen=True)
class Sentence:
    """A sentence in words.

    Attributes:
        words, tags: as many of one as of the other.
        lines: the line that each word stands in.
    """

    words: Words
    tags: tuple[str, ...]
    lines: tuple[int, ...]


def load_tokens(
    root: str | Path | None = None,
    *,
    train_file: str | Path | None = None,
    validation_file: str | Path | None = None,
    test_file: str | Path | None = None,
    encoding: str = "utf-8-sig",
    validation: float | int = 0.2,
    seed: int = 0,
) -> DataSplits:
    """Sentences whose words have tags, for token classification (named entities, parts of speech).

    In a CoNLL file each line holds a word first and its tag last, parted by spaces or tabs (other columns between them
    are not read); a blank line ends a sentence; ``-DOCSTART-`` lines are left out. In a jsonl file each line holds an
    object with ``tokens`` (or ``words``) and ``tags`` (or ``ner_tags``, ``pos_tags``, ``labels``), two lists of one
    length. The classes are the tags of the training file: ``O`` first, the others by alphabet, with their ``B-`` and
    ``I-``.

    Args:
        root: a folder that holds ``train``, ``dev`` (or ``val``, ``valid``, ``validation``) and ``test`` files, found
            by name; or one file. The other files may be relative to it.
        train_file, validation_file, test_file: files, named one by one.
        encoding: of the files.
        validation: share (float) or number (int) of training sentences that select, where no file is given for it.
        seed: decides which.

    Raises:
        DataError: a file is missing, a line has no tag, words and tags differ in number, there is one tag only, or a
            tag is unknown to the training file; file and line are named.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (Path(folder) / "train.conll").write_text("EU B-ORG\\nrejects O\\n\\nGerman B-MISC\\ncall O\\n")
        ...     splits = load_tokens(folder, validation=1)
        >>> splits.class_names, len(splits.train), splits.task
        (('O', 'B-MISC', 'B-ORG'), 1, 'token')
    """
    given = {"train": train_file, "validation": validation_file, "test": test_file}
    files = find_files(root, given, SUFFIXES, data="conll")
    sentences = {part: read_sentences(path, encoding) for part, path in files.items()}
    name = name_of(root, files["train"])
    tags = {tag for sentence in sentences["train"] for tag in sentence.tags}
    class_names = tuple(sorted(tags, key=lambda tag: (tag != OUTSIDE, tag)))
    if len(class_names) < 2:
        raise DataError(
            f"Cannot learn to tell tags apart in {files['train']}: all its words have one tag ({class_names[0]!r}). "
            "The tag is the last column of each line."
        )
    splits, texts = {}, {}
    for part, own in sentences.items():
        places = [f"{files[part]} line {sentence.lines[0]}" for sentence in own]
        labels = encode_tags(own, class_names, files[part])
        splits[part] = Split([sentence.words for sentence in own], labels, places, _fingerprint(own))
        texts[part] = [json.dumps(sentence.words) for sentence in own]
    report_shared(name, texts)
    train, held_out = splits["train"], splits.get("validation")
    if held_out is None:
        train, held_out = divide(train, validation, seed)
    return DataSplits(train, held_out, splits.get("test"), class_names, "text", name, "token")


def read_sentences(path: Path, encoding: str = "utf-8-sig") -> list[Sentence]:
    """The sentences of a CoNLL or jsonl file; see `load_tokens`.

    Raises:
        DataError: a line has no tag, is no JSON, or holds lists that do not fit; file and line are named.
    """
    text = read_text(path, encoding)
    jsonl = path.suffix.lower() in (".jsonl", ".ndjson", ".json")
    sentences = _from_json(path, text) if jsonl else _from_columns(path, text)
    if not sentences:
        raise DataError(f"{path} holds no sentence.")
    return sentences


def read_words(path: Path, encoding: str = "utf-8-sig") -> list[Sentence]:
    """The sentences of a CoNLL file without their tags, which need not be there: the first column of each line.

    Raises:
        DataError: the file cannot be read or holds no word.
    """
    sentences = _from_columns(path, read_text(path, encoding), tagged=False)
    if not sentences:
        raise DataError(f"{path} holds no sentence.")
    return sentences


def encode_tags(sentences: Sequence[Sentence], class_names: Sequence[str], path: Path) -> Tensor:
    """Tags as class numbers: `(N, W)` int64, W the most words of a sentence, -100 behind the last word.

    Raises:
        DataError: a tag is none of `class_names`; the first such lines are named.
    """
    numbers = {name: k for k, name in enumerate(class_names)}
    tagged = [(tag, line) for s in sentences for tag, line in zip(s.tags, s.lines, strict=True)]
    unknown = [f"{path} line {line} ({tag!r})" for tag, line in tagged if tag not in numbers]
    if unknown:
        raise DataError(
            f"Tags unknown to the training file: {named(unknown)}; {len(unknown)} of {len(tagged)} words. Training has "
            f"{', '.join(map(repr, class_names[:10]))}{' ...' if len(class_names) > 10 else ''}."
        )
    labels = torch.full((len(sentences), max(len(s.words) for s in sentences)), IGNORED_LABEL, dtype=torch.int64)
    for row, sentence in zip(labels, sentences, strict=True):
        row[: len(sentence.tags)] = torch.tensor([numbers[tag] for tag in sentence.tags])
    return labels


def _from_columns(path: Path, text: str, tagged: bool = True) -> list[Sentence]:
    sentences: list[Sentence] = []
    rows: list[tuple[int, str, str]] = []
    for number, line in enumerate([*text.split("\n"), ""], 1):
        line = line.removesuffix("\r")
        if not line.strip():
            if rows:
                lines, words, tags = zip(*rows, strict=True)
                sentences.append(Sentence(Words(words), tags, lines))
            rows = []
            continue
        # Not `split()`: a word may hold a no-break space, and a space where tabs part the columns.
        columns = [part.strip() for part in line.split("\t" if "\t" in line else " ") if part.strip()]
        if columns[0] == "-DOCSTART-":
            continue
        if tagged and len(columns) < 2:
            raise DataError(
                f"{path} line {number} holds one column ({line.strip()!r}): each line needs a word and its tag, parted "
                "by a space or a tab."
            )
        rows.append((number, columns[0], columns[-1]))
    return sentences


def _from_json(path: Path, text: str) -> list[Sentence]:
    sentences = []
    for number, line in numbered_lines(text):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path} line {number} is not JSON: {error.msg}.") from error
        words, tags = _list_of(entry, WORD_KEYS), _list_of(entry, TAG_KEYS)
        if words is None or tags is None or len(words) != len(tags):
            found = "other contents" if words is None or tags is None else f"{len(words)} words and {len(tags)} tags"
            raise DataError(
                f"{path} line {number} needs an object with two lists of one length, {' or '.join(WORD_KEYS)} and "
                f"{' or '.join(TAG_KEYS)}; it holds {found}."
            )
        texts = [label_text(tag) for tag in tags]
        if None in texts:
            raise DataError(f"{path} line {number}: word {texts.index(None) + 1} has no tag.")
        if words:
            sentences.append(Sentence(Words(map(str, words)), tuple(map(str, texts)), (number,) * len(words)))
    return sentences


def _list_of(entry: Any, keys: Sequence[str]) -> list[Any] | None:
    values = [entry[key] for key in keys if key in entry] if isinstance(entry, dict) else []
    return values[0] if values and isinstance(values[0], list) else None


def _fingerprint(sentences: Sequence[Sentence]) -> str:
    digest = hashlib.sha256()
    for sentence in sentences:
        digest.update((json.dumps([sentence.words, sentence.tags]) + "\n").encode())
    return digest.hexdigest()
