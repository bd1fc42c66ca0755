"""How the schemes start and what the best head gets wrong: for the report, computed from the features."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from headinit.analysis.diagnostics import head_spectrum, logit_histogram
from headinit.analysis.metrics import HIGHER_IS_BETTER, confusion_matrix
from headinit.analysis.report import ConfusedExample, Starts, Winner
from headinit.analysis.results import RunRow
from headinit.comparison.bench import Bench, Setting, logits_on
from headinit.comparison.frozen import cell_key, train_bank
from headinit.comparison.grid import Cell
from headinit.experiment import START_EXAMPLES
from headinit.heads.record import record_of
from headinit.training.head_bank import head_logits

CONFUSED_EXAMPLES = 12


def report_details(bench: Bench, cells: Sequence[Cell], rows: Sequence[RunRow]) -> tuple[Starts, Winner | None]:
    """How the schemes start, and what the best head gets wrong: from the features, nothing is stored for it."""
    last = cells[-1]  # its features are still at hand
    setting = bench.setting(last.split_seed, last.per_class)
    return _starts(setting, cells), _winner(bench, cells, rows)


def _starts(setting: Setting, cells: Sequence[Cell]) -> Starts:
    histograms, spectra, warnings, chance = {}, {}, {}, None
    for cell in cells:
        if cell.label in histograms or cell.seed != cells[0].seed:
            continue
        head = setting.start(cell)
        histograms[cell.label] = logit_histogram(logits_on(head, setting.train.features[:START_EXAMPLES]))
        if type(head) is nn.Linear:
            spectra[cell.label] = head_spectrum(head.weight)
        scores = setting.start_scores(head)
        chance = scores.get("chance_loss")
        if scores.get("warnings"):
            warnings[cell.label] = scores["warnings"]
    return Starts(chance, histograms, spectra, warnings)


def _winner(bench: Bench, cells: Sequence[Cell], rows: Sequence[RunRow]) -> Winner | None:
    """Confusion matrix and most confident mistakes of the run that is best on validation."""
    if type(bench.head) is not nn.Linear or record_of(bench.model).task != "single_label":
        return None
    monitor = bench.recipe.monitor
    sign = 1 if HIGHER_IS_BETTER[monitor] else -1
    judged = [(cell, row) for cell, row in zip(cells, rows, strict=False) if row.val.get(monitor) is not None]
    if not judged:
        return None
    best, _ = max(judged, key=lambda pair: sign * float(pair[1].val[monitor] or 0.0))
    setting = bench.setting(best.split_seed, best.per_class)
    weight, bias = _weights_of(bench, best, cells)
    features, split = setting.validation, setting.data.validation
    if setting.test is not None and setting.data.test is not None:
        features, split = setting.test, setting.data.test
    probabilities = head_logits(weight, bias, features.features).double().softmax(1)
    predicted = probabilities.argmax(1)
    names = setting.data.class_names
    wrong = (predicted != split.labels).nonzero().flatten()
    confidence = probabilities.amax(1)
    worst = wrong[confidence[wrong].argsort(descending=True)][:CONFUSED_EXAMPLES].tolist()
    confused = [
        ConfusedExample(
            content, names[int(split.labels[i])], names[int(predicted[i])], confidence[i].item(), split.names[i]
        )
        for i in worst
        if (content := _content(split.items[i])) is not None
    ]
    counts = confusion_matrix(predicted, split.labels, len(names)).numpy()
    return Winner(f"{best.label} at lr {best.lr:g}, seed {best.seed}", counts, names, confused)


def _weights_of(bench: Bench, best: Cell, cells: Sequence[Cell]) -> tuple[Tensor, Tensor | None]:
    """The trained head of a cell; where it was trained by an earlier process, its bank is trained again."""
    if bench.leader is not None and bench.leader.key == cell_key(bench, best):
        return bench.leader.weight, bench.leader.bias
    bank = (best.split_seed, best.per_class, best.seed, best.order_seed)
    together = [c for c in cells if (c.split_seed, c.per_class, c.seed, c.order_seed) == bank]
    _, weight, bias = train_bank(bench.setting(best.split_seed, best.per_class), together)[id(best)]
    return weight, bias


def _content(item: Any) -> bytes | Path | str | None:
    """An example as the report shows it; None for what cannot be shown (rows of a feature matrix)."""
    if isinstance(item, (str, Path)):
        return item
    if isinstance(item, tuple) and item and isinstance(item[0], str):
        return " | ".join(str(part) for part in item)
    from PIL import Image

    picture = item if isinstance(item, Image.Image) else None
    if picture is None and getattr(item, "ndim", 0) in (2, 3):
        picture = Image.fromarray(item)
    if picture is None:
        return None
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()
