"""Settings: checked all at once, and a run's name follows from what it computes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from headinit.config import run_id, settings_from
from headinit.errors import ConfigError

CONF = Path(__file__).resolve().parent.parent / "conf"
GROUPS = {g: {"name": n} for g, n in {"model": "resnet50", "head": "linear", "init": "he", "data": "digits"}.items()}


def composed(*overrides: str):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("finetune", overrides=list(overrides))


def files(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.mark.parametrize(
    "override",
    [
        f"{group}={name}"
        for group in ("init", "freeze", "optim", "schedule", "trainer", "head")
        for name in files(group)
    ],
)
def test_every_file_of_a_group_fits_the_schema(override: str) -> None:
    extra = {"freeze=stages": ["freeze.stages=1"], "freeze=patterns": ["freeze.patterns=[layer1.*]"]}.get(override, [])
    settings = settings_from(composed(override, *extra))
    group, name = override.split("=")
    if group in ("init", "head"):
        assert getattr(settings, group)["name"] == name


@pytest.mark.parametrize("name", [n for n in files("model") if n not in ("torchvision", "timm", "transformers")])
def test_every_named_model_has_settings(name: str) -> None:
    assert settings_from(composed(f"model={name}")).model["name"] == name


@pytest.mark.parametrize("group", ["model", "init", "head", "data", "freeze", "optim", "schedule", "trainer"])
def test_defaults_name_a_file_of_each_group(group: str) -> None:
    assert files(group)


def test_all_mistakes_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        settings_from({**GROUPS, "optim": {"lr": -1}, "freeze": {"policy": "al"}, "data": {"name": ""}})
    message = str(caught.value)
    assert "optim.lr=-1" in message
    assert "'al'" in message
    assert "Did you mean 'all'" in message
    assert "data.name is not set" in message


def test_a_wrong_type_names_the_setting() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.epochs"):
        settings_from({**GROUPS, "trainer": {"epochs": "many"}})


def test_settings_cannot_point_at_code() -> None:
    with pytest.raises(ConfigError, match="_target_"):
        settings_from({**GROUPS, "init": {"name": "he", "x": [{"_target_": "os.system"}]}})


def test_run_id_follows_what_is_computed() -> None:
    base = run_id(composed())
    assert base == run_id(composed())
    assert base == run_id(composed("trainer.workers=7", "trainer.progress=false"))
    for change in ("seed=1", "init=zeros", "optim.lr=0.5", "trainer.epochs=3", "data.per_class=4", "init.gain=2.0"):
        try:
            changed = composed(change)
        except Exception:
            changed = composed("+" + change)
        assert run_id(changed) != base, change


def test_run_id_ignores_the_hydra_node() -> None:
    config = composed()
    with_hydra = OmegaConf.merge(config, {"hydra": {"x": 1}}) if not OmegaConf.is_struct(config) else None
    if with_hydra is None:
        OmegaConf.set_struct(config, False)
        with_hydra = OmegaConf.merge(config, {"hydra": {"x": 1}})
    assert run_id(with_hydra) == run_id(composed())
