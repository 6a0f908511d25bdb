"""Header fields, addresses, the envelope, dates, and what changes a header."""

from __future__ import annotations

from sieve_cases import Case, does, letter, require, when

NUMERIC = ("relational", "comparator-i;ascii-numeric")


def shown(name: str, field: str | bytes, kind: str = "header", *capabilities: str, of: str = "x-a") -> Case:
    """What a test makes of a field's value, as the name of a folder."""
    script = require("fileinto", "variables", *capabilities)
    script += f'if {kind} :matches "{of}" "*" {{ fileinto "={{${{1}}}}"; }} else {{ fileinto "none"; }}\n'
    return Case(name, script, letter(field))


VALUES = [
    shown("value-plain", "X-A: a"),
    shown("value-no-blank", "X-A:a"),
    shown("value-many-blanks", "X-A: \t  a \t "),
    shown("value-capitals-in-the-name", "x-A: a"),
    shown("value-blank-before-the-colon", "X-A : a"),
    shown("value-colon-in-it", "X-A: a: b"),
    shown("folded-blank", "X-A: a\n b"),
    shown("folded-tab", "X-A: a\n\tb"),
    shown("folded-two-blanks", "X-A: a\n  b"),
    shown("folded-twice", "X-A: a\n b\n c"),
    shown("folded-blank-line", "X-A: a\n \n b"),
    shown("folded-at-once", "X-A:\n a"),
    shown("folded-blank-at-the-end", "X-A: a \n b"),
    shown("word-q", "X-A: =?utf-8?q?gr=C3=BCn?="),
    shown("word-b", "X-A: =?UTF-8?B?Z3LDvG4=?="),
    shown("word-latin1", "X-A: =?iso-8859-1?q?gr=FCn?="),
    shown("word-windows", "X-A: =?windows-1252?q?=80?="),
    shown("word-japanese", "X-A: =?iso-2022-jp?b?GyRCRnxLXBsoQg==?="),
    shown("word-utf16", "X-A: =?utf-16be?b?APwAYQ==?="),
    shown("word-language", "X-A: =?utf-8*de?q?gr=C3=BCn?="),
    shown("word-underscore", "X-A: =?utf-8?q?a_b?="),
    shown("word-and-text", "X-A: a =?utf-8?q?b?= c"),
    shown("word-beside-word", "X-A: =?utf-8?q?a?= =?utf-8?q?b?="),
    shown("word-folded-word", "X-A: =?utf-8?q?a?=\n =?utf-8?q?b?="),
    shown("word-text-word", "X-A: =?utf-8?q?a?= b =?utf-8?q?c?="),
    shown("word-glued-behind", "X-A: x=?utf-8?q?a?="),
    shown("word-glued-before", "X-A: =?utf-8?q?a?=x"),
    shown("word-in-quotes", 'X-A: "=?utf-8?q?a?="'),
    shown("word-in-parentheses", "X-A: (=?utf-8?q?a?=)"),
    shown("word-empty", "X-A: =?utf-8?q??="),
    shown("word-unknown-charset", "X-A: =?x-nothing?q?a?="),
    shown("word-unknown-encoding", "X-A: =?utf-8?x?a?="),
    shown("word-not-closed", "X-A: =?utf-8?q?a"),
    shown("word-blanks-in-it", "X-A: =?utf-8?q?a b?="),
    shown("word-wrong-hex", "X-A: =?utf-8?q?a=4?="),
    shown("word-no-padding", "X-A: =?utf-8?b?Z3LDvG4?="),
    shown("word-not-utf8", "X-A: =?utf-8?q?a=FFb?="),
    shown("word-capital-q", "X-A: =?UTF-8?Q?a?="),
    shown("raw-utf8", "X-A: grün"),
    shown("raw-latin1", b"X-A: gr\xfcn"),
    shown("raw-and-word", "X-A: ü =?utf-8?q?=C3=BC?="),
    when("word-in-a-key", 'header "x-a" "=?utf-8?q?a?="', message=letter("X-A: =?utf-8?q?a?=")),
    when("word-contains", 'header :contains "x-a" "grün"', message=letter("X-A: Das ist =?utf-8?q?gr=C3=BCn?= da")),
    when("repeated-first", 'header "x-twice" "first"'),
    when("repeated-second", 'header "x-twice" "second"'),
    when("repeated-both", 'header "x-twice" "first second"'),
    when("field-name-case", 'header "X-TWICE" "second"'),
    when("exists", 'exists "x-twice"'),
    when("exists-empty", 'exists "x-empty"'),
    when("exists-all", 'exists ["from", "to", "x-empty"]'),
    when("exists-not-all", 'exists ["from", "x-none"]'),
    when("not-a-field", 'header :contains "second" "line"'),
    when("no-header", 'exists "subject"', message=b"\nSubject: in the body\n"),
    when("no-body", 'header "subject" "s"', message=b"Subject: s\n\n"),
    when("broken-line", 'header "subject" "s"', message=b"X-A: b\nnot a field\nSubject: s\n\nbody\n"),
    when("nothing-at-all", 'exists "subject"', message=b"\n"),
    when(
        "long-field", 'header :contains "x-a" "end"', message=letter("X-A: " + "x" * 900 + "\n " + "y" * 900 + "\n end")
    ),
    when("many-fields", 'header "x-b" "b"', message=letter(*(f"X-{n}: {n}" for n in range(300)), "X-B: b")),
    when("from-line", 'header "subject" "s"', message=b"Subject: s\n\nFrom x\n"),
    when("name-from-a-variable", 'header "${n}" "42"', "variables"),
    does(
        "name-set-in-a-variable",
        'set "n" "x-number"; if header "${n}" "42" { fileinto "yes"; }',
        "fileinto",
        "variables",
    ),
]

INDEX = [
    when("index-1", 'header :index 1 "x-twice" "first"', "index"),
    when("index-2", 'header :index 2 "x-twice" "second"', "index"),
    when("index-2-not-first", 'header :index 2 "x-twice" "first"', "index"),
    when("index-3", 'header :index 3 :contains "x-twice" ""', "index"),
    when("index-last", 'header :index 1 :last "x-twice" "second"', "index"),
    when("index-last-2", 'header :last :index 2 "x-twice" "first"', "index"),
    when("index-of-several-names", 'header :index 2 ["x-twice", "x-number"] "first"', "index"),
    when("index-of-several-names-last", 'header :index 1 :last ["x-number", "x-twice"] "second"', "index"),
    when("index-count", 'header :index 2 :count "eq" :comparator "i;ascii-numeric" "x-twice" "1"', "index", *NUMERIC),
    when(
        "index-count-none", 'header :index 9 :count "eq" :comparator "i;ascii-numeric" "x-twice" "0"', "index", *NUMERIC
    ),
    when("index-address", 'address :index 1 "to" "joe@example.com"', "index"),
    when(
        "index-address-is-of-fields",
        'address :index 2 "to" "d@e.f"',
        "index",
        message=letter("To: a@b.c, d@e.f", "To: g@h.i"),
    ),
    when(
        "index-address-second-field",
        'address :index 2 "to" "g@h.i"',
        "index",
        message=letter("To: a@b.c, d@e.f", "To: g@h.i"),
    ),
]

ADDRESSES = [
    when("address", 'address "from" "jane@example.org"'),
    when("address-all", 'address :all "from" "JANE@EXAMPLE.ORG"'),
    when("address-octet", 'address :comparator "i;octet" "from" "JANE@EXAMPLE.ORG"'),
    when("address-not-the-name", 'address :contains "from" "Doe"'),
    when("address-localpart", 'address :localpart "from" "jane"'),
    when("address-domain", 'address :domain "from" "example.org"'),
    when("address-domain-not-part", 'address :domain "cc" "example.org"'),
    when("address-domain-matches", 'address :domain :matches "cc" "*.example.org"'),
    when("address-any-of", 'address "to" "richard.roe+list@example.net"'),
    when("address-several-fields", 'address ["from", "cc"] "team@lists.example.org"'),
    when("address-user", 'address :user "to" "richard.roe"', "subaddress"),
    when("address-detail", 'address :detail "to" "list"', "subaddress"),
    when("address-detail-of-none", 'address :detail "from" ""', "subaddress"),
    when("address-detail-empty", 'address :detail "to" ""', "subaddress", message=letter("To: a+@b.c")),
    when("address-detail-of-two", 'address :detail "to" "b+c"', "subaddress", message=letter("To: a+b+c@d.e")),
    when("address-user-of-none", 'address :user "from" "jane"', "subaddress"),
    when("address-detail-contains", 'address :detail :contains "from" ""', "subaddress"),
    when("address-no-field", 'address :contains "bcc" ""'),
    when("address-empty-field", 'address "to" ""', message=letter("To:")),
    when("address-group", 'address "to" "c@d.e"', message=letter("To: friends: a@b.c, C D <c@d.e>;")),
    when(
        "address-group-count",
        'address :count "eq" :comparator "i;ascii-numeric" "to" "3"',
        *NUMERIC,
        message=letter("To: g: a@b.c, d@e.f;, h@i.j"),
    ),
    when("address-comments", 'address "to" "a@b.c"', message=letter("To: (x) a (y) @ (z) b.c (w)")),
    when("address-nested-comment", 'address "to" "a@b.c"', message=letter("To: a@b.c (x (y) \\) z)")),
    when("address-route", 'address "to" "a@b.c"', message=letter("To: <@x,@y:a@b.c>")),
    when("address-literal", 'address :domain "to" "[127.0.0.1]"', message=letter("To: a@[127.0.0.1]")),
    when("address-quoted-localpart", 'address :localpart "to" "a b"', message=letter('To: "a b"@c.d')),
    when("address-quoted-all", 'address :all "to" "\\"a b\\"@c.d"', message=letter('To: "a b"@c.d')),
    when("address-quoted-for-nothing", 'address :all "to" "ab@c.d"', message=letter('To: "ab"@c.d')),
    when(
        "address-comma-in-the-name",
        'address :count "eq" :comparator "i;ascii-numeric" "to" "1"',
        *NUMERIC,
        message=letter('To: "a, b" <c@d.e>'),
    ),
    when("address-at-in-the-name", 'address "to" "c@d.e"', message=letter('To: "a@b" <c@d.e>')),
    when("address-encoded-name", 'address "to" "a@b.c"', message=letter("To: =?utf-8?q?x=40y=2Ez?= <a@b.c>")),
    when("address-folded", 'address "to" "d@e.f"', message=letter("To: a@b.c,\n\tD\n E <d@e.f>")),
    when("address-blanks-in-it", 'address "to" "a@b.c"', message=letter("To: a @ b . c")),
    when(
        "address-empty-elements",
        'address :count "eq" :comparator "i;ascii-numeric" "to" "1"',
        *NUMERIC,
        message=letter("To: , a@b.c,,"),
    ),
    when("address-no-angle-end", 'address :localpart "to" "a"', message=letter("To: <a@b.c")),
    when("address-good-beside-broken", 'address "to" "d@e.f"', message=letter("To: broken <, d@e.f")),
    when("address-no-domain", 'address :localpart "to" "postmaster"', message=letter("To: postmaster")),
    when("address-broken-as-a-whole", 'address "to" "not an address"', message=letter("To: not an address")),
    when("address-broken-no-domain", 'address :domain :contains "to" ""', message=letter("To: not an address")),
    when("address-undisclosed", 'address :contains :domain "to" ""', message=letter("To: undisclosed-recipients:;")),
    when("address-repeated-field", 'address "to" "d@e.f"', message=letter("To: a@b.c", "To: d@e.f")),
    when("address-sender", 'address "sender" "a@b.c"', message=letter("Sender: a@b.c")),
    when("address-resent", 'address ["resent-from", "resent-to"] "a@b.c"', message=letter("Resent-To: x <a@b.c>")),
    when("address-reply-to", 'address :domain "reply-to" ["x", "b.c"]', message=letter("Reply-To: a@b.c")),
    shown("address-shown", "To: A B <a-b@c>", "address", of="to"),
    shown("address-shown-first", "To: a@b, c@d", "address", of="to"),
    shown("address-shown-case", "To: A@B", "address", of="to"),
]

ENVELOPE = [
    when("envelope-from", 'envelope "from" "sender@example.org"', "envelope"),
    when("envelope-from-case", 'envelope "FROM" "SENDER@example.ORG"', "envelope"),
    when("envelope-localpart", 'envelope :localpart "from" "sender"', "envelope"),
    when("envelope-domain", 'envelope :domain "from" "example.org"', "envelope"),
    when("envelope-to-domain", 'envelope :domain "to" "example.com"', "envelope"),
    when("envelope-to-detail", 'envelope :detail "to" "box"', "envelope", "subaddress", detail="box"),
    when("envelope-to-no-detail", 'envelope :detail :contains "to" ""', "envelope", "subaddress"),
    when("envelope-to-localpart", 'envelope :matches :localpart "to" "*+box"', "envelope", detail="box"),
    when("envelope-to-user", 'envelope :contains :user "to" "box"', "envelope", "subaddress", detail="box"),
    when("envelope-to-two-details", 'envelope :detail "to" "a+b"', "envelope", "subaddress", detail="a+b"),
    when("envelope-detail-of-from", 'envelope :detail "from" "b"', "envelope", "subaddress", sender="a+b@c.d"),
    when("envelope-null", 'envelope "from" ""', "envelope", sender=""),
    when("envelope-null-contains", 'envelope :contains "from" ""', "envelope", sender=""),
    when("envelope-null-not-brackets", 'envelope "from" "<>"', "envelope", sender=""),
    when("envelope-null-localpart", 'envelope :localpart "from" ""', "envelope", sender=""),
    when("envelope-null-domain", 'envelope :domain "from" ""', "envelope", sender=""),
    when(
        "envelope-null-count",
        'envelope :count "eq" :comparator "i;ascii-numeric" "from" "1"',
        "envelope",
        *NUMERIC,
        sender="",
    ),
    when(
        "envelope-count", 'envelope :count "eq" :comparator "i;ascii-numeric" ["from", "to"] "2"', "envelope", *NUMERIC
    ),
    when("envelope-either", 'envelope :domain ["to", "from"] "example.org"', "envelope"),
    when("envelope-quoted", 'envelope :localpart "from" "a b"', "envelope", sender='"a b"@c.d'),
    when("envelope-matches-the-start", 'envelope :matches "from" "sender@*"', "envelope"),
    Case("detail-alone", "", detail="box"),
    Case("detail-keep", "keep;", detail="box"),
    Case("detail-fileinto", 'require "fileinto"; fileinto "a";', detail="box"),
    Case("detail-fileinto-and-keep", 'require "fileinto"; fileinto "a"; keep;', detail="box"),
    Case("detail-fileinto-inbox", 'require "fileinto"; fileinto "INBOX";', detail="box"),
    Case("detail-keep-and-fileinto-inbox", 'require "fileinto"; fileinto "INBOX"; keep;', detail="box"),
    Case("detail-fileinto-the-same", 'require "fileinto"; fileinto "box"; keep;', detail="box"),
    Case("detail-discard", "discard;", detail="box"),
    Case("detail-error", "bogus;", detail="box"),
    Case("detail-flags", 'require "imap4flags"; setflag ["f", "\\\\Seen"];', detail="box"),
    Case("detail-inbox", "keep;", detail="INBOX"),
    Case("detail-subfolder", "keep;", detail="a/b"),
]

DAY = "Date: Sat, 24 Feb 2024 23:59:58 +0530"
NEW_YEAR = "Date: 31 Dec 2023 20:30:00 -0800"
PARTS = {
    "year": "2024",
    "month": "02",
    "day": "24",
    "date": "2024-02-24",
    "julian": "60364",
    "hour": "23",
    "minute": "59",
    "second": "58",
    "time": "23:59:58",
    "iso8601": "2024-02-24T23:59:58+05:30",
    "std11": "Sat, 24 Feb 2024 23:59:58 +0530",
    "zone": "+0530",
    "weekday": "6",
}
DATES = [
    *(
        when(f"date-{part}", f'date :originalzone "date" "{part}" "{value}"', "date", message=letter(DAY))
        for part, value in PARTS.items()
    ),
    *(
        does(
            f"date-zone-{part}",
            f'if date :zone "-0800" :matches "date" "{part}" "*" {{ addflag "${{1}}"; }}',
            "date",
            "variables",
            "imap4flags",
            message=letter(NEW_YEAR),
        )
        for part in (
            "year",
            "month",
            "day",
            "date",
            "julian",
            "hour",
            "minute",
            "second",
            "time",
            "iso8601",
            "zone",
            "weekday",
        )
    ),
    *(
        does(
            f"date-moved-{part}",
            f'if date :zone "+0100" :matches "date" "{part}" "*" {{ addflag "${{1}}"; }}',
            "date",
            "variables",
            "imap4flags",
            message=letter(NEW_YEAR),
        )
        for part in (
            "year",
            "month",
            "day",
            "date",
            "julian",
            "hour",
            "minute",
            "second",
            "time",
            "iso8601",
            "zone",
            "weekday",
        )
    ),
    when("date-part-in-capitals", 'date :originalzone "date" "YEAR" "2024"', "date", message=letter(DAY)),
    when("date-utc", 'date :zone "+0000" "date" "iso8601" "2024-02-24T18:29:58Z"', "date", message=letter(DAY)),
    when(
        "date-value",
        'date :zone "+0000" :value "ge" "date" "date" "2024-02-24"',
        "date",
        "relational",
        message=letter(DAY),
    ),
    when("date-several-keys", 'date :originalzone "date" "weekday" ["0", "6"]', "date", message=letter(DAY)),
    when(
        "date-count",
        'date :count "eq" :comparator "i;ascii-numeric" "date" "year" "1"',
        "date",
        *NUMERIC,
        message=letter(DAY),
    ),
    when("date-count-none", 'date :count "eq" :comparator "i;ascii-numeric" "x-none" "year" "0"', "date", *NUMERIC),
    when("date-missing", 'date :contains "x-none" "year" ""', "date"),
    when("date-malformed", 'date :contains "date" "year" ""', "date", message=letter("Date: tomorrow")),
    when("date-empty", 'date :contains "date" "year" ""', "date", message=letter("Date:")),
    when(
        "date-31-february",
        'date :contains "date" "year" ""',
        "date",
        message=letter("Date: 31 Feb 2024 00:00:00 +0000"),
    ),
    when(
        "date-24-hours", 'date :contains "date" "year" ""', "date", message=letter("Date: 24 Feb 2024 24:00:00 +0000")
    ),
    when(
        "date-no-seconds",
        'date :originalzone "date" "time" "23:59:00"',
        "date",
        message=letter("Date: 24 Feb 2024 23:59 +0100"),
    ),
    when(
        "date-no-weekday",
        'date :originalzone "date" "weekday" "6"',
        "date",
        message=letter("Date: 24 Feb 2024 23:59:58 +0100"),
    ),
    when(
        "date-wrong-weekday",
        'date :originalzone "date" "weekday" "6"',
        "date",
        message=letter("Date: Mon, 24 Feb 2024 23:59:58 +0100"),
    ),
    when(
        "date-two-digits",
        'date :originalzone "date" "year" "1999"',
        "date",
        message=letter("Date: 24 Feb 99 23:59:58 +0100"),
    ),
    when(
        "date-two-digits-new",
        'date :originalzone "date" "year" "2024"',
        "date",
        message=letter("Date: 24 Feb 24 23:59:58 +0100"),
    ),
    when(
        "date-one-digit-day",
        'date :originalzone "date" "day" "04"',
        "date",
        message=letter("Date: Sun, 4 Feb 2024 23:59:58 +0100"),
    ),
    when(
        "date-zone-name",
        'date :originalzone "date" "zone" "-0500"',
        "date",
        message=letter("Date: 24 Feb 2024 23:59:58 EST"),
    ),
    when(
        "date-gmt", 'date :originalzone "date" "zone" "+0000"', "date", message=letter("Date: 24 Feb 2024 23:59:58 GMT")
    ),
    when(
        "date-minus-zero",
        'date :originalzone "date" "zone" "+0000"',
        "date",
        message=letter("Date: 24 Feb 2024 23:59:58 -0000"),
    ),
    when(
        "date-comment",
        'date :originalzone "date" "hour" "23"',
        "date",
        message=letter("Date: Sat, (x) 24 Feb 2024 23:59:58 +0100 (CET)"),
    ),
    when(
        "date-folded",
        'date :originalzone "date" "hour" "23"',
        "date",
        message=letter("Date: Sat,\n 24 Feb 2024\n\t23:59:58 +0100"),
    ),
    when(
        "date-behind-a-semicolon",
        'date :originalzone "x-a" "year" "2024"',
        "date",
        message=letter("X-A: from a; by b; 24 Feb 2024 23:59:58 +0100"),
    ),
    when(
        "date-behind-text",
        'date :originalzone "x-a" "year" "2024"',
        "date",
        message=letter("X-A: from a 24 Feb 2024 23:59:58 +0100"),
    ),
    when(
        "date-leap-second",
        'date :originalzone "date" "minute" "59"',
        "date",
        message=letter("Date: 24 Feb 2024 23:59:60 +0000"),
    ),
    when(
        "date-long-ago",
        'date :originalzone "date" "julian" "23839"',
        "date",
        message=letter("Date: 24 Feb 1924 23:59:58 +0000"),
    ),
    when(
        "date-far",
        'date :originalzone "date" "julian" "96888"',
        "date",
        message=letter("Date: 24 Feb 2124 23:59:58 +0000"),
    ),
    when("currentdate-year", 'currentdate :value "ge" "year" "2024"', "date", "relational"),
    when("currentdate-matches", 'currentdate :matches :zone "+0000" "iso8601" "????-??-??T??:??:??Z"', "date"),
    when("currentdate-zone", 'currentdate :zone "+0530" "zone" "+0530"', "date"),
    when("currentdate-not", 'currentdate :value "lt" "date" "2024-01-01"', "date", "relational"),
    when("currentdate-count", 'currentdate :count "eq" :comparator "i;ascii-numeric" "year" "1"', "date", *NUMERIC),
]

ENVIRONMENT = [
    when("environment-phase", 'environment :contains "phase" ""', "environment"),
    when("environment-location", 'environment "location" ["MDA", "MTA", "MUA", "MS"]', "environment"),
    when("environment-unknown", 'environment :contains "x-nothing" ""', "environment"),
    when("environment-name", 'environment :matches "name" "?*"', "environment"),
    when("environment-version", 'environment :matches "version" "?*"', "environment"),
    when("environment-host", 'environment :matches "host" "?*"', "environment"),
    when("environment-domain", 'environment "domain" "example.com"', "environment"),
    when(
        "environment-count-unknown",
        'environment :count "eq" :comparator "i;ascii-numeric" "x-nothing" "0"',
        "environment",
        *NUMERIC,
    ),
]

SEVERAL = letter("X-A: 1", "Subject: s", "X-a: 2", "To: a@b.c", "X-A: =?utf-8?q?=C3=BC?=\n 3")


def edits(name: str, commands: str, *capabilities: str, message: bytes = SEVERAL) -> Case:
    return does(name, commands, "editheader", "fileinto", *capabilities, message=message)


EDITS = [
    edits("add", 'addheader "X-New" "value";'),
    edits("add-last", 'addheader :last "X-New" "value";'),
    edits("add-two", 'addheader "X-1" "a"; addheader "X-2" "b";'),
    edits("add-two-last", 'addheader :last "X-1" "a"; addheader :last "X-2" "b";'),
    edits("add-one-that-is-there", 'addheader "Subject" "t"; addheader :last "Subject" "u";'),
    edits("add-empty", 'addheader "X-New" "";'),
    edits("add-umlaut", 'addheader "X-New" "grün";'),
    edits("add-long", f'addheader "X-New" "{"word " * 40}end";'),
    edits("add-long-umlauts", f'addheader "X-New" "{"ü" * 150}";'),
    edits("add-line-end", 'addheader "X-New" "a\nX-Injected: b";'),
    edits("add-blanks-around", 'addheader "X-New" "  a  "; if header "x-new" "a" { fileinto "trimmed"; }'),
    edits("add-is-seen", 'addheader "X-New" "v"; if header "x-new" "v" { fileinto "seen"; }'),
    edits("add-is-seen-by-exists", 'addheader "X-New" "v"; if exists "x-new" { fileinto "seen"; }'),
    edits("add-is-seen-by-address", 'addheader "Cc" "x@y.z"; if address :domain "cc" "y.z" { fileinto "seen"; }'),
    edits(
        "add-is-counted",
        'addheader "X-A" "v"; if header :count "eq" :comparator "i;ascii-numeric" "x-a" "4" { fileinto "seen"; }',
        *NUMERIC,
    ),
    edits("add-index", 'addheader "X-A" "0"; if header :index 1 "x-a" "0" { fileinto "seen"; }', "index"),
    edits(
        "add-last-index", 'addheader :last "X-A" "9"; if header :index 1 :last "x-a" "9" { fileinto "seen"; }', "index"
    ),
    edits("add-from-a-variable", 'set "v" "x"; addheader "X-${v}" "${v}";', "variables"),
    edits("add-and-delete", 'addheader "X-New" "v"; deleteheader "x-new";'),
    edits("add-discard", 'addheader "X-New" "v"; discard;'),
    edits("add-between", 'fileinto "a"; addheader "X-New" "v"; fileinto "b";'),
    edits("add-after-keep", 'keep; addheader "X-New" "v"; fileinto "b";'),
    edits("add-then-error", 'addheader "X-New" "v"; fileinto "a//b";'),
    edits("delete", 'deleteheader "X-A";'),
    edits("delete-none", 'deleteheader "X-None";'),
    edits("delete-value", 'deleteheader "x-a" "2";'),
    edits("delete-values", 'deleteheader "x-a" ["1", "2"];'),
    edits("delete-contains", 'deleteheader :contains "x-a" "ü";'),
    edits("delete-matches", 'deleteheader :matches "x-a" "?";'),
    edits("delete-octet", 'deleteheader :comparator "i;octet" "Subject" "S";'),
    edits("delete-relational", 'deleteheader :value "gt" :comparator "i;ascii-numeric" "x-a" "1";', *NUMERIC),
    edits("delete-index", 'deleteheader :index 2 "x-a";'),
    edits("delete-index-last", 'deleteheader :index 1 :last "x-a";'),
    edits("delete-last-index-2", 'deleteheader :last :index 2 "x-a";'),
    edits("delete-index-far", 'deleteheader :index 9 "x-a";'),
    edits("delete-index-and-value", 'deleteheader :index 1 "x-a" "2";'),
    edits("delete-index-and-right-value", 'deleteheader :index 2 "x-a" "2";'),
    edits("delete-is-seen", 'deleteheader "subject"; if not exists "subject" { fileinto "gone"; }'),
    edits(
        "delete-one-is-seen", 'deleteheader :index 1 "x-a"; if header :index 1 "x-a" "2" { fileinto "two"; }', "index"
    ),
    edits("delete-one-by-one", 'deleteheader :index 1 "x-a"; deleteheader :index 1 "x-a";'),
    edits(
        "delete-received",
        'deleteheader "Received"; if exists "received" { fileinto "still"; }',
        message=letter("Received: from x by y; Sat, 24 Feb 2024 23:59:58 +0100", "Subject: s"),
    ),
    edits("delete-all-others", 'deleteheader "x-a"; deleteheader "subject"; deleteheader "to";'),
    edits(
        "replace", 'deleteheader "Subject"; addheader "Subject" "new"; if header "subject" "new" { fileinto "new"; }'
    ),
    edits(
        "replace-with-a-match",
        'if header :matches "subject" "*" { deleteheader "Subject"; addheader :last "Subject" "[x] ${1}"; }',
        "variables",
    ),
    edits("add-name-with-a-blank", 'addheader "X New" "v";'),
    edits("add-name-with-a-colon", 'addheader "X-New:" "v";'),
    edits("add-name-of-umlauts", 'addheader "X-Ü" "v";'),
    edits("add-invalid-name-at-run-time", 'set "n" "X New"; fileinto "a"; addheader "${n}" "v";', "variables"),
]

SCORES = [
    *(
        when(
            f"spamtest-{score}-is-{value}",
            f'spamtest :value "eq" :comparator "i;ascii-numeric" "{value}"',
            "spamtest",
            *NUMERIC,
            message=letter(f"X-Spam-Score: {score}"),
        )
        for score, value in (
            ("0.0", 1),
            ("0.1", 1),
            ("5.0", 5),
            ("5.0", 6),
            ("9.9", 10),
            ("10.0", 10),
            ("25.0", 10),
            ("-3.0", 1),
        )
    ),
    when("spamtest-none", 'spamtest :value "eq" :comparator "i;ascii-numeric" "0"', "spamtest", *NUMERIC),
    when(
        "spamtest-unreadable",
        'spamtest :value "eq" :comparator "i;ascii-numeric" "0"',
        "spamtest",
        *NUMERIC,
        message=letter("X-Spam-Score: high"),
    ),
    when("spamtest-is", 'spamtest "0"', "spamtest"),
    when(
        "spamtest-count",
        'spamtest :count "eq" :comparator "i;ascii-numeric" "1"',
        "spamtest",
        *NUMERIC,
        message=letter("X-Spam-Score: 5.0"),
    ),
    when(
        "spamtestplus-percent",
        'spamtest :percent :value "eq" :comparator "i;ascii-numeric" "50"',
        "spamtestplus",
        *NUMERIC,
        message=letter("X-Spam-Score: 5.0"),
    ),
    when(
        "spamtestplus-percent-of-most",
        'spamtest :percent :value "eq" :comparator "i;ascii-numeric" "100"',
        "spamtestplus",
        *NUMERIC,
        message=letter("X-Spam-Score: 12.0"),
    ),
    when(
        "spamtestplus-none", 'spamtest :percent :count "eq" :comparator "i;ascii-numeric" "0"', "spamtestplus", *NUMERIC
    ),
    when(
        "spamtestplus-no-percent",
        'spamtest :value "ge" :comparator "i;ascii-numeric" "5"',
        "spamtestplus",
        *NUMERIC,
        message=letter("X-Spam-Score: 5.0"),
    ),
    *(
        when(
            f"virustest-{text}",
            f'virustest :value "eq" :comparator "i;ascii-numeric" "{value}"',
            "virustest",
            *NUMERIC,
            message=letter(f"X-Virus-Status: {text}"),
        )
        for text, value in (
            ("Clean", 1),
            ("Replaced", 2),
            ("Cured", 3),
            ("Suspect", 4),
            ("Infected", 5),
            ("Unknown", 0),
        )
    ),
    when("virustest-none", 'virustest :value "eq" :comparator "i;ascii-numeric" "0"', "virustest", *NUMERIC),
]

CASES = [*VALUES, *INDEX, *ADDRESSES, *ENVELOPE, *DATES, *ENVIRONMENT, *EDITS, *SCORES]
