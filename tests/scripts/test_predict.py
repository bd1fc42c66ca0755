"""scripts/predict.py, run in this process as the command line runs it."""

from __future__ import annotations

import csv
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from torch import nn

from headinit.attach import attach_head, save
from headinit.data.images import ImagePreprocessing
from headinit.data.text import TextPreprocessing
from headinit.heads.record import call_model
from tests.heads.models import tiny

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("[red]cat[/red]", "dog", "Zürich, 'x'")
WORDS = ["[PAD]", "[UNK]", "a", "good", "bad", "film", "it's", "really", "not", "fine", "the", "plot"]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def predict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the script in an empty folder; gives exit code, standard output and standard error."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # the script sets these two: put them back
        monkeypatch.setenv("HEADINIT_DEBUG", "0")
        monkeypatch.setattr(sys, "argv", [str(ROOT / "scripts" / "predict.py"), *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(sys.argv[0], run_name="__main__")
        told = capsys.readouterr()
        return int(ended.value.code or 0), told.out, told.err

    return run


def picture_model(num_classes: int = 3, **options: Any) -> nn.Module:
    return attach_head(timm.create_model("test_resnet"), num_classes, seed=1, **options).eval()


def text_model(**options: Any) -> nn.Module:
    return attach_head(tiny("BertForSequenceClassification"), 3, seed=1, **options).eval()


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")


PICTURES = ImagePreprocessing(size=(32, 32))
TEXTS = TextPreprocessing(tokenizer(), max_length=16)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures [b]"
    for name, colour in (("red.png", "red"), ("below/green.JPG", "green"), ("below/more/blue.bmp", "blue")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 48), colour).save(folder / name)
    return folder


def rows_of(file: str) -> list[dict[str, str]]:
    with open(file, encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened))


def expected(model: nn.Module, path: Path) -> torch.Tensor:
    with torch.no_grad():
        return model(PICTURES(path)[None])[0]


def test_a_folder_of_pictures(predict: Run, pictures: Path, tmp_path: Path) -> None:
    model = picture_model(class_names=NAMES)
    save(model, tmp_path / "run" / "model", preprocessing=PICTURES)
    (pictures / "notes.txt").write_text("not a picture")
    (pictures / ".hidden.png").write_text("nor this")
    code, out, err = predict(f"model={tmp_path / 'run'}", f"input={pictures}", "output=all.csv", "batch_size=2")
    assert (code, err) == (0, "")
    assert "Left out 1 files" in out
    rows = rows_of("all.csv")
    paths = [pictures / "red.png", pictures / "below/green.JPG", pictures / "below/more/blue.bmp"]
    assert [row["name"] for row in rows] == [str(path) for path in paths]
    for row, path in zip(rows, paths, strict=True):
        values, order = expected(model, path).softmax(0).sort(descending=True)
        assert [row["label"], row["label_2"]] == [NAMES[order[0]], NAMES[order[1]]]
        assert float(row["probability"]) == pytest.approx(values[0].item(), abs=1e-6)
        assert float(row["probability_2"]) == pytest.approx(values[1].item(), abs=1e-6)
        assert f"{100 * values[0].item():.1f} %" in out
    assert rows[0]["label"] in out  # in full, whatever looks like markup in it
    assert "pictures [b]" in out


def test_one_picture_and_more_ranks(predict: Run, pictures: Path, tmp_path: Path) -> None:
    save(picture_model(), tmp_path / "model", preprocessing=PICTURES)
    path = pictures / "red.png"
    code, _, _ = predict(f"model={tmp_path / 'model'}", f"input={path}", "output=one.jsonl", "top_k=9")
    assert code == 0
    (row,) = map(json.loads, Path("one.jsonl").read_text().splitlines())
    assert {pair["label"] for pair in row["top"]} == {"0", "1", "2"}  # no names are known
    assert sum(pair["probability"] for pair in row["top"]) == pytest.approx(1)
    assert row["label"] == row["top"][0]["label"]


def test_the_mean_of_several_models(predict: Run, pictures: Path, tmp_path: Path) -> None:
    models = [picture_model(class_names=NAMES) for _ in range(2)]
    for number, model in enumerate(models):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * number)
        save(model, tmp_path / f"run {number}" / "model", preprocessing=PICTURES)
    folders = ",".join(f"'{tmp_path}/run {number}'" for number in range(2))
    code, _, err = predict(f"model=[{folders}]", f"input={pictures / 'red.png'}", "output=mean.csv")
    assert (code, err) == (0, "")
    mean = picture_model()
    with torch.no_grad():
        for own, first, second in zip(mean.parameters(), *(model.parameters() for model in models), strict=True):
            own.copy_((first.double() + second.double()) / 2)
    (row,) = rows_of("mean.csv")
    assert float(row["probability"]) == pytest.approx(expected(mean, pictures / "red.png").softmax(0).max().item())
    save(picture_model(class_names=("a", "b", "c")), tmp_path / "other", preprocessing=PICTURES)
    code, _, err = predict(f"model=['{tmp_path}/run 0','{tmp_path}/other']", f"input={pictures}")
    assert code == 2
    assert "predicts other classes" in err


def test_what_cannot_be_read_is_named_and_the_rest_is_done(predict: Run, pictures: Path, tmp_path: Path) -> None:
    save(picture_model(), tmp_path / "model", preprocessing=PICTURES)
    (pictures / "bad[1].png").write_bytes(b"no picture")
    (pictures / "below" / "cut\x1b[31m.png").write_bytes((pictures / "red.png").read_bytes()[:60])
    code, out, err = predict(f"model={tmp_path / 'model'}", f"input={pictures}", "output=all.jsonl")
    assert code == 2
    assert "bad[1].png: is not a picture" in err
    assert "2 of 5 inputs could not be labelled" in err
    assert "\x1b" not in err + out
    assert "Traceback" not in err
    assert len(Path("all.jsonl").read_text().splitlines()) == 3


def test_sentences(predict: Run, tmp_path: Path) -> None:
    model = text_model(class_names=NAMES)
    save(model, tmp_path / "model", preprocessing=TEXTS)
    sentences = ["a good film", 'it\'s really, ${not} fine! a=b ("the") plot\\', "'bad'"]
    lines = tmp_path / "lines.txt"
    lines.write_bytes(b"\xef\xbb\xbf" + "\n\r\n".join(sentences).encode() + b"\nbad \xff byte\n")
    code, _, err = predict(f"model={tmp_path / 'model'}", f"input={lines}", "output=lines.csv", "batch_size=2")
    assert code == 2
    assert f"{lines} line 6: is not UTF-8" in err
    rows = rows_of("lines.csv")
    assert [row["name"] for row in rows] == [f"{lines} line {n}" for n in (1, 3, 5)]
    with torch.no_grad():
        probabilities = call_model(model, TEXTS(sentences)).softmax(1)
    for row, sentence, found in zip(rows, sentences, probabilities, strict=True):
        assert row["label"] == NAMES[found.argmax()]
        assert float(row["probability"]) == pytest.approx(found.max().item(), abs=1e-5)
        if sentence != "'bad'":  # that one Hydra's users would have quoted by hand
            code, out, _ = predict(f"model={tmp_path / 'model'}", f"input={sentence}", "output=one.jsonl")
            assert code == 0
            (one,) = map(json.loads, Path("one.jsonl").read_text().splitlines())
            assert one["name"] == sentence
            assert one["probability"] == pytest.approx(found.max().item(), abs=1e-5)
            assert NAMES[found.argmax()] in out


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_tables_of_texts_and_pairs(predict: Run, tmp_path: Path, suffix: str) -> None:
    model = text_model()
    save(model, tmp_path / "model", preprocessing=TEXTS)
    pairs = [("a good film", "fine"), ("the plot", "really not")]
    file = tmp_path / f"table.{suffix}"
    if suffix == "jsonl":
        rows = [{"id": i, "sentence1": a, "sentence2": b} for i, (a, b) in enumerate(pairs)]
        file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"id": 9, "sentence1": "alone"}]))
    else:
        tab = "," if suffix == "csv" else "\t"
        rows = [["id", "sentence1", "sentence2"], *([str(i), *pair] for i, pair in enumerate(pairs)), ["9", "", ""]]
        file.write_text("".join(tab.join(row) + "\n" for row in rows))
    code, _, err = predict(f"model={tmp_path / 'model'}", f"input={file}", "output=pairs.jsonl")
    assert code == 2
    assert "has no text" in err
    found = [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()]
    with torch.no_grad():
        wanted = call_model(model, TEXTS(pairs)).softmax(1).max(1).values
    assert [row["probability"] for row in found] == pytest.approx(wanted.tolist(), abs=1e-5)
    code, _, _ = predict(f"model={tmp_path / 'model'}", f"input={file}", "text=sentence1", "output=single.jsonl")
    assert code == (0 if suffix == "jsonl" else 2)
    single = json.loads(Path("single.jsonl").read_text().splitlines()[0])
    with torch.no_grad():
        alone = call_model(model, TEXTS(["a good film"])).softmax(1).max().item()
    assert single["probability"] == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_several_labels(predict: Run, pictures: Path, tmp_path: Path, suffix: str) -> None:
    model = picture_model(class_names=NAMES, task="multi_label")
    save(model, tmp_path / "model", preprocessing=PICTURES)
    path = pictures / "below/more/blue.bmp"
    probabilities = expected(model, path).sigmoid()
    threshold = probabilities.sort().values[:2].mean().item()  # two of the three are above
    command = [f"model={tmp_path / 'model'}", f"input={path}", f"threshold={threshold}"]
    assert predict(*command, f"output=all.{suffix}", "top_k=3")[0] == 0
    best = [NAMES[k] for k in probabilities.argsort(descending=True)]
    if suffix == "csv":
        (row,) = rows_of("all.csv")
        assert row["labels"] == ",".join(best[:2])
        assert [row[f"label_{k}"] for k in (1, 2, 3)] == best
        assert float(row["probability_3"]) == pytest.approx(probabilities.min().item(), abs=1e-6)
    else:
        row = json.loads(Path("all.jsonl").read_text())
        assert row["labels"] == best[:2]
        assert [pair["label"] for pair in row["top"]] == best
    code, out, _ = predict(*command[:2], "threshold=1")
    assert code == 0
    assert "none" in out


def test_regression(predict: Run, pictures: Path, tmp_path: Path) -> None:
    model = picture_model(2, class_names=["width", "height"], task="regression")
    save(model, tmp_path / "model", preprocessing=PICTURES)
    code, out, _ = predict(f"model={tmp_path / 'model'}", f"input={pictures}", "output=values.csv")
    assert code == 0
    rows = rows_of("values.csv")
    value = expected(model, pictures / "red.png")
    assert [float(rows[0][name]) for name in ("width", "height")] == pytest.approx(value.tolist(), abs=1e-5)
    assert f"{value[0].item():.4g}" in out


def test_many_rows_are_counted(predict: Run, pictures: Path, tmp_path: Path) -> None:
    save(picture_model(), tmp_path / "model", preprocessing=PICTURES)
    code, out, _ = predict(f"model={tmp_path / 'model'}", f"input={pictures}", "show=1")
    assert code == 0
    assert "... and 2 more" in out
    assert "blue.bmp" not in out


@pytest.fixture
def saved(tmp_path: Path, pictures: Path) -> Path:
    """Models and files for the mistakes: pictures/ text/ bare/ token/ below one folder."""
    save(picture_model(), tmp_path / "models" / "pictures" / "model", preprocessing=PICTURES)
    save(text_model(), tmp_path / "models" / "text" / "model", preprocessing=TEXTS)
    save(picture_model(), tmp_path / "models" / "bare")
    tokens = attach_head(tiny("BertForTokenClassification"), 3, task="token")
    save(tokens, tmp_path / "models" / "token", preprocessing=TEXTS)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "zeros.txt").write_bytes(b"a\x00b")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    (tmp_path / "ragged.csv").write_text("text,b\n1,2,3\n")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "model=FOLDER"),
        (["model={}/nowhere"], "nowhere is not there"),
        (["model={}/other.csv"], "a file"),
        (["model={}/empty"], "holds no saved model"),
        (["model={}/models"], "holds several runs"),
        (["model={}/models/bare", "input=x.png"], "without its preprocessing"),
        (["model={}/models/token", "input=a film", "text_pair=the plot"], "pair of texts"),
        (["model={}/models/pictures"], "What is to be labelled"),
        (["model={}/models/pictures", "input=absent.png"], "absent.png: there is no such file"),
        (["model={}/models/pictures", "input={}/empty"], "holds no picture"),
        (["model={}/models/pictures", "input={}/other.csv"], "1 of 1 inputs could not be labelled"),
        (["model={}/models/text", "input=absent.txt"], "absent.txt: there is no such file"),
        (["model={}/models/text", "input={}/empty"], "this model reads text"),
        (["model={}/models/text", "input={}/empty.txt"], "is empty"),
        (["model={}/models/text", "input={}/zeros.txt"], "zero bytes"),
        (["model={}/models/text", "input={}/other.csv"], "set text=COLUMN"),
        (["model={}/models/text", "input={}/other.csv", "text=c"], "text=c is no column"),
        (["model={}/models/text", "input={}/ragged.csv"], "line 2 has 3 fields"),
        (["model={}/models/text", "input=a", "top_k=0"], "top_k"),
        (["model={}/models/text", "input=a", "batch_size=many"], "batch_size"),
        (["model={}/models/text", "input=a", "threshold=2"], "threshold"),
        (["model={}/models/text", "input=a", "output=all.xlsx"], ".csv or .jsonl"),
        (["model={}/models/text", "input=a", "output=absent/all.csv"], "make it first"),
        (["model={}/models/text", "input={}/other.csv", "output={}/other.csv"], "is the input itself"),
        (["model={}/models/text", "input=a", "outputt=b"], "Did you mean 'output'"),
    ],
)
def test_mistakes(predict: Run, saved: Path, arguments: list[str], message: str) -> None:
    before = sorted(saved.rglob("*"))
    code, _, err = predict(*(argument.format(saved) for argument in arguments))
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert "Error executing job" not in err
    assert sorted(saved.rglob("*")) == before  # nothing was written, in the folder of the command least of all


def test_weights_that_give_no_number(predict: Run, pictures: Path, tmp_path: Path) -> None:
    model = picture_model()
    with torch.no_grad():
        model.get_classifier().bias[0] = float("nan")
    save(model, tmp_path / "model", preprocessing=PICTURES)
    code, _, err = predict(f"model={tmp_path / 'model'}", f"input={pictures}")
    assert code == 2
    assert "not finite" in err
    assert "3 of 3 inputs" in err


# --- words ------------------------------------------------------------------------------------------------------------


def test_every_word_gets_the_tag_of_its_first_token(predict: Run, tmp_path: Path) -> None:
    """Sentences of different length together are what each of them is alone, line by line."""
    names = ("O", "B-PER", "I-PER")
    model = attach_head(tiny("BertForTokenClassification"), 3, seed=1, task="token", class_names=names).eval()
    save(model, tmp_path / "model", preprocessing=TEXTS)
    sentences = [["a", "good", "film"], ["it's", "really", "not", "fine", "."], ["bad"]]
    (tmp_path / "new.conll").write_text("\n\n".join("\n".join(f"{word} NN" for word in own) for own in sentences))
    expected = []
    for own in sentences:
        with torch.no_grad():
            ids = TEXTS.tokenizer(own, is_split_into_words=True, return_tensors="pt")
            expected += [names[k] for k in call_model(model, dict(ids))[0].argmax(-1).tolist()]
    rows = {}
    for suffix in ("csv", "jsonl"):
        output = tmp_path / f"tags.{suffix}"
        code, out, err = predict(f"model={tmp_path}/model", f"input={tmp_path}/new.conll", f"output={output}")
        assert (code, err) == (0, "")
        assert "9 rows" in out.replace("\n", " ")
        lines = output.read_text().splitlines()
        rows[suffix] = list(csv.DictReader(lines)) if suffix == "csv" else [json.loads(line) for line in lines]
    words = [word for own in sentences for word in own]
    for found in rows.values():
        assert [row["word"] for row in found] == words
        assert [row["label"] for row in found] == expected
        assert [row["name"].rpartition(" ")[2] for row in found] == ["1"] * 3 + ["5"] * 5 + ["11"]


def test_a_sentence_is_parted_into_words_and_what_is_cut_off_is_named(predict: Run, tmp_path: Path) -> None:
    model = attach_head(tiny("BertForTokenClassification"), 3, seed=1, task="token").eval()
    save(model, tmp_path / "model", preprocessing=TEXTS)
    code, _, _ = predict(f"model={tmp_path}/model", "input=it's a film, really.", f"output={tmp_path}/tags.csv")
    assert code == 0
    with (tmp_path / "tags.csv").open() as file:
        assert [row["word"] for row in csv.DictReader(file)] == ["it's", "a", "film", ",", "really", "."]
    code, _, err = predict(f"model={tmp_path}/model", "input=" + "film " * 20)
    assert code == 2
    assert "4 of 20 words have no token" in err
