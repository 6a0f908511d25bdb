"""Mail through the real programs: from their clients, by their starters, to a mailbox their readers see."""

from __future__ import annotations

import os
import smtplib
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from harness import LMTPD, PATIENCE, Address, Client, Site, connect, wait_for
from peers import Dovecot, Inetd, Listener, Postfix, SystemdSocketActivate, finish, program, smtp_source

MESSAGE = b"From: sender@example.com\r\nTo: jane@example.com\r\nSubject: a subject\r\n\r\nA line.\r\n"
# Lines with dots, white space at the ends, a line of the longest length allowed, and none at all.
AWKWARD_BODY = b".\r\n..\r\n.dot\r\n trailing \t\r\n\r\n" + b"x" * 998 + b"\r\n\r\n\tlast\r\n"


def left_in_tmp(site: Site) -> list[Path]:
    """What lies in a tmp/ of the store: nothing when every delivery was finished or cleared away."""
    return list(site.spool.glob("**/tmp/*"))


def run(*command: str) -> str:
    """Runs a client that must succeed, with nothing to read; what it printed."""
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=PATIENCE,
        encoding="utf-8",
        errors="replace",
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def as_stored(text: bytes) -> bytes:
    return text.replace(b"\r\n", b"\n")


@pytest.fixture(autouse=True)
def nothing_stays_in_tmp(site: Site) -> Iterator[None]:
    yield
    assert left_in_tmp(site) == []


@pytest.fixture(params=["unix", "tcp"])
def listener(site: Site, request: pytest.FixtureRequest) -> Iterator[Listener]:
    """lmtpd on a unix socket and, its clients trusted, on a port."""
    arguments = ["-a"] if request.param == "tcp" else []
    with Listener(site, *arguments, tcp=request.param == "tcp") as listener:
        yield listener


class TestSmtpSource:
    """Postfix's load generator, which reads every reply and gives up on one that is not expected."""

    def test_a_connection_for_each_message(self, site: Site, listener: Listener) -> None:
        finish(smtp_source(listener.address, "-m", "8"))
        assert len(site.messages("jane")) == 8

    def test_many_messages_on_one_connection(self, site: Site, listener: Listener) -> None:
        finish(smtp_source(listener.address, "-d", "-m", "200"))
        assert len(site.messages("jane")) == 200

    def test_parallel_sessions(self, site: Site, listener: Listener) -> None:
        finish(smtp_source(listener.address, "-s", "8", "-m", "32"))
        assert len(site.messages("jane")) == 32

    def test_several_recipients(self, site: Site, listener: Listener) -> None:
        # It puts a number before or after the local part, depending on the version, and leaves one without in some.
        names = [*(f"{number}jane" for number in range(1, 6)), *(f"jane{number}" for number in range(50))]
        site.add_user(*names)
        finish(smtp_source(listener.address, "-r", "5", "-s", "2", "-m", "10", "-d"))
        assert sum(len(site.messages(name)) for name in ["jane", *names]) == 50

    @pytest.mark.parametrize("size", [1, 1000, 65536, 5_000_000])
    def test_sizes(self, site: Site, listener: Listener, size: int) -> None:
        finish(smtp_source(listener.address, "-m", "2", "-l", str(size)))
        for message in site.messages("jane"):
            # It counts its line ends as one octet or two, depending on the version.
            assert size * 0.9 <= len(message) <= size + 2000


class MailSystem(NamedTuple):
    """The whole way: Postfix takes mail, lmtpd stores it, Dovecot serves it."""

    site: Site
    postfix: Postfix
    dovecot: Dovecot

    def submit(self, message: bytes, *recipients: str, sender: str = "sender@example.com") -> None:
        """Hands a message to Postfix and waits until it has delivered or bounced it."""
        with smtplib.SMTP(*self.postfix.address, timeout=PATIENCE) as smtp:
            smtp.sendmail(sender, recipients, message, mail_options=["BODY=8BITMIME"])
        self.postfix.wait_until_sent()


@pytest.fixture(scope="module")
def mail_system() -> Iterator[MailSystem]:
    site = Site()
    try:
        with Postfix(site) as postfix, Dovecot(site) as dovecot:
            yield MailSystem(site, postfix, dovecot)
    finally:
        site.close()


class TestPostfixAndDovecot:
    """A real queue before lmtpd, started by its spawn(8) as the store's owner; a real IMAP server behind it."""

    def test_a_message_goes_from_smtp_to_imap(self, mail_system: MailSystem) -> None:
        mail_system.site.add_user("anna")
        mail_system.submit(MESSAGE + AWKWARD_BODY, "anna@example.com")
        [stored] = mail_system.site.messages("anna")
        assert stored.startswith(b"Return-Path: <sender@example.com>\nReceived: from mx.example.org ")
        assert stored.endswith(as_stored(MESSAGE[MESSAGE.index(b"\r\n\r\n") :] + AWKWARD_BODY))
        imap = mail_system.dovecot.login("anna")
        try:
            assert imap.select("INBOX") == ("OK", [b"1"])
            assert fetched(imap.fetch("1", "(FLAGS)")) == rb"1 (FLAGS (\Recent))"
            assert literal(imap.fetch("1", "(BODY[])")) == stored.replace(b"\n", b"\r\n")
        finally:
            imap.logout()
        # Dovecot has moved it to cur/, under the same name and with the flag \Seen.
        assert mail_system.site.files("anna") == []
        [seen] = mail_system.site.files("anna", kind="cur")
        assert seen.read_bytes() == stored
        assert seen.name.endswith(":2,S")

    def test_the_sizes_in_the_file_name_are_those_dovecot_believes(self, mail_system: MailSystem) -> None:
        mail_system.site.add_user("sizes")
        mail_system.submit(MESSAGE, "sizes@example.com")
        [stored] = mail_system.site.messages("sizes")
        imap = mail_system.dovecot.login("sizes")
        try:
            imap.select("INBOX")
            size = len(stored.replace(b"\n", b"\r\n"))
            assert fetched(imap.fetch("1", "(RFC822.SIZE)")) == b"1 (RFC822.SIZE %d)" % size
            assert len(literal(imap.fetch("1", "(BODY.PEEK[])"))) == size
        finally:
            imap.logout()

    def test_eight_bits_arrive(self, mail_system: MailSystem) -> None:
        mail_system.site.add_user("bits")
        body = bytes(octet for octet in range(1, 256) if octet not in b"\r\n") + b"\r\n"
        mail_system.submit(b"Subject: caf\xc3\xa9\r\n\r\n" + body, "bits@example.com")
        imap = mail_system.dovecot.login("bits")
        try:
            imap.select("INBOX")
            assert literal(imap.fetch("1", "(BODY[TEXT])")) == body
            assert literal(imap.fetch("1", "(BODY[HEADER.FIELDS (SUBJECT)])")) == b"Subject: caf\xc3\xa9\r\n\r\n"
        finally:
            imap.logout()

    def test_new_mail_shows_in_a_mailbox_that_is_open(self, mail_system: MailSystem) -> None:
        mail_system.site.add_user("open")
        imap = mail_system.dovecot.login("open")
        try:
            assert imap.select("INBOX") == ("OK", [b"0"])
            mail_system.submit(MESSAGE, "open@example.com")
            imap.noop()
            assert imap.response("EXISTS")[1][-1] == b"1"
        finally:
            imap.logout()

    def test_an_unknown_user_bounces_and_the_bounce_is_delivered(self, mail_system: MailSystem) -> None:
        mail_system.site.add_user("bob")
        mail_system.submit(MESSAGE, "nobody@example.com", sender="bob@example.com")
        [bounce] = mail_system.site.messages("bob")
        assert bounce.startswith(b"Return-Path: <>\n")
        assert b"Status: 5.1.1" in bounce
        assert b"550 5.1.1" in bounce
        assert "dsn=5.1.1, status=bounced" in mail_system.postfix.log.read_text()

    def test_one_unknown_recipient_is_not_the_fault_of_the_others(self, mail_system: MailSystem) -> None:
        mail_system.site.add_user("carl", "dora", "eve")
        recipients = [f"{name}@example.com" for name in ("carl", "nobody", "dora")]
        mail_system.submit(MESSAGE, *recipients, sender="eve@example.com")
        assert [len(mail_system.site.messages(name)) for name in ("carl", "dora", "eve")] == [1, 1, 1]

    def test_a_hundred_messages_from_parallel_clients(self, mail_system: MailSystem) -> None:
        mail_system.site.add_user("busy")
        host, port = mail_system.postfix.address
        run(
            *[program("smtp-source"), "-s", "5", "-m", "100", "-l", "2000"],
            *["-f", "sender@example.com", "-t", "busy@example.com", f"inet:{host}:{port}"],
        )
        mail_system.postfix.wait_until_sent()
        assert len(mail_system.site.messages("busy")) == 100

    def test_a_large_message(self, mail_system: MailSystem) -> None:
        mail_system.site.add_user("large")
        body = b"0123456789abcdef" * 4 + b"\r\n"
        mail_system.submit(MESSAGE + body * 100_000, "large@example.com")
        [stored] = mail_system.site.messages("large")
        assert stored.endswith(as_stored(body * 100_000))
        assert stored.count(b"\n") < 100_020

    def test_swaks_submits_to_postfix(self, mail_system: MailSystem) -> None:
        mail_system.site.add_user("fay")
        host, port = mail_system.postfix.address
        swaks("--server", f"{host}:{port}", "--to", "fay@example.com", "--body", "by way of swaks")
        mail_system.postfix.wait_until_sent()
        [stored] = mail_system.site.messages("fay")
        assert b"by way of swaks\n" in stored

    def test_nothing_stays_in_tmp_and_nothing_in_the_queue(self, mail_system: MailSystem) -> None:
        mail_system.postfix.wait_until_sent()
        assert left_in_tmp(mail_system.site) == []


def fetched(answer: tuple[str, list[Any]]) -> bytes:
    """The one line of a FETCH without a literal."""
    status, [line] = answer
    assert status == "OK"
    assert isinstance(line, bytes)
    return line


def literal(answer: tuple[str, list[Any]]) -> bytes:
    """The literal of a FETCH."""
    status, parts = answer
    assert status == "OK"
    assert isinstance(parts[0], tuple)
    octets = parts[0][1]
    assert isinstance(octets, bytes)
    return octets


def swaks(*arguments: str) -> str:
    return run(program("swaks"), "--from", "sender@example.com", "--suppress-data", *arguments)


class TestSwaks:
    def test_by_a_pipe(self, site: Site) -> None:
        swaks("--protocol", "LMTP", "--pipe", " ".join(site.command()), "--to", "jane@example.com", "--body", "piped")
        [stored] = site.messages("jane")
        assert b"\n\npiped\n" in stored

    def test_by_a_unix_socket(self, site: Site) -> None:
        with Listener(site) as listener:
            swaks("--protocol", "LMTP", "--socket", str(listener.address), "--to", "jane@example.com", "--body", "x")
        assert len(site.messages("jane")) == 1

    def test_one_of_two_recipients_is_unknown(self, site: Site) -> None:
        with Listener(site) as listener:
            printed = swaks(
                *["--protocol", "LMTP", "--socket", str(listener.address)],
                *["--to", "nobody@example.com,jane@example.com", "--body", "x"],
            )
        assert "<** 550 5.1.1" in printed
        assert len(site.messages("jane")) == 1


class TestMsmtp:
    def send(self, site: Site, *names: str) -> subprocess.CompletedProcess[str]:
        rc = site.root / "msmtprc"
        rc.touch(mode=0o600)
        with Listener(site, "-a", tcp=True) as listener:
            rc.write_text(
                f"account default\nprotocol lmtp\nhost {listener.address[0]}\nport {listener.address[1]}\n"
                "from sender@example.com\n"
            )
            return subprocess.run(
                [program("msmtp"), "-C", str(rc), *(f"{name}@example.com" for name in names)],
                input=MESSAGE.decode(),
                capture_output=True,
                encoding="utf-8",
                timeout=PATIENCE,
                check=False,
            )

    @pytest.mark.parametrize("names", [["jane"], ["jane", "joe"]], ids=["one recipient", "two recipients"])
    def test_lmtp(self, site: Site, names: list[str]) -> None:
        site.add_user("joe")
        done = self.send(site, *names)
        assert done.returncode == 0, done.stderr
        for name in names:
            [stored] = site.messages(name)
            assert stored.endswith(as_stored(MESSAGE))

    def test_an_unknown_user_is_an_error(self, site: Site) -> None:
        done = self.send(site, "nobody")
        assert done.returncode != 0
        assert "550 5.1.1" in done.stderr


class TestSmtplib:
    """LMTP by Python's standard library, which reads one reply after the dot: so one recipient."""

    def lmtp(self, address: Address) -> smtplib.LMTP:
        return smtplib.LMTP(address) if isinstance(address, str) else smtplib.LMTP(*address)

    def test_a_message(self, site: Site, listener: Listener) -> None:
        with self.lmtp(listener.address) as lmtp:
            lmtp.sendmail("sender@example.com", ["jane@example.com"], MESSAGE + AWKWARD_BODY)
        [stored] = site.messages("jane")
        assert stored.endswith(as_stored(AWKWARD_BODY))

    def test_it_understands_the_extensions(self, listener: Listener) -> None:
        with self.lmtp(listener.address) as lmtp:
            lmtp.ehlo_or_helo_if_needed()
            for extension in ("8bitmime", "enhancedstatuscodes", "pipelining", "size"):
                assert lmtp.has_extn(extension), extension

    def test_an_unknown_user_is_refused(self, listener: Listener) -> None:
        with self.lmtp(listener.address) as lmtp, pytest.raises(smtplib.SMTPRecipientsRefused) as refusal:
            lmtp.sendmail("sender@example.com", ["nobody@example.com"], MESSAGE)
        code, text = refusal.value.recipients["nobody@example.com"]
        assert code == 550
        assert b"5.1.1" in text

    def test_verify(self, listener: Listener) -> None:
        with self.lmtp(listener.address) as lmtp:
            assert lmtp.verify("jane")[0] == 252


def deliver_by(address: Address, site: Site) -> None:
    """A delivery on a connection of its own, to its very end."""
    before = len(site.messages("jane"))
    client = Client(connect(address))
    try:
        client.hello()
        [reply] = client.deliver(MESSAGE, "jane")
        assert reply.startswith("250 2.1.5"), reply
        assert client.command("QUIT").startswith("221 2.0.0")
        assert client.line() == b"", "the connection is closed after QUIT"
    finally:
        client.close()
    assert len(site.messages("jane")) == before + 1


class TestStarters:
    """Who starts lmtpd in real life, and with which descriptors."""

    def test_inetd(self, site: Site) -> None:
        with Inetd(site) as inetd:
            deliver_by(inetd.address, site)
            deliver_by(inetd.tcp_address, site)

    def test_inetd_nothing_but_replies_reaches_the_client(self, site: Site) -> None:
        """inetd makes the connection the standard error, too: no log line may get there."""
        with Inetd(site) as inetd:
            client = Client(connect(inetd.address))
            client.hello()
            client.deliver(MESSAGE, "jane")
            client.send(b"XYZZY\r\nMAIL FROM:<>\r\nRCPT TO:<nobody>\r\nRSET\r\nQUIT\r\n")
            codes = [client.reply()[-1][:3] for _ in range(5)]
            assert codes == ["500", "250", "550", "250", "221"]
            assert client.line() == b""
            client.close()

    def test_a_warning_of_python_is_not_for_the_client(self, site: Site) -> None:
        """A library that Python has to compile again may warn, and standard error is the client's connection."""
        quiet = {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPYCACHEPREFIX": str(site.root / "nothing")}
        ours, theirs = socket.socketpair()
        with theirs:
            fd = theirs.fileno()
            environment = {**os.environ, **quiet, "PYTHONWARNINGS": "always"}
            child = subprocess.Popen(site.command(), stdin=fd, stdout=fd, stderr=fd, env=environment)
        client = Client(ours)
        [greeting] = client.reply()
        assert greeting.startswith("220 "), greeting
        assert client.command("QUIT").startswith("221")
        client.close()
        child.wait(PATIENCE)

    def test_systemd_socket_activation(self, site: Site) -> None:
        with SystemdSocketActivate(site) as systemd:
            deliver_by(systemd.address, site)
            deliver_by(systemd.address, site)

    def test_a_connection_that_says_nothing_and_leaves(self, site: Site) -> None:
        with Listener(site) as listener:
            connect(listener.address).close()
            deliver_by(listener.address, site)

    def test_a_client_that_leaves_in_the_middle_of_a_message(self, site: Site) -> None:
        with Listener(site) as listener:
            sock = connect(listener.address)
            client = Client(sock)
            client.hello()
            client.send(b"MAIL FROM:<>\r\nRCPT TO:<jane>\r\nDATA\r\n")
            assert [client.reply()[-1][:3] for _ in range(3)] == ["250", "250", "354"]
            client.send(MESSAGE)
            sock.shutdown(socket.SHUT_WR)
            wait_for(lambda: client.line() == b"", "lmtpd to leave")
            client.close()
        assert site.messages("jane") == []

    def test_a_shell_with_a_pipe(self, site: Site) -> None:
        session = r"LHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<jane>\r\nDATA\r\n\r\nx\r\n.\r\nQUIT\r\n"
        printed = run("sh", "-c", f"printf '{session}' | {LMTPD} -C {site.conf} 2>/dev/null")
        assert printed.splitlines()[-1].startswith("221 2.0.0")
        assert len(site.messages("jane")) == 1
