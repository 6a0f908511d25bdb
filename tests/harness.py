"""What the tests are made of: a scratch site for lmtpd, and a small LMTP client."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar, Union

from lmtpd import Config

T = TypeVar("T")
# The path of a unix socket, or a host and port.
Address = Union[str, tuple[str, int]]

LMTPD = str(Path(sys.executable).parent / "lmtpd")
IMPATIENT = str(Path(__file__).parent / "impatient.py")
AS_ROOT = os.geteuid() == 0
# The account that owns the store when the tests run as root; every Debian has it.
STORE_USER = "mail"
PATIENCE = 60.0


def config_of(**options: str) -> Config:
    """What lmtpd makes of an imapd.conf with these options; the store is at /spool unless they say otherwise."""
    options = {"configdirectory": "/lib", "partition-default": "/spool", "servername": "mx.example.com", **options}
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", prefix="lmtpd-test-") as file:
        file.write("".join(f"{name}: {value}\n" for name, value in options.items()))
        file.flush()
        return Config.load(file.name)


def wait_for(condition: Callable[[], T], what: str, log: Path | None = None, patience: float = PATIENCE) -> T:
    """What condition() returns, as soon as that is true; looks at it again and again until then."""
    end = time.monotonic() + patience
    while not (result := condition()):
        if time.monotonic() > end:
            tail = log.read_text(errors="replace")[-4000:] if log and log.exists() else ""
            raise AssertionError(f"waited {patience:.0f} s for {what}\n{tail}")
        time.sleep(0.02)
    return result


def connect(address: Address) -> socket.socket:
    """A connection to a unix socket or to a host and port."""
    sock = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
    try:
        sock.settimeout(PATIENCE)
        sock.connect(address)
    except OSError:
        sock.close()
        raise
    return sock


PORTS_IN_BLOCK = 50


def reserved_ports() -> Iterator[int]:
    """Ports of loopback, each of which nobody else gets from here as long as this process lives.

    They are outside the range from which the system takes ports for clients. A block of them belongs to the process
    that has bound a socket in the abstract namespace to its name, which is known wherever the ports are, and is free
    again when the process has ended in whatever way.
    """
    lowest, highest = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    blocks = []
    for ports in (range(10_000, lowest), range(max(highest + 1, 10_000), 65_536)):
        for start in range(0, len(ports), PORTS_IN_BLOCK):
            block = socket.socket(socket.AF_UNIX)
            try:
                block.bind(f"\0lmtpd-tests-ports-{ports[start]}")
            except OSError:
                block.close()
                continue
            blocks.append(block)
            yield from filter(is_free, ports[start : start + PORTS_IN_BLOCK])
    raise RuntimeError("no port is left outside net.ipv4.ip_local_port_range")


def is_free(port: int) -> bool:
    """Whether nobody listens on the port, at any address: there are other programs than the tests."""
    with socket.socket(socket.AF_INET6) as probe:
        probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("::", port))
        except OSError:
            return False
        return True


RESERVED_PORTS = reserved_ports()
RESERVING = threading.Lock()


def free_port() -> int:
    """A port on loopback for a program that cannot be handed a socket that is bound already."""
    with RESERVING:
        return next(RESERVED_PORTS)


class Client:
    """An LMTP client that sends exactly the octets it is told to."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sock.settimeout(PATIENCE)
        self._buffer = b""

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def line(self) -> bytes:
        """The next line of the server without its CR LF; b"" at end of file."""
        while b"\r\n" not in self._buffer:
            more = self.sock.recv(65536)
            if not more:
                rest, self._buffer = self._buffer, b""
                return rest
            self._buffer += more
        line, self._buffer = self._buffer.split(b"\r\n", 1)
        return line

    def reply(self) -> list[str]:
        """The lines of the next reply, [] at end of file."""
        lines: list[str] = []
        while True:
            line = self.line().decode("ascii")
            if line:
                lines.append(line)
            if line[3:4] != "-":
                return lines

    def command(self, line: str | bytes) -> str:
        """Sends one command line; the last line of its reply."""
        self.send((line.encode() if isinstance(line, str) else line) + b"\r\n")
        reply = self.reply()
        return reply[-1] if reply else ""

    def hello(self) -> list[str]:
        """Reads the greeting, says LHLO; the lines of its reply."""
        self.reply()
        self.send(b"LHLO client.example\r\n")
        return self.reply()

    def deliver(
        self,
        message: bytes,
        *recipients: str | bytes,
        sender: str = "sender@example.com",
        mail: str = "",
        rcpt: str = "",
    ) -> list[str]:
        """One transaction with DATA; for each recipient the refusal, or the reply to the final dot.

        mail, rcpt: what stands behind the addresses in these commands.
        """
        assert self.command(f"MAIL FROM:<{sender}> {mail}".rstrip()).startswith("250")
        octets = [address if isinstance(address, bytes) else address.encode() for address in recipients]
        replies = [self.command((b"RCPT TO:<%s> %s" % (address, rcpt.encode())).rstrip()) for address in octets]
        accepted = [number for number, reply in enumerate(replies) if reply.startswith("250")]
        if not accepted:
            self.command("RSET")
            return replies
        assert self.command("DATA").startswith("354")
        stuffed = (b"\r\n" + message).replace(b"\r\n.", b"\r\n..")[2:]
        self.send(stuffed + (b".\r\n" if message.endswith(b"\r\n") else b"\r\n.\r\n"))
        for number in accepted:
            replies[number] = (self.reply() or [""])[-1]
        return replies

    def server(self) -> int:
        """The process that serves this client, which its session's id names; the transaction is reset."""
        found = re.search(r"SESSIONID=<lmtpd-(\d+)-", self.command("RSET"))
        assert found
        return int(found[1])

    def leave(self) -> None:
        """Ends the session as one should."""
        assert self.command("QUIT").startswith("221")
        self.close()

    def close(self) -> None:
        self.sock.close()


class Site:
    """A scratch folder with an imapd.conf, a mail spool and users, and lmtpd run on it.

    figures: constants of lmtpd that are others for it, for a test that would have to wait for too long.
    has_unnamed_drafts: whether it is on a file system where the drafts of messages have no names.
    """

    def __init__(self, parent: str = "", **options: str) -> None:
        """parent: the folder in which to make it; by default that for temporary files."""
        self.has_unnamed_drafts = False
        self.root = Path(tempfile.mkdtemp(prefix="lmtpd-test-", dir=parent or None))
        self.root.chmod(0o755)
        self.conf = self.root / "imapd.conf"
        self.spool = self.root / "spool"
        self.configdirectory = self.root / "lib"
        self.log = self.root / "log"
        self.log.touch()
        self._children: list[subprocess.Popen[bytes]] = []
        self.figures: dict[str, float] = {}
        for folder in (self.spool, self.configdirectory):
            folder.mkdir()
            self.give(folder)
        self.options: dict[str, str] = {
            "configdirectory": str(self.configdirectory),
            "partition-default": str(self.spool),
            "servername": "mx.example.com",
            "duplicatesuppression": "no",  # the tests send the same messages again and again
        }
        if AS_ROOT:
            self.options["cyrus_user"] = STORE_USER
        self.configure(**options)

    def give(self, path: Path) -> None:
        """Makes path belong to the account that lmtpd runs as."""
        if AS_ROOT:
            account = pwd.getpwnam(STORE_USER)
            os.chown(path, account.pw_uid, account.pw_gid)

    def log_text(self) -> str:
        return self.log.read_text()

    def configure(self, **options: str | None) -> None:
        """Writes imapd.conf with these options changed (None: left out)."""
        for name, value in options.items():
            if value is None:
                self.options.pop(name, None)
            else:
                self.options[name] = value
        self.conf.write_text("".join(f"{name}: {value}\n" for name, value in self.options.items()))

    def add_user(self, *names: str) -> Path:
        """Makes an empty Maildir for each; the last one's path."""
        for name in names:
            maildir = self.spool / name
            for folder in (maildir, maildir / "tmp", maildir / "new", maildir / "cur"):
                folder.mkdir()
                self.give(folder)
        return maildir

    def command(self, *arguments: str) -> list[str]:
        settings = [f"{name}={value}" for name, value in self.figures.items()]
        program = [sys.executable, "-I", IMPATIENT, *settings, "--"] if settings else [LMTPD]
        return [*program, "-C", str(self.conf), *arguments]

    def pipe(self, session: bytes, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        """Runs a whole session through pipes, as a shell would; log lines go to the file log."""
        with self.log.open("ab") as log:
            return subprocess.run(
                self.command(*arguments),
                input=session,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self.journal(),
                timeout=PATIENCE,
                check=False,
            )

    def connect(self, *arguments: str) -> Client:
        """Starts lmtpd with a socket as its standard input and output, and a log as systemd has it."""
        ours, theirs = socket.socketpair()
        with theirs:
            self.start(theirs, *arguments)
        return Client(ours)

    def start(self, connection: socket.socket, *arguments: str) -> None:
        """Starts lmtpd on a connection; its log lines go to the file log as they would go to the journal."""
        with self.log.open("ab") as log:
            child = subprocess.Popen(
                self.command(*arguments),
                stdin=connection.fileno(),
                stdout=connection.fileno(),
                stderr=log,
                env=self.journal(),
            )
        self._children.append(child)

    def journal(self) -> dict[str, str]:
        """The environment in which a standard error that goes to the file log is the journal's."""
        status = self.log.stat()
        return {**os.environ, "JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}

    @property
    def child(self) -> subprocess.Popen[bytes]:
        """The process that the last connect() started."""
        return self._children[-1]

    def files(self, user: str, folder: str = "", kind: str = "new") -> list[Path]:
        """The message files in that folder, oldest first."""
        return sorted((self.spool / user / folder / kind).iterdir(), key=lambda path: path.stat().st_mtime_ns)

    def messages(self, user: str, folder: str = "") -> list[bytes]:
        return [path.read_bytes() for path in self.files(user, folder)]

    def stored(self) -> set[Path]:
        """The files of all new messages."""
        return {path for folder in ("*", "*/.*") for path in self.spool.glob(f"{folder}/new/*")}

    def place(self, message: Path) -> str:
        """The user and the folder that has a message: "jane", "jane/lists", "jane@example.com/lists/new"."""
        user, *folder = str(message.parent.parent.relative_to(self.spool)).split("/.")
        return "/".join([user, *(part.replace(".", "/") for part in folder)])

    def close(self) -> None:
        for child in self._children:
            if child.poll() is None:
                child.kill()
            child.wait()
        shutil.rmtree(self.root)
