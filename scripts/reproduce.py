"""Published baselines: run a row by its recipe, judge it against its number, keep the table docs/baselines.md.

python scripts/reproduce.py --list                                    every row and its state
python scripts/reproduce.py baseline=all check=true                   what is missing here for each of them
python scripts/reproduce.py baseline=run_glue/rte                     one row, by the published number of seeds
python scripts/reproduce.py baseline=pytorch_tutorial data.root=hymenoptera_data
python scripts/reproduce.py baseline=pytorch_tutorial data.root=hymenoptera_data model=efficientnet_lite0

The last is a stand-in: what differs from the recipe is named in the table, and reproduces nothing. Settings of its own:
  seeds=N           how many runs, in place of the published number
  check=true        only look whether weights and data are there (nothing is downloaded, nothing runs)
  folder=FOLDER     where the runs go; finished ones are not repeated (outputs/reproduce)
  table=FILE        the table; its numbers are kept in the .json file beside it (docs/baselines.md)
  by="NAME, GPU"    who runs it, where it is not the machine that keeps the table
  states=FILE       add what another machine has left in its .json file to the table (its own file writes it anew)
Everything else is an argument of scripts/finetune.py. A row whose weights or data are missing ends with exit code 2 and
a message that says what belongs where.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from headinit.command_line import run_script
from headinit.errors import ConfigError, RequirementError

ROOT = Path(__file__).resolve().parent.parent
CONFIGURATIONS = ROOT / "conf"
JOBS = {"study": "headinit.reproduction.study:run_study"}
"""Jobs of baseline files of another kind: a function of (Baseline, Request)."""


@dataclass(frozen=True)
class Request:
    """What the user asked for.

    Attributes:
        baseline: a file of `conf/baseline/`, one of its rows, or ``"all"``.
        overrides: arguments of `scripts/finetune.py`.
        configurations: the folder `conf`.
        folder: where runs go.
        table: the table in docs.
        seeds, by, check, states: see the script's description.
    """

    baseline: str
    overrides: tuple[str, ...] = ()
    configurations: Path = CONFIGURATIONS
    folder: Path = field(default_factory=lambda: Path("outputs") / "reproduce")
    table: Path = ROOT / "docs" / "baselines.md"
    seeds: int | None = None
    by: str | None = None
    check: bool = False
    states: Path | None = None

    @classmethod
    def of(cls, arguments: Sequence[str]) -> Request:
        """From the command line."""
        own: dict[str, str] = {}
        overrides = []
        for argument in arguments:
            key, equals, value = argument.partition("=")
            if not equals:
                raise ConfigError(f"Cannot read the argument {argument!r}: settings are NAME=VALUE.")
            if key in ("baseline", "folder", "table", "seeds", "by", "check", "states"):
                own[key] = value
            else:
                overrides.append(argument)
        if "baseline" not in own and "states" not in own:
            raise ConfigError("Say which: baseline=NAME, baseline=NAME/ROW or baseline=all. --list shows them.")
        if not own.get("seeds", "1").isdigit():
            raise ConfigError(f"seeds={own['seeds']} is not a number of runs.")
        if own.get("check", "false").lower() not in ("true", "false"):
            raise ConfigError(f"check={own['check']} is neither true nor false.")
        given: dict = {name: Path(own[name]) for name in ("folder", "table", "states") if name in own}
        return cls(
            own.get("baseline", ""),
            tuple(overrides),
            seeds=int(own["seeds"]) if "seeds" in own else None,
            by=own.get("by"),
            check=own.get("check", "false").lower() == "true",
            **given,
        )

    @property
    def kept(self) -> Path:
        """The numbers behind the table."""
        return self.table.with_suffix(".json")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="every row and its state; nothing is run")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a mistake")
    parser.add_argument("settings", nargs="*", help="baseline=NAME and settings, as described above")
    arguments = parser.parse_args()
    code = 0

    def task() -> None:
        nonlocal code
        asked = arguments.settings
        code = _list(asked) if arguments.list else _reproduce(Request.of(asked))

    return run_script(task) or code


def _reproduce(request: Request) -> int:
    if request.states is not None:
        return _merge(request)
    if request.check:
        # Before any library reads them.
        os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HEADINIT_OFFLINE="1")
    from headinit.reproduction.baselines import KINDS, find_rows, read_baseline

    family = request.baseline.partition("/")[0]
    if request.baseline != "all":
        baseline = read_baseline(request.configurations, family)
        if baseline.kind not in KINDS:
            if baseline.kind not in JOBS:
                raise ConfigError(f"baseline={family} is of the kind {baseline.kind!r}; known: {', '.join(JOBS)}.")
            module, _, function = JOBS[baseline.kind].partition(":")
            return getattr(importlib.import_module(module), function)(baseline, request) or 0
    rows = find_rows(request.configurations, request.baseline)
    return _check(request, rows) if request.check else _run(request, rows)


def _check(request: Request, rows: Sequence) -> int:
    """For each row whether it can be run here; 2 where one cannot."""
    from rich.console import Console

    from headinit.reproduction.jobs import check_row
    from headinit.reproduction.requirements import Requirements

    console, requirements, missing = Console(highlight=False, soft_wrap=True, markup=False), Requirements(), 0
    for row in rows:
        try:
            check_row(row, request.configurations, request.overrides, requirements)
            console.print(f"{row.name}: can be run here.")
        except RequirementError as error:
            missing += 1
            console.print(f"{error}\n")
    console.print(f"{len(rows) - missing} of {len(rows)} rows can be run here.")
    return 2 if missing else 0


def _run(request: Request, rows: Sequence) -> int:
    """Run the rows; a row that cannot be run is reported, and the others go on."""
    from rich.console import Console

    from headinit.reproduction.jobs import run_row

    console, failures = Console(highlight=False, soft_wrap=True), []
    for row in rows:
        try:
            done = run_row(
                row,
                request.configurations,
                request.overrides,
                request.folder,
                seeds=request.seeds,
                by=request.by,
                console=console,
            )
        except RequirementError as error:
            failures.append(str(error))
            continue
        _keep(request, [done.state])
        console.print(f"[bold]{row.name}[/bold]: {row.title}")
        for number, judgement in zip(row.published, done.judgements, strict=True):
            runs = ", ".join(f"{value:.2f}" for value in done.state.measured[number.metric])
            console.print(f"  published  {number.text}\n  measured   {judgement.measured:.2f} ({runs})")
            console.print(f"  verdict    {done.state.verdicts[number.metric]}")
        if done.state.differences:
            console.print(f"  a stand-in, not this row: {'; '.join(done.state.differences)}")
        for note in row.notes:
            console.print(f"  known difference: {note}")
        console.print(f"  table      {request.table}")
    for failure in failures:
        print(f"Error: {failure}", file=sys.stderr)
    return 2 if failures else 0


def _keep(request: Request, new: Sequence) -> None:
    """Put states into the file behind the table, and write the table anew."""
    from headinit.reproduction.baselines import find_rows
    from headinit.reproduction.states import read_states, with_state, write_states, write_table

    states = read_states(request.kept)
    for state in new:
        states = with_state(states, state)
    write_states(request.kept, states)
    write_table(request.table, find_rows(request.configurations, "all"), states)


def _merge(request: Request) -> int:
    from dataclasses import replace

    from headinit.reproduction.states import read_states

    assert request.states is not None
    states = read_states(request.states)
    if not states:
        raise ConfigError(f"There is nothing in {request.states}: give the .json file beside another machine's table.")
    unnamed = [state.row for state in states if state.by is None]
    if unnamed and request.by is None:
        raise ConfigError(f'Say who ran {", ".join(unnamed)}: by="NAME, MACHINE".')
    _keep(request, [replace(state, by=state.by or request.by) for state in states])
    return 0


def _list(asked: Sequence[str]) -> int:
    """Every row, its published number and its state."""
    from rich.console import Console
    from rich.table import Table

    from headinit.reproduction.baselines import find_rows
    from headinit.reproduction.states import read_states, state_text

    request = Request.of(asked if any(item.startswith("baseline=") for item in asked) else [*asked, "baseline=all"])
    states = read_states(request.kept)
    table = Table("row", "published", "state", box=None, pad_edge=False)
    rows = find_rows(request.configurations, request.baseline)
    for row in rows:
        state = state_text(row, states).replace("<br>", "\n").replace("**", "")
        table.add_row(row.name, "; ".join(number.text for number in row.published), state)
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
