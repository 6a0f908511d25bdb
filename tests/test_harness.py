"""What the other tests rely on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness import Site

TESTS = Path(__file__).parent


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_test_that_is_skipped_fails_the_run(tmp_path: Path, workers: str) -> None:
    (tmp_path / "test_it.py").write_text("import pytest\ndef test_it(): pytest.skip()\n")
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", "-n", workers, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "1 skipped" in run.stdout
    assert run.returncode == pytest.ExitCode.TESTS_FAILED


def test_no_port_is_handed_out_twice() -> None:
    """Not even by processes that know nothing of each other; nor is it one that the system gives to clients."""
    program = "import harness, sys; print(*(harness.free_port() for _ in range(120)), flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", program]
    children = [
        subprocess.Popen(command, cwd=TESTS, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    ports: list[int] = []
    for child in children:
        assert child.stdout
        ports += map(int, child.stdout.readline().split())
    for child in children:
        child.communicate()
    assert len(set(ports)) == len(ports) == 360
    lowest, highest = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    assert not [port for port in ports if lowest <= port <= highest]


def test_a_figure_that_is_not_there_is_not_changed_in_vain(site: Site) -> None:
    site.figures = {"GRACE": 1, "NOWHERE": 1}
    done = site.pipe(b"QUIT\r\n")
    assert done.returncode == 1
    assert done.stdout == b""
    assert "NOWHERE" in site.log_text()
