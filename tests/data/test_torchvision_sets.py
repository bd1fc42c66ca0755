from __future__ import annotations

import pickle
import shutil

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from headinit.data.catalog import load_data
from headinit.data.torchvision_sets import load_torchvision
from headinit.errors import DataError


class SmallFake(torchvision.datasets.FakeData):
    def __init__(self) -> None:
        super().__init__(size=20, image_size=(3, 8, 8), num_classes=3, random_offset=1)


class Flowers(torchvision.datasets.VisionDataset):
    """As Flowers102: three splits by name, paths and labels in private lists."""

    classes = ("daisy", "rose")

    def __init__(self, root, split="train", transform=None, target_transform=None, download=False):
        super().__init__(root)
        if split not in ("train", "val", "test"):
            raise ValueError(
                f"Unknown value '{split}' for argument split. Valid values are {{'train', 'val', 'test'}}."
            )
        self._image_files = sorted((self.root_path() / split).glob("*.png"))
        if not self._image_files:
            raise RuntimeError("Dataset not found or corrupted. You can use download=True to download it")
        self._labels = [int(path.stem[0]) for path in self._image_files]

    def root_path(self):
        from pathlib import Path

        return Path(self.root)

    def __len__(self):
        return len(self._image_files)

    def __getitem__(self, i):
        raise AssertionError("a picture was read through the data set although its path is known")


def make_cifar(folder, monkeypatch) -> None:
    """A CIFAR10 of 20 + 4 random pictures in the layout of the original, made on the fly."""
    base = folder / "cifar-10-batches-py"
    base.mkdir(parents=True)
    generator = np.random.default_rng(0)

    def write(name, count):
        data = generator.integers(0, 256, (count, 3072), dtype=np.uint8)
        (base / name).write_bytes(pickle.dumps({"data": data, "labels": [i % 4 for i in range(count)]}))

    for i in range(1, 6):
        write(f"data_batch_{i}", 4)
    write("test_batch", 4)
    names = ["plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *a: True)


def test_parts_by_train_flag(tmp_path, monkeypatch):
    make_cifar(tmp_path, monkeypatch)
    splits = load_data("torchvision", dataset="CIFAR10", root=str(tmp_path))
    assert splits.test is not None
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (16, 4, 4)
    assert splits.class_names[:2] == ("plane", "car")
    reference = torchvision.datasets.CIFAR10(str(tmp_path), train=False)
    assert np.array_equal(np.asarray(splits.test.items[3]), np.asarray(reference[3][0]))
    assert splits.test.labels.tolist() == [0, 1, 2, 3]
    shutil.rmtree(tmp_path)
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"Cannot load torchvision's CIFAR10 .*data\.download=true"):
        load_torchvision("CIFAR10", root=tmp_path)


def test_parts_by_split_name_and_paths_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "Flowers102", Flowers)
    for part in ("train", "val", "test"):
        (tmp_path / part).mkdir()
        for i in range(4):
            Image.new("RGB", (6, 6), (i, 0, 0)).save(tmp_path / part / f"{i % 2}{i}.png")
    splits = load_torchvision("Flowers102", root=tmp_path)
    assert splits.test is not None
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [4, 4, 4]
    assert splits.class_names == ("daisy", "rose")
    assert splits.train.labels.tolist() == [0, 0, 1, 1]
    (tmp_path / "val" / "00.png").write_bytes(b"")
    with pytest.raises(DataError, match="Cannot read 1 of 12"):
        load_torchvision("Flowers102", root=tmp_path)
    assert len(load_torchvision("Flowers102", root=tmp_path, skip_unreadable=True).validation) == 3


def test_data_without_splits_or_label_lists(monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "FakeData", SmallFake)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    splits = load_torchvision("FakeData", validation=0.25)
    assert torch.equal(torch.get_rng_state(), state)
    assert (len(splits.train), len(splits.validation), splits.test) == (15, 5, None)
    reference = SmallFake()
    labels = sorted(int(reference[i][1]) for i in range(20))
    assert sorted([*splits.train.labels.tolist(), *splits.validation.labels.tolist()]) == labels
    assert splits.class_names == ("0", "1", "2")


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(DataError, match="Did you mean 'Flowers102'"):
        load_torchvision("Flower102", root=tmp_path)
    with pytest.raises(DataError, match=r"needs data\.root"):
        load_torchvision("CIFAR10")
    with pytest.raises(DataError, match=r"needs data\.dataset"):
        load_torchvision()
    with pytest.raises(DataError, match="not a data set that loads by name"):
        load_torchvision("CocoDetection", root=tmp_path)
    with pytest.raises(DataError, match=r"Flowers102 from .*Put its files there"):
        load_torchvision("Flowers102", root=tmp_path)
