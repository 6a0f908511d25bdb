"""What has been answered 250 survives a power loss, whole. How this is tested is in faults/README.md."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from harness import PATIENCE, wait_for
from starters import descendants

TOP = Path(__file__).parent.parent
PROGRAM = TOP / "tests/faults/power_loss.py"
FILE_SYSTEMS = ("ext4", "xfs")
# The calls by which lmtpd makes a message's data durable, and its name.
DATA_SYNCS = ["os.fsync(self._fd)", "ioctl(fd, FS_IOC_FIEMAP, COUNT_WRITTEN_EXTENTS)"]
FOLDER_SYNCS = ["sync_directory(self._directory)"]
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
@pytest.mark.parametrize(("calls", "fault"), [(DATA_SYNCS, "partial"), (FOLDER_SYNCS, "lost")], ids=["data", "folder"])
def test_a_missing_sync_of_lmtpd_is_found(tmp_path: Path, file_system: str, calls: list[str], fault: str) -> None:
    source = wrong = (TOP / "lmtpd.py").read_text()
    for call in calls:
        wrong = wrong.replace(call, "pass")
    assert wrong != source
    (tmp_path / "lmtpd.py").write_text(wrong)
    table = examined(file_system, f"--lmtpd={tmp_path}/lmtpd.py", states=9)
    assert table.total(fault), table.said


@pytest.mark.parametrize("file_system", FILE_SYSTEMS)
def test_data_that_is_not_waited_for_is_found(file_system: str) -> None:
    """By bare system calls instead of lmtpd: the data is on its way to the disk when the file gets its name."""
    table = examined(file_system, "--order=begin-link-fsync", states=30)
    assert table.total("partial"), table.said
    assert table.total("lost") == 0, table.said


def test_a_cache_that_nobody_flushes_is_found() -> None:
    """On ext4 with its journal on another disk, one commit of the journal does not flush the disk that has the data."""
    table = examined("ext4-external", "--order=wait-link-fsync", states=9)
    assert table.total("partial"), table.said


def loop_devices(folder: Path) -> set[str]:
    """The loop devices of files below this folder, and of files that are mounted nowhere any more."""
    found = set()
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            file = path.read_text().strip()
        except OSError:
            continue  # it has just gone
        if file == "/" or file.startswith(f"{folder}/"):
            found.add(path.parts[3])
    return found


def is_running(words: str) -> bool:
    return not subprocess.run(["pgrep", "-f", words], stdout=subprocess.DEVNULL).returncode


def test_nothing_is_left_when_it_is_killed(tmp_path: Path) -> None:
    """Not even what the kernel has to do for a process before it may end: it would wait for a disk that has gone."""
    command = [sys.executable, str(PROGRAM), "--messages=20000", "--order=wait-link-fsync", "ext4"]
    with subprocess.Popen(command, env={**os.environ, "TMPDIR": str(tmp_path)}, stdout=subprocess.DEVNULL) as process:
        try:
            writers = f"orders.py wait-link-fsync {tmp_path}"
            wait_for(lambda: process.poll() is not None or is_running(writers), "the writers")
            assert process.poll() is None
            devices = loop_devices(tmp_path)
            ends = [os.pidfd_open(pid) for pid in descendants(process.pid)]
        finally:
            process.kill()
    for end in ends:
        assert select.select([end], [], [], PATIENCE)[0], "a process has not ended"
        os.close(end)
    wait_for(lambda: not devices & loop_devices(tmp_path), "the end of the loop device")
    [folder] = tmp_path.iterdir()
    assert list(folder.iterdir()) == []
