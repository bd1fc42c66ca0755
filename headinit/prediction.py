"""A saved model at work: pictures or sentences in, names and probabilities out; what cannot be read is named."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headinit.data.folders import PICTURE_SUFFIXES
from headinit.data.tables import SUFFIXES, Table, _guess_texts, read_table
from headinit.data.text import Words, first_tokens
from headinit.data.tokens import read_words
from headinit.errors import CheckpointError, ConfigError, DataError, HeadInitError
from headinit.features.extract import to_model
from headinit.heads.locate import evaluating
from headinit.heads.record import call_model, record_of
from headinit.persistence import MANIFEST, load, preprocessing_of
from headinit.training.averaging import soup

if TYPE_CHECKING:
    from rich.table import Table as RichTable

OUTPUT_SUFFIXES = (".csv", ".jsonl")
_COLUMNS = (".conll", ".iob", ".iob2", ".bio")
_WORD = re.compile(r"\w+(?:[.,'\u2019-]\w+)*|[^\w\s]")


@dataclass(frozen=True)
class Inputs:
    """What is to be labelled.

    Attributes:
        items: paths of pictures, sentences, or pairs of sentences.
        names: what to call each of them: its path, or "file.txt line 3".
        failures: name and reason of what could not be read.
        left_out: files in a folder that are not pictures by their suffix.
    """

    items: Sequence[Any]
    names: Sequence[str]
    failures: tuple[tuple[str, str], ...] = ()
    left_out: int = 0


@dataclass(frozen=True)
class Prediction:
    """What a model says about one input.

    Attributes:
        name: of the input.
        labels: the label; of a multi-label model all whose probability reaches the threshold; none for regression.
        ranking: label and probability, the most probable first, `top_k` of them; for regression every target and its
            value.
        word: the word of the input that this is about, of a model that labels words.
    """

    name: str
    labels: tuple[str, ...]
    ranking: tuple[tuple[str, float], ...]
    word: str | None = None


@dataclass(frozen=True)
class Predictions:
    """All that a model says, in the order of the inputs.

    Attributes:
        rows: one for each input that could be read; one for each of its words where the model labels words.
        failures: name and reason of each that could not.
        task: ``"single_label"``, ``"multi_label"``, ``"regression"`` or ``"token"``.
    """

    rows: tuple[Prediction, ...]
    failures: tuple[tuple[str, str], ...]
    task: str


# --- the model --------------------------------------------------------------------------------------------------------


def load_for_prediction(folder: str | os.PathLike | None) -> nn.Module:
    """A saved model, by its own folder or by that of the run that left it.

    Raises:
        ConfigError: no folder was given.
        CheckpointError: there is no saved model, or none that can label inputs by itself.
    """
    if not folder:
        raise ConfigError("Which model? Give model=FOLDER, the folder of a run or of a saved model.")
    place = Path(folder).expanduser()
    if not place.is_dir():
        raise CheckpointError(
            f"model={place} is {'a file' if place.exists() else 'not there'}. Give the folder of a run or of a saved "
            "model."
        )
    if not (place / MANIFEST).is_file() and (place / "model" / MANIFEST).is_file():
        place = place / "model"
    if not (place / MANIFEST).is_file():
        held = sorted(path.parent for path in place.glob(f"*/model/{MANIFEST}"))
        hint = f" It holds several runs: choose one, such as model={held[0].parent}." if held else ""
        raise CheckpointError(f"model={place} holds no saved model (no {MANIFEST}, no model/{MANIFEST}).{hint}")
    model = load(place)
    if preprocessing_of(model) is None:
        raise CheckpointError(
            f"The model in {place} was saved without its preprocessing, so how to prepare inputs is unknown. Save it "
            "with headinit.save(model, folder, preprocessing=...)."
        )
    return model


def load_soup(folders: Sequence[str | os.PathLike]) -> nn.Module:
    """The mean of several saved models of one task, such as runs that differ in the order of their examples.

    Raises:
        ConfigError: the models name their classes differently.
        CheckpointError: as `load_for_prediction`.
        TrainingError: they are not of one network and head.
    """
    models = [load_for_prediction(folder) for folder in folders]
    names = [record_of(model).class_names for model in models]
    for folder, own in zip(folders, names, strict=True):
        if own != names[0]:
            raise ConfigError(
                f"{folder} predicts other classes than {folders[0]}: only models of one task have a mean."
            )
    return soup(models)


# --- the inputs -------------------------------------------------------------------------------------------------------


def find_inputs(source: Any, modality: str, text: str | None = None, text_pair: str | None = None) -> Inputs:
    """What `source` names: a picture, a folder of pictures, a file of sentences, a table, or a sentence itself.

    A ``.conll`` file has a word a line, its first column, and a blank line behind each sentence.

    Args:
        source: a path, or a sentence.
        modality: ``"image"`` or ``"text"``: what the model reads.
        text, text_pair: columns of a table; None takes the usual names. Beside a sentence, `text_pair` is the second.

    Raises:
        ConfigError: nothing was given.
        DataError: there is no such file, it holds nothing to label, or a column is not there.

    Example:
        >>> find_inputs("A sentence.", "text").items
        ('A sentence.',)
    """
    if source is None or not str(source).strip():
        raise ConfigError("What is to be labelled? Give input=FILE, input=FOLDER or, for text, input='A sentence.'")
    path = Path(str(source)).expanduser()
    exists = _exists(path)
    if modality == "image":
        if not exists:
            raise DataError(f"input={source}: there is no such file or folder. This model labels pictures.")
        return _pictures_in(path) if path.is_dir() else Inputs((path,), (str(path),))
    if exists and path.is_dir():
        raise DataError(
            f"input={source} is a folder, and this model reads text: give a file with one sentence a line (.txt), a "
            "table (.csv, .tsv, .jsonl), or a sentence."
        )
    if exists:
        if path.suffix.lower() in _COLUMNS:
            return _sentences_of(path)
        return _rows_of(path, text, text_pair) if path.suffix.lower() in SUFFIXES else _lines_of(path)
    if _looks_like_a_file(path, str(source)):
        raise DataError(f"input={source}: there is no such file.")
    item = str(source) if text_pair is None else (str(source), text_pair)
    return Inputs((item,), (str(source),))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a sentence may be longer than a path, or hold what no path does
        return False


def _looks_like_a_file(path: Path, source: str) -> bool:
    known = {".txt", *SUFFIXES, *_COLUMNS, *PICTURE_SUFFIXES}
    return not any(character.isspace() for character in source.strip()) and (
        path.suffix.lower() in known or os.sep in source
    )


def _pictures_in(folder: Path) -> Inputs:
    """Every picture below a folder, sorted by path; links to folders are not followed."""
    found, left_out, failures = [], 0, []

    def unreadable(error: OSError) -> None:
        failures.append((str(error.filename), f"cannot be listed: {error.strerror}"))

    for place, folders, files in os.walk(folder, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__MACOSX")
        pictures = [name for name in files if Path(name).suffix.lower() in PICTURE_SUFFIXES and name[0] != "."]
        left_out += sum(not name.startswith(".") for name in files) - len(pictures)
        found += [Path(place) / name for name in sorted(pictures)]
    if not found and not failures:
        raise DataError(
            f"input={folder} holds no picture ({'/'.join(PICTURE_SUFFIXES)}), nor does any folder below it"
            + (f"; it holds {left_out} other files." if left_out else ".")
        )
    return Inputs(found, [str(path) for path in found], tuple(failures), left_out)


def _lines_of(path: Path) -> Inputs:
    """One sentence a line; blank lines do not count, and a line that is not UTF-8 spoils no other."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror or error}.") from error
    if b"\x00" in content:
        raise DataError(f"{path} is not text (it holds zero bytes). This model reads text in UTF-8.")
    items, names, failures = [], [], []
    for number, raw in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        name = f"{path} line {number}"
        try:
            line = raw.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            failures.append((name, f"is not UTF-8 (byte 0x{raw[error.start]:02x})"))
            continue
        if line:
            items.append(line)
            names.append(name)
    if not items and not failures:
        raise DataError(f"{path} is empty: it needs one sentence a line.")
    return Inputs(items, names, tuple(failures))


def _sentences_of(path: Path) -> Inputs:
    items, names = [], []
    for sentence in read_words(path):
        items.append(sentence.words)
        names.append(f"{path} line {sentence.lines[0]}")
    return Inputs(items, names)


def _rows_of(path: Path, text: str | None, text_pair: str | None) -> Inputs:
    table = read_table(path)
    first, second = _text_columns(table, text, text_pair)
    columns = [table.column(name) for name in (first, second) if name is not None]
    items, names, failures = [], [], []
    for name, *values in zip(table.where, *columns, strict=True):
        if any(value is None or not str(value).strip() for value in values):
            failures.append((name, "has no text"))
            continue
        items.append(str(values[0]) if len(values) == 1 else tuple(str(value) for value in values))
        names.append(name)
    if not items and not failures:
        raise DataError(f"{path} has a header and no row.")
    return Inputs(items, names, tuple(failures))


def _text_columns(table: Table, text: str | None, text_pair: str | None) -> tuple[str, str | None]:
    has = f"{table.name} has: {', '.join(table.columns)}."
    for option, name in (("text", text), ("text_pair", text_pair)):
        if name is not None and name not in table.columns:
            raise DataError(f"{option}={name} is no column. {has}")
    if text is None and text_pair is not None:
        raise DataError(f"text_pair={text_pair} needs text=COLUMN, the first text. {has}")
    found, pair = (text, text_pair) if text is not None else _guess_texts(table)
    if found is None:
        raise DataError(f"Cannot tell which column holds the text: set text=COLUMN. {has}")
    return found, pair


# --- predicting -------------------------------------------------------------------------------------------------------


@dataclass
class _Collected:
    """Rows by position, so that texts may be run in any order."""

    rows: dict[int, Sequence[Prediction]] = field(default_factory=dict)
    failures: list[tuple[str, str]] = field(default_factory=list)

    def in_order(self, task: str) -> Predictions:
        """What was collected, in the order of the inputs."""
        return Predictions(tuple(row for i in sorted(self.rows) for row in self.rows[i]), tuple(self.failures), task)


def label_inputs(
    model: nn.Module, inputs: Inputs, *, batch_size: int = 32, top_k: int = 2, threshold: float = 0.5
) -> Predictions:
    """Run a loaded model over inputs, batch by batch; what cannot be read is left out and named.

    Args:
        model: as `load_for_prediction` gives it.
        inputs: as `find_inputs` gives them.
        batch_size: inputs that go through the model together.
        top_k: how many labels to rank, at most K.
        threshold: probability from which a multi-label model assigns a label.

    Raises:
        ConfigError: a setting is out of range.

    Example:
        >>> from PIL import Image
        >>> from headinit.attach import attach_head
        >>> from headinit.data.images import ImagePreprocessing
        >>> body = nn.Sequential(nn.Flatten(), nn.Linear(12, 9))
        >>> model = attach_head(body, 2, init="zeros", class_names=["cat", "dog"])
        >>> model.headinit_preprocessing = ImagePreprocessing(size=(2, 2))
        >>> label_inputs(model, Inputs([Image.new("RGB", (8, 8)), "absent.png"], ["black", "absent.png"])).rows
        (Prediction(name='black', labels=('cat',), ranking=(('cat', 0.5), ('dog', 0.5)), word=None),)
    """
    check_settings(batch_size, top_k, threshold)
    preprocessing, record = preprocessing_of(model), record_of(model)
    collected = _Collected(failures=list(inputs.failures))
    names = record.class_names or tuple(str(k) for k in range(record.num_classes))
    if record.task == "token":
        _label_words(model, inputs, batch_size, top_k, names, collected)
        return collected.in_order("token")
    prepared: Iterator[tuple[list[int], Any]] = (
        _texts(inputs, preprocessing, batch_size)
        if preprocessing.modality == "text"
        else _pictures(inputs, preprocessing, batch_size, collected.failures)
    )
    with evaluating(model):
        for positions, batch in prepared:
            logits = call_model(model, to_model(batch, model)).double().cpu()
            for position, row in zip(positions, logits, strict=True):
                name = inputs.names[position]
                if row.isfinite().all():
                    collected.rows[position] = [_judge(name, row, names, record.task, top_k, threshold)]
                else:
                    collected.failures.append((name, "gives logits that are not finite"))
    return collected.in_order(record.task)


def _label_words(
    model: nn.Module, inputs: Inputs, batch_size: int, top_k: int, names: Sequence[str], collected: _Collected
) -> None:
    """A label for each word: that of its first token, as in training."""
    preprocessing = preprocessing_of(model)
    pairs = [name for name, item in zip(inputs.names, inputs.items, strict=True) if _is_pair(item)]
    if pairs:
        raise DataError(f"{pairs[0]} is a pair of texts, and this model labels the words of one text. Give text alone.")
    sentences = [words_in(item) for item in inputs.items]
    if not sentences:
        return
    encoded = preprocessing.encode(sentences)
    left = preprocessing.tokenizer.padding_side == "left"
    with evaluating(model):
        for chosen in encoded.lengths.argsort(stable=True).split(batch_size):
            batch = preprocessing.pad(encoded, chosen)
            logits = call_model(model, to_model(batch, model)).double().cpu()
            for position, row in zip(chosen.tolist(), logits, strict=True):
                name, words, tokens = inputs.names[position], sentences[position], encoded.words[position]
                start = len(row) - len(tokens) if left else 0
                known = {tokens[i]: row[start + i] for i in first_tokens(tokens)}
                if not all(scores.isfinite().all() for scores in known.values()):
                    collected.failures.append((name, "gives logits that are not finite"))
                    continue
                collected.rows[position] = [
                    dataclasses.replace(_judge(name, known[k], names, "token", top_k, 0.0), word=word)
                    for k, word in enumerate(words)
                    if k in known
                ]
                if len(known) < len(words):
                    lost = len(words) - len(known)
                    reason = f"{lost} of {len(words)} words have no token: the model reads {preprocessing.max_length}"
                    collected.failures.append((name, reason))


def _is_pair(item: Any) -> bool:
    return isinstance(item, tuple) and not isinstance(item, Words)


def words_in(text: str | Words) -> Words:
    """The words of a sentence, punctuation apart, as files of tagged words have them.

    Example:
        >>> words_in("Anna's U.S.-trip (3.5 days) ends.")
        ("Anna's", 'U.S', '.', '-', 'trip', '(', '3.5', 'days', ')', 'ends', '.')
    """
    return text if isinstance(text, Words) else Words(_WORD.findall(text))


def check_settings(batch_size: int, top_k: int, threshold: float, show: int = 1) -> None:
    """Refuse what is out of range.

    Raises:
        ConfigError: a count below 1, or a threshold that is no probability.
    """
    for name, value in (("batch_size", batch_size), ("top_k", top_k), ("show", show)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}.")
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
        raise ConfigError(f"threshold must be a probability from 0 to 1, got {threshold!r}.")


def _pictures(
    inputs: Inputs, preprocessing: Any, batch_size: int, failures: list[tuple[str, str]]
) -> Iterator[tuple[list[int], Tensor]]:
    positions: list[int] = []
    tensors: list[Tensor] = []
    for position, item in enumerate(inputs.items):
        try:
            tensors.append(preprocessing(item))
            positions.append(position)
        except Exception as error:  # decoders of damaged files raise anything
            reason = str(error) if isinstance(error, HeadInitError) else f"cannot be read: {error}"
            failures.append((inputs.names[position], reason.removeprefix(f"Cannot read picture {item}: ")))
        if len(tensors) == batch_size:
            yield positions, torch.stack(tensors)
            positions, tensors = [], []
    if tensors:
        yield positions, torch.stack(tensors)


def _texts(inputs: Inputs, preprocessing: Any, batch_size: int) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Texts of similar length together, so that little is padded."""
    if not inputs.items:
        return
    encoded = preprocessing.encode(inputs.items)
    for positions in encoded.lengths.argsort(stable=True).split(batch_size):
        yield positions.tolist(), preprocessing.pad(encoded, positions)


def _judge(
    name: str, logits: Tensor, class_names: Sequence[str], task: str, top_k: int, threshold: float
) -> Prediction:
    """Read one row of logits `(K,)` float64 as its task means them."""
    if task == "regression":
        return Prediction(name, (), tuple(zip(class_names, logits.tolist(), strict=True)))
    exclusive = task in ("single_label", "token")
    probabilities = logits.softmax(0) if exclusive else logits.sigmoid()
    values, order = probabilities.sort(descending=True, stable=True)
    ranking = tuple((class_names[k], p) for k, p in zip(order.tolist(), values.tolist(), strict=True))
    chosen = ranking[:1] if exclusive else [pair for pair in ranking if pair[1] >= threshold]
    return Prediction(name, tuple(label for label, _ in chosen), ranking[:top_k])


# --- telling ----------------------------------------------------------------------------------------------------------


def prediction_table(predictions: Predictions, limit: int | None = None) -> RichTable:
    """A table for a person's terminal; names from files are shown as they are, never read as markup.

    Args:
        predictions: what to show.
        limit: the most rows to show.

    Example:
        >>> row = Prediction("a.png", ("[red]",), (("[red]", 0.75), ("dog", 0.25)))
        >>> [str(cell) for column in prediction_table(Predictions((row,), (), "single_label")).columns
        ...  for cell in column.cells]
        ['a.png', '[red]', '75.0 %', 'dog 25.0 %']
    """
    from rich.table import Table as RichTable

    table = RichTable(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("name", overflow="fold")
    shown = predictions.rows[:limit]
    if predictions.task == "regression":
        targets = [target for target, _ in shown[0].ranking] if shown else []
        for target in targets:
            table.add_column(_shown(target), justify="right")
        for row in shown:
            table.add_row(_shown(row.name), *(f"{value:.6g}" for _, value in row.ranking))
        return table
    several = predictions.task == "multi_label"
    by_word = predictions.task == "token"
    if by_word:
        table.add_column("word", overflow="fold")
    table.add_column("labels" if several else "label", overflow="fold")
    table.add_column("probability", justify="right")
    table.add_column("most probable" if several else "runner-up", overflow="fold")
    earlier = None
    for row in shown:
        known = dict(row.ranking)
        chosen = ", ".join(_percent(known[label]) for label in row.labels if label in known)
        others = row.ranking if several else row.ranking[1:]
        named = "" if by_word and row.name == earlier else row.name  # once for all words of a sentence
        earlier = row.name
        table.add_row(
            _shown(named),
            *([_shown(row.word or "")] if by_word else []),
            _shown(", ".join(row.labels) or "none"),
            chosen or "-",
            _shown(", ".join(f"{label} {_percent(p)}" for label, p in others) or "-"),
        )
    return table


def _shown(text: str) -> Any:
    """Text that rich does not read as markup, and that cannot steer a terminal."""
    from rich.text import Text

    return Text("".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text))


def printable(text: str) -> str:
    """Text without characters that steer a terminal.

    Example:
        >>> printable("a\\x1b[31mb")
        'a\N{REPLACEMENT CHARACTER}[31mb'
    """
    return _shown(text).plain


def _percent(probability: float) -> str:
    return f"{100 * probability:.1f} %"


def check_output(output: Any, source: Any) -> Path | None:
    """The file to write, or None.

    Raises:
        ConfigError: of a kind that cannot be written, in no folder, or the input itself.

    Example:
        >>> check_output("labels.csv", "photos").name
        'labels.csv'
    """
    if output is None:
        return None
    path = Path(str(output)).expanduser()
    if path.suffix.lower() not in OUTPUT_SUFFIXES:
        raise ConfigError(f"output={output} must end in {' or '.join(OUTPUT_SUFFIXES)}.")
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"output={output}: {path if path.is_dir() else path.parent} is {_what(path)}.")
    given = Path(str(source)).expanduser()
    if _exists(given) and path.exists() and path.samefile(given):
        raise ConfigError(f"output={output} is the input itself: name another file.")
    return path


def _what(path: Path) -> str:
    return "a folder" if path.is_dir() else "no folder: make it first"


def write_predictions(predictions: Predictions, path: Path) -> None:
    """Write all rows as ``.csv`` or ``.jsonl``, the whole file or nothing.

    csv: ``name,label,probability,label_2,probability_2,...``; for several labels ``name,labels,label_1,...`` (chosen
    labels parted by commas, as data=csv reads them); for regression ``name`` and one column for each target; for words
    a line each, with ``word`` behind the name. jsonl has the same by name, and ``top`` as a list.

    Raises:
        DataError: the file cannot be written.

    Example:
        >>> row = Prediction("a.png", ("cat",), (("cat", 0.75), ("dog", 0.25)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_predictions(Predictions((row,), (), "single_label"), Path(folder) / "labels.csv")
        ...     (Path(folder) / "labels.csv").read_text().splitlines()
        ['name,label,probability,label_2,probability_2', 'a.png,cat,0.75,dog,0.25']
    """
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            # A file name need not be Unicode: its bytes go out as they came in.
            with open(descriptor, "w", encoding="utf-8", newline="", errors="surrogateescape") as file:
                if path.suffix.lower() == ".csv":
                    csv.writer(file).writerows(_csv_rows(predictions))
                else:
                    file.writelines(json.dumps(_as_json(row, predictions.task)) + "\n" for row in predictions.rows)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise DataError(f"Cannot write {path}: {error.strerror or error}.") from error


def _csv_rows(predictions: Predictions) -> Iterator[list[Any]]:
    rows, task = predictions.rows, predictions.task
    ranks = range(1, (len(rows[0].ranking) if rows else 1) + 1)
    if task == "regression":
        yield ["name", *(target for target, _ in rows[0].ranking)] if rows else ["name"]
        yield from ([row.name, *(value for _, value in row.ranking)] for row in rows)
        return
    several = task == "multi_label"
    heads = [f"{kind}_{k}" if k > 1 or several else kind for k in ranks for kind in ("label", "probability")]
    extra = ["labels"] if several else ["word"] if task == "token" else []
    yield ["name", *extra, *heads]
    for row in rows:
        pairs = [value for pair in row.ranking for value in pair]
        yield [row.name, *([",".join(row.labels)] if several else [row.word] if extra else []), *pairs]


def _as_json(row: Prediction, task: str) -> dict[str, Any]:
    if task == "regression":
        return {"name": row.name, "values": dict(row.ranking)}
    top = [{"label": label, "probability": p} for label, p in row.ranking]
    if task == "multi_label":
        return {"name": row.name, "labels": list(row.labels), "top": top}
    word = {"word": row.word} if task == "token" else {}
    return {"name": row.name, **word, "label": row.labels[0], "probability": row.ranking[0][1], "top": top}
