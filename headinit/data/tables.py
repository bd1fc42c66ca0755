"""Tables of texts: csv, tsv, jsonl, parquet, and files of patterned lines."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from headinit.data.folders import report_shared
from headinit.data.labels import (
    check_task,
    encode_classes,
    encode_label_sets,
    encode_targets,
    label_text,
    named,
    require_labels,
    separate_labels,
    sorted_names,
)
from headinit.data.splits import DataSplits, Split, check_class_count, divide
from headinit.errors import DataError, unknown_name

logger = logging.getLogger(__name__)

FORMATS = ("auto", "csv", "tsv", "jsonl", "parquet")
SUFFIXES = {
    ".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl",
    ".parquet": "parquet", ".pq": "parquet",
}  # fmt: skip
SPLIT_STEMS = {"train": ("train",), "validation": ("dev", "val", "valid", "validation"), "test": ("test",)}

# What columns are called, in the order of trial (letter case does not count).
SINGLE_TEXTS = ("text", "sentence")
TEXT_PAIRS = (
    ("sentence1", "sentence2"),
    ("#1 string", "#2 string"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question", "answer"),
    ("query", "passage"),
    ("text_a", "text_b"),
    ("text1", "text2"),
)
OTHER_TEXTS = ("content", "review", "question", "document", "utterance", "tweet", "message", "comment", "title")
LABELS = (
    "label", "labels", "quality", "target", "class", "category", "intent", "sentiment", "gold_label", "is_duplicate",
    "score", "y",
)  # fmt: skip


@dataclass(frozen=True)
class Table:
    """The rows of one file.

    Attributes:
        name: the file's name, for messages.
        columns: the names of the columns.
        rows: one tuple of values for each row, as long as `columns`.
        where: "file.tsv line 12" for each row.
    """

    name: str
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    where: list[str]

    def column(self, name: str) -> list[Any]:
        """The values of one column."""
        position = self.columns.index(name)
        return [row[position] for row in self.rows]


@dataclass(frozen=True)
class Columns:
    """Which columns are read: one text or two, and the label."""

    text: str
    text_pair: str | None
    label: str


def load_table(
    root: str | Path | None = None,
    *,
    train_file: str | Path | None = None,
    validation_file: str | Path | None = None,
    test_file: str | Path | None = None,
    format: str = "auto",
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = None,
    task: str = "single_label",
    label_separator: str = ",",
    encoding: str = "utf-8-sig",
    separator: str | None = None,
    column_names: Sequence[str] | None = None,
    line_pattern: str | None = None,
    validation: float | int = 0.2,
    seed: int = 0,
) -> DataSplits:
    """Texts, or pairs of texts, with labels from files; GLUE's files as they are.

    Args:
        root: a folder that holds ``train``, ``dev`` (or ``val``, ``valid``, ``validation``) and ``test`` files, found
            by name; a test file without labels is left out. Or one file. The other files may be relative to it.
        train_file, validation_file, test_file: files, named one by one.
        format: csv (quoted), tsv (never quoted), jsonl, parquet; auto goes by the suffix.
        text, text_pair, label: names of columns; where none is given the usual ones are looked for, and reported.
        task: single_label; multi_label (labels parted by `label_separator`); regression (labels are numbers).
        label_separator: parts the labels of one example, for multi_label.
        encoding: of the text files ("latin-1", ...).
        separator: parts the columns of csv and tsv; by default "," and tab.
        column_names: names of the columns of files without a header line.
        line_pattern: regular expression with groups ``text``, ``label`` and perhaps ``text_pair`` that every line must
            match, for files that are no tables.
        validation: share (float) or number (int) of training examples that select, where no file is given for it.
        seed: decides which.

    Raises:
        DataError: a file, column or label is missing, a line cannot be read, one class only, a label unknown to the
            training file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (Path(folder) / "train.csv").write_text("text,label\\ngood,1\\nbad,0\\nfine,1\\npoor,0\\n")
        ...     splits = load_table(folder, validation=0.5)
        >>> splits.class_names, len(splits.train), len(splits.validation)
        (('0', '1'), 2, 2)
    """
    check_task(task)
    if format not in FORMATS:
        raise unknown_name("table format", format, FORMATS, DataError)
    given = {"train": train_file, "validation": validation_file, "test": test_file}
    files = find_files(root, given)

    def read(path: Path) -> Table:
        return read_table(path, format, encoding, separator, column_names, line_pattern)

    tables = {part: read(path) for part, path in files.items()}
    columns = choose_columns(tables["train"], text, text_pair, label)
    if "test" in tables and test_file is None and not _has_labels(tables["test"], columns):
        logger.info("%s has no labels: left out.", files["test"])
        del tables["test"]
    name = name_of(root, files["train"])
    return splits_of_tables(tables, columns, task, label_separator, name, validation, seed)


def splits_of_tables(
    tables: dict[str, Table],
    columns: Columns,
    task: str,
    label_separator: str,
    name: str,
    validation: float | int,
    seed: int,
    class_names: tuple[str, ...] | None = None,
) -> DataSplits:
    """Tables by split ("train", perhaps "validation" and "test") as splits of one task.

    Classes are the distinct labels of the training table unless `class_names` gives them.
    """
    class_names, encode = _label_encoder(tables["train"], columns, task, label_separator, class_names)
    splits, texts = {}, {}
    for part, table in tables.items():
        items = texts_of(table, columns)
        labels = encode(table)
        raw = [str(value) for value in table.column(columns.label)]
        splits[part] = Split(items, labels, table.where, _fingerprint(items, raw))
        texts[part] = [json.dumps(item) for item in items]
    report_shared(name, texts)
    train, held_out = splits["train"], splits.get("validation")
    if task == "single_label":
        check_class_count(train.labels, class_names, name)
    if held_out is None:
        train, held_out = divide(train, validation, seed)
    return DataSplits(train, held_out, splits.get("test"), class_names, "text", name, task)


def choose_columns(table: Table, text: str | None, text_pair: str | None, label: str | None) -> Columns:
    """The columns to read: the given names, or the usual ones where none is given (reported to the log).

    Raises:
        DataError: a named column is not there, or none of the usual names is; the columns found are listed.

    Example:
        >>> choose_columns(Table("train.tsv", ("index", "sentence1", "sentence2", "label"), [], []), None, None, None)
        Columns(text='sentence1', text_pair='sentence2', label='label')
    """
    for option, name in (("text", text), ("text_pair", text_pair), ("label", label)):
        if name is not None:
            require_column(table, name, option)
    if text is None and text_pair is not None:
        raise DataError(f"data.text_pair={text_pair} needs data.text=COLUMN, the first text. {_found(table)}")
    guessed = []
    if text is None:
        text, text_pair = _guess_texts(table)
        guessed.append(f"text={text}" + (f" text_pair={text_pair}" if text_pair else ""))
    if label is None:
        label = _guess(table, LABELS)
        guessed.append(f"label={label}")
    if text is None or label is None:
        what = "text" if text is None else "label"
        raise DataError(
            f"Cannot tell which column of {table.name} holds the {what}: set data.{what}=COLUMN. {_found(table)}"
        )
    if guessed:
        logger.info("%s: columns taken by their usual names: %s.", table.name, " ".join(guessed))
    return Columns(text, text_pair, label)


def require_column(table: Table, name: str, option: str) -> None:
    """Refuse the name of a column that is not there."""
    if name not in table.columns:
        raise DataError(f"data.{option}={name}: {table.name} has no such column. {_found(table)}")


def texts_of(table: Table, columns: Columns) -> list[Any]:
    """The texts, or pairs of texts, of all rows.

    Raises:
        DataError: a text is missing (the first rows are named, all are counted) or the column is not there.
    """
    names = [columns.text] + ([columns.text_pair] if columns.text_pair else [])
    values = []
    for option, name in zip(("text", "text_pair"), names, strict=False):
        require_column(table, name, option)
        column = table.column(name)
        missing = [table.where[i] for i, value in enumerate(column) if value is None]
        if missing:
            raise DataError(f"No text in column {name!r} of {named(missing)}: {len(missing)} of {len(column)} rows.")
        empty = sum(not str(value).strip() for value in column)
        if empty:
            logger.warning("%s: %d of %d texts in column %r are empty.", table.name, empty, len(column), name)
        values.append([str(value) for value in column])
    return values[0] if len(values) == 1 else list(zip(*values, strict=True))


def _label_encoder(
    train: Table, columns: Columns, task: str, label_separator: str, class_names: tuple[str, ...] | None
) -> tuple[tuple[str, ...], Callable[[Table], Tensor]]:
    """The class names, and the function from a table to its labels."""
    column = columns.label

    def values(table: Table) -> list[Any]:
        require_column(table, column, "label")
        return table.column(column)

    def texts(table: Table) -> list[str | None]:
        return [label_text(value) for value in values(table)]

    def sets(table: Table) -> list[list[str]]:
        return [separate_labels(value, label_separator) for value in values(table)]

    if task == "regression":
        return (column,), lambda table: encode_targets(texts(table), table.where, column)
    if task == "multi_label":
        names = class_names or sorted_names([label for labels in sets(train) for label in labels])
        return names, lambda table: encode_label_sets(sets(table), table.where, names)
    known = class_names or sorted_names(require_labels(texts(train), train.where, column))
    return known, lambda table: encode_classes(texts(table), table.where, column, known)


def _has_labels(table: Table, columns: Columns) -> bool:
    if columns.label not in table.columns:
        return False
    return any(label_text(value) is not None for value in table.column(columns.label))


def _guess(table: Table, names: Iterable[str]) -> str | None:
    by_name = {column.strip().lower(): column for column in reversed(table.columns)}
    return next((by_name[name] for name in names if name in by_name), None)


def _guess_texts(table: Table) -> tuple[str | None, str | None]:
    # A lone "sentence" is the text; beside a "question" (QNLI) it is the second one.
    pairs = [(a, b) for first, second in TEXT_PAIRS if (a := _guess(table, [first])) and (b := _guess(table, [second]))]
    single = _guess(table, SINGLE_TEXTS)
    if pairs and (single is None or single in pairs[0]):
        return pairs[0]
    extra = _guess(table, ["text_pair"]) if single is not None else None
    return (single or _guess(table, OTHER_TEXTS)), extra


def _found(table: Table) -> str:
    return f"It has: {', '.join(table.columns)}."


def _fingerprint(items: Sequence[Any], labels: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for item, label in zip(items, labels, strict=True):
        digest.update((json.dumps([item, label]) + "\n").encode())
    return digest.hexdigest()


def name_of(root: str | Path | None, train: Path) -> str:
    """What to call the data: the folder, or the training file."""
    if root is not None and Path(root).expanduser().is_dir():
        return Path(root).expanduser().resolve().name
    return train.stem


def find_files(
    folder: str | Path | None,
    given: dict[str, str | Path | None],
    suffixes: Iterable[str] = tuple(SUFFIXES),
    data: str = "csv",
) -> dict[str, Path]:
    """The file of each split that there is: those that are given, and those of the usual names in the folder.

    Raises:
        DataError: a file is not there, there is none to train on, or there are several.
    """
    root = Path(folder).expanduser() if folder is not None else None
    if root is not None and root.is_file() and given["train"] is None:
        root, given = root.parent, {**given, "train": root.name}
    if root is not None and not root.is_dir():
        raise DataError(f"data.root={root} is {'a file' if root.exists() else 'not there'}: give a folder of files.")
    files: dict[str, Path] = {}
    for part, file in given.items():
        if file is not None:
            path = Path(file).expanduser()
            path = root / path if root is not None else path
            if not path.is_file():
                raise DataError(f"data.{part}_file={file}: there is no file {path}.")
            files[part] = path
    if "train" in files:
        return files
    if root is None:
        raise DataError(f"data={data} needs data.root=FOLDER (with a train file in it) or data.train_file=FILE.")
    for part, stems in SPLIT_STEMS.items():
        found = sorted(p for p in root.iterdir() if p.stem.lower() in stems and p.suffix.lower() in suffixes)
        if len(found) > 1 and part not in files:
            raise DataError(
                f"{root} has several {part} files ({', '.join(p.name for p in found)}): "
                f"choose with data.{part}_file=FILE."
            )
        if found:
            files.setdefault(part, found[0])
    if "train" not in files:
        held = ", ".join(sorted(p.name for p in root.iterdir())[:10]) or "nothing"
        raise DataError(
            f"{root} has no train file (train{next(iter(suffixes))}, ...): set data.train_file=FILE. It holds {held}."
        )
    return files


def read_table(
    path: Path,
    format: str = "auto",
    encoding: str = "utf-8-sig",
    separator: str | None = None,
    column_names: Sequence[str] | None = None,
    line_pattern: str | None = None,
) -> Table:
    """The rows of one file; see `load_table` for the arguments.

    Raises:
        DataError: the file cannot be read as what it should be; file and line are named.
    """
    if line_pattern is not None:
        return _read_lines(path, read_text(path, encoding), line_pattern)
    if format == "auto":
        format = SUFFIXES.get(path.suffix.lower(), "")
    if format == "parquet":
        return _read_parquet(path)
    text = read_text(path, encoding)
    if not format:
        # Other suffixes (.txt) may hold anything; a tab in the first line says what.
        if "\t" not in text.split("\n", 1)[0]:
            raise DataError(f"Cannot tell the format of {path} by its suffix: set data.format to csv, tsv or jsonl.")
        format = "tsv"
    if format == "jsonl":
        return _read_json(path, text)
    return _read_separated(path, text, format, separator, column_names)


def read_text(path: Path, encoding: str) -> str:
    """The text of a file.

    Raises:
        DataError: it cannot be read, or is of another encoding; the line is named.
    """
    try:
        content = path.read_bytes()
        return content.decode(encoding)
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror or error}.") from error
    except LookupError as error:
        raise DataError(f"data.encoding={encoding} is not known to Python: try utf-8-sig or latin-1.") from error
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path} line {line} is not {encoding} (byte 0x{content[error.start]:02x}): "
            "set data.encoding, to latin-1 perhaps."
        ) from error


def numbered_lines(text: str) -> list[tuple[int, str]]:
    """Lines that are not blank. Not `splitlines`, which also parts at characters that texts may hold."""
    lines = (line.removesuffix("\r") for line in text.split("\n"))
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _read_lines(path: Path, text: str, line_pattern: str) -> Table:
    try:
        pattern = re.compile(line_pattern)
    except re.error as error:
        raise DataError(f"data.line_pattern={line_pattern} is not a regular expression: {error}.") from error
    columns = tuple(pattern.groupindex)
    if not {"text", "label"} <= set(columns):
        raise DataError(f"data.line_pattern={line_pattern} needs the groups (?P<text>...) and (?P<label>...).")
    numbered = numbered_lines(text)
    matches = [pattern.fullmatch(line) for _, line in numbered]
    wrong = [f"line {number}" for (number, _), match in zip(numbered, matches, strict=True) if match is None]
    if wrong:
        raise DataError(
            f"{path}: {named(wrong)} do not match data.line_pattern; {len(wrong)} of {len(numbered)} lines."
        )
    rows = [tuple(match[name] for name in columns) for match in matches if match is not None]
    return Table(str(path), columns, rows, [f"{path} line {number}" for number, _ in numbered])


def _read_separated(
    path: Path, text: str, format: str, separator: str | None, column_names: Sequence[str] | None
) -> Table:
    if format == "tsv":
        # As GLUE writes it: a quotation mark is a character like any other.
        numbered = [(number, line.split(separator or "\t")) for number, line in numbered_lines(text)]
    else:
        numbered = _quoted_rows(path, text, separator or ",")
    if column_names is None:
        if not numbered:
            raise DataError(f"{path} is empty.")
        columns = tuple(name.strip() for name in numbered.pop(0)[1])
    else:
        columns = tuple(column_names)
    if len(set(columns)) < len(columns):
        raise DataError(f"{path} has two columns of one name: {', '.join(columns)}.")
    for number, row in numbered:
        if len(row) != len(columns):
            raise DataError(
                f"{path} line {number} has {len(row)} fields, the header {len(columns)} ({', '.join(columns)}). "
                "Repair the line, or set data.format or data.separator."
            )
    return Table(str(path), columns, [tuple(row) for _, row in numbered], [f"{path} line {n}" for n, _ in numbered])


def _quoted_rows(path: Path, text: str, separator: str) -> list[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows, start = [], 1
    try:
        for row in reader:
            if row and (len(row) > 1 or row[0].strip()):
                rows.append((start, row))
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path} line {start} cannot be read as csv: {error}.") from error
    return rows


def _read_json(path: Path, text: str) -> Table:
    objects: list[tuple[int, Any]] = []
    number = 1
    try:
        if text.lstrip().startswith("["):
            objects = list(enumerate(json.loads(text), 1))
        else:
            for number, line in numbered_lines(text):
                objects.append((number, json.loads(line)))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} line {number + error.lineno - 1} is not JSON: {error.msg}.") from error
    wrong = [f"line {number}" for number, row in objects if not isinstance(row, dict)]
    if wrong:
        raise DataError(f"{path}: {named(wrong)} hold no JSON object.")
    columns = tuple(dict.fromkeys(key for _, row in objects for key in row))
    rows = [tuple(row.get(column) for column in columns) for _, row in objects]
    return Table(str(path), columns, rows, [f"{path} line {number}" for number, _ in objects])


def _read_parquet(path: Path) -> Table:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"Reading {path} needs pyarrow: pip install 'headinit[tables]'.") from error
    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.lib.ArrowException) as error:
        raise DataError(f"Cannot read {path} as parquet: {error}.") from error
    columns = tuple(table.column_names)
    rows = list(zip(*(table.column(name).to_pylist() for name in columns), strict=True))
    return Table(str(path), columns, rows, [f"{path} row {i + 1}" for i in range(len(rows))])
