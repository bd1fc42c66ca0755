from __future__ import annotations

from collections import namedtuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from headinit.errors import ConfigError, DataError, HeadError
from headinit.features.extract import FeatureSet, extract_features, relative_error, stream_features
from headinit.heads.locate import find_head
from headinit.heads.record import logits_of

Batch = namedtuple("Batch", "inputs labels index")


def pictures(n: int = 6, size: int = 64) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3, size, size), torch.arange(n) % 3


def tokens(n: int = 6, length: int = 7) -> tuple[dict[str, Tensor], Tensor]:
    ids = torch.randint(5, 60, (n, length))
    mask = torch.ones_like(ids)
    for row in range(n):  # of mixed length, padded with 0 on the right
        mask[row, length - row % 4 :] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}, torch.arange(n) % 3


def torchvision_model(name: str) -> nn.Module:
    import torchvision

    options = {"init_weights": False} if name in ("inception_v3", "googlenet") else {}
    return torchvision.models.get_model(name, weights=None, num_classes=5, **options)


def timm_model(name: str) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False, num_classes=5)


def transformers_model(kind: str) -> nn.Module:
    import transformers as t

    small = {"vocab_size": 64, "num_labels": 5, "pad_token_id": 0}
    bert = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    if kind == "bert":
        return t.BertForSequenceClassification(t.BertConfig(**small, **bert))
    if kind == "roberta":
        return t.RobertaForSequenceClassification(t.RobertaConfig(**small, **bert))
    if kind == "distilbert":
        return t.DistilBertForSequenceClassification(
            t.DistilBertConfig(**small, dim=32, hidden_dim=48, n_layers=2, n_heads=4)
        )
    if kind == "gpt2":  # a Linear over every token, of which the last real one is chosen afterwards
        return t.GPT2ForSequenceClassification(t.GPT2Config(**small, n_embd=32, n_layer=2, n_head=4))
    assert kind == "bert_tokens"
    return t.BertForTokenClassification(t.BertConfig(**small, **bert))


def apply_head(model: nn.Module, features: Tensor) -> Tensor:
    layer = model.get_submodule(find_head(model)[0].path)
    return F.linear(features, layer.weight.flatten(1), layer.bias).detach()


IMAGE_MODELS = [
    (torchvision_model, "resnet18"),
    (torchvision_model, "mobilenet_v3_small"),
    (torchvision_model, "densenet121"),
    (torchvision_model, "shufflenet_v2_x0_5"),
    (torchvision_model, "convnext_tiny"),
    (timm_model, "tf_efficientnet_lite0"),
    (timm_model, "resnet10t"),
    (timm_model, "mobilenetv3_small_050"),
    (timm_model, "lcnet_035"),
]


@pytest.mark.parametrize(("maker", "name"), IMAGE_MODELS)
def test_features_times_head_are_the_logits_of_pictures(maker, name: str) -> None:
    model = maker(name)
    data = pictures()
    found = extract_features(model, data, batch_size=4)
    with torch.no_grad():
        logits = model.eval()(data[0])
    assert found.features.shape == (6, find_head(model)[0].in_features)
    torch.testing.assert_close(apply_head(model, found.features), logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.labels, data[1])
    assert found.num_classes == 3
    assert not found.from_cache


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "gpt2"])
def test_features_times_head_are_the_logits_of_text(name: str) -> None:
    model = transformers_model(name)
    data = tokens()
    found = extract_features(model, data, batch_size=4)
    with torch.no_grad():
        logits = logits_of(model.eval()(**data[0]))
    assert found.features.shape == (6, 32)
    torch.testing.assert_close(apply_head(model, found.features), logits, rtol=1e-4, atol=1e-5)


def test_tokens_with_a_label_are_the_rows_of_a_token_task() -> None:
    model = transformers_model("bert_tokens")
    inputs, _ = tokens()
    labels = torch.where(inputs["attention_mask"] == 1, inputs["input_ids"] % 5, -100)
    batches = [
        Batch({k: v[rows] for k, v in inputs.items()}, labels[rows], rows)
        for rows in torch.tensor([4, 1, 3, 0, 5, 2]).split(2)
    ]
    found = extract_features(model, batches)
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    torch.testing.assert_close(apply_head(model, found.features), logits[labels >= 0], rtol=1e-4, atol=1e-5)
    assert torch.equal(found.labels, labels[labels >= 0])


def test_a_head_before_a_nonlinear_pooling_is_refused() -> None:
    with pytest.raises(HeadError, match="not linear"):
        extract_features(torchvision_model("squeezenet1_1"), pictures())


class MapHead(nn.Module):
    """A 1x1 convolution over the map, averaged afterwards: linear, so the mean may be taken first."""

    def __init__(self, kernel: int = 1) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 8, 3, padding=1)
        self.classifier = nn.Conv2d(8, 5, kernel)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.body(x).relu()).mean((2, 3))


@pytest.mark.parametrize("kernel", [1, 4])
def test_convolutional_heads(kernel: int) -> None:
    model, data = MapHead(kernel), pictures(size=4)
    found = extract_features(model, data, batch_size=4)
    assert found.features.shape == (6, 8 * kernel * kernel)
    torch.testing.assert_close(apply_head(model, found.features), model(data[0]).detach(), rtol=1e-4, atol=1e-5)


class Simple(nn.Module):
    """BatchNorm and Dropout show whether the mode was right."""

    def __init__(self, width: int = 6, classes: int = 3) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(x)))


def simple_data(n: int = 10) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 6), torch.arange(n) % 3


def test_the_model_is_left_as_it_was() -> None:
    model = Simple().train()
    model.norm.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    x, y = simple_data()
    found = extract_features(model, (x, y))
    torch.testing.assert_close(found.features, x / (1 + model.norm.eps) ** 0.5)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_modes_are_back_between_batches_and_after_an_error() -> None:
    model = Simple().train()
    stream = stream_features(model, simple_data(), batch_size=4)
    next(stream)
    assert all(m.training for m in model.modules())
    with pytest.raises(RuntimeError):
        extract_features(model, (torch.randn(4, 7), torch.zeros(4, dtype=torch.long)))
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_no_random_number_is_drawn() -> None:
    model, data = Simple(), simple_data()
    state = torch.get_rng_state()
    extract_features(model, data)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("form", ["pair", "loader", "list", "mappings", "generator", "labels as list"])
def test_every_form_of_data(form: str) -> None:
    model, (x, y) = Simple(), simple_data()
    batches = list(zip(x.split(4), y.split(4), strict=True))
    data = {
        "pair": (x, y),
        "loader": DataLoader(TensorDataset(x, y), batch_size=4),
        "list": [[a, b, "extra"] for a, b in batches],
        "mappings": [{"x": a, "labels": b} for a, b in batches],
        "generator": (batch for batch in batches),
        "labels as list": (x, y.tolist()),
    }[form]
    found = extract_features(model, data, batch_size=4)
    torch.testing.assert_close(found.features, x / (1 + model.norm.eps) ** 0.5)
    assert torch.equal(found.labels, y)
    assert found.labels.dtype == torch.int64


def test_a_feature_set_is_returned_as_it_is() -> None:
    ready = FeatureSet(torch.randn(3, 6), torch.tensor([0, 1, 2]), 3)
    assert extract_features(Simple(), ready) is ready
    parts = list(stream_features(Simple(), ready, batch_size=2))
    assert torch.equal(torch.cat([f for f, _ in parts]), ready.features)


def test_rows_come_back_in_the_order_of_the_data() -> None:
    model, (x, y) = Simple(), simple_data()
    shuffled = torch.randperm(10)
    batches = [Batch(x[rows], y[rows], rows) for rows in shuffled.split(4)]
    found = extract_features(model, batches)
    torch.testing.assert_close(found.features, x / (1 + model.norm.eps) ** 0.5)
    assert torch.equal(found.labels, y)


def test_labels_of_other_tasks() -> None:
    x = torch.randn(4, 6)
    regression = extract_features(Simple(), (x, torch.rand(4)))
    assert regression.labels.shape == (4, 1)
    assert regression.num_classes == 1
    multi = extract_features(Simple(), (x, torch.rand(4, 7)))
    assert multi.labels.shape == (4, 7)
    assert multi.num_classes == 7
    assert extract_features(Simple(), (x, torch.tensor([0, 1, 0, 1])), num_classes=9).num_classes == 9
    assert extract_features(Simple(), (x, torch.tensor([0, 1, 0, 1], dtype=torch.int32))).labels.dtype == torch.int64


def test_half_precision_weights_give_float32_features() -> None:
    model, (x, y) = Simple().to(torch.bfloat16), simple_data()
    found = extract_features(model, (x, y))
    assert found.features.dtype == torch.float32
    assert relative_error(found.features, x) < 1e-2


def test_bf16_only_where_the_data_allow_it() -> None:
    x, y = torch.randn(8, 64), torch.zeros(8, dtype=torch.long)
    safe = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2))
    exact = extract_features(safe, (x, y)).features
    reduced = extract_features(safe, (x, y), precision="bf16").features
    assert 1e-4 < relative_error(reduced, exact) < 1e-2
    # A difference of two nearly equal numbers: bf16 has 8 bits for it.
    unsafe = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 2))
    with torch.no_grad():
        unsafe[0].weight.copy_(torch.eye(64))
        unsafe[0].bias.fill_(1000.0)
        unsafe[1].weight.copy_(torch.eye(64))
        unsafe[1].bias.fill_(-1000.0)
    exact = extract_features(unsafe, (x, y)).features
    assert relative_error(extract_features(unsafe, (x, y), precision="bf16").features, exact) > 0.1
    assert relative_error(extract_features(unsafe, (x, y), precision="auto").features, exact) < 1e-3


def test_progress_is_told() -> None:
    told: list[tuple] = []
    extract_features(Simple(), simple_data(), batch_size=4, progress=lambda *args: told.append(args))
    assert [t[:2] for t in told] == [(1, 3), (2, 3), (3, 3)]
    assert told[-1][2] == 0
    assert all(t[2] >= 0 for t in told)
    told.clear()
    batches = ((x, y) for x, y in [simple_data(2)] * 2)
    extract_features(Simple(), batches, progress=lambda *args: told.append(args))
    assert told == [(1, None, None), (2, None, None)]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "no example"),
        ((torch.randn(3, 6), torch.zeros(2)), "one label a row"),
        (torch.randn(3, 6), "Cannot read data of type Tensor"),
        (7, "Cannot read data of type int"),
        ([torch.randn(3, 6)], "Cannot read a batch of type Tensor"),
        ([{"x": torch.randn(3, 6)}], "no 'labels', only x"),
        ([(torch.randn(3, 6), torch.zeros(2))], "3 examples and 2 labels"),
        ((torch.full((3, 6), torch.nan), torch.zeros(3)), "example 0 are not finite"),
    ],
)
def test_bad_data_is_refused(data, message: str) -> None:
    with pytest.raises(DataError, match=message):
        extract_features(Simple(), data)


def test_the_example_that_is_not_finite_is_named() -> None:
    x, y = simple_data()
    x[7, 2] = torch.inf
    with pytest.raises(DataError, match="example 7 "):
        extract_features(Simple(), (x, y), batch_size=4)


def test_unknown_settings_list_the_near_ones() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'bf16'"):
        extract_features(Simple(), simple_data(), precision="bf61")
    with pytest.raises(ConfigError, match="Did you mean 'plain'"):
        extract_features(Simple(), simple_data(), speed="plane")


def test_a_model_without_weights_is_refused() -> None:
    with torch.device("meta"):
        model = Simple()
    with pytest.raises(HeadError, match="meta device"):
        extract_features(model, simple_data())
