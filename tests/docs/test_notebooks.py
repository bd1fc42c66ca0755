"""The notebooks of the documentation run from top to bottom, offline."""

from __future__ import annotations

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="pip install 'headinit[docs]'")
nbclient = pytest.importorskip("nbclient", reason="pip install 'headinit[docs]'")

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "docs" / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()  # raises with the cell and its error
    assert list(tmp_path.iterdir()) == [], "a notebook leaves nothing behind"


def test_there_are_three_of_them_with_small_outputs() -> None:
    assert len(NOTEBOOKS) == 3
    assert all(path.stat().st_size < 30_000 for path in NOTEBOOKS)
