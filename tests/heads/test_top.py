from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from torch import nn

from headinit.attach import attach_head, init_head
from headinit.description import describe
from headinit.errors import HeadError, SchemeError
from headinit.heads.record import record_of
from headinit.heads.top import top_parameters
from headinit.training.freezing import freeze
from headinit.training.param_groups import param_groups
from tests.heads.models import tiny, tiny_vit


def bert() -> nn.Module:
    return tiny("BertForSequenceClassification", num_hidden_layers=3)


def changed(before: dict, after: dict) -> set[str]:
    return {
        n for n, v in after.items() if n in before and (v.shape != before[n].shape or not torch.equal(v, before[n]))
    }


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "DistilBertForSequenceClassification"])
def test_the_top_of_bert_starts_anew_as_its_library_does_it_and_nothing_else(name: str) -> None:
    model = tiny(name, **{"n_layers" if name.startswith("D") else "num_hidden_layers": 3})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)  # no value is where the library would put it
    before, state = {n: v.clone() for n, v in model.state_dict().items()}, torch.get_rng_state()
    attach_head(model, 3, init="zeros", init_options={"reinit_top": 1})
    assert torch.equal(state, torch.get_rng_state())
    new = set(record_of(model).new_parameters)
    assert changed(before, model.state_dict()) == new
    weights = [p for n, p in model.named_parameters() if n in new and p.ndim == 2 and not n.startswith("classifier")]
    values = torch.cat([weight.flatten() for weight in weights])
    assert values.std().item() == pytest.approx(model.config.initializer_range, rel=0.1)
    assert values.mean().abs().item() < 0.01
    assert record_of(model).kept_tensors == len([*model.parameters(), *model.buffers()]) - len(new)


def test_what_starts_anew_is_new_in_every_respect() -> None:
    model = attach_head(bert(), 3, init_options={"reinit_top": 1})
    record = record_of(model)
    assert record.init["reinit_top"] == 1
    anew = [name for name in record.new_parameters if ".layer." in name or "pooler" in name]
    assert anew
    freeze(model, "all")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(record.new_parameters)
    assert {group["lr"] for group in param_groups(model, lr=0.1)} == {0.1}
    text = str(describe(model))
    assert "start anew by the library's own rule" in text
    assert anew[0] in text


def test_the_seed_decides() -> None:
    def top(seed: int) -> torch.Tensor:
        torch.manual_seed(0)
        model = attach_head(bert(), 3, seed=seed, init_options={"reinit_top": 1})
        return model.bert.pooler.dense.weight

    assert torch.equal(top(1), top(1))
    assert not torch.equal(top(1), top(2))


def test_a_head_computed_from_data_reads_the_features_of_the_new_top() -> None:
    model = timm.create_model("test_vit", num_classes=30)
    data = torch.randn(12, 3, 160, 160), torch.arange(12) % 3
    options = {"reinit_top": 1, "calibrate": False}
    attach_head(model.eval(), 3, init="class_mean", init_options=options, data=data)
    with torch.no_grad():
        features = model.forward_head(model.forward_features(data[0]), pre_logits=True)
    means = torch.stack([features[data[1] == k].mean(0) for k in range(3)]) - features.mean(0)
    torch.testing.assert_close(model.head.weight, means, rtol=1e-3, atol=1e-4)


def test_top_blocks_of_vision_transformers() -> None:
    assert {n.split(".")[1] for n in top_parameters(timm.create_model("test_vit"), 2)} == {"4", "5"}
    assert all(".1." in n for n in top_parameters(tiny_vit(num_hidden_layers=2), 1))


@pytest.mark.parametrize(
    ("make", "blocks", "match"),
    [
        (lambda: torchvision.models.resnet18(), 1, "holds BatchNorm statistics"),
        (lambda: timm.create_model("test_convnext"), 1, "do not stand in one list"),
        (lambda: timm.create_model("test_vit"), 0, "has no pooler"),
        (lambda: timm.create_model("test_vit"), 6, "has 6 blocks, and one at least must stay"),
    ],
)
def test_models_that_it_does_not_suit(make, blocks: int, match: str) -> None:  # type: ignore[no-untyped-def]
    model = make()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    with pytest.raises(HeadError, match=match):
        attach_head(model, 3, init_options={"reinit_top": blocks})
    assert not changed(before, model.state_dict())


def test_init_head_does_not_touch_the_backbone() -> None:
    model = attach_head(bert(), 3)
    with pytest.raises(SchemeError, match="init_head changes the head alone"):
        init_head(model, "he", reinit_top=1)
    with pytest.raises(SchemeError, match="number of blocks"):
        attach_head(model, 3, init_options={"reinit_top": -1})
