"""The programs that start lmtpd, as small classes: systemd-socket-activate, openbsd-inetd, xinetd.

Each runs in the foreground with a scratch configuration, listens where `address` says (loopback, or a unix
socket), and is ended, with what it has started, by close().

    with Inetd(site.command(), wait=True) as inetd:
        client = inetd.connect()
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Union

from harness import Client, connect, free_port, wait_for

if TYPE_CHECKING:
    from typing_extensions import Self

XINETD = os.environ.get("LMTPD_TEST_XINETD") or str(
    Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "lmtpd-tests/xinetd/usr/sbin/xinetd")
)
# The user in their configuration is ourselves, since no other may be able to reach this tree. When that is root, lmtpd
# itself takes on the store's user.
USER = pwd.getpwuid(os.geteuid()).pw_name

# A port of 127.0.0.1, or the path of a unix socket.
Address = Union[int, str]


def listening(address: Address, process: int | str = "self") -> bool:
    """Whether somebody listens there. Asks the kernel: to try it would be a connection, and start lmtpd.

    process: one that has the network in which a port is meant.
    """
    if isinstance(address, str):
        # Flags with __SO_ACCEPTCON, then the path.
        sockets = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
        return any(fields[-1] == address and fields[3] == "00010000" for fields in sockets)
    wanted = f":{address:04X}"
    tables = [Path(f"/proc/{process}/net/tcp"), Path(f"/proc/{process}/net/tcp6")]
    sockets = [line.split() for table in tables if table.exists() for line in table.read_text().splitlines()]
    return any(fields[1].endswith(wanted) and fields[3] == "0A" for fields in sockets)


class Starter:
    """What the three have in common. `process` is the starter; its messages are in `log`."""

    def __init__(self, address: Address | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="lmtpd-starter-"))
        self.folder.chmod(0o755)
        self.address = address if address is not None else free_port()
        self.log = self.folder / "log"
        with self.log.open("wb") as log:
            # A session of its own, so that what it starts can be ended with it.
            self.process = subprocess.Popen(
                self.command_line(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        try:
            wait_for(lambda: self.process.poll() is not None or all(map(listening, self.addresses)), "it to listen")
            assert self.process.poll() is None, "it has ended"
        except BaseException:
            print(f"{type(self).__name__}:\n{self.close()}")
            raise

    def command_line(self) -> list[str]:
        """Writes the configuration; the command that reads it."""
        raise NotImplementedError

    @property
    def addresses(self) -> list[Address]:
        """All addresses on which it listens."""
        return [self.address]

    def connect(self) -> Client:
        return Client(connect(self.place))

    @property
    def place(self) -> str | tuple[str, int]:
        """The address as others have it."""
        return self.address if isinstance(self.address, str) else ("127.0.0.1", self.address)

    def children(self) -> list[int]:
        """The processes that it has started and that are still there."""
        found = subprocess.run(
            ["pgrep", "--parent", str(self.process.pid)], capture_output=True, text=True, check=False
        )
        return [int(pid) for pid in found.stdout.split()]

    def close(self) -> str:
        """Ends the starter and all that it has started; what the starter had to say."""
        # Its children first, while it is there to reap them.
        deadline = time.monotonic() + 2
        while (left := descendants(self.process.pid)) and time.monotonic() < deadline:
            kill(left)
            time.sleep(0.01)
        # In order, for inetd to remove its process id file.
        self.process.terminate()
        try:
            self.process.wait(2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        kill(descendants(self.process.pid))
        said = self.log.read_text(errors="replace")
        shutil.rmtree(self.folder)
        if isinstance(self.address, str):
            Path(self.address).unlink(missing_ok=True)
        return said

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        said = self.close()
        if error is not None:
            # pytest shows it with the failure.
            print(said)


def kill(pids: list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def descendants(starter: int) -> list[int]:
    """Its children and theirs, also those whose parent has gone: they are of its session still, or of a
    session that one of them has opened. Not those that are dead and wait to be reaped."""
    listed = subprocess.run(["ps", "-e", "-o", "pid=,ppid=,sid=,stat="], capture_output=True, text=True, check=True)
    rows = [line.split() for line in listed.stdout.splitlines()]
    family = {str(starter)}
    while True:
        more = {pid for pid, parent, session, _ in rows if parent in family or session in family} - family
        if not more:
            break
        family |= more
    return [int(pid) for pid, _, _, state in rows if pid in family and pid != str(starter) and state[0] != "Z"]


class SocketActivate(Starter):
    """systemd-socket-activate(1). It takes one of four ways to hand sockets over:

    accept, inetd    a process for each connection, which is its standard input
    accept           a process for each connection, which is descriptor 3
    inetd            becomes the command when a connection waits; the listening socket is its standard input
    neither          the same, but the listening sockets are descriptors 3 and up (LISTEN_FDS)

    Without `accept` it is not there any more once the command has ended: there is no second start.
    """

    def __init__(
        self,
        command: list[str],
        *,
        accept: bool = False,
        inetd: bool = False,
        address: Address | None = None,
        more_addresses: tuple[str, ...] = (),
        environment: tuple[str, ...] = (),
    ) -> None:
        self._command = command
        self._options = ["--accept"] * accept + ["--inetd"] * inetd
        self._more_addresses = more_addresses
        self._options += [f"--listen={more}" for more in more_addresses]
        # It hands on only PATH, HOME and the like of its own environment.
        self._options += [f"--setenv={variable}" for variable in environment]
        super().__init__(address)

    @property
    def addresses(self) -> list[Address]:
        """All addresses on which it listens."""
        more = [address if address[0] == "/" else int(address.rpartition(":")[2]) for address in self._more_addresses]
        return [self.address, *more]

    def command_line(self) -> list[str]:
        address = self.address if isinstance(self.address, str) else f"127.0.0.1:{self.address}"
        return ["systemd-socket-activate", f"--listen={address}", *self._options, *self._command]


class Inetd(Starter):
    """openbsd-inetd. With `wait`, the command gets the listening socket; else, each connection."""

    def __init__(self, command: list[str], *, wait: bool = False, address: Address | None = None) -> None:
        self._command = command
        self._wait = wait
        super().__init__(address)

    def command_line(self) -> list[str]:
        unix = isinstance(self.address, str)
        service = self.address if unix else f"127.0.0.1:{self.address}"
        protocol = "unix" if unix else "tcp"
        # More starts a minute than any test makes: the port would be closed for ten minutes.
        wait = ("wait" if self._wait else "nowait") + ".60000"
        program, *arguments = self._command
        fields = [str(service), "stream", protocol, wait, USER, program, os.path.basename(program), *arguments]
        conf = self.folder / "inetd.conf"
        conf.write_text("\t".join(fields) + "\n")
        return ["inetd", "-i", str(conf)]


class Xinetd(Starter):
    """xinetd. With `wait`, the command gets the listening socket; else, each connection. It has no unix sockets."""

    def __init__(self, command: list[str], *, wait: bool = False) -> None:
        self._command = command
        self._wait = wait
        super().__init__(None)

    def command_line(self) -> list[str]:
        program, *arguments = self._command
        attributes = {
            "type": "UNLISTED",
            "socket_type": "stream",
            "protocol": "tcp",
            "bind": "127.0.0.1",
            "port": self.address,
            "user": USER,
            "server": program,
            "server_args": " ".join(arguments),
            "wait": "yes" if self._wait else "no",
            "cps": "10000 1",
            "disable": "no",
        }
        lines = [f"    {name} = {value}\n" for name, value in attributes.items() if value != ""]
        conf = self.folder / "xinetd.conf"
        conf.write_text("service lmtp\n{\n" + "".join(lines) + "}\n")
        files = ["-f", str(conf), "-pidfile", str(self.folder / "pid"), "-filelog", str(self.folder / "xinetd.log")]
        return [XINETD, "-dontfork", *files]
