"""The head bank against `finetune` and `torch.optim` on one head at a time."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from headinit.comparison.frozen import ViewBatches
from headinit.data.loading import TensorBatches
from headinit.errors import DataError, TrainingError
from headinit.features.extract import FeatureSet
from headinit.training.finetune import finetune
from headinit.training.head_bank import BankEntry, head_logits, split_bank, train_head_bank
from headinit.training.recipe import Recipe

WIDTH, CLASSES = 7, 4


def make_features(size: int, seed: int, dtype: torch.dtype = torch.float64) -> FeatureSet:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (size,), generator=generator)
    centres = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(99))
    features = centres[labels] + 1.5 * torch.randn(size, WIDTH, generator=generator)
    return FeatureSet(features.to(dtype), labels, CLASSES)


def make_entries(count: int, **options) -> list[BankEntry]:
    """Heads that differ in everything that may differ."""
    generator = torch.Generator().manual_seed(5)
    entries = []
    for i in range(count):
        weight = torch.randn(CLASSES, WIDTH, generator=generator, dtype=torch.float64)
        bias = torch.randn(CLASSES, generator=generator, dtype=torch.float64)
        settings = {
            "lr": (0.1, 0.003, 0.03)[i % 3],
            "weight_decay": (0.0, 0.1)[i % 2],
            "order_seed": i % 2,
            "label_smoothing": (0.0, 0.2)[i // 2 % 2],
        }
        entries.append(BankEntry(weight, bias, **{**settings, **options}))
    return entries


def train_alone(
    train: FeatureSet, validation: FeatureSet, entry: BankEntry, recipe: Recipe, batch_size: int, task: str
):
    head = nn.Linear(WIDTH, CLASSES, bias=entry.bias is not None, dtype=train.features.dtype)
    with torch.no_grad():
        head.weight.copy_(entry.weight)
        if entry.bias is not None:
            head.bias.copy_(entry.bias)
    smoothing = recipe.label_smoothing if entry.label_smoothing is None else entry.label_smoothing
    own = replace(recipe, lr=entry.lr, weight_decay=entry.weight_decay, label_smoothing=smoothing)
    batches = TensorBatches(train.features, train.labels, batch_size, shuffle_seed=entry.order_seed)
    held_out = TensorBatches(validation.features, validation.labels, batch_size)
    return head, finetune(head, batches, held_out, own, task=task, cpu=True)


def assert_same(train, validation, entries, recipe, batch_size=8, task="single_label", tolerance=1e-12):
    results = train_head_bank(train, validation, entries, recipe, batch_size=batch_size, task=task)
    for entry, result in zip(entries, results, strict=True):
        head, outcome = train_alone(train, validation, entry, recipe, batch_size, task)
        steps = max(1, outcome.steps)
        torch.testing.assert_close(result.weight, head.weight.detach(), rtol=0, atol=tolerance * steps)
        if entry.bias is not None:
            torch.testing.assert_close(result.bias, head.bias.detach(), rtol=0, atol=tolerance * steps)
        assert (result.best_epoch, result.steps) == (outcome.best_epoch, outcome.steps)
        assert result.stopped_early == outcome.stopped_early
        assert len(result.history) == len(outcome.history)
        for row, expected in zip(result.history, outcome.history, strict=True):
            loss = row.pop("train_loss")  # `finetune` sums it in float32
            assert loss is None if expected["train_loss"] is None else loss == pytest.approx(expected["train_loss"])
            for key, value in row.items():
                assert value == pytest.approx(expected[key], rel=1e-9, abs=1e-9), key
    return results


RECIPES = {
    "adamw": Recipe(epochs=3),
    "adamw, no clipping": Recipe(epochs=3, clip_norm=None, schedule="constant", warmup=0.0, betas=(0.8, 0.9), eps=1e-3),
    "clipped hard": Recipe(epochs=3, clip_norm=0.05, schedule="linear"),
    "sgd": Recipe(epochs=3, optimizer="sgd", clip_norm=None),
    "heavy ball": Recipe(epochs=3, optimizer="sgd", nesterov=False, momentum=0.5, schedule="step", step_epochs=1),
    "plain sgd": Recipe(epochs=3, optimizer="sgd", nesterov=False, momentum=0.0),
    "accumulated": Recipe(epochs=3, accumulation=2),
    "patient": Recipe(epochs=12, patience=1, monitor="nll"),
    "other metric": Recipe(epochs=3, monitor="macro_f1"),
    "every other epoch": Recipe(epochs=5, evaluate_every=2),
    "untrained": Recipe(epochs=0),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_bank_trains_every_head_as_if_it_were_alone(name):
    results = assert_same(make_features(43, 1), make_features(29, 2), make_entries(6), RECIPES[name])
    if name == "patient":
        stopped = [result.stopped_early for result in results]
        assert any(stopped)  # some leave the stack while others go on
        assert len({result.steps for result in results}) > 1


@pytest.mark.parametrize("task", ["multi_label", "regression"])
def test_other_tasks_train_as_if_alone(task):
    train, validation = make_features(43, 1), make_features(29, 2)
    generator = torch.Generator().manual_seed(3)

    def targets(size):
        drawn = torch.randn(size, CLASSES, generator=generator, dtype=torch.float64)
        return (drawn > 0).double() if task == "multi_label" else drawn

    train, validation = replace(train, labels=targets(43)), replace(validation, labels=targets(29))
    monitor = {"multi_label": "map", "regression": "mse"}[task]
    assert_same(train, validation, make_entries(4), Recipe(epochs=2, monitor=monitor), task=task)


def test_heads_without_bias_and_float32():
    entries = [replace(entry, bias=None) for entry in make_entries(3)]
    assert_same(make_features(43, 1), make_features(29, 2), entries, Recipe(epochs=2))
    single = [make_features(size, seed, torch.float32) for size, seed in ((43, 1), (29, 2))]
    results = train_head_bank(*single, entries, Recipe(epochs=2))
    assert {result.weight.dtype for result in results} == {torch.float32}


def test_one_step_equals_torch_optim_to_1e_12():
    """Against torch.optim alone: none of headinit's own training code on the other side."""
    train = make_features(8, 1)
    for entry in make_entries(6):
        head = nn.Linear(WIDTH, CLASSES, dtype=torch.float64)
        with torch.no_grad():
            head.weight.copy_(entry.weight)
            head.bias.copy_(entry.bias)
        decayed = {"params": [head.weight], "weight_decay": entry.weight_decay}
        optimizer = torch.optim.AdamW([decayed, {"params": [head.bias], "weight_decay": 0.0}], lr=entry.lr, fused=False)
        for _ in range(5):
            optimizer.zero_grad()
            smoothing = entry.label_smoothing
            loss = nn.functional.cross_entropy(head(train.features), train.labels, label_smoothing=smoothing)
            loss.backward()
            nn.utils.clip_grad_norm_(head.parameters(), 0.3)
            optimizer.step()
        recipe = Recipe(epochs=5, schedule="constant", warmup=0.0, clip_norm=0.3, monitor="nll")
        # What is validated is what is trained on, so the last epoch is the best where the rate is low.
        result = train_head_bank(train, train, [replace(entry, lr=entry.lr)], recipe, batch_size=8)[0]
        if result.best_epoch == 5:
            torch.testing.assert_close(result.weight, head.weight.detach(), rtol=0, atol=5e-12)
        final = nn.functional.cross_entropy(head(train.features), train.labels).item()
        assert result.history[-1]["nll"] == pytest.approx(final, abs=1e-11)


def test_the_start_is_kept_where_training_makes_it_worse():
    train = make_features(40, 1)
    gram = train.features.T @ train.features + torch.eye(WIDTH)
    weight = torch.linalg.solve(gram, train.features.T @ nn.functional.one_hot(train.labels).double()).T
    entry = BankEntry(weight, torch.zeros(CLASSES, dtype=torch.float64), lr=50.0)
    result = train_head_bank(train, train, [entry], Recipe(epochs=2, clip_norm=None))[0]
    assert result.best_epoch == 0
    torch.testing.assert_close(result.weight, weight, rtol=0, atol=0)
    logits = head_logits(result.weight, result.bias, train.features)
    assert (logits.argmax(1) == train.labels).double().mean().item() == result.history[0]["accuracy"]


def test_splitting_a_bank_changes_nothing():
    train, validation, entries = make_features(43, 1), make_features(29, 2), make_entries(7)
    size = 4 * CLASSES * WIDTH * 8
    assert max(len(bank) for bank in split_bank(entries, 2 * size, dtype=torch.float64)) == 2
    whole = train_head_bank(train, validation, entries, Recipe(epochs=3))
    parts = train_head_bank(train, validation, entries, Recipe(epochs=3), memory=2 * size)
    for first, second in zip(whole, parts, strict=True):
        torch.testing.assert_close(first.weight, second.weight, rtol=0, atol=1e-11)
        assert first.best_epoch == second.best_epoch


@pytest.mark.parametrize("memory", [1, 500, 1000, 10**9])
def test_split_bank_covers_every_entry_once_within_the_budget(memory):
    entries = [replace(entry, order_seed=i % 3) for i, entry in enumerate(make_entries(11))]
    banks = split_bank(entries, memory)
    assert sorted(i for bank in banks for i in bank) == list(range(11))
    assert all(len(bank) * 4 * CLASSES * WIDTH * 4 <= max(memory, 4 * CLASSES * WIDTH * 4) for bank in banks)


def test_a_diverging_head_leaves_the_others_as_they_are():
    train, validation = make_features(43, 1, torch.float32), make_features(29, 2, torch.float32)
    good = make_entries(2, order_seed=0, weight_decay=0.0)
    recipe = Recipe(epochs=4, optimizer="sgd", clip_norm=None)
    bad = replace(good[0], lr=1e30, weight_decay=0.1)
    alone = train_head_bank(train, validation, good, recipe)
    results = train_head_bank(train, validation, [good[0], bad, good[1]], recipe)
    assert [result.status for result in results] == ["finished", "diverged", "finished"]
    assert results[1].steps < results[0].steps
    assert all(math.isfinite(row["nll"]) for row in results[1].history)
    for first, second in zip(alone, (results[0], results[2]), strict=True):
        torch.testing.assert_close(first.weight, second.weight, rtol=0, atol=1e-5)
        assert first.history[-1]["accuracy"] == second.history[-1]["accuracy"]


def test_views_take_turns_over_the_epochs():
    views = [make_features(43, 1), replace(make_features(43, 1), features=make_features(43, 7).features)]
    validation, entries = make_features(29, 2), make_entries(3)
    results = train_head_bank(views[0], validation, entries, Recipe(epochs=3), batch_size=8, views=views)
    for entry, result in zip(entries, results, strict=True):
        head = nn.Linear(WIDTH, CLASSES, dtype=torch.float64)
        with torch.no_grad():
            head.weight.copy_(entry.weight)
            head.bias.copy_(entry.bias)
        recipe = Recipe(epochs=3, lr=entry.lr, weight_decay=entry.weight_decay, label_smoothing=entry.label_smoothing)
        batches = ViewBatches(views, 8, entry.order_seed)
        outcome = finetune(head, batches, TensorBatches(validation.features, validation.labels, 8), recipe, cpu=True)
        assert result.best_epoch == outcome.best_epoch
        torch.testing.assert_close(result.weight, head.weight.detach(), rtol=0, atol=2e-11)
    with pytest.raises(DataError, match="labels differ"):
        train_head_bank(views[0], validation, entries, Recipe(epochs=1), views=[make_features(43, 8)])


def test_heads_that_all_diverge_end_the_bank():
    train = make_features(43, 1, torch.float32)
    bad = [replace(entry, lr=1e30, weight_decay=0.1) for entry in make_entries(3)]
    results = train_head_bank(train, train, bad, Recipe(epochs=4, optimizer="sgd", clip_norm=None))
    assert {result.status for result in results} == {"diverged"}


def test_a_start_that_is_not_finite_is_marked():
    train = make_features(20, 1)
    entry = make_entries(1)[0]
    result = train_head_bank(train, train, [replace(entry, weight=entry.weight * math.nan)], Recipe(epochs=2))[0]
    assert (result.status, result.history, result.steps) == ("diverged", [], 0)


def test_what_does_not_fit_is_refused():
    train, entries = make_features(20, 1), make_entries(2)
    with pytest.raises(DataError, match="all be"):
        train_head_bank(train, train, [entries[0], replace(entries[1], bias=None)], Recipe(epochs=1))
    with pytest.raises(DataError, match="all be"):
        train_head_bank(train, train, [replace(entries[0], weight=torch.zeros(CLASSES, 3))], Recipe(epochs=1))
    with pytest.raises(DataError, match="NaN"):
        train_head_bank(replace(train, features=train.features / 0), train, entries, Recipe(epochs=1))
    with pytest.raises(DataError, match="validation"):
        train_head_bank(train, replace(train, features=torch.zeros(20, 2)), entries, Recipe(epochs=1))
    with pytest.raises(TrainingError, match="none of accuracy"):
        train_head_bank(train, train, entries, Recipe(epochs=1, monitor="pearson"))


def test_the_global_generators_are_left_alone():
    train, state = make_features(20, 1), torch.get_rng_state()
    train_head_bank(train, train, make_entries(2), Recipe(epochs=1))
    assert torch.equal(state, torch.get_rng_state())
