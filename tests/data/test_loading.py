from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image

from headinit.data import loading
from headinit.data.images import ImagePreprocessing
from headinit.data.loading import Batch, Batches, CycledBatches, TensorBatches
from headinit.data.splits import Split
from headinit.data.text import TextPreprocessing
from headinit.errors import DataError
from tests.data.test_text import make_tokenizer

PREPROCESSING = ImagePreprocessing(size=(8, 8), resize=10)


def pictures(count: int) -> Split:
    generator = np.random.default_rng(0)
    items = [generator.integers(0, 256, (14, 12, 3), dtype=np.uint8) for _ in range(count)]
    return Split(items, torch.arange(count) % 3, [f"picture {i}" for i in range(count)], "f")


def texts(count: int) -> Split:
    generator = random.Random(0)
    items = [" ".join(generator.choices("abcdefgh", k=generator.randint(1, 25))) for _ in range(count)]
    return Split(items, torch.arange(count) % 2, [f"line {i}" for i in range(count)], "f")


def same(a: Batch, b: Batch) -> bool:
    inputs = [(a.inputs[k], b.inputs[k]) for k in a.inputs] if isinstance(a.inputs, dict) else [(a.inputs, b.inputs)]
    return all(torch.equal(x, y) for x, y in [*inputs, (a.labels, b.labels), (a.index, b.index)])


@pytest.mark.parametrize("total", [1, 7, 8, 23])
@pytest.mark.parametrize("batch_size", [1, 4, 50])
@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("kind", ["pictures", "texts", "buckets", "tensors"])
def test_every_example_once_an_epoch(total, batch_size, seed, kind):
    split = pictures(total) if kind == "pictures" else texts(total)
    if kind == "tensors":
        batches = TensorBatches(torch.arange(total) * 2, split.labels, batch_size, shuffle_seed=seed)
    else:
        preprocessing = PREPROCESSING if kind == "pictures" else TextPreprocessing(make_tokenizer(), 32)
        batches = Batches(split, preprocessing, batch_size, shuffle_seed=seed, bucket=kind == "buckets")
    for epoch in (0, 1):
        found = list(batches.epoch(epoch))
        assert len(found) == len(batches) == -(-total // batch_size)
        assert sorted(torch.cat([b.index for b in found]).tolist()) == list(range(total))
        for batch in found:
            assert torch.equal(batch.labels, split.labels[batch.index])


def test_pictures_are_the_preprocessed_ones():
    split = pictures(5)
    for batch in Batches(split, PREPROCESSING, 2, shuffle_seed=1):
        expected = torch.stack([PREPROCESSING(split.items[i]) for i in batch.index])
        assert torch.equal(batch.inputs, expected)


@pytest.mark.parametrize("augmentation", ["none", "basic", "trivial_augment"])
@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(augmentation, workers):
    options = {"shuffle_seed": 5, "augmentation": augmentation}
    alone = Batches(pictures(17), PREPROCESSING, 4, **options)
    helped = Batches(pictures(17), PREPROCESSING, 4, workers=workers, **options)
    for epoch in (0, 2):
        assert all(same(a, b) for a, b in zip(alone.epoch(epoch), helped.epoch(epoch), strict=True))


@pytest.mark.parametrize("kind", ["pictures", "texts"])
def test_epochs_differ_and_can_be_replayed_from_any_batch(kind):
    preprocessing = PREPROCESSING if kind == "pictures" else TextPreprocessing(make_tokenizer(), 32)
    split = pictures(20) if kind == "pictures" else texts(20)
    options = {"augmentation": "basic"} if kind == "pictures" else {"bucket": True}
    batches = Batches(split, preprocessing, 4, shuffle_seed=0, **options)
    torch.manual_seed(0)
    state, python_state = torch.get_rng_state(), random.getstate()
    second = list(batches.epoch(2))
    list(batches.epoch(0))
    random.random()
    torch.rand(3)
    again = list(Batches(split, preprocessing, 4, shuffle_seed=0, **options).epoch(2, start=3))
    assert all(same(a, b) for a, b in zip(second[3:], again, strict=True))
    random.setstate(python_state)
    torch.set_rng_state(state)
    list(batches.epoch(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python_state
    orders = {tuple(torch.cat(batches.order(epoch)).tolist()) for epoch in range(4)}
    assert len(orders) == 4
    other = Batches(split, preprocessing, 4, shuffle_seed=1, **options)
    assert tuple(torch.cat(other.order(0)).tolist()) not in orders


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("length", [None, 4, 7])
def test_a_process_reads_its_own_batches_only(processes, workers, length, monkeypatch):
    """In every epoch and from any start, also where an epoch ends in the middle of a pass."""
    decoded = []
    plain = ImagePreprocessing.augmented_pixels
    monkeypatch.setattr(
        ImagePreprocessing, "augmented_pixels", lambda self, item, *rest: decoded.append(1) or plain(self, item, *rest)
    )
    batches = Batches(pictures(18), PREPROCESSING, 4, shuffle_seed=0, augmentation="basic", workers=workers)
    batches = batches if length is None else CycledBatches(batches, length)
    for epoch, start in ((0, 0), (1, 0), (2, 2 * processes // 3)):
        whole = list(batches.epoch(epoch, start))
        for rank in range(processes):
            decoded.clear()
            found = list(batches.epoch(epoch, start, share=(rank, processes)))
            assert [b.index.tolist() for b in found] == [b.index.tolist() for b in whole]
            own = [number % processes == rank for number in range(start, len(batches))]
            for batch, expected, read in zip(found, whole, own, strict=True):
                assert torch.equal(batch.labels, expected.labels)
                assert torch.equal(batch.inputs, expected.inputs if read else torch.zeros_like(expected.inputs))
            if workers == 0 or length is None:  # workers read ahead of an epoch that ends in the middle of a pass
                assert len(decoded) == sum(len(b.index) for b, read in zip(whole, own, strict=True) if read)


def test_augmentation_depends_on_epoch_and_example_only():
    split = pictures(6)
    one = Batches(split, PREPROCESSING, 1, shuffle_seed=4, augmentation="basic")
    six = Batches(split, PREPROCESSING, 6, shuffle_seed=4, augmentation="basic")
    singles = {int(b.index): b.inputs[0] for b in one.epoch(1)}
    whole = next(six.epoch(1))
    assert all(torch.equal(whole.inputs[row], singles[int(i)]) for row, i in enumerate(whole.index))
    other_epoch = {int(b.index): b.inputs[0] for b in one.epoch(2)}
    assert not any(torch.equal(singles[i], other_epoch[i]) for i in singles)


def test_buckets_save_padding():
    split, preprocessing = texts(400), TextPreprocessing(make_tokenizer(), 32)
    tokens = {}
    for bucket in (False, True):
        batches = Batches(split, preprocessing, 8, shuffle_seed=0, bucket=bucket)
        tokens[bucket] = sum(batch.inputs["input_ids"].numel() for batch in batches)
    needed = int(preprocessing.lengths(split.items).sum())
    assert tokens[True] < 1.1 * needed < tokens[False]
    widths = [b.inputs["input_ids"].shape[1] for b in Batches(split, preprocessing, 8, shuffle_seed=0, bucket=True)]
    assert widths != sorted(widths, reverse=True)


def test_kept_pictures_are_decoded_once(monkeypatch):
    calls = []
    original = ImagePreprocessing.pixels
    monkeypatch.setattr(ImagePreprocessing, "pixels", lambda self, picture: calls.append(1) or original(self, picture))
    split = pictures(9)
    kept = Batches(split, PREPROCESSING, 4, shuffle_seed=0, cache_decoded=True, workers=2)
    found = [list(kept.epoch(e)) for e in range(3)]
    assert len(calls) == 9
    fresh = Batches(split, PREPROCESSING, 4, shuffle_seed=0)
    for epoch, batches in enumerate(found):
        assert all(same(a, b) for a, b in zip(batches, fresh.epoch(epoch), strict=True))
    monkeypatch.setattr(loading, "CACHE_BYTES", 9 * 3 * 8 * 8 - 1)
    calls.clear()
    crowded = Batches(split, PREPROCESSING, 4, cache_decoded=True)
    list(crowded.epoch(0)), list(crowded.epoch(1))
    assert len(calls) == 18
    with pytest.raises(DataError, match="augmentation=basic"):
        Batches(split, PREPROCESSING, 4, cache_decoded=True, augmentation="basic")


def test_drop_last():
    for batches in (
        Batches(pictures(10), PREPROCESSING, 4, shuffle_seed=0, drop_last=True),
        Batches(texts(10), TextPreprocessing(make_tokenizer(), 32), 4, shuffle_seed=0, bucket=True, drop_last=True),
        TensorBatches(torch.rand(10, 2), torch.arange(10), 4, drop_last=True),
    ):
        assert [len(b.labels) for b in batches] == [4, 4]
        assert len(batches) == 2


def test_leaving_an_epoch_early_leaves_no_thread():
    import threading

    before = threading.active_count()
    epoch = Batches(pictures(40), PREPROCESSING, 2, workers=3).epoch(0)
    next(epoch)
    epoch.close()
    assert threading.active_count() == before


def test_paths_arrays_and_pil_pictures_give_the_same(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (14, 12, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    split = Split([array, Image.fromarray(array), tmp_path / "a.png"], torch.arange(3), ["a", "b", "c"], "")
    inputs = next(iter(Batches(split, PREPROCESSING, 3))).inputs
    assert torch.equal(inputs[0], inputs[1])
    assert torch.equal(inputs[0], inputs[2])


def test_tensor_batches_of_named_inputs_and_the_order_of_batches():
    inputs = {"input_ids": torch.arange(12).view(6, 2), "attention_mask": torch.ones(6, 2)}
    named = TensorBatches(inputs, torch.arange(6), 4, shuffle_seed=7)
    order = [batch.index.tolist() for batch in Batches(pictures(6), PREPROCESSING, 4, shuffle_seed=7)]
    for batch, index in zip(named, order, strict=True):
        assert batch.index.tolist() == index
        assert torch.equal(batch.inputs["input_ids"], inputs["input_ids"][index])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Batches(pictures(3), TextPreprocessing(make_tokenizer(), 8), 2), r"model=resnet50.*data=csv"),
        (lambda: Batches(texts(3), PREPROCESSING, 2), r"model=bert.*data=imagefolder"),
        (lambda: Batches(pictures(3), PREPROCESSING, 0), "batch_size"),
        (lambda: Batches(pictures(3), PREPROCESSING, 2, augmentation="mixup"), "Known: basic"),
        (lambda: Batches(pictures(3), PREPROCESSING, 2, bucket=True), "groups texts"),
        (lambda: Batches(pictures(3), PREPROCESSING, 2, workers=-1), "workers"),
        (lambda: Batches(pictures(3), PREPROCESSING, 4, drop_last=True), "no batch"),
        (lambda: Batches(pictures(3).select([]), PREPROCESSING, 4), "without examples"),
        (
            lambda: Batches(texts(3), TextPreprocessing(make_tokenizer(), 8), 2, augmentation="basic"),
            "augmentation=basic is for pictures",
        ),
        (lambda: TensorBatches(torch.rand(3, 2), torch.arange(4), 2), "one length"),
        (lambda: TensorBatches(torch.rand(0, 2), torch.arange(0), 2), "above 0"),
    ],
)
def test_mismatches_are_refused(make, message):
    with pytest.raises(DataError, match=message):
        make()
