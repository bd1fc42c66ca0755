from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from headinit import schemes
from headinit.attach import attach_head, init_head
from headinit.errors import ConfigError, TrainingError
from headinit.heads.record import HeadRecord, HeadSite, record_of, set_record
from headinit.training.freezing import freeze
from headinit.training.param_groups import backbone_share, param_groups

from .models import record_head, tiny_bert, tiny_timm, torchvision_model

MODELS = {
    "bert": tiny_bert,
    "timm vit": lambda: tiny_timm("test_vit", "head"),
    "timm resnet": lambda: tiny_timm("test_resnet", "fc"),
    "timm convnext": lambda: tiny_timm("test_convnext", "head.fc"),
    "timm efficientnet": lambda: tiny_timm("test_efficientnet", "classifier"),
    "torchvision resnet18": lambda: torchvision_model("resnet18", "fc"),
    "torchvision swin": lambda: torchvision_model("swin_t", "head"),
}


def _by_parameter(model: nn.Module, groups: list[dict]) -> dict[str, dict]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)]: group for group in groups for parameter in group["params"]}


@pytest.mark.parametrize("policy", ["none", "all", 1, "norm"])
@pytest.mark.parametrize("layer_decay", [None, 0.5])
@pytest.mark.parametrize("name", MODELS)
def test_every_trainable_parameter_exactly_once(name: str, layer_decay: float | None, policy: str | int) -> None:
    model = freeze(MODELS[name](), policy)
    groups = param_groups(model, lr=1e-2, layer_decay=layer_decay, weight_decay=0.1)
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert len({group["name"] for group in groups}) == len(groups)
    torch.optim.AdamW(groups)  # torch accepts them as they are


def test_rates_of_head_and_backbone() -> None:
    model = tiny_bert()
    held = _by_parameter(model, param_groups(model, lr=1e-2))
    head = set(record_of(model).new_parameters)
    assert {group["lr"] for name, group in held.items() if name in head} == {1e-2}
    assert {group["lr"] for name, group in held.items() if name not in head} == {1e-3}
    held = _by_parameter(model, param_groups(model, lr=1e-2, backbone_lr=5e-5))
    assert {group["lr"] for name, group in held.items() if name not in head} == {5e-5}


def _for_pictures(init: str, **options: object) -> nn.Module:
    """A network with a convolution, its head started by a scheme on 40 examples of two classes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))
    labels = torch.arange(40) % 2
    pictures = torch.randn(40, 3, 5, 5) + labels[:, None, None, None]
    model = attach_head(model, 2, init="zeros")
    return init_head(model, init, data=(pictures, labels), **options)


NOT_FINISHED = {"lsuv", "he", "zeros", "library", "torch", "xavier", "lecun", "normal", "bert", "trunc_normal"}
NOT_FINISHED |= {"scaled_down", "uniform", "orthogonal", "etf"}


@pytest.mark.parametrize("init", sorted(set(schemes.available()) - {"multi_proxy", "source"}))
def test_the_backbone_of_a_finished_start_on_pictures_trains_at_a_hundredth(init: str) -> None:
    model = _for_pictures(init)
    assert record_of(model).from_data is (init not in NOT_FINISHED)
    share = 0.1 if init in NOT_FINISHED else 0.01
    assert backbone_share(model) == share
    held = _by_parameter(model, param_groups(model, lr=1e-2))
    assert held["0.weight"]["lr"] == pytest.approx(share * 1e-2)
    assert held["4.weight"]["lr"] == 1e-2
    held = _by_parameter(model, param_groups(model, lr=1e-2, optimizer="sgd"))
    assert held["0.weight"]["lr"] == pytest.approx(1e-3)


def test_a_random_start_under_modifiers_that_read_data_is_not_finished() -> None:
    for options in ({"prior_bias": True}, {"standardise": True}, {"logit_std": 0.5}, {"energy": 0.4}):
        assert backbone_share(_for_pictures("normal", **options)) == 0.1, options
    assert backbone_share(_for_pictures("ridge", standardise=True)) == 0.01
    assert backbone_share(init_head(_for_pictures("ridge"), "he")) == 0.1  # the last word counts


def test_text_and_random_backbones_keep_the_tenth() -> None:
    labels = torch.arange(12) % 2
    text = attach_head(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), 2, init="zeros")
    init_head(text, "ridge", data=(torch.randn(12, 4) + labels[:, None], labels))
    assert record_of(text).from_data
    assert backbone_share(text) == 0.1
    random = nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))
    pictures = torch.randn(12, 3, 5, 5) + labels[:, None, None, None]
    random = attach_head(random, 2, init="ridge", data=(pictures, labels), pretrained=False)
    assert record_of(random).from_data
    assert backbone_share(random) == 0.1


def test_new_parameters_outside_the_head_train_at_its_rate() -> None:
    model = tiny_bert()
    names = tuple(n for n, _ in model.named_parameters() if n.startswith(("classifier.", "bert.pooler.")))
    set_record(model, HeadRecord((HeadSite("classifier", "linear", 16, 3),), "linear", 3, names, ("classifier",)))
    held = _by_parameter(model, param_groups(model, lr=1.0, backbone_lr=0.1, layer_decay=0.5))
    assert held["bert.pooler.dense.weight"]["lr"] == 1.0
    assert held["bert.encoder.layer.2.output.dense.weight"]["lr"] == 0.1


def test_equal_values_are_not_the_same_parameter() -> None:
    model = record_head(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "1", classes=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    groups = param_groups(model, lr=1.0)
    assert sum(len(group["params"]) for group in groups) == 4


@pytest.mark.parametrize(
    ("name", "head"),
    [("test_vit", "head"), ("test_resnet", "fc"), ("test_convnext", "head.fc"), ("test_efficientnet", "classifier")],
)
def test_layer_decay_is_timms(name: str, head: str) -> None:
    from timm.optim import param_groups_layer_decay

    model = tiny_timm(name, head)
    theirs = param_groups_layer_decay(
        model, weight_decay=0.05, no_weight_decay_list=getattr(model, "no_weight_decay", set)(), layer_decay=0.6
    )
    ours = _by_parameter(model, param_groups(model, lr=1.0, backbone_lr=1.0, layer_decay=0.6, weight_decay=0.05))
    head_scale = max(group["lr_scale"] for group in theirs)
    new = set(record_of(model).new_parameters)
    for parameter_name, group in _by_parameter(model, theirs).items():
        assert group["weight_decay"] == ours[parameter_name]["weight_decay"], parameter_name
        if parameter_name in new:
            assert group["lr_scale"] == head_scale
        elif parameter_name.startswith("head.norm"):
            # timm counts ConvNeXt's last norm, pretrained, as head; here it belongs to the deepest block.
            assert ours[parameter_name]["lr"] == 1.0
        else:
            # timm's deepest block is already one factor below the head, ours is at backbone_lr.
            assert ours[parameter_name]["lr"] * 0.6 == pytest.approx(group["lr_scale"])


def test_layer_decay_of_bert_by_hand() -> None:
    model = tiny_bert(layers=3)
    held = _by_parameter(model, param_groups(model, lr=1.0, backbone_lr=0.1, layer_decay=0.5))
    expected = {"layer.2.": 0.1, "pooler": 0.1, "layer.1.": 0.05, "layer.0.": 0.025, "embeddings": 0.0125}
    for part, rate in expected.items():
        assert {g["lr"] for n, g in held.items() if part in n} == {rate}


def test_weight_decay_is_transformers_for_bert(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = tiny_bert()
    trainer = Trainer(model, TrainingArguments(output_dir=str(tmp_path), report_to=[]))
    decayed = set(trainer.get_decay_parameter_names(model))
    ours = _by_parameter(model, param_groups(model, lr=1.0, weight_decay=0.1))
    assert {name for name, group in ours.items() if group["weight_decay"] > 0} == decayed


def test_tokens_and_positions_are_not_decayed() -> None:
    from torchvision.models import VisionTransformer

    model = record_head(VisionTransformer(32, 16, 2, 2, 16, 32, num_classes=3), "heads.head")
    held = _by_parameter(model, param_groups(model, lr=1.0, weight_decay=0.1))
    assert held["class_token"]["weight_decay"] == held["encoder.pos_embedding"]["weight_decay"] == 0.0
    assert held["conv_proj.weight"]["weight_decay"] == 0.1


def test_a_model_without_a_record_is_all_head() -> None:
    groups = param_groups(nn.Linear(4, 2), lr=0.5, weight_decay=0.1)
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in groups] == [("head", 0.5, 0.1), ("head/no_decay", 0.5, 0)]


def test_nothing_trainable() -> None:
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(TrainingError, match="None of the 2 parameters of Linear is trainable"):
        param_groups(model, lr=1.0)


@pytest.mark.parametrize(
    "rates", [{"lr": -1.0}, {"lr": float("nan")}, {"lr": 1.0, "layer_decay": 0.0}, {"lr": 1.0, "weight_decay": -0.1}]
)
def test_rates_out_of_range(rates: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        param_groups(nn.Linear(2, 2), **rates)


def test_a_backbone_rate_needs_a_backbone() -> None:
    with pytest.raises(ConfigError, match="attached no head"):
        param_groups(nn.Linear(2, 2), lr=1.0, backbone_lr=0.1)
