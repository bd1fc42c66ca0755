from __future__ import annotations

import copy
import json
import math
import pickle
import random
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import headinit
from headinit import schemes
from headinit.attach import attach_head, init_head
from headinit.errors import HeadError, SchemeError
from headinit.features.extract import FeatureSet, extract_features
from headinit.heads.locate import check_head, find_head
from headinit.heads.record import call_model, record_of
from headinit.schemes.scheme import Scheme
from tests.heads.models import perceptron, pictures, tiny, tiny_vit, tokens

MODELS: dict[str, tuple[Any, Any]] = {
    "perceptron": (perceptron, lambda: torch.rand(4, 8)),
    "plain_conv": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        lambda: pictures(4, 16),
    ),
    "resnet18": (lambda: torchvision.models.resnet18(), pictures),
    "squeezenet": (lambda: torchvision.models.squeezenet1_1(), pictures),
    "timm_resnet": (lambda: timm.create_model("test_resnet"), pictures),
    "timm_vit": (lambda: timm.create_model("test_vit"), lambda: pictures(2, 160)),
    "timm_conv_head": (lambda: timm.create_model("resnetv2_50", layers=(1, 1, 1, 1)), pictures),
    "timm_two_heads": (lambda: timm.create_model("deit_tiny_distilled_patch16_224", depth=1), lambda: pictures(2, 224)),
    "timm_headless": (lambda: timm.create_model("test_resnet", num_classes=0), pictures),
    "bert": (lambda: tiny("BertForSequenceClassification"), tokens),
    "distilbert": (lambda: tiny("DistilBertForSequenceClassification"), tokens),
    "roberta": (lambda: tiny("RobertaForSequenceClassification"), tokens),
    "gpt2": (lambda: tiny("GPT2ForSequenceClassification"), tokens),
    "vit": (lambda: tiny_vit(), lambda: {"pixel_values": pictures(2, 32)}),
    "bert_base": (lambda: tiny("BertModel"), tokens),
}


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def generator_states() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


# --- guarantees -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize("name", MODELS)
def test_only_the_new_changes_and_the_logits_have_the_new_shape(name: str, head: str) -> None:
    build, inputs = MODELS[name]
    model = build().eval()
    before = {id(t): (n, t.detach().clone()) for n, t in [*model.named_parameters(), *model.named_buffers()]}
    cls, states = type(model), generator_states()
    attached = attach_head(model, 7, head=head)
    assert generator_states() == states
    record = record_of(attached)
    if name != "bert_base":
        assert attached is model
        assert type(attached) is cls
    for parameter_name, tensor in [*attached.named_parameters(), *attached.named_buffers()]:
        if id(tensor) in before:
            assert torch.equal(tensor, before[id(tensor)][1]), parameter_name
            assert parameter_name not in record.new_parameters
        else:
            assert parameter_name in record.new_parameters or "running" in parameter_name
    assert call_model(attached, inputs()).shape[-1] == 7
    assert check_head(attached, record.sites, inputs())
    assert find_head(attached) == record.sites
    assert record.kept_tensors > 0
    with pytest.raises(AttributeError):
        record.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_reaches_every_new_parameter(name: str) -> None:
    build, inputs = MODELS[name]
    model = attach_head(build().eval(), 7)
    logits = call_model(model, inputs())
    F.cross_entropy(logits, torch.arange(len(logits)) % 7).backward()
    for parameter_name in record_of(model).new_parameters:
        gradient = model.get_parameter(parameter_name).grad
        assert gradient is not None, parameter_name
        assert gradient.any(), parameter_name


@pytest.mark.parametrize("name", ["perceptron", "resnet18", "timm_two_heads", "roberta", "bert_base"])
def test_the_same_seed_gives_the_same_head_whatever_else_drew(name: str) -> None:
    build, _ = MODELS[name]
    heads = []
    for disturbance, seed in ((0, 3), (1, 3), (0, 4)):
        model = build()
        torch.manual_seed(disturbance)
        torch.rand(disturbance + 1)
        attach_head(model, 7, head="mlp", seed=seed) if name != "bert_base" else None
        model = model if name != "bert_base" else attach_head(model, 7, head="mlp", seed=seed)
        heads.append({n: model.get_parameter(n).detach() for n in record_of(model).new_parameters})
    assert all(torch.equal(heads[0][n], heads[1][n]) for n in heads[0])
    assert not all(torch.equal(heads[0][n], heads[2][n]) for n in heads[0])


def test_each_head_of_a_pair_has_numbers_of_its_own() -> None:
    model = attach_head(MODELS["timm_two_heads"][0](), 7)
    assert not torch.equal(model.head.weight, model.head_dist.weight)


def test_the_head_is_the_schemes_own_output() -> None:
    from headinit.seeding import generator_for

    model = attach_head(perceptron(), 7, init="xavier", seed=5)
    expected = schemes.build("xavier")(schemes.HeadShape(16, 7), generator_for(5, "head/2"))
    assert torch.equal(model[2].weight, expected.weight)
    assert record_of(model).intended_std["2.weight"] == expected.std


def test_a_scheme_that_fails_leaves_the_model_as_it_was() -> None:
    class Failing(Scheme):
        def __call__(self, shape: Any, generator: Any, data: Any = None) -> Any:
            raise SchemeError("no")

    for build, _ in (MODELS["perceptron"], MODELS["bert"], MODELS["timm_two_heads"]):
        model = build()
        before, modules = tensors_of(model), list(model.modules())
        labels = getattr(getattr(model, "config", None), "num_labels", None)
        with pytest.raises(SchemeError, match="no"):
            attach_head(model, 7, init=Failing())
        after = tensors_of(model)
        assert list(model.modules()) == modules
        assert before.keys() == after.keys()
        assert all(torch.equal(before[n], after[n]) for n in before)
        assert not hasattr(model, "headinit_record")
        assert getattr(getattr(model, "config", None), "num_labels", None) == labels


def test_a_scheme_that_writes_to_the_backbone_is_caught() -> None:
    model = perceptron()

    class Meddling(Scheme):
        def __call__(self, shape: Any, generator: Any, data: Any = None) -> Any:
            with torch.no_grad():
                model[0].bias.add_(1)
            return schemes.build("he")(shape, generator)

    with pytest.raises(HeadError, match=r"wrote to '0\.bias'"):
        attach_head(model, 7, init=Meddling())


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_classes": 0}, "at least 1"),
        ({"num_classes": True}, "whole number"),
        ({"num_classes": 2.0}, "whole number"),
        ({"num_classes": 1}, "regression"),
        ({"num_classes": 3, "class_names": ["a", "b"]}, "3 different names"),
        ({"num_classes": 2, "class_names": ["a", "a"]}, "2 different names"),
        ({"num_classes": 3, "task": "single"}, "Did you mean 'single_label'"),
        ({"num_classes": 3, "head": "liner"}, "Did you mean 'linear'"),
        ({"num_classes": 3, "pooling": "mean"}, "Cannot take tokens out of Sequential"),
        ({"num_classes": 3, "weights": "x.pth"}, "load a model by its name"),
        ({"num_classes": 3, "image_size": 3}, "load a model by its name"),
        ({"num_classes": 3, "head": "mlp", "head_options": {"hidden_bias": -1.0}}, "hidden_bias"),
    ],
)
def test_bad_arguments(options: dict[str, Any], match: str) -> None:
    model = perceptron()
    before = list(model.modules())
    with pytest.raises(HeadError, match=match):
        attach_head(model, **options)
    assert list(model.modules()) == before


def test_schemes_by_name_mapping_or_value() -> None:
    by_name = attach_head(perceptron(), 3, init="he", init_options={"mode": "fan_out"})
    by_mapping = attach_head(perceptron(), 3, init={"name": "he", "mode": "fan_out"})
    by_value = attach_head(perceptron(), 3, init=schemes.build("he", mode="fan_out"))
    assert torch.equal(by_name[2].weight, by_mapping[2].weight)
    assert torch.equal(by_name[2].weight, by_value[2].weight)
    assert record_of(by_name).init == record_of(by_mapping).init == {"name": "he", "mode": "fan_out"}
    with pytest.raises(SchemeError, match="Did you mean 'he'"):
        attach_head(perceptron(), 3, init="hee")


def test_one_class_for_regression_and_multi_label() -> None:
    model = attach_head(tiny("BertForSequenceClassification"), 1, task="regression")
    assert model.config.problem_type == "regression"
    assert attach_head(perceptron(), 1, task="multi_label")(torch.rand(2, 8)).shape == (2, 1)


def test_meta_wrapped_and_single_layer_models_are_refused() -> None:
    with torch.device("meta"):
        model = perceptron()
    with pytest.raises(HeadError, match="meta device"):
        attach_head(model, 3)
    with pytest.raises(HeadError, match="DataParallel"):
        attach_head(nn.DataParallel(perceptron()), 3)
    with pytest.raises(HeadError, match="single layer"):
        attach_head(nn.Linear(3, 2), 3)
    with pytest.raises(HeadError, match="a model's name"):
        attach_head(3, 3)


def test_bias_is_the_librarys_choice_unless_given() -> None:
    assert record_of(attach_head(tiny("GPT2ForSequenceClassification"), 3)).new_parameters == ("score.weight",)
    model = attach_head(tiny("GPT2ForSequenceClassification"), 3, bias=True)
    assert record_of(model).new_parameters == ("score.weight", "score.bias")
    assert perceptron()[2].bias is not None
    assert attach_head(perceptron(), 3, bias=False)[2].bias is None


# --- what the libraries must know -------------------------------------------------------------------------------------


def test_transformers_configuration_and_loss() -> None:
    model = attach_head(tiny("BertForSequenceClassification"), 3, class_names=["a", "b", "c"])
    assert model.config.num_labels == model.num_labels == 3
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert model.config.label2id == {"a": 0, "b": 1, "c": 2}
    labels = torch.tensor([0, 1, 2, 0])
    output = model(**tokens(), labels=labels)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, labels))
    many = attach_head(tiny("BertForSequenceClassification"), 3, task="multi_label")
    targets = torch.tensor([[1.0, 0, 1]] * 4)
    output = many(**tokens(), labels=targets)
    torch.testing.assert_close(output.loss, F.binary_cross_entropy_with_logits(output.logits, targets))


def test_token_classification() -> None:
    model = attach_head(tiny("BertForTokenClassification"), 5, task="token")
    labels = torch.full((4, 6), -100)
    labels[:, 0] = 2
    output = model(**tokens(), labels=labels)
    assert output.logits.shape == (4, 6, 5)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits[:, 0], labels[:, 0]))


def test_timm_knows_the_class_count() -> None:
    model = attach_head(timm.create_model("test_resnet"), 7)
    assert model.num_classes == 7
    assert model.get_classifier() is model.fc
    assert attach_head(timm.create_model("test_vit"), 7).num_classes == 7


def test_init_weights_does_not_overwrite_the_head() -> None:
    """Trap: `init_weights()` re-initialises what transformers takes for uninitialised."""
    for head in ("linear", "mlp"):
        model = attach_head(tiny("BertForSequenceClassification"), 3, head=head)
        names = record_of(model).new_parameters
        before = {n: model.get_parameter(n).detach().clone() for n in names}
        model.init_weights()
        assert all(torch.equal(before[n], model.get_parameter(n)) for n in names)


def test_auxiliary_heads_get_the_new_classes() -> None:
    model = torchvision.models.googlenet(init_weights=False)
    attach_head(model, 7, head="mlp", head_options={"hidden": [8]})
    output = model.train()(pictures(2, 96))
    assert [o.shape for o in output] == [(2, 7)] * 3
    assert isinstance(model.aux1.fc2, nn.Linear)
    assert {"aux1.fc2.weight", "aux2.fc2.weight", "fc.output.weight"} <= set(record_of(model).new_parameters)


def test_a_half_precision_backbone_gets_a_head_made_in_float32() -> None:
    for init in ("orthogonal", "he"):
        with pytest.warns(UserWarning, match="bfloat16"):
            model = attach_head(perceptron().to(torch.bfloat16), 3, init=init)
        reference = attach_head(perceptron(), 3, init=init)
        assert model[2].weight.dtype == torch.bfloat16
        assert torch.equal(model[2].weight, reference[2].weight.to(torch.bfloat16))
        assert "bfloat16" in record_of(model).notes[0]


# --- what the checkpoint did not fill ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def masked_language_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in ("BertForMaskedLM", "RobertaForMaskedLM", "DistilBertForMaskedLM"):
        tiny(name).save_pretrained(folder / name)
    return folder


FILLED = {
    "Bert": ("classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias"),
    "Roberta": (
        "classifier.out_proj.weight", "classifier.out_proj.bias", "classifier.dense.weight", "classifier.dense.bias",
    ),
    "DistilBert": ("classifier.weight", "classifier.bias", "pre_classifier.weight", "pre_classifier.bias"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILLED)
def test_what_a_checkpoint_left_open_is_new(name: str, masked_language_checkpoints: Path) -> None:
    import transformers

    cls = getattr(transformers, f"{name}ForSequenceClassification")
    made = []
    for disturbance in (0, 1):
        torch.manual_seed(disturbance)
        made.append(cls.from_pretrained(masked_language_checkpoints / f"{name}ForMaskedLM"))
    assert not torch.equal(made[0].get_parameter(FILLED[name][2]), made[1].get_parameter(FILLED[name][2]))
    loaded = tensors_of(made[0])
    for model in made:
        attach_head(model, 3)
    record = record_of(made[0])
    assert set(record.new_parameters) == set(FILLED[name])
    assert record.pretrained
    for parameter_name in FILLED[name]:  # the same seed, the same values: also of what was missing
        assert torch.equal(made[0].get_parameter(parameter_name), made[1].get_parameter(parameter_name))
    missing = FILLED[name][2]
    assert made[0].get_parameter(missing).std().item() == pytest.approx(0.02, rel=0.2)
    assert not made[0].get_parameter(FILLED[name][3]).any()
    for parameter_name, tensor in tensors_of(made[0]).items():
        assert parameter_name in FILLED[name] or torch.equal(tensor, loaded[parameter_name])
    modules = record.new_modules
    assert modules[0] == record.sites[0].path
    assert missing.rpartition(".")[0] in modules


def test_the_head_does_not_depend_on_what_else_is_missing(masked_language_checkpoints: Path, tmp_path: Path) -> None:
    """Trap: in transformers the same seed gives another head where other keys are missing."""
    import transformers

    cls = transformers.BertForSequenceClassification
    model = cls.from_pretrained(masked_language_checkpoints / "BertForMaskedLM")
    cls.from_pretrained(masked_language_checkpoints / "BertForMaskedLM").save_pretrained(tmp_path / "full")
    full = attach_head(cls.from_pretrained(tmp_path / "full"), 3)
    assert record_of(full).new_parameters == ("classifier.weight", "classifier.bias")
    assert torch.equal(attach_head(model, 3).classifier.weight, full.classifier.weight)


def test_the_old_head_is_replaced_when_the_class_count_is_the_same() -> None:
    model = tiny("BertForSequenceClassification", num_labels=3)
    old = model.classifier.weight
    attach_head(model, 3)
    assert model.classifier.weight is not old
    assert not torch.equal(model.classifier.weight, old)


def test_a_transformers_model_without_loaded_weights_is_recorded_as_random() -> None:
    assert not record_of(attach_head(tiny("BertForSequenceClassification"), 3)).pretrained
    assert record_of(attach_head(perceptron(), 3)).pretrained
    assert not record_of(attach_head(perceptron(), 3, pretrained=False)).pretrained


def test_attaching_again_replaces_the_head_and_remembers_what_is_new(masked_language_checkpoints: Path) -> None:
    import transformers

    model = transformers.BertForSequenceClassification.from_pretrained(masked_language_checkpoints / "BertForMaskedLM")
    attach_head(attach_head(model, 3, head="mlp"), 5)
    assert isinstance(model.classifier, nn.Linear)
    assert set(record_of(model).new_parameters) == set(FILLED["Bert"])


# --- pooling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["cls", "mean", "max", "last", "pooler"])
def test_pooled_heads_on_a_classifier_take_its_base_model(pooling: str) -> None:
    source = tiny("BertForSequenceClassification")
    model = attach_head(source, 3, pooling=pooling)
    assert model.backbone is source.bert
    batch = tokens()
    batch["attention_mask"][:, 4:] = 0
    output = model(**batch, labels=torch.tensor([0, 1, 2, 0]))
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, torch.tensor([0, 1, 2, 0])))
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][:, 4:] = 9  # padding is not seen
    torch.testing.assert_close(model(**changed).logits, output.logits)
    assert record_of(model).new_parameters == ("head.weight", "head.bias")
    assert ("pooler" in str(list(model.state_dict()))) == (pooling == "pooler")  # no parameter without a use


def test_a_base_model_gets_mean_pooling_and_heads_over_tokens_their_tokens() -> None:
    model = attach_head(tiny("BertModel"), 3)
    assert record_of(model).pooling == "mean"
    hidden = model.backbone(**tokens()).last_hidden_state.mean(1)
    torch.testing.assert_close(model(**tokens()).logits, model.head(hidden))
    for head in ("attention_pool", "recurrent", "conv"):
        model = attach_head(tiny("BertModel"), 3, head=head)
        assert model(**tokens()).logits.shape == (4, 3)
        with pytest.raises(HeadError, match="pools by itself"):
            attach_head(tiny("BertModel"), 3, head=head, pooling="cls")
    with pytest.raises(HeadError, match="no pooler"):
        attach_head(tiny("DistilBertForSequenceClassification"), 3, pooling="pooler")


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_heads_over_the_patches_of_timm_models(name: str) -> None:
    for head in ("attention_pool", "recurrent"):
        model = attach_head(timm.create_model(name), 3, head=head).eval()
        assert model(pictures(2, 160)).shape == (2, 3)
        names = dict(model.named_parameters())
        assert not any(n.startswith(("backbone.head.", "backbone.fc.")) for n in names)


WITH_MAPS = (
    *("resnet18", "convnext_tiny", "vit_b_32", "swin_t", "vgg11", "densenet121", "mobilenet_v2", "shufflenet_v2_x0_5"),
    *("mnasnet0_5", "squeezenet1_1", "googlenet", "mobilenet_v3_small"),
)


@pytest.mark.parametrize("name", WITH_MAPS)
def test_heads_over_the_patches_of_torchvision_models(name: str) -> None:
    """Every parameter that is left gets a gradient: DistributedDataParallel refuses a model where one does not."""
    options = {"init_weights": False} if name == "googlenet" else {}
    model = attach_head(torchvision.models.get_model(name, **options), 3, head="attention_pool").train()
    size = 224 if name == "vit_b_32" else 96
    logits = model(pictures(2, size))
    assert logits.shape == (2, 3)
    logits.sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert find_head(model)[0].path == "head"


@pytest.mark.parametrize("name", ["densenet121", "mobilenet_v2", "shufflenet_v2_x0_5", "mnasnet0_5", "squeezenet1_1"])
def test_the_map_is_what_the_model_itself_pools(name: str) -> None:
    """The mean over the map is the feature that the model's own classifier receives."""
    model = torchvision.models.get_model(name).eval()
    own = attach_head(copy.deepcopy(model), 3)
    if name == "squeezenet1_1":
        own = nn.Sequential(own.features, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        expected = own(pictures(2, 96))
    else:
        expected = extract_features(own, (pictures(2, 96), torch.tensor([0, 1])), speed="plain").features
    pooled = attach_head(model, 3, pooling="mean")
    found = extract_features(pooled, (pictures(2, 96), torch.tensor([0, 1])), speed="plain").features
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_mean_pooling_of_a_resnet_is_its_own_pooling() -> None:
    source = torchvision.models.resnet18().eval()
    pooled = attach_head(copy.deepcopy(source), 3, pooling="mean").eval()
    native = attach_head(source, 3, init=schemes.build("he"))
    with torch.no_grad():
        native.fc.weight.copy_(pooled.head.weight)
    torch.testing.assert_close(pooled(pictures()), native(pictures()), rtol=1e-4, atol=1e-4)


# --- heads with hidden layers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("activation", "gain"), [("relu", 2**0.5), ("tanh", None), ("selu", 1.0), ("gelu", 1.5335)])
def test_hidden_layers_get_the_scheme_of_their_activation(activation: str, gain: float | None) -> None:
    options = {"hidden": [400], "activation": activation, "norm": "layer"}
    model = attach_head(nn.Sequential(nn.Linear(2, 300), nn.Linear(300, 2)), 3, head="mlp", head_options=options)
    layer, norm = model[1].hidden[0], model[1].hidden[1]
    expected = gain / 300**0.5 if gain else (2 / 700) ** 0.5
    assert layer.weight.std().item() == pytest.approx(expected, rel=0.02)
    assert not layer.bias.any()
    assert norm.weight.eq(1).all()
    assert not norm.bias.any()
    assert record_of(model).intended_std["1.hidden.0.weight"] == pytest.approx(expected, rel=1e-3)


def test_hidden_options() -> None:
    options = {"hidden": 6, "hidden_init": "orthogonal", "hidden_bias": 0.1}
    model = attach_head(perceptron(), 3, head="mlp", head_options=options)
    hidden = model[2].hidden[0]
    torch.testing.assert_close(hidden.weight @ hidden.weight.T, torch.eye(6), rtol=0, atol=1e-5)
    assert hidden.bias.tolist() == pytest.approx([0.1] * 6)
    with pytest.raises(SchemeError, match="equal units"):
        attach_head(perceptron(), 3, head="mlp", head_options={"hidden_init": "zeros"})
    for activation, init, remedy in (("relu", "xavier", "he"), ("tanh", "he", "xavier")):
        with pytest.warns(UserWarning, match=f"Use {remedy}"):
            attach_head(perceptron(), 3, head="mlp", head_options={"activation": activation, "hidden_init": init})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach_head(perceptron(), 3, head="mlp", head_options={"hidden_init": "he"})


def test_a_zero_last_layer_starts_at_ln_k_and_moves() -> None:
    model = attach_head(perceptron(), 4, init="zeros", head="mlp")
    labels = torch.arange(8) % 4
    loss = F.cross_entropy(model(torch.randn(8, 8)), labels)
    assert loss.item() == pytest.approx(math.log(4), abs=1e-6)
    loss.backward()
    assert model[2].output.weight.grad.any()


def test_a_zero_head_before_a_relu_is_refused() -> None:
    """Trap: SqueezeNet is convolution, ReLU, pool: a zero head has exactly zero gradient."""
    with pytest.raises(SchemeError, match="never move"):
        attach_head(torchvision.models.squeezenet1_1(), 3, init="zeros")
    model = attach_head(torchvision.models.squeezenet1_1(), 3, init="zeros", init_options={"bias": 0.01})
    F.cross_entropy(model(pictures()), torch.tensor([0, 1])).backward()
    assert model.classifier[1].weight.grad.any()


def test_the_bias_of_a_prior_needs_a_place() -> None:
    class Prior(Scheme):
        def __call__(self, shape: Any, generator: Any, data: Any = None) -> Any:
            return schemes.HeadWeights(torch.ones(shape.out_features, shape.fan_in), torch.ones(shape.out_features))

    with pytest.raises(SchemeError, match="bias=True"):
        attach_head(tiny("GPT2ForSequenceClassification"), 3, init=Prior())


# --- init=library -----------------------------------------------------------------------------------------------------


def test_library_is_what_torchvision_builds() -> None:
    for name, expected, tolerance in (
        ("efficientnet_b0", 1 / (3 * 64) ** 0.5, 0.02),  # U(+-1/sqrt(K)): it follows the class count
        ("mobilenet_v3_small", 0.01, 0.02),
    ):
        model = attach_head(f"torchvision/{name}", 64, pretrained=False, init="library")
        assert output_of(model).weight.std().item() == pytest.approx(expected, rel=tolerance)
    assert not attach_head("torchvision/vit_b_32", 5, pretrained=False, init="library").heads.head.weight.any()


def output_of(model: nn.Module) -> Any:
    return model.get_submodule(record_of(model).sites[0].path)


def test_library_is_what_timm_builds() -> None:
    for name in ("lcnet_035", "test_resnet"):
        fresh = timm.create_model(name, num_classes=50)
        model = attach_head(timm.create_model(name), 50, init="library")
        ours, theirs = output_of(model).weight, fresh.get_classifier().weight
        assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.05)
        assert output_of(model).bias.std().item() == pytest.approx(fresh.get_classifier().bias.std().item(), abs=0.05)


def test_library_is_what_transformers_builds() -> None:
    import transformers

    model = attach_head(tiny("BertForSequenceClassification", initializer_range=0.3), 200, init="library")
    assert model.classifier.weight.std().item() == pytest.approx(0.3, rel=0.05)
    assert not model.classifier.bias.any()
    # CLIP's head is started by a rule on the classifier model itself, not on its last layer
    vision = {
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "image_size": 32,
    }
    config = transformers.CLIPConfig(vision_config=vision, text_config={"hidden_size": 8, "num_hidden_layers": 1})
    config.initializer_factor = 2.0
    clip = attach_head(transformers.CLIPForImageClassification(config), 200, init="library")
    config.num_labels = 200
    fresh = transformers.CLIPForImageClassification(config)
    assert clip.classifier.weight.std().item() == pytest.approx(fresh.classifier.weight.std().item(), rel=0.05)


def test_library_of_a_plain_module_is_its_layers_own_reset() -> None:
    model = attach_head(nn.Sequential(nn.Linear(3, 300), nn.Linear(300, 2)), 50, init="library")
    assert model[1].weight.std().item() == pytest.approx(1 / 900**0.5, rel=0.03)
    assert model[1].bias.abs().max() <= 1 / 300**0.5
    again = attach_head(nn.Sequential(nn.Linear(3, 300), nn.Linear(300, 2)), 50, init="library")
    assert torch.equal(model[1].weight, again[1].weight)


def test_library_refusals() -> None:
    with pytest.raises(SchemeError, match="Attach by name"):
        attach_head(torchvision.models.resnet18(), 3, init="library")
    with pytest.raises(SchemeError, match="no mlp head"):
        attach_head(perceptron(), 3, init="library", head="mlp")


# --- schemes from data ------------------------------------------------------------------------------------------------


def clusters(width: int = 8, classes: int = 3, rows: int = 90) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(rows) % classes
    centres = torch.randn(classes, width, generator=generator) * 3
    return centres[labels] + torch.randn(rows, width, generator=generator), labels


@pytest.mark.parametrize("init", ["ridge", "lda", "class_mean"])
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_heads_from_data_classify_before_any_training(init: str, head: str) -> None:
    inputs, labels = clusters()
    batches = list(zip(inputs.split(30), labels.split(30), strict=True))
    weights, source = [], perceptron().train()
    for data in ((inputs, labels), batches):
        model = attach_head(copy.deepcopy(source), 3, init=init, head=head, data=data)
        assert model.training
        assert (model.eval()(inputs).argmax(1) == labels).float().mean() > 0.9
        weights.append(output_of(model).output.weight if head == "mlp" else output_of(model).weight)
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-4)


def test_a_feature_set_stands_for_the_features_of_the_backbone() -> None:
    inputs, labels = clusters()
    for head in ("linear", "mlp"):
        model = perceptron()
        with torch.no_grad():
            features = FeatureSet(model[1](model[0](inputs)), labels, 3)
        attach_head(model, 3, init="ridge", head=head, data=features)
        direct = attach_head(copy.deepcopy(model), 3, init="ridge", head=head, data=(inputs, labels))
        torch.testing.assert_close(model(inputs), direct(inputs), rtol=1e-3, atol=1e-4)


def test_data_tell_which_layer_of_a_plain_module_is_the_head() -> None:
    class HeadFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.body = nn.Linear(6, 5), nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x).relu())

    inputs, labels = clusters()
    model = attach_head(HeadFirst(), 3, data=(inputs, labels))
    assert record_of(model).sites[0].path == "head"
    assert (
        attach_head(HeadFirst(), 3, init="ridge", data=(inputs, labels))(inputs).argmax(1) == labels
    ).float().mean() > 0.9


def test_data_schemes_ask_for_data_and_change_nothing_without() -> None:
    model = perceptron()
    layer = model[2]
    with pytest.raises(SchemeError, match="none was given"):
        attach_head(model, 3, init="ridge")
    assert model[2] is layer


# --- init_head --------------------------------------------------------------------------------------------------------


def test_init_head_restarts_the_attached_head_in_place() -> None:
    for head in ("linear", "mlp"):
        model = attach_head(perceptron(), 3, head=head, seed=1)
        first = tensors_of(model)
        parameters = [id(p) for p in model.parameters()]
        init_head(model, "he", seed=2)
        assert not torch.equal(
            first[record_of(model).new_parameters[0]], tensors_of(model)[record_of(model).new_parameters[0]]
        )
        init_head(model, "he", seed=1)
        assert [id(p) for p in model.parameters()] == parameters  # optimisers keep their parameters
        assert all(torch.equal(first[n], t) for n, t in tensors_of(model).items())
        assert record_of(model).seed == 1


def test_init_head_takes_options_and_models_that_came_with_their_head() -> None:
    model = perceptron()
    before = tensors_of(model)
    init_head(model, "uniform", a=0.5)
    assert model[2].weight.abs().max() <= 0.5
    assert model[2].weight.std().item() == pytest.approx(0.5 / 3**0.5, rel=0.15)
    assert record_of(model).new_parameters == ("2.weight", "2.bias")
    assert torch.equal(before["0.weight"], model[0].weight)


def test_init_head_failing_leaves_the_head() -> None:
    model = attach_head(perceptron(), 3, head="mlp")
    before, record = tensors_of(model), record_of(model)
    with pytest.raises(SchemeError):
        init_head(model, "ridge")
    assert all(torch.equal(before[n], t) for n, t in tensors_of(model).items())
    assert record_of(model) == record
    with pytest.raises(SchemeError, match="equal"):
        init_head(model, "he", hidden_init="zeros")
    with pytest.raises(HeadError, match="num_classes=0"):
        init_head(timm.create_model("test_resnet", num_classes=0), "he")


def test_a_parametrised_layer_is_refused_in_place_and_replaced_by_attach() -> None:
    """Trap: what is written to a parametrised weight is lost."""
    model = perceptron()
    nn.utils.parametrizations.weight_norm(model[2])
    with pytest.raises(HeadError, match="parametrised"):
        init_head(model, "zeros")
    assert not attach_head(model, 3, init="zeros")[2].weight.any()


# --- copies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["perceptron", "timm_resnet", "roberta", "bert_base"])
def test_copies_and_state_dicts_keep_logits_and_record(name: str, tmp_path: Path) -> None:
    build, inputs = MODELS[name]
    if name == "perceptron":
        model = attach_head(build(), 7, head="mlp").eval()
    else:
        model = attach_head(build(), 7, seed=9).eval()
    batch = inputs()
    logits = call_model(model, batch)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(call_model(other, batch), logits)
        assert record_of(other) == record_of(model)
    fresh = attach_head(build(), 7, head=record_of(model).head).eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(call_model(fresh, batch), logits)


@pytest.mark.parametrize("name", ["perceptron", "bert_base"])
def test_compiled_models_give_the_same_logits_and_their_record(name: str) -> None:
    build, inputs = MODELS[name]
    model = attach_head(build(), 7).eval()
    compiled, batch = torch.compile(model, backend="eager"), inputs()
    torch.testing.assert_close(call_model(compiled, batch), call_model(model, batch))
    assert record_of(compiled) is record_of(model)
    assert find_head(compiled) == find_head(model)
    init_head(compiled, "zeros")
    assert not call_model(compiled, batch).any()


@pytest.mark.slow
def test_attaching_is_cheap() -> None:
    """Under 50 ms beyond building the model, in a process of its own; the fastest of three."""
    code = """
import time, torch, torchvision, transformers
from headinit.attach import attach_head
with torch.device("meta"):
    shells = [torchvision.models.resnet50(), transformers.BertForSequenceClassification(transformers.BertConfig())]
for shell in shells:
    model = shell.to_empty(device="cpu")
    times = []
    for _ in range(3):
        start = time.perf_counter()
        attach_head(model, 10)
        times.append(time.perf_counter() - start)
    print(min(times))
"""
    environment = {"OMP_NUM_THREADS": "1", "PATH": "", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    for line in result.stdout.split():
        assert float(line) < 0.05


@pytest.mark.parametrize("name", ["resnet", "bert"])
def test_attaching_makes_no_copy_of_the_backbone(name: str) -> None:
    """Nothing that the size of the head does not explain is allocated, and every other tensor is the same memory."""
    from torch.profiler import ProfilerActivity, profile

    bert = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 2}
    model = torchvision.models.resnet18() if name == "resnet" else tiny("BertForSequenceClassification", **bert)
    places = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    total = sum(t.numel() * t.element_size() for t in model.parameters())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        attached = attach_head(model, 3)
    # What is freed again counts too: no copy for a moment either.
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in measured.events())
    new = {attached.get_parameter(n).data_ptr() for n in record_of(attached).new_parameters}
    assert {t.data_ptr() for t in (*attached.parameters(), *attached.buffers())} - new <= places
    assert total > 3e6
    assert allocated < 0.02 * total


# --- schemes that read the head which was there -----------------------------------------------------------------------


def examples_of_classes(classes: int = 4) -> tuple[Tensor, Tensor]:
    labels = torch.arange(24) % classes
    return torch.randn(24, 8, generator=torch.Generator().manual_seed(5)) + labels[:, None], labels


@pytest.mark.parametrize("waits", [False, True], ids=["at_once", "after_a_placeholder"])
def test_source_mixes_the_rows_of_the_classifier_that_was_there(waits: bool) -> None:
    model = perceptron()
    old, data = copy.deepcopy(model[2]), examples_of_classes(3)
    attach_head(model, 3, init="lecun" if waits else "source", data=None if waits else data)
    if waits:
        init_head(model, "source", data=data)
    with torch.no_grad():
        features = model[1](model[0](data[0]))
        shares = torch.stack([old(features)[data[1] == k].softmax(1).mean(0) for k in range(3)])
        rows, biases = shares @ old.weight, shares @ old.bias
    scale = model[2].weight.norm() / rows.norm()
    torch.testing.assert_close(model[2].weight, rows * scale, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model[2].bias, biases * scale, rtol=1e-4, atol=1e-5)
    assert json.loads(json.dumps(dict(record_of(model).init))) == {"name": "source"}


def test_source_needs_a_pretrained_classifier_of_the_same_features() -> None:
    data = examples_of_classes()
    with pytest.raises(SchemeError, match="made from a hidden layer"):
        attach_head(perceptron(), 4, init="source", head="mlp", data=data)
    ids = {**tokens(8), "labels": torch.arange(8) % 2}
    with pytest.raises(SchemeError, match="tokens that headinit pools"):
        attach_head(tiny("BertModel"), 2, init="source", data=[ids])
    model = tiny("BertForSequenceClassification")
    for name, parameter in model.named_parameters():
        parameter._is_hf_initialized = not name.startswith("classifier")  # as from_pretrained marks a new classifier
    with pytest.raises(SchemeError, match="came without one"):
        attach_head(model, 2, init="source", data=[ids])


def test_a_scheme_with_tensors_is_recorded_as_json() -> None:
    scheme = schemes.build("source").with_source(torch.randn(5, 16), None)
    model = attach_head(perceptron(), 4, init=scheme, data=examples_of_classes())
    assert json.loads(json.dumps(dict(record_of(model).init)))["weight"] == "tensor (5, 16)"


@pytest.mark.parametrize("pooling", ["logsumexp", "max"])
def test_multi_proxy_head_from_data_is_saved_and_loaded(pooling: str, tmp_path: Path) -> None:
    data = examples_of_classes()
    options = {"proxies": 3, "pooling": pooling}
    model = attach_head(perceptron(), 4, init="multi_proxy", head="multi_proxy", head_options=options, data=data)
    assert model(data[0]).shape == (24, 4)
    assert (model(data[0]).argmax(1) == data[1]).float().mean() > 0.8
    assert model[2].output.weight.shape == (12, 16)
    headinit.save(model, tmp_path / "model")
    copied = headinit.load(tmp_path / "model", model=perceptron())
    torch.testing.assert_close(copied(data[0]), model(data[0]))


def test_multi_proxy_head_refuses_what_does_not_fill_it() -> None:
    model, data = perceptron(), examples_of_classes()
    for init, match in (("zeros", "stay equal"), ("ridge", "one row per class")):
        with pytest.raises(SchemeError, match=match):
            attach_head(model, 4, init=init, head="multi_proxy", data=data)
    with pytest.raises(SchemeError, match="for another head"):
        attach_head(model, 4, init="multi_proxy", init_options={"pooling": "max"}, head="multi_proxy", data=data)
    attach_head(model, 4, init="lecun", head="multi_proxy")
    first, second = model[2].output.weight[:2]
    assert not torch.equal(first, second)
