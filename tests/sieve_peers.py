"""Scripts run by lmtpd and by Pigeonhole, side by side, and what became of them in a form that can be compared."""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness import Client, Site
from pigeonhole import DOMAIN, SCORES, SPECIAL_USE, Pigeonhole, Result, result_of
from sieve_cases import Case
from sieve_fields import Field, fields_of
from sieve_mails import Sent, sent
from sink import Sink

# Files are made and thrown away by the thousand: what is synced here need not be on a disk.
IN_MEMORY = "/dev/shm"
TRACE = {"return-path", "delivered-to"}
# What lmtpd adds to a message that has none.
ADDED = {"message-id", "date"}


class SieveSite(Site):
    """lmtpd with the options that make of it what Pigeonhole is for its users.

    There are two processes: one without scripts of the site, and one that has some, which may be empty.
    """

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        super().__init__(
            unixhierarchysep="yes",
            recipient_delimiter="+",
            lmtp_detail_create="yes",
            lmtp_autosubscribe="yes",
            smtp_backend="host",
            smtp_host="{}:{}/noauth".format(*sink.address),
            sieve_use_lmtp_reject="no",  # Pigeonhole reports, too
            **{f"xlist-{use[1:].lower()}": name for name, use in SPECIAL_USE.items()},
            **SCORES,
        )
        self.scripts = self.root / "scripts"
        self.site_scripts = self.root / "site"
        self.global_scripts = self.root / "global"
        for folder in (self.scripts, self.site_scripts, self.global_scripts):
            folder.mkdir()
            self.give(folder)
        self.configure(sieve_script=f"{self.scripts}/%u/active.sieve", sieve_global_dir=str(self.global_scripts))
        self.plain = self._connected()
        self._install_site(Case("", ""))
        self.configure(
            sieve_before=f"{self.site_scripts}/before.sieve",
            sieve_after=f"{self.site_scripts}/after.sieve",
        )
        self.with_site_scripts = self._connected()

    def _connected(self) -> Client:
        client = self.connect()
        client.hello()
        return client

    def _install_site(self, case: Case) -> None:
        for name, script in (("before", case.before), ("after", case.after)):
            (self.site_scripts / f"{name}.sieve").write_text(script)

    def run(self, user: str, case: Case) -> Result:
        """Installs the scripts of a case for a new user, delivers its message."""
        self.add_user(user)
        folder = self.scripts / user
        folder.mkdir()
        self.give(folder)
        replies = []
        self.sink.clear()
        self.sink.refuse.update(case.refuse)
        for step in (case, *case.then):
            self._install(folder, step)
            client = self.plain
            if step.before or step.after:
                self._install_site(step)
                client = self.with_site_scripts
            for _ in range(step.times):
                [reply] = client.deliver(on_the_wire(step.message), address_of(user, step), sender=step.sender)
                replies.append(reply)
        return result_of(self.spool / user, tuple(replies), tuple(self.sink.mails))

    def _install(self, folder: Path, case: Case) -> None:
        """Gives a user these scripts, each as a new file, which shows that it is another one."""
        for name, text in {"active": case.script, **case.others}.items():
            new = folder / f"{name}.new"
            new.write_bytes(text if isinstance(text, bytes) else text.encode())
            new.replace(folder / f"{name}.sieve")

    def close(self) -> None:
        self.plain.close()
        self.with_site_scripts.close()
        super().close()


def on_the_wire(message: bytes) -> bytes:
    return message.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")


def address_of(user: str, case: Case) -> str:
    return f"{user}+{case.detail}@{DOMAIN}" if case.detail else f"{user}@{DOMAIN}"


def run_by_pigeonhole(pigeonhole: Pigeonhole, sink: Sink, user: str, case: Case) -> Result:
    """The same as SieveSite.run."""
    replies: list[str] = []
    sink.clear()
    sink.refuse.update(case.refuse)
    for step in (case, *case.then):
        pigeonhole.install(user, step.theirs or step.script, **step.others)
        site = {name: text for name, text in (("before", step.before), ("after", step.after)) if text}
        if site:
            pigeonhole.install_site(user, **site)
        message = on_the_wire(step.message)
        replies += [pigeonhole.deliver(user, message, step.sender, step.detail) for _ in range(step.times)]
    return dataclasses.replace(pigeonhole.result(user, *replies), mails=tuple(sink.mails))


def for_user(case: Case, user: str) -> Case:
    """The case with that user's name in place of the word "username"; in capitals for "USERNAME"."""

    def in_text(text: str) -> str:
        return text.replace("username", user).replace("USERNAME", user.upper())

    def in_octets(octets: bytes) -> bytes:
        return octets.replace(b"username", user.encode()).replace(b"USERNAME", user.upper().encode())

    return dataclasses.replace(
        case,
        script=in_octets(case.script) if isinstance(case.script, bytes) else in_text(case.script),
        message=in_octets(case.message),
        sender=in_text(case.sender),
        before=in_text(case.before),
        after=in_text(case.after),
        theirs=in_text(case.theirs),
        then=tuple(for_user(step, user) for step in case.then),
    )


@dataclass(frozen=True)
class Outcome:
    """What must be the same on both sides.

    codes: of the replies. stored: of each message its folder, flags, header fields and body. subscribed: to which of
    these folders the user is. sent: the mails.
    """

    codes: tuple[str, ...]
    stored: tuple[tuple[str, tuple[str, ...], tuple[Field, ...], bytes], ...]
    subscribed: tuple[str, ...]
    sent: tuple[Sent, ...]

    def __str__(self) -> str:
        lines = [f"replies {' '.join(self.codes)}"]
        for folder, flags, fields, body in self.stored:
            lines += [f"{folder} [{' '.join(flags)}]", *(f"    {name}: {value}" for name, value in fields)]
            lines.append(f"    {len(body)} octets: {body[:100]!r}")
        lines += map(str, self.sent)
        return "\n".join(lines)


def outcome_of(result: Result, case: Case) -> Outcome:
    trace = TRACE | (ADDED - {name for name, _ in fields_of(case.message.partition(b"\n\n")[0], set())})
    stored = []
    for message in result.stored:
        header, _, body = message.octets.partition(b"\n\n")
        stored.append((message.folder, message.flags, tuple(fields_of(header, trace)), body))
    folders = {message.folder for message in result.stored} - {"INBOX"}
    return Outcome(
        tuple(reply[:3] for reply in result.replies),
        tuple(sorted(stored)),
        tuple(sorted(folders.intersection(result.subscribed))),
        sent(result.mails, tuple(step.message for step in (case, *case.then))),
    )


class Peers:
    """Both sides, and a user for each case."""

    def __init__(self, pigeonhole: Pigeonhole, sink: Sink, site: SieveSite) -> None:
        self.pigeonhole, self.sink, self.site = pigeonhole, sink, site
        self._numbers = itertools.count()

    def results(self, case: Case) -> tuple[Result, Result, str]:
        """Ours, theirs, and what both had to say."""
        user = f"user{next(self._numbers)}"
        case = for_user(case, user)
        theirs = run_by_pigeonhole(self.pigeonhole, self.sink, user, case)
        log = self.site.log.stat().st_size
        ours = self.site.run(user, case)
        said = self.pigeonhole.complaints(user)
        with self.site.log.open("rb") as lines:
            lines.seek(log)
            said += lines.read().decode(errors="replace")
        self.pigeonhole.forget(user)
        return ours, theirs, said

    def outcomes(self, case: Case) -> tuple[Outcome, Outcome, str]:
        """The same, as what must be the same."""
        ours, theirs, said = self.results(case)
        return outcome_of(ours, case), outcome_of(theirs, case), said


@contextmanager
def both_sides() -> Iterator[Peers]:
    with Sink() as ours, Sink() as theirs:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tempfile, "tempdir", IN_MEMORY)
            site = SieveSite(ours)
        try:
            author = {"sieve_notify_mailto_envelope_from": "recipient"}
            with Pigeonhole(site.root / "pigeonhole", theirs.address, **author) as pigeonhole:
                yield Peers(pigeonhole, theirs, site)
        finally:
            site.close()


def shown(case: Case, ours: Outcome, theirs: Outcome, said: str) -> str:
    """What a person wants to know of a case that fails."""
    script = case.script if isinstance(case.script, str) else repr(case.script)
    parts = {"script": script, "before": case.before, "after": case.after}
    parts.update(case.others)
    parts.update({f"then {number}": str(step) for number, step in enumerate(case.then)})
    parts.update(message=case.message[:2000].decode(errors="replace"), ours=str(ours), Pigeonhole=str(theirs), log=said)
    return "\n".join(f"--- {name}\n{text}" for name, text in parts.items() if text)
