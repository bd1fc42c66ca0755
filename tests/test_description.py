from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from headinit.attach import attach_head, describe, init_head
from headinit.errors import HeadError
from headinit.heads.record import record_of
from tests.heads.models import perceptron, pictures, tiny, tokens


def test_every_new_parameter_with_its_intended_and_measured_std() -> None:
    model = attach_head(nn.Sequential(nn.Linear(4, 900), nn.ReLU(), nn.Linear(900, 2)), 30, seed=4)
    found = describe(model)
    weight, bias = found.parameters
    assert (weight.name, weight.shape, weight.scheme) == ("2.weight", (30, 900), "he")
    assert weight.intended_std == pytest.approx((2 / 900) ** 0.5)
    assert weight.measured_std == pytest.approx(model[2].weight.std(correction=0).item())
    assert weight.measured_std == pytest.approx(weight.intended_std, rel=0.02)
    assert (bias.intended_std, bias.measured_std) == (0.0, 0.0)
    assert found.new == 30 * 901
    text = str(found)
    for part in (
        "linear head, init=he, seed 4",
        "2.weight",
        "30x900",
        "27,030 new",
        "0 frozen",
        "checked to be untouched",
    ):
        assert part in text


def test_hidden_layers_are_told_from_the_last() -> None:
    schemes = {
        line.name: line.scheme for line in describe(attach_head(perceptron(), 3, init="zeros", head="mlp")).parameters
    }
    assert schemes["2.hidden.0.weight"] == "hidden"
    assert schemes["2.output.weight"] == "zeros"


def test_the_start_is_that_of_autograd() -> None:
    model = attach_head(perceptron(), 3).train()
    inputs, labels = torch.randn(50, 8), torch.arange(50) % 3
    start = describe(model, (inputs, labels)).start
    features = model[1](model[0](inputs)).detach().requires_grad_()
    logits = model[2](features)
    losses = F.cross_entropy(logits, labels, reduction="none")
    gradient = torch.autograd.grad(losses.sum(), features)[0].norm(dim=1).mean().item()
    assert start["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert start["feature_gradient"] == pytest.approx(gradient, rel=1e-5)
    assert start["chance_loss"] == math.log(3)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    zero = describe(init_head(model, "zeros"), (inputs, labels)).start
    assert zero["loss"] == pytest.approx(math.log(3), rel=1e-6)
    assert zero["feature_gradient"] == 0


def test_the_start_on_batches_of_a_transformers_model_and_other_tasks() -> None:
    model = attach_head(tiny("BertForSequenceClassification"), 3)
    batch = {**tokens(), "labels": torch.tensor([0, 1, 2, 0])}
    once, twice = describe(model, [batch]).start, describe(model, [batch, batch]).start
    assert once == pytest.approx({**twice, "examples": 4})
    many = attach_head(perceptron(), 3, init="zeros", task="multi_label")
    start = describe(many, (torch.randn(4, 8), torch.ones(4, 3))).start
    assert start["loss"] == pytest.approx(math.log(2)) == start["chance_loss"]
    line = attach_head(perceptron(), 1, init="zeros", task="regression")
    assert describe(line, (torch.randn(4, 8), torch.full((4, 1), 2.0))).start["loss"] == pytest.approx(4.0)
    words = attach_head(tiny("BertForTokenClassification"), 5, init="zeros", task="token")
    labels = torch.full((4, 6), -100)
    labels[:, 1:3] = 4
    assert describe(words, (tokens(), labels)).start["loss"] == pytest.approx(math.log(5))
    with pytest.raises(HeadError, match="without a batch"):
        describe(model, [])


def test_what_is_frozen_and_how() -> None:
    model = attach_head(torchvision.models.resnet18(), 3)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("fc."))
    found = describe(model.train())
    assert found.trainable == 3 * 513
    assert dict(found.frozen_modules)["layer1"] == "training mode"
    assert any("BatchNorm" in warning for warning in found.warnings)
    model.eval()
    assert dict(describe(model).frozen_modules)["layer1"] == "evaluation mode"
    assert not describe(model).warnings


def test_freezing_by_headinit_is_recognised() -> None:
    from headinit.training.freezing import freeze

    model = freeze(attach_head(torchvision.models.resnet18(), 3), "all").train()
    found = describe(model)
    assert dict(found.frozen_modules)["layer1"] == "held in evaluation mode"
    assert not found.warnings


def test_a_random_pooler_inside_a_frozen_bert(tmp_path: Path) -> None:
    """Trap: freezing `model.bert` of a masked-LM checkpoint freezes random weights."""
    import transformers

    tiny("BertForMaskedLM").save_pretrained(tmp_path)
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    model.bert.requires_grad_(False)
    assert any("bert.pooler" in w and "frozen" in w for w in describe(model).warnings)
    attach_head(model, 3)
    assert any("bert.pooler" in w and "new and frozen" in w for w in describe(model).warnings)
    for name in record_of(model).new_parameters:
        model.get_parameter(name).requires_grad_(True)
    assert not any("pooler" in w for w in describe(model).warnings)


def test_other_things_that_are_wrong() -> None:
    with pytest.warns(UserWarning, match="float16"):
        half = attach_head(perceptron().half(), 3)
    assert any("float16" in w for w in describe(half).warnings)
    hidden = attach_head(perceptron(), 3, head="mlp")
    nn.init.zeros_(hidden[2].hidden[0].weight)
    assert any("all zeros" in w for w in describe(hidden).warnings)
    dead = attach_head(torchvision.models.squeezenet1_1(), 3)
    nn.init.zeros_(dead.classifier[1].weight)
    assert any("never moves" in w for w in describe(dead).warnings)
    assert any("random, not pretrained" in w for w in describe(attach_head(tiny("BertModel"), 3)).warnings)
    assert not describe(attach_head(perceptron(), 3)).warnings


def test_a_model_that_headinit_has_not_touched() -> None:
    model = torchvision.models.resnet18()
    found = describe(model, (pictures(), torch.tensor([0, 1])))
    assert [line.scheme for line in found.parameters] == ["unknown", "unknown"]
    assert found.start["chance_loss"] == math.log(1000)
    assert "the head that the model came with" in str(found)
