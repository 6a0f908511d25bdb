"""Scripts and messages that are made to do harm: each ends soon, takes little memory, and the message is stored whole.

Each delivery has a process of its own, whose processor time and memory are measured and bounded.
"""

from __future__ import annotations

import os
import pickle
import re
import resource
import sys
import traceback
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from harness import Site, config_of
from sieve import LETTER, Outcome, Sieve, Text, octets_of, script_text, seconds_of_cpu

from lmtpd import DeliveryAgent

QUICK = 6.0  # seconds of CPU time
PATIENCE = 20  # seconds of CPU time after which a process is ended
SMALL = 100 * 1024  # KiB of memory
LARGEST = 3 << 30  # octets of addresses that a process may have
PIECE = 64 * 1024
ENVELOPE = "From: a@example.org\nTo: jane@example.com\n"
EMPTY_FIELDS = "a:\n" * 80_000  # as many as a header may have to be read as a whole
SMILE = "\U0001f600"


class Measured(NamedTuple):
    """A delivery: what came of it, and what it took, in seconds and in KiB."""

    outcome: Outcome
    seconds: float
    memory: int


@pytest.fixture
def sieve(site: Site) -> Sieve:
    return Sieve(site)


def peak() -> int:
    """The most memory that this process has had, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measured(sieve: Sieve, script: Text, message: Text, pieces: int = 0) -> Measured:
    """Delivers a message in a process that only lives for it. pieces: how many octets arrive at a time; 0 for all."""
    octets = octets_of(message)
    sieve.write("active", script)

    def deliver() -> Measured:
        resource.setrlimit(resource.RLIMIT_CPU, (PATIENCE, PATIENCE))
        resource.setrlimit(resource.RLIMIT_AS, (LARGEST, LARGEST))
        seconds, memory = seconds_of_cpu(), peak()
        outcome = sieve.deliver(octets, pieces=pieces)
        return Measured(outcome, seconds_of_cpu() - seconds, peak() - memory)

    return in_child(deliver)


def in_child(work: Callable[[], Measured]) -> Measured:
    """What work returns in a child process; its exception, or its end by a signal, fails the test."""
    sys.stdout.flush()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            try:
                result: Measured | str = work()
            except BaseException:
                result = traceback.format_exc()
            with os.fdopen(writing, "wb") as pipe:
                pickle.dump(result, pipe)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if not answer:
        pytest.fail(f"the process ended with status {status}: it took more than {PATIENCE} s, or has crashed")
    result = pickle.loads(answer)
    if not isinstance(result, Measured):
        pytest.fail(str(result))
    return result


def verify_cheap(delivery: Measured) -> None:
    """Fails if the delivery took too much, or had an error that is not the script's."""
    outcome = delivery.outcome
    names = {event.name for event in outcome.events}
    assert outcome.reply == "250 2.1.5"
    assert not names & {"traceback", "internal-error", "delivery-failed"}
    assert delivery.seconds < QUICK, f"{delivery.seconds:.2f} s"
    assert delivery.memory < SMALL, f"{delivery.memory // 1024} MiB"


def as_received(stored: bytes, message: bytes) -> bytes:
    """What is stored without the fields that lmtpd gives a message: where it came from, and what it lacks."""
    for name, value in ((b"Return-Path", b"<sender@"), (b"Message-ID", b"<lmtpd."), (b"Date", b"")):
        if not re.search(rb"(?mi)^%s:" % name, message[:300]):
            stored = re.sub(rb"(?m)^%s: %s.*\n" % (name, value), b"", stored, count=1)
    return stored


def attack(sieve: Sieve, script: Text, message: Text = LETTER, **scripts: Text) -> Outcome:
    """Fails unless the delivery takes little and the message is in the INBOX as it came."""
    for name, other in scripts.items():
        sieve.write(name, other)
    delivery = measured(sieve, script, message)
    verify_cheap(delivery)
    outcome = delivery.outcome
    assert list(outcome.folders) == ["INBOX"]
    assert as_received(outcome.message.octets, octets_of(message)) == octets_of(message)
    return outcome


def listed(*names: str) -> str:
    return "[" + ", ".join(f'"{name}"' for name in names) + "]"


def parts(number: int, body: str = "x", content_type: str = "text/plain") -> str:
    """A message with so many equal parts."""
    part = f"--b\nContent-Type: {content_type}\n\n{body}\n"
    return f"{ENVELOPE}Content-Type: multipart/mixed; boundary=b\n\n{part * number}--b--\n"


def quadrupled(times: int, letter: str = "x", length: int = 1000) -> str:
    """Commands that give the variable a a long value."""
    return f'set "a" "{letter * length}";\n' + 'set "a" "${a}${a}${a}${a}";\n' * times


HTML = "<b><i>" * 170_000  # 1 MiB without any text


# Names and fields.


def test_a_name_that_is_listed_fifteen_thousand_times(sieve: Sieve) -> None:
    attack(sieve, f"if exists {listed(*['a'] * 10_000)} {{ stop; }}", EMPTY_FIELDS + "\nx\n")
    attack(sieve, 'if exists ["a"' + ',"a"' * 15_000 + "] { stop; }", EMPTY_FIELDS + "\nx\n")


def test_the_fields_of_many_names_are_not_collected(sieve: Sieve) -> None:
    for names in (["a"] * 2000, [f"{chr(97 + number % 26)}{number}" for number in range(2000)]):
        attack(sieve, f'if header {listed("a", *names)} "x" {{ stop; }}', EMPTY_FIELDS + "\nx\n")
    attack(sieve, f'if address {listed(*["from"] * 2000)} "x" {{ stop; }}', "From:\n" * 40_000 + "\nx\n")


def test_the_fields_of_parts_are_not_collected(sieve: Sieve) -> None:
    names = [f"{number:x}" for number in range(4096, 4096 + 7000)]
    attack(sieve, script_text("mime", f'if header :mime :anychild {listed(*names)} "x" {{ stop; }}'), parts(990))
    attack(sieve, script_text("mime", f'if header :mime {listed(*["a"] * 59)} "x" {{ stop; }}'), EMPTY_FIELDS + "\nx\n")


def test_fields_that_are_deleted_one_by_one(sieve: Sieve) -> None:
    """All of the commands count, or none does."""
    script = script_text("editheader index", 'deleteheader :index 1 "a";\n' * 2000)
    delivery = measured(sieve, script, EMPTY_FIELDS + "\nx\n")
    verify_cheap(delivery)
    assert list(delivery.outcome.folders) == ["INBOX"]
    left = 80_000 if delivery.outcome.errors else 78_000
    assert as_received(delivery.outcome.message.octets, b"") == b"a:\n" * left + b"\nx\n"


def test_addresses_that_are_read_again_and_again(sieve: Sieve) -> None:
    script = script_text("index", 'if address :index 1 "from" "zz" { stop; }\n' * 1000)
    attack(sieve, script, "From: " + "a@b," * 60_000 + "\n\nx\n")


def test_dates_that_are_read_again_and_again(sieve: Sieve) -> None:
    script = script_text("date index", 'if date :index 1 "date" "year" "1" { stop; }\n' * 1000)
    attack(sieve, script, f"{ENVELOPE}Date: {'(' * 250_000}\n\nx\n")
    for test in ('date :index 1 "date" "year" "1"', 'currentdate "year" "1"'):
        tests = f"if {test} {{ stop; }}\n" * 1000
        script = script_text("date index foreverypart", f"foreverypart {{ {tests} }}")
        attack(sieve, script, f"Date: Mon, 1 Jan 2024 00:00:00 +0000\n{parts(990)}")


# Variables.


def test_a_string_of_many_variables(sieve: Sieve) -> None:
    for letter in ("x", SMILE):
        body = f'{quadrupled(3, letter)} set "b" "{"${a}" * 12_000}";'
        attack(sieve, script_text("variables", body))


def test_a_long_error(sieve: Sieve) -> None:
    """The file in which the user finds it has a limit."""
    body = f'{quadrupled(3)} error "{"${a}" * 12_000}";'
    outcome = attack(sieve, script_text("variables ihave", body))
    assert outcome.errors
    assert (sieve.folder / "active.log").stat().st_size <= 64 * 1024


def test_texts_that_are_remembered_in_another_form(sieve: Sieve) -> None:
    for comparator in ("i;ascii-casemap", "i;octet", "i;unicode-casemap"):
        test = f'string :comparator "{comparator}" "${{n}}${{a}}" "1"'
        loop = f'foreverypart {{ set "n" "${{n}}x"; if {test} {{ stop; }} }}'
        body = f'{quadrupled(1, SMILE)} set "a" "${{a}}${{a}}${{a}}"; set "n" ""; {loop}'
        attack(sieve, script_text("variables foreverypart comparator-i;unicode-casemap", body), parts(990))


def test_strings_that_are_only_counted(sieve: Sieve) -> None:
    levels = [f"Content-Type: multipart/mixed; boundary=b{level}\n\n--b{level}\n" for level in range(99)]
    test = f'string :count "eq" {listed(*["a"] * 10_000)} "1"'
    loops = f"foreverypart {{ foreverypart {{ foreverypart {{ if {test} {{ stop; }} }} }} }}"
    message = f"{ENVELOPE}{''.join(levels)}Content-Type: text/plain\n\nx\n"
    attack(sieve, script_text("foreverypart variables relational", loops), message)


# Scripts that include others.


@pytest.mark.parametrize("arguments", [':once "s"', ':optional "missing"', ':once :optional "missing"'])
def test_a_script_that_is_looked_for_again_and_again(sieve: Sieve, arguments: str) -> None:
    loop = "foreverypart { " + f"include {arguments};\n" * 1500 + "}"
    attack(sieve, script_text("include foreverypart", loop), parts(200), s="# nothing\n")


def test_large_scripts_that_are_included(sieve: Sieve) -> None:
    """Neither is the time for compiling them free, nor are all of them kept."""
    names = [f"s{number}" for number in range(20)]
    body = "".join(f'include "{name}";\n' for name in names)
    attack(sieve, script_text("include", body), **dict.fromkeys(names, "keep;" * 13_000))


# Comparators.


def test_many_combining_characters(sieve: Sieve) -> None:
    """A stranger sends them to somebody whose script is quite innocent."""
    message = f"{ENVELOPE}Subject: a" + "\u0301\u0327" * 60_000 + "\n\nx\n"
    test = 'header :comparator "i;unicode-casemap" "subject" "x"'
    attack(sieve, script_text("comparator-i;unicode-casemap", f"if {test} {{ stop; }}"), message)
    attack(sieve, script_text("comparator-i;unicode-casemap", f"if {test} {{ stop; }}\n" * 700), message)
    body = 'if header :matches "subject" "*" { fileinto "${1}"; }'
    attack(sieve, script_text("fileinto variables", body), message)
    assert (sieve.folder / "active.log").stat().st_size < 4096


def test_long_keys_that_the_run_makes(sieve: Sieve) -> None:
    """They are brought into the form in which they are compared, as values are."""
    tests = 'if string :comparator "i;unicode-casemap" "x" "${a}${a}${a}" { stop; }\n' * 700
    body = f"{quadrupled(2, SMILE)}{tests}"
    attack(sieve, script_text("variables comparator-i;unicode-casemap", body))


@pytest.mark.parametrize("key", ["*?dich", "*dich"])
def test_what_a_second_key_matches_is_as_the_message_has_it(sieve: Sieve, key: str) -> None:
    expected = "Größe an" if "?" in key else "Größe an "
    matches = f'header :matches "subject" ["zz?", "{key}"]'
    same = f'string :comparator "i;octet" "${{1}}" "{expected}"'
    script = script_text("variables fileinto", f'if {matches} {{ if {same} {{ fileinto "right"; }} }}')
    message = "Subject: Größe an dich\n\nx\n"
    delivery = measured(sieve, script, message)
    verify_cheap(delivery)
    assert list(delivery.outcome.folders) == ["right"]
    assert as_received(delivery.outcome.message.octets, b"") == message.encode()


def test_what_unicode_casemap_matches_is_as_the_message_has_it(sieve: Sieve) -> None:
    matches = 'header :comparator "i;unicode-casemap" :matches "subject" "grüße *"'
    script = script_text("variables fileinto comparator-i;unicode-casemap", f'if {matches} {{ fileinto "${{1}}"; }}')
    message = "Subject: Grüße Max\n\nx\n"
    delivery = measured(sieve, script, message)
    verify_cheap(delivery)
    assert list(delivery.outcome.folders) == ["Max"]
    assert as_received(delivery.outcome.message.octets, b"") == message.encode()


# The bodies of parts.


def test_much_html_without_text(sieve: Sieve) -> None:
    script = script_text("body", 'if body :text :contains "zz" { stop; }')
    attack(sieve, script, parts(15, HTML, "text/html"))


def test_a_text_that_is_extracted_again_and_again(sieve: Sieve) -> None:
    body = "foreverypart { " + 'extracttext "a";\n' * 20 + "}"
    attack(sieve, script_text("variables extracttext foreverypart", body), parts(1, HTML, "text/html"))
    body = "foreverypart { " + 'extracttext "a";\n' * 3000 + "}"
    attack(sieve, script_text("variables extracttext foreverypart", body), parts(1, HTML, "text/html"))


# Regular expressions.


@pytest.mark.parametrize("pattern", ["((a?b?){900})+c", "(((a|ab)(b|ba)?){300})+(.*)$"])
def test_a_large_regular_expression(sieve: Sieve, pattern: str) -> None:
    message = f"{ENVELOPE}X: {'ab' * 125_000}\n\nx\n"
    for times in (1, 100):
        body = f'if header :regex "x" ["{pattern}"] {{ stop; }}\n' * times
        attack(sieve, script_text("regex variables", body), message)


def test_many_regular_expressions(sieve: Sieve) -> None:
    keys = [f"(x{{1000}}){number}" for number in range(3400)]
    attack(sieve, script_text("regex", f'if header :regex "x" {listed(*keys)} {{ stop; }}'))


def test_regular_expressions_that_the_run_makes(sieve: Sieve) -> None:
    keys = listed(*(f"((x|y){{400}}${{n}}){{2}}{number}" for number in range(10)))
    loop = f'foreverypart {{ set "n" "${{n}}x"; if string :regex "" {keys} {{ stop; }} }}'
    attack(sieve, script_text("regex variables foreverypart", f'set "n" ""; {loop}'), parts(900))


# Flags.


def test_long_lists_of_flags(sieve: Sieve) -> None:
    loop = f'foreverypart {{ setflag ["{"a " * 30_000}"]; }}'
    delivery = measured(sieve, script_text("imap4flags foreverypart", loop), parts(900))
    verify_cheap(delivery)
    assert as_received(delivery.outcome.message.octets, b"") == parts(900).encode()
    assert delivery.outcome.placed == {"INBOX": "" if delivery.outcome.errors else "a"}
    tests = 'if hasflag "a" "y" { stop; }\n' * 1000
    body = f'set "a" "{"a " * 8000}"; foreverypart {{ {tests} }}'
    attack(sieve, script_text("imap4flags variables foreverypart", body), parts(900))


def test_more_keywords_than_letters_in_many_folders(sieve: Sieve) -> None:
    """The log says so once for each folder at most."""
    keywords = " ".join(f"k{number}" for number in range(128))
    actions = "".join(f'fileinto "f{number}";\n' for number in range(32))
    script = script_text("imap4flags fileinto", f'setflag ["{keywords}"];\n{actions}')
    delivery = measured(sieve, script, LETTER)
    verify_cheap(delivery)
    assert len(delivery.outcome.folders) == 32
    for [stored] in delivery.outcome.folders.values():
        assert as_received(stored.octets, b"") == LETTER.encode()
        assert len(stored.flags) == 26
    assert sum(event.name == "no-letter-for-keyword" for event in delivery.outcome.events) <= 32
    assert len(delivery.outcome.events) <= 4 * 32


# Records of what has been seen.


@pytest.mark.parametrize(("handles", "number", "suffix"), [(1000, 300, ""), (100, 500, "${a}")])
def test_many_records_of_duplicates(sieve: Sieve, handles: int, number: int, suffix: str) -> None:
    tests = "".join(
        f'if duplicate :handle "{handle}" :uniqueid "${{n}}{suffix}" {{ stop; }}\n' for handle in range(handles)
    )
    body = f'{quadrupled(2)} set "n" ""; foreverypart {{ set "n" "${{n}}x"; {tests} }}'
    attack(sieve, script_text("duplicate variables foreverypart", body), parts(number))


# The header that is stored.


def edited(sieve: Sieve, script: Text, message: Text, pieces: int = 0) -> bytes:
    """The octets that are stored in the INBOX, without lmtpd's own fields."""
    delivery = measured(sieve, script, message, pieces)
    verify_cheap(delivery)
    assert delivery.outcome.errors == []
    assert list(delivery.outcome.folders) == ["INBOX"]
    return as_received(delivery.outcome.message.octets, octets_of(message))


def test_an_added_field_has_no_control_characters(sieve: Sieve) -> None:
    """They are a stranger's, who would make other fields of the one."""
    message = b"Subject: =?utf-8?q?a=0DSubject:_evil=0D=0D=00b=0Ac=0D=0A=0D=0Ad?=\nFrom: a@example.org\n\nbody\n"
    body = 'if header :matches "subject" "*" { addheader "X-Copy" "${1}"; }'
    octets = edited(sieve, script_text("editheader variables", body), message)
    added = octets.replace(message, b"")
    assert octets == added + message
    assert re.fullmatch(rb"X-Copy: [ -~]+(?:\n [ -~]+)*\n", added), added
    octets = edited(sieve, script_text("editheader", 'addheader "X-Copy" "a\nBcc: evil\n\nbody";'), LETTER)
    added = octets.replace(LETTER.encode(), b"")
    assert re.fullmatch(rb"X-Copy: [ -~]+(?:\n [ -~]+)*\n", added), added


def test_a_field_behind_a_line_without_end(sieve: Sieve) -> None:
    script = script_text("editheader", 'addheader :last "X-New" "v";')
    assert edited(sieve, script, "Subject: x").rstrip(b"\n") == b"Subject: x\nX-New: v"
    assert edited(sieve, script, "Subject: x\n") == b"Subject: x\nX-New: v\n"
    script = script_text("editheader", 'addheader "X-New" "v";')
    assert edited(sieve, script, "Subject: x") == b"X-New: v\nSubject: x"


def test_a_folded_field_has_no_empty_lines(sieve: Sieve) -> None:
    for value in (f"{'a' * 74}{' ' * 60}", f"{'a' * 74}{' ' * 160}b", " " * 200, f"{' ' * 100}a"):
        octets = edited(sieve, script_text("editheader", f'addheader "X-Copy" "{value}";'), LETTER)
        added = octets.replace(LETTER.encode(), b"")
        assert octets == added + LETTER.encode()
        first, *others = added.split(b"\n")[:-1]
        assert first.startswith(b"X-Copy:")
        assert all(line.strip() for line in others), added


def test_an_added_field_is_utf_8(sieve: Sieve) -> None:
    """Even if what it is made of is not."""
    message = b"Subject: gr\xfc\xdfe\n\nbody\n"
    body = 'if header :matches "subject" "*" { addheader "X-Copy" "${1}"; }'
    delivery = measured(sieve, script_text("editheader variables", body), message)
    verify_cheap(delivery)
    [value] = delivery.outcome.message.headers("X-Copy")
    for word in re.findall(r"=\?utf-8\?b\?(.*?)\?=", value, re.IGNORECASE):
        octets = b64decode(word)
        assert octets.decode("utf-8").startswith("gr")
    assert delivery.outcome.message.octets.endswith(message)


def test_an_explicit_keep_of_the_site_and_what_a_user_changes(site: Site) -> None:
    sieve = Sieve(site, before="keep;")
    for last in ("", " keep;"):
        script = script_text("editheader imap4flags", f'addheader "X-New" "v"; addflag "\\\\Flagged";{last}')
        delivery = measured(sieve, script, LETTER)
        verify_cheap(delivery)
        assert delivery.outcome.placed == {"INBOX": r"\Flagged"}
        assert as_received(delivery.outcome.message.octets, b"") == b"X-New: v\n" + LETTER.encode()


LONG_FIELDS = [f"X-Long: {'a' * 200_000}\n", f"X-Fill: {'b' * 250_000}\n", "X-After: here\nSubject: secret\n"]
LONG_HEADER = f"{ENVELOPE}{''.join(LONG_FIELDS)}\nbody\n".encode()


@pytest.mark.parametrize("pieces", [0, 1000, PIECE])
def test_a_field_behind_a_header_that_is_too_long(sieve: Sieve, pieces: int) -> None:
    """It stands between two fields of the message."""
    octets = edited(sieve, script_text("editheader", 'addheader :last "X-New" "v";'), LONG_HEADER, pieces)
    before, added, after = octets.partition(b"X-New: v\n")
    assert added
    assert before + after == LONG_HEADER
    assert before.endswith(b"\n")
    assert re.match(rb"[A-Z][A-Za-z-]*: |\n", after)


@pytest.mark.parametrize("name", ["X-Long", "X-Fill", "X-After"])
@pytest.mark.parametrize("pieces", [0, 1000, PIECE])
def test_a_field_of_a_header_that_is_too_long_goes_or_stays_as_a_whole(sieve: Sieve, pieces: int, name: str) -> None:
    octets = edited(sieve, script_text("editheader", f'deleteheader "{name}";'), LONG_HEADER, pieces)
    without = re.sub(rb"(?m)^%s: .*\n" % name.encode(), b"", LONG_HEADER)
    assert octets in (without, LONG_HEADER)
    assert name != "X-Long" or octets == without


def test_a_long_header_that_is_only_read(sieve: Sieve) -> None:
    """A message in pieces is stored as it came."""
    script = script_text("fileinto", 'if header "to" "jane@example.com" { fileinto "x"; }')
    delivery = measured(sieve, script, LONG_HEADER, PIECE)
    verify_cheap(delivery)
    assert list(delivery.outcome.folders) == ["x"]
    assert as_received(delivery.outcome.message.octets, b"") == LONG_HEADER


# What a user must not do, nor a stranger.


def test_a_user_without_a_script_has_no_scripts_in_the_working_directory(site: Site) -> None:
    """Nor above it, when a script of the site includes one of the user's."""
    sieve = Sieve(site, before=script_text("include", 'include :optional :personal "planted";'))
    directory = site.root / "above" / "working"
    directory.mkdir(parents=True)
    for path in (directory, directory.parent):
        Path(path, "planted.sieve").write_text(script_text("fileinto", 'fileinto "planted";'))
    own = {name: value for name, value in site.options.items() if name not in ("cyrus_user", "sieve_script")}
    sieve.config = config_of(**own)
    sieve.agent = DeliveryAgent(sieve.config)

    def deliver() -> Measured:
        os.chdir(directory)
        return Measured(sieve.deliver(LETTER), 0, 0)

    outcome = in_child(deliver).outcome
    assert outcome.reply == "250 2.1.5"
    assert list(outcome.folders) == ["INBOX"]
    assert as_received(outcome.message.octets, b"") == LETTER.encode()


def test_a_stranger_cannot_forge_lines_for_a_user(sieve: Sieve) -> None:
    message = "X: =?utf-8?q?a=0D=0AMon,_active.sieve:1:_forged=1B[31m=E2=80=AE=C2=85=E2=80=A8z?=\n\nbody\n"
    body = 'if header :matches "x" "*" { error "${1}"; }'
    outcome = attack(sieve, script_text("variables ihave", body), message)
    assert outcome.errors
    log = (sieve.folder / "active.log").read_text()
    assert len(log.splitlines()) == 1
    assert log[:-1].isprintable()
    assert log.endswith("\n")
