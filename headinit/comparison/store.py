"""Rows of finished cells, kept so that a kill at any moment loses none of them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from headinit.analysis.results import RunRow, plain

CELLS_FILE = "cells.jsonl"


class CellStore:
    """The rows of finished cells: a line each in `cells.jsonl`, on the disk before the next are computed.

    Args:
        folder: where; None keeps them in memory.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> CellStore(folder).add({"key": RunRow(init="he", lr=0.1, seed=0, val={"accuracy": 0.5})})
        >>> CellStore(folder).rows["key"].val
        {'accuracy': 0.5}
    """

    def __init__(self, folder: Path | None) -> None:
        self.path = None if folder is None else folder / CELLS_FILE
        self.rows: dict[str, RunRow] = {}
        if self.path is not None and self.path.is_file():
            for line in self.path.read_bytes().split(b"\n")[:-1]:  # what comes after the last one was cut off by a kill
                self._read(line)

    def _read(self, line: bytes) -> None:
        try:
            content = json.loads(line)
            row = dict(content["row"])
            row["history"] = tuple((int(step), value) for step, value in row["history"])
            self.rows[content["key"]] = RunRow(**row)
        except (ValueError, KeyError, TypeError):
            return  # damaged: that cell is computed again

    def add(self, found: Mapping[str, RunRow]) -> None:
        """Keep these rows; when it returns they are on the disk."""
        self.rows.update(found)
        if self.path is None or not found:
            return
        lines = [json.dumps({"key": key, "row": plain(row)}, allow_nan=False) + "\n" for key, row in found.items()]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+b") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            file.write("".join(lines).encode())
            file.flush()
            os.fsync(file.fileno())
