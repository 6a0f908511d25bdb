"""A process that is left without descriptors defers mail. What it has to load by then cannot be loaded, either."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from harness import PATIENCE, Site
from sieve import script_text
from sink import SendmailScript, Sink

import lmtpd

sys.path.append(str(Path(__file__).parent / "faults"))

from dovecot_users import DovecotUsers

USER = "games"  # an account of every Debian
MESSAGE = b"""\
From: sender@example.com\r
To: games@example.com\r
Message-ID: <%d@example.org>\r
Date: Sun, 22 Nov 2026 12:00:00 +0000\r
\r
A body.\r
"""
SCRIPT = script_text(
    "copy vacation fileinto mailbox body",
    'redirect :copy "joe@example.net"; vacation "I am away."; '
    'if body :text :contains "body" { fileinto :create "Work"; }',
)
FEWEST, ENOUGH = 4, 20


class Starved(Site):
    """A site whose lmtpd may have so many descriptors."""

    limit = 1024

    def command(self, *arguments: str) -> list[str]:
        return ["prlimit", f"--nofile={self.limit}", *super().command(*arguments)]


@pytest.fixture(params=["maildir", "passwd", "dovecot", "duplicates", "smtp", "sendmail"])
def site(request: pytest.FixtureRequest) -> Iterator[Starved]:
    with ExitStack() as stack:
        site = Starved(duplicatesuppression="yes")
        stack.callback(site.close)
        maildir = site.add_user(USER)
        if request.param == "passwd":
            site.configure(userdb="passwd", passwd_min_uid="1")
            for path in (maildir, *maildir.iterdir()):
                shutil.chown(path, USER, USER)
        elif request.param == "dovecot":
            users = stack.enter_context(DovecotUsers(site.root / "users", {USER: site.spool}))
            site.configure(userdb="dovecot", userdb_socket_path=str(users.socket), maildir_path="%h/%u")
        elif request.param == "maildir":
            site.configure(duplicatesuppression="no")
        elif request.param in ("smtp", "sendmail"):
            (site.root / "script").write_text(SCRIPT)
            site.configure(sieve_script=f"{site.root}/script", smtp_backend="host")
            sink = stack.enter_context(Sink())
            site.configure(smtp_host=f"127.0.0.1:{sink.port}")
            if request.param == "sendmail":
                site.configure(smtp_backend="sendmail", sendmail=str(SendmailScript(site).path))
        yield site


def test_without_descriptors_mail_is_deferred(site: Starved) -> None:
    """With a few more, it is delivered. Nothing is an internal error, and the session goes on to its end."""
    replies: list[str] = []
    for site.limit in (*range(FEWEST, ENOUGH + 1), 1024):
        client = site.connect()
        if not client.reply():
            assert not replies  # Python has not started
            continue
        client.command("LHLO client.example")
        replies += client.deliver(MESSAGE % site.limit, f"{USER}@example.com")
        client.leave()
        site.child.wait(PATIENCE)
        assert "internal" not in site.log_text(), (site.limit, site.log_text())
    first, *_, last = replies
    assert first == "451 4.3.0 Mail storage failed, try again later"
    assert last.startswith("250")
    delivered = [reply.startswith("250") for reply in replies]
    assert delivered == sorted(delivered), replies
    assert {reply[:3] for reply in replies} == {"250", "451"}


def test_a_user_that_cannot_be_looked_up_is_not_unknown(site: Starved) -> None:
    """Pipes leave more descriptors to Python's start than a socket."""
    session = f"LHLO x\r\nMAIL FROM:<joe@example.com>\r\nRCPT TO:<{USER}@example.com>\r\nQUIT\r\n".encode()
    seen = set()
    for site.limit in (*range(FEWEST, ENOUGH + 1), 1024):
        said = site.pipe(session).stdout.decode().splitlines()
        if said:
            *_, reply, bye = said
            assert bye.startswith("221"), (site.limit, site.log_text())
            seen.add(reply[:3])
    assert seen == {"250", "451"}


@pytest.fixture
def plain() -> Iterator[Starved]:
    site = Starved()
    site.add_user(USER)
    yield site
    site.close()


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), MemoryError(), ValueError("odd")])
def test_whatever_fails_at_rcpt_defers_the_recipient(
    plain: Starved, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package for the domains of some recipients may be loaded at any time, for example."""

    def fail(*_: object) -> list[str]:
        raise error

    monkeypatch.setattr(lmtpd, "recipients_of", fail)
    router = lmtpd.Router(lmtpd.Config.load(str(plain.conf), "lmtp"))
    with pytest.raises(lmtpd.LmtpError) as raised:
        router.find(lmtpd.Address(USER, "example.com"), lmtpd.Envelope(None), 0, False)
    assert str(raised.value.reply) == "451 4.3.0"


def test_the_end_of_a_session_needs_no_descriptor(plain: Starved) -> None:
    plain.configure(lmtp_max_bad_commands="1")
    ends = []
    for plain.limit in (*range(FEWEST, ENOUGH + 1), 1024):
        client = plain.connect()
        if client.reply():
            client.send(b"X\r\nX\r\n")
            ends.append([client.line()[:9] for _ in range(4)])
            client.close()
            plain.child.wait(PATIENCE)
            assert "-error" not in plain.log_text(), plain.limit
        os.truncate(plain.log, 0)
    assert [end for end in ends if end != [b"500 5.5.2", b"500 5.5.2", b"421 4.7.0", b""]] == []
    assert ends
