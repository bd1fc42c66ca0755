from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from headinit.errors import HeadError, HeadInitError, TrainingError
from headinit.heads.record import HeadRecord, HeadSite, call_model, record_of, set_record
from headinit.training.freezing import freeze, freeze_state, frozen_digest, frozen_summary

from .models import NormZoo, bert_inputs, record_head, tiny_bert, tiny_timm, torchvision_model

IMAGE = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))

ALL_FROZEN = {
    "bert": (tiny_bert, bert_inputs),
    "norm zoo": (lambda: record_head(NormZoo(), "head.2"), lambda: IMAGE[:, :, :8, :8]),
    "timm vit": (
        lambda: tiny_timm("test_vit", "head", img_size=64, drop_path_rate=0.5, attn_drop_rate=0.5, pos_drop_rate=0.5),
        lambda: IMAGE,
    ),
    "timm resnet": (lambda: tiny_timm("test_resnet", "fc", drop_path_rate=0.5), lambda: IMAGE),
    "timm efficientnet": (lambda: tiny_timm("test_efficientnet", "classifier", drop_path_rate=0.5), lambda: IMAGE),
    "torchvision resnet18": (lambda: torchvision_model("resnet18", "fc"), lambda: IMAGE),
    "torchvision efficientnet": (lambda: torchvision_model("efficientnet_b0", "classifier.1"), lambda: IMAGE),
    "torchvision vit": (
        lambda: record_head(_small_torchvision_vit(), "heads.head"),
        lambda: IMAGE[:, :, :32, :32],
    ),
}


def _small_torchvision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 16, 2, 2, 16, 32, dropout=0.5, attention_dropout=0.5, num_classes=3)


def _head_input(model: nn.Module, inputs: object) -> torch.Tensor:
    """What the head receives: a probe of everything below it."""
    taken = []
    head = model.get_submodule(record_of(model).sites[0].path)
    handle = head.register_forward_pre_hook(lambda _, args: taken.append(args[0].detach().clone()))
    call_model(model, inputs)  # type: ignore[arg-type]
    handle.remove()
    return taken[0]


def _train_as_others_do(model: nn.Module, inputs: object, steps: int = 3) -> None:
    """A foreign loop in the manner of transformers' Trainer: `train()` at every step, all parameters, weight decay."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(steps):
        model.train()
        logits = call_model(model, inputs)  # type: ignore[arg-type]
        F.cross_entropy(logits, torch.arange(len(logits)) % 3).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)


@pytest.mark.parametrize("name", ALL_FROZEN)
def test_all_is_bit_identical_and_deterministic_under_a_foreign_loop(name: str) -> None:
    build, data = ALL_FROZEN[name]
    model, inputs = build(), data()
    freeze(model, "all")
    before, head = frozen_digest(model), record_of(model).new_parameters
    start = {name: model.get_parameter(name).detach().clone() for name in head}
    _train_as_others_do(model, inputs)
    assert frozen_digest(model) == before
    assert all(not torch.equal(model.get_parameter(name), value) for name, value in start.items())
    model.train()
    training = _head_input(model, inputs)
    model.eval()
    torch.testing.assert_close(training, _head_input(model, inputs), rtol=0, atol=0)


def test_the_foreign_loop_would_have_changed_an_unfrozen_model() -> None:
    model = record_head(NormZoo(), "head")
    statistics = model.bn.running_mean.clone()
    _train_as_others_do(model, IMAGE[:, :, :8, :8])
    assert not torch.equal(model.bn.running_mean, statistics)


def test_requires_grad_alone_would_not_do() -> None:
    model = record_head(NormZoo(), "head")
    freeze(model, "all")
    digest = frozen_digest(model)
    for module in model.modules():
        module._forward_pre_hooks.clear()
    _train_as_others_do(model, IMAGE[:, :, :8, :8])
    assert frozen_digest(model) != digest


def test_new_head_keeps_its_own_norm_and_dropout() -> None:
    model = freeze(record_head(NormZoo(), "head.2"), "all")
    assert not model.head[0].training  # the record names head.2 alone as new
    model = NormZoo()
    names = tuple(n for n, _ in model.named_parameters() if n.startswith("head."))
    set_record(model, HeadRecord((HeadSite("head.2", "linear", 4, 3),), "mlp", 3, names, ("head",)))
    freeze(model, "all").train()
    statistics = model.head[0].running_mean.clone()
    first, second = model(IMAGE), model(IMAGE)
    assert model.head[0].training
    assert model.head[1].training
    assert not torch.equal(model.head[0].running_mean, statistics)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_survives_copying(how: str) -> None:
    model = freeze(tiny_bert(), "all")
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    inputs, digest = bert_inputs(), frozen_digest(other)
    _train_as_others_do(other, inputs)
    assert frozen_digest(other) == digest
    other.train()
    torch.testing.assert_close(_head_input(other, inputs), _head_input(other, inputs), rtol=0, atol=0)
    freeze(other, "none")  # hooks of a copy can be taken away too
    assert not any(module._forward_pre_hooks for module in other.modules())
    assert any(module._forward_pre_hooks for module in model.modules())


def test_survives_compiling() -> None:
    torch.compiler.reset()
    model = freeze(record_head(NormZoo(), "head"), 0)
    compiled = torch.compile(model, backend="eager")
    digest = frozen_digest(compiled)
    inputs = IMAGE[:, :, :8, :8]
    for _ in range(3):
        compiled.train()
        compiled(inputs).sum().backward()
    assert frozen_digest(compiled) == digest
    assert not model.bn.training
    torch.compiler.reset()


def test_freezing_a_compiled_model_takes_effect() -> None:
    torch.compiler.reset()
    model = record_head(NormZoo(), "head")
    compiled = torch.compile(model, backend="eager")
    compiled.train()
    inputs = IMAGE[:, :, :8, :8]
    compiled(inputs)
    freeze(compiled, "all")
    digest = frozen_digest(model)
    compiled.train()
    compiled(inputs)
    assert frozen_digest(model) == digest
    torch.compiler.reset()


def test_wrapped_in_ddp_is_refused() -> None:
    class Pretending(nn.DataParallel):
        pass

    with pytest.raises(TrainingError, match="Call freeze on the bare model"):
        freeze(Pretending(tiny_bert()), "all")


def test_a_held_gradient_does_not_move_a_frozen_parameter() -> None:
    model = record_head(NormZoo(), "head")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(IMAGE).sum().backward()
    freeze(model, "all")
    digest = frozen_digest(model)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    assert frozen_digest(model) == digest


def test_old_spectral_norm_does_not_iterate() -> None:
    body = nn.utils.spectral_norm(nn.Linear(4, 4))
    model = freeze(record_head(nn.Sequential(body, nn.Linear(4, 3)), "1"), "all")
    u = body.weight_u.clone()
    model.train()(torch.randn(2, 4))
    assert torch.equal(body.weight_u, u)


def test_new_spectral_norm_does_not_iterate() -> None:
    body = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
    model = freeze(record_head(nn.Sequential(body, nn.Linear(4, 3)), "1"), "all")
    digest = frozen_digest(model)
    for _ in range(3):
        model.train()(torch.randn(2, 4))
    assert frozen_digest(model) == digest


@pytest.mark.parametrize(("name", "head"), [("inception_v3", "fc"), ("googlenet", "fc")])
def test_frozen_inception_gives_plain_logits(name: str, head: str) -> None:
    model = freeze(torchvision_model(name, head, init_weights=False), "all")
    model.train()
    output = model(torch.zeros(2, 3, 96, 96))
    assert isinstance(output, torch.Tensor)


STAGES = {
    "bert": (tiny_bert, "bert.encoder.layer.2.", ["bert.embeddings.", "bert.encoder.layer.1."]),
    "torchvision resnet18": (lambda: torchvision_model("resnet18", "fc"), "layer4.", ["conv1.", "layer3."]),
    "torchvision convnext": (
        lambda: torchvision_model("convnext_tiny", "classifier.2"),
        "features.7.",
        ["features.5.", "features.0."],
    ),
    "torchvision vit": (
        lambda: record_head(_small_torchvision_vit(), "heads.head"),
        "encoder.layers.encoder_layer_1.",
        ["class_token", "encoder.pos_embedding", "encoder.layers.encoder_layer_0."],
    ),
    "timm vit": (lambda: tiny_timm("test_vit", "head"), "blocks.5.", ["cls_token", "pos_embed", "blocks.4."]),
    "timm resnet": (lambda: tiny_timm("test_resnet", "fc"), "layer4.", ["conv1.", "layer3."]),
    "timm convnext": (lambda: tiny_timm("test_convnext", "head.fc"), "stages.3.", ["stem.", "stages.2."]),
    "timm efficientnet": (
        lambda: tiny_timm("test_efficientnet", "classifier"),
        "blocks.4.",
        ["conv_stem.", "blocks.3."],
    ),
    "plain": (
        lambda: record_head(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)), "3"),
        "1.",
        ["0."],
    ),
}


@pytest.mark.parametrize("name", STAGES)
def test_last_stage_and_head_train(name: str) -> None:
    build, last, earlier = STAGES[name]
    model = build()
    freeze(model, 1)
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(record_of(model).new_parameters) <= trains
    assert all(name in trains for name, _ in model.named_parameters() if name.startswith(last))
    for prefix in earlier:
        names = [name for name, _ in model.named_parameters() if name.startswith(prefix)]
        assert names
        assert not trains & set(names)


@pytest.mark.parametrize("name", ["bert", "timm vit", "torchvision vit"])
def test_the_frozen_prefix_gives_the_same_every_time(name: str) -> None:
    builds = {
        "bert": (lambda: tiny_bert(), bert_inputs(), "bert.encoder.layer.2"),
        "timm vit": (
            lambda: tiny_timm("test_vit", "head", img_size=64, drop_path_rate=0.5, pos_drop_rate=0.5),
            IMAGE,
            "blocks.5",
        ),
        "torchvision vit": (
            lambda: record_head(_small_torchvision_vit(), "heads.head"),
            IMAGE[:, :, :32, :32],
            "encoder.layers.encoder_layer_1",
        ),
    }
    build, inputs, boundary = builds[name]
    model = freeze(build(), 1)
    nn.init.normal_(model.get_submodule(record_of(model).sites[0].path).weight)  # torchvision's starts at zero
    model.train()
    seen, outputs = [], []
    model.get_submodule(boundary).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    for _ in range(2):
        outputs.append(call_model(model, inputs))
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(outputs[0], outputs[1])  # the trainable stage keeps its dropout


def test_trainable_stage_keeps_its_statistics_moving_unless_norm_is_eval() -> None:
    for norm, moves in ((None, True), ("train", True), ("eval", False)):
        model = freeze(torchvision_model("resnet18", "fc"), 1, norm=norm)
        model.train()(IMAGE)
        assert (model.layer4[0].bn1.num_batches_tracked.item() > 0) is moves
        assert model.layer3[0].bn1.num_batches_tracked.item() == 0
        assert model.layer4[0].bn1.weight.requires_grad


def test_none_with_norm_eval_trains_weights_and_holds_statistics() -> None:
    model = freeze(NormZoo(), "none", norm="eval")
    digest = frozen_digest(model)
    model.train()
    model(IMAGE).sum().backward()
    assert frozen_digest(model) == digest
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.drop.training


def test_norm_freezes_norms_alone() -> None:
    model = freeze(record_head(NormZoo(), "head.2"), "norm")
    frozen = {name.split(".")[0] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"bn", "bn_act", "instance", "sync", "flat", "head"}
    assert model.conv.weight.requires_grad
    digest = frozen_digest(model)
    _train_as_others_do(model, IMAGE[:, :, :8, :8])
    assert frozen_digest(model) == digest
    model.train()
    assert model.drop.training


@pytest.mark.parametrize("name", ["levit_128s"])
def test_norm_finds_batchnorm_1d_in_levit(name: str) -> None:
    import timm

    model = freeze(timm.create_model(name), "norm")
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d)]
    assert len(norms) >= 40
    model.train()
    model(torch.zeros(1, 3, 224, 224))
    assert all(m.num_batches_tracked.item() == 0 for m in norms)


def test_norm_finds_the_norms_of_transformers() -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=9)
    model = freeze(LlamaForSequenceClassification(config), "norm")
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {n for n, _ in model.named_parameters() if "norm" in n}


def test_patterns_globs_paths_and_regular_expressions() -> None:
    model = tiny_bert()
    freeze(model, ["bert.embeddings", "bert.encoder.layer.0.*", r".*layer\.1\..*bias"])
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    expected = {
        n
        for n, _ in model.named_parameters()
        if n.startswith(("bert.embeddings.", "bert.encoder.layer.0.")) or ("layer.1." in n and n.endswith("bias"))
    }
    assert frozen == expected
    model.train()
    call_model(model, bert_inputs())
    assert not model.bert.embeddings.dropout.training
    assert not model.bert.encoder.layer[0].attention.self.training
    assert model.bert.encoder.layer[1].attention.self.training


def test_patterns_never_freeze_the_new_head() -> None:
    model = freeze(tiny_bert(), ["*"])
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(record_of(model).new_parameters)


def test_refreezing_replaces_the_policy_cleanly() -> None:
    model = tiny_bert()
    model.bert.embeddings.position_embeddings.weight.requires_grad_(False)  # fixed by its owner
    model.train()
    freeze(model, "all")
    freeze(model, 1)
    freeze(model, "none")
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == [
        "bert.embeddings.position_embeddings.weight"
    ]
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(module.training for module in model.modules())
    fresh = freeze(tiny_bert(), 1)
    again = freeze(freeze(tiny_bert(), "all"), 1)
    flags = [(n, p.requires_grad) for n, p in fresh.named_parameters()]
    assert flags == [(n, p.requires_grad) for n, p in again.named_parameters()]
    fresh.train(), again.train()
    call_model(fresh, bert_inputs()), call_model(again, bert_inputs())
    modes = [(n, m.training) for n, m in fresh.named_modules()]
    assert modes == [(n, m.training) for n, m in again.named_modules()]


@pytest.mark.parametrize(
    ("policy", "norm", "message"),
    [
        ("al", None, "Did you mean 'all'"),
        (9, None, "has 3. Give a number from 0 to 3"),
        (-1, None, "Give a whole number"),
        (True, None, "Give a whole number"),
        (["bert.encoder.layr.0.*"], None, "Near names: bert.encoder.layer.0"),
        (["("], None, "matches none of the"),
        ("all", "evla", "Did you mean 'eval'"),
        ("norm", "train", "drop one of the two"),
    ],
)
def test_what_does_not_fit_changes_nothing(policy: object, norm: str | None, message: str) -> None:
    model = freeze(tiny_bert(), 2)
    before = ([p.requires_grad for p in model.parameters()], freeze_state(model))
    with pytest.raises(HeadInitError, match=message):
        freeze(model, policy, norm=norm)  # type: ignore[arg-type]
    assert ([p.requires_grad for p in model.parameters()], freeze_state(model)) == before


def test_all_and_stages_need_a_record() -> None:
    for policy in ("all", 1):
        with pytest.raises(HeadError, match=r"attach_head\(model, num_classes\) first"):
            freeze(nn.Linear(2, 2), policy)  # type: ignore[arg-type]


def test_zero_stages_freeze_what_all_freezes() -> None:
    first, second = freeze(tiny_bert(), 0), freeze(tiny_bert(), "all")
    assert [p.requires_grad for p in first.parameters()] == [p.requires_grad for p in second.parameters()]


def test_digest_sees_parameters_buffers_and_not_the_layout() -> None:
    model = freeze(torchvision_model("resnet18", "fc"), "all")
    digest = frozen_digest(model)
    assert frozen_digest(model.to(memory_format=torch.channels_last)) == digest
    model.bn1.running_mean[0] += 1e-7
    changed = frozen_digest(model)
    assert changed != digest
    model.conv1.weight.data[0, 0, 0, 0] += 1e-6
    assert frozen_digest(model) not in (digest, changed)
    digest = frozen_digest(model)
    model.fc.weight.data += 1
    assert frozen_digest(model) == digest


def test_summary_counts() -> None:
    model = freeze(tiny_bert(), "all")
    summary = frozen_summary(model)
    assert summary["new"] == summary["trainable"] == 16 * 3 + 3
    assert summary["frozen"] == sum(p.numel() for p in model.parameters()) - summary["new"]
    assert (summary["policy"], summary["norm"]) == ("all", None)
    assert summary["held_modules"] == sum(1 for _ in model.modules()) - 1


def test_state_is_plain_json() -> None:
    import json

    state = freeze_state(freeze(tiny_bert(), ["bert.embeddings"], norm="eval"))
    assert json.loads(json.dumps(state)) == state


def test_a_tied_new_parameter_stays_trainable() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    set_record(model, HeadRecord((HeadSite("1", "linear", 4, 4),), "linear", 4, ("1.weight", "1.bias"), ("1",)))
    freeze(model, "all")
    assert model[0].weight.requires_grad
    assert not model[0].bias.requires_grad


def test_a_frozen_network_still_takes_the_fast_path_of_extraction() -> None:
    import torchvision

    from headinit.features.acceleration import pays

    model = torchvision.models.resnet18(num_classes=3)
    set_record(
        model,
        HeadRecord((HeadSite("fc", "linear", 512, 3),), "linear", 3, ("fc.weight", "fc.bias"), ("fc",)),
    )
    freeze(model, "all")
    assert pays(model, torch.zeros(8, 3, 224, 224), 16)
    model.layer1.register_forward_hook(lambda *_: None)
    assert not pays(model, torch.zeros(8, 3, 224, 224), 16)
