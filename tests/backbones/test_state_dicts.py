from __future__ import annotations

import argparse
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from headinit.backbones.state_dicts import (
    align_prefix,
    classifier_paths,
    fill,
    read_state_dict,
    rename_lite0,
    require_finite,
)
from headinit.errors import WeightsError


def small_model(classes: int = 10) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, classes))


STATE = small_model().state_dict()


@pytest.mark.parametrize(
    "wrapped",
    [
        STATE,
        {"state_dict": STATE, "epoch": 3, "optimizer": {"state": {}}},
        {"model": STATE, "args": argparse.Namespace(lr=0.1)},
        {"state_dict": {"model": STATE}},
        {f"module.{name}": value for name, value in STATE.items()},
        {f"_orig_mod.{name}": value for name, value in STATE.items()},
        {f"_orig_mod.module.{name}": value for name, value in STATE.items()},
        {f"module._orig_mod.{name}": value for name, value in STATE.items()},
        {"model_state_dict": {f"module.{name}": value for name, value in STATE.items()}},
    ],
    ids=["plain", "state_dict", "timm", "nested", "ddp", "compiled", "compiled-ddp", "ddp-compiled", "ddp-wrapped"],
)
def test_common_wrappings_are_undone(tmp_path, wrapped):
    torch.save(wrapped, tmp_path / "w.pth")
    state = read_state_dict(tmp_path / "w.pth")
    assert list(state) == list(STATE)
    for name, value in STATE.items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=0)


class Exploit:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_code_is_refused_and_not_run(tmp_path, legacy):
    target = tmp_path / "ran"
    path = tmp_path / "w.pth"
    torch.save({"state_dict": STATE, "x": Exploit(target)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(WeightsError, match=r"mkdir.*nothing in it was run.*safetensors"):
        read_state_dict(path)
    assert not target.exists()


def test_a_plain_pickle_is_refused_and_not_run(tmp_path):
    (tmp_path / "w.bin").write_bytes(pickle.dumps(Exploit(tmp_path / "ran"), protocol=2))
    with pytest.raises(WeightsError):
        read_state_dict(tmp_path / "w.bin")
    assert not (tmp_path / "ran").exists()


def test_a_whole_pickled_module_is_refused_with_the_way_out(tmp_path):
    torch.save(small_model(), tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=r"save its state dict again"):
        read_state_dict(tmp_path / "w.pt")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("damage", ["empty", "truncated", "text", "flipped header"])
def test_damaged_files(tmp_path, suffix, damage):
    path = tmp_path / f"w{suffix}"
    save_file(STATE, path) if suffix == ".safetensors" else torch.save(STATE, path)
    whole = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "truncated": whole[: len(whole) // 2],
            "text": b"<html>404 not found</html>",
            "flipped header": bytes(b ^ 0xFF for b in whole[:64]) + whole[64:],
        }[damage]
    )
    with pytest.raises(WeightsError, match=r"w\.\w+ (is damaged|holds pickled)"):
        read_state_dict(path)


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"state_dict": {}}, {"model": {"lr": 0.1}}])
def test_files_without_a_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="holds no state dict"):
        read_state_dict(tmp_path / "w.pth")


def test_another_class_count_leaves_the_classifier_as_it_was():
    model, path = small_model(7), "w.pth"
    before = model[3].weight.detach().clone()
    missing = fill(model, STATE, classifier_paths(model, 7), path)
    assert missing == ("3.bias", "3.weight")
    torch.testing.assert_close(model[3].weight.detach(), before, rtol=0, atol=0)
    torch.testing.assert_close(model[0].weight.detach(), STATE["0.weight"], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("0.weight"), r"1 of 9 names missing \(0\.weight\); 0 unexpected"),
        (lambda s: s.update({"9.weight": torch.zeros(1)}), r"0 of 9 names missing; 1 unexpected \(9\.weight\)"),
        (lambda s: s.update({"0.weight": torch.zeros(4, 3, 5, 5)}), r"0\.weight: \(4, 3, 5, 5\) in the file"),
    ],
)
def test_any_other_difference_is_an_error_and_changes_nothing(change, message):
    model = small_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = dict(STATE)
    change(state)
    with pytest.raises(WeightsError, match=message):
        fill(model, state, ("3",), "w.pth")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_step_counters_may_be_missing():
    state = {name: value for name, value in STATE.items() if not name.endswith("num_batches_tracked")}
    assert fill(small_model(), state, (), "w.pth") == ()


def test_the_models_dtype_is_kept():
    model = small_model()
    fill(model, {name: value.to(torch.bfloat16) for name, value in STATE.items()}, (), "w.pth")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    torch.testing.assert_close(model[0].weight.detach(), STATE["0.weight"].bfloat16().float(), rtol=0, atol=0)


def test_values_that_are_not_finite_are_refused():
    state = {**STATE, "0.bias": torch.tensor([0.0, float("nan"), float("inf"), 1.0])}
    with pytest.raises(WeightsError, match=r"0\.bias holds 2 values that are not finite"):
        require_finite(state, "w.pth")
    require_finite({"large": torch.full((9,), 3e38), "half": torch.full((9,), 6e4, dtype=torch.float16)}, "w.pth")


def test_a_training_frameworks_prefix_is_dropped_only_where_it_is_one():
    prefixed = {f"model.{name}": value for name, value in STATE.items()}
    assert list(align_prefix(prefixed, STATE)) == list(STATE)
    assert list(align_prefix(prefixed, prefixed)) == list(prefixed)
    assert next(iter(align_prefix({**prefixed, "loss.weight": torch.ones(1)}, STATE))) == "model.0.weight"


def test_lite0_names_are_timms_and_one_to_one():
    import timm

    wanted = timm.create_model("tf_efficientnet_lite0").state_dict()
    assert rename_lite0(wanted) == dict(wanted)
    with_rows = {"_blocks.15._bn0.bias": 0, "_blocks.0._bn1.bias": 0, "_conv_head.weight": 0, "_bn0.bias": 0}
    assert list(rename_lite0(with_rows)) == [
        "blocks.6.0.bn1.bias",
        "blocks.0.0.bn1.bias",
        "conv_head.weight",
        "bn1.bias",
    ]
    assert set(rename_lite0(with_rows)) <= set(wanted)
