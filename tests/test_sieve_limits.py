"""The limits of scripts: what must be possible is, and what is too much ends soon, with the message in the INBOX."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from harness import Site
from sieve import LETTER, Outcome, Sieve, script_text, seconds_of_cpu

QUICK = 5.0  # seconds of CPU time
MANY = 64 * 1024
LONG = f"Subject: {'a' * MANY}\nX-Short: aaa\n\n{'a' * MANY}\n"


@pytest.fixture
def sieve(site: Site) -> Sieve:
    return Sieve(site)


@contextmanager
def quickly() -> Iterator[None]:
    before = seconds_of_cpu()
    yield
    assert seconds_of_cpu() - before < QUICK


def verify_ended(outcome: Outcome) -> None:
    """Fails unless the message is where the script wants it, or in the INBOX because of an error."""
    assert outcome.reply == "250 2.1.5"
    assert outcome.folders or outcome.is_discarded
    assert not any(event.name in ("traceback", "internal-error", "delivery-failed") for event in outcome.events)
    if outcome.errors:
        assert outcome.placed == {"INBOX": ""}


def verify_error(outcome: Outcome) -> None:
    verify_ended(outcome)
    assert outcome.errors


def verify_fine(outcome: Outcome, *folders: str) -> None:
    verify_ended(outcome)
    assert outcome.errors == []
    assert sorted(outcome.folders) == sorted(folders)


# Actions.


def test_thirty_two_actions(sieve: Sieve) -> None:
    """One more, and what has been stored is taken back."""
    folders = [f"folder {number}" for number in range(33)]
    actions = [f'fileinto "{folder}";' for folder in folders]
    verify_fine(sieve.run(script_text("fileinto", "\n".join(actions[:32]))), *folders[:32])
    sieve.clear()
    outcome = sieve.run(script_text("fileinto", "\n".join(actions)))
    verify_error(outcome)
    assert outcome.errors[0].startswith("34: ")


def test_what_does_not_store_is_no_action(sieve: Sieve) -> None:
    body = 'set "a" "b";\naddflag "x";\nif true { }\n' * 100
    verify_fine(sieve.run(script_text("fileinto variables imap4flags", f'{body}\nfileinto "x";')), "x")


def test_the_actions_of_included_scripts_count(sieve: Sieve) -> None:
    """Each of two has twenty."""
    scripts = {
        name: script_text("fileinto", "\n".join(f'fileinto "{name}{number}";' for number in range(20)))
        for name in ("a", "b")
    }
    verify_error(sieve.run('require "include";\ninclude "a";\ninclude "b";\n', **scripts))


def test_the_actions_of_a_loop_count(sieve: Sieve) -> None:
    script = script_text(
        "foreverypart fileinto variables mime",
        'foreverypart { if header :mime :matches "X-Number" "*" { fileinto "${1}"; } }',
    )
    verify_error(sieve.run(script, parts(*(f"X-Number: {number}\n" for number in range(40)))))


# Nesting.


@pytest.mark.parametrize("opening", ["if true { ", "if false { stop; } else { "])
def test_blocks_may_be_nested_thirty_deep(sieve: Sieve, opening: str) -> None:
    verify_fine(sieve.run(script_text("fileinto", opening * 30 + 'fileinto "x";' + " }" * 30)), "x")
    verify_error(sieve.run(script_text("fileinto", opening * 34 + 'fileinto "x";' + " }" * 34)))


@pytest.mark.parametrize(("opening", "closing"), [("not ", ""), ("allof (", ")"), ("anyof (false, ", ")")])
def test_tests_may_be_nested_thirty_deep(sieve: Sieve, opening: str, closing: str) -> None:
    verify_fine(sieve.run(script_text("fileinto", f'if {opening * 30}true{closing * 30} {{ fileinto "x"; }}')), "x")
    verify_error(sieve.run(script_text("fileinto", f'if {opening * 34}true{closing * 34} {{ fileinto "x"; }}')))


@pytest.mark.parametrize(
    "script",
    [
        "if true {" * 6000,
        "if " + "not " * 15000 + "true { keep; }",
        "if " + "allof (" * 9000,
        "if exists " + "[" * 60000,
        "{" * 60000,
        "(" * 60000,
        "if true { keep; } " + "els" * 3 + "if true { keep; } " * 3000,
        "if false { } " + "elsif false { } " * 4000 + "else { keep; }",
        ";" * 60000,
        '"' * 60001,
        "/*" * 30000,
        "/" + "*" * 60000,
        "text:\n" * 10000,
        "\\" * 60000,
        ":a" * 30000,
        "keep;" * 12000,
        "if anyof (" + "false, " * 8000 + "true) { keep; }",
        'if exists ["a"' + ', "a"' * 12000 + "] { keep; }",
    ],
    ids=range(18),
)
def test_a_large_odd_script_is_read_soon(sieve: Sieve, script: str) -> None:
    with quickly():
        outcome = sieve.run(script)
    verify_ended(outcome)
    assert list(outcome.folders) == ["INBOX"]


# Include.


def chain(length: int, times: int = 1, last: str = 'require "fileinto";\nfileinto "x";\n') -> dict[str, str]:
    """Scripts each of which includes the next so many times; s0 is the first."""
    scripts = {
        f"s{number}": 'require "include";\n' + f'include "s{number + 1}";\n' * times for number in range(length - 1)
    }
    return {**scripts, f"s{length - 1}": last}


def test_scripts_may_be_included_nine_deep(sieve: Sieve) -> None:
    active = 'require "include";\ninclude "s0";\n'
    verify_fine(sieve.run(active, **chain(9)), "x")
    verify_error(sieve.run(active, **chain(12)))


@pytest.mark.parametrize("last", ["", 'require "imap4flags";\naddflag "x";\n', 'require "fileinto";\nfileinto "x";\n'])
@pytest.mark.parametrize("times", [2, 10, 500])
def test_includes_that_fan_out_end_soon(sieve: Sieve, times: int, last: str) -> None:
    """Ten scripts, each of which includes the next two times make 1,024 runs, which may be done or not."""
    with quickly():
        outcome = sieve.run('require "include";\ninclude "s0";\n', **chain(9, times, last))
    verify_ended(outcome)
    if times > 2:
        verify_error(outcome)


def test_many_scripts_may_be_included(sieve: Sieve) -> None:
    scripts = {f"s{number}": script_text("fileinto", f'fileinto "x{number % 30}";') for number in range(60)}
    active = 'require "include";\n' + "".join(f'include "{name}";\n' for name in scripts)
    verify_ended(sieve.run(active, **scripts))


# Variables.


def test_a_variable_holds_four_thousand_characters(sieve: Sieve) -> None:
    value = "0123456789" * 400
    script = f'set "a" "{value}";\nif string "${{a}}" "{value}" {{ fileinto "x"; }}'
    verify_fine(sieve.run(script_text("variables fileinto", script)), "x")


@pytest.mark.parametrize("text", ["a", "\u00e9", "\u20ac", "\U0001f600"])
def test_a_value_that_doubles_is_cut(sieve: Sieve, text: str) -> None:
    """That is no error, RFC 5229 section 6, and no character is cut in two."""
    body = f'set "a" "{text}";\n' + 'set "a" "${a}${a}";\n' * 50
    body += f'if not string :matches "${{a}}" "*{text}" {{ discard; stop; }}\n'
    body += 'set :length "b" "${a}";\nif string :matches "${b}" ["????", "?????", "??????"] { fileinto "x"; }'
    with quickly():
        outcome = sieve.run(script_text("variables fileinto", body))
    verify_fine(outcome, "x")


@pytest.mark.parametrize("modifiers", [":quotewildcard", ":upper", ":length", ":lowerfirst :quotewildcard"])
def test_modifiers_of_long_values_end_soon(sieve: Sieve, modifiers: str) -> None:
    body = 'set "a" "*?";\n' + 'set "a" "${a}${a}";\n' * 30 + f'set {modifiers} "b" "${{a}}";\n' * 500
    with quickly():
        verify_ended(sieve.run(script_text("variables", body)))


def test_a_string_of_many_long_values_ends_soon(sieve: Sieve) -> None:
    """Each string of the script is hundreds of times as long as it looks."""
    body = 'set "a" "0123456789";\n' + 'set "a" "${a}${a}";\n' * 30
    long = "${a}" * 500
    body += f'if string "{long}" "{long}x" {{ stop; }}\n' * 10
    body += f'if string :contains "{long}" "{long}x" {{ stop; }}\n' * 4
    with quickly():
        verify_ended(sieve.run(script_text("variables", body)))


def test_there_may_be_many_variables(sieve: Sieve) -> None:
    body = "".join(f'set "v{number}" "{number}";\n' for number in range(128))
    verify_fine(sieve.run(script_text("variables fileinto", f'{body}fileinto "${{v0}}-${{v127}}";')), "0-127")


@pytest.mark.parametrize(("length", "right"), [(32, True), (64, True), (65, False), (5000, False)])
def test_the_name_of_a_variable_has_sixty_four_characters(sieve: Sieve, length: int, right: bool) -> None:
    name = "n" * length
    outcome = sieve.run(script_text("variables fileinto", f'set "{name}" "x";\nfileinto "${{{name}}}";'))
    if right:
        verify_fine(outcome, "x")
    else:
        verify_error(outcome)


def test_match_variables_up_to_nine(sieve: Sieve) -> None:
    script = 'if header :matches "Subject" "?-?-?-?-?-?-?-?-*" { fileinto "${9}${8}${1}"; }'
    verify_fine(sieve.run(script_text("variables fileinto", script), "Subject: 1-2-3-4-5-6-7-8-9\n\nx\n"), "981")


# Patterns.

PATTERNS = {
    "stars": "*a*a*a*a*b",
    "many-stars": "*a" * 500 + "*b",
    "questions": "?" * 500,
    "more-questions": "?" * 30000,
    "only-stars": "*" * 30000,
    "both": "*?" * 10000 + "b",
    "star-question-star": "*?*a" * 500 + "b",
    "backslash": "a\\\\",
    "stars-backslash": "*a*a*\\\\",
    "literal": "*" + "a" * 20000 + "b*",
    "classes": "*[a-z]*{a,b}*(a|b)*",
}
TESTED = {
    "header": 'header :matches {} "Subject" "{}"',
    "body-raw": 'body :matches :raw {} "{}"',
    "body-text": 'body :matches :text {} "{}"',
    "address": 'address :matches {} "From" "{}"',
    "variable": 'string :matches {} "${{a}}" "{}"',
}
COMPARATORS = ["", ':comparator "i;octet"', ':comparator "i;unicode-casemap"']


@pytest.mark.parametrize("comparator", COMPARATORS, ids=["casemap", "octet", "unicode"])
@pytest.mark.parametrize("test", TESTED)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_ends_soon(sieve: Sieve, pattern: str, test: str, comparator: str) -> None:
    body = 'if header :matches "Subject" "*" { set "a" "${1}"; }\n'
    body += f'if {TESTED[test].format(comparator, PATTERNS[pattern])} {{ fileinto "yes"; }}'
    requires = "variables body fileinto comparator-i;unicode-casemap"
    message = f"From: <{'a' * 5000}@{'a' * 5000}>\n{LONG}"
    with quickly():
        outcome = sieve.run(script_text(requires, body), message)
    verify_ended(outcome)
    if pattern in ("only-stars", "questions", "stars"):
        assert outcome.errors == []
        assert list(outcome.folders) == ["yes" if pattern == "only-stars" else "INBOX"]


@pytest.mark.parametrize(
    ("pattern", "value", "matches"),
    [
        ("*a*a*a*a*b", "a" * 1000 + "b", True),
        ("?" * 500, "a" * 500, True),
        ("?" * 500, "a" * 501, False),
        ("*?*", "", False),
        ("*?*", "a", True),
        ("*a?*b", "xxaabb", True),
        ("a\\\\", "a\\", True),
        ("a\\\\", "a", False),
        ("\\\\*\\\\?\\\\\\\\", "*?\\", True),
        ("\\\\a", "a", True),
    ],
)
def test_what_a_pattern_matches(sieve: Sieve, pattern: str, value: str, matches: bool) -> None:
    """A backslash at the end stands for itself."""
    escaped = value.replace("\\", "\\\\")
    script = script_text("variables fileinto", f'if string :matches "{escaped}" "{pattern}" {{ fileinto "yes"; }}')
    verify_fine(sieve.run(script), "yes" if matches else "INBOX")


def listed(*strings: str) -> str:
    """A list of strings."""
    return "[" + ", ".join(f'"{string}"' for string in strings) + "]"


LISTS = [
    f'header :contains "Subject" {listed("a" * 30000 + "b")}',
    f'header :contains "Subject" {listed("b" + "a" * 30000)}',
    f"body :raw :contains {listed('a' * 20000 + 'b' + 'a' * 20000)}",
    f"body :text :contains {listed(*('a' * number + 'b' for number in range(1, 300)))}",
    f"body :text :matches {listed(*('*a*' + 'a' * number + 'b*' for number in range(1, 300)))}",
    f'header :contains {listed(*["Subject"] * 3000)} "b"',
    f"header :contains {listed(*['Subject'] * 1000)} {listed(*['ab'] * 1000)}",
    f"address {listed(*['From'] * 3000)} {listed(*['x'] * 3000)}",
    'body :content ["", "text", "text/plain"] :contains ["b", "c"]',
]


@pytest.mark.parametrize("test", LISTS, ids=range(len(LISTS)))
def test_keys_and_lists_end_soon(sieve: Sieve, test: str) -> None:
    with quickly():
        verify_ended(sieve.run(script_text("body", f"if {test} {{ discard; }}"), f"From: a@example.org\n{LONG}"))


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "(a+)+b",
        "(a|aa)+b",
        "(a|a)*b",
        "(.*)*b",
        "(x+x+)+y",
        "(a*)*(a*)*(a*)*b",
        "^(a?){300}a{300}b",
        "a{1000}{1000}",
        "((a{0,100}){0,100}){0,100}",
        "(" * 1000 + "a" + ")" * 1000,
        "(a|" * 3000 + ")" * 3000,
        "[[:alpha:]]" * 2000,
        "(((((a+)+)+)+)+)+b",
        "(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)b",
    ],
    ids=range(15),
)
@pytest.mark.parametrize("comparator", ["", ':comparator "i;octet"'])
def test_a_regular_expression_ends_soon(sieve: Sieve, pattern: str, comparator: str) -> None:
    script = script_text("regex variables", f'if header :regex {comparator} "Subject" "{pattern}" {{ discard; }}')
    with quickly():
        verify_ended(sieve.run(script, LONG))


# MIME.

MIME_TESTS = {
    "loop": 'foreverypart { addflag "x"; }',
    "nested-loops": "foreverypart { " * 8 + 'addflag "x";' + " }" * 8,
    "loop-anychild": 'foreverypart { if header :mime :anychild "X" "y" { addflag "x"; } }',
    "anychild": 'if header :mime :anychild :param "name" "Content-Type" "y" { discard; }',
    "exists": 'if exists :mime :anychild "x-none" { discard; }',
    "content": 'if body :content "" :contains "xyz" { discard; }',
    "text": 'if body :text :contains "xyz" { discard; }',
    "extract": 'foreverypart { extracttext "a"; set "b" "${b}${a}"; }',
}


def parts(*contents: str) -> str:
    """A message with these MIME parts: the header of each, an empty line and the body."""
    body = "".join(f"--b\n{content}" if "\n\n" in content else f"--b\n{content}\ntext\n" for content in contents)
    return f"Subject: x\nMIME-Version: 1.0\nContent-Type: multipart/mixed; boundary=b\n\n{body}--b--\n"


def nested(depth: int, inner: str = "Content-Type: text/plain\n\ninner\n") -> str:
    """A message with multiparts inside each other."""
    message = inner
    for level in range(depth):
        boundary = f"b{level}."
        message = f"Content-Type: multipart/mixed; boundary={boundary}\n\n--{boundary}\n{message}--{boundary}--\n"
    return f"Subject: x\nMIME-Version: 1.0\n{message}"


def forwarded(depth: int) -> str:
    """A message with messages inside each other."""
    return "Subject: x\nMIME-Version: 1.0\nContent-Type: message/rfc822\n\n" * depth + "Subject: y\n\nx\n"


MULTIPART = "Content-Type: multipart/mixed; boundary=b"
MIME_MESSAGES = {
    "deep": nested(150),
    "very-deep": nested(3000),
    "forwarded": forwarded(150),
    "forwarded-deep": forwarded(10000),
    "wide": parts(*["Content-Type: text/plain\n\nxy\n"] * 2000),
    "very-wide": parts(*["\n\n"] * 100_000),
    "wide-and-deep": parts(*(nested(20).partition("\n")[2] for _ in range(100))),
    "open": f"{MULTIPART}\n\n" + f"--b\n{MULTIPART}\n\n" * 5000,
    "boundaries": "".join(f"{MULTIPART}{n}\n\n--b{n}\n" for n in range(150)) + "--b\n" * 50_000,
    "dashes": f"{MULTIPART}\n\n" + "-" * 500_000 + "\n" + "--\n" * 100_000,
    "header-of-parts": parts(*["Content-Type: text/plain" + "; a=b" * 300 + "\n\nx\n"] * 100),
    "base64": parts(f"Content-Type: text/plain\nContent-Transfer-Encoding: base64\n\n{'QUFB' * 18}\n" * 1000),
    "quoted-printable": parts(
        "Content-Type: text/html\nContent-Transfer-Encoding: quoted-printable\n\n" + "=3C=\n" * 200_000
    ),
    "html": parts("Content-Type: text/html\n\n" + "<" * 300_000),
    "html-tags": parts("Content-Type: text/html\n\n" + "<a b='" * 50_000),
    "html-comments": parts("Content-Type: text/html\n\n" + "<!-- <script> " * 20_000),
    "html-entities": parts("Content-Type: text/html\n\n" + "&" * 100_000 + "&#x" * 50_000 + "&#9" * 50_000),
}  # fmt: skip


@pytest.mark.parametrize("test", MIME_TESTS)
@pytest.mark.parametrize("message", MIME_MESSAGES)
def test_a_message_of_many_parts_ends_soon(sieve: Sieve, message: str, test: str) -> None:
    script = script_text("mime foreverypart extracttext variables imap4flags body", MIME_TESTS[test])
    with quickly():
        verify_ended(sieve.run(script, MIME_MESSAGES[message]))


@pytest.mark.parametrize(
    "message",
    [
        nested(90, "Content-Type: text/plain\nX-Found: yes\n\nx\n"),
        parts(*["X-Found: no\n\nx\n"] * 990, "X-Found: yes\n\nx\n"),
    ],
    ids=["deep", "wide"],
)
def test_parts_within_the_limits_are_seen(sieve: Sieve, message: str) -> None:
    script = script_text("mime fileinto", 'if header :mime :anychild "X-Found" "yes" { fileinto "found"; }')
    verify_fine(sieve.run(script, message), "found")


@pytest.mark.parametrize("message", [nested(150), parts(*["X-Number: 1\n\nx\n"] * 2000)], ids=["deep", "wide"])
def test_beyond_the_limits_the_rest_is_one_part(sieve: Sieve, message: str) -> None:
    """That is no error of the script."""
    verify_fine(sieve.run(script_text("mime", 'if exists :mime :anychild "X-None" { discard; }'), message), "INBOX")


# Headers.

HEADERS = {
    "fields": "X: a\n" * 30_000,
    "names": "".join(f"X-{number}: a\n" for number in range(20_000)),
    "folded": "Subject: a\n" + " b\n" * 100_000,
    "encoded": "Subject: " + "=?utf-8?q?=C3=A9?=\n " * 10_000 + "x\n",
    "half-encoded": "Subject: " + "=?utf-8?q?" * 30_000 + "\n",
    "questions": "Subject: " + "=?" * 100_000 + "\n",
    "addresses": "From: " + ",\n ".join(f"User {number} <u{number}@example.org>" for number in range(10_000)) + "\n",
    "commas": "From: " + "," * 100_000 + "\n",
    "comments": "From: " + "(" * 100_000 + "\n",
    "closed-comments": "From: " + "(" * 50_000 + ")" * 50_000 + " a@example.org\n",
    "quotes": "From: " + '"' * 100_001 + "\n",
    "backslashes": "From: " + '"' + "\\" * 100_000 + "\n",
    "groups": "From: " + "a:" * 50_000 + ";" * 50_000 + "\n",
    "angles": "From: " + "<" * 50_000 + ">" * 50_000 + "\n",
    "routes": "From: <" + "@a," * 30_000 + "@a:b@example.org>\n",
    "dots": "From: " + "a." * 50_000 + "@" + "b." * 50_000 + "\n",
    "date": "Date: " + "(" * 50_000 + ")" * 50_000 + " Tue, 1 Apr 1997 09:06:31 -0800\n",
    "long-date": "Date: " + "1 " * 100_000 + "\n",
    "semicolons": "Received: " + ";" * 100_000 + "\n",
    "parameters": "Content-Type: text/plain" + "; a*0*=x''%41" * 10_000 + "\n",
    "continuations": "Content-Type: text/plain" + "".join(f"; a*{n}=b" for n in range(10_000)) + "\n",
}  # fmt: skip


@pytest.mark.parametrize("header", HEADERS)
def test_a_large_odd_header_ends_soon(sieve: Sieve, header: str) -> None:
    tests = [
        'header :contains ["Subject", "From", "X"] "none"',
        'address :all :contains ["From", "To"] "none"',
        'address :localpart ["From", "To"] "none"',
        'address :count "eq" "From" "7"',
        'header :count "eq" "X" "7"',
        'date "date" "year" "1"',
        'date "received" "year" "1"',
        'header :mime :param "a" "Content-Type" "none"',
        'exists ["X-none", "Subject"]',
    ]
    requires = "mime date relational comparator-i;ascii-numeric"
    with quickly():
        verify_ended(
            sieve.run(
                script_text(requires, "".join(f"if {test} {{ stop; }}\n" for test in tests)), HEADERS[header] + LETTER
            )
        )


def test_a_header_that_is_edited_again_and_again(sieve: Sieve) -> None:
    body = 'addheader "X" "0123456789";\naddheader :last "Y" "z";\n' * 600 + 'deleteheader :index 1 "X";\n' * 300
    with quickly():
        verify_ended(sieve.run(script_text("editheader index", body), "X: a\n" * 5000 + LETTER))


def test_a_large_message(sieve: Sieve) -> None:
    """Its body is read as far as the limit says."""
    message = f"Subject: large\n\n{'0123456789abcdefghijklmnopqrstuvwxyz' * 2}\n" + "0123456789\n" * 1_500_000
    script = script_text("body fileinto", 'if body :text :contains "xyz0123" { fileinto "x"; }')
    with quickly():
        verify_fine(sieve.run(script, message), "x")


# The script's file.


def padded(size: int) -> str:
    """A script of so many octets."""
    script = 'require "fileinto";\nfileinto "x";\n'
    return script + "#" * (size - len(script) - 1) + "\n"


def test_a_script_may_have_sixty_four_kibioctets(sieve: Sieve) -> None:
    verify_fine(sieve.run(padded(65536)), "x")
    verify_error(sieve.run(padded(65537)))
    verify_error(sieve.run(padded(10_000_000)))
    assert sieve.check(padded(65536)) == []
    assert sieve.check(padded(65537)) != []


def test_the_greatest_size_of_a_script_is_an_option(site: Site) -> None:
    """In kibioctets, as Cyrus has it."""
    sieve = Sieve(site, sieve_maxscriptsize="2")
    verify_fine(sieve.run(padded(2048)), "x")
    verify_error(sieve.run(padded(2049)))


def test_an_included_script_has_the_same_limit(sieve: Sieve) -> None:
    verify_error(sieve.run('require "include";\ninclude "large";\n', large=padded(65537)))


@pytest.mark.parametrize("kind", ["directory", "fifo", "device", "broken link"])
def test_a_script_that_is_no_plain_file(sieve: Sieve, kind: str) -> None:
    """Nobody waits for it, and the message is in the INBOX."""
    if kind == "directory":
        sieve.script.mkdir()
    elif kind == "fifo":
        os.mkfifo(sieve.script)
    elif kind == "device":
        sieve.script.symlink_to("/dev/zero")
    else:
        sieve.script.symlink_to("missing.sieve")
    with quickly():
        outcome = sieve.deliver(LETTER)
    assert outcome.reply == "250 2.1.5"
    assert outcome.placed == {"INBOX": ""}


def test_a_script_that_changes_counts_at_the_next_message(sieve: Sieve) -> None:
    """Be it older, as a copy that is put back, or of the same size."""
    verify_fine(sieve.run('require "fileinto";\nfileinto "a";\n'), "a")
    status = sieve.script.stat()
    verify_fine(sieve.run('require "fileinto";\nfileinto "b";\n'), "b")
    sieve.write("active", 'require "fileinto";\nfileinto "c";\n')
    os.utime(sieve.script, ns=(status.st_atime_ns, status.st_mtime_ns))
    verify_fine(sieve.deliver(LETTER), "c")
    sieve.script.unlink()
    verify_fine(sieve.deliver(LETTER), "INBOX")
