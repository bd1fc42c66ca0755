from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from headinit.data.catalog import load_data
from headinit.data.hub import load_hub
from headinit.data.images import ImagePreprocessing
from headinit.data.loading import Batches
from headinit.errors import DataError

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def pairs(count: int, hidden: bool = False):
    features = datasets.Features(
        sentence1=datasets.Value("string"),
        sentence2=datasets.Value("string"),
        label=datasets.ClassLabel(names=["yes", "no"]),
    )
    rows = {
        "sentence1": [f"first {i}" for i in range(count)],
        "sentence2": [f"second {i}" for i in range(count)],
        "label": [-1 if hidden else i % 2 for i in range(count)],
    }
    return datasets.Dataset.from_dict(rows, features=features)


def test_text_saved_to_disk_keeps_its_class_order_and_drops_hidden_tests(tmp_path):
    parts = {"train": pairs(10), "validation": pairs(4), "test": pairs(3, hidden=True)}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "rte"))
    splits = load_data("hub", path=str(tmp_path / "rte"))
    assert (splits.class_names, splits.modality, splits.test) == (("yes", "no"), "text", None)
    assert splits.train.items[1] == ("first 1", "second 1")
    assert splits.validation.labels.tolist() == [0, 1, 0, 1]
    with pytest.raises(DataError, match=r"No label .*3 of 3"):
        load_hub(str(tmp_path / "rte"), test_split="test")
    with pytest.raises(DataError, match=r"data\.train_split=trian: .* has the splits train, validation, test"):
        load_hub(str(tmp_path / "rte"), train_split="trian")
    with pytest.raises(DataError, match=r"data\.text=body.*sentence1, sentence2, label"):
        load_hub(str(tmp_path / "rte"), text="body")


def test_a_folder_of_json_files(tmp_path):
    (tmp_path / "films").mkdir()
    lines = [json.dumps({"text": f"film {i}", "label": ["good", "bad"][i % 2]}) for i in range(10)]
    (tmp_path / "films" / "train.jsonl").write_text("\n".join(lines))
    splits = load_data("hub", path=str(tmp_path / "films"), validation=0.4)
    assert splits.class_names == ("bad", "good")
    assert (len(splits.train), len(splits.validation)) == (6, 4)
    assert splits.train.items[0].startswith("film")


def test_pictures_are_read_when_they_are_needed(tmp_path):
    generator = np.random.default_rng(0)
    for name in ("ant", "bee"):
        (tmp_path / "bugs" / "train" / name).mkdir(parents=True)
        for i in range(5):
            Image.fromarray(generator.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(
                tmp_path / "bugs" / "train" / name / f"{i}.png"
            )
    splits = load_data("hub", path=str(tmp_path / "bugs"), per_class=2)
    assert (splits.modality, splits.class_names, len(splits.train)) == ("image", ("ant", "bee"), 4)
    batch = next(iter(Batches(splits.validation, ImagePreprocessing(size=(8, 8)), 2, workers=2)))
    assert batch.inputs.shape == (2, 3, 8, 8)
    assert load_data("hub", path=str(tmp_path / "bugs"), per_class=2).fingerprint == splits.fingerprint
    changed = Image.fromarray(generator.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    changed.save(tmp_path / "bugs" / "train" / "ant" / "0.png")
    assert load_data("hub", path=str(tmp_path / "bugs"), per_class=2).fingerprint != splits.fingerprint
    with pytest.raises(DataError, match="for text"):
        load_hub(str(tmp_path / "bugs"), task="regression")


def test_regression_and_validation_by_another_name(tmp_path):
    rows = {"text": ["a", "b", "c"], "score": [0.5, 1.5, 2.0]}
    parts = {"train": datasets.Dataset.from_dict(rows), "dev": datasets.Dataset.from_dict(rows)}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "sts"))
    splits = load_hub(str(tmp_path / "sts"), task="regression")
    torch.testing.assert_close(splits.validation.labels, torch.tensor([[0.5], [1.5], [2.0]]))


def test_what_cannot_be_had_says_what_was_tried(tmp_path):
    with pytest.raises(DataError, match=r"datasets\.load_dataset\('no-one/nothing', 'rte'\) said .*data\.path=FOLDER"):
        load_hub("no-one/nothing", config="rte")
    with pytest.raises(DataError, match=r"needs data\.path"):
        load_hub()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="Cannot load the data set"):
        load_hub(str(tmp_path / "empty"))


def test_code_of_a_data_set_is_not_run(tmp_path):
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(DataError):
        load_hub(str(tmp_path / "evil"))
    assert not (tmp_path / "ran").exists()
