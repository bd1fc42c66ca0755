"""Cells that train more than a head on features: each is an ordinary run in a folder of its own."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import shutil
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from headinit.analysis.results import RESULT_FILE, RunRow
from headinit.comparison.bench import Bench
from headinit.comparison.frozen import cell_key, has_diverged
from headinit.comparison.grid import Cell, cell_settings, freeze_text
from headinit.comparison.store import CellStore
from headinit.config import Settings, as_mapping, run_id, settings_from
from headinit.errors import ConfigError, TrainingError
from headinit.experiment import run

if TYPE_CHECKING:
    from rich.console import Console


def check_ordinary_cells(bench: Bench, cells: Sequence[Cell], folder: Path | None) -> None:
    """Whether these cells can be run.

    Raises:
        ConfigError: model or data have no names to run them by, there is no folder, or the settings are wrong.
    """
    if bench.settings is None or folder is None:
        what = "a model and data by their names" if bench.settings is None else "a folder for the runs"
        raise ConfigError(
            f"{len(cells)} cells train more than a head on features (freeze={cells[0].freeze['policy']}), so each is a "
            f"run of its own, and that needs {what}: compare('resnet50', 'digits', ..., folder='runs')."
        )
    for cell in {freeze_text(cell.freeze): cell for cell in cells}.values():
        settings_from(as_mapping(cell_settings(bench.settings, cell)))


def run_ordinary_cells(
    bench: Bench,
    cells: Sequence[Cell],
    store: CellStore,
    folder: Path,
    console: Console | None,
    workers: int = 1,
    keep_models: bool = True,
) -> list[RunRow]:
    """Fine-tuning runs, each in its own folder, where it is resumed, or skipped when it is done."""
    if workers > 1 and len(cells) > 1:
        _run_in_processes(bench, cells, folder, workers, keep_models)
    rows = []
    for cell in cells:
        assert bench.settings is not None
        settings = cell_settings(bench.settings, cell)
        key = hashlib.sha256(f"{cell_key(bench, cell)}|{run_id(as_mapping(settings))}".encode()).hexdigest()
        if key not in store.rows:
            store.add({key: _ordinary_row(settings, cell, folder, bench, console)})
            if not keep_models:
                _drop_models(run_folder(settings, folder))
        rows.append(store.rows[key])
    return rows


def _run_in_processes(bench: Bench, cells: Sequence[Cell], folder: Path, workers: int, keep_models: bool) -> None:
    """Run the cells in processes of their own, the cores shared among them; each leaves its result in its folder."""
    assert bench.settings is not None
    settings = [cell_settings(bench.settings, cell) for cell in cells]
    missing = [own for own in settings if not (run_folder(own, folder) / RESULT_FILE).is_file()]
    threads = max(1, torch.get_num_threads() // workers)
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=prepare_worker, initargs=(threads,)
    ) as pool:
        configs = [as_mapping(own) for own in missing]
        for _ in pool.map(_run_quietly, configs, itertools.repeat(folder), itertools.repeat(keep_models)):
            pass


def prepare_worker(threads: int) -> None:
    """What a process of a pool does first: take its share of the threads, and see to it that it ends with its parent.

    A pool's processes wait for work for ever where the parent was killed. This one then gets SIGTERM until it ends: a
    run saves and leaves, and is gone on with by the next comparison.
    """
    torch.set_num_threads(threads)
    parent = parent_process()

    def end_with_parent() -> None:
        assert parent is not None
        parent.join()
        while True:  # the pool may have handed out one more run
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1.0)

    if parent is not None:
        threading.Thread(target=end_with_parent, daemon=True).start()


def _run_quietly(config: Mapping[str, Any], folder: Path, keep_models: bool) -> None:
    """One run in a process of its own. A run that diverges is looked at again by the process that asked for it."""
    from rich.console import Console

    settings = settings_from(config)
    settings.trainer.progress = False
    with open(os.devnull, "w") as nowhere, suppress(TrainingError):
        run(settings, run_folder(settings, folder), Console(file=nowhere))
        if not keep_models:
            _drop_models(run_folder(settings, folder))


def _drop_models(folder: Path) -> None:
    """Leave the result of a finished run, without the weights that it would go on from."""
    for weights in ("checkpoint", "model"):
        shutil.rmtree(folder / weights, ignore_errors=True)


def run_folder(settings: Settings, folder: Path) -> Path:
    """Where the run of a cell is kept."""
    return folder / "runs" / run_id(as_mapping(settings))


def _ordinary_row(settings: Settings, cell: Cell, folder: Path, bench: Bench, console: Console | None) -> RunRow:
    data = bench.data_of(cell.split_seed, cell.per_class)
    validation = data.validation.labels
    majority = torch.bincount(validation).max().item() / len(validation) if data.task == "single_label" else None
    try:
        record = run(settings, run_folder(settings, folder), console)
    except TrainingError as error:
        if not has_diverged(error):
            raise
        row = RunRow(init=cell.label, lr=cell.lr, seed=cell.seed, val={}, data=data.name, status="diverged")
    else:
        row = RunRow.from_record(record)
    return dataclasses.replace(
        row,
        init=cell.label,
        weight_decay=cell.weight_decay,
        split_seed=cell.split_seed,
        per_class=cell.per_class,
        freeze=freeze_text(cell.freeze),
        majority=majority,
    )
