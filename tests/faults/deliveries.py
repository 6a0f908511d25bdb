"""The work of lmtpd during which the power is lost: messages of all kinds, over several connections."""

from __future__ import annotations

import random
import re
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from harness import Site
from starters import SocketActivate

CONNECTIONS = 5
KEYWORDS = 6

FLAGGING = """\
require ["imap4flags", "variables"];
if header :matches "Message-ID" "<*" { addflag "\\\\Flagged"; }
if header :matches "X-Keyword" "*" { addflag "${1}"; }
"""
NUMBER = re.compile(rb"^Message-ID: <(\d+)@example\.com>$", re.MULTILINE)
NAME = re.compile(r"[^,:]+,S=(\d+),W=(\d+)(?::2,([A-Za-z]*))?")


class Place(NamedTuple):
    """Where a message belongs. folder: of the user's Maildir. keyword: that it has there."""

    user: str
    folder: str = ""
    keyword: str = ""


class Letter(NamedTuple):
    """A numbered message, and where it is sent."""

    number: int
    size: int
    recipients: dict[str, Place]

    @property
    def stored(self) -> bytes:
        """What the store has after the trace headers."""
        text = random.Random(self.number).randbytes(self.size // 2).hex()
        lines = [text[start : start + 72] for start in range(0, len(text), 72)]
        header = f"Message-ID: <{self.number}@example.com>\nX-Keyword: {keyword_of(self.number)}\n\n"
        return (header + "".join(f"{line}\n" for line in lines)).encode()


def keyword_of(number: int) -> str:
    return f"k{number % KEYWORDS}"


def letter(number: int) -> Letter:
    """The message with this number; all kinds are among those with a few dozen numbers."""
    dice = random.Random(number)
    size = dice.choice((500, 2000, 4000, 4000, 4000, 9000, 30_000, 100_000))
    plain = {"jane": Place("jane")}
    flagged = {"flagged": Place("flagged", "", keyword_of(number))}
    kinds = (
        lambda: Letter(number, size, plain),
        lambda: Letter(number, 2_000_000, plain),
        lambda: Letter(number, size, {f"new{number}": Place(f"new{number}")}),
        lambda: Letter(number, size, {f"joe+list{number}": Place("joe", f".list{number}")}),
        lambda: Letter(number, size, flagged),
        lambda: Letter(number, size, {**plain, "joe": Place("joe"), **flagged}),
    )
    return dice.choices(kinds, (8, 1, 3, 3, 4, 4))[0]()


class DiskSite(Site):
    """A site with its mail on a disk of its own, below place. module: another lmtpd.py than the installed one."""

    def __init__(self, place: Path, module: Path | None) -> None:
        self.module = module
        super().__init__(
            autocreate_post="yes",
            autocreate_quota="10000000",
            lmtp_detail_create="yes",
            lmtp_prefork=str(CONNECTIONS),
        )
        self.spool = place / "spool"
        self.spool.mkdir()
        self.give(self.spool)
        scripts = self.root / "scripts"
        scripts.mkdir()
        (scripts / "flagged").write_text(FLAGGING)
        self.configure(**{"partition-default": str(self.spool), "sieve_script": f"{scripts}/%u"})
        self.add_user("jane", "joe", "flagged")
        quota = self.spool / "jane/maildirsize"
        quota.write_text("10000000000S\n0 0\n")
        self.give(quota)

    def command(self, *arguments: str) -> list[str]:
        if not self.module:
            return super().command(*arguments)
        program = f"import sys; sys.path.insert(0, {str(self.module.parent)!r}); import lmtpd; lmtpd.command()"
        return [sys.executable, "-I", "-c", program, "-C", str(self.conf), *arguments]


class Deliveries:
    """Delivers messages; then says what is wrong with a store. Has the interface of Calls in orders.py."""

    def __init__(self, place: Path, count: int, module: Path | None) -> None:
        self._letters = {number: letter(number) for number in range(count)}
        self._site = DiskSite(place, module)
        # For each message the last event before its answer was read.
        self.answered: dict[int, int] = {}

    def run(self, position: Callable[[], int]) -> None:
        """Has all messages delivered. position: gives the number of the last event."""
        with SocketActivate(self._site.command(), address=str(self._site.root / "lmtp")) as starter:
            clients = [starter.connect() for _ in range(CONNECTIONS)]
            together = threading.Barrier(CONNECTIONS)

            def deliver(connection: int) -> None:
                client = clients[connection]
                client.hello()
                together.wait()
                for number in range(connection, len(self._letters), CONNECTIONS):
                    sent = self._letters[number]
                    replies = client.deliver(sent.stored.replace(b"\n", b"\r\n"), *sent.recipients)
                    if not all(reply.startswith("250") for reply in replies):
                        raise RuntimeError(f"{replies}\n{self._site.log_text()[-2000:]}")
                    self.answered[number] = position()
                client.leave()

            with ThreadPoolExecutor(CONNECTIONS) as threads:
                for _ in threads.map(deliver, range(CONNECTIONS)):
                    pass
        self._site.close()

    def faults(self, place: Path, cut: int) -> Iterator[tuple[str, str]]:
        """The faults of the store that is mounted there, and what each concerns."""
        found: dict[tuple[int, str, str], str] = {}
        keywords: dict[str, dict[str, str]] = {}
        for path in sorted(place.glob("spool/*/**/*")):
            if path.parent.name not in ("new", "cur"):
                continue
            folder = path.parent.parent.relative_to(place / "spool")
            content = path.read_bytes()
            number = NUMBER.search(content)
            name = NAME.fullmatch(path.name)
            if not number or not name or not self._is_whole(int(number[1]), content, name):
                yield "partial", f"{folder}: {path.name}: {len(content)} octets"
                continue
            user, _, subfolder = str(folder).partition("/")
            key = int(number[1]), user, subfolder
            if key in found:
                yield "twice", f"{folder}: {number[1].decode()}"
            found[key] = name[3] or ""
            if str(folder) not in keywords:
                keywords[str(folder)] = keywords_of(path.parent.parent)
        for number_of_message, position in self.answered.items():
            if position > cut:
                continue
            for where in self._letters[number_of_message].recipients.values():
                flags = found.get((number_of_message, where.user, where.folder))
                if flags is None:
                    yield "lost", f"{where}: {number_of_message}"
                elif where.keyword:
                    letters = keywords[where.user]
                    if where.keyword not in {letters.get(flag) for flag in flags}:
                        yield "unflagged", f"{where}: {number_of_message} has {flags}, {letters}"

    def expected(self, cut: int) -> int:
        """How many copies of messages must be there."""
        return sum(len(self._letters[number].recipients) for number, at in self.answered.items() if at <= cut)

    def _is_whole(self, number: int, content: bytes, name: re.Match[str]) -> bool:
        stored = self._letters[number].stored
        sizes = len(content), len(content) + content.count(b"\n")
        return content.endswith(stored) and sizes == (int(name[1]), int(name[2]))


def keywords_of(folder: Path) -> dict[str, str]:
    """The keyword of each letter, as the folder's file of keywords has it."""
    file = folder / "dovecot-keywords"
    lines = [line.partition(" ") for line in file.read_text().splitlines()] if file.exists() else []
    return {chr(ord("a") + int(number)): keyword for number, _, keyword in lines}
