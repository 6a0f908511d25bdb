"""What is stored, sent and recorded when lmtpd is killed in the middle, and the client tries again: the table of
lmtpd(8), SENDING MAIL."""

from __future__ import annotations

import itertools
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from harness import PATIENCE, Client, Site, wait_for
from mailboxes import connected
from peers import program
from sieve import Sieve, script_text
from sink import Sink

SENDER = "sender@example.org"
NUMBERS = itertools.count()
# Scripts, and how many copies each stores.
SCRIPTS = {
    "redirect": ('redirect "joe@example.net";', 0),
    "redirect and keep": (script_text("copy", 'redirect :copy "joe@example.net";'), 1),
    "vacation": (script_text("vacation", 'vacation "I am away.";'), 1),
    "fileinto and notify": (script_text("enotify fileinto", 'fileinto "Work"; notify "mailto:joe@example.net";'), 1),
    "report": (script_text("reject", 'reject "Grüße";'), 0),
}


@pytest.fixture
def sink() -> Iterator[Sink]:
    with Sink() as sink:
        yield sink


@pytest.fixture
def sieve(site: Site, sink: Sink) -> Sieve:
    return Sieve(site, sink, duplicatesuppression="yes")


def letter() -> bytes:
    """A message that is not the same as any before, and can be known again."""
    header = f"From: {SENDER}\r\nTo: jane@example.com\r\nMessage-ID: <{next(NUMBERS)}@example.org>\r\n"
    return f"{header}Date: Sun, 22 Nov 2026 12:00:00 +0000\r\n\r\nA body.\r\n".encode()


def deliver(site: Site, message: bytes) -> str:
    client = connected(site)
    [reply] = client.deliver(message, "jane@example.com", sender=SENDER)
    client.leave()
    return reply


def begin(site: Site, message: bytes) -> Client:
    """Sends a message up to its final dot, and does not wait for the reply."""
    client = connected(site)
    for command in (f"MAIL FROM:<{SENDER}>", "RCPT TO:<jane@example.com>", "DATA"):
        assert client.command(command)[0] in "23"
    client.send(message + b".\r\n")
    return client


def kill(site: Site, client: Client) -> None:
    """Kills the process that serves the client."""
    site.child.kill()
    site.child.wait(PATIENCE)
    client.close()


def stored(site: Site) -> int:
    """How many messages the user has in all folders."""
    return len(list((site.spool / "jane").rglob("*,S=*")))


def killed_at(site: Site, path: str, call: str, message: bytes) -> None:
    """Delivers a message; the process is killed in place of its first such call that has to do with that file."""
    inject = f"inject={call}:signal=KILL:retval=0:when=1"
    session = b"LHLO x\r\nMAIL FROM:<%s>\r\nRCPT TO:<jane@example.com>\r\nDATA\r\n%s.\r\nQUIT\r\n"
    done = subprocess.run(
        [program("strace"), "-f", "-o", "/dev/null", "-P", path, "-e", inject, *site.command()],
        input=session % (SENDER.encode(), message),
        capture_output=True,
        timeout=PATIENCE,
    )
    assert b"250 2.1.5 Ok\r\n221" not in done.stdout
    assert not done.stdout.endswith(b"Bye\r\n")


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(("point", "sent"), [("connect", 1), ("data", 1), ("message", 2)])
def test_killed_while_the_server_is_told(
    sieve: Sieve, site: Site, sink: Sink, script: str, point: str, sent: int
) -> None:
    """Only what the server may have taken is sent again."""
    text, copies = SCRIPTS[script]
    sieve.write("active", text)
    message = letter()
    sink.hold[point] = threading.Event()
    client = begin(site, message)
    if point == "message":
        sink.wait(1)
    else:
        wait_for(lambda: stored(site) == copies and is_connected_to(sink), "the connection to the server")
    kill(site, client)
    sink.hold.pop(point).set()
    assert stored(site) == copies
    assert deliver(site, message).startswith("250")
    assert stored(site) == copies
    assert len(sink.mails) == sent
    assert deliver(site, message).startswith("250")
    assert len(sink.mails) == sent


def is_connected_to(sink: Sink) -> bool:
    """Whether lmtpd has a connection to its server. Source: proc(5), net/tcp; 01 is TCP_ESTABLISHED."""
    connections = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
    return any(fields[2].endswith(f":{sink.port:04X}") and fields[3] == "01" for fields in connections)


@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_after_sending_before_recording(sieve: Sieve, site: Site, sink: Sink, script: str) -> None:
    """Nothing is lost; what has been sent is sent once more."""
    text, copies = SCRIPTS[script]
    sieve.write("active", "keep;")
    deliver(site, letter())  # the database is there now
    sieve.write("active", text)
    # With copies the first record is that of the copies.
    before = stored(site)
    message = letter()
    killed_at(site, f"{site.configdirectory}/deliver.db-wal", "pwrite64", message)
    assert stored(site) == before + copies
    assert len(sink.mails) == (0 if copies else 1)
    assert deliver(site, message).startswith("250")
    assert stored(site) == before + 2 * copies
    assert len(sink.mails) == (1 if copies else 2)


def test_what_has_been_recorded_is_not_sent_again(sieve: Sieve, site: Site, sink: Sink) -> None:
    """Killed at the second mail of a delivery."""
    sieve.write("active", script_text("enotify", 'redirect "ann@example.net"; notify "mailto:joe@example.net";'))
    message = letter()
    sink.hold["message"] = threading.Event()
    client = begin(site, message)
    sink.wait(1)
    sink.hold["message"].set()
    sink.wait(2)
    kill(site, client)
    sink.hold.clear()
    assert deliver(site, message).startswith("250")
    sent = [mail.recipients[0] for mail in sink.mails]
    assert sent.count("ann@example.net") == 1
    assert 1 <= sent.count("joe@example.net") <= 2


def test_killed_before_the_copy_of_an_answer_is_filed(sieve: Sieve, site: Site, sink: Sink) -> None:
    """The answer is not sent again, and has no copy."""
    sieve.write("active", "keep;")
    deliver(site, letter())
    sieve.write("active", script_text("vacation fcc mailbox", 'vacation :fcc "Sent" :create "I am away.";'))
    message = letter()
    killed_at(site, f"{site.spool}/jane/.Sent", "mkdir,mkdirat", message)
    assert len(sink.mails) == 1
    assert deliver(site, message).startswith("250")
    assert len(sink.mails) == 1
    assert stored(site) == 2


def test_two_processes_answer_one_sender_once(sieve: Sieve, site: Site, sink: Sink) -> None:
    """Each waits for the other, which is at it."""
    sieve.write("active", SCRIPTS["vacation"][0])
    sink.hold["message"] = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        replies = [pool.submit(deliver, site, letter()) for _ in range(2)]
        sink.wait(1)
        wait_for(lambda: stored(site) == 2, "both copies")
        sink.hold["message"].set()
        assert all(reply.result(PATIENCE).startswith("250") for reply in replies)
    assert [mail.recipients for mail in sink.mails] == [(SENDER,)]
