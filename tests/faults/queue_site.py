"""A mail server for queue_run.py: Postfix's queue, lmtpd's pool as systemd runs it, Dovecot's users, a small disk."""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import smtplib
import socket
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from block import FileSystem
from harness import STORE_USER, Site, wait_for
from peers import PASSWORD, Peer, Postfix, answers, dovecot_24_head, dovecot_version, program

DISK = FileSystem("ext4", 640 << 20, 4096)
USERS = tuple(f"user{number}" for number in range(8))
SCRIPTED = "scripted"  # the user with a script that stores a second copy
SENDER = "returned"  # a user, too, whose mailbox would get what bounces
SCRIPT = 'require ["copy", "fileinto", "mailbox"];\nfileinto :copy :create "filed";\n'
SIZES = (500, 2000, 4000, 4000, 9000, 30_000)
LARGE = 400_000  # more than lmtpd keeps in memory
CONNECTIONS = 4  # by which Postfix gets its mail
# Waits of lmtpd, in seconds, for a run that is short, and for another.
SHORT_WAITS = {"DATABASE_PATIENCE": 0.5, "BACKOFF": 1.0, "SERVICE_TIMEOUT": 1, "RELOAD_PATIENCE": 1}
WAITS = {"SERVICE_TIMEOUT": 5}
# The environment that sd_listen_fds(3) wants, from a socket that is standard input.
AS_SYSTEMD = 'exec 3<&0 0</dev/null 1>&2; LISTEN_FDS=1 LISTEN_PID=$$ exec "$@"'
# After these it is the next connection that starts it: a clean end, and RestartPreventExitStatus= of the unit.
NO_RESTART = (os.EX_OK, -signal.SIGHUP, -signal.SIGTERM, os.EX_USAGE, os.EX_CONFIG)
DATABASE_FILES = ("deliver.db", "deliver.db-wal", "deliver.db-shm")

MAIN_CF = """\
virtual_mailbox_domains = example.com
virtual_transport = lmtp:unix:{socket}
defer_transports = lmtp
lmtp_destination_concurrency_limit = 10
lmtp_destination_concurrency_failed_cohort_limit = 20
maximal_backoff_time = 2s
transport_retry_time = 1s
service_throttle_time = 1s
in_flow_delay = 0
enable_long_queue_ids = yes
notify_classes =
"""


class Letter(NamedTuple):
    """A numbered message. places: for each recipient the folders that get it, below the folder of all homes."""

    number: int
    size: int
    places: dict[str, tuple[str, ...]]

    @property
    def stored(self) -> bytes:
        """What the store has after the trace headers."""
        text = random.Random(self.number).randbytes(self.size // 2).hex()
        lines = [text[start : start + 72] for start in range(0, len(text), 72)]
        date = "Date: Sat, 28 Nov 2026 12:00:00 +0000\n"
        # Without a From Postfix would add one.
        header = f"Message-ID: <{self.number}@queue.example>\n{date}From: {SENDER}@example.com\n\n"
        return (header + "".join(f"{line}\n" for line in lines)).encode()


def letter(number: int) -> Letter:
    """The message with this number: to one user or two, some with a sub-address, or to the user with a script."""
    dice = random.Random(number)
    one, other = dice.sample(USERS, 2)
    folder = f"list{dice.randrange(3)}"
    kinds = (
        (one,),
        (one, other),
        (f"{one}+{folder}",),
        (one, f"{other}+{folder}"),
        (SCRIPTED,),
    )
    recipients = dice.choices(kinds, (8, 3, 3, 2, 2))[0]
    size = LARGE if dice.random() < 0.02 else dice.choice(SIZES)
    return Letter(number, size, {recipient: places_of(recipient) for recipient in recipients})


def places_of(recipient: str) -> tuple[str, ...]:
    user, _, detail = recipient.partition("+")
    inbox = f"{user}/Maildir"
    if user == SCRIPTED:
        return inbox, f"{inbox}/.filed"
    return (f"{inbox}/.{detail}" if detail else inbox,)


class Users(Peer):
    """Dovecot's authentication service with the users in an SQLite database.

    Not in a passwd-file: when that is missing, Dovecot 2.3 now and then answers that the user does not exist.
    """

    name = "Dovecot"

    def __init__(self, site: Site, homes: Path) -> None:
        super().__init__(site.root / "users")
        self.socket = self.folder / "run/auth-userdb"
        self._database = self.folder / "users.db"
        self._ask("CREATE TABLE users (name, home)")
        for name in (*USERS, SCRIPTED, SENDER):
            self._ask(f"INSERT INTO users VALUES ('{name}', '{homes}/{name}')")
        self.conf = self.folder / "dovecot.conf"
        is_old = dovecot_version() < (2, 4)
        self.conf.write_text(f"""\
{"" if is_old else dovecot_24_head()}\
base_dir = {self.folder}/run
state_dir = {self.folder}/run
log_path = {self.log}
protocols =
ssl = no
{self._databases() if is_old else self._24_databases()}\
service auth {{
  unix_listener auth-userdb {{
    mode = 0600
    user = {STORE_USER}
  }}
}}
""")

    def _databases(self) -> str:
        sql = self.folder / "sql.conf"
        query = "SELECT home FROM users WHERE name = '%u'"
        sql.write_text(f"driver = sqlite\nconnect = {self._database}\nuser_query = {query}\n")
        passwords = f"passdb {{\n  driver = static\n  args = password={PASSWORD}\n}}\n"
        return f"{passwords}userdb {{\n  driver = sql\n  args = {sql}\n}}\n"

    def _24_databases(self) -> str:
        """The same in the language of Dovecot 2.4."""
        query = "SELECT home FROM users WHERE name = '%{user}'"
        database = f"sql_driver = sqlite\nsqlite_path = {self._database}\n"
        return f"{database}passdb static {{\n  password = {PASSWORD}\n}}\nuserdb sql {{\n  query = {query}\n}}\n"

    def _ask(self, statement: str) -> None:
        with contextlib.closing(sqlite3.connect(self._database, timeout=30)) as database, database:
            database.execute(statement)

    def break_down(self) -> None:
        """Makes every question about a user one that can't be answered at the moment."""
        self._ask("ALTER TABLE users RENAME TO gone")

    def mend(self) -> None:
        """Ends what break_down() did."""
        self._ask("ALTER TABLE gone RENAME TO users")

    def start(self) -> None:
        self.run([program("dovecot"), "-F", "-c", str(self.conf)], lambda: answers(str(self.socket)))

    def stop(self) -> None:
        """Ends them all: those that have a client would go on without their master for a while."""
        os.killpg(self.process.pid, signal.SIGTERM)


class Log:
    """lmtpd's log: lines as they come, each with its time.

    write_end: the descriptor to write to, as to the journal. file: has them, too.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._read_end, self.write_end = os.pipe()
        self.lines: list[tuple[float, str]] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with os.fdopen(self._read_end, encoding="ascii") as log, self._file.open("w", buffering=1) as copy:
            for line in log:
                at, text = time.time(), line.rstrip("\n").partition(">")[2]
                self.lines.append((at, text))
                copy.write(f"{at:.3f} {text}\n")

    def environment(self) -> dict[str, str]:
        """The environment of a process whose standard error is the journal's."""
        status = os.fstat(self.write_end)
        return {**os.environ, "JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}

    def close(self) -> None:
        """Waits for the last line: that is when no process has the log any more."""
        os.close(self.write_end)
        self._thread.join()


class Service:
    """Runs lmtpd's pool on a unix socket as systemd does: when a connection waits, and again after a crash.

    ends: the exit statuses of its processes so far. restart: seconds until the start after a crash.
    """

    def __init__(self, command: list[str], address: str, log: Log, restart: float) -> None:
        self._command, self._log, self._restart = command, log, restart
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(address)
        os.chmod(address, 0o666)
        self._listener.listen(512)
        self._process: subprocess.Popen[bytes] | None = None
        self._groups: list[int] = []
        self._stopping = threading.Event()
        self._keeps_orphans = False
        self.ends: list[int] = []
        self.orphaned: list[int] = []  # workers that were killed because their parent had been
        self._thread = threading.Thread(target=self._supervise)
        self._thread.start()

    def _supervise(self) -> None:
        must_start = False
        while not self._stopping.is_set():
            if not must_start and not poll(self._listener):
                continue
            process = self._start()
            status = process.wait()
            self.ends.append(status)
            if status < 0 and not self._keeps_orphans:
                # KillMode=mixed
                for worker in self.members():
                    self.orphaned.append(worker)
                    kill(worker)
            self._keeps_orphans = False
            must_start = status not in NO_RESTART
            if must_start:
                self._stopping.wait(self._restart)

    def _start(self) -> subprocess.Popen[bytes]:
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", AS_SYSTEMD, "sh", *self._command],
            stdin=self._listener.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=self._log.write_end,
            env=self._log.environment(),
            start_new_session=True,
        )
        self._groups.append(self._process.pid)
        return self._process

    def members(self) -> list[int]:
        """Its processes but the parent."""
        parent = self.parent()
        return [process for process, group in processes() if group in self._groups and process != parent]

    def parent(self) -> int:
        """The parent of the pool; 0 if it does not run."""
        process = self._process
        return process.pid if process and process.poll() is None else 0

    def kill_parent(self, keeps_orphans: bool) -> int:
        """Kills the parent; then its workers, too, unless they are to be left alone, as with inetd. Its process id."""
        parent = self.parent()
        if parent:
            self._keeps_orphans = keeps_orphans
            kill(parent)
        return parent

    def signal_parent(self, number: signal.Signals) -> int:
        """Sends a signal to the parent; its process id."""
        parent = self.parent()
        if parent:
            os.kill(parent, number)
        return parent

    def close(self) -> list[int]:
        """Stops it; the processes that are there all the same."""
        self._stopping.set()
        self.signal_parent(signal.SIGTERM)
        self._thread.join()
        self._listener.close()
        with contextlib.suppress(AssertionError):
            wait_for(lambda: not self.members(), "its end", patience=5)
        left = self.members()
        for process in left:
            kill(process)
        return left


def poll(listener: socket.socket) -> bool:
    """Whether a connection waits, perhaps after a moment."""
    return bool(select.select([listener], [], [], 0.1)[0])


def kill(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def processes(name: str = "") -> Iterator[tuple[int, int]]:
    """The processes that live, of a program or all, each with its process group. Source: proc_pid_stat(5)."""
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            head, _, rest = file.read_text(errors="replace").rpartition(")")
            process, _, found = head.partition(" (")
            state, _, group, *_ = rest.split()
            if state != "Z" and name in ("", found):
                yield int(process), int(group)


class QueueSite(Site):
    """All of it. place: an empty folder, on which the disk is mounted. has_short_waits: see SHORT_WAITS."""

    _writing = threading.Lock()

    def __init__(self, place: Path, has_short_waits: bool) -> None:
        super().__init__()
        self._stack = contextlib.ExitStack()
        self.figures = dict(SHORT_WAITS if has_short_waits else WAITS)
        self.patience = 0.5 if has_short_waits else 5.0
        self.backoff = 1.0 if has_short_waits else 10.0
        self.disk = place
        self._mount(place)
        self.users = Users(self, self.spool)
        self.configure(
            duplicatesuppression="yes",
            userdb="dovecot",
            userdb_socket_path=str(self.users.socket),
            maildir_path="%h/Maildir",
            lmtp_detail_create="yes",
            lmtp_maxchild="8",
        )
        self.journal_lines = Log(self.log)
        address = str(self.root / "lmtp")
        self.postfix = Postfix(self, MAIN_CF.replace("{socket}", address))
        self._stack.callback(self.postfix.close)
        self._stack.enter_context(self.users)
        self.service = Service(self.command(), address, self.journal_lines, 0.2 if has_short_waits else 1.0)
        self.postfix.start()

    def _mount(self, place: Path) -> None:
        image = self.root / "image"
        DISK.make([image])
        self._stack.enter_context(DISK.mounted([image], place))
        self.spool, self.configdirectory = place / "spool", place / "lib"
        for folder in (self.spool, self.configdirectory):
            folder.mkdir()
            self.give(folder)
        for name in (*USERS, SCRIPTED, SENDER):
            (self.spool / name).mkdir()
            self.give(self.spool / name)
        script = self.spool / SCRIPTED / ".dovecot.sieve"
        script.write_text(SCRIPT)
        self.give(script)
        self.options["configdirectory"], self.options["partition-default"] = str(self.configdirectory), str(self.spool)

    def configure(self, **options: str | None) -> None:
        """Writes imapd.conf, which is never there in part: lmtpd would do as the part says."""
        with self._writing:
            for name, value in options.items():
                if value is None:
                    self.options.pop(name, None)
                else:
                    self.options[name] = value
            text = "".join(f"{name}: {value}\n" for name, value in self.options.items())
            new = self.conf.with_suffix(".new")
            new.write_text(text)
            new.rename(self.conf)

    @property
    def database(self) -> Path:
        return self.configdirectory / "deliver.db"

    def remove_database(self, names: Sequence[str] = DATABASE_FILES) -> None:
        """What an administrator does with a damaged one."""
        for name in names:
            (self.configdirectory / name).unlink(missing_ok=True)

    def send(self, letters: Sequence[Letter]) -> None:
        """Puts messages into Postfix's queue."""
        with ThreadPoolExecutor(CONNECTIONS) as threads:
            for _ in threads.map(self._send, (letters[start::CONNECTIONS] for start in range(CONNECTIONS))):
                pass

    def _send(self, letters: Sequence[Letter]) -> None:
        if not letters:
            return
        with smtplib.SMTP(*self.postfix.address) as smtp:
            for sent in letters:
                recipients = [f"{recipient}@example.com" for recipient in sent.places]
                smtp.sendmail(f"{SENDER}@example.com", recipients, sent.stored.replace(b"\n", b"\r\n"))

    def begin(self) -> None:
        """Lets Postfix deliver what is in its queue."""
        conf = ["-c", str(self.postfix.conf)]
        subprocess.run([program("postconf"), *conf, "defer_transports="], check=True)
        subprocess.run([program("postfix"), *conf, "reload"], check=True, capture_output=True)
        self.flush()

    def flush(self) -> None:
        """Lets Postfix try again all that is in its queue."""
        subprocess.run([program("postqueue"), "-c", str(self.postfix.conf), "-f"], check=True)

    def queued(self) -> int:
        """How many messages are in Postfix's queue."""
        folders = ("maildrop", "incoming", "active", "deferred", "hold", "corrupt")
        return sum(1 for name in folders for path in (self.postfix.queue / name).rglob("*") if path.is_file())

    def finish(self) -> list[int]:
        """Ends all but the disk; the processes of lmtpd that are there after its end."""
        self.postfix.close()
        left = self.service.close()
        self.users.close()
        self.journal_lines.close()
        return left

    def close(self) -> None:
        self._stack.close()
        super().close()
