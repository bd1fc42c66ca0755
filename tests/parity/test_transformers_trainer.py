"""The same losses and scores as transformers' `Trainer` with the arguments of its `run_glue.py`."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import nn
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

from headinit.attach import attach_head
from headinit.backbones.load import load_backbone
from headinit.data.catalog import load_data
from headinit.data.loading import Batches
from headinit.data.splits import DataSplits, Split
from headinit.data.text import TextPreprocessing
from headinit.seeding import derived_seed, global_generators_kept
from headinit.training.recipe import Recipe

from .losses import assert_equal_losses, finetune_with_losses

# run_glue with lr 2e-5; the rest are the Trainer's defaults: AdamW without decay, linear down to 0, gradient norm 1.
RUN_GLUE = Recipe(
    lr=2e-5, backbone_lr=2e-5, weight_decay=0.0, schedule="linear", warmup=0.0, clip_norm=1.0, channels_last=False
)


class OrderedTrainer(Trainer):
    """A `Trainer` that reads the examples in the order of headinit's batches and remembers its losses."""

    def __init__(self, *args: Any, batches: Batches, dropout_seed: int | None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.batches, self.dropout_seed, self.losses = batches, dropout_seed, list[float]()

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return _Order(self.batches)

    def training_step(self, *args: Any, **options: Any) -> torch.Tensor:
        epoch, step = divmod(self.state.global_step, len(self.batches))
        seed = derived_seed(self.dropout_seed or 0, f"training/{epoch + 1}/{step}")
        with global_generators_kept(seed):
            loss = super().training_step(*args, **options)
        self.losses.append(loss.item())
        return loss


class _Order(torch.utils.data.Sampler):
    """Another epoch of the same order at every pass."""

    def __init__(self, batches: Batches) -> None:
        self.batches, self.epoch = batches, 0

    def __len__(self) -> int:
        return len(self.batches.split)

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        return iter(torch.cat(self.batches.order(self.epoch - 1)).tolist())


def as_run_glue_reads(split: Split, tokenizer: Any, max_length: int) -> list[dict[str, Any]]:
    """Tokenised as the script does it."""
    texts = zip(*split.items, strict=True) if isinstance(split.items[0], tuple) else [split.items]
    encoded = tokenizer(*map(list, texts), truncation=True, max_length=max_length)
    return [{**{name: encoded[name][i] for name in encoded}, "label": int(split.labels[i])} for i in range(len(split))]


def glue_metrics(prediction: Any) -> dict[str, float]:
    """The metrics of GLUE, by scikit-learn: MCC for CoLA, accuracy for RTE, F1 for MRPC."""
    guesses, labels = prediction.predictions.argmax(1), prediction.label_ids
    return {
        "accuracy": accuracy_score(labels, guesses),
        "macro_f1": f1_score(labels, guesses, average="macro"),
        "mcc": matthews_corrcoef(labels, guesses),
    }


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def compare(
    splits: DataSplits, recipe: Recipe, batch_size: int, folder: Path, *, dropout: bool, max_length: int
) -> None:
    """Train MiniLM by both loops; losses of every step and scores at the end must agree."""
    backbone = load_backbone("minilm", max_length=max_length)
    preprocessing = backbone.require_preprocessing()
    assert isinstance(preprocessing, TextPreprocessing)
    model = attach_head(backbone, splits.num_classes, init="bert", seed=recipe.seed)
    model = model if dropout else without_dropout(model)
    theirs = copy.deepcopy(model)
    train = Batches(splits.train, preprocessing, batch_size, shuffle_seed=recipe.seed, bucket=True)
    validation = Batches(splits.validation, preprocessing, batch_size, bucket=True)
    outcome, losses = finetune_with_losses(model, train, validation, recipe)

    trainer = OrderedTrainer(
        model=theirs,
        args=TrainingArguments(
            str(folder),
            learning_rate=recipe.lr,
            num_train_epochs=recipe.epochs,
            per_device_train_batch_size=batch_size,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_strategy="no",
        ),
        train_dataset=as_run_glue_reads(splits.train, preprocessing.tokenizer, max_length),
        eval_dataset=as_run_glue_reads(splits.validation, preprocessing.tokenizer, max_length),
        data_collator=DataCollatorWithPadding(preprocessing.tokenizer),
        compute_metrics=glue_metrics,
        batches=train,
        dropout_seed=recipe.seed,
    )
    trainer.train()
    assert_equal_losses(losses, trainer.losses, steps=outcome.steps)
    scores = trainer.evaluate()
    for name in ("accuracy", "macro_f1", "mcc"):
        assert outcome.history[-1][name] == pytest.approx(scores[f"eval_{name}"], abs=1e-6)
    assert outcome.history[-1]["nll"] == pytest.approx(scores["eval_loss"], rel=1e-4)


def test_sentences_of_docstrings(tmp_path: Path) -> None:
    """With dropout, from the generator that headinit seeds at each step."""
    splits = load_data("pydocs", train_size=48, validation=40)
    recipe = with_epochs(RUN_GLUE, 3, lr=3e-4)  # so high that 18 steps move the loss
    compare(splits, recipe, 8, tmp_path, dropout=True, max_length=32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "batch_size", "epochs"), [("glue_rte", 8, 3), ("glue_mrpc", 8, 5), ("glue_sst2", 32, 3)]
)
def test_glue(task: str, batch_size: int, epochs: int, shared_data: Path, tmp_path: Path) -> None:
    """51, 50 and 51 steps, pairs in small batches for time's sake. SST-2 stands for CoLA: sentences judged by MCC."""
    splits = load_data("csv", root=str(shared_data / task), train_size=-(-50 // epochs) * batch_size)
    splits = dataclasses.replace(splits, validation=splits.validation.select(range(64)))
    compare(splits, with_epochs(RUN_GLUE, epochs), batch_size, tmp_path, dropout=False, max_length=128)


def with_epochs(recipe: Recipe, epochs: int, lr: float | None = None) -> Recipe:
    rate = recipe.lr if lr is None else lr
    return dataclasses.replace(recipe, epochs=epochs, lr=rate, backbone_lr=rate)
