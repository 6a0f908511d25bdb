"""The deliveries that the sweep of faults has: what is delivered, where it has to be in the end, and what is wrong."""

from __future__ import annotations

import collections
import functools
import os
import random
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from harness import STORE_USER
from sieve import script_text

SENDER = "sender@example.org"
REDIRECTED = "joe@example.net"
QUOTA = "50000000S,1000C"
# Accounts of every Debian; with userdb: passwd their mail is theirs.
ACCOUNTS = ("games", "news", "daemon")
SCRIPT = script_text(
    "fileinto copy vacation imap4flags mailbox",
    f'addflag ["\\\\Flagged", "work"]; fileinto "Work"; redirect :copy "{REDIRECTED}"; vacation "I am away.";',
)
ONLY_SENT = f'redirect "{REDIRECTED}";'

SQLITE, POSTGRESQL = "sqlite", "postgresql"

NUMBER = re.compile(rb"^Message-ID: <(\d+)@example\.org>$", re.MULTILINE)
NAME = re.compile(r"[^,:]+,S=(\d+),W=(\d+)(:2,[A-Za-z]*)?")
# The messages: one that is there before, the one whose delivery meets a fault, and the one after it.
BEFORE, FIRST, NEXT = range(3)


class Kind(NamedTuple):
    """A kind of delivery.

    recipients: for each local part the folders of the store in which the message has to be then, as "jane/.Work".
    options: of imapd.conf. owners: the Maildirs that are there before, and the account that has each. quota: the files
    maildirsize of some. before: the recipients of another message, which is there before. has: those who have got the
    message already. script: of every user. mails: the recipients of what is sent, by SMTP or by Postfix's sendmail.
    records: whether lmtpd recognizes the message when it comes again: "" if it does not, else the database.
    """

    recipients: Mapping[str, Sequence[str]]
    options: Mapping[str, str] = {}
    owners: Mapping[str, str] = {}
    quota: Mapping[str, str] = {}
    before: Sequence[str] = ()
    has: Sequence[str] = ()
    script: str = ""
    mails: Sequence[str] = ()
    has_sendmail: bool = False
    size: int = 3000
    records: str = ""

    def letter(self, number: int) -> bytes:
        """What the store has of a message, after the trace headers."""
        return letter(self.size, number)


@functools.cache
def letter(size: int, number: int) -> bytes:
    """A message with a text of that size."""
    text = random.Random(number).randbytes(size // 2).hex()
    lines = [text[start : start + 72] for start in range(0, len(text), 72)]
    header = f"From: {SENDER}\nTo: jane@example.com\nMessage-ID: <{number}@example.org>\nDate: {date(number)}\n\n"
    return (header + "".join(f"{line}\n" for line in lines)).encode()


def date(number: int) -> str:
    """What a message has in its field Date."""
    return f"Sun, 22 Nov 2026 12:00:0{number} +0000"


JANE = {"jane": STORE_USER}
JANE_AND_JOE = {**JANE, "joe": STORE_USER}
THREE = {user: (user,) for user in ACCOUNTS}
OF_THREE = {user: user for user in ACCOUNTS}
BY_PASSWD = {"userdb": "passwd", "passwd_min_uid": "1"}
LARGE = 900_000

KINDS: dict[str, Kind] = {
    "new-user": Kind(
        {STORE_USER: (STORE_USER,)},
        {
            "autocreate_post": "yes",
            "autocreate_users": "group:mail",
            "autocreate_quota": "50000",
            "autocreate_inbox_folders": "Sent|Spam",
            "autocreate_subscribe_folders": "Sent",
        },
    ),
    "folder": Kind({"jane+lists": ("jane/.lists",)}, {"lmtp_detail_create": "yes", "lmtp_autosubscribe": "yes"}, JANE),
    "three-owners": Kind(THREE, BY_PASSWD, OF_THREE),
    "dovecot": Kind(
        {user: (user,) for user in ACCOUNTS[:2]},
        {"userdb": "dovecot", "maildir_path": "%h/%u"},
        {user: user for user in ACCOUNTS[:2]},
    ),
    "large": Kind({"jane": ("jane",), "joe": ("joe",)}, {}, JANE_AND_JOE, size=LARGE),
    "large-three-owners": Kind(THREE, BY_PASSWD, OF_THREE, size=LARGE),
    "quota": Kind(
        {"jane": ("jane",), "joe": ("joe",)},
        {"lmtp_strict_quota": "yes"},
        JANE_AND_JOE,
        quota={"jane": f"{QUOTA}\n0 0\n", "joe": f"{QUOTA}\n"},
        before=("jane", "joe"),
    ),
    "duplicates": Kind(
        {"jane": ("jane",), "joe": ("joe",), "ann": ("ann",)},
        {"duplicatesuppression": "yes"},
        {**JANE_AND_JOE, "ann": STORE_USER},
        has=("joe",),
        records=SQLITE,
    ),
    "script": Kind(
        {"jane": ("jane/.Work",)},
        {"duplicatesuppression": "yes"},
        JANE,
        script=SCRIPT,
        mails=(REDIRECTED, SENDER),
        records=SQLITE,
    ),
    "redirect": Kind(
        {"jane": ()}, {"duplicatesuppression": "yes"}, JANE, script=ONLY_SENT, mails=(REDIRECTED,), records=SQLITE
    ),
}
KINDS["sendmail"] = KINDS["redirect"]._replace(has_sendmail=True)
KINDS["duplicates-postgresql"] = KINDS["duplicates"]._replace(records=POSTGRESQL)
KINDS["redirect-postgresql"] = KINDS["redirect"]._replace(records=POSTGRESQL, before=("jane",))


class Copy(NamedTuple):
    """A message that readers can see. place: the folder of the store, as in Kind. flags: as in its file's name."""

    place: str
    number: int
    flags: str

    def __str__(self) -> str:
        return f"{self.place}: message {self.number} {self.flags}"


class Other(NamedTuple):
    """Something else than a message. name: its path, or "message 1" in its folder. content: of a file."""

    name: str
    mode: int
    owner: tuple[int, int]
    content: bytes

    def __str__(self) -> str:
        return f"{self.name} {self.mode:o} {self.owner} {self.content[:80]!r}"


class Store:
    """What is below the partition.

    copies: of messages that are whole. partial: other files in new/ and cur/. drafts: files in tmp/. others: the owner
    and mode of everything, and the content of files that are no messages, but not that of maildirsize.
    """

    def __init__(self, spool: Path, kind: Kind) -> None:
        self.spool = spool
        self.copies: collections.Counter[Copy] = collections.Counter()
        self.partial: list[str] = []
        self.drafts: list[str] = []
        self.others: set[Other] = set()
        self._letters = {number: kind.letter(number) for number in (BEFORE, FIRST, NEXT)}
        for folder, _, files in os.walk(spool):
            place = os.path.relpath(folder, spool)
            self._add_other(Path(folder), place, b"")
            for name in files:
                self._add_file(Path(folder, name), f"{place}/{name}")

    def _add_file(self, path: Path, name: str) -> None:
        content, place = path.read_bytes(), os.path.dirname(os.path.dirname(name))
        if path.parent.name == "tmp":
            self.drafts.append(name)
        elif path.parent.name not in ("new", "cur"):
            self._add_other(path, name, b"" if path.name == "maildirsize" else content)
        elif copy := self._copy(place, path.name, content):
            self.copies[copy] += 1
            self._add_other(path, f"{os.path.dirname(name)}/message {copy.number}", b"")
        else:
            self.partial.append(f"{name}: {len(content)} octets")

    def _add_other(self, path: Path, name: str, content: bytes) -> None:
        status = path.lstat()
        self.others.add(Other(name, stat.S_IMODE(status.st_mode), (status.st_uid, status.st_gid), content))

    def _copy(self, place: str, name: str, content: bytes) -> Copy | None:
        """The message that is in a file; None if it is not whole."""
        number, fields = NUMBER.search(content), NAME.fullmatch(name)
        if not number or not fields:
            return None
        letter = self._letters[int(number[1])]
        head = content[: -len(letter)]
        is_whole = content == head + letter and head.startswith(b"Return-Path: ") and head.count(b"\nReceived: ") == 1
        sizes = len(content), len(content) + content.count(b"\n")
        if not is_whole or sizes != (int(fields[1]), int(fields[2])):
            return None
        return Copy(place, int(number[1]), fields[3] or "")

    def count(self, place: str, number: int) -> int:
        """How often a message is in that folder."""
        return sum(count for copy, count in self.copies.items() if copy[:2] == (place, number))

    def differences(self, other: Store) -> Iterator[str]:
        """What is here and not there, and the other way round. How often a message is there does not matter."""
        for sign, here, there in (("+", self, other), ("-", other, self)):
            for each in (*(here.copies.keys() - there.copies.keys()), *sorted(here.others - there.others)):
                yield f"{sign}{each}"

    def quota_errors(self) -> Iterator[tuple[str, int, int]]:
        """The Maildirs whose file maildirsize has other sums than the files: octets and messages too much there."""
        for file in sorted(self.spool.glob("*/maildirsize")):
            lines = file.read_text().split("\n")[1:-1]
            messages = [path for path in file.parent.rglob("*,S=*") if path.parent.name in ("new", "cur")]
            try:
                sums = [sum(column) for column in zip(*(map(int, line.split()) for line in lines))]
                octets, count = sums or (0, 0)
            except ValueError:
                continue  # it says that the messages have to be counted
            octets -= sum(path.stat().st_size for path in messages)
            if octets or count != len(messages):
                yield file.parent.name, octets, count - len(messages)
