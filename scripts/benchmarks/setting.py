"""What the parts of the benchmark share: sizes, measurements, the pictures, the backbones and one plain pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from headinit.backbones.load import Backbone, load_backbone
from headinit.data.catalog import load_data
from headinit.data.loading import Batches
from headinit.data.splits import DataSplits, Split, take_share

ROOT = Path(__file__).resolve().parents[2]
INITS = ("he", "xavier", "lecun", "torch", "normal", "bert", "scaled_down", "orthogonal", "zeros", "ridge")
RATES = (1e-4, 1e-3, 1e-2, 1e-1)


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        pictures: of the 1,797 digits.
        image_size: side in pixels; None takes the model's own.
        backbones: of pictures whose speed is measured; the first is the one that heads are compared on.
        inits, rates, seeds, epochs: of the comparison.
        sentences: of the text that features are extracted from.
        peer_epochs: epochs that the loops over the whole network run with a frozen backbone.
        tuning_texts, tuning_pictures: examples of the fine-tuning runs, one epoch each.
        prefix_pictures, prefix_validation, prefix_epochs: of the run with a cached prefix; those of hymenoptera.
        memory_pictures, memory_steps: of the runs whose memory is measured.
        rounds: how often short measurements are repeated, in turns.
        claims: whether the limits are checked.
    """

    pictures: int
    image_size: int | None
    backbones: tuple[str, ...]
    inits: tuple[str, ...]
    rates: tuple[float, ...]
    seeds: int
    epochs: int
    sentences: int
    peer_epochs: int
    tuning_texts: int
    tuning_pictures: int
    prefix_pictures: int
    prefix_validation: int
    prefix_epochs: int
    memory_pictures: int
    memory_steps: int
    rounds: int
    claims: bool

    @property
    def runs(self) -> int:
        """Number of heads that are compared."""
        return len(self.inits) * len(self.rates) * self.seeds

    @property
    def image_options(self) -> dict[str, int]:
        """What a backbone for pictures is loaded with."""
        return {} if self.image_size is None else {"image_size": self.image_size}


SIZES = {
    "small": Size(
        pictures=120, image_size=64, backbones=("resnet18",), inits=("he", "zeros", "ridge"), rates=(1e-3, 1e-2),
        seeds=2, epochs=3, sentences=60, peer_epochs=1, tuning_texts=64, tuning_pictures=64, prefix_pictures=64,
        prefix_validation=16, prefix_epochs=2, memory_pictures=64, memory_steps=2, rounds=1, claims=False,
    ),
    "full": Size(
        pictures=1797, image_size=None, backbones=("resnet50", "efficientnet_lite0"), inits=INITS, rates=RATES,
        seeds=5, epochs=20, sentences=2400, peer_epochs=1, tuning_texts=960, tuning_pictures=224, prefix_pictures=244,
        prefix_validation=153, prefix_epochs=10, memory_pictures=640, memory_steps=4, rounds=5, claims=True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Measurement:
    """One number.

    Attributes:
        section: which part of the benchmark.
        name: what was measured.
        value, unit: how much.
        limit: what is claimed, and `at_most` whether that is the greatest or the least value allowed.
        note: how it was measured.
    """

    section: str
    name: str
    value: float
    unit: str = ""
    limit: float | None = None
    at_most: bool = True
    note: str = ""

    @property
    def holds(self) -> bool | None:
        """Whether the claim holds; None where none is made."""
        if self.limit is None:
            return None
        return self.value <= self.limit if self.at_most else self.value >= self.limit


@dataclass
class Bench:
    """What the sections share, each made once.

    Attributes:
        size: how much is measured.
        folder: for files that nobody keeps.
        console: where the numbers are printed as they come.
        data: folder with glue_rte, glue_mrpc and hymenoptera; None measures on what is installed.
        section: the part that is running.
        found: the measurements so far.
        kept: values by name, for `once`.
    """

    size: Size
    folder: Path
    console: Console
    data: Path | None = None
    section: str = ""
    found: list[Measurement] = field(default_factory=list)
    kept: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, value: float, unit: str = "", note: str = "", **claim: Any) -> None:
        """Keep a measurement of this section; a claim is kept only at full size."""
        claim = claim if self.size.claims else {}
        self.found.append(Measurement(self.section, name, value, unit, note=note, **claim))
        self.console.print(f"  {name}: {value:.4g} {unit}", highlight=False)

    def add_gain(self, name: str, ours: float, peer: float, note: str, least: float | None = None) -> None:
        """Keep how many times faster than a peer it was, both in seconds."""
        claim = {} if least is None else {"limit": least, "at_most": False}
        self.add(name, peer / ours, "x", f"{note}: {peer:.1f} s against our {ours:.1f} s", **claim)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """The value of this name, made when it is first asked for."""
        if name not in self.kept:
            self.kept[name] = make()
        return self.kept[name]


@contextmanager
def timed() -> Iterator[list[float]]:
    """Wall-clock seconds of a block, in a list that is filled at its end."""
    seconds: list[float] = []
    start = time.perf_counter()
    yield seconds
    seconds.append(time.perf_counter() - start)


class Decoded(torch.utils.data.Dataset):
    """Pictures decoded one at a time, with the same preprocessing as ours."""

    def __init__(self, split: Split, preprocessing: Callable[[Any], Tensor]) -> None:
        self.split, self.preprocessing = split, preprocessing

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.preprocessing(self.split.items[i]), int(self.split.labels[i])


# --- what is measured on ----------------------------------------------------------------------------------------------


def pictures_of(bench: Bench) -> DataSplits:
    """The digits, or a part of them."""

    def make() -> DataSplits:
        splits = load_data("digits")
        share = bench.size.pictures / 1797
        if share >= 1:
            return splits
        parts = [take_share(part, share, 0) for part in (splits.train, splits.validation, splits.test) if part]
        return DataSplits(*parts, splits.class_names, splits.modality, splits.name)

    return bench.once("pictures", make)


def all_examples(splits: DataSplits) -> Split:
    """Every example of a task as one split."""
    parts = [part for part in (splits.train, splits.validation, splits.test) if part is not None]
    items = [item for part in parts for item in part.items]
    names = [name for part in parts for name in part.names]
    return Split(items, torch.cat([part.labels for part in parts]), names, splits.fingerprint)


def first_examples(split: Split, count: int) -> Split:
    """The first examples of a split."""
    count = min(count, len(split))
    return Split([split.items[i] for i in range(count)], split.labels[:count], list(split.names[:count]), f"{count}")


def shuffled(split: Split) -> Split:
    """The examples in another, fixed order, so that the first of them are of all classes."""
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0)).tolist()
    return Split([split.items[i] for i in order], split.labels[order], [split.names[i] for i in order], "shuffled")


def backbone_of(bench: Bench, name: str) -> Backbone:
    """A backbone; speed does not depend on the weights, so what is not bundled is random."""

    def make() -> Backbone:
        bundled = name in ("efficientnet_lite0", "minilm")
        return load_backbone(name, pretrained=bundled, **({} if name == "minilm" else bench.size.image_options))

    return bench.once(f"backbone {name}", make)


def batches_of(bench: Bench, name: str, split: Split, **options: Any) -> Batches:
    """Batches of 32 for a backbone, two threads decoding."""
    return Batches(split, backbone_of(bench, name).require_preprocessing(), 32, workers=2, **options)


@torch.inference_mode()
def plain_pass(model: nn.Module, batches: Batches) -> float:
    """Seconds of one pass in eager float32, NCHW, with the head the model has: what any loop pays for each epoch."""
    model.eval()
    with timed() as seconds:
        for batch in batches:
            model(**batch.inputs) if isinstance(batch.inputs, dict) else model(batch.inputs)
    return seconds[0]


def plain_seconds(bench: Bench) -> float:
    """Seconds of the plain pass that the claims refer to."""
    return bench.once("plain", lambda: another_plain_pass(bench))


def another_plain_pass(bench: Bench) -> float:
    """Seconds of a plain pass of the first backbone over all pictures, measured now."""
    name = bench.size.backbones[0]
    split = all_examples(pictures_of(bench))
    return plain_pass(backbone_of(bench, name).model, batches_of(bench, name, split))
