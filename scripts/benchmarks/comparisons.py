"""Hundreds of frozen runs by one comparison, and what others need for them."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.features import features_of
from benchmarks.setting import (
    ROOT,
    Bench,
    Decoded,
    another_plain_pass,
    backbone_of,
    batches_of,
    pictures_of,
    plain_seconds,
    timed,
)
from headinit import attach_head, freeze
from headinit.backbones.load import load_backbone
from headinit.comparison import compare
from headinit.data.loading import Batches
from headinit.data.splits import Split
from headinit.features.extract import FeatureSet
from headinit.heads.locate import find_head


def measure_comparison(bench: Bench) -> None:
    """All runs by compare.py, process start and report included, against one plain pass; then again from the cache."""
    size, name = bench.size, bench.size.backbones[0]
    before = plain_seconds(bench)
    first, second = (comparison_seconds(bench, folder) for folder in ("first", "second"))
    after = another_plain_pass(bench)
    plain = (before + after) / 2  # the machine is not equally fast at all times
    note = f"{size.pictures} pictures, eager float32, NCHW; {before:.1f} s before and {after:.1f} s after the runs"
    bench.add(f"one plain pass of {name}", plain, "s", note)
    note = f"{size.runs} runs of {size.epochs} epochs by compare.py in {first:.1f} s: process, features, heads, report"
    bench.add(f"{size.runs} frozen runs over one plain pass", first / plain, "x", note, limit=0.75)
    bench.kept["ours"] = first
    features_of(bench)
    floor = bench.kept[f"seconds {name}"][1]
    note = f"{first:.1f} s, the pass alone {floor:.1f} s; 1 is the floor"
    bench.add("all of it over the fastest pass of the backbone", first / floor, "x", note)
    warm = repeated_seconds(bench)
    note = (
        f"compare() twice in one process, other folders: {warm[0]:.1f} s, with features from the cache {warm[1]:.1f} s"
    )
    bench.add("second comparison over the first", warm[1] / warm[0], "x", note, limit=0.15)
    bench.add("the same as commands", second / first, "x", f"{first:.1f} s and {second:.1f} s")


def comparison_seconds(bench: Bench, folder: str) -> float:
    """Seconds of the command, in a process of its own."""
    size = bench.size
    arguments = [
        f"model={size.backbones[0]}",
        "model.pretrained=false",
        f"init=[{','.join(size.inits)}]",
        f"optim.lr=[{','.join(map(str, size.rates))}]",
        "optim.weight_decay=0",
        f"seeds={size.seeds}",
        f"trainer.epochs={size.epochs}",
        f"cache={bench.folder / 'cache'}",
        f"hydra.run.dir={bench.folder / folder}",
    ]
    arguments += [f"model.{key}={value}" for key, value in size.image_options.items()]
    if size.pictures < 1797:
        arguments += [f"data.train_size={round(0.6 * size.pictures)}"]
    with timed() as seconds:
        subprocess.run(
            [sys.executable, str(ROOT / "scripts" / "compare.py"), *arguments],
            check=True,
            capture_output=True,
            cwd=bench.folder,
        )
    return seconds[0]


def repeated_seconds(bench: Bench) -> list[float]:
    """Seconds of the same comparison twice in this process, the second with the features of the first."""
    size, found = bench.size, []
    model: dict[str, Any] = {"name": size.backbones[0], "pretrained": False, **size.image_options}
    data: dict[str, Any] = {"name": "digits", "modality": "image"}
    if size.pictures < 1797:
        data["train_size"] = round(0.6 * size.pictures)
    for number in range(2):
        with timed() as seconds:
            compare(
                model, data, inits=list(size.inits), lrs=list(size.rates), seeds=size.seeds, epochs=size.epochs,
                folder=bench.folder / f"repeated {number}", cache=bench.folder / "cache of repeated",
            )  # fmt: skip
        found.append(seconds[0])
    return found


def measure_peers(bench: Bench) -> None:
    """The best simple practice, loops over the whole network, and scikit-learn."""
    size = bench.size
    plain, ours = plain_seconds(bench), bench.once("ours", lambda: comparison_seconds(bench, "first"))
    features = features_of(bench)
    count = round(0.6 * len(features))
    train, validation = (part(features, rows) for rows in (slice(0, count), slice(count, round(0.8 * len(features)))))
    with timed() as heads:
        for seed in range(size.seeds):
            for rate in size.rates:
                for _ in size.inits:
                    one_head(train, validation, rate, seed, size.epochs)
    simple = plain + heads[0]
    note = f"one plain pass ({plain:.1f} s) and {size.runs} heads one after another in plain torch ({heads[0]:.1f} s)"
    bench.add("cached features, head after head: times slower", simple / ours, "x", note, limit=2, at_most=False)
    for label, loop in (("plain torch loop", tutorial_epoch), ("transformers Trainer", trainer_epoch)):
        seconds = loop(bench)
        epochs = size.runs * size.epochs
        note = (
            f"measured: one run of {size.peer_epochs} epoch, {seconds:.1f} s; {epochs} such epochs are "
            f"{seconds * epochs:.0f} s by multiplication (not run) against our {ours:.1f} s"
        )
        bench.add(f"{label}, frozen backbone: times slower", seconds * epochs / ours, "x", note)
    seconds, accuracy = logistic_regression(train, validation)
    bench.add("scikit-learn LogisticRegression, 5 values of C", seconds, "s", f"accuracy {accuracy:.4f}")


def part(features: FeatureSet, rows: slice) -> FeatureSet:
    """Some rows of a feature set."""
    return FeatureSet(features.features[rows], features.labels[rows], features.num_classes)


def one_head(train: FeatureSet, validation: FeatureSet, rate: float, seed: int, epochs: int) -> float:
    """One linear head in plain torch, as fast as simple code gets: tensors in memory, fused AdamW, cosine."""
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(train.features.shape[1], train.num_classes)
    optimizer = torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=0.0, fused=True)
    steps = epochs * -(-len(train) // 64)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    best = 0.0
    for _ in range(epochs):
        for rows in torch.randperm(len(train), generator=generator).split(64):
            loss = nn.functional.cross_entropy(head(train.features[rows]), train.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            right = head(validation.features).argmax(1) == validation.labels
            best = max(best, right.float().mean().item())
    return best


class WithLoss(nn.Module):
    """A network as Trainer wants it: keyword arguments in, loss and logits out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Loss and logits."""
        logits = self.model(pixel_values)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def frozen_network(bench: Bench) -> tuple[nn.Module, Batches, Batches]:
    """A network with a new head, everything else frozen, and its batches."""
    name, splits = bench.size.backbones[0], pictures_of(bench)
    backbone = load_backbone(name, pretrained=False, **bench.size.image_options)
    model = freeze(attach_head(backbone, splits.num_classes), "all")
    train = batches_of(bench, name, splits.train, shuffle_seed=0)
    return model, train, batches_of(bench, name, splits.validation)


def tutorial_epoch(bench: Bench) -> float:
    """Seconds of the loop of PyTorch's transfer-learning tutorial: train the head through the whole network."""
    model, train, validation = frozen_network(bench)
    site = find_head(model)[0].path
    optimizer = torch.optim.SGD(model.get_submodule(site).parameters(), lr=1e-3, momentum=0.9)
    with timed() as seconds:
        for epoch in range(bench.size.peer_epochs):
            model.train()
            for batch in train.epoch(epoch):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(batch.inputs), batch.labels)
                loss.backward()
                optimizer.step()
            model.eval()
            with torch.no_grad():
                for batch in validation:
                    model(batch.inputs)
    return seconds[0] / bench.size.peer_epochs


def trainer_epoch(bench: Bench) -> float:
    """Seconds of an epoch and its evaluation by transformers' Trainer."""
    model, train, validation = frozen_network(bench)
    trainer = trainer_of_pictures(
        bench, bench.size.backbones[0], model, train.split, validation.split, num_train_epochs=bench.size.peer_epochs
    )
    with timed() as seconds:
        trainer.train()
    return seconds[0] / bench.size.peer_epochs


def as_trainer_takes_them(examples: Sequence[tuple[Tensor, int]]) -> dict[str, Tensor]:
    """A batch of pictures and their labels."""
    pictures, labels = zip(*examples, strict=True)
    return {"pixel_values": torch.stack(pictures), "labels": torch.tensor(labels)}


def trainer_of_pictures(
    bench: Bench, name: str, model: nn.Module, train: Split, validation: Split | None = None, **options: Any
) -> Any:
    """transformers' Trainer for a network of pictures, silent, on the CPU."""
    from transformers import Trainer, TrainingArguments

    preprocessing = backbone_of(bench, name).require_preprocessing()
    arguments = TrainingArguments(
        output_dir=str(bench.folder / "trainer"), per_device_train_batch_size=32, per_device_eval_batch_size=32,
        **{"num_train_epochs": 1, **options}, eval_strategy="no" if validation is None else "epoch",
        save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    return Trainer(
        model=WithLoss(model),
        args=arguments,
        train_dataset=Decoded(train, preprocessing),
        eval_dataset=None if validation is None else Decoded(validation, preprocessing),
        data_collator=as_trainer_takes_them,
    )


def logistic_regression(train: FeatureSet, validation: FeatureSet) -> tuple[float, float]:
    """Seconds of scikit-learn's solver over five strengths, and the best validation accuracy."""
    from sklearn.linear_model import LogisticRegression

    best = 0.0
    with timed() as seconds, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # weak penalties do not converge within the iterations
        for strength in (1e-4, 1e-2, 1.0, 1e2, 1e4):
            model = LogisticRegression(C=strength, max_iter=200).fit(train.features.numpy(), train.labels.numpy())
            best = max(best, float(model.score(validation.features.numpy(), validation.labels.numpy())))
    return seconds[0], best
