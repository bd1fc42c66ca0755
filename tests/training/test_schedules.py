from __future__ import annotations

import pytest
import torch

from headinit.training.schedules import learning_rate_factor


def _torch_factors(build: object, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = build(optimizer)  # type: ignore[operator]
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_equal_to_transformers(name: str, warmup: int) -> None:
    import transformers

    builds = {
        "cosine": lambda o: transformers.get_cosine_schedule_with_warmup(o, warmup, 50),
        "linear": lambda o: transformers.get_linear_schedule_with_warmup(o, warmup, 50),
        "constant": lambda o: transformers.get_constant_schedule_with_warmup(o, warmup),
    }
    ours = [learning_rate_factor(name, step, 50, warmup_steps=warmup) for step in range(51)]
    assert ours == pytest.approx(_torch_factors(builds[name], 51), abs=1e-12)


def test_step_is_torchs() -> None:
    expected = _torch_factors(lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=12, gamma=0.3), 50)
    ours = [
        learning_rate_factor("step", step, 50, steps_per_epoch=4, step_epochs=3, step_gamma=0.3) for step in range(50)
    ]
    assert ours == pytest.approx(expected)
