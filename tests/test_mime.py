"""Header fields as text, addresses, dates; the parts of messages, and the text in them. Python is the oracle."""

from __future__ import annotations

import base64
import datetime
import email
import email.header
import email.message
import email.policy
import email.utils
import html
import quopri
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lmtpd
from lmtpd import (
    HEADERS_LIMIT,
    LOOKALIKES_LIMIT,
    NESTING_LIMIT,
    PART_HEADER_LIMIT,
    PARTS_LIMIT,
    WINDOW,
    ContentType,
    Header,
    Message,
    Part,
    charset_text,
    date_of,
    html_to_text,
    mailboxes_of,
    raw_text,
    unstructured,
    whole,
)

MEBIOCTET = 1 << 20
# Quadratic time for so many octets takes longer by far than so many seconds.
HOSTILE_SIZE = MEBIOCTET // 2
PATIENCE = 5


class Stored(Message):
    """A message with these octets, which counts those that are read."""

    def __init__(self, *pieces: tuple[bytes, int]) -> None:
        """pieces: octets, and how many times they come."""
        super().__init__()
        self.pieces = pieces
        self.header = Header.of(pieces[0][0])
        rest = pieces[0][0][len(self.header.octets) :]
        self.body_offset = len(self.header.octets) + (1 if rest.startswith(b"\n") else 2 if rest else 0)
        self.size = sum(len(octets) * times for octets, times in pieces)
        self.read_to = self.octets_read = 0

    def read(self, offset: int, size: int) -> bytes:
        parts, start = [], 0
        end = min(self.size, offset + size)
        for octets, times in self.pieces:
            after = start + len(octets) * times
            if max(offset, start) < min(end, after):
                first, last = max(offset, start) - start, min(end, after) - start
                skipped = first // len(octets)
                needed = octets * (-(-last // len(octets)) - skipped)
                parts.append(needed[first - skipped * len(octets) : last - skipped * len(octets)])
            start = after
        octets = b"".join(parts)
        self.read_to = max(self.read_to, offset + len(octets))
        self.octets_read += len(octets)
        return octets


def root_of(content: bytes) -> Part:
    return whole(Stored((content, 1)))


def shape(part: Part) -> list[tuple[int, str, bytes]]:
    """Depth, type and content of all parts; of those with parts, only that they are there."""
    return [
        (part.depth, str(part.content_type), b"" if [*part.children()] else part.content(MEBIOCTET))
        for part in part.walk()
    ]


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b" Hello\n", "Hello"),
        (b"", ""),
        (b" \t\r\n", ""),
        (b" a\r\n b\n\tc\r\n", "a b c"),
        (b"\n folded right after the colon\n", "folded right after the colon"),
        ("grün".encode(), "grün"),
        (b"gr\xfcn", "gr\udcfcn"),
        (b"=?iso-8859-1?Q?gr=FCn?=", "grün"),
        (b"=?ISO-8859-1?q?gr=fcn_und_=5F?= blau", "grün und _ blau"),
        (b"=?utf-8?B?Z3LDvG4=?=", "grün"),
        (b"=?utf-8?b?Z3LDvG4?=", "grün"),
        (b"=?utf-8?q?a?= =?utf-8?q?b?=", "ab"),
        (b"=?utf-8?q?a?=\n =?iso-8859-1?q?b?=", "ab"),
        (b"=?utf-8?q?a?==?utf-8?q?b?=", "ab"),
        (b"=?utf-8?q?a?= b =?utf-8?q?c?=", "a b c"),
        (b"x =?utf-8?q?a?=", "x a"),
        (b"=?utf-8?q?gr=C3?= =?utf-8?q?=BCn?=", "grün"),
        (b"=?utf-8?B?4oI=?= =?utf-8?b?rA==?=", "€"),
        (b"=?UTF-8*de?Q?gr=C3=BCn?=", "grün"),
        (b"=?utf-8?q?_a_?=", "a"),
        (b"=?utf-8?q??=", ""),
        (b"=?utf-8?q?a b?=", "a b"),
        (b"=?gb2312?B?xOO6w4EwgTA=?=", "你好\x80"),
        (b"=?iso-2022-jp?B?GyRCRnxLXBsoQg==?=", "日本"),
        (b"=?koi8-u?q?=A6?= =?windows-874?q?=A1?=", "іก"),
        # what is malformed or unknown stays
        (b"=?x-unknown?q?a?=", "=?x-unknown?q?a?="),
        (b"=?base64?q?a?=", "=?base64?q?a?="),
        (b"=?unicode_escape?q?=5Cn?=", "=?unicode_escape?q?=5Cn?="),
        (b"=?utf-8?x?a?=", "=?utf-8?x?a?="),
        (b"=?utf-8?b?a?=", "=?utf-8?b?a?="),
        (b"=?utf-8?q?=FF?=", "=?utf-8?q?=FF?="),
        (b"=?utf-8?q?=FF?= =?utf-8?q?b?=", "=?utf-8?q?=FF?=b"),
        (b"=?utf-7?q?+AOQ-?=", "ä"),
        (b"=?utf-7?q?+2AA-?=", "=?utf-7?q?+2AA-?="),
        (b"=?utf-8?q?a", "=?utf-8?q?a"),
        (b"=?=?=", "=?=?="),
        (b"a ?= =? b", "a ?= =? b"),
        (b"\xff=?utf-8?q?a?=", "\udcffa"),
    ],
)
def test_unstructured_text(body: bytes, text: str) -> None:
    assert unstructured(body) == text


def test_raw_text_is_not_decoded() -> None:
    assert raw_text(b" =?utf-8?q?a?=\n =?utf-8?q?b?=\xff \n") == "=?utf-8?q?a?= =?utf-8?q?b?=\udcff"


TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc", "Zs", "Zl", "Zp")), min_size=1)


@given(st.lists(TEXT, min_size=1).map(" ".join), st.sampled_from(["utf-8", "utf-16-be", "gb18030", "utf-8*en"]))
def test_text_that_python_encodes(text: str, charset: str) -> None:
    encoded = email.header.Header(text, charset.partition("*")[0], maxlinelen=60).encode(linesep="\n")
    assert unstructured(encoded.encode()) == text


@given(st.binary(), st.sampled_from(["utf-8", "iso-8859-1", "us-ascii", "utf-7", "x", "utf-16", "idna", "hz"]))
def test_text_of_a_charset_can_always_be_written(octets: bytes, charset: str) -> None:
    for complete in (True, False):
        charset_text(octets, charset, complete).encode("utf-8", "surrogateescape")


@pytest.mark.parametrize(
    ("octets", "charset", "text"),
    [
        (b"a\r\nb", "us-ascii", "a\r\nb"),
        (b"\xc3\xa9", "us-ascii", "é"),
        (b"\xe9", "ISO-8859-1", "é"),
        (b"\xe9", "iso_8859-1:1987", "é"),
        (b"\x80", "Windows-1252", "€"),
        (b"\x80", "cp1252", "€"),
        (b"\xe9", "utf-8", "\udce9"),
        (b"\xe9", "x-unknown", "\udce9"),
        (b"\xe0", " ISO-8859-8-I ", "א"),
        *(
            (b"YQ==", name, "YQ==")
            for name in ("base64", "base64_codec", "uu", "zlib", "hex", "bz2", "rot13", "quopri")
        ),
        *((b"\\x41-", name, "\\x41-") for name in ("unicode_escape", "raw_unicode_escape", "punycode", "idna")),
        *((b"a", name, "a") for name in ("undefined", "", "\0", "é", "\udc80", "../x", "aliases", "mbcs", "a" * 99999)),
    ],
)
def test_text_of_charsets(octets: bytes, charset: str, text: str) -> None:
    assert charset_text(octets, charset) == text


def test_a_piece_of_a_character_at_the_end_is_left_out_if_there_is_more() -> None:
    assert charset_text("aé".encode()[:-1], "utf-8", complete=False) == "a"
    assert charset_text("日本".encode("gb18030")[:-1], "gb18030", complete=False) == "日"


def test_every_character_of_every_charset_can_be_written() -> None:
    lmtpd.codec_of("utf-8")
    for codec in set(lmtpd.CHARSETS.values()):
        for first in range(256):
            for octets in (bytes((first,)), bytes((first, 0x81)), bytes((first, 0x30, 0x81, 0x30))):
                charset_text(octets, codec).encode("utf-8", "surrogateescape")


@pytest.mark.parametrize(
    ("body", "value", "parameters"),
    [
        (b"text/html", "text/html", {}),
        (b" TEXT/Html ; Charset=UTF-8\n", "text/html", {"charset": "UTF-8"}),
        (b'text/plain; charset="us-ascii" (plain text)', "text/plain", {"charset": "us-ascii"}),
        (b"(a (nested) comment) text/plain (b); charset=x(c)", "text/plain", {"charset": "x"}),
        (b"text / plain", "text/plain", {}),
        (b'a/b; name="a \\"b\\" \\\\ ;(c)=d"', "a/b", {"name": 'a "b" \\ ;(c)=d'}),
        (b"a/b;\n\tboundary=----=_Part_1.2", "a/b", {"boundary": "----=_Part_1.2"}),
        (b"a/b; x = y ; z", "a/b", {"x": "y", "z": ""}),
        (b"a/b; x=1; X=2;;=3;", "a/b", {"x": "1"}),
        (b'a/b; name="open', "a/b", {"name": "open"}),
        (b"a/b; name=my file.pdf", "a/b", {"name": "my file.pdf"}),
        (b"a/b; name*=UTF-8''gr%C3%BCn", "a/b", {"name": "grün"}),
        (b"a/b; name*=iso-8859-1'de'gr%FCn%; name=green", "a/b", {"name": "grün%"}),
        (b"a/b; name*0=a; name*1=b; name*3=d", "a/b", {"name": "ab"}),
        (b"a/b; name*1*=%BCn%41; name*0*=utf-8''gr%C3; name*2=\"%41 'x'\"", "a/b", {"name": "grünA%41 'x'"}),
        (b"a/b; name*=no%20charset; n*x=1; n*1=2", "a/b", {"name": "no charset"}),
        (b"a/b; name*=x-unknown''%C3%BC", "a/b", {"name": "ü"}),
        (b"text/plain charset=x", "text/plain", {}),
        *(
            (body, "text/plain", {"charset": "us-ascii"})
            for body in (None, b"", b"text", b"/", b"a/", b"/b", b";", b'"')
        ),
        *(
            (body, "text/plain", {"charset": "us-ascii"})
            for body in (b"te xt/html", b"a/b/c", b"a@/b", b"(text/html", b"\xff/a")
        ),
    ],
)
def test_content_type(body: bytes | None, value: str, parameters: dict[str, str]) -> None:
    content_type = ContentType.parse(body)
    assert (str(content_type), content_type.parameters) == (value, parameters)


def test_the_default_type() -> None:
    content_type = ContentType.parse(None, "message/rfc822")
    assert (content_type.type, content_type.subtype, content_type.parameters) == ("message", "rfc822", {})


@pytest.mark.parametrize(
    ("body", "value", "parameters"),
    [
        (b"Attachment; filename=a.pdf", "attachment", {"filename": "a.pdf"}),
        (b"inline", "inline", {}),
        (None, "", {}),
        (b"; filename=x", "", {"filename": "x"}),
    ],
)
def test_content_disposition(body: bytes | None, value: str, parameters: dict[str, str]) -> None:
    disposition = ContentType.parse_disposition(body)
    assert (disposition.type, disposition.subtype, disposition.parameters) == (value, "", parameters)


@given(st.text(st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp")), min_size=1))
def test_file_names_that_python_writes(name: str) -> None:
    message = email.message.Message()
    message.add_header("Content-Disposition", "attachment", filename=("utf-8", "", name))
    body = message.as_bytes().partition(b":")[2]
    assert ContentType.parse_disposition(body).parameters == {"filename": name}


@pytest.mark.parametrize(
    ("body", "mailboxes"),
    [
        (b"jane@example.org", [("", "jane", "example.org")]),
        (b" Jane Doe <jane@example.org>,\n Joe <joe@x>", [("Jane Doe", "jane", "example.org"), ("Joe", "joe", "x")]),
        (b'"Doe, Jane" <j@x>', [("Doe, Jane", "j", "x")]),
        (b'"a \\"b\\" \\\\" <j@x>', [('a "b" \\', "j", "x")]),
        (b"J. R. Doe <j@x>", [("J. R. Doe", "j", "x")]),
        (b"=?utf-8?q?J=C3=B6?= =?utf-8?q?rg?= <j@x>", [("Jörg", "j", "x")]),
        (b'"=?utf-8?q?J=C3=B6?=" <j@x>', [("Jö", "j", "x")]),
        ("Jörg <jörg@x>".encode(), [("Jörg", "jörg", "x")]),
        (b"J\xf6rg <j@x>", [("J\udcf6rg", "j", "x")]),
        (b"j@x (Jane (nested \\) ) Doe)", [("", "j", "x")]),
        (b"(c) j (c) @ (c) x (c) . (c) y (c)", [("", "j", "x.y")]),
        (b"Jane <(c) j (c) . k @x>", [("Jane", "j.k", "x")]),
        (b'"jane doe"@x', [("", "jane doe", "x")]),
        (b'"j@y"@x, "a".b."c d"@x', [("", "j@y", "x"), ("", "a.b.c d", "x")]),
        (b"j@[127.0.0.1], <j@[IPv6:::1]>", [("", "j", "[127.0.0.1]"), ("", "j", "[IPv6:::1]")]),
        (b"<@a,@b:j@x>, <@a:k@x>", [("", "j", "x"), ("", "k", "x")]),
        (b"Friends: a@x, B <b@x>;, c@x", [("", "a", "x"), ("B", "b", "x"), ("", "c", "x")]),
        (b"undisclosed-recipients:;", []),
        (b"A:;,B: a@x;", [("", "a", "x")]),
        (b"a@x; b@x", [("", "a", "x"), ("", "b", "x")]),
        (b"root, <root>, Root <root>", [("", "root", ""), ("", "root", ""), ("Root", "root", "")]),
        (b"<>, Nobody <>, ,,", []),
        (b"", []),
        # malformed
        (b"Jane jane@x", [("Jane", "jane", "x")]),
        (b"j@x Jane Doe, k@y", [("", "j", "x"), ("", "k", "y")]),
        (b"<j@x> Jane, k@y", [("", "j", "x"), ("", "k", "y")]),
        (b"<j@x> <k@y>", [("", "j", "x"), ("", "k", "y")]),
        (b"<j@x, k@y", [("", "j", "x"), ("", "k", "y")]),
        (b"j@x>, k@y", [("", "j", "x"), ("", "k", "y")]),
        (b"j@x <j@x>", [("j@x", "j", "x")]),
        (b"a@b@x", [("", "a@b", "x")]),
        (b"@x, y@", [("", "", "x"), ("", "y", "")]),
        (b'"j@x', [("", "j@x", "")]),
        (b"(j@x", []),
        (b"a\\@b@x", [("", "a@b", "x")]),
    ],
)
def test_addresses(body: bytes, mailboxes: list[tuple[str, str, str]]) -> None:
    assert mailboxes_of(body) == mailboxes


@given(
    st.lists(
        st.tuples(
            st.lists(TEXT, max_size=3).map(" ".join),
            st.text(st.sampled_from("abcXYZ019.!#$%&'*+-/=?^_`{|}~"), min_size=1),
            st.from_regex(r"[a-z0-9]+(\.[a-z0-9]+){0,2}", fullmatch=True),
        ),
        max_size=3,
    )
)
def test_addresses_that_python_writes(mailboxes: list[tuple[str, str, str]]) -> None:
    body = ", ".join(email.utils.formataddr((name, f"{local}@{domain}")) for name, local, domain in mailboxes)
    assert mailboxes_of(body.encode()) == mailboxes


@pytest.mark.parametrize(
    ("text", "seconds", "offset"),
    [
        ("Fri, 21 Nov 1997 09:55:06 -0600", 880127706, -360),
        ("fri, 21 nov 1997 09:55:06 -0600", 880127706, -360),
        ("21 Nov 97 09:55:06 GMT", 880106106, 0),
        ("21 Nov 097 09:55:06 GMT", 880106106, 0),
        ("21 Nov 1997 9:55 EST", 880124100, -300),
        (" Fri(x) , (a (b)) 21\n Nov 1997 (c) 09 : 55 (d) : 06 (e) -0600 (CST)", 880127706, -360),
        ("1 Jan 1970 00:00 +0000", 0, 0),
        ("1 Jan 70 00:00 z", 0, 0),
        ("1 Jan 49 00:00 +0000", 2493072000, 0),
        ("31 Dec 1998 23:59:60 UT", 915148799, 0),
        ("1 Jan 1900 00:00 +0000", -2208988800, 0),
        ("31 Dec 9999 23:59:59 +0000", 253402300799, 0),
        ("29 Feb 2000 12:00:00 +1345", 951776100, 825),
        *(
            (f"1 Jan 1970 10:00 {zone}", 36000 - hours * 3600, hours * 60)
            for zone, hours in (
                ("EST", -5),
                ("edt", -4),
                ("CST", -6),
                ("CDT", -5),
                ("MST", -7),
                ("MDT", -6),
                ("PST", -8),
                ("PDT", -7),
            )
        ),
        *((f"1 Jan 1970 10:00{zone}", 36000, 0) for zone in (" A", " CEST", " -0000", "", " +0000 GMT")),
    ],
)
def test_dates(text: str, seconds: int, offset: int) -> None:
    assert date_of(text) == (seconds, offset)


@pytest.mark.parametrize(
    "text",
    [
        *("", "x", "Fri", "31 Feb 2020 00:00 +0000", "29 Feb 1900 00:00 +0000", "0 Jan 2000 00:00 +0000"),
        *("1 Foo 2000 00:00 +0000", "Foo, 1 Jan 2000 00:00 +0000", "1 Jan 2000 24:00 +0000", "1 Jan 2000 0:60 +0000"),
        *(
            "1 Jan 2000 0:0:61 +0000",
            "1 Jan 2000 00:00:61 +0000",
            "1 Jan 2000 00 +0000",
            "1 Jan 2000 00:00:00:00 +0000",
        ),
        *("1 Jan 2000 00:00 +0060", "1 Jan 2000 00:00 +000", "1 Jan 2000 00:00 0000", "1 Jan 1899 00:00 +0000"),
        *("1 Jan 0000 00:00 +0000", "1 Jan 20000 00:00 +0000", "1 Jan 2000", "1 Jan 2000 +0000", "-1 Jan 2000 00:00 Z"),
        *("1\u0661 Jan 2000 00:00 Z", "² Jan 2000 00:00 Z", "2000-01-01T00:00:00Z", "1 January 2000 00:00 Z", "(1 Jan"),
    ],
)
def test_texts_that_are_no_dates(text: str) -> None:
    assert date_of(text) is None


@given(
    st.datetimes(datetime.datetime(1900, 1, 2), datetime.datetime(9999, 12, 30)),
    st.integers(-5999, 5999).filter(lambda minutes: abs(minutes) < 1440),
)
def test_dates_that_python_writes(moment: datetime.datetime, offset: int) -> None:
    zone = datetime.timezone(datetime.timedelta(minutes=offset))
    moment = moment.replace(tzinfo=zone, microsecond=0)
    epoch = datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc)
    expected = ((moment - epoch) // datetime.timedelta(seconds=1), offset)
    assert date_of(email.utils.format_datetime(moment)) == expected


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("plain", "plain"),
        ("<p>a</p><p>b</p>", "a\nb"),
        ("a<br>b<BR/>c<br />d", "a\nb\nc\nd"),
        ("he<b>l</b>lo <i>a</i>", "hello a"),
        ("a\n  b\t c", "a b c"),
        ("<table><tr><td>a</td><td>b</td></tr></table>", "a b"),
        ("a<!-- b > c <p> -->d", "ad"),
        ("a<!-->b<!--->c", "abc"),
        ("a<!-- b", "a"),
        ("<!DOCTYPE html><?xml?>a", "a"),
        ("<head><title>t &lt;</title><style>p > a {}</style></head><body>b", "t <\nb"),
        ("a<script>if (a<b) '</p>' <!-- </SCRIPT >b", "ab"),
        ("a<script", "a"),
        ("a<script>b", "a"),
        ('<a title="a > b" href=x>c</a>', "c"),
        ("<a title = 'a > \" b'>c", "c"),
        ("<a title=it's>c", "c"),
        ('<a "b>c', "c"),
        ('<a b="c>d', ""),
        ("<a b=''>c", "c"),
        ("1 < 2 > 0 <3", "1 < 2 > 0 <3"),
        ("</ x>a</>b", "ab"),
        ("a &lt;b&gt; &amp;amp; &quot;&apos;", "a <b> &amp; \"'"),
        (
            "&eacute;&euro;&Alpha;&#233;&#xE9;&#XE9;&#128;&nbsp;x",
            "é€Αééé€ x",
        ),
        ("&#118&#105&#x61gra &nbsp &amp", "viagra &"),
        ("AT&T a&b=c &; &# &#x; &unknown; &#xg", "AT&T a&b=c &; &# &#x; &unknown; &#xg"),
        ("&#0;&#xD800;&#x110000;&#99999999999;a\0", "\ufffd" * 4 + "a\ufffd"),
        ("\udcff", "\udcff"),
    ],
)
def test_html(markup: str, text: str) -> None:
    assert html_to_text(markup) == text


@given(
    st.lists(st.sampled_from(["&", "#", "x", "1", "g", ";", "amp", "eacute", "Alpha", "zwnj", " a", "<", "b>", "\\"]))
)
def test_references_that_end_are_those_of_python(pieces: list[str]) -> None:
    text = "".join(f"&{piece};" if piece.isalnum() else "." for piece in pieces)
    assert lmtpd.with_references_resolved(text) == html.unescape(text)


NESTED = b"""\
Content-Type: multipart/mixed; boundary=outer

prologue
--outer
Content-Type: multipart/alternative; boundary="in ner"

--in ner

plain
--in ner\t
Content-Type: TEXT/HTML; charset=iso-8859-1
Content-Transfer-Encoding: Quoted-Printable

<p>gr=FCn</p>=
<p>blau</p>
--in ner--
--outer
Content-Type: message/rfc822

Subject: inner
Content-Type: multipart/digest; boundary=d

--d

Subject: in the digest

text
--d--
--outer
Content-Type: application/pdf
Content-Transfer-Encoding: base64

SGVs
bG8=
--outer--
epilogue
--outer
is over
"""


@pytest.mark.parametrize("eol", [b"\n", b"\r\n"])
def test_the_parts_of_a_message(eol: bytes) -> None:
    root = root_of(NESTED.replace(b"\n", eol))
    assert shape(root) == [
        (0, "multipart/mixed", b""),
        (1, "multipart/alternative", b""),
        (2, "text/plain", b"plain"),
        (2, "text/html", b"<p>gr\xfcn</p><p>blau</p>"),
        (1, "message/rfc822", b""),
        (2, "multipart/digest", b""),
        (3, "message/rfc822", b""),
        (4, "text/plain", b"text"),
        (1, "application/pdf", b"Hello"),
    ]
    assert root.prologue(1000) == b"prologue"
    assert root.epilogue(1000) == b"epilogue\n--outer\nis over\n".replace(b"\n", eol)
    assert (root.prologue(3), root.epilogue(3), root.prologue(0)) == (b"pro", b"epi", b"")
    _, alternative, *_, pdf = root.walk()
    assert [part.text(1000) for part in alternative.children()] == ["plain", "grün\nblau"]
    assert (alternative.prologue(9), alternative.epilogue(9), pdf.prologue(9), pdf.epilogue(9)) == (b"",) * 4
    assert pdf.parent is root
    assert pdf.header.body_of(b"content-type") == "application/pdf"
    inner = [part.header.body_of(b"subject") for part in root.walk()]
    assert [*filter(None, inner)] == ["inner", "in the digest"]


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        (b"--b\n\nx\n--b--\n", [b"x"]),
        (b"--b\n\nx\n\n--b--\n", [b"x\n"]),
        (b"--b\n\nx\n--b", [b"x", b""]),
        (b"--b\n\nx\n--b\n", [b"x", b""]),
        (b"--b\n\nx\n", [b"x\n"]),
        (b"--b\n\nx", [b"x"]),
        (b"--b\n\n--b\n--b\n--b--", [b"", b"", b""]),
        (b"--b  \t\r\n\r\nx\r\n--b-- \t", [b"x"]),
        (b"--b\n\nx\n--bb\n--b-\n--b --\n --b\n--b--", [b"x\n--bb\n--b-\n--b --\n --b"]),
        (b"--b\nA: b\n--b--", [b""]),
        (b"--b\nno header\n\nx\n--b--", [b"no header\n\nx"]),
        (b"--b" + b" " * 2000 + b"\n--b\n\nx", [b"x"]),
        (b"no part", []),
        (b"", []),
    ],
)
def test_delimiters(body: bytes, parts: list[bytes]) -> None:
    root = root_of(b"Content-Type: multipart/mixed; boundary=b\n\n" + body)
    assert [part.content(1000) for part in root.children()] == parts
    assert [part.content(1000) for part in root.children()] == parts, "again"
    if not parts:
        assert root.prologue(1000) == body


@pytest.mark.parametrize(
    "header",
    [
        *(b"", b"Content-Type: text/plain; boundary=b\n", b"Content-Type: multipart/mixed\n"),
        *(b"Content-Type: multipart/mixed; boundary=\n", b'Content-Type: multipart/mixed; boundary=" "\n'),
        b"Content-Type: multipart/mixed; boundary=" + b"b" * 201 + b"\n",
        b"Content-Type: message/rfc822\nContent-Transfer-Encoding: base64\n",
    ],
)
def test_messages_without_parts(header: bytes) -> None:
    body = b"--b\n\nx\n--" + b"b" * 201 + b"\n--\n"
    assert len([*root_of(b"Subject: x\n" + header + b"\n" + body).walk()]) == 1


def test_the_boundary_of_the_outer_multipart_ends_the_inner_one() -> None:
    inner = b"--o\nContent-Type: multipart/mixed; boundary=i\n\n--i\n\nx\n"
    root = root_of(b"Content-Type: multipart/mixed; boundary=o\n\n" + inner + b"--o\n\ny\n--i\n--o--\n--i\n")
    assert [content for _, _, content in shape(root)] == [b"", b"", b"x", b"y\n--i"]


def test_multiparts_with_the_same_boundary() -> None:
    inner = b"--b\nContent-Type: multipart/mixed; boundary=b\n\n--b\n\nx\n--b--\n"
    root = root_of(b"Content-Type: multipart/mixed; boundary=b\n\n" + inner + b"--b\n\ny\n--b--\n")
    assert [(depth, content) for depth, _, content in shape(root)] == [(0, b""), (1, b""), (2, b"x"), (1, b"y")]


@pytest.mark.parametrize("place", [*range(-220, 5, 3), *range(-20, 5)])
def test_delimiters_where_one_read_ends_and_the_next_begins(place: int) -> None:
    beginning = b"Content-Type: multipart/mixed; boundary=" + b"b" * 200 + b"\n\n--" + b"b" * 200 + b"\n\n"
    filler = b"x" * (WINDOW + len(beginning) - 300 + place)
    root = root_of(beginning + filler + b"\r\n--" + b"b" * 200 + b" \r\n\r\ny\r\n--" + b"b" * 200 + b"--")
    assert [part.content(MEBIOCTET) for part in root.children()] == [filler, b"y"]


Tree = tuple[str, list["Tree"], bytes]


def text_of_tree(number: Iterator[int], tree: Tree) -> bytes:
    """A message with that structure. number: for boundaries."""
    kind, parts, content = tree
    if kind == "multipart/mixed":
        boundary = b"b%d" % next(number)
        body = b"".join(b"--%b\n%b\n" % (boundary, text_of_tree(number, part)) for part in parts)
        return b"Content-Type: multipart/mixed; boundary=%b\n\n%b--%b--\n" % (boundary, body, boundary)
    if kind == "message/rfc822":
        return b"Content-Type: message/rfc822\n\n" + text_of_tree(number, parts[0])
    return b"Content-Type: text/plain\nContent-Transfer-Encoding: %b\n\n%b" % (kind.encode(), content)


LEAVES: st.SearchStrategy[Tree] = st.tuples(
    st.sampled_from(["7bit", "base64", "quoted-printable", "8bit", "x-unknown"]),
    st.just([]),
    # Without a delimiter: after another one, Python does not take it for the beginning of a part.
    st.lists(st.sampled_from([b"a", b"=41", b"\n", b"--", b"-", b"b1", b"YQ==", b" ", b"=\n", b": "]))
    .map(b"".join)
    .filter(lambda content: b"--b1" not in content),
)
TREES = st.recursive(
    LEAVES,
    lambda trees: (
        st.tuples(st.just("multipart/mixed"), st.lists(trees, min_size=1, max_size=4), st.just(b""))
        | st.tuples(st.just("message/rfc822"), trees.map(lambda tree: [tree]), st.just(b""))
    ),
)


@given(TREES)
def test_the_parts_are_those_that_python_finds(tree: Tree) -> None:
    octets = text_of_tree(iter(range(1000)), tree)
    message = email.message_from_bytes(octets)
    assert [str(part.content_type) for part in root_of(octets).walk()] == [
        part.get_content_type() for part in message.walk()
    ]
    for ours, theirs in zip(root_of(octets).walk(), message.walk()):
        if not theirs.is_multipart() and theirs["Content-Transfer-Encoding"] in ("7bit", "8bit"):
            assert ours.content(MEBIOCTET) == theirs.get_payload(decode=True)


@given(
    st.lists(
        st.sampled_from(
            [
                *(
                    b"\n",
                    b"\r\n",
                    b"--",
                    b"b",
                    b"c",
                    b"--b",
                    b"--b--",
                    b"--c",
                    b"--c--",
                    b" ",
                    b"x",
                    b"=",
                    b":",
                    b"YQ==",
                    b"\xff",
                ),
                *(b"Content-Type: multipart/mixed; boundary=b\n\n", b"Content-Type: multipart/digest; boundary=c\n\n"),
                *(b"Content-Type: message/rfc822\n", b"Content-Type: text/html; charset=utf-16\n", b"\n\n"),
                *(b"Content-Transfer-Encoding: base64\n", b"Content-Transfer-Encoding: x-uuencode\n"),
            ]
        )
    ).map(b"".join),
    st.integers(0, 50),
)
def test_parts_lie_in_order_in_one_another(octets: bytes, limit: int) -> None:
    root = root_of(b"Content-Type: multipart/mixed; boundary=b\n\n" + octets)
    for part in root.walk():
        assert len(part.content(limit)) <= limit
        assert part.content(limit) == part.content(1000)[:limit]
        part.text(limit).encode("utf-8", "surrogateescape")
        assert len(part.prologue(limit)) <= limit >= len(part.epilogue(limit))
        assert part.start <= part.end
        last = part.start
        for child in part.children():
            assert last <= child.start <= child.end <= part.end
            last = child.end


@given(st.binary(max_size=300), st.integers(1, 80), st.sampled_from([b"\n", b"\r\n", b"!\n", b""]))
def test_base64(octets: bytes, width: int, separator: bytes) -> None:
    encoded = base64.b64encode(octets)
    lines = separator.join(encoded[start : start + width] for start in range(0, len(encoded), width))
    header = b"Content-Transfer-Encoding: base64 (comment)\n\n"
    assert root_of(header + lines).content(1000) == octets
    assert root_of(header + lines.rstrip(b"=")).content(1000) == octets
    assert root_of(header + lines + encoded).content(1000) == octets * 2


@given(st.lists(st.sampled_from([b"a", b"\xff", b"=", b" ", b"\t", b"\n", b"line\n", b"." * 70])).map(b"".join))
def test_quoted_printable(octets: bytes) -> None:
    part = root_of(b"Content-Transfer-Encoding: quoted-printable\n\n" + quopri.encodestring(octets))
    assert part.content(10000) == octets


@pytest.mark.parametrize(
    ("encoding", "encoded", "content"),
    [
        (b"quoted-printable", b"a =\t\nb  \n=3D=3d=zz=", b"a b\n===zz"),
        (b"base64", b"Y", b""),
        (b"base64", b"YWJj\nY", b"abc"),
        (b"base64", b"====YQ==YQ=YQ", b"aaa"),
        (b"x-uuencode", b"begin 644 x\n#86)C\n`\nend\n", b"abc"),
        (b"x-uuencode", b"text\n\nbegin 644 x\n#86)C\n!9   \nend\n#86", b"abcd"),
        (b"8bit", b"=41", b"=41"),
        (b"x-unknown", b"=41", b"=41"),
        (b"", b"=41", b"=41"),
    ],
)
def test_transfer_encodings(encoding: bytes, encoded: bytes, content: bytes) -> None:
    assert root_of(b"Content-Transfer-Encoding: " + encoding + b"\n\n" + encoded).content(1000) == content


@pytest.mark.parametrize("encoding", [b"base64", b"quoted-printable", b"8bit", b"x-uuencode"])
def test_content_over_several_reads(encoding: bytes) -> None:
    octets = b"".join(b"line %d = \xff\n" % number for number in range(20000))
    encode: dict[bytes, Callable[[bytes], bytes]] = {
        b"base64": base64.encodebytes,
        b"quoted-printable": quopri.encodestring,
        b"8bit": bytes,
        b"x-uuencode": uuencoded,
    }
    part = root_of(b"Content-Transfer-Encoding: " + encoding + b"\n\n" + encode[encoding](octets))
    assert part.content(MEBIOCTET) == octets
    assert part.content(100_001) == octets[:100_001]


def uuencoded(octets: bytes) -> bytes:
    from binascii import b2a_uu

    lines = [b2a_uu(octets[start : start + 45]) for start in range(0, len(octets), 45)]
    return b"begin 644 x\n" + b"".join(lines) + b"`\nend\n"


def test_no_more_is_read_than_the_limit_asks_for() -> None:
    message = Stored((b"Content-Transfer-Encoding: base64\n\n", 1), (b"!" * 1000, 50_000))
    assert whole(message).content(1000) == b""
    assert message.read_to < MEBIOCTET


def test_the_first_part_of_a_large_message_is_found_without_reading_the_others() -> None:
    head = b"Content-Type: multipart/mixed; boundary=b\n\n--b\n\nhello\n--b\n\n"
    message = Stored((head, 1), (b"x" * 75 + b"\n", 700_000), (b"--b--\n", 1))
    parts = whole(message).children()
    assert next(parts).content(1000) == b"hello"
    assert next(parts).content(1000) == b"x" * 75 + b"\n" + (b"x" * 75 + b"\n") * 12 + b"x" * 12
    assert message.read_to <= 2 * WINDOW
    _, second = whole(message).children()
    assert second.end == message.size - 7
    assert message.octets_read < 1.1 * message.size


def test_a_large_message_needs_little_memory() -> None:
    head = b"Content-Type: multipart/mixed; boundary=b\n\n--b\nContent-Transfer-Encoding: base64\n\n"
    message = Stored((head, 1), (b"YWJj" * 19 + b"\n", 700_000), (b"--b--\n", 1))
    tracemalloc.start()
    try:
        parts = [*whole(message).walk()]
        assert parts[1].content(10_000) == (b"abc" * 3334)[:10_000]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * MEBIOCTET


def test_limits_of_parts() -> None:
    message = Stored((b"Content-Type: multipart/mixed; boundary=b\n\n", 1), (b"--b\n\nx\n", 2 * PARTS_LIMIT))
    *_, first, last = whole(message).walk()
    assert len([*whole(message).walk()]) == PARTS_LIMIT
    assert first.content(1000) == b"x"
    assert last.end == message.size
    assert last.content(1000).startswith(b"\nx\n--b\n\nx\n")
    field = b"--b\nX: " + b"x" * 10000 + b"\n\n"
    message = Stored((b"Content-Type: multipart/mixed; boundary=b\n\n", 1), (field, 200))
    assert len([*whole(message).walk()]) == HEADERS_LIMIT // 10004 + 2
    assert sum(len(part.header.octets) for part in whole(message).walk()) < HEADERS_LIMIT + 1000


def test_limit_of_nesting() -> None:
    levels = range(NESTING_LIMIT + 20)
    octets = b"\n--".join(
        b"b%d\nContent-Type: multipart/mixed; boundary=b%d\n" % (level, level + 1) for level in levels
    )
    parts = [*root_of(octets.partition(b"\n")[2]).walk()]
    assert [part.depth for part in parts] == [*range(NESTING_LIMIT + 1)]
    parts = [*root_of(b"Content-Type: message/rfc822\n\n" * len(levels)).walk()]
    assert [part.depth for part in parts] == [*range(NESTING_LIMIT + 1)]


def test_limit_of_a_header() -> None:
    fields = b"X: y\n" * 20000
    head = b"Content-Type: multipart/mixed; boundary=b\n\n"
    _, part = root_of(head + b"--b\n" + fields + b"\nbody\n--b--\n").walk()
    assert len(part.header.octets) == PART_HEADER_LIMIT // 5 * 5
    assert part.content(MEBIOCTET) == fields[len(part.header.octets) :] + b"\nbody"


def test_limit_of_lines_that_look_like_delimiters() -> None:
    head = b"Content-Type: multipart/mixed; boundary=b\n\n--b\n\n"
    for count, parts in ((LOOKALIKES_LIMIT - 10, 3), (LOOKALIKES_LIMIT + 10, 2)):
        message = Stored((head, 1), (b"\n--bb", count), (b"\n--b\n\nx\n--b--\n", 1))
        assert len([*whole(message).walk()]) == parts


HOSTILE = [
    *("(", ")", '"', "\\", "<", ">", "[", "]", "@", ",", ";", ":", "=", "?", "&", "%", "'", "*", " ", "\n ", ".", "-"),
    *(
        "()",
        '""',
        "(\\",
        "=?",
        "?=",
        "=?utf-8?q?a?=",
        "=?utf-8?q?a?= ",
        "=?utf-8?b?YQ?= ",
        "=?utf-8?q?=FF?= ",
        "=?x?q?a?=",
    ),
    *("a@b,", "<a@b>,", "<@a,", "a:", "a b ", "a=b;", "a*0*=b;", "a*=b''c;", "%41", "1 Jan ", "<!--", "<script", "<a>"),
    *(
        "<script>",
        "</script",
        "<script></script>",
        "<title>",
        "<a b='",
        '<a b="" ',
        "<!",
        "<?",
        "</",
        "</ ",
        "&a;",
        "&#1",
    ),
    *(
        "\n--",
        "\n--b",
        "\n--b\n",
        "\n--b--",
        "--b\n\n",
        "=\n",
        "=3D",
        "YQ=",
        "YQ==",
        " \n",
        "a\n",
        "\r\n",
        "\r",
        "M",
        "`\n",
    ),
]


@pytest.mark.parametrize("piece", HOSTILE)
def test_hostile_input_takes_linear_time(piece: str) -> None:
    text = (piece * HOSTILE_SIZE)[:HOSTILE_SIZE]
    octets = text.encode()
    mime = b"Content-Type: multipart/mixed; boundary=b\n"
    start = time.process_time()
    for parse in (raw_text, unstructured, mailboxes_of, ContentType.parse, ContentType.parse_disposition):
        parse(octets)
    date_of(text)
    for prefix in ("", "<a ", "<script>", "<a b='", "<!--", "&"):
        html_to_text(prefix + text)
    for header in (
        mime,
        mime + b"\n--b\nContent-Type: multipart/mixed; boundary=c\n\n--c\n",
        b"Content-Type: message/rfc822\n",
    ):
        for part in root_of(header + b"\n" + octets).walk():
            part.content(HOSTILE_SIZE if part.depth else 0)
    for encoding in (b"base64", b"quoted-printable", b"x-uuencode"):
        root_of(b"Content-Transfer-Encoding: " + encoding + b"\n\n" + octets).content(HOSTILE_SIZE)
    assert time.process_time() - start < PATIENCE


@given(st.binary() | st.lists(st.sampled_from(HOSTILE)).map("".join).map(str.encode))
def test_nothing_raises(octets: bytes) -> None:
    text = octets.decode("utf-8", "surrogateescape")
    values: list[str] = [raw_text(octets), unstructured(octets), html_to_text(text)]
    for mailbox in mailboxes_of(octets):
        values += mailbox
    for content_type in (ContentType.parse(octets), ContentType.parse_disposition(octets)):
        values += [str(content_type), *content_type.parameters, *content_type.parameters.values()]
    date_of(text)
    for value in values:
        value.encode("utf-8", "surrogateescape")


def test_usual_messages_need_no_module_that_is_slow_to_load() -> None:
    program = (
        "import sys, lmtpd\n"
        "print(lmtpd.unstructured(b'=?utf-8?q?a?='), lmtpd.mailboxes_of(b'A <a@b>'))\n"
        "print(lmtpd.date_of('1 Jan 2000 00:00 Z'), lmtpd.html_to_text('<p>&uuml;&euro;&#8364;'))\n"
        "message = lmtpd.Message()\n"
        "print(lmtpd.whole(message).text(10))\n"
        "print(*sys.modules)"
    )
    modules = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True).stdout
    for heavy in ("email", "re", "html", "datetime", "calendar", "unicodedata", "urllib"):
        assert heavy not in modules.split()
