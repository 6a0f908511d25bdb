#!/usr/bin/env python3
"""Has each system call of a delivery fail in every way it can, and looks for what is lost, doubled or wrong.

Usage:
  calls.py [options] [FILE-SYSTEM...]
  calls.py --help

Options:
  --kind KIND     Only this kind of delivery; --help lists them.
  --fault FAULT   Only this fault, as the program reports it: CALL:NUMBER:WHAT. Shows the log, too.
  --every N       Only one of so many faults [default: 1].
  --workers N     Processes that try faults at the same time [default: 2].
  --lmtpd FILE    Another lmtpd.py than the one that is installed.
  --help          Show this text.

Kinds: new-user, folder, three-owners, dovecot, large, large-three-owners, quota, duplicates, script, redirect; by
Postfix's sendmail, sendmail; with records in PostgreSQL, duplicates-postgresql, redirect-postgresql.
File systems: tmpfs, where drafts have names, and ext4, where they have none (both by default), and xfs.

Prints a table, and what is wrong on standard error with the command that shows it again; the exit status is 1 if there
is anything. It needs root, and leaves nothing behind: all is in a mount namespace of its own.
"""

from __future__ import annotations

import collections
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from docopt import docopt

sys.path.append(str(Path(__file__).parent.parent))

from attempts import Result, attempt
from file_systems import mounted
from injection import Call, Fault
from kinds import KINDS
from power_loss import INSIDE, confine, enter
from trials import Trials

FILE_SYSTEMS = ("tmpfs", "ext4")
SEEN = ("250", "4xx", "5xx", "closed")
RULES = ("lost", "doubled", "partial", "visible")
COLUMNS = ("calls", "faults", *SEEN, "again", *RULES, "others", "missed")


class Delivery(NamedTuple):
    """What is tried: a kind of delivery, where, and by which lmtpd.py; None for the installed one."""

    kind: str
    file_system: str
    module: Path | None = None

    def trials(self, folder: Path) -> Trials:
        """The trials of it, on a file system below a folder."""
        return Trials(self.kind, mounted(self.file_system, folder), self.module)

    def finding(self, call: Call, fault: Fault, result: Result) -> str:
        """What is wrong after a fault, and how to see it again."""
        replies = ", ".join(reply[:40] or "no reply" for reply in result.replies)
        lines = [
            f"{sys.argv[0]} --kind {self.kind} --fault {fault} {self.file_system}",
            call.line,
            f"replies: {replies}",
        ]
        return "\n  ".join([*lines, *(f"{rule}: {what}" for rule, what in result.violations)])


class Tally:
    """What has come of many faults. counts: by the columns of the table. findings: what is wrong, for people."""

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.findings: list[str] = []

    def merge(self, other: Tally) -> None:
        """Adds another one."""
        self.counts += other.counts
        self.findings += other.findings

    def add(self, result: Result) -> None:
        """Adds what has come of a fault."""
        broken = {rule if rule in RULES else "others" for rule, _ in result.violations}
        self.counts.update(["faults", result.seen, *broken])
        self.counts["again"] += result.again


def sweep(delivery: Delivery, folder: Path, part: slice) -> Tally:
    """Tries a part of all faults."""
    tally = Tally()
    with delivery.trials(folder) as trials:
        tally.counts["calls"] = len(trials.calls)
        faults = [(each, fault) for each in trials.calls for fault in each.faults]
        for call, fault in faults[part]:
            result = attempt(trials, fault)
            if not result:
                tally.counts["missed"] += 1
                tally.findings.append(f"{delivery.kind} {delivery.file_system}: {fault} has not happened: {call.line}")
                continue
            tally.add(result)
            if result.violations:
                tally.findings.append(delivery.finding(call, fault, result))
    return tally


def show(delivery: Delivery, folder: Path, fault: Fault) -> int:
    """Tries one fault, and prints all about it; the exit status."""
    with delivery.trials(folder) as trials:
        [call] = [call for call in trials.calls if (call.name, call.ordinal) == (fault.name, fault.ordinal)]
        result = attempt(trials, fault)
    if not result:
        print(f"{call.line}\nThe call has not been made.")
        return 1
    print(result.log, delivery.finding(call, fault, result), sep="\n")
    return 1 if result.violations else 0


def main() -> int:
    arguments = docopt(__doc__)
    if INSIDE not in os.environ:
        return confine()
    folder = enter()
    module = Path(arguments["--lmtpd"]).resolve() if arguments["--lmtpd"] else None
    kinds = [arguments["--kind"]] if arguments["--kind"] else list(KINDS)
    deliveries = [Delivery(kind, each, module) for each in arguments["FILE-SYSTEM"] or FILE_SYSTEMS for kind in kinds]
    if arguments["--fault"]:
        return show(deliveries[0], folder, Fault.parse(arguments["--fault"]))
    step, workers = int(arguments["--every"]), int(arguments["--workers"])
    parts = [slice(number * step, None, workers * step) for number in range(workers)]
    print("| delivery | file system |", " | ".join(COLUMNS), "|")
    print("|---|---|" + "--:|" * len(COLUMNS))
    found = 0
    with ProcessPoolExecutor(workers) as pool:
        for delivery in deliveries:
            tally = Tally()
            for part in [pool.submit(sweep, delivery, folder, part) for part in parts]:
                tally.merge(part.result())
            tally.counts["calls"] //= workers
            cells = [str(tally.counts[column]) for column in COLUMNS]
            print(f"| {delivery.kind} | {delivery.file_system} |", " | ".join(cells), "|", flush=True)
            for finding in tally.findings:
                print(finding, file=sys.stderr, flush=True)
            found += len(tally.findings)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
