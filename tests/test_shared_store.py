"""Several hosts that have one store, on a cluster file system whose servers come and go."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from cluster import Host, MooseFS, Namespaces
from harness import Client, wait_for

from lmtpd import LOCK_STALE

USERS = ("jane", "joe", "ann", "bob", "eve")
NUMBER = re.compile(rb"^Message-ID: <(\d+)@example\.com>$", re.MULTILINE)
NAME = re.compile(r"(\d+\.M\d+P\d+[^.,:]*)\.([^.,:]+),S=(\d+),W=(\d+)(?::2,)?")
CONNECTIONS = 4  # to each host
MESSAGES = 1000  # of each test
TRIES = 100
PATIENT = 300.0  # seconds that a reply may take, as with the mail servers that wait longest


class Letter:
    """A numbered message and its recipients. The same numbers have the same messages."""

    def __init__(self, number: int) -> None:
        dice = random.Random(number)
        self.number = number
        users = dice.sample(USERS, dice.choice((1, 1, 1, 2, 3)))
        self.recipients = [f"{user}+lists" if dice.random() < 0.3 else user for user in users]
        text = dice.randbytes(dice.choice((200, 1000, 2000, 4000, 20_000))).hex()
        lines = "".join(f"{text[start : start + 72]}\n" for start in range(0, len(text), 72))
        self.stored = f"Message-ID: <{number}@example.com>\n\n{lines}".encode()

    @property
    def sent(self) -> bytes:
        return self.stored.replace(b"\n", b"\r\n")


class Queue:
    """Delivers letters as a mail server with a queue does: what has been deferred is tried again."""

    def __init__(self, letters: list[Letter], connections: int, wait: float = 0.2) -> None:
        self.letters = letters
        self._left = iter(letters)
        self._lock = threading.Lock()
        self._wait = wait
        self._connections = connections
        self._turns = threading.Semaphore(connections)
        self.deferred: Counter[str] = Counter()
        self.times: list[float] = []
        self.done = 0

    def _next(self) -> Letter | None:
        with self._lock:
            return next(self._left, None)

    def deliver(self, client: Client) -> None:
        """Delivers letters over this connection until none is left."""
        client.hello()
        client.sock.settimeout(PATIENT)
        while letter := self._next():
            with self._turns:
                began = time.monotonic()
                self._deliver(client, letter)
            with self._lock:
                self.done += 1
                self.times.append(time.monotonic() - began)
        client.leave()

    def _deliver(self, client: Client, letter: Letter) -> None:
        recipients = letter.recipients
        for _ in range(TRIES):
            replies = client.deliver(letter.sent, *recipients)
            refused = [reply for reply in replies if not reply.startswith("250")]
            assert all(reply.startswith("4") for reply in refused), refused
            self.deferred.update(refused)
            recipients = [recipient for recipient, reply in zip(recipients, replies) if not reply.startswith("250")]
            if not recipients:
                return
            time.sleep(self._wait)
        raise AssertionError(f"{letter.number} is still deferred for {recipients}")

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No message is on its way during the "with" block; the connections are open."""
        for _ in range(self._connections):
            self._turns.acquire()
        try:
            yield
        finally:
            self._turns.release(self._connections)


@pytest.fixture
def cluster() -> Iterator[MooseFS]:
    """With the settings with which what has been answered survives the loss of a server."""
    with MooseFS(master="CHANGELOG_SAVE_MODE = 2\n", chunk_server="HDD_FSYNC_BEFORE_CLOSE = 1\n") as cluster:
        yield cluster


def two_hosts(cluster: MooseFS, **options: str) -> tuple[Host, Host]:
    """Hosts that deliver to the same users, all of whom have a quota."""
    hosts = cluster.host("one"), cluster.host("two")
    for host in hosts:
        host.configure(lmtp_detail_create="yes", lmtp_prefork=str(CONNECTIONS), **options)
    hosts[0].add_user(*USERS)
    for user in USERS:
        quota = hosts[0].spool / user / "maildirsize"
        quota.write_text("100000000000S\n0 0\n")
        hosts[0].give(quota)
    return hosts


def clients_of(hosts: Sequence[Host]) -> list[Client]:
    """Connections to all of them."""
    addresses = [host.serve() for host in hosts]
    return [host.connect_to(address) for host, address in zip(hosts, addresses) for _ in range(CONNECTIONS)]


def faults(spool: Path, letters: list[Letter]) -> list[str]:
    """What is wrong with a store in which these letters, and no others, must be once."""
    found: Counter[tuple[int, str]] = Counter()
    names: Counter[str] = Counter()
    wrong = []
    by_number = {letter.number: letter for letter in letters}
    for path in [path for kind in ("new", "cur") for path in spool.glob(f"*/**/{kind}/*")]:
        content = path.read_bytes()
        number, name = NUMBER.search(content), NAME.fullmatch(path.name)
        letter = by_number.get(int(number[1])) if number else None
        if not letter or not name or not content.endswith(letter.stored) or int(name[3]) != len(content):
            wrong.append(f"{path} is not a letter: {content[:500]!r}")
            continue
        user, *folder = path.parent.parent.relative_to(spool).parts
        found[letter.number, "+".join([user, *(part[1:] for part in folder)])] += 1
        names[f"{user}: {name[1]}.{name[2]}"] += 1
    expected = {(letter.number, recipient) for letter in letters for recipient in letter.recipients}
    wrong += [f"{copy} is lost" for copy in expected - set(found)]
    wrong += [f"{copy} is there {count} times" for copy, count in found.items() if count > 1]
    wrong += [f"{copy} is too much" for copy in set(found) - expected]
    wrong += [f"{name} is the name of {count}" for name, count in names.items() if count > 1]
    return wrong


def kill_a_chunk_server(cluster: MooseFS, queue: Queue) -> None:
    """Kills one and starts it again when the other has gone on alone."""
    [server, _] = cluster.chunk_servers
    server.kill()
    seen = queue.done
    wait_for(lambda: queue.done > seen + MESSAGES // 5, "deliveries with one chunk server", patience=PATIENT)
    server.start()


def kill_the_master(cluster: MooseFS, queue: Queue) -> None:
    """Kills it, so that no server is left that knows the names of files, and starts it again while mail comes.

    MooseFS locks a file for two minutes if one of the hosts is writing to it at that moment. That is too long here.
    """
    with queue.paused():
        cluster.master.kill()
    cluster.master.start()


@pytest.mark.parametrize("disturb", [kill_a_chunk_server, kill_the_master])
def test_nothing_is_lost_when_a_server_of_the_store_dies(
    cluster: MooseFS, disturb: Callable[[MooseFS, Queue], None]
) -> None:
    """Each message is there once, though two hosts whose processes have the same ids deliver to the same users."""
    hosts = two_hosts(cluster)
    queue = Queue([Letter(number) for number in range(MESSAGES)], CONNECTIONS * len(hosts))
    clients = clients_of(hosts)
    with ThreadPoolExecutor(len(clients)) as threads:
        deliveries = [threads.submit(queue.deliver, client) for client in clients]
        wait_for(lambda: queue.done > MESSAGES // 4, "deliveries", patience=PATIENT)
        disturb(cluster, queue)
        for delivery in deliveries:
            delivery.result()
    for host in hosts:
        assert not faults(host.spool, queue.letters)
        assert not list(host.spool.glob("**/tmp/*"))


def test_two_hosts_lose_no_message_from_the_quota(cluster: MooseFS) -> None:
    """One counts and replaces maildirsize while the other appends. A message may be counted twice, but not never."""
    hosts = two_hosts(cluster)
    for host in hosts:
        host.figures = {"QUOTA_FILE_LIMIT": 300}  # so that it is soon too long, and replaced
    queue = Queue([Letter(number) for number in range(MESSAGES // 2)], CONNECTIONS * len(hosts))
    clients = clients_of(hosts)
    with ThreadPoolExecutor(len(clients)) as threads:
        for _ in threads.map(queue.deliver, clients):
            pass
    for user in USERS:
        lines = (hosts[0].spool / user / "maildirsize").read_text().splitlines()[1:]
        sizes = [int(name[3]) for name in names_of(hosts[0].spool / user)]
        assert sum(int(line.split()[0]) for line in lines) >= sum(sizes)
        assert sum(int(line.split()[1]) for line in lines) >= len(sizes)


def names_of(maildir: Path) -> list[re.Match[str]]:
    """The names of the messages in all folders."""
    names = [NAME.fullmatch(path.name) for kind in ("new", "cur") for path in maildir.glob(f"**/{kind}/*")]
    return [name for name in names if name]


class LockHolder:
    """A process on a host of that name that holds Dovecot's lock of a folder until it is told to give it back."""

    PROGRAM = """\
import os, sys
from lmtpd import DovecotLock, Directory, Identity
with DovecotLock(Directory(sys.argv[1], Identity.of_process()), "", "dovecot-uidlist.lock", 5):
    print(os.getpid(), flush=True)
    sys.stdin.readline()
"""

    def __init__(self, host: str, folder: Path) -> None:
        self._namespaces = Namespaces("--uts", prepare=f"hostname {host}")
        command = self._namespaces.inside(sys.executable, "-c", self.PROGRAM, str(folder))
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout
        self.pid = int(self._process.stdout.readline())

    def give_back(self) -> None:
        self._process.communicate("\n", timeout=PATIENT)
        assert self._process.returncode == 0

    def close(self) -> None:
        self._namespaces.close()
        self._process.communicate()


def test_a_host_does_not_remove_the_lock_of_another(tmp_path: Path) -> None:
    """One has held it for too long, the other has taken it from there, and both processes have the same id."""
    lock = tmp_path / "dovecot-uidlist.lock"
    with ExitStack() as stack:
        first = LockHolder("one", tmp_path)
        stack.callback(first.close)
        long_ago = time.time() - LOCK_STALE - 10
        os.utime(lock, (long_ago, long_ago))
        second = LockHolder("two", tmp_path)
        stack.callback(second.close)
        assert first.pid == second.pid
        assert lock.read_text() == f"{second.pid}:two"
        first.give_back()
        assert lock.read_text() == f"{second.pid}:two"
        second.give_back()
        assert not lock.exists()


def test_an_sqlite_database_on_the_shared_store_is_refused(cluster: MooseFS) -> None:
    """Hosts would damage it. On a local disk, each has its own."""
    host = cluster.host("one")
    host.add_user("jane")
    host.configure(duplicatesuppression="yes", duplicate_db_path=f"{host.mountpoint}/spool/deliver.db")
    assert host.pipe(b"").stdout == b"421 4.3.0 Configuration error, see the log\r\n"
    said = subprocess.run(host.command("--check"), stdout=subprocess.PIPE, text=True, check=False)
    assert said.returncode == os.EX_CONFIG
    for text in (host.log_text(), said.stdout):
        assert f"{host.mountpoint}/spool/deliver.db would be on a file system of type fuse" in text
        assert "duplicate_db: sql" in text
    assert not (host.spool / "deliver.db").exists()
    host.configure(duplicate_db_path=None)
    assert subprocess.run(host.command("--check"), stdout=subprocess.PIPE, check=False).returncode == os.EX_OK
