"""Clients that mean harm, or have gone mad: each comes to a clear end, and costs little until then."""

from __future__ import annotations

import re
import select
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from harness import PATIENCE, Client, Site

MEMORY_LIMIT = 32 * 1024  # KiB
GREETING = b"220 mx.example.com lmtpd "
TRANSACTION = b"LHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<jane>\r\n"
MESSAGE = b"Subject: a subject\r\n\r\nA body.\r\n"


@pytest.fixture
def site(site: Site) -> Site:
    """A site with the option debug: "connected" and "disconnected" are in its log."""
    site.configure(debug="yes")
    return site


@pytest.fixture(autouse=True)
def nothing_stays_in_tmp(site: Site) -> Iterator[None]:
    yield
    assert list(site.spool.glob("**/tmp/*")) == []


def peak_memory(site: Site) -> int:
    """The most memory that the process on the last connection has had, in KiB; 0 when it has ended."""
    found = re.search(r"^VmHWM:\s*(\d+) kB$", Path(f"/proc/{site.child.pid}/status").read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


def over_tcp(site: Site) -> Client:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        connection, _ = server.accept()
        with connection:
            site.start(connection, "-a")
    return Client(client)


LAST = b"252 2.3.3 Try RCPT to attempt delivery\r\n"


def flood(client: Client, data: bytes, times: int = 1) -> bytes:
    """Sends data that often while it reads what comes back, to the end of file or the reply to VRFY; all that came."""
    answers = bytearray()
    client.sock.setblocking(False)
    waiting = memoryview(data)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        readable, writable, _ = select.select([client.sock], [client.sock] if times else [], [], PATIENCE)
        try:
            if readable:
                if not (more := client.sock.recv(1 << 20)):
                    return bytes(answers)
                answers += more
                if answers.endswith(LAST):
                    return bytes(answers)
            if writable:
                waiting = waiting[client.sock.send(waiting) :]
                if not waiting:
                    times, waiting = times - 1, memoryview(data)
        except ConnectionError:
            return bytes(answers)
    raise TimeoutError


# Slow ones


def trickle(client: Client, data: bytes) -> list[bytes]:
    """Sends data octet by octet, one in 0.3 seconds, until the server has had enough; the lines it said."""
    for octet in data:
        if select.select([client.sock], [], [], 0.3)[0]:
            break
        client.send(bytes([octet]))
    lines = []
    while line := client.line():
        lines.append(line)
    return lines


def test_a_line_that_never_ends_is_not_waited_for_octet_by_octet(site: Site) -> None:
    site.configure(lmtp_command_timeout="1s")
    begin = time.monotonic()
    client = site.connect()
    client.hello()
    assert trickle(client, b"NOOP " + b"x" * 100) == [b"421 4.4.2 Timeout, closing the connection"]
    assert 1 <= time.monotonic() - begin < 20  # all of it would take 30 seconds
    assert site.child.wait(PATIENCE) == 0


@pytest.mark.parametrize("start", [b"NOOP\r\n" * 30, b"DATA\r\n", b"BDAT 100 LAST\r\n"])
def test_a_session_has_a_limit_of_its_own(site: Site, start: bytes) -> None:
    site.configure(lmtp_command_timeout="1s", lmtp_session_timeout="2s")
    begin = time.monotonic()
    client = site.connect()
    client.hello()
    if start.startswith(b"NOOP"):
        while client.command("NOOP") == "250 2.0.0 Ok":
            time.sleep(0.1)
        assert client.reply() == []
    else:
        for command in (b"MAIL FROM:<>\r\n", b"RCPT TO:<jane>\r\n"):
            client.send(command)
            assert client.reply()[0].startswith("250")
        client.send(start)
        if start.startswith(b"DATA"):
            client.reply()
        last = [b"421 4.4.2 Session or authentication time limit reached, closing the connection"]
        assert trickle(client, b"x" * 100) == last
    assert 2 <= time.monotonic() - begin < 20  # all of it would take 30 seconds
    assert site.child.wait(PATIENCE) == 0
    assert site.files("jane") == []
    assert 'reason="421 4.4.2 Session or authentication time limit reached, closing the connection"' in site.log_text()


def test_a_session_that_is_never_silent_has_its_limit_too(site: Site) -> None:
    site.configure(lmtp_session_timeout="1s", lmtp_max_idle_commands="0")
    answers = flood(site.connect(), b"NOOP\r\n" * 1000, 1_000_000)
    assert answers.endswith(b"\r\n421 4.4.2 Session or authentication time limit reached, closing the connection\r\n")


def test_without_a_limit_a_session_goes_on(site: Site) -> None:
    site.configure(lmtp_command_timeout="3s")
    client = site.connect()
    client.hello()
    for _ in range(7):
        time.sleep(0.5)
        assert client.command("NOOP") == "250 2.0.0 Ok"


@pytest.mark.parametrize("session_timeout", ["0", "2s"])
def test_a_window_that_never_opens(site: Site, session_timeout: str) -> None:
    site.configure(
        lmtp_command_timeout="1s" if session_timeout == "0" else "1d",
        lmtp_session_timeout=session_timeout,
        lmtp_max_idle_commands="0",
    )
    client = over_tcp(site)
    client.sock.settimeout(0.05)
    waiting = commands = memoryview(b"HELP\r\n" * 100_000)
    memory = 0
    while now := peak_memory(site):
        memory = now
        with suppress(ConnectionError, TimeoutError):
            waiting = waiting[client.sock.send(waiting) :] or commands
    assert site.child.wait(PATIENCE) == 0
    assert 0 < memory < MEMORY_LIMIT
    # On a busy machine the session may end before the window is full.
    limit = "|421 4.4.2 Session or authentication time limit reached" if session_timeout != "0" else ""
    assert re.search(f'reason="(the client does not read the replies{limit})', site.log_text())


# Endless ones


def test_endless_commands_without_a_message(site: Site) -> None:
    site.configure(lmtp_max_idle_commands="5")
    client = site.connect()
    client.hello()
    for _ in range(2):  # a message sets the count to 0, its own commands do not count
        for command in ("NOOP", "VRFY jane", "TRACE x", "RCPT TO:<jane>"):
            assert client.command(command)[:3] in ("250", "252", "503")
        assert client.deliver(MESSAGE, *["jane"] * 10) != []
    for command in ("NOOP", "RSET", "HELP", "LHLO x", "MAIL FROM:<>"):
        assert client.command(command)[:3] in ("250", "214")
    assert client.command("RCPT TO:<nobody>").startswith("550")
    assert client.command("RSET").startswith("250")
    assert client.reply() == ["421 4.7.0 Too many commands without a message, closing the connection"]
    assert client.reply() == []
    assert len(site.files("jane")) == 20


def test_an_endless_line_is_cut_off(site: Site) -> None:
    site.configure(lmtp_command_timeout="1s")
    client = site.connect()
    client.hello()
    assert flood(client, b"x" * 100_000, 1_000_000).endswith(b"421 4.4.2 " + b"Timeout, closing the connection\r\n")


def test_a_line_of_100_mb_costs_no_memory(site: Site) -> None:
    client = site.connect()
    client.hello()
    for _ in range(1000):
        client.send(b"x" * 100_000)
    client.send(b"\r\n")
    assert client.reply() == ["500 5.5.2 Line too long"]
    assert client.command("NOOP") == "250 2.0.0 Ok"
    assert peak_memory(site) < MEMORY_LIMIT


@pytest.mark.parametrize("field", [b"A: " + b"x" * 90 + b"\r\n", b"A:" + b"\r\n x" * 1000, b"x" * 1000, b"\xff" * 1000])
@pytest.mark.parametrize("verb", [b"DATA", b"BDAT"])
def test_a_header_of_100_mb_costs_no_memory(site: Site, field: bytes, verb: bytes) -> None:
    site.configure(munge8bit="yes")
    client = site.connect()
    client.hello()
    piece = field * (1_000_000 // len(field))
    times = 100
    client.send(
        b"MAIL FROM:<>\r\nRCPT TO:<jane>\r\n"
        + (b"DATA\r\n" if verb == b"DATA" else b"BDAT %d LAST\r\n" % (times * len(piece) + 2))
    )
    for _ in range(times):
        client.send(piece)
    client.send(b"\r\n.\r\n" if verb == b"DATA" else b"\r\n")
    codes = [client.reply()[0][:9] for _ in range(4 if verb == b"DATA" else 3)]
    assert codes[-1] == "250 2.1.5"
    assert peak_memory(site) < MEMORY_LIMIT
    (file,) = site.files("jane")
    assert file.stat().st_size > 70_000_000


def test_100000_recipients(site: Site) -> None:
    client = site.connect()
    assert client.hello()
    answers = flood(client, b"MAIL FROM:<>\r\n" + b"RCPT TO:<jane>\r\n" * 100_000 + b"VRFY jane\r\n")
    assert answers.count(b"250 2.1.5 ") == 1000
    assert answers.count(b"452 4.5.3 ") == 99_000
    assert answers.endswith(LAST)
    assert peak_memory(site) < MEMORY_LIMIT
    assert site.files("jane") == []


def test_guesses_at_users_have_a_limit(site: Site) -> None:
    client = site.connect()
    client.hello()
    answers = flood(client, b"MAIL FROM:<>\r\n" + b"RCPT TO:<nobody>\r\n" * 100_000)
    assert answers.count(b"550 5.1.1 ") == 1000
    assert answers.endswith(b"\r\n421 4.7.0 Too many commands without a message, closing the connection\r\n")


def test_a_pipeline_of_megabytes(site: Site) -> None:
    message = b"MAIL FROM:<>\r\nRCPT TO:<jane>\r\nBDAT 40000 LAST\r\n" + b"x" * 40_000
    message += b"MAIL FROM:<>\r\nRCPT TO:<jane>\r\nDATA\r\n" + b"." * 40_000 + b"\r\n.\r\n"
    client = site.connect()
    client.hello()
    codes = [line[:9] for line in flood(client, message * 100 + b"VRFY jane\r\n").splitlines()]
    once = [b"250 2.1.0", b"250 2.1.5", b"250 2.1.5", b"250 2.1.0", b"250 2.1.5", b"354 Go ah", b"250 2.1.5"]
    assert codes == once * 100 + [b"252 2.3.3"]
    assert peak_memory(site) < MEMORY_LIMIT
    assert len(site.files("jane")) == 200


def test_commands_by_the_megabyte(site: Site) -> None:
    site.configure(lmtp_max_idle_commands="0")
    client = site.connect()
    client.hello()
    answers = flood(client, b"NOOP\r\n" * 500_000 + b"VRFY jane\r\n")
    assert answers == b"250 2.0.0 Ok\r\n" * 500_000 + LAST
    assert peak_memory(site) < MEMORY_LIMIT


# Connections that break

SESSION = (
    TRANSACTION
    + b"DATA\r\nSubject: a\r\n\r\n..b\r\n.\r\n"
    + b"MAIL FROM:<>\r\nRCPT TO:<jane>\r\nBDAT 2\r\na:BDAT 5 LAST\r\nb\r\n\r\nQUIT\r\n"
)
DELIVERED = b"\r\n250 2.1.5 Ok SESSIONID="


@pytest.fixture
def server(site: Site) -> Iterator[tuple[str, int]]:
    """The address of an lmtpd that listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        site.start(listener, "-a")
        yield listener.getsockname()
        site.child.terminate()
        assert site.child.wait(PATIENCE) == 0


def wait_for_end(site: Site, sessions: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while site.log_text().count(">disconnected ") < sessions:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_the_client_closes_its_half_at_every_point(site: Site, server: tuple[str, int]) -> None:
    seen = 0
    for length in range(len(SESSION)):
        with socket.create_connection(server, PATIENCE) as sock:
            sock.sendall(SESSION[:length])
            sock.shutdown(socket.SHUT_WR)
            answers = b""
            while more := sock.recv(65536):
                answers += more
        delivered = (SESSION[:length].count(b"\r\n.\r\n")) + (SESSION[:length].find(b"b\r\n\r\n") > 0)
        assert answers.count(DELIVERED) == delivered
        seen += delivered
        assert len(site.files("jane")) == seen
    assert site.log_text().count(">disconnected session=") == len(SESSION)
    assert "traceback" not in site.log_text()


@pytest.mark.parametrize("patience", [0, 0.01])
def test_the_client_resets_at_every_point(site: Site, server: tuple[str, int], patience: float) -> None:
    """Right after it has sent something, and when it has got the replies to it."""
    first_end = SESSION.find(b"\r\n.\r\n") + 5
    second_end = SESSION.find(b"b\r\n\r\n") + 5
    before = 0
    for count, length in enumerate(range(len(SESSION) + 1), 1):
        sock = socket.create_connection(server, PATIENCE)
        sock.sendall(SESSION[:length])
        answers = b""
        while patience and select.select([sock], [], [], patience)[0] and (more := sock.recv(65536)):
            answers += more
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
        wait_for_end(site, count)
        delivered = len(site.files("jane")) - before
        before += delivered
        assert answers.count(DELIVERED) <= delivered <= (length >= first_end) + (length >= second_end)
    assert "traceback" not in site.log_text()
