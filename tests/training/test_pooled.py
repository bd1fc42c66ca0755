"""Freezing by stages and layer-wise rates where the backbone is inside a `HeadedBackbone`."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from headinit.attach import attach_head
from headinit.heads.record import call_model, record_of
from headinit.training.depth import parameter_depths
from headinit.training.freezing import freeze, frozen_digest
from headinit.training.param_groups import param_groups
from tests.heads.models import pictures, tiny, tokens

BACKBONES = {
    "bert": (lambda: tiny("BertForSequenceClassification", num_hidden_layers=2), tokens, "encoder.layer.1."),
    "timm vit": (lambda: timm.create_model("test_vit", img_size=64), pictures, ("blocks.", "norm.")),
    "timm resnet": (lambda: timm.create_model("test_resnet"), pictures, "layer4."),
    "timm efficientnet": (lambda: timm.create_model("test_efficientnet"), pictures, ()),
    "torchvision resnet": (torchvision.models.resnet18, pictures, "layer4."),
    "torchvision densenet": (
        torchvision.models.densenet121,
        pictures,
        ("features.denseblock4.", "features.transition3."),  # what leads into a stage belongs to it
    ),
}


def inner_depths(model: nn.Module, coarse: bool) -> tuple[dict[str, int], int]:
    found = parameter_depths(model, set(record_of(model).new_parameters), coarse=coarse)
    names = {name.removeprefix("backbone.").removeprefix("bert."): depth for name, depth in found.of.items()}
    return {name: depth for name, depth in names.items() if not name.startswith("pooler.")}, found.count


@pytest.mark.parametrize("coarse", [True, False])
@pytest.mark.parametrize("name", BACKBONES)
def test_depths_are_those_of_the_backbone_with_its_own_head(name: str, coarse: bool) -> None:
    build = BACKBONES[name][0]
    pooled, own = attach_head(build(), 3, head="attention_pool"), attach_head(build(), 3)
    assert inner_depths(pooled, coarse) == inner_depths(own, coarse)
    assert inner_depths(pooled, coarse)[1] > 1


@pytest.mark.parametrize("name", BACKBONES)
def test_the_last_stage_and_the_head_move_and_nothing_else(name: str) -> None:
    build, inputs, last = BACKBONES[name]
    model = freeze(attach_head(build(), 3, head="attention_pool"), 1)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    digest = frozen_digest(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        model.train()
        logits = call_model(model, inputs())
        F.cross_entropy(logits, torch.arange(len(logits)) % 3).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert frozen_digest(model) == digest
    learns = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    moved = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert {"head.hidden.query", "head.output.weight"} <= moved & learns
    if last:
        assert any(key.removeprefix("backbone.").startswith(last) for key in learns)
        wrong = [key for key in learns if not key.removeprefix("backbone.").startswith(last) and key[:4] == "back"]
        assert not [key for key in wrong if "norm" not in key]


@pytest.mark.parametrize("name", ["bert", "timm vit"])
def test_rates_fall_by_depth(name: str) -> None:
    model = attach_head(BACKBONES[name][0](), 3, head="attention_pool")
    groups = param_groups(model, lr=1e-2, backbone_lr=1e-3, layer_decay=0.5, weight_decay=0.1)
    depths = parameter_depths(model, set(record_of(model).new_parameters))
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    seen = {names[id(parameter)]: group for group in groups for parameter in group["params"]}
    assert len(seen) == len(names)
    for key, group in seen.items():
        wanted = 1e-2 if key.startswith("head.") else 1e-3 * 0.5 ** (depths.count - depths.of[key])
        assert group["lr"] == pytest.approx(wanted)
        if key.endswith(("bias", "pos_embed", "cls_token")):
            assert group["weight_decay"] == 0
