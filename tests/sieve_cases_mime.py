"""Bodies and their parts: body, mime, foreverypart, extracttext."""

from __future__ import annotations

from sieve_cases import Case, does, letter, require, when

NUMERIC = ("relational", "comparator-i;ascii-numeric")
PLAIN = letter("Subject: s", body="line one\nline two\n\n")
EMPTY = letter("Subject: s", body="")
HTML = letter(
    "Subject: s",
    "MIME-Version: 1.0",
    "Content-Type: text/html; charset=utf-8",
    body="<html><head><title>Title</title><style>p { color: red }</style><script>var secret;</script></head>\n"
    '<body><!-- a comment --><p class="hidden">Hello &amp; good&nbsp;<b>bye</b> &eacute;&#233;&#xe9;</p>\n'
    "</body></html>\n",
)
MIXED = letter(
    "From: jane@example.org",
    "Subject: outer",
    "MIME-Version: 1.0",
    'Content-Type: multipart/mixed; boundary="b1"',
    body="""\
The prologue.
--b1
Content-Type: text/plain; charset=iso-8859-1
Content-Transfer-Encoding: quoted-printable
X-Part: one

gr=FCn and a soft =
break
--b1
Content-Type: application/pdf; name="report.pdf"
Content-Disposition: attachment; filename="report.pdf"
Content-Transfer-Encoding: base64
X-Part: two

SGVsbG8gYmluYXJ5IHdvcmxk
--b1
Content-Type: message/rfc822
X-Part: three

From: inner@example.net
Subject: inner
Content-Type: text/plain

The inner body.
--b1
Content-Type: multipart/alternative; boundary=b2
X-Part: four

The second prologue.
--b2
X-Part: five

A plain part.
--b2
Content-Type: text/html; charset=utf-8
X-Part: six

<p>An <i>html</i> part.</p>
--b2--
The second epilogue.
--b1--
The epilogue.
""",
)


def of(content_type: str, body: str | bytes, *fields: str) -> bytes:
    """A message of that type."""
    return letter("Subject: s", "MIME-Version: 1.0", f"Content-Type: {content_type}", *fields, body=body)


def mixed(name: str, test: str, *capabilities: str) -> Case:
    return when(name, test, "body", *capabilities, message=MIXED)


BODY = [
    when("body", 'body :contains "line two"', "body", message=PLAIN),
    when("body-default-is-text", 'body :contains "<p"', "body", message=HTML),
    when("body-case", 'body :contains "LINE TWO"', "body", message=PLAIN),
    when("body-octet", 'body :comparator "i;octet" :contains "LINE TWO"', "body", message=PLAIN),
    when("body-not-the-header", 'body :raw :contains "Subject"', "body", message=PLAIN),
    when("body-raw-is", "body :raw :is text:\nline one\nline two\n\n.\n", "body", message=PLAIN),
    when("body-text-is", "body :text :is text:\nline one\nline two\n\n.\n", "body", message=PLAIN),
    when("body-is-without-line-end", 'body :is "line one\r\nline two"', "body", message=PLAIN),
    when("body-over-lines", 'body :contains "one\r\nline"', "body", message=PLAIN),
    when("body-matches", 'body :matches "line*two*"', "body", message=PLAIN),
    when("body-matches-the-end", 'body :matches "*two"', "body", message=PLAIN),
    when("body-regex", 'body :regex "one.+two"', "body", "regex", message=PLAIN),
    when("body-regex-octets", 'body :regex :comparator "i;octet" "^line one"', "body", "regex", message=PLAIN),
    when("body-keys", 'body :contains ["x", "line"]', "body", message=PLAIN),
    when("body-count", 'body :raw :count "eq" :comparator "i;ascii-numeric" "1"', "body", *NUMERIC, message=PLAIN),
    when("body-empty-is", 'body :text :is ""', "body", message=EMPTY),
    when("body-empty-content", 'body :content "text" :is ""', "body", message=EMPTY),
    when("body-empty-other-content", 'body :content "image" :contains ""', "body", message=EMPTY),
    *(
        when(f"html-{name}", f'body :text :contains "{key}"', "body", message=HTML)
        for name, key in (
            ("text", "Hello"),
            ("ampersand", "Hello & good"),
            ("entities", "éé"),
            ("hex-entity", "ééé"),
            ("tag", "<p"),
            ("attribute", "hidden"),
            ("script", "secret"),
            ("style", "color"),
            ("comment", "comment"),
            ("title", "Title"),
            ("entity-as-it-is", "&amp;"),
        )
    ),
    when("html-raw", 'body :raw :contains "<b>bye</b>"', "body", message=HTML),
    when("html-content", 'body :content "text/html" :contains "<b>bye</b>"', "body", message=HTML),
    when("html-content-text", 'body :content "text" :contains "&amp;"', "body", message=HTML),
    when("html-not-plain", 'body :content "text/plain" :contains "Hello"', "body", message=HTML),
    mixed("raw-prologue", 'body :raw :contains "The prologue"'),
    mixed("raw-undecoded", 'body :raw :contains "SGVsbG8g"'),
    mixed("raw-not-decoded", 'body :raw :contains "Hello binary"'),
    mixed("raw-boundary", 'body :raw :contains "--b1--"'),
    mixed("raw-inner-header", 'body :raw :contains "inner@example.net"'),
    mixed("text-decoded", 'body :text :contains "grün and a soft break"'),
    mixed("text-not-binary", 'body :text :contains "binary"'),
    mixed("text-html-part", 'body :text :contains "html"'),
    mixed("text-no-tags", 'body :text :contains "<i>"'),
    mixed("text-inner-body", 'body :text :contains "The inner body"'),
    mixed("text-not-the-inner-subject", 'body :text :contains "Subject: inner"'),
    mixed("text-not-the-prologue", 'body :text :contains "prologue"'),
    mixed("content-pdf", 'body :content "application/pdf" :contains "Hello binary world"'),
    mixed("content-pdf-type", 'body :content "application" :contains "Hello binary world"'),
    mixed("content-case", 'body :content "Application/PDF" :contains "Hello binary world"'),
    mixed("content-several", 'body :content ["image", "application/pdf"] :contains "binary"'),
    mixed("content-other", 'body :content "image" :contains ""'),
    mixed("content-slash-only", 'body :content "application/" :contains ""'),
    mixed("content-no-type", 'body :content "/pdf" :contains ""'),
    mixed("content-two-slashes", 'body :content "application/pdf/x" :contains ""'),
    mixed("content-part-of-a-type", 'body :content "app" :contains ""'),
    mixed("content-wildcard", 'body :content "text/*" :contains ""'),
    mixed("content-all-decoded", 'body :content "" :contains "Hello binary world"'),
    mixed("content-all-prologue", 'body :content "" :contains "The prologue"'),
    mixed("content-all-not-encoded", 'body :content "" :contains "SGVsbG8g"'),
    mixed("content-text-count", 'body :content "text" :count "eq" :comparator "i;ascii-numeric" "4"', *NUMERIC),
    mixed("content-message-header", 'body :content "message/rfc822" :contains "inner@example.net"'),
    mixed("content-message-not-its-body", 'body :content "message/rfc822" :contains "The inner body"'),
    mixed("content-message-type", 'body :content "message" :contains "Subject: inner"'),
    mixed("content-multipart-prologue", 'body :content "multipart" :contains "The prologue"'),
    mixed("content-multipart-epilogue", 'body :content "multipart" :contains "The epilogue"'),
    mixed("content-multipart-not-its-parts", 'body :content "multipart" :contains "A plain part"'),
    mixed("content-multipart-alternative", 'body :content "multipart/alternative" :contains "second prologue"'),
    mixed("content-multipart-mixed", 'body :content "multipart/mixed" :contains "second prologue"'),
    mixed("content-default-type", 'body :content "text/plain" :contains "A plain part"'),
    when(
        "charset-unknown",
        'body :text :contains "hello"',
        "body",
        message=of("text/plain; charset=x-nothing", "hello\n"),
    ),
    when(
        "charset-utf16",
        'body :text :contains "hello"',
        "body",
        message=of("text/plain; charset=utf-16be", "AGgAZQBsAGwAbw==\n", "Content-Transfer-Encoding: base64"),
    ),
    when(
        "charset-quoted", 'body :text :contains "ü"', "body", message=of('text/plain; charset="ISO-8859-1"', b"\xfc\n")
    ),
    when(
        "charset-windows", 'body :text :contains "€"', "body", message=of("text/plain; charset=windows-1252", b"\x80\n")
    ),
    when(
        "charset-japanese",
        'body :text :contains "日本"',
        "body",
        message=of("text/plain; charset=iso-2022-jp", b"\x1b$BF|K\\\x1b(B\n"),
    ),
    when(
        "charset-of-html",
        'body :text :contains "ü"',
        "body",
        message=of("text/html; charset=iso-8859-1", b"<p>\xfc</p>\n"),
    ),
    when("charset-missing", 'body :text :contains "ü"', "body", message=of("text/plain", "ü\n")),
    when(
        "base64",
        'body :contains "hello"',
        "body",
        message=of("text/plain", "aGVs\nbG8=\n", "Content-Transfer-Encoding: base64"),
    ),
    when(
        "base64-capitals",
        'body :contains "hello"',
        "body",
        message=of("text/plain", "aGVsbG8=\n", "Content-Transfer-Encoding: BASE64"),
    ),
    when(
        "base64-with-blanks",
        'body :contains "hello"',
        "body",
        message=of("text/plain", "aGVs \n bG8=\n", "Content-Transfer-Encoding: base64"),
    ),
    when(
        "quoted-printable-small",
        'body :contains "ü"',
        "body",
        message=of("text/plain; charset=utf-8", "=c3=bc\n", "Content-Transfer-Encoding: quoted-printable"),
    ),
    when(
        "quoted-printable-broken",
        'body :contains "=4"',
        "body",
        message=of("text/plain", "=4\n", "Content-Transfer-Encoding: quoted-printable"),
    ),
    when(
        "encoding-8bit",
        'body :contains "ü"',
        "body",
        message=of("text/plain; charset=utf-8", "ü\n", "Content-Transfer-Encoding: 8bit"),
    ),
    when(
        "encoding-unknown-raw",
        'body :raw :contains "hello"',
        "body",
        message=of("text/plain", "hello\n", "Content-Transfer-Encoding: x-nothing"),
    ),
    when(
        "boundary-missing",
        'body :content "multipart" :contains "nowhere"',
        "body",
        message=of("multipart/mixed; boundary=b", "nowhere\n"),
    ),
    when(
        "boundary-not-closed",
        'body :text :contains "part"',
        "body",
        message=of("multipart/mixed; boundary=b", "--b\n\na part\n"),
    ),
    when(
        "boundary-with-blanks",
        'body :text :contains "part"',
        "body",
        message=of('multipart/mixed; boundary="a b"', "--a b\n\na part\n--a b--\n"),
    ),
    when(
        "boundary-blanks-behind",
        'body :text :contains "part"',
        "body",
        message=of("multipart/mixed; boundary=b", "--b  \n\na part\n--b--\n"),
    ),
    when(
        "boundary-inside-a-line",
        'body :text :contains "x --b"',
        "body",
        message=of("multipart/mixed; boundary=b", "--b\n\nx --b\n--b--\n"),
    ),
    when(
        "boundary-folded-field",
        'body :text :contains "part"',
        "body",
        message=of("multipart/mixed;\n\tboundary=b", "--b\n\na part\n--b--\n"),
    ),
    when(
        "digest-part",
        'body :text :contains "digested"',
        "body",
        message=of("multipart/digest; boundary=b", "--b\n\nSubject: d\n\ndigested\n--b--\n"),
    ),
    when("type-comment", 'body :content "text/html" :contains "x"', "body", message=of("text/html (a comment)", "x\n")),
    when("type-broken", 'body :content "text/plain" :contains "x"', "body", message=of("nonsense", "x\n")),
    when("type-image", 'body :text :contains ""', "body", message=of("image/png", "x\n")),
    when(
        "large-body", 'body :contains "needle"', "body", message=letter("Subject: s", body="hay\n" * 20000 + "needle\n")
    ),
    when(
        "many-parts",
        'body :contains "needle"',
        "body",
        message=of("multipart/mixed; boundary=b", "--b\n\nhay\n" * 200 + "--b\n\nneedle\n--b--\n"),
    ),
    when(
        "key-over-a-buffer",
        'body :contains "needle in the hay"',
        "body",
        message=letter("Subject: s", body="x" * 8185 + "needle in the hay\n"),
    ),
]


def part(name: str, test: str, *capabilities: str) -> Case:
    """A test on the outermost header with :mime."""
    return when(name, test, "mime", *capabilities, message=MIXED)


def every(name: str, block: str, *capabilities: str, after: str = "", message: bytes = MIXED) -> Case:
    """A loop over the parts."""
    first = require("mime", "foreverypart", "fileinto", "copy", "variables", "imap4flags", *capabilities)
    return Case(name, f"{first}foreverypart {{ {block} }} {after}\n", message)


MIME = [
    part("mime-type", 'header :mime :type "content-type" "multipart"'),
    part("mime-subtype", 'header :mime :subtype "content-type" "mixed"'),
    part("mime-contenttype", 'header :mime :contenttype "content-type" "multipart/mixed"'),
    part("mime-param", 'header :mime :param "boundary" "content-type" "b1"'),
    part("mime-param-missing", 'header :mime :param "charset" :contains "content-type" ""'),
    part("mime-whole-field", 'header :mime :contains "content-type" "boundary="'),
    part("mime-type-case", 'header :mime :type "Content-Type" "MULTIPART"'),
    part("mime-not-below", 'header :mime :type "content-type" "application"'),
    part("anychild-type", 'header :mime :anychild :type "content-type" "application"'),
    part("anychild-contenttype", 'header :mime :anychild :contenttype "content-type" "text/html"'),
    part("anychild-param", 'header :mime :anychild :param "filename" "content-disposition" "report.pdf"'),
    part("anychild-disposition", 'header :mime :anychild :type "content-disposition" "attachment"'),
    part(
        "anychild-params",
        'header :mime :anychild :param ["name", "filename"] :matches ["content-type", "content-disposition"] "*.pdf"',
    ),
    part("anychild-itself", 'header :mime :anychild :subtype "content-type" "mixed"'),
    part("anychild-other-field", 'header :mime :anychild "x-part" "six"'),
    part("anychild-nowhere", 'header :mime :anychild "x-part" "seven"'),
    part("anychild-in-a-message", 'header :mime :anychild "subject" "inner"'),
    part("anychild-count", 'header :mime :anychild :count "eq" :comparator "i;ascii-numeric" "x-part" "6"', *NUMERIC),
    part("anychild-exists", 'exists :mime :anychild "x-part"'),
    part("exists-mime", 'exists :mime "x-part"'),
    part("anychild-exists-several", 'exists :mime :anychild ["x-part", "content-disposition"]'),
    part("anychild-address", 'address :mime :anychild :domain "from" "example.net"'),
    part("address-mime", 'address :mime "from" "jane@example.org"'),
    when("mime-default-type", 'header :mime :type :contains "content-type" ""', "mime", message=PLAIN),
    when(
        "mime-param-quoted",
        'header :mime :param "name" "content-type" "a b"',
        "mime",
        message=of('text/plain; name="a b"', "x\n"),
    ),
    when(
        "mime-param-encoded",
        'header :mime :param "name" "content-type" "ü"',
        "mime",
        message=of("text/plain; name*=utf-8''%C3%BC", "x\n"),
    ),
    when(
        "mime-param-continued",
        'header :mime :param "name" "content-type" "abcd"',
        "mime",
        message=of("text/plain; name*0=ab; name*1=cd", "x\n"),
    ),
    when(
        "mime-param-comment",
        'header :mime :param "name" "content-type" "a"',
        "mime",
        message=of("text/plain; (c) name=a (d)", "x\n"),
    ),
    when(
        "mime-param-case",
        'header :mime :param "NAME" "content-type" "a"',
        "mime",
        message=of("text/plain; Name=a", "x\n"),
    ),
    when("mime-type-broken", 'header :mime :subtype :contains "content-type" ""', "mime", message=of("text", "x\n")),
    every("loop-flags", 'if header :mime :matches "x-part" "*" { addflag "${1}"; }'),
    every("loop-types", 'if header :mime :contenttype :matches "content-type" "*" { fileinto :copy "p=${1}"; }'),
    every("loop-subtype", 'if header :mime :subtype :matches "content-type" "*" { addflag "${1}"; }'),
    every("loop-count", 'set "n" "${n}x";', after='fileinto "=${n}=";'),
    every("loop-break", 'set "n" "${n}x"; if header :mime "x-part" "two" { break; }', after='fileinto "=${n}=";'),
    every("loop-break-at-once", 'break; fileinto "wrong";'),
    every("loop-anychild", 'if header :mime :anychild "x-part" "six" { set "n" "${n}x"; }', after='fileinto "=${n}=";'),
    every("loop-nested", 'foreverypart { set "n" "${n}x"; }', after='fileinto "=${n}=";'),
    every("loop-nested-break", 'foreverypart { set "n" "${n}x"; break; }', after='fileinto "=${n}=";'),
    Case(
        "loop-named-break",
        require("mime", "foreverypart", "fileinto", "variables")
        + 'foreverypart :name "outer" { foreverypart { set "n" "${n}x"; break :name "outer"; } } fileinto "=${n}=";',
        MIXED,
    ),
    Case(
        "loop-named-break-itself",
        require("mime", "foreverypart", "fileinto", "variables")
        + 'foreverypart :name "l" { set "n" "${n}x"; break :name "l"; } fileinto "=${n}=";',
        MIXED,
    ),
    every("loop-stop", 'if header :mime "x-part" "one" { fileinto "one"; stop; }'),
    every("loop-exists", 'if exists :mime "content-disposition" { fileinto "a"; }'),
    every("loop-without-mime", 'if header "x-part" "one" { fileinto "a"; }'),
    every("loop-outer-header", 'if header "subject" "outer" { fileinto "a"; }'),
    every("loop-inner-message", 'if header :mime "subject" "inner" { fileinto "a"; }'),
    every("loop-of-one", 'set "n" "${n}x";', after='fileinto "=${n}=";', message=PLAIN),
    every(
        "loop-body-is-of-all",
        'if header :mime "x-part" "two" { if body :contains "A plain part" { fileinto "a"; } }',
        "body",
    ),
    every(
        "loop-values-stay", 'if header :mime :matches "x-part" "t*" { set "r" "${r}${1}"; }', after='fileinto "=${r}=";'
    ),
    every(
        "extract",
        'if header :mime "x-part" "one" { extracttext "t"; if string :contains "${t}" "a soft break" { keep; } }',
        "extracttext",
    ),
    every(
        "extract-first",
        'if header :mime "x-part" "five" { extracttext :first 7 "t"; fileinto "=${t}="; }',
        "extracttext",
    ),
    every(
        "extract-modifier",
        'if header :mime "x-part" "five" { extracttext :upper :first 7 "t"; fileinto "=${t}="; }',
        "extracttext",
    ),
    every(
        "extract-length",
        'if header :mime "x-part" "five" { extracttext :length "t"; fileinto "=${t}="; }',
        "extracttext",
    ),
    every(
        "extract-html",
        'if header :mime "x-part" "six" { extracttext "t"; if not string :contains "${t}" "<" { fileinto "text"; } }',
        "extracttext",
    ),
    every(
        "extract-binary",
        'if header :mime "x-part" "two" { set "t" "old"; extracttext "t"; fileinto "=${t}="; }',
        "extracttext",
    ),
    every(
        "extract-multipart",
        'if header :mime "x-part" "four" { extracttext "t"; if string :contains "${t}" "part" { fileinto "parts"; } }',
        "extracttext",
    ),
    every("extract-plain", 'extracttext :first 8 "t"; fileinto "=${t}=";', "extracttext", message=PLAIN),
    does(
        "extract-outside",
        'extracttext "t"; fileinto "wrong";',
        "extracttext",
        "foreverypart",
        "mime",
        "variables",
        "fileinto",
        message=MIXED,
    ),
]

CASES = [*BODY, *MIME]
