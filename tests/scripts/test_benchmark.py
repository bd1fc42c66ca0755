"""The benchmark at its small size: that every part runs, what it leaves, and what it calls a claim that holds."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "scripts"))
    yield importlib.import_module("benchmark")
    sys.path.remove(str(ROOT / "scripts"))


@pytest.mark.parametrize(
    ("value", "limit", "at_most", "holds"),
    [(0.5, 0.75, True, True), (0.8, 0.75, True, False), (2.5, 2.0, False, True), (1.5, 2.0, False, False)],
)
def test_a_claim_holds_on_the_right_side(
    benchmark: ModuleType, value: float, limit: float, at_most: bool, holds: bool
) -> None:
    from benchmarks.setting import Measurement

    assert Measurement("s", "n", value, limit=limit, at_most=at_most).holds is holds
    assert Measurement("s", "n", value).holds is None


def test_the_full_size_is_the_one_of_the_claims(benchmark: ModuleType) -> None:
    full = benchmark.SIZES["full"]
    assert (full.runs, full.pictures, full.epochs, full.backbones[0]) == (200, 1797, 20, "resnet50")
    assert full.claims
    assert not benchmark.SIZES["small"].claims


def test_sections_that_are_not_measured_again_stay(benchmark: ModuleType, tmp_path: Path) -> None:
    from benchmarks.report import write_measurements
    from benchmarks.setting import Measurement

    path = tmp_path / "benchmark-small.json"
    write_measurements(path, "small", [Measurement("peers", "a", 1.0), Measurement("text", "b", 1.0)], None)
    content = write_measurements(path, "small", [Measurement("peers", "c", 2.0)], None)
    assert [(entry["section"], entry["name"]) for entry in content["measurements"]] == [("peers", "c"), ("text", "b")]
    assert json.loads(path.read_text()) == json.loads(json.dumps(content))


def test_the_page_says_what_was_claimed_and_what_was_missed(benchmark: ModuleType, tmp_path: Path) -> None:
    from benchmarks.report import write_measurements
    from benchmarks.setting import Measurement

    found = [
        Measurement("pictures", "fast | enough", 1.5, "x", limit=1.3, at_most=False),
        Measurement("memory", "too much", 1.4, "x", limit=1.1, note="140 MB and 100 MB"),
    ]
    write_measurements(tmp_path / "benchmark-full.json", "full", found, Path("data"))
    page = tmp_path / "page.md"
    arguments = ["--output", str(tmp_path), "--report", str(page), "--only-report"]
    assert benchmark.main(arguments) == 0
    text = page.read_text()
    assert "1 of 2 claims hold" in text
    assert "| fast \\| enough | 1.5 x | at least 1.3 | holds |  |" in text
    assert "| too much | 1.4 x | at most 1.1 | **missed** | 140 MB and 100 MB |" in text


@pytest.mark.slow
@pytest.mark.parametrize("section", ["attach", "extraction", "closed-forms", "peers", "text", "pictures", "prefix"])
def test_a_section_at_the_small_size(benchmark: ModuleType, tmp_path: Path, section: str) -> None:
    assert benchmark.main(["--size", "small", "--only", section, "--output", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "benchmark-small.json").read_text())
    assert {entry["section"] for entry in content["measurements"]} == {section}
    assert all(entry["value"] >= 0 and entry["limit"] is None for entry in content["measurements"])
    same = [entry["value"] for entry in content["measurements"] if "same" in entry["name"]]
    assert all(difference < 1e-4 for difference in same)
    assert content["machine"]["cores"] >= 1


@pytest.mark.slow
def test_the_sections_that_start_processes(benchmark: ModuleType, tmp_path: Path) -> None:
    assert benchmark.main(["--size", "small", "--only", "comparison", "memory", "--output", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "benchmark-small.json").read_text())
    peaks = [entry["value"] for entry in content["measurements"] if entry["section"] == "memory"]
    assert len(peaks) == 2
    assert all(0.2 < ratio < 5 for ratio in peaks)
