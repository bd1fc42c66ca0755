"""MixUp against torchvision's, and in training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from headinit.data.loading import TensorBatches
from headinit.errors import TrainingError
from headinit.training.finetune import finetune
from headinit.training.mixup import mix, mixing_share
from headinit.training.recipe import Recipe


def test_it_is_torchvisions_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.transforms import v2

    pictures, labels = torch.rand(6, 3, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    share = mixing_share(0.2, 3, "5/0")
    reference = v2.MixUp(alpha=0.2, num_classes=3)
    monkeypatch.setattr(reference, "make_params", lambda _: {"labels": labels, "batch_size": 6, "lam": share})
    wanted, targets = reference(pictures, labels)
    mixed, parts = mix(pictures, labels, 0.2, 3, "5/0")
    torch.testing.assert_close(mixed, wanted)
    logits = torch.randn(6, 3)
    loss = sum(part * nn.functional.cross_entropy(logits, own) for part, own in parts)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits, targets))


def test_shares_follow_the_beta_distribution() -> None:
    from scipy import stats

    shares = [mixing_share(0.4, 0, f"{step}/0") for step in range(2000)]
    assert stats.kstest(shares, stats.beta(0.4, 0.4).cdf).pvalue > 0.001


def test_text_is_refused() -> None:
    with pytest.raises(TrainingError, match="text"):
        mix({"input_ids": torch.ones(2, 3)}, torch.zeros(2), 0.1, 0, "0/0")


class Killed(Exception):
    pass


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    x, y = torch.randn(40, 6), torch.randint(0, 3, (40,))
    batches = TensorBatches(x, y, 8, shuffle_seed=1)
    recipe = Recipe(steps=17, lr=0.05, mixup=0.4, select="last", bias_correction=False)

    def trained(folder: Path, stop_at: int | None = None) -> nn.Linear:
        torch.manual_seed(0)
        model = nn.Linear(6, 3)

        def watch(row: dict) -> None:
            if row["epoch"] == stop_at:
                raise Killed

        finetune(model, batches, batches, recipe, folder=folder, on_evaluation=watch, cpu=True)
        return model

    whole = trained(tmp_path / "whole")
    with pytest.raises(Killed):
        trained(tmp_path / "parts", stop_at=3)
    assert torch.equal(trained(tmp_path / "parts").weight, whole.weight)
    torch.manual_seed(0)
    plain = nn.Linear(6, 3)
    finetune(plain, batches, batches, Recipe(steps=17, lr=0.05, select="last", bias_correction=False), cpu=True)
    assert not torch.equal(plain.weight, whole.weight)
