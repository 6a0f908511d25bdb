"""What scripts send but for vacation's answers: redirect, reject, ereject, notify, copies of what is sent (fcc).

RFC 5228, 3894, 5429, 5435, 5436, 8580; and what becomes of a message when something cannot be sent.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from email.message import EmailMessage, Message
from email.utils import parseaddr
from pathlib import Path
from unittest import mock

import pytest
from authority import Authority
from harness import Site, free_port
from mailboxes import connected
from sieve import Clock, Outcome, Sent, Sieve, parsed, script_text
from sink import SendmailScript, Sink
from test_sieve_command import run
from test_sieve_language import verify_error

from lmtpd import DeliveryAgent

DAY = 86400
SENDER = "sender@example.org"
JOE = "joe@example.net"
ANN = "ann@example.net"
REDIRECT = f'redirect "{JOE}";'
INBOX = {"INBOX": ""}
SECRET = "open sesame"
NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def server() -> Iterator[Sink]:
    with Sink() as server:
        yield server


@pytest.fixture
def sink(server: Sink) -> Sink:
    server.clear()
    return server


@pytest.fixture
def sieve(site: Site, sink: Sink) -> Sieve:
    return Sieve(site, sink)


@pytest.fixture
def clock() -> Iterator[Clock]:
    clock = Clock()
    with mock.patch("time.time", clock.now):
        yield clock


def mail(*fields: str, body: str = "A body.\n", number: int | None = None) -> str:
    """A message with these fields, and a Message-ID that no other has, but with that number."""
    number = next(NUMBERS) if number is None else number
    own = [f"Message-ID: <{number}@example.org>", "Date: Sun, 22 Nov 2026 12:00:00 +0000", "Subject: hello"]
    return "\n".join(["From: someone@example.org", "To: jane@example.com", *own, *fields, "", body])


def on_the_wire(message: str | bytes) -> bytes:
    octets = message.encode("utf-8", "surrogateescape") if isinstance(message, str) else message
    return octets.replace(b"\n", b"\r\n")


def verify(outcome: Outcome, placed: dict[str, str], *recipients: str, reply: str = "250 2.1.5") -> None:
    """Fails unless the message is there, mails went to these recipients, and no script had an error."""
    assert outcome.errors == []
    assert outcome.reply == reply
    assert outcome.placed == placed
    assert sorted(each for sent in outcome.sent for each in sent.recipients) == sorted(recipients)


def verify_error_at_run_time(outcome: Outcome) -> None:
    """Fails unless the script had an error, the message was kept, and nothing was sent."""
    assert len(outcome.errors) == 1
    assert outcome.reply == "250 2.1.5"
    assert outcome.placed == INBOX
    assert outcome.sent == []


def tries(outcome: Outcome) -> list[tuple[str, str, str]]:
    """What the log says of each failure to send: action, recipient and result."""
    return [(each["action"], each["to"], each["result"]) for each in outcome.fields("mail-not-sent")]


def forget_failures(sieve: Sieve) -> None:
    """Makes lmtpd try a server again that it has just not reached, as another process does after the back-off."""
    for path in sieve.site.configdirectory.glob("*.backoff"):
        path.unlink()
    sieve.agent = DeliveryAgent(sieve.config)


# redirect: who gets it

FOUR = "".join(f'redirect "joe{number}@example.net";' for number in range(4))


@pytest.mark.parametrize(
    ("requires", "commands", "placed", "recipients"),
    [
        ("", REDIRECT, {}, [JOE]),
        ("", f"{REDIRECT} keep;", INBOX, [JOE]),
        ("", f"keep; {REDIRECT}", INBOX, [JOE]),
        ("", f"{REDIRECT} discard;", {}, [JOE]),
        ("", f"discard; {REDIRECT}", {}, [JOE]),
        ("", f"{REDIRECT} stop;", {}, [JOE]),
        ("", f"stop; {REDIRECT}", INBOX, []),
        ("copy", f'redirect :copy "{JOE}";', INBOX, [JOE]),
        ("copy", f'redirect :copy "{JOE}"; discard;', {}, [JOE]),
        ("copy", f'redirect :copy "{JOE}"; redirect "{ANN}";', {}, [JOE, ANN]),
        ("fileinto", f'fileinto "Work"; {REDIRECT}', {"Work": ""}, [JOE]),
        ("fileinto copy", f'fileinto :copy "Work"; redirect :copy "{JOE}";', {"Work": "", "INBOX": ""}, [JOE]),
        ("", f'{REDIRECT} redirect "{ANN}";', {}, [JOE, ANN]),
        # Each recipient gets one (RFC 5228 section 2.10.3).
        ("", f"{REDIRECT} {REDIRECT}", {}, [JOE]),
        ("", f'{REDIRECT} redirect "joe@EXAMPLE.net";', {}, [JOE]),
        ("copy", f'{REDIRECT} redirect :copy "{JOE}";', {}, [JOE]),
        ("", f'redirect "Joe <{JOE}>";', {}, [JOE]),
        ("", f'redirect "\\"Joe, the other\\" <{JOE}>";', {}, [JOE]),
        ("", f'redirect "<{JOE}>";', {}, [JOE]),
        ("", 'redirect "\\"joe doe\\"@example.net";', {}, ['"joe doe"@example.net']),
        ("", 'redirect "joe@[127.0.0.1]";', {}, ["joe@[127.0.0.1]"]),
        ("", 'redirect "-joe@example.net";', {}, ["-joe@example.net"]),
        ("variables", f'set "a" "{JOE}"; redirect "${{a}}";', {}, [JOE]),
        ("", FOUR, {}, [f"joe{number}@example.net" for number in range(4)]),
        # To oneself it is a keep.
        ("", 'redirect "jane@example.com";', INBOX, []),
        ("", 'redirect "Jane <JANE@Example.COM>";', INBOX, []),
        ("copy", 'redirect :copy "jane@example.com";', INBOX, []),
        ("", f'redirect "jane@example.com"; {REDIRECT}', INBOX, [JOE]),
        ("", 'redirect "jane@example.com"; discard;', INBOX, []),
        ("", 'redirect "jane@example.org";', {}, ["jane@example.org"]),
    ],
)  # fmt: skip
def test_who_gets_what_is_redirected(
    sieve: Sieve, requires: str, commands: str, placed: dict[str, str], recipients: list[str]
) -> None:
    outcome = sieve.run(script_text(requires, commands), mail(), SENDER)
    verify(outcome, placed, *recipients)
    assert all(sent.mail.reverse_path == SENDER for sent in outcome.sent)


@pytest.mark.parametrize(
    "commands",
    [
        f"{FOUR} {REDIRECT}",
        'set "a" "no address"; redirect "${a}";',
        'set "a" ""; redirect "${a}";',
        'set "a" "joe@example.net, ann@example.net"; redirect "${a}";',
        'set "a" "Friends: joe@example.net;"; redirect "${a}";',
        'set "a" "joe"; redirect "${a}";',
        'set "a" "joe@"; redirect "${a}";',
        'set "a" "@example.net"; redirect "${a}";',
        'set "a" "joe@example.net>"; redirect "${a}";',
        'set "a" "joe@example.net\\r\\nRCPT TO:<ann@example.net>"; redirect "${a}";',
        'set "a" "joe@example.net\n"; redirect "x${a}\nDATA";',
        'set "a" "joe@exa mple.net"; redirect "${a}";',
        f'{REDIRECT} error "no";',
        f'{REDIRECT} fileinto "a//b";',
    ],
)
def test_after_an_error_nothing_is_redirected(sieve: Sieve, commands: str) -> None:
    outcome = sieve.run(script_text("variables ihave fileinto", commands), mail(), SENDER)
    verify_error_at_run_time(outcome)


def test_the_fifth_redirect_need_not_be_another(sieve: Sieve) -> None:
    verify(sieve.run(REDIRECT * 5, mail(), SENDER), {}, JOE)


@pytest.mark.parametrize(
    ("sender", "reverse_path"),
    [
        (SENDER, SENDER),
        ("", ""),
        ("root", "root@mx.example.com"),
        ('"a b"@example.org', '"a b"@example.org'),
        ("MiXed@Example.Org", "MiXed@Example.Org"),
    ],
)
def test_the_reverse_path_is_kept(sieve: Sieve, sender: str, reverse_path: str) -> None:
    outcome = sieve.run(REDIRECT, mail(), sender)
    verify(outcome, {}, JOE)
    [sent] = outcome.sent
    assert sent.mail.reverse_path == reverse_path
    assert not any("NOTIFY" in option for options in sent.mail.recipient_options for option in options)


def test_redirect_to_oneself_by_the_sub_address_that_was_given(sieve: Sieve) -> None:
    sieve.write("active", 'redirect "jane+lists@example.com";')
    verify(sieve.deliver(mail(), SENDER, "jane+lists"), INBOX)


@pytest.mark.parametrize("recipients", [("jane", "joe"), ("joe", "jane")])
def test_two_users_redirect_to_the_same_address(site: Site, sink: Sink, recipients: tuple[str, str]) -> None:
    """It is redirected for each of them."""
    site.add_user("joe")
    sieve = Sieve(site, sink, default=REDIRECT)
    outcome = sieve.deliver(mail(), SENDER, *recipients)
    verify(outcome, {}, JOE, JOE, reply="250 2.1.5, 250 2.1.5")


def test_what_the_log_says_of_a_redirect(sieve: Sieve) -> None:
    outcome = sieve.run(REDIRECT, mail(number=next(NUMBERS)), SENDER)
    [event] = outcome.fields("mail-sent")
    [redirected] = outcome.fields("redirected")
    assert event.pop("ms").replace(".", "").isdigit()
    msgid = outcome.sent[0].header("Message-ID")
    assert event == {"action": "redirect", "recipient": "<jane@example.com>", "to": f"<{JOE}>", "msgid": msgid}
    assert (redirected["recipient"], redirected["msgid"]) == ("<jane@example.com>", msgid)
    assert outcome.fields("discarded") == []
    assert redirected["script"] == f"{sieve.folder}/active.sieve"


def test_what_is_stored_too_is_no_redirected_message(sieve: Sieve) -> None:
    outcome = sieve.run(f"{REDIRECT} keep;", mail(), SENDER)
    assert [event.name for event in outcome.events if event.name in {"delivered", "redirected"}] == ["delivered"]


# redirect: what is sent


@pytest.mark.parametrize(
    "body",
    [
        "A body.\n",
        "",
        "\n",
        "\n\n\n",
        ".\n..\n. x\n\n.\n",
        "no end",
        ".",
        "a\n.",
        "From here\n>From there\n",
        "x" * 990 + "\n",
        "trailing blanks \t\n",
        "\ttab\x0b\x0c\x1b[2J\n",
    ],
)
def test_the_body_is_sent_as_it_came(sieve: Sieve, body: str) -> None:
    message = mail(body=body)
    outcome = sieve.run(REDIRECT, message, SENDER)
    verify(outcome, {}, JOE)
    expected = on_the_wire(message)
    assert outcome.sent[0].mail.octets == (expected if expected.endswith(b"\n") else expected + b"\r\n")


@pytest.mark.parametrize("body", ["a\rb\n", "a\r", "\r\r\n", "a\r\r\rb\n"])
def test_no_bare_cr_is_sent(sieve: Sieve, body: str) -> None:
    """RFC 5321 section 2.3.8: CR and LF stand only together."""
    outcome = sieve.run(REDIRECT, mail(body=body), SENDER)
    verify(outcome, {}, JOE)
    octets = outcome.sent[0].mail.octets
    assert not re.search(rb"\r(?!\n)|(?<!\r)\n", octets)
    end = body.replace("\r\n", "\n").replace("\r\n", "\n").replace("\r", " ").rstrip("\n")
    assert octets.rstrip(b"\r\n").endswith(end.encode())


def test_a_bare_cr_makes_no_line_of_the_header(sieve: Sieve) -> None:
    """A field that servers before have not seen must not appear."""
    outcome = sieve.run(REDIRECT, mail("X-A: x\rAuthentication-Results: pass", "X-B: y\r\rz"), SENDER)
    verify(outcome, {}, JOE)
    assert "authentication-results" not in outcome.sent[0].names
    assert outcome.sent[0].header("X-A") == "x Authentication-Results: pass"


@pytest.mark.parametrize(("domain", "expected"), [("example.com", "example.com"), ("", "mx.example.com")])
def test_a_recipient_without_a_domain_gets_one(site: Site, sink: Sink, domain: str, expected: str) -> None:
    options = {"defaultdomain": domain} if domain else {}
    Sieve(site, sink, **options).write("active", script_text("enotify", f'notify "mailto:{ANN}";'))
    client = connected(site)
    [reply] = client.deliver(on_the_wire(mail()), "jane", sender=SENDER)
    assert reply.startswith("250")
    client.leave()
    [sent] = map(Sent, sink.mails)
    assert parseaddr(sent.header("From") or "")[1] == f"jane@{expected}"
    assert f'owner-email="jane@{expected}"' in (sent.header("Auto-Submitted") or "")


@pytest.mark.parametrize("size", [300_000, 5_000_000])
@pytest.mark.parametrize("pieces", [65_536, 10_007])
def test_a_large_message_is_sent_as_it_came(sieve: Sieve, size: int, pieces: int) -> None:
    """It is spooled meanwhile; dots begin lines wherever a piece ends."""
    body = "".join(f".{number}\n" for number in range(20_000))
    body = body * (size // len(body) + 1)
    message = mail(body=body)
    sieve.write("active", script_text("editheader", f'addheader "X-Added" "yes"; {REDIRECT} keep;'))
    outcome = sieve.deliver(message, SENDER, pieces=pieces)
    verify(outcome, INBOX, JOE)
    assert outcome.sent[0].mail.octets == b"X-Added: yes\r\n" + on_the_wire(message)
    assert outcome.message.octets == f"Return-Path: <{SENDER}>\nX-Added: yes\n{message}".encode()


@pytest.mark.parametrize(
    ("commands", "fields"),
    [
        (f'addheader "X-A" "1"; {REDIRECT}', ["X-A: 1"]),
        (f'{REDIRECT} addheader "X-A" "1";', []),
        (f'addheader "X-A" "1"; {REDIRECT} deleteheader "X-A";', ["X-A: 1"]),
        (f'addheader "X-A" "gr\u00fcn"; {REDIRECT}', ["X-A: =?UTF-8?B?Z3LDvG4=?="]),
    ],
)
def test_the_header_of_the_moment_is_sent(sieve: Sieve, commands: str, fields: list[str]) -> None:
    message = mail()
    outcome = sieve.run(script_text("editheader", commands), message, SENDER)
    verify(outcome, {}, JOE)
    assert outcome.sent[0].mail.octets == on_the_wire("\n".join([*fields, message]))


def test_each_redirect_has_its_own_header(sieve: Sieve) -> None:
    script = f'{REDIRECT} addheader "X-A" "1"; redirect "{ANN}"; deleteheader "Subject"; keep;'
    outcome = sieve.run(script_text("editheader", script), mail(), SENDER)
    verify(outcome, INBOX, JOE, ANN)
    assert {sent.recipients[0]: (sent.header("X-A"), sent.header("Subject")) for sent in outcome.sent} == {
        JOE: (None, "hello"),
        ANN: ("1", "hello"),
    }
    assert (outcome.message.header("X-A"), outcome.message.header("Subject")) == ("1", None)


def test_a_redirected_message_has_our_trace(site: Site, sink: Sink) -> None:
    """Received on top, and no Return-Path, which only the last host adds (RFC 5321 section 4.4)."""
    Sieve(site, sink).write("active", REDIRECT)
    message = on_the_wire(mail("Received: from elsewhere"))
    client = connected(site)
    [reply] = client.deliver(message, "jane@example.com", sender=SENDER)
    assert reply.startswith("250 2.1.5 Ok")
    client.leave()
    [sent] = map(Sent, sink.mails)
    received, other = sent.headers("Received")
    assert re.match(r"from client\.example .*by mx\.example\.com .*for <jane@example\.com>;", received)
    assert other == "from elsewhere"
    assert "return-path" not in sent.names
    assert sent.mail.octets.endswith(message)
    assert sent.mail.octets.startswith(b"Received: from client.example")
    assert site.files("jane") == []


@pytest.mark.parametrize("lacks", ["PIPELINING", "SIZE", "DSN", "SMTPUTF8", "ENHANCEDSTATUSCODES", "8BITMIME"])
def test_a_server_that_lacks_something_gets_mail(sieve: Sieve, sink: Sink, lacks: str) -> None:
    sink.extensions.discard(lacks)
    verify(sieve.run(REDIRECT, mail(), SENDER), {}, JOE)


def test_a_server_of_old_gets_mail(sieve: Sieve, sink: Sink) -> None:
    sink.replies["ehlo"] = "502 5.5.1 What?"
    outcome = sieve.run(REDIRECT, mail(), SENDER)
    verify(outcome, {}, JOE)
    assert outcome.sent[0].mail.options == ()


def test_eight_bits_are_announced(sieve: Sieve) -> None:
    message = mail(body="gr\u00fcn \udcff\n").encode("utf-8", "surrogateescape")
    outcome = sieve.run(REDIRECT, message, SENDER)
    verify(outcome, {}, JOE)
    assert "BODY=8BITMIME" in outcome.sent[0].mail.options
    assert outcome.sent[0].mail.octets == on_the_wire(message)


def test_eight_bits_are_not_sent_to_a_server_that_cannot_take_them(sieve: Sieve, sink: Sink) -> None:
    """RFC 6152 section 3: it is a failure for good."""
    sink.extensions.discard("8BITMIME")
    outcome = sieve.run(REDIRECT, mail(body="gr\u00fcn\n"), SENDER)
    verify(outcome, INBOX)
    assert tries(outcome) == [("redirect", f"<{JOE}>", "permanent")]


@pytest.mark.parametrize(
    ("sender", "address"),
    [("j\u00f6@example.org", JOE), (SENDER, "j\u00f6@example.net"), (SENDER, "joe@\u00e4.example")],
)
def test_addresses_in_utf8(site: Site, sink: Sink, sender: str, address: str) -> None:
    sieve = Sieve(site, sink)
    outcome = sieve.run(f'redirect "{address}";', mail(), sender)
    [sent] = outcome.sent
    verify(outcome, {}, *sent.recipients)
    if sent.recipients == [address]:
        assert "SMTPUTF8" in sent.mail.options
        assert sent.mail.reverse_path == sender
    else:
        assert sent.recipients == ["joe@xn--4ca.example"]
    sink.extensions.discard("SMTPUTF8")
    outcome = sieve.run(f'redirect "{address}";', mail(), sender)
    if not outcome.sent:
        verify(outcome, INBOX)
        assert tries(outcome) == [("redirect", f"<{address}>", "permanent")]
    else:
        assert outcome.sent[0].recipients == ["joe@xn--4ca.example"]


def test_smtputf8_is_asked_for_only_where_it_is_needed(sieve: Sieve) -> None:
    outcome = sieve.run(REDIRECT, mail("X-Name: gr\u00fcn"), SENDER)
    verify(outcome, {}, JOE)
    assert "SMTPUTF8" not in outcome.sent[0].mail.options


# redirect: loops and second tries


def test_a_message_that_comes_again_is_not_sent_again(sieve: Sieve, clock: Clock) -> None:
    """Within the seven days for which clients try; it is redirected already, so nothing is left to do."""
    message = mail()
    verify(sieve.run(REDIRECT, message, SENDER), {}, JOE)
    for days in (0, 1.5, 6.9):
        clock.ahead = days * DAY
        verify(sieve.run(REDIRECT, message, SENDER), {})
    clock.ahead = 7.1 * DAY
    verify(sieve.run(REDIRECT, message, SENDER), {}, JOE)


def test_a_message_that_comes_again_is_sent_to_whom_it_was_not(sieve: Sieve) -> None:
    message = mail()
    verify(sieve.run(REDIRECT, message, SENDER), {}, JOE)
    verify(sieve.run(f'{REDIRECT} redirect "{ANN}";', message, SENDER), {}, ANN)


def test_a_message_that_comes_back_with_another_header_is_kept(sieve: Sieve, clock: Clock) -> None:
    """It is a loop, unless a day has gone by."""
    number = next(NUMBERS)
    verify(sieve.run(REDIRECT, mail(number=number), SENDER), {}, JOE)
    outcome = sieve.run(REDIRECT, mail("X-Hop: 1", number=number), SENDER)
    verify(outcome, INBOX)
    [event] = outcome.fields("redirect-not-followed")
    assert event["recipient"] == "<jane@example.com>"
    assert event["to"] == f"<{JOE}>"
    assert event["msgid"] == f"<{number}@example.org>"
    assert event["cause"]
    verify(sieve.run(f'redirect "{ANN}";', mail("X-Hop: 2", number=number), SENDER), {}, ANN)
    clock.ahead = 1.1 * DAY
    verify(sieve.run(REDIRECT, mail("X-Hop: 3", number=number), SENDER), {}, JOE)


def test_a_loop_is_kept_where_the_sub_address_says(site: Site, sink: Sink) -> None:
    sieve = Sieve(site, sink, sieve_subaddress_folder="yes")
    sieve.add_folder("lists")
    sieve.write("active", REDIRECT)
    number = next(NUMBERS)
    verify(sieve.deliver(mail(number=number), SENDER, "jane+lists"), {}, JOE)
    verify(sieve.deliver(mail("X-Hop: 1", number=number), SENDER, "jane+lists"), {"lists": ""})


def test_a_loop_is_kept_once(sieve: Sieve) -> None:
    script = script_text("copy fileinto", f'fileinto "Work"; redirect :copy "{JOE}";')
    number = next(NUMBERS)
    verify(sieve.run(script, mail(number=number), SENDER), {"Work": ""}, JOE)
    outcome = sieve.run(script, mail("X-Hop: 1", number=number), SENDER)
    assert "Work" in outcome.placed
    assert outcome.sent == []
    assert len(outcome.fields("redirect-not-followed")) == 1


def test_messages_without_an_id_are_told_apart_by_all_of_them(sieve: Sieve) -> None:
    first, second = ("From: someone@example.org\nSubject: hello\n\n" + body for body in ("one\n", "two\n"))
    verify(sieve.run(REDIRECT, first, SENDER), {}, JOE)
    verify(sieve.run(REDIRECT, second, SENDER), {}, JOE)


def test_a_device_may_send_the_same_message_without_an_id_again(sieve: Sieve) -> None:
    """It is no second try: the first one has been answered."""
    message = "From: device@example.org\nSubject: alarm\n\nThe door is open.\n"
    for _ in range(3):
        verify(sieve.run(REDIRECT, message, SENDER), {}, JOE)


def test_a_second_try_of_a_message_without_an_id_does_nothing_twice(sieve: Sieve, sink: Sink) -> None:
    message = "From: device@example.org\nSubject: alarm\n\nThe door is open.\n"
    script = f'redirect "a@example.net"; {REDIRECT}'
    sink.refuse[JOE] = "451 4.3.0 Not now"
    verify(sieve.run(script, message, SENDER), {}, "a@example.net", reply="451 4.4.0")
    sink.refuse.clear()
    verify(sieve.run(script, message, SENDER), {}, JOE)


def test_an_empty_message_id_is_none(sieve: Sieve) -> None:
    for body in ("one", "two"):
        message = f"From: someone@example.org\nMessage-ID: <>\n\n{body}\n"
        verify(sieve.run(REDIRECT, message, SENDER), {}, JOE)


def test_two_users_with_the_same_message(site: Site, sink: Sink) -> None:
    """What was sent for one of them was not sent for the other."""
    site.add_user("joe")
    sieve = Sieve(site, sink, default=REDIRECT)
    message = mail()
    verify(sieve.deliver(message, SENDER, "jane"), {}, JOE)
    verify(sieve.deliver(message, SENDER, "joe"), {}, JOE)
    verify(sieve.deliver(message, SENDER, "joe", "jane"), {}, reply="250 2.1.5, 250 2.1.5")


@pytest.mark.parametrize(("hops", "is_sent"), [(0, True), (100, True), (101, False), (5000, False)])
def test_a_message_of_many_hops_is_not_sent_on(sieve: Sieve, hops: int, is_sent: bool) -> None:
    """It is kept; RFC 5321 section 6.3."""
    outcome = sieve.run(REDIRECT, mail(*["Received: by relay.example; Sun, 22 Nov 2026 12:00:00 +0000"] * hops), SENDER)
    if is_sent:
        verify(outcome, {}, JOE)
    else:
        verify(outcome, INBOX)
        [event] = outcome.fields("redirect-not-followed")
        assert event["to"] == f"<{JOE}>"
        assert "Received" in event["cause"]


def test_hops_are_counted_in_the_header_that_has_arrived(sieve: Sieve) -> None:
    script = script_text("editheader", f'deleteheader "X-Trace"; {REDIRECT}')
    outcome = sieve.run(script, mail(*["RECEIVED : by relay.example"] * 101), SENDER)
    verify(outcome, INBOX)


def test_a_redirect_is_sent_even_if_the_database_cannot_be_used(site: Site, sink: Sink) -> None:
    """Mail is not lost for that, though loops last longer."""
    folder = site.root / "folder.db"
    folder.mkdir()
    sieve = Sieve(site, sink, duplicate_db_path=str(folder))
    verify(sieve.run(REDIRECT, mail(), SENDER), {}, JOE)


# redirect: failures

POINTS = ["mail", "rcpt", "data", "message"]


@pytest.mark.parametrize("point", [*POINTS, "connect"])
@pytest.mark.parametrize("reply", ["451 4.3.0 Not now", "421 4.3.2 Not now", ""])
def test_a_redirect_that_fails_for_now_is_tried_again(
    sieve: Sieve, sink: Sink, site: Site, point: str, reply: str
) -> None:
    """By the client, if nothing was stored. An empty reply hangs up."""
    message = mail()
    sink.replies[point] = reply
    outcome = sieve.run(REDIRECT, message, SENDER)
    verify(outcome, {}, reply="451 4.4.0")
    assert tries(outcome) == [("redirect", f"<{JOE}>", "temporary")]
    if reply:
        assert "Not now" in outcome.fields("mail-not-sent")[0]["cause"]
    sink.replies.clear()
    forget_failures(sieve)
    verify(sieve.run(REDIRECT, message, SENDER), {}, JOE)
    verify(sieve.run(REDIRECT, message, SENDER), {})


@pytest.mark.parametrize("point", POINTS)
def test_a_redirect_that_fails_for_good_is_a_keep(sieve: Sieve, sink: Sink, point: str) -> None:
    sink.replies[point] = "550 5.7.1 Never"
    outcome = sieve.run(REDIRECT, mail(), SENDER)
    verify(outcome, INBOX)
    [event] = outcome.fields("mail-not-sent")
    assert (event["action"], event["to"], event["result"]) == ("redirect", f"<{JOE}>", "permanent")
    assert event["recipient"] == "<jane@example.com>"
    assert "550 5.7.1 Never" in event["cause"]
    assert [each["mailbox"] for each in outcome.fields("delivered")] == [str(sieve.site.spool / "jane")]


def test_a_redirect_that_fails_for_good_is_kept_where_the_sub_address_says(site: Site, sink: Sink) -> None:
    sieve = Sieve(site, sink, sieve_subaddress_folder="yes")
    sieve.add_folder("lists")
    sieve.write("active", REDIRECT)
    sink.refuse[JOE] = "550 5.1.1 Who?"
    verify(sieve.deliver(mail(), SENDER, "jane+lists"), {"lists": ""})


@pytest.mark.parametrize("reply", ["451 4.3.0 Not now", "550 5.7.1 Never"])
@pytest.mark.parametrize(
    ("requires", "commands", "placed"),
    [
        ("", f"{REDIRECT} keep;", INBOX),
        ("", f"keep; {REDIRECT}", INBOX),
        ("copy", f'redirect :copy "{JOE}";', INBOX),
        ("fileinto", f'{REDIRECT} fileinto "Work";', {"Work": ""}),
        ("imap4flags", f'setflag "\\\\Flagged"; keep; {REDIRECT}', {"INBOX": "\\Flagged"}),
    ],
)
def test_a_redirect_that_fails_leaves_what_was_stored(
    sieve: Sieve, sink: Sink, reply: str, requires: str, commands: str, placed: dict[str, str]
) -> None:
    """Nobody tries again: the client has handed over its responsibility."""
    sink.refuse[JOE] = reply
    outcome = sieve.run(script_text(requires, commands), mail(), SENDER)
    verify(outcome, placed)
    assert tries(outcome) == [("redirect", f"<{JOE}>", "temporary" if reply.startswith("4") else "permanent")]


def test_the_next_try_sends_only_what_was_not_sent(sieve: Sieve, sink: Sink) -> None:
    script = f'redirect "a@example.net"; {REDIRECT} redirect "{ANN}";'
    sink.refuse[JOE] = "451 4.3.0 Not now"
    message = mail()
    outcome = sieve.run(script, message, SENDER)
    assert outcome.reply == "451 4.4.0"
    assert outcome.placed == {}
    sent = [sent.recipients[0] for sent in outcome.sent]
    assert set(sent) <= {"a@example.net", ANN}
    sink.refuse.clear()
    outcome = sieve.run(script, message, SENDER)
    verify(outcome, {}, *sorted({"a@example.net", JOE, ANN} - set(sent)))
    verify(sieve.run(script, message, SENDER), {})


def test_one_redirect_fails_for_good_and_one_for_now(sieve: Sieve, sink: Sink) -> None:
    """The message is not lost, and the other two get it once."""
    script = f'redirect "a@example.net"; {REDIRECT} redirect "{ANN}";'
    sink.refuse[JOE] = "550 5.1.1 Who?"
    sink.refuse[ANN] = "451 4.3.0 Not now"
    message = mail()
    outcomes = [sieve.run(script, message, SENDER)]
    sink.refuse.pop(ANN)
    if outcomes[0].reply.startswith("4"):
        outcomes.append(sieve.run(script, message, SENDER))
    assert outcomes[-1].reply == "250 2.1.5"
    assert [outcome.placed for outcome in outcomes if outcome.placed] == [INBOX]
    sent = [recipient for outcome in outcomes for sent in outcome.sent for recipient in sent.recipients]
    assert sorted(sent) == sorted({"a@example.net", *sent})


def test_another_recipient_does_not_wait_for_a_redirect_that_failed(site: Site, sink: Sink) -> None:
    site.add_user("joe")
    sieve = Sieve(site, sink)
    sieve.write("active", REDIRECT)
    sink.refuse[JOE] = "451 4.3.0 Not now"
    outcome = sieve.deliver(mail(), SENDER, "jane", "joe")
    assert outcome.reply == "451 4.4.0, 250 2.1.5"
    assert len(site.files("joe")) == 1
    assert outcome.placed == {}


def test_a_second_try_does_nothing_twice(sieve: Sieve, sink: Sink) -> None:
    """Neither the redirect that went through, nor the notification, nor the answer."""
    script = script_text(
        "vacation enotify", f'redirect "a@example.net"; {REDIRECT} vacation "away"; notify "mailto:{ANN}";'
    )
    sink.refuse[JOE] = "451 4.3.0 Not now"
    message = mail()
    assert sieve.run(script, message, SENDER).reply == "451 4.4.0"
    sink.refuse.clear()
    assert sieve.run(script, message, SENDER).reply == "250 2.1.5"
    assert sorted(each.recipients[0] for each in sink.mails) == ["a@example.net", ANN, JOE, SENDER]


def test_what_is_not_stored_is_not_sent(site: Site, sink: Sink) -> None:
    """Nor recorded: the next try does all of it."""
    sieve = Sieve(site, sink, lmtp_strict_quota="yes")
    quota = site.spool / "jane/maildirsize"
    quota.write_text("10S\n0 0\n")
    site.give(quota)
    script = script_text(
        "enotify vacation copy", f'redirect :copy "{JOE}"; notify "mailto:{ANN}"; vacation "I am away."; keep;'
    )
    message = mail()
    outcome = sieve.run(script, message, SENDER)
    assert outcome.reply.startswith("4")
    assert outcome.sent == []
    quota.unlink()
    verify(sieve.run(script, message, SENDER), INBOX, JOE, ANN, SENDER)


def test_a_failure_of_one_of_two_tries_in_a_day_is_no_loop(sieve: Sieve, sink: Sink) -> None:
    """The client's second try may have another header, for an MTA in between may have added to it."""
    number = next(NUMBERS)
    sink.refuse[JOE] = "451 4.3.0 Not now"
    assert sieve.run(REDIRECT, mail(number=number), SENDER).reply == "451 4.4.0"
    sink.refuse.clear()
    verify(sieve.run(REDIRECT, mail("X-Hop: 1", number=number), SENDER), {}, JOE)


# How mail leaves: SMTP


def test_a_server_that_is_not_there_is_a_failure_for_now(site: Site) -> None:
    sieve = Sieve(site, smtp_backend="host", smtp_host=f"127.0.0.1:{free_port()}")
    outcome = sieve.run(REDIRECT, mail(), SENDER)
    verify(outcome, {}, reply="451 4.4.0")
    assert tries(outcome) == [("redirect", f"<{JOE}>", "temporary")]


def test_a_host_that_does_not_exist_is_a_failure_for_now(site: Site) -> None:
    sieve = Sieve(site, smtp_backend="host", smtp_host="nowhere.invalid:25")
    outcome = sieve.run(REDIRECT, mail(), SENDER)
    verify(outcome, {}, reply="451 4.4.0")
    assert tries(outcome) == [("redirect", f"<{JOE}>", "temporary")]


@pytest.fixture
def authority(site: Site) -> Authority:
    return Authority(site)


def secure_sink(authority: Authority, name: str, **settings: object) -> Sink:
    """A server with a certificate for that name."""
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.sign(name))
    return Sink(tls=context, **settings)  # type: ignore[arg-type]


def over_tls(site: Site, sink: Sink, authority: Authority, host: str = "localhost", **options: str) -> Sieve:
    """A user whose mail goes to that server by STARTTLS."""
    smtp_host = f"{host}:{sink.port}/tls"
    return Sieve(site, sink, smtp_host=smtp_host, **{"smtp_tls_ca_file": str(authority.file), **options})


def test_mail_leaves_by_tls(site: Site, authority: Authority) -> None:
    with secure_sink(authority, "localhost") as sink:
        outcome = over_tls(site, sink, authority).run(REDIRECT, mail(), SENDER)
        verify(outcome, {}, JOE)
        assert outcome.sent[0].mail.secure
        assert outcome.sent[0].mail.user == ""


@pytest.mark.parametrize("fault", ["name", "authority", "no starttls", "system"])
def test_mail_does_not_leave_without_a_certificate_that_is_right(
    site: Site, authority: Authority, fault: str, tmp_path: Path
) -> None:
    with secure_sink(authority, "other.example" if fault == "name" else "localhost") as sink:
        options = {}
        if fault == "no starttls":
            sink.extensions.discard("STARTTLS")
        elif fault == "authority":
            other = Site()
            try:
                (tmp_path / "other.pem").write_bytes(Authority(other).file.read_bytes())
            finally:
                other.close()
            options = {"smtp_tls_ca_file": str(tmp_path / "other.pem")}
        if fault == "system":
            sieve = Sieve(site, sink, smtp_host=f"localhost:{sink.port}/tls")
        else:
            sieve = over_tls(site, sink, authority, **options)
        outcome = sieve.run(REDIRECT, mail(), SENDER)
        verify(outcome, {}, reply="451 4.4.0")
        assert tries(outcome) == [("redirect", f"<{JOE}>", "temporary")]
        assert not any(line.startswith("MAIL") for line in sink.commands)


@pytest.mark.parametrize("mechanisms", [("PLAIN",), ("LOGIN",), ("PLAIN", "LOGIN")])
def test_lmtpd_authenticates(site: Site, authority: Authority, mechanisms: tuple[str, ...]) -> None:
    users = {"relay": SECRET}
    with secure_sink(authority, "localhost", users=users, required=True, mechanisms=mechanisms) as sink:
        sieve = over_tls(site, sink, authority, smtp_auth_authname="relay", smtp_auth_password=SECRET)
        outcome = sieve.run(REDIRECT, mail(), SENDER)
        verify(outcome, {}, JOE)
        assert outcome.sent[0].mail.user == "relay"
        assert outcome.sent[0].mail.secure


def test_a_password_that_is_refused_is_a_failure_for_now(site: Site, authority: Authority) -> None:
    """The message is good; the configuration is not. The log does not tell the password."""
    with secure_sink(authority, "localhost", users={"relay": "another"}, required=True) as sink:
        sieve = over_tls(site, sink, authority, smtp_auth_authname="relay", smtp_auth_password=SECRET)
        outcome = sieve.run(REDIRECT, mail(), SENDER)
        verify(outcome, {}, reply="451 4.4.0")
        assert tries(outcome) == [("redirect", f"<{JOE}>", "temporary")]
        assert "535" in outcome.fields("mail-not-sent")[0]["cause"]
        assert not any(SECRET in value for event in outcome.events for value in event.fields.values())


def test_lmtpd_does_not_authenticate_where_it_is_told_so(site: Site, authority: Authority) -> None:
    with secure_sink(authority, "localhost", users={"relay": SECRET}) as sink:
        sieve = over_tls(site, sink, authority, smtp_auth_authname="relay", smtp_auth_password=SECRET)
        site.configure(smtp_host=f"localhost:{sink.port}/tls/noauth")
        options = {name: value for name, value in site.options.items() if name.startswith(("smtp_", "sieve_"))}
        sieve = Sieve(site, sink, **{**options, "smtp_host": f"localhost:{sink.port}/tls/noauth"})
        outcome = sieve.run(REDIRECT, mail(), SENDER)
        verify(outcome, {}, JOE)
        assert outcome.sent[0].mail.user == ""


def test_on_this_host_a_password_may_go_in_the_clear(site: Site) -> None:
    with Sink(users={"relay": SECRET}, in_clear=True, required=True) as sink:
        sieve = Sieve(site, sink, smtp_auth_authname="relay", smtp_auth_password=SECRET)
        outcome = sieve.run(REDIRECT, mail(), SENDER)
        verify(outcome, {}, JOE)
        assert outcome.sent[0].mail.user == "relay"


def test_a_server_that_says_ipv6_address_and_port(site: Site, sink: Sink) -> None:
    sieve = Sieve(site, sink, smtp_host=f"localhost:{sink.port}")
    verify(sieve.run(REDIRECT, mail(), SENDER), {}, JOE)


# How mail leaves: sendmail


@pytest.fixture
def sendmail(site: Site) -> SendmailScript:
    return SendmailScript(site)


def by_sendmail(site: Site, program: SendmailScript | str) -> Sieve:
    return Sieve(site, sendmail=program if isinstance(program, str) else str(program.path))


@pytest.mark.parametrize(
    ("sender", "given", "address"),
    [
        (SENDER, SENDER, JOE),
        ("", "<>", JOE),
        ("root", "root@mx.example.com", JOE),
        ("-oQ/tmp@example.org", "-oQ/tmp@example.org", "-oA/tmp@example.net"),
        ("a$(id)`id`;@example.org", "a$(id)`id`;@example.org", JOE),
    ],
)
def test_sendmail_gets_the_mail(site: Site, sendmail: SendmailScript, sender: str, given: str, address: str) -> None:
    sieve = by_sendmail(site, sendmail)
    message = mail(body=".\n..\nx\n")
    if "$" in sender:
        sender = f'"{sender.partition("@")[0]}"@example.org'
        given = sender
    outcome = sieve.run(f'redirect "{address}";', message, sender)
    verify(outcome, {})
    [ran] = sendmail.runs
    assert ran.arguments == ("-i", "-oep", "-f", given, "--", address)
    assert ran.octets == message.encode()
    assert [event["to"] for event in outcome.fields("mail-sent")] == [f"<{address}>"]


def test_sendmail_gets_a_large_message(site: Site, sendmail: SendmailScript) -> None:
    message = mail(body="0123456789\n" * 300_000)
    sieve = by_sendmail(site, sendmail)
    sieve.write("active", REDIRECT)
    verify(sieve.deliver(message, SENDER, pieces=65_536), {})
    [ran] = sendmail.runs
    assert ran.octets == message.encode()


@pytest.mark.parametrize(
    ("status", "result"),
    [
        (os.EX_TEMPFAIL, "temporary"),
        (os.EX_NOUSER, "permanent"),
        (os.EX_NOHOST, "permanent"),
        (os.EX_UNAVAILABLE, "permanent"),
        (os.EX_DATAERR, "permanent"),
        (os.EX_OSERR, "temporary"),
        (os.EX_CONFIG, "temporary"),
        (os.EX_USAGE, "temporary"),
        (1, "temporary"),
        (127, "temporary"),
    ],
)
def test_the_exit_status_of_sendmail(site: Site, sendmail: SendmailScript, status: int, result: str) -> None:
    """By sysexits(3): only what speaks of the message or the address is a failure for good."""
    sendmail.exit_with(status, words="sendmail: fatal: the reason\n")
    message = mail()
    sieve = by_sendmail(site, sendmail)
    outcome = sieve.run(REDIRECT, message, SENDER)
    if result == "temporary":
        verify(outcome, {}, reply="451 4.4.0")
    else:
        verify(outcome, INBOX)
    assert tries(outcome) == [("redirect", f"<{JOE}>", result)]
    assert "the reason" in outcome.fields("mail-not-sent")[0]["cause"]
    sendmail.exit_with(0)
    if result == "temporary":
        verify(sieve.run(REDIRECT, message, SENDER), {})
        assert len(sendmail.runs) == 2


SENDMAIL_FAULTS = {
    "signal": "#!/bin/sh\ncat >/dev/null\nkill -9 $$\n",
    "does not read": "#!/bin/sh\nexec <&-\nexit 75\n",
    "no program": "no program",
    "not executable": "",
    "missing": "",
    "directory": "",
}


@pytest.mark.parametrize("fault", SENDMAIL_FAULTS)
@pytest.mark.parametrize("size", [1, 2_000_000])
def test_a_sendmail_that_does_not_work_is_a_failure_for_now(site: Site, fault: str, size: int) -> None:
    program = site.root / "mailer"
    if fault == "directory":
        program.mkdir()
    elif fault != "missing":
        program.write_text(SENDMAIL_FAULTS[fault] or "#!/bin/sh\nexit 0\n")
        program.chmod(0o644 if fault == "not executable" else 0o755)
    sieve = by_sendmail(site, str(program))
    outcome = sieve.run(REDIRECT, mail(body="x" * 70 + "\n" + "0123456\n" * (size // 8)), SENDER)
    verify(outcome, {}, reply="451 4.4.0")
    assert tries(outcome) == [("redirect", f"<{JOE}>", "temporary")]
    if fault != "signal" and fault != "does not read":
        assert str(program) in outcome.fields("mail-not-sent")[0]["cause"]


def test_what_sendmail_prints_is_not_the_clients(site: Site) -> None:
    """Its standard output is none of the session's, nor is its input."""
    program = site.root / "mailer"
    program.write_text("#!/bin/sh\ncat >/dev/null\necho '250 2.1.5 Forged'\nexit 67\n")
    program.chmod(0o755)
    by_sendmail(site, str(program)).write("active", REDIRECT)
    client = connected(site)
    [reply] = client.deliver(on_the_wire(mail()), "jane@example.com", sender=SENDER)
    assert reply.startswith("250 2.1.5 Ok")
    client.leave()
    assert len(site.files("jane")) == 1


def test_automatic_mail_by_sendmail(site: Site, sendmail: SendmailScript) -> None:
    sieve = by_sendmail(site, sendmail)
    verify(sieve.run(script_text("vacation", 'vacation "I am away.";'), mail(), SENDER), INBOX)
    [ran] = sendmail.runs
    assert "<>" in ran.arguments
    assert ran.arguments[-2:] == ("--", SENDER)
    assert parsed(ran.octets)["Auto-Submitted"] == "auto-replied"


# reject and ereject


@pytest.mark.parametrize("action", ["reject", "ereject"])
@pytest.mark.parametrize(
    ("reason", "lines"),
    [
        ('"Go away."', ["550 5.7.1 Go away."]),
        ('"One.\nTwo."', ["550-5.7.1 One.", "550 5.7.1 Two."]),
        ("text:\r\nOne.\r\n\r\n..\r\nTwo.\r\n.\r\n", ["550-5.7.1 One.", "550-5.7.1 ", "550-5.7.1 .", "550 5.7.1 Two."]),
        ('"  blanks  "', ["550 5.7.1 blanks"]),
    ],
)
def test_a_rejected_message_is_refused(sieve: Sieve, action: str, reason: str, lines: list[str]) -> None:
    """RFC 5429 section 2.5."""
    outcome = sieve.run(script_text(action, f"{action} {reason};"), mail(), SENDER)
    verify(outcome, {}, reply="550 5.7.1")
    assert [line.rstrip() for line in outcome.reply_lines] == [line.rstrip() for line in lines]
    [event] = outcome.fields("rejected")
    assert (event["recipient"], event["reply"]) == ("<jane@example.com>", "550 5.7.1")
    assert outcome.fields("discarded") == outcome.fields("not-delivered") == []


@pytest.mark.parametrize("action", ["reject", "ereject"])
@pytest.mark.parametrize(
    "reason",
    ["x" * 3000, "word " * 600, "x\n" * 500, "", "\n\n", "a\rb", "a\tb\x1b[2J\x7fc", "250 2.1.5 Ok\n250 2.1.5 Ok"],
)
def test_the_reply_of_a_rejection_is_one_that_smtp_allows(sieve: Sieve, action: str, reason: str) -> None:
    """RFC 5321 section 4.5.3.1.5: lines of at most 512 octets; each with the code, and none of them empty."""
    outcome = sieve.run(script_text(action, f'{action} "{reason}";'), mail(), SENDER)
    verify(outcome, {}, reply="550 5.7.1")
    lines = outcome.reply_lines
    assert all(re.fullmatch(r"550-5\.7\.1 [\t -~]*", line) for line in lines[:-1])
    assert re.fullmatch(r"550 5\.7\.1 [\t -~]+", lines[-1])
    assert max(map(len, lines)) <= 510
    text = "".join(line[10:] for line in lines)
    if set(reason) <= set("xword \n") and reason.strip():
        assert text.replace(" ", "") == reason.replace(" ", "").replace("\n", "")[: len(text.replace(" ", ""))]


def test_a_rejection_on_the_wire(site: Site, sink: Sink) -> None:
    """Each recipient has a reply of its own (RFC 2033)."""
    site.add_user("joe")
    Sieve(site, sink).write("active", script_text("reject", 'reject "One.\nTwo.";'))
    client = connected(site)
    assert client.command(f"MAIL FROM:<{SENDER}>").startswith("250")
    for name in ("joe", "jane", "joe+x"):
        assert client.command(f"RCPT TO:<{name}@example.com>").startswith("250")
    assert client.command("DATA").startswith("354")
    client.send(on_the_wire(mail()) + b".\r\n")
    first, second, third = (client.reply() for _ in range(3))
    assert second == ["550-5.7.1 One.", "550 5.7.1 Two."]
    assert [line[:12] for line in (*first, *third)] == ["250 2.1.5 Ok"] * 2
    client.leave()
    assert site.files("jane") == []
    assert sink.mails == []


def test_the_text_of_ereject_that_is_not_ascii_is_replaced(sieve: Sieve) -> None:
    """RFC 5429 section 2.1.1."""
    outcome = sieve.run(script_text("ereject", 'ereject "Gr\u00fc\u00dfe";'), mail(), SENDER)
    verify(outcome, {}, reply="550 5.7.1")
    [line] = outcome.reply_lines
    assert line.isascii()
    assert len(line) > 20
    assert "Gr" not in line


def report(outcome: Outcome) -> tuple[Sent, EmailMessage, dict[str, str], EmailMessage]:
    """The only mail, a report by RFC 6522 and 8098; its explanation, its fields, and what it says of the message."""
    [sent] = outcome.sent
    message = sent.message
    assert message.get_content_type() == "multipart/report"
    assert message.get_param("report-type") == "disposition-notification"
    explanation, notification, original = message.iter_parts()
    assert isinstance(explanation, EmailMessage)
    assert isinstance(original, EmailMessage)
    assert notification.get_content_type() == "message/disposition-notification"
    payload = notification.get_payload()
    assert isinstance(payload, list)
    [fields] = payload
    assert isinstance(fields, Message)
    return sent, explanation, {name: str(value) for name, value in fields.items()}, original


REPORTED = [
    ("", 'reject "Gr\u00fc\u00dfe\nund Tsch\u00fc\u00df";', "Gr\u00fc\u00dfe\nund Tsch\u00fc\u00df"),
    ("no", 'reject "Go away.";', "Go away."),
]


@pytest.mark.parametrize(("use_lmtp_reject", "command", "reason"), REPORTED)
def test_a_rejection_by_report(site: Site, sink: Sink, use_lmtp_reject: str, command: str, reason: str) -> None:
    """RFC 5429 section 2.2.1: an MDN, whose disposition is "deleted"."""
    options = {"sieve_use_lmtp_reject": use_lmtp_reject} if use_lmtp_reject else {}
    sieve = Sieve(site, sink, **options)
    message = mail("X-Original: yes", number=next(NUMBERS))
    outcome = sieve.run(script_text("reject", command), message, SENDER)
    verify(outcome, {}, SENDER)
    sent, explanation, fields, original = report(outcome)
    assert sent.mail.reverse_path == ""
    assert sent.mail.recipient_options == (("NOTIFY=NEVER",),)
    assert parseaddr(sent.header("To") or "")[1] == SENDER
    assert parseaddr(sent.header("From") or "")[1].endswith("@example.com")
    assert (sent.header("Auto-Submitted") or "").startswith("auto-replied")
    assert sent.header("MIME-Version") == "1.0"
    assert sent.header("In-Reply-To") == parsed(message.encode())["Message-ID"]
    assert {"subject", "date", "message-id"} <= set(sent.names)
    assert len(sent.names) == len(set(sent.names))
    assert explanation.get_content_type() == "text/plain"
    assert reason in explanation.get_content().replace("\r\n", "\n")
    assert len(explanation.get_content()) > len(reason) + 20  # RFC 5429: it also says that a filter did it
    assert fields["Final-Recipient"].replace(" ", "") == "rfc822;jane@example.com"
    assert fields["Original-Message-ID"] == parsed(message.encode())["Message-ID"]
    assert re.fullmatch(r"automatic-action/MDN-sent-automatically; ?deleted", fields["Disposition"])
    assert set(fields) <= {
        "Reporting-UA",
        "Final-Recipient",
        "Original-Recipient",
        "Original-Message-ID",
        "Disposition",
    }
    assert original.get_content_type() in {"message/rfc822", "text/rfc822-headers"}
    assert b"X-Original: yes" in original.as_bytes()
    [event] = outcome.fields("mail-sent")
    assert (event["action"], event["to"]) == ("reject", f"<{SENDER}>")
    assert len(outcome.fields("rejected")) == 1


def test_ereject_is_never_by_report(site: Site, sink: Sink) -> None:
    sieve = Sieve(site, sink, sieve_use_lmtp_reject="no")
    outcome = sieve.run(script_text("ereject", 'ereject "Go away.";'), mail(), SENDER)
    verify(outcome, {}, reply="550 5.7.1")
    assert outcome.reply_lines == ["550 5.7.1 Go away."]


@pytest.mark.parametrize("use_lmtp_reject", ["yes", "no"])
@pytest.mark.parametrize("reason", ["Gr\u00fc\u00dfe", "Go away."])
def test_nobody_gets_a_report_on_a_report(site: Site, sink: Sink, use_lmtp_reject: str, reason: str) -> None:
    """RFC 5429 section 2.2.1: a message from <> is refused, in English if it has to be."""
    sieve = Sieve(site, sink, sieve_use_lmtp_reject=use_lmtp_reject)
    outcome = sieve.run(script_text("reject", f'reject "{reason}";'), mail(), "")
    verify(outcome, {}, reply="550 5.7.1")
    [line] = outcome.reply_lines
    assert line.isascii()
    assert (line == "550 5.7.1 Go away.") or not reason.isascii() or use_lmtp_reject == "no"


def test_a_report_about_a_hostile_message(sieve: Sieve) -> None:
    message = mail(
        "Subject: =?utf-8?q?x=0D=0ABcc:_victim=40example.net?=",
        "Content-Type: multipart/report; boundary=a",
        "X-Long: " + "x" * 5000,
        "X-Bits: gr\u00fcn \udcff",
        "X-Boundary: --a--",
        body="--a\n\n--a--\n",
    ).encode("utf-8", "surrogateescape")
    outcome = sieve.run(script_text("reject", 'reject "Gr\u00fc\u00dfe\n--a--\n";'), message, SENDER)
    sent, explanation, _, _ = report(outcome)
    assert "bcc" not in sent.names
    assert "Gr\u00fc\u00dfe" in explanation.get_content()
    assert sent.recipients == [SENDER]
    assert max(len(line) for line in sent.mail.octets.partition(b"\r\n\r\n")[0].split(b"\r\n")) <= 998


def test_the_report_about_a_large_message_is_small(site: Site, sink: Sink) -> None:
    sieve = Sieve(site, sink, sieve_use_lmtp_reject="no")
    sieve.write("active", script_text("reject", 'reject "Go away.";'))
    outcome = sieve.deliver(mail(body="0123456789\n" * 500_000), SENDER, pieces=65_536)
    verify(outcome, {}, SENDER)
    assert len(outcome.sent[0].mail.octets) < 100_000


@pytest.mark.parametrize("reply", ["451 4.3.0 Not now", "550 5.7.1 Never"])
def test_a_report_that_cannot_be_sent(site: Site, sink: Sink, reply: str) -> None:
    """The client tries again, or the message is kept."""
    sieve = Sieve(site, sink, sieve_use_lmtp_reject="no")
    script, message = script_text("reject", 'reject "Go away.";'), mail()
    sink.refuse[SENDER] = reply
    outcome = sieve.run(script, message, SENDER)
    if reply.startswith("4"):
        assert outcome.reply.startswith("451")
        assert outcome.placed == {}
        sink.refuse.clear()
        verify(sieve.run(script, message, SENDER), {}, SENDER)
        verify(sieve.run(script, message, SENDER), {})
    else:
        verify(outcome, INBOX)
    assert tries(outcome) == [("reject", f"<{SENDER}>", "temporary" if reply.startswith("4") else "permanent")]


@pytest.mark.parametrize("action", ["reject", "ereject"])
@pytest.mark.parametrize(
    ("requires", "commands", "placed"),
    [
        ("", "{}", {}),
        ("", "{} stop;", {}),
        ("", "{} discard;", {}),
        ("", "discard; {}", {}),
        ("", "{} keep;", INBOX),
        ("", "keep; {}", INBOX),
        ("imap4flags", 'setflag "\\\\Seen"; {}', {}),
        ("imap4flags", '{} keep :flags "\\\\Seen";', {"INBOX": "\\Seen"}),
        ("variables", 'set "x" "away."; if true {{ {} }}', {}),
    ],
)
def test_what_goes_with_a_rejection(
    sieve: Sieve, action: str, requires: str, commands: str, placed: dict[str, str]
) -> None:
    """RFC 5429 section 2.4: it cancels the implicit keep, not one that is written."""
    outcome = sieve.run(script_text(f"{action} {requires}", commands.format(f'{action} "no";')), mail(), SENDER)
    verify(outcome, placed, reply="550 5.7.1")
    assert len(outcome.fields("rejected")) == 1


@pytest.mark.parametrize("action", ["reject", "ereject"])
@pytest.mark.parametrize(
    ("requires", "other"),
    [
        ("fileinto", 'fileinto "Work";'),
        ("fileinto copy", 'fileinto :copy "Work";'),
        ("", REDIRECT),
        ("copy", f'redirect :copy "{JOE}";'),
        ("vacation", 'vacation "I am away.";'),
        ("reject", 'reject "other";'),
        ("ereject", 'ereject "other";'),
        ("ihave", 'error "other";'),
    ],
)
def test_what_does_not_go_with_a_rejection(sieve: Sieve, action: str, requires: str, other: str) -> None:
    """In whichever order."""
    for commands in (f'{action} "no"; {other}', f'{other} {action} "no";'):
        if commands.startswith("error"):
            continue
        outcome = sieve.run(script_text(f"{action} {requires}", commands), mail(), SENDER)
        verify_error_at_run_time(outcome)


def test_a_script_of_the_site_rejects(site: Site, sink: Sink) -> None:
    """Then the user's does not run."""
    sieve = Sieve(site, sink, before=script_text("reject", 'reject "Go away.";'))
    verify(sieve.run(script_text("fileinto", 'fileinto "Work";'), mail(), SENDER), {}, reply="550 5.7.1")


def test_what_a_script_of_the_site_has_filed_does_not_keep_the_user_from_rejecting(site: Site, sink: Sink) -> None:
    """RFC 5429 section 2.4: an archive is a reason to do both."""
    sieve = Sieve(site, sink, before=script_text("fileinto copy", 'fileinto :copy "Before";'))
    outcome = sieve.run(script_text("reject", 'reject "Go away.";'), mail(), SENDER)
    verify(outcome, {"Before": ""}, reply="550 5.7.1")


def test_a_rejected_message_is_rejected_again(sieve: Sieve) -> None:
    message = mail()
    for _ in range(2):
        outcome = sieve.run(script_text("reject", 'reject "Go away.";'), message, SENDER)
        verify(outcome, {}, reply="550 5.7.1")


# notify


def notify(arguments: str) -> str:
    return script_text("enotify", f"notify {arguments};")


def notification(outcome: Outcome, placed: dict[str, str] | None = None) -> Sent:
    """The only mail, which is a notification."""
    assert outcome.errors == []
    assert outcome.reply == "250 2.1.5"
    assert outcome.placed == (INBOX if placed is None else placed)
    [sent] = outcome.sent
    assert re.fullmatch(r'auto-notified; ?owner-email="?jane@example\.com"?', sent.header("Auto-Submitted") or "")
    return sent


def test_a_notification(sieve: Sieve) -> None:
    """RFC 5436 section 2.7. It does not touch the implicit keep (RFC 5435 section 7)."""
    sent = notification(sieve.run(notify(f'"mailto:{ANN}"'), mail(), SENDER))
    assert sent.mail.reverse_path == "jane@example.com"
    assert sent.mail.recipients == (ANN,)
    assert parseaddr(sent.header("From") or "") == ("", "jane@example.com")
    assert parseaddr(sent.header("To") or "") == ("", ANN)
    assert sent.decoded("Subject") == "hello"
    assert sent.header("MIME-Version") == "1.0"
    assert sent.message.get_content_type() == "text/plain"
    assert {"date", "message-id"} <= set(sent.names)
    assert "cc" not in sent.names
    assert len(sent.names) == len(set(sent.names))
    assert sent.header("Message-ID") not in {None, *sent.headers("References")}


def test_a_notification_of_a_message_from_nobody_is_from_nobody(sieve: Sieve) -> None:
    """RFC 5436 section 2.7: it must be sent, and must not start a loop."""
    sent = notification(sieve.run(notify(f'"mailto:{ANN}"'), mail(), ""))
    assert sent.mail.reverse_path == ""
    assert parseaddr(sent.header("From") or "")[1] == "jane@example.com"


@pytest.mark.parametrize(
    ("uri", "to", "cc"),
    [
        (f"mailto:{ANN}", {ANN}, set()),
        (f"MAILTO:{ANN}", {ANN}, set()),
        (f"mailto:{ANN},{JOE}", {ANN, JOE}, set()),
        (f"mailto:{ANN}?to={JOE}", {ANN, JOE}, set()),
        (f"mailto:?to={JOE}", {JOE}, set()),
        (f"mailto:{ANN}?cc={JOE}", {ANN}, {JOE}),
        (f"mailto:{ANN}?CC={JOE}&Cc=c@example.net", {ANN}, {JOE, "c@example.net"}),
        ("mailto:ann%40example.net", {ANN}, set()),
        ("mailto:a%2Cb@example.net", None, None),
        ("mailto:%22a%20b%22@example.net", {'"a b"@example.net'}, set()),
        ("mailto:ann%25x@example.net", {"ann%x@example.net"}, set()),
        ("mailto:ann+x@example.net", {"ann+x@example.net"}, set()),
        (f"mailto:{ANN}?subject=a", {ANN}, set()),
        (f"mailto:{ANN},{ANN}", {ANN}, set()),
    ],
)
def test_whom_a_notification_is_sent_to(sieve: Sieve, uri: str, to: set[str] | None, cc: set[str] | None) -> None:
    outcome = sieve.run(notify(f'"{uri}"'), mail(), SENDER)
    if to is None or cc is None:
        assert outcome.sent == []
        assert outcome.placed == INBOX
        return
    verify(outcome, INBOX, *(to | cc))
    for sent in outcome.sent:
        found = {
            name: {each.addr_spec for field in sent.message.get_all(name, []) for each in field.addresses}
            for name in ("To", "Cc")
        }
        assert found == {"To": to, "Cc": cc}
        assert all("NOTIFY=NEVER" in options for options in sent.mail.recipient_options)


@pytest.mark.parametrize(
    ("arguments", "subject"),
    [
        (f'"mailto:{ANN}"', "hello"),
        (f'"mailto:{ANN}?subject=From%20the%20URI"', "From the URI"),
        (f'"mailto:{ANN}?Subject=gr%C3%BCn"', "gr\u00fcn"),
        (f':message "From the tag" "mailto:{ANN}?subject=From%20the%20URI"', "From the tag"),
        (f':message "gr\u00fcn" "mailto:{ANN}"', "gr\u00fcn"),
        (f':message "two\nlines" "mailto:{ANN}"', "two lines"),
        (f'"mailto:{ANN}?subject=a+b"', "a+b"),
    ],
)
def test_the_subject_of_a_notification(sieve: Sieve, arguments: str, subject: str) -> None:
    sent = notification(sieve.run(notify(arguments), mail(), SENDER))
    assert sent.decoded("Subject") == subject
    assert sent.mail.octets.partition(b"\r\n\r\n")[0].isascii()


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        (f"mailto:{ANN}?body=You%20have%20mail.", "You have mail."),
        (f"mailto:{ANN}?body=One%0D%0ATwo", "One\nTwo"),
        (f"mailto:{ANN}?body=gr%C3%BCn", "gr\u00fcn"),
        (f"mailto:{ANN}?BODY=.%0D%0A..", ".\n.."),
        (f"mailto:{ANN}?body={'long%20' * 400}", ("long " * 400).strip()),
    ],
)
def test_the_body_of_a_notification(sieve: Sieve, uri: str, text: str) -> None:
    sent = notification(sieve.run(notify(f'"{uri}"'), mail(), SENDER))
    assert sent.text.strip() == text
    assert max(map(len, sent.lines)) <= 998


@pytest.mark.parametrize(
    ("author", "expected"),
    [
        ("jane@example.com", ("", "jane@example.com")),
        ("Jane Doe <jane@example.com>", ("Jane Doe", "jane@example.com")),
        ("J\u00e4ne <JANE@example.com>", ("J\u00e4ne", "jane@example.com")),
        ("joe@example.com", ("", "jane@example.com")),
        ("Jane <jane@example.net>", ("", "jane@example.com")),
    ],
)
def test_whom_a_notification_is_from(sieve: Sieve, author: str, expected: tuple[str, str]) -> None:
    """RFC 5435 section 3.3: an author that is not the user is ignored."""
    sent = notification(sieve.run(notify(f':from "{author}" "mailto:{ANN}"'), mail(), SENDER))
    [address] = sent.message["From"].addresses
    assert (address.display_name, address.addr_spec.lower()) == expected
    assert sent.mail.reverse_path.lower() == "jane@example.com"


@pytest.mark.parametrize(
    ("importance", "expected"), [("", {None, "normal"}), ("1", {"high"}), ("2", {None, "normal"}), ("3", {"low"})]
)
def test_the_importance_of_a_notification(sieve: Sieve, importance: str, expected: set[str | None]) -> None:
    """RFC 5436 section 2.4 leaves it to the server whether there is a field; here there is."""
    tag = f':importance "{importance}" ' if importance else ""
    sent = notification(sieve.run(notify(f'{tag}"mailto:{ANN}"'), mail(), SENDER))
    found = sent.header("Importance")
    assert (found.lower() if found else None) in expected


def test_other_fields_in_the_uri_are_those_of_the_notification(sieve: Sieve) -> None:
    uri = f"mailto:{ANN}?x-custom=one&keywords=gr%C3%BCn&Comments=two"
    sent = notification(sieve.run(notify(f'"{uri}"'), mail(), SENDER))
    assert sent.header("X-Custom") == "one"
    assert sent.decoded("Keywords") == "gr\u00fcn"
    assert sent.header("Comments") == "two"


@pytest.mark.parametrize(
    "name",
    [
        *("from", "From", "auto-submitted", "AUTO-SUBMITTED", "received", "message-id", "date", "mime-version"),
        *("content-type", "content-transfer-encoding", "return-path", "sender", "Fr%6Fm", "resent-to", "bcc"),
    ],
)
def test_fields_that_a_uri_cannot_set(sieve: Sieve, name: str) -> None:
    """RFC 5436 section 2.7: they are ignored; so are those that would make the message something else."""
    sent = notification(sieve.run(notify(f'"mailto:{ANN}?{name}=victim@example.net"'), mail(), SENDER))
    assert sent.recipients == [ANN]
    assert b"victim@example.net" not in sent.mail.octets
    assert len(sent.names) == len(set(sent.names))


@pytest.mark.parametrize(
    "query",
    [
        "subject=x%0D%0ABcc:%20victim@example.net",
        "subject=x%0ABcc:%20victim@example.net%0A%0Abody",
        "subject=x%0DBcc:%20victim@example.net",
        "x-a=x%0D%0ABcc:%20victim@example.net",
        "x-a%3A%20x%0ABcc=victim@example.net",
        "Bcc%3A%20victim@example.net%0Ax=y",
        "x%20y=z",
        "=x",
        "to=victim@example.net%0D%0ADATA",
        "to=victim@example.net%3E%20NOTIFY=NEVER",
        "subject=" + "x" * 2000,
        "keywords=%00%1B%7F",
    ],
)
def test_a_uri_adds_no_other_field(sieve: Sieve, query: str) -> None:
    """Whether it is an error or not: nobody else gets the notification, and the header is in order."""
    outcome = sieve.run(notify(f'"mailto:{ANN}?{query}"'), mail(), SENDER)
    assert outcome.placed == INBOX
    assert len(outcome.sent) + len(outcome.errors) == 1
    for sent in outcome.sent:
        assert sent.recipients == [ANN]
        assert "bcc" not in sent.names
        header = sent.mail.octets.partition(b"\r\n\r\n")[0]
        assert not re.search(rb"[\x00-\x08\x0b-\x1f\x7f]", header.replace(b"\r\n", b""))
        assert max(map(len, header.split(b"\r\n"))) <= 998
        assert all(re.match(rb"[!-9;-~]+: |[ \t]", line) for line in header.split(b"\r\n"))


@pytest.mark.parametrize(
    ("value", "is_sent"),
    [
        ("no", True),
        ("No", True),
        ("no; x=y", True),
        ("(comment) no", True),
        ("auto-notified", False),
        ('auto-notified; owner-email="jane@example.com"', False),
        ("auto-replied", False),
        ("auto-generated", False),
        ("AUTO-GENERATED", False),
        ("\n auto-replied", False),
    ],
)
def test_automatic_messages_cause_no_notification(sieve: Sieve, value: str, is_sent: bool) -> None:
    """RFC 5436 section 2.7; two users who notify each other would never end."""
    outcome = sieve.run(notify(f'"mailto:{ANN}"'), mail(f"Auto-Submitted: {value}"), SENDER)
    verify(outcome, INBOX, *([ANN] if is_sent else []))


def test_a_list_causes_notifications(sieve: Sieve) -> None:
    """As in the RFC's example."""
    notification(sieve.run(notify(f'"mailto:{ANN}"'), mail("List-Id: <list.example.org>", "Precedence: list"), SENDER))


@pytest.mark.parametrize(
    ("requires", "commands", "placed"),
    [
        ("", "{} discard;", {}),
        ("", "discard; {}", {}),
        ("", "{} keep;", INBOX),
        ("fileinto", '{} fileinto "Work";', {"Work": ""}),
        ("", "{} stop;", INBOX),
    ],
)
def test_a_notification_leaves_other_actions_alone(
    sieve: Sieve, requires: str, commands: str, placed: dict[str, str]
) -> None:
    script = script_text(f"enotify {requires}", commands.format(f'notify "mailto:{ANN}";'))
    notification(sieve.run(script, mail(), SENDER), placed)


def test_a_rejected_message_may_cause_a_notification(sieve: Sieve) -> None:
    """RFC 5435 section 7."""
    script = script_text("enotify reject", f'reject "Go away."; notify "mailto:{ANN}";')
    verify(sieve.run(script, mail(), SENDER), {}, ANN, reply="550 5.7.1")


def test_several_notifications(sieve: Sieve) -> None:
    script = f'notify :message "one" "mailto:{ANN}"; notify :message "two" "mailto:{JOE}";'
    outcome = sieve.run(script_text("enotify", script), mail(), SENDER)
    verify(outcome, INBOX, ANN, JOE)
    assert sorted(sent.decoded("Subject") for sent in outcome.sent) == ["one", "two"]


@pytest.mark.parametrize("reply", ["451 4.3.0 Not now", "550 5.7.1 Never"])
@pytest.mark.parametrize("commands", [f'notify "mailto:{ANN}";', f'notify "mailto:{ANN}"; discard;'])
def test_a_notification_that_cannot_be_sent_is_logged(sieve: Sieve, sink: Sink, reply: str, commands: str) -> None:
    """RFC 5435 section 3.8: and that is all."""
    sink.refuse[ANN] = reply
    outcome = sieve.run(script_text("enotify", commands), mail(), SENDER)
    verify(outcome, {} if "discard" in commands else INBOX)
    [event] = outcome.fields("mail-not-sent")
    assert (event["action"], event["to"]) == ("notify", f"<{ANN}>")
    assert reply in event["cause"]


def test_a_message_that_comes_again_causes_no_other_notification(sieve: Sieve) -> None:
    message = mail()
    notification(sieve.run(notify(f'"mailto:{ANN}"'), message, SENDER))
    assert sieve.run(notify(f'"mailto:{ANN}"'), message, SENDER).sent == []


@pytest.mark.parametrize(
    "commands",
    [
        'set "m" "xmpp:ann@example.net"; notify "${m}";',
        'set "m" ""; notify "${m}";',
        'set "m" "mailto:"; notify "${m}";',
        'set "m" "mailto:no address"; notify "${m}";',
        'set "m" "mailto:ann@example.net?subject=%zz"; notify "${m}";',
        'set "i" "4"; notify :importance "${i}" "mailto:ann@example.net";',
        'set "a" "no address"; notify :from "${a}" "mailto:ann@example.net";',
    ],
)
def test_a_method_that_is_wrong_at_run_time(sieve: Sieve, commands: str) -> None:
    """RFC 5435 section 3.2."""
    verify_error_at_run_time(sieve.run(script_text("enotify variables", commands), mail(), SENDER))


VALID = {
    f'"mailto:{ANN}"': True,
    f'"MailTo:{ANN}?subject=x&body=y%20z"': True,
    f'["mailto:{ANN}", "mailto:{JOE},{ANN}"]': True,
    f'["mailto:{ANN}", "xmpp:{ANN}"]': False,
    '"mailto:no address"': False,
    f'"mailto:{ANN}?subject=%zz"': False,
    f'"{ANN}"': False,
    '""': False,
    '"http://gw.example.net/notify?test"': False,
    '"tel:+14085551212"': False,
    '"mailto"': False,
    f'"mail to:{ANN}"': False,
}


@pytest.mark.parametrize("methods", VALID)
def test_which_methods_are_valid(sieve: Sieve, methods: str) -> None:
    """RFC 5435 section 4: exactly those with which notify works."""
    script = f'if valid_notify_method {methods} {{ fileinto "yes"; }} else {{ fileinto "no"; }}'
    outcome = sieve.run(script_text("enotify fileinto", script), mail(), SENDER)
    verify(outcome, {"yes" if VALID[methods] else "no": ""})
    if not methods.startswith("["):
        script = script_text("enotify variables", f'set "m" {methods}; notify "${{m}}";')
        outcome = sieve.run(script, mail(), SENDER)
        assert (outcome.errors == []) == VALID[methods]


@pytest.mark.parametrize(
    ("test", "holds"),
    [
        (f'"mailto:{ANN}" "online" "maybe"', True),
        (f'"mailto:{ANN}" "ONLINE" ["yes", "Maybe"]', True),
        (f'"mailto:{ANN}" "online" ["yes", "no"]', False),
        (f':contains "mailto:{ANN}" "online" "may"', True),
        (f':matches "mailto:{ANN}" "online" "m*"', True),
        (f':matches "mailto:{ANN}" "nonesuch" "*"', False),
        (f':count "ge" "mailto:{ANN}" "nonesuch" "0"', False),
        (':matches "xmpp:ann@example.net" "online" "*"', False),
        (':matches "mailto:no address" "online" "*"', False),
        (':matches "" "online" "*"', False),
        (f':comparator "i;octet" "mailto:{ANN}" "online" "Maybe"', False),
    ],
)
def test_whether_the_recipient_is_online(sieve: Sieve, test: str, holds: bool) -> None:
    """RFC 5436 section 2.2: nobody knows; what is wrong or unknown fails without an error (RFC 5435 section 5)."""
    script = f'if notify_method_capability {test} {{ fileinto "yes"; }} else {{ fileinto "no"; }}'
    outcome = sieve.run(script_text("enotify fileinto relational", script), mail(), SENDER)
    verify(outcome, {"yes" if holds else "no": ""})


@pytest.mark.parametrize(
    ("modifiers", "text", "value"),
    [
        (":encodeurl", "safe body&evil=evilbody", "safe%20body%26evil%3Devilbody"),
        (":encodeurl", "AZaz09-._~", "AZaz09-._~"),
        (":encodeurl", "gr\u00fcn", "gr%C3%BCn"),
        (":encodeurl", "!*'();:@&=+$,/?#[]%", "%21%2A%27%28%29%3B%3A%40%26%3D%2B%24%2C%2F%3F%23%5B%5D%25"),
        (":encodeurl", "a\nb", "a%0D%0Ab"),
        (":encodeurl", "", ""),
        (":encodeurl :length", "a b", "5"),
        (":encodeurl :upper", "a b\u00e4", "A%20B%C3%A4"),
        (":lower :encodeurl", "A B\u00c4", "a%20b%C3%84"),
        (":quotewildcard :encodeurl", "a*", "a%5C%2A"),
    ],
)
def test_text_for_a_uri(sieve: Sieve, modifiers: str, text: str, value: str) -> None:
    """RFC 5435 section 6: all but the unreserved characters of RFC 3986; between :quotewildcard and :length."""
    script = f'set {modifiers} "a" "{text}"; if string :comparator "i;octet" "${{a}}" "{value}" {{ discard; }}'
    assert sieve.run(script_text("enotify variables", script), mail(), SENDER).is_discarded


def test_encoded_text_that_is_too_long_is_cut_between_characters(sieve: Sieve) -> None:
    """RFC 5435 section 6."""
    script = (
        f'set "a" "{"x" * 3000}"; set :encodeurl "b" "${{a}}{" " * 3000}"; set :length "c" "${{b}}";'
        f'if allof(string :matches "${{b}}" "*%20", not string :matches "${{b}}" ["*%", "*%2"]) {{ discard; }}'
    )
    assert sieve.run(script_text("enotify variables", script), mail(), SENDER).is_discarded


# fcc (RFC 8580)


@pytest.mark.parametrize("action", ['vacation {} "I am away."', f'notify {{}} "mailto:{ANN}"'])
@pytest.mark.parametrize(
    ("requires", "tags", "folder"),
    [
        ("", ':fcc "Sent"', {"Sent": ""}),
        ("mailbox", ':fcc "Sent" :create', {"Sent": ""}),
        ("imap4flags", ':fcc "Sent" :flags ["\\\\Seen", "$Auto"]', {"Sent": "$Auto \\Seen"}),
        ("imap4flags mailbox", ':flags "\\\\Seen" :create :fcc "Sent"', {"Sent": "\\Seen"}),
        ("special-use", ':fcc "Else" :specialuse "\\\\Sent"', {"Else": ""}),
        ("", ':fcc "a/b"', {"a/b": ""}),
        ("", ':fcc "Gr\u00fcn"', {"Gr\u00fcn": ""}),
    ],
)
def test_a_copy_of_what_is_sent_is_stored(
    sieve: Sieve, action: str, requires: str, tags: str, folder: dict[str, str]
) -> None:
    """The same octets, with the flags that the tag says, not those of the message."""
    script = script_text(f"fcc vacation enotify {requires}", f"{action.format(tags)};")
    outcome = sieve.run(script, mail(), SENDER)
    assert outcome.errors == []
    assert outcome.reply == "250 2.1.5"
    [sent] = outcome.sent
    [name] = folder
    assert outcome.placed == {**INBOX, **folder}
    [copy] = outcome.folders[name]
    assert on_the_wire(copy.octets).endswith(sent.mail.octets)
    assert copy.header("Auto-Submitted") == sent.header("Auto-Submitted")


def test_a_copy_goes_to_the_folder_of_that_use(site: Site, sink: Sink) -> None:
    """RFC 8579 section 4: :specialuse comes before the name."""
    sieve = Sieve(site, sink, **{"xlist-sent": "Post"})
    sieve.add_folder("Post")
    for action in ('vacation {} "I am away.";', f'notify {{}} "mailto:{ANN}";'):
        script = action.format(':fcc "Else" :specialuse "\\\\Sent"')
        outcome = sieve.run(script_text("fcc vacation enotify special-use", script), mail(), SENDER)
        assert outcome.errors == []
        assert len(outcome.sent) == 1
        assert outcome.placed == {"INBOX": "", "Post": ""}


def test_a_copy_in_the_inbox(sieve: Sieve) -> None:
    script = script_text("fcc vacation", 'vacation :fcc "INBOX" "I am away.";')
    outcome = sieve.run(script, mail(), SENDER)
    assert list(outcome.placed) == ["INBOX"]
    assert sorted(message.header("Auto-Submitted") or "" for message in outcome.folders["INBOX"]) == [
        "",
        "auto-replied",
    ]


def test_there_is_no_copy_of_what_is_not_sent(sieve: Sieve, sink: Sink) -> None:
    script = script_text("fcc vacation", 'vacation :fcc "Sent" "I am away.";')
    verify(sieve.run(script, mail("Precedence: bulk"), SENDER), INBOX)
    sink.refuse[SENDER] = "451 4.3.0 Not now"
    verify(sieve.run(script, mail(), SENDER), INBOX)
    sink.refuse.clear()
    outcome = sieve.run(script, mail(), SENDER)
    verify(outcome, {"INBOX": "", "Sent": ""}, SENDER)
    verify(sieve.run(script, mail(), SENDER), INBOX)


def test_the_flags_of_the_message_are_not_those_of_the_copy(sieve: Sieve) -> None:
    """RFC 8580 section 3: only :flags counts."""
    script = 'setflag "\\\\Flagged"; vacation :fcc "Sent" "I am away.";'
    outcome = sieve.run(script_text("fcc vacation imap4flags", script), mail(), SENDER)
    verify(outcome, {"INBOX": "\\Flagged", "Sent": ""}, SENDER)


def test_a_copy_that_cannot_be_stored_changes_nothing_else(sieve: Sieve, site: Site) -> None:
    """The answer has been sent."""
    blocked = site.spool / "jane/.Sent"
    blocked.write_text("a file")
    script = script_text("fcc vacation", 'vacation :fcc "Sent" "I am away.";')
    outcome = sieve.run(script, mail(), SENDER)
    assert outcome.reply == "250 2.1.5"
    assert outcome.placed == INBOX
    if not outcome.errors:
        assert [sent.recipients for sent in outcome.sent] == [[SENDER]]


def test_a_copy_in_a_folder_with_an_impossible_name_is_an_error(sieve: Sieve) -> None:
    for command in ('vacation :fcc "a//b" "I am away.";', f'notify :fcc "a//b" "mailto:{ANN}";'):
        verify_error_at_run_time(sieve.run(script_text("fcc vacation enotify", command), mail(), SENDER))


def test_capabilities_come_together(sieve: Sieve) -> None:
    """A script may ask for all of them, and ihave knows them."""
    names = ["reject", "ereject", "vacation", "vacation-seconds", "enotify", "fcc", "copy"]
    script = f"if ihave [{', '.join(map(repr, names))}] {{ discard; }}".replace("'", '"')
    assert sieve.run(script_text("ihave", script), mail(), SENDER).is_discarded


# What would happen is explained


@pytest.mark.parametrize(
    ("requires", "commands", "actions"),
    [
        ("", REDIRECT, {f"redirect {JOE}"}),
        ("copy", f'redirect :copy "{JOE}";', {f"redirect {JOE}", "fileinto INBOX"}),
        ("vacation", 'vacation "I am away.";', {"vacation", "fileinto INBOX"}),
        ("reject", 'reject "Go away.";', {"reject"}),
        ("enotify", f'notify "mailto:{ANN}";', {"notify mailto:ann@example.net", "fileinto INBOX"}),
    ],
)
def test_what_would_be_sent_is_explained(
    site: Site, sink: Sink, requires: str, commands: str, actions: set[str]
) -> None:
    """And nothing is sent."""
    sieve = Sieve(site, sink)
    sieve.write("active", script_text(requires, commands))
    said = run(*site.command("--explain", "jane@example.com"), text=on_the_wire(mail()))
    assert said.status == os.EX_OK
    found = re.split(r", (?=redirect|fileinto|vacation|reject|notify)", said.value["actions"])
    assert len(found) == len(actions)
    for wanted in actions:
        assert any(each.startswith(wanted.split(" mailto:")[0]) for each in found), found
    assert sink.commands == []
    assert site.files("jane") == []


# Scripts that are wrong: see test_sieve_language.

WRONG = [
    # redirect
    ("", "«redirect«;", "redirect"),
    ("", "redirect «5;", "string"),
    ("", f'redirect «["{JOE}"];', "string"),
    ("", 'redirect «"no address";', "address"),
    ("", 'redirect «"joe";', "address"),
    ("", 'redirect «"";', "address"),
    ("", 'redirect «"joe@example.net, ann@example.net";', "address"),
    ("", 'redirect «"Friends: joe@example.net;";', "address"),
    ("", 'redirect «"joe@example.net\nann@example.net";', "address"),
    ("", 'redirect «"joe@@example.net";', "address"),
    ("", 'redirect «"@example.net";', "address"),
    ("", 'redirect «"joe@example..net";', "address"),
    ("", f'redirect «:copy "{JOE}";', "copy"),
    ("copy", f'redirect :copy «:copy "{JOE}";', ":copy"),
    ("", f'redirect "{JOE}" «"{ANN}";', "redirect"),
    ("", f'redirect «:nonesuch "{JOE}";', ":nonesuch"),
    # reject
    ("reject", "«reject«;", "reject"),
    ("reject", "reject «5;", "string"),
    ("reject", 'reject "a" «"b";', "reject"),
    ("reject", 'reject «:days "a";', ":days"),
    ("ereject", "«ereject«;", "ereject"),
    ("ereject", 'ereject «["a"];', "string"),
    # vacation
    ("vacation", "«vacation«;", "vacation"),
    ("vacation", "vacation «5;", "string"),
    ("vacation", 'vacation «["a"];', "string"),
    ("vacation", 'vacation "a" «"b";', "vacation"),
    ("vacation", 'vacation :days «"7" "a";', "number"),
    ("vacation", "vacation :days 7 «:days 8 \"a\";", ":days"),
    ("vacation", 'vacation «:seconds 60 "a";', "vacation-seconds"),
    ("vacation vacation-seconds", 'vacation :days 1 «:seconds 60 "a";', ":seconds"),
    ("vacation vacation-seconds", 'vacation :seconds 60 «:days 1 "a";', ":days"),
    ("vacation-seconds", 'vacation :seconds «"60" "a";', "number"),
    ("vacation", 'vacation :subject «5 "a";', "string"),
    ("vacation", 'vacation :subject «["a"] "a";', "string"),
    ("vacation", 'vacation :from «"no address" "a";', "address"),
    ("vacation", 'vacation :from «"" "a";', "address"),
    ("vacation", 'vacation :from «"jane@example.com, joe@example.com" "a";', "address"),
    ("vacation", 'vacation :addresses «"no address" "a";', "address"),
    ("vacation", 'vacation :addresses ["jane@example.com", «"no address"] "a";', "address"),
    ("vacation", 'vacation :addresses «5 "a";', "string"),
    ("vacation", 'vacation :handle «5 "a";', "string"),
    ("vacation", 'vacation :mime «"no header" ;', "Content-Type"),
    ("vacation", 'vacation :mime «:mime "a";', ":mime"),
    ("vacation", 'vacation «:nonesuch "a";', ":nonesuch"),
    ("vacation", 'vacation «:fcc "Sent" "a";', "fcc"),
    ("vacation", 'if «vacation "a" { keep; }', "vacation"),
    # notify
    ("enotify", "«notify«;", "notify"),
    ("enotify", "notify «5;", "string"),
    ("enotify", 'notify «"xmpp:joe@example.net";', "mailto"),
    ("enotify", 'notify «"joe@example.net";', "mailto"),
    ("enotify", 'notify «"";', "mailto"),
    ("enotify", 'notify «"mailto:no address";', "address"),
    ("enotify", 'notify «"mailto:joe@example.net?subject=%zz";', "%"),
    ("enotify", f'notify :importance «"4" "mailto:{ANN}";', "4"),
    ("enotify", f'notify :importance «1 "mailto:{ANN}";', "string"),
    ("enotify", f'notify :from «"no address" "mailto:{ANN}";', "address"),
    ("enotify", f'notify :options «5 "mailto:{ANN}";', "string"),
    ("enotify", f'notify :message «5 "mailto:{ANN}";', "string"),
    ("enotify", f'notify :message "a" «:message "b" "mailto:{ANN}";', ":message"),
    ("enotify", f'notify «:fcc "Sent" "mailto:{ANN}";', "fcc"),
    ("enotify", f'notify «:method "mailto:{ANN}";', ":method"),
    ("enotify", "if «valid_notify_method «{ keep; }", "valid_notify_method"),
    ("enotify", "if valid_notify_method «5 { keep; }", "string"),
    ("enotify", 'if notify_method_capability «["mailto:"] "online" "yes" { keep; }', "string"),
    ("enotify", 'if «notify_method_capability "mailto:" "online" «{ keep; }', "notify_method_capability"),
    ("variables", 'set «:encodeurl "a" "b";', "enotify"),
    # fcc
    ("fcc vacation mailbox", 'vacation «:create "a";', ":fcc"),
    ("fcc vacation imap4flags", 'vacation «:flags "x" "a";', ":fcc"),
    ("fcc vacation special-use", 'vacation «:specialuse "\\\\Sent" "a";', ":fcc"),
    ("fcc vacation", 'vacation :fcc "Sent" «:flags "x" "a";', "imap4flags"),
    ("fcc vacation", 'vacation :fcc "Sent" «:create "a";', "mailbox"),
    ("fcc vacation", 'vacation :fcc «5 "a";', "string"),
    ("fcc vacation", 'vacation :fcc «["a"] "a";', "string"),
    ("fcc enotify mailbox", f'notify «:create "mailto:{ANN}";', ":fcc"),
    ("fcc fileinto", 'fileinto «:fcc "Sent" "a";', ":fcc"),
    ("fcc", f'redirect «:fcc "Sent" "{JOE}";', ":fcc"),
    ("fcc reject", 'reject «:fcc "Sent" "a";', ":fcc"),
]  # fmt: skip

CAPABILITIES = [
    ("reject", "", '«reject "a";'),
    ("ereject", "", '«ereject "a";'),
    ("ereject", "reject", '«ereject "a";'),
    ("reject", "ereject", '«reject "a";'),
    ("vacation", "", '«vacation "a";'),
    ("vacation-seconds", "vacation", 'vacation «:seconds 60 "a";'),
    ("enotify", "", f'«notify "mailto:{ANN}";'),
    ("enotify", "", f'if «valid_notify_method "mailto:{ANN}" {{ keep; }}'),
    ("enotify", "", f'if «notify_method_capability "mailto:{ANN}" "online" "yes" {{ keep; }}'),
    ("enotify", "variables", 'set «:encodeurl "a" "b";'),
    ("copy", "", f'redirect «:copy "{JOE}";'),
    ("fcc", "vacation", 'vacation «:fcc "Sent" "a";'),
    ("fcc", "enotify", f'notify «:fcc "Sent" "mailto:{ANN}";'),
    ("mailbox", "vacation fcc", 'vacation :fcc "Sent" «:create "a";'),
    ("imap4flags", "vacation fcc", 'vacation :fcc "Sent" «:flags "x" "a";'),
    ("special-use", "vacation fcc", 'vacation :fcc "Sent" «:specialuse "\\\\Sent" "a";'),
]


@pytest.mark.parametrize(("requires", "script", "word"), WRONG)
def test_an_error_is_reported_where_it_is(sieve: Sieve, requires: str, script: str, word: str) -> None:
    verify_error(sieve, script_text(requires, script), word)


@pytest.mark.parametrize(("capability", "others", "script"), CAPABILITIES)
def test_what_is_used_must_be_required(sieve: Sieve, capability: str, others: str, script: str) -> None:
    verify_error(sieve, script_text(others, script), capability, "require")
    assert sieve.check(script_text(f"{others} {capability}", script.replace("«", ""))) == []


RIGHT = [
    ("vacation", 'vacation :days 4294967295 "a";'),
    ("vacation", 'vacation :days 0 "a";'),
    ("vacation-seconds", 'vacation :seconds 0 "a";'),
    ("vacation", 'vacation :handle "h" :days 3 :subject "s" :from "Jane <jane@example.com>" "a";'),
    ("vacation", 'vacation :mime "Content-Type: text/plain\n\na";'),
    ("vacation", 'vacation :addresses "jane@example.com" :mime text:\nContent-Type: text/plain\n\na\n.\n;'),
    ("vacation variables", 'vacation :from "${a}" :addresses ["${b}", "jane@example.com"] :mime "${c}";'),
    ("variables", 'redirect "${a}";'),
    ("enotify variables", 'notify :importance "${i}" :from "${a}" "${m}";'),
    ("enotify", f'notify :options ["a=b", "c=d"] :message "x" :importance "3" "mailto:{ANN}";'),
    ("enotify", f'notify :from "Jane <jane@example.com>" :options "a=b" "mailto:{ANN}";'),
    ("enotify", 'if valid_notify_method ["", "xmpp:x", "mailto:"] { keep; }'),
    ("enotify", 'if notify_method_capability :is :comparator "i;octet" "x" "y" ["z"] { keep; }'),
    ("reject", 'reject "";'),
    ("reject ereject", 'if true { reject "a"; } else { ereject "b"; }'),
]  # fmt: skip


@pytest.mark.parametrize(("requires", "script"), RIGHT)
def test_what_is_right_is_no_error(sieve: Sieve, requires: str, script: str) -> None:
    assert sieve.check(script_text(requires, script)) == []
