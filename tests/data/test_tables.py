from __future__ import annotations

import csv
import json
import logging
from pathlib import Path

import pytest
import torch

from headinit.data.catalog import load_data
from headinit.data.labels import sorted_names
from headinit.data.tables import Table, choose_columns, load_table, read_table
from headinit.errors import DataError

TREC = r"(?P<label>[A-Z]+):\S+ (?P<text>.*)"
ROWS = [('He said "no", twice', "neg"), ("plain", "pos"), ("tab\there", "neg"), ("two\nlines", "pos")]


def write(path: Path, content: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(content.encode(encoding))
    return path


def tsv(path: Path, header: str, rows: list[str]) -> Path:
    return write(path, "\n".join([header, *rows]) + "\n")


@pytest.fixture
def small(tmp_path) -> Path:
    return tsv(tmp_path / "train.tsv", "sentence\tlabel", [f"text number {i}\t{'ab'[i % 2]}" for i in range(20)])


def test_tsv_is_never_unquoted(tmp_path):
    path = tsv(
        tmp_path / "train.tsv", "sentence\tlabel", ['" The start\t1', 'the end "\t0', 'a "b" c\t1', "x\x85y\u2028z\t0"]
    )
    table = read_table(path)
    assert table.column("sentence") == ['" The start', 'the end "', 'a "b" c', "x\x85y\u2028z"]
    assert table.where[2] == f"{path} line 4"


@pytest.mark.parametrize("separator", [None, ";"])
def test_csv_reads_what_python_writes(tmp_path, separator):
    with open(tmp_path / "train.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=separator or ",")
        writer.writerows([("text", "label"), *ROWS])
    table = read_table(tmp_path / "train.csv", separator=separator)
    assert table.rows == ROWS
    assert [where.rsplit(" ", 1)[1] for where in table.where] == ["2", "3", "4", "5"]


def test_jsonl_json_and_parquet_hold_the_same(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    objects = [{"text": text, "label": label} for text, label in ROWS]
    write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, objects)) + "\n\n")
    write(tmp_path / "a.json", json.dumps(objects, indent=1))
    parquet.write_table(pyarrow.Table.from_pylist(objects), tmp_path / "a.parquet")
    tables = [read_table(tmp_path / name) for name in ("a.jsonl", "a.json", "a.parquet")]
    assert [table.rows for table in tables] == [ROWS] * 3
    splits = [load_table(train_file=tmp_path / n, validation=0.5) for n in ("a.jsonl", "a.json", "a.parquet")]
    assert len({split.fingerprint for split in splits}) == 1


def test_bom_windows_line_ends_and_txt_with_tabs(tmp_path):
    write(
        tmp_path / "all.txt",
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t1\t2\ta\tb\r\n0\t1\t2\tc\td\r\n",
    )
    table = read_table(tmp_path / "all.txt")
    assert table.columns[0] == "Quality"
    assert table.rows[1][-1] == "d"
    assert choose_columns(table, None, None, None).text_pair == "#2 String"


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ("index sentence1 sentence2 label", ("sentence1", "sentence2", "label")),
        ("sentence label", ("sentence", None, "label")),
        ("index question sentence label", ("question", "sentence", "label")),
        ("id qid1 qid2 question1 question2 is_duplicate", ("question1", "question2", "is_duplicate")),
        ("Text Class", ("Text", None, "Class")),
        ("premise hypothesis gold_label", ("premise", "hypothesis", "gold_label")),
        ("review sentiment", ("review", None, "sentiment")),
        ("text text_pair label", ("text", "text_pair", "label")),
        ("text question answer target", ("text", None, "target")),
    ],
)
def test_usual_columns_are_found_and_reported(columns, expected, caplog):
    table = Table("train.tsv", tuple(columns.split()), [], [])
    with caplog.at_level(logging.INFO):
        found = choose_columns(table, None, None, None)
    assert (found.text, found.text_pair, found.label) == expected
    assert f"text={expected[0]}" in caplog.text


def test_one_text_is_taken_when_one_is_named():
    table = Table("train.tsv", ("sentence1", "sentence2", "label"), [], [])
    assert choose_columns(table, "sentence2", None, None).text_pair is None
    with pytest.raises(
        DataError, match=r"data\.text=body: train\.tsv has no such column\. It has: sentence1, sentence2, label"
    ):
        choose_columns(table, "body", None, None)
    with pytest.raises(DataError, match=r"needs data\.text"):
        choose_columns(table, None, "sentence2", None)
    with pytest.raises(DataError, match=r"set data\.label=COLUMN\. It has: text, answer"):
        choose_columns(Table("f", ("text", "answer"), [], []), None, None, None)
    with pytest.raises(DataError, match=r"set data\.text=COLUMN"):
        choose_columns(Table("f", ("words", "label"), [], []), None, None, None)


def test_files_of_a_folder_are_found(small):
    folder = small.parent
    tsv(folder / "dev.tsv", "sentence\tlabel", ["new\ta", "old\tb"])
    tsv(folder / "test.tsv", "index\tsentence", ["0\thidden"])
    splits = load_table(folder)
    assert (len(splits.train), len(splits.validation), splits.test) == (20, 2, None)
    assert splits.validation.items == ["new", "old"]
    assert splits.validation.names[1] == f"{folder / 'dev.tsv'} line 3"
    tsv(folder / "test.tsv", "sentence\tlabel", ["shown\tb"])
    with_test = load_table(folder)
    assert with_test.test is not None
    assert with_test.test.labels.tolist() == [1]
    assert load_table(small).train.items == load_table(train_file=small).train.items
    assert load_table(folder, train_file="train.tsv", test_file="dev.tsv").test.items == ["new", "old"]  # type: ignore[union-attr]


def test_missing_and_ambiguous_files(small, tmp_path):
    with pytest.raises(DataError, match=r"needs data\.root=FOLDER"):
        load_table()
    with pytest.raises(DataError, match=r"data\.test_file=no\.tsv: there is no file"):
        load_table(small.parent, test_file="no.tsv")
    with pytest.raises(DataError, match="not there"):
        load_table(tmp_path / "absent")
    tsv(tmp_path / "train.csv", "text,label", ["a,b"])
    with pytest.raises(DataError, match=r"several train files \(train\.csv, train\.tsv\)"):
        load_table(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no train file.*holds nothing"):
        load_table(tmp_path / "empty")
    with pytest.raises(DataError, match="Cannot tell the format"):
        load_table(train_file=write(tmp_path / "words.dat", "one two\n"))
    with pytest.raises(DataError, match="Did you mean 'csv'"):
        load_table(small, format="cvs")


def test_missing_labels_are_named_and_counted(tmp_path):
    path = tsv(tmp_path / "train.tsv", "text\tlabel", ["a\tx", "b\t", "c\ty", "d\t ", "e\tx"])
    with pytest.raises(DataError, match=r"train\.tsv line 3, .*train\.tsv line 5: 2 of 5 examples have none"):
        load_table(path)
    write(tmp_path / "t.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": 1}\n{"text": null, "label": 0}\n')
    with pytest.raises(DataError, match=r"No text in column 'text' of .*line 3: 1 of 3"):
        load_table(tmp_path / "t.jsonl")
    write(tmp_path / "t.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}\n')
    with pytest.raises(DataError, match=r"No label.*line 2: 1 of 2"):
        load_table(tmp_path / "t.jsonl")


def test_labels_unknown_to_training_are_refused(small):
    tsv(small.parent / "dev.tsv", "sentence\tlabel", ["new\ta", "odd\tc"])
    with pytest.raises(
        DataError, match=r"unknown to the training examples: .*dev\.tsv line 3 \('c'\); 1 of 2.*'a', 'b'"
    ):
        load_table(small.parent)
    tsv(small.parent / "dev.tsv", "sentence", ["new"])
    with pytest.raises(DataError, match=r"data\.label=label: .*dev\.tsv has no such column"):
        load_table(small.parent)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text\tlabel\na\tb\nc\n", r"line 3 has 1 fields, the header 2 \(text, label\)"),
        ("text\ttext\na\tb\n", "two columns of one name"),
        ("", "is empty"),
        ("text\tlabel\na\tx\nb\tx\n", "one class"),
        ("text\tlabel\n", "one class"),
    ],
)
def test_broken_tables(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        load_table(write(tmp_path / "train.tsv", content))


def test_broken_csv_json_and_encoding(tmp_path):
    with pytest.raises(DataError, match="line 3 cannot be read as csv"):
        load_table(write(tmp_path / "t.csv", 'text,label\na,b\n"open,c\n'))
    with pytest.raises(DataError, match="line 3 is not JSON"):
        load_table(write(tmp_path / "t.jsonl", '{"text": "a", "label": 1}\n\n{"text"\n'))
    with pytest.raises(DataError, match="line 1 hold no JSON object"):
        load_table(write(tmp_path / "t.jsonl", "1\n"))
    with pytest.raises(DataError, match=r"as parquet"):
        load_table(write(tmp_path / "t.parquet", "no"))
    latin = write(tmp_path / "t.tsv", "text\tlabel\nna\u00efve\ta\nb\tb\n", "latin-1")
    with pytest.raises(DataError, match=r"line 2 is not utf-8-sig \(byte 0xef\).*latin-1"):
        load_table(latin)
    assert read_table(latin, encoding="latin-1").rows[0][0] == "na\u00efve"
    with pytest.raises(DataError, match="not known to Python"):
        load_table(latin, encoding="latin-99")


def test_lines_by_pattern(tmp_path):
    path = write(
        tmp_path / "q.label", "NUM:dist How far is it ?\nLOC:city Where is Nimes ?\nHUM:x Who ?\nNUM:y When ?\n"
    )
    splits = load_table(train_file=path, line_pattern=TREC, validation=1)
    assert splits.class_names == ("HUM", "LOC", "NUM")
    assert sorted([*splits.train.items, *splits.validation.items]) == [
        "How far is it ?", "When ?", "Where is Nimes ?", "Who ?",
    ]  # fmt: skip
    write(path, "NUM:dist How far ?\nno label here\nLOC:c Where ?\n")
    with pytest.raises(DataError, match=r"line 2 do not match.*1 of 3 lines"):
        load_table(train_file=path, line_pattern=TREC)
    with pytest.raises(DataError, match="needs the groups"):
        load_table(train_file=path, line_pattern="(.*)")
    with pytest.raises(DataError, match="not a regular expression"):
        load_table(train_file=path, line_pattern="(?P<text>")


def test_classes_are_sorted_by_value_or_alphabet(tmp_path):
    assert sorted_names(["10", "9", "-1", "2.5"]) == ("-1", "2.5", "9", "10")
    assert sorted_names(["nan", "1"]) == ("1", "nan")
    rows = [f"t{i}\t{label}" for i, label in enumerate(["10", "9", "2"] * 3)]
    splits = load_table(tsv(tmp_path / "train.tsv", "text\tlabel", rows))
    assert splits.class_names == ("2", "9", "10")


def test_header_names_may_be_given(tmp_path):
    path = write(tmp_path / "train.csv", "1,good\n0,bad\n1,fine\n0,poor\n")
    splits = load_table(path, column_names=["label", "text"], validation=2)
    assert sorted([*splits.train.items, *splits.validation.items]) == ["bad", "fine", "good", "poor"]


def test_regression_targets(tmp_path):
    path = tsv(tmp_path / "train.tsv", "text\tscore", [f"t{i}\t{i / 4}" for i in range(8)])
    splits = load_data("csv", root=path, task="regression", validation=2)
    assert (splits.task, splits.class_names, splits.train.labels.shape) == ("regression", ("score",), (6, 1))
    assert splits.train.labels.dtype == torch.float32
    for text, target in zip(splits.train.items, splits.train.labels, strict=True):
        assert target.item() == int(text[1:]) / 4
    tsv(path, "text\tscore", ["a\t1.5", "b\tmany", "c\tinf"])
    with pytest.raises(DataError, match=r"line 3 \('many'\), .*line 4 \('inf'\); 2 of 3"):
        load_data("csv", root=path, task="regression")


def test_multi_label_targets(tmp_path):
    path = tsv(tmp_path / "train.tsv", "text\tlabels", ["a\tred|round", "b\t", "c\tround", "d\tblue | red"])
    splits = load_table(path, task="multi_label", label_separator="|", validation=1)
    assert splits.class_names == ("blue", "red", "round")
    targets = {
        text: target
        for split in (splits.train, splits.validation)
        for text, target in zip(split.items, split.labels.tolist(), strict=True)
    }
    assert targets == {"a": [0, 1, 1], "b": [0, 0, 0], "c": [0, 0, 1], "d": [1, 1, 0]}
    tsv(tmp_path / "dev.tsv", "text\tlabels", ["e\tgreen"])
    with pytest.raises(DataError, match=r"dev\.tsv line 2 \('green'\)"):
        load_table(tmp_path, task="multi_label", label_separator="|")
    with pytest.raises(DataError, match="Known: multi_label, regression, single_label"):
        load_table(path, task="token")


def test_fingerprint_follows_texts_and_labels(small):
    first = load_table(small)
    moved = small.rename(small.parent / "other.tsv")
    assert load_table(moved).fingerprint == first.fingerprint
    content = moved.read_text()
    write(moved, content.replace("text number 3", "text number three"))
    changed = load_table(moved).fingerprint
    write(moved, content.replace("number 3\tb", "number 3\ta"))
    assert len({first.fingerprint, changed, load_table(moved).fingerprint}) == 3


@pytest.mark.parametrize(
    ("name", "counts", "classes", "paired"),
    [
        ("glue_rte", (2490, 277), ("entailment", "not_entailment"), True),
        ("glue_mrpc", (3668, 408), ("0", "1"), True),
        ("glue_sst2", (67349, 872), ("0", "1"), False),
    ],
)
def test_real_glue_files(shared_data, name, counts, classes, paired):
    splits = load_data("csv", root=shared_data / name)
    assert (len(splits.train), len(splits.validation)) == counts
    assert (splits.class_names, splits.test, splits.name) == (classes, None, name)
    assert isinstance(splits.train.items[0], tuple) is paired
    if name == "glue_mrpc":
        assert splits.train.labels.double().mean().item() == pytest.approx(0.68, abs=0.01)
        more = load_data("csv", root=shared_data / name, test_file="msr_paraphrase_test.txt")
        assert more.test is not None
        assert len(more.test) == 1725


def test_real_trec(shared_data, caplog):
    options = {"train_file": "train_5500.label", "test_file": "TREC_10.label", "encoding": "latin-1"}
    splits = load_data("csv", root=shared_data / "trec", line_pattern=TREC, **options)
    assert splits.test is not None
    assert (len(splits.train) + len(splits.validation), len(splits.test)) == (5452, 500)
    assert splits.class_names == ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
    assert "10 of 500 test examples are identical to a training example" in caplog.text
