from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from headinit.features import acceleration
from headinit.features.extract import extract_features, relative_error


@pytest.fixture(autouse=True)
def _any_amount_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceleration, "PIXELS_THAT_PAY", 1)


class Convolutions(nn.Module):
    """Small, with what real networks have: batch norm, a residual, a depthwise convolution, pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.depthwise = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16))
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(16, 3)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = (x + self.depthwise(x)).relu()
        return self.head(self.drop(x.mean((2, 3))))


def pictures(n: int = 21, size: int = 16) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3, size, size), torch.arange(n) % 3


def torchvision_model(name: str) -> nn.Module:
    import torchvision

    return torchvision.models.get_model(name, weights=None, num_classes=3)


def timm_model(name: str) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False, num_classes=3)


MODELS = [
    (lambda _: Convolutions(), "plain module"),
    (torchvision_model, "resnet18"),
    (timm_model, "tf_efficientnet_lite0"),
    (timm_model, "mobilenetv3_small_050"),
    pytest.param(torchvision_model, "resnet50", marks=pytest.mark.slow),
    pytest.param(torchvision_model, "densenet121", marks=pytest.mark.slow),
    pytest.param(torchvision_model, "convnext_tiny", marks=pytest.mark.slow),
    pytest.param(torchvision_model, "inception_v3", marks=pytest.mark.slow),
    pytest.param(timm_model, "efficientvit_b0", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("maker", "name"), MODELS)
def test_the_same_features_and_the_model_untouched(maker, name: str) -> None:
    model = maker(name).train()
    data = pictures(11, size=96 if name == "inception_v3" else 32)
    plain = extract_features(model, data, speed="plain", batch_size=11)
    before = {key: (value.clone(), value.data_ptr(), value.stride()) for key, value in model.state_dict().items()}
    fast = extract_features(model, data, batch_size=11)
    assert relative_error(fast.features, plain.features) < 1e-5
    assert not torch.equal(fast.features, plain.features)  # so the copy was really used
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key][0])
        assert (value.data_ptr(), value.stride()) == before[key][1:]
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not torch.jit.onednn_fusion_enabled()


@pytest.mark.parametrize("n", [1, 7, 8, 9, 17])
@pytest.mark.parametrize("batch_size", [3, 8, 20])
def test_every_number_of_pictures(n: int, batch_size: int) -> None:
    model, data = Convolutions(), pictures(n)
    fast = extract_features(model, data, batch_size=batch_size)
    plain = extract_features(model, data, batch_size=batch_size, speed="plain")
    torch.testing.assert_close(fast.features, plain.features, rtol=1e-4, atol=1e-5)


def test_pictures_of_another_size_go_the_plain_way() -> None:
    model = Convolutions()
    batches = [pictures(8), pictures(8, size=24), pictures(8)]
    fast = extract_features(model, batches)
    plain = extract_features(model, batches, speed="plain")
    torch.testing.assert_close(fast.features, plain.features, rtol=1e-4, atol=1e-5)
    assert torch.equal(fast.features[8:16], plain.features[8:16])


class Branching(Convolutions):
    """Looks at its input: a traced copy would take one way for ever."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2 if x.mean() > 0 else x)


class Uncopyable(Convolutions):
    def __deepcopy__(self, memo: dict) -> nn.Module:
        raise TypeError("cannot copy")


@pytest.mark.parametrize("kind", [Branching, Uncopyable])
def test_what_cannot_be_traced_is_right_all_the_same(kind: type[Convolutions]) -> None:
    model = kind()
    low, high = pictures(8), pictures(8)
    batches = [(low[0] - 1, low[1]), (high[0] + 1, high[1])]
    fast = extract_features(model, batches)
    plain = extract_features(model, batches, speed="plain")
    torch.testing.assert_close(fast.features, plain.features, rtol=1e-4, atol=1e-5)


def test_a_copy_that_is_off_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(model, features_of, sample):
        return lambda pictures: features_of(model)(pictures) * 1.0002

    model, data = Convolutions(), pictures()
    plain = extract_features(model, data, speed="plain")
    monkeypatch.setattr(acceleration, "_compiled", off)
    found = extract_features(model, data)
    assert relative_error(found.features, plain.features) < 1e-5


def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    original = acceleration._compiled
    monkeypatch.setattr(acceleration, "_compiled", lambda *args: (calls.append("made"), original(*args))[1])
    acceleration._compiled.__name__ = "_compiled"
    return calls


def test_when_a_copy_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = used(monkeypatch)
    model, data = Convolutions(), pictures()
    extract_features(model, data, speed="plain")
    extract_features(model, data, precision="bf16")
    extract_features(model, (batch for batch in [data]))  # nobody knows how many will come
    extract_features(nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3)), data)
    extract_features(model.double(), data)
    model.float()
    handle = model.stem.register_forward_hook(lambda *_: None)
    extract_features(model, data)
    handle.remove()
    monkeypatch.setattr(acceleration, "PIXELS_THAT_PAY", 32 * 16 * 16 + 1)
    extract_features(model, data)  # one batch of 21, as if it were full
    assert calls == []
    monkeypatch.setattr(acceleration, "PIXELS_THAT_PAY", 21 * 16 * 16)
    extract_features(model, data)
    assert calls == ["made"]


def test_one_copy_serves_all_data_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = used(monkeypatch)
    model, sets = Convolutions(), [pictures(21), pictures(17), pictures(9, size=24)]
    apart = [extract_features(model, data).features for data in sets]
    assert len(calls) == 3
    calls.clear()
    with acceleration.copies_kept():
        together = [extract_features(model, data).features for data in sets]
        other = extract_features(Convolutions(), sets[0]).features
    assert len(calls) == 3  # one for each size of pictures, one for the other model
    assert all(torch.equal(a, b) for a, b in zip(apart, together, strict=True))
    assert not torch.equal(other, together[0])
    with torch.no_grad():
        model.stem[0].weight.mul_(-1.0)
    assert not torch.equal(extract_features(model, sets[0]).features, together[0])  # nothing is kept after the block


def test_the_copy_shares_what_it_can() -> None:
    model = Convolutions()
    copied = acceleration._shared_copy(model)
    own, other = dict(model.named_parameters()), dict(copied.named_parameters())
    shared = {name for name in own if own[name].data_ptr() == other[name].data_ptr()}
    assert set(own) - shared == {"stem.0.weight"}  # a depthwise weight has the same layout either way
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(model.buffers(), copied.buffers(), strict=True))
    assert model.stem[0] is not copied.stem[0]


def test_parametrised_convolutions_keep_their_originals() -> None:
    model = Convolutions()
    nn.utils.parametrizations.weight_norm(model.stem[0])
    nn.utils.parametrizations.spectral_norm(model.depthwise[0])
    model.eval()  # spectral norm turns its vectors in training mode alone
    before = {key: value.clone() for key, value in model.state_dict().items()}
    data = pictures()
    plain = extract_features(model, data, speed="plain")
    fast = extract_features(model, data)
    torch.testing.assert_close(fast.features, plain.features, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
