from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from headinit.data.augmentation import AUGMENTATIONS
from headinit.data.catalog import LOADERS, known_options, load_data
from headinit.errors import DataError

CONF = Path(__file__).resolve().parents[2] / "conf" / "data"
COMMON = {"name", "modality", "validation", "per_class", "train_size", "augmentation", "split_seed", "join_validation"}
FILES = sorted(path.stem for path in CONF.glob("*.yaml"))


def read(name: str) -> dict:
    return yaml.safe_load((CONF / f"{name}.yaml").read_text(encoding="utf-8"))


def test_every_data_set_has_its_settings():
    assert set(LOADERS) <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_settings_and_options_are_in_step(name):
    settings = read(name)
    options = known_options(settings["name"])
    built_in = name in ("digits", "pydocs")  # they have a test split
    assert set(settings) == COMMON | set(options) | (set() if built_in else {"test"})
    assert settings["modality"] in ("image", "text", "auto")
    assert settings["augmentation"] == AUGMENTATIONS[0]
    if settings["name"] == name:
        assert {key: settings[key] for key in options} == options
        assert settings["validation"] == 0.2
    lines = (CONF / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ")


def test_trec_settings_read_real_trec(shared_data):
    settings = {key: value for key, value in read("trec").items() if key not in COMMON | {"test"}}
    splits = load_data("csv", **{**settings, "root": shared_data / "trec"}, train_size=0.1)
    assert (len(splits.train), len(splits.validation), len(splits.test or ())) == (436, 1090, 500)


def test_unknown_names_list_the_near_ones():
    with pytest.raises(DataError, match=r"Unknown data set 'imagefolders'\. Did you mean 'imagefolder'"):
        load_data("imagefolders")
    with pytest.raises(DataError, match=r"option of data=imagefolder 'rot'\. Did you mean 'root'.*skip_unreadable"):
        load_data("imagefolder", rot="x")
    with pytest.raises(DataError, match="data=digits has no options of its own"):
        load_data("digits", root="x")


def test_subsets_keep_validation_and_test_whole():
    whole, few = load_data("digits"), load_data("digits", per_class=3)
    assert few.validation.fingerprint == whole.validation.fingerprint
    assert few.test is not None
    assert whole.test is not None
    assert few.test.fingerprint == whole.test.fingerprint
    assert few.train.fingerprint != whole.train.fingerprint
    assert few.train.labels.bincount().tolist() == [3] * 10
    assert len(load_data("digits", train_size=0.5).train) == 540


def test_a_test_share_is_held_out_where_there_is_none(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\n" + "".join(f"words {i},{'ab'[i % 2]}\n" for i in range(40)))
    splits = load_data("csv", root=tmp_path, test=0.25)
    whole = load_data("csv", root=tmp_path)
    assert splits.test is not None
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (24, 8, 8)
    parts = [set(part.items) for part in (splits.train, splits.validation, splits.test)]
    assert len(set.union(*parts)) == 40
    assert set(splits.validation.items) == set(whole.validation.items)
    with pytest.raises(DataError, match=r"digits has a test split of 359 examples\. Leave data\.test at null"):
        load_data("digits", test=0.2)
