"""The life of lmtpd's processes: pools of workers, their limits and ends, signals, -D and -H."""

from __future__ import annotations

import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from harness import PATIENCE, Address, Client, Site, connect, free_port, wait_for
from peers import Peer, finish, own_copy, program, smtp_source
from starters import Inetd, SocketActivate, Starter, Xinetd

from lmtpd import AVAILABLE, CONNECTED, UNAVAILABLE, PoolReporter, WorkerGroup

BODY = "Subject: a subject\r\n\r\nA body.\r\n."
GONE = "421 4.3.2"


def logged(site: Site, *arguments: str, lmtpd: str = "") -> list[str]:
    """The command of lmtpd whose log lines go to the site's, whatever its starter does with standard error."""
    command = [lmtpd, "-C", str(site.conf)] if lmtpd else site.command()
    script = site.root / "lmtpd"
    script.write_text(
        f"#!/bin/sh\nexport JOURNAL_STREAM={site.journal()['JOURNAL_STREAM']}\n"
        f'exec {shlex.join(command)} "$@" 2>>{site.log}\n'
    )
    script.chmod(0o755)
    return [str(script), *arguments]


def children(process: int) -> list[int]:
    """Its children, the dead that it has not reaped among them."""
    return [int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def exists(process: int) -> bool:
    return Path(f"/proc/{process}").exists()


def descriptors(process: int) -> dict[int, str]:
    found = {}
    for link in Path(f"/proc/{process}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            found[int(link.name)] = os.readlink(link)
    return found


def sessions(site: Site) -> Counter[int]:
    """How many connections each process has served."""
    return Counter(int(pid) for pid in re.findall(r">connected session=lmtpd-(\d+)-", site.log_text()))


def begin(client: Client) -> None:
    """A transaction, as far as the message."""
    assert client.command("MAIL FROM:<sender@example.com>").startswith("250")
    assert client.command("RCPT TO:<jane>").startswith("250")
    assert client.command("DATA").startswith("354")


def rest(client: Client) -> bytes:
    """All that the server has to say yet; it closes the connection then."""
    said = b""
    try:
        while data := client.sock.recv(65536):
            said += data
    except ConnectionResetError:  # it did not read all we sent
        pass
    client.close()
    return said


def greets_not(client: Client, seconds: float = 0.5) -> bool:
    client.sock.settimeout(seconds)
    try:
        client.line()
    except TimeoutError:
        return True
    finally:
        client.sock.settimeout(PATIENCE)
    return False


@contextmanager
def pool(site: Site, *arguments: str, more_addresses: tuple[str, ...] = ()) -> Iterator[SocketActivate]:
    """A pool on a unix socket; `process` is the parent of the workers, as soon as there was a connection."""
    address = str(site.root / "lmtp")
    with SocketActivate(logged(site, *arguments), address=address, more_addresses=more_addresses) as starter:
        yield starter


def client_of(port: int) -> Client | None:
    """A client on the port of loopback; None while nobody listens there."""
    try:
        return Client(connect(("127.0.0.1", port)))
    except ConnectionRefusedError:
        return None


def open_session(starter: Starter) -> Client:
    client = starter.connect()
    client.hello()
    return client


def wait_for_workers(parent: int, number: int) -> None:
    wait_for(lambda: len(children(parent)) == number, f"{number} workers")


@pytest.fixture
def site(site: Site) -> Site:
    """A site with the option debug: "connected" and "disconnected" are in its log."""
    site.configure(debug="yes")
    return site


@pytest.fixture
def fast_site() -> Iterator[Site]:
    """A site whose store is in memory, for load."""
    site = Site()
    spool = Path(tempfile.mkdtemp(prefix="lmtpd-test-", dir="/dev/shm"))
    spool.chmod(0o755)
    site.give(spool)
    site.spool = spool
    site.configure(debug="yes", **{"partition-default": str(spool)})
    site.add_user("jane")
    yield site
    site.close()
    shutil.rmtree(spool)


class TestPool:
    """Listening sockets handed over by systemd's tool: workers come and go, connections stay."""

    def test_ten_thousand_connections_and_fifty_for_each_worker(self, fast_site: Site) -> None:
        with pool(fast_site, "-U", "50", "-T", "2") as starter:
            finish(smtp_source(str(starter.address), "-s", "20", "-m", "10000"), 90)
            assert len(list((fast_site.spool / "jane/new").iterdir())) == 10000
            assert not fast_site.files("jane", kind="tmp")
            assert "Z" not in map(state_of, live(starter))
            # Those that have not served 50, and those that came too late to serve any, leave when it is quiet.
            assert starter.process.wait(PATIENCE) == 0
        served = sessions(fast_site)
        assert max(served.values()) == 50
        assert sum(served.values()) == 10000
        assert "worker-died" not in fast_site.log_text()

    def test_a_process_for_each_connection(self, site: Site) -> None:
        with pool(site, "-U", "1") as starter:
            finish(smtp_source(str(starter.address), "-s", "4", "-m", "40"))
            assert list(sessions(site).values()) == [1] * 40
        assert len(site.files("jane")) == 40

    def test_several_sockets_of_all_kinds(self, site: Site) -> None:
        port, port6 = free_port(), free_port()
        listeners = (f"127.0.0.1:{port}", f"[::1]:{port6}")
        with pool(site, "-a", more_addresses=listeners) as starter:
            addresses: list[Address] = [str(starter.address), ("127.0.0.1", port), ("::1", port6)]
            for load in [smtp_source(address, "-s", "5", "-m", "50") for address in addresses]:
                finish(load)
            assert starter.process.poll() is None
        stored = Counter(re.findall(rb"^Received: from \S+ \((.*?)\)", b"\n".join(site.messages("jane")), re.MULTILINE))
        assert len(site.files("jane")) == 150
        assert sum(count for peer, count in stored.items() if b"[127.0.0.1]" in peer) == 50
        assert sum(count for peer, count in stored.items() if b"[IPv6:::1]" in peer) == 50
        assert f"uid {os.geteuid()}" in site.log_text()

    def test_internet_peers_must_authenticate_without_a(self, site: Site) -> None:
        port = free_port()
        with pool(site, more_addresses=(f"127.0.0.1:{port}",)) as starter:
            client = wait_for(lambda: client_of(port), "the second socket")
            assert client
            client.hello()
            assert client.command("MAIL FROM:<>").startswith("430 4.7.0")
            client.close()
            assert open_session(starter).command("MAIL FROM:<>").startswith("250")

    def test_no_more_workers_than_maxchild(self, site: Site) -> None:
        site.configure(lmtp_maxchild="3")
        with pool(site) as starter:
            clients = [open_session(starter) for _ in range(3)]
            assert len({client.server() for client in clients}) == 3
            waiting = starter.connect()
            assert greets_not(waiting)
            assert len(children(starter.process.pid)) == 3
            clients[0].leave()
            assert waiting.line().startswith(b"220 ")

    def test_clients_that_are_not_trusted_leave_workers_for_those_that_are(self, site: Site) -> None:
        site.configure(lmtp_maxchild="2", lmtp_maxchild_untrusted="3", lmtp_auth_timeout="1h")
        port = free_port()
        with pool(site, more_addresses=(f"127.0.0.1:{port}",)) as starter:
            strangers = [Client(connect(("127.0.0.1", port))) for _ in range(5)]
            for stranger in strangers[:3]:
                stranger.hello()
            assert greets_not(strangers[3])
            clients = [open_session(starter) for _ in range(2)]
            for client in clients:
                assert client.deliver(b"Subject: x\r\n\r\nA body.\r\n", "jane")[0].startswith("250")
            assert len(children(starter.process.pid)) == 5
            assert greets_not(starter.connect())
            strangers[0].leave()
            assert strangers[3].hello()

    def test_clients_that_have_to_authenticate_may_be_as_many_as_the_others(self, site: Site) -> None:
        site.configure(lmtp_maxchild="2", lmtp_prefork="1")
        port = free_port()
        with pool(site, more_addresses=(f"127.0.0.1:{port}",)) as starter:
            strangers = [Client(connect(("127.0.0.1", port))) for _ in range(3)]
            for stranger in strangers[:2]:
                stranger.hello()
            client = open_session(starter)
            wait_for_workers(starter.process.pid, 4)  # one is kept ready for those that are trusted
            assert greets_not(strangers[2])
            client.leave()

    def test_more_idle_workers_than_may_be_are_an_odd_setting(self, site: Site) -> None:
        site.configure(lmtp_maxchild="2", lmtp_prefork="5")
        with pool(site) as starter:
            open_session(starter)
            wait_for_workers(starter.process.pid, 2)
        assert (
            '<4>odd-setting cause="lmtp_prefork is 5, but lmtp_maxchild allows 2: lower it, or raise lmtp_maxchild"'
            in site.log_text()
        )

    def test_workers_are_kept_ready(self, site: Site) -> None:
        site.configure(lmtp_prefork="3")
        with pool(site) as starter:
            clients = [open_session(starter) for _ in range(2)]
            parent = starter.process.pid
            wait_for_workers(parent, 5)
            idle = set(children(parent)) - {client.server() for client in clients}
            os.kill(idle.pop(), signal.SIGKILL)
            wait_for(
                lambda: len(children(parent)) == 5 and not idle.issuperset(children(parent)), "another in its place"
            )
            assert open_session(starter).server() in children(parent)

    def test_a_connection_wakes_one_worker_only(self, site: Site) -> None:
        site.configure(lmtp_prefork="5")
        with pool(site) as starter:
            open_session(starter).command("QUIT")
            parent = starter.process.pid
            for _ in range(10):
                wait_until_at_rest(parent, 5)
                before = {worker: switches(worker) for worker in children(parent)}
                client = open_session(starter)
                woken = {worker for worker, count in before.items() if switches(worker) != count}
                assert woken <= {client.server()}  # which may not have slept again yet
                client.command("QUIT")
                client.close()

    def test_systemd_is_told_how_it_goes(self, site: Site) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind(str(site.root / "notify"))
            manager.settimeout(PATIENCE)
            os.chmod(site.root / "notify", 0o777)
            environment = (f"NOTIFY_SOCKET={site.root}/notify", "WATCHDOG_USEC=400000")
            address = str(site.root / "lmtp")
            with SocketActivate(logged(site), address=address, environment=environment) as starter:
                client = open_session(starter)
                told: list[str] = []
                while (
                    told.count("WATCHDOG=1") < 3 or "STATUS=0 workers ready, 1 busy, 1 connections served" not in told
                ):
                    told.append(manager.recv(4096).decode())
                client.command("QUIT")
                starter.process.terminate()
                while told[-1] != "STOPPING=1":
                    told.append(manager.recv(4096).decode())
        assert told[0] == "READY=1"

    def test_nothing_is_done_while_nothing_happens(self, site: Site) -> None:
        site.configure(lmtp_prefork="2")
        with pool(site) as starter:
            open_session(starter).command("QUIT")
            wait_until_at_rest(starter.process.pid, 2)
            family = live(starter)
            before = [cpu_ticks(process) for process in family]
            time.sleep(1)
            assert [cpu_ticks(process) for process in family] == before

    def test_workers_leave_when_their_parent_is_killed(self, site: Site) -> None:
        site.configure(lmtp_prefork="2")
        with pool(site, "-T", "0") as starter:
            open_session(starter).command("QUIT")
            wait_for(lambda: len(live(starter)) >= 3, "two workers")
            workers = children(starter.process.pid)
            os.kill(starter.process.pid, signal.SIGKILL)
            wait_for(lambda: not any(exists(worker) for worker in workers), "their end")

    def test_a_killed_worker_hurts_nobody_else(self, site: Site) -> None:
        with pool(site) as starter:
            victim, other = open_session(starter), open_session(starter)
            worker = victim.server()
            for client in victim, other:
                begin(client)
            os.kill(worker, signal.SIGKILL)
            assert rest(victim) == b""
            assert other.command(BODY).startswith("250")
            assert open_session(starter).deliver(b"Subject: x\r\n\r\nbody\r\n", "jane")[0].startswith("250")
            wait_for(lambda: f"worker-died worker={worker} status=-9" in site.log_text(), "the parent to say so")
            assert not exists(worker)
        assert len(site.files("jane")) == 2

    def test_workers_that_die_at_their_start_are_not_started_all_the_time(self, site: Site) -> None:
        site.configure(debug_command=": %s; kill -9 %d")
        with pool(site, "-D") as starter:
            begun = time.monotonic()
            client = starter.connect()
            wait_for(lambda: site.log_text().count("worker-died") >= 3, "the third to die")
            assert time.monotonic() - begun >= 2
            assert greets_not(client)
            assert starter.process.poll() is None
            # It leaves as the changed configuration asks, and the connection is the next one's.
            starter.process.terminate()
            assert starter.process.wait(PATIENCE) == 0

    def test_workers_have_no_descriptors_but_their_own(self, site: Site) -> None:
        helper = site.root / "helper"
        helper.mkdir(mode=0o777)
        helper.chmod(0o777)
        site.configure(debug_command=f": %s; ls /proc/self/fd >{helper}/%d", lmtp_prefork="2")
        with pool(site, "-D") as starter:
            client = open_session(starter)
            wait_for_workers(starter.process.pid, 3)
            worker = client.server()
            own = {
                "socket:[]": 3,  # the connection twice, the listening socket
                "log": 1,
                "/dev/null": 1,
                "pipe:[]": 3,  # of signals both ends, to the parent one
                "anon_inode:[eventpoll]": 1,
                "anon_inode:[eventfd]": 1,  # the count of idle workers
            }

            def has_its_own_only() -> bool:
                names = (name.replace(str(site.log), "log") for name in descriptors(worker).values())
                return Counter(re.sub(r"\d+", "", name) for name in names) == own

            # It may have another open for a moment, such as the file that it reads.
            wait_for(has_its_own_only, f"{worker} to have no others")
            connections = {name for fd, name in descriptors(worker).items() if fd in (0, 1)}
            assert len(connections) == 1
            # 3 is the folder that ls reads.
            assert (helper / str(worker)).read_text().split() == ["0", "1", "2", "3"]
            client.leave()
            # The connection stays open nowhere.
            wait_for(lambda: connections.isdisjoint(descriptors(worker).values()), "the worker to close it")
            for process in [starter.process.pid, *children(starter.process.pid)]:
                assert connections.isdisjoint(descriptors(process).values())

    def test_idle_workers_leave_and_then_the_parent(self, site: Site) -> None:
        with pool(site, "-T", "1") as starter:
            clients = [open_session(starter) for _ in range(3)]
            for client in clients[:2]:
                client.leave()
            wait_for(lambda: children(starter.process.pid) == [clients[2].server()], "the idle ones to leave")
            time.sleep(1.5)
            assert clients[2].command("NOOP").startswith("250")
            begun = time.monotonic()
            clients[2].leave()
            assert starter.process.wait(PATIENCE) == 0
            assert time.monotonic() - begun >= 1
        assert "worker-died" not in site.log_text()

    def test_zero_is_for_ever(self, site: Site) -> None:
        with pool(site, "-T", "0") as starter:
            open_session(starter).command("QUIT")
            time.sleep(1.5)
            assert len(children(starter.process.pid)) == 1


def live(starter: Starter) -> list[int]:
    return [starter.process.pid, *children(starter.process.pid)]


def switches(process: int) -> int:
    """How often it has slept."""
    found = re.search(r"^voluntary_ctxt_switches:\t(\d+)$", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1])


def wait_until_at_rest(parent: int, workers: int) -> None:
    """Returns when there are as many workers, or more, and neither they nor their parent have anything to do."""

    def seen() -> dict[int, tuple[str, int]]:
        return {pid: (state_of(pid), switches(pid)) for pid in (parent, *children(parent))}

    def at_rest() -> bool:
        before = seen()
        time.sleep(0.2)
        return len(before) > workers and {state for state, _ in before.values()} == {"S"} and seen() == before

    wait_for(at_rest, "the workers to wait")


def state_of(process: int) -> str:
    """In the letters of proc(5)."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]


def cpu_ticks(process: int) -> int:
    user, system = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
    return int(user) + int(system)


class TestRestart:
    """inetd(8) and xinetd with "wait", which start the next process when one has left."""

    STARTERS: dict[str, Callable[[list[str], Path], Starter]] = {
        "inetd": lambda command, folder: Inetd(command, wait=True, address=str(folder / "lmtp")),
        "xinetd": lambda command, _: Xinetd(command, wait=True),
    }

    @pytest.mark.parametrize("name", STARTERS)
    def test_no_connection_is_lost_when_the_process_leaves(self, site: Site, name: str) -> None:
        # Each process leaves a second after its last connection; the connections come around that moment.
        failed: list[str] = []
        processes: list[set[str]] = []

        def work(number: int) -> None:
            folder = site.root / str(number)
            folder.mkdir()
            chance = random.Random(number)
            with self.STARTERS[name](command, folder) as starter:
                seen = set()
                for _ in range(6):
                    client = starter.connect()
                    try:
                        greeting = client.reply()
                        client.command("LHLO x")
                        client.command("QUIT")
                    except OSError as error:
                        greeting = [str(error)]
                    client.close()
                    if not greeting[0].startswith("220"):
                        failed.append(f"{number}: {greeting}")
                        return
                    seen |= {str(pid) for pid in starter.children()}
                    time.sleep(chance.uniform(0.98, 1.08))
                processes.append(seen)

        command = logged(site, "-T", "1", "-a")
        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failed == []
        # Some connections were in time for the process that was about to leave, and some were not.
        assert len(processes) == 8
        assert sum(len(seen) for seen in processes) > 8

    @pytest.mark.parametrize("prefork", ["0", "2"])
    def test_the_changed_configuration_is_used_by_the_next_connection(self, site: Site, prefork: str) -> None:
        site.configure(lmtp_prefork=prefork)
        with Inetd(logged(site), wait=True, address=str(site.root / "lmtp")) as starter:
            clients = [open_session(starter) for _ in range(2)]
            for client in clients:
                client.leave()
            time.sleep(0.2)
            [before] = starter.children()
            site.configure(servername="changed.example")
            assert starter.connect().reply() == ["220 changed.example lmtpd 0.4.1 ready"]
            assert before not in starter.children()
            assert not exists(before)

    def test_an_included_file_counts_too(self, site: Site) -> None:
        included = site.root / "more.conf"
        included.write_text("serverinfo: min\n")
        site.configure(**{"@include": str(included)})
        with Inetd(logged(site), wait=True, address=str(site.root / "lmtp")) as starter:
            open_session(starter).command("QUIT")
            included.write_text("serverinfo: off\n")
            assert starter.connect().reply() == ["220 mx.example.com ready"]

    def test_the_changed_program_is_used_by_the_next_connection(self, site: Site) -> None:
        lmtpd = own_copy(site)
        with Inetd(logged(site, lmtpd=str(lmtpd)), wait=True, address=str(site.root / "lmtp")) as starter:
            assert open_session(starter).command("QUIT").startswith("221")
            module = lmtpd.parent / "lmtpd.py"
            module.write_text(module.read_text().replace('__version__ = "0.4.1"', '__version__ = "10.0"'))
            assert starter.connect().reply() == ["220 mx.example.com lmtpd 10.0 ready"]

    def test_a_busy_connection_keeps_its_process_when_the_configuration_changes(self, site: Site) -> None:
        with Inetd(logged(site), wait=True, address=str(site.root / "lmtp")) as starter:
            client = open_session(starter)
            begin(client)
            site.configure(servername="changed.example")
            assert client.command(BODY).startswith("250")
            client.leave()
            assert starter.connect().reply() == ["220 changed.example lmtpd 0.4.1 ready"]

    def test_clients_are_told_when_the_changed_configuration_is_broken(self, site: Site) -> None:
        with Inetd(logged(site), wait=True, address=str(site.root / "lmtp")) as starter:
            open_session(starter).command("QUIT")
            site.configure(lmtp_maxchild="many")
            for _ in range(3):
                assert rest(starter.connect()).startswith(b"421 4.3.0 ")
            site.configure(lmtp_maxchild="5")
            assert starter.connect().line().startswith(b"220 ")


class TestBrokenConfiguration:
    @pytest.mark.parametrize("inetd", [False, True], ids=["LISTEN_FDS", "standard input"])
    def test_all_that_wait_are_told(self, site: Site, inetd: bool) -> None:
        site.configure(lmtp_maxchild="many")
        with SocketActivate(logged(site), address=str(site.root / "lmtp"), inetd=inetd) as starter:
            os.kill(starter.process.pid, signal.SIGSTOP)
            clients = [starter.connect() for _ in range(5)]
            os.kill(starter.process.pid, signal.SIGCONT)
            for client in clients:
                assert rest(client).startswith(b"421 4.3.0 ")
            assert starter.process.wait(PATIENCE) == os.EX_CONFIG
        assert "lmtp_maxchild" in site.log_text()


class Target:
    """A way to run lmtpd for the tests of signals: sessions with it, and the process that is told."""

    def __init__(self, site: Site, starter: Starter | None) -> None:
        self._site, self._starter = site, starter

    def session(self) -> Client:
        client = self._starter.connect() if self._starter else self._site.connect()
        client.hello()
        return client

    def tell(self, number: signal.Signals) -> None:
        self.process.send_signal(number)
        # Two signals at once may become one.
        time.sleep(0.2)

    @property
    def process(self) -> subprocess.Popen[bytes]:
        return self._starter.process if self._starter else self._site.child


@pytest.fixture(params=["one connection", "pool"])
def target(site: Site, request: pytest.FixtureRequest) -> Iterator[Target]:
    if request.param == "pool":
        with pool(site) as starter:
            yield Target(site, starter)
    else:
        yield Target(site, None)


class TestSignals:
    """To the process of a connection, and to the parent of a pool."""

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_term_between_transactions(self, target: Target, number: signal.Signals) -> None:
        client = target.session()
        target.tell(number)
        assert client.line().startswith(GONE.encode())
        assert rest(client) == b""
        assert target.process.wait(PATIENCE) == 0

    def test_term_in_a_transaction(self, site: Site, target: Target) -> None:
        client = target.session()
        begin(client)
        client.send(b"Subject: a subject\r\n")
        target.tell(signal.SIGTERM)
        assert target.process.poll() is None
        client.send(b"\r\nA body.\r\n.\r\n")
        assert client.line().startswith(b"250 2.1.5")
        assert client.line().startswith(GONE.encode())
        assert rest(client) == b""
        assert target.process.wait(PATIENCE) == 0
        [message] = site.messages("jane")
        assert message.endswith(b"\n\nA body.\n")

    def test_term_with_only_mail_said(self, target: Target) -> None:
        client = target.session()
        assert client.command("MAIL FROM:<>").startswith("250")
        target.tell(signal.SIGTERM)
        assert client.command("RSET").startswith("250")
        assert client.line().startswith(GONE.encode())
        assert rest(client) == b""
        assert target.process.wait(PATIENCE) == 0

    def test_a_second_term_leaves_nothing_half_delivered(self, site: Site, target: Target) -> None:
        client = target.session()
        begin(client)
        # Enough to be on disk by now.
        client.send(b"Subject: a subject\r\n\r\n" + b"0123456789\r\n" * 300_000)
        target.tell(signal.SIGTERM)
        begun = time.monotonic()
        target.tell(signal.SIGTERM)
        assert rest(client) == b""
        assert target.process.wait(PATIENCE) == 0
        assert time.monotonic() - begun < 20  # without the second it would have been given 30 seconds
        for kind in "new", "cur", "tmp":
            assert site.files("jane", kind=kind) == []

    def test_a_transaction_gets_its_grace_and_no_more(self, site: Site) -> None:
        grace = 5
        site.figures = {"GRACE": grace}
        # Both at once, to take the time only once.
        with pool(site) as starter:
            targets = Target(site, starter), Target(site, None)
            clients = [target.session() for target in targets]
            for client in clients:
                begin(client)
                client.send(b"Subject: a subject\r\n\r\n" + b"0123456789\r\n" * 300_000)
            begun = time.monotonic()
            for target in targets:
                target.tell(signal.SIGTERM)
            while time.monotonic() < begun + grace - 2:
                for client in clients:
                    client.send(b"more\r\n")
                time.sleep(0.2)
            for target, client in zip(targets, clients):
                assert rest(client) == b""
                assert time.monotonic() >= begun + grace
                assert target.process.wait(PATIENCE) == 0
        for kind in "new", "cur", "tmp":
            assert site.files("jane", kind=kind) == []

    def test_hup_lets_the_connection_go_on(self, site: Site, target: Target) -> None:
        client = target.session()
        target.tell(signal.SIGHUP)
        for _ in range(3):
            assert client.deliver(b"Subject: x\r\n\r\nbody\r\n", "jane")[0].startswith("250")
        assert target.process.poll() is None
        assert client.command("QUIT").startswith("221")
        assert rest(client) == b""
        assert target.process.wait(PATIENCE) == 0
        assert len(site.files("jane")) == 3

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
    def test_a_pool_with_nothing_to_do_leaves(self, site: Site, number: signal.Signals) -> None:
        site.configure(lmtp_prefork="3")
        with pool(site) as starter:
            open_session(starter).command("QUIT")
            wait_for(lambda: len(children(starter.process.pid)) >= 3, "workers")
            workers = children(starter.process.pid)
            starter.process.send_signal(number)
            assert starter.process.wait(PATIENCE) == 0
            assert not any(exists(worker) for worker in workers)
        assert "worker-died" not in site.log_text()

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
    def test_workers_just_started_are_told_too(self, site: Site, number: signal.Signals) -> None:
        site.configure(lmtp_prefork="20")
        site.figures = {"RELOAD_PATIENCE": 30}
        for _ in range(5):
            with pool(site) as starter:
                starter.connect().close()
                wait_for(lambda: children(starter.process.pid), "the first worker")
                begun = time.monotonic()
                starter.process.send_signal(number)
                assert starter.process.wait(PATIENCE) == 0
                assert time.monotonic() - begun < 20

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
    def test_a_worker_that_is_told_leaves_alone(self, site: Site, number: signal.Signals) -> None:
        with pool(site) as starter:
            client, other = open_session(starter), open_session(starter)
            worker = client.server()
            os.kill(worker, number)
            if number == signal.SIGTERM:
                assert client.line().startswith(GONE.encode())
            else:
                assert client.command("QUIT").startswith("221")
            client.close()
            wait_for(lambda: not exists(worker), "the worker to leave")
            assert other.command("NOOP").startswith("250")
            assert open_session(starter).command("NOOP").startswith("250")
            assert "worker-died" not in site.log_text()

    def test_term_is_not_lost_among_connections(self, fast_site: Site) -> None:
        # Whatever the workers are at, what was answered with 250 is stored and nothing else.
        with Inetd(logged(fast_site), wait=True, address=str(fast_site.root / "lmtp")) as starter:
            for _ in range(3):
                load = smtp_source(str(starter.address), "-s", "10", "-m", "100000")
                time.sleep(random.uniform(0.3, 0.6))
                for process in starter.children():
                    os.kill(process, signal.SIGTERM)
                    wait_for(lambda process=process: not exists(process), "the pool to leave")  # type: ignore[misc]
                load.kill()
                load.communicate()
        wait_for(lambda: not fast_site.files("jane", kind="tmp"), "the rest to be cleared away")
        assert fast_site.log_text().count(">delivered ") == len(fast_site.files("jane"))
        log = fast_site.log_text().splitlines()
        assert [line for line in log if ">internal-error " in line or ">traceback " in line] == []


class TestShutdownFile:
    """{configdirectory}/msg/shutdown, by which the administrator stops the mail."""

    def announce(self, site: Site, text: str = "Moving to a new machine\nsecond line\n") -> None:
        folder = site.configdirectory / "msg"
        folder.mkdir()
        (folder / "shutdown").write_text(text)

    @pytest.mark.parametrize(
        "command",
        [
            *("MAIL FROM:<>", "RCPT TO:<jane>", "DATA", "BDAT 0 LAST", "RSET", "VRFY jane", "HELP", "TRACE x"),
            *("AUTH EXTERNAL =", "STARTTLS", "EHLO x"),
        ],
    )
    def test_commands_are_refused(self, site: Site, target: Target, command: str) -> None:
        self.announce(site)
        client = target.session()
        assert client.command("NOOP").startswith("250")
        assert client.command("LHLO again.example").startswith("250")
        assert client.command(command) == "421 4.3.2 Moving to a new machine"
        assert rest(client) == b""

    def test_quit_is_answered(self, site: Site, target: Target) -> None:
        self.announce(site)
        assert target.session().command("QUIT").startswith("221")

    def test_it_counts_in_a_session_too_after_the_transaction(self, site: Site, target: Target) -> None:
        client = target.session()
        assert client.command("MAIL FROM:<>").startswith("250")
        self.announce(site)
        assert client.command("RCPT TO:<jane>").startswith("250")
        assert client.command("DATA").startswith("354")
        client.send(b"Subject: x\r\n\r\nbody\r\n.\r\n")
        assert client.reply()[0].startswith("250 2.1.5")
        assert client.command("MAIL FROM:<>") == "421 4.3.2 Moving to a new machine"
        (site.configdirectory / "msg/shutdown").unlink()
        client = target.session()
        assert client.deliver(b"Subject: x\r\n\r\nbody\r\n", "jane")[0].startswith("250")

    @pytest.mark.parametrize("text", ["", "\n", "é\r\n"])
    def test_odd_texts(self, site: Site, text: str) -> None:
        self.announce(site, text)
        client = site.connect()
        client.hello()
        assert re.fullmatch(r"421 4\.3\.2 [ -~]+", client.command("MAIL FROM:<>"))


class TestDebugCommand:
    """-D: a debugger is there before the first session."""

    @contextmanager
    def debugged(self, site: Site, way: str) -> Iterator[Client]:
        if way == "pool":
            with pool(site, "-D") as starter:
                yield starter.connect()
        else:
            yield site.connect("-D")

    @staticmethod
    def writable(site: Site) -> Path:
        folder = site.root / "debug"
        folder.mkdir()
        site.give(folder)
        return folder

    @pytest.mark.parametrize("way", ["one connection", "pool"])
    def test_strace(self, site: Site, way: str) -> None:
        trace = self.writable(site) / "trace"
        attached = "while grep -q '^TracerPid:[[:space:]]*0$' /proc/$PPID/status; do sleep 0.01; done"
        site.configure(debug_command=f": %s; {program('strace')} -q -s 100 -o {trace} -p %d & {attached}; : %s")
        with self.debugged(site, way) as client:
            client.hello()
            worker = client.server()
            assert client.command("MAIL FROM:<traced@example.com>").startswith("250")
            assert client.command("QUIT").startswith("221")
            client.close()
        text = wait_for(lambda: trace.read_text() if "Bye" in trace.read_text() else "", "strace to write it")
        assert re.search(r'write\(1, "220 mx\.example\.com', text)
        assert "traced@example.com" in text
        log = site.log_text()
        assert f"-p {worker} " in log
        assert ": lmtp" in log
        assert log.index(">debugger ") < log.index(">connected ")
        assert "status=0" in log.partition(">debugger ")[2].splitlines()[0]

    @pytest.mark.parametrize("way", ["one connection", "pool"])
    def test_gdb(self, site: Site, way: str) -> None:
        said = self.writable(site) / "gdb"
        site.configure(debug_command=f"{program('gdb')} -batch -nx -ex 'info inferiors' %s %d >{said} 2>&1; : %s")
        with self.debugged(site, way) as client:
            client.hello()
            worker = client.server()
            assert re.search(rf"process {worker}\b", said.read_text())
            assert client.deliver(b"Subject: x\r\n\r\nbody\r\n", "jane")[0].startswith("250")
        log = site.log_text()
        assert log.index(">debugger ") < log.index(">connected ")

    def test_a_command_that_fails_stops_no_mail(self, site: Site) -> None:
        site.configure(debug_command="exit 7; : %s")
        client = site.connect("-D")
        client.hello()
        assert "status=7" in site.log_text()
        assert client.deliver(b"Subject: x\r\n\r\nbody\r\n", "jane")[0].startswith("250")

    @pytest.mark.parametrize("command", ["%s %d %s %s", "%d", "%s %s", "gdb %x", "%s %n", "%s %", "%5s"])
    def test_wrong_conversions_are_an_error_of_the_configuration(self, site: Site, command: str) -> None:
        site.configure(debug_command=f"true {command}")
        done = site.pipe(b"QUIT\r\n", "-D")
        assert done.returncode == os.EX_CONFIG
        assert done.stdout.startswith(b"421 4.3.0 ")
        assert "debug_command" in site.log_text()

    def test_without_a_command(self, site: Site) -> None:
        assert site.pipe(b"QUIT\r\n", "-D").returncode == os.EX_CONFIG


class Haproxy(Peer):
    """haproxy in TCP mode before lmtpd on a unix socket, with each version of the PROXY header."""

    name = "haproxy"

    def __init__(self, site: Site, backend: str) -> None:
        super().__init__(site.root / "haproxy")
        self.v1, self.v2, self.checked = free_port(), free_port(), free_port()
        self.v2_ipv6 = free_port()
        self._control = str(self.folder / "control")
        self.conf = self.folder / "haproxy.cfg"
        self.conf.write_text(f"""\
global
    maxconn 200
    stats socket {self._control}
defaults
    mode tcp
    timeout connect 10s
    timeout check 10s
    timeout client 30s
    timeout server 30s
listen v1
    bind 127.0.0.1:{self.v1}
    server lmtpd unix@{backend} send-proxy
listen v2
    bind 127.0.0.1:{self.v2}
    bind [::1]:{self.v2_ipv6}
    server lmtpd unix@{backend} send-proxy-v2
listen checked
    bind 127.0.0.1:{self.checked}
    option tcp-check
    tcp-check expect string 220
    server lmtpd unix@{backend} send-proxy-v2 check check-send-proxy inter 200ms
""")

    def start(self) -> None:
        self.run([program("haproxy"), "-db", "-f", str(self.conf)], lambda: os.path.exists(self._control))

    def statistics(self, section: str) -> list[str]:
        """What haproxy knows of its server there."""
        with connect(self._control) as control:
            control.sendall(b"show stat\n")
            said = rest(Client(control)).decode()
        [line] = [line for line in said.splitlines() if line.startswith(f"{section},lmtpd,")]
        return line.split(",")


def from_address(address: str, port: int) -> Client:
    """A connection to haproxy from an address that only the header can tell."""
    host = "::1" if ":" in address else "127.0.0.1"
    client = Client(socket.create_connection((host, port), timeout=PATIENCE, source_address=(address, 0)))
    client.hello()
    return client


class TestHaproxy:
    @pytest.fixture
    def haproxy(self, site: Site) -> Iterator[Haproxy]:
        with pool(site, "-H", "-a") as starter, Haproxy(site, str(starter.address)) as haproxy:
            yield haproxy

    @pytest.mark.parametrize(
        ("version", "address", "name"),
        [
            ("v1", "127.0.0.2", "[127.0.0.2]"),
            ("v2", "127.0.0.3", "[127.0.0.3]"),
            ("v2_ipv6", "::1", "[IPv6:::1]"),
        ],
    )
    def test_the_clients_address_is_seen(
        self, site: Site, haproxy: Haproxy, version: str, address: str, name: str
    ) -> None:
        client = from_address(address, getattr(haproxy, version))
        assert client.deliver(b"Subject: x\r\n\r\nbody\r\n", "jane")[0].startswith("250")
        assert f"({name})".encode() in site.messages("jane")[0]
        assert re.search(rf'>connected session=\S+ peer="?{re.escape(name)}"?$', site.log_text(), re.MULTILINE)

    def test_load(self, site: Site, haproxy: Haproxy) -> None:
        loads = [smtp_source(("127.0.0.1", port), "-s", "5", "-m", "100") for port in (haproxy.v1, haproxy.v2)]
        for load in loads:
            finish(load)
        assert len(site.files("jane")) == 200

    def test_health_checks_are_the_proxys_own(self, site: Site, haproxy: Haproxy) -> None:
        wait_for(lambda: site.log_text().count('peer="unix socket, uid') >= 4, "checks")
        wait_for(lambda: {"UP", "L7OK"} <= set(haproxy.statistics("checked")), "haproxy to believe it")
        client = from_address("127.0.0.4", haproxy.checked)
        assert client.command("QUIT").startswith("221")

    def test_a_client_behind_the_proxy_is_not_trusted_for_the_proxys_socket(self, site: Site) -> None:
        with pool(site, "-H") as starter, Haproxy(site, str(starter.address)) as haproxy:
            for port in haproxy.v1, haproxy.v2:
                assert from_address("127.0.0.2", port).command("MAIL FROM:<>").startswith("430")


SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
IPV4 = socket.inet_aton("192.0.2.1") + socket.inet_aton("192.0.2.2") + bytes([0, 25, 0, 26])
IPV6 = socket.inet_pton(socket.AF_INET6, "2001:db8::1") + socket.inet_pton(socket.AF_INET6, "2001:db8::2") + bytes(4)
UNIX = b"/run/client".ljust(108, b"\0") * 2
TLV = b"\x04\x00\x03abc\x02\x00\x0bexample.com"
LOCAL, PROXY = 0x20, 0x21
NOBODY_ELSE = "unix socket, uid"


def v2(command: int, family: int, address: bytes, length: int | None = None) -> bytes:
    length = len(address) if length is None else length
    return SIGNATURE + bytes([command, family]) + length.to_bytes(2, "big") + address


GOOD_HEADERS = {
    "v1 TCP4": (b"PROXY TCP4 192.0.2.1 192.0.2.2 25 26\r\n", "[192.0.2.1]"),
    "v1 TCP6": (b"PROXY TCP6 2001:db8::1 2001:db8::2 25 26\r\n", "[IPv6:2001:db8::1]"),
    "v1 TCP6 of an IPv4 address": (b"PROXY TCP6 ::ffff:192.0.2.1 ::ffff:192.0.2.2 25 26\r\n", "[192.0.2.1]"),
    "v1 UNKNOWN": (b"PROXY UNKNOWN\r\n", NOBODY_ELSE),
    "v1 UNKNOWN and more": (b"PROXY UNKNOWN ffff::1 ffff::2 65535 65535\r\n", NOBODY_ELSE),
    "v2 TCP4": (v2(PROXY, 0x11, IPV4), "[192.0.2.1]"),
    "v2 TCP6": (v2(PROXY, 0x21, IPV6), "[IPv6:2001:db8::1]"),
    "v2 TCP4 with TLVs": (v2(PROXY, 0x11, IPV4 + TLV), "[192.0.2.1]"),
    "v2 TCP4 with many TLVs": (
        v2(PROXY, 0x11, IPV4 + b"\xea" + (20000).to_bytes(2, "big") + bytes(20000)),
        "[192.0.2.1]",
    ),
    "v2 unix": (v2(PROXY, 0x31, UNIX), "unix socket"),
    "v2 LOCAL": (v2(LOCAL, 0x00, b""), NOBODY_ELSE),
    "v2 LOCAL with an address": (v2(LOCAL, 0x11, IPV4), NOBODY_ELSE),
    "v2 UNSPEC": (v2(PROXY, 0x00, b"\x01\x02"), NOBODY_ELSE),
}
BAD_HEADERS = {
    "none": b"LHLO client.example\r\n",
    "short and none": b"QUIT\r\nQUIT\r\n",
    "v1 lower case": b"proxy TCP4 192.0.2.1 192.0.2.2 25 26\r\n",
    "v1 of another family": b"PROXY UDP4 192.0.2.1 192.0.2.2 25 26\r\n",
    "v1 without ports": b"PROXY TCP4 192.0.2.1 192.0.2.2\r\n",
    "v1 one word too many": b"PROXY TCP4 192.0.2.1 192.0.2.2 25 26 27\r\n",
    "v1 two spaces": b"PROXY TCP4  192.0.2.1 192.0.2.2 25 26\r\n",
    "v1 wrong address": b"PROXY TCP4 192.0.2.256 192.0.2.2 25 26\r\n",
    "v1 wrong destination": b"PROXY TCP4 192.0.2.1 nowhere 25 26\r\n",
    "v1 address of the other family": b"PROXY TCP4 2001:db8::1 2001:db8::2 25 26\r\n",
    "v1 wrong ports": b"PROXY TCP4 192.0.2.1 192.0.2.2 x 26\r\n",
    "v1 ports too large": b"PROXY TCP4 192.0.2.1 192.0.2.2 25 65536\r\n",
    "v1 bytes beyond ASCII": b"PROXY TCP4 192.0.2.\xb2 192.0.2.2 25 26\r\n",
    "v1 NUL": b"PROXY TCP4 192.0.2.1\0 192.0.2.2 25 26\r\n",
    "v1 too long": b"PROXY TCP6 " + b"0" * 120 + b" ::1 25 26\r\n",
    "v1 much too long": b"PROXY TCP6 " + b"0" * 20000 + b"\r\n",
    "v1 only LF": b"PROXY TCP4 192.0.2.1 192.0.2.2 25 26\nLHLO x\n",
    "v1 no more": b"PROXY TCP4 192.0.2.1",
    "v2 other version": v2(0x31, 0x11, IPV4),
    "v2 other command": v2(0x22, 0x11, IPV4),
    "v2 other family": v2(PROXY, 0x41, IPV4),
    "v2 TCP4 too short": v2(PROXY, 0x11, IPV4[:-1]),
    "v2 TCP6 with an address of TCP4": v2(PROXY, 0x21, IPV4),
    "v2 unix too short": v2(PROXY, 0x31, UNIX[:-1]),
    "v2 no more of the address": v2(PROXY, 0x11, IPV4[:4], 12),
    "v2 no more of the header": SIGNATURE + b"\x21",
    "v2 wrong signature": b"\r\n\r\n\0\r\nQUIT\r" + v2(PROXY, 0x11, IPV4)[12:],
    "v2 no more of the signature": SIGNATURE[:6],
    "nothing": b"",
}


class TestProxyHeader:
    """Headers made by hand. The connection is a unix socket, so the proxy itself would be one with a uid."""

    @pytest.mark.parametrize("name", GOOD_HEADERS)
    def test_good(self, site: Site, name: str) -> None:
        header, peer = GOOD_HEADERS[name]
        client = site.connect("-H", "-a")
        client.send(header)
        client.hello()
        assert client.deliver(b"Subject: x\r\n\r\nbody\r\n", "jane")[0].startswith("250")
        [line] = [line for line in site.log_text().splitlines() if ">connected " in line]
        assert re.search(rf'peer="?{re.escape(peer)}', line)
        assert peer.encode() in site.messages("jane")[0].partition(b"\n\n")[0]

    def test_good_with_what_follows_in_one_piece(self, site: Site) -> None:
        for header in b"PROXY TCP4 192.0.2.1 192.0.2.2 25 26\r\n", v2(PROXY, 0x11, IPV4 + TLV):
            client = site.connect("-H")
            client.send(header + b"LHLO x\r\nQUIT\r\n")
            assert re.fullmatch(rb"220 .*\r\n250-(.*\r\n)*221 .*\r\n", rest(client))

    def test_good_octet_by_octet(self, site: Site) -> None:
        for header in b"PROXY TCP4 192.0.2.1 192.0.2.2 25 26\r\n", v2(PROXY, 0x11, IPV4 + TLV):
            client = site.connect("-H")
            for octet in header:
                client.send(bytes([octet]))
                time.sleep(0.002)
            assert client.line().startswith(b"220 ")

    @pytest.mark.parametrize("name", BAD_HEADERS)
    def test_bad_ends_the_connection_without_a_word(self, site: Site, name: str) -> None:
        client = site.connect("-H", "-a")
        client.send(BAD_HEADERS[name])
        client.sock.shutdown(socket.SHUT_WR)
        assert rest(client) == b""
        assert site.child.wait(PATIENCE) == 0
        log = site.log_text()
        assert ">connected " not in log
        assert "connection-refused" in log
        assert "internal-error" not in log

    def test_nothing_is_said_before_the_header(self, site: Site) -> None:
        assert greets_not(site.connect("-H"), 0.5)

    def test_it_must_come_in_time(self, site: Site) -> None:
        site.configure(lmtp_command_timeout="1s")
        begun = time.monotonic()
        silent, slow = site.connect("-H"), site.connect("-H")
        for octet in b"PROXY TCP6 " + b"0" * 90:
            try:
                slow.send(bytes([octet]))
            except OSError:
                break
            time.sleep(0.1)
        assert rest(silent) == rest(slow) == b""
        assert time.monotonic() - begun < 8  # all of it would take 10 seconds
        assert ">connected " not in site.log_text()

    @pytest.mark.parametrize("start", [b"", b"PROXY TCP4 ", SIGNATURE])
    def test_term_while_it_is_waited_for(self, site: Site, start: bytes) -> None:
        client = site.connect("-H")
        client.send(start)
        time.sleep(0.3)
        site.child.terminate()
        assert site.child.wait(5) == 0
        assert rest(client) == b""

    def test_a_bad_header_is_one_use_of_a_worker(self, site: Site) -> None:
        with pool(site, "-H") as starter:
            for _ in range(3):
                client = starter.connect()
                client.send(b"LHLO x\r\nMAIL FROM:<>\r\n")
                assert rest(client) == b""
            client = starter.connect()
            client.send(b"PROXY UNKNOWN\r\n")
            assert client.line().startswith(b"220 ")

    def test_without_h_it_is_a_bad_command(self, site: Site) -> None:
        client = site.connect()
        client.reply()
        assert client.command("PROXY TCP4 192.0.2.1 192.0.2.2 25 26").startswith("500")


class Killed(BaseException):
    """Stands for SIGKILL at a place in the code that no signal from outside can be timed for."""


@pytest.mark.parametrize("message", [AVAILABLE, UNAVAILABLE, CONNECTED])
@pytest.mark.parametrize("place", ["take_one", "WorkerState.note", "os.eventfd_write"])
def test_the_count_of_idle_workers_is_never_too_high(monkeypatch: pytest.MonkeyPatch, place: str, message: int) -> None:
    """Wherever a worker is killed: if it were too high, the worker that takes the last one would call nobody."""
    group = WorkerGroup([], 3, 0)
    states = [group.new_state() for _ in range(3)]
    victim = PoolReporter(os.open(os.devnull, os.O_WRONLY), states[0], group)
    if message == AVAILABLE:
        victim.report(CONNECTED)

    def kill(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(f"lmtpd.{place}", kill)
        with suppress(Killed):
            victim.report(message)
    group.free(states[0])
    assert group.ready() == 2
    told = Path(f"/proc/self/fdinfo/{group.idle}").read_text()
    [count] = re.findall(r"eventfd-count: *(\w+)", told)
    assert int(count, 16) <= 2
    for fd in (group.idle, victim.fd):
        os.close(fd)
