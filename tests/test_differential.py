"""The same sessions to a real Cyrus lmtpd and to ours: the reply codes agree, but for differences with a name.

So do the places of the messages and their Return-Path.
"""

from __future__ import annotations

import contextlib
import functools
import re
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, Union

import pytest
from harness import Client, Site
from peers import Cyrus
from test_man import LMTPD_8, section

MAXIMUM = 20000  # maxmessagesize of both
OPTIONS = {"maxmessagesize": str(MAXIMUM), "unixhierarchysep": "yes", "altnamespace": "yes"}
MESSAGE = b"From: sender@example.com\r\nSubject: a subject\r\n\r\nA line.\r\n"

Code = str  # "250", or with the enhanced code of its last line "250 2.1.5"


class Data(NamedTuple):
    """The octets after DATA with their final dot; not sent when DATA was refused."""

    octets: bytes


Step = Union[str, bytes, Data]


class Session(NamedTuple):
    """What a client sends after LHLO. Pipelined: all at once; else each step waits for the replies to the last."""

    name: str
    steps: tuple[Step, ...]
    pipelined: bool = False
    lhlo: bool = True


class Difference(NamedTuple):
    """The codes of ours where they are meant to differ from Cyrus', and why."""

    ours: tuple[Code, ...]
    reason: str
    in_every_version: bool = True  # of Cyrus


def message(body: bytes = MESSAGE) -> Data:
    return Data(body + b".\r\n")


def lockstep(name: str, *steps: Step) -> Session:
    return Session(name, steps)


def pipelined(name: str, *steps: Step) -> Session:
    return Session(name, steps, pipelined=True)


def mail(*parameters: str) -> str:
    return " ".join(["MAIL FROM:<sender@example.com>", *parameters])


MAIL = mail()
JANE = "RCPT TO:<jane>"
JOE = "RCPT TO:<joe>"
NOBODY = "RCPT TO:<nobody>"
TRANSACTION: tuple[Step, ...] = (MAIL, JANE, "DATA", message())


def recipient(name: str, path: str) -> Session:
    """A session that is about how one forward-path is taken."""
    return lockstep(f"recipient: {name}", MAIL, f"RCPT TO:{path}", "DATA", message(), "NOOP")


def sender(name: str, path: str) -> Session:
    """A session that is about how one reverse-path is taken."""
    return lockstep(f"sender: {name}", f"MAIL FROM:{path}", JANE, "RSET")


SESSIONS = [
    # The order of commands
    lockstep("one message", *TRANSACTION),
    lockstep("two messages", *TRANSACTION, *TRANSACTION),
    Session("MAIL without LHLO", (MAIL, JANE, "DATA", message()), lhlo=False),
    Session("RSET, NOOP and VRFY without LHLO", ("RSET", "NOOP", "VRFY jane"), lhlo=False),
    lockstep("LHLO again", "LHLO other.example", MAIL),
    lockstep("LHLO in a transaction", MAIL, JANE, "LHLO other.example", MAIL, JANE, "DATA", message()),
    lockstep("LHLO without a name", "LHLO"),
    lockstep("LHLO with an empty name", "LHLO "),
    lockstep("LHLO with more than a name", "LHLO a b", "LHLO  a", "LHLO a\t", "LHLO [127.0.0.1]", "LHLO -"),
    lockstep("HELO and EHLO", "HELO client.example", "EHLO client.example"),
    lockstep("nested MAIL", MAIL, MAIL, JANE, "DATA", message()),
    lockstep("RCPT before MAIL", JANE, *TRANSACTION),
    lockstep("DATA before MAIL", "DATA", message(), *TRANSACTION),
    lockstep("DATA without recipients", MAIL, "DATA", message(), "NOOP"),
    lockstep("DATA after refused recipients", MAIL, NOBODY, "DATA", message(), "NOOP"),
    lockstep("RSET", MAIL, JANE, "RSET", JANE, MAIL, "RSET", "RSET"),
    lockstep("NOOP", "NOOP", "noop"),
    lockstep("NOOP with an argument", "NOOP something"),
    lockstep("RSET with an argument", "RSET something"),
    lockstep("DATA with an argument", MAIL, JANE, "DATA something", "RSET"),
    lockstep("VRFY", "VRFY jane", "VRFY nobody", "VRFY"),
    lockstep("EXPN", "EXPN jane"),
    lockstep("HELP", "HELP", "HELP MAIL"),
    lockstep("TRACE", "TRACE some-id.1", "TRACE", "TRACE a b", "TRACE " + "a" * 256),
    lockstep("AUTH", "AUTH", "AUTH UNKNOWN", "AUTH PLAIN AGphbmUAc2VjcmV0"),
    lockstep("STARTTLS", "STARTTLS", "NOOP"),
    lockstep("unknown commands", "XYZZY", "SEND FROM:<a@example.com>", "MAILFROM:<a@example.com>", "250 ok"),
    lockstep("an empty line", "", "NOOP"),
    lockstep("8-bit octets in a command", b"X\xc3\xa9", b"NOOP\xff", "NOOP"),
    lockstep("lower case", "mail from:<sender@example.com>", "rcpt to:<jane>", "data", message()),
    lockstep("trailing spaces", "NOOP  ", "RSET ", MAIL + "  ", JANE + "  ", "DATA ", message()),
    lockstep("trailing white space", "NOOP\t", "RSET \t", MAIL + "\f", JANE + "\v", "DATA\t ", message(), "QUIT\t"),
    lockstep("a trailing bare CR", "NOOP\r", "RSET\r", "QUIT\r"),
    lockstep("a trailing NUL", "NOOP\0", "RSET\0x", MAIL + "\0", JANE + "\0", "QUIT\0"),
    lockstep("leading white space", " NOOP", "\tRSET", " " + MAIL, " QUIT"),
    lockstep("spaces after the colon", "MAIL FROM: <sender@example.com>", "RCPT TO: <jane>", "RSET"),
    lockstep("a long line", "NOOP " + "x" * 3000, "X" * 3000, "NOOP"),
    lockstep("a very long line", "X" * 20000, "NOOP"),
    lockstep("BDAT", MAIL, JANE, b"BDAT 11 LAST\r\nNOOP\r\nxyz", "NOOP"),
    lockstep("QUIT with an argument", "QUIT now"),
    lockstep("QUIT in a transaction", MAIL, JANE, "QUIT"),
    # Pipelining
    pipelined("pipelined", *TRANSACTION),
    pipelined("pipelined, three messages", *TRANSACTION, *TRANSACTION, *TRANSACTION),
    pipelined("pipelined, one of two unknown", MAIL, NOBODY, JANE, "DATA", message(), "NOOP"),
    pipelined("pipelined, nested MAIL and RSET", MAIL, MAIL, "RSET", MAIL, JANE, "RSET", "NOOP"),
    pipelined("pipelined, commands after QUIT", "NOOP", "QUIT", "NOOP"),
    # Parameters
    lockstep("SIZE", mail("SIZE=100"), JANE, "DATA", message()),
    lockstep("SIZE at the limit", mail(f"SIZE={MAXIMUM}")),
    lockstep("SIZE over the limit", mail(f"SIZE={MAXIMUM + 1}")),
    lockstep("SIZE over the limit, then MAIL", mail(f"SIZE={MAXIMUM + 1}"), MAIL, JANE),
    lockstep("SIZE beyond 32 bits", mail("SIZE=4294967297")),
    lockstep("SIZE beyond 64 bits", mail("SIZE=99999999999999999999")),
    lockstep("SIZE that is no number", mail("SIZE=many"), MAIL),
    lockstep("SIZE without a value", mail("SIZE"), mail("SIZE=")),
    lockstep("SIZE with a sign", mail("SIZE=-1"), mail("SIZE=+1")),
    lockstep("BODY=8BITMIME", mail("BODY=8BITMIME"), JANE, "DATA", message(MESSAGE + b"\xc3\xa9\r\n")),
    lockstep("BODY=7BIT", mail("BODY=7BIT"), JANE),
    lockstep("BODY=8bitmime", mail("body=8bitmime"), JANE),
    lockstep("BODY that is unknown", mail("BODY=9BIT"), MAIL, JANE),
    lockstep("BODY=BINARYMIME", mail("BODY=BINARYMIME"), "RSET"),
    lockstep("SIZE and BODY", mail("SIZE=10", "BODY=8BITMIME"), JANE),
    lockstep("a parameter that is unknown", mail("XYZ=1"), MAIL, JANE),
    lockstep("SMTPUTF8", mail("SMTPUTF8"), "RSET"),
    lockstep("AUTH= on MAIL", mail("AUTH=<>"), JANE),
    lockstep("IGNOREQUOTA", MAIL, JANE + " IGNOREQUOTA", "DATA", message()),
    lockstep("IGNOREQUOTA in lower case", MAIL, JANE + " ignorequota"),
    lockstep("IGNOREQUOTA on MAIL", mail("IGNOREQUOTA"), "RSET"),
    lockstep("a parameter of RCPT that is unknown", MAIL, JANE + " XYZ=1", JANE),
    lockstep("NOTIFY on RCPT", MAIL, JANE + " NOTIFY=NEVER", JANE),
    # Senders
    sender("null", "<>"),
    sender("without a domain", "<sender>"),
    sender("source route", "<@one.example,@two.example:sender@example.com>"),
    sender("quoted", '<"a b"@example.com>'),
    sender("quoted, with a bracket", '<"a>b"@example.com>'),
    sender("address literal", "<sender@[127.0.0.1]>"),
    sender("8 bit", "<sénder@example.com>"),
    sender("two at signs", "<a@b@example.com>"),
    sender("no angle brackets", "sender@example.com"),
    sender("no closing bracket", "<sender@example.com"),
    sender("no opening bracket", "sender@example.com>"),
    sender("nothing", ""),
    sender("a space within", "<sen der@example.com>"),
    sender("text after the bracket", "<sender@example.com>x"),
    # Recipients
    recipient("with a domain", "<jane@example.com>"),
    recipient("upper case", "<JANE@EXAMPLE.COM>"),
    recipient("unknown", "<nobody@example.com>"),
    recipient("address extension", "<jane+lists@example.com>"),
    recipient("extension that is no folder", "<jane+nothing@example.com>"),
    recipient("empty extension", "<jane+@example.com>"),
    recipient("extension of an unknown user", "<nobody+lists@example.com>"),
    recipient("source route", "<@one.example:jane@example.com>"),
    recipient("quoted", '<"jane"@example.com>'),
    recipient("quoted pair", '<"ja\\ne"@example.com>'),
    recipient("quoted, with a space", '<"jane "@example.com>'),
    recipient("empty", "<>"),
    recipient("empty local part", "<@example.com>"),
    recipient("empty domain", "<jane@>"),
    recipient("no angle brackets", "jane@example.com"),
    recipient("no closing bracket", "<jane@example.com"),
    recipient("nothing", ""),
    recipient("8 bit", "<jané@example.com>"),
    recipient("address literal", "<jane@[127.0.0.1]>"),
    recipient("slash", "<../jane@example.com>"),
    recipient("dots", "<..@example.com>"),
    recipient("shared folder that is not there", "<+shared.folder@example.com>"),
    recipient("two at signs", "<jane@x@example.com>"),
    recipient("very long", "<" + "j" * 400 + "@example.com>"),
    recipient("postmaster", "<postmaster>"),
    lockstep("two recipients, one unknown", MAIL, JANE, NOBODY, "DATA", message()),
    lockstep("two recipients", MAIL, JANE, JOE, "DATA", message()),
    lockstep("the same recipient twice", MAIL, JANE, JANE, "DATA", message()),
    # Messages
    lockstep("empty message", MAIL, JANE, "DATA", message(b"")),
    lockstep("no headers", MAIL, JANE, "DATA", message(b"\r\nOnly a body.\r\n")),
    lockstep("no body", MAIL, JANE, "DATA", message(b"Subject: only headers\r\n")),
    lockstep("not a header", MAIL, JANE, "DATA", message(b"This is no header\r\n\r\nA body.\r\n")),
    lockstep("8-bit header", MAIL, JANE, "DATA", message(b"Subject: caf\xc3\xa9\r\n\r\nA body.\r\n")),
    lockstep("dot-stuffing", MAIL, JANE, "DATA", message(MESSAGE + b"..\r\n...\r\n.x\r\n"), "NOOP"),
    lockstep("NUL in the body", MAIL, JANE, JOE, "DATA", message(MESSAGE + b"a\0b\r\n"), "NOOP"),
    lockstep("NUL in a header", MAIL, JANE, "DATA", message(b"Subject: a\0b\r\n\r\n"), "NOOP"),
    lockstep("long line in the message", MAIL, JANE, "DATA", message(MESSAGE + b"x" * 9000 + b"\r\n")),
    lockstep("too large", MAIL, JANE, "DATA", message(MESSAGE + b"0123456789\r\n" * 3000), "NOOP"),
    lockstep("too large for two", MAIL, JANE, JOE, "DATA", message(MESSAGE + b"0123456789\r\n" * 3000), "NOOP"),
    lockstep("bare CR", MAIL, JANE, "DATA", message(MESSAGE + b"a\rb\r\n"), "NOOP"),
    lockstep("bare LF", MAIL, JANE, "DATA", message(MESSAGE + b"a\nb\r\n"), "NOOP"),
    lockstep("end: LF dot LF", MAIL, JANE, "DATA", message(MESSAGE + b"a\n.\nNOOP\r\n"), "NOOP"),
    lockstep("end: LF dot CR LF", MAIL, JANE, "DATA", message(MESSAGE + b"a\n.\r\nNOOP\r\n"), "NOOP"),
    lockstep("end: CR LF dot LF", MAIL, JANE, "DATA", message(MESSAGE + b"a\r\n.\nNOOP\r\n"), "NOOP"),
    lockstep("end: CR dot CR", MAIL, JANE, "DATA", message(MESSAGE + b"a\r.\rNOOP\r\n"), "NOOP"),
    lockstep("end: CR LF dot CR", MAIL, JANE, "DATA", message(MESSAGE + b"a\r\n.\rNOOP\r\n"), "NOOP"),
]

PARAMETERS_FIRST = "The parameters are judged before a transaction is begun: a refused MAIL leaves none behind."
ONE_END = "Only CR LF dot CR LF ends a message (RFC 5321, 4.1.1.4): anything else is SMTP smuggling."
TOLERANT = "White space at the end of a command is no fault (RFC 5321, 4.1.1)."
UNQUOTED = "The quotes belong to the syntax, not to the name (RFC 5321, 4.1.2)."
ARGUMENT = "The command is known, its argument is wrong: 501, not 500 (RFC 5321, 4.2.2)."
UNKNOWN_PARAMETER = "555 says that a parameter is not known (RFC 5321, 4.1.1.11); 501, that its syntax is wrong."
NOT_ASCII = "An address beyond ASCII without SMTPUTF8 has a code of its own (RFC 6531, 3.5)."

DIFFERENCES: dict[str, Difference] = {
    "LHLO without a name": Difference(("501 5.5.4", "221 2.0.0"), ARGUMENT),
    "RSET with an argument": Difference(("501 5.5.4", "221 2.0.0"), ARGUMENT),
    "DATA with an argument": Difference(("250 2.1.0", "250 2.1.5", "501 5.5.4", "250 2.0.0", "221 2.0.0"), ARGUMENT),
    "VRFY": Difference(("252 2.3.3", "252 2.3.3", "501 5.5.4", "221 2.0.0"), ARGUMENT),
    "QUIT with an argument": Difference(("501 5.5.4", "221 2.0.0"), ARGUMENT),
    "AUTH": Difference(
        ("501 5.5.4", "504 5.5.4", "504 5.5.4", "221 2.0.0"), "AUTH without a mechanism is a known verb."
    ),
    "trailing spaces": Difference(
        ("250 2.0.0", "250 2.0.0", "250 2.1.0", "250 2.1.5", "354", "250 2.1.5", "221 2.0.0"), TOLERANT
    ),
    "trailing white space": Difference(
        ("250 2.0.0", "250 2.0.0", "250 2.1.0", "250 2.1.5", "354", "250 2.1.5", "221 2.0.0"), TOLERANT
    ),
    "a trailing NUL": Difference(
        (*["500 5.5.2"] * 5, "221 2.0.0"),
        "A NUL is no end of a line, as it is for Cyrus, whose lines are strings of C.",
    ),
    "LHLO with an empty name": Difference(("501 5.5.4", "221 2.0.0"), ARGUMENT),
    "IGNOREQUOTA on MAIL": Difference(("555 5.5.4", "250 2.0.0", "221 2.0.0"), UNKNOWN_PARAMETER),
    "a parameter of RCPT that is unknown": Difference(
        ("250 2.1.0", "555 5.5.4", "250 2.1.5", "221 2.0.0"), UNKNOWN_PARAMETER
    ),
    "NOTIFY on RCPT": Difference(("250 2.1.0", "555 5.5.4", "250 2.1.5", "221 2.0.0"), UNKNOWN_PARAMETER),
    "sender: 8 bit": Difference(("553 5.6.7", "503 5.5.1", "250 2.0.0", "221 2.0.0"), NOT_ASCII),
    "recipient: 8 bit": Difference(("250 2.1.0", "553 5.6.7", "503 5.5.1", "250 2.0.0", "221 2.0.0"), NOT_ASCII),
    "sender: a space within": Difference(
        ("250 2.1.0", "250 2.1.5", "250 2.0.0", "221 2.0.0"),
        "A space outside of quotes is taken, as Cyrus' own deliver(8) sends it in a recipient.",
    ),
    "LHLO in a transaction": Difference(
        ("250 2.1.0", "250 2.1.5", "250", "250 2.1.0", "250 2.1.5", "354", "250 2.1.5", "221 2.0.0"),
        "A new LHLO resets the transaction (RFC 5321, 4.1.4).",
    ),
    "NOOP with an argument": Difference(("250 2.0.0", "221 2.0.0"), "NOOP may have one (RFC 5321, 4.1.1.9)."),
    "HELP": Difference(("214 2.0.0", "214 2.0.0", "221 2.0.0"), "We have HELP (RFC 5321, 4.1.1.8)."),
    "TRACE": Difference(
        ("250 2.0.0", "501 5.5.4", "501 5.5.4", "501 5.5.4", "221 2.0.0"),
        "Later versions of Cyrus have TRACE.",
        in_every_version=False,
    ),
    "BDAT": Difference(
        ("250 2.1.0", "250 2.1.5", "250 2.1.5", "250 2.0.0", "221 2.0.0"), "We have CHUNKING (RFC 3030)."
    ),
    "a long line": Difference(("250 2.0.0", "500 5.5.2", "250 2.0.0", "221 2.0.0"), "NOOP may have an argument."),
    "a very long line": Difference(
        ("500 5.5.2", "250 2.0.0", "221 2.0.0"),
        "The rest of a line that is too long is skipped, not taken for commands.",
    ),
    "SIZE over the limit, then MAIL": Difference(
        ("552 5.2.3", "250 2.1.0", "250 2.1.5", "221 2.0.0"), PARAMETERS_FIRST
    ),
    "SIZE beyond 32 bits": Difference(
        ("552 5.2.3", "221 2.0.0"), "A size of 4 GiB and 1 octet is over the limit, too."
    ),
    "SIZE that is no number": Difference(("501 5.5.4", "250 2.1.0", "221 2.0.0"), PARAMETERS_FIRST),
    "SIZE without a value": Difference(("501 5.5.4", "501 5.5.4", "221 2.0.0"), PARAMETERS_FIRST),
    "SIZE with a sign": Difference(("501 5.5.4", "501 5.5.4", "221 2.0.0"), PARAMETERS_FIRST),
    "BODY that is unknown": Difference(("501 5.5.4", "250 2.1.0", "250 2.1.5", "221 2.0.0"), PARAMETERS_FIRST),
    "a parameter that is unknown": Difference(("555 5.5.4", "250 2.1.0", "250 2.1.5", "221 2.0.0"), PARAMETERS_FIRST),
    "SMTPUTF8": Difference(("250 2.1.0", "250 2.0.0", "221 2.0.0"), "We have SMTPUTF8 (RFC 6531)."),
    "recipient: quoted": Difference(("250 2.1.0", "250 2.1.5", "354", "250 2.1.5", "250 2.0.0", "221 2.0.0"), UNQUOTED),
    "recipient: quoted pair": Difference(
        ("250 2.1.0", "250 2.1.5", "354", "250 2.1.5", "250 2.0.0", "221 2.0.0"), UNQUOTED
    ),
    "not a header": Difference(
        ("250 2.1.0", "250 2.1.5", "354", "250 2.1.5", "221 2.0.0"), "What arrived is stored; nothing is lost."
    ),
    "too large": Difference(
        ("250 2.1.0", "250 2.1.5", "354", "552 5.3.4", "250 2.0.0", "221 2.0.0"),
        "5.3.4 is the code for a message too large for the system (RFC 3463), 5.2.3 the one for a mailbox's limit.",
    ),
    "too large for two": Difference(
        ("250 2.1.0", "250 2.1.5", "250 2.1.5", "354", "552 5.3.4", "552 5.3.4", "250 2.0.0", "221 2.0.0"),
        "Each recipient gets a reply (RFC 2033, 4.2).",
    ),
    **{
        f"end: {name}": Difference(("250 2.1.0", "250 2.1.5", "354", "250 2.1.5", "250 2.0.0", "221 2.0.0"), ONE_END)
        for name in ("LF dot LF", "LF dot CR LF", "CR LF dot LF")
    },
}


def octets(step: Step) -> bytes:
    if isinstance(step, Data):
        return step.octets
    return (step.encode() if isinstance(step, str) else step) + b"\r\n"


class Conversation(NamedTuple):
    """What was sent in a session, and every reply after LHLO's."""

    sent: bytes
    replies: list[list[str]]

    @property
    def codes(self) -> list[Code]:
        return [code(reply) for reply in self.replies]


def greet(client: Client, session: Session) -> None:
    if session.lhlo:
        client.hello()
    else:
        client.reply()


def converse(client: Client, session: Session) -> Conversation:
    """Runs the session, QUIT at its end.

    In lockstep a message is only sent when it was asked for. One of several replies to it is waited for, as there are
    servers that give only one; the others are read as the replies to the next steps, so all are in their order.
    """
    greet(client, session)
    if session.pipelined:
        sent = b"".join(map(octets, session.steps))
        client.send(sent)
        return Conversation(sent, the_rest(client))
    sent = b""
    replies: list[list[str]] = []
    for step in session.steps:
        if isinstance(step, Data) and not (replies and replies[-1][-1].startswith("354")):
            continue
        sent += octets(step)
        client.send(octets(step))
        if reply := client.reply():
            replies.append(reply)
    return Conversation(sent, replies + the_rest(client))


def the_rest(client: Client) -> list[list[str]]:
    """Says QUIT and reads every reply that is still to come."""
    replies = []
    # A server that has left before takes no more, but what it said before is still to be read.
    with contextlib.suppress(OSError):
        client.send(b"QUIT\r\n")
    with contextlib.suppress(OSError):
        while reply := client.reply():
            replies.append(reply)
    client.close()
    return replies


def code(reply: list[str]) -> Code:
    """The code of a reply and, if its last line has one, the enhanced code."""
    found = re.match(r"(\d{3})[ -](\d\.\d{1,3}\.\d{1,3})?", reply[-1])
    if found is None:
        return f"not a reply: {reply}"
    return " ".join(filter(None, found.groups()))


def agree(one: Code, other: Code) -> bool:
    """Whether two codes are the same, as far as both say something."""
    return all(a == b for a, b in zip(one.split(), other.split()))


def same(one: list[Code], other: list[Code]) -> bool:
    return len(one) == len(other) and all(map(agree, one, other))


@pytest.fixture(scope="module")
def cyrus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cyrus]:
    home = Site()
    with Cyrus(home.root / "cyrus", users=("jane", "joe"), folders=("lists",), **OPTIONS) as server:
        yield server
    home.close()


@pytest.fixture(scope="module")
def ours() -> Iterator[Site]:
    site = Site(**OPTIONS)
    site.add_user("jane", "joe")
    site.add_user("jane/.lists", "joe/.lists")
    yield site
    site.close()


@pytest.mark.parametrize("session", SESSIONS, ids=lambda session: session.name)
def test_reply_codes_are_those_of_cyrus_or_differ_for_a_reason(session: Session, cyrus: Cyrus, ours: Site) -> None:
    theirs = converse(cyrus.connect(), session).codes
    conversation = converse(ours.connect(), session)
    if difference := DIFFERENCES.get(session.name):
        if difference.in_every_version:
            assert not same(theirs, list(difference.ours)), "Cyrus does the same: no difference any more"
        assert same(conversation.codes, list(difference.ours)), f"{difference.reason}\n{conversation.replies}"
    else:
        assert same(theirs, conversation.codes), conversation.replies


@pytest.mark.parametrize("session", SESSIONS, ids=lambda session: session.name)
def test_pipelining_changes_no_reply(session: Session, ours: Site) -> None:
    in_turn = converse(ours.connect(), session)
    client = ours.connect()
    greet(client, session)
    client.send(in_turn.sent)
    assert [code(reply) for reply in the_rest(client)] == in_turn.codes


def test_every_difference_is_one_of_a_session() -> None:
    assert set(DIFFERENCES) <= {session.name for session in SESSIONS}


BODIES = {
    "a plain message": MESSAGE,
    "dots": MESSAGE + b"..\r\n...\r\n..x\r\n",
    "eight bits": MESSAGE + b"caf\xc3\xa9 \xff\r\n",
    "white space": MESSAGE + b" \t \r\n\r\n\r\n",
    "only headers": b"Subject: only headers\r\n",
    "only a body": b"\r\nA body.\r\n",
    "nothing": b"",
    "a folded header": b"Subject: a\r\n subject\r\nX-Empty:\r\n\r\nA line.\r\n",
    "a Return-Path that came with it": b"Return-Path: <forged@example.com>\r\n" + MESSAGE,
    "a bare LF": MESSAGE + b"a\nb\r\n",
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
def test_what_is_stored_is_what_cyrus_stores(body: bytes, cyrus: Cyrus, ours: Site) -> None:
    """But for the headers that each adds itself, and that ours ends lines in LF as a Maildir has it."""
    for client in (cyrus.connect(), ours.connect()):
        converse(client, lockstep("", MAIL, "RCPT TO:<joe>", "DATA", message(body)))
    latest = (messages[-1].replace(b"\r\n", b"\n") for messages in (cyrus.messages("joe"), ours.messages("joe")))
    theirs, mine = map(without_trace, latest)
    assert theirs == mine


# Duplicates: the headers of two messages, with a number of their own for N.
SAME_ID, DATE = "Message-ID: <N@x>\r\n", "Date: a\r\n"
SAME = SAME_ID + DATE
PAIRS = {
    "the same date": (SAME, SAME),
    "another date": (SAME, SAME_ID + "Date: b\r\n"),
    "no date": (SAME_ID, SAME_ID),
    "one without a date": (SAME_ID, SAME),
    "a date in other case": (SAME_ID + "Date: A\r\n", SAME),
    "a date that is folded": (SAME_ID + "Date: a\r\n b\r\n", SAME_ID + "Date: a b\r\n"),
    "a date with more spaces": (SAME_ID + "Date: a  b\r\n", SAME_ID + "Date: a b\r\n"),
    "two dates, the first the same": (SAME + "Date: b\r\n", SAME + "Date: c\r\n"),
    "two dates, the last the same": (SAME_ID + "Date: b\r\n" + DATE, SAME_ID + "Date: c\r\n" + DATE),
    "another Resent-Date": (SAME + "Resent-Date: a\r\n", SAME + "Resent-Date: b\r\n"),
    "another subject": (SAME + "Subject: a\r\n", SAME + "Subject: b\r\n"),
    "an id that is folded": ("Message-ID:\r\n <N@x>\r\n" + DATE, SAME),
    "an id in other case": ("Message-ID: <N@X>\r\n" + DATE, SAME),
    "an id with more spaces": ("Message-ID:   <N@x>  \r\n" + DATE, SAME),
    "an id without brackets": ("Message-ID: N@x\r\n" + DATE, "Message-ID: N@x\r\n" + DATE),
    "an id with a comment": ("Message-ID: <N@x> (c)\r\n" + DATE, SAME),
    "an id of brackets only": ("Message-ID: <>\r\nDate: N\r\n", "Message-ID: <>\r\nDate: N\r\n"),
    "an id of 1,000 characters": (f"Message-ID: <N{'x' * 1000}@x>\r\n{DATE}",) * 2,
    "two ids, the first the same": (SAME + "Message-ID: <a@x>\r\n", SAME + "Message-ID: <b@x>\r\n"),
    "two ids, the last the same": ("Message-ID: <aN@x>\r\n" + SAME, "Message-ID: <bN@x>\r\n" + SAME),
    "another Resent-Message-ID": (SAME + "Resent-Message-ID: <a@x>\r\n", SAME + "Resent-Message-ID: <b@x>\r\n"),
    "a Resent-Message-ID only": ("Resent-Message-ID: <N@x>\r\n" + DATE,) * 2,
    "no id": ("Date: N\r\n", "Date: N\r\n"),
}
# How many of the two we store where Cyrus stores another number, and why.
OTHER_NUMBERS = {
    "a date with more spaces": (1, "White space says nothing of a date."),
    "an id with more spaces": (1, "White space is no part of an id (RFC 5322, 3.6.4)."),
    "an id of brackets only": (2, "Broken senders give it to every message."),
    "an id of 1,000 characters": (2, "A line may have 998 (RFC 5322, 2.1.1)."),
}


@pytest.fixture(scope="module")
def suppressing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cyrus, Site]]:
    """Both with duplicate suppression."""
    site = Site(duplicatesuppression="yes")
    site.add_user("jane")
    with Cyrus(site.root / "cyrus", duplicatesuppression="yes") as server:
        yield server, site
    site.close()


@pytest.mark.parametrize("name", PAIRS)
def test_duplicates_are_those_of_cyrus_or_differ_for_a_reason(name: str, suppressing: tuple[Cyrus, Site]) -> None:
    numbers = []
    for server in suppressing:
        before = len(server.messages("jane"))
        client = server.connect()
        client.hello()
        for header in PAIRS[name]:
            if "Date" not in header:
                time.sleep(1.1)  # Cyrus adds the time in seconds, which is a date like any other
            text = header.replace("N", str(list(PAIRS).index(name))).encode() + b"\r\nbody\r\n"
            assert client.deliver(text, "jane")[0].startswith("250")
        client.leave()
        numbers.append(len(server.messages("jane")) - before)
    theirs, ours = numbers
    if name in OTHER_NUMBERS:
        assert ours == OTHER_NUMBERS[name][0] != theirs, OTHER_NUMBERS[name][1]
    else:
        assert ours == theirs


def without_trace(text: bytes) -> tuple[bytes, bytes]:
    """The headers, without those that a server adds, and the body."""
    headers, _, body = text.partition(b"\n\n")
    fields = re.split(rb"\n(?![ \t])", headers)
    added = (b"received:", b"x-cyrus-session-id:", b"x-sieve:", b"message-id:", b"date:")
    return b"\n".join(field for field in fields if not field.lower().startswith(added)), body


# Addresses: where a message goes, and what its Return-Path is.
PathText = Union[str, bytes]
REFUSED = "refused"  # with a code 5xx: the message would go back to its sender
DEFERRED = "deferred"  # with a code 4xx
ADDRESS_OPTIONS = {"unixhierarchysep": "yes", "altnamespace": "yes", "autocreate_acl": "lists anyone p"}


class Outcome(NamedTuple):
    """The folder that a message was stored in, REFUSED or DEFERRED, and its Return-Path."""

    place: str
    return_path: str = ""


class Other(NamedTuple):
    """What ours makes of a path, the folder or the Return-Path, where it is meant to differ from Cyrus, and why."""

    ours: str
    reason: str
    in_every_version: bool = True  # of Cyrus


class Layout(NamedTuple):
    """The users, the options that are not in ADDRESS_OPTIONS, and the recipients of each folder."""

    users: tuple[str, ...]
    options: dict[str, str]
    recipients: dict[str, tuple[PathText, ...]]
    others: dict[PathText, Other]


def stretched(path: str, size: int) -> str:
    """The path with its first letter repeated, so that it is this long."""
    return path[:2] + path[1] * (size - len(path)) + path[2:]


# The reasons, in the words of the manual's section COMPATIBILITY.
QUOTES = "a local part is the same without its quotes and backslashes"
DOMAINS = "domains are compared without regard to case, a dot at the end"
NO_DOMAIN = "an empty domain is the same as none"
LENIENT = "addresses with an underscore in the domain, IPv6 literals, and spaces outside of quotes are taken"
TRACE = (
    "in Return-Path the sender has quotes only where needed and no source route, and servername also where the domain"
)
STRICT = "not taken are paths of more than 900 bytes, control characters, a NUL, the recipient <>,"
PARAMETERS = "a parameter that is given twice or is empty"
WHITE = "white space after a command, or more of it before a parameter, does no harm"
POSTMASTER = "mail for postmaster in any domain goes to one user"
POSTUSER = "an address with postuser never leads to the folder of a user"
CIRCUMFLEX = "a circumflex in the name of a user does not stand for a dot"
UTF8 = "without lmtp_strict_rfc2821 an address in UTF-8 stays as it is"

KEPT_SENDERS = (
    *("<>", "<a@b>", "<A@b.example>", "<a..b@c>", "<.a@b>", "<a.@b>", "<.@b>", "<a@-b>", "<a@b->", "<a@1.2.3.4>"),
    *("<a@B.Example>", "<a@b.>", "<a@b.example.>", "<a@b..c>", "<a@.b>", "<a@.>", "<a@..>", "<#@[]>", "<a@[...]>"),
    *("<a@[1.2.3.4]>", '<"a b"@c>', '<"a\\"b"@c>', '<"a\\\\b"@c>', '<"a>b"@c>', '<"a@b"@c>', '<""@b>', "<'a'@b>"),
    *("<a%b@c>", "<a!b@c>", "<a/b@c>", "<//@c>", "<a+b=c@d.example>", "<prvs=1a/a@b>", "<SRS0=x=yy=b.example=a@c>"),
    *("<a{b}|c~d`e^f&g$h?i*j#k@l>", stretched("<a@b.example>", 200), stretched("<a@b.example>", 900)),
)
SENDERS: dict[str, tuple[PathText, ...]] = {
    REFUSED: (
        *("", "<", "< >", "a@b", "<a@b", "a@b>", " <a@b>", " a@b", "\t<a@b>", "<<a@b>>", "<<a@b>", "<a@b>>", "<@b>"),
        *("<@>", "<a@@b>", "<a@b@c>", "<a @b>", "< a@b>", "<a@b >", "<a@ b>", "<a\tb@c>", "<a,b@c>"),
        *("<a:b@c>", "<a;b@c>", "<a(b)@c>", "<a[b@c>", "<a]b@c>", '<a"b@c>', '<"a@c>', '<"a"."b"@c>', "<a@b,c>"),
        *("<a@b:c>", "<a@b;c>", "<a@b(c)>", "<a@b\\c>", '<a@b"c>', "<a@b/c>", "<a@b%c>", "<a@b!c>", "<a@b*>", "<a@[b>"),
        *("<a@b]>", "<a@[1.2.3.4]x>", "<a@[1.2.3.4>", "<@r>", "<@r,s:a@b>", "<@r:@s:a@b>", "<@r a@b>", "<a@b>x"),
        *("<a@b>SIZE=1", "<a@b>\tSIZE=1", "<a@b> x"),
        *("<a@b> RET=FULL", "<a@b> AUTH", "<a@b> AUTH=+zz", "<a@b> BODY=", "<a@b> BODY=7BITx", "<\u00e9@b.example>"),
        *("<a@\u00e9.example>", b"<\xe9@b.example>", b"<a@\xe9.example>"),
        *(b"<a@b>\xa0", "<a@b>\r", "<a\\>", "<a@b\\>>", "<a@[1.2.3.4]:b@c>"),
    ),
    "<a@b>": ("<a@b> SIZE=1", "<a@b> AUTH=<>", "<a@b> AUTH=a+2Bb", "<a@b> BODY=8BITMIME SIZE=10"),
    "<a@mx.example.com>": ("<a>",),
    "<MAILER-DAEMON@mx.example.com>": ("<MAILER-DAEMON>",),
    "<a!b@mx.example.com>": ("<a!b>",),
    '<""@mx.example.com>': ('<"">',),
    **{path: (path,) for path in KEPT_SENDERS},
}
OTHER_SENDERS: dict[PathText, Other] = {
    "<a@b_c.example>": Other("<a@b_c.example>", LENIENT),
    "<a@[IPv6:::1]>": Other("<a@[IPv6:::1]>", LENIENT),
    "<a b@c>": Other('<"a b"@c>', LENIENT),
    "<a@>": Other("<a@mx.example.com>", TRACE),
    "<@r:a@b>": Other("<a@b>", TRACE),
    "<@r,@s:a@b>": Other("<a@b>", TRACE),
    "<@[1.2.3.4]:a@b>": Other("<a@b>", TRACE),
    "<@:a@b>": Other("<a@b>", TRACE),
    "<@r:a>": Other("<a@mx.example.com>", TRACE),
    '<"a"@b>': Other("<a@b>", TRACE),
    '<"a@b">': Other('<"a@b"@mx.example.com>', TRACE),
    "<a\\b@c>": Other("<ab@c>", QUOTES),
    "<a\\@b@c>": Other('<"a@b"@c>', QUOTES),
    "<a\\ b@c>": Other('<"a b"@c>', QUOTES),
    "<a\\>b@c>": Other('<"a>b"@c>', QUOTES),
    '<a\\"b@c>': Other('<"a\\"b"@c>', QUOTES),
    stretched("<a@b.example>", 1000): Other(REFUSED, STRICT),
    "<a\x7fb@c>": Other(REFUSED, STRICT),
    '<"a\tb"@c>': Other(REFUSED, STRICT),
    '<"\u00e9"@b>': Other(REFUSED, STRICT),
    "<a@b>\0x": Other(REFUSED, STRICT),
    "<a@b> AUTH=": Other(REFUSED, PARAMETERS),
    "<a@b> SIZE=1 SIZE=2": Other(REFUSED, PARAMETERS),
    "<a@b> BODY=7BIT BODY=8BITMIME": Other(REFUSED, PARAMETERS),
    "<a@b>  SIZE=1": Other("<a@b>", WHITE),
    **dict.fromkeys(
        ("<a@b> ", "<a@b> SIZE=1 ", "<a@b>\t", "<a@b> \t", "<a@b>\v", "<a@b>\f", "<a@b>\u00a0"), Other("<a@b>", WHITE)
    ),
}
# Without lmtp_strict_rfc2821.
SENDERS_8BIT: dict[str, tuple[PathText, ...]] = {
    "<X@b.example>": (b"<\xe9@b.example>",),
}
OTHER_SENDERS_8BIT: dict[PathText, Other] = {
    "<\u00e9@b.example>": Other("<\u00e9@b.example>", UTF8),
    "<a@\u00e9.example>": Other("<a@\u00e9.example>", UTF8),
    '<"\u00e9"@b.example>': Other("<\u00e9@b.example>", TRACE),
}

# What is nobody's address, whatever the layout.
MALFORMED: tuple[PathText, ...] = (
    *("", "<", "<>", "< >", "jane", "jane@example.com", " <jane>", "<<jane>>", "<<jane>", "<jane>>", "<jane>x"),
    *("<@example.com>", "<@>", "<jane@@example.com>", "<jane@example.com@other.example>", "<jane@x@example.com>"),
    *("<jane @example.com>", "< jane@example.com>", "<jane@example.com >", "<jane@ example.com>", "<jane joe>"),
    *("<jane\\>", "<jane@b\\>>", "<jane@r:jane>", "<jane >", '<jane+"lists">', '<"jane"+lists>', '<j"an"e>'),
    *("<jane,joe>", "<jane:>", "<:jane>", "<jane;x>", "<jane(c)>", "<(c)jane@b>", "<jane@b(c)>", "<jane@b,c>", "<@r:>"),
    *("<jane@b:c>", "<jane@b;c>", "<jane@b/c>", "<jane@b%c>", "<jane@b!c>", "<jane@b+c>", "<jane@b\\c>", "<@r,s:jane>"),
    *(b"<jane>\xa0", "<jane>\r", "<jane\t>", "<jane\x01>"),
    *("<jan\u00e9>", b"<jan\xe9>", "<jane+\u00e9>", b"<jane+\xe9>", "<jane@\u00e9.example>", b"<jane@\xe9.example>"),
    *("<jane> x", "<jane> NOTIFY=NEVER", "<jane> ORCPT=rfc822;jane@x", "<jane> IGNOREQUOTAx", "<jane>\tIGNOREQUOTA"),
)
# Names that only look like jane's.
UNKNOWN: tuple[PathText, ...] = (
    *("<nobody>", "<anyone>", "<cyrus>", "<root>", "<mail>", "<.>", "<..>", "<+>", "<+jane>", "<+@example.com>"),
    *("<.jane>", "<jane.>", "<ja..ne>", "<jane/>", "</jane>", "<~jane>", "<jane*>", "<jan?>", "<&jane>", "<'jane'>"),
    *("<jane%example.com>", "<jane%other.example@example.com>", "<jane!x>", "<x!jane>", "<jane=x>", "<jane-lists>"),
    *("<jane_lists>", "<jane.lists>", "<jane/lists>", "<user.jane>", "<user/jane>", "<../jane>", "<mary-x>"),
    *("<mary+ann>", "<+user/jane>", "<+lists>", f"<{'j' * 400}@example.com>", "<nobody+lists@example.com>", "<jan%>"),
    *('<"jane@example.com">', '<"jane@other.example">', '<"jane@example.com"@example.com>', "<jane\\@other.example>"),
)
# Where domains matter, these are of other ones.
EMPTY_LABELS: tuple[PathText, ...] = ("<jane@..>", "<jane@.example.com>", "<jane@example..com>", "<jane@example.com..>")
# The details of jane that name no folder of hers, and those that do.
DETAILS = (
    *("", "a", "a+b", "+lists", "Lists", "LISTS", "INBOX", "inbox", "INBOX/lists", "INBOX.lists", "lists.sub"),
    *("lists/sub", "lists^", ".lists", "lists.", "lists/.", "./lists", "..", "../joe", "user/joe", "user/jane/lists"),
    *("#lists", "~", "some_folder", "Some.Folder", "Some%20Folder", "lists+x", "&AOk-", "x" * 300, "'lists'", "lists-"),
)
JANE_OF_EVERY_LAYOUT: tuple[PathText, ...] = (
    *("<jane>", "<JANE>", "<Jane>", "<@r:jane>", "<@r,@s:jane>", "<jane> IGNOREQUOTA"),
    *(f"<jane+{detail}>" for detail in DETAILS),
)
LISTS_OF_EVERY_LAYOUT: tuple[PathText, ...] = (
    *("<jane+lists>", "<JANE+lists>", "<@r:jane+lists>", "<jane+lists/>", "<jane+/lists>", "<jane+//lists//>"),
)
OTHERS_OF_EVERY_LAYOUT: dict[PathText, Other] = {
    '<"jane">': Other("jane", QUOTES),
    '<"JANE">': Other("jane", QUOTES),
    '<"ja\\ne">': Other("jane", QUOTES),
    "<ja\\ne>": Other("jane", QUOTES),
    '<"jane+lists">': Other("jane/lists", QUOTES),
    "<jane+li\\sts>": Other("jane/lists", QUOTES),
    '<"jane+Some Folder">': Other("jane/Some Folder", QUOTES),
    "<jane+Some Folder>": Other("jane/Some Folder", LENIENT),
    "<jane+some folder>": Other("jane", LENIENT),
    "<jane>  IGNOREQUOTA": Other("jane", WHITE),
    **dict.fromkeys(
        ("<jane> ", "<jane> IGNOREQUOTA ", "<jane>\t", "<jane> \t", "<jane>\v", "<jane>\u00a0"), Other("jane", WHITE)
    ),
    "<+user/jane/lists>": Other(REFUSED, POSTUSER),
    "<jane>\0": Other(REFUSED, STRICT),
    f"<jane+{'x' * 1000}>": Other(REFUSED, STRICT),
}

LAYOUTS = {
    "off": Layout(
        ("jane", "joe", "mary-ann", "jo.hn"),
        {"virtdomains": "off", "defaultdomain": "example.com"},
        {
            "jane": (
                *("<jane@example.com>", "<jane@other.example>", "<JANE@EXAMPLE.COM>", "<jane@localhost>", "<jane@-b>"),
                *("<jane@xn--mnchen-3ya.example>", "<jane@[127.0.0.1]>", "<jane@1.2.3.4>", "<jane+@example.com>"),
                *("<@r:jane@example.com>", f"<jane@{'a' * 300}.example>", "<jane@[]>", "<jane@>", "<jane@.>"),
                *("<jane@example.com.>", *EMPTY_LABELS, *JANE_OF_EVERY_LAYOUT),
            ),
            "jane/lists": (
                "<jane+lists@example.com>",
                "<Jane+lists@other.example>",
                "<jane+lists@>",
                *LISTS_OF_EVERY_LAYOUT,
            ),
            "mary-ann": ("<mary-ann>", "<Mary-Ann@example.com>", "<mary-ann+x>"),
            "jo.hn": ("<jo.hn>", "<JO.HN@example.com>", "<jo.hn+x>"),
            REFUSED: ("<j.o.h.n>", *MALFORMED, *UNKNOWN),
        },
        {
            "<jane@b_c.example>": Other("jane", LENIENT),
            "<jane@[IPv6:::1]>": Other("jane", LENIENT),
            "<jane+Some Folder@example.com>": Other("jane/Some Folder", LENIENT),
            '<"jane"@example.com>': Other("jane", QUOTES),
            "<jo^hn>": Other(REFUSED, CIRCUMFLEX),
            **OTHERS_OF_EVERY_LAYOUT,
        },
    ),
    "userid": Layout(
        ("jane", "joe", "postmaster", "jane@example.com", "jo.hn@example.com", "jane@xn--mnchen-3ya.example"),
        {"virtdomains": "userid"},
        {
            "jane": JANE_OF_EVERY_LAYOUT,
            "jane/lists": LISTS_OF_EVERY_LAYOUT,
            "postmaster": ("<postmaster>", "<PostMaster>", "<postmaster+x>"),
            "jane@example.com": (
                *("<jane@example.com>", "<JANE@EXAMPLE.COM>", "<Jane@Example.com>", "<@r:jane@example.com>"),
                *("<jane+@example.com>", "<jane+x@example.com>", "<jane+Lists@EXAMPLE.com>"),
            ),
            "jane@example.com/lists": ("<jane+lists@example.com>", "<JANE+lists@EXAMPLE.COM>"),
            "jo.hn@example.com": ("<jo.hn@example.com>", "<Jo.Hn@Example.com>"),
            "jane@xn--mnchen-3ya.example": ("<jane@xn--mnchen-3ya.example>", "<jane@XN--MNCHEN-3YA.example>"),
            REFUSED: (
                *("<joe@example.com>", "<jane@other.example>", "<jane@sub.example.com>", "<jane@com>"),
                *("<jane@ample.com>", "<jo.hn>", "<jane@mx.example.com>", "<jane@localhost>", "<jane@defdomain>"),
                *("<jane@[127.0.0.1]>", "<jane@b_c.example>", "<jane@[IPv6:::1]>", f"<jane@{'a' * 300}.example>"),
                *(*UNKNOWN, *EMPTY_LABELS),
            ),
        },
        {
            "<jane@example.com.>": Other("jane@example.com", DOMAINS),
            "<jane@>": Other("jane", NO_DOMAIN),
            "<jane@.>": Other("jane", NO_DOMAIN),
            "<jane+Some Folder@example.com>": Other("jane@example.com/Some Folder", LENIENT),
            '<"jane"@example.com>': Other("jane@example.com", QUOTES),
            '<"jane+lists"@example.com>': Other("jane@example.com/lists", QUOTES),
            "<postmaster@example.com>": Other("postmaster", POSTMASTER),
            **OTHERS_OF_EVERY_LAYOUT,
        },
    ),
    "on, with a default": Layout(
        ("jane", "jane@other.example", "jane@sub.example.com"),
        {"virtdomains": "on", "defaultdomain": "example.com"},
        {
            "jane": ("<jane@example.com>", "<Jane@example.com>", "<jane+x@example.com>", *JANE_OF_EVERY_LAYOUT),
            "jane/lists": ("<jane+lists@example.com>", *LISTS_OF_EVERY_LAYOUT),
            "jane@other.example": ("<jane@other.example>", "<JANE@OTHER.EXAMPLE>", "<jane+x@other.example>"),
            "jane@other.example/lists": ("<jane+lists@other.example>", "<Jane+lists@Other.example>"),
            "jane@sub.example.com": ("<jane@sub.example.com>", "<jane@SUB.example.com>"),
            REFUSED: (
                *("<jane@nowhere.example>", "<jane@com>", "<jane@ample.com>", "<jane@xexample.com>"),
                *("<jane@localhost>", *UNKNOWN, *EMPTY_LABELS),
                *('<"jane@other.example"@example.com>', "<jane\\@other.example@example.com>"),
            ),
        },
        {
            '<"jane"@other.example>': Other("jane@other.example", QUOTES),
            # 3.6.1 stores the message, fails an assertion and hangs up.
            "<jane@EXAMPLE.COM>": Other("jane", DOMAINS, in_every_version=False),
            "<jane@example.com.>": Other("jane", DOMAINS),
            "<jane@other.example.>": Other("jane@other.example", DOMAINS),
            "<jane@>": Other("jane", NO_DOMAIN),
            "<jane@.>": Other("jane", NO_DOMAIN),
            **OTHERS_OF_EVERY_LAYOUT,
        },
    ),
    "dots for levels": Layout(
        ("jane", "mary-ann"),
        {"unixhierarchysep": "no"},
        {
            "jane": ("<jane>", "<jane@example.com>", "<jane+lists/x>", "<jane+lists/>", "<jane+user.jane.lists>"),
            "jane/lists": ("<jane+lists>", "<JANE+lists@example.com>"),
            "mary-ann": ("<mary-ann>",),
            REFUSED: ("<jane.lists>", "<jane/lists>", "<user.jane>", "<+user.jane>", "<.jane>", "<jane.>"),
        },
        {},
    ),
    "a catch-all": Layout(
        ("jane", "joe"),
        {"virtdomains": "userid", "lmtp_catchall_mailbox": "joe"},
        {
            "jane": ("<jane>", "<jane+x>", "<JANE>"),
            "joe": (
                *("<nobody>", "<nobody@example.com>", "<nobody+lists>", "<jane@example.com>", "<jane@[1.2.3.4]>"),
                *("<.>", "<..>", "<a/b>", "<jane/>", f"<{'x' * 300}>", f"<jane@{'a.' * 150}b>", "<jane%example.com>"),
                *('<"nobody">', "<nobody@>", "<nobody@.>", "<jane@..>", "<jane@x.>", "<jane@[]>", "<+lists>", "<+x@y>"),
            ),
            REFUSED: ("<jane@@b>", "<n,o>", "nobody", "<jan\u00e9>", "<nobody@a/b>"),
        },
        {
            '<"jane">': Other("jane", QUOTES),
            "<ja\\ne>": Other("jane", QUOTES),
            "<nobody joe>": Other("joe", LENIENT),
            "<jane@>": Other("jane", NO_DOMAIN),
            "<>": Other(REFUSED, STRICT),
        },
    ),
    "similar names": Layout(
        ("jane",),
        {"lmtp_fuzzy_mailbox_match": "yes"},
        {
            "jane/lists": (
                *("<jane+lists>", "<jane+LISTS>", "<jane+Lists@example.com>", "<jane+lists/sub>", "<jane+Lists/a/b/>"),
                *("<jane+/Lists>", "<jane+lists//sub>"),
            ),
            "jane": ("<jane+list>", "<jane+lists.sub>", "<jane+INBOX/lists>", "<jane+/>", "<jane+//>", "<jane+/x>"),
        },
        {},
    ),
    "8 bit": Layout(
        ("jane",),
        {"lmtp_strict_rfc2821": "no"},
        {
            "jane": ("<jane+\u00e9>", b"<jane+\xe9>", "<jane+list\u00e9>"),
            REFUSED: ("<jan\u00e9>", b"<jan\xe9>", '<"jan\u00e9">'),
        },
        {"<jane@\u00e9.example>": Other("jane", UTF8)},
    ),
}


class Correspondent:
    """A client that sends a server one message after the other, and looks where it has stored them."""

    def __init__(self, server: Cyrus | Site) -> None:
        self._server = server
        self._client: Client | None = None
        self._seen = server.stored()

    def send(self, mail: bytes, rcpt: bytes) -> Outcome:
        """What comes of a message with these commands. What goes wrong ends the connection."""
        client, self._client = self._client or self._connect(), None
        for step in (mail, rcpt, b"DATA", MESSAGE + b"."):
            reply = client.command(step)
            if not reply.startswith(("2", "3")):
                break
        new = self._server.stored() - self._seen
        self._seen |= new
        if reply.startswith("4"):
            client.close()
            return Outcome(DEFERRED)
        assert client.command("RSET").startswith("250")
        self._client = client
        if reply.startswith("5"):
            assert not new
            return Outcome(REFUSED)
        (path,) = new
        found = re.match(rb"Return-Path: (.*?)\r?\n", path.read_bytes())
        assert found is not None
        return Outcome(self._server.place(path), found[1].decode())

    def _connect(self) -> Client:
        client = self._server.connect()
        client.hello()
        return client

    def close(self) -> None:
        if self._client:
            self._client.close()


# Gives clients of Cyrus and of ours for the name of a layout.
Both = Callable[[str], tuple[Correspondent, Correspondent]]


@pytest.fixture(scope="module")
def both() -> Iterator[Both]:
    """A layout's servers run from its first test on."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def correspondents(name: str) -> tuple[Correspondent, Correspondent]:
            layout = LAYOUTS[name]
            options = {**ADDRESS_OPTIONS, **layout.options}
            site = Site(**options, lmtp_max_bad_commands="0", lmtp_max_idle_commands="0")
            stack.callback(site.close)
            for user in layout.users:
                site.add_user(user, f"{user}/.lists", f"{user}/.Some Folder")
            cyrus = stack.enter_context(Cyrus(site.root / "cyrus", layout.users, ("lists", "Some Folder"), **options))
            pair = Correspondent(cyrus), Correspondent(site)
            for correspondent in pair:
                stack.callback(correspondent.close)
            return pair

        yield correspondents


Row = tuple[str, PathText, Union[str, Other]]


def rows(layout: str, alike: dict[str, tuple[PathText, ...]], others: dict[PathText, Other]) -> list[Row]:
    """Each path, and what is to come of it."""
    return [
        *((layout, path, outcome) for outcome, paths in alike.items() for path in paths),
        *((layout, path, other) for path, other in others.items()),
    ]


RECIPIENTS = [row for name, layout in LAYOUTS.items() for row in rows(name, layout.recipients, layout.others)]
RETURN_PATHS = [*rows("off", SENDERS, OTHER_SENDERS), *rows("8 bit", SENDERS_8BIT, OTHER_SENDERS_8BIT)]


def name_of(row: Row) -> str:
    return f"{row[0]}: {row[1]!r:.60}"


@pytest.mark.parametrize("row", RECIPIENTS, ids=name_of)
def test_mail_goes_where_cyrus_puts_it_or_elsewhere_for_a_reason(row: Row, both: Both) -> None:
    layout, path, expected = row
    theirs, ours = (client.send(b"MAIL FROM:<a@b>", b"RCPT TO:" + octets(path)[:-2]) for client in both(layout))
    compare(theirs.place, ours.place, expected)


@pytest.mark.parametrize("row", RETURN_PATHS, ids=name_of)
def test_return_path_is_that_of_cyrus_or_another_for_a_reason(row: Row, both: Both) -> None:
    layout, path, expected = row
    theirs, ours = (client.send(b"MAIL FROM:" + octets(path)[:-2], b"RCPT TO:<jane>") for client in both(layout))
    compare(theirs.return_path or theirs.place, ours.return_path or ours.place, expected)


def compare(theirs: str, ours: str, expected: str | Other) -> None:
    if isinstance(expected, Other):
        if expected.in_every_version:
            assert theirs != expected.ours, "Cyrus does the same: no difference any more"
        assert ours == expected.ours, expected.reason
    else:
        assert (theirs, ours) == (expected, expected)


def test_the_manual_has_every_reason() -> None:
    source = section(LMTPD_8, "COMPATIBILITY")
    text = " ".join(re.sub(r"^\.(?:Ic|It|Ql)", "", source, flags=re.MULTILINE).split())
    assert [
        row.reason for *_, row in RECIPIENTS + RETURN_PATHS if isinstance(row, Other) and row.reason not in text
    ] == []
