"""Which file systems get drafts without names: those that are known to put all changes into one journal, in order."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness import Site
from peers import program

import lmtpd


@contextmanager
def image(folder: Path, make: str, *mount: str, tune: str = "") -> Iterator[Path]:
    """A mounted file system in a file there. make: the command that makes it. tune: an option of its superblock."""
    file, where = folder / "image", folder / "mounted"
    file.touch()
    os.truncate(file, 400 << 20)
    where.mkdir()
    command, *arguments = make.split()
    subprocess.run([program(command), *arguments, file], check=True, capture_output=True)
    if tune:
        subprocess.run([program("tune2fs"), "-o", tune, file], check=True, capture_output=True)
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
    for mode, ordered in (("^journal_data_writeback", True), ("journal_data_writeback", False)):
        folder = tmp_path / mode
        folder.mkdir()
        with image(folder, "mkfs.ext4 -q", tune=mode) as mounted:
            assert has_ordered_journal(mounted) is ordered


@pytest.mark.parametrize("folder", ["/dev/shm", "/proc", "/sys"])
def test_what_has_no_journal_is_known(folder: str) -> None:
    assert not has_ordered_journal(Path(folder))


def test_an_unknown_device_has_none() -> None:
    assert not lmtpd.has_ordered_journal(os.makedev(4095, 1048575), lambda: None)


@pytest.mark.parametrize(
    ("release", "version"),
    [
        *[("6.18.44-fc-v669", (6, 18)), ("6.12.48+deb13-amd64", (6, 12)), ("6.17+deb14-amd64", (6, 17))],
        *[("6.12+", (6, 12)), ("6.18-rc1+", (6, 18)), ("5.10.0", (5, 10)), ("unknown", (0, 0)), ("7", (0, 0))],
    ],
)
def test_the_version_of_the_kernel(monkeypatch: pytest.MonkeyPatch, release: str, version: tuple[int, int]) -> None:
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", "host", release, "#1", "x86_64")))
    assert lmtpd.linux_version() == version


def test_a_file_system_that_is_mounted_from_an_empty_name_is_known(tmp_path: Path) -> None:
    """A field of mountinfo is empty then. mount(8) does not do that, but programs that call mount(2) do."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mount(b"", bytes(tmp_path), b"tmpfs", 0, None) == 0, os.strerror(ctypes.get_errno())
    try:
        device = os.stat(tmp_path).st_dev
        assert lmtpd.mount_of(f"{os.major(device)}:{os.minor(device)}")[0] == "tmpfs"
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)


def test_one_user_does_not_decide_for_the_others(tmp_path: Path) -> None:
    """A user whose tmp/ cannot be used, or whose message has too many links, gets what is possible for that mail."""
    with image(tmp_path, "mkfs.ext4 -q") as mounted:
        for name in ("one", "other"):
            for part in ("tmp", "new"):
                (mounted / name / part).mkdir(parents=True)
        guest = lmtpd.Identity(54321, 54321, ())
        one, other = (lmtpd.Directory(str(mounted / name), guest) for name in ("one", "other"))
        (mounted / "one/tmp").rmdir()
        (mounted / "one/tmp").symlink_to("new")
        os.chown(mounted / "one", guest.uid, guest.gid)
        with pytest.raises(OSError, match="symbolic link"):
            one.new_draft("tmp")
        draft = other.new_draft("tmp")
        assert isinstance(draft, lmtpd.UnnamedDraft)
        new = os.open(mounted / "other/new", os.O_RDONLY)
        draft.link(new, "a")
        with pytest.raises(FileExistsError):
            draft.link(new, "a")
        draft.discard()
        os.close(new)
        another = other.new_draft("tmp")
        assert isinstance(another, lmtpd.UnnamedDraft)
        another.discard()


def test_a_disk_that_fails_while_it_writes_is_a_temporary_failure(site: Site) -> None:
    """The file system has room, but its disk has not: only who waits for the data learns of it."""
    small = site.root / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m,mode=0755", "lmtpd-test", small], check=True)
    try:
        with image(small, "mkfs.ext4 -q -E lazy_itable_init=0") as mounted:
            for part in ("", "jane", "jane/tmp", "jane/new", "jane/cur"):
                (mounted / part).mkdir(exist_ok=True)
                site.give(mounted / part)
            site.configure(**{"partition-default": str(mounted)})
            client = site.connect()
            client.hello()
            assert client.deliver(b"Subject: small\r\n\r\n", "jane")[0].startswith("250")
            large = b"Subject: large\r\n\r\n" + (b"x" * 998 + b"\r\n") * 80_000
            assert client.deliver(large, "jane")[0][:9] in ("452 4.3.1", "451 4.3.0")
            [stored] = (mounted / "jane/new").iterdir()
            assert stored.read_bytes().endswith(b"Subject: small\n\n")
            client.close()
    finally:
        subprocess.run(["umount", "--lazy", small], check=True)
    assert "spooling-failed" in site.log_text()
