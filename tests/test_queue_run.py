"""Nothing is lost while much goes wrong: a real Postfix delivers a queue. How this is tested is in faults/README.md."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parent / "faults/queue_run.py"
EVERYTHING = "--messages=600", "--rounds=1", "--seed=16", "--short"


def examined(*options: str) -> tuple[dict[str, list[str]], dict[str, int], str]:
    """Runs the program: the cells of each row of its table, its figures, and all its words."""
    done = subprocess.run([sys.executable, str(PROGRAM), *options], capture_output=True, text=True)
    said = f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line[:1] == "|"]
    figures = {
        name: int(number) for name, number in re.findall(r"(?:^|, )([a-z ()]+) (\d+)", done.stdout, re.MULTILINE)
    }
    return {name: cells for name, *cells in rows[2:]}, figures, said


def test_every_message_arrives_while_everything_fails_now_and_then() -> None:
    """At least once, whole, and once only unless a kill or a fault of the database explains it; nothing bounces."""
    table, figures, said = examined(*EVERYTHING)
    assert said.startswith("exit status 0\n"), said
    assert len(table) == 16, said
    assert all(int(tries) > 0 for tries, *_ in table.values()), said
    assert figures["messages"] == 600, said
    assert figures["copies"] > 600, said
    assert figures["not stored again"] > 0, said
    for fault in ("lost", "partial", "bounced", "other violations", "doubled for no reason"):
        assert figures[fault] == 0, said
