"""What the head sees: the features that reach it, streamed batch by batch."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headinit.data.loading import batches_from
from headinit.errors import DataError, HeadError, unknown_name
from headinit.features.acceleration import accelerate, pays
from headinit.features.cache import (
    CacheEntry,
    FeatureBatch,
    FeatureCache,
    ShardWriter,
    cache_key,
    joined,
    tensors_digest,
)
from headinit.features.sharing import extract_together
from headinit.heads.locate import capture_head_input, evaluating, find_head
from headinit.heads.record import HeadSite, call_model, has_record, record_of, unwrap
from headinit.processes import process_count, process_index

PRECISIONS = ("fp32", "bf16", "auto")
SPEEDS = ("auto", "plain")

# What `precision="auto"` allows between bf16 and fp32 features of the user's own examples, relative to their norm.
BF16_TOLERANCE = 1e-2

# How far the features of the faster copy may be from those of the plain pass, relative to their norm. Summing in
# another order costs about 1e-6.
FAST_TOLERANCE = 1e-4

Inputs = Tensor | Mapping[str, Tensor]
Progress = Callable[[int, int | None, float | None], None]


@dataclass(frozen=True)
class FeatureSet:
    """Features of a set of examples, exactly as the head receives them.

    Attributes:
        features: `(N, d)`, float32 (or float16), on the CPU.
        labels: `(N,)` int64 classes; `(N, K)` float for multi-label and regression.
        num_classes: number of classes K (or of targets).
        fingerprint: digest of weights, preprocessing and data that the features come from ("" if unknown).
        from_cache: whether they were read from the feature cache.
    """

    features: Tensor
    labels: Tensor
    num_classes: int
    fingerprint: str = ""
    from_cache: bool = False

    def __len__(self) -> int:
        return len(self.features)


# --- the data, in whatever form it comes ------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorPair:
    """Inputs and labels in memory, read as batches in order."""

    inputs: Inputs
    labels: Tensor
    batch_size: int

    def digest(self) -> str:
        """SHA-256 of the content."""
        inputs = self.inputs if isinstance(self.inputs, Mapping) else {"inputs": self.inputs}
        return tensors_digest({**{f"inputs/{name}": value for name, value in inputs.items()}, "labels": self.labels})

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Inputs, Tensor]]:
        return self.from_batch(0)

    def from_batch(self, first: int) -> Iterator[tuple[Inputs, Tensor]]:
        """The batches from number `first` on."""
        for start in range(first * self.batch_size, len(self.labels), self.batch_size):
            rows = slice(start, start + self.batch_size)
            if isinstance(self.inputs, Mapping):
                yield {name: value[rows] for name, value in self.inputs.items()}, self.labels[rows]
            else:
                yield self.inputs[rows], self.labels[rows]


def as_batches(data: Any, batch_size: int) -> Iterable[Any]:
    """Batches of `data`: a pair (inputs, labels) is cut into batches, an iterable of batches is taken as it is.

    Raises:
        DataError: neither; or inputs and labels of different lengths.

    Example:
        >>> len(as_batches((torch.zeros(5, 3), torch.zeros(5)), 2))
        3
    """
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor | Mapping):
        inputs, labels = data[0], torch.as_tensor(data[1])
        sizes = {len(v) for v in (inputs.values() if isinstance(inputs, Mapping) else [inputs])}
        if sizes != {len(labels)}:
            raise DataError(f"The inputs have {sorted(sizes)} rows and the labels {len(labels)}: give one label a row.")
        return TensorPair(inputs, labels, batch_size)
    if isinstance(data, Iterable) and not isinstance(data, Tensor | Mapping | str):
        return data
    raise DataError(
        f"Cannot read data of type {type(data).__name__}: give a FeatureSet, a pair of tensors (inputs, labels), or an "
        "iterable of batches (inputs, labels), such as a DataLoader."
    )


def split_batch(batch: Any) -> tuple[Inputs, Tensor, Tensor | None]:
    """Inputs, labels and, where the batch has it, the index of each example in the data.

    A batch is `(inputs, labels, ...)`, or a mapping with ``"labels"`` as the collators of transformers give.

    Raises:
        DataError: the batch has no labels, or is none of these.

    Example:
        >>> split_batch({"x": torch.zeros(2, 3), "labels": torch.zeros(2)})[0].keys()
        dict_keys(['x'])
    """
    if isinstance(batch, Mapping):
        if batch.get("labels") is None:
            raise DataError(
                f"A batch has no 'labels', only {', '.join(map(str, batch))}. Add the labels to the batches."
            )
        inputs = {name: value for name, value in batch.items() if name != "labels" and isinstance(value, Tensor)}
        return inputs, torch.as_tensor(batch["labels"]), None
    if isinstance(batch, tuple | list) and len(batch) >= 2 and isinstance(batch[0], Tensor | Mapping):
        index = getattr(batch, "index", None)  # a field of `Batch`; the method of a plain tuple is no tensor
        return batch[0], torch.as_tensor(batch[1]), index if isinstance(index, Tensor) else None
    raise DataError(
        f"Cannot read a batch of type {type(batch).__name__}: it must be (inputs, labels, ...) or a mapping with "
        "'labels'."
    )


# --- one batch through the model --------------------------------------------------------------------------------------

Runner = Callable[[Any], Tensor]


def head_runner(model: nn.Module, site: HeadSite) -> Runner:
    """A function from inputs to features: the plain way, through the model as it is.

    Most heads receive `(B, d)` and that is it. Where a head works on positions (a convolution over a map, a Linear over
    tokens) and the model pools its logits afterwards, the model is let to pool the features instead: the head's output
    is replaced by its input. That is the same thing only if nothing but linear pooling follows, so the first batch is
    checked: the head on the pooled features must give the model's logits.
    """
    way: list[str] = []

    def run(inputs: Inputs) -> Tensor:
        if not way:
            features, found = _first_batch(model, site, inputs)
            way.append(found)
            return features
        with evaluating(model):
            if way[0] == "pooled later":
                return _through_pooling(model, site, inputs)
            return _received(model, site, inputs)[0]

    return run


def _first_batch(model: nn.Module, site: HeadSite, inputs: Inputs) -> tuple[Tensor, str]:
    with evaluating(model):
        features, logits = _received(model, site, inputs)
        if features.ndim == 2 or (features.ndim == 3 and logits.ndim == 3):
            return features, "received"
        layer = model.get_submodule(site.path)
        features = _through_pooling(model, site, inputs)
        if features.ndim == 2 and features.shape[1] == site.in_features and _head_on(layer, features, logits):
            return features, "pooled later"
    raise HeadError(
        f"The head {site.path!r} of {type(model).__name__} works on many positions, and what follows it is not linear "
        "(a ReLU before the pooling, as in SqueezeNet), so there is no one feature vector an example. Fine-tune it "
        "with an init that needs no data (such as init=he), or give attach_head a pooled head."
    )


def _received(model: nn.Module, site: HeadSite, inputs: Inputs) -> tuple[Tensor, Tensor]:
    with capture_head_input(model, site) as seen:
        logits = call_model(model, inputs)
    features = seen.tensor
    layer = model.get_submodule(site.path)
    if isinstance(layer, nn.Conv2d) and features.shape[2:] == layer.kernel_size and not any(layer.padding):
        features = features.flatten(1)  # one position that covers the whole map
    return features, logits


def _through_pooling(model: nn.Module, site: HeadSite, inputs: Inputs) -> Tensor:
    handle = model.get_submodule(site.path).register_forward_hook(lambda module, args, output: args[0])
    try:
        return call_model(model, inputs)
    finally:
        handle.remove()


def _head_on(layer: nn.Module, features: Tensor, logits: Tensor) -> bool:
    """Whether the head on pooled features gives these logits."""
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    if not isinstance(weight, Tensor) or weight[0].numel() != features.shape[1]:
        return False
    made = nn.functional.linear(features, weight.flatten(1), bias)
    return made.shape == logits.shape and relative_error(made, logits) <= (
        1e-4 if logits.dtype == torch.float32 else 3e-2
    )


def relative_error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||, in float64.

    Example:
        >>> round(relative_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0])), 2)
        1.33
    """
    found, expected = found.detach().double(), expected.detach().double()
    return ((found - expected).norm() / expected.norm().clamp_min(1e-300)).item()


def to_model(inputs: Inputs, model: nn.Module) -> Inputs:
    """Inputs on the model's device, floating ones in the dtype of its weights."""
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    if like is None:
        return inputs
    if like.is_meta:
        raise HeadError(f"{type(model).__name__} is on the meta device: it has no weights. Load them first.")

    def moved(value: Tensor) -> Tensor:
        return value.to(like.device, like.dtype if value.is_floating_point() else None, non_blocking=True)

    return {name: moved(value) for name, value in inputs.items()} if isinstance(inputs, Mapping) else moved(inputs)


# --- streams ----------------------------------------------------------------------------------------------------------


def stream_features(
    model: nn.Module,
    data: Any,
    *,
    site: HeadSite | None = None,
    batch_size: int = 32,
    epoch: int = 0,
    precision: str = "fp32",
    speed: str = "auto",
    cache: FeatureCache | None = None,
    fingerprint: str | None = None,
    progress: bool | Progress = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Features and labels of `data`, batch by batch, in the order in which the batches come.

    Nothing is kept, so the memory does not depend on the number of examples; with a `cache`, what is there is
    memory-mapped shard by shard. The model is in evaluation mode during each batch only; its modes are put back before
    the batch is handed out. See `extract_features` for the arguments.

    Yields:
        `(features (B, d) float32, labels)`, on the CPU. For token tasks, a row is a token with a label (>= 0).

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(6, 2))
        >>> [f.shape for f, y in stream_features(model, (torch.zeros(5, 2, 3), torch.zeros(5)), batch_size=4)]
        [torch.Size([4, 6]), torch.Size([1, 6])]
    """
    if isinstance(data, FeatureSet):
        for rows in torch.arange(len(data)).split(batch_size):
            yield data.features[rows].float(), data.labels[rows]
        return
    request = _Request.of(model, data, site, batch_size, epoch, precision, speed, progress)
    parts = request.stream() if cache is None else request.stream_cached(cache.entry(request.key(fingerprint)))
    for part in parts:
        yield part.features, part.labels


@dataclass(frozen=True)
class _Request:
    """What is asked of `stream_features` and `extract_features`, checked."""

    model: nn.Module
    site: HeadSite
    batches: Any
    epoch: int
    precision: str
    speed: str
    progress: bool | Progress

    @classmethod
    def of(
        cls,
        model: nn.Module,
        data: Any,
        site: HeadSite | None,
        batch_size: int,
        epoch: int,
        precision: str,
        speed: str,
        progress: bool | Progress,
    ) -> _Request:
        if precision not in PRECISIONS:
            raise unknown_name("precision", precision, PRECISIONS)
        if speed not in SPEEDS:
            raise unknown_name("speed", speed, SPEEDS)
        model = unwrap(model)
        batches = as_batches(data, batch_size)
        return cls(model, site or find_head(model)[0], batches, epoch, precision, speed, progress)

    def key(self, fingerprint: str | None) -> str:
        return cache_key(
            self.model,
            self.site,
            self.batches,
            precision=self.precision,
            speed=self.speed,
            epoch=self.epoch,
            fingerprint=fingerprint,
        )

    def stream(self, skip: int = 0, row: int = 0, precision: str | None = None) -> Iterator[FeatureBatch]:
        """The batches from number `skip`, example `row`, on; in the precision that those before had."""
        return (part for _, part in self.numbered(skip, row, precision))

    def share(self, skip: int, row: int, precision: str | None) -> Iterator[tuple[int, FeatureBatch]]:
        """Of the same batches those of this process, with their numbers."""
        return self.numbered(skip, row, precision, every=process_count(), turn=process_index())

    def numbered(
        self, skip: int, row: int, precision: str | None, every: int = 1, turn: int = 0
    ) -> Iterator[tuple[int, FeatureBatch]]:
        """The batches `skip + turn`, `skip + turn + every`, ... with their numbers."""
        precision = precision or self.precision
        total = len(self.batches) if hasattr(self.batches, "__len__") else None
        run: Runner | None = None
        with _reporting(self.progress, total, skip) as report:
            for number, batch in _batches_from(self.batches, self.epoch, skip, every, turn):
                inputs, labels, index = split_batch(batch)
                if (number - skip) % every != turn:  # another process's, read because it could not be left out
                    row += len(labels)
                    continue
                inputs = to_model(inputs, self.model)
                if run is None:
                    run, precision = _choose_runner(self.model, self.site, inputs, precision, self.speed, total)
                index = torch.arange(row, row + len(labels)) if index is None else index
                yield number, _rows(run(inputs), labels, index, self.site, precision)
                row += len(labels)
                report(number + 1)

    def stream_cached(self, entry: CacheEntry) -> Iterator[FeatureBatch]:
        """What the entry holds, then the rest, which is written to it."""
        whole = entry.check()
        batches, examples, precision = 0, 0, self.precision
        for shard in entry.shards():
            yield shard
            batches, examples, precision = batches + shard.batches, examples + shard.examples, shard.precision
        if whole:
            return
        with entry.locked() as mine:
            writer = ShardWriter(entry, batches)
            for batch in self.stream(batches, examples, precision):
                if mine:
                    writer.add(batch)
                yield batch
            if mine:
                writer.finish()


def _batches_from(batches: Any, epoch: int, skip: int, every: int, turn: int) -> Iterator[tuple[int, Any]]:
    """The batches of an epoch from number `skip` on, numbered; what is not wanted is not read where the data allow."""
    if isinstance(batches, TensorPair):
        return enumerate(batches.from_batch(skip), start=skip)
    if hasattr(batches, "epoch"):
        return enumerate(batches_from(batches, epoch, skip, share=((skip + turn) % every, every)), start=skip)
    return enumerate(itertools.islice(iter(batches), skip, None), start=skip)


def _rows(features: Tensor, labels: Tensor, index: Tensor, site: HeadSite, precision: str) -> FeatureBatch:
    labels = labels.detach().cpu()
    index = index.cpu()
    features = features.detach()
    examples = len(labels)
    if features.ndim == 3:  # tokens: those with a label
        if labels.shape != features.shape[:2]:
            raise DataError(
                f"The head {site.path!r} makes logits for each of {features.shape[1]} tokens, but the labels have "
                f"shape {tuple(labels.shape)}. Give one label a token (-100 for none), or load a sequence classifier."
            )
        kept = labels >= 0
        index, features, labels = index.repeat_interleave(kept.sum(1)), features[kept.to(features.device)], labels[kept]
    if len(labels) != len(features):
        raise DataError(f"A batch has {len(features)} examples and {len(labels)} labels: give one label an example.")
    if not labels.is_floating_point():
        labels = labels.long()
    elif labels.ndim == 1:
        labels = labels[:, None]
    features = features.to("cpu", torch.float32)
    if not features.isfinite().all():
        row = int(index[(~features.isfinite()).any(1).nonzero()[0, 0]])
        raise DataError(
            f"The features of example {row} are not finite (NaN or infinity). Look at that input and at the weights; "
            "with precision='bf16' or half-precision weights try precision='fp32'."
        )
    return FeatureBatch(features, labels, index, examples=examples, precision=precision)


def _choose_runner(
    model: nn.Module, site: HeadSite, inputs: Inputs, precision: str, speed: str, batches: int | None
) -> tuple[Runner, str]:
    """How to run the model, and in which precision."""
    run = head_runner(model, site)
    if precision == "bf16" or (precision == "auto" and bf16_allowed(run, inputs)):
        return _under_bf16(run), "bf16"
    if speed == "auto" and isinstance(inputs, Tensor) and pays(model, inputs, batches):
        faster = accelerate(model, lambda network: head_runner(network, site), inputs, FAST_TOLERANCE, site.path)
        if faster is not None:
            return faster, "fp32"
    return run, "fp32"


def bf16_allowed(run: Runner, inputs: Inputs) -> bool:
    """Whether bfloat16 is fast on this device and leaves the features of these examples within 1 %."""
    device = _device_of(inputs)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return fast and relative_error(_under_bf16(run)(inputs), run(inputs)) <= BF16_TOLERANCE


def _under_bf16(run: Runner) -> Runner:
    def reduced(inputs: Inputs) -> Tensor:
        with torch.autocast(_device_of(inputs).type, torch.bfloat16):
            return run(inputs)

    return reduced


def _device_of(inputs: Inputs) -> torch.device:
    return next(iter(inputs.values())).device if isinstance(inputs, Mapping) else inputs.device


# --- the whole set ----------------------------------------------------------------------------------------------------


def extract_features(
    model: nn.Module,
    data: Any,
    *,
    site: HeadSite | None = None,
    num_classes: int | None = None,
    batch_size: int = 32,
    epoch: int = 0,
    precision: str = "fp32",
    speed: str = "auto",
    cache: FeatureCache | None = None,
    fingerprint: str | None = None,
    progress: bool | Progress = False,
    shared: bool = False,
) -> FeatureSet:
    """The features of `data`, exactly as the model's head receives them: feature times head gives the logits.

    The model runs in evaluation mode without gradients and is left as it was: modes, weights, memory format. Rows come
    back in the order of the data also where batches are sorted by length, as long as the batches say their `index`.

    Args:
        model: any model whose head `find_head` finds.
        data: a `FeatureSet` (returned as it is), a pair of tensors `(inputs, labels)`, or an iterable of batches
            `(inputs, labels, ...)` or mappings with ``"labels"``, such as a DataLoader.
        site: the head in question; the main one if None.
        num_classes: K; by default that of the attached head, otherwise the largest label plus one.
        batch_size: batch size for a pair of tensors; iterables bring their own.
        epoch: which epoch of data that have epochs: with augmentation, each is another view.
        precision: ``"fp32"``; ``"bf16"``; ``"auto"``: bf16 if the features of the first batch are then within 1 % of
            float32 ones (EfficientNet-Lite0's are 29 % off on small digits).
        speed: ``"auto"`` runs a faster copy of the network (float32, within 1e-4, checked on the first batch) where the
            data are enough to pay for making it; ``"plain"`` runs the model as it is.
        cache: where features are kept between runs; `FeatureSet.from_cache` says whether all were there. What an
            interrupted extraction has left there is not computed again.
        fingerprint: digest of the data, for iterables that do not bring one and are to be cached.
        progress: True for a progress bar with the time left, or a function called with (batches done, batches in all or
            None, seconds left or None).
        shared: the processes of a distributed run, all of which make this call, run the model over every n-th batch
            each, and all get all features. Only the first one uses the cache.

    Raises:
        HeadError: no head was found, or none that receives one feature vector an example.
        DataError: the data cannot be read, are empty, or features are not finite.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(6, 2))
        >>> extract_features(model, (torch.ones(5, 2, 3), torch.tensor([0, 1, 0, 1, 1]))).features.shape
        torch.Size([5, 6])
    """
    if isinstance(data, FeatureSet):
        return data
    request = _Request.of(model, data, site, batch_size, epoch, precision, speed, progress)
    key = "" if cache is None else request.key(fingerprint)
    entry = None if cache is None else cache.entry(key)
    if shared and process_count() > 1:
        parts, hit = extract_together(request.share, entry)
    else:
        hit = entry is not None and entry.check()
        parts = list(request.stream() if entry is None else request.stream_cached(entry))
    if not any(len(part.index) for part in parts):
        raise DataError("Cannot extract features: the data hold no example.")
    features, labels = _in_order(joined(parts))
    return FeatureSet(features, labels, num_classes or count_classes(request.model, labels), key, hit)


def _in_order(rows: FeatureBatch) -> tuple[Tensor, Tensor]:
    """Features and labels in the order of the examples."""
    if bool((rows.index[1:] >= rows.index[:-1]).all()):
        return rows.features, rows.labels
    order = rows.index.argsort(stable=True)
    return rows.features[order], rows.labels[order]


def count_classes(model: nn.Module, labels: Tensor) -> int:
    """K, from the attached head if there is one, from the labels otherwise."""
    if labels.is_floating_point():
        return labels.shape[1]
    found = int(labels.max()) + 1
    if not has_record(model):
        return found
    known = record_of(model).num_classes
    if found > known:
        raise DataError(
            f"Label {found - 1} is out of range: the head was attached for {known} classes, 0 to {known - 1}. "
            "Attach it with the right num_classes, or look at the labels."
        )
    return known


# --- progress ---------------------------------------------------------------------------------------------------------


@contextmanager
def _reporting(progress: bool | Progress, total: int | None, skipped: int) -> Iterator[Callable[[int], None]]:
    start = time.perf_counter()
    if callable(progress):

        def call(done: int) -> None:
            left = None if total is None else (time.perf_counter() - start) / (done - skipped) * (total - done)
            progress(done, total, left)

        yield call
    elif progress:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        with Bar(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as bar:
            task = bar.add_task("features", total=total, completed=skipped)
            yield lambda done: bar.update(task, completed=done)
    else:
        yield lambda done: None
