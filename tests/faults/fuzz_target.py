"""What all targets of fuzz.py have."""

from __future__ import annotations

import os
import random
import re
import shutil
import sqlite3
import tempfile
from binascii import a2b_base64, b2a_base64
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

if TYPE_CHECKING:
    from lmtpd import Config, DeliveryAgent, Stop

BASE64 = re.compile(rb"(?:[A-Za-z0-9+/]{4}){2,}(?:[A-Za-z0-9+/]{2,3}={0,2})?(?=\s)")


class Target:
    """A part of lmtpd that takes octets of others. It is called with an input, and raises if a rule is broken.

    name: of the target, and of the folder of its corpus. token, unit: what the octets are made of; the mutations
    replace, repeat and move these. inner_words: words that what is in base64 may have; none if it is not changed.
    """

    name: str
    inner_words: tuple[bytes, ...] = ()
    token = re.compile(rb"\w+|\s+|.", re.DOTALL)
    unit = re.compile(rb"[^\n]*\n?")

    def __call__(self, data: bytes) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Removes all that the target has made."""

    def seeds(self) -> Iterator[bytes]:
        """The inputs with which fuzzing begins."""
        raise NotImplementedError

    def words(self) -> list[bytes]:
        """Words that an input may have."""
        raise NotImplementedError

    def __enter__(self) -> Target:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def scratch_folder(stack: ExitStack) -> Path:
    """A folder in memory, if there is such a file system, until the stack ends."""
    folder = Path(tempfile.mkdtemp(prefix="lmtpd-test-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    stack.callback(shutil.rmtree, folder)
    return folder


def log_into(lines: list[str], stack: ExitStack) -> None:
    """Has lmtpd add its log lines to a list, until the stack ends."""
    import lmtpd  # late, for it must be imported by atheris

    stack.enter_context(mock.patch.object(lmtpd.log, "_journal", None))
    stack.enter_context(mock.patch.object(lmtpd.log, "_emit", lambda _level, line: lines.append(line)))


def served(commands: bytes, config: Config, agent: DeliveryAgent, stop: Stop, trusted: bool) -> bytes:
    """What a client gets that sends these commands in a session. trusted: whether it may deliver without AUTH."""
    import lmtpd  # late, for it must be imported by atheris

    source, sink = os.memfd_create("sent"), os.memfd_create("answers")
    try:
        os.write(source, commands)
        os.lseek(source, 0, os.SEEK_SET)
        connection = lmtpd.Connection(lmtpd.Wire(source, sink, 5, 0, stop.wakeup.fd), 5)
        peer = lmtpd.Peer("[192.0.2.1]", True, "192.0.2.1")
        authenticator = lmtpd.Authenticator(config, "lmtp", peer, trusted)
        lmtpd.Session(connection, peer, authenticator, agent, stop, config).serve()
        authenticator.close()
        return os.pread(sink, 1 << 20, 0)
    finally:
        os.close(source)
        os.close(sink)


def forget_records(database: Path) -> None:
    """Removes all records from an SQLite database, so that one run does not depend on those before."""
    if not database.exists():
        return
    with closing(sqlite3.connect(database)) as connection:
        tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        for (table,) in tables:
            connection.execute(f'DELETE FROM "{table}"')
        connection.commit()


class Mutator:
    """Changes an input where one part ends and another begins."""

    def __init__(self, target: Target) -> None:
        self._token, self._unit = target.token, target.unit
        self._words, self._inner_words = target.words(), target.inner_words
        self._others = [seed for seed in target.seeds() if seed]

    def change(self, data: bytes, seed: int) -> bytes:
        """The input with some changes."""
        dice = random.Random(seed)
        for _ in range(dice.choice((1, 1, 1, 2, 3, 5))):
            if self._inner_words and not dice.randrange(4) and (found := list(BASE64.finditer(data))):
                data = self._changed_within(data, dice.choice(found), dice)
                continue
            pattern = dice.choice((self._token, self._unit))
            parts = [part for part in pattern.findall(data) if part] or [b""]
            self._change(parts, pattern, dice)
            data = b"".join(parts)
        return data

    def _changed_within(self, data: bytes, place: re.Match[bytes], dice: random.Random) -> bytes:
        """The input with a change of what is in base64 at that place."""
        octets = a2b_base64(place[0] + b"==")
        start = dice.randrange(len(octets) + 1)
        end = min(len(octets), start + dice.choice((0, 0, 1, 1, 2, 4, 8, 50)))
        word = dice.choice((b"", bytes([dice.randrange(256)]), *self._inner_words))
        changed = octets[:start] + word * dice.choice((1, 1, 1, 2, 200)) + octets[end:]
        return data[: place.start()] + b2a_base64(changed, newline=False) + data[place.end() :]

    def _change(self, parts: list[bytes], pattern: re.Pattern[bytes], dice: random.Random) -> None:
        here, there = dice.randrange(len(parts)), dice.randrange(len(parts))
        kind = dice.choice(("insert", "insert", "replace", "replace", "remove", "repeat", "swap", "move", "splice"))
        if kind == "insert":
            parts[here:here] = [dice.choice(self._words)]
        elif kind == "replace":
            parts[here] = dice.choice(self._words)
        elif kind == "remove":
            del parts[here : here + dice.choice((1, 1, 1, 2, 5))]
        elif kind == "repeat":
            parts[here:here] = parts[here : here + 3] * dice.choice((1, 1, 2, 10, 50))
        elif kind == "swap":
            parts[here], parts[there] = parts[there], parts[here]
        elif kind == "move":
            parts[there:there] = parts[min(here, there) : here]
        else:
            other = [part for part in pattern.findall(dice.choice(self._others)) if part]
            start = dice.randrange(len(other))
            parts[here:here] = other[start : start + dice.choice((1, 2, 4, 8, 100))]
