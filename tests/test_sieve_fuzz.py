"""Scripts and messages, mutated: whatever they are, the message is stored, or thrown away by the script's own will.

It goes on for so many seconds: tests/run --fuzz-seconds 600 -k test_sieve_fuzz
"""

from __future__ import annotations

import re
import time

import pytest
from harness import Site
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sieve import LETTER, Outcome, Sieve, octets_of, script_text, seconds_of_cpu
from test_fuzz import MUTATIONS, mutated
from test_sieve_language import CAPABILITIES, MARK, RIGHT, WRONG, marked
from test_sieve_rfc import EXAMPLES, HTML, IMPORTANT, NESTED, SPAM, TESTS, VALUES, VIRUS

LIMIT = 2.0  # seconds of CPU time for a message
TROUBLE = {"internal-error", "traceback", "delivery-failed"}
TOKEN = re.compile(
    rb'text:[^\n]*\n(?:.*?\n)?\.\r?\n|"(?:[^"\\]|\\.)*"|/\*.*?\*/|#[^\n]*\n|:?[A-Za-z_][A-Za-z0-9_]*|[0-9]+[KMG]?|\s+|.',
    re.DOTALL,
)
REQUIRE = re.compile(rb'require\s+(?:\[[^\]]*\]|"[^"]*")\s*;', re.IGNORECASE)
REQUIRE_ALL = octets_of(
    script_text(
        "fileinto envelope encoded-character variables relational comparator-i;ascii-numeric subaddress copy "
        "imap4flags "
        "body date index environment include ihave mailbox special-use duplicate mime foreverypart extracttext "
        "editheader spamtestplus virustest regex comparator-i;unicode-casemap",
        "",
    )
)
SCRIPTS = [
    *(octets_of(each.script) for each in EXAMPLES),
    *(octets_of(other) for each in EXAMPLES for other in each.others.values()),
    *(octets_of(script_text(requires, f"if {test} {{ discard; }}")) for _, requires, test, _, _ in TESTS),
    *(octets_of(script_text(f"fileinto {row[1]}", f'{row[2]} fileinto "{row[3]}";')) for row in VALUES),
    *map(octets_of, RIGHT),
    *(marked(script_text(f"{others} {capability}", script))[0] for capability, others, script in CAPABILITIES),
]
WRONG_SCRIPTS = [marked(script_text(requires, script))[0] for requires, script, _ in WRONG]
TOKENS = sorted({token for script in (*SCRIPTS, *WRONG_SCRIPTS) for token in TOKEN.findall(script)})


def kind_of(token: bytes) -> bytes:
    """What a token may be replaced with so that the script may still be one."""
    first = token[:1]
    if first == b":":
        return b":"
    if first.isalpha() or first == b"_":
        return b"text" if token.lower().startswith(b"text:") else b"word"
    return b"number" if first.isdigit() else b" " if first.isspace() or token[:2] == b"/*" else first


ALIKE: dict[bytes, list[bytes]] = {}
for token in TOKENS:
    ALIKE.setdefault(kind_of(token), []).append(token)
MESSAGES = [
    *(octets_of(case.message) for each in EXAMPLES for case in each.cases if len(case.message) < 10_000),
    *(octets_of(message) for _, _, _, message, _ in TESTS),
    *map(octets_of, (LETTER, HTML, IMPORTANT, NESTED, "", "\n", "no header\n", "Subject: a\n\n--b\n--b--\n")),
]

NO_CHANGES: list[tuple[str, int, int, bytes]] = []
TOKEN_CHANGES = st.just(NO_CHANGES) | st.lists(
    st.tuples(
        st.sampled_from(["alike"] * 10 + ["delete", "repeat", "swap", "insert", "replace", "wrap", "move"]),
        st.integers(0, 5000),
        st.integers(0, 5000),
        st.sampled_from(TOKENS),
    ),
    max_size=4,
)
OCTET_CHANGES = st.one_of(st.just(NO_CHANGES), MUTATIONS)


def changed(script: bytes, changes: list[tuple[str, int, int, bytes]]) -> bytes:
    """The script with these changes of its tokens."""
    tokens = TOKEN.findall(script)
    for kind, first, second, token in changes:
        if not tokens:
            break
        here, there = first % len(tokens), second % len(tokens)
        if kind == "alike":
            others = ALIKE[kind_of(tokens[here])]
            tokens[here] = others[second % len(others)]
        elif kind == "delete":
            del tokens[here]
        elif kind == "repeat":
            tokens[here:here] = tokens[here : here + second % 20]
        elif kind == "swap":
            tokens[here], tokens[there] = tokens[there], tokens[here]
        elif kind == "insert":
            tokens[here:here] = [b" ", token, b" "]
        elif kind == "replace":
            tokens[here] = token
        elif kind == "wrap":
            tokens[here:here] = [b"if true {"] * (second % 40)
            tokens += [b"}"] * (second % 40)
        else:
            tokens[there:there] = tokens[min(here, there) : here]
    return b"".join(tokens)


def joined(scripts: list[bytes]) -> bytes:
    """A script with what all of these do. One alone remains as it is, so that it may miss a capability."""
    if len(scripts) == 1:
        return scripts[0]
    return REQUIRE_ALL + b"\n".join(REQUIRE.sub(b"", script) for script in scripts)


SCRIPT = st.builds(
    lambda scripts, changes, octets: mutated(changed(joined(scripts), changes), octets),
    st.lists(st.sampled_from(SCRIPTS), min_size=1, max_size=4) | st.sampled_from(WRONG_SCRIPTS).map(lambda one: [one]),
    TOKEN_CHANGES,
    st.just(NO_CHANGES) | OCTET_CHANGES,
)
MESSAGE = st.builds(
    lambda message, octets: mutated(message, octets).replace(b"\0", b""), st.sampled_from(MESSAGES), OCTET_CHANGES
)


def verify(outcome: Outcome) -> None:
    """Fails if the message is neither stored nor discarded, or something went wrong that is not the script's fault."""
    assert not {event.name for event in outcome.events} & TROUBLE, outcome.events
    assert outcome.reply == "250 2.1.5"
    assert outcome.folders or outcome.is_discarded
    if outcome.errors:
        assert outcome.placed == {"INBOX": ""}


def sieve_of(site: Site) -> Sieve:
    """A user with the scripts that the examples include."""
    sieve = Sieve(site, **SPAM, **VIRUS, **{"xlist-junk": "Junk"})
    for each in EXAMPLES:
        for name, script in each.others.items():
            if name.startswith("/"):
                sieve.write_global(name[1:], script)
            else:
                sieve.write(name, script)
    return sieve


def test_no_mark_is_left() -> None:
    assert not any(octets_of(MARK) in script for script in (*SCRIPTS, *WRONG_SCRIPTS))


def test_every_script_with_a_few_messages(site: Site) -> None:
    """Unchanged; so, the mutations begin with what works."""
    sieve = sieve_of(site)
    for number, script in enumerate((*SCRIPTS, *WRONG_SCRIPTS)):
        verify(sieve.run(script, MESSAGES[number * 7 % len(MESSAGES)]))
        sieve.clear()


def test_mutated_scripts(site: Site, pytestconfig: pytest.Config) -> None:
    seconds: float = pytestconfig.getoption("fuzz_seconds")
    sieve = sieve_of(site)
    runs = errors = 0

    @settings(max_examples=2000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(SCRIPT, SCRIPT, MESSAGE, st.sampled_from(["sender@example.org", "", "owner-list@example.org"]))
    def run(script: bytes, included: bytes, message: bytes, sender: str) -> None:
        nonlocal runs, errors
        if time.monotonic() > end:
            return
        before = seconds_of_cpu()
        outcome = sieve.run(script, message, sender, "detail", one=included)
        assert seconds_of_cpu() - before < LIMIT
        verify(outcome)
        runs += 1
        errors += bool(outcome.errors)
        sieve.clear()

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        run()
    print(f"{runs} scripts, {errors} of them with an error, in {seconds:.0f} s")
    assert runs > seconds
    assert 0 < errors < runs
