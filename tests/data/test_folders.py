from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from headinit.data.catalog import load_data
from headinit.data.folders import load_imagefolder
from headinit.data.images import ImagePreprocessing
from headinit.data.loading import Batches
from headinit.errors import DataError


def fill(folder: Path, count: int, suffix: str = ".png", seed: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng([seed, *folder.name.encode()])
    for i in range(count):
        Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(folder / f"{i:03d}{suffix}")


@pytest.fixture
def pets(tmp_path) -> Path:
    for name in ("dog", "cat", "Eel"):
        fill(tmp_path / "pets" / name, 10)
    return tmp_path / "pets"


def test_classes_are_those_of_torchvision(pets):
    from torchvision.datasets import ImageFolder

    splits, reference = load_imagefolder(pets, validation=0.2), ImageFolder(str(pets))
    assert splits.class_names == tuple(reference.classes) == ("Eel", "cat", "dog")
    number = {Path(path): label for path, label in reference.samples}
    for split in (splits.train, splits.validation):
        assert [number[path] for path in split.items] == split.labels.tolist()
    assert (len(splits.train), len(splits.validation), splits.test) == (24, 6, None)
    assert (splits.name, splits.modality) == ("pets", "image")


def test_split_folders_are_found_and_classes_shared(tmp_path):
    for part, classes in {"train": "abc", "Valid": "ac", "test": "b"}.items():
        for name in classes:
            fill(tmp_path / part / name, 3, seed=len(part))
    splits = load_imagefolder(tmp_path)
    assert splits.class_names == ("a", "b", "c")
    assert splits.validation.labels.tolist() == [0, 0, 0, 2, 2, 2]
    assert splits.test is not None
    assert splits.test.labels.tolist() == [1, 1, 1]


def test_a_class_may_be_called_train(tmp_path):
    for name in ("train", "car"):
        fill(tmp_path / name, 4)
    assert load_imagefolder(tmp_path, validation=0.5).class_names == ("car", "train")


def test_another_domain_for_test_and_validation(pets, tmp_path):
    for name in ("cat", "dog"):
        fill(tmp_path / "sketches" / name, 2, seed=1)
    splits = load_imagefolder(pets, test_root=tmp_path / "sketches", validation_root=tmp_path / "sketches")
    assert (len(splits.train), len(splits.validation)) == (30, 4)
    assert splits.test is not None
    assert splits.test.labels.tolist() == [1, 1, 2, 2]
    fill(tmp_path / "sketches" / "emu", 1)
    with pytest.raises(DataError, match=r"'emu'.*unknown to"):
        load_imagefolder(pets, test_root=tmp_path / "sketches")


def test_what_is_no_picture_is_left_out_and_reported(pets, caplog):
    for name in ("Thumbs.db", ".hidden.jpg", "note.txt", "logo.gif"):
        (pets / "cat" / name).write_bytes(b"not a picture")
    (pets / ".git").mkdir()
    (pets / "LICENSE").write_text("free")
    with caplog.at_level(logging.WARNING):
        splits = load_imagefolder(pets)
    assert len(splits.train) + len(splits.validation) == 30
    assert "left out 4 entries" in caplog.text
    assert "Thumbs.db" in caplog.text


def break_pictures(pets: Path) -> None:
    content = (pets / "cat" / "000.png").read_bytes()
    (pets / "cat" / "000.png").write_bytes(content[: len(content) // 2])
    (pets / "dog" / "003.png").write_bytes(b"")


def test_unreadable_pictures_stop_or_are_dropped(pets, caplog):
    break_pictures(pets)
    with pytest.raises(DataError, match=r"Cannot read 2 of 30 pictures: .*skip_unreadable=true") as caught:
        load_imagefolder(pets)
    assert "000.png" in str(caught.value)
    assert "003.png (not a picture)" in str(caught.value)
    with caplog.at_level(logging.WARNING):
        splits = load_imagefolder(pets, skip_unreadable=True)
    assert len(splits.train) + len(splits.validation) == 28
    assert "Left out 2 of 30" in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_pictures_that_were_not_checked_stop_the_epoch(pets, workers):
    break_pictures(pets)
    splits = load_imagefolder(pets, check_pictures=False, validation=3)
    whole = Batches(splits.train, ImagePreprocessing(size=(8, 8)), 4, workers=workers)
    count = sum(path.name in ("000.png", "003.png") and path.parent.name != "Eel" for path in splits.train.items)
    broken = sum(str(path).endswith(("cat/000.png", "dog/003.png")) for path in splits.train.items)
    assert 1 <= broken <= count
    with pytest.raises(DataError, match=rf"Cannot read picture .*0[0-9]+\.png.*{broken} of 27 pictures"):
        list(whole)


def test_truncated_jpegs_are_found_up_front(pets):
    fill(pets / "cat", 2, ".jpg")
    big = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8))
    big.save(pets / "cat" / "big.jpg")
    content = (pets / "cat" / "big.jpg").read_bytes()
    load_imagefolder(pets)
    (pets / "cat" / "big.jpg").write_bytes(content[: int(len(content) * 0.95)])
    with pytest.raises(DataError, match=r"Cannot read 1 of 33 pictures: .*big\.jpg"):
        load_imagefolder(pets)


def test_a_class_whose_pictures_are_all_unreadable_is_named(pets):
    for path in (pets / "dog").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match="No readable training picture is left of 'dog'"):
        load_imagefolder(pets, skip_unreadable=True)


def test_bad_folders(pets, tmp_path):
    with pytest.raises(DataError, match=r"needs data\.root"):
        load_imagefolder()
    with pytest.raises(DataError, match="not there"):
        load_imagefolder(tmp_path / "absent")
    with pytest.raises(DataError, match="is a file"):
        load_imagefolder(pets / "cat" / "000.png")
    with pytest.raises(DataError, match="no class folders"):
        load_imagefolder(pets / "cat")
    with pytest.raises(DataError, match="one level too high"):
        load_imagefolder(tmp_path)
    (pets / "newt").mkdir()
    with pytest.raises(DataError, match=r"Class folder .*newt holds no picture"):
        load_imagefolder(pets)


def test_one_class_is_refused(tmp_path):
    fill(tmp_path / "cat", 5)
    with pytest.raises(DataError, match=r"all 5 training examples have one class \('cat'\)"):
        load_imagefolder(tmp_path)


@pytest.mark.parametrize("folders", [("val", "valid", "train"), ("val", "test")])
def test_split_folders_must_be_clear(tmp_path, folders):
    for part in folders:
        fill(tmp_path / part / "a", 1)
    with pytest.raises(DataError, match=r"several validation folders|no folder 'train'"):
        load_imagefolder(tmp_path)


def test_fingerprint_follows_content_and_names_only(pets, tmp_path):
    first = load_imagefolder(pets)
    moved = pets.rename(tmp_path / "elsewhere")
    assert load_imagefolder(moved).fingerprint == first.fingerprint
    content = (moved / "cat" / "001.png").read_bytes()
    (moved / "cat" / "001.png").write_bytes((moved / "cat" / "002.png").read_bytes())
    changed = load_imagefolder(moved).fingerprint
    (moved / "cat" / "001.png").write_bytes(content)
    (moved / "cat" / "001.png").rename(moved / "cat" / "renamed.png")
    renamed = load_imagefolder(moved).fingerprint
    assert len({first.fingerprint, changed, renamed}) == 3


def test_identical_pictures_in_train_and_test_are_reported(pets, caplog):
    with caplog.at_level(logging.WARNING):
        load_imagefolder(pets, test_root=pets)
    assert "30 of 30 test examples are identical to a training example" in caplog.text


def test_real_hymenoptera(shared_data):
    splits = load_data("imagefolder", root=shared_data / "hymenoptera")
    assert (len(splits.train), len(splits.validation), splits.class_names) == (244, 153, ("ants", "bees"))
    assert splits.name == "hymenoptera"
    batch = next(iter(Batches(splits.validation, ImagePreprocessing(size=(64, 64), resize=72), 8)))
    assert batch.inputs.shape == (8, 3, 64, 64)
    assert torch.isfinite(batch.inputs).all()


def test_real_eurosat_and_office(shared_data):
    eurosat = load_data("imagefolder", root=shared_data / "eurosat_mini", per_class=10)
    assert (len(eurosat.train), len(eurosat.validation), len(eurosat.class_names)) == (100, 500, 10)
    office = shared_data / "office_caltech10"
    domains = load_data("imagefolder", root=office / "dslr", test_root=office / "webcam", check_pictures=False)
    assert (len(domains.train) + len(domains.validation), len(domains.test or ())) == (157, 295)
