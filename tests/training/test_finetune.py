from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from sklearn.datasets import load_iris
from torch import nn
from torch.nn import functional as F

from headinit.data.loading import TensorBatches
from headinit.errors import DataError, TrainingError
from headinit.training.evaluation import evaluate, predict
from headinit.training.finetune import finetune
from headinit.training.freezing import freeze, frozen_digest
from headinit.training.losses import summed_loss
from headinit.training.precision import bfloat16_error, chosen_precision
from headinit.training.recipe import Recipe

from .models import NormZoo, bert_inputs, record_head, tiny_bert, tiny_timm, torchvision_model

PLAIN = {"weight_decay": 0.0, "clip_norm": None, "warmup": 0.0, "schedule": "constant"}


def iris(batch_size: int = 16, **options: object) -> TensorBatches:
    data = load_iris()
    features = torch.tensor(data.data - data.data.mean(0), dtype=torch.float32)
    return TensorBatches(features, torch.tensor(data.target, dtype=torch.int64), batch_size, **options)  # type: ignore


def pictures(batch_size: int = 2, count: int = 6, size: int = 32, seed: int = 0) -> TensorBatches:
    generator = torch.Generator().manual_seed(seed)
    return TensorBatches(
        torch.randn(count, 3, size, size, generator=generator), torch.arange(count) % 3, batch_size, shuffle_seed=0
    )


class Sentences:
    """Batches of token ids, as a mapping."""

    def __init__(self, count: int = 3) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        return self.epoch(0)

    def epoch(self, epoch: int) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        for _ in range(self.count):
            yield bert_inputs(), torch.tensor([0, 1, 2, 0])


def _softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_nesterov_sgd_against_numpy(smoothing: float) -> None:
    head = nn.Linear(4, 3)
    train = iris(shuffle_seed=3)
    w, b = head.weight.detach().double().numpy().copy(), head.bias.detach().double().numpy().copy()
    vw, vb = np.zeros_like(w), np.zeros_like(b)
    lr, momentum, decay, smooth = 0.05, 0.9, 0.01, smoothing
    for epoch in range(2):
        for batch in train.epoch(epoch):
            x, y = batch.inputs.double().numpy(), np.eye(3)[batch.labels.numpy()] * (1 - smooth) + smooth / 3
            error = (_softmax(x @ w.T + b) - y) / len(x)
            gw, gb = error.T @ x + decay * w, error.sum(0)
            vw, vb = momentum * vw + gw, momentum * vb + gb
            w, b = w - lr * (gw + momentum * vw), b - lr * (gb + momentum * vb)
    recipe = Recipe(epochs=2, lr=lr, optimizer="sgd", label_smoothing=smooth, **{**PLAIN, "weight_decay": decay})
    outcome = finetune(head, train, iris(), recipe, cpu=True)
    assert outcome.best_epoch == 2
    torch.testing.assert_close(head.weight.detach().double(), torch.tensor(w), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(head.bias.detach().double(), torch.tensor(b), rtol=1e-5, atol=1e-6)


def test_adamw_with_clipping_and_cosine_against_numpy() -> None:
    head = nn.Linear(4, 3)
    train = iris(shuffle_seed=1)
    weights = [head.weight.detach().double().numpy().copy(), head.bias.detach().double().numpy().copy()]
    m, v = [np.zeros_like(p) for p in weights], [np.zeros_like(p) for p in weights]
    lr, (b1, b2), eps, decay, clip = 0.02, (0.9, 0.99), 1e-8, (0.1, 0.0), 0.5
    total, warm, t = 3 * len(train), 3, 0
    for epoch in range(3):
        for batch in train.epoch(epoch):
            factor = t / warm if t < warm else 0.5 * (1 + math.cos(math.pi * (t - warm) / (total - warm)))
            t += 1
            x, y = batch.inputs.double().numpy(), np.eye(3)[batch.labels.numpy()]
            error = (_softmax(x @ weights[0].T + weights[1]) - y) / len(x)
            gradients = [error.T @ x, error.sum(0)]
            norm = math.sqrt(sum((g**2).sum() for g in gradients))
            for i, gradient in enumerate(gradients):
                g = gradient * min(1.0, clip / (norm + 1e-6))
                m[i], v[i] = b1 * m[i] + (1 - b1) * g, b2 * v[i] + (1 - b2) * g**2
                weights[i] = weights[i] * (1 - lr * factor * decay[i])
                step = (m[i] / (1 - b1**t)) / (np.sqrt(v[i] / (1 - b2**t)) + eps)
                weights[i] = weights[i] - lr * factor * step
    recipe = Recipe(epochs=3, lr=lr, betas=(b1, b2), weight_decay=0.1, clip_norm=clip, warmup=0.1, monitor="nll")
    outcome = finetune(head, train, iris(), recipe, cpu=True)
    assert outcome.best_epoch == 3
    torch.testing.assert_close(head.weight.detach().double(), torch.tensor(weights[0]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head.bias.detach().double(), torch.tensor(weights[1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("accumulation", [1, 3, 4])
def test_accumulated_batches_equal_one_large_batch(accumulation: int) -> None:
    """150 examples in batches of 16: the last batch has 6, and the last step has fewer batches."""
    first, second = nn.Linear(4, 3), nn.Linear(4, 3)
    second.load_state_dict(first.state_dict())
    recipe = Recipe(epochs=2, lr=0.05, monitor="nll", **PLAIN)
    one = finetune(first, iris(16 * accumulation, shuffle_seed=5), iris(), recipe, cpu=True)
    recipe = Recipe(epochs=2, lr=0.05, monitor="nll", accumulation=accumulation, **PLAIN)
    many = finetune(second, iris(16, shuffle_seed=5), iris(), recipe, cpu=True)
    assert one.steps == many.steps == 2 * math.ceil(150 / (16 * accumulation))
    torch.testing.assert_close(first.weight, second.weight)
    assert one.history[-1]["train_loss"] == pytest.approx(many.history[-1]["train_loss"], rel=1e-5)


def test_history_best_and_restored_weights() -> None:
    head = nn.Linear(4, 3)
    start = copy.deepcopy(head.state_dict())
    seen = []
    recipe = Recipe(epochs=4, lr=100.0, optimizer="sgd", monitor="nll", **PLAIN)  # far too high: gets worse
    outcome = finetune(head, iris(), iris(), recipe, on_evaluation=seen.append, cpu=True)
    assert [row["epoch"] for row in outcome.history] == [0, 1, 2, 3, 4]
    assert seen == outcome.history
    assert outcome.best_epoch == 0
    assert outcome.best == outcome.history[0]
    assert outcome.history[0]["train_loss"] is None
    assert outcome.history[0]["nll"] == pytest.approx(F.cross_entropy(*_logits(start)).item(), rel=1e-5)
    torch.testing.assert_close(head.state_dict(), start, rtol=0, atol=0)
    assert not head.training


def _logits(state: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    data = iris(150)
    return F.linear(data.features, state["weight"], state["bias"]), data.labels


def test_maximum_and_minimum_are_known_by_the_metric() -> None:
    scores = iter([{"accuracy": 0.5, "nll": 0.1}, {"accuracy": 0.6, "nll": 0.9}, {"accuracy": 0.6, "nll": 0.05}] * 2)
    for monitor, best in (("accuracy", 1), ("nll", 2)):
        recipe = Recipe(epochs=2, monitor=monitor, **PLAIN)
        outcome = finetune(nn.Linear(4, 3), iris(), iris(), recipe, evaluate_metrics=lambda *_: next(scores), cpu=True)
        assert outcome.best_epoch == best


def test_patience() -> None:
    values = iter([0.5, 0.6, 0.6, 0.4, 0.9, 0.9])
    recipe = Recipe(epochs=5, patience=2, **PLAIN)
    metrics = lambda *_: {"accuracy": next(values)}  # noqa: E731
    outcome = finetune(nn.Linear(4, 3), iris(), iris(), recipe, evaluate_metrics=metrics, cpu=True)
    assert outcome.stopped_early
    assert [row["epoch"] for row in outcome.history] == [0, 1, 2, 3]
    assert outcome.best_epoch == 1


def test_evaluate_every_and_the_last_epoch() -> None:
    recipe = Recipe(epochs=5, evaluate_every=2, **PLAIN)
    outcome = finetune(nn.Linear(4, 3), iris(), iris(), recipe, cpu=True)
    assert [row["epoch"] for row in outcome.history] == [0, 2, 4, 5]


def test_no_epoch_evaluates_the_start() -> None:
    outcome = finetune(nn.Linear(4, 3), iris(), iris(), Recipe(epochs=0), cpu=True)
    assert (outcome.steps, len(outcome.history), outcome.best_epoch) == (0, 1, 0)


def test_dropout_is_seeded_and_the_global_generators_are_left_alone() -> None:
    results = []
    for noise in (0, 1):
        torch.manual_seed(noise)
        np.random.seed(noise)
        head = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3))
        nn.init.constant_(head[1].weight, 0.1)
        nn.init.zeros_(head[1].bias)
        before = (torch.get_rng_state(), np.random.get_state()[1].copy())
        finetune(head, iris(shuffle_seed=0), iris(), Recipe(epochs=2, seed=7, monitor="nll"), cpu=True)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.array_equal(np.random.get_state()[1], before[1])
        results.append(head[1].weight.detach().clone())
    assert torch.equal(*results)
    other = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3))
    nn.init.constant_(other[1].weight, 0.1)
    nn.init.zeros_(other[1].bias)
    finetune(other, iris(shuffle_seed=0), iris(), Recipe(epochs=2, seed=8, monitor="nll"), cpu=True)
    assert not torch.equal(other[1].weight, results[0])


def test_a_dataloader_that_shuffles_is_reproducible() -> None:
    data = iris(150)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(data.features, data.labels), batch_size=16, shuffle=True
    )
    weights = []
    for noise in (0, 1):
        torch.manual_seed(noise)
        head = nn.Linear(4, 3)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        finetune(head, loader, iris(), Recipe(epochs=2, **PLAIN), cpu=True)
        weights.append(head.weight.detach().clone())
    assert torch.equal(*weights)


@pytest.mark.parametrize("policy", ["all", "norm", 1])
def test_frozen_is_bit_identical_after_finetune(policy: str | int) -> None:
    for model, train in (
        (torchvision_model("resnet18", "fc"), pictures()),
        (tiny_bert(), Sentences()),
        (record_head(NormZoo(), "head"), pictures(size=8)) if policy != 1 else (tiny_bert(), Sentences()),
    ):
        freeze(model, policy)
        digest = frozen_digest(model)
        outcome = finetune(model, train, train, Recipe(epochs=1, lr=0.1, monitor="nll", warmup=0.0), cpu=True)
        assert frozen_digest(model) == digest
        assert outcome.steps == 3
        head = [p for p in model.parameters() if p.requires_grad]
        assert all(p.is_contiguous() for p in model.parameters())
        assert head
        copy.deepcopy(model)
        assert "forward" not in vars(model)


def test_rates_of_head_and_backbone_are_used() -> None:
    model = torchvision_model("resnet18", "fc")
    start = copy.deepcopy(model.state_dict())
    metrics = iter([{"accuracy": 0.0}, {"accuracy": 1.0}])
    recipe = Recipe(epochs=1, lr=0.1, backbone_lr=0.0, **{**PLAIN})
    finetune(model, pictures(), pictures(), recipe, evaluate_metrics=lambda *_: next(metrics), cpu=True)
    assert torch.equal(model.conv1.weight, start["conv1.weight"])
    assert not torch.equal(model.fc.weight, start["fc.weight"])
    assert not torch.equal(model.bn1.running_mean, start["bn1.running_mean"])


def test_distilled_pair_pays_for_both_heads() -> None:
    model = tiny_timm("deit_tiny_distilled_patch16_224", ("head", "head_dist"), img_size=32, depth=1)
    model.set_distilled_training(True)
    heads = [copy.deepcopy(model.head.weight), copy.deepcopy(model.head_dist.weight)]
    freeze(model, "none")
    metrics = iter([{"accuracy": 0.0}, {"accuracy": 1.0}])
    recipe = Recipe(epochs=1, lr=0.1, **PLAIN)
    train = pictures()
    model.train()
    first, second = model(train.features[:2])
    expected = (F.cross_entropy(first, train.labels[:2]) + F.cross_entropy(second, train.labels[:2])).item() / 2
    batch = [(train.features[:2], train.labels[:2])]
    outcome = finetune(model, batch, batch, recipe, evaluate_metrics=lambda *_: next(metrics), cpu=True)
    assert outcome.history[1]["train_loss"] == pytest.approx(expected, rel=1e-4)
    assert not torch.equal(model.head.weight, heads[0])
    assert not torch.equal(model.head_dist.weight, heads[1])


def test_inception_trains_on_its_main_logits() -> None:
    model = torchvision_model("googlenet", "fc", init_weights=False)
    outcome = finetune(model, pictures(size=64), pictures(size=64), Recipe(epochs=1, lr=1e-4, monitor="nll"), cpu=True)
    assert math.isfinite(outcome.history[1]["train_loss"])


def test_multi_label_regression_and_tokens() -> None:
    x, y = torch.randn(12, 4), (torch.randn(12, 3) > 0).float()
    y[:2] = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    head = nn.Linear(4, 3)
    expected = F.binary_cross_entropy_with_logits(head(x), y).item()
    recipe = Recipe(epochs=1, lr=0.0, monitor="map", **PLAIN)
    outcome = finetune(head, [(x, y)], [(x, y)], recipe, task="multi_label", cpu=True)
    assert outcome.history[1]["train_loss"] == pytest.approx(expected, rel=1e-5)

    head, y = nn.Linear(4, 1), torch.randn(12)
    expected = F.mse_loss(head(x)[:, 0], y).item()
    recipe = Recipe(epochs=1, lr=0.0, monitor="mse", **PLAIN)
    batches = [(x[:7], y[:7]), (x[7:], y[7:])]
    outcome = finetune(head, batches, batches, recipe, task="regression", cpu=True)
    assert outcome.history[1]["train_loss"] == pytest.approx(expected, rel=1e-5)

    head, x = nn.Linear(4, 3), torch.randn(3, 5, 4)
    y = torch.randint(0, 3, (3, 5))
    y[:, 3:] = -100
    y[0] = -100
    expected = F.cross_entropy(head(x).reshape(-1, 3), y.reshape(-1)).item()
    batches = [(x[:1], y[:1]), (x[1:, :4], y[1:, :4])]  # a batch without a target; batches of unequal length
    recipe = Recipe(epochs=1, lr=0.0, accumulation=2, **PLAIN)
    outcome = finetune(head, batches, batches, recipe, task="token", cpu=True)
    assert outcome.history[1]["train_loss"] == pytest.approx(expected, rel=1e-5)


def test_token_logits_of_unequal_length_are_padded() -> None:
    head = nn.Linear(4, 3)
    batches = [(torch.randn(2, length, 4), torch.zeros(2, length, dtype=torch.int64)) for length in (3, 5)]
    logits, labels = predict(head, batches)
    assert logits.shape == (4, 5, 3)
    assert labels.tolist() == [[0, 0, 0, -100, -100]] * 2 + [[0] * 5] * 2
    torch.testing.assert_close(logits[0, :3], head(batches[0][0])[0].detach())


def test_evaluate_leaves_every_mode_as_it_was() -> None:
    model = NormZoo().train()
    model.bn.eval()
    modes = [module.training for module in model.modules()]
    statistics = model.flat.running_mean.clone()
    scores = evaluate(model, pictures(size=8))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model.flat.running_mean, statistics)
    assert 0 <= scores["accuracy"] <= 1


@pytest.mark.parametrize(
    ("spoil", "cause"),
    [
        ("inputs", "the inputs of this batch contain NaN"),
        ("rate", "a learning rate that is too high"),
        ("start", "the parameter weight was not finite before training"),
    ],
)
def test_a_loss_that_is_not_finite_names_the_step_and_the_cause(spoil: str, cause: str) -> None:
    head, train = nn.Linear(4, 3), iris()
    recipe = Recipe(epochs=3, lr=1e38 if spoil == "rate" else 0.1, optimizer="sgd", **PLAIN)
    metrics = lambda *_: {"accuracy": 0.0}  # noqa: E731
    if spoil == "inputs":
        train.features[40, 2] = float("nan")
    if spoil == "start":
        nn.init.constant_(head.weight, float("inf"))
    with pytest.raises(TrainingError, match=cause) as caught:
        finetune(head, train, iris(), recipe, evaluate_metrics=metrics, cpu=True)
    if spoil == "inputs":
        assert "at step 3 (epoch 1, step 3 of 10)" in str(caught.value)


def test_labels_that_do_not_fit() -> None:
    head = nn.Linear(4, 2)
    with pytest.raises(DataError, match=r"Label 2 is outside 0\.\.1: the head has 2 classes"):
        finetune(head, iris(), [(torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64))], Recipe(epochs=1), cpu=True)
    with pytest.raises(DataError, match="must be int64 class numbers"):
        summed_loss(torch.zeros(2, 3), torch.zeros(2))


def test_monitor_that_is_not_measured() -> None:
    with pytest.raises(TrainingError, match="'accuracy' that chooses the best epoch is none of"):
        finetune(nn.Linear(4, 1), [(torch.zeros(4, 4), torch.rand(4))] * 2, [(torch.rand(4, 4), torch.rand(4))],
                 Recipe(epochs=1), task="regression", cpu=True)  # fmt: skip


def test_nothing_trainable_and_nothing_to_train_on() -> None:
    with pytest.raises(TrainingError, match="is trainable"):
        finetune(nn.Linear(4, 3).requires_grad_(False), iris(), iris(), Recipe(), cpu=True)
    with pytest.raises(TrainingError, match="no batch"):
        finetune(nn.Linear(4, 3), [], iris(), Recipe(), cpu=True)
    with pytest.raises(TrainingError, match="has no length"):
        finetune(nn.Linear(4, 3), iter([]), iris(), Recipe(), cpu=True)
    with pytest.raises(DataError, match="no example to evaluate"):
        finetune(nn.Linear(4, 3), iris(), [], Recipe(), cpu=True)


def test_bf16_and_precision_of_the_next_run() -> None:
    for precision in ("bf16", "fp32", "bf16"):
        model = nn.Linear(4, 3)
        outcome = finetune(model, iris(), iris(), Recipe(epochs=1, precision=precision, monitor="nll"), cpu=True)
        assert outcome.precision == precision
        assert model.weight.dtype == torch.float32
        assert vars(model).keys() == vars(nn.Linear(4, 3)).keys()


def test_bf16_is_used() -> None:
    x = torch.full((2, 1), 1.001)
    for precision, expected in {"fp32": 1.001, "bf16": 1.0}.items():
        model = nn.Linear(1, 2)
        nn.init.constant_(model.weight, 1.0)
        nn.init.zeros_(model.bias)
        batch = [(x, torch.zeros(2, dtype=torch.int64))]
        recipe = Recipe(epochs=0, precision=precision, monitor="nll")
        first_logit = lambda logits, labels: {"nll": logits[0, 0].item()}  # noqa: E731
        outcome = finetune(model, batch, batch, recipe, evaluate_metrics=first_logit, cpu=True)
        assert outcome.best["nll"] == pytest.approx(expected, abs=1e-6)


def test_fp16_on_a_cpu_is_refused() -> None:
    with pytest.raises(TrainingError, match="Use precision=fp32 or bf16"):
        finetune(nn.Linear(4, 3), iris(), iris(), Recipe(precision="fp16"), cpu=True)
    finetune(nn.Linear(4, 3), iris(), iris(), Recipe(epochs=1), cpu=True)


def test_auto_precision_looks_at_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headinit.training.precision._is_fast", lambda cpu: True)
    batches = [(torch.randn(8, 64), torch.zeros(8, dtype=torch.int64))]
    assert chosen_precision("auto", nn.Linear(64, 8), batches) == "bf16"
    # A difference of two nearly equal numbers is lost in 8 bits.
    fragile = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 8))
    nn.init.constant_(fragile[0].bias, 100.0)
    nn.init.constant_(fragile[1].weight, 1.0)
    with torch.no_grad():
        fragile[1].bias.fill_(-800.0)
    assert bfloat16_error(fragile, batches[0][0]) > 0.1
    assert chosen_precision("auto", fragile, batches) == "fp32"
    monkeypatch.setattr("headinit.training.precision._is_fast", lambda cpu: False)
    assert chosen_precision("auto", nn.Linear(64, 8), batches) == "fp32"


def test_the_bar_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    finetune(nn.Linear(4, 3), iris(), iris(), Recipe(epochs=1), progress=True, cpu=True)
    assert "10/10" in capsys.readouterr().out
