"""Sieve scripts and messages made at random, of words that meet often enough to matter.

Left out is what Pigeonhole is known to do wrong, and what the two do differently on purpose: each has a case of its own
in sieve_cases_*.
"""

from __future__ import annotations

import base64
import quopri

from hypothesis import strategies as st
from sieve_cases import Case, require

CAPABILITIES = (
    *("fileinto", "copy", "mailbox", "imap4flags", "variables", "relational", "comparator-i;ascii-numeric", "envelope"),
    *("subaddress", "body", "editheader", "index"),
)
WORDS = ("a", "A", "b", "ab", "aB", "abc", "1", "10", "9", "007", "x y", "a-b", "€", "日本")
PLAIN_WORDS = tuple(word for word in WORDS if word.isascii())
FLAGS = ("a", "b", "$Junk", r"\\Seen", r"\\flagged", "d e", "C")
FIELDS = ("subject", "x-a", "X-B", "x-none")
# Of these a question mark is one octet, too.
PLAIN_FIELDS = ("x-plain", "X-Number")
ADDRESS_FIELDS = ("from", "to", "Cc")
LOCAL_PARTS = ("a", "ab", "a+b", "A", "x-1")
DOMAINS = ("a.b", "b", "example.org", "A.B")
VARIABLES = ("v", "w", "long_name1")
MODIFIERS = (":lower", ":upper", ":lowerfirst", ":upperfirst", ":quotewildcard", ":length")


def quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def strings(elements: st.SearchStrategy[str], unique: bool = False) -> st.SearchStrategy[str]:
    """A string or a list of them; the elements are quoted already."""
    several = st.lists(elements, min_size=1, max_size=3, unique=unique).map(lambda found: f"[{', '.join(found)}]")
    return elements | several


def spaced(*parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.tuples(*parts).map(lambda found: " ".join(filter(None, found)))


def optional(*choices: str) -> st.SearchStrategy[str]:
    return st.sampled_from(("", *choices))


WORD = st.sampled_from(WORDS).map(quoted)
REFERENCE = st.sampled_from([f"${{{name}}}" for name in (*VARIABLES, "0", "1", "2", "unknown")])
# Text with variables in it; what it comes to may be anything.
TEXT = st.lists(st.sampled_from(WORDS) | REFERENCE, min_size=1, max_size=3).map(lambda found: quoted("".join(found)))
PATTERN = st.lists(st.sampled_from((*PLAIN_WORDS, "*", "-", "\\*")), min_size=1, max_size=5).map(
    lambda found: quoted("".join(found))
)
PLAIN_PATTERN = st.lists(st.sampled_from((*PLAIN_WORDS, "?", "\\?", "-")), min_size=1, max_size=4).map(
    lambda found: quoted("".join(found))
)
TEXT_COMPARATORS = (':comparator "i;octet"', ':comparator "i;ascii-casemap"')
NUMERIC = ':comparator "i;ascii-numeric"'
OPERATOR = st.sampled_from(("gt", "ge", "lt", "le", "eq", "ne")).map(quoted)
# To Pigeonhole an empty value is not the infinity that other text is: keys are numbers.
NUMBER = st.sampled_from(("0", "1", "2", "3", "10", "007", "9 x")).map(quoted)


def compared(
    name: str, values: st.SearchStrategy[str], keys: st.SearchStrategy[str], pattern: st.SearchStrategy[str] = PATTERN
) -> st.SearchStrategy[str]:
    """A test of that name with every match type. The comparator is always said: Pigeonhole's default may be another."""
    start, comparator = st.just(name), st.sampled_from(TEXT_COMPARATORS)
    return st.one_of(
        spaced(start, optional(":is", ":contains"), comparator, values, strings(keys)),
        spaced(start, st.just(":matches"), comparator, values, strings(pattern)),
        spaced(start, st.just(":is"), st.just(NUMERIC), values, strings(NUMBER)),
        spaced(start, st.just(":value"), OPERATOR, st.just(NUMERIC), values, strings(NUMBER)),
        spaced(start, st.just(":value"), OPERATOR, comparator, values, strings(keys)),
        spaced(start, st.just(":count"), OPERATOR, st.just(NUMERIC), values, strings(NUMBER)),
    )


def of_fields(names: tuple[str, ...]) -> st.SearchStrategy[str]:
    # With an index, Pigeonhole counts a field twice that is named twice.
    return strings(st.sampled_from(names).map(quoted), unique=True)


ADDRESS = st.tuples(st.sampled_from(LOCAL_PARTS), st.sampled_from(DOMAINS)).map("@".join)
ADDRESS_KEY = st.one_of(ADDRESS, st.sampled_from(LOCAL_PARTS), st.sampled_from(DOMAINS)).map(quoted)
ADDRESS_PART = optional(":all", ":localpart", ":domain", ":user", ":detail")
ADDRESS_PATTERN = st.sampled_from(("*", "a*", "*b", "*@*", "*+*", "a?", "*.?", "*example*")).map(quoted)
ONE_TEST: st.SearchStrategy[str] = st.one_of(
    compared("header", of_fields(FIELDS), WORD | TEXT),
    compared("header", of_fields(PLAIN_FIELDS), WORD | TEXT, PLAIN_PATTERN),
    ADDRESS_PART.flatmap(
        lambda part: compared(f"address {part}", of_fields(ADDRESS_FIELDS), ADDRESS_KEY, ADDRESS_PATTERN)
    ),
    ADDRESS_PART.flatmap(lambda part: compared(f"envelope {part}", st.just('"from"'), ADDRESS_KEY, ADDRESS_PATTERN)),
    compared("string", strings(TEXT), WORD | TEXT),
    strings(st.sampled_from((*FIELDS, *ADDRESS_FIELDS)).map(quoted)).map("exists {}".format),
    st.sampled_from(("size :over 1M", "size :over 3K", "size :under 3K", "size :under 1M")),
    spaced(
        st.just("hasflag"), optional(":is", ":contains"), strings(st.sampled_from(("a", "b", "$Junk", "c")).map(quoted))
    ),
    spaced(
        st.just("body"),
        optional(":raw", ":text", ':content "text"', ':content ["text/html", "application"]', ':content ""'),
        st.just(":contains"),
        strings(st.sampled_from(("word", "WORD", "grün", "markup", "b2N0", "octets", "--b1", "nothing")).map(quoted)),
    ),
    st.integers(1, 3)
    .flatmap(lambda index: compared(f"header :index {index}", of_fields(FIELDS), WORD))
    .filter(
        # Counted among the fields of an index Pigeonhole is wrong.
        lambda test: ":count" not in test
    ),
)


@st.composite
def simple_tests(draw: st.DrawFn) -> str:
    """One of these. As a function: a strategy is shown with everything that it is made of."""
    return draw(ONE_TEST)


TESTS = st.recursive(
    simple_tests(),
    lambda inner: st.one_of(
        inner.map("not {}".format),
        spaced(
            st.sampled_from(("allof", "anyof")),
            st.lists(inner, min_size=1, max_size=3).map(lambda found: f"({', '.join(found)})"),
        ),
    ),
    max_leaves=4,
)


@st.composite
def tests(draw: st.DrawFn) -> str:
    return draw(TESTS)


def modified(modifiers: list[str]) -> bool:
    """Whether these may stand together: two that change the same letters may not."""
    return not ({":lower", ":upper"} <= set(modifiers) or {":lowerfirst", ":upperfirst"} <= set(modifiers))


# Pigeonhole forgets what follows a flag that is there already.
FLAG_LIST = st.lists(st.sampled_from(FLAGS), min_size=1, max_size=3, unique=True).map(
    lambda found: "[" + ", ".join(f'"{flag}"' for flag in found) + "]"
)
ONE_COMMAND = st.one_of(
    spaced(
        st.just("set"),
        st.lists(st.sampled_from(MODIFIERS), unique=True, max_size=3).filter(modified).map(" ".join),
        st.sampled_from(VARIABLES).map(quoted),
        TEXT,
        # A variable that is set to itself loses its value with Pigeonhole.
    ).filter(lambda command: command.split('"')[3] != f"${{{command.split(chr(34))[1]}}}"),
    spaced(st.sampled_from(("setflag", "addflag", "removeflag")), FLAG_LIST),
    # A folder with a copy is no other's: the second of two actions on it would be wrong with Pigeonhole.
    spaced(st.just("fileinto"), optional(":create"), st.sampled_from(('"f1"', '"f2"', '"f1/f3"'))),
    spaced(st.just("fileinto :copy"), st.sampled_from(('"c1"', '"c2"'))),
    spaced(st.just("fileinto :flags"), FLAG_LIST, st.just('"f4"')),
    st.sampled_from(("keep", "discard", "stop", "keep", 'fileinto "f1"')),
    spaced(st.just("keep :flags"), FLAG_LIST),
).map("{};".format)


@st.composite
def commands(draw: st.DrawFn) -> str:
    return draw(ONE_COMMAND)


def blocks(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """An if with what follows it, around these commands."""
    block = st.lists(inner, max_size=3).map(lambda found: "{ " + " ".join(found) + " }")
    return st.tuples(
        tests().map("if {}".format),
        block,
        st.lists(st.tuples(tests(), block), max_size=2).map(
            lambda more: " ".join(f"elsif {test} {then}" for test, then in more)
        ),
        st.none() | block,
    ).map(lambda found: " ".join((*found[:3], "" if found[3] is None else f"else {found[3]}")))


# What the variables have become can be read in the message.
RESULTS = "".join(f'addheader :last "X-Result" "{name}=${{{name}}}.";\n' for name in (*VARIABLES, "1"))
RESULTS += 'fileinto :copy "result";\n'
SCRIPT = st.lists(st.recursive(commands(), blocks, max_leaves=8), min_size=1, max_size=6).map(
    lambda found: require(*CAPABILITIES) + "\n".join(found) + "\n" + RESULTS
)


@st.composite
def values(draw: st.DrawFn, words: tuple[str, ...] = WORDS) -> str:
    """The value of a field: words, some of them encoded, some on a line of their own."""
    parts = []
    for word in draw(st.lists(st.sampled_from(words), max_size=4)):
        form = draw(st.sampled_from(("plain", "plain", "q", "b", "folded")))
        if form == "q" or (form != "b" and not word.isascii()):
            parts.append("=?utf-8?q?" + quopri.encodestring(word.encode(), header=True).decode() + "?=")
        elif form == "b":
            parts.append("=?UTF-8?B?" + base64.b64encode(word.encode()).decode() + "?=")
        else:
            parts.append("\n " + word if form == "folded" and parts else word)
    return " ".join(parts)


@st.composite
def mailboxes(draw: st.DrawFn) -> str:
    address = draw(ADDRESS)
    return draw(
        st.sampled_from(("{}", "<{}>", "A B <{}>", '"a, b" <{}>', "{} (a comment)", "=?utf-8?q?a=2Cb?= <{}>"))
    ).format(address)


@st.composite
def address_lists(draw: st.DrawFn) -> str:
    found = draw(st.lists(mailboxes(), min_size=1, max_size=3))
    glue = draw(st.sampled_from((", ", ",\n ", ",")))
    form = draw(st.sampled_from(("{}", "{}", "friends: {};")))
    return form.format(glue.join(found))


PARTS = (
    "\n\na word\n",
    "Content-Type: text/plain; charset=iso-8859-1\nContent-Transfer-Encoding: quoted-printable\n\ngr=FCn\n",
    "Content-Type: text/html\n\n<p>the <b>word</b> in markup</p>\n",
    "Content-Type: application/octet-stream\nContent-Transfer-Encoding: base64\n\nb2N0ZXRz\n",
    "Content-Type: message/rfc822\n\nSubject: a word\n\nanother word\n",
)


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    header = ["X-First: 1\n"]  # Pigeonhole dies of a header that is empty
    for name in draw(st.lists(st.sampled_from((*FIELDS[:3], *PLAIN_FIELDS, *ADDRESS_FIELDS)), max_size=8)):
        if name in ADDRESS_FIELDS:
            header.append(f"{name}: {draw(address_lists())}\n")
        else:
            header.append(f"{name}: {draw(values(PLAIN_WORDS if name in PLAIN_FIELDS else WORDS))}\n")
    body = draw(st.sampled_from(("\nbody\n", "\n", "\na word\n" + "x\n" * 3000, "")))
    if not body:
        header.append('MIME-Version: 1.0\nContent-Type: multipart/mixed; boundary="b1"\n')
        parts = draw(st.lists(st.sampled_from(PARTS), max_size=3))
        body = "\n" + "".join(f"--b1\n{part}" for part in parts) + "--b1--\n"
    return ("".join(header) + body).encode()


@st.composite
def cases(draw: st.DrawFn) -> Case:
    return Case("generated", draw(SCRIPT), draw(messages()), draw(st.one_of(ADDRESS, st.just(""))))
