from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_iris
from torch import nn

from headinit.config import settings_from
from headinit.data.loading import TensorBatches
from headinit.errors import ConfigError, TrainingError
from headinit.training.finetune import finetune
from headinit.training.lr_finder import HIGHEST, LOWEST, find_learning_rate, valley
from headinit.training.recipe import Recipe

from . import killable


def fastai_valley(losses: list[float]) -> int:
    """fastai.callback.schedule.valley (2.7), whose search stays below the first step that its indices can mean."""
    n, start, end = len(losses), 0, 0
    lengths = [1] * n
    for i in range(1, n):
        for j in range(i):
            if losses[i] < losses[j] and lengths[i] < lengths[j] + 1:
                lengths[i] = lengths[j] + 1
            if lengths[end] < lengths[i]:
                end = i
                start = end - lengths[end]
    sections = (end - start) / 3
    return start + int(sections) + int(sections / 2)


@pytest.mark.parametrize("seed", range(20))
def test_valley_against_fastai(seed: int) -> None:
    generator = np.random.default_rng(seed)
    x = np.linspace(-7, 1, 90)
    losses = list(2 - 1.5 / (1 + np.exp(-3 * (x + 3))) + np.exp(4 * x) + 0.02 * generator.standard_normal(90))
    assert valley(losses) == fastai_valley(losses)


def iris() -> TensorBatches:
    data = load_iris()
    features = torch.tensor(data.data - data.data.mean(0), dtype=torch.float32)
    return TensorBatches(features, torch.tensor(data.target, dtype=torch.int64), 16, shuffle_seed=0)


def test_the_found_rate_trains_well() -> None:
    torch.manual_seed(0)
    head = nn.Linear(4, 3)
    before = [p.detach().clone() for p in head.parameters()]
    sweep = find_learning_rate(head, iris(), Recipe(), cpu=True)
    assert all(torch.equal(p, own) and p.grad is None for p, own in zip(head.parameters(), before, strict=True))
    assert sweep.rates[0] == pytest.approx(LOWEST)
    assert np.diff(np.log(sweep.rates)) == pytest.approx(np.log(HIGHEST / LOWEST) / 99)
    assert 1e-3 < sweep.suggestion < 1.0
    found = finetune(head, iris(), iris(), Recipe(epochs=20, lr=sweep.suggestion), cpu=True)
    assert found.best["accuracy"] > 0.9
    assert find_learning_rate(nn.Linear(4, 3), iris(), Recipe(optimizer="sgd"), cpu=True).losses[-1] > 0


def test_the_model_is_left_as_it_was() -> None:
    model = killable.build(2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    first = find_learning_rate(model, killable.data(), killable.RECIPE, cpu=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert find_learning_rate(model, killable.data(), killable.RECIPE, cpu=True) == first


def test_broken_data_is_an_error() -> None:
    data = TensorBatches(torch.full((8, 4), torch.nan), torch.arange(8) % 3, 4)
    with pytest.raises(TrainingError, match="NaN"):
        find_learning_rate(nn.Linear(4, 3), data, Recipe(), cpu=True)


NAMES = {"model": "efficientnet_lite0", "head": "linear", "init": "zeros", "data": "digits"}
GROUPS = {group: {"name": name} for group, name in NAMES.items()}


def test_settings() -> None:
    assert settings_from({**GROUPS, "optim": {"lr": "find"}}).optim.lr == "find"
    assert settings_from({**GROUPS, "optim": {"lr": 1}}).optim.lr == 1
    for wrong in ("best", 0.0, -1.0, True):
        with pytest.raises(ConfigError, match="is not a positive learning rate"):
            settings_from({**GROUPS, "optim": {"lr": wrong}})
    with pytest.raises(ConfigError, match="trains in phases"):
        settings_from({**GROUPS, "optim": {"lr": "find"}, "freeze": {"policy": "lp_ft"}})


def test_a_comparison_names_its_rates() -> None:
    from headinit.comparison.grid import Grid

    with pytest.raises(ConfigError, match="find is for one run"):
        Grid.of(inits=["he"], lrs="find")


def test_a_run_finds_its_rate_once(tmp_path: Path) -> None:
    """On features; a resumed run takes the rate that is written down."""
    from headinit.experiment import RATE_FILE, run

    groups = {
        **GROUPS,
        "model": {"name": "resnet18", "pretrained": False, "image_size": 32},
        "data": {"name": "digits", "train_size": 60},
        "optim": {"lr": "find"},
        "trainer": {"epochs": 2, "cache": None, "progress": False, "workers": 0},
    }
    record = run(settings_from(groups), tmp_path / "a")
    sweep = json.loads((tmp_path / "a" / RATE_FILE).read_text())
    assert record.found_lr == sweep["suggestion"]
    assert record.rates == {"head": record.found_lr}
    assert (tmp_path / "a" / "lr_finder.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((tmp_path / "a" / "result.json").read_text())["found_lr"] == record.found_lr
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / RATE_FILE).write_text(json.dumps({"suggestion": 0.5}))
    assert run(settings_from(groups), tmp_path / "b").found_lr == 0.5
