"""Full fine-tuning beside transformers' Trainer (text) and a plain torch loop (pictures), and the cached prefix."""

from __future__ import annotations

import copy
import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.features import mixed_sentences
from benchmarks.setting import (
    Bench,
    Decoded,
    all_examples,
    backbone_of,
    batches_of,
    first_examples,
    pictures_of,
    shuffled,
    timed,
)
from headinit import attach_head, freeze
from headinit.backbones.load import load_backbone
from headinit.data.catalog import load_data
from headinit.data.loading import Batches
from headinit.data.splits import Split
from headinit.training.finetune import TrainingOutcome, finetune
from headinit.training.recipe import Recipe

BATCH = 32
# The peers' recipe, so that the same batches give the same curve.
TEXT = Recipe(epochs=1, lr=5e-5, backbone_lr=5e-5, weight_decay=0.0, schedule="linear", warmup=0.0, clip_norm=1.0)
PICTURES = Recipe(
    epochs=1, lr=1e-3, backbone_lr=1e-3, weight_decay=0.0, optimizer="sgd", momentum=0.9, nesterov=False,
    schedule="constant", warmup=0.0, clip_norm=None,
)  # fmt: skip


def has_fast_bfloat16() -> bool:
    """Whether this processor computes in bfloat16 faster than in float32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


# --- text -------------------------------------------------------------------------------------------------------------


def measure_text(bench: Bench) -> None:
    """MiniLM against Trainer: same examples, batch size, number of steps and precision; one epoch each."""
    peers: dict[str, dict[str, Any]] = {
        "padded to 128, as run_glue": {"pad": True},
        "padded to the longest of each batch": {},
        "grouped by length": {"train_sampling_strategy": "group_by_length"},
    }
    least = {"padded to 128, as run_glue": 1.9, "grouped by length": 1.1}
    for name, split in texts_of(bench).items():
        before = text_seconds(bench, split, "fp32")
        theirs = {setting: trainer_seconds(bench, split, **options) for setting, options in peers.items()}
        after = text_seconds(bench, split, "fp32")  # the machine's speed drifts: ours is measured on both sides
        note = f"{len(split)} texts, {math.ceil(len(split) / BATCH)} steps of {BATCH}, float32"
        for setting, seconds in theirs.items():
            timed_twice = f"{note}; ours {before:.1f} s before and {after:.1f} s after"
            bench.add_gain(
                f"{name}: over Trainer, {setting}", (before + after) / 2, seconds, timed_twice, least.get(setting)
            )
        if has_fast_bfloat16():
            reduced = text_seconds(bench, split, "bf16")
            seconds = trainer_seconds(bench, split, bf16=True, train_sampling_strategy="group_by_length")
            note = note.replace("float32", "bfloat16 both")
            bench.add_gain(f"{name}: over Trainer, grouped by length, bfloat16", reduced, seconds, note)
    measure_same_batches(bench, split)


def texts_of(bench: Bench) -> dict[str, Split]:
    """RTE and MRPC where their files are given, else sentences of installed libraries."""
    count = bench.size.tuning_texts
    if bench.data is None:
        return {"sentences": first_examples(mixed_sentences(count), count)}
    found = {}
    for name in ("rte", "mrpc"):
        splits = load_data("csv", root=str(bench.data / f"glue_{name}"))
        found[name.upper()] = first_examples(shuffled(splits.train), count)
    return found


def text_model(bench: Bench) -> nn.Module:
    """MiniLM with a new head of two classes, the same each time."""
    fresh = bench.once("text model", lambda: attach_head(load_backbone("minilm"), 2))
    return copy.deepcopy(fresh)


def text_batches(bench: Bench, split: Split, **options: Any) -> Batches:
    """Bucketed batches whose texts have been tokenised already, as Trainer's have."""
    batches = batches_of(bench, "minilm", split, shuffle_seed=0, bucket=True, **options)
    next(iter(batches))
    return batches


def text_seconds(bench: Bench, split: Split, precision: str) -> float:
    """Seconds of our epoch; of evaluation, two examples before and after it are in them."""
    model, train = text_model(bench), text_batches(bench, split)
    few = list(batches_of(bench, "minilm", first_examples(split, 2)))
    with timed() as seconds:
        finetune(model, train, few, replace(TEXT, precision=precision), cpu=True)
    return seconds[0]


class TokenisedTexts(torch.utils.data.Dataset):
    """Tokenised texts as Trainer takes them."""

    def __init__(self, bench: Bench, split: Split, pad: bool) -> None:
        preprocessing = backbone_of(bench, "minilm").require_preprocessing()
        columns = preprocessing.tokenizer(
            *columns_of(split), truncation=True, max_length=128, padding="max_length" if pad else False
        )
        self.rows = [{key: columns[key][i] for key in columns} for i in range(len(split))]
        for row, label in zip(self.rows, split.labels.tolist(), strict=True):
            row["labels"] = label

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.rows[i]


def columns_of(split: Split) -> list[list[str]]:
    """First and, of pairs, second texts."""
    items = list(split.items)
    return [items] if isinstance(items[0], str) else [list(column) for column in zip(*items, strict=True)]


def trainer_seconds(bench: Bench, split: Split, pad: bool = False, **options: Any) -> float:
    """Seconds of one epoch by transformers' Trainer, without any evaluation."""
    from transformers import DataCollatorWithPadding, Trainer, default_data_collator

    tokenizer = backbone_of(bench, "minilm").require_preprocessing().tokenizer
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=text_model(bench),
            args=trainer_arguments(folder, **options),
            train_dataset=TokenisedTexts(bench, split, pad),
            data_collator=default_data_collator if pad else DataCollatorWithPadding(tokenizer),
        )
        with timed() as seconds:
            trainer.train()
    return seconds[0]


def trainer_arguments(folder: str | Path, **options: Any) -> Any:
    """Trainer's defaults, silent, on the CPU."""
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=BATCH, num_train_epochs=1, learning_rate=TEXT.lr,
        save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no", **options,
    )  # fmt: skip


def measure_same_batches(bench: Bench, split: Split) -> None:
    """The loss after a few steps on the same batches, dropout off: it is the same training, only faster."""
    from transformers import Trainer

    model = text_model(bench)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    train = text_batches(bench, first_examples(split, 8 * BATCH if bench.size.claims else 2 * BATCH))
    theirs = copy.deepcopy(model)

    class Replayed(Trainer):
        def get_train_dataloader(self) -> Any:
            return [{**batch.inputs, "labels": batch.labels} for batch in train.epoch(0)]

    with tempfile.TemporaryDirectory() as folder:
        trainer = Replayed(
            model=theirs, args=trainer_arguments(folder), train_dataset=TokenisedTexts(bench, split, False)
        )
        expected = trainer.train().training_loss
    few = list(batches_of(bench, "minilm", first_examples(split, 2)))
    found = finetune(model, train, few, TEXT, cpu=True).history[-1]["train_loss"]
    bench.add(
        "same batches: difference of the mean loss from Trainer's", abs(found / expected - 1), "", limit=1e-4,
        note=f"{len(train)} steps without dropout: {found:.6f} and {expected:.6f}; batches of the timed runs differ",
    )  # fmt: skip


# --- pictures ---------------------------------------------------------------------------------------------------------


def measure_pictures(bench: Bench) -> None:
    """Full fine-tuning against the loop of PyTorch's tutorial: the same batches in the same order, one epoch each."""
    split = tuning_pictures(bench, bench.size.tuning_pictures)
    for name in bench.size.backbones:
        model = picture_model(bench, name)
        # The machine's speed drifts: what is compared is measured on both sides of the middle.
        plain_before, expected = tutorial_run(bench, name, copy.deepcopy(model), split)
        ours_before, outcome = our_run(bench, name, copy.deepcopy(model), split, "fp32")
        reduced = our_run(bench, name, copy.deepcopy(model), split, "auto") if has_fast_bfloat16() else None
        ours_after, _ = our_run(bench, name, copy.deepcopy(model), split, "fp32")
        plain_after, _ = tutorial_run(bench, name, copy.deepcopy(model), split)
        plain, ours = (plain_before + plain_after) / 2, (ours_before + ours_after) / 2
        note = f"{len(split)} pictures, batches of {BATCH}, decoding included"
        note += f"; the plain loop {plain_before:.1f} s first and {plain_after:.1f} s last"
        twice = f"{note}, ours {ours_before:.1f} and {ours_after:.1f} s between"
        bench.add_gain(f"{name}: over a plain loop, float32", ours, plain, twice, 1.3)
        loss = outcome.history[-1]["train_loss"]
        text = f"{loss:.5f} and {expected:.5f}: channels-last sums are rounded in another order"
        bench.add(f"{name}: difference of the mean loss from the plain loop's", abs(loss / expected - 1), "", text)
        if reduced is not None:
            note += f"; precision=auto chose {reduced[1].precision}, its check included"
            bench.add_gain(f"{name}: over a plain loop, bfloat16 allowed", reduced[0], plain, note, 2.2)
        measure_same_layout(bench, name, model, split)


def measure_same_layout(bench: Bench, name: str, model: nn.Module, split: Split) -> None:
    """The loss of both loops in the same memory layout: it is the same training."""
    few = first_examples(split, 2 * BATCH)
    _, expected = tutorial_run(bench, name, copy.deepcopy(model), few)
    _, outcome = our_run(bench, name, copy.deepcopy(model), few, "fp32", channels_last=False)
    loss = outcome.history[-1]["train_loss"]
    note = f"2 steps, both NCHW: {loss:.6f} and {expected:.6f}"
    bench.add(f"{name}: the same in the plain layout", abs(loss / expected - 1), "", note, limit=1e-5)


def tuning_pictures(bench: Bench, count: int) -> Split:
    """Photographs where they are given, else digits."""
    if bench.data is None:
        return first_examples(pictures_of(bench).train, count)
    splits = load_data("imagefolder", root=str(bench.data / "hymenoptera"))
    return first_examples(shuffled(all_examples(splits)), count)


def picture_model(bench: Bench, name: str) -> nn.Module:
    """A backbone with a new head, everything trainable."""
    classes = pictures_of(bench).num_classes if bench.data is None else 2
    backbone = load_backbone(name, pretrained=name == "efficientnet_lite0", **bench.size.image_options)
    return attach_head(backbone, classes)


def our_run(
    bench: Bench, name: str, model: nn.Module, split: Split, precision: str, **options: Any
) -> tuple[float, TrainingOutcome]:
    """Seconds and outcome of one epoch; two pictures are evaluated before and after it. `options` are of the recipe."""
    train = batches_of(bench, name, split, shuffle_seed=0)
    few = list(batches_of(bench, name, first_examples(split, 2)))
    recipe = replace(PICTURES, precision=precision, **options)
    with timed() as seconds:
        outcome = finetune(model, train, few, recipe, cpu=True)
    return seconds[0], outcome


def tutorial_run(bench: Bench, name: str, model: nn.Module, split: Split) -> tuple[float, float]:
    """Seconds and mean loss of an epoch as in the transfer learning tutorial: NCHW, eager, two workers decoding."""
    order = [index.tolist() for index in batches_of(bench, name, split, shuffle_seed=0).order(0)]
    pictures = Decoded(split, backbone_of(bench, name).require_preprocessing())
    loader = torch.utils.data.DataLoader(pictures, batch_sampler=order, num_workers=2 if bench.size.claims else 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=PICTURES.lr, momentum=PICTURES.momentum)
    total = 0.0
    with timed() as seconds:
        model.train()
        for inputs, labels in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), labels)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(labels)
    return seconds[0], total / len(split)


# --- the cached prefix ------------------------------------------------------------------------------------------------


def measure_prefix(bench: Bench) -> None:
    """The last stage trains, all before it is frozen: computed once or in every epoch."""
    name, epochs = bench.size.backbones[0], bench.size.prefix_epochs
    count = bench.size.prefix_pictures
    pictures = tuning_pictures(bench, count + bench.size.prefix_validation)
    splits = pictures.select(range(count)), pictures.select(range(count, len(pictures)))
    model = freeze(picture_model(bench, name), 1)
    found = {budget: prefix_run(bench, name, copy.deepcopy(model), splits, budget) for budget in (None, 8.0)}
    (plain, expected), (cached, outcome) = found[None], found[8.0]
    note = f"{count} pictures, {len(splits[1])} to validate on, {epochs} epochs, last stage and head train"
    bench.add_gain(f"{name}: over computing the frozen part in every epoch", cached, plain, note, 3.0)
    curves = [[row["train_loss"] for row in run.history[1:]] for run in (outcome, expected)]
    difference = max(abs(a / b - 1) for a, b in zip(*curves, strict=True))
    bench.add(f"{name}: greatest difference of the epochs' losses", difference, "", limit=1e-2)


def prefix_run(
    bench: Bench, name: str, model: nn.Module, splits: tuple[Split, Split], gigabytes: float | None
) -> tuple[float, Any]:
    """Seconds and outcome of a run whose frozen part is kept within this budget."""
    train, validation = batches_of(bench, name, splits[0], shuffle_seed=0), batches_of(bench, name, splits[1])
    recipe = replace(PICTURES, epochs=bench.size.prefix_epochs)
    with timed() as seconds:
        outcome = finetune(model, train, validation, recipe, cpu=True, prefix_cache_gb=gigabytes)
    return seconds[0], outcome
