"""Mail that scripts send leaves by a real Postfix, whose queue comes before lmtpd, too."""

from __future__ import annotations

import itertools
import smtplib
from collections.abc import Iterator
from email import message_from_bytes

import pytest
from harness import PATIENCE, Site, wait_for
from peers import POSTFIX_MAIN_CF, Postfix
from sieve import script_text
from sink import Mail, Sink

SENDER = "sender@example.org"
NUMBERS = itertools.count()
USERS = ("jane", "joe", "ann", "bob")


class MailSystem:
    """Postfix takes mail, lmtpd delivers that for example.com, and sends by the same Postfix; sink gets all else."""

    def __init__(self, site: Site, postfix: Postfix, sink: Sink) -> None:
        self.site, self.postfix, self.sink = site, postfix, sink

    def write(self, user: str, script: str) -> None:
        """Gives a user a script."""
        (self.site.root / "sieve" / f"{user}.sieve").write_text(script)

    def submit(self, *recipients: str, subject: str = "hello") -> None:
        """Sends a message from a stranger, and waits until nothing is in the queue."""
        number = next(NUMBERS)
        text = f"From: {SENDER}\r\nTo: {', '.join(recipients)}\r\nSubject: {subject}\r\n"
        text += f"Message-ID: <{number}@example.org>\r\n"
        with smtplib.SMTP(*self.postfix.address, timeout=PATIENCE) as smtp:
            smtp.sendmail(SENDER, recipients, f"{text}\r\nA body.\r\n")
        self.postfix.wait_until_sent()

    def sent_to(self, recipient: str) -> list[Mail]:
        """What has come for somebody elsewhere."""
        return [mail for mail in self.sink.mails if mail.recipients == (recipient,)]


@pytest.fixture(scope="module")
def running() -> Iterator[MailSystem]:
    site = Site()
    try:
        site.add_user(*USERS)
        (site.root / "sieve").mkdir()
        with Sink() as sink:
            elsewhere = f"default_transport = smtp:[127.0.0.1]:{sink.port}\nsmtp_host_lookup = native\n"
            postfix = Postfix(site, POSTFIX_MAIN_CF + elsewhere)
            site.configure(
                sieve_script=f"{site.root}/sieve/%u.sieve",
                smtp_backend="host",
                smtp_host=f"127.0.0.1:{postfix.address[1]}",
                duplicatesuppression="yes",
                recipient_delimiter="+",
            )
            with postfix:
                yield MailSystem(site, postfix, sink)
    finally:
        site.close()


@pytest.fixture
def mail_system(running: MailSystem) -> MailSystem:
    running.sink.clear()
    for user in USERS:
        running.write(user, "keep;")
        for message in (running.site.spool / user).rglob("*,S=*"):
            message.unlink()
    return running


def test_an_out_of_office_reaches_the_sender_once(mail_system: MailSystem) -> None:
    mail_system.write("jane", script_text("vacation", 'vacation :subject "Away" "I am away.";'))
    mail_system.submit("jane@example.com")
    mail_system.submit("jane@example.com")
    [answer] = mail_system.sent_to(SENDER)
    assert answer.reverse_path == ""
    message = message_from_bytes(answer.octets)
    assert (message["From"], message["Subject"], message["Auto-Submitted"]) == (
        "jane@example.com",
        "Away",
        "auto-replied",
    )
    assert len(mail_system.site.files("jane")) == 2


def test_a_forward_arrives_elsewhere(mail_system: MailSystem) -> None:
    mail_system.write("joe", 'redirect "joe@example.net";')
    mail_system.submit("joe@example.com", subject="forwarded")
    [mail] = mail_system.sent_to("joe@example.net")
    assert mail.reverse_path == SENDER
    message = message_from_bytes(mail.octets)
    assert message["Subject"] == "forwarded"
    assert message["Return-Path"] is None
    assert mail_system.site.files("joe") == []


def test_a_rejected_message_comes_back_as_a_bounce(mail_system: MailSystem) -> None:
    mail_system.write("jane", script_text("reject", 'reject "I take no advertising.\nWrite a letter.";'))
    mail_system.submit("jane@example.com")
    [bounce] = mail_system.sent_to(SENDER)
    assert bounce.reverse_path == ""
    explanation = message_from_bytes(bounce.octets).get_payload(0)
    text = " ".join(str(explanation).split())
    assert "<jane@example.com>" in text
    assert "I take no advertising. 550 5.7.1 Write a letter." in text or "advertising. Write a letter." in text
    assert mail_system.site.files("jane") == []


def test_two_users_who_redirect_to_each_other_have_the_message(mail_system: MailSystem) -> None:
    mail_system.write("jane", 'redirect "joe@example.com";')
    mail_system.write("joe", 'redirect "jane@example.com";')
    mail_system.submit("jane@example.com")
    assert len(mail_system.site.files("jane")) == 1
    assert mail_system.site.files("joe") == []
    assert mail_system.sink.mails == []


def test_two_users_who_are_away_do_not_answer_each_other(mail_system: MailSystem) -> None:
    for user in ("jane", "joe"):
        mail_system.write(user, script_text("vacation", 'vacation "I am away.";'))
    text = "From: joe@example.com\r\nTo: jane@example.com\r\nMessage-ID: <away@example.com>\r\n\r\nx\r\n"
    with smtplib.SMTP(*mail_system.postfix.address, timeout=PATIENCE) as smtp:
        smtp.sendmail("joe@example.com", ["jane@example.com"], text)
    wait_for(lambda: len(mail_system.site.files("joe")) == 1, "the answer")
    mail_system.postfix.wait_until_sent()
    assert len(mail_system.site.files("jane")) == 1
    assert len(mail_system.site.files("joe")) == 1


def test_one_of_two_addresses_is_refused(mail_system: MailSystem) -> None:
    """Postfix takes it, and tells the sender."""
    mail_system.write("jane", 'redirect "joe@example.net"; redirect "never@example.net";')
    mail_system.sink.refuse["never@example.net"] = "550 5.1.1 Never"
    mail_system.submit("jane@example.com")
    assert len(mail_system.sent_to("joe@example.net")) == 1
    assert len(mail_system.sent_to(SENDER)) == 1


def test_a_server_that_is_down_defers_the_message(mail_system: MailSystem) -> None:
    """The message stays in the queue of Postfix, and is sent on once when the server is there again."""
    site = mail_system.site
    mail_system.write("jane", 'redirect "ann@example.net";')
    site.configure(smtp_host="127.0.0.1:1")
    try:
        text = f"From: {SENDER}\r\nTo: jane@example.com\r\nMessage-ID: <down@example.org>\r\n\r\nx\r\n"
        with smtplib.SMTP(*mail_system.postfix.address, timeout=PATIENCE) as smtp:
            smtp.sendmail(SENDER, ["jane@example.com"], text)
        wait_for(lambda: "451 4.4.0" in mail_system.postfix.queued(), "the deferral", mail_system.postfix.log)
        assert site.files("jane") == []
    finally:
        site.configure(smtp_host=f"127.0.0.1:{mail_system.postfix.address[1]}")
    (site.configdirectory / "smtp.backoff").unlink(missing_ok=True)
    mail_system.postfix.wait_until_sent()
    assert len(mail_system.sent_to("ann@example.net")) == 1
    assert site.files("jane") == []
