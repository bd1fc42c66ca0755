"""The run as a whole, on a small random network and real digits."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

import headinit
from headinit.analysis.results import read_result
from headinit.config import Settings, settings_from
from headinit.errors import ConfigError, HeadInitError
from headinit.experiment import attach_new_head, head_start, load_model, load_splits, make_loaders, run
from headinit.features.cache import FeatureCache

CONF = Path(__file__).resolve().parent.parent / "conf"
SMALL = (
    "model=timm",
    "model.name=test_resnet",
    "model.pretrained=false",
    "model.image_size=64",
    "trainer.epochs=2",
    "trainer.progress=false",
    "trainer.workers=0",
    "trainer.cache=null",
)


@pytest.fixture
def settings(picture_folder: Path) -> Callable[..., Settings]:
    def make(*overrides: str) -> Settings:
        data = ["data=imagefolder", f"data.root={picture_folder}"]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return settings_from(compose("finetune", overrides=[*SMALL, *data, *overrides]))

    return make


@pytest.mark.parametrize("policy", ["all", "none", "norm"])
def test_a_run_leaves_what_the_design_says(settings: Callable[..., Settings], tmp_path: Path, policy: str) -> None:
    record = run(settings(f"freeze={policy}"), tmp_path)
    saved = json.loads((tmp_path / "result.json").read_text())
    assert saved["init"]["chance_loss"] == pytest.approx(math.log(3))
    assert set(saved["init"]) >= {"loss", "chance_loss", "accuracy", "logit_std", "feature_gradient"}
    assert saved["pretrained"] is False
    assert saved["frozen_digest"]["before"] == saved["frozen_digest"]["after"]
    assert saved["steps"] == 2 * math.ceil(36 / 32)
    assert (saved["parameters"]["frozen"] == 0) == (policy == "none")
    assert saved["class_names"] == ["blue", "green", "red"]
    assert read_result(tmp_path).val == pytest.approx(dict(record.val))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    assert (tmp_path / "checkpoint").is_dir()
    assert headinit.load(tmp_path / "model") is not None


def test_features_and_examples_train_to_the_same_head(
    settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = settings("trainer.clip_norm=null")
    by_features = run(chosen, tmp_path / "features")
    monkeypatch.setattr("headinit.experiment.trains_on_features", lambda *_: False)
    by_examples = run(chosen, tmp_path / "examples")
    for name, value in by_features.val.items():
        assert by_examples.val[name] == pytest.approx(value, abs=1e-3), name
    assert by_examples.init["feature_gradient"] == pytest.approx(by_features.init["feature_gradient"], rel=1e-3)
    heads = [headinit.load(tmp_path / kind / "model").get_classifier().weight for kind in ("features", "examples")]
    torch.testing.assert_close(*heads, rtol=1e-3, atol=1e-4)


def test_a_finished_run_is_found_again(
    settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(settings(), tmp_path)
    monkeypatch.setattr("headinit.experiment.load_model", lambda *_: pytest.fail("the backbone was loaded again"))
    assert run(settings(), tmp_path).val == first.val
    with pytest.raises(ConfigError, match="other data"):
        run(settings("data.per_class=9"), tmp_path)


def test_the_same_seed_gives_the_same_run(settings: Callable[..., Settings], tmp_path: Path) -> None:
    first, second = (run(settings("freeze=none"), tmp_path / name) for name in ("a", "b"))
    assert first.val == second.val
    other = run(settings("freeze=none", "seed=1"), tmp_path / "c")
    assert other.init["loss"] != first.init["loss"]


def test_a_model_for_text_on_pictures_says_what_to_change(settings: Callable[..., Settings], tmp_path: Path) -> None:
    chosen = settings("model=minilm", "model.image_size=null", "model.name=minilm", "model.pretrained=true")
    with pytest.raises(ConfigError, match=r"model=minilm reads text and data=imagefolder holds pictures.*data=pydocs"):
        run(chosen, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.per_class=100000", "per_class"),
        ("head.dropout=2", "dropout"),
        ("init.mode=fan_up", "fan_in"),
        ("trainer.monitor=acuracy", "accuracy"),
        ("optim.name=adam", "adamw"),
    ],
)
def test_bad_input_writes_nothing(
    settings: Callable[..., Settings], tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(HeadInitError, match=message):
        run(settings(override), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_head_start_agrees_with_the_closed_form(settings: Callable[..., Settings]) -> None:
    chosen = settings()
    splits = load_splits(chosen)
    backbone = load_model(chosen, splits)
    model = attach_new_head(chosen, splits, backbone).eval()
    batch = next(iter(make_loaders(chosen, splits, backbone).train_in_order))
    logits, gradient = head_start(model, batch.inputs, batch.labels)
    probabilities = torch.softmax(logits.double(), 1)
    residual = probabilities - torch.nn.functional.one_hot(batch.labels, 3)
    expected = (residual @ model.get_classifier().weight.detach().double()).norm(dim=1)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_frozen_head_is_as_good_as_logistic_regression(tmp_path: Path) -> None:
    """The defaults, on the bundled network and real digits; C is chosen as the best epoch is: on validation."""
    from sklearn.linear_model import LogisticRegression

    with initialize_config_dir(str(CONF), version_base="1.3"):
        chosen = settings_from(compose("finetune", overrides=["trainer.progress=false", f"trainer.cache={tmp_path}"]))
    record = run(chosen, tmp_path / "run")
    splits = load_splits(chosen)
    backbone = load_model(chosen, splits)
    model = attach_new_head(chosen, splits, backbone)
    loaders = make_loaders(chosen, splits, backbone)
    train, validation, test = (
        headinit.extract_features(model, batches, cache=FeatureCache(tmp_path))
        for batches in (loaders.train_in_order, loaders.validation, loaders.test)
    )
    assert train.from_cache
    assert validation.from_cache
    fits = [LogisticRegression(C=c, max_iter=1000).fit(train.features, train.labels) for c in (0.01, 0.1, 1, 10)]
    best = max(fits, key=lambda fit: fit.score(validation.features, validation.labels))
    assert record.val["accuracy"] >= best.score(validation.features, validation.labels) - 0.01
    assert record.test["accuracy"] >= best.score(test.features, test.labels) - 0.01
    assert record.frozen_digest["before"] == record.frozen_digest["after"]
