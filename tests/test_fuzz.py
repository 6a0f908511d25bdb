"""Real sessions, mutated: whatever a client sends, the session keeps to a few rules that a small model knows.

It goes on for so many seconds: tests/run --fuzz-seconds 600 -k test_fuzz
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import tempfile
import time
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import config_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scramp import ScramMechanism

import lmtpd

USERS = ("jane", "joe")
BEGIN = b"MAIL FROM:<a@example.com>\r\nRCPT TO:<jane>\r\n"
CORPUS = [
    b"LHLO client.example\r\n",
    BEGIN + b"RCPT TO:<joe+folder@example.com>\r\nDATA\r\nSubject: a\r\n\r\n..dot\r\n.x\r\n\r\n.\r\n",
    BEGIN + b"BDAT 12\r\nSubject: b\r\nBDAT 3\r\n\r\nxBDAT 2 LAST\r\n\r\n",
    BEGIN + b"RCPT TO:<joe> IGNOREQUOTA\r\nRCPT TO:<nobody>\r\nBDAT 24 LAST\r\nSubject: c\r\n\r\nNOOP\r\nRSETRSET\r\n",
    b"MAIL FROM:<> SIZE=1 BODY=8BITMIME SMTPUTF8 AUTH=<>\r\n",
    "MAIL FROM:<é@exämple.com> SMTPUTF8\r\nRCPT TO:<jane>\r\nRCPT TO:<ü>\r\n".encode(),
    "DATA\r\nSubject: é\r\n\r\n€\r\n.\r\n".encode(),
    b'MAIL FROM:<"a b"@[127.0.0.1]> BODY=7BIT\r\nRCPT TO:<@a,@b:"jane"@example.com>\r\nRCPT TO:<postmaster>\r\n',
    b"DATA\r\nReturn-Path: <x>\r\nReceived: a\r\n\tb\r\nMessage-ID: <a@b>\r\nDate: now\r\n\r\n"
    + b"x" * 3000
    + b"\r\n.\r\n",
    b"DATA\r\nno header\r\n.\r\n",
    b"DATA\r\n.\r\n",
    b"BDAT 0 LAST\r\n",
    b"RSET\r\nNOOP x\r\nVRFY jane\r\nHELP\r\nTRACE id-1\r\n",
    b"AUTH EXTERNAL =\r\n",
    b"AUTH EXTERNAL\r\njane\r\nAUTH PLAIN AGEAYg==\r\nSTARTTLS\r\n",
    b"AUTH LOGIN\r\nYQ==\r\nYg==\r\n",
    b"AUTH SCRAM-SHA-256 biwsbj1hLHI9eA==\r\nYz1iaXdzLHI9eCxwPXk=\r\n",
    b"QUIT\r\n",
    b"NOOP " + b"x" * 8184 + b"\r\nNOOP " + b"x" * 8190 + b"\r\n",
]
DICTIONARY = [
    *(b"\r", b"\n", b"\r\n", b".", b"\0", b" ", b"<", b">", b'"', b"\\", b"@", b":", b"+", b"/", b"../", b"%", b"\xff"),
    *(b"\r\n.\r\n", b"\n.\n", b"\r.\r", b"\r\n.\n", b"\n.\r\n", b"LAST", b"9" * 20, b"0", b"-1"),
    *("é".encode(), b"\xc2\x85"),
    *(b"DATA\r\n", b"BDAT 5\r\n", b"BDAT 5 LAST\r\n", b"RSET\r\n", b"QUIT\r\n", b"RCPT TO:<joe>\r\n", b"jane"),
    b"x" * 9000,
]  # fmt: skip


# What is sent


def mutated(session: bytes, mutations: list[tuple[str, int, int, bytes]]) -> bytes:
    for kind, place, length, word in mutations:
        start = place % (len(session) + 1)
        end = min(start + length, len(session))
        if kind == "flip" and start < len(session):
            session = session[:start] + bytes([session[start] ^ (1 << length % 8)]) + session[start + 1 :]
        elif kind == "insert":
            session = session[:start] + word + session[start:]
        elif kind == "replace":
            session = session[:start] + word + session[start + len(word) :]
        elif kind == "repeat":
            session = session[:end] + session[start:end] + session[end:]
        elif kind == "remove":
            session = session[:start] + session[end:]
        elif kind == "move":
            session = session[:start] + session[end:] + session[start:end]
        elif kind == "cut":
            session = session[:start]
    return session


KINDS = ["flip", "insert", "insert", "replace", "repeat", "remove", "remove", "move", "cut"]
MUTATIONS = st.lists(
    st.tuples(st.sampled_from(KINDS), st.integers(0, 20_000), st.integers(1, 60), st.sampled_from(DICTIONARY)),
    max_size=8,
)
BODIES = st.lists(st.sampled_from(CORPUS), min_size=1, max_size=8).map(b"".join)
CLIENT = st.builds(
    lambda session, mutations, lf: mutated(session.replace(b"\r\n", b"\n") if lf else session, mutations),
    BODIES,
    MUTATIONS,
    st.booleans(),
)


# What has to come of it


CHUNK = re.compile(rb"BDAT (\d{1,20})( LAST)?", re.IGNORECASE)


class Model:
    """What a client expects who knows what it has sent and reads the replies.

    stored: the message that each 250 after data speaks of.
    """

    def __init__(self, sent: bytes, answers: bytes, on_socket: bool) -> None:
        newline = sent.find(b"\n")
        lf = not on_socket and newline >= 0 and not sent[:newline].endswith(b"\r")
        self.eol = b"\n" if lf else b"\r\n"
        self.stored: list[bytes] = []
        self._sent, self._on_socket = sent, on_socket
        self._replies = self._split(answers)
        self._recipients = 0
        self._in_transaction = False
        self._chunks = b""

    @staticmethod
    def _split(answers: bytes) -> list[bytes]:
        """The replies, each its last line."""
        replies = []
        code = b""
        assert answers.endswith(b"\n") or not answers
        for line in answers.split(b"\n")[:-1]:
            line = line.removesuffix(b"\r")
            assert re.fullmatch(rb"[2-5]\d\d[- ][ -~]*", line), line
            assert len(line) <= 510
            assert code in (b"", line[:3])
            code = line[:3] if line[3:4] == b"-" else b""
            if not code:
                replies.append(line)
        assert code == b""
        return replies

    def check(self) -> None:
        """Raises AssertionError if there are more or fewer replies than there should be."""
        if not (self._sent or self._on_socket):
            assert self._replies == []
            return
        assert self._next().startswith(b"220 ")
        while (line := self._line()) is not None:
            chunk = CHUNK.fullmatch(line.rstrip(b" \t\v\f"))
            if chunk and len(self._sent) < int(chunk[1]):
                break
            reply = self._next()
            while reply.startswith(b"334"):
                if self._line() is None:
                    break
                reply = self._next()
            if reply.startswith((b"221", b"421")) or reply.endswith(b"closing the connection"):
                break
            if not self._step(line, reply):
                break
            if self._replies and self._replies[0].startswith(b"421 4.7.0 Too many"):
                self._next()
                break
        assert self._replies == []

    def _next(self) -> bytes:
        assert self._replies, "a reply is missing"
        return self._replies.pop(0)

    def _line(self) -> bytes | None:
        line, eol, rest = self._sent.partition(self.eol)
        if not eol:
            return None
        self._sent = rest
        return line

    def _step(self, line: bytes, reply: bytes) -> bool:
        """Follows the session over one command; whether there is anything left of it."""
        verb = line[:4].upper()
        if len(line) + len(self.eol) > 8192:
            assert reply == b"500 5.5.2 Line too long"
        elif verb == b"MAIL" and reply.startswith(b"250"):
            assert not self._in_transaction
            self._reset()
            self._in_transaction = True
        elif verb == b"RCPT" and reply.startswith(b"250"):
            assert self._in_transaction
            self._recipients += 1
        elif verb in (b"RSET", b"LHLO") and reply.startswith(b"250"):
            self._reset()
        elif reply.startswith(b"354"):
            assert verb == b"DATA"
            return self._data()
        elif verb == b"BDAT":
            return self._bdat(line, reply)
        return True

    def _reset(self) -> None:
        self._recipients, self._in_transaction, self._chunks = 0, False, b""

    def _data(self) -> bool:
        lines = (self.eol + self._sent).partition(self.eol + b"." + self.eol)
        if not lines[1]:
            return False
        self._sent = lines[2]
        unstuffed = [line[1:] if line.startswith(b".") else line for line in lines[0].split(self.eol)[1:]]
        self._end_of_message(b"".join(line + b"\n" for line in unstuffed), self._next())
        return True

    def _bdat(self, line: bytes, reply: bytes) -> bool:
        chunk = CHUNK.fullmatch(line.rstrip(b" \t\v\f"))
        assert chunk, line
        size = int(chunk[1])
        self._chunks += self._sent[:size]
        self._sent = self._sent[size:]
        if not self._recipients:
            assert reply.startswith(b"503")
            self._chunks = b""
        elif chunk[2]:
            self._end_of_message(self._chunks.replace(self.eol, b"\n"), reply)
        return True

    def _end_of_message(self, message: bytes, reply: bytes) -> None:
        for recipient in range(self._recipients):
            reply = self._next() if recipient else reply
            assert reply[:3] in (b"250", b"552", b"554"), reply
            if reply.startswith(b"250"):
                self.stored.append(message)
        self._reset()


# The session, in this process


class Scene:
    """A store that sessions are run on, and what stands around it."""

    trusted = True  # whether its clients need not authenticate

    def __init__(self, log: list[str], **options: str) -> None:
        self.log = log
        fast = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.root = Path(tempfile.mkdtemp(prefix="lmtpd-test-", dir=fast))
        self.spool = self.root / "spool"
        for user in (*USERS, "../outside"):
            for folder in ("tmp", "new", "cur"):
                (self.spool / user / folder).mkdir(parents=True)
        always = {"configdirectory": str(self.root), "partition-default": str(self.spool)}
        # Not suppressed, so that there are as many messages as accepted recipients.
        self.config = config_of(**{**always, "duplicatesuppression": "no", **options})
        self.store = lmtpd.DeliveryAgent(self.config)
        self.stop = lmtpd.Stop(lmtpd.ShutdownFile(f"{self.root}/shutdown"))
        self.stop.wakeup.open()
        self.before = self.tree()

    def tree(self) -> set[str]:
        return {os.path.join(folder, name) for folder, _, files in os.walk(self.root) for name in ("", *files)}

    def serve(self, sent: bytes, on_socket: bool) -> bytes:
        """One session; what the client is told."""
        ours = None
        if on_socket:
            ours, theirs = socket.socketpair()
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            ours.sendall(sent)
            ours.shutdown(socket.SHUT_WR)
            source = theirs.detach()
        else:
            source = os.memfd_create("sent")
            os.write(source, sent)
            os.lseek(source, 0, os.SEEK_SET)
        sink = os.memfd_create("answers")
        try:
            connection = lmtpd.Connection(lmtpd.Wire(source, sink, 5, 0, self.stop.wakeup.fd), 5)
            peer = lmtpd.Peer("a test")
            authenticator = lmtpd.Authenticator(self.config, "lmtp", peer, self.trusted)
            lmtpd.Session(connection, peer, authenticator, self.store, self.stop, self.config).serve()
            authenticator.close()
            return os.pread(sink, 1 << 24, 0)
        finally:
            os.close(source)
            os.close(sink)
            if ours:
                ours.close()

    def check(self, sent: bytes, on_socket: bool) -> int:
        """How many messages a session stored. Raises AssertionError if it does not go as it should."""
        self.log.clear()
        answers = self.serve(sent, on_socket)
        made = self.tree() - self.before
        try:
            self._check_log()
            model = Model(sent, answers, on_socket)
            model.check()
            self._check_store(made, model.stored)
            return len(model.stored)
        finally:
            self._clear(made)

    def _check_log(self) -> None:
        for line in self.log:
            assert line.isascii()
            assert line.isprintable()
            assert not line.startswith(("internal-error", "traceback", "delivery-failed", "spooling-failed")), self.log

    def _check_store(self, made: set[str], stored: list[bytes]) -> None:
        assert self.before <= self.tree()
        files = [Path(path) for path in made if not path.endswith("/")]
        assert all(path.parts[-2] == "new" and self.spool == path.parents[2] for path in files)
        assert all(path.startswith(f"{self.spool}/") for path in made)
        files.sort(key=lambda path: int(path.name.partition("Q")[2].partition(".")[0]))
        assert len(files) == len(stored)
        for path, message in zip(files, stored):
            if b"return-path" not in message.lower():
                assert path.read_bytes().endswith(message)

    def _clear(self, made: set[str]) -> None:
        for path in made:
            if not path.endswith("/"):
                os.unlink(path)
        for path in made:
            if path.endswith("/"):
                shutil.rmtree(path, ignore_errors=True)

    def close(self) -> None:
        shutil.rmtree(self.root)


@pytest.fixture
def scenes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Scene]]:
    log: list[str] = []
    free = {"lmtp_max_bad_commands": "0", "lmtp_max_idle_commands": "0"}
    passwords = tmp_path / "passwords"
    salt, stored_key, server_key, iterations = ScramMechanism("SCRAM-SHA-256").make_auth_info("b", iteration_count=4096)
    keys = ",".join(b64encode(key).decode() for key in (salt, stored_key, server_key))
    passwords.write_text(f"a:{{SCRAM-SHA-256}}{iterations},{keys}\n")
    passwords.chmod(0o600)
    password_of_a = {"sasl_pwcheck_method": "file", "sasl_password_file": str(passwords)}
    scenes = [
        Scene(log, **free),
        Scene(log, **free, autocreate_post="yes", maxmessagesize="2000", virtdomains="userid"),
        Scene(log, lmtp_max_bad_commands="2", lmtp_max_idle_commands="4", chatty="yes", reject8bit="yes"),
        Scene(log, **free, allowplaintext="yes", admins="a", **password_of_a),
    ]
    scenes[-1].trusted = False
    lmtpd.log.send_to(lambda _level, line: log.append(line))
    monkeypatch.setattr(time, "sleep", lambda _: None)
    yield scenes
    for scene in scenes:
        scene.close()


def test_mutated_sessions(scenes: list[Scene], monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> None:
    seconds: float = pytestconfig.getoption("fuzz_seconds")
    sessions = messages = 0

    @settings(max_examples=2000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(CLIENT, st.sampled_from(scenes), st.booleans(), st.sampled_from([65536, 1, 2, 7, 100]), st.booleans())
    def run(sent: bytes, scene: Scene, on_socket: bool, read_size: int, spooled: bool) -> None:
        nonlocal sessions, messages
        if time.monotonic() > end:
            return
        monkeypatch.setattr(lmtpd, "READ_SIZE", read_size)
        monkeypatch.setattr(lmtpd, "MEMORY_LIMIT", 10 if spooled else 256 * 1024)
        messages += scene.check(sent, on_socket and len(sent) < 100_000)  # what a socket's buffer holds
        sessions += 1

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        run()
    print(f"{sessions} sessions with {messages} messages in {seconds:.0f} s")
    assert messages > seconds
