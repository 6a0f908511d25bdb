"""Sieve scripts in this process: a script is put where the user has it, a message delivered, and the outcome read."""

from __future__ import annotations

import ast
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import SMTPUTF8, compat32
from pathlib import Path
from typing import NamedTuple, Union
from unittest import mock

from harness import Site, config_of
from sink import Mail, Sink

import lmtpd
from lmtpd import Compiler, DeliveryAgent, Envelope, Incoming, Reply, ScriptErrors, language_for

Text = Union[str, bytes]

USER = "jane"
LETTER = "From: someone@example.org\nTo: jane@example.com\nSubject: hello\n\nA body.\n"
DELIVERED = Reply(250, "2.1.5", "Ok")
# The events of lmtpd's log that speak of scripts.
SCRIPT_ERROR, DISCARDED = "script-error", "discarded"
FLAGS = {"D": r"\Draft", "F": r"\Flagged", "R": r"\Answered", "S": r"\Seen", "T": r"\Deleted"}
FIELD = re.compile(r' (\w+)=("(?:[^"\\]|\\.)*"|[^ "]*)')


def octets_of(text: Text) -> bytes:
    return text.encode() if isinstance(text, str) else text


class Event(NamedTuple):
    """A line of the log."""

    name: str
    fields: dict[str, str]

    @classmethod
    def of(cls, line: str) -> Event:
        name = re.split(r" \w+=", line, maxsplit=1)[0]
        fields = {}
        for key, value in FIELD.findall(line[len(name) :]):
            fields[key] = str(ast.literal_eval(value)) if value.startswith('"') else value
        return cls(name, fields)


class Stored(NamedTuple):
    """A message in a folder. flags: of the system as "\\Seen", keywords by their names."""

    flags: frozenset[str]
    octets: bytes

    def headers(self, name: str) -> list[str]:
        """The bodies of all fields of that name, unfolded."""
        return fields_of(self.octets, name)

    def header(self, name: str) -> str | None:
        """The body of the first field of that name; None if there is none."""
        return next(iter(self.headers(name)), None)


class Sent(NamedTuple):
    """A message that was sent on the occasion of a delivery. mail: what the SMTP server got."""

    mail: Mail

    @property
    def recipients(self) -> list[str]:
        """Those of the envelope, sorted."""
        return sorted(self.mail.recipients)

    @property
    def message(self) -> EmailMessage:
        """The message, its fields decoded."""
        return parsed(self.mail.octets)

    @property
    def names(self) -> list[str]:
        """The names of all fields, in lower case, sorted."""
        return sorted(name.lower() for name in message_from_bytes(self.mail.octets, policy=compat32))

    @property
    def text(self) -> str:
        """The text of a message that has no parts, decoded, its lines with LF."""
        text = self.message.get_content()
        assert isinstance(text, str)
        return text.replace("\r\n", "\n")

    @property
    def lines(self) -> list[bytes]:
        """The lines as they came."""
        return self.mail.octets.split(b"\r\n")

    def headers(self, name: str) -> list[str]:
        """The bodies of all fields of that name, unfolded, not decoded."""
        return fields_of(self.mail.octets, name)

    def header(self, name: str) -> str | None:
        """The body of the first field of that name; None if there is none."""
        return next(iter(self.headers(name)), None)

    def decoded(self, name: str) -> str:
        """The body of the only field of that name, its encoded words decoded."""
        [value] = self.message.get_all(name, [])
        return str(value)


class Outcome(NamedTuple):
    """What came of one delivery. replies: one for each recipient. folders: the messages that it added.

    events: the log. sent: the mails.
    """

    replies: list[Reply]
    folders: dict[str, list[Stored]]
    events: list[Event]
    sent: list[Sent]

    @property
    def reply(self) -> str:
        """The codes of the reply; those for several recipients have commas between them."""
        return ", ".join(map(str, self.replies))

    @property
    def reply_lines(self) -> list[str]:
        """The lines of the only reply, as the client gets them."""
        [reply] = self.replies
        return reply.render().decode("ascii").split("\r\n")[:-1]

    @property
    def placed(self) -> dict[str, str]:
        """The flags of the message in each folder; those of several messages have commas between them."""
        return {
            folder: ", ".join(" ".join(sorted(message.flags)) for message in messages)
            for folder, messages in self.folders.items()
        }

    @property
    def errors(self) -> list[str]:
        """The errors of scripts, each as "line: cause"."""
        found = (event.fields for event in self.events if event.name == SCRIPT_ERROR)
        return [f"{fields['line']}: {fields['cause']}" for fields in found]

    def fields(self, event: str) -> list[dict[str, str]]:
        """The fields of the events of that name."""
        return [each.fields for each in self.events if each.name == event]

    @property
    def is_discarded(self) -> bool:
        """Whether nothing is stored, and the log says that a script wanted it so."""
        return not self.folders and any(event.name == DISCARDED for event in self.events)

    @property
    def message(self) -> Stored:
        """The message, where only one has been stored."""
        [message] = [message for messages in self.folders.values() for message in messages]
        return message


class Sieve:
    """A user with scripts. sink: where mail is sent to. before, after, default: scripts of the site."""

    def __init__(
        self,
        site: Site,
        sink: Sink | None = None,
        /,
        before: Text = "",
        after: Text = "",
        default: Text = "",
        **options: str,
    ) -> None:
        self.site, self.sink = site, sink
        self.folder = site.root / "sieve" / USER
        self.global_folder = site.root / "sieve-global"
        for folder in (self.folder.parent, self.folder, self.global_folder):
            folder.mkdir(exist_ok=True)
        site.give(self.folder)
        settings = {
            "sieve_script": f"{self.folder.parent}/%u/active.sieve",
            "sieve_global_dir": str(self.global_folder),
        }
        for name, script in (("before", before), ("after", after), ("default", default)):
            if script:
                settings[f"sieve_{name}"] = str(self._write(site.root, name, script))
        if sink:
            settings |= {"smtp_backend": "host", "smtp_host": f"127.0.0.1:{sink.port}"}
        site.configure(**{**settings, **options})
        own = {name: value for name, value in site.options.items() if name != "cyrus_user"}
        self.config = config_of(**own)
        self.agent = DeliveryAgent(self.config)

    @property
    def script(self) -> Path:
        """The user's active script."""
        return self.folder / "active.sieve"

    def write(self, name: str, script: Text) -> None:
        """Gives the user a script of that name, beside the active one."""
        self._write(self.folder, name, script)

    def write_global(self, name: str, script: Text) -> None:
        """Gives the site a script of that name, for include :global."""
        self._write(self.global_folder, name, script)

    def add_folder(self, name: str) -> None:
        """Makes a folder of the user's; its levels have slashes between them."""
        path = self.site.spool / USER / f".{name.replace('/', '.')}"
        for folder in (path, path / "tmp", path / "new", path / "cur"):
            folder.mkdir()
            self.site.give(folder)

    def run(
        self,
        script: Text | None,
        message: Text = LETTER,
        sender: str = "sender@example.org",
        detail: str = "",
        **scripts: Text,
    ) -> Outcome:
        """Delivers a message with that active script, None for none. scripts: others of the user's, by their names."""
        if script is None:
            self.script.unlink(missing_ok=True)
        else:
            self.write("active", script)
        for name, other in scripts.items():
            self.write(name, other)
        return self.deliver(message, sender, f"{USER}+{detail}" if detail else USER)

    def deliver(self, message: Text, sender: str = "sender@example.org", *recipients: str, pieces: int = 0) -> Outcome:
        """Delivers a message with the scripts as they are. recipients: the user, or local parts, or whole addresses.

        pieces: how many octets of the message arrive at a time; 0 for all at once.
        """
        lines: list[str] = []
        before = set(self._files())
        mails = len(self.sink.mails) if self.sink else 0
        with mock.patch.object(lmtpd.log, "_emit", lambda _, line: lines.append(line)):
            octets = octets_of(message).replace(b"\r\n", b"\n")
            replies = self._deliver(octets, sender, recipients or (USER,), pieces)
        sent = [Sent(mail) for mail in self.sink.mails[mails:]] if self.sink else []
        folders: dict[str, list[Stored]] = {}
        for path in sorted(set(self._files()) - before, key=lambda path: path.stat().st_mtime_ns):
            folders.setdefault(folder_of(path), []).append(Stored(flags_of(path), path.read_bytes()))
        return Outcome(replies, folders, [Event.of(line) for line in lines], sent)

    def check(self, script: Text) -> list[str]:
        """The errors in a script, each as "line:column: text"; [] if there is none."""
        try:
            language = language_for(self.config.sieve_extensions)
            Compiler(language, self.config.sieve_maxscriptsize).compile(octets_of(script), "checked")
        except ScriptErrors as errors:
            return [f"{line}:{column}: {text}" for line, column, text in errors.errors]
        return []

    def clear(self) -> None:
        """Removes all messages and folders of the user."""
        maildir = self.site.spool / USER
        for path in maildir.glob(".*"):
            if path.is_dir():
                shutil.rmtree(path)
        for path in (*self._files(), maildir / "dovecot-keywords", maildir / "subscriptions"):
            path.unlink(missing_ok=True)

    def _write(self, folder: Path, name: str, script: Text) -> Path:
        """Writes a script in place of an older one, which shows by its inode."""
        new = folder / f"{name}.new"
        new.write_bytes(octets_of(script))
        self.site.give(new)
        return new.replace(folder / f"{name}.sieve")

    def _deliver(self, message: bytes, sender: str, recipients: Sequence[str], pieces: int) -> list[Reply]:
        envelope = Envelope(lmtpd.parse_path(f"<{sender}>")[0])
        for recipient in recipients:
            local_part, _, domain = recipient.rpartition("@") if "@" in recipient else (recipient, "", "")
            address = lmtpd.Address(local_part, domain or "example.com")
            envelope.destinations.append(self.agent.router.find(address, envelope, 0, False))
        incoming = Incoming(b"Return-Path: <%s>\n" % sender.encode(), self.config, self.agent.drafts(envelope))
        try:
            size = pieces or len(message) or 1
            for start in range(0, len(message), size):
                incoming.write(message[start : start + size])
            incoming.complete()
            return self.agent.deliver(incoming, envelope, DELIVERED)
        finally:
            incoming.discard()

    def _files(self) -> Iterator[Path]:
        maildir = self.site.spool / USER
        for folder in ("", ".*/"):
            for kind in ("new", "cur"):
                yield from maildir.glob(f"{folder}{kind}/*")


class Clock:
    """The time as lmtpd sees it, which goes faster where a test wants it."""

    def __init__(self) -> None:
        self.ahead = 0.0
        self._time = time.time

    def now(self) -> float:
        return self._time() + self.ahead


def fields_of(octets: bytes, name: str) -> list[str]:
    """The bodies of all fields of that name in a message, unfolded."""
    fields = message_from_bytes(octets, policy=compat32).get_all(name, [])
    return [re.sub(r"\r?\n(?=[ \t])", "", str(field)).strip() for field in fields]


def parsed(octets: bytes) -> EmailMessage:
    """A message, its fields decoded."""
    message = message_from_bytes(octets, policy=SMTPUTF8)
    assert isinstance(message, EmailMessage)
    return message


def folder_of(message: Path) -> str:
    """The folder of a message, its levels with slashes between them, without the level INBOX above others."""
    directory = message.parent.parent.name
    if not directory.startswith("."):
        return "INBOX"
    first, *rest = [lmtpd.from_modified_utf7(level) for level in directory[1:].split(".")]
    return "/".join(rest if rest and first.upper() == "INBOX" else [first, *rest])


def flags_of(message: Path) -> frozenset[str]:
    """The flags in the name of a message's file; a keyword's letter is looked up in the folder."""
    letters = message.name.partition(":2,")[2]
    try:
        lines = (message.parent.parent / "dovecot-keywords").read_text().splitlines()
    except FileNotFoundError:
        lines = []
    keywords = {chr(ord("a") + int(number)): name for number, name in (line.split(" ", 1) for line in lines)}
    return frozenset(FLAGS.get(letter) or keywords[letter] for letter in letters)


def script_text(requires: str, body: str) -> str:
    """A script with these capabilities, given as words."""
    words = ", ".join(f'"{word}"' for word in requires.split())
    return f"require [{words}];\n{body}\n" if words else f"{body}\n"


def seconds_of_cpu() -> float:
    """The CPU time that this process has used."""
    times = os.times()
    return times.user + times.system
