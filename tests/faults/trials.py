"""A pool of lmtpd whose workers meet faults, each in its only session, and a client that takes what comes."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from dovecot_users import DovecotUsers
from harness import PATIENCE, Client, Site, connect, wait_for
from injection import Call, Strace, calls_in
from kinds import BEFORE, FIRST, KINDS, NEXT, POSTGRESQL, SENDER, Store, date
from peers import PostfixQueue, programs_running
from postgres import Database, scratch_server
from sink import Sink

import lmtpd

SENDMAIL = "/usr/sbin/sendmail"
TABLES = ("deliveries", "script_records")
BROKEN = ""  # the reply of a server that has closed the connection
# Seconds: each delivery tries again what has failed in the one before, and does not wait for a process that was killed.
FIGURES = {"BACKOFF": 0.001, "STALE_PAUSE": 0.001, "EMPTY_LOCK_STALE": 0.3, "LOCK_STALE": 0.3}


def parent_of(process: str) -> str:
    """The process that has started another one; "" if that has ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1]
    except OSError:
        return ""


class TrialSite(Site):
    """A site below a folder. module: another lmtpd.py than the installed one. around: a command that runs lmtpd."""

    around: Sequence[str] = ()

    def __init__(self, folder: Path, module: Path | None, **options: str) -> None:
        self._module = module
        super().__init__(str(folder), lmtp_prefork="1", **options)

    def command(self, *arguments: str) -> list[str]:
        path = f"sys.path.insert(0, {str(self._module.parent)!r}); " if self._module else ""
        code = f"import sys; {path}import lmtpd; vars(lmtpd).update({FIGURES}); lmtpd.command()"
        return [*self.around, sys.executable, "-I", "-c", code, "-C", str(self.conf), *arguments]


class Session:
    """A session of an LMTP client. pid: of the worker that serves it."""

    def __init__(self, address: str) -> None:
        self._client = Client(connect(address))
        self._client.hello()
        self.pid = self._client.server()
        self._end = os.pidfd_open(self.pid)
        self._is_closed = False

    def command(self, line: str) -> str:
        """Sends a line; the last line of the reply, BROKEN if there is none."""
        return self._say(f"{line}\r\n".encode())

    def deliver(self, letter: bytes, recipients: Sequence[str]) -> list[str]:
        """Delivers a message, and goes on after each reply; the last reply that concerns each recipient."""
        said = self.command(f"MAIL FROM:<{SENDER}>")
        if not said.startswith("250"):
            return [said] * len(recipients)
        replies = [self.command(f"RCPT TO:<{recipient}@example.com>") for recipient in recipients]
        accepted = [number for number, reply in enumerate(replies) if reply.startswith("250")]
        if not accepted:
            return replies
        said = self.command("DATA")
        if said.startswith("354"):
            said = self._say(letter.replace(b"\n", b"\r\n") + b".\r\n")
            for number in accepted:
                replies[number] = said if number == accepted[0] else self._reply()
        else:
            for number in accepted:
                replies[number] = said
        return replies

    def leave(self) -> bool:
        """Ends the session, and waits for the end of the worker; whether the client was answered."""
        answered = self.command("QUIT").startswith("221")
        self._client.close()
        if not select.select([self._end], [], [], PATIENCE)[0]:
            raise RuntimeError("the worker does not end")
        os.close(self._end)
        return answered

    def _say(self, octets: bytes) -> str:
        if not self._is_closed:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self._client.send(octets)
        return self._reply()

    def _reply(self) -> str:
        reply: list[str] = []
        if not self._is_closed:
            with contextlib.suppress(ConnectionResetError):
                reply = self._client.reply()
        self._is_closed = not reply
        return reply[-1] if reply else BROKEN


class Trials:
    """Deliveries of a kind, in a "with" block.

    folder: on the file system that is tried. module: another lmtpd.py than the installed one.
    kind, site: what is delivered, and where. address: of the pool, each of whose workers serves one session.
    calls: those of a delivery without a fault. good: what is there after it and the next one.
    """

    def __init__(self, name: str, folder: Path, module: Path | None = None) -> None:
        self.kind = KINDS[name]
        self._folder, self._module = folder, module
        self._database: Database | None = None
        self._postfix: PostfixQueue | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Trials:
        with self._stack:
            self._start()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self) -> None:
        kind = self.kind
        self.site = TrialSite(self._folder, self._module, **kind.options)
        self._stack.callback(self.site.close)
        self._sink = self._stack.enter_context(Sink())
        if kind.records == POSTGRESQL:
            self._database = self._stack.enter_context(self._stack.enter_context(scratch_server()).database())
            self.site.configure(**self._database.options)
        if kind.script:
            script = self.site.root / "script"
            script.write_text(kind.script)
            host = f"127.0.0.1:{self._sink.port}"
            self.site.configure(sieve_script=str(script), smtp_backend="host", smtp_host=host)
        if kind.has_sendmail:
            self._postfix = self._stack.enter_context(PostfixQueue(self.site, self._sink.port))
            self.site.around = self._postfix.around
            self.site.configure(smtp_backend="sendmail", sendmail=SENDMAIL)
        if kind.options.get("userdb") == "dovecot":
            homes = dict.fromkeys(kind.owners, self.site.spool)
            users = self._stack.enter_context(DovecotUsers(self.site.root / "users", homes, kind.owners))
            self.site.configure(userdb_socket_path=str(users.socket))
        for user, account in kind.owners.items():
            self._add_user(user, account)
        self.address = str(self.site.root / "lmtp")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self.address)
            listener.listen()
            self.site.start(listener, "-U", "1", "-T", "0")
        if kind.before:
            self.deliver(BEFORE, kind.before)
        if kind.has:
            self.deliver(FIRST, kind.has)
        for user, content in kind.quota.items():
            if content.count("\n") == 1:  # only the limits: the messages have to be counted
                (self.site.spool / user / "maildirsize").write_text(content)
        if self._database:
            for table in TABLES:
                self._database.execute(f"CREATE TABLE good_{table} AS TABLE {table}")
        self._template = self.site.root / "template"
        self._template.mkdir()
        self._copy(self.site.root, self._template)
        self._clear_sink()
        self.calls = self._record()
        self.deliver(NEXT, list(kind.recipients))
        self.good = Store(self.site.spool, kind)

    def _add_user(self, user: str, account: str) -> None:
        maildir = self.site.add_user(user)
        if content := self.kind.quota.get(user):
            (maildir / "maildirsize").write_text(content)
            (maildir / "maildirsize").chmod(0o600)
        for path in (maildir, *maildir.iterdir()):
            shutil.chown(path, account, account)

    def _copy(self, source: Path, target: Path) -> None:
        """Copies the mail and the database."""
        subprocess.run(["cp", "-a", source / "spool", source / "lib", target], check=True)

    def reset(self) -> None:
        """Makes everything as it was before the delivery, with an empty log."""
        os.truncate(self.site.log, 0)
        for name in ("spool", "lib"):
            shutil.rmtree(self.site.root / name)
        self._copy(self._template, self.site.root)
        if self._database:
            change = "; ".join(f"DELETE FROM {table}; INSERT INTO {table} TABLE good_{table}" for table in TABLES)
            self._database.execute(change)
        self._clear_sink()

    def mails(self) -> dict[str, int]:
        """How many mails each of the kind's recipients has got."""
        self._wait_for_mails()
        sent = [mail.recipients for mail in self._sink.mails]
        return {address: sum(address in recipients for recipients in sent) for address in self.kind.mails}

    def _wait_for_mails(self) -> None:
        """Returns when all that was sent has arrived."""
        if self._postfix:
            wait_for(lambda: not self._sending(), "the end of sendmail")
            self._postfix.wait_until_sent()

    def _sending(self) -> list[str]:
        """The processes that are sendmail, or are about to become it: their parent may have been killed."""
        pool = str(self.site.child.pid)
        ours = [each for each in programs_running(str(self.site.conf)) if each != pool and parent_of(each) != pool]
        return [*ours, *programs_running(SENDMAIL)]

    def _clear_sink(self) -> None:
        """Forgets what came. Each reply of the server has one line, which comes in one piece."""
        self._wait_for_mails()
        self._sink.clear()
        self._sink.extensions.clear()

    def _record(self) -> list[Call]:
        session = Session(self.address)
        strace = Strace(session.pid)
        replies = session.deliver(self.kind.letter(FIRST), list(self.kind.recipients))
        record = strace.detach()
        session.leave()
        if not all(reply.startswith("250") for reply in replies):
            raise RuntimeError(f"{replies}\n{self.site.log_text()}")
        return calls_in(record)

    def deliver(self, number: int, recipients: Sequence[str]) -> None:
        """Delivers a message in a session of its own."""
        session = Session(self.address)
        session.deliver(self.kind.letter(number), recipients)
        session.leave()

    def records(self) -> set[str]:
        """What the database says of the first message: the folders that have it, and the recipients of mail.

        Raises sqlite3.Error.
        """
        if self._database:
            return self._records_of_server(self._database)
        look = self.site.root / "look"
        shutil.rmtree(look, ignore_errors=True)
        look.mkdir()  # of copies: SQLite would change the files
        for path in self.site.configdirectory.glob("deliver.db*"):
            shutil.copy(path, look)
        found: set[str] = set()
        if not self.kind.records or not (look / "deliver.db").exists():
            return found
        with contextlib.closing(sqlite3.connect(look / "deliver.db")) as database:
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
            if tables.issuperset(TABLES):
                query = "SELECT mailbox FROM deliveries WHERE message_id = ?"
                rows = database.execute(query, (f"<{FIRST}@example.org>",))
                found |= {os.path.relpath(mailbox, self.site.spool) for (mailbox,) in rows}
                # Of two records for one mail, that with the Message-ID is for loops.
                rows = database.execute("SELECT record FROM script_records WHERE record NOT LIKE '<%'")
                found |= {word for (record,) in rows for word in record.split() if "@" in word}
        return found

    def _records_of_server(self, database: Database) -> set[str]:
        """The same, of PostgreSQL, which has only hashes."""
        places = [place for places in self.kind.recipients.values() for place in places]
        keys = database.column("SELECT key FROM deliveries")
        found = {place for place in places if self._key(place) in keys}
        mails = database.column("TABLE script_records EXCEPT TABLE good_script_records")
        return found.union(self.kind.mails if any(mails) else ())

    def _key(self, place: str) -> bytes:
        key = lmtpd.key_of(f"<{FIRST}@example.org>", date(FIRST), f"{self.site.spool}/{place}")
        return bytes.fromhex(key[2:])

    def open_files(self, pid: int) -> list[str]:
        """The files of mailboxes, and those without a name, that a process has open."""
        found = []
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                target = os.readlink(link)
                is_gone = target.endswith(" (deleted)") and target.startswith(f"{self.site.root}/")
                if is_gone or target.startswith(f"{self.site.spool}/"):
                    found.append(target)
        return found
