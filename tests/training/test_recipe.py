from __future__ import annotations

import pytest

from headinit.errors import ConfigError
from headinit.training.recipe import Recipe


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": -1}, "epochs=-1"),
        ({"epochs": 1.5}, "epochs=1.5"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"lr": float("inf")}, "lr=inf"),
        ({"lr": "1e-3"}, "lr='1e-3'"),
        ({"layer_decay": 0.0}, "layer_decay=0.0"),
        ({"layer_decay": 1.01}, "layer_decay=1.01"),
        ({"warmup": 1.0}, "warmup=1.0"),
        ({"clip_norm": 0.0}, "clip_norm=0.0"),
        ({"accumulation": 0}, "accumulation=0"),
        ({"patience": 0}, "patience=0"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0"),
        ({"betas": (0.9, 1.0)}, "betas="),
        ({"betas": [0.9]}, "betas="),
        ({"optimizer": "adam"}, "Did you mean 'adamw'"),
        ({"schedule": "cos"}, "Unknown schedule 'cos'"),
        ({"precision": "bf61"}, "Unknown precision 'bf61'"),
        ({"monitor": "acuracy"}, "Did you mean 'accuracy'"),
        ({"backbone_share": -0.1}, "backbone_share=-0.1"),
        ({"backbone_lr": 1e-4, "backbone_share": 0.1}, "give one of the two"),
        ({"optimizer": "sgd", "momentum": 0.0}, "Nesterov momentum needs"),
    ],
)
def test_settings_out_of_range(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Recipe(**settings)
    assert message in str(caught.value)


def test_all_mistakes_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        Recipe(epochs=-1, lr=-1.0, schedule="sine")
    assert len(str(caught.value).splitlines()) == 3


def test_the_edges_of_the_ranges_are_valid() -> None:
    recipe = Recipe(epochs=0, lr=0.0, layer_decay=1.0, warmup=0.0, betas=[0.0, 0.5], clip_norm=None, patience=None)
    assert recipe.betas == (0.0, 0.5)
