from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from torch import nn

from headinit.errors import HeadError
from headinit.heads.locate import capture_head_input, check_head, find_head
from tests.heads.models import perceptron, pictures, tiny, tiny_vit, tokens


class HeadFirst(nn.Module):
    """Registers its head before its body: the order of registration says nothing about the order of execution."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)
        self.body = nn.Linear(4, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).relu())


class NormAfterHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm = nn.Linear(4, 3), nn.LayerNorm(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.body(x))


TORCHVISION = {
    "resnet18": ["fc"],
    "densenet121": ["classifier"],
    "mobilenet_v3_small": ["classifier.3"],
    "efficientnet_b0": ["classifier.1"],
    "vgg11": ["classifier.6"],
    "convnext_tiny": ["classifier.2"],
    "vit_b_32": ["heads.head"],
    "swin_t": ["head"],
    "squeezenet1_1": ["classifier.1"],
    "maxvit_t": ["classifier.5"],
    "inception_v3": ["fc", "AuxLogits.fc"],
    "googlenet": ["fc", "aux1.fc2", "aux2.fc2"],
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_paths(name: str) -> None:
    options = {"init_weights": False} if len(TORCHVISION[name]) > 1 else {}
    if name == "maxvit_t":
        model = torchvision.models.get_model(name)
    else:
        with torch.device("meta"):
            model = torchvision.models.get_model(name, **options)
    sites = find_head(model)
    assert [site.path for site in sites] == TORCHVISION[name]
    assert [site.role for site in sites[1:]] == ["auxiliary"] * (len(sites) - 1)
    assert sites[0].bias == (name != "maxvit_t")
    assert sites[0].kind == ("conv" if name == "squeezenet1_1" else "linear")


TIMM = {
    "test_resnet": ["fc"],
    "test_vit": ["head"],
    "deit_tiny_distilled_patch16_224": ["head", "head_dist"],
    "levit_128s": ["head.linear", "head_dist.linear"],
    "levit_384_s8": ["head.linear", "head_dist.linear"],  # timm's configuration names one of the two
    "pit_ti_distilled_224": ["head", "head_dist"],
    "efficientformer_l1": ["head", "head_dist"],
    "crossvit_tiny_240": ["head.0", "head.1"],
    "repvit_m0_9": ["head.head.l", "head.head_dist.l"],
    "efficientvim_m1": ["heads.0", "heads.1", "heads.2", "heads.3"],
    "volo_d1_224": ["head", "aux_head"],
    "caformer_s18": ["head.fc.fc2"],
    "resnetv2_50": ["head.fc"],
    "convnext_atto": ["head.fc"],
}


@pytest.mark.parametrize("name", TIMM)
def test_timm_paths(name: str) -> None:
    with torch.device("meta"):
        sites = find_head(timm.create_model(name))
    assert [site.path for site in sites] == TIMM[name]
    assert [site.role for site in sites] == ["main"] + ["distilled"] * (len(sites) - 1)
    assert sites[0].kind == ("conv" if name == "resnetv2_50" else "linear")


@pytest.mark.parametrize("name", ["levit_128s", "deit_tiny_distilled_patch16_224", "crossvit_tiny_240", "repvit_m0_9"])
def test_the_effect_of_several_heads_together_is_the_logits(name: str) -> None:
    model = timm.create_model(name).eval()
    sites = find_head(model)
    inputs = pictures(1, model.pretrained_cfg["input_size"][-1])
    assert check_head(model, sites, inputs)
    assert not check_head(model, sites[:1], inputs)  # one of them alone is not


TRANSFORMERS = {
    "BertForSequenceClassification": "classifier",
    "DistilBertForSequenceClassification": "classifier",
    "RobertaForSequenceClassification": "classifier.out_proj",
    "GPT2ForSequenceClassification": "score",
    "BertForTokenClassification": "classifier",
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_paths(name: str) -> None:
    model = tiny(name)
    sites = find_head(model)
    assert [site.path for site in sites] == [TRANSFORMERS[name]]
    assert check_head(model, sites, tokens())


def test_a_hidden_layer_as_wide_as_the_classes_is_not_taken_for_the_head() -> None:
    model = tiny("DistilBertForSequenceClassification", num_labels=16)  # pre_classifier is 16 -> 16 as well
    assert find_head(model)[0].path == "classifier"


def test_two_teacher_heads() -> None:
    sites = find_head(tiny_vit("DeiTForImageClassificationWithTeacher"))
    assert [(s.path, s.role) for s in sites] == [("cls_classifier", "main"), ("distillation_classifier", "distilled")]


def test_a_timm_model_inside_transformers() -> None:
    import transformers

    config = transformers.TimmWrapperConfig(architecture="test_resnet", num_labels=4)
    model = transformers.TimmWrapperForImageClassification(config).eval()
    sites = find_head(model)
    assert sites[0].path == "timm_model.fc"
    assert check_head(model, sites, {"pixel_values": pictures()})


def test_a_masked_language_model_is_refused_because_its_last_layer_is_the_embedding() -> None:
    with pytest.raises(HeadError, match="not a classifier"):
        find_head(tiny("BertForMaskedLM"))
    with pytest.raises(HeadError, match=r"tied.*pretrained weights"):
        find_head(tiny("BertForMaskedLM", num_labels=60))  # as many labels as words: only the tie tells


def test_tied_weights_of_a_plain_module_are_refused() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7))
    model[1].weight = model[0].weight
    with pytest.raises(HeadError, match=r"'0\.weight'.*tied"):
        find_head(model)


def test_base_models_are_refused_with_the_way_out() -> None:
    with pytest.raises(HeadError, match="pooling='mean'"):
        find_head(tiny("BertModel"))


def test_modules_without_a_head() -> None:
    with pytest.raises(HeadError, match="no Linear or Conv2d"):
        find_head(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)))
    headless = torchvision.models.resnet18()
    headless.fc = nn.Identity()
    with pytest.raises(HeadError, match="BatchNorm2d"):  # never the last convolution of the body
        find_head(headless)
    with pytest.raises(HeadError, match="lazy"):
        find_head(nn.Sequential(nn.LazyLinear(3)))
    with pytest.raises(HeadError, match="grouped"):
        find_head(nn.Sequential(nn.Conv2d(4, 4, 1, groups=2)))


def test_an_input_settles_what_structure_cannot() -> None:
    inputs = torch.rand(2, 4)
    assert find_head(HeadFirst())[0].path == "body"  # by structure alone: wrong
    site = find_head(HeadFirst(), inputs)[0]
    assert (site.path, site.in_features, site.out_features) == ("head", 6, 3)
    with pytest.raises(HeadError, match="something with an effect of its own"):
        find_head(NormAfterHead(), inputs)


def test_check_head_leaves_the_model_as_it_was() -> None:
    model = timm.create_model("test_resnet").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert check_head(model, find_head(model), pictures())
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_capture_gives_what_times_the_head_is_the_logits() -> None:
    for model, inputs in ((perceptron(), torch.rand(3, 8)), (timm.create_model("resnetv2_50").eval(), pictures())):
        with capture_head_input(model) as seen, torch.no_grad():
            logits = model(inputs)
        layer = model.get_submodule(find_head(model)[0].path)
        again = seen.tensor @ layer.weight.flatten(1).T + layer.bias
        torch.testing.assert_close(again, logits, rtol=1e-4, atol=1e-5)
    with capture_head_input(perceptron()) as seen, pytest.raises(HeadError, match="no forward pass"):
        _ = seen.tensor


def test_capture_keeps_the_map_of_a_head_that_is_not_pooled() -> None:
    model = torchvision.models.squeezenet1_1().eval()
    with capture_head_input(model) as seen, torch.no_grad():
        model(pictures())
    assert seen.tensor.shape == (2, 512, 3, 3)
