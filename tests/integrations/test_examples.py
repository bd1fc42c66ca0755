from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import headinit
from headinit.errors import CheckpointError, HeadError, TrainingError
from headinit.heads.record import record_of
from headinit.training.freezing import frozen_digest
from tests.heads.models import tiny

from .examples import (
    Watch,
    convolutional,
    language,
    picture_examples,
    picture_loader,
    rates,
    run,
    text_examples,
)

FIRST_STAGES = ("conv1", "bn1", "layer1", "layer2", "layer3")  # what freeze(model, 1) leaves of a residual network


def check(watch: Watch, frozen: tuple[str, ...]) -> None:
    """The frozen part has its bits, by its digest and tensor by tensor; the head, and what else may, has moved."""
    assert frozen_digest(watch.model) == watch.digest
    moved = watch.moved()
    held = [name for name in watch.tensors if name.startswith(frozen)]
    assert held
    assert not moved.intersection(held)
    assert watch.head() <= moved
    learns = {name for name, p in watch.model.named_parameters() if p.requires_grad}
    assert not learns.intersection(held)


def test_plain_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, watch = run(
        "A plain torch loop", monkeypatch, tmp_path, backbone=convolutional(), train_loader=picture_loader()
    )
    check(watch, (*FIRST_STAGES, "layer4"))
    assert watch.moved() == watch.head()
    assert rates(names["optimizer"]) == {"head": 0.1}
    pictures = torch.rand(2, 3, 32, 32)
    assert torch.equal(headinit.load("my-model")(pictures), names["model"].eval()(pictures))


def residual() -> nn.Module:
    """transformers' own ResNet, with BatchNorm."""
    return tiny(
        "ResNetForImageClassification",
        embedding_size=8,
        hidden_sizes=[8, 12],
        depths=[1, 1],
        layer_type="basic",
    )


@pytest.mark.parametrize(
    ("backbone", "data", "frozen"),
    [
        (residual, picture_examples, ("resnet.embedder", "resnet.encoder.stages.0")),
        (language, text_examples, ("bert.embeddings", "bert.encoder.layer.0")),
    ],
    ids=["resnet", "bert"],
)
def test_transformers_trainer(
    backbone: Any, data: Any, frozen: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, watch = run("transformers `Trainer`", monkeypatch, tmp_path, backbone=backbone(), train_dataset=data())
    check(watch, frozen)
    assert rates(names["optimizer"], "initial_lr") == {"backbone": 1e-4, "head": 1e-2}
    assert names["trainer"].optimizer.optimizer is names["optimizer"]
    again = type(names["model"]).from_pretrained("my-model")
    assert again.num_labels == 3
    for name, value in names["model"].state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


def test_trainer_on_pooled_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A body without a head of its own: `HeadedBackbone` has the loss that the Trainer asks for."""
    _, watch = run(
        "transformers `Trainer`",
        monkeypatch,
        tmp_path,
        backbone=language().bert,
        train_dataset=text_examples(),
    )
    check(watch, ("backbone.embeddings", "backbone.encoder.layer.0"))


def test_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightning", reason="needs the extra: pip install 'headinit[lightning]'")
    names, watch = run("Lightning", monkeypatch, tmp_path, backbone=convolutional(), train_loader=picture_loader())
    check(watch, FIRST_STAGES)
    assert rates(names["classifier"].optimizers().optimizer) == {"backbone": 1e-4, "head": 1e-2}
    assert names["classifier"].model is watch.model


def test_accelerate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, watch = run("accelerate", monkeypatch, tmp_path, backbone=convolutional(), train_loader=picture_loader())
    check(watch, FIRST_STAGES)
    assert rates(names["optimizer"].optimizer) == {"backbone": 1e-4, "head": 1e-2}


def test_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, watch = run("timm", monkeypatch, tmp_path, backbone=convolutional(), train_loader=picture_loader())
    check(watch, FIRST_STAGES)
    assert rates(names["optimizer"], "initial_lr") == {"backbone": 1e-4, "head": 1e-2}
    now = rates(names["optimizer"])
    assert now["head"] < 1e-2  # the schedule has come down
    assert now["head"] / now["backbone"] == pytest.approx(100)
    decays = {group["name"]: group["weight_decay"] for group in names["optimizer"].param_groups}
    assert decays["head"] == 0.05
    assert decays["head/no_decay"] == 0


def test_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft", reason="needs the extra: pip install 'headinit[peft]'")
    loader = DataLoader(text_examples(), batch_size=4)
    names, watch = run("PEFT", monkeypatch, tmp_path, backbone=language(), train_loader=loader)
    adapted, merged = names["adapted"], names["merged"]
    assert rates(names["optimizer"]) == {"backbone": 1e-3, "head": 1e-2}
    groups = {group["name"]: len(group["params"]) for group in names["optimizer"].param_groups}
    assert groups == {"backbone": 8, "head": 1, "head/no_decay": 1}  # two matrices for each of 2 x 2 layers
    # Merging adds the adapters into these and puts the trained head in its place; all else has its bits.
    adapters = {f"bert.encoder.layer.{i}.attention.self.{kind}.weight" for i in (0, 1) for kind in ("query", "value")}
    head = watch.head()
    state = {**dict(merged.named_parameters()), **dict(merged.named_buffers())}
    changed = {name for name, (_, before) in watch.tensors.items() if not torch.equal(state[name], before)}
    assert changed == adapters | head
    assert type(merged) is type(watch.model)
    assert adapted is not merged
    batch = {k: v for k, v in next(iter(loader)).items() if k != "labels"}
    assert torch.equal(headinit.load("my-model")(**batch).logits, merged.eval()(**batch).logits)


def test_adapters_leave_the_frozen_part_in_evaluation_mode() -> None:
    peft = pytest.importorskip("peft", reason="needs the extra: pip install 'headinit[peft]'")
    model = headinit.freeze(headinit.attach_head(language(), 3), "all")
    new = list(record_of(model).new_modules)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=new)).train()
    batch = {"input_ids": torch.randint(5, 60, (2, 5))}
    assert torch.equal(adapted(**batch).logits, adapted(**batch).logits)  # the pretrained dropout is off
    assert any(module.training for name, module in adapted.named_modules() if "lora_dropout" in name)


def test_adapters_are_new_even_after_a_finished_start() -> None:
    peft = pytest.importorskip("peft", reason="needs the extra: pip install 'headinit[peft]'")
    labels = torch.arange(12) % 3
    data = (torch.randn(12, 3, 8, 8) + labels[:, None, None, None], labels)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    model = headinit.attach_head(network.append(torch.nn.Linear(6, 3)), 3, init="ridge", data=data)
    assert {group["lr"] for group in headinit.param_groups(model, lr=1.0)} == {1.0, 0.01}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["3"]))
    assert rates(torch.optim.SGD(headinit.param_groups(adapted, lr=1.0))) == {"backbone": 0.1, "head": 1.0}


def test_what_cannot_be_done_around_adapters_is_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs the extra: pip install 'headinit[peft]'")
    model = headinit.freeze(headinit.attach_head(language(), 3), "all")
    new = list(record_of(model).new_modules)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=new))
    trains = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert len(trains) == 2 * 2 + 2
    for wrapped in (adapted, model):  # the adapters are in the model itself, too
        with pytest.raises(TrainingError, match=r"PEFT's adapters .* first, then get_peft_model"):
            headinit.freeze(wrapped, "none")
    assert [name for name, p in adapted.named_parameters() if p.requires_grad] == trains
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    for change in (lambda: headinit.init_head(adapted, "zeros"), lambda: headinit.attach_head(adapted, 4)):
        with pytest.raises(HeadError, match=r"first, then get_peft_model"):
            change()
    assert all(torch.equal(before[name], tensor) for name, tensor in adapted.state_dict().items())
    with pytest.raises(CheckpointError, match="merge_and_unload"):
        headinit.save(adapted, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(name, reason="needs the extra: pip install 'headinit[onnx]'")
    run("ONNX", monkeypatch, tmp_path, backbone=convolutional())
    assert os.listdir(tmp_path) == ["model.onnx"]


@pytest.mark.parametrize("pooling", ["native", "mean"])
def test_accumulated_steps_average_as_the_document_says(pooling: str, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    def step(batch_size: int, accumulation: int) -> torch.Tensor:
        torch.manual_seed(0)
        backbone = language(hidden_dropout_prob=0.0)
        model = headinit.freeze(headinit.attach_head(backbone, 3, pooling=pooling, seed=0), "all")
        if pooling == "native":
            model.accepts_loss_kwargs = False
        head = model.get_parameter(record_of(model).new_parameters[0])
        before = head.detach().clone()
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=1,
            max_grad_norm=0,
            lr_scheduler_type="constant",
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            save_strategy="no",
            report_to="none",
        )
        optimizer = torch.optim.SGD(headinit.param_groups(model, lr=0.1))
        Trainer(model=model, args=arguments, train_dataset=text_examples(), optimizers=(optimizer, None)).train()
        return head.detach() - before

    torch.testing.assert_close(step(3, 4), step(12, 1))
