"""The HyperRule and the staircase against the schedule that BiT's authors state."""

from __future__ import annotations

import pytest
import torch

from headinit.errors import ConfigError
from headinit.training.hyper_rule import bit_hyperrule
from headinit.training.recipe import Recipe
from headinit.training.schedules import learning_rate_factor


@pytest.mark.parametrize(
    ("examples", "boundaries", "mixup"),
    [
        (10, (100, 200, 300, 400, 500), 0.0),
        (19_999, (100, 200, 300, 400, 500), 0.0),
        (20_000, (500, 3000, 6000, 9000, 10_000), 0.1),
        (499_999, (500, 3000, 6000, 9000, 10_000), 0.1),
        (500_000, (500, 6000, 12_000, 18_000, 20_000), 0.1),
    ],
)
def test_every_step_has_the_authors_rate(examples: int, boundaries: tuple[int, ...], mixup: float) -> None:
    warmup, *falls, end = boundaries
    rule = bit_hyperrule(examples, (32, 32))
    assert (rule.steps, rule.warmup_steps, rule.mixup) == (end, warmup, mixup)
    for step in range(0, end, 1 if end == 500 else 50):
        # Linear to the base rate, then a tenth for each boundary that lies before the step.
        wanted = step / warmup if step < warmup else 0.1 ** sum(fall < step for fall in falls)
        found = learning_rate_factor("staircase", step, end, warmup_steps=warmup, milestones=rule.milestones)
        assert found == pytest.approx(wanted), step


@pytest.mark.parametrize(("size", "side"), [((32, 32), 128), ((95, 97), 128), ((96, 96), 480), ((640, 480), 480)])
def test_small_pictures_are_enlarged_less(size: tuple[int, int], side: int) -> None:
    assert bit_hyperrule(100, size).image_size == side


def test_no_examples_are_refused() -> None:
    with pytest.raises(ConfigError, match="found 0"):
        bit_hyperrule(0, (32, 32))


def test_the_staircase_is_torchs_multi_step() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 7], gamma=0.2)
    for step in range(10):
        wanted = optimizer.param_groups[0]["lr"]
        found = learning_rate_factor("staircase", step, 10, step_gamma=0.2, milestones=[3, 7])
        assert found == pytest.approx(wanted)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "staircase"}, "needs milestones"),
        ({"milestones": (5, 3)}, "must be whole numbers above 0 that rise"),
        ({"steps": 0}, "steps=0 is out of range"),
        ({"mixup": -1.0}, "mixup=-1.0 is out of range"),
        ({"select": "lastt"}, "Did you mean 'last'"),
        ({"select": "last", "patience": 2}, "drop one of the two"),
    ],
)
def test_mistakes_in_a_recipe(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe(**options)
