from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from headinit.data.augmentation import AUGMENTATIONS
from headinit.data.catalog import LOADERS, known_options, load_data
from headinit.errors import DataError

CONF = Path(__file__).resolve().parents[2] / "conf" / "data"
COMMON = {"name", "modality", "validation", "per_class", "train_size", "augmentation", "split_seed"}
FILES = sorted(path.stem for path in CONF.glob("*.yaml"))


def read(name: str) -> dict:
    return yaml.safe_load((CONF / f"{name}.yaml").read_text(encoding="utf-8"))


def test_every_data_set_has_its_settings():
    assert set(LOADERS) <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_settings_and_options_are_in_step(name):
    settings = read(name)
    options = known_options(settings["name"])
    assert set(settings) == COMMON | set(options)
    assert settings["modality"] in ("image", "text", "auto")
    assert settings["augmentation"] == AUGMENTATIONS[0]
    if settings["name"] == name:
        assert {key: settings[key] for key in options} == options
        assert settings["validation"] == 0.2
    lines = (CONF / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ")


def test_trec_settings_read_real_trec(shared_data):
    settings = {key: value for key, value in read("trec").items() if key not in COMMON}
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
