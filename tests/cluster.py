"""Several hosts on this machine that share one store: a MooseFS of scratch folders, and hosts that mount it.

    with MooseFS() as cluster:
        first, second = cluster.host("one"), cluster.host("two")
        first.add_user("jane")
        client = first.connect_to(first.serve())

The servers have a network of their own, so nobody else can reach them. A host has its own host name, process ids and
mounts. All of it ends with the process that made it, however that ends: the first process of each namespace waits for
the end of its standard input.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from harness import STORE_USER, Client, Site, connect, wait_for
from peers import libraries, unpacked
from starters import listening

if TYPE_CHECKING:
    from typing_extensions import Self

# An address for documentation (RFC 5737): the master refuses chunk servers that come from 127.0.0.1.
ADDRESS = "192.0.2.1"
CHUNK_SERVERS = 2
MASTER_CFG = """\
WORKING_USER = root
WORKING_GROUP = root
DATA_PATH = {folder}
EXPORTS_FILENAME = {folder}/exports
TOPOLOGY_FILENAME = /dev/null
MATOML_LISTEN_HOST = {address}
MATOCS_LISTEN_HOST = {address}
MATOCL_LISTEN_HOST = {address}
REPLICATIONS_DELAY_INIT = 0
"""
CHUNK_SERVER_CFG = """\
WORKING_USER = root
WORKING_GROUP = root
DATA_PATH = {folder}
HDD_CONF_FILENAME = {folder}/disks
HDD_LEAVE_SPACE_DEFAULT = 16MiB
MASTER_HOST = {address}
MASTER_RECONNECTION_DELAY = 1
CSSERV_LISTEN_HOST = {address}
CSSERV_LISTEN_PORT = {port}
"""


class Namespaces:
    """Namespaces of Linux, kept by a process that does nothing. kinds: options of unshare(1); outside: a command
    that runs unshare."""

    def __init__(self, *kinds: str, prepare: str = ":", outside: tuple[str, ...] = ()) -> None:
        """prepare: a command of the shell that is the first to run there."""
        always = ("--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
        keeper = f"{prepare} && echo ready && exec cat"
        self._keeper = subprocess.Popen(
            [*outside, "unshare", *always, *kinds, "sh", "-euc", keeper],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._keeper.stdout
        if self._keeper.stdout.readline() != b"ready\n":
            self.close()
            raise AssertionError(f"{prepare} has failed")
        self.process = child_of(self._keeper.pid)
        entered = {"--uts": "--uts", "--net": "--net"}
        self._entered = ["--mount", "--pid", *(entered[kind] for kind in kinds)]

    def inside(self, *command: str) -> list[str]:
        """The command that runs another one there. It is the parent of that one."""
        return ["nsenter", "--target", str(self.process), *self._entered, "--", *command]

    def close(self) -> None:
        """Ends all processes there; what is mounted there goes with them."""
        assert self._keeper.stdin
        assert self._keeper.stdout
        self._keeper.kill()
        self._keeper.wait()
        self._keeper.stdin.close()
        self._keeper.stdout.close()


def child_of(process: int) -> int:
    """The one child of a process, as soon as there is one."""
    file = Path(f"/proc/{process}/task/{process}/children")
    return int(wait_for(file.read_text, f"a child of {process}").split()[0])


class Server:
    """One of MooseFS' servers, in the foreground."""

    def __init__(self, command: list[str], folder: Path, ports: tuple[int, ...], place: Namespaces) -> None:
        self._command, self._ports, self._place = command, ports, place
        self.folder = folder
        self.log = folder / "log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *arguments: str) -> None:
        root = unpacked("moosefs")
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._place.inside(*self._command, *arguments, "start"),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "LD_LIBRARY_PATH": libraries(root)},
            )
        wait_for(self._is_there, f"{self._command[0]} to listen", self.log)

    def _is_there(self) -> bool:
        assert self.process
        assert self.process.poll() is None, self.log.read_text()
        return all(listening(port, self._place.process) for port in self._ports)

    @property
    def pid(self) -> int:
        assert self.process
        return child_of(self.process.pid)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Sends it a signal that ends it."""
        assert self.process
        os.kill(self.pid, number)
        self.process.wait()

    def stop(self) -> None:
        """Stops it until go_on(): it answers nobody, and its connections stay open."""
        os.kill(self.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        assert self.process
        # nsenter(1), its parent, has stopped itself, too.
        for process in (self.pid, self.process.pid):
            os.kill(process, signal.SIGCONT)

    def close(self) -> None:
        """Waits for the end of the server, whose namespaces have ended."""
        if self.process:
            self.process.kill()
            self.process.wait()


class MooseFS:
    """A master, chunk servers that have two copies of each file between them, and hosts.

    master, chunk_server: lines for their configurations.
    """

    def __init__(self, master: str = "", chunk_server: str = "") -> None:
        self._master_cfg, self._chunk_server_cfg = MASTER_CFG + master, CHUNK_SERVER_CFG + chunk_server
        self.folder = Path(tempfile.mkdtemp(prefix="lmtpd-test-"))
        self.folder.chmod(0o755)
        self._hosts: list[Host] = []
        self._servers: list[Server] = []
        self._network: Namespaces | None = None
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        prepare = f"ip link set lo up && ip address add {ADDRESS}/32 dev lo"
        self._network = Namespaces("--net", prepare=prepare)
        programs = unpacked("moosefs")
        folder = self.folder / "master"
        folder.mkdir()
        shutil.copy(programs / "var/lib/mfs/metadata.mfs.empty", folder / "metadata.mfs")
        (folder / "exports").write_text("* / rw,alldirs,maproot=0\n")
        (folder / "cfg").write_text(self._master_cfg.format(folder=folder, address=ADDRESS))
        # -a: after a crash, too.
        command = [str(programs / "usr/sbin/mfsmaster"), "-c", str(folder / "cfg"), "-f", "-a"]
        self.master = Server(command, folder, (9419, 9420, 9421), self._network)
        self._servers.append(self.master)
        self.master.start()
        self.chunk_servers = []
        for port in range(9422, 9422 + CHUNK_SERVERS):
            folder = self.folder / f"chunks{port}"
            (folder / "disk").mkdir(parents=True)
            (folder / "disks").write_text(f"{folder}/disk\n")
            (folder / "cfg").write_text(self._chunk_server_cfg.format(folder=folder, address=ADDRESS, port=port))
            command = [str(programs / "usr/sbin/mfschunkserver"), "-c", str(folder / "cfg"), "-f"]
            server = Server(command, folder, (port,), self._network)
            self._servers.append(server)
            self.chunk_servers.append(server)
            server.start()
        registered = "chunkserver register end"
        wait_for(
            lambda: self.master.log.read_text().count(registered) >= CHUNK_SERVERS, "chunk servers", self.master.log
        )

    def host(self, name: str) -> Host:
        assert self._network
        host = Host(name, self.folder, self._network)
        self._hosts.append(host)
        return host

    def close(self) -> None:
        for host in self._hosts:
            host.close()
        if self._network:
            self._network.close()
        for server in self._servers:
            server.close()
        shutil.rmtree(self.folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Host(Site):
    """A host that has mounted the file system, and has its own configuration. The tests see its store in spool."""

    def __init__(self, name: str, folder: Path, network: Namespaces) -> None:
        self.name = name
        programs = unpacked("moosefs")
        # One path on all hosts, as on a site: records of deliveries have the path of the Maildir.
        self.mountpoint = folder / "store"
        self.mountpoint.mkdir(exist_ok=True)
        owner = pwd.getpwnam(STORE_USER)
        mount = (
            f"hostname {name} && {programs}/usr/bin/mfsmount -H {ADDRESS} {self.mountpoint} >{folder}/{name}.log 2>&1"
            f" && mkdir -p {self.mountpoint}/spool && chown {owner.pw_uid}:{owner.pw_gid} {self.mountpoint}/spool"
        )
        net = f"--net=/proc/{network.process}/ns/net"
        environment = f"LD_LIBRARY_PATH={libraries(programs)}"
        self.namespaces = Namespaces("--uts", prepare=mount, outside=("nsenter", net, "env", environment))
        self._pools: list[subprocess.Popen[bytes]] = []
        self._listening: list[socket.socket] = []
        super().__init__(**{"partition-default": str(self.mountpoint / "spool"), "servername": f"{name}.example.com"})
        self.spool = Path(f"/proc/{self.namespaces.process}/root{self.mountpoint}/spool")

    def command(self, *arguments: str) -> list[str]:
        return self.namespaces.inside(*super().command(*arguments))

    def serve(self, *arguments: str) -> str:
        """Starts a pool of lmtpd; the path of the socket at which it listens."""
        address = str(self.root / "lmtp")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(address)
        os.chmod(address, 0o666)  # Postfix comes as another user
        listener.listen(128)
        self._listening.append(listener)
        with self.log.open("ab") as log:
            self._pools.append(
                subprocess.Popen(
                    self.command("-T", "0", *arguments),
                    stdin=listener.fileno(),
                    stdout=log,
                    stderr=log,
                    env=self.journal(),
                )
            )
        return address

    def connect_to(self, address: str) -> Client:
        return Client(connect(address))

    @property
    def mount_process(self) -> int:
        """The process of the file system's client: what hangs when this one is stopped is the file system."""
        for status in Path("/proc").glob("[0-9]*/status"):
            with suppress(OSError):
                if "Name:\tmfsmount" in status.read_text() and self._has(int(status.parent.name)):
                    return int(status.parent.name)
        raise AssertionError("no mfsmount")

    def _has(self, process: int) -> bool:
        return os.readlink(f"/proc/{process}/ns/uts") == os.readlink(f"/proc/{self.namespaces.process}/ns/uts")

    def close(self) -> None:
        self.namespaces.close()
        for listener in self._listening:
            listener.close()
        for pool in self._pools:
            pool.wait()
        super().close()
