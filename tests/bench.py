#!/usr/bin/env python3
"""Compares lmtpd with Dovecot, Cyrus and the least that the disk asks for.

Usage:
  bench.py [--quick | --rounds N] [--long] [WORK...]
  bench.py --help

Options:
  --rounds N  How often each work is done [default: 7].
  --quick     Two rounds of few messages, for a look in less than a minute.
  --long      Also the works that take minutes.
  --help      Show this text.

Works:
  sync                     the calls per message by which each server makes it durable
  one                      4 KiB messages on a connection that is kept open
  ten, ten-mailboxes       ten connections kept open, to one mailbox or ten
  reconnect                a new connection for each message
  reconnect-ten, reconnect-ten-mailboxes
                           the same, ten at once
  recipients               messages to 100 recipients
  5mb, 50mb                large messages
  duplicates               "one" with and without duplicate suppression
  sql, sql-ten             "one" and "ten-mailboxes" with duplicate_db: sql, against SQLite
  cold                     a process for one message, against one that does nothing
  sieve                    "one" with a script of ten tests, and lmtpd without a script
  sieve-large              the same with a script of 1,000 rules, of which the last one matches
  sieve-body               50 MB messages with a test of the body, and lmtpd's memory
  sieve-cold               a process for one message with a small script, against one without
  sending                  what a redirect costs beyond the server's answer, and a vacation answer that is not due
  1gib                     memory for a message of 1 GiB (long)
  growth-folder, growth-connection, growth-recipients
                           time per message as the number of them grows (long)

It needs root, and sets up what it needs as tests/run does.

How it measures: all servers run side by side, each with its own store, warm, and idle but for the one that is at work.
A round does a work once with each, another one first each time, so that what the machine does meanwhile strikes all
alike; ratios are taken within a round, and only then the median over rounds. Every measurement has mailboxes of its
own, none of them large. What arrived is counted. All is on a fresh ext4 image with a journal if one may be mounted:
without a journal, creating files is slowed by earlier deletions, and figures mislead. CPU time is that of a server's
whole tree of processes; that of the generator, Postfix's smtp-source, is not in it. Nobody's messages stay in
memory only: "sync" shows who calls fsync(2) and how often, and all are as their packages have it in this.
"""

# The floor is what a delivery cannot do without, where one commit of the journal is enough: create a file without a
# name, write, wait for the data, link, fsync the folder, by as many processes as there are connections. "talk only" is
# a server that throws everything away, Postfix's smtp-sink: the two together are about what can be had with this
# generator.

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import platform
import re
import shutil
import signal
import smtplib
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

SET_UP = """
set -euo pipefail
. tests/setup.sh
need_packages postfix dovecot-imapd dovecot-lmtpd dovecot-sieve systemd strace e2fsprogs
need_cyrus
need_postgresql
need_venv
LMTPD_BENCH=ready exec "$venv/bin/python" tests/bench.py "$@"
"""
TOP = Path(__file__).resolve().parent.parent

if __name__ == "__main__" and "LMTPD_BENCH" not in os.environ:
    os.chdir(TOP)
    command = ["bash", "-c", SET_UP, "bench", *sys.argv[1:]]
    os.execvp("sudo" if os.geteuid() else command[0], ["sudo", *command] if os.geteuid() else command)

# These are there only after the set-up.
from docopt import docopt  # noqa: E402
from harness import PATIENCE, STORE_USER, Client, Site, connect, free_port, wait_for  # noqa: E402
from peers import Cyrus, Dovecot, Peer, program  # noqa: E402
from postgres import Postgres  # noqa: E402

import lmtpd  # noqa: E402
from lmtpd import Config, write_data  # noqa: E402

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
IMAGE_SIZE = 12 * GIB
MEASUREMENT_PATIENCE = 600
DISTURBED = 0.05  # of the machine's CPU time, taken by others
TICKS = os.sysconf("SC_CLK_TCK")
CPUS = os.cpu_count() or 1
QUICK_ROUNDS, QUICK_DIVISOR = 2, 10


class BenchError(Exception):
    """A measurement is worth nothing; the text says why."""


# --- Accounts: who used how much of the machine ---------------------------------------------------------------------


def tree(root: int) -> list[int]:
    """The process and its descendants."""
    pids = [root]
    for pid in pids:
        with contextlib.suppress(OSError):  # it has gone
            pids += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return pids


def stat_fields(pid: int) -> list[str]:
    """What proc(5) says of a process from the third field of its stat on; [] when it has gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return []


def cpu_seconds(pid: int) -> float:
    """The CPU time of a process, and of its children that have ended and been reaped."""
    try:
        own = int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9  # finer than the ticks in stat
    except OSError:
        return 0.0
    return own + sum(map(int, stat_fields(pid)[13:15])) / TICKS


def kernel_seconds() -> float:
    """The CPU time of the kernel's own threads, whose parent is process 2."""
    everybody = (stat_fields(int(name)) for name in os.listdir("/proc") if name.isdigit())
    return sum(sum(map(int, fields[11:13])) for fields in everybody if fields[1:2] == ["2"]) / TICKS


def busy_seconds() -> float:
    """The CPU time of everybody, also that which the hypervisor kept to itself."""
    user, nice, system, _idle, _iowait, *more = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    return sum(map(int, (user, nice, system, *more))) / TICKS


def memory(pid: int, file: str, field: str) -> float:
    """A field of a file in /proc that is in KiB, as MiB; 0 when the process has gone."""
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB", Path(f"/proc/{pid}/{file}").read_text(), re.MULTILINE)
    except OSError:
        return 0.0
    return int(found[1]) / KIB if found else 0.0


# --- Works ----------------------------------------------------------------------------------------------------------


class Goal(NamedTuple):
    """lmtpd is to be so many times as fast as the other one."""

    other: str
    factor: float


class Work(NamedTuple):
    """A way to bring messages. messages: how many in a measurement; a contestant's share is what it gets of them."""

    title: str
    messages: int
    goals: tuple[Goal, ...]
    size: int = 4 * KIB
    connections: int = 1
    mailboxes: int = 1
    recipients: int = 1
    reconnect: bool = False

    @property
    def unit(self) -> str:
        return "MB/s" if self.size >= MIB else "copies/s" if self.recipients > 1 else "messages/s"

    def amount(self, messages: int) -> float:
        """So many messages, in what the unit counts."""
        return messages * self.size / 1e6 if self.size >= MIB else float(messages * self.recipients)

    def generators(self, address: str, user: str, messages: int) -> list[list[str]]:
        """The commands that bring so many messages, all to be run at once: one for each mailbox."""
        options = {"-s": self.connections, "-m": messages, "-l": self.size, "-r": self.recipients}
        options["-s"] //= self.mailboxes
        options["-m"] //= self.mailboxes
        numbers = [word for name, value in options.items() for word in (name, str(value))]
        command = [program("smtp-source"), "-L", *([] if self.reconnect else ["-d"]), *numbers]
        return [
            [*command, "-f", "sender@example.com", "-t", f"{user}{number}", f"unix:{address}"]
            for number in range(self.mailboxes)
        ]


def against(dovecot: float, cyrus: float, floor: float = 0.0) -> tuple[Goal, ...]:
    goals = Goal("Dovecot", dovecot), Goal("Cyrus", cyrus), Goal("floor", floor)
    return tuple(goal for goal in goals if goal.factor)


WORKS = {
    "one": Work("4 KiB messages, one connection kept open", 1500, against(3.5, 4.2)),
    "ten": Work("ten connections kept open, one mailbox", 4000, against(2.7, 0), connections=10),
    "ten-mailboxes": Work(
        "ten connections kept open, ten mailboxes", 4000, against(3, 4), connections=10, mailboxes=10
    ),
    "reconnect": Work("a new connection for each message", 800, against(2.7, 2.7), reconnect=True),
    "reconnect-ten": Work(
        "a new connection for each message, ten at once, one mailbox",
        *(1600, against(2.7, 2.7)),
        connections=10,
        reconnect=True,
    ),
    "reconnect-ten-mailboxes": Work(
        "a new connection for each message, ten at once, ten mailboxes",
        *(1600, against(2.7, 2.7)),
        connections=10,
        mailboxes=10,
        reconnect=True,
    ),
    "recipients": Work("messages to 100 recipients", 20, against(10, 10), recipients=100),
    "5mb": Work("5 MB messages", 40, against(2, 2, 0.85), size=5_000_000),
    "50mb": Work("50 MB messages", 8, against(2, 2, 0.85), size=50_000_000),
}
CPU_GOAL = 0.2  # of Dovecot's, for the work "one"
ONE = WORKS["one"]


# --- Contestants ----------------------------------------------------------------------------------------------------


class Contestant:
    """One of those that are compared.

    divisor: it gets the work's messages divided by this, being slower, so that all take about as long.
    stores: whether there is something to be found afterwards.
    peak, resident: in MiB, the most that one of its processes had, and all of them together at a time.
    """

    stores = True

    def __init__(self, name: str, divisor: int = 1) -> None:
        self.name, self.divisor = name, divisor
        self.peak = self.resident = 0.0

    def deliver(self, work: Work, user: str, messages: int) -> None:
        """Gets so many messages into its store, in the mailboxes that begin with user."""
        raise NotImplementedError

    def prepare(self, work: Work, user: str) -> None:
        """Makes those mailboxes, and has whatever processes are kept started."""
        # One after the other, for servers that do not stand being asked for the same new mailbox by two at once.
        self.deliver(work._replace(connections=work.mailboxes), user, work.mailboxes)
        self.deliver(work, user, work.connections)

    def files(self, user: str) -> list[Path]:
        """The messages in the mailboxes whose names have user in them."""
        raise NotImplementedError

    def pids(self) -> list[int]:
        return []

    def cpu(self) -> float:
        """The CPU seconds it has used since it was started."""
        return sum(map(cpu_seconds, self.pids()))

    def takes_part(self, work: Work) -> bool:
        return True

    def look_at_memory(self) -> None:
        pids = self.pids()
        self.peak = max([self.peak, *(memory(pid, "status", "VmHWM") for pid in pids)])
        self.resident = max(self.resident, sum(memory(pid, "smaps_rollup", "Pss") for pid in pids))


class Server(Contestant):
    """A server on a unix socket. find: gives its messages."""

    def __init__(self, name: str, peer: Peer, address: str, find: Callable[[str], list[Path]], divisor: int) -> None:
        super().__init__(name, divisor)
        self.address = address
        self._peer, self._find = peer, find

    def deliver(self, work: Work, user: str, messages: int) -> None:
        with tempfile.TemporaryFile() as said:
            commands = work.generators(self.address, user, messages)
            running = [subprocess.Popen(command, stdout=said, stderr=said) for command in commands]
            signal.alarm(MEASUREMENT_PATIENCE)  # wait(timeout) would look only twenty times a second
            statuses = [generator.wait() for generator in running]
            signal.alarm(0)
            said.seek(0)
            if any(statuses):
                raise BenchError(f"{self.name}: {said.read(KIB).decode(errors='replace')}")

    def files(self, user: str) -> list[Path]:
        return self._find(user)

    def pids(self) -> list[int]:
        return tree(self._peer.process.pid)


class Accepting(Server):
    """lmtpd with a process for each connection, which is of interest where there are many."""

    def takes_part(self, work: Work) -> bool:
        return work.reconnect

    def look_at_memory(self) -> None:
        """Nothing is left to look at but what starts it."""


class Talking(Server):
    """A server that keeps nothing, and reads large messages more slowly than those that do."""

    stores = False

    def takes_part(self, work: Work) -> bool:
        return work.size < MIB


class CyrusServer(Server):
    """Cyrus, whose mailboxes have no quota roots; those that it makes of its own accord have."""

    def __init__(self, cyrus: Cyrus) -> None:
        super().__init__(cyrus.name, cyrus, str(cyrus.address), in_cyrus(cyrus.folder / "spool"), divisor=4)
        self._quotas = cyrus.folder / "lib/quota"
        self._fix_quotas = [str(cyrus.programs / "quota"), "-C", str(cyrus.imapd_conf), "-f"]
        self._libraries = cyrus.libraries

    def prepare(self, work: Work, user: str) -> None:
        super().prepare(work, user)
        roots = [path for path in self._quotas.rglob("*") if path.is_file()]
        if not roots:
            return
        for root in roots:
            root.unlink()
        environment = {**os.environ, "LD_LIBRARY_PATH": self._libraries}
        subprocess.run(
            self._fix_quotas,
            check=True,
            capture_output=True,
            env=environment,
            user=STORE_USER,
            group=STORE_USER,
            extra_groups=[],
        )


class Floor(Contestant):
    """What no delivery can do without."""

    def __init__(self, folder: Path) -> None:
        super().__init__("floor")
        self._folder = folder
        self._cpu = 0.0

    def deliver(self, work: Work, user: str, messages: int) -> None:
        writers = [self._start_writer(work, user, number, messages) for number in range(work.connections)]
        for writer in writers:
            _, status, usage = os.wait4(writer, 0)
            self._cpu += usage.ru_utime + usage.ru_stime
            if status:
                raise BenchError("floor: a writer failed")

    def _start_writer(self, work: Work, user: str, number: int, messages: int) -> int:
        """Forks a process that writes its part of the messages."""
        if process := os.fork():
            return process
        status = os.EX_SOFTWARE
        try:
            names = [f"{user}{number % work.mailboxes}", *(f"{user}to{more}" for more in range(1, work.recipients))]
            folders = [self._mailbox(name) for name in names]
            for written in range(messages * work.recipients // work.connections):
                write_message(folders[written % len(folders)], b"x" * work.size)
            status = os.EX_OK
        finally:
            os._exit(status)

    def _mailbox(self, name: str) -> str:
        for part in ("tmp", "new"):
            (self._folder / name / part).mkdir(parents=True, exist_ok=True)
        return str(self._folder / name)

    def files(self, user: str) -> list[Path]:
        return list(self._folder.glob(f"{user}*/new/*"))

    def cpu(self) -> float:
        return self._cpu


def write_message(mailbox: str, content: bytes) -> None:
    """Puts a message into a Maildir for good, by the fewest calls and commits."""
    file = os.open(f"{mailbox}/new", os.O_WRONLY | os.O_TMPFILE)
    while content:
        content = content[os.write(file, content) :]
    write_data(file)
    folder = os.open(f"{mailbox}/new", os.O_RDONLY | os.O_DIRECTORY)
    name = f"{time.time_ns()}.{os.getpid()}"
    os.link(f"/proc/self/fd/{file}", name, dst_dir_fd=folder, follow_symlinks=True)
    os.fsync(folder)
    os.close(folder)
    os.close(file)


def keeps_log_in_memory(folder: Path) -> Path:
    """Gives a folder for a Peer a log that is on no disk, where each fsync(2) of a message would write it, too."""
    folder.mkdir()
    descriptor, path = tempfile.mkstemp(prefix="lmtpd-bench-log-", dir="/dev/shm")
    os.close(descriptor)
    (folder / "log").symlink_to(path)
    atexit.register(os.unlink, path)
    return folder


class SmtpSink(Peer):
    """Postfix's server that throws everything away: what the conversation takes, which is not in the floor."""

    name = "talk only"

    def __init__(self, site: Site) -> None:
        super().__init__(site.root / "sink")
        self.address = str(self.folder / "lmtp")
        shutil.chown(self.folder, STORE_USER)

    def start(self) -> None:
        command = [program("smtp-sink"), "-u", STORE_USER, "-L", f"unix:{self.address}", "1000"]
        self.run(command, lambda: os.path.exists(self.address))


class SystemdLmtpd(Peer):
    """lmtpd, started by systemd's activation tool as lmtpd-pool or, with accept, as lmtpd@.service would be."""

    name = "lmtpd"

    def __init__(self, site: Site, accept: bool) -> None:
        super().__init__(keeps_log_in_memory(site.root / "systemd"))
        self.address = str(self.folder / "lmtp")
        self.log.touch()
        status = self.log.stat()
        self._command = [
            # Its standard output must not be that of its log, or lmtpd would take both for a client's.
            *["sh", "-c", 'exec "$@" >/dev/null', "sh"],
            program("systemd-socket-activate"),
            *(["--accept", "--inetd"] if accept else []),
            *["-l", self.address, f"--setenv=JOURNAL_STREAM={status.st_dev}:{status.st_ino}"],
            # A pool that has left would not be started again by this tool.
            *(site.command() if accept else site.command("-T", "0")),
        ]

    def start(self) -> None:
        self.run(self._command, lambda: os.path.exists(self.address))


class DovecotLmtp(Dovecot):
    """Dovecot's LMTP server, in place of that for IMAP."""

    def __init__(self, site: Site) -> None:
        keeps_log_in_memory(site.root / "dovecot")
        super().__init__(site)

    @property
    def lmtp_address(self) -> str:
        return str(self.folder / "run/lmtp")

    def use_script(self, script: Path) -> None:
        """Has everybody's mail filtered by a script."""
        settings = {"sieve_default": script, "sieve": f"file:{self.folder}/none;active={self.folder}/none.sieve"}
        lines = "".join(f"  {name} = {value}\n" for name, value in {**settings, "sieve_max_script_size": "4M"}.items())
        with self.conf.open("a") as conf:
            conf.write(f"protocol lmtp {{\n  mail_plugins = $mail_plugins sieve\n}}\nplugin {{\n{lines}}}\n")

    def _private_conf(self) -> str:
        return super()._private_conf().replace("protocols = imap", "protocols = lmtp")

    def _private_24_conf(self) -> str:
        return super()._private_24_conf().replace("imap = yes", "lmtp = yes")

    def start(self) -> None:
        self.run([program("dovecot"), "-F", "-c", str(self.conf)], lambda: os.path.exists(self.lmtp_address))


def in_maildirs(spool: Path) -> Callable[[str], list[Path]]:
    return lambda user: [*spool.glob(f"*{user}*/new/*"), *spool.glob(f"*{user}*/cur/*")]


def in_folders(spool: Path) -> Callable[[str], list[Path]]:
    """Also what a script has filed."""
    return lambda user: [file for kind in ("new", "cur") for file in spool.glob(f"*{user}*/**/{kind}/*")]


def in_cyrus(spool: Path) -> Callable[[str], list[Path]]:
    """Cyrus has mailboxes under their names or under ids, and the name in a header file in either case."""
    return lambda user: [
        file
        for header in spool.rglob("cyrus.header")
        if user.encode() in header.read_bytes()
        for file in header.parent.glob("[0-9]*.")
    ]


class Bench:
    """The contestants, and how much they are asked to do.

    pool, cold: lmtpd as lmtpd-pool runs it, and a site for processes that are started by hand. suppressing: a pool
    with duplicate suppression, if lmtpd has it.
    """

    def __init__(self, folder: Path, stack: contextlib.ExitStack, rounds: int, divisor: int) -> None:
        self.rounds, self.divisor = rounds, divisor
        self._folder, self._stack = folder, stack
        self.suppressing: Contestant | None = None
        plain: dict[str, str] = {}
        if "duplicatesuppression" in Config.table():
            plain = {"duplicatesuppression": "no"}
            self.suppressing = self._lmtpd("suppressing", {"duplicatesuppression": "yes"})
        self.pool = self._lmtpd("lmtpd", plain)
        accepting = self._lmtpd("Accept=yes", plain, accept=True)
        self.floor = Floor(folder / "floor")
        self.contestants = [self.pool, self._dovecot(), self._cyrus(), self.floor, self._talk(), accepting]
        self.cold = self._site(plain)

    def _site(self, options: dict[str, str]) -> Site:
        site = Site(autocreate_post="yes", **options)
        self._stack.callback(site.close)
        return site

    def _lmtpd(self, name: str, options: dict[str, str], accept: bool = False) -> Server:
        site = self._site(options)
        peer = self._stack.enter_context(SystemdLmtpd(site, accept))
        kind = Accepting if accept else Server
        find = in_folders if "sieve_default" in options else in_maildirs
        return kind(name, peer, peer.address, find(site.spool), divisor=16 if accept else 1)

    def _dovecot(self) -> Server:
        site = self._site({})
        peer = self._stack.enter_context(DovecotLmtp(site))
        return Server(peer.name, peer, peer.lmtp_address, in_maildirs(site.spool), divisor=2)

    def filtering(self, script: Path) -> list[Contestant]:
        """lmtpd and Dovecot with a script for everybody, and lmtpd without one."""
        script.chmod(0o644)
        options = {"duplicatesuppression": "no", "sieve_maxscriptsize": "4M"}
        dovecot = DovecotLmtp(site := self._site({}))
        dovecot.use_script(script)
        self._stack.enter_context(dovecot)
        return [
            self._lmtpd("with script", {**options, "sieve_default": str(script)}),
            Server("Dovecot", dovecot, dovecot.lmtp_address, in_folders(site.spool), divisor=2),
            self._lmtpd("no script", options),
        ]

    def sending(self, script: Path, port: int) -> Server:
        """lmtpd with a script for everybody, which sends by the SMTP server at that port."""
        script.chmod(0o644)
        options = {"sieve_default": str(script), "smtp_backend": "host", "smtp_host": f"127.0.0.1:{port}"}
        return self._lmtpd(script.stem, {"duplicatesuppression": "no", **options})

    def filtering_cold(self, script: Path) -> Site:
        """A site for processes that are started by hand, with a script for everybody."""
        script.chmod(0o644)
        return self._site({"duplicatesuppression": "no", "sieve_default": str(script)})

    def recording(self) -> list[Contestant]:
        """lmtpd with its records in PostgreSQL, and in SQLite."""
        postgres = self._stack.enter_context(Postgres(Path(tempfile.mkdtemp(dir=self._folder))))
        for setting in ("fsync", "full_page_writes"):  # off in tests
            postgres.execute(f"ALTER SYSTEM SET {setting} = on")
        postgres.execute("SELECT pg_reload_conf()")
        database = self._stack.enter_context(postgres.database())
        return [self._lmtpd("PostgreSQL", database.options), self._lmtpd("SQLite", {})]

    def _cyrus(self) -> Server:
        peer = Cyrus(self._site({}).root / "cyrus", users=(), autocreate_users="anyone")
        return CyrusServer(self._stack.enter_context(peer))

    def _talk(self) -> Server:
        peer = self._stack.enter_context(SmtpSink(self._site({})))
        return Talking(peer.name, peer, peer.address, lambda _: [], divisor=1)

    def fresh_pool(self) -> Server:
        """A pool that has done nothing yet."""
        return self._lmtpd("fresh", {})

    def messages(self, work: Work, contestant: Contestant) -> int:
        """How many messages it gets: a multiple of the connections."""
        wanted = work.messages // self.divisor // contestant.divisor
        return max(wanted // work.connections, 1) * work.connections


# --- Measurements ---------------------------------------------------------------------------------------------------


class Measurement(NamedTuple):
    """rate: in the work's unit. cpu: seconds per 1,000 messages. others: the part of the machine that others took."""

    rate: float
    cpu: float
    others: float


class Clock:
    """Measures what happens between its making and stop(), within which only this contestant is at work."""

    def __init__(self, contestant: Contestant) -> None:
        self._contestant = contestant
        self._cpu, self._others = contestant.cpu(), self._by_others()
        self._start = time.monotonic()

    def stop(self) -> tuple[float, float, float]:
        """Wall seconds, CPU seconds of the contestant, and the part of the machine that others took."""
        seconds = time.monotonic() - self._start
        time.sleep(0.1)  # for processes that have yet to end
        others = self._by_others() - self._others
        return seconds, self._contestant.cpu() - self._cpu, max(others, 0.0) / (seconds + 0.1) / CPUS

    def _by_others(self) -> float:
        ours = sum(os.times()[:4]) + sum(map(cpu_seconds, self._contestant.pids()))
        return busy_seconds() - kernel_seconds() - ours


def measure(contestant: Contestant, work: Work, user: str, messages: int) -> Measurement:
    """One measurement, in mailboxes of that name. Raises BenchError when not everything arrived."""
    contestant.prepare(work, user)
    os.sync()
    before = len(contestant.files(user))
    clock = Clock(contestant)
    contestant.deliver(work, user, messages)
    seconds, cpu, others = clock.stop()
    contestant.look_at_memory()
    if contestant.stores:
        check_arrival(contestant, work, user, before + messages * work.recipients)
    return Measurement(work.amount(messages) / seconds, cpu * 1000 / messages, others)


def check_arrival(contestant: Contestant, work: Work, user: str, expected: int) -> None:
    """Raises BenchError unless so many messages are there, whole; makes room if they are large."""
    files = contestant.files(user)
    if len(files) != expected:
        raise BenchError(f"{contestant.name}: {len(files)} messages arrived, not {expected}")
    # smtp-source counts line ends as one octet or two, depending on the version.
    if any(file.stat().st_size < 0.9 * work.size for file in files):
        raise BenchError(f"{contestant.name}: a message is not whole")
    if work.size >= MIB:
        for file in files:
            file.unlink()


def race(bench: Bench, contestants: list[Contestant], name: str, work: Work) -> dict[str, list[Measurement]]:
    """The measurements of each contestant, one a round."""
    results: dict[str, list[Measurement]] = {contestant.name: [] for contestant in contestants}
    for number in range(bench.rounds):
        progress(f"{name}: round {number + 1} of {bench.rounds}")
        # Who has many recipients has few messages for each; making so many mailboxes anew would take its time.
        user = f"{name.replace('-', '')}x{0 if work.recipients > 1 else number:02}x"
        first = number % len(contestants)
        for contestant in contestants[first:] + contestants[:first]:
            results[contestant.name].append(measure(contestant, work, user, bench.messages(work, contestant)))
    return results


# --- Reports --------------------------------------------------------------------------------------------------------


def progress(text: str) -> None:
    """Says on standard error what is going on, in one line on a terminal."""
    end = "\r" if sys.stderr.isatty() else "\n"
    print(f"{text:<60}", end=end, file=sys.stderr, flush=True)


def report(*lines: str) -> None:
    print(*lines, sep="\n", flush=True)


def spread(values: list[float]) -> str:
    """The median, and the lowest and highest."""
    return f"{number(statistics.median(values))} ({number(min(values))} - {number(max(values))})"


def number(value: float) -> str:
    """A number in three digits or more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def at_least(value: float, goal: float) -> str:
    return f"goal >= {goal:g}: " + ("met" if value >= goal else f"missed by {100 * (1 - value / goal):.0f} %")


def at_most(value: float, goal: float) -> str:
    return f"goal <= {goal:g}: " + ("met" if value <= goal else f"missed by {100 * (value / goal - 1):.0f} %")


def ratios(ours: list[float], theirs: list[float]) -> list[float]:
    """Ours to theirs, round by round."""
    return [one / other for one, other in zip(ours, theirs)]


def report_race(name: str, work: Work, results: dict[str, list[Measurement]], judged: str = "lmtpd") -> None:
    """A line for each contestant, and how the one that is judged compares with it."""
    goals = {goal.other: goal.factor for goal in work.goals}
    ours = [result.rate for result in results[judged]]
    report("", f"{name}: {work.title}; {work.unit}, CPU seconds per 1,000 messages")
    for other, measurements in results.items():
        rates = [result.rate for result in measurements]
        line = f"  {other:<12}{spread(rates):<28}{statistics.median(r.cpu for r in measurements):>8.2f} s"
        if other != judged:
            times = ratios(ours, rates)
            line += f"   {judged} is {spread(times)} times it"
            line += f"; {at_least(statistics.median(times), goals[other])}" if other in goals else ""
        report(line)
    report_disturbance(results)


def report_disturbance(results: dict[str, list[Measurement]]) -> None:
    """Which rounds others had a part in."""
    worst = [max(result.others for result in one_round) for one_round in zip(*results.values())]
    report(
        f"  others had {100 * statistics.median(worst):.0f} % of the CPU time in a round's worst measurement (median)"
    )
    if disturbed := [f"{index} ({100 * part:.0f} %)" for index, part in enumerate(worst, 1) if part > DISTURBED]:
        report(f"  disturbed rounds: {', '.join(disturbed)}")


def report_cpu_goal(results: dict[str, list[Measurement]]) -> None:
    parts = ratios(*([result.cpu for result in results[name]] for name in ("lmtpd", "Dovecot")))
    report(f"  lmtpd's CPU time is {spread(parts)} of Dovecot's; {at_most(statistics.median(parts), CPU_GOAL)}")


def report_memory(bench: Bench) -> None:
    report("", "memory, MiB: the largest process (VmHWM), and all together at the end of a work (PSS), at most")
    for contestant in bench.contestants:
        if contestant.peak:
            report(f"  {contestant.name:<12}{number(contestant.peak):>8}{number(contestant.resident):>8}")


# --- Works of their own kind ----------------------------------------------------------------------------------------


def sync_calls(bench: Bench) -> None:
    """Counts what each server asks the disk for, with strace(1) on all its processes."""
    messages = 20
    report("", f"sync: calls per message on a connection kept open ({messages} messages)")
    for contestant in bench.contestants:
        if isinstance(contestant, Server) and contestant.stores and contestant.takes_part(ONE):
            contestant.prepare(ONE, "sync")
            calls = traced(contestant, messages)
            counts = (f"{count / messages:g} {call}" for call, count in sorted(calls.items()))
            report(f"  {contestant.name:<12}{', '.join(counts)}")
    report("  floor       1 fsync, and one ioctl that waits for the data")


def traced(server: Server, messages: int) -> Counter[str]:
    """The calls that make something durable, counted while so many messages are delivered."""
    pids = server.pids()
    with tempfile.NamedTemporaryFile("r") as trace:
        wanted = "trace=fsync,fdatasync,sync,syncfs,sync_file_range,msync"
        command = [program("strace"), "-f", "-qq", "-e", wanted, "-e", "signal=none", "-o", trace.name]
        strace = subprocess.Popen([*command, *(f"-p{pid}" for pid in pids)])
        try:
            wait_for(lambda: all(memory_field(pid, "TracerPid") == strace.pid for pid in pids), "strace to attach")
            server.deliver(ONE, "sync", messages)
        finally:
            strace.terminate()
            strace.wait(PATIENCE)
        return Counter(re.findall(r"^\d+ +(\w+)\(", trace.read(), re.MULTILINE))


def memory_field(pid: int, field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


def duplicates(bench: Bench) -> None:
    """What it costs to suppress duplicates."""
    if not bench.suppressing:
        report("", "duplicates: lmtpd does not suppress them yet")
        return
    work = ONE._replace(title="with duplicate suppression, against without", goals=(Goal("lmtpd", 0.85),))
    report_race(
        "duplicates", work, race(bench, [bench.suppressing, bench.pool], "duplicates", work), bench.suppressing.name
    )


def records(bench: Bench, name: str, work: Work, factor: float) -> None:
    """What it costs to have the records in PostgreSQL. factor: the goal."""
    work = work._replace(title=f"{work.title}, with duplicate_db: sql", goals=(Goal("SQLite", factor),))
    report_race(name, work, race(bench, bench.recording(), name, work), "PostgreSQL")


COLD_MESSAGE = b"From: sender@example.com\r\nSubject: a cold start\r\n\r\n" + (b"x" * 68 + b"\r\n") * 28
COLD_SESSION = b"".join(
    [
        *(b"LHLO client.example\r\n", b"MAIL FROM:<sender@example.com>\r\n", b"RCPT TO:<cold>\r\n", b"DATA\r\n"),
        *(COLD_MESSAGE, b".\r\nQUIT\r\n"),
    ]
)


TEN_TESTS = 'require "fileinto";\n' + "".join(
    f'if header :contains "{name}" "{key}" {{ fileinto "Filed"; stop; }}\n'
    for name, key in (
        *(("subject", "[list]"), ("subject", "invoice"), ("list-id", "announce"), ("x-spam-flag", "yes")),
        *(("to", "sales"), ("cc", "sales"), ("from", "newsletter"), ("x-mailer", "bulk"), ("sender", "bounce")),
        ("from", "sender@example.com"),
    )
)
RULES = 1000
MANY_RULES = 'require "fileinto";\n' + "".join(
    f'if header :contains "{name}" "word{number}" {{ fileinto "F{number}"; }}\n'
    for number, name in zip(range(RULES - 1), itertools.cycle(("subject", "from", "to", "list-id")))
)
MANY_RULES += 'if header :contains "from" "sender@example.com" { fileinto "Filed"; }\n'
BODY_TEST = 'require ["fileinto", "body"];\nif body :text :contains "no such text" { fileinto "Filed"; }\n'


def filters(bench: Bench, name: str, script: str, work: Work) -> dict[str, list[Measurement]]:
    """A race with a script, and the report of it."""
    file = Path(tempfile.mkdtemp()) / f"{name}.sieve"
    file.parent.chmod(0o755)
    file.write_text(script)
    contestants = bench.filtering(file)
    results = race(bench, contestants, name, work)
    report_race(name, work, results, "with script")
    for contestant in contestants:
        report(f"  memory of {contestant.name}: {number(contestant.peak)} MiB at most in a process")
    return results


def small_filter(bench: Bench) -> None:
    """What a usual script costs."""
    goals = Goal("Dovecot", 2.5), Goal("no script", 0.85)
    filters(bench, "sieve", TEN_TESTS, ONE._replace(title="4 KiB messages and ten tests", goals=goals))


def large_filter(bench: Bench) -> None:
    """What a large script costs for a message, and once to compile."""
    work = ONE._replace(title=f"4 KiB messages and {RULES} rules", messages=400, goals=())
    results = filters(bench, "sieve-large", MANY_RULES, work)
    more = [
        1000 / with_script.rate - 1000 / without.rate
        for with_script, without in zip(results["with script"], results["no script"])
    ]
    report(f"  the script takes {spread(more)} ms a message; {at_most(statistics.median(more), 3)}")
    language = lmtpd.language_for(())
    octets = MANY_RULES.encode()
    times = [timed(lambda: lmtpd.Compiler(language, len(octets)).compile(octets, "large")) for _ in range(bench.rounds)]
    report(f"  compiling it takes {spread(times)} ms; {at_most(statistics.median(times), 100)}")


def body_filter(bench: Bench) -> None:
    """What a test of the body costs for large messages."""
    work = WORKS["50mb"]._replace(title="50 MB messages and a test of the body", goals=(Goal("Dovecot", 1),))
    filters(bench, "sieve-body", BODY_TEST, work)


SENDING_SCRIPTS = {
    "redirected": 'redirect "joe@example.net";\n',
    "discarded": "discard;\n",
    "answered": 'require "vacation";\nvacation "I am away.";\ndiscard;\n',
}


def sending(bench: Bench) -> None:
    """What a redirect costs beyond an SMTP session with the same server, and a vacation answer that is not due."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    port = free_port()
    sink = subprocess.Popen([program("smtp-sink"), "-u", STORE_USER, f"127.0.0.1:{port}", "100"])
    atexit.register(sink.kill)
    clients = {}
    for name, script in SENDING_SCRIPTS.items():
        file = folder / f"{name}.sieve"
        file.write_text(script)
        clients[name] = Client(connect(bench.sending(file, port).address))
        clients[name].hello()
    wait_for(lambda: connect(("127.0.0.1", port)), "smtp-sink")
    times: dict[str, list[float]] = {name: [] for name in ("direct", *clients)}
    for number_of_message in range(100 * bench.rounds):
        text = f"To: jane@example.com\r\nMessage-ID: <{number_of_message}@example.com>\r\n\r\n" + "0123456\r\n" * 450
        for name, client in clients.items():
            times[name].append(timed(partial(client.deliver, text.encode(), "jane@example.com")))
        times["direct"].append(timed(partial(send_directly, port, text)))
    report("", f"sending: ms for a 4 KiB message; {len(times['direct'])} of each, one after the other")
    for name, taken in times.items():
        report(f"  {name:<10} {spread(taken)}")
    middle = {name: statistics.median(taken[10:]) for name, taken in times.items()}
    redirect, silence = middle["redirected"] - middle["direct"], middle["answered"] - middle["discarded"]
    report(f"  a redirect takes {number(redirect)} ms beyond the server's answer; {at_most(redirect, 1)}")
    report(f"  an answer that is not due takes {number(silence)} ms; {at_most(silence, 0.3)}")


def send_directly(port: int, text: str) -> None:
    """Sends a message to the server itself."""
    with smtplib.SMTP("127.0.0.1", port, "mx.example.com") as smtp:
        smtp.sendmail("sender@example.com", ["joe@example.net"], text)


class Life(NamedTuple):
    """What a process took from its start to its end, in milliseconds."""

    wall: float
    cpu: float


def cold(bench: Bench) -> None:
    """The whole life of a process for a connection with one message, against a Python that does nothing."""
    site = bench.cold
    environment = site.journal()
    nothing, command = [sys.executable, "-I", "-c", "pass"], site.command()
    lives = {name: list[Life]() for name in ("lmtpd", "python", "again")}
    for _ in range(10 * bench.rounds):
        lives["python"].append(life(nothing, site, environment))
        lives["lmtpd"].append(life(command, site, environment))
        lives["again"].append(life(nothing, site, environment))
    stored = len(site.messages("cold"))
    if stored != len(lives["lmtpd"]):
        raise BenchError(f"cold: {stored} messages arrived, not {len(lives['lmtpd'])}")
    report("", f"cold: a process for one 2 KB message, ms; {len(lives['lmtpd'])} of each")
    for part in Life._fields:
        one, other, again = ([getattr(one, part) for one in lives[name]] for name in ("lmtpd", "python", "again"))
        pythons = [(before + after) / 2 for before, after in zip(other, again)]
        times = statistics.median(ratios(one, pythons))
        report(
            f"  {part:<5}lmtpd {spread(one)}, python3 -I -c pass {spread(pythons)}: {number(times)} times;"
            f" {at_most(times, 1.5)}"
        )


def cold_filter(bench: Bench) -> None:
    """The whole life of a process for a message with a small script, against one without."""
    file = Path(tempfile.mkdtemp()) / "cold.sieve"
    file.parent.chmod(0o755)
    file.write_text(TEN_TESTS)
    sites = {"without": bench.cold, "with": bench.filtering_cold(file)}
    lives = {name: list[Life]() for name in sites}
    for _ in range(10 * bench.rounds):
        for name, site in sites.items():
            lives[name].append(life(site.command(), site, site.journal()))
    report("", f"sieve-cold: a process for one 2 KB message and ten tests, ms; {len(lives['with'])} of each")
    for part in Life._fields:
        ours, others = ([getattr(one, part) for one in lives[name]] for name in ("with", "without"))
        times = statistics.median(ratios(ours, others))
        report(
            f"  {part:<5}with {spread(ours)}, without {spread(others)}: {number(times)} times; {at_most(times, 1.35)}"
        )


def life(command: list[str], site: Site, environment: dict[str, str]) -> Life:
    """Runs a command on a connection on which everything has been said, as the account that systemd starts it with."""
    ours, theirs = socket.socketpair()
    with ours, theirs, site.log.open("ab") as log:
        ours.sendall(COLD_SESSION)
        ours.shutdown(socket.SHUT_WR)
        start = time.monotonic()
        child = subprocess.Popen(
            command,
            stdin=theirs.fileno(),
            stdout=theirs.fileno(),
            stderr=log,
            env=environment,
            user=STORE_USER,
            group=STORE_USER,
            extra_groups=[],
        )
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.monotonic() - start
        child.returncode = status
    if status:
        raise BenchError(f"cold: {command[0]} ended with {os.waitstatus_to_exitcode(status)}")
    return Life(wall * 1000, (usage.ru_utime + usage.ru_stime) * 1000)


def gibibyte(bench: Bench) -> None:
    """The memory that a message of 1 GiB takes beyond that of a small one."""
    pool = bench.fresh_pool()
    peaks = []
    for size in (4 * KIB, GIB):
        work = ONE._replace(size=size)
        pool.deliver(work, "large", 1)
        pool.look_at_memory()
        peaks.append(pool.peak)
        check_arrival(pool, work._replace(size=4 * KIB), "large", len(peaks))
    report("", "1gib: MiB of lmtpd's largest process (VmHWM) after a message of 4 KiB and one of 1 GiB")
    small, large = peaks
    report(f"  {number(small)}, {number(large)}; {at_most(large, 24)}; the difference: {at_most(large - small, 4)}")


GROWTH_GOAL = 1.15
FOLDER_SIZES = (0, 1_000, 10_000, 50_000, 200_000)
RECIPIENT_COUNTS = (1, 10, 100, 1000)


def growth_of_folder(bench: Bench) -> None:
    """The time for a message as the folder fills, against that of the floor in a folder just as full.

    What fills it is put there by hand: lmtpd keeps nothing of a folder in mind.
    """
    report("", "growth-folder: ms per message with so many in the folder")
    contestants = [bench.pool, bench.floor]
    medians: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for size in FOLDER_SIZES:
        progress(f"growth-folder: {size:,}")
        for contestant in contestants:
            contestant.prepare(ONE, "full")
            fill(contestant.files("full")[0].parent, size)
        times: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
        for _ in range(bench.rounds):
            for contestant in contestants:
                result = measure(contestant, ONE, "full", 500 // bench.divisor)
                times[contestant.name].append(1000 / result.rate)
        report(f"  {size:>9,}" + "".join(f"   {name} {spread(values)}" for name, values in times.items()))
        for name, values in times.items():
            medians[name].append(statistics.median(values))
    for name, values in medians.items():
        report(f"  {name}: {growth(values)}")


def fill(folder: Path, size: int) -> None:
    """Makes a folder hold so many files, with names as long as those of messages."""
    host = socket.gethostname()
    for number in range(len(os.listdir(folder)), size):
        (folder / f"{1_700_000_000 + number}.M{number:06d}P1Q1.{host},S=4900,W=5000").write_bytes(b"x" * 4900)


def growth(values: list[float]) -> str:
    """By how much a later value exceeds an earlier one at most, and whether that is too much."""
    times = max(later / earlier for index, earlier in enumerate(values) for later in values[index:])
    return f"at most {number(times)} times what it was before; {at_most(times, GROWTH_GOAL)}"


def growth_of_connection(bench: Bench) -> None:
    """The time for a message by its place on a connection of 1,000."""
    times: list[list[float]] = []
    message = b"Subject: growth\r\n\r\n" + (b"x" * 78 + b"\r\n") * 50
    for _ in range(2 * bench.rounds):
        client = Client(connect(bench.pool.address))
        client.hello()
        times.append([timed(lambda: client.deliver(message, "connection")) for _ in range(1000)])  # noqa: B023
        client.command("QUIT")
        client.close()
    report("", "growth-connection: ms per message by its place on a connection, medians")
    parts = {f"{start + 1} to {end}": (start, end) for start, end in ((0, 10), (10, 100), (450, 550), (900, 1000))}
    medians = [statistics.median(time for one in times for time in one[slice(*part)]) for part in parts.values()]
    report("  " + ", ".join(f"{name}: {number(median)}" for name, median in zip(parts, medians)))
    report(f"  {growth(medians)}")


def timed(action: Callable[[], object]) -> float:
    """Milliseconds that it takes."""
    start = time.monotonic()
    action()
    return (time.monotonic() - start) * 1000


def growth_of_recipients(bench: Bench) -> None:
    """The time for a copy by the number of recipients."""
    medians = []
    report("", "growth-recipients: ms per copy with so many recipients")
    for count in RECIPIENT_COUNTS:
        work = ONE._replace(recipients=count, messages=max(500 // count, 3))
        results = race(bench, [bench.pool], f"rcpt{count}of", work)[bench.pool.name]
        times = [1000 / result.rate for result in results]
        medians.append(statistics.median(times))
        report(f"  {count:>9,}   {spread(times)}")
    report(f"  {growth(medians)}")


TRIALS: dict[str, Callable[[Bench], None]] = {
    "sync": sync_calls,
    "duplicates": duplicates,
    "sql": lambda bench: records(bench, "sql", ONE, 0.8),
    "sql-ten": lambda bench: records(bench, "sql-ten", WORKS["ten-mailboxes"], 0.9),
    "cold": cold,
    "sieve": small_filter,
    "sieve-large": large_filter,
    "sieve-body": body_filter,
    "sieve-cold": cold_filter,
    "sending": sending,
}
LONG_TRIALS: dict[str, Callable[[Bench], None]] = {
    "1gib": gibibyte,
    "growth-folder": growth_of_folder,
    "growth-connection": growth_of_connection,
    "growth-recipients": growth_of_recipients,
}


# --- Main -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder for everything: the root of a fresh file system where one may be mounted."""
    top = Path(tempfile.mkdtemp(prefix="lmtpd-bench-"))
    folder = top / "disk"
    folder.mkdir()
    folder.chmod(0o755)
    top.chmod(0o755)
    mounted = mount_image(top / "image", folder)
    try:
        yield folder
    finally:
        tempfile.tempdir = None
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=False)
        subprocess.run(["rm", "-rf", str(top)], check=False)


def mount_image(image: Path, folder: Path) -> bool:
    """Makes a file system with a journal and mounts it there; whether that may be done."""
    with image.open("wb") as file:
        file.truncate(IMAGE_SIZE)
    # All of it is made now, and not by the kernel in the middle of a measurement.
    whole = ["-E", "lazy_itable_init=0,lazy_journal_init=0", "-J", "size=256", "-i", "8192"]
    commands = (
        [program("mkfs.ext4"), "-q", "-F", *whole, str(image)],
        ["mount", "-o", "loop,noatime", str(image), str(folder)],
    )
    for command in commands:
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            report(f"No fresh file system, so all is in {folder}: {done.stderr.strip()}")
            return False
    return True


def report_machine(bench: Bench, folder: Path) -> None:
    """What the figures are figures of."""
    mount = subprocess.run(["findmnt", "-no", "FSTYPE,SOURCE", "-T", str(folder)], capture_output=True, text=True)
    dovecot = subprocess.run([program("dovecot"), "--version"], capture_output=True, text=True)
    report(
        f"{CPUS} CPUs, Linux {platform.release()}, {mount.stdout.strip()}; "
        f"Python {platform.python_version()}, Dovecot {dovecot.stdout.strip()}",
        f"medians of {bench.rounds} rounds (lowest - highest)",
    )


def run(bench: Bench, names: list[str]) -> None:
    """Does these works, one after the other."""
    trials = {**TRIALS, **LONG_TRIALS}
    for name in names:
        if name in trials:
            trials[name](bench)
            continue
        work = WORKS[name]
        results = race(bench, [each for each in bench.contestants if each.takes_part(work)], name, work)
        report_race(name, work, results)
        if work is ONE:
            report_cpu_goal(results)
    report_memory(bench)


def main() -> int:
    options = docopt(__doc__)
    works = [name for name in TRIALS if name != "sync"]
    every = ["sync", *WORKS, *works, *(LONG_TRIALS if options["--long"] else [])]
    names = options["WORK"] or every
    if unknown := set(names) - {"sync", *WORKS, *TRIALS, *LONG_TRIALS}:
        print(f"no such work: {', '.join(sorted(unknown))}; --help lists them", file=sys.stderr)
        return os.EX_USAGE
    rounds, divisor = int(options["--rounds"]), 1
    if options["--quick"]:
        rounds, divisor = QUICK_ROUNDS, QUICK_DIVISOR
    # So that all is cleared away.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    signal.signal(signal.SIGALRM, lambda *_: sys.exit("a generator does not end"))
    try:
        with scratch() as folder, contextlib.ExitStack() as stack:
            tempfile.tempdir = str(folder)
            bench = Bench(folder, stack, rounds, divisor)
            report_machine(bench, folder)
            run(bench, names)
    except BenchError as error:
        print(error, file=sys.stderr)
        return os.EX_SOFTWARE
    return os.EX_OK


if __name__ == "__main__":
    sys.exit(main())
