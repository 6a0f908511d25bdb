"""Messages: their parts, fields, addresses, dates and HTML, and what this host writes about them. No file, no socket.

An input is a message. Its fields X-Path and X-Uri are taken for the argument of MAIL and for a URI.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from unittest import mock

from fuzz_target import Target
from harness import config_of
from sieve import octets_of
from test_sieve_fuzz import MESSAGES

import lmtpd
from lmtpd import Address, DotDecoder, Header, Message, Part

LIMIT = 1 << 16
SIZES = (1, 2, 3, 7)
SMALL_READ_SIZE = 200
PIECES_LIMIT = 200  # octets that are cut into such small pieces
CONFIG = {"virtdomains": "userid", "defaultdomain": "example.com", "recipient_delimiter": "+-", "postuser": "bb"}
ADDRESSES = (
    *("jane@example.com", "<a@b>", '"a b" <"c d"@e.f>', "friends: a@b, c@[127.0.0.1];", "(c) a (d) . b @ (e) c", "<>"),
    *("=?utf-8?q?J=C3=BC?= <j@xn--bcher-kva.example>", "ü@bücher.example", "<@a,@b:c@d>", "a@b c@d", '"a\\"b"@c'),
)
DATES = (
    "Sat, 28 Nov 2026 12:00:00 +0100",
    "1 Jan 70 00:00 EST",
    "31 Dec 1999 23:59:60 -0000 (x)",
    "29 feb 2000 1:00 z",
)
TYPES = (
    "text/html; charset=utf-7",
    "text/plain; charset*0*=us-ascii'en'%41; charset*1=b; name*=utf-8''%e2%82%ac",
    'multipart/mixed; boundary="b"; x="a\\"b"',
    "message/rfc822",
    "multipart/digest; boundary=b (c)",
)
HTML = "<p>a&amp;b&#x41;&#150;&nbsp<br><script>x</script y='>'><!-- c --><td title=\">\">d</td>&notit;<!x></ y><style>"
PATHS = (
    "<a@b> SIZE=1 BODY=7BIT",
    '<@a:"b c"@d.e>',
    "<a+b-c@[IPv6:::1]>",
    "<>",
    "<ü@bücher.example> SMTPUTF8",
    "<#@[]>",
)
URIS = ("mailto:a@b?subject=x%0D%0Ay&body=c&x-d=e", "mailto:?to=a@b,c@d&cc=e@f", "mailto:%22a%20b%22@c")
FIELD = re.compile(rb"[!-9;-~]+:")


class Mails(Target):
    """What is done with the octets of a message."""

    name = "mail"

    def __init__(self) -> None:
        self._config = config_of(**CONFIG)

    def __call__(self, data: bytes) -> None:
        check_decoders(data)
        message = Message.of(data)
        check_message(message)
        header = message.header
        for body in bodies_of(header):
            check_field(body)
        if (path := lmtpd.field_body(header, b"x-path")) is not None:
            self._check_path(path)
        self._check_answers(data)

    def _check_path(self, body: bytes) -> None:
        argument = body.decode("utf-8", "replace").strip(" ")
        try:
            address, rest = lmtpd.parse_path(argument)
            lmtpd.parse_parameters(rest)
        except ValueError:
            return
        if not address:
            return
        again = lmtpd.parse_path(f"<{address}>")[0]
        assert again, (address.local, address.domain)
        assert (again.local, again.domain) == (address.local, address.domain)
        for recipient in lmtpd.recipients_of(address, self._config):
            assert recipient.userid is not None

    def _check_answers(self, data: bytes) -> None:
        """The messages that this host writes about one that has arrived."""
        config, message = self._config, Message.of(b"Return-Path: <a@b>\nReceived: by us\n" + data)
        message.added = len(b"Return-Path: <a@b>\nReceived: by us\n")
        identity = message.header.body_of(b"message-id")
        message.message_id, message.has_message_id = identity or "", identity is not None
        sender, owner = Address("a", "b"), Address("jane", "example.com")
        reason = lmtpd.reason_for_silence(message.header, sender)
        assert isinstance(reason, str)
        lmtpd.addressee(message.header, {lmtpd.comparable(owner): owner})
        words = lmtpd.unstructured(lmtpd.field_body(message.header, b"x-words") or b"")
        author = lmtpd.mailbox_text(words, owner)
        written = [
            lmtpd.vacation_answer(message, sender, author, words, lmtpd.text_entity(words), config),
            lmtpd.vacation_answer(message, sender, author, "", lmtpd.mime_entity(words), config),
            lmtpd.rejection_report(message, sender, owner, words, config),
        ]
        uri = lmtpd.field_body(message.header, b"x-uri")
        if uri is not None:
            with contextlib.suppress(ValueError):
                mailto = lmtpd.Mailto(uri.decode("utf-8", "replace").strip())
                written.append(lmtpd.notification(message, mailto, author, owner, words, "1", config))
        for each in written:
            check_written(each)

    def seeds(self) -> Iterator[bytes]:
        yield from MESSAGES
        for number in range(12):
            date, kind = DATES[number % len(DATES)], TYPES[number % len(TYPES)]
            path, uri = PATHS[number % len(PATHS)], URIS[number % len(URIS)]
            yield octets_of(
                f"From: {ADDRESSES[number % len(ADDRESSES)]}\nTo: jane@example.com\nDate: {date}\nX-Path: {path}\n"
                f"X-Uri: {uri}\nX-Words: =?utf-8?q?a=0Ab?= {ADDRESSES[-number]}\nMessage-ID: <1@x>\n"
                "References: <a> <b>\n"
                f"Content-Type: {kind}\nPrecedence: first\n\n{HTML}\n--b\nContent-Type: {TYPES[number % 4]}\n"
                f"Content-Transfer-Encoding: {tuple(lmtpd.DECODERS)[number % 3]}\n\n"
                "PGI+YTwvYj4=\n=41=\nb \n#86)C\n--b--\nx\n"
            )

    def words(self) -> list[bytes]:
        lmtpd.codec_of("utf-8")  # reads the names of all codecs
        names = sorted({*lmtpd.CHARSETS, *lmtpd.OTHER_CHARSETS, "utf_7", "hz", "idna", "punycode", "iso2022_jp"})
        texts = [
            *ADDRESSES,
            *DATES,
            *TYPES,
            *PATHS,
            *URIS,
            *names,
            *lmtpd.DECODERS,
            "&#x",
            "&amp",
            "<script>",
            "</",
            "<!--",
        ]
        texts += [
            "--b\n",
            "--b--\n",
            "=?utf-8?q?",
            "?=",
            "=?utf-8?b?4oKs?=",
            "charset*1*=",
            "\r",
            "\0",
            "\n ",
            "\n\t",
            "=3D",
        ]
        texts += ["Content-Type: ", "Content-Transfer-Encoding: base64\n", "X-Path: ", "X-Uri: ", "X-Words: "]
        return [octets_of(text) for text in texts]


def bodies_of(header: Header) -> list[bytes]:
    """The bodies of all fields."""
    names = {line.partition(b":")[0].lower() for line in header.octets.split(b"\n") if FIELD.match(line)}
    bodies = []
    for name in sorted(names)[:50]:
        spans = list(header.spans(name))
        assert spans, name
        bodies += [header.octets[start:end].partition(b":")[2] for start, end in spans]
        rest = header.without(name)
        assert len(rest) == len(header.octets) - sum(end - start for start, end in spans)
    assert header.octets.startswith(header.without_last_field().octets)
    return bodies


def check_field(body: bytes) -> None:
    """What may be done with the body of a field."""
    text = lmtpd.raw_text(body)
    assert lmtpd.octets_of(text) == lmtpd.unfolded(body)
    value = lmtpd.unstructured(body)
    check_folding(value)
    lmtpd.ContentType.parse(body)
    lmtpd.ContentType.parse_disposition(body)
    lmtpd.is_automatic(text)
    lmtpd.is_bulk(text)
    lmtpd.suppresses_answers(text)
    for name, local, domain in lmtpd.mailboxes_of(body):
        assert local or domain
        check_address(name, local, domain)
    if date := lmtpd.date_of(text):
        again = lmtpd.date_of(lmtpd.date_text("std11", *date))
        assert again in (date, None), (text, date, again)


def check_folding(value: str) -> None:
    """A value becomes one field, which has the value again."""
    field = lmtpd.folded_field("X-A", value)
    check_header(field)
    assert field.startswith(b"X-A:")
    clean = value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    clean = clean.replace("\r\n", " ").translate(lmtpd.NOT_IN_FIELDS).strip()
    if "=?" not in clean:
        again = lmtpd.unstructured(field.partition(b":")[2])
        assert again.split(" ") == clean.split(" ") or again.split() == clean.split(), (value, again)


def check_address(name: str, local: str, domain: str) -> None:
    """An address that can be written can be read again."""
    address = Address(local, domain)
    if str(address) != str(address).strip():
        return
    try:
        _, strict = lmtpd.strict_address(str(address))
    except ValueError:
        return
    assert (strict.local, strict.domain) == (local, domain), (local, domain, strict.local, strict.domain)
    written = lmtpd.mailbox_text(name, address)
    found = lmtpd.mailboxes_of(written.encode("utf-8", "surrogateescape"))
    assert [(local, domain) for _, local, domain in found] == [(local, domain)], (written, found)
    lmtpd.domain_spellings(domain)


def check_header(octets: bytes) -> None:
    """Fields, whole, with folded lines that are not too long."""
    assert octets.endswith(b"\n")
    assert b"\r" not in octets, octets
    lines = octets[:-1].split(b"\n")
    assert all(FIELD.match(line) or line.startswith((b" ", b"\t")) for line in lines), octets
    assert all(line.strip() for line in lines), octets
    assert all(len(line) <= 998 for line in lines), octets


def check_written(message: Message) -> None:
    """A message that this host has written has each field once."""
    header = message.content.partition(b"\n\n")[0]
    check_header(header + b"\n")
    names = [line.partition(b":")[0].lower() for line in header.split(b"\n") if not line.startswith((b" ", b"\t"))]
    assert names.count(b"to") + names.count(b"cc") in (1, 2), header
    for name in (b"from", b"subject", b"date", b"message-id", b"mime-version", b"auto-submitted"):
        assert names.count(name) == 1, (name, header)
    list(lmtpd.whole(message).walk())


def check_message(message: Message) -> None:
    """The parts of a message, read in large pieces and in small ones."""
    parts = described(message)
    if all(len(line) < SMALL_READ_SIZE for line in message.content.split(b"\n")):  # as lines are, to large pieces
        with mock.patch.object(lmtpd, "WINDOW", 1100), mock.patch.object(lmtpd, "READ_SIZE", SMALL_READ_SIZE):
            assert described(message) == parts
    wire = b"".join(lmtpd.on_the_wire(message))
    with mock.patch.object(lmtpd, "READ_SIZE", 3):
        assert b"".join(lmtpd.on_the_wire(message)) == wire
    assert b"\n" not in wire.replace(b"\r\n", b"")
    assert b"\r" not in wire.replace(b"\r\n", b"")
    decoder = DotDecoder()
    expected = message.content.replace(b"\r\n", b"\n").replace(b"\r", b" ")
    expected += b"" if expected.endswith(b"\n") or not expected else b"\n"
    assert decoder.decode(wire + b".\r\n") == expected
    assert decoder.ended


def described(message: Message) -> list[tuple[object, ...]]:
    """All that can be asked about the parts."""
    root = lmtpd.whole(message)
    found: list[tuple[object, ...]] = []
    for part in root.walk():
        assert 0 <= part.start <= part.end <= message.size
        assert not part.parent or part.parent.start <= part.start
        content = part.content(LIMIT)
        assert content[:10].startswith(part.content(10))  # less if many octets before say nothing
        text = part.text(LIMIT)
        assert len(text) <= max(len(content), 1) * 2, (content, text)
        found.append(
            (
                part.start,
                part.end,
                part.depth,
                str(part.content_type),
                content,
                text,
                part.prologue(LIMIT),
                epilogue(part),
            )
        )
    return found


def epilogue(part: Part) -> bytes:
    return part.epilogue(LIMIT)


def check_decoders(data: bytes) -> None:
    """What arrives in pieces is decoded as what arrives at once."""
    check_pieces(data[:PIECES_LIMIT])
    for decode in (lmtpd.decode_base64, lmtpd.decode_quoted_printable):
        expected, rest = decode(data, True)
        assert not rest
        for cut in (len(data) // 3, len(data) // 2):
            if b"\n" not in data[:cut]:
                continue  # a line of quoted-printable is never as long as a piece
            first, rest = decode(data[:cut], False)
            assert first + decode(rest + data[cut:], True)[0] == expected, (decode.__name__, data, cut)
    lmtpd.decode_uuencode(data, True)
    text = lmtpd.charset_text(data, "utf-8")
    assert len(lmtpd.html_to_text(text)) <= len(text)


def check_pieces(data: bytes) -> None:
    """A message that arrives in pieces by DATA or BDAT is decoded as one that arrives at once."""
    for eol in (b"\r\n", b"\n"):
        whole = DotDecoder(eol)
        expected = whole.decode(data)
        chunks = lmtpd.ChunkDecoder(eol)
        expected_chunks = chunks.decode(data) + chunks.rest()
        assert expected_chunks == data.replace(eol, b"\n")
        for size in SIZES:
            decoder, chunks = DotDecoder(eol), lmtpd.ChunkDecoder(eol)
            pieces, chunked, place = [], [], 0
            while place < len(data) and not decoder.ended:
                pieces.append(decoder.decode(data[place : place + size]))
                place += size
            assert decoder.ended == whole.ended
            got = b"".join(pieces)
            assert got == expected if whole.ended else expected.startswith(got) or got.startswith(expected)
            if whole.ended:
                assert decoder.rest + data[place:] == whole.rest
            chunked = [chunks.decode(data[start : start + size]) for start in range(0, len(data), size)]
            assert b"".join([*chunked, chunks.rest()]) == expected_chunks
