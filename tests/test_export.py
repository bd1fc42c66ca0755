from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import headinit.export
from headinit.attach import attach_head
from headinit.data.images import ImagePreprocessing
from headinit.errors import HeadError
from headinit.export import export_onnx
from headinit.heads.record import call_model
from headinit.training.freezing import freeze, frozen_digest
from tests.heads.models import perceptron, tiny, tiny_vit, tokens

INSTALLED = all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime", "onnxscript"))
needs_extra = pytest.mark.skipif(not INSTALLED, reason="needs the extra: pip install 'headinit[onnx]'")


def convolutional() -> nn.Module:
    body = (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*body, nn.Linear(6, 9))


def padded(rows: int) -> dict[str, torch.Tensor]:
    batch = tokens(rows, 9)
    batch["attention_mask"][rows // 2, 4:] = 0
    return batch


# What to build, how its head is attached, what it reads.
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], Callable[[int], Any]]] = {
    "mlp": (
        convolutional,
        {"head": "mlp", "head_options": {"hidden": 8}},
        lambda n: torch.rand(n, 3, 40, 48),
    ),
    "bert": (lambda: tiny("BertForSequenceClassification"), {}, padded),
    "bert_mean": (lambda: tiny("BertModel"), {"pooling": "mean"}, padded),
    "multi_proxy": (
        convolutional,
        {"head": "multi_proxy", "head_options": {"proxies": 3}},
        lambda n: torch.rand(n, 3, 40, 48),
    ),
    "vit_cosine": (tiny_vit, {"head": "cosine"}, lambda n: {"pixel_values": torch.rand(n, 3, 32, 32)}),
}


SLOW = ("bert_mean", "vit_cosine")


def run(path: Path, inputs: Any) -> torch.Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    named = inputs if isinstance(inputs, dict) else {"input": inputs}
    return torch.from_numpy(session.run(["logits"], {name: value.numpy() for name, value in named.items()})[0])


@needs_extra
@pytest.mark.parametrize(
    "name", [*list(MODELS)[:2], *(pytest.param(n, marks=pytest.mark.slow) for n in list(MODELS)[2:])]
)
def test_onnxruntime_gives_the_logits(name: str, tmp_path: Path) -> None:
    build, options, inputs = MODELS[name]
    model = freeze(attach_head(build(), 3, class_names=["a", "b", "ü"], seed=1, **options), "all")
    if name in ("mlp", "multi_proxy"):  # the size of its pictures comes from its preprocessing
        model.headinit_preprocessing = ImagePreprocessing(size=(40, 48))
    digest, hooks = frozen_digest(model), [len(module._forward_pre_hooks) for module in model.modules()]
    model.train()
    path = export_onnx(model, tmp_path / "new" / "model.onnx")
    assert os.listdir(tmp_path / "new") == ["model.onnx"]
    assert model.training
    assert frozen_digest(model) == digest
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    model.eval()
    for rows in (1, 5):
        batch = inputs(rows)
        with torch.no_grad():
            expected = call_model(model, batch)
        torch.testing.assert_close(run(path, batch), expected, rtol=1e-4, atol=1e-4)
    import onnx

    (names,) = [entry.value for entry in onnx.load(path).metadata_props if entry.key == "class_names"]
    assert json.loads(names) == ["a", "b", "ü"]


@needs_extra
def test_what_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.onnx").write_text("earlier")
    model = attach_head(perceptron(), 3)
    with pytest.raises(HeadError, match="give example_inputs"):
        export_onnx(model, tmp_path / "model.onnx")
    with pytest.raises(HeadError, match="B at least 2"):
        export_onnx(model, tmp_path / "model.onnx", torch.rand(1, 8))
    monkeypatch.setattr(headinit.export, "TOLERANCE", -1.0)  # as if the file computed something else
    with pytest.raises(HeadError, match="computes something else"):
        export_onnx(model, tmp_path / "model.onnx", torch.rand(2, 8))
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_text() == "earlier"


class Branching(nn.Module):
    """What it does depends on its values: no graph can hold that."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) if x.sum() > 0 else self.fc(-x)


@needs_extra
def test_a_model_that_cannot_be_exported(tmp_path: Path) -> None:
    model = attach_head(Branching(), 3)
    with pytest.raises(HeadError, match="Branching cannot be exported to ONNX"):
        export_onnx(model, tmp_path / "model.onnx", torch.rand(2, 8))
    assert list(tmp_path.iterdir()) == []


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headinit.export, "_NEEDED", ("torch", "no_such_package"))
    with pytest.raises(HeadError, match=r"needs no_such_package: pip install 'headinit\[onnx\]'"):
        export_onnx(perceptron(), tmp_path / "model.onnx", torch.rand(2, 8))
    assert list(tmp_path.iterdir()) == []


@needs_extra
def test_a_recurrent_head_over_text_is_refused_in_words(tmp_path: Path) -> None:
    model = attach_head(tiny("BertModel"), 3, head="recurrent")
    with pytest.raises(HeadError, match="packs its sequences"):
        export_onnx(model, tmp_path / "model.onnx", tokens())
    assert not list(tmp_path.iterdir())
