"""The benchmark at its small size: that it runs, what it leaves, and what it calls a claim that holds."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_script", ROOT / "scripts" / "benchmark.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("value", "limit", "at_most", "holds"),
    [(0.5, 0.75, True, True), (0.8, 0.75, True, False), (2.5, 2.0, False, True), (1.5, 2.0, False, False)],
)
def test_a_claim_holds_on_the_right_side(
    benchmark: ModuleType, value: float, limit: float, at_most: bool, holds: bool
) -> None:
    assert benchmark.Measurement("s", "n", value, limit=limit, at_most=at_most).holds is holds
    assert benchmark.Measurement("s", "n", value).holds is None


def test_the_full_size_is_the_one_of_the_claims(benchmark: ModuleType) -> None:
    full = benchmark.SIZES["full"]
    assert (full.runs, full.pictures, full.epochs, full.backbones[0]) == (200, 1797, 20, "resnet50")
    assert full.claims
    assert not benchmark.SIZES["small"].claims


@pytest.mark.slow
def test_the_small_size_runs_and_is_written(benchmark: ModuleType, tmp_path: Path) -> None:
    assert benchmark.main(["--size", "small", "--only", "closed-forms", "peers", "--output", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "benchmark-small.json").read_text())
    assert {"closed forms", "peers"} == {entry["section"] for entry in content["measurements"]}
    assert all(entry["value"] > 0 and entry["limit"] is None for entry in content["measurements"])
    assert content["machine"]["cores"] >= 1
