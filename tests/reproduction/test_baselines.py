"""Every file of conf/baseline/: its rows, its numbers, its recipe, and what it says where things are missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from headinit.config import composed_settings
from headinit.errors import ConfigError, RequirementError
from headinit.reproduction.baselines import Published, arguments_with, baseline_names, find_rows, read_baseline
from headinit.reproduction.jobs import check_row
from headinit.reproduction.requirements import Requirements, differences

ROOT = Path(__file__).resolve().parents[2]
CONFIGURATIONS = ROOT / "conf"
ROWS = {row.name: row for row in find_rows(CONFIGURATIONS, "all")}

# One cell of each published table, typed by hand: (row, metric, number, std).
KNOWN = [
    ("run_glue/cola", "val.mcc", 56.53, None),
    ("run_glue/mnli", "test.accuracy", 84.10, None),
    ("run_glue/wnli", "val.accuracy", 56.34, None),
    ("mosbach/devlin_cola", "val.mcc", 45.6, 25.6),
    ("mosbach/stable_rte", "val.accuracy", 70.1, 2.4),
    ("tomihari/lp_ft_rte", "val.accuracy", 76.75, 0.87),
    ("tomihari/ft_boolq", "val.accuracy", 78.69, 0.27),
    ("pytorch_tutorial/fixed", "val.accuracy", 95.42, None),
    ("kornblith/linear_flowers", "test.balanced_accuracy", 94.7, None),
    ("kornblith/finetuned_food", "test.accuracy", 88.3, None),
    ("kornblith/scratch_voc", "test.map", 67.3, None),
    ("salman/resnet50_sun", "test.accuracy", 62.4, None),
    ("salman/resnet18_fixed_dtd", "test.accuracy", 67.1, None),
    ("tllib/share15_aircraft", "val.accuracy", 41.6, None),
    ("tllib/share100_cub", "val.accuracy", 81.8, None),
    ("bit_hyperrule/five_cifar100", "test.accuracy", 65.5, None),
    ("big_vision/pets", "test.accuracy", 93.78, None),
    ("lp_ft/lp_ft", "test.accuracy", 82.6, None),
]


@pytest.mark.parametrize(("name", "metric", "value", "std"), KNOWN)
def test_the_numbers_are_the_published_ones(name: str, metric: str, value: float, std: float | None) -> None:
    numbers = {number.metric: number for number in ROWS[name].published}
    assert (numbers[metric].value, numbers[metric].std) == (value, std)


def test_the_tables_are_whole() -> None:
    rows = {family: sum(row.family == family for row in ROWS.values()) for family in baseline_names(CONFIGURATIONS)}
    expected = {
        "run_glue": 9, "run_glue_uncased": 4, "mosbach": 6, "tomihari": 21, "pytorch_tutorial": 2, "kornblith": 36,
        "salman": 11, "tllib": 12, "bit_hyperrule": 6, "big_vision": 4, "lp_ft": 3,
    }  # fmt: skip
    assert {family: rows[family] for family in expected} == expected
    assert ROWS["mosbach/stable_mrpc"].published[0] == Published(
        "val.accuracy+f1", 89.6, std=0.8, median=89.5, maximum=91.4, seeds=25
    )
    assert ROWS["run_glue_uncased/rte"].published[0].text == "accuracy 61.7 to 71.4 (5 seeds, median)"


def test_each_file_opens_with_its_command_and_source() -> None:
    for name in baseline_names(CONFIGURATIONS):
        opening = (CONFIGURATIONS / "baseline" / f"{name}.yaml").read_text(encoding="utf-8").split("\ntitle:")[0]
        assert f"python scripts/reproduce.py baseline={name}" in opening, name


def test_every_row_composes_and_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in ("HF_HOME", "TORCH_HOME"):
        monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.setenv("HEADINIT_OFFLINE", "1")
    requirements = Requirements()
    for row in ROWS.values():
        with pytest.raises(RequirementError) as caught:
            check_row(row, CONFIGURATIONS, (), requirements)
        message = str(caught.value)
        assert row.name in message
        assert "data: " in message or row.unsupported
        known = ("data.root=FOLDER", "data.path=FOLDER") if not row.unsupported else ("several labels",)
        assert any(text in message for text in known), message
        if "model.pretrained=false" not in row.settings:
            assert "model.weights" in message, message
        assert all(file in message for file in row.files)
    assert not any(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("wanted", "message"),
    [("run_gluee", "Did you mean 'run_glue'"), ("run_glue/rtee", "Did you mean 'rte'")],
)
def test_unknown_names(wanted: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_rows(CONFIGURATIONS, wanted)


def test_a_misspelt_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "baseline").mkdir()
    (tmp_path / "baseline" / "x.yaml").write_text("title: t\nsource: s\nsettingss: []\npublished: {val.accuracy: 1}\n")
    with pytest.raises(ConfigError, match="settings"):
        read_baseline(tmp_path, "x")


def test_what_the_user_changes_is_told_from_where_things_are() -> None:
    row = ROWS["pytorch_tutorial/finetuned"]
    own = composed_settings(CONFIGURATIONS, row.settings)

    def changed(*overrides: str) -> tuple[str, ...]:
        return differences(row, own, composed_settings(CONFIGURATIONS, arguments_with(row, overrides)))

    assert changed("data.root=elsewhere", "model.weights=file.pth", "trainer.workers=7") == ()
    assert changed("model=efficientnet_lite0") == ("model.name=efficientnet_lite0 in place of resnet18.IMAGENET1K_V1",)
    assert changed("optim.lr=0.1") == ("optim.lr=0.1 in place of 0.001",)
    assert changed("data.augmentation=none") == ("data.augmentation=none in place of basic",)


def test_the_same_data_from_local_files_are_no_change() -> None:
    row = ROWS["run_glue/rte"]
    own = composed_settings(CONFIGURATIONS, row.settings)
    asked = composed_settings(CONFIGURATIONS, arguments_with(row, ("data=csv", "data.root=glue_rte")))
    assert differences(row, own, asked, (2490, 277)) == ()
    assert differences(row, own, asked, (2000, 277)) == ("data.name=csv in place of hub",)


def test_other_data_under_the_same_name_are_refused(picture_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADINIT_OFFLINE", "1")
    row = ROWS["pytorch_tutorial/fixed"]
    with pytest.raises(RequirementError, match="found 36 training \\+ 18 validation \\+ 18 test examples"):
        check_row(row, CONFIGURATIONS, (f"data.root={picture_folder}",), Requirements())
