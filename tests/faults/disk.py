"""Disks with a write cache, for a loop device each: a FUSE server that keeps a record of what they are told.

    disk.py RECORD SEED IMAGE MOUNTPOINT [IMAGE MOUNTPOINT]

serves the content of each image as the file at the mount point, until all of them are unmounted, and says so on its
standard output when it begins. The images stay as they are. The record is a file of events, each an EVENT and, for a
write, its data:

    WRITE  a write has arrived; "number" is its offset
    DONE   a write has been answered; "number" is the write's event
    FLUSH  the disk has been told to flush its cache, and has been answered

A write is answered after a short random time, meanwhile others arrive, and the answers are in another order than the
writes. So a file system that sends something before it has waited for what must come first is found out. What a flush
has made durable is what had been answered before it arrived: not what was on its way.

The first octets of the record are the number of events (COUNT). It is written before an event is answered.
"""

# The kernel's side is in <linux/fuse.h>. Nothing but the kernel's loop driver uses these file systems, and it has the
# file open with O_DIRECT: each request of the block layer is a request here, and several are on their way at a time.
# (Through the page cache the writes of a file would be merged, and come when it likes.)

from __future__ import annotations

import heapq
import mmap
import os
import random
import select
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from block import leave_mounts

COUNT = struct.Struct("=Q")
EVENT = struct.Struct("=BBxxIQ")  # kind, disk, length of the data, number
WRITE, DONE, FLUSH = range(3)

LONGEST_DELAY = 0.001
LARGEST_WRITE = 1 << 20

# Operations, flags and structures of <linux/fuse.h>, version 7.31.
FORGET, GETATTR, SETATTR, OPEN, READ, WRITE_TO, RELEASE, FSYNC, FLUSH_FD, INIT, INTERRUPT, BATCH_FORGET = (
    2, 3, 4, 14, 15, 16, 18, 20, 25, 26, 36, 42,
)  # fmt: skip
ASYNC_READ, BIG_WRITES, ASYNC_DIO, MAX_PAGES = 1 << 0, 1 << 5, 1 << 15, 1 << 22
FOPEN_DIRECT_IO = 1
REQUEST = struct.Struct("=IIQQIIIHH")  # length, operation, unique, node, uid, gid, pid, extensions, padding
ANSWER = struct.Struct("=IiQ")  # length, error, unique
TRANSFER = struct.Struct("=QQIIQII")  # handle, offset, size, flags, owner of the lock, flags of the file, padding
INIT_ANSWER = struct.Struct("=IIIIHHIIHHI7I")
ATTRIBUTES = struct.Struct("=QII6Q10I")
OPEN_ANSWER = struct.Struct("=QII")
WRITE_ANSWER = struct.Struct("=II")
ENOSYS = 38


class Event(NamedTuple):
    """One of the record. start: where its data begin in the record."""

    kind: int
    disk: int
    length: int
    number: int
    start: int


class Disk:
    """The file at one mount point; its content is a private copy of the image's."""

    def __init__(self, number: int, image: Path, place: Path) -> None:
        self.number = number
        self.size = image.stat().st_size
        with image.open("rb") as file:
            self.content = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE)
        self.fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        options = f"fd={self.fd},rootmode=100600,user_id=0,group_id=0"
        # -i: without a helper program.
        subprocess.run(
            ["mount", "-i", "-t", "fuse", "-o", options, "lmtpd-test", place], check=True, pass_fds=[self.fd]
        )

    def attributes(self) -> bytes:
        numbers = (1, self.size, self.size // 512, 0, 0, 0)
        return ATTRIBUTES.pack(1, 0, 0, *numbers, 0, 0, 0, 0o100600, 1, 0, 0, 0, 4096, 0)

    def answer(self, unique: int, data: bytes | memoryview = b"", error: int = 0) -> None:
        os.writev(self.fd, [ANSWER.pack(ANSWER.size + len(data), -error, unique), data])


class Record:
    """The events, in a file that others read meanwhile."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("r+b", buffering=0)
        self._count = mmap.mmap(self._file.fileno(), mmap.PAGESIZE)
        self._file.seek(mmap.PAGESIZE)
        self.events = 0

    def add(self, kind: int, disk: Disk, number: int = 0, data: bytes | memoryview = b"") -> int:
        """Adds an event; its own number, of which the first is 1."""
        header = EVENT.pack(kind, disk.number, len(data), number)
        os.writev(self._file.fileno(), [header, data])
        self.events += 1
        COUNT.pack_into(self._count, 0, self.events)
        return self.events


class Server:
    """Serves the disks until they are unmounted."""

    def __init__(self, record: Record, disks: list[Disk], seed: int) -> None:
        self._record, self._disks = record, {disk.fd: disk for disk in disks}
        self._random = random.Random(seed)
        self._buffer = bytearray(LARGEST_WRITE + 4096)
        # When a write is to be answered; its event, so that no two are the same; its disk, number and length.
        self._unanswered: list[tuple[float, int, Disk, int, int]] = []

    def serve(self) -> None:
        while self._disks:
            wait = max(self._unanswered[0][0] - time.monotonic(), 0) if self._unanswered else None
            readable, _, _ = select.select(self._disks, [], [], wait)
            self._answer_writes()
            for fd in readable:
                self._read_request(self._disks[fd])

    def _answer_writes(self) -> None:
        while self._unanswered and self._unanswered[0][0] <= time.monotonic():
            _, event, disk, unique, size = heapq.heappop(self._unanswered)
            self._record.add(DONE, disk, event)
            disk.answer(unique, WRITE_ANSWER.pack(size, 0))

    def _read_request(self, disk: Disk) -> None:
        try:
            length = os.readv(disk.fd, [self._buffer])
        except FileNotFoundError:
            return  # the request has been taken back
        except OSError:
            del self._disks[disk.fd]  # ENODEV: it is unmounted
            return
        _, operation, unique, *_ = REQUEST.unpack_from(self._buffer)
        body = memoryview(self._buffer)[REQUEST.size : length]
        if operation == WRITE_TO:
            _, offset, size, *_ = TRANSFER.unpack_from(body)
            data = body[TRANSFER.size : TRANSFER.size + size]
            disk.content[offset : offset + size] = data
            event = self._record.add(WRITE, disk, offset, data)
            due = time.monotonic() + self._random.uniform(0, LONGEST_DELAY)
            heapq.heappush(self._unanswered, (due, event, disk, unique, size))
        elif operation == READ:
            _, offset, size, *_ = TRANSFER.unpack_from(body)
            disk.answer(unique, memoryview(disk.content)[offset : offset + size])
        elif operation == FSYNC:
            self._record.add(FLUSH, disk)
            disk.answer(unique)
        elif operation == INIT:
            _, _, readahead, offered = struct.unpack_from("=IIII", body)
            flags = offered & (ASYNC_READ | BIG_WRITES | ASYNC_DIO | MAX_PAGES)
            pages = LARGEST_WRITE // mmap.PAGESIZE
            disk.answer(
                unique, INIT_ANSWER.pack(7, 31, readahead, flags, 64, 48, LARGEST_WRITE, 1, pages, 0, 0, *[0] * 7)
            )
        elif operation in (GETATTR, SETATTR):
            disk.answer(unique, disk.attributes())
        elif operation == OPEN:
            disk.answer(unique, OPEN_ANSWER.pack(0, FOPEN_DIRECT_IO, 0))
        elif operation in (RELEASE, FLUSH_FD):
            disk.answer(unique)
        elif operation not in (FORGET, BATCH_FORGET, INTERRUPT):
            disk.answer(unique, error=ENOSYS)


def main() -> None:
    record, seed, *places = sys.argv[1:]
    pairs = zip(places[::2], places[1::2])
    disks = [Disk(number, Path(image), Path(place)) for number, (image, place) in enumerate(pairs)]
    # The last process of a mount namespace unmounts what is there when it ends. If that were this one, killed, it would
    # wait for its own answers, and everybody's sync(2) would wait, too.
    leave_mounts([Path(place) for place in places[1::2]])
    print("mounted", flush=True)
    os.close(sys.stdout.fileno())
    Server(Record(Path(record)), disks, int(seed)).serve()


if __name__ == "__main__":
    main()
