"""More clients at once than a pool has workers, or memory: they wait or come again, and nothing is lost."""

from __future__ import annotations

import collections
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from harness import Client, Site, connect, wait_for
from service import Log, Service

CLIENTS = 500
TRIES = 200
WORKERS = 8
MEBIBYTE = 1 << 20
PATIENCE = 120.0
# Into the control group before lmtpd starts.
ENTER = 'echo $$ >"$1"; shift; exec "$@"'


class MemoryGroup:
    """A control group whose processes together get no more memory than that many octets. Source: cgroups(7)."""

    def __init__(self, limit: int) -> None:
        hierarchies = dict(re.findall(r"^\d+:([^:\n]*):(.*)$", Path("/proc/self/cgroup").read_text(), re.MULTILINE))
        if "memory" in hierarchies:  # version 1
            self.path = Path(f"/sys/fs/cgroup/memory{hierarchies['memory']}", f"lmtpd-test-{time.time_ns()}")
            self._events, settings = "memory.oom_control", {"memory.limit_in_bytes": limit, "memory.swappiness": 0}
        else:
            top = Path("/sys/fs/cgroup")
            (top / "cgroup.subtree_control").write_text("+memory")
            self.path = top / f"lmtpd-test-{time.time_ns()}"
            self._events, settings = "memory.events", {"memory.max": limit, "memory.swap.max": 0}
        self.path.mkdir()
        for name, value in settings.items():
            if name != "memory.swap.max" or (self.path / name).exists():  # it is not there if the host has no swap
                (self.path / name).write_text(str(value))

    def command(self, command: list[str]) -> list[str]:
        """A command that runs in the group."""
        return ["/bin/sh", "-c", ENTER, "sh", str(self.path / "cgroup.procs"), *command]

    def killed(self) -> int:
        """How many processes the kernel has killed because there was no memory."""
        found = re.search(r"^oom_kill (\d+)$", (self.path / self._events).read_text(), re.MULTILINE)
        assert found
        return int(found[1])

    def close(self) -> None:
        wait_for(lambda: not (self.path / "cgroup.procs").read_text(), "the group to be empty")
        self.path.rmdir()


class Crowd:
    """Clients that all are connected before the first of them says a word. seen: their replies, "" for a lost one."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._together = threading.Barrier(CLIENTS)
        self.seen: collections.Counter[str] = collections.Counter()

    def run(self) -> None:
        """Each delivers one message, and tries again while that fails for now."""
        with ThreadPoolExecutor(CLIENTS) as threads:
            for _ in threads.map(self._deliver, range(CLIENTS)):
                pass

    def _deliver(self, number: int) -> None:
        for attempt in range(TRIES):
            sock = connect(self._address)
            if not attempt:
                self._together.wait(PATIENCE)
            reply = self._try(Client(sock), number)
            self.seen[reply[:9]] += 1
            if reply.startswith("250 "):
                return
            assert not reply or reply.startswith("4"), reply
            time.sleep(0.1)
        raise AssertionError(f"{number} was not delivered")

    def _try(self, client: Client, number: int) -> str:
        """The reply to the message, or an earlier one that is no good; "" if the connection is lost."""
        try:
            client.sock.settimeout(PATIENCE)
            for command in ("", "LHLO client.example", "MAIL FROM:<>", f"RCPT TO:<user{number % 10}>", "DATA"):
                reply = client.command(command) if command else "".join(client.reply()[-1:])
                if reply[:1] not in ("2", "3"):
                    return reply
            client.send(message(number) + b".\r\n")
            return "".join(client.reply()[-1:])
        except OSError:
            return ""
        finally:
            client.close()


def message(number: int) -> bytes:
    return f"Message-ID: <{number}@load.example>\r\n\r\n".encode() + b"A line of text.\r\n" * (number % 50 + 1)


def stored(site: Site) -> collections.Counter[int]:
    """How often each message is there, each of them whole."""
    found: collections.Counter[int] = collections.Counter()
    for path in site.stored():
        content = path.read_bytes()
        [number] = map(int, re.findall(rb"^Message-ID: <(\d+)@load\.example>$", content, re.MULTILINE))
        assert content.endswith(message(number).replace(b"\r\n", b"\n"))
        assert path.parent.parent.name == f"user{number % 10}"
        found[number] += 1
    return found


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    site.add_user(*(f"user{number}" for number in range(10)))
    yield site
    site.close()


def test_clients_wait_while_all_workers_are_busy(site: Site) -> None:
    """Each is served in its turn, and never by more workers than lmtp_maxchild says."""
    site.configure(lmtp_maxchild=str(WORKERS))
    log = Log(site.log)
    service = Service(site.command(), str(site.root / "lmtp"), log, restart=1)
    most = 0
    try:
        crowd = Crowd(str(site.root / "lmtp"))
        thread = threading.Thread(target=crowd.run)
        thread.start()
        while thread.is_alive():
            most = max(most, len(service.members()))
            thread.join(0.05)
    finally:
        left = service.close()
        log.close()
    assert crowd.seen == {"250 2.1.5": CLIENTS}
    assert stored(site) == dict.fromkeys(range(CLIENTS), 1)
    assert 1 < most <= WORKERS
    assert (left, service.ends) == ([], [0])


def test_nothing_is_lost_when_the_kernel_kills_for_lack_of_memory(site: Site) -> None:
    """Clients lose their connections, or wait until the pool is there again, and send their messages again."""
    site.configure(lmtp_maxchild="200")
    group = MemoryGroup(80 * MEBIBYTE)
    log = Log(site.log)
    service = Service(group.command(site.command()), str(site.root / "lmtp"), log, restart=0.5)
    try:
        crowd = Crowd(str(site.root / "lmtp"))
        crowd.run()
    finally:
        left = service.close()
        log.close()
        killed = group.killed()
        group.close()
    assert killed
    assert crowd.seen["250 2.1.5"] == CLIENTS
    assert set(stored(site)) == set(range(CLIENTS))
    assert not left
    assert " traceback " not in site.log_text()
