"""What has been answered 250 survives a power loss, whole. How this is tested is in faults/README.md."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

TOP = Path(__file__).parent.parent
PROGRAM = TOP / "tests/faults/power_loss.py"
FILE_SYSTEMS = ("ext4", "xfs")
FAULTS = ("lost", "partial", "twice", "unflagged", "unreadable", "damaged")


class Table(NamedTuple):
    """What the program has found: its rows, and all its words."""

    rows: list[dict[str, str]]
    said: str

    def total(self, column: str) -> int:
        return sum(int(row[column]) for row in self.rows)


def examined(file_system: str, *options: str, states: int = 51, messages: int = 80) -> Table:
    """Runs the program for one file system."""
    counts = [f"--states={states}", f"--messages={messages}"]
    command = [sys.executable, str(PROGRAM), *counts, *options, file_system]
    done = subprocess.run(command, capture_output=True, text=True)
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()] or [[], []]
    said = f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    table = Table([dict(zip(head, row)) for row in rows], said)
    assert [row["state"] for row in table.rows] == ["written", "flushed", "mixed"], said
    assert table.total("states") == states, said
    assert done.returncode == (1 if any(map(table.total, FAULTS)) else 0), said
    return table


@pytest.mark.parametrize("file_system", FILE_SYSTEMS)
def test_what_was_answered_survives_a_power_loss(file_system: str) -> None:
    table = examined(file_system)
    assert table.total("messages") > 500, table.said
    assert [table.total(fault) for fault in FAULTS] == [0] * len(FAULTS), table.said


@pytest.mark.parametrize("file_system", FILE_SYSTEMS)
@pytest.mark.parametrize(
    ("call", "fault"), [("os.fsync(self._fd)", "partial"), ("sync_directory(self._directory)", "lost")]
)
def test_a_missing_sync_is_found(tmp_path: Path, file_system: str, call: str, fault: str) -> None:
    source = (TOP / "lmtpd.py").read_text()
    assert call in source
    wrong = tmp_path / "lmtpd.py"
    wrong.write_text(source.replace(call, "pass"))
    table = examined(file_system, f"--lmtpd={wrong}", states=9)
    assert table.total(fault), table.said
