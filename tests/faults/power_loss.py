#!/usr/bin/env python3
"""Looks for messages that lmtpd has taken and a power loss has broken or lost.

Usage:
  power_loss.py [options] [FILE-SYSTEM...]
  power_loss.py --help

Options:
  --states N      How many states of each file system are looked at [default: 300].
  --messages N    How many messages are delivered meanwhile [default: 200].
  --seed N        Another one gives other states [default: 1].
  --lmtpd FILE    Another lmtpd.py than the one that is installed.
  --order ORDER   System calls in this order instead of lmtpd: fsync-rename-fsync, wait-link-fsync, and wrong ones:
                  rename-fsync, link-fsync, begin-link-fsync, wait-link.
  --help          Show this text.

File systems: ext4, xfs (these two by default), ext4-journal, ext4-writeback, ext4-nodelalloc, ext4-dioread-lock,
ext4-async-commit, ext4-inline-data, ext4-fast-commit, ext4-external, xfs-external.

Prints a table, and its first faults on standard error; the exit status is 1 if there are any. It needs root, and leaves
nothing behind, even if it is killed: all is in a mount namespace of its own.
"""

from __future__ import annotations

import collections
import os
import random
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Union

from docopt import docopt

sys.path.append(str(Path(__file__).parent.parent))

from block import FILE_SYSTEMS, FileSystem, mount, sync_file_system
from deliveries import Deliveries
from orders import Calls
from states import KINDS, Recording, Replay, State

# The name, in the environment, of the folder in which all is.
INSIDE = "LMTPD_POWER_LOSS_FOLDER"
AT_ONCE = 4  # most of the time of a state is waiting
FAULTS = ("lost", "partial", "twice", "unflagged", "unreadable", "damaged")
FAULTS_SHOWN = 10
STATES_FOR_A_CHECK = 10  # one of so many is checked by the file system's own program

Tally = dict[str, collections.Counter[str]]
Work = Union[Deliveries, Calls]


def confine() -> int:
    """Runs this program again, where everything that it mounts or starts ends with it."""
    namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    command = ["setpriv", "--pdeathsig", "KILL", *namespaces, sys.executable, *sys.argv]
    with tempfile.TemporaryDirectory(prefix="lmtpd-test-") as folder:
        return subprocess.run(command, env={**os.environ, INSIDE: folder}, check=False).returncode


def enter() -> Path:
    """The folder for all that the program makes there: an empty tmpfs."""
    folder = Path(os.environ[INSIDE])
    mount("none", folder, "tmpfs", "mode=755,size=80%")
    tempfile.tempdir = str(folder)
    return folder


class Examination:
    """Looks at states, several at a time."""

    def __init__(self, folder: Path, file_system: FileSystem, work: Work) -> None:
        self._folder, self._file_system, self._work = folder, file_system, work
        self.tally: Tally = {kind: collections.Counter() for kind in KINDS}
        self._shown = 0
        self._lock = threading.Lock()

    def run(self, replay: Replay, cuts: list[int]) -> None:
        """Looks at the states at these events, of every kind."""
        room = threading.Semaphore(AT_ONCE)
        with ThreadPoolExecutor(AT_ONCE) as threads:
            done = []
            for number, state in enumerate(replay.states(cuts)):
                room.acquire()
                done.append(threads.submit(self._look, number, state))
                done[-1].add_done_callback(lambda _: room.release())
        for future in done:
            future.result()

    def _look(self, number: int, state: State) -> None:
        place = self._folder / f"state{number}"
        place.mkdir()
        try:
            try:
                with self._file_system.mounted(state.images, place):
                    faults = list(self._work.faults(place, state.cut))
                if number % STATES_FOR_A_CHECK == 0:
                    faults += [("damaged", said) for said in self._file_system.check(state.images)]
            except OSError as error:
                faults = [("unreadable", str(error))]
        finally:
            place.rmdir()
            state.remove()
        with self._lock:
            self.tally[state.kind].update(fault for fault, _ in faults)
            self.tally[state.kind].update(states=1, messages=self._work.expected(state.cut))
            for fault, what in faults[: max(FAULTS_SHOWN - self._shown, 0)]:
                self._shown += 1
                print(f"event {state.cut}, {state.kind}: {fault}: {what}", file=sys.stderr)


def examine(folder: Path, file_system: FileSystem, arguments: dict[str, str]) -> Tally:
    """Has messages delivered, and looks at what is there after power losses."""
    folder.mkdir()
    count, seed = int(arguments["--messages"]), int(arguments["--seed"])
    dice = random.Random(seed)
    with Recording(folder, file_system, seed) as recording:
        work: Work
        if order := arguments["--order"]:
            work = Calls(recording.place, count, order)
        else:
            module = arguments["--lmtpd"]
            work = Deliveries(recording.place, count, Path(module).resolve() if module else None)
        sync_file_system(recording.place)
        first = recording.position()
        work.run(recording.position)
        last = recording.position()
    # Half of them at the moment of an answer, where most is at stake.
    answers = list(work.answered.values())
    cuts = [
        dice.choice(answers) if number % 2 else dice.randint(first, last)
        for number in range(-(-int(arguments["--states"]) // len(KINDS)))
    ]
    examination = Examination(folder, file_system, work)
    examination.run(Replay(folder, recording, dice), cuts)
    return examination.tally


def main() -> int:
    arguments = docopt(__doc__)
    if INSIDE not in os.environ:
        return confine()
    folder = enter()
    columns = ("states", "messages", *FAULTS)
    print("| file system | state |", " | ".join(columns), "|")
    print("|---|---|" + "--:|" * len(columns))
    faults = 0
    for name in arguments["FILE-SYSTEM"] or ["ext4", "xfs"]:
        for kind, tally in examine(folder / name, FILE_SYSTEMS[name], arguments).items():
            print(f"| {name} | {kind} |", " | ".join(str(tally[column]) for column in columns), "|", flush=True)
            faults += sum(tally[fault] for fault in FAULTS)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
