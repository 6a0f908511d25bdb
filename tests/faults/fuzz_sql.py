"""What a PostgreSQL server answers.

The first line of an input is a number: which configuration. Each other line is a message of the server, see MESSAGES.
The server sends those up to the next "Z" when the client has asked for it. After the last one, and at a line "%%", it
closes the connection; what follows is for the next one. Source: PostgreSQL, chapter 55 (message formats).
"""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

from fuzz_target import Target, log_into, scratch_folder, served
from harness import config_of

import lmtpd

DIVISION = b"\n%%\n"
TROUBLE = ("internal-error", "traceback", "delivery-failed", "script-failed")
PORT = 5432  # in the name of the socket
USERS = ("jane", "joe")
ID, NEXT_ID, DATE = "<1@example.com>", "<2@example.com>", "Fri, 27 Nov 2026 12:00:00 +0000"
MAIL = f"Message-ID: {ID}\r\nDate: {DATE}\r\nSubject: a\r\n\r\nbody\r\n".encode()
SESSION = (
    b"LHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<jane>\r\nRCPT TO:<joe>\r\nDATA\r\n%s.\r\n"
    b"MAIL FROM:<>\r\nRCPT TO:<joe>\r\nDATA\r\n%s.\r\nQUIT\r\n" % (MAIL, MAIL.replace(b"<1", b"<2"))
)
REMEMBERING = 'require "duplicate"; if duplicate :handle "a" { discard; }'
FIRST = b"".join(
    b"%c%s%s" % (kind, (len(body) + 4).to_bytes(4, "big"), body)
    for kind, body in (
        (b"R", bytes(4)),
        *((b"S", b"%s\0%s\0" % pair) for pair in ((b"server_encoding", b"UTF8"), (b"client_encoding", b"UTF8"))),
        (b"S", b"in_hot_standby\0off\0"),
        (b"S", b"default_transaction_read_only\0off\0"),
        (b"S", b"server_version\x0015.1\0"),
        (b"S", b"standard_conforming_strings\0on\0"),
        (b"K", bytes(8)),
        (b"Z", b"I"),
    )
)


def row_description(_: bytes) -> bytes:
    """One column of octets."""
    return b"\0\1key\0" + bytes(6) + (17).to_bytes(4, "big") + b"\xff\xff" + b"\xff" * 4 + bytes(2)


def data_row(value: bytes) -> bytes:
    """A row with a value; with NULL if there is none."""
    return b"\0\1" + (len(value).to_bytes(4, "big") + value if value else b"\xff" * 4)


def error(words: bytes) -> bytes:
    """An error: its SQLSTATE, and the text after it."""
    state, _, text = words.partition(b" ")
    return b"SERROR\0VERROR\0C%s\0M%s\0\0" % (state, text)


# The first letter of a line, which is the type of the message, and what makes its body of the rest of the line.
MESSAGES: dict[bytes, Callable[[bytes], bytes]] = {
    b"1": lambda _: b"",  # ParseComplete
    b"2": lambda _: b"",  # BindComplete
    b"n": lambda _: b"",  # NoData
    b"I": lambda _: b"",  # EmptyQueryResponse
    b"s": lambda _: b"",  # PortalSuspended
    b"T": row_description,
    b"D": data_row,
    b"C": lambda tag: tag + b"\0",  # CommandComplete
    b"E": error,
    b"N": error,  # NoticeResponse
    b"S": lambda words: words.replace(b"=", b"\0") + b"\0",  # ParameterStatus
    b"A": lambda words: bytes(4) + words + b"\0\0",  # NotificationResponse
    b"t": lambda words: words,  # ParameterDescription
    b"Z": lambda state: state[:1] or b"I",  # ReadyForQuery
}
RAW = b"x"  # begins a line with octets in hexadecimal digits


def message(line: bytes) -> bytes:
    """The message that a line describes; none if it describes nothing."""
    kind, rest = line[:1], line[1:].lstrip()
    if kind == RAW:
        with contextlib.suppress(ValueError):
            return bytes.fromhex(rest.decode("latin-1"))
    if kind not in MESSAGES:
        return b""
    body = MESSAGES[kind](rest)
    return kind + (len(body) + 4).to_bytes(4, "big") + body


class Server:
    """Answers each connection with a script of its own: the groups of messages, one for each Sync of the client."""

    def __init__(self, folder: Path) -> None:
        self.scripts: list[list[bytes]] = []
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(folder / f".s.PGSQL.{PORT}"))
        self._socket.listen(16)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._socket.accept()
                groups = self.scripts.pop(0) if self.scripts else []
                threading.Thread(target=self._serve, args=(client, groups), daemon=True).start()

    def _serve(self, client: socket.socket, groups: list[bytes]) -> None:
        with contextlib.suppress(OSError), client, client.makefile("rb") as asked:
            asked.read(int.from_bytes(asked.read(4), "big") - 4)  # StartupMessage
            client.sendall(FIRST)
            for group in groups:
                while asked.read(1) != b"S":
                    if not (size := asked.read(4)):
                        return
                    asked.read(int.from_bytes(size, "big") - 4)
                asked.read(4)
                client.sendall(group)

    def close(self) -> None:
        """Takes no more connections."""
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


class Answers(Target):
    """The answers of a PostgreSQL server to what is asked before and after two messages are stored."""

    name = "sql"
    token = re.compile(rb"[A-Za-z_]+|[0-9]+|<\w+>|\s+|.", re.DOTALL)

    def __init__(self) -> None:
        self._log: list[str] = []
        with ExitStack() as stack:
            self._root = scratch_folder(stack)
            (self._root / "lib").mkdir()
            self._server = Server(self._root)
            stack.callback(self._server.close)
            for name, value in (("SERVER_PATIENCE", 0.05), ("SENDING_PATIENCE", 0.05)):
                stack.enter_context(mock.patch.object(lmtpd, name, value))
            log_into(self._log, stack)
            self._stop = lmtpd.Stop(lmtpd.ShutdownFile(f"{self._root}/shutdown"))
            self._stop.wakeup.open()
            (self._root / "script.sieve").write_text(REMEMBERING)
            self._configs = [self._config(), self._config(sieve_default=f"{self._root}/script.sieve")]
            self._stack = stack.pop_all()

    def _config(self, **options: str) -> lmtpd.Config:
        records = {"duplicatesuppression": "yes", "duplicate_db": "sql", "sql_hostnames": str(self._root)}
        places = {"configdirectory": f"{self._root}/lib", "partition-default": f"{self._root}/spool"}
        return config_of(**{**places, **records, "sql_user": "a", "sql_database": "b", **options})

    def __call__(self, data: bytes) -> None:
        first, _, rest = data.partition(b"\n")
        if first not in (b"0", b"1"):
            return
        self._log.clear()
        (self._root / "lib/deliver.backoff").unlink(missing_ok=True)
        for user in USERS:
            for folder in ("tmp", "new", "cur"):
                (self._root / "spool" / user / folder).mkdir(parents=True)
        try:
            self._server.scripts = [self._groups(script) for script in rest.split(DIVISION)]
            replies = self._replies(self._configs[int(first)])
            self._check(replies, first == b"1" or any(word in rest for word in (b"<jane>", b"<joe>", b"<next>", RAW)))
        finally:
            shutil.rmtree(self._root / "spool")

    def _groups(self, script: bytes) -> list[bytes]:
        for word, message_id, user in ((b"<jane>", ID, "jane"), (b"<joe>", ID, "joe"), (b"<next>", NEXT_ID, "joe")):
            key = lmtpd.key_of(message_id, DATE, f"{self._root}/spool/{user}")
            script = script.replace(word, key.encode())
        groups = [b""]
        for line in script.split(b"\n"):
            groups[-1] += message(line)
            if line.startswith(b"Z"):
                groups.append(b"")
        return groups

    def _replies(self, config: lmtpd.Config) -> list[str]:
        """The replies to the final dots, of a session with two messages."""
        agent = lmtpd.DeliveryAgent(config)
        answers = served(SESSION, config, agent, self._stop, trusted=True)
        if isinstance(agent._records, lmtpd.ServerRecords):
            agent._records._close()
        lines = [line for line in answers.decode("ascii").split("\r\n") if line[3:4] == " "]
        # The greeting, LHLO, MAIL, two RCPT and DATA; after two replies MAIL, RCPT and DATA; after the last one QUIT.
        assert [line[:3] for line in lines[:6]] == ["220", "250", "250", "250", "250", "354"], lines
        assert [line[:3] for line in (*lines[8:11], lines[12])] == ["250", "250", "354", "221"], lines
        assert len(lines) == 13, lines
        return [lines[6], lines[7], lines[11]]

    def _check(self, replies: list[str], may_be_duplicate: bool) -> None:
        for reply, user, number in zip(replies, ("jane", "joe", "joe"), (b"<1@", b"<1@", b"<2@")):
            files = [path.read_bytes() for path in (self._root / "spool" / user / "new").iterdir()]
            copies = sum(number in octets for octets in files)
            assert reply.startswith(("250 ", "451 4.")), reply
            assert copies <= reply.startswith("250"), (reply, copies)
            assert copies or may_be_duplicate or reply.startswith("451"), (reply, copies)
            assert all(octets.endswith(b"\n\nbody\n") for octets in files)
        for line in self._log:
            assert line.isascii(), line
            assert line.isprintable(), line
            assert not line.startswith(TROUBLE), self._log

    def close(self) -> None:
        self._stack.close()

    def seeds(self) -> Iterator[bytes]:
        tables = b"1\n2\nT\nD1\nCSELECT 1\nZI\n"
        begin = b"1\n2\nn\nCBEGIN\n"
        both = b"1\n2\nT\nD<jane>\nD<joe>\nCINSERT 0 2\nZT\n"
        commit = b"1\n2\nn\nCCOMMIT\nZI\n"
        second = b"2\nn\nCBEGIN\n1\n2\nT\nD<next>\nCINSERT 0 1\nZT\n2\nn\nCCOMMIT\nZI\n"
        known = b"1\n2\nT\nD<joe>\nCINSERT 0 1\nZT\n1\n2\nT\nD<jane>\nCSELECT 1\nZT\n"
        makes = b"1\n2\nT\nCSELECT 0\nZI\n" + b"1\n2\nn\nCBEGIN\n" + b"1\n2\nn\nCCREATE\n" * 5 + commit
        locked = b"1\n2\nn\nCBEGIN\n1\nE55P03 canceling\nZE\n1\n2\nn\nCROLLBACK\n2\nn\nCBEGIN\n1\n2\nn\nCSET\nZT\n"
        each = b"1\n2\nn\nCLOCK\nZT\n1\n2\nn\nCSAVEPOINT\n1\n2\nT\nD<jane>\nCINSERT 0 1\nZT\n"
        busy = b"2\nn\nCSAVEPOINT\nE55P03 a\nZE\n1\n2\nn\nCROLLBACK\nZT\n"
        row = b"2\nT\nCSELECT 0\nZI\n1\n2\nn\nCINSERT 0 1\n1\n2\nn\nCDELETE 0\nZI\n"
        yield b"0\n" + tables + begin + both + commit + second
        yield b"0\n" + tables + begin + known + commit + second
        yield b"0\n" + makes + begin + both + commit
        yield b"0\n" + tables + locked + each + busy + commit
        yield b"0\n" + tables + begin + both + b"E57P01 terminating connection\n%%\n" + tables + begin + both + commit
        yield b"0\n" + tables + b"E42501 permission denied\nZI\n"
        yield b"0\n1\nE42P01 no\xff table\nZI\n%%\nNS a\nS client_encoding=LATIN1\nx5a00000004\n"
        yield b"1\n" + tables + b"1\n" + row * 2 + begin + both + commit

    def words(self) -> list[bytes]:
        states = [b"55P03", b"40P01", b"57014", b"57P01", b"42501", b"25P02", b"XX000", b""]
        lines = [b"1", b"2", b"n", b"I", b"s", b"T", b"D1", b"D", b"D<jane>", b"D<joe>", b"D<next>", b"Z", b"ZT", b"ZE"]
        lines += [
            b"CSELECT 1",
            b"CCOMMIT",
            b"CROLLBACK",
            b"Sserver_encoding=LATIN1",
            b"A",
            b"t",
            b"xff",
            b"%%",
            b"\xff",
        ]
        return [line + b"\n" for line in (*lines, *(b"E%s a" % state for state in states))]
