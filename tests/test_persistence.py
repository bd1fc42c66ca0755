from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

from headinit.attach import attach_head, load, preprocessing_of, save
from headinit.data.images import ImagePreprocessing
from headinit.errors import CheckpointError, HeadError
from headinit.heads.record import call_model, record_of
from tests.heads.models import perceptron, pictures, tiny, tiny_vit, tokens

MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], bool]] = {
    "bert": (lambda: tiny("BertForSequenceClassification"), tokens, True),
    "roberta": (lambda: tiny("RobertaForSequenceClassification"), tokens, True),
    "gpt2": (lambda: tiny("GPT2ForSequenceClassification"), tokens, True),
    "bert_tokens": (lambda: tiny("BertForTokenClassification"), tokens, True),
    "bert_base": (lambda: tiny("BertModel"), tokens, True),
    "vit": (tiny_vit, lambda: {"pixel_values": pictures(2, 32)}, True),
    "timm": (lambda: timm.create_model("test_resnet"), pictures, True),
    "torchvision": (lambda: torchvision.models.mnasnet0_5(), pictures, False),
    "plain": (perceptron, lambda: torch.rand(3, 8), False),
}


@pytest.mark.parametrize("head", ["linear", "mlp", "cosine"])
@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_model_is_the_saved_one(name: str, head: str, tmp_path: Path) -> None:
    build, inputs, rebuilds = MODELS[name]
    task = "token" if name == "bert_tokens" else "single_label"
    model = attach_head(build(), 3, head=head, class_names=["a", "b", "c"], task=task, seed=2).eval()
    save(model, tmp_path / "model")
    assert os.listdir(tmp_path) == ["model"]  # nothing half-written beside it
    base = None if rebuilds else build()
    state = torch.get_rng_state()
    copy = load(tmp_path / "model", model=base)
    assert torch.equal(state, torch.get_rng_state())
    assert not copy.training
    assert type(copy) is type(model)
    batch = inputs()
    assert torch.equal(call_model(copy, batch), call_model(model, batch))
    assert record_of(copy) == record_of(model)
    assert record_of(copy).class_names == ("a", "b", "c")
    if hasattr(model, "config"):
        assert copy.config.id2label == {0: "a", 1: "b", 2: "c"}


def test_a_head_over_tokens_and_half_precision_survive(tmp_path: Path) -> None:
    for number, model in enumerate(
        [
            attach_head(tiny("BertModel"), 3, head="recurrent", head_options={"hidden": 4, "cell": "gru"}),
            attach_head(tiny("BertForSequenceClassification"), 3, pooling="mean"),
        ]
    ):
        copy = load(save(model.eval(), tmp_path / str(number)))
        assert torch.equal(copy(**tokens()).logits, model(**tokens()).logits)
    with pytest.warns(UserWarning, match="bfloat16"):
        model = attach_head(tiny("BertForSequenceClassification").to(torch.bfloat16), 3).eval()
    copy = load(save(model, tmp_path / "half"))
    assert {p.dtype for p in copy.parameters()} == {torch.bfloat16}
    assert torch.equal(copy(**tokens()).logits, model(**tokens()).logits)


@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2", "bert_tokens", "vit"])
def test_from_pretrained_reads_a_linear_head(name: str, tmp_path: Path) -> None:
    build, inputs, _ = MODELS[name]
    task = "token" if name == "bert_tokens" else "single_label"
    model = attach_head(build(), 3, class_names=["a", "b", "c"], task=task).eval()
    save(model, tmp_path / "model")
    again, report = type(model).from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    batch = inputs()
    assert torch.equal(call_model(again, batch), call_model(model, batch))
    assert again.config.id2label == {0: "a", 1: "b", 2: "c"}


def test_timm_reads_a_linear_head(tmp_path: Path) -> None:
    model = attach_head(timm.create_model("test_resnet"), 3, class_names=["a", "b", "c"]).eval()
    folder = save(model, tmp_path / "model")
    batch = pictures()
    for again in (
        timm.create_model("test_resnet", num_classes=3, checkpoint_path=str(folder / "model.safetensors")),
        timm.create_model(f"local-dir:{folder}", pretrained=True),
    ):
        assert torch.equal(again.eval()(batch), model(batch))


def test_other_heads_are_not_taken_for_a_checkpoint_of_the_library(tmp_path: Path) -> None:
    """A library would load the backbone and start another head at random."""
    folder = save(attach_head(tiny("BertForSequenceClassification"), 3, head="mlp"), tmp_path / "model")
    assert sorted(os.listdir(folder)) == ["headinit.json", "headinit.safetensors"]
    with pytest.raises(OSError, match="no file named"):
        type(tiny("BertForSequenceClassification")).from_pretrained(folder)


def test_a_model_by_name_comes_back_without_help(tmp_path: Path) -> None:
    model = attach_head("torchvision/resnet18", 3, pretrained=False, head="mlp", head_options={"hidden": [8]}).eval()
    copy = load(save(model, tmp_path / "model"))
    batch = pictures()
    assert torch.equal(copy(batch), model(batch))
    assert isinstance(preprocessing_of(copy), ImagePreprocessing)
    assert preprocessing_of(copy) == preprocessing_of(model)
    assert not record_of(copy).pretrained


def test_text_preprocessing_comes_back(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from headinit.data.text import TextPreprocessing

    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "good": 2, "film": 3}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    preprocessing = TextPreprocessing(tokenizer, max_length=8)
    model = attach_head(tiny("BertForSequenceClassification"), 3).eval()
    copy = load(save(model, tmp_path / "model", preprocessing=preprocessing))
    batch = preprocessing_of(copy)(["good film", "good"])
    assert {k: v.tolist() for k, v in batch.items()} == {
        k: v.tolist() for k, v in preprocessing(["good film", "good"]).items()
    }
    assert preprocessing_of(copy).max_length == 8


def test_tied_tensors_are_written_once_and_stay_tied(tmp_path: Path) -> None:
    def build() -> nn.Module:
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2))
        model[1].weight = model[0].weight
        return model

    model = attach_head(build(), 3).eval()
    folder = save(model, tmp_path / "model")
    manifest = json.loads((folder / "headinit.json").read_text())
    assert manifest["aliases"] == {"1.weight": "0.weight"}
    copy = load(folder, model=build())
    assert copy[0].weight is copy[1].weight
    assert torch.equal(copy(torch.ones(1, 6)), model(torch.ones(1, 6)))


# --- folders ----------------------------------------------------------------------------------------------------------


def test_saving_replaces_its_own_and_leaves_other_peoples_files(tmp_path: Path) -> None:
    model = attach_head(perceptron(), 3)
    save(model, tmp_path / "model")
    save(attach_head(perceptron(), 4), tmp_path / "model")
    assert load(tmp_path / "model", model=perceptron())[2].out_features == 4
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(CheckpointError, match="did not write"):
        save(model, tmp_path / "mine")
    assert os.listdir(tmp_path / "mine") == ["thesis.tex"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="not a folder"):
        save(model, tmp_path / "file")
    with pytest.raises(HeadError, match="no head attached"):
        save(perceptron(), tmp_path / "none")
    assert sorted(os.listdir(tmp_path)) == ["file", "mine", "model"]


def test_a_failing_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(attach_head(perceptron(), 3), tmp_path / "model")
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(CheckpointError, match="no space left"):
        save(attach_head(perceptron(), 4), folder)
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before
    assert os.listdir(tmp_path) == ["model"]


def edit(folder: Path, **changes: Any) -> None:
    manifest = json.loads((folder / "headinit.json").read_text())
    (folder / "headinit.json").write_text(json.dumps({**manifest, **changes}))


def redigest(folder: Path, name: str) -> None:
    """What an attacker would do: the list of files fits the payload."""
    manifest = json.loads((folder / "headinit.json").read_text())
    manifest["files"][name] = _digest(folder / name)
    (folder / "headinit.json").write_text(json.dumps(manifest))


def _digest(path: Path) -> dict[str, Any]:
    import hashlib

    return {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}


class Payload:
    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["HEADINIT_TEST_TRAP"],)


def truncated(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])


def changed(folder: Path) -> None:
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Payload()))
    redigest(folder, "model.safetensors")


def climbing(folder: Path) -> None:
    (folder.parent / "secret").write_text("x")
    edit(folder, files={"../secret": _digest(folder.parent / "secret")})


def linked(folder: Path) -> None:
    weights = folder / "model.safetensors"
    shutil.move(weights, folder.parent / "elsewhere.safetensors")
    weights.symlink_to(folder.parent / "elsewhere.safetensors")


HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (truncated, "truncated"),
    "another digest": (changed, "SHA-256"),
    "pickled payload": (pickled, "not a safetensors file"),
    "climbs out": (climbing, "outside itself"),
    "absolute": (lambda f: edit(f, files={"/etc/passwd": {"sha256": "", "bytes": 1}}), "outside itself"),
    "linked": (linked, "outside itself"),
    "newer": (lambda f: edit(f, format=2), "Update headinit"),
    "no version": (lambda f: edit(f, format="1"), "no format version"),
    "no files": (lambda f: edit(f, files={}), "list of files"),
    "missing file": (lambda f: (f / "model.safetensors").unlink(), "incomplete"),
    "not json": (lambda f: (f / "headinit.json").write_text("{"), "damaged"),
    "a list": (lambda f: (f / "headinit.json").write_text("[]"), "no format version"),
    "no manifest": (lambda f: (f / "headinit.json").unlink(), "has no headinit.json"),
    "damaged record": (lambda f: edit(f, record={"sites": [{"where": 1}]}), "record of the saved model is damaged"),
}


@pytest.mark.parametrize("attack", HOSTILE)
@pytest.mark.parametrize("name", ["plain", "bert"])
def test_hostile_folders_are_refused(name: str, attack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADINIT_TEST_TRAP", str(tmp_path / "trap"))
    build, _, rebuilds = MODELS[name]
    folder = save(attach_head(build(), 3), tmp_path / "model")
    spoil, message = HOSTILE[attack]
    spoil(folder)
    with pytest.raises(CheckpointError, match=message):
        load(folder, model=None if rebuilds else build())
    assert not (tmp_path / "trap").exists()


def test_foreign_classes_and_remote_code_are_not_run(tmp_path: Path) -> None:
    folder = save(attach_head(tiny("BertForSequenceClassification"), 3), tmp_path / "model")
    architecture = json.loads((folder / "headinit.json").read_text())["architecture"]
    for foreign in ("Trainer", "os", "BertConfig", "NoSuchModel"):
        edit(folder, architecture={**architecture, "class": foreign})
        with pytest.raises(CheckpointError, match=f"class '{foreign}'"):
            load(folder)
    for module in (
        "os",
        "transformers.models.bert",
        "transformers.models.nothing.here",
        "transformers.models.bert..os",
    ):
        edit(folder, architecture={**architecture, "module": module})
        with pytest.raises(CheckpointError, match="No code from the folder"):
            load(folder)
    edit(folder, architecture={**architecture, "config": {**architecture["config"], "model_type": "strange"}})
    with pytest.raises(CheckpointError, match="strange"):
        load(folder)
    edit(folder, architecture={**architecture, "config": {**architecture["config"], "auto_map": {"AutoModel": "a.b"}}})
    assert type(load(folder)).__name__ == "BertForSequenceClassification"


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    folder = save(attach_head(perceptron(), 3), tmp_path / "model")
    with pytest.raises(CheckpointError, match="whose code only you have"):
        load(folder)
    with pytest.raises(CheckpointError, match="do not fit"):
        load(folder, model=perceptron(inputs=9))
    with pytest.raises(CheckpointError, match="leave model= out"):
        load(save(attach_head(tiny("BertForSequenceClassification"), 3), tmp_path / "bert"), model=perceptron())
