"""The least that stores messages, without lmtpd: system calls in one order or another, by several processes.

    orders.py ORDER FOLDER FIRST COUNT

stores COUNT messages with the numbers FIRST, FIRST + WRITERS, ..., and prints each number when it is durable.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import random
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

WRITERS, FOLDERS = 4, 2
FS_IOC_FIEMAP, FIEMAP_FLAG_SYNC = 0xC020660B, 1
FIEMAP = struct.Struct("=QQIIII")  # start, length, flags, extents that there are, room for so many, padding
SYNC_FILE_RANGE_WRITE = 2
LIBC = ctypes.CDLL(None, use_errno=True)
WRITE_SIZE = 1 << 16


def content(number: int) -> bytes:
    dice = random.Random(number)
    return dice.randbytes(dice.choice((500, 2000, 4096, 4096, 9000, 100_000, 1_000_000)))


def wait_for_data(fd: int) -> None:
    """Writes the data to the device, and waits for that; does not flush its cache, nor commit a journal."""
    fcntl.ioctl(fd, FS_IOC_FIEMAP, FIEMAP.pack(0, (1 << 64) - 1, FIEMAP_FLAG_SYNC, 0, 0, 0))


def begin_to_write(fd: int) -> None:
    if LIBC.sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(0), SYNC_FILE_RANGE_WRITE):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def nothing(fd: int) -> None:
    pass


def renamed(sync: Callable[[int], None], sync_folder: Callable[[int], None]) -> Callable[[int, int, int], None]:
    """Writes a file in tmp/, and moves it to new/."""

    def store(number: int, tmp: int, new: int) -> None:
        name = str(number)
        fd = os.open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600, dir_fd=tmp)
        write(fd, content(number))
        sync(fd)
        os.close(fd)
        os.rename(name, name, src_dir_fd=tmp, dst_dir_fd=new)
        sync_folder(new)

    return store


def linked(sync: Callable[[int], None], sync_folder: Callable[[int], None]) -> Callable[[int, int, int], None]:
    """Writes a file without a name, and gives it one in new/."""

    def store(number: int, tmp: int, new: int) -> None:
        fd = os.open(".", os.O_TMPFILE | os.O_RDWR, 0o600, dir_fd=tmp)
        write(fd, content(number))
        sync(fd)
        os.link(f"/proc/self/fd/{fd}", str(number), dst_dir_fd=new)
        os.close(fd)
        sync_folder(new)

    return store


def write(fd: int, data: bytes) -> None:
    for start in range(0, len(data), WRITE_SIZE):
        os.write(fd, data[start : start + WRITE_SIZE])


ORDERS = {
    "fsync-rename-fsync": renamed(os.fsync, os.fsync),
    "wait-link-fsync": linked(wait_for_data, os.fsync),
    "rename-fsync": renamed(nothing, os.fsync),
    "link-fsync": linked(nothing, os.fsync),
    "begin-link-fsync": linked(begin_to_write, os.fsync),
    "wait-link": linked(wait_for_data, nothing),
}


class Calls:
    """Has the messages stored in one order; then says what is wrong with a store."""

    def __init__(self, place: Path, count: int, order: str) -> None:
        self._place, self._count, self._order = place, count, order
        # For each message the last event before it was said to be durable.
        self.answered: dict[int, int] = {}
        for folder in range(FOLDERS):
            for name in ("tmp", "new"):
                (place / str(folder) / name).mkdir(parents=True)

    def run(self, position: Callable[[], int]) -> None:
        """Has all messages stored. position: gives the number of the last event."""
        writers = [threading.Thread(target=self._follow, args=(first, position)) for first in range(WRITERS)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        if len(self.answered) < self._count // WRITERS * WRITERS:
            raise RuntimeError("a writer has failed")

    def _follow(self, first: int, position: Callable[[], int]) -> None:
        numbers = [str(first), str(self._count // WRITERS)]
        command = [sys.executable, __file__, self._order, str(self._place), *numbers]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            for line in process.stdout:
                self.answered[int(line)] = position()

    def faults(self, place: Path, cut: int) -> Iterator[tuple[str, str]]:
        """The faults of the store that is mounted there, and what each concerns."""
        found = set()
        for path in place.glob("*/new/*"):
            found.add(int(path.name))
            if path.read_bytes() != content(int(path.name)):
                yield "partial", path.name
        for number, position in self.answered.items():
            if position <= cut and number not in found:
                yield "lost", str(number)

    def expected(self, cut: int) -> int:
        """How many messages must be there."""
        return sum(1 for position in self.answered.values() if position <= cut)


def main() -> None:
    order, place, first, count = sys.argv[1:]
    folder = Path(place, str(int(first) % FOLDERS))
    tmp, new = (os.open(folder / name, os.O_RDONLY | os.O_DIRECTORY) for name in ("tmp", "new"))
    for number in range(int(first), int(first) + int(count) * WRITERS, WRITERS):
        ORDERS[order](number, tmp, new)
        print(number, flush=True)


if __name__ == "__main__":
    main()
