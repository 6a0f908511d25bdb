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
# Changes of lmtpd.py: other drafts on every file system, and a sync less.
TWO_COMMITS = ("works = cls._works_on.get(device)", "works = False")
NO_WAIT_FOR_DATA = ("ioctl(fd, FS_IOC_FIEMAP, COUNT_WRITTEN_EXTENTS)", "pass")
NO_SYNC_OF_DATA = ("os.fsync(self._fd)", "pass")
NO_SYNC_OF_FOLDER = ("sync_directory(self._directory)", "pass")
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


def changed(folder: Path, *changes: tuple[str, str]) -> str:
    """The option for an lmtpd.py with these changes, which is put into the folder."""
    source = (TOP / "lmtpd.py").read_text()
    for old, new in changes:
        assert old in source
        source = source.replace(old, new)
    (folder / "lmtpd.py").write_text(source)
    return f"--lmtpd={folder}/lmtpd.py"


def assert_faultless(table: Table) -> None:
    assert table.total("messages") > 100, table.said
    assert [table.total(fault) for fault in FAULTS] == [0] * len(FAULTS), table.said


@pytest.mark.parametrize("file_system", FILE_SYSTEMS)
def test_what_was_answered_survives_a_power_loss(file_system: str) -> None:
    assert_faultless(examined(file_system))


@pytest.mark.parametrize("file_system", FILE_SYSTEMS)
def test_so_it_does_with_two_commits_of_the_journal(tmp_path: Path, file_system: str) -> None:
    """As lmtpd does it on other file systems."""
    assert_faultless(examined(file_system, changed(tmp_path, TWO_COMMITS), states=30))


@pytest.mark.parametrize("file_system", ["ext4-external", "xfs-external"])
def test_so_it_does_with_the_journal_on_another_disk(file_system: str) -> None:
    """Where one commit is not enough, see below."""
    assert_faultless(examined(file_system, states=15))


@pytest.mark.parametrize("file_system", FILE_SYSTEMS)
@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ([NO_WAIT_FOR_DATA], "partial"),
        ([TWO_COMMITS, NO_SYNC_OF_DATA], "partial"),
        ([NO_SYNC_OF_FOLDER], "lost"),
    ],
    ids=["data", "data-two-commits", "folder"],
)
def test_a_missing_sync_of_lmtpd_is_found(
    tmp_path: Path, file_system: str, changes: list[tuple[str, str]], fault: str
) -> None:
    table = examined(file_system, changed(tmp_path, *changes), states=9)
    assert table.total(fault), table.said


@pytest.mark.parametrize("file_system", FILE_SYSTEMS)
def test_data_that_is_not_waited_for_is_found(file_system: str) -> None:
    """By bare system calls instead of lmtpd: the data is on its way to the disk when the file gets its name."""
    table = examined(file_system, "--order=begin-link-fsync", states=30)
    assert table.total("partial"), table.said
    assert table.total("lost") == 0, table.said


def test_a_cache_that_is_not_flushed_is_found() -> None:
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
