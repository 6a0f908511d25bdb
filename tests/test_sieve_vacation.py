"""Who gets an answer of vacation and who doesn't, what is in it, and when there is another (RFC 5230, 6131, 3834)."""

from __future__ import annotations

import itertools
import re
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from email.utils import parseaddr
from typing import NamedTuple
from unittest import mock

import pytest
from harness import Client, Site
from mailboxes import connected
from sieve import Clock, Outcome, Sent, Sieve, script_text
from sink import Sink

from lmtpd import DeliveryAgent

IN_MEMORY = "/dev/shm"
DAY = 86400
SENDER = "sender@example.org"
TEXT = "I am away."
AWAY = 'vacation "I am away.";'
# The fields of an answer to a message that has a Message-ID.
FIELDS = [
    "auto-submitted",
    "content-transfer-encoding",
    "content-type",
    "date",
    "from",
    "in-reply-to",
    "message-id",
    "mime-version",
    "references",
    "subject",
    "to",
]
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
def site() -> Iterator[Site]:
    """A site in memory: what is synced here need not be on a disk, and there are many messages."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", IN_MEMORY)
        site = Site()
    site.add_user("jane")
    yield site
    site.close()


@pytest.fixture
def sieve(site: Site, sink: Sink) -> Sieve:
    return Sieve(site, sink)


@pytest.fixture
def clock() -> Iterator[Clock]:
    clock = Clock()
    with mock.patch("time.time", clock.now):
        yield clock


def mail(*fields: str, to: str = "To: jane@example.com", subject: str = "Subject: hello", body: str = "A body.") -> str:
    """A message that deserves an answer but for these fields. It is not the same as any other."""
    own = [f"Message-ID: <{next(NUMBERS)}@example.org>", "Date: Sun, 22 Nov 2026 12:00:00 +0000", to, subject]
    return "\n".join(["From: someone@example.org", *filter(None, own), *fields, "", body, ""])


def away(arguments: str = f'"{TEXT}"', requires: str = "") -> str:
    """A script whose only command is vacation, with these arguments."""
    return script_text(f"vacation {requires}", f"vacation {arguments};")


def verify_kept(outcome: Outcome) -> None:
    """Fails unless the message is in the INBOX and nowhere else, and no script had an error."""
    assert outcome.errors == []
    assert outcome.reply == "250 2.1.5"
    assert outcome.placed == {"INBOX": ""}


def verify_no_answer(outcome: Outcome, cause: str = "") -> None:
    """Fails unless nothing was sent, and the log says why."""
    assert outcome.sent == []
    [event] = outcome.fields("no-answer")
    assert event["recipient"] == "<jane@example.com>"
    assert cause.lower() in event["cause"].lower()
    assert event["cause"]


def answer(outcome: Outcome) -> Sent:
    """The only mail, which is an answer."""
    verify_kept(outcome)
    [sent] = outcome.sent
    assert sent.header("Auto-Submitted") == "auto-replied"
    return sent


# Who gets an answer


class Condition(NamedTuple):
    """What decides about an answer. answers: whether there is one, if nothing else forbids it.

    fields: of the message. to: in place of the usual recipient. sender: with %d for a number that makes it unique.
    tags: of vacation. cause: what the log says.
    """

    name: str
    answers: bool
    fields: tuple[str, ...] = ()
    to: str = ""
    sender: str = ""
    tags: str = ""
    cause: str = ""

    @property
    def slots(self) -> set[str]:
        """What of the delivery it decides upon, which only one condition can."""
        return {slot for slot in ("to", "sender", "tags") if getattr(self, slot)}


def yes(name: str, *fields: str, to: str = "", sender: str = "", tags: str = "") -> Condition:
    return Condition(name, True, fields, to, sender, tags)


def no(name: str, *fields: str, to: str = "", sender: str = "", tags: str = "", cause: str = "") -> Condition:
    return Condition(name, False, fields, to, sender, tags, cause)


OTHER = ':addresses ["j.doe@example.net", "Doe <doe@example.net>"]'

CONDITIONS = [
    # RFC 3834 section 2: messages that are not from a person.
    yes("plain"),
    no("null-sender", sender="<>", cause="<>"),
    no("owner", sender="owner-list%d@example.org", cause="owner-"),
    no("owner-upper", sender="OWNER-list%d@example.org"),
    no("owner-quoted", sender='"owner-a b%d"@example.org'),
    yes("owner-elsewhere", sender="the-owner-of%d@example.org"),
    yes("owner-without-hyphen", sender="owner%d@example.org"),
    yes("owner-in-domain", sender="joe%d@owner-x.example"),
    no("request", sender="list%d-request@example.org", cause="-request"),
    no("request-mixed", sender="list%d-ReQuest@example.org"),
    yes("request-elsewhere", sender="list-requests%d@example.org"),
    yes("request-without-hyphen", sender="request@example%d.org"),
    no("listserv", sender="listserv@example%d.org", cause="listserv"),
    no("listserv-upper", sender="LISTSERV@example%d.org"),
    no("majordomo", sender="majordomo@example%d.org", cause="majordomo"),
    no("majordomo-mixed", sender="Majordomo@example%d.org"),
    no("mailer-daemon", sender="mailer-daemon@example%d.org", cause="mailer-daemon"),
    no("mailer-daemon-upper", sender="MAILER-DAEMON@example%d.org"),
    yes("mailer-daemon-longer", sender="mailer-daemons@example%d.org"),
    yes("sender-of-another-domain", sender="jane@example%d.org"),
    # RFC 5230 section 4.6: lists.
    *(
        no(name.lower(), f"{name}: <mailto:list@example.org>", cause="List-")
        for name in (
            *("List-Id", "List-Post", "List-Help", "List-Unsubscribe", "List-Subscribe", "List-Owner", "List-Archive"),
            *("List-Unsubscribe-Post", "List-Nonesuch", "LIST-ID"),
        )
    ),
    no("list-id-empty", "List-Id:"),
    no("list-id-obsolete-blank", "List-Id : <list.example.org>"),
    yes("listing", "Listing: yes"),
    yes("x-list-id", "X-List-Id: <list.example.org>"),
    yes("list-in-a-value", "Comments: x\n List-Id: <list.example.org>"),
    no("bulk", "Precedence: bulk", cause="Precedence: bulk"),
    no("list", "Precedence: list", cause="Precedence: list"),
    no("junk", "Precedence: junk", cause="Precedence: junk"),
    no("bulk-upper", "PRECEDENCE: BULK"),
    no("junk-mixed", "precedence: Junk"),
    no("bulk-folded", "Precedence:\n bulk"),
    no("bulk-blanks", "Precedence: \t bulk \t "),
    no("bulk-second", "Precedence: first-class\nPrecedence: bulk"),
    yes("first-class", "Precedence: first-class"),
    yes("special-delivery", "Precedence: special-delivery"),
    yes("precedence-empty", "Precedence:"),
    yes("bulky", "Precedence: bulky"),
    # RFC 3834 sections 2 and 5.
    *(
        no(f"auto-submitted {value!r}", f"Auto-Submitted: {value}", cause="Auto-Submitted")
        for value in (
            *("auto-replied", "auto-generated", "auto-notified; owner-email=jane@example.com", "AUTO-REPLIED", "yes"),
            *("auto-replied (vacation)", "(no) auto-replied", "\n auto-generated", "nope", "no-no"),
        )
    ),
    *(
        yes(f"auto-submitted {value!r}", f"Auto-Submitted: {value}")
        for value in ("no", "NO", "No ", "no (comment)", "(auto-replied) no", "no; x=y", 'no;x="auto-replied"', "\n no")
    ),
    no("auto-submitted-second", "Auto-Submitted: no\nAuto-Submitted: auto-generated"),
    yes("auto-submitted-of-another", "X-Auto-Submitted: auto-replied"),
    *(
        no(f"suppress {value!r}", f"X-Auto-Response-Suppress: {value}", cause="X-Auto-Response-Suppress")
        for value in (
            *("All", "OOF", "AutoReply", "all", "oof", "AUTOREPLY"),
            *("DR, OOF, NRN", "DR,AutoReply", "DR,\n All", "DR OOF"),
        )
    ),
    *(
        yes(f"suppress {value!r}", f"X-Auto-Response-Suppress: {value}")
        for value in ("None", "DR", "DR, RN, NRN, NDR", "", "OOFX", "Overall")
    ),
    # RFC 5230 section 4.6: the user himself.
    no("himself", sender="jane@example.com", cause="jane@example.com"),
    no("himself-case", sender="Jane@EXAMPLE.com"),
    no("himself-other", sender="j.doe@example.net", tags=OTHER),
    no("himself-other-case", sender="J.Doe@Example.NET", tags=OTHER),
    no("himself-other-named", sender="doe@example.net", tags=OTHER),
    # RFC 5230 section 4.5: one of the user's addresses must be in the message.
    *(
        yes(name.lower(), to=f"{name}: jane@example.com")
        for name in ("Cc", "Bcc", "Resent-To", "Resent-Cc", "Resent-Bcc", "TO", "cc")
    ),
    *(
        yes(f"to {value!r}", to=f"To: {value}")
        for value in (
            "<jane@example.com>",
            "Jane Doe <jane@example.com>",
            "Jane@Example.COM",
            '"Doe, Jane (x@y) <z>" <jane@example.com>',
            "jane@example.com (Jane Doe)",
            "(joe@example.net, ) jane@example.com",
            "=?utf-8?q?J=C3=A4ne?= <jane@example.com>",
            "=?utf-8?b?PGpvZUBleGFtcGxlLm5ldD4s?= <jane@example.com>",
            "J\u00e4ne <jane@example.com>",
            "joe@example.net, jane@example.com, ann@example.net",
            "joe@example.net,\n Jane\n <jane@example.com>",
            "Friends: joe@example.net, Jane <jane@example.com>;",
            "Nobody:;, Friends: jane@example.com;, joe@example.net",
            '"jane"@example.com',
            "jane @ example.com",
            "<@relay.example,@b.example:jane@example.com>",
            "joe@example.net\nTo: jane@example.com",
            "undisclosed-recipients:;\nCc: jane@example.com",
            ", ,jane@example.com,",
        )
    ),
    *(
        no(f"to {value!r}", to=f"To: {value}")
        for value in (
            "joe@example.net",
            "undisclosed-recipients:;",
            "",
            '"jane@example.com" <joe@example.net>',
            "joe@example.net (jane@example.com)",
            "=?utf-8?q?jane=40example=2Ecom?= <joe@example.net>",
            "=?utf-8?q?=3Cjane=40example=2Ecom=3E?=",
            "jane@example.com.example",
            "xjane@example.com",
            "jane@mail.example.com",
            "jane@example.org",
            "jane: joe@example.net;",
            '"jane@example.com, " <joe@example.net>',
            '"jane@example.com"@example.net',
            "joe@example.net\nX-To: jane@example.com",
            "joe@example.net\nReply-To: jane@example.com",
            "joe@example.net\nDelivered-To: jane@example.com",
            "joe@example.net\nEnvelope-To: jane@example.com",
            "joe@example.net\nSender: jane@example.com",
            "joe@example.net\nComments: x\n To: jane@example.com",
        )
    ),
    no("to-nobody", to="X-Nothing: x"),
    yes("addresses", to="To: j.doe@example.net", tags=OTHER),
    yes("addresses-case", to="Cc: J.DOE@example.NET", tags=OTHER),
    yes("addresses-named", to="To: doe@example.net", tags=OTHER),
    yes("addresses-one", to="To: j.doe@example.net", tags=':addresses "j.doe@example.net"'),
    yes("addresses-and-own", to="To: jane@example.com", tags=OTHER),
    no("addresses-none", to="To: doe@example.com", tags=OTHER),
    no("addresses-without", to="To: j.doe@example.net"),
]  # fmt: skip


def deliver(sieve: Sieve, *conditions: Condition) -> Outcome:
    """Delivers a message that fulfils these conditions."""
    chosen = {slot: value for each in conditions for slot in ("to", "sender", "tags") if (value := getattr(each, slot))}
    message = mail(
        *(field for each in conditions for field in each.fields), to=chosen.get("to", "To: jane@example.com")
    )
    sender = chosen.get("sender", "person%d@example.org").replace("%d", str(next(NUMBERS)))
    return sieve.run(away(f'{chosen.get("tags", "")} "{TEXT}"'), message, "" if sender == "<>" else sender)


@pytest.mark.parametrize("condition", CONDITIONS, ids=lambda condition: condition.name)
def test_who_gets_an_answer(sieve: Sieve, condition: Condition) -> None:
    outcome = deliver(sieve, condition)
    verify_kept(outcome)
    if condition.answers:
        assert answer(outcome).text.strip() == TEXT
        assert outcome.fields("no-answer") == []
    else:
        verify_no_answer(outcome, condition.cause)


@pytest.mark.parametrize("number", range(len(CONDITIONS)), ids=lambda number: CONDITIONS[number].name)
def test_who_gets_an_answer_for_two_reasons(sieve: Sieve, number: int) -> None:
    """There is one if both conditions allow it."""
    first = CONDITIONS[number]
    wrong = []
    for second in CONDITIONS[number + 1 :]:
        if first.slots & second.slots:
            continue
        outcome = deliver(sieve, first, second)
        if len(outcome.sent) != (first.answers and second.answers) or outcome.placed != {"INBOX": ""}:
            wrong.append(second.name)
    assert wrong == []


@pytest.mark.parametrize(
    ("recipient", "to", "answers"),
    [
        ("jane+lists", "jane+lists@example.com", True),
        ("jane+lists", "Jane+Lists@Example.com", True),
        ("jane+lists", "jane@example.com", True),
        ("jane+lists", "jane+other@example.com", False),
        ("jane", "jane@example.com", True),
        ("JANE", "jane@example.com", True),
        ("jane@example.net", "jane@example.net", True),
        ("jane@example.net", "Jane <JANE@EXAMPLE.NET>", True),
    ],
)
def test_the_recipient_as_given_counts_with_and_without_detail(
    sieve: Sieve, recipient: str, to: str, answers: bool
) -> None:
    sieve.write("active", away())
    outcome = sieve.deliver(mail(to=f"To: {to}"), SENDER, recipient)
    verify_kept(outcome)
    assert len(outcome.sent) == answers


@pytest.mark.parametrize("sender", ["jane+lists@example.com", "jane@example.com"])
def test_the_user_himself_with_a_sub_address_gets_none(sieve: Sieve, sender: str) -> None:
    sieve.write("active", away())
    outcome = sieve.deliver(mail(), sender, "jane+lists")
    assert outcome.placed == {"INBOX": ""}
    assert outcome.sent == []


def test_the_user_of_a_virtual_domain(site: Site, sink: Sink) -> None:
    """The userid is an address."""
    site.add_user("joe@other.example")
    sieve = Sieve(site, sink, virtdomains="userid", before=away())
    outcome = sieve.deliver(mail(to="To: joe@other.example"), SENDER, "joe@other.example")
    assert outcome.reply == "250 2.1.5"
    [sent] = outcome.sent
    assert parseaddr(sent.header("From") or "")[1] == "joe@other.example"
    assert sieve.deliver(mail(to="To: joe@example.com"), "another@example.org", "joe@other.example").sent == []


def test_two_recipients_who_are_the_same_user_give_one_answer(sieve: Sieve) -> None:
    sieve.write("active", away())
    message = mail(to="To: jane@example.com, jane+lists@example.com")
    outcome = sieve.deliver(message, SENDER, "jane", "jane+lists", "jane@example.net")
    assert outcome.reply == "250 2.1.5, 250 2.1.5, 250 2.1.5"
    assert len(outcome.sent) == 1


def test_two_users_give_two_answers(site: Site, sink: Sink) -> None:
    """Even to one transaction."""
    site.add_user("joe")
    sieve = Sieve(site, sink, default=away())
    outcome = sieve.deliver(mail(to="To: jane@example.com, joe@example.com"), SENDER, "jane", "joe")
    assert outcome.reply == "250 2.1.5, 250 2.1.5"
    senders = sorted(parseaddr(sent.header("From") or "")[1] for sent in outcome.sent)
    assert senders == ["jane@example.com", "joe@example.com"]


# The answer


def test_the_envelope_of_an_answer(sieve: Sieve, sink: Sink) -> None:
    """Its reverse-path is null, and no report on it is wanted (RFC 3834 section 4)."""
    sent = answer(sieve.run(away(), mail(), SENDER))
    assert sent.mail.reverse_path == ""
    assert sent.mail.recipients == (SENDER,)
    assert sent.mail.recipient_options == (("NOTIFY=NEVER",),)
    sink.extensions.discard("DSN")
    sent = answer(sieve.run(away(), mail(), "another@example.org"))
    assert sent.mail.recipient_options == ((),)


def test_the_answer_goes_to_the_envelopes_sender(sieve: Sieve) -> None:
    """Not to whom From, Sender or Reply-To name (RFC 5230 section 5)."""
    message = mail("Sender: a@example.net", "Reply-To: b@example.net", "Return-Path: <c@example.net>")
    sent = answer(sieve.run(away(), message, SENDER))
    assert sent.recipients == [SENDER]
    assert parseaddr(sent.header("To") or "") == ("", SENDER)


def test_the_fields_of_an_answer(sieve: Sieve) -> None:
    started = datetime.now(timezone.utc).replace(microsecond=0)
    sent = answer(sieve.run(away(), mail(), SENDER))
    assert sent.names == FIELDS
    assert sent.header("MIME-Version") == "1.0"
    assert sent.message.get_content_type() == "text/plain"
    assert sent.message.get_content_charset() == "utf-8"
    date = sent.message["Date"].datetime
    assert 0 <= (date - started).total_seconds() < 600


def test_each_answer_has_a_message_id_of_its_own(sieve: Sieve) -> None:
    found = {answer(sieve.run(away(), mail(), f"{name}@example.org")).header("Message-ID") for name in "abc"}
    assert len(found) == 3
    assert all(re.fullmatch(r"<[^<>@\s]+@mx\.example\.com>", each or "") for each in found)


@pytest.mark.parametrize(
    ("to", "tags", "expected"),
    [
        ("To: Jane <jane@example.com>", "", ("", "jane@example.com")),
        ("Cc: jane@example.com", "", ("", "jane@example.com")),
        ("To: j.doe@example.net", OTHER, ("", "j.doe@example.net")),
        ("To: doe@example.net", OTHER, None),
        ("To: jane@example.com", ':from "jane@example.com"', ("", "jane@example.com")),
        ("To: jane@example.com", ':from "Jane Doe <jane@example.com>"', ("Jane Doe", "jane@example.com")),
        ("To: jane@example.com", ':from "\\"Doe, Jane\\" <jane@example.com>"', ("Doe, Jane", "jane@example.com")),
        ("To: jane@example.com", ':from "J\u00e4ne Doe <jane@example.com>"', ("J\u00e4ne Doe", "jane@example.com")),
        ("To: jane@example.com", f':from "J. <j.doe@example.net>" {OTHER}', ("J.", "j.doe@example.net")),
        ("To: j.doe@example.net", f':from "jane@example.com" {OTHER}', ("", "jane@example.com")),
    ],
)  # fmt: skip
def test_whom_an_answer_is_from(sieve: Sieve, to: str, tags: str, expected: tuple[str, str] | None) -> None:
    sent = answer(sieve.run(away(f'{tags} "{TEXT}"'), mail(to=to), SENDER))
    [address] = sent.message["From"].addresses
    if expected:
        assert (address.display_name, address.addr_spec) == expected
    else:
        assert address.addr_spec == "doe@example.net"


def test_the_recipient_with_its_detail_is_whom_an_answer_is_from(sieve: Sieve) -> None:
    sieve.write("active", away())
    sent = answer(sieve.deliver(mail(to="To: jane+lists@example.com"), SENDER, "jane+lists"))
    assert parseaddr(sent.header("From") or "")[1] == "jane+lists@example.com"


@pytest.mark.parametrize("author", ["joe@example.com", "Jane <jane@example.net>", "postmaster@example.com"])
def test_an_author_that_is_not_the_user_is_ignored(sieve: Sieve, author: str) -> None:
    """With a warning."""
    outcome = sieve.run(away(f':from "{author}" "{TEXT}"'), mail(), SENDER)
    assert parseaddr(answer(outcome).header("From") or "") == ("", "jane@example.com")
    named = parseaddr(author)[1]
    assert any(named in value for event in outcome.events for value in event.fields.values())


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("Subject: hello", "Auto: hello"),
        ("Subject: Re: hello", "Auto: Re: hello"),
        ("Subject: two\n  lines", "Auto: two lines"),
        ("Subject:\n hello", "Auto: hello"),
        ("Subject: =?iso-8859-1?q?Gr=FC=DFe?=", "Auto: Gr\u00fc\u00dfe"),
        ("Subject: =?utf-8?b?8J+YgA==?= =?utf-8?q?_x?=", "Auto: \U0001f600 x"),
        ("Subject: Gr\u00fc\u00dfe", "Auto: Gr\u00fc\u00dfe"),
        ("Subject: " + "gr\u00fcn " * 40 + "end", "Auto: " + "gr\u00fcn " * 40 + "end"),
        ("Subject: one\nSubject: two", "Auto: one"),
    ],
)
def test_the_subject_of_an_answer(sieve: Sieve, field: str, expected: str) -> None:
    sent = answer(sieve.run(away(), mail(subject=field), SENDER))
    assert " ".join(sent.decoded("Subject").split()) == expected
    assert sent.mail.octets.isascii()
    assert max(map(len, sent.lines)) <= 998


@pytest.mark.parametrize(
    "value",
    [
        "hello",
        "Gr\u00fc\u00dfe aus M\u00fcnchen",
        "\U0001f3d6 " * 40 + "end",
        "=?utf-8?q?no_word?= here",
        "a: b",
        "x" * 900,
    ],
)
def test_the_subject_that_the_script_wants(sieve: Sieve, value: str) -> None:
    sent = answer(sieve.run(away(f':subject "{value}" "{TEXT}"'), mail(), SENDER))
    assert sent.mail.octets.isascii()
    assert sent.names == FIELDS
    shown = sent.decoded("Subject")
    assert shown == (value if "=?" not in value else shown)
    assert max(map(len, sent.lines)) <= 998


@pytest.mark.parametrize("field", ["", "Subject:", "Subject:  "])
def test_the_subject_of_an_answer_to_a_message_without(sieve: Sieve, field: str) -> None:
    sent = answer(sieve.run(away(), mail(subject=field), SENDER))
    assert sent.names == FIELDS
    assert sent.decoded("Subject").startswith("Auto")


HOSTILE = [
    "=?utf-8?q?x=0D=0ABcc:_victim=40example.net?=",
    "=?utf-8?q?x=0ABcc:_victim=40example.net=0A=0Abody?=",
    "=?utf-8?q?x=0DBcc:_victim=40example.net?=",
    "=?utf-8?q?x=00=08=1B[2J=7F?=",
    "=?utf-8?q?x=C2=85Bcc:=E2=80=A8To:?=",
    "x\n\tBcc: victim@example.net",
    "x\rBcc: victim@example.net",
    "x\x08y\x1b[2J",
    "=?utf-8?q?=FF=FE?= \udcff\udcfe",
    "=?utf-8?b?" + "QQ==" * 30_000 + "?=",
    "x" * 100_000,
    "x " * 100_000,
    "x\n " * 20_000 + "y",
]


@pytest.mark.parametrize("number", range(len(HOSTILE)))
@pytest.mark.parametrize("name", ["Subject", "References", "In-Reply-To", "Message-ID"])
def test_a_hostile_field_of_the_message_makes_no_other_field_of_the_answer(
    sieve: Sieve, name: str, number: int
) -> None:
    value = HOSTILE[number]
    message = mail(f"{name}: {value}", subject="").encode("utf-8", "surrogateescape")
    if name == "Message-ID":
        message = message.replace(b"Message-ID", b"X-Number", 1)
    outcome = sieve.run(away(), message, SENDER)
    [sent] = outcome.sent
    assert set(sent.names) <= set(FIELDS)
    assert len(sent.names) == len(set(sent.names))
    assert sent.recipients == [SENDER]
    assert sent.text.strip() == TEXT
    header = sent.mail.octets.partition(b"\r\n\r\n")[0]
    assert header.isascii()
    assert not re.search(rb"[\x00-\x08\x0b-\x1f\x7f]", header.replace(b"\r\n", b""))
    assert max(map(len, sent.lines)) <= 998


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ([], "<own@example.org>"),
        (["References: <a@x> <b@x>"], "<a@x> <b@x> <own@example.org>"),
        (["References: <a@x>\n <b@x>"], "<a@x> <b@x> <own@example.org>"),
        (["In-Reply-To: <a@x>"], "<a@x> <own@example.org>"),
        (["In-Reply-To: <a@x> <b@x>"], "<own@example.org>"),
        (["In-Reply-To: Your message of Monday"], "<own@example.org>"),
        (["References: <a@x>", "In-Reply-To: <b@x>"], "<a@x> <own@example.org>"),
        (["References:", "In-Reply-To: <b@x>"], "<b@x> <own@example.org>"),
    ],
)
def test_what_an_answer_refers_to(sieve: Sieve, fields: list[str], expected: str) -> None:
    """RFC 5230 section 5.8, by RFC 5322 section 3.6.4."""
    message = re.sub(r"Message-ID: .*", "Message-ID: <own@example.org>", mail(*fields))
    sent = answer(sieve.run(away(), message, SENDER))
    assert sent.header("In-Reply-To") == "<own@example.org>"
    assert " ".join((sent.header("References") or "").split()) == expected


def test_many_references_are_folded(sieve: Sieve) -> None:
    references = [f"<{number:050}@example.org>" for number in range(300)]
    sent = answer(sieve.run(away(), mail("References: " + "\n ".join(references)), SENDER))
    assert max(map(len, sent.lines)) <= 998
    found = (sent.header("References") or "").split()
    assert found[0] == references[0]  # the thread's
    assert found[-2] == references[-1]
    assert [found[-1]] == [sent.header("In-Reply-To")]


TEXTS = {
    "ascii": "I am away.\n",
    "no-end": "I am away.",
    "empty": "",
    "lines": "One.\n\nTwo.\n\n\nThree.\n",
    "umlauts": "Ich bin im Urlaub, zur\u00fcck am M\u00e4rz.\n",
    "cjk": "\u79c1\u306f\u4f11\u6687\u4e2d\u3067\u3059\u3002" * 30 + "\n",
    "emoji": "\U0001f3d6\n",
    "long": "0123456789" * 300 + "\n",
    "long-words": "away " * 400 + "\n",
    "dots": ".\n..\n. x\n.\n.x\n",
    "from": "From here on I am away.\n>From there, too.\nFrom \n",
    "blanks": "trailing blanks  \n\t\n tabs\t\n",
    "equals": "a=3D b= =\n=\n",
    "header": "Bcc: victim@example.net\n\nx\n",
    "quote": 'He said \\"no\\" \\\\ once.\n',
    "nbsp": "\u00a0\u2028x\u2029\u0085\n",
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("lacks", ["", "8BITMIME", "8BITMIME SMTPUTF8 DSN SIZE PIPELINING"])
def test_the_text_of_an_answer(sieve: Sieve, sink: Sink, name: str, lacks: str) -> None:
    """It comes as it was written, in lines that every server takes, and with eight bits only where it may."""
    sink.extensions -= set(lacks.split())
    text = TEXTS[name]
    sent = answer(sieve.run(away(f'"{text}"'), mail(), SENDER))
    written = text.replace('\\"', '"').replace("\\\\", "\\")
    body = sent.message.get_payload(decode=True)
    assert isinstance(body, bytes)
    assert body.decode().replace("\r\n", "\n").rstrip("\n") == written.rstrip("\n")
    assert sent.names == FIELDS
    assert max(map(len, sent.lines)) <= 998
    assert not re.search(rb"\r(?!\n)|(?<!\r)\n", sent.mail.octets)
    has_eight_bits = not sent.mail.octets.isascii()
    assert sent.message["Content-Transfer-Encoding"].cte == (
        "8bit" if has_eight_bits else sent.message["Content-Transfer-Encoding"].cte
    )
    assert ("BODY=8BITMIME" in sent.mail.options) >= has_eight_bits
    assert "SMTPUTF8" not in sent.mail.options


def test_a_text_of_several_lines(sieve: Sieve) -> None:
    script = script_text("vacation", "vacation text:\r\nOne.\r\n..\r\n..two\r\n.\r\n;")
    assert answer(sieve.run(script, mail(), SENDER)).text == "One.\n.\n.two\n"


def test_variables_in_an_answer(sieve: Sieve) -> None:
    script = script_text(
        "vacation variables",
        'if header :matches "subject" "*" { set "s" "${1}"; }\nvacation :subject "Re: ${s}" "About ${s}: I am away.";',
    )
    sent = answer(sieve.run(script, mail(subject="Subject: =?utf-8?q?gr=C3=BCn?="), SENDER))
    assert sent.decoded("Subject") == "Re: gr\u00fcn"
    assert sent.text.strip() == "About gr\u00fcn: I am away."


# RFC 5230 section 4.4: a whole MIME entity.

MULTIPART = """\
Content-Type: multipart/alternative; boundary=foo

This is a preamble.
--foo
Content-Type: text/plain; charset=utf-8
Content-Transfer-Encoding: 8bit

Ich bin f\u00fcr eine Woche fort.
--foo
Content-Type: text/html; charset=us-ascii

<p>I am away.</p>
--foo--
"""


def in_lines(text: str) -> str:
    """A string of a script, of several lines."""
    return "text:\n" + re.sub(r"(?m)^\.", "..", text) + ".\n"


def test_an_answer_of_several_parts(sieve: Sieve) -> None:
    sent = answer(sieve.run(away(f":mime {in_lines(MULTIPART)}"), mail(), SENDER))
    message = sent.message
    assert message.get_content_type() == "multipart/alternative"
    plain, html = message.iter_parts()
    assert plain.get_content().strip() == "Ich bin f\u00fcr eine Woche fort."
    assert html.get_content().strip() == "<p>I am away.</p>"
    assert sent.header("MIME-Version") == "1.0"
    assert set(sent.names) <= set(FIELDS)
    assert "BODY=8BITMIME" in sent.mail.options


def test_an_answer_of_another_type(sieve: Sieve) -> None:
    entity = "MIME-Version: 1.0\nContent-Type: text/html;\n charset=utf-8\nContent-Language: en\n\n<p>I am away.</p>\n"
    sent = answer(sieve.run(away(f":mime {in_lines(entity)}"), mail(), SENDER))
    assert sent.message.get_content_type() == "text/html"
    assert sent.text.strip() == "<p>I am away.</p>"
    assert sent.headers("MIME-Version") == ["1.0"]
    assert sent.header("Content-Language") == "en"


@pytest.mark.parametrize(
    "fields",
    [
        "Bcc: victim@example.net",
        "To: victim@example.net",
        "Cc: victim@example.net",
        "From: joe@example.com",
        "Subject: another",
        "Resent-To: victim@example.net",
        "Auto-Submitted: no",
        "Received: from nowhere",
        "Return-Path: <victim@example.net>",
        "Date: Thu, 1 Jan 1970 00:00:00 +0000",
        "Content-Type: text/html\nBcc: victim@example.net",
        "bcc : victim@example.net",
    ],
)
def test_an_entity_has_no_fields_but_those_of_mime(sieve: Sieve, fields: str) -> None:
    """Whether that is an error or they are left out: the message is kept, and nobody else gets the answer."""
    for entity in (f"{fields}\nContent-Type: text/plain\n\nx\n", f"Content-Type: text/plain\n{fields}\n\nx\n"):
        variables = script_text(
            "vacation variables", f'set "entity" {in_lines(entity)};\nvacation :mime "${{entity}}";'
        )
        for script in (away(f":mime {in_lines(entity)}"), variables):
            outcome = sieve.run(script, mail(), f"person{next(NUMBERS)}@example.org")
            assert outcome.placed == {"INBOX": ""}
            assert len(outcome.sent) + len(outcome.errors) >= 1
            for sent in outcome.sent:
                assert set(sent.names) <= set(FIELDS)
                assert len(sent.names) == len(set(sent.names))
                assert [each.partition("@")[0][:6] for each in sent.recipients] == ["person"]
                assert parseaddr(sent.header("From") or "")[1] == "jane@example.com"
                assert sent.header("Auto-Submitted") == "auto-replied"


# When there is another answer


class Interval(NamedTuple):
    """tags: of vacation. none: seconds after which there is no other answer. other: after which there is one."""

    tags: str
    none: int
    other: int
    options: dict[str, str]


def interval(tags: str, seconds: int, **options: str) -> Interval:
    return Interval(tags, seconds - 30, seconds + 30, options)


@pytest.mark.parametrize(
    "case",
    [
        interval("", 7 * DAY),
        interval(":days 10", 10 * DAY),
        interval(":days 1", 3 * DAY),
        interval(":days 0", 3 * DAY),
        interval(":days 3", 3 * DAY),
        interval(":days 90", 90 * DAY),
        interval(":days 91", 90 * DAY),
        interval(":days 4294967295", 90 * DAY),
        interval(":days 1", DAY, sieve_vacation_min_response="1d"),
        interval(":days 20", 10 * DAY, sieve_vacation_max_response="10d"),
        interval("", 5 * DAY, sieve_vacation_max_response="5d"),
        interval("", 9 * DAY, sieve_vacation_min_response="9d"),
        interval(":seconds 600", 600),
        interval(":seconds 1", 60),
        interval(":seconds 0", 60),
        interval(":seconds 600", 3600, sieve_vacation_min_seconds="1h"),
        interval(":seconds 8000000", 90 * DAY),
        interval(":seconds 4294967295", 90 * DAY),
    ],
    ids=lambda case: f"{case.tags} {' '.join(case.options.values())}".strip() or "default",
)
def test_how_long_there_is_no_other_answer(site: Site, sink: Sink, clock: Clock, case: Interval) -> None:
    sieve = Sieve(site, sink, **case.options)
    script = away(f'{case.tags} "{TEXT}"', "vacation-seconds")
    answer(sieve.run(script, mail(), SENDER))
    clock.ahead += case.none
    outcome = sieve.run(script, mail(), SENDER)
    verify_kept(outcome)
    verify_no_answer(outcome)
    clock.ahead += case.other - case.none
    answer(sieve.run(script, mail(), SENDER))
    verify_no_answer(sieve.run(script, mail(), SENDER))


def test_the_interval_does_not_grow_with_messages_that_get_no_answer(sieve: Sieve, clock: Clock) -> None:
    answers = []
    for _ in range(15):
        answers.append(len(sieve.run(away(), mail(), SENDER).sent))
        clock.ahead += DAY + 1
    assert answers == [1, 0, 0, 0, 0, 0, 0] * 2 + [1]


def test_all_messages_can_be_answered(site: Site, sink: Sink) -> None:
    """RFC 6131 section 2: zero seconds, where the site has no least value."""
    sieve = Sieve(site, sink, sieve_vacation_min_seconds="0")
    for _ in range(3):
        answer(sieve.run(away(f':seconds 0 "{TEXT}"', "vacation-seconds"), mail(), SENDER))


def test_seconds_bring_vacation_with_them(sieve: Sieve) -> None:
    """RFC 6131 section 4."""
    answer(sieve.run(script_text("vacation-seconds", f'vacation :seconds 600 "{TEXT}";'), mail(), SENDER))


@pytest.mark.parametrize(
    ("first", "second", "answers"),
    [
        # RFC 5230 section 4.2.
        ('"a"', '"a"', False),
        ('"a"', '"b"', True),
        ('"a"', '"A"', True),
        ('"a"', ':subject "s" "a"', True),
        (':subject "s" "a"', ':subject "t" "a"', True),
        (':subject "s" "a"', ':subject "s" "a"', False),
        ('"a"', ':from "jane@example.com" "a"', True),
        (':from "jane@example.com" "a"', ':from "Jane <jane@example.com>" "a"', True),
        ('"Content-Type: text/plain\n\na"', ':mime "Content-Type: text/plain\n\na"', True),
        ('"a"', ':days 30 "a"', False),
        (':handle "h" "a"', ':handle "h" "b"', False),
        (':handle "h" "a"', ':handle "h" :subject "s" :from "jane@example.com" "b"', False),
        (':handle "h" "a"', ':handle "i" "a"', True),
        (':handle "h" "a"', '"a"', True),
        ('"a"', ':handle "a" "a"', True),
        (':handle "" "a"', ':handle "" "b"', False),
        (':handle "ä" "a"', ':handle "ö" "a"', True),
        (f':handle "{"h" * 2000}x" "a"', f':handle "{"h" * 2000}y" "a"', True),
        (':subject "a" "b"', ':subject "" "ab"', True),
        (':subject "s" :handle "h" "a"', ':subject "s" :handle "h" "a"', False),
    ],
)
def test_which_answers_are_the_same(sieve: Sieve, first: str, second: str, answers: bool) -> None:
    answer(sieve.run(away(first), mail(), SENDER))
    assert len(sieve.run(away(second), mail(subject="Subject: another"), SENDER).sent) == answers


@pytest.mark.parametrize(
    ("other", "answers"),
    [
        ("sender@EXAMPLE.org", False),
        ("SENDER@example.org", False),
        ("sender2@example.org", True),
        ("sender@example.net", True),
        ("sender@example.org.example", True),
    ],
)
def test_which_senders_are_the_same(sieve: Sieve, other: str, answers: bool) -> None:
    answer(sieve.run(away(), mail(), SENDER))
    assert len(sieve.run(away(), mail(), other).sent) == answers


def test_who_got_no_answer_gets_one_as_soon_as_that_is_right(sieve: Sieve) -> None:
    verify_no_answer(sieve.run(away(), mail("Precedence: bulk"), SENDER))
    answer(sieve.run(away(), mail(), SENDER))


@pytest.mark.parametrize("point", ["mail", "rcpt", "data", "message", "connect"])
@pytest.mark.parametrize("code", ["451 4.3.0", "421 4.3.2", "550 5.7.1"])
def test_an_answer_that_cannot_be_sent_is_tried_with_the_next_message(
    sieve: Sieve, sink: Sink, point: str, code: str
) -> None:
    sink.replies[point] = f"{code} Not this"
    outcome = sieve.run(away(), mail(), SENDER)
    verify_kept(outcome)
    assert outcome.sent == []
    [event] = outcome.fields("mail-not-sent")
    assert event["action"] == "vacation"
    assert event["to"] == f"<{SENDER}>"
    assert event["recipient"] == "<jane@example.com>"
    if point != "connect":
        assert event["result"] == ("permanent" if code.startswith("5") else "temporary")
    assert "Not this" in event["cause"]
    sink.replies.clear()
    for path in sieve.site.configdirectory.glob("*.backoff"):
        path.unlink()
    sieve.agent = DeliveryAgent(sieve.config)  # as after the back-off
    answer(sieve.run(away(), mail(), SENDER))
    verify_no_answer(sieve.run(away(), mail(), SENDER))


def test_what_the_log_says_of_an_answer(sieve: Sieve) -> None:
    message = re.sub(r"Message-ID: .*", "Message-ID: <own@example.org>", mail())
    [event] = sieve.run(away(), message, SENDER).fields("mail-sent")
    assert event.pop("ms").replace(".", "").isdigit()
    assert event == {
        "action": "vacation",
        "recipient": "<jane@example.com>",
        "to": f"<{SENDER}>",
        "msgid": "<own@example.org>",
    }


def test_there_is_no_answer_if_the_database_cannot_be_used(site: Site, sink: Sink) -> None:
    """Without it, each message would have one."""
    folder = site.root / "folder.db"
    folder.mkdir()
    sieve = Sieve(site, sink, duplicate_db_path=str(folder))
    outcome = sieve.run(away(), mail(), SENDER)
    verify_kept(outcome)
    assert outcome.sent == []
    [event] = outcome.fields("mail-not-sent")
    assert "duplicate database" in event["cause"]


def test_there_is_no_answer_to_a_message_that_is_not_stored(site: Site, sink: Sink) -> None:
    sieve = Sieve(site, sink, lmtp_strict_quota="yes")
    maildir = site.spool / "jane"
    (maildir / "maildirsize").write_text("10S\n0 0\n")
    site.give(maildir / "maildirsize")
    outcome = sieve.run(away(), mail(), SENDER)
    assert outcome.reply.startswith("4")
    assert outcome.sent == []
    (maildir / "maildirsize").unlink()
    answer(sieve.run(away(), mail(), SENDER))


# With other actions

STORES = {"INBOX": ""}


@pytest.mark.parametrize(
    ("requires", "commands", "placed", "recipients"),
    [
        ("", AWAY, STORES, [SENDER]),
        ("", f"keep; {AWAY}", STORES, [SENDER]),
        ("", f"{AWAY} keep;", STORES, [SENDER]),
        ("", f"{AWAY} stop;", STORES, [SENDER]),
        ("", f"stop; {AWAY}", STORES, []),
        ("", f"{AWAY} discard;", {}, [SENDER]),
        ("", f"discard; {AWAY}", {}, [SENDER]),
        ("fileinto", f'fileinto "Work"; {AWAY}', {"Work": ""}, [SENDER]),
        ("fileinto", f'{AWAY} fileinto "Work";', {"Work": ""}, [SENDER]),
        ("", f'{AWAY} redirect "joe@example.net";', {}, ["joe@example.net", SENDER]),
        ("copy", f'redirect :copy "joe@example.net"; {AWAY}', STORES, ["joe@example.net", SENDER]),
        ("imap4flags", f'setflag "\\\\Seen"; {AWAY}', {"INBOX": "\\Seen"}, [SENDER]),
        ("", f'if header :is "subject" "no" {{ {AWAY} }}', STORES, []),
        ("", f'if header :is "subject" "no" {{ {AWAY} }} else {{ {AWAY} }}', STORES, [SENDER]),
    ],
)
def test_vacation_leaves_the_other_actions_alone(
    sieve: Sieve, requires: str, commands: str, placed: dict[str, str], recipients: list[str]
) -> None:
    """RFC 5230 section 4.7: it has no effect on the implicit keep."""
    outcome = sieve.run(script_text(f"vacation {requires}", commands), mail(), SENDER)
    assert outcome.errors == []
    assert outcome.reply == "250 2.1.5"
    assert outcome.placed == placed
    assert sorted(each for sent in outcome.sent for each in sent.recipients) == recipients


@pytest.mark.parametrize(
    ("requires", "commands"),
    [
        ("", f"{AWAY} {AWAY}"),
        ("", f'{AWAY} vacation :handle "other" "b";'),
        ("reject", f'{AWAY} reject "no";'),
        ("reject", f'reject "no"; {AWAY}'),
        ("ereject", f'{AWAY} ereject "no";'),
        ("ereject", f'ereject "no"; {AWAY}'),
        ("ihave", f'{AWAY} error "not today";'),
        ("include", f'include "away"; {AWAY}'),
        ("include", 'include "away"; include "away";'),
        ("variables", 'set "x" "no address"; vacation :from "${x}" "a";'),
        ("variables", 'set "x" "no address"; vacation :addresses "${x}" "a";'),
    ],
)
def test_what_does_not_go_with_vacation(sieve: Sieve, requires: str, commands: str) -> None:
    """RFC 5230 section 4.7: it is an error at run time, after which the message is kept and nothing is sent."""
    outcome = sieve.run(script_text(f"vacation {requires}", commands), mail(), SENDER, away=away())
    assert len(outcome.errors) == 1
    assert outcome.reply == "250 2.1.5"
    assert outcome.placed == {"INBOX": ""}
    assert outcome.sent == []
    answer(sieve.run(away(), mail(), SENDER))


def test_an_included_script_answers(sieve: Sieve) -> None:
    outcome = sieve.run(script_text("include", 'include "away";'), mail(), SENDER, away=away())
    assert answer(outcome).text.strip() == TEXT


@pytest.mark.parametrize("user", ["keep;", "discard;", None, away('"of the user"')])
def test_a_script_of_the_site_answers(site: Site, sink: Sink, user: str | None) -> None:
    """The earliest of several answers counts."""
    sieve = Sieve(site, sink, before=away('"of the site"'), after=away('"of the end"'))
    outcome = sieve.run(user, mail(), SENDER)
    assert outcome.errors == []
    assert [sent.text.strip() for sent in outcome.sent] == ["of the site"]
    assert outcome.placed == ({} if user == "discard;" else {"INBOX": ""})


def test_a_later_script_of_the_site_answers(site: Site, sink: Sink) -> None:
    sieve = Sieve(site, sink, after=away())
    assert answer(sieve.run("keep;", mail(), SENDER)).text.strip() == TEXT


def test_the_header_as_it_was_received_decides(sieve: Sieve) -> None:
    """A list's mail does not become a person's because a script takes its field away."""
    script = script_text("vacation editheader", f'deleteheader "List-Id"; {AWAY}')
    outcome = sieve.run(script, mail("List-Id: <list.example.org>"), SENDER)
    assert outcome.message.header("List-Id") is None
    verify_no_answer(outcome, "List-Id")


# Over the wire


def test_many_messages_at_the_same_time_get_one_answer(site: Site, sink: Sink) -> None:
    """Each is delivered by another process."""
    sieve = Sieve(site, sink)
    sieve.write("active", away())
    clients = [connected(site) for _ in range(6)]

    def send(client: Client) -> list[str]:
        message = mail().replace("\n", "\r\n").encode()
        return client.deliver(message, "jane@example.com", sender=SENDER)

    with ThreadPoolExecutor(len(clients)) as pool:
        replies = [reply for replies in pool.map(send, clients) for reply in replies]
    assert [reply[:12] for reply in replies] == ["250 2.1.5 Ok"] * len(clients)
    for client in clients:
        client.leave()
    assert len(site.files("jane")) == len(clients)
    assert [mail.recipients for mail in sink.mails] == [(SENDER,)]
    assert site.log_text().count("no-answer ") == len(clients) - 1
