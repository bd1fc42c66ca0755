"""A comparison to be killed: ``python -m tests.comparison_to_kill FOLDER DELAY...`` kills one child after each delay.

The children are forks of one process, so that only the first import is paid for. Each goes on in the same folder.
After every kill the number of whole lines of cells.jsonl is printed, at the end the rows of the finished comparison.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch

from headinit.analysis.results import RunRow
from headinit.comparison import compare
from headinit.features.extract import FeatureSet

INITS = ["he", "zeros", "ridge", "imprint"]


def data() -> FeatureSet:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    features = torch.randn(3, 16, generator=generator)[labels] + 1.5 * torch.randn(300, 16, generator=generator)
    return FeatureSet(features, labels, 3)


def run_comparison(folder: Path | None) -> list[RunRow]:
    found = compare(data(), inits=INITS, lrs=[0.01, 0.1], seeds=8, split_seeds=[0, 1], epochs=12, folder=folder)
    return list(found.rows)


def finished_cells(folder: Path) -> int:
    path = folder / "cells.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def main() -> None:
    folder, delays = Path(sys.argv[1]), [float(delay) for delay in sys.argv[2:]]
    torch.set_num_threads(1)  # threads do not survive a fork
    for delay in delays:
        child = os.fork()
        if child == 0:
            run_comparison(folder)
            os._exit(0)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        print(finished_cells(folder), flush=True)


if __name__ == "__main__":
    main()
