"""Faults of system calls, and how strace(1) puts them into a running process."""

from __future__ import annotations

import collections
import re
import subprocess
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

from harness import PATIENCE
from peers import program

# What each call may return, by the manual pages, on a local disk and on NFS. At others, the process is only killed.
NO_ACCESS = ("EIO", "ENOMEM", "ESTALE")
LOOKING = (*NO_ACCESS, "EACCES")
FULL = ("ENOSPC", "EDQUOT")
CHANGING = (*LOOKING, *FULL, "EROFS")
STORING = ("EIO", *FULL, "EROFS", "ESTALE", "EINTR")
NO_DESCRIPTOR = ("EMFILE", "ENFILE", "ENOMEM")
CALLS: dict[Sequence[str], Sequence[str]] = {
    ("openat",): (*CHANGING, "EMFILE", "ENFILE", "EINTR"),
    ("mkdir", "mkdirat", "link", "linkat", "rename", "renameat", "renameat2"): (*CHANGING, "EMLINK"),
    ("unlink", "unlinkat", "rmdir", "truncate"): (*LOOKING, "EROFS"),
    ("chmod", "fchmod", "fchmodat", "chown", "fchown", "fchownat", "utimensat"): (*CHANGING, "EPERM"),
    ("stat", "lstat", "newfstatat", "statx", "access", "faccessat", "faccessat2", "readlink", "readlinkat"): LOOKING,
    ("fstat", "fstatfs"): NO_ACCESS,
    ("getdents64",): LOOKING,
    ("read", "pread64"): (*NO_ACCESS, "EINTR"),
    ("write", "pwrite64", "ftruncate", "fallocate", "fsync", "fdatasync"): STORING,
    ("ioctl",): ("EIO", *FULL, "ENOTTY", "ENOMEM", "EINTR"),
    ("close",): ("EIO", *FULL, "EINTR"),
    ("lseek", "fadvise64"): ("EIO",),
    ("fcntl", "flock"): ("EIO", "EINTR", "ENOLCK", "ENOMEM"),
    ("mmap", "mremap"): ("ENOMEM",),
    ("socket", "pipe2", "dup", "dup3", "epoll_create1", "eventfd2"): NO_DESCRIPTOR,
    ("connect",): ("ECONNREFUSED", "ETIMEDOUT", "ENETUNREACH", "EACCES", "EINTR"),
    ("sendto", "sendmsg", "recvfrom", "recvmsg", "shutdown"): ("EINTR", "ENOMEM", "ECONNRESET"),
    ("setsockopt", "getsockopt", "getsockname", "getpeername"): ("ENOMEM",),
    ("poll", "ppoll", "select", "pselect6", "epoll_wait"): ("EINTR", "ENOMEM"),
    ("epoll_ctl",): ("ENOMEM",),
    ("setresuid", "setresgid", "setgroups"): ("EPERM", "EAGAIN", "ENOMEM"),
    ("clone", "clone3", "vfork", "execve"): ("EAGAIN", "ENOMEM"),
}
# They do nothing that matters before the next call.
IDENTITIES = ("getpid", "getuid", "geteuid", "getgid", "getegid", "getgroups")
HARMLESS = frozenset(
    (*IDENTITIES, "uname", "brk", "munmap", "futex", "rt_sigprocmask", "rt_sigaction", "clock_gettime")
)
ERRORS = {name: errors for names, errors in CALLS.items() for name in names}
# What is no error: the process is killed instead of the call; a write is short, and what follows it succeeds, or fails
# as on a full disk.
KILL, SHORT, CUT = "kill", "short", "cut"

ENTRY = re.compile(r"(?P<name>\w+)\((?P<arguments>.*)")
FIRST_DESCRIPTOR = re.compile(r"\w+\((?:\[\{fd=)?(\d+)<(.?)")
WRITTEN = re.compile(r"\) += (\d+)$")


class Fault(NamedTuple):
    """What happens to a call: the name of an error, KILL, SHORT or CUT. ordinal: see Call."""

    name: str
    ordinal: int
    what: str

    @classmethod
    def parse(cls, text: str) -> Fault:
        """The fault that is written so."""
        name, ordinal, what = text.split(":")
        return cls(name, int(ordinal), what)

    def __str__(self) -> str:
        return f"{self.name}:{self.ordinal}:{self.what}"

    @property
    def is_full(self) -> bool:
        """Whether it says that there is no room on the disk."""
        return self.what in (*FULL, CUT)


class Call(NamedTuple):
    """A system call of a good run. ordinal: its number among the calls of its name. line: as strace writes it.

    may_write: of a call that opens or closes a file, whether the file is open for writing.
    """

    name: str
    ordinal: int
    line: str
    may_write: bool = False

    @property
    def faults(self) -> list[Fault]:
        """All that may happen to it."""
        if self.name in HARMLESS:
            return []
        return [Fault(self.name, self.ordinal, what) for what in (*self._errors(), KILL, *self._short())]

    def _errors(self) -> Sequence[str]:
        """The errors that it may return with these arguments."""
        line, errors = self.line, ERRORS.get(self.name, ())
        if self.name in ("openat", "close") and not self.may_write:
            return [error for error in errors if error not in (*FULL, "EROFS")]
        if "AT_EMPTY_PATH" in line:  # fstat(2)
            return NO_ACCESS
        if "F_DUPFD" in line:
            return NO_DESCRIPTOR
        if (self.name == "fcntl" and "F_SETLK" not in line) or (self.name == "ioctl" and "FIEMAP" not in line):
            return ()
        return errors if "F_UNLCK" not in line else ()

    def _short(self) -> Sequence[str]:
        """How a write to a file may be short."""
        first, written = FIRST_DESCRIPTOR.match(self.line), WRITTEN.search(self.line)
        is_file = first and first[2] == "/" and first[1] != "2"
        return (
            (SHORT, CUT) if self.name in ("write", "pwrite64") and is_file and written and int(written[1]) > 1 else ()
        )


def is_of_client(line: str) -> bool:
    """Whether a call has to do with the connection to the client: standard input and output. line: as in Call."""
    first = FIRST_DESCRIPTOR.match(line)
    return bool(first and first[1] in ("0", "1"))


def hides_answer(line: str) -> bool:
    """Whether a process that fails at this call may not learn what another one has done. line: as in Call.

    It is a call for a socket, but not that which closes it, or for a pipe, over which a child tells that it runs.
    """
    first = FIRST_DESCRIPTOR.match(line)
    return bool(first and (first[2] == "p" or (first[2] == "s" and not line.startswith("close"))))


def calls_in(record: str) -> list[Call]:
    """The calls that strace has recorded."""
    calls = []
    ordinals: collections.Counter[str] = collections.Counter()
    writable: set[str] = set()
    for line in record.splitlines():
        entry = ENTRY.match(line)
        if not entry or entry["name"] == "restart_syscall" or line.endswith("<detached ...>"):
            continue
        name, may_write = entry["name"], False
        ordinals[name] += 1
        if name == "openat":
            may_write = any(flag in line for flag in ("O_RDWR", "O_WRONLY", "O_CREAT"))
            descriptor = line.rpartition(" = ")[2].partition("<")[0]
            (writable.add if may_write else writable.discard)(descriptor)
        elif name == "close":
            may_write = entry["arguments"].partition("<")[0] in writable
        calls.append(Call(name, ordinals[name], line, may_write))
    return calls


class Strace:
    """strace(1) on a running process, which has to be idle. fault: an error or KILL; None for a record of all calls."""

    def __init__(self, pid: int, fault: Fault | None = None) -> None:
        self._fault = fault
        options = []
        if fault:
            what = "signal=KILL:retval=0" if fault.what == KILL else f"error={fault.what}"
            options = ["-e", f"trace={fault.name}", "-e", f"inject={fault.name}:{what}:when={fault.ordinal}"]
        self._output = tempfile.NamedTemporaryFile("r", prefix="lmtpd-test-", errors="replace")  # noqa: SIM115
        command = [program("strace"), "-p", str(pid), "-o", self._output.name, "-y", "-s", "40", *options]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self._process.stderr
        said = self._process.stderr.readline()
        if "attached" not in said:
            self._process.kill()
            self._end()
            raise RuntimeError(said)

    def detach(self) -> str:
        """Leaves the process; what was recorded."""
        self._process.terminate()
        return self._end()

    def met(self) -> str:
        """Waits for the end of the process; the line of the call that has met the fault, "" if none has."""
        assert self._fault
        lines = self._end().splitlines()
        if self._fault.what == KILL:
            return lines[-2] if len(lines) > 1 and lines[-1].startswith("+++ killed by SIGKILL") else ""
        return next((line for line in lines if line.endswith("(INJECTED)")), "")

    def _end(self) -> str:
        self._process.wait(PATIENCE)
        assert self._process.stderr
        self._process.stderr.close()
        with self._output:
            return self._output.read()
