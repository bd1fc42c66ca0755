"""The run as a whole, on a small random network and real digits."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir

import headinit
from headinit import experiment
from headinit.analysis.results import read_result
from headinit.config import Settings, settings_from
from headinit.errors import ConfigError, HeadInitError, SchemeError
from headinit.experiment import (
    WITHOUT_CLOSED_FORM,
    attach_new_head,
    head_start,
    init_of,
    load_model,
    load_splits,
    make_loaders,
    recipe_of,
    run,
)
from headinit.features.cache import FeatureCache
from headinit.heads.modules import KINDS
from headinit.heads.record import record_of

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


def test_lp_ft_trains_the_head_on_features_and_then_everything(
    settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = ("freeze=lp_ft", "freeze.probe_epochs=3", "trainer.epochs=2", "data.augmentation=basic")
    record = run(settings(*chosen), tmp_path / "run")
    assert record.frozen_digest["before"] == record.frozen_digest["after"]
    assert record.parameters["frozen"] == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["phase"]) for line in lines] == [
        *((epoch, "probe") for epoch in range(4)),
        *((epoch, "everything") for epoch in (4, 5)),
    ]
    assert [line["step"] for line in lines] == [2 * line["epoch"] for line in lines]
    assert record.steps == 10
    assert all(line["feature_drift"] > 0 for line in lines[4:])
    assert not any("feature_drift" in line for line in lines[:4])
    assert record.val["nll"] == pytest.approx(lines[record.best_epoch]["nll"], rel=1e-5)
    assert {path.name for path in (tmp_path / "run" / "checkpoint").iterdir()} == {"phase-1", "phase-2"}

    # The same, with the head trained through the network: the probe sees no augmentation, so neither may this.
    plain = settings(*chosen[:3])
    by_features = run(plain, tmp_path / "features")
    monkeypatch.setattr("headinit.experiment.probes_on_features", lambda *_: False)
    by_examples = run(plain, tmp_path / "examples")
    first, second = (dict(found.history) for found in (by_features, by_examples))
    assert {step: first[step] for step in range(0, 8, 2)} == pytest.approx({s: second[s] for s in range(0, 8, 2)})


@pytest.mark.parametrize("policy", ["gradual", "lp_ft"])
def test_a_run_in_phases_goes_on_in_its_phase(
    settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    options = {
        "gradual": ("freeze.stages=1", "trainer.epochs=4"),
        "lp_ft": ("freeze.probe_epochs=1", "init=ridge", "trainer.epochs=2"),
    }[policy]
    chosen = settings(f"freeze={policy}", *options)
    whole = run(chosen, tmp_path / "whole")
    from headinit import experiment

    writer = experiment._metrics_writer

    def stopping(folder: Path) -> Callable[[dict], None]:
        def write(row: dict) -> None:
            writer(folder)(row)
            if row["epoch"] == 3:
                raise KeyboardInterrupt

        return write

    monkeypatch.setattr(experiment, "_metrics_writer", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(chosen, tmp_path / "killed")
    monkeypatch.setattr(experiment, "_metrics_writer", writer)
    resumed = run(chosen, tmp_path / "killed")
    assert resumed.val == whole.val
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("overrides", "trains"),
    [
        (("init=source",), 2),
        (("init=multi_proxy", "head=multi_proxy", "head.proxies=2"), 2),
        (("model.name=test_vit", "model.image_size=160", "init=ridge", "init.reinit_top=1"), 14),
    ],
    ids=["source", "multi_proxy", "reinit_top"],
)
def test_heads_that_wait_for_data(
    settings: Callable[..., Settings], tmp_path: Path, overrides: tuple, trains: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "init=source" in overrides:  # random weights are no pretrained classifier; this network's count as one here
        plain = experiment.load_model

        def pretrained(*args: Any) -> Any:
            found = plain(*args)
            return dataclasses.replace(found, weights=dataclasses.replace(found.weights, source="file"))

        monkeypatch.setattr(experiment, "load_model", pretrained)
    record = run(settings("trainer.epochs=0", *overrides), tmp_path)
    chance = record.init["chance_loss"]
    assert math.isfinite(record.init["loss"])
    assert record.init["loss"] < 1.5 * chance
    model = headinit.load(tmp_path / "model")
    assert len(record_of(model).new_parameters) == trains


def test_a_head_before_a_relu_says_that_it_has_no_features(settings: Callable[..., Settings], tmp_path: Path) -> None:
    squeezenet = ("model=torchvision", "model.name=squeezenet1_1", "trainer.epochs=0")
    with pytest.raises(HeadInitError, match="an init that needs no data"):
        run(settings(*squeezenet, "init=ridge"), tmp_path / "run")


def test_source_without_a_pretrained_classifier_fails_before_features_are_computed(
    settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment, "extract_features", None)
    with pytest.raises(SchemeError, match="came without one"):
        run(settings("init=source"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_drift_is_measured_where_the_backbone_trains(settings: Callable[..., Settings], tmp_path: Path) -> None:
    record = run(settings("freeze=none"), tmp_path / "a")
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert (lines[0]["feature_drift"], lines[0]["feature_cka"]) == (0.0, pytest.approx(1.0))
    assert lines[2]["feature_drift"] > 0
    assert record.drift == {key: lines[record.best_epoch][key] for key in ("feature_drift", "feature_cka")}
    assert read_result(tmp_path / "a").drift == record.drift
    without = run(settings("freeze=none", "trainer.drift=false"), tmp_path / "b")
    assert without.drift is None
    assert without.val == record.val
    assert run(settings(), tmp_path / "c").drift is None


def test_evaluations_and_layout_follow_the_settings(settings: Callable[..., Settings], tmp_path: Path) -> None:
    chosen = settings("trainer.epochs=3", "trainer.evaluate_every=2", "trainer.channels_last=false")
    assert recipe_of(chosen).channels_last is False
    run(chosen, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 2, 3]


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
        ("init.missing=men", "mean"),
        ("trainer.monitor=acuracy", "accuracy"),
        ("trainer.monitor=pearson", r"trainer.monitor for single_label data 'pearson'.*Known: accuracy"),
        ("trainer.evaluate_every=0", "evaluate_every=0"),
        ("freeze=gradual", r"leaves -2 of 2 .* at least 5 epochs"),
        ("optim.name=adam", "adamw"),
    ],
)
def test_bad_input_writes_nothing(
    settings: Callable[..., Settings], tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(HeadInitError, match=message):
        run(settings(override), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("head", sorted(KINDS))
def test_the_default_start_serves_every_kind_of_head(
    settings: Callable[..., Settings], tmp_path: Path, head: str, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = settings(f"head={head}", "init=auto", "trainer.epochs=0")
    if head in WITHOUT_CLOSED_FORM:
        name, options = init_of(settings(f"head={head}", "init=auto", "init.logit_std=0.5"))
        assert name == "he"
        assert options["logit_std"] == 0.5
        assert "policy" not in options
    record = run(chosen, tmp_path / "run")
    assert math.isfinite(record.init["loss"])
    assert record.config["init"]["name"] == init_of(chosen)[0]
    assert ("has no closed form" in capsys.readouterr().out.replace("\n", " ")) == (head in WITHOUT_CLOSED_FORM)


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
