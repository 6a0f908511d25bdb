"""Loop devices that go when nobody uses them, and file systems on them. Needs root."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

# <linux/loop.h>
LOOP_CTL_GET_FREE, LOOP_CONFIGURE = 0x4C82, 0x4C0A
AUTOCLEAR, DIRECT_IO = 4, 16
CONFIGURATION = struct.Struct("=II40xIIII64x64x32x16x64x")  # file, block size, ..., loop, encryption (2), flags

CLONE_NEWNS, MNT_DETACH = 0x20000, 2  # <sched.h>, <sys/mount.h>
LIBC = ctypes.CDLL(None, use_errno=True)
MEBIBYTE = 1 << 20


class FileSystem(NamedTuple):
    """How one is made and mounted.

    sector: octets that its disk writes as a whole. log: the size of a journal on another disk, 0 if it is on the same.
    """

    kind: str
    size: int
    sector: int
    features: str = ""
    options: str = ""
    log: int = 0

    def make(self, images: Sequence[Path]) -> None:
        """Makes it in these files, the second of which is the journal's."""
        for image, size in zip(images, (self.size, self.log)):
            with image.open("wb") as file:
                file.truncate(size)
        with contextlib.ExitStack() as stack:
            devices = [stack.enter_context(loop(image, self.sector)) for image in images]
            for command in self._commands(*devices):
                done = subprocess.run(command, check=False, capture_output=True, text=True)
                if done.returncode:
                    raise RuntimeError(f"{' '.join(command)}: {done.stderr}")

    def _commands(self, device: str, log: str = "") -> list[list[str]]:
        if self.kind == "xfs":
            where = ["-l", f"logdev={log},size={self.log // 4096}b"] if log else []
            return [["mkfs.xfs", "-q", "-f", "-K", *where, device]]
        # A small journal is full soon, so that what happens then is tested, too.
        whole = "nodiscard,lazy_itable_init=0,lazy_journal_init=0"
        where = ["-J", f"device={log}" if log else "size=8"]
        features = ["-O", self.features] if self.features else []
        make = ["mkfs.ext4", "-q", "-F", "-b", "4096", "-E", whole, *features, *where, device]
        return ([["mke2fs", "-q", "-F", "-b", "4096", "-O", "journal_dev", log]] if log else []) + [make]

    @contextlib.contextmanager
    def mounted(self, images: Sequence[Path], place: Path, direct: bool = False) -> Iterator[None]:
        """Mounts it there for the time of a "with" block. Raises OSError."""
        with contextlib.ExitStack() as stack:
            device, *log = [stack.enter_context(loop(image, self.sector, direct)) for image in images]
            options = [self.options] if self.options else []
            if self.kind == "xfs":
                options += ["nouuid", *(f"logdev={path}" for path in log)]
            else:
                options += [f"journal_path={path}" for path in log]
            mount(device, place, self.kind, ",".join(options))
        try:
            yield
        finally:
            unmount(place)

    def check(self, images: Sequence[Path]) -> Iterator[str]:
        """What the file system's own program finds wrong in it when it is not mounted; nothing with an external log."""
        if self.log:
            return
        command = ["xfs_repair", "-n"] if self.kind == "xfs" else ["e2fsck", "-f", "-n"]
        done = subprocess.run([*command, str(images[0])], check=False, capture_output=True, text=True)
        if done.returncode:
            yield done.stdout + done.stderr


# The superblock of ext4 has 1024 octets and a checksum: if only one of two sectors is written, it cannot be mounted.
EXT4 = FileSystem("ext4", 256 * MEBIBYTE, 4096)
# It cannot be smaller.
XFS = FileSystem("xfs", 300 * MEBIBYTE, 512)
FILE_SYSTEMS = {
    "ext4": EXT4,
    "ext4-journal": EXT4._replace(options="data=journal"),
    "ext4-writeback": EXT4._replace(options="data=writeback"),
    "ext4-nodelalloc": EXT4._replace(options="nodelalloc"),
    "ext4-dioread-lock": EXT4._replace(options="dioread_lock"),
    "ext4-async-commit": EXT4._replace(options="data=journal,journal_async_commit"),
    "ext4-inline-data": EXT4._replace(features="inline_data"),
    "ext4-fast-commit": EXT4._replace(features="fast_commit"),
    "ext4-external": EXT4._replace(log=16 * MEBIBYTE),
    "xfs": XFS,
    "xfs-external": XFS._replace(log=64 * MEBIBYTE),
}


@contextlib.contextmanager
def loop(image: Path, sector: int, direct: bool = False) -> Iterator[str]:
    """A loop device for the image, of which the kernel disposes after the "with" block when it is not mounted.

    direct: whether each request goes to the image's file system as it is, several at a time.
    """
    flags = AUTOCLEAR | (DIRECT_IO if direct else 0)
    with image.open("r+b") as file:
        while True:
            with open("/dev/loop-control", "rb", buffering=0) as control:
                number = fcntl.ioctl(control, LOOP_CTL_GET_FREE)
            device = os.open(f"/dev/loop{number}", os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.ioctl(device, LOOP_CONFIGURE, CONFIGURATION.pack(file.fileno(), sector, 0, 0, 0, flags))
                break
            except OSError as error:
                os.close(device)
                if error.errno != errno.EBUSY:  # another process has taken it
                    raise
    try:
        yield f"/dev/loop{number}"
    finally:
        os.close(device)


def mount(device: str, place: Path, kind: str, options: str) -> None:
    if LIBC.mount(device.encode(), bytes(place), kind.encode(), 0, options.encode()):
        raise OSError(ctypes.get_errno(), f"{kind} ({options}): {os.strerror(ctypes.get_errno())}", device)


def unmount(place: Path, flags: int = 0) -> None:
    if LIBC.umount2(bytes(place), flags):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(place))


def leave_mounts(places: Sequence[Path]) -> None:
    """Takes the process to a mount namespace of its own, in which what is at these places is not mounted."""
    if LIBC.unshare(CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    for place in places:
        unmount(place, MNT_DETACH)


def sync_file_system(place: Path) -> None:
    """Syncs the file system that has this directory, and no other: sync(2) waits for everybody's."""
    fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if LIBC.syncfs(fd):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(place))
    finally:
        os.close(fd)
