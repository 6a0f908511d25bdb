"""What becomes of the octets of a message between the wire and the store, and of replies on their way out."""

from __future__ import annotations

import errno
import itertools
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator
from email.utils import parsedate_to_datetime
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
from harness import config_of
from hypothesis import given, settings
from hypothesis import strategies as st

import lmtpd
from lmtpd import ChunkDecoder, Config, DotDecoder, Draft, Header, Incoming, Reply

EOLS = [pytest.param(b"\r\n", id="CRLF"), pytest.param(b"\n", id="LF")]


def line_ends(content: bytes) -> int:
    """Those that CR LF takes an octet more for: an LF that has a CR before it is left as it is by IMAP servers."""
    return content.count(b"\n") - content.count(b"\r\n")


def pieces(data: bytes, cuts: Iterable[int]) -> list[bytes]:
    """The data cut at these places, as reads may cut it."""
    places = sorted({0, *(cut for cut in cuts if cut < len(data)), len(data)})
    return [data[start:end] for start, end in zip(places, places[1:])]


def octets(data: bytes) -> list[bytes]:
    return pieces(data, range(len(data)))


# ----------------------------------------------------------------------
# The end of DATA, and dots (RFC 5321 sections 2.3.8, 4.1.1.4, 4.5.2)
# ----------------------------------------------------------------------


def by_lines(data: bytes, eol: bytes) -> tuple[bytes, bytes] | None:
    """The message and what follows its end, by the letter of the RFC: line for line; None if it does not end."""
    lines = data.split(eol)[:-1]
    if b"." not in lines:
        return None
    end = lines.index(b".")
    message = b"".join(line.removeprefix(b".") + b"\n" for line in lines[:end])
    return message, data[sum(len(line) + len(eol) for line in lines[: end + 1]) :]


def decode(reads: list[bytes], eol: bytes) -> tuple[bytes, bytes] | None:
    """The same as DotDecoder has it."""
    decoder = DotDecoder(eol)
    message = b""
    for number, data in enumerate(reads, 1):
        message += decoder.decode(data)
        if decoder.ended:
            return message, decoder.rest + b"".join(reads[number:])
    assert decoder.rest == b""
    return None


@pytest.mark.parametrize(
    ("data", "message", "rest"),
    [
        (b".\r\n", b"", b""),
        (b"\r\n.\r\n", b"\n", b""),
        (b"a\r\n.\r\n", b"a\n", b""),
        (b"a\r\n.\r\nRSET\r\n", b"a\n", b"RSET\r\n"),
        (b".\r\n.\r\n", b"", b".\r\n"),
        (b"..\r\n.\r\n", b".\n", b""),
        (b"...\r\n.\r\n", b"..\n", b""),
        (b".a\r\n..b\r\nc.\r\n.\r\n", b"a\n.b\nc.\n", b""),
        (b"a\r\n\r\n.\r\n\r\n", b"a\n\n", b"\r\n"),
        (b"a\r\r\n.\r\n", b"a\r\n", b""),
        (b"a\n.\nb\r\n.\r\n", b"a\n.\nb\n", b""),
        (b"a\r\n.b\r\n..\r\n.\r\n.\r\n", b"a\nb\n.\n", b".\r\n"),
    ],
)
def test_a_message_ends_at_a_line_of_one_dot(data: bytes, message: bytes, rest: bytes) -> None:
    assert by_lines(data, b"\r\n") == (message, rest)
    for cut in range(len(data)):
        assert decode(pieces(data, [cut]), b"\r\n") == (message, rest)
    assert decode(octets(data), b"\r\n") == (message, rest)


@pytest.mark.parametrize("eol", EOLS)
def test_every_short_message_cut_into_octets(eol: bytes) -> None:
    endings = 0
    for length in range(8):
        for symbols in itertools.product((b"\r", b"\n", b".", b"a"), repeat=length):
            data = b"".join(symbols)
            expected = by_lines(data, eol)
            assert decode(octets(data), eol) == expected, data
            endings += expected is not None
    assert endings > 20


LINE_NOISE = st.lists(
    st.sampled_from(
        [b"\r", b"\n", b"\r\n", b".", b"..", b"\r\n.", b"\r\n.\r", b"\n.\n", b"\r.\r", b"\0", b"a", b"\xff"]
    ),
    max_size=16,
).map(b"".join)
CUTS = st.sets(st.integers(1, 40), max_size=8)


@settings(max_examples=1000)
@given(LINE_NOISE, CUTS, st.sampled_from([b"\r\n", b"\n"]), LINE_NOISE)
def test_it_does_not_matter_how_data_is_cut_into_reads(data: bytes, cuts: set[int], eol: bytes, after: bytes) -> None:
    assert decode(pieces(data, cuts), eol) == by_lines(data, eol)
    ended = data + eol + b"." + eol + after
    expected = by_lines(ended, eol)
    assert expected is not None
    assert decode(pieces(ended, cuts), eol) == expected


@settings(max_examples=300)
@given(
    st.lists(st.binary(max_size=6).filter(lambda line: b"\r\n" not in line and line[-1:] != b"\r"), max_size=6), CUTS
)
def test_what_a_client_stuffs_with_dots_is_what_it_had(lines: list[bytes], cuts: set[int]) -> None:
    stuffed = b"".join((b"." if line.startswith(b".") else b"") + line + b"\r\n" for line in lines)
    message = b"".join(line + b"\n" for line in lines)
    assert decode(pieces(stuffed + b".\r\nQUIT\r\n", cuts), b"\r\n") == (message, b"QUIT\r\n")


# What one server or another has taken for the end of DATA.
FALSE_ENDS = [
    *(b"\n.\n", b"\n.\r\n", b"\r\n.\n", b"\r.\r", b"\r.\r\n", b"\r\n.\r", b"\n.\r", b"\r.\n"),
    *(b"\r\n\0.\r\n", b"\r\n.\0\r\n", b"\r\n.\r\0\n", b"\r\0\n.\r\n", b"\n\0.\n", b"\0\r\n\0.\0\r\n"),
    *(b"\r\r\n.\r\r\n", b"\n\n.\n\n", b"\r\n\r.\r\n", b"\n\r.\r\n", b"\r\n.\n\r\n", b"\n\r\n.\n", b"\r\n.\r\r\n"),
    *(b"\r\n. \r\n", b"\r\n .\r\n", b"\r\n.\t\r\n", b"\r\n.\x1a\r\n", b"\r\n..\r\n", b"\r\n\x08.\r\n"),
    *(b"\x85.\x85", b"\x0b.\x0b", b"\x0c.\x0c", b"\r\x0a\x00.\x0d\x0a", b"\x8d\x8a.\x8d\x8a", b"\xe2\x80\xa8.\r\n"),
]


@pytest.mark.parametrize("false_end", FALSE_ENDS)
def test_nothing_else_ends_a_message(false_end: bytes) -> None:
    smuggled = b"MAIL FROM:<admin@example.com>\r\nRCPT TO:<jane@example.com>\r\nDATA\r\n"
    data = b"Subject: a\r\n\r\nb" + false_end + smuggled
    whole = data + b"\r\n.\r\n"
    for cuts in (range(len(data)), *([cut] for cut in range(len(data)))):
        assert decode(pieces(data, cuts), b"\r\n") is None
        result = decode(pieces(whole, cuts), b"\r\n")
        assert result is not None
        message, rest = result
        assert message.endswith(smuggled.replace(b"\r\n", b"\n") + b"\n")
        assert rest == b""


@settings(max_examples=500)
@given(LINE_NOISE, CUTS, st.sampled_from([b"\r\n", b"\n"]))
def test_it_does_not_matter_how_chunks_are_cut(data: bytes, cuts: set[int], eol: bytes) -> None:
    decoder = ChunkDecoder(eol)
    message = b"".join([decoder.decode(read) for read in pieces(data, cuts)])
    assert message + decoder.rest() == b"\n".join(data.split(eol))


# ----------------------------------------------------------------------
# The message
# ----------------------------------------------------------------------

TRACE = b"Return-Path: <sender@example.com>\nReceived: from x\n\tby y; now\n"
ADDED = re.compile(
    rb"(?:Message-ID: (<[^<>@\s]+@mx\.example\.com>)\n)?(?:Date: (\w+, \d\d \w+ \d{4} [\d:]{8} [+-]\d{4})\n)?"
)


@cache
def cached_config(options: tuple[tuple[str, str], ...]) -> Config:
    return config_of(**dict(options))


def message_of(reads: Iterable[bytes], **options: str) -> Incoming:
    incoming = Incoming(TRACE, cached_config(tuple(options.items())), iter(()))  # it stays in memory
    for data in reads:
        incoming.write(data)
    incoming.complete()
    return incoming


def stored(content: bytes, **options: str) -> bytes:
    """What is stored of it behind the trace headers."""
    incoming = message_of([content], **options)
    assert incoming.refusal is None
    assert (incoming.message.size, incoming.message.lines) == (
        len(incoming.message.content),
        line_ends(incoming.message.content),
    )
    assert incoming.message.content.startswith(TRACE)
    return incoming.message.content[len(TRACE) :]


def added(content: bytes) -> tuple[list[str], bytes]:
    """The names of the fields that are added to it, and the rest of what is stored."""
    text = stored(content)
    match = ADDED.match(text)
    assert match
    names = [name for name, value in zip(("Message-ID", "Date"), match.groups()) if value]
    return names, text[match.end() :]


BOTH = "Message-ID: <1@x>\nDate: now\n"


@pytest.mark.parametrize(
    ("header", "missing"),
    [
        ("Subject: a\n", ["Message-ID", "Date"]),
        ("Message-ID: <1@x>\n", ["Date"]),
        ("Date: now\n", ["Message-ID"]),
        (BOTH, []),
        ("message-id: <1@x>\nDATE: now\n", []),
        ("Subject: a\nMessage-ID: <1@x>\nDate: now\nX: y\n", []),
        ("Message-ID : <1@x>\nDate \t : now\n", []),  # obsolete white space, RFC 5322 section 4.5.8
        ("Message-ID:\n <1@x>\nDate:now\n", []),
        ("Message-ID:\nDate:\n", []),  # empty, but there
        ("Message-ID: <1@x>\nMessage-ID: <2@x>\nDate: now\nDate: then\n", []),
        ("X-Message-ID: <1@x>\nResent-Date: now\n", ["Message-ID", "Date"]),
        ("Message-ID-X: <1@x>\nDates: now\n", ["Message-ID", "Date"]),
        ("Subject: a\n Message-ID: <1@x>\n\tDate: now\n", ["Message-ID", "Date"]),  # folded, so of the subject
        ("From jane Mon Jan  1 00:00:00 2024\nMessage-ID: <1@x>\nDate: now\n", []),  # an mbox was sent
        (">From jane Mon Jan  1 00:00:00 2024\nMessage-ID: <1@x>\nDate: now\n", []),
    ],
)
def test_message_id_and_date_are_added_only_when_they_are_missing(header: str, missing: list[str]) -> None:
    for body in ("", "\nbody\n", "\n\n", "\nMessage-ID: <body@x>\n\nDate: body\n"):
        content = (header + body).encode()
        assert added(content) == (missing, content)


def test_what_is_added_is_well_formed() -> None:
    before = int(time.time()) - 1  # strftime() has a clock of its own, a little behind
    match = ADDED.match(stored(b"Subject: a\n\nb\n"))
    assert match
    date = parsedate_to_datetime(match[2].decode())
    assert before <= date.timestamp() <= time.time()
    assert date.tzinfo is not None
    others = {stored(b"Subject: a\n\nb\n").split(b"\n")[0] for _ in range(100)}
    assert len(others) == 100


@pytest.mark.parametrize(
    ("field", "message_id"),
    [
        (b"Message-ID: <1@x>\n", "<1@x>"),
        (b"Message-ID:<1@x>  \n", "<1@x>"),
        (b"MESSAGE-id :\t<1@x>\n", "<1@x>"),
        (b"Message-ID:\n <1@x>\n", "<1@x>"),
        (b"Message-ID: <1\n\t2@x>\n 3\n", "<1 2@x> 3"),
        (b"Message-ID: <a:b@x>\n", "<a:b@x>"),
        (b"Message-ID:\n", ""),
        (b"Message-ID: <\xff@x>\n", r"<\xff@x>"),
        ("Message-ID: <ü@x>\n".encode(), "<ü@x>"),
        (b"Message-ID: <1@x>\nMessage-ID: <2@x>\n", "<1@x>"),
        (b"Message-ID: <1@x>", "<1@x>"),
    ],
)
def test_the_log_gets_the_message_id_unfolded(field: bytes, message_id: str) -> None:
    assert message_of([b"Subject: a\n" + field]).message.message_id == message_id


def test_the_log_gets_the_message_id_that_was_added() -> None:
    incoming = message_of([b"Subject: a\n\nb\n"])
    assert f"Message-ID: {incoming.message.message_id}\n".encode() in incoming.message.content


@pytest.mark.parametrize(
    ("header", "rest"),
    [
        ("Return-Path: <a>\n", ""),
        ("Return-Path:\n", ""),
        ("return-PATH : <a>\n", ""),
        ("Return-Path: <a>\nReturn-Path: <b>\nSubject: a\nReturn-Path: <c>\n", "Subject: a\n"),
        ("Return-Path:\n <a>\n\t(b)\nSubject: a\n", "Subject: a\n"),
        ("Subject: a\nReturn-Path: <a>\n b\n", "Subject: a\n"),
        ("X-Return-Path: <a>\nReturn-Paths: <b>\nReturn-Path-X: <c>\nReturn-Pat: <d>\n", None),
        ("Subject: a\n Return-Path: <a>\n", None),
        ("Subject: Return-Path: <a>\n", None),
    ],
)
def test_return_path_is_taken_out_wherever_it_is(header: str, rest: str | None) -> None:
    for body in ("", "\nReturn-Path: <body>\n", "\n\nReturn-Path: <body>\n"):
        kept = header if rest is None else rest
        assert stored((BOTH + header + body).encode()).decode() == BOTH + kept + body
        assert stored((header + BOTH + body).encode()).decode() == kept + BOTH + body


@pytest.mark.parametrize(
    "body",
    [
        *("hello\n", "hello", "two words: a\n", ": a\n", " folded: a\n", "\tfolded: a\n", "fröhlich: a\n", "Fromage\n"),
        *("\x7f: a\n", "-- \nReturn-Path: <a>\n", "a" * 2000 + ": b\n"),
    ],
)
def test_text_without_a_header_becomes_the_body(body: str) -> None:
    assert added(body.encode()) == (["Message-ID", "Date"], b"\n" + body.encode())


@pytest.mark.parametrize("content", [b"\n", b"\nbody\n", b"\n\n", b"\nSubject: a\n"])
def test_an_empty_header_stays_empty(content: bytes) -> None:
    assert added(content) == (["Message-ID", "Date"], content)


def test_an_empty_message_has_a_header_all_the_same() -> None:
    assert added(b"") == (["Message-ID", "Date"], b"")
    assert message_of([]).message.content.startswith(TRACE)


@pytest.mark.parametrize("content", [b"Subject: a", b"Subject: a\n", b"Subject: a\n b", b"Subject: a\n\n"])
def test_a_message_may_be_all_header(content: bytes) -> None:
    assert added(content) == (["Message-ID", "Date"], content)


NAMES = st.sampled_from(
    b"Return-Path return-path RETURN-PATH Return-Pat Return-Path-2 X-Return-Path Subject".split()
    + b"Message-ID MESSAGE-ID Message-I Date dATE Dat Dates !~ X".split()
)
VALUES = st.lists(
    st.sampled_from([b"Return-Path: <a>", b"date:", b":", b" ", b"", b"a", b"\r", b"\xfc", b"x" * 80]),
    min_size=1,
    max_size=3,
)
BODIES = st.lists(
    st.sampled_from([b"\n", b"Return-Path: <a>\n", b"Date: b\n", b".", b"\r", b"a", b" "]) | st.binary(max_size=4),
    max_size=9,
).map(lambda parts: b"".join(parts).replace(b"\0", b""))


@st.composite
def field_texts(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """A field's name in lower case, and the field."""
    name = draw(NAMES)
    field = name + draw(st.sampled_from([b"", b"", b" ", b" \t"])) + b":" + b"\n\t".join(draw(VALUES)) + b"\n"
    return name.lower(), field


FIELDS = st.lists(field_texts(), min_size=1, max_size=6)


@settings(max_examples=500)
@given(FIELDS, BODIES, CUTS)
def test_fields_go_and_come_and_everything_else_stays(
    fields: list[tuple[bytes, bytes]], body: bytes, cuts: set[int]
) -> None:
    content = b"".join(field for _, field in fields) + b"\n" + body
    incoming = message_of(pieces(content, cuts))
    assert incoming.message.content.startswith(TRACE)
    match = ADDED.match(incoming.message.content, len(TRACE))
    assert match
    names = [name for name, _ in fields]
    assert [bool(value) for value in match.groups()] == [b"message-id" not in names, b"date" not in names]
    kept = b"".join(field for name, field in fields if name != b"return-path")
    assert incoming.message.content[match.end() :] == kept + b"\n" + body
    assert (incoming.message.size, incoming.message.lines) == (
        len(incoming.message.content),
        line_ends(incoming.message.content),
    )
    assert incoming.wire_size == len(content.replace(b"\n", b"\r\n"))


@settings(max_examples=500)
@given(BODIES | st.binary(max_size=60).map(lambda data: data.replace(b"\0", b"\n")), CUTS)
def test_nothing_is_lost_whatever_it_is(content: bytes, cuts: set[int]) -> None:
    incoming = message_of(pieces(content, cuts))
    assert incoming.refusal is None
    header = Header.of(content).octets
    assert content.startswith(header)
    if b"return-path" not in header.lower():
        assert incoming.message.content.endswith(content)
    assert incoming.message.content.endswith(content[len(header) :])


# ----------------------------------------------------------------------
# What is refused
# ----------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 2, 25, 26, 27, 1000])
@pytest.mark.parametrize("content", [b"\n", b"Subject: a\n\nb\n", b"x" * 998 + b"\n", b"y" * 1000, b"\n" * 500])
def test_the_size_limit_is_exact_and_counts_line_ends_as_crlf(limit: int, content: bytes) -> None:
    size = len(content.replace(b"\n", b"\r\n"))
    for reads in (octets(content), [content]):
        incoming = message_of(reads, maxmessagesize=str(limit))
        assert (incoming.refusal is lmtpd.TOO_LARGE) == (size > limit)
        assert bool(incoming.message.content) == (size <= limit)
    at_the_limit = message_of([content], maxmessagesize=str(size))
    assert at_the_limit.refusal is None
    assert message_of([content, b"z"], maxmessagesize=str(size)).refusal is lmtpd.TOO_LARGE


@pytest.mark.parametrize("place", range(22))
def test_nul_is_refused_anywhere(place: int) -> None:
    content = b"Subject: a\n\nfirst line\n"
    content = content[:place] + b"\0" + content[place:]
    for reads in (octets(content), [content]):
        incoming = message_of(reads)
        assert incoming.refusal is lmtpd.NUL_IN_MESSAGE
        assert incoming.message.content == b""
    assert (lmtpd.NUL_IN_MESSAGE.code, lmtpd.NUL_IN_MESSAGE.enhanced) == (554, "5.6.0")


EIGHT_BIT = "Subject: gruß\nX: a\n ö\n".encode()
SEVEN_BIT = b"Subject: a\n"


@pytest.mark.parametrize("body", [b"\nbody\n", "\nKörper\n".encode(), b"\n\xff\n", b""])
def test_8_bit_headers_are_kept_refused_or_munged(body: bytes) -> None:
    header = BOTH.encode() + EIGHT_BIT
    assert stored(header + body) == header + body
    assert stored(header + body, munge8bit="yes") == BOTH.encode() + b"Subject: gruXX\nX: a\n XX\n" + body
    refused = message_of([header + body], reject8bit="yes")
    assert refused.refusal is lmtpd.EIGHT_BIT_HEADER
    assert refused.message.content == b""
    assert message_of([header + body], reject8bit="yes", munge8bit="yes").refusal is lmtpd.EIGHT_BIT_HEADER


@pytest.mark.parametrize("option", ["reject8bit", "munge8bit"])
def test_8_bit_bodies_are_nobodys_business(option: str) -> None:
    for content in (BOTH.encode() + SEVEN_BIT + b"\n\xff\xfe\n", "\nKörper\n".encode(), "Körper: so\n".encode()):
        text = stored(content, **{option: "yes"})
        assert text.endswith(content)


# ----------------------------------------------------------------------
# Large messages
# ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def maildir() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="lmtpd-test-") as name:
        (Path(name) / "tmp").mkdir()
        yield Path(name)


def open_draft(maildir: Path) -> Draft:
    return lmtpd.Directory(str(maildir), lmtpd.Identity.of_process()).new_draft("tmp")


def spool(reads: Iterable[bytes], maildir: Path, limit: int, **options: str) -> Incoming:
    """The message when no more than limit octets of it are kept in memory."""
    with mock.patch.object(lmtpd, "MEMORY_LIMIT", limit):
        incoming = Incoming(TRACE, cached_config(tuple(options.items())), (open_draft(maildir) for _ in range(1)))
        for data in reads:
            incoming.write(data)
        incoming.complete()
    return incoming


def drafts(maildir: Path) -> list[Path]:
    return list((maildir / "tmp").iterdir())


@pytest.mark.parametrize(("size", "spooled"), [(lmtpd.MEMORY_LIMIT, False), (lmtpd.MEMORY_LIMIT + 1, True)])
def test_a_message_over_the_memory_limit_is_spooled(maildir: Path, size: int, spooled: bool) -> None:
    content = BOTH.encode() + b"\n"
    content += b"x" * (size - len(content))
    incoming = spool(pieces(content, range(0, size, 5000)), maildir, lmtpd.MEMORY_LIMIT)
    assert bool(incoming.message.draft) == spooled
    assert (drafts(maildir)[0].read_bytes() if spooled else incoming.message.content) == TRACE + content
    assert (incoming.message.size, incoming.message.lines) == (len(TRACE + content), line_ends(TRACE + content))
    assert (incoming.message.content == b"") == spooled
    incoming.discard()
    assert drafts(maildir) == []


@settings(max_examples=300, deadline=None)
@given(FIELDS | st.just([]), BODIES, CUTS, st.integers(0, 40), st.sampled_from([{}, {"munge8bit": "yes"}]))
def test_a_spooled_message_is_the_same_as_one_in_memory(
    maildir: Path, fields: list[tuple[bytes, bytes]], body: bytes, cuts: set[int], room: int, options: dict[str, str]
) -> None:
    content = b"".join(field for _, field in fields) + b"\n" + body
    limit = len(Header.of(content).octets) + 1 + room  # the header has to fit into memory
    with (
        mock.patch.object(lmtpd, "date_time", return_value="now"),
        mock.patch.object(time, "time_ns", return_value=1),
        mock.patch.object(os, "fsync"),
    ):
        in_memory = message_of([content], **options)
        incoming = spool(pieces(content, cuts), maildir, limit, **options)
    assert bool(incoming.message.draft) == (len(content) > limit)
    stored = drafts(maildir)[0].read_bytes() if incoming.message.draft else incoming.message.content
    assert stored == in_memory.message.content
    assert incoming.wire_size == in_memory.wire_size
    for name in ("size", "lines", "message_id", "body_offset"):
        assert getattr(incoming.message, name) == getattr(in_memory.message, name)
    assert incoming.message.header.octets == in_memory.message.header.octets
    for message in (incoming.message, in_memory.message):
        assert message.read(0, len(stored) + 1) == stored
        assert message.read(message.body_offset, 7) == stored[message.body_offset :][:7]
        assert message.read(len(stored), 1) == b""
    incoming.discard()
    assert drafts(maildir) == []


@pytest.mark.parametrize(
    ("tail", "options", "refusal"),
    [
        (b"\0", {}, lmtpd.NUL_IN_MESSAGE),
        (b"x" * 300, {"maxmessagesize": "400"}, lmtpd.TOO_LARGE),
    ],
)
def test_a_spooled_message_that_is_refused_leaves_nothing_behind(
    maildir: Path, tail: bytes, options: dict[str, str], refusal: Reply
) -> None:
    incoming = spool([b"Subject: a\n\n", b"x" * 200, tail, b"more"], maildir, 100, **options)
    assert incoming.refusal is refusal
    assert incoming.message.draft is None
    assert drafts(maildir) == []


def test_a_header_that_is_refused_is_never_spooled(maildir: Path) -> None:
    incoming = spool([EIGHT_BIT + b"\n" + b"x" * 200], maildir, 100, reject8bit="yes")
    assert incoming.refusal is lmtpd.EIGHT_BIT_HEADER
    assert drafts(maildir) == []


@pytest.mark.parametrize(
    ("number", "reply"),
    [
        (errno.ENOSPC, lmtpd.STORAGE_FULL),
        (errno.EDQUOT, lmtpd.STORAGE_FULL),
        (errno.EFBIG, lmtpd.STORAGE_FULL),
        (errno.EIO, lmtpd.STORAGE_FAILED),
        (errno.EACCES, lmtpd.STORAGE_FAILED),
    ],
)
@pytest.mark.parametrize("call", ["open", "write", "fsync"])
def test_a_message_that_cannot_be_spooled_is_refused_for_now(
    maildir: Path, call: str, number: int, reply: Reply
) -> None:
    with mock.patch.object(os, call, side_effect=OSError(number, "broken")):
        incoming = spool([b"Subject: a\n\n", b"x" * 200, b"y" * 200], maildir, 100)
    assert incoming.failure
    assert lmtpd.storage_reply(incoming.failure) is reply
    assert (reply.code, reply.enhanced) in ((452, "4.3.1"), (451, "4.3.0"))
    assert drafts(maildir) == []


# ----------------------------------------------------------------------
# Replies (RFC 5321 section 4.2.1, RFC 2034)
# ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "wire"),
    [
        (Reply(250, "2.0.0", "Ok"), b"250 2.0.0 Ok\r\n"),
        (Reply(354, "", "Go ahead"), b"354 Go ahead\r\n"),
        (Reply(550, "5.1.1", "a\nb\nc"), b"550-5.1.1 a\r\n550-5.1.1 b\r\n550 5.1.1 c\r\n"),
        (Reply(250, "", "a\nb"), b"250-a\r\n250 b\r\n"),
        (Reply(451, "4.3.0", "gruß\0\r\t\x7f\u2028"), b"451 4.3.0 gru\\xdf\\x00\\r\\t\\x7f\\u2028\r\n"),
    ],
)
def test_replies_as_they_are_written(reply: Reply, wire: bytes) -> None:
    assert reply.render() == wire
    assert reply.render(b"\n") == wire.replace(b"\r\n", b"\n")


@pytest.mark.parametrize("length", [499, 500, 501, 5000])
def test_a_reply_line_has_512_octets_at_most(length: int) -> None:
    first, last = Reply(550, "5.1.1", "x" * length + "\nend").render().split(b"\r\n")[:2]
    assert first == b"550-5.1.1 " + b"x" * min(length, 500)
    assert last == b"550 5.1.1 end"


@given(
    st.integers(200, 599),
    st.sampled_from(["", "2.0.0", "4.3.0", "5.123.999"]),
    st.text(st.sampled_from("\n\r\0a'\"\\é\u2028") | st.characters(), max_size=30)
    | st.text(min_size=400, max_size=600),
)
def test_whatever_it_says_a_reply_keeps_its_form(code: int, enhanced: str, text: str) -> None:
    reply = Reply(code, enhanced, text)
    lines = reply.render().split(b"\r\n")
    assert lines.pop() == b""
    assert len(lines) == text.count("\n") + 1
    for number, line in enumerate(lines, 1):
        divider = " " if number == len(lines) else "-"
        assert line.startswith(f"{code}{divider}{f'{enhanced} ' if enhanced else ''}".encode())
        assert len(line) <= 510
        assert re.fullmatch(rb"[\x20-\x7e]+", line)


def test_a_421_closes_the_connection() -> None:
    assert Reply(421, "4.3.0", "a").closes
    assert Reply(221, "2.0.0", "a", closes=True).closes
    assert not Reply(250, "2.0.0", "a").closes
