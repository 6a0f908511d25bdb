"""Mail that is sent for users, and scripts, messages, servers and programs that are made to do harm by it."""

from __future__ import annotations

import itertools
import os
import resource
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator
from unittest import mock

import pytest
from harness import PATIENCE, Client, Site, wait_for
from sieve import Clock, Sieve, Text, script_text, seconds_of_cpu
from sink import Sink
from test_sieve_attacks import Measured, in_child, peak

import lmtpd

QUICK = 4.0  # seconds of CPU time
ENDED = 6  # seconds of CPU time after which a process is ended
NUMBERS = itertools.count()
LONG = "x" * 300
LARGE = 400_000  # octets: more than a pipe and READ_SIZE hold


@pytest.fixture
def sink() -> Iterator[Sink]:
    with Sink() as sink:
        yield sink


@pytest.fixture
def sieve(site: Site, sink: Sink) -> Sieve:
    return Sieve(site, sink)


def letter(body: str = "A body.", fields: str = "") -> str:
    """A message that is not the same as any before, and can be known again."""
    message_id = f"<{next(NUMBERS)}@example.org>"
    return f"From: someone@example.org\nTo: jane@example.com\nMessage-ID: {message_id}\n{fields}\n{body}\n"


def large_letter() -> str:
    return letter(("y" * 78 + "\n") * (LARGE // 79))


def verify_cheap(site: Site, script: Text, message: Text) -> None:
    """Fails unless the delivery takes little and the message is in the INBOX."""
    sieve = Sieve(site)
    sieve.write("active", script)

    def deliver() -> Measured:
        resource.setrlimit(resource.RLIMIT_CPU, (ENDED, ENDED))
        seconds = seconds_of_cpu()
        outcome = sieve.deliver(message)
        return Measured(outcome, seconds_of_cpu() - seconds, peak())

    delivery = in_child(deliver)
    assert list(delivery.outcome.folders) == ["INBOX"]
    assert delivery.seconds < QUICK, f"{delivery.seconds:.2f} s"


class Program:
    """A shell script in place of sendmail, which can write to the file out."""

    def __init__(self, site: Site, script: str) -> None:
        self.out, self.started, self.go = (site.root / name for name in ("out", "started", "go"))
        path = site.root / "program"
        site.root.chmod(0o777)
        path.write_text(f"#!/bin/sh\ncd {site.root}\n{script}\n")
        path.chmod(0o755)
        site.configure(smtp_backend="sendmail", sendmail=str(path))
        self.sieve = Sieve(site, smtp_backend="sendmail", sendmail=str(path))


# Nothing is lost


def test_each_of_two_messages_with_one_header_is_sent_on(sieve: Sieve) -> None:
    """A device may give all its messages the same Message-ID, and no Date."""
    header = "From: device@example.org\nMessage-ID: <report@device>\nSubject: report\n"
    for body in ("all is well", "fire"):
        outcome = sieve.run('redirect "joe@example.net";', f"{header}\n{body}\n")
        assert len(outcome.sent) + len(outcome.folders) == 1, body


def test_a_program_that_has_not_read_the_message_has_not_sent_it(site: Site) -> None:
    """A message that fits into the pipe is another matter: whether it is read does not show."""
    program = Program(site, "exec <&-; exit 0")
    assert program.sieve.run('redirect "joe@example.net";', large_letter()).reply == "451 4.4.0"


def test_a_program_is_not_believed_where_the_system_reaps_it(site: Site) -> None:
    """Who starts lmtpd may have it ignore SIGCHLD, and then nobody learns how a child has ended."""
    program = Program(site, "cat >out; exit 75")
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        outcome = program.sieve.run('redirect "joe@example.net";', letter())
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert outcome.reply == "451 4.4.0"


# Nothing is sent in part


def test_a_program_does_not_get_a_part_of_a_message_for_the_whole(site: Site) -> None:
    program = Program(site, "cat >part && mv part out")
    read, kill = lmtpd.Message.read, os.killpg

    def failing(message: lmtpd.Message, offset: int, size: int) -> bytes:
        if offset > LARGE // 2:
            raise OSError(5, "Input/output error")
        return read(message, offset, size)

    def late(group: int, number: int) -> None:
        time.sleep(0.3)  # the program is as quick as it may be
        kill(group, number)

    with mock.patch.object(lmtpd.Message, "read", failing), mock.patch.object(os, "killpg", late):
        outcome = program.sieve.run('redirect "joe@example.net";', large_letter())
    assert outcome.reply.startswith("451")
    assert not program.out.exists()


def test_a_killed_process_leaves_no_part_of_a_message_to_the_program(site: Site) -> None:
    program = Program(site, "touch started; until [ -e go ]; do sleep 0.02; done; cat >part && mv part out")
    program.sieve.write("active", 'redirect "joe@example.net";')
    message = large_letter().replace("\n", "\r\n").encode()
    client = begin(site, message)
    wait_for(program.started.exists, "the program")
    time.sleep(0.2)
    site.child.kill()
    site.child.wait(PATIENCE)
    client.close()
    program.go.touch()
    time.sleep(0.5)
    assert not program.out.exists() or program.out.stat().st_size > LARGE


def begin(site: Site, message: bytes) -> Client:
    """Sends a message up to its final dot, and does not wait for the reply."""
    client = site.connect()
    client.hello()
    for command in ("MAIL FROM:<sender@example.org>", "RCPT TO:<jane@example.com>", "DATA"):
        assert client.command(command)[0] in "23"
    client.send(message + b".\r\n")
    return client


# Nothing is sent too often


@pytest.mark.parametrize(
    ("script", "message_id"),
    [("", "<>"), ('require "editheader"; deleteheader "Message-ID";', "<1@example.org>")],
    ids=["without an id", "with the id deleted"],
)
def test_a_message_that_cannot_be_known_again_does_not_multiply(sieve: Sieve, script: str, message_id: str) -> None:
    """Two redirects, and each of the two others sends back to jane."""
    sieve.write("active", f'{script} redirect "joe@example.net"; redirect "ann@example.net";')
    wave = [f"From: someone@example.org\nMessage-ID: {message_id}\n\nA body.\n".encode()]
    sent = 0
    for hop in range(6):
        arriving = [b"Received: from elsewhere %d%d\n%s" % (hop, number, each) for number, each in enumerate(wave)]
        wave = []
        for each in arriving:
            received = (
                b"Received: from x\n\tby mx.example.com with LMTPA id lmtpd-1-1; Sun, 22 Nov 2026 12:00:00 +0000\n"
            )
            wave += [mail.mail.octets.replace(b"\r\n", b"\n") for mail in sieve.deliver(received + each).sent]
        sent += len(wave)
    assert sent < 40


@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_nobody_is_answered_again_and_again_while_nothing_can_be_recorded(
    site: Site, sink: Sink, sieve: Sieve, fault: str
) -> None:
    script = script_text("vacation", 'vacation :handle "away" "I am away.";')
    sieve.run(script, letter(), sender="first@example.org")
    database = sqlite3.connect(site.configdirectory / "deliver.db", isolation_level=None)
    raising = "SELECT RAISE(ABORT, 'database or disk is full')"
    if fault == "full":
        database.execute(f"CREATE TRIGGER full BEFORE INSERT ON script_records BEGIN {raising}; END")
    database.close()
    sink.mails.clear()
    opened = sqlite3.connect

    def read_only(path: str, timeout: float, isolation_level: None) -> sqlite3.Connection:
        return opened(f"file:{path}?mode=ro", timeout, isolation_level=isolation_level, uri=True)

    with mock.patch.object(sqlite3, "connect", read_only if fault == "read-only" else opened):
        for _ in range(3):
            (site.configdirectory / "deliver.backoff").unlink(missing_ok=True)  # as if it were over
            sieve.agent = lmtpd.DeliveryAgent(sieve.config)
            assert sieve.run(script, letter()).reply == "250 2.1.5"
    assert len(sink.mails) < 2


def test_a_clock_that_was_wrong_does_not_silence_answers_for_years(sieve: Sieve) -> None:
    script, clock = script_text("vacation", 'vacation "I am away.";'), Clock()
    with mock.patch.object(time, "time", clock.now):
        clock.ahead = 20 * 365 * 86400
        assert len(sieve.run(script, letter()).sent) == 1
        clock.ahead = 200 * 86400
        assert len(sieve.run(script, letter()).sent) == 1


# Nobody waits for others


def test_a_message_does_not_wait_for_another_that_goes_to_the_same_address(site: Site, sink: Sink) -> None:
    sieve = Sieve(site, sink)
    sieve.write("active", 'redirect "joe@example.net";')
    sink.hold["message"] = held = threading.Event()
    clients = [begin(site, letter().replace("\n", "\r\n").encode()) for _ in range(2)]
    try:
        wait_for(lambda: len(sink.mails) == 2, "the second mail", patience=2)
    finally:
        held.set()
    for client in clients:
        assert client.reply()[0].startswith("250")
        client.close()


# Nothing costs much


def test_a_long_domain_in_the_field_to_is_not_normalized(site: Site) -> None:
    """Characters that combine take quadratic time: here to decide whether a vacation answer is due."""
    message = f"From: someone@example.org\nTo: someone@{chr(0x315) + chr(0x316)}".encode()
    message += f"{chr(0x315)}{chr(0x316)}".encode() * 60_000 + b"\n\nA body.\n"
    verify_cheap(site, script_text("vacation", 'vacation "I am away.";'), message)


PARTS = "MIME-Version: 1.0\nContent-Type: multipart/mixed; boundary=x\n\n" + "--x\n\na\n" * 990 + "--x--\n"
COSTLY = {
    "capability of many addresses": (
        "enotify",
        'if notify_method_capability "mailto:{}" "online" "no" {{ stop; }}'.format(",".join(["a@example.com"] * 4000)),
    ),
    "addresses with long names": (
        "variables",
        'redirect "${n}${n}${n}${n} <jane@example.com>";\n' * 100,
    ),
    "the same notification": (
        "enotify variables",
        'notify "mailto:${a}${a}${a}";\n' * 100,
    ),
    "domains beyond ASCII": (
        "copy",
        'redirect :copy "joe@{}.example";\n'.format(".".join(["\u00fc\u0431"] * 60)) * 50,
    ),
}


@pytest.mark.parametrize("what", COSTLY)
def test_addresses_in_a_loop_count_as_work(site: Site, what: str) -> None:
    requires, body = COSTLY[what]
    variables = ""
    if "variables" in requires:
        quotes, addresses = r"\"\"" * 4000, "a@example.com," * 1000
        variables = f'set "n" "{quotes}"; set "a" "{addresses}";\n'
    script = script_text(f"foreverypart mime {requires}", f"{variables}foreverypart {{\n{body}\n}}")
    verify_cheap(site, script, f"From: someone@example.org\n{PARTS}")


# Nothing is smuggled in


def test_a_display_name_brings_no_other_author(sieve: Sieve) -> None:
    name = "=?utf-8?q?=3D=3Fx_=3Cboss=40example.com=3E=2C?="
    script = script_text("vacation", f'vacation :from "{name} <jane@example.com>" "I am away.";')
    [sent] = sieve.run(script, letter()).sent
    author = sent.header("From") or ""
    assert [(local, domain) for _, local, domain in lmtpd.mailboxes_of(author.encode())] == [("jane", "example.com")]


@pytest.mark.parametrize(
    "action",
    [
        f'vacation :from "{"n" * 2000} <jane@example.com>" "I am away.";',
        f'vacation :from "{"ü" * 1000} <jane@example.com>" "I am away.";',
        f'vacation :subject "a{" " * 2000}b" "I am away.";',
        f'notify "mailto:joe@example.net?{"x" * 2000}=y";',
        f'notify "mailto:{",".join(f"{number}{LONG}@example.net" for number in range(5))}";',
    ],
    ids=["name", "encoded name", "subject", "name of a field", "addresses"],
)
def test_no_line_is_longer_than_lines_may_be(sieve: Sieve, action: str) -> None:
    outcome = sieve.run(script_text("vacation enotify", action), letter())
    for sent in outcome.sent:
        assert max(map(len, sent.lines)) <= 998


def test_no_nul_is_sent(sieve: Sieve) -> None:
    entity = "Content-Type: text/plain\n\nA${hex:00}B\n"
    script = script_text("vacation encoded-character", f'vacation :mime "{entity}";')
    assert not any(b"\0" in sent.mail.octets for sent in sieve.run(script, letter()).sent)


# The log


def test_a_report_that_cannot_be_sent_rejects_nothing(sieve: Sieve, sink: Sink) -> None:
    sink.refuse["sender@example.org"] = "550 5.1.1 Never"
    outcome = sieve.run(script_text("reject", 'reject "Grüße";'), letter())
    assert outcome.placed == {"INBOX": ""}
    assert not outcome.fields("rejected")


@pytest.fixture
def in_clear() -> Iterator[Sink]:
    with Sink(users={"jöe": "pässwort"}, in_clear=True) as sink:
        yield sink


def test_a_password_beyond_ascii_is_no_fault_of_the_program(site: Site, in_clear: Sink) -> None:
    sieve = Sieve(site, in_clear, smtp_auth_authname="jöe", smtp_auth_password="pässwort")
    outcome = sieve.run('redirect "joe@example.net";', letter())
    assert not outcome.fields("traceback")
