"""Looks for each message of queue_run.py after the faults, and finds out why a folder has one twice."""

from __future__ import annotations

import collections
import re
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from queue_faults import (
    CHANGED_OPTION,
    DAMAGED,
    DATABASE_FAULTS,
    FULL_DISK,
    HANG_UP,
    KILLED_CLIENTS,
    KILLED_PARENT,
    KILLED_PARENT_ONLY,
    KILLED_WORKER,
    MOMENTS,
    NO_DOVECOT,
    NO_USERS,
    OUTAGES,
    RECORDS_LOST,
    SILENT_DOVECOT,
    TERMINATE,
    WRONG_OPTION,
    Fault,
)
from queue_site import SENDER, QueueSite, letter
from sieve import Event

NUMBER = re.compile(rb"^Message-ID: <(\d+)@queue\.example>$", re.MULTILINE)
NAME = re.compile(r"(\d+)\.M(\d+)P(\d+)[^,:]*,S=(\d+),W=(\d+)(?::2,[A-Za-z]*)?")
DRAFT = re.compile(r"\d+\.M\d+P(\d+)")
QUEUED = re.compile(r"/cleanup\[\d+\]: (\w+): message-id=<(\d+)@queue\.example>")
# Not those that were kept back until all were in the queue.
RESULT = re.compile(
    r"^(?!.*\(deferred transport\)$)(\w+ +\d+ [\d:]+) .*?: (\w+): to=<([^>]+)@example\.com>, .*status=(\w+) \((.*)\)$"
)
REPLY = re.compile(r"(\d{3} \d\.\d\.\d+ .*?)(?: \(in reply| SESSIONID|$)")
SLACK = 0.3  # seconds by which times of different logs may differ; Postfix's has whole seconds
AFTERMATH = 5.0  # seconds after a fault in which Postfix may tell what came of it
KILLS = (KILLED_WORKER, KILLED_PARENT, KILLED_PARENT_ONLY)
STOPS = (HANG_UP, TERMINATE, CHANGED_OPTION, WRONG_OPTION)
# The events of lmtpd's log that each kind of fault has. The others are of every day, or are violations.
EXPECTED = {
    "worker-died": KILLS,
    "transaction-cut-off": (*KILLS, KILLED_CLIENTS, *STOPS),
    "duplicate-database-unavailable": DATABASE_FAULTS,
    "record-not-locked": DATABASE_FAULTS,
    "delivery-failed": (FULL_DISK,),
    "spooling-elsewhere": (FULL_DISK,),
    "spooling-failed": (FULL_DISK,),
    "not-delivered": (FULL_DISK,),
    "user-database-unavailable": (NO_DOVECOT, SILENT_DOVECOT, NO_USERS),
    "mailbox-not-accessible": (FULL_DISK,),
    "not-subscribed": (FULL_DISK,),
    "configuration-error": (WRONG_OPTION,),
}
EVERY_DAY = ("delivered", "duplicate", "refused", "disconnected", "files-changed")
# What Postfix is told, in its log, and the faults of which it may come.
REPLIES = (
    ("452 4.3.1", (FULL_DISK,)),
    ("Configuration error", (WRONG_OPTION,)),
    ("Shutting down", STOPS),
    ("lost connection", KILLS),
    ("mail transport unavailable", (KILLED_CLIENTS,)),
    ("Too many commands", (NO_DOVECOT, SILENT_DOVECOT, NO_USERS)),
    ("451 4.3.0", (NO_DOVECOT, SILENT_DOVECOT, NO_USERS)),
)
BY_KILL, BY_DATABASE = "kill", "database"


class Copy(NamedTuple):
    """A message in a folder. at: when it was made, by the clock. process: the worker that made it."""

    at: float
    process: int
    name: str


class Outcome(NamedTuple):
    """What Postfix has logged of a delivery."""

    at: float
    number: int
    recipient: str
    status: str
    text: str


class Verdict:
    """What is wrong, and what each fault has led to. violations: each in a line."""

    def __init__(self, site: QueueSite, happened: Sequence[Fault], count: int, left: Sequence[int]) -> None:
        self._site, self._happened, self._count = site, sorted(happened, key=lambda fault: fault.begin), count
        self.violations: list[str] = []
        self._killed = {
            process: fault.begin for fault in happened if fault.kind in KILLS for process in fault.processes
        }
        self._killed |= site.service.orphaned
        self._events = [(at, Event.of(line)) for at, line in site.journal_lines.lines]
        # When each file was logged.
        self._logged = {event.fields["file"]: at for at, event in self._events if event.name == "delivered"}
        self._outcomes = list(outcomes(site.postfix.log))
        self.lost: collections.Counter[str] = collections.Counter()
        self.doubled: collections.Counter[tuple[str, str]] = collections.Counter()
        self._copies = self._look()
        self._check_messages()
        self._check_log()
        self._check_postfix()
        self._check_rest(left)

    def _violation(self, kind: str, what: object) -> None:
        self.violations.append(f"{kind}: {what}")

    def _look(self) -> dict[tuple[int, str], list[Copy]]:
        """The copies of each message in each folder. What is not whole, or where it does not belong, is a violation."""
        copies: dict[tuple[int, str], list[Copy]] = collections.defaultdict(list)
        for path in sorted(self._site.spool.rglob("*")):
            kind = path.parent.name
            if kind == "tmp" and path.is_file():
                draft = DRAFT.match(path.name)
                if not draft or int(draft[1]) not in self._killed:
                    self._violation("left in tmp", path)
            if kind not in ("new", "cur"):
                continue
            folder = str(path.parent.parent.relative_to(self._site.spool))
            content = path.read_bytes()
            number, name = NUMBER.search(content), NAME.fullmatch(path.name)
            if not number or not name:
                self._violation("not a message of the queue", f"{path}: {content[:500]!r}")
                continue
            sent = letter(int(number[1]))
            sizes = len(content), len(content) + content.count(b"\n")
            if not content.endswith(sent.stored) or sizes != (int(name[4]), int(name[5])):
                self._violation("partial", f"{path}: {len(content)} octets")
            if folder not in [place for places in sent.places.values() for place in places]:
                self._violation("in a wrong folder", path)
            at = int(name[1]) + int(name[2]) / 1e6
            copies[sent.number, folder].append(Copy(at, int(name[3]), path.name))
        return copies

    def _check_messages(self) -> None:
        """Each message must be in each of its folders: once, or more often with a reason."""
        last_sent = {(each.number, each.recipient): each.at for each in self._outcomes if each.status == "sent"}
        for sent in map(letter, range(self._count)):
            for recipient, places in sent.places.items():
                at = last_sent.get((sent.number, recipient))
                if at is None:
                    self._violation("not sent", f"{sent.number} to {recipient}")
                for place in places:
                    copies = sorted(self._copies[sent.number, place])
                    if not copies:
                        self._violation("lost", f"{sent.number} in {place}")
                        self.lost[self._latest(at or 0, self._kinds())] += 1
                    for earlier, later in zip(copies, copies[1:]):
                        self._explain(earlier, later, f"{sent.number} in {place}")

    def _explain(self, earlier: Copy, later: Copy, what: str) -> None:
        """Finds out why a copy was stored although another one was there."""
        logged = self._logged.get(earlier.name)
        kill = self._killed.get(earlier.process)
        reason = ""
        if kill is not None and logged is None and -SLACK < kill - earlier.at < 60:
            reason = BY_KILL
            cause = self._kill_of(earlier.process)
        elif cause := self._lost_record(earlier, later):
            reason = BY_DATABASE
        if reason:
            self.doubled[cause, reason] += 1
        else:
            self._violation("doubled for no reason", f"{what}: {earlier}, logged {logged}; {later}")

    def _kill_of(self, process: int) -> str:
        killed = [fault.kind for fault in self._happened if fault.kind in KILLS and process in fault.processes]
        return killed[0] if killed else KILLED_PARENT

    def _lost_record(self, earlier: Copy, later: Copy) -> str:
        """The fault for which the database did not know of the earlier copy when the later one was stored."""
        for fault in self._happened:
            if fault.kind in RECORDS_LOST:
                # A damaged database is removed at the end.
                end = fault.end if fault.kind == DAMAGED else fault.begin
                if earlier.at - SLACK <= end and fault.begin <= later.at + SLACK:
                    return fault.kind
        wait, pause = self._site.patience + SLACK, self._site.backoff + SLACK
        for at, event in self._events:
            if event.name == "duplicate-database-unavailable" and any(
                at - wait <= copy.at <= at + pause for copy in (earlier, later)
            ):
                return self._latest(at, DATABASE_FAULTS)
        return ""

    def _latest(self, at: float, kinds: Sequence[str]) -> str:
        """The last fault of these kinds that had begun by then."""
        begun = [fault.kind for fault in self._happened if fault.kind in kinds and fault.begin <= at + 1]
        return begun[-1] if begun else kinds[0]

    def _check_log(self) -> None:
        """Each line of lmtpd's log must be one of every day, or come from a fault that has just happened."""
        for at, event in self._events:
            if event.name in EVERY_DAY:
                continue
            kinds = EXPECTED.get(event.name, ())
            wait = self._site.patience + self._site.backoff + AFTERMATH
            if not any(each.kind in kinds and each.begin - SLACK <= at <= each.end + wait for each in self._happened):
                self._violation("in the log", f"{at:.3f} {event}")
            elif event.name == "worker-died" and event.fields["status"] != str(-signal.SIGKILL):
                self._violation("worker", event)
        # SIGHUP and SIGTERM end a process that has not come so far that it handles them.
        allowed = {0, 78, -signal.SIGKILL, -signal.SIGHUP, -signal.SIGTERM}
        for status in set(self._site.service.ends) - allowed:
            self._violation("exit status of the pool", status)

    def _check_postfix(self) -> None:
        for outcome in self._outcomes:
            if outcome.status not in ("sent", "deferred") or re.search(r"\b5\d\d 5\.|undeliverable", outcome.text):
                self._violation("bounced", outcome)
        if queued := len(self._site.postfix.messages()):
            self._violation("left in the queue", queued)
        if returned := list((self._site.spool / SENDER).rglob("new/*")):
            self._violation("returned to the sender", returned)

    def _check_rest(self, left: Sequence[int]) -> None:
        if left:
            self._violation("processes that have not ended", left)
        now = time.time()
        for path in self._site.spool.rglob("*.lock"):
            if not self._killed:
                self._violation("lock", f"{path}, {now - path.stat().st_mtime:.0f} seconds old")

    @staticmethod
    def _kinds() -> list[str]:
        return [*OUTAGES, *MOMENTS]

    def _said(self) -> dict[str, collections.Counter[str]]:
        """What Postfix was told for each kind of fault, and how often."""
        said: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        for outcome in self._outcomes:
            if outcome.status != "deferred" or outcome.text.startswith("delivery temporarily suspended"):
                continue
            text = next((kinds for words, kinds in REPLIES if words in outcome.text), tuple(self._kinds()))
            said[self._latest(outcome.at, text)][short(outcome.text)] += 1
        return said

    def print_table(self, seconds: float) -> None:
        """Prints what has happened, as a table in Markdown."""
        tries = collections.Counter(fault.kind for fault in self._happened)
        said = self._said()
        print("| fault | tries | what Postfix saw, and how often | lost | doubled |\n|---|--:|---|--:|--:|")
        for kind in self._kinds():
            saw = "; ".join(f"{text} ({count})" for text, count in said[kind].most_common(3)) or "nothing"
            doubled = sum(count for (cause, _), count in self.doubled.items() if cause == kind)
            print(f"| {kind} | {tries[kind]} | {saw} | {self.lost[kind]} | {doubled} |")
        reasons: collections.Counter[str] = collections.Counter()
        for (_, reason), count in self.doubled.items():
            reasons[reason] += count
        copies = sum(len(found) for found in self._copies.values())
        kinds = collections.Counter(violation.partition(":")[0] for violation in self.violations)
        found = sum(event.name == "duplicate" for _, event in self._events)
        print(f"""
messages {self._count}, copies {copies}, seconds {seconds:.0f}
lost {kinds["lost"]}, partial {kinds["partial"]}, bounced {kinds["bounced"]}, other violations {self._others(kinds)}
doubled by a kill before the record {reasons[BY_KILL]}, without the database {reasons[BY_DATABASE]}
doubled for no reason {kinds["doubled for no reason"]}, not stored again {found}""")

    @staticmethod
    def _others(kinds: collections.Counter[str]) -> int:
        named = ("lost", "partial", "bounced", "doubled for no reason")
        return sum(count for kind, count in kinds.items() if kind not in named)


def outcomes(log: Path) -> Iterator[Outcome]:
    """What Postfix's log says of each try to deliver a message of the queue."""
    numbers: dict[str, int] = {}
    year = time.localtime().tm_year
    for line in log.read_text(errors="replace").splitlines():
        if queued := QUEUED.search(line):
            numbers[queued[1]] = int(queued[2])
        elif result := RESULT.match(line):
            at = time.mktime(time.strptime(f"{year} {result[1]}", "%Y %b %d %H:%M:%S"))
            yield Outcome(at, numbers.get(result[2], -1), result[3], result[4], result[5])


def short(text: str) -> str:
    """What the client saw, without the names of hosts and sockets."""
    text = re.sub(
        r" (?:with|by|from)? ?\S*mx\.example\.org\S*", "", text.replace("host mx.example.org", "mx.example.org")
    )
    reply = REPLY.search(text)
    return reply[1] if reply else text.split(" -- ")[0]
