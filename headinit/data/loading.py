"""Batches: which examples come together, in which order, decoded ahead; any epoch can be replayed bit for bit."""

from __future__ import annotations

import inspect
import itertools
import logging
import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headinit.data.augmentation import AUGMENTATIONS
from headinit.data.images import ImagePreprocessing
from headinit.data.splits import Split
from headinit.data.text import IGNORED_LABEL, EncodedTexts, TextPreprocessing
from headinit.errors import DataError, unknown_name
from headinit.seeding import derived_seed, generator_for

logger = logging.getLogger(__name__)

CACHE_BYTES = 2 << 30  # the most that `cache_decoded` may hold in memory
_BUCKET_BATCHES = 50  # texts of similar length are sought among this many batches


class Batch(NamedTuple):
    """Examples that go through the model together.

    Attributes:
        inputs: pictures `(B, 3, H, W)` float32; or the tensors `(B, L)` int64 of tokenised text by name.
        labels: `(B,)` int64; `(B, K)` float32; of words `(B, L)` int64, a label for each token, -100 for none.
        index: `(B,)` int64: which examples of the split they are.
    """

    inputs: Any
    labels: Tensor
    index: Tensor  # type: ignore[assignment]  # hides the method tuple.index, which nobody needs here


class Batches:
    """The batches of a split, epoch by epoch.

    The order and the augmentation depend on `shuffle_seed`, the epoch and the example alone: neither on `workers` nor
    on whatever else drew random numbers.

    Args:
        split: the examples.
        preprocessing: the backbone's own, `ImagePreprocessing` or `TextPreprocessing`.
        batch_size: examples in a batch; the last batch may be smaller.
        shuffle_seed: another order in every epoch; None keeps the order of the split.
        augmentation: none, crop, basic or trivial_augment, for pictures.
        bucket: put texts of similar length together, so that less is padded.
        workers: threads that decode pictures ahead; 0 decodes when a batch is asked for.
        cache_decoded: keep decoded pictures (before normalisation) in memory, up to 2 GiB, where nothing is augmented.
        drop_last: leave out a last batch that is not full.

    Raises:
        DataError: the examples do not suit the preprocessing; a picture cannot be decoded (when it is reached).

    Example:
        >>> import numpy as np
        >>> pictures = [np.full((8, 8), i, dtype=np.uint8) for i in range(5)]
        >>> split = Split(pictures, torch.arange(5), [str(i) for i in range(5)], "")
        >>> batches = Batches(split, ImagePreprocessing(size=(4, 4)), batch_size=2, shuffle_seed=0)
        >>> len(batches), [tuple(batch.inputs.shape) for batch in batches.epoch(3)]
        (3, [(2, 3, 4, 4), (2, 3, 4, 4), (1, 3, 4, 4)])
    """

    def __init__(
        self,
        split: Split,
        preprocessing: ImagePreprocessing | TextPreprocessing,
        batch_size: int,
        *,
        shuffle_seed: int | None = None,
        augmentation: str = "none",
        bucket: bool = False,
        workers: int = 0,
        cache_decoded: bool = False,
        drop_last: bool = False,
    ) -> None:
        _check(split, preprocessing, batch_size, augmentation, bucket, workers, drop_last)
        self.split, self.preprocessing, self.batch_size = split, preprocessing, batch_size
        self.shuffle_seed, self.augmentation, self.bucket = shuffle_seed, augmentation, bucket
        self.workers, self.drop_last = workers, drop_last
        self._reads = True
        self._cache = self._new_cache() if cache_decoded and preprocessing.modality == "image" else None

    def __len__(self) -> int:
        """Batches of an epoch."""
        return _batch_count(len(self.split), self.batch_size, self.drop_last)

    def __iter__(self) -> Iterator[Batch]:
        return self.epoch(0)

    def epoch(self, epoch: int, start: int = 0, share: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
        """The batches of one epoch, from batch `start` on.

        Args:
            epoch, start: numbers from 0 on.
            share: ``(rank, processes)``: only the pictures of every `processes`-th batch from batch `rank` on are read;
                the other batches hold zeros of their shape, which take no memory, beside their labels.
        """
        order, (rank, processes) = self.order(epoch), share
        if isinstance(self.preprocessing, TextPreprocessing):
            for index in order[start:]:
                yield Batch(self.preprocessing.pad(self._encoded, index), self._labels(index), index)
            return
        chosen = [(index, self._reads and number % processes == rank) for number, index in enumerate(order)][start:]
        pixels = self._decoded([index for index, read in chosen if read], epoch)
        for index, read in chosen:
            if read:
                inputs = self.preprocessing.normalise(next(pixels))
            else:
                inputs = torch.zeros(()).expand(len(index), 3, *self.preprocessing.size)
            yield Batch(inputs, self.split.labels[index], index)

    @contextmanager
    def unread(self) -> Iterator[None]:
        """Within the block pictures are not read: batches hold zeros of their shape, which take no memory."""
        self._reads = False
        try:
            yield
        finally:
            self._reads = True

    def order(self, epoch: int) -> list[Tensor]:
        """Which examples make up each batch of an epoch: `(B,)` int64 each, every example once."""
        total = len(self.split)
        if self.bucket:
            return _bucketed(self._encoded.lengths, self.batch_size, self.shuffle_seed, epoch, self.drop_last)
        return _cut(_permutation(total, self.shuffle_seed, epoch), self.batch_size, self.drop_last)

    def labelled_tokens(self) -> Tensor:
        """How many tokens of each example have a label, for examples that are words: `(N,)` int64."""
        return torch.cat([(self._labels(torch.tensor([i])) != IGNORED_LABEL).sum(1) for i in range(len(self.split))])

    def _labels(self, index: Tensor) -> Tensor:
        if self._encoded.words is None:
            return self.split.labels[index]
        assert isinstance(self.preprocessing, TextPreprocessing)
        return self.preprocessing.align(self._encoded, self.split.labels, index)

    @cached_property
    def _encoded(self) -> EncodedTexts:
        assert isinstance(self.preprocessing, TextPreprocessing)
        encoded = self.preprocessing.encode(self.split.items)
        if encoded.words is not None:
            _report_cut(encoded.words, self.split.items, self.preprocessing.max_length)
        return encoded

    def _decoded(self, chosen: Sequence[Tensor], epoch: int) -> Iterator[Tensor]:
        """The pictures of these batches, `(B, 3, H, W)` uint8 each."""
        if self.workers == 0:
            for index in chosen:
                yield torch.stack([self._pixels(i, epoch) for i in index.tolist()])
            return
        ahead = 1 + math.ceil(2 * self.workers / self.batch_size)
        waiting: deque[list[Future[Tensor]]] = deque()
        pool = ThreadPoolExecutor(max_workers=self.workers)
        try:
            for index in chosen:
                waiting.append([pool.submit(self._pixels, i, epoch) for i in index.tolist()])
                if len(waiting) > ahead:
                    yield torch.stack([future.result() for future in waiting.popleft()])
            while waiting:
                yield torch.stack([future.result() for future in waiting.popleft()])
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _pixels(self, i: int, epoch: int) -> Tensor:
        """One picture, `(3, H, W)` uint8."""
        assert isinstance(self.preprocessing, ImagePreprocessing)
        if self._cache is not None and self._cache[i] is not None:
            return self._cache[i]
        try:
            if self.augmentation == "none":
                pixels = self.preprocessing.pixels(self.split.items[i])
            else:
                seed = derived_seed(self.shuffle_seed or 0, f"augmentation/epoch {epoch}/example {i}")
                pixels = self.preprocessing.augmented_pixels(self.split.items[i], self.augmentation, seed)
        except Exception as error:  # a foreign decoder may raise anything
            raise self._unreadable(i, error) from error
        if self._cache is not None:
            self._cache[i] = pixels
        return pixels

    def _unreadable(self, i: int, error: Exception) -> DataError:
        from headinit.data.picture_checks import unreadable_pictures

        count = len(unreadable_pictures(self.split))
        what = str(error) if isinstance(error, DataError) else f"Cannot read picture {self.split.names[i]}: {error}."
        return DataError(
            f"{what} {count} of {len(self.split)} pictures of this split cannot be read. "
            "Repair or delete them, or leave them out with data.skip_unreadable=true."
        )

    def _new_cache(self) -> list[Any] | None:
        assert isinstance(self.preprocessing, ImagePreprocessing)
        if self.augmentation != "none":
            raise DataError(
                f"cache_decoded keeps what never changes: it cannot go with augmentation={self.augmentation}."
            )
        height, width = self.preprocessing.size
        needed = len(self.split) * 3 * height * width
        if needed > CACHE_BYTES:
            logger.info("Decoded pictures are not kept: they need %.1f GiB, more than 2.", needed / 2**30)
            return None
        return [None] * len(self.split)


def batches_from(data: Any, epoch: int, start: int, share: tuple[int, int]) -> Iterator[Any]:
    """The batches of an epoch from number `start` on, by whatever part of `Batches.epoch` the data know.

    Example:
        >>> batches = TensorBatches(torch.eye(3), torch.arange(3), batch_size=1)
        >>> [batch.labels.item() for batch in batches_from(batches, 0, 1, share=(0, 1))]
        [1, 2]
    """
    known = inspect.signature(data.epoch).parameters
    if "start" not in known:
        return itertools.islice(data.epoch(epoch), start, None)
    return data.epoch(epoch, start=start, **({"share": share} if "share" in known else {}))


class CycledBatches:
    """Batches whose epoch is a number of batches, not a pass: the passes go on where the last epoch left off.

    Args:
        batches: `Batches` or `TensorBatches`.
        length: batches in an epoch.

    Example:
        >>> cycled = CycledBatches(TensorBatches(torch.eye(3), torch.arange(3), batch_size=2), length=3)
        >>> [[batch.labels.tolist() for batch in cycled.epoch(e)] for e in range(2)]
        [[[0, 1], [2], [0, 1]], [[2], [0, 1], [2]]]
    """

    def __init__(self, batches: Any, length: int) -> None:
        if length < 1:
            raise DataError(f"An epoch must have at least 1 batch, got {length}.")
        self._batches, self._length = batches, length

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._batches, name)  # split, batch_size, ...: what tells these batches from others

    def __len__(self) -> int:
        """Batches of an epoch."""
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        return self.epoch(0)

    def epoch(self, epoch: int, start: int = 0, share: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
        """The batches of one epoch, from batch `start` on (those before are not read); `share` as for `Batches`."""
        number, (rank, processes) = start, share
        while number < self._length:
            a_pass, offset = divmod(epoch * self._length + number, len(self._batches))
            # A pass counts its batches from its own beginning.
            for batch in batches_from(self._batches, a_pass, offset, ((rank + offset - number) % processes, processes)):
                yield batch
                number += 1
                if number == self._length:
                    return


class TensorBatches:
    """The batches of features (or any inputs) that are in memory, by the same protocol as `Batches`.

    Args:
        features: `(N, ...)`, or several such tensors by name.
        labels: `(N,)` or `(N, K)`.
        batch_size: examples in a batch.
        shuffle_seed: another order in every epoch (the order that `Batches` has); None keeps the order.
        drop_last: leave out a last batch that is not full.

    Raises:
        DataError: features and labels differ in number.

    Example:
        >>> batches = TensorBatches(torch.eye(3), torch.arange(3), batch_size=2)
        >>> [batch.labels.tolist() for batch in batches]
        [[0, 1], [2]]
    """

    def __init__(
        self,
        features: Tensor | dict[str, Tensor],
        labels: Tensor,
        batch_size: int,
        *,
        shuffle_seed: int | None = None,
        drop_last: bool = False,
    ) -> None:
        counts = {len(v) for v in features.values()} if isinstance(features, dict) else {len(features)}
        if counts != {len(labels)} or len(labels) == 0:
            raise DataError(
                f"Features and labels must have one length above 0: found {sorted(counts)} and {len(labels)}."
            )
        _check_batch_size(batch_size, len(labels), drop_last)
        self.features, self.labels, self.batch_size = features, labels, batch_size
        self.shuffle_seed, self.drop_last = shuffle_seed, drop_last

    def __len__(self) -> int:
        """Batches of an epoch."""
        return _batch_count(len(self.labels), self.batch_size, self.drop_last)

    def __iter__(self) -> Iterator[Batch]:
        return self.epoch(0)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, from batch `start` on."""
        for index in self.order(epoch)[start:]:
            if isinstance(self.features, dict):
                inputs: Any = {name: tensor[index] for name, tensor in self.features.items()}
            else:
                inputs = self.features[index]
            yield Batch(inputs, self.labels[index], index)

    def order(self, epoch: int) -> list[Tensor]:
        """Which examples make up each batch of an epoch: `(B,)` int64 each."""
        return _cut(_permutation(len(self.labels), self.shuffle_seed, epoch), self.batch_size, self.drop_last)


class TokenBatches(TensorBatches):
    """The features of labelled tokens in memory, sentence by sentence, by the same protocol.

    Args:
        features: `(R, d)`, a row for each labelled token, in the order of the sentences.
        labels: `(R,)` int64.
        lengths: `(N,)` how many rows belong to each sentence.
        batch_size, shuffle_seed, drop_last: of sentences, as in `TensorBatches`.

    Raises:
        DataError: the lengths do not add up to the rows.

    Example:
        >>> batches = TokenBatches(torch.eye(3), torch.tensor([5, 6, 7]), torch.tensor([1, 2]), batch_size=2)
        >>> [batch.labels.tolist() for batch in batches]
        [[[5, -100], [6, 7]]]
    """

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        lengths: Tensor,
        batch_size: int,
        *,
        shuffle_seed: int | None = None,
        drop_last: bool = False,
    ) -> None:
        super().__init__(features, labels, batch_size, shuffle_seed=shuffle_seed, drop_last=drop_last)
        if int(lengths.sum()) != len(labels):
            raise DataError(f"The sentences have {int(lengths.sum())} labelled tokens, and there are {len(labels)}.")
        self.lengths = lengths
        self._parts, self._labels = features.split(lengths.tolist()), labels.split(lengths.tolist())

    def __len__(self) -> int:
        """Batches of an epoch."""
        return _batch_count(len(self.lengths), self.batch_size, self.drop_last)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, from batch `start` on: features `(B, T, d)`, labels `(B, T)` with -100 for none."""
        for index in self.order(epoch)[start:]:
            chosen = index.tolist()
            yield Batch(
                torch.nn.utils.rnn.pad_sequence([self._parts[i] for i in chosen], batch_first=True),
                torch.nn.utils.rnn.pad_sequence(
                    [self._labels[i] for i in chosen], batch_first=True, padding_value=IGNORED_LABEL
                ),
                index,
            )

    def order(self, epoch: int) -> list[Tensor]:
        """Which sentences make up each batch of an epoch: `(B,)` int64 each."""
        return _cut(_permutation(len(self.lengths), self.shuffle_seed, epoch), self.batch_size, self.drop_last)


def _report_cut(words: Sequence[Sequence[int | None]], items: Sequence[Any], max_length: int) -> None:
    """Words without a token are neither learnt nor scored: say how many."""
    lost = sum(
        len(item) - len({word for word in own if word is not None}) for own, item in zip(words, items, strict=True)
    )
    if lost:
        logger.warning(
            "%d of %d words have no token (sentences are cut at %d tokens) and are neither learnt nor scored: raise "
            "model.max_length.",
            lost,
            sum(map(len, items)),
            max_length,
        )


def _permutation(total: int, shuffle_seed: int | None, epoch: int) -> Tensor:
    if shuffle_seed is None:
        return torch.arange(total)
    return torch.randperm(total, generator=generator_for(shuffle_seed, f"order/epoch {epoch}"))


def _cut(order: Tensor, batch_size: int, drop_last: bool) -> list[Tensor]:
    batches = list(order.split(batch_size))
    return batches[:-1] if drop_last and len(batches[-1]) < batch_size else batches


def _bucketed(lengths: Tensor, batch_size: int, shuffle_seed: int | None, epoch: int, drop_last: bool) -> list[Tensor]:
    """Batches of similar length: sorted inside pools of shuffled examples, the batches shuffled in turn."""
    order = _permutation(len(lengths), shuffle_seed, epoch)
    pool = len(lengths) if shuffle_seed is None else batch_size * _BUCKET_BATCHES
    batches: list[Tensor] = []
    for part in order.split(pool):
        ordered = part[lengths[part].argsort(descending=True, stable=True)]
        batches += _cut(ordered, batch_size, drop_last)
    if shuffle_seed is None:
        return batches
    generator = generator_for(shuffle_seed, f"order of buckets/epoch {epoch}")
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def _batch_count(total: int, batch_size: int, drop_last: bool) -> int:
    return total // batch_size if drop_last else -(-total // batch_size)


def _check(
    split: Split, preprocessing: Any, batch_size: int, augmentation: str, bucket: bool, workers: int, drop_last: bool
) -> None:
    if len(split) == 0:
        raise DataError("Cannot make batches of a split without examples.")
    _check_batch_size(batch_size, len(split), drop_last)
    if augmentation not in AUGMENTATIONS:
        raise unknown_name("augmentation", augmentation, AUGMENTATIONS, DataError)
    if workers < 0:
        raise DataError(f"workers must be 0 or more, got {workers}.")
    first = split.items[0]
    found = "text" if isinstance(first, (str, tuple)) else "image"
    if found != preprocessing.modality:
        raise DataError(
            f"This model reads {preprocessing.modality} and the examples are {found} ({split.names[0]}): choose "
            + ("a model for pictures (model=resnet50) or data of text (data=csv)." if found == "image" else
               "a model for text (model=bert) or data of pictures (data=imagefolder).")
        )  # fmt: skip
    if found == "text" and augmentation != "none":
        raise DataError(f"augmentation={augmentation} is for pictures, and the examples are text: set it to none.")
    if found == "image" and bucket:
        raise DataError("bucket=True groups texts by length, and the examples are pictures: set it to False.")


def _check_batch_size(batch_size: int, total: int, drop_last: bool) -> None:
    if batch_size < 1:
        raise DataError(f"batch_size must be at least 1, got {batch_size}.")
    if drop_last and batch_size > total:
        raise DataError(f"drop_last leaves no batch: batch_size={batch_size} exceeds the {total} examples.")
