"""Writes of a running process that are short, by ptrace(2).

strace(1) can only say that a write was short, while the kernel writes nothing. Here the kernel is told to write less.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import struct
import threading
from typing import NamedTuple

from harness import PATIENCE
from injection import CUT, SHORT, Fault

# <sys/ptrace.h>, <elf.h>, <linux/wait.h>
PTRACE_DETACH, PTRACE_SYSCALL, PTRACE_GETREGSET, PTRACE_SETREGSET = 17, 24, 0x4204, 0x4205
PTRACE_SEIZE, PTRACE_INTERRUPT, PTRACE_GET_SYSCALL_INFO = 0x4206, 0x4207, 0x420E
PTRACE_O_TRACESYSGOOD = 1
NT_PRSTATUS = 1
ENTRY, EXIT = 1, 2
SYSCALL_STOP = signal.SIGTRAP | 0x80
INFO = struct.Struct("=B23xQ6Q")  # whether the call begins or ends, its number and arguments
WAIT_FOR_ALL = 0x40000000

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
LIBC.ptrace.restype = ctypes.c_long


class Machine(NamedTuple):
    """The numbers of calls, and the places of registers: of the first argument, of the third, and of the result."""

    numbers: dict[str, int]
    first: int
    size: int
    result: int


MACHINES = {
    "x86_64": Machine({"write": 1, "pwrite64": 18}, 14, 12, 10),
    "aarch64": Machine({"write": 64, "pwrite64": 68}, 0, 2, 0),
}


class Octets(ctypes.Structure):
    """struct iovec."""

    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))


def ptrace(request: int, pid: int, address: int = 0, data: int = 0) -> None:
    """ptrace(2). Raises OSError."""
    if LIBC.ptrace(request, pid, address, data) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), f"ptrace {request:x}")


def set_register(pid: int, register: int, value: int) -> None:
    """Changes a register of a process that has stopped."""
    values = (ctypes.c_long * 64)()
    octets = Octets(ctypes.addressof(values), ctypes.sizeof(values))
    ptrace(PTRACE_GETREGSET, pid, NT_PRSTATUS, ctypes.addressof(octets))
    values[register] = value
    ptrace(PTRACE_SETREGSET, pid, NT_PRSTATUS, ctypes.addressof(octets))


class ShortWrite:
    """Lets a running process, which has to be idle, write half of what it wants to write, once.

    With CUT, the next thing that it writes to the same file fails.
    """

    def __init__(self, pid: int, fault: Fault) -> None:
        self._pid, self._fault = pid, fault
        self._machine = MACHINES[os.uname().machine]
        self._count, self._file, self._happened = 0, -1, False
        # A register to restore at the end of the call, and the error that the call has to return.
        self._changed: tuple[int, int, int] | None = None
        self._error: Exception | None = None
        self._begun = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self._begun.wait(PATIENCE)

    def met(self) -> str:
        """Waits for the end of the process; the name of the call that has met the fault, "" if none has."""
        self._thread.join(PATIENCE)
        if self._error:
            raise self._error
        return self._fault.name if self._happened else ""

    def _run(self) -> None:
        # Only this thread may trace the process.
        try:
            ptrace(PTRACE_SEIZE, self._pid, 0, PTRACE_O_TRACESYSGOOD)
            ptrace(PTRACE_INTERRUPT, self._pid)
            while self._follow():
                self._begun.set()
        except Exception as error:
            self._error = error
        finally:
            self._begun.set()

    def _follow(self) -> bool:
        """Waits for a stop, and lets the process go on; whether it is still of interest."""
        _, status = os.waitpid(self._pid, WAIT_FOR_ALL)
        if not os.WIFSTOPPED(status):
            return False
        stop = os.WSTOPSIG(status)
        if stop == SYSCALL_STOP:
            self._on_call()
            if self._happened and not self._changed and (self._fault.what == SHORT or self._file < 0):
                ptrace(PTRACE_DETACH, self._pid)
                return False
        # An event of ptrace is no signal that the process has to get.
        ptrace(PTRACE_SYSCALL, self._pid, 0, 0 if stop == SYSCALL_STOP or status >> 16 else stop)
        return True

    def _on_call(self) -> None:
        info = ctypes.create_string_buffer(128)
        ptrace(PTRACE_GET_SYSCALL_INFO, self._pid, len(info), ctypes.addressof(info))
        kind, number, first, _, size, *_ = INFO.unpack_from(info)
        machine = self._machine
        if kind == EXIT and self._changed:
            register, value, error = self._changed
            set_register(self._pid, register, value)
            if error:
                set_register(self._pid, machine.result, -error)
            self._changed = None
        elif kind == ENTRY and number in machine.numbers.values():
            is_alike = number == machine.numbers[self._fault.name]
            self._count += is_alike
            if is_alike and self._count == self._fault.ordinal and not self._happened:
                self._happened, self._file = True, first
                self._change(machine.size, size, size // 2)
            elif self._fault.what == CUT and first == self._file:
                self._file = -1
                self._change(machine.first, first, -1, errno.ENOSPC)

    def _change(self, register: int, old: int, new: int, error: int = 0) -> None:
        set_register(self._pid, register, new)
        self._changed = register, old, error
