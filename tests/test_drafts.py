"""Which file systems get drafts without names: those that are known to put all changes into one journal, in order."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from peers import program

import lmtpd


@contextmanager
def image(folder: Path, make: str, *mount: str) -> Iterator[Path]:
    """A mounted file system in a file there. make: the command that makes it."""
    file, where = folder / "image", folder / "mounted"
    file.touch()
    os.truncate(file, 400 << 20)
    where.mkdir()
    command, *arguments = make.split()
    subprocess.run([program(command), *arguments, file], check=True, capture_output=True)
    subprocess.run(["mount", *mount, file, where], check=True)
    try:
        yield where
    finally:
        subprocess.run(["umount", "--lazy", where], check=True)


def has_ordered_journal(folder: Path) -> bool:
    """The answer for the file system that has the folder."""

    def sync_change() -> None:
        with (folder / "change").open("wb") as file:
            os.fsync(file.fileno())

    return lmtpd.has_ordered_journal(os.stat(folder).st_dev, sync_change)


@pytest.mark.parametrize(
    ("make", "options", "ordered"),
    [
        ("mkfs.ext4 -q", "loop", True),
        ("mkfs.ext4 -q", "loop,data=journal", True),
        ("mkfs.ext4 -q", "loop,data=writeback", False),
        ("mkfs.ext4 -q -O ^has_journal", "loop", False),
        ("mkfs.ext3 -q", "loop", False),
        ("mkfs.ext4 -q -O fast_commit", "loop", False),
        ("mkfs.xfs -q", "loop", True),
    ],
)
def test_the_journal_is_known(tmp_path: Path, make: str, options: str, ordered: bool) -> None:
    with image(tmp_path, make, "-o", options) as mounted:
        assert has_ordered_journal(mounted) is ordered


def test_a_mode_in_the_superblock_counts(tmp_path: Path) -> None:
    """No option of the mount shows it."""
    with image(tmp_path, "mkfs.ext4 -q") as mounted:
        assert has_ordered_journal(mounted)
    (tmp_path / "mounted").rmdir()
    file = tmp_path / "image"
    subprocess.run([program("tune2fs"), "-o", "journal_data_writeback", file], check=True, capture_output=True)
    (tmp_path / "mounted").mkdir()
    subprocess.run(["mount", file, tmp_path / "mounted"], check=True)
    try:
        assert not has_ordered_journal(tmp_path / "mounted")
    finally:
        subprocess.run(["umount", "--lazy", tmp_path / "mounted"], check=True)


@pytest.mark.parametrize("folder", ["/dev/shm", "/proc", "/sys"])
def test_what_has_no_journal_is_known(folder: str) -> None:
    assert not has_ordered_journal(Path(folder))


def test_an_unknown_device_has_none() -> None:
    assert not lmtpd.has_ordered_journal(os.makedev(4095, 1048575), lambda: None)
