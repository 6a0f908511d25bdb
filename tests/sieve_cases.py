"""What the cases of Sieve are made of: letters, and forms of many scripts. The cases are in sieve_cases_*."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

LETTER = b"""\
From: Jane Doe <jane@example.org>
To: joe@example.com, "Roe, Richard" <richard.roe+list@example.net>
Cc: team@lists.example.org
Subject: A letter about Sieve
Date: Sat, 24 Feb 2024 23:59:58 +0530
Message-ID: <1@example.org>
X-Number: 42
X-Twice: first
X-Twice: second
X-Empty:
List-Id: Team <team.lists.example.org>

The first line.
The second line.
"""


@dataclass(frozen=True)
class Case:
    """A script and a message that is delivered to it, by LMTP, so many times.

    before, after: scripts of the site. others: scripts of the user by name, for include. refuse: the reply to the
    recipient of a mail that it sends. then: what else is delivered to the same user afterwards. theirs: the script for
    Pigeonhole, if it does not know all of ours.

    The word "username" stands for the user's name.
    """

    name: str
    script: str | bytes
    message: bytes = LETTER
    sender: str = "sender@example.org"
    detail: str = ""
    before: str = ""
    after: str = ""
    others: Mapping[str, str] = field(default_factory=dict)
    times: int = 1
    refuse: Mapping[str, str] = field(default_factory=dict)
    then: tuple[Case, ...] = ()
    theirs: str = ""

    def __str__(self) -> str:
        return self.name


def require(*capabilities: str) -> str:
    """The first line of a script; nothing if it needs nothing."""
    names = ", ".join(f'"{name}"' for name in capabilities)
    return f"require [{names}];\n" if capabilities else ""


def when(
    name: str,
    test: str,
    *capabilities: str,
    message: bytes = LETTER,
    sender: str = "sender@example.org",
    detail: str = "",
) -> Case:
    """A test that decides between two folders."""
    script = require("fileinto", *capabilities) + f'if {test} {{ fileinto "yes"; }} else {{ fileinto "no"; }}\n'
    return Case(name, script, message, sender, detail)


def does(name: str, commands: str, *capabilities: str, message: bytes = LETTER) -> Case:
    """A script of these commands."""
    return Case(name, require(*capabilities) + commands + "\n", message)


def broken(name: str, commands: str, *capabilities: str) -> Case:
    """A script that has an error, below a command that would be seen."""
    return Case(name, require("fileinto", *capabilities) + f'fileinto "wrong";\n{commands}\n')


def letter(*fields: str | bytes, body: str | bytes = "Body.\n") -> bytes:
    """A message of these header fields, each without its line end."""
    lines = [line.encode() if isinstance(line, str) else line for line in fields]
    return b"".join(line + b"\n" for line in lines) + b"\n" + (body.encode() if isinstance(body, str) else body)
