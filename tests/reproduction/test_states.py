"""What the table says of a row."""

from __future__ import annotations

from pathlib import Path

import pytest

from headinit.errors import ConfigError
from headinit.reproduction.baselines import Published, Row
from headinit.reproduction.states import State, read_states, state_text, with_state, write_states, write_table

ROW = Row("a/b", "runs", "A title", "https://example.org", (), (Published("val.accuracy", 90.0),))


def state(**changes: object) -> State:
    values = {
        "row": "a/b", "date": "2026-01-02", "by": None, "seeds": 1, "differences": (),
        "measured": {"val.accuracy": [91.0]}, "verdicts": {"val.accuracy": "off by +1.00"},
        "versions": {"torch": "2.6"},
    }  # fmt: skip
    return State(**{**values, **changes})  # type: ignore[arg-type]


def test_states_survive_the_file_and_newer_ones_replace_older_ones(tmp_path: Path) -> None:
    path = tmp_path / "states.json"
    states = with_state(with_state([state()], state(date="2026-02-03")), state(by="Ada"))
    write_states(path, states)
    assert read_states(path) == states
    assert [(s.date, s.by) for s in states] == [("2026-02-03", None), ("2026-01-02", "Ada")]


def test_only_what_was_run_is_claimed(tmp_path: Path) -> None:
    stand_in = state(differences=("model.name=small in place of large",))
    assert state_text(ROW, []) == "never run"
    assert state_text(ROW, [stand_in]).startswith("never run<br>**stand-in**, not this row: model.name=small")
    assert state_text(ROW, [state()]).startswith("run here on 2026-01-02")
    assert state_text(ROW, [state(by="Ada, 1 GPU")]).startswith("run by Ada, 1 GPU on 2026-01-02")
    write_table(tmp_path / "t.md", [ROW], [stand_in])
    assert "1 rows, 0 of them run" in (tmp_path / "t.md").read_text()


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text("[{}]")
    with pytest.raises(ConfigError, match=r"s\.json is damaged"):
        read_states(tmp_path / "s.json")
