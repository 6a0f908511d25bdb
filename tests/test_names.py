"""The names of message files are unique."""

from __future__ import annotations

import subprocess
import sys

from harness import PATIENCE

NAMES = """
import os, time, lmtpd
assert os.getpid() == 1
time.time_ns = lambda: 1795374589375072000
print(*(lmtpd.unique_name() for _ in range(10_000)), sep="\\n")
"""


def test_names_differ_though_the_host_the_process_and_the_time_are_the_same() -> None:
    """As on two hosts of one name, or after the clock was set back."""
    command = ["unshare", "--pid", "--fork", sys.executable, "-c", NAMES]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(10)]
    names = [name for process in processes for name in process.communicate(timeout=PATIENCE)[0].splitlines()]
    assert len(set(names)) == len(names) == 100_000
