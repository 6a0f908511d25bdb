"""What a fault in a delivery does to it, to the same delivery when it is tried again, and to the next one."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from injection import CUT, KILL, SHORT, Fault, Strace, hides_answer, is_of_client
from kinds import FIRST, NEXT, SENDER, Store
from short_writes import ShortWrite
from trials import BROKEN, Session, Trials

TRIES = 5  # a call may have another number if what comes over a socket comes in other pieces


class Result(NamedTuple):
    """What has come of a fault. replies: the last one for each recipient. log: of lmtpd.

    violations: each the name of a rule, and what breaks it. again: the copies and mails that a second try has added,
    which is as documented.
    """

    replies: Sequence[str]
    violations: Sequence[tuple[str, str]]
    again: int
    log: str

    @property
    def seen(self) -> str:
        """What the client has seen, at worst."""
        codes = {reply[:3] for reply in self.replies}
        if "" in codes:
            return "closed"
        return "250" if codes == {"250"} else f"{max(codes)[0]}xx"


class Missed(Exception):
    """The call has not been made."""


def attempt(trials: Trials, fault: Fault) -> Result | None:
    """Tries a fault. None if the call is not made."""
    for _ in range(TRIES):
        try:
            return Attempt(trials, fault).run()
        except Missed:
            continue
    return None


class Attempt:
    """One delivery with a fault, the same again for those recipients who were not answered 250, and another one."""

    def __init__(self, trials: Trials, fault: Fault) -> None:
        self._trials, self._fault = trials, fault
        self._kind, self._site = trials.kind, trials.site
        self._violations: list[tuple[str, str]] = []
        self._again = 0
        self._log = ""

    def run(self) -> Result:
        """Does it. Raises Missed."""
        trials, kind = self._trials, self._kind
        trials.reset()
        recipients = list(kind.recipients)
        replies, goes_on = self._meet_fault(recipients)
        self._log = self._site.log_text()
        self._set_expectations()
        if not goes_on and not self._may_end:
            self._complain("closed", "the session does not go on")
        self._check_replies(replies)
        self._check_first(Store(self._site.spool, kind), replies)
        recorded = self._records()
        mails = [trials.mails()]
        session = Session(trials.address)
        deferred = [recipient for recipient, reply in zip(recipients, replies) if not reply.startswith("250")]
        if deferred:
            self._repeat(session, FIRST, deferred)
            self._check_second(Store(self._site.spool, kind), recorded)
        mails.append(trials.mails())
        self._repeat(session, NEXT, recipients)
        mails.append(trials.mails())
        if not session.leave():
            self._complain("later", "the session does not go on")
        self._log = self._site.log_text()
        self._check_end(Store(self._site.spool, kind))
        self._check_mails(mails, recorded)
        self._check_log()
        return Result(replies, list(dict.fromkeys(self._violations)), self._again, self._log)

    def _complain(self, rule: str, what: object) -> None:
        self._violations.append((rule, str(what)))

    def _meet_fault(self, recipients: Sequence[str]) -> tuple[list[str], bool]:
        """The replies, and whether the session went on after them. Raises Missed."""
        session = Session(self._trials.address)
        self._worker = session.pid
        injector = (ShortWrite if self._fault.what in (SHORT, CUT) else Strace)(session.pid, self._fault)
        replies = session.deliver(self._kind.letter(FIRST), recipients)
        # An error that is put in place of close(2) leaves the file open.
        if session.command("RSET").startswith("250") and self._fault.name != "close":
            for file in self._trials.open_files(session.pid):
                self._complain("left open", file)
        goes_on = session.leave()
        if not (line := injector.met()):
            raise Missed
        self._is_of_client, self._hides_answer = is_of_client(line), hides_answer(line)
        return replies, goes_on

    def _set_expectations(self) -> None:
        """Sets what may be otherwise than in a good run, as documented, by what the log says."""
        killed = self._fault.what == KILL
        # The client cannot be answered, or the process has to end.
        self._may_end = killed or self._is_of_client or "identity-not-restored" in self._log
        self._has_database = "duplicate-database-unavailable" not in self._log
        self._has_script = "script-error" not in self._log
        self._has_subscribed = not killed and "not-subscribed" not in self._log
        self._places = dict(self._kind.recipients)
        if not self._has_script:
            self._places = {recipient: (recipient,) for recipient in self._places}

    def _records(self) -> set[str]:
        try:
            return self._trials.records()
        except sqlite3.Error as error:
            self._complain("database", error)
            return set()

    def _check_replies(self, replies: Sequence[str]) -> None:
        for reply in replies:
            # 451 4.4.0 is for mail that cannot be sent.
            wanted = ("250", "452", "451 4.4.0") if self._fault.is_full else ("250", "451", "421")
            if reply == BROKEN and not self._may_end:
                self._complain("closed", "instead of a reply")
            elif reply != BROKEN and not reply.startswith(wanted):
                self._complain("reply", reply)

    def _check_first(self, store: Store, replies: Sequence[str]) -> None:
        """Looks at what the delivery with the fault has left."""
        for what in store.partial:
            self._complain("partial", what)
        for (recipient, places), reply in zip(self._places.items(), replies):
            had = recipient in self._kind.has
            for place in places:
                count = store.count(place, FIRST)
                told = f"{place} has it {count} times after {reply or 'no reply'}"
                if reply.startswith("250") and not count:
                    self._complain("lost", told)
                elif count > 1:
                    self._expect_double(told, had and not self._has_database)
                elif reply and not reply.startswith("250") and count != had:
                    self._complain("visible", told)
        wanted = {place for places in self._places.values() for place in places}
        for copy in store.copies:
            if copy.number == FIRST and copy.place not in wanted:
                self._complain("visible", copy)
        if store.drafts and not self._may_end and "draft-left-behind" not in self._log:
            self._complain("left behind", store.drafts)

    def _check_second(self, store: Store, recorded: set[str]) -> None:
        """Looks at the copies after the second try."""
        for recipient, places in self._places.items():
            had = recipient in self._kind.has and not self._has_database
            for place in places:
                count = store.count(place, FIRST)
                told = f"{place} has it {count} times after the second try"
                if not count:
                    self._complain("lost", told)
                elif count > 1:
                    self._expect_double(told, had or (self._may_end and place not in recorded))

    def _expect_double(self, told: str, expected: bool) -> None:
        if expected:
            self._again += 1
        else:
            self._complain("doubled", told)

    def _repeat(self, session: Session, number: int, recipients: Sequence[str]) -> None:
        """Delivers without a fault."""
        for recipient, reply in zip(recipients, session.deliver(self._kind.letter(number), recipients)):
            if not reply.startswith("250"):
                self._complain("later", f"{recipient}, message {number}: {reply}")

    def _check_end(self, store: Store) -> None:
        """Looks at all that is there after the next delivery."""
        for difference in store.differences(self._trials.good):
            is_lock = ".lock " in difference
            may_stay = self._fault.what == KILL or self._fault.name.startswith("unlink")
            if is_lock and not may_stay:
                self._complain("left behind", difference)
            elif is_lock or (not self._has_subscribed and "subscri" in difference):
                continue
            elif self._has_script or f"message {FIRST}" not in difference:
                self._complain("different", difference)
        for user, octets, messages in store.quota_errors():
            # A process that is killed may have stored a message and not counted it. ESTALE says that the file has been
            # replaced, so the message is counted again. Before a quota refuses mail, all messages are counted.
            if messages != {KILL: -1, "ESTALE": 1}.get(self._fault.what):
                self._complain("quota", f"{user}: {octets} octets, {messages} messages more than there are")

    def _check_mails(self, mails: Sequence[Mapping[str, int]], recorded: set[str]) -> None:
        """Looks at what has been sent. mails: how many each recipient has got after each of the deliveries."""
        for address in self._kind.mails:
            first, second, third = (counts[address] for counts in mails)
            told = f"{address} got {first}, {second}, {third}, {'' if address in recorded else 'not '}recorded"
            failed = f"to=<{address}>" in self._log.partition("mail-not-sent")[2] or not self._has_script
            is_answer = address == SENDER
            if first > 1 or (address in recorded and (first, second) != (1, 1)):
                self._complain("sent", told)
            elif not second and not failed and (self._has_database or not is_answer):
                self._complain("unsent", told)
            elif second > 1:
                self._expect_double(told, self._may_end or self._hides_answer or not self._has_database)
            if third - second > 1 or (third == second and not is_answer):
                self._complain("sent", told)

    def _check_log(self) -> None:
        for line in self._log.splitlines():
            if "traceback" in line or "internal-error" in line:
                self._complain("log", line)
                break
        if f"worker-died worker={self._worker} " in self._log and not self._may_end:
            self._complain("log", "worker-died")
