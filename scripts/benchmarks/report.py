"""The measurements as a table, as JSON and as a page of the documentation."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks.setting import Measurement
from headinit.analysis.results import library_versions, write_json, write_text

TITLES = {
    "import": "Start of a process",
    "attach": "Attaching a head",
    "extraction": "Feature extraction",
    "closed-forms": "Heads in closed form",
    "comparison": "Hundreds of frozen runs",
    "peers": "What others need for the same runs",
    "text": "Full fine-tuning of text",
    "pictures": "Full fine-tuning of pictures",
    "prefix": "Cached prefix",
    "memory": "Peak memory",
}


def write_measurements(path: Path, size: str, found: Sequence[Measurement], data: Path | None) -> dict[str, Any]:
    """Write the JSON file; sections of an earlier run at this size that were not measured again stay."""
    new = {entry.section for entry in found}
    earlier = json.loads(path.read_text())["measurements"] if path.exists() else []
    kept = [Measurement(**entry) for entry in earlier if entry["section"] not in new]
    order = list(TITLES)
    content = {
        "size": size,
        "date": time.strftime("%Y-%m-%d"),
        "fine_tuning_on": "RTE, MRPC and hymenoptera" if data else "installed sentences and digits",
        "machine": machine(),
        "versions": library_versions(),
        "measurements": [asdict(m) for m in sorted([*kept, *found], key=lambda m: order.index(m.section))],
    }
    write_json(path, content)
    return content


def machine() -> dict[str, Any]:
    """What it ran on."""
    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
    }


def processor_name() -> str:
    """The processor, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def table_of(found: Sequence[Measurement]) -> Table:
    """The measurements, with what is claimed."""
    table = Table(title=None)
    for head in ("section", "measured", "value", "claim", "", "how"):
        table.add_column(head, justify="right" if head in ("value", "claim") else "left", overflow="fold")
    for entry in found:
        mark = {True: "[green]holds[/green]", False: "[red]MISSED[/red]", None: ""}[entry.holds]
        table.add_row(entry.section, entry.name, number_of(entry), claim_of(entry), mark, entry.note)
    return table


def number_of(entry: Measurement) -> str:
    """Value and unit."""
    return (
        f"{entry.value:.3g} {entry.unit}".strip() if entry.value < 1000 else f"{entry.value:.0f} {entry.unit}".strip()
    )


def claim_of(entry: Measurement) -> str:
    """The claim in words."""
    return "" if entry.limit is None else f"{'at most' if entry.at_most else 'at least'} {entry.limit:g}"


def page_of(content: Mapping[str, Any]) -> str:
    """The page of the documentation, in Markdown.

    Args:
        content: what the JSON file holds.
    """
    found = [Measurement(**entry) for entry in content["measurements"]]
    machine, versions = content["machine"], content["versions"]
    libraries = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    held = [entry.holds for entry in found if entry.holds is not None]
    parts = [
        "# Benchmarks",
        "Written by `python scripts/benchmark.py --report docs/benchmarks.md`: do not edit, run it again. Every claim "
        "is a ratio of two things measured by the same run on the same machine, the peers included.",
        f"{content['date']}, {machine['cores']} cores ({machine['processor']}), {machine['torch_threads']} threads, "
        f"size `{content['size']}`. Fine-tuning on {content['fine_tuning_on']}. {libraries}.",
        f"{sum(held)} of {len(held)} claims hold.",
        floor_of(found),
    ]
    for section, title in TITLES.items():
        own = [entry for entry in found if entry.section == section]
        if own:
            parts.append(f"## {title}")
            parts.append("\n".join(lines_of(own)))
    return "\n\n".join(part for part in parts if part) + "\n"


def lines_of(found: Sequence[Measurement]) -> list[str]:
    """A Markdown table."""
    lines = ["| measured | value | claim | | how |", "|---|--:|--:|---|---|"]
    for entry in found:
        mark = {True: "holds", False: "**missed**", None: ""}[entry.holds]
        cells = [entry.name, number_of(entry), claim_of(entry), mark, entry.note]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def floor_of(found: Sequence[Measurement]) -> str:
    """How far the comparison is from the least that it could cost."""
    entry = next((entry for entry in found if entry.name.startswith("all of it over the fastest pass")), None)
    if entry is None:
        return ""
    return (
        "The floor of a comparison on new data is one pass of the backbone, as fast as this machine runs it; the heads "
        f"are extra. The whole comparison takes {entry.value:.2f} times that pass ({entry.note})."
    )


def write_page(path: Path, content: Mapping[str, Any]) -> Path:
    """Write the page."""
    return write_text(path, page_of(content))
