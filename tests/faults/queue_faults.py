"""What goes wrong while the queue of queue_run.py is delivered: outages, which last, and moments, which do not."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

from queue_site import DATABASE_FILES, Letter, QueueSite
from service import kill, processes

Outage = Callable[[QueueSite, random.Random], AbstractContextManager[None]]
Moment = Callable[[QueueSite, random.Random], Sequence[int]]

KILLED_WORKER, KILLED_CLIENTS = "SIGKILL to a worker", "SIGKILL to all clients (processes of Postfix)"
KILLED_PARENT = "SIGKILL to the parent, and systemd kills its workers"
KILLED_PARENT_ONLY = "SIGKILL to the parent, whose workers go on"
HANG_UP, TERMINATE = "SIGHUP to the parent", "SIGTERM to the parent"
FULL_DISK = "the disk is full"
LOCKED, DAMAGED = "deliver.db is locked", "deliver.db is damaged, then removed"
REMOVED, REMOVED_ONLY = (
    "deliver.db is removed, with its -wal and -shm",
    "deliver.db is removed, without its -wal and -shm",
)
NO_DOVECOT, SILENT_DOVECOT = "Dovecot is stopped", "Dovecot does not answer (SIGSTOP)"
NO_USERS = "Dovecot cannot read its table of users"
WRONG_OPTION, CHANGED_OPTION = "imapd.conf has an error", "imapd.conf changes"
CHUNK = 16 << 20
STEPS = 4  # in so many parts the letters of an outage, and of the time until the next one, come
MOMENTS_FOR_AN_OUTAGE = 5  # about so many are in the time of both
LOST_REPLIES, MOST_LOST_REPLIES = 4, 12  # how often all clients are killed in the end: until a message comes again
TRANSPORT_RETRY = 1.2  # seconds after which Postfix uses its clients again when they have been killed
CLIENT_PATIENCE = 0.5  # seconds to wait for a client that is busy
DATABASE_PATIENCE = 5.0  # seconds to wait until lmtpd has made the database
EFFECT_PATIENCE = 60.0  # seconds to wait until lmtpd's log tells of an outage
DATABASE_FAULTS = (FULL_DISK, LOCKED, DAMAGED, REMOVED, REMOVED_ONLY)
RECORDS_LOST = (DAMAGED, REMOVED, REMOVED_ONLY)


class Fault(NamedTuple):
    """One that has happened. begin, end: by time.time(). processes: those that it has hit."""

    kind: str
    begin: float
    end: float
    processes: Sequence[int] = ()


@contextlib.contextmanager
def full_disk(site: QueueSite, _: random.Random) -> Iterator[None]:
    """A file takes all of the disk that is left, what only root may have included."""
    ballast = site.disk / "ballast"
    try:
        with ballast.open("wb") as file:
            place, size = 0, CHUNK
            while size >= 4096:
                try:
                    os.posix_fallocate(file.fileno(), place, size)
                    place += size
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    size //= 2
        yield
    finally:
        ballast.unlink()


@contextlib.contextmanager
def locked_database(site: QueueSite, _: random.Random) -> Iterator[None]:
    """Another program writes to the database, and does not come to an end."""
    # mode=rw: it must not be made by root.
    database = sqlite3.connect(f"file:{site.database}?mode=rw", uri=True, isolation_level=None, timeout=30)
    try:
        database.execute("BEGIN EXCLUSIVE")
        yield
    finally:
        database.close()


@contextlib.contextmanager
def damaged_database(site: QueueSite, dice: random.Random) -> Iterator[None]:
    """Octets of the database are overwritten, those of its head among them every second time."""
    with site.database.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        places = [dice.randrange(size) for _ in range(dice.randint(1, 20))]
        if dice.random() < 0.5:
            places.append(0)
        for place in places:
            file.seek(place)
            file.write(dice.randbytes(dice.choice((1, 16, 500))))
    try:
        yield
    finally:
        site.remove_database()


@contextlib.contextmanager
def removed_database(site: QueueSite, _: random.Random) -> Iterator[None]:
    site.remove_database()
    yield


@contextlib.contextmanager
def half_removed_database(site: QueueSite, _: random.Random) -> Iterator[None]:
    site.remove_database(DATABASE_FILES[:1])
    yield


@contextlib.contextmanager
def stopped_dovecot(site: QueueSite, _: random.Random) -> Iterator[None]:
    site.users.close()
    try:
        yield
    finally:
        site.users.start()


@contextlib.contextmanager
def silent_dovecot(_: QueueSite, __: random.Random) -> Iterator[None]:
    """Its socket takes connections, but nobody reads from them."""
    stopped = [process for process, _ in processes("auth")]
    for process in stopped:
        os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        for process in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT)


@contextlib.contextmanager
def missing_users(site: QueueSite, _: random.Random) -> Iterator[None]:
    site.users.break_down()
    try:
        yield
    finally:
        site.users.mend()


@contextlib.contextmanager
def wrong_option(site: QueueSite, _: random.Random) -> Iterator[None]:
    site.configure(lmtp_command_timeout="soon")
    try:
        yield
    finally:
        site.configure(lmtp_command_timeout=None)


OUTAGES: dict[str, Outage] = {
    FULL_DISK: full_disk,
    LOCKED: locked_database,
    DAMAGED: damaged_database,
    REMOVED: removed_database,
    REMOVED_ONLY: half_removed_database,
    NO_DOVECOT: stopped_dovecot,
    SILENT_DOVECOT: silent_dovecot,
    NO_USERS: missing_users,
    WRONG_OPTION: wrong_option,
}


# What lmtpd's log says if messages come meanwhile.
EFFECTS = {
    FULL_DISK: "delivery-failed",
    LOCKED: "duplicate-database-unavailable",
    NO_DOVECOT: "user-database-unavailable",
    SILENT_DOVECOT: "user-database-unavailable",
    NO_USERS: "user-database-unavailable",
    WRONG_OPTION: "configuration-error",
}


def kill_worker(site: QueueSite, dice: random.Random) -> Sequence[int]:
    if not (workers := site.service.members()):
        return []
    kill(worker := dice.choice(workers))
    return [worker]


def kill_clients(_: QueueSite, __: random.Random) -> Sequence[int]:
    """All processes of Postfix that deliver: some have not read the reply for a message that lmtpd has stored."""
    end = time.monotonic() + CLIENT_PATIENCE
    while not (busy := [process for process, _ in processes("lmtp") if has_message(process)]):
        if time.monotonic() > end:
            break
    for process in busy:
        kill(process)
    return busy


@contextlib.contextmanager
def stopped(name: str) -> Iterator[None]:
    """While the block runs, the processes of a program are stopped."""
    found = [process for process, _ in processes(name)]
    try:
        for process in found:
            os.kill(process, signal.SIGSTOP)
        yield
    finally:
        for process in found:
            os.kill(process, signal.SIGCONT)


def has_message(client: int) -> bool:
    """Whether a process of Postfix has a message of the queue open."""
    with contextlib.suppress(OSError):
        return any("/queue/active/" in os.readlink(file) for file in Path(f"/proc/{client}/fd").iterdir())
    return False


def kill_parent(site: QueueSite, _: random.Random) -> Sequence[int]:
    return list(filter(None, [site.service.kill_parent(keeps_orphans=False)]))


def kill_parent_only(site: QueueSite, _: random.Random) -> Sequence[int]:
    return list(filter(None, [site.service.kill_parent(keeps_orphans=True)]))


def hang_up(site: QueueSite, _: random.Random) -> Sequence[int]:
    return list(filter(None, [site.service.signal_parent(signal.SIGHUP)]))


def terminate(site: QueueSite, _: random.Random) -> Sequence[int]:
    return list(filter(None, [site.service.signal_parent(signal.SIGTERM)]))


def change_option(site: QueueSite, dice: random.Random) -> Sequence[int]:
    """The pool ends and starts again, with another number of workers."""
    site.configure(lmtp_maxchild=str(dice.randint(5, 12)), lmtp_prefork=str(dice.randint(0, 4)))
    return [os.getpid()]


# How often each is there among so many.
MOMENTS: dict[str, tuple[Moment, int]] = {
    KILLED_WORKER: (kill_worker, 8),
    KILLED_CLIENTS: (kill_clients, 3),
    KILLED_PARENT: (kill_parent, 1),
    KILLED_PARENT_ONLY: (kill_parent_only, 1),
    HANG_UP: (hang_up, 1),
    TERMINATE: (terminate, 1),
    CHANGED_OPTION: (change_option, 1),
}


class Faults:
    """Has things go wrong, at moments and in an order that a seed decides. happened: what has, in order of its end."""

    def __init__(self, site: QueueSite, seed: int, pace: float) -> None:
        """pace: how long all lasts, 1 for seconds."""
        self._site, self._pace = site, pace
        self._outages, self._moments = random.Random(f"{seed} outages"), random.Random(f"{seed} moments")
        self.happened: list[Fault] = []
        self._letters: list[Letter] = []
        self._share = 1
        self._sending = threading.Lock()
        self._over = threading.Event()

    def run(self, rounds: int, letters: Sequence[Letter]) -> None:
        """Has each outage once in each round, and moments all the time, while the letters come."""
        self._letters = list(letters)
        kinds = [kind for _ in range(rounds) for kind in self._outages.sample(list(OUTAGES), len(OUTAGES))]
        # The others are for outages that last longer, because nothing has come of them yet, and for the end.
        self._share = max(len(letters) * 3 // 5 // len(kinds) // (2 * STEPS + MOMENTS_FOR_AN_OUTAGE), 1)
        thread = threading.Thread(target=self._have_moments)
        thread.start()
        try:
            for kind in kinds:
                self._have_outage(kind)
                self._wait(self._outages.uniform(0.4, 0.8) * self._pace)
        finally:
            self._over.set()
            thread.join()
        self._lose_replies()
        self._send(len(self._letters))

    def _lose_replies(self) -> None:
        """Kills clients while nothing else goes wrong: what has been stored for them comes again, and is not stored."""
        self._have_database()
        time.sleep(self._site.patience + self._site.backoff + 1)
        lines = self._site.journal_lines.lines
        begin = len(lines)
        share = max(len(self._letters) // MOST_LOST_REPLIES, 1)
        for number in range(MOST_LOST_REPLIES):
            if number >= LOST_REPLIES and self._has_logged("duplicate", begin):
                break
            before = len(lines)
            with stopped("qmgr"):  # which has many clients deliver at once then
                self._send(share)
            # The first has been stored, so the others are on their way.
            end = time.monotonic() + TRANSPORT_RETRY
            while not self._has_logged("delivered", before) and time.monotonic() < end:
                time.sleep(0.001)
            self._have_moment(KILLED_CLIENTS)
            time.sleep(TRANSPORT_RETRY)

    def _send(self, count: int) -> None:
        with self._sending:
            now, self._letters = self._letters[:count], self._letters[count:]
        self._site.send(now)

    def _wait(self, seconds: float) -> None:
        """Waits so long; meanwhile letters come."""
        for _ in range(STEPS):
            self._send(self._share)
            time.sleep(seconds / STEPS)

    def _have_outage(self, kind: str) -> None:
        seconds = self._outages.uniform(0.7, 1.5) * self._pace
        if kind in (LOCKED, DAMAGED):
            self._have_database()
        begin, lines = time.time(), len(self._site.journal_lines.lines)
        with OUTAGES[kind](self._site, self._outages):
            self._wait(seconds)
            end = time.monotonic() + EFFECT_PATIENCE
            while kind in EFFECTS and not self._has_logged(EFFECTS[kind], lines) and time.monotonic() < end:
                self._send(1)
                time.sleep(0.1)
        self.happened.append(Fault(kind, begin, time.time()))

    def _has_logged(self, event: str, since: int) -> bool:
        return any(line.startswith(f"{event} ") for _, line in self._site.journal_lines.lines[since:])

    def _have_database(self) -> None:
        """Returns when the database is there and whole; an administrator removes one that is damaged."""
        last = time.monotonic() + EFFECT_PATIENCE
        end = time.monotonic() + DATABASE_PATIENCE
        while True:
            try:
                uri = f"file:{self._site.database}?mode=rw"
                with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=30)) as database:
                    database.execute("SELECT count(*) FROM deliveries").fetchall()
                return
            except sqlite3.OperationalError:
                is_damaged = time.monotonic() > end  # else it is being made
            except sqlite3.DatabaseError:
                is_damaged = True
            if is_damaged:
                self._site.remove_database()
                self.happened.append(Fault(REMOVED, time.time(), time.time()))
                end = time.monotonic() + DATABASE_PATIENCE
            if time.monotonic() > last:
                raise RuntimeError("lmtpd makes no database: are there too few messages?")
            self._send(1)
            time.sleep(0.1)

    def _have_moments(self) -> None:
        kinds = [kind for kind, (_, count) in MOMENTS.items() for _ in range(count)]
        while True:
            for kind in self._moments.sample(kinds, len(kinds)):
                if self._over.wait(self._moments.uniform(0.05, 0.5) * self._pace):
                    return
                self._send(self._share)
                time.sleep(self._moments.uniform(0, 0.2))
                self._have_moment(kind)

    def _have_moment(self, kind: str) -> None:
        begin = time.time()
        if hit := MOMENTS[kind][0](self._site, self._moments):
            self.happened.append(Fault(kind, begin, time.time(), hit))
