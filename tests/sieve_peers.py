"""Scripts run by lmtpd and by Pigeonhole, side by side, and what became of them in a form that can be compared."""

from __future__ import annotations

import itertools
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.errors import HeaderParseError
from email.header import decode_header, make_header

import pytest
from harness import Client, Site
from pigeonhole import DOMAIN, SCORES, SPECIAL_USE, Pigeonhole, Result, result_of
from sieve_cases import Case

# Files are made and thrown away by the thousand: what is synced here need not be on a disk.
IN_MEMORY = "/dev/shm"
TRACE = {"return-path", "delivered-to"}
# What lmtpd adds to a message that has none.
ADDED = {"message-id", "date"}


class SieveSite(Site):
    """lmtpd with the options that make of it what Pigeonhole is for its users.

    There are two processes: one without scripts of the site, and one that has some, which may be empty.
    """

    def __init__(self) -> None:
        super().__init__(
            unixhierarchysep="yes",
            recipient_delimiter="+",
            lmtp_detail_create="yes",
            lmtp_autosubscribe="yes",
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
        for name, text in {"active": case.script, **case.others}.items():
            (folder / f"{name}.sieve").write_bytes(text if isinstance(text, bytes) else text.encode())
        client = self.plain
        if case.before or case.after:
            self._install_site(case)
            client = self.with_site_scripts
        replies = []
        for _ in range(case.times):
            [reply] = client.deliver(on_the_wire(case.message), address_of(user, case), sender=case.sender)
            replies.append(reply)
        return result_of(self.spool / user, tuple(replies))

    def close(self) -> None:
        self.plain.close()
        self.with_site_scripts.close()
        super().close()


def on_the_wire(message: bytes) -> bytes:
    return message.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")


def address_of(user: str, case: Case) -> str:
    return f"{user}+{case.detail}@{DOMAIN}" if case.detail else f"{user}@{DOMAIN}"


def run_by_pigeonhole(pigeonhole: Pigeonhole, user: str, case: Case) -> Result:
    """The same as SieveSite.run."""
    pigeonhole.install(user, case.script, **case.others)
    site = {name: text for name, text in (("before", case.before), ("after", case.after)) if text}
    if site:
        pigeonhole.install_site(user, **site)
    message = on_the_wire(case.message)
    replies = [pigeonhole.deliver(user, message, case.sender, case.detail) for _ in range(case.times)]
    return pigeonhole.result(user, *replies)


@dataclass(frozen=True)
class Outcome:
    """What must be the same on both sides.

    codes: of the replies. stored: of each message its folder, flags, header fields and body. subscribed: to which of
    these folders the user is.
    """

    codes: tuple[str, ...]
    stored: tuple[tuple[str, tuple[str, ...], tuple[tuple[str, str], ...], bytes], ...]
    subscribed: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"replies {' '.join(self.codes)}"]
        for folder, flags, fields, body in self.stored:
            lines += [f"{folder} [{' '.join(flags)}]", *(f"    {name}: {value}" for name, value in fields)]
            lines.append(f"    {len(body)} octets: {body[:100]!r}")
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
    )


def fields_of(header: bytes, trace: set[str]) -> Iterator[tuple[str, str]]:
    """The fields but for the trace, their names in lower case, their values unfolded and decoded."""
    for field in re.split(rb"\n(?![ \t])", header.strip(b"\n")):
        name, colon, value = field.decode("utf-8", "backslashreplace").partition(":")
        if name.lower() in trace or (name.lower() == "received" and "by mx.example.com" in value):
            continue
        yield name.lower().rstrip(), decoded_value(" ".join(value.split())) if colon else ""


def decoded_value(value: str) -> str:
    try:
        return str(make_header(decode_header(value)))
    except (HeaderParseError, LookupError, ValueError):
        return value


class Peers:
    """Both sides, and a user for each case."""

    def __init__(self, pigeonhole: Pigeonhole, site: SieveSite) -> None:
        self.pigeonhole, self.site = pigeonhole, site
        self._numbers = itertools.count()

    def outcomes(self, case: Case) -> tuple[Outcome, Outcome, str]:
        """Ours, theirs, and what both had to say."""
        user = f"user{next(self._numbers)}"
        theirs = outcome_of(run_by_pigeonhole(self.pigeonhole, user, case), case)
        log = self.site.log.stat().st_size
        ours = outcome_of(self.site.run(user, case), case)
        said = self.pigeonhole.complaints(user)
        with self.site.log.open("rb") as lines:
            lines.seek(log)
            said += lines.read().decode(errors="replace")
        self.pigeonhole.forget(user)
        return ours, theirs, said


@contextmanager
def both_sides() -> Iterator[Peers]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", IN_MEMORY)
        site = SieveSite()
    try:
        with Pigeonhole(site.root / "pigeonhole") as pigeonhole:
            yield Peers(pigeonhole, site)
    finally:
        site.close()


def shown(case: Case, ours: Outcome, theirs: Outcome, said: str) -> str:
    """What a person wants to know of a case that fails."""
    script = case.script if isinstance(case.script, str) else repr(case.script)
    parts = {"script": script, "before": case.before, "after": case.after}
    parts.update(case.others)
    parts.update(message=case.message[:2000].decode(errors="replace"), ours=str(ours), Pigeonhole=str(theirs), log=said)
    return "\n".join(f"--- {name}\n{text}" for name, text in parts.items() if text)
