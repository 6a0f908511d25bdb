"""A mail server for queue_run.py: Postfix's queue, lmtpd's pool as systemd runs it, Dovecot's users, a small disk."""

from __future__ import annotations

import contextlib
import random
import smtplib
import subprocess
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from block import FileSystem
from dovecot_users import DovecotUsers
from harness import Site
from peers import Postfix, program
from service import Log, Service

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
        homes = {name: self.spool / name for name in (*USERS, SCRIPTED, SENDER)}
        self.users = DovecotUsers(self.root / "users", homes)
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
