"""What is on the disks after a power loss, made from the record of what they were told (see disk.py)."""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import disk
from block import FileSystem, unmount
from disk import COUNT, DONE, EVENT, FLUSH, WRITE, Event

COPY_SIZE = 1 << 20

# The kinds of states: every write that the disk was sent, also if it was not answered; only those that a flush made
# durable; those and some of the others, whole or in part.
WRITTEN, FLUSHED, MIXED = KINDS = ("written", "flushed", "mixed")


class State(NamedTuple):
    """The disks at a power loss. cut: the number of the last event before it."""

    cut: int
    kind: str
    images: Sequence[Path]

    def remove(self) -> None:
        """Removes the images."""
        for image in self.images:
            image.unlink()


class Recording:
    """A file system that is mounted on recorded disks, in a "with" block.

    place: where it is mounted. sector: octets that its disks write as a whole. base: their images before it all.
    """

    def __init__(self, folder: Path, file_system: FileSystem, seed: int) -> None:
        self._folder, self._file_system, self._seed = folder, file_system, seed
        self._stack = contextlib.ExitStack()
        self.sector = file_system.sector
        self.place = folder / "mounted"
        self._record = folder / "record"
        numbers = range(2 if file_system.log else 1)
        self.base = [folder / f"base{number}" for number in numbers]
        self._disks = [folder / f"disk{number}" for number in numbers]

    def __enter__(self) -> Recording:
        with self._stack:
            self.place.mkdir()
            self._file_system.make(self.base)
            self._record.write_bytes(bytes(mmap.PAGESIZE))
            with self._record.open("rb") as file:
                self._count = mmap.mmap(file.fileno(), mmap.PAGESIZE, prot=mmap.PROT_READ)
            for path in self._disks:
                path.touch()
            places = [str(path) for pair in zip(self.base, self._disks) for path in pair]
            command = [sys.executable, disk.__file__, str(self._record), str(self._seed), *places]
            server = subprocess.Popen(command, stdout=subprocess.PIPE)
            self._stack.callback(server.wait)
            assert server.stdout
            with server.stdout:
                if not server.stdout.read():  # its greeting, when all is mounted
                    raise RuntimeError("the disks are not served")
            for path in self._disks:
                self._stack.callback(unmount, path)
            self._stack.enter_context(self._file_system.mounted(self._disks, self.place, direct=True))
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def position(self) -> int:
        """The number of the last event."""
        return int(COUNT.unpack_from(self._count)[0])

    def events(self) -> tuple[list[Event], mmap.mmap]:
        """All events, and the record in which their data are."""
        with self._record.open("rb") as file:
            record = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        events, offset = [], mmap.PAGESIZE
        for _ in range(self.position()):
            kind, number_of_disk, length, number = EVENT.unpack_from(record, offset)
            offset += EVENT.size
            events.append(Event(kind, number_of_disk, length, number, offset))
            offset += length
        return events, record


class Replay:
    """Plays a record back, and stops where the power is lost."""

    def __init__(self, folder: Path, recording: Recording, dice: random.Random) -> None:
        self._folder, self._random, self._sector = folder, dice, recording.sector
        self._events, self._data = recording.events()
        # What is durable. The base is needed no more.
        self._durable = recording.base
        self._files = [os.open(path, os.O_RDWR | os.O_CLOEXEC) for path in self._durable]
        # For each disk the writes that are not durable yet, by their numbers, and whether they have been answered.
        self._pending: list[dict[int, bool]] = [{} for _ in self._files]
        self._at = 0

    def states(self, cuts: Sequence[int]) -> Iterator[State]:
        """The states after a power loss at each of these events. The caller removes them."""
        for number_of_cut, cut in enumerate(sorted(cuts)):
            self._advance(cut)
            for kind in KINDS:
                images = [self._folder / f"cut{number_of_cut}-{kind}-{number}" for number in range(len(self._files))]
                for number, image in enumerate(images):
                    self._make(number, image, kind)
                yield State(cut, kind, images)

    def _advance(self, cut: int) -> None:
        while self._at < cut:
            event = self._events[self._at]
            self._at += 1
            pending = self._pending[event.disk]
            if event.kind == WRITE:
                pending[self._at] = False
            elif event.kind == DONE:
                if event.number in pending:
                    pending[event.number] = True
            elif event.kind == FLUSH:
                for number in [number for number, answered in pending.items() if answered]:
                    del pending[number]
                    self._apply(self._events[number - 1], self._files[event.disk])

    def _apply(self, event: Event, file: int, parts: Sequence[tuple[int, int]] | None = None) -> None:
        for start, end in parts if parts is not None else [(0, event.length)]:
            os.pwrite(file, memoryview(self._data)[event.start + start : event.start + end], event.number + start)

    def _make(self, number: int, image: Path, kind: str) -> None:
        file = os.open(image, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            copy_sparse(self._files[number], file)
            rate = self._random.choice((0.1, 0.5, 0.9))
            for pending in self._pending[number]:
                event = self._events[pending - 1]
                if kind == WRITTEN:
                    self._apply(event, file)
                elif kind == MIXED:
                    self._apply(event, file, self._some_of(event, rate))
        finally:
            os.close(file)

    def _some_of(self, event: Event, rate: float) -> list[tuple[int, int]]:
        """The parts of a write that happened: all, none, or any of its sectors."""
        if self._random.random() < 0.5:
            return [(0, event.length)] if self._random.random() < rate else []
        starts = range(0, event.length, self._sector)
        return [(start, start + self._sector) for start in starts if self._random.random() < rate]

    def close(self) -> None:
        for file in self._files:
            os.close(file)


def copy_sparse(source: int, target: int) -> None:
    """Copies a file with its holes."""
    size = os.fstat(source).st_size
    os.ftruncate(target, size)
    end = 0
    while True:
        try:
            start = os.lseek(source, end, os.SEEK_DATA)
        except OSError:
            return  # ENXIO: no more data
        end = os.lseek(source, start, os.SEEK_HOLE)
        for offset in range(start, end, COPY_SIZE):
            os.pwrite(target, os.pread(source, min(COPY_SIZE, end - offset), offset), offset)
