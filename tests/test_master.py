"""Cyrus' own master(8), which runs lmtpd as one of its services and keeps books about its processes."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from harness import PATIENCE, STORE_USER, Client, Site, connect, wait_for
from peers import Cyrus, finish, lmtpd_for_others, own_copy, smtp_source
from test_man import LMTPD_8, section

PREFORK = 2
MAXCHILD = 10
# Linux has fcntl(2) locks in /proc/locks, each with the inode of its file.
LOCKS = Path("/proc/locks")
# A /dev of its own, with the same devices but with another log, and a program that runs in it. The mounts are seen by
# nobody else, and go with the last process that sees them.
WITH_OWN_LOG = """
set -e
dev=$1 log=$2
shift 2
mount -t tmpfs -o mode=755 tmpfs "$dev"
for name in null zero full random urandom tty; do
    : >"$dev/$name"
    mount --bind "/dev/$name" "$dev/$name"
done
mkdir "$dev/shm"
mount --bind /dev/shm "$dev/shm"
ln -s /proc/self/fd "$dev/fd"
: >"$dev/log"
mount --bind "$log" "$dev/log"
mount --rbind "$dev" /dev
exec "$@"
"""
# What master(8) says when the states that a child reports are not those it expects, or a child is lost.
COMPLAINTS = ("too many", "lost", "READY state", "duplicate", "UNKNOWN", "unrecognized", "abnormally", "bogus")


def literal_in(page: Path, title: str) -> str:
    """The literal block in a subsection of a manual page."""
    found = re.search(r"^\.Bd -literal.*?\n(.*?)^\.Ed$", section(page, title, "Ss"), re.MULTILINE | re.DOTALL)
    assert found
    return found[1]


class Syslog:
    """A syslog(3) socket, and what it was told."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        path.chmod(0o666)
        self.lines: list[str] = []
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while line := self._socket.recv(65536):
            self.lines.append(line.decode(errors="replace"))

    def of(self, name: str) -> list[str]:
        """The lines of the program with that name, without time and priority."""
        return [line[line.index(name) :] for line in self.lines if re.search(rf"\b{name}\[\d+\]: ", line)]

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RD)
        self._thread.join(PATIENCE)
        self._socket.close()


def state_of(process: int) -> str:
    """The state of a process in proc(5)'s letters; that of a dead one if it has gone."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][:1]
    except OSError:
        return "Z"


class Master(Cyrus):
    """master(8) with our lmtpd in its cyrus.conf. Both write to `syslog`."""

    def __init__(self, site: Site, command: str, *arguments: str, prefork: int = PREFORK) -> None:
        self._site, self._prefork = site, prefork
        self._command = " ".join([command, "-C", str(site.conf), *arguments])
        # master(8) and lmtpd have one configuration, of which each takes what is its own.
        site.configure(configdirectory=str(site.root / "cyrus/lib"), cyrus_user=STORE_USER, defaultpartition="default")
        super().__init__(site.root / "cyrus")
        self.syslog = Syslog(self.folder / "syslog")
        (self.folder / "dev").mkdir()

    def _configure(self) -> None:
        super()._configure()
        self.imapd_conf = self._site.conf
        self.write_cyrus_conf(self._prefork)

    def write_cyrus_conf(self, prefork: int) -> None:
        services = literal_in(LMTPD_8, "Cyrus master")
        for shown, here in {
            "/usr/local/bin/lmtpd": self._command,
            "/run/cyrus/socket/lmtp": str(self.address),
            "prefork=2 maxchild=10": f"prefork={prefork} maxchild={MAXCHILD}",
        }.items():
            assert shown in services
            services = services.replace(shown, here)
        self.cyrus_conf.write_text(f"START {{\n}}\n{services}EVENTS {{\n}}\n")

    def start(self) -> None:
        master = [str(self.programs / "master"), "-D", "-p", str(self.folder / "pid")]
        private = ["unshare", "--mount", "--propagation", "private", "sh", "-c", WITH_OWN_LOG, "sh"]
        self.run(
            [
                *[*private, str(self.folder / "dev"), str(self.folder / "syslog")],
                *[*master, "-C", str(self.imapd_conf), "-M", str(self.cyrus_conf)],
            ],
            lambda: len(self.ready()) == self._prefork and Path(str(self.address)).exists(),
            LD_LIBRARY_PATH=self.libraries,
        )

    def close(self) -> None:
        super().close()
        self.syslog.close()

    def children(self) -> list[int]:
        """Its processes, the dead that it has not reaped among them."""
        process = self.process.pid
        return [int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()]

    def living(self) -> list[int]:
        """Its processes that are not dead."""
        return [pid for pid in self.children() if state_of(pid) != "Z"]

    def ready(self) -> list[list[str]]:
        """The processes that wait for a connection: lines of /proc/locks for the accept lock, which one has."""
        inodes = {f":{lock.stat().st_ino}" for lock in (self.folder / "lib/socket").glob("lmtpunix-*.lock")}
        lines = [line.split() for line in LOCKS.read_text().splitlines()]
        return [line for line in lines if any(word.endswith(inode) for word in line for inode in inodes)]

    def complaints(self) -> list[str]:
        return [line for line in self.syslog.of("master") if any(word in line for word in COMPLAINTS)]

    def source(self, *options: str) -> subprocess.Popen[bytes]:
        return smtp_source(self.address, *options)

    def load(self, *options: str) -> None:
        finish(self.source(*options))

    def client(self) -> Client:
        client = Client(connect(self.address))
        client.hello()
        return client


def sessions(master: Master) -> Counter[int]:
    """How many connections each process has served."""
    return Counter(int(pid) for pid in re.findall(r": connected session=lmtpd-(\d+)-", "\n".join(master.syslog.lines)))


@contextmanager
def started(site: Site, *arguments: str, command: str = "", prefork: int = PREFORK) -> Iterator[Master]:
    with Master(site, command or lmtpd_for_others(site), *arguments, prefork=prefork) as master:
        yield master
        assert master.complaints() == []


@pytest.fixture
def site(site: Site) -> Site:
    """A site with the option debug: "connected" and "disconnected" are in its log."""
    site.configure(debug="yes")
    return site


@pytest.fixture
def master(site: Site) -> Iterator[Master]:
    with started(site) as master:
        yield master


@pytest.mark.parametrize("options", [["-s", "10", "-m", "500"], ["-s", "10", "-m", "500", "-d"]], ids=["each", "few"])
def test_mail_under_load(site: Site, master: Master, options: list[str]) -> None:
    master.load(*options)
    assert len(site.files("jane")) == 500
    assert not site.files("jane", kind="tmp")
    # When master may start one, it starts all that prefork asks for.
    assert PREFORK <= len(master.living()) <= MAXCHILD + PREFORK - 1


def test_no_more_processes_than_maxchild(site: Site, master: Master) -> None:
    """Save for those that master starts together with the last one, because prefork asks for them."""
    clients = [master.client() for _ in range(MAXCHILD)]
    assert len({client.server() for client in clients}) == MAXCHILD
    most = MAXCHILD + PREFORK - 1
    waiting = [Client(connect(master.address)) for _ in range(most - MAXCHILD + 1)]
    waiting[-1].sock.settimeout(0.5)
    with pytest.raises(TimeoutError):
        waiting[-1].line()
    assert len(master.children()) <= most
    for client in (*clients, *waiting[:-1]):
        client.close()
    waiting[-1].sock.settimeout(PATIENCE)
    assert waiting[-1].line().startswith(b"220 ")


def test_prefork_processes_are_ready(site: Site, master: Master) -> None:
    assert len(master.children()) == PREFORK
    clients = [master.client() for _ in range(3)]
    wait_for(lambda: len(master.ready()) == PREFORK, "spare processes")
    assert len(master.children()) == 3 + PREFORK
    for client in clients:
        client.leave()
    # They are ready again, and master starts no others in their place.
    time.sleep(1)
    assert len(master.children()) == 3 + PREFORK
    again = [master.client() for _ in range(3)]
    assert len({client.server() for client in again}) == 3
    assert len(master.children()) == 3 + PREFORK


def has_started(process: int) -> bool:
    """Whether the process has installed its handler of SIGHUP, which it would die of before; see proc(5)."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return True
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return caught is None or bool(int(caught[1], 16) & 1 << (signal.SIGHUP - 1))


@pytest.mark.parametrize(("uses", "wait"), [("100000", True), ("50", False)], ids=["all started", "some starting"])
def test_nothing_is_lost_across_reloads(site: Site, uses: str, wait: bool) -> None:
    """A process may die of the signal before env(1) holds it back, but not so many that master gives the service up."""
    with Master(site, lmtpd_for_others(site), "-U", uses) as master:
        reload_under_load(site, master, wait)
        assert [line for line in master.complaints() if "terminated abnormally" not in line] == []
        assert not [line for line in master.syslog.of("master") if "too many" in line]


def reload_under_load(site: Site, master: Master, wait: bool) -> None:
    new = site.spool / "jane/new"
    for reload in range(5):
        source = master.source("-s", "10", "-m", "500")
        wait_for(lambda: len(os.listdir(new)) > 500 * reload, "the first of these messages")  # noqa: B023
        if wait:  # so that it is sure that none is hit by the signal before it can do anything about it
            wait_for(lambda: all(map(has_started, master.children())), "the processes to have started")
        master.write_cyrus_conf(prefork=PREFORK + reload % 2)
        master.process.send_signal(signal.SIGHUP)
        finish(source)
    assert len(site.files("jane")) == 2500
    assert sum("got SIGHUP" in line for line in master.syslog.of("master")) == 5
    assert len(sessions(master)) > 2 * MAXCHILD


def test_processes_leave_after_their_uses(site: Site) -> None:
    with started(site, "-U", "5") as master:
        master.load("-s", "10", "-m", "500")
        assert len(site.files("jane")) == 500
        wait_for(lambda: sum(sessions(master).values()) >= 500, "the log")
        served = sessions(master)
        assert max(served.values()) == 5
        assert len(served) >= 100
        wait_for(lambda: len(master.ready()) >= PREFORK, "new processes in their place")


def test_an_idle_process_leaves(site: Site) -> None:
    with started(site, "-T", "1", prefork=0) as master:
        for _ in range(2):
            client = master.client()
            assert len(master.children()) == 1
            before = time.monotonic()
            client.leave()
            wait_for(lambda: not master.children(), "the idle process to leave")
            assert time.monotonic() - before >= 1


def test_idle_processes_leave_though_others_have_the_lock(site: Site) -> None:
    with started(site, "-T", "1") as master:
        clients = [master.client() for _ in range(5)]
        served = {client.server() for client in clients}
        wait_for(lambda: len(master.ready()) == PREFORK, "spare processes")
        before = time.monotonic()
        for client in clients:
            client.leave()
        # master keeps as many as it is told to, so that not all that leave are replaced.
        wait_for(lambda: not served.intersection(master.living()), "those that have served to leave")
        assert 1 <= time.monotonic() - before < 30
        wait_for(lambda: len(master.ready()) == PREFORK, "spare processes")
        master.load("-m", "5")
        assert len(site.files("jane")) == 5


def test_syslog_has_the_facility_and_the_prefix_that_are_set(site: Site) -> None:
    site.configure(syslog_facility="local3", syslog_prefix="inside")
    with started(site) as master:
        master.load("-m", "1")
        wait_for(lambda: [line for line in master.syslog.of("lmtpd") if "delivered " in line], "the log")
        # The facility times eight, and 6 for "info".
        [line] = [line for line in master.syslog.lines if ": delivered " in line]
        assert re.match(rf"<{19 * 8 + 6}>.* inside/lmtpd\[\d+\]: delivered session=", line)


def test_a_killed_process_hurts_nobody_else(site: Site) -> None:
    with Master(site, lmtpd_for_others(site)) as master:
        victim, other = master.client(), master.client()
        for client in victim, other:
            client.command("MAIL FROM:<sender@example.com>")
            client.command("RCPT TO:<jane>")
            assert client.command("DATA").startswith("354")
        os.kill(server_of_log(master, 0), signal.SIGKILL)
        assert victim.line() == b""
        assert other.command("Subject: x\r\n\r\nbody\r\n.").startswith("250")
        other.leave()
        master.load("-s", "5", "-m", "50")
        assert len(site.files("jane")) == 51
        # master says so, and only that.
        wait_for(lambda: any("signaled to death" in line for line in master.syslog.of("master")), "master to notice")
        assert len(master.complaints()) <= 1


def server_of_log(master: Master, number: int) -> int:
    """The process of that session in the log."""
    found = re.findall(r": connected session=lmtpd-(\d+)-", "\n".join(master.syslog.lines))
    return int(found[number])


def test_the_lock_is_masters_and_taken_in_turns(site: Site, master: Master) -> None:
    [lock] = (Path(site.options["configdirectory"]) / "socket").glob("lmtpunix-*.lock")
    assert re.fullmatch(r"lmtpunix-\d+\.lock", lock.name)
    assert sum("->" in line for line in master.ready()) == PREFORK - 1
    # A busy process neither holds it nor waits for it.
    client = master.client()
    wait_for(lambda: len(master.ready()) == PREFORK, "a new one in its place")
    assert str(client.server()) not in {word for line in master.ready() for word in line}


def test_a_holder_of_the_lock_that_is_killed_gives_it_up(site: Site) -> None:
    with Master(site, lmtpd_for_others(site)) as master:
        [holder] = [line for line in master.ready() if "->" not in line]
        # The fourth word after its number is the process.
        os.kill(int(holder[4]), signal.SIGKILL)
        master.load("-m", "5")
        assert len(site.files("jane")) == 5


@pytest.mark.parametrize("what", ["program", "configuration"])
def test_what_was_changed_is_used_by_the_next_connection(site: Site, what: str) -> None:
    command = own_copy(site)
    with started(site, command=str(command)) as master:
        with closing(Client(connect(master.address))) as client:
            assert client.reply() == ["220 mx.example.com lmtpd 0.4.1 ready"]
            # master may start another in its place only while it is busy.
            wait_for(lambda: len(master.ready()) == PREFORK, "a new one in its place")
        wait_for(lambda: len(master.ready()) == 1 + PREFORK, "idle processes")
        before = set(master.children())
        if what == "program":
            module = command.parent / "lmtpd.py"
            module.write_text(module.read_text().replace('__version__ = "0.4.1"', '__version__ = "9.9.9"'))
        else:
            site.configure(servername="changed.example")
        [greeting] = Client(connect(master.address)).reply()
        assert (
            greeting
            == {
                "program": "220 mx.example.com lmtpd 9.9.9 ready",
                "configuration": "220 changed.example lmtpd 0.4.1 ready",
            }[what]
        )
        wait_for(lambda: len(before.intersection(master.children())) < len(before), "an idle process to leave")


def test_master_ends_its_processes(site: Site, master: Master) -> None:
    client = master.client()
    assert client.command("MAIL FROM:<sender@example.com>").startswith("250")
    assert client.command("RCPT TO:<jane>").startswith("250")
    assert client.command("DATA").startswith("354")
    children = master.children()
    master.process.terminate()
    assert client.command("Subject: x\r\n\r\nbody\r\n.").startswith("250")
    assert client.line().startswith(b"421 4.3.2")
    client.close()
    master.process.wait(PATIENCE)
    assert len(site.files("jane")) == 1
    wait_for(lambda: not any(Path(f"/proc/{child}").exists() for child in children), "the processes to leave")
