"""File systems for tests whose outcome depends on the type: whether lmtpd's drafts have a name depends on it."""

from __future__ import annotations

import fcntl
import os
import subprocess
from pathlib import Path

import pytest
from peers import program

IMAGE_SIZE = 2 << 30  # bytes, most of them never written
# tmpfs has no journal, so drafts have names there. The test's fixture "site" is on each of them.
ALL_DRAFTS = pytest.mark.parametrize("site", ["tmpfs", "ext4"], indirect=True)


def mounted(file_system: str, shared: Path) -> Path:
    """A folder on a file system of that type, in memory, made below a shared folder by the worker that comes first."""
    folder = shared / file_system
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.path.ismount(folder):
            folder.mkdir()
            mount = ["-t", "tmpfs", "lmtpd-test"]
            if file_system != "tmpfs":
                image = folder.with_suffix(".image")
                image.touch()
                os.truncate(image, IMAGE_SIZE)
                subprocess.run([program(f"mkfs.{file_system}"), "-q", image], check=True)
                mount = ["-o", "loop", str(image)]
            subprocess.run(["mount", *mount, folder], check=True)
            folder.chmod(0o755)
    return folder


def unmount_all(shared: Path) -> None:
    """Unmounts what mounted() has mounted there."""
    for folder in filter(os.path.ismount, shared.iterdir()):
        subprocess.run(["umount", "--lazy", folder], check=True)
