"""lmtpd's pool as systemd runs it by the units, and its log with the time of each line."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from harness import wait_for

# The environment that sd_listen_fds(3) wants, from a socket that is standard input.
AS_SYSTEMD = 'exec 3<&0 0</dev/null 1>&2; LISTEN_FDS=1 LISTEN_PID=$$ exec "$@"'
# After these it is the next connection that starts it: a clean end, and RestartPreventExitStatus= of the unit.
NO_RESTART = (os.EX_OK, -signal.SIGHUP, -signal.SIGTERM, os.EX_USAGE, os.EX_CONFIG)


class Log:
    """lmtpd's log: lines as they come, each with its time.

    write_end: the descriptor to write to, as to the journal. file: has them, too.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._read_end, self.write_end = os.pipe()
        self.lines: list[tuple[float, str]] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with os.fdopen(self._read_end, encoding="ascii") as log, self._file.open("w", buffering=1) as copy:
            for line in log:
                at, text = time.time(), line.rstrip("\n").partition(">")[2]
                self.lines.append((at, text))
                copy.write(f"{at:.3f} {text}\n")

    def environment(self) -> dict[str, str]:
        """The environment of a process whose standard error is the journal's."""
        status = os.fstat(self.write_end)
        return {**os.environ, "JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}

    def close(self) -> None:
        """Waits for the last line: that is when no process has the log any more."""
        os.close(self.write_end)
        self._thread.join()


class Service:
    """Runs lmtpd's pool on a unix socket as systemd does: when a connection waits, and again after a crash.

    ends: the exit statuses of its processes so far. orphaned: the workers that it has killed because their parent had
    been killed, and when. restart: seconds until the start after a crash.
    """

    def __init__(self, command: list[str], address: str, log: Log, restart: float) -> None:
        self._command, self._log, self._restart = command, log, restart
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(address)
        os.chmod(address, 0o666)
        self._listener.listen(512)
        self._process: subprocess.Popen[bytes] | None = None
        self._groups: list[int] = []
        self._stopping = threading.Event()
        self._keeps_orphans = False
        self.ends: list[int] = []
        self.orphaned: dict[int, float] = {}
        self._thread = threading.Thread(target=self._supervise, daemon=True)
        self._thread.start()

    def _supervise(self) -> None:
        must_start = False
        while not self._stopping.is_set():
            if not must_start and not poll(self._listener):
                continue
            process = self._start()
            status = process.wait()
            self.ends.append(status)
            if status < 0 and not self._keeps_orphans:
                # KillMode=mixed
                for worker in self.members():
                    self.orphaned[worker] = time.time()
                    kill(worker)
            self._keeps_orphans = False
            must_start = status not in NO_RESTART
            if must_start:
                self._stopping.wait(self._restart)

    def _start(self) -> subprocess.Popen[bytes]:
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", AS_SYSTEMD, "sh", *self._command],
            stdin=self._listener.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=self._log.write_end,
            env=self._log.environment(),
            start_new_session=True,
        )
        self._groups.append(self._process.pid)
        return self._process

    def members(self) -> list[int]:
        """Its processes but the parent."""
        parent = self.parent()
        return [process for process, group in processes() if group in self._groups and process != parent]

    def parent(self) -> int:
        """The parent of the pool; 0 if it does not run."""
        process = self._process
        return process.pid if process and process.poll() is None else 0

    def kill_parent(self, keeps_orphans: bool) -> int:
        """Kills the parent; then its workers, too, unless they are to be left alone, as with inetd. Its process id."""
        parent = self.parent()
        if parent:
            self._keeps_orphans = keeps_orphans
            kill(parent)
        return parent

    def signal_parent(self, number: signal.Signals) -> int:
        """Sends a signal to the parent; its process id."""
        parent = self.parent()
        if parent:
            os.kill(parent, number)
        return parent

    def close(self) -> list[int]:
        """Stops it; the processes that are there all the same."""
        self._stopping.set()
        self.signal_parent(signal.SIGTERM)
        self._thread.join()
        self._listener.close()
        with contextlib.suppress(AssertionError):
            wait_for(lambda: not self.members(), "its end", patience=5)
        left = self.members()
        for process in left:
            kill(process)
        return left


def poll(listener: socket.socket) -> bool:
    """Whether a connection waits, perhaps after a moment."""
    return bool(select.select([listener], [], [], 0.1)[0])


def kill(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def processes(name: str = "") -> Iterator[tuple[int, int]]:
    """The processes that live, of a program or all, each with its process group. Source: proc_pid_stat(5)."""
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            head, _, rest = file.read_text(errors="replace").rpartition(")")
            process, _, found = head.partition(" (")
            state, _, group, *_ = rest.split()
            if state != "Z" and name in ("", found):
                yield int(process), int(group)
