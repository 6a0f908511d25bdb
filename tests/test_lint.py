"""The code keeps its own rules."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
TESTS = [str(file) for file in sorted((TOP / "tests").rglob("*.py"))]


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "--config", "tests/ruff.toml", "--no-cache", "."],
        ["ruff", "format", "--config", "tests/ruff.toml", "--no-cache", "--check", "."],
        ["mypy", "--config-file", "tests/mypy.ini", "--cache-dir", "/dev/null", "lmtpd.py", *TESTS],
    ],
    ids=["lint", "format", "types"],
)
def test_the_checker_has_nothing_to_say(command: list[str]) -> None:
    result = subprocess.run([str(BIN / command[0]), *command[1:]], cwd=TOP, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_only_what_every_session_needs_is_imported_at_the_top() -> None:
    module = ast.parse((TOP / "lmtpd.py").read_text())
    imported = {
        name
        for node in module.body
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported == {
        "__future__",
        "errno",
        "itertools",
        "os",
        "select",
        "stat",
        "sys",
        "time",
    }


def test_delivering_a_message_imports_nothing_that_only_others_need() -> None:
    program = "import sys; before = set(sys.modules); import lmtpd; print(*(set(sys.modules) - before))"
    command = [sys.executable, "-I", "-c", program]
    modules = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert "lmtpd" in modules
    for heavy in ("ssl", "sqlite3", "email", "logging", "typing", "dataclasses", "subprocess", "systemd", "enum", "re"):
        assert heavy not in modules
