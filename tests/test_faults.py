"""No fault of a system call loses, doubles or breaks a message. How this is tested is in faults/README.md."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from file_systems import mounted

TOP = Path(__file__).parent.parent
sys.path.append(str(TOP / "tests/faults"))

from attempts import attempt  # noqa: E402
from injection import CUT, KILL, SHORT  # noqa: E402
from kinds import KINDS, POSTGRESQL  # noqa: E402
from trials import Trials  # noqa: E402

SHARED = "LMTPD_TEST_SHARED"
TRIES = 40  # of each kind, on each file system
FILE_SYSTEMS = ("tmpfs", "ext4")
# With records on a server, the file system makes no difference; many faults make libpq wait for seconds.
DELIVERIES = [(name, place) for place in FILE_SYSTEMS for name, kind in KINDS.items() if kind.records != POSTGRESQL]
DELIVERIES.append(("duplicates-postgresql", "tmpfs"))


def folder_on(file_system: str) -> Path:
    return mounted(file_system, Path(os.environ[SHARED]))


@pytest.mark.parametrize(("kind", "file_system"), DELIVERIES)
def test_faults_of_system_calls(kind: str, file_system: str) -> None:
    """A sample of those that faults/calls.py tries, from the first call to the last."""
    wrong = []
    with Trials(kind, folder_on(file_system)) as trials:
        faults = [(call, fault) for call in trials.calls for fault in call.faults]
        sample = faults[:: len(faults) // TRIES]
        for call, fault in sample:
            result = attempt(trials, fault)
            if result and result.violations:
                wrong.append(f"--kind {kind} --fault {fault} {file_system}\n{call.line}\n{result.violations}")
    assert not wrong, "\n".join(wrong)
    assert len(sample) >= TRIES


@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if not kind.has_sendmail])
def test_a_worker_has_been_given_all_modules(kind: str) -> None:
    """The parent of a pool has loaded them, so that no fault of the system can keep one out, and mail comes sooner.

    Those that start sendmail take more than a megabyte, and most workers never send any mail.
    """
    with Trials(kind, folder_on("tmpfs")) as trials:
        lines = [call.line for call in trials.calls]
    assert lines
    assert [line for line in lines if line.startswith("openat") and re.search(r"\.(py|pyc|so)\b", line)] == []


class Defect(NamedTuple):
    """A change of lmtpd.py, and faults that have to show it: in this kind of delivery, of this call, what happens."""

    old: str
    new: str
    kind: str
    call: str
    what: str
    rule: str


DEFECTS = {
    "rest of a short write": Defect("data = data[written:]", 'data = b""', "folder", "write", SHORT, "partial"),
    "end of a full disk": Defect("data = data[written:]", 'data = b""', "large", "write", CUT, "partial"),
    "copy that is not taken back": Defect(
        "os.unlink(self.name, dir_fd=self._directory)", "pass", "large", "fsync", "EIO", "visible"
    ),
    "copy that is not stored": Defect(
        "delivery.fail(reply_to(error, self._config, placement.key), placement)\n                del",
        "del",
        "large",
        "openat",
        "EMFILE",
        "lost",
    ),
    "draft that stays": Defect(
        "                    os.unlink(self._name, dir_fd=self._directory)",
        "                    pass",
        "folder",
        "fsync",
        "EIO",
        "left behind",
    ),
    "reply": Defect("full = error.errno in (", "full = error.errno not in (", "large", "fsync", "ENOSPC", "reply"),
    "record of a copy that is not stored": Defect(
        "stored = [placement.key for placement in placements if placement.is_stored]",
        "stored = [placement.key for placement in placements]",
        "duplicates",
        "fsync",
        "EIO",
        "lost",
    ),
    "mail recorded too early": Defect(
        "self._submission.send(message,",
        "self._records.add(mailbox, records); self._submission.send(message,",
        "redirect",
        "sendto",
        KILL,
        "sent",
    ),
    "group that cannot be looked up": Defect(
        'check_look_up("getgrnam_r", group)', "pass", "new-user", "openat", "EIO", "reply"
    ),
    "mail that has been taken, and is sent again": Defect(
        "except OSError as error:  # perhaps the server has taken the message",
        "except ZeroDivisionError as error:",
        "redirect",
        "close",
        "EIO",
        "doubled",
    ),
    "quota that is not counted": Defect(
        "        except OSError:\n            self._invalidate()\n            raise",
        "        except OSError:\n            raise",
        "quota",
        "openat",
        "EIO",
        "quota",
    ),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_found(tmp_path: Path, name: str) -> None:
    """So the sweep looks at what it says it looks at."""
    defect = DEFECTS[name]
    source = (TOP / "lmtpd.py").read_text()
    assert defect.old in source
    (tmp_path / "lmtpd.py").write_text(source.replace(defect.old, defect.new))
    with Trials(defect.kind, folder_on("tmpfs"), tmp_path / "lmtpd.py") as trials:
        faults = [fault for call in trials.calls for fault in call.faults]
        chosen = [fault for fault in faults if (fault.name, fault.what) == (defect.call, defect.what)]
        results = [attempt(trials, fault) for fault in chosen]
    assert defect.rule in {rule for result in results if result for rule, _ in result.violations}


def test_the_program() -> None:
    """It prints a table, and ends with status 0 if nothing is wrong. With a fault, it prints all about that."""
    place = Path(os.environ[SHARED], "calls")
    place.mkdir()
    command = [sys.executable, str(TOP / "tests/faults/calls.py"), "--kind=large", "tmpfs"]

    def run(*options: str) -> str:
        environment = {**os.environ, "TMPDIR": str(place)}
        done = subprocess.run([*command, *options], capture_output=True, text=True, env=environment)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    head, _, row = [[cell.strip() for cell in line.split("|")[1:-1]] for line in run("--every=50").splitlines()]
    cells = dict(zip(head, row))
    assert (cells["delivery"], cells["file system"]) == ("large", "tmpfs")
    assert int(cells["faults"]) == sum(int(cells[seen]) for seen in ("250", "4xx", "5xx", "closed")) > 0
    said = run("--fault=fsync:1:EDQUOT")
    assert "Disk quota exceeded" in said
    assert re.search(r"^  replies: 452 4\.3\.1 .*, 452 4\.3\.1 ", said, re.MULTILINE)
    place.rmdir()  # nothing is left in it
