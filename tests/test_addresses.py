"""Which addresses are understood, whose mailbox they mean, and that none of them leads out of the store."""

from __future__ import annotations

import re
import string
import unicodedata
from contextlib import nullcontext, suppress
from functools import cache
from typing import NoReturn
from unittest import mock

import pytest
from harness import config_of
from hypothesis import given, settings
from hypothesis import strategies as st

import lmtpd
from lmtpd import Address, Config, MaildirStore, Recipient, UserUnknown, parse_parameters, parse_path, recipients_of


def parsed(argument: str) -> tuple[str, str] | None:
    """Local-part and domain of a path that nothing follows."""
    address, rest = parse_path(argument)
    assert rest == ""
    return (address.local, address.domain) if address else None


# ----------------------------------------------------------------------
# The syntax of paths, RFC 5321 section 4.1.2
# ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("<>", None),
        ("<jane@example.com>", ("jane", "example.com")),
        ("<jane>", ("jane", "")),
        ("<postmaster>", ("postmaster", "")),
        ("<Jane@EXAMPLE.Com>", ("Jane", "EXAMPLE.Com")),
        ("<a@b>", ("a", "b")),
        ("<jane+folder@example.com>", ("jane+folder", "example.com")),
        ("<!#$%&'*+-/=?^_`{|}~@example.com>", ("!#$%&'*+-/=?^_`{|}~", "example.com")),
        ("<j.a.n.e@x.y.z>", ("j.a.n.e", "x.y.z")),
        ("<a..b@example.com>", ("a..b", "example.com")),  # no dot-string, but in use
        ("<.a.@example.com>", (".a.", "example.com")),
        ("<jane@my_host.example>", ("jane", "my_host.example")),
        ("<jane@1.2.3.4>", ("jane", "1.2.3.4")),
        ("<jane@xn--bcher-kva.example>", ("jane", "xn--bcher-kva.example")),
        # quoted strings and quoted pairs
        ('<"jane"@example.com>', ("jane", "example.com")),
        ('<"jane doe"@example.com>', ("jane doe", "example.com")),
        ('<"a@b"@example.com>', ("a@b", "example.com")),
        ('<"<>"@example.com>', ("<>", "example.com")),
        (r'<"a\"b"@example.com>', ('a"b', "example.com")),
        (r'<"a\\"@example.com>', ("a\\", "example.com")),
        (r'<"\j\a"@example.com>', ("ja", "example.com")),
        ('<" "@example.com>', (" ", "example.com")),
        ('<"jane doe">', ("jane doe", "")),
        # address literals
        ("<jane@[192.0.2.1]>", ("jane", "[192.0.2.1]")),
        ("<jane@[IPv6:2001:db8::1]>", ("jane", "[IPv6:2001:db8::1]")),
        # what breaks the rules, and is in use
        ("<jane@example.com.>", ("jane", "example.com.")),
        ("<jane@Example..COM>", ("jane", "Example..COM")),
        ("<jane@.>", ("jane", ".")),
        ("<jane@>", ("jane", "")),
        ("<#@[]>", ("#", "[]")),
        ("<jane+Some Folder@example.com>", ("jane+Some Folder", "example.com")),
        ("<jane+Some Folder>", ("jane+Some Folder", "")),
        ("<a\\b@example.com>", ("ab", "example.com")),
        ("<a\\@b\\ c\\>\\\\@example.com>", ("a@b c>\\", "example.com")),
        # source routes are dropped
        ("<@:jane@b>", ("jane", "b")),
        ("<@a.example:jane@example.com>", ("jane", "example.com")),
        ("<@a.example,@b.example:jane@example.com>", ("jane", "example.com")),
        ('<@a.example:"x:y"@example.com>', ("x:y", "example.com")),
        # beyond ASCII, RFC 6531
        ("<müller@bücher.example>", ("müller", "bücher.example")),
        ("<用户@例子.广告>", ("用户", "例子.广告")),
        ('<"δοκιμή \\"x"@παράδειγμα.example>', ('δοκιμή "x', "παράδειγμα.example")),
    ],
)
def test_a_good_path(path: str, expected: tuple[str, str] | None) -> None:
    assert parsed(path) == expected


@pytest.mark.parametrize(
    "path",
    [
        *("", " ", "<", ">", "< >", "<<>>", "<<jane@example.com>>", " <jane@example.com>"),
        *("jane@example.com", "<jane@example.com", "jane@example.com>", "Jane <jane@example.com>"),
        *("<@>", "<@example.com>", "<jane@@example.com>", "<jane@a@b>"),
        *("<jane @example.com>", "<jane@example com>", "< jane@example.com>", "<jane@example.com >", "< @a>"),
        *("<jane,joe@example.com>", "<a(b)@example.com>", "<a:b@example.com>", "<a;b@example.com>"),
        *("<a[b]@example.com>", '<a"b"@example.com>', "<a\\", "<a\\>", "<jane@a\\b>"),
        *("<jane@example,com>", "<jane@a/b>", "<jane@a%b>", "<jane@[1.2.3.4>", "<jane@1.2.3.4]>", "<jane@[]x>"),
        *("<jane@[1.2.3.4]x>", "<jane@[[1.2.3.4]]>", "<jane@[1.2 .3.4]>", "<jane@[ü]>", "<jane@x[1.2.3.4]>"),
        *(
            '<">',
            '<"jane>',
            '<"jane@example.com>',
            '<"jane\\">',
            '<"jane\\',
            '<"a"b@example.com>',
            '<"a""b"@example.com>',
        ),
        *("<@a.example>", "<@a.example:>", "<@a.example jane@b>", "<@a,:jane@b>", "<@a,b:jane@c>"),
        *("<@a,@b>", "<@a:@b:jane@c>", "<@a@b:jane@c>", "<a.example:jane@b>"),
        *("<jane@example.com>x", "<jane@example.com>SIZE=1", "<>x", "<jane@example.com>\tSIZE=1", "<>>"),
        *("<ja\0ne@example.com>", "<jane\r@example.com>", "<jane\n@example.com>", "<jane@example\x7f.com>"),
        *("<ja\u200bne@example.com>", "<ja\u2028ne@example.com>", "<jane@b\u0085.example>", "<\ud800@example.com>"),
        f"<{'a' * 889}@example.com>",
        f"<jane@{'a.' * 450}com>",
    ],
)
def test_a_bad_path(path: str) -> None:
    with pytest.raises(ValueError, match=r"^(the|a) "):  # a text for the client
        parse_path(path)


@pytest.mark.parametrize("size", [64, 255, 887, 888])
def test_a_long_path_is_taken_up_to_the_limit(size: int) -> None:
    assert parsed(f"<{'a' * size}@example.com>") == ("a" * size, "example.com")


@pytest.mark.parametrize("rest", ["", " ", " SIZE=1", " SIZE=1 BODY=8BITMIME", "  X=<>"])
def test_what_follows_a_path_is_given_back(rest: str) -> None:
    for path in ("<>", "<jane@example.com>", '<"a> b"@example.com>'):
        assert parse_path(path + rest)[1] == rest


@pytest.mark.parametrize(
    ("local", "domain", "text"),
    [
        ("jane", "example.com", "jane@example.com"),
        ("jane", "", "jane"),
        ("jane doe", "example.com", '"jane doe"@example.com'),
        ("a@b", "", '"a@b"'),
        ('"\\', "x", r'"\"\\"@x'),
        ("jürgen", "bücher.example", "jürgen@bücher.example"),
    ],
)
def test_an_address_is_quoted_only_where_it_must_be(local: str, domain: str, text: str) -> None:
    assert str(Address(local, domain)) == text


ATEXT = string.ascii_letters + string.digits + "!#$%&'*+-/=?^_`{|}~"
BEYOND_ASCII = st.characters(min_codepoint=0xA1, categories=["L", "N", "S", "P"])
LABELS = st.text(st.sampled_from(string.ascii_letters + string.digits + "-") | BEYOND_ASCII, min_size=1, max_size=5)
HOSTS = st.lists(LABELS, min_size=1, max_size=4).map(".".join)
LITERALS = st.one_of(
    st.ip_addresses(v=4).map(lambda address: f"[{address}]"),
    st.ip_addresses(v=6).map(lambda address: f"[IPv6:{address}]"),
)
BARE = st.text(st.sampled_from(ATEXT + ".") | BEYOND_ASCII, min_size=1, max_size=12).map(lambda local: (local, local))


@st.composite
def quoted(draw: st.DrawFn) -> tuple[str, str]:
    """A quoted string as it is written, and what it means."""
    local = draw(st.text(st.sampled_from(string.printable[:95]) | BEYOND_ASCII, min_size=1, max_size=12))
    pairs = (f"\\{c}" if c in '\\"' or draw(st.integers(0, 4)) == 0 else c for c in local)
    return f'"{"".join(pairs)}"', local


@settings(max_examples=300)
@given(
    BARE | quoted(), st.just("") | HOSTS | LITERALS, st.lists(HOSTS, max_size=3), st.sampled_from(["", " X", " A=<b>"])
)
def test_every_valid_path_is_understood_and_can_be_written_again(
    local: tuple[str, str], domain: str, route: list[str], rest: str
) -> None:
    written, meant = local
    hops = ",".join(f"@{host}" for host in route) + ":" if route else ""
    address, given_back = parse_path(f"<{hops}{written}{'@' if domain else ''}{domain}>{rest}")
    assert address is not None
    assert address.local == meant
    assert address.domain == domain
    assert given_back == rest
    assert parsed(f"<{address}>") == (address.local, address.domain)


@settings(max_examples=500)
@given(st.text(st.sampled_from('<>@".\\[]:, ab+/%é\0\r\n\x7f') | st.characters(), max_size=20), st.booleans())
def test_a_path_is_understood_or_refused_and_nothing_else(text: str, in_brackets: bool) -> None:
    outcome: object = None
    try:
        address, rest = parse_path(f"<{text}>" if in_brackets else text)
        if address:
            outcome = parse_path(f"<{address}>{rest}")[1] == rest
        else:
            outcome = text.startswith("<>" if not in_brackets else "")
    except ValueError as error:
        outcome = str(error)
    assert outcome


# ----------------------------------------------------------------------
# Parameters
# ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("   ", {}),
        (" SIZE=1", {"SIZE": "1"}),
        (" size=1  body=8BitMime ", {"SIZE": "1", "BODY": "8BitMime"}),
        (" SMTPUTF8", {"SMTPUTF8": None}),
        (" X-1=<a+b/c>", {"X-1": "<a+b/c>"}),
    ],
)
def test_parameters(text: str, expected: dict[str, str | None]) -> None:
    assert parse_parameters(text) == expected


@pytest.mark.parametrize("text", [" SIZE=", " =1", " =", " A=B=C", " SIZE=1 size=2", " X X", " X_Y=1", " Ü=1", " A==B"])
def test_bad_parameters(text: str) -> None:
    with pytest.raises(ValueError, match=r"malformed parameter|is given twice"):
        parse_parameters(text)


KEYWORDS = st.text(string.ascii_letters + string.digits + "-", min_size=1, max_size=6)
PARAMETER_VALUES = st.text(
    st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="="), min_size=1, max_size=8
)


@given(st.lists(st.tuples(KEYWORDS, st.none() | PARAMETER_VALUES), unique_by=lambda pair: pair[0].upper(), max_size=5))
def test_every_valid_parameter_is_understood(pairs: list[tuple[str, str | None]]) -> None:
    text = "".join(f" {keyword}" if value is None else f" {keyword}={value}" for keyword, value in pairs)
    assert parse_parameters(text) == {keyword.upper(): value for keyword, value in pairs}


@given(st.text(st.sampled_from(" =AaBß-\t") | st.characters(), max_size=12))
def test_parameters_are_understood_or_refused_and_nothing_else(text: str) -> None:
    outcome: object = None
    try:
        outcome = all(re.fullmatch("[A-Z0-9-]+", keyword) for keyword in parse_parameters(text))
    except ValueError as error:
        outcome = str(error)
    assert outcome


# ----------------------------------------------------------------------
# Whom an address means here
# ----------------------------------------------------------------------


IN_BOTH_SPELLINGS = ["münchen.example", "xn--mnchen-3ya.example"]


@cache
def cached_config(options: tuple[tuple[str, str], ...]) -> Config:
    return config_of(**dict(options))


def recipient(path: str, **options: str) -> Recipient:
    address, _ = parse_path(path)
    assert address
    return recipients_of(address, cached_config(tuple(options.items())))[-1]


@pytest.mark.parametrize(
    ("path", "options", "userid", "detail"),
    [
        ("<jane@example.com>", {}, "jane", ""),
        ("<jane>", {}, "jane", ""),
        ("<jane@[192.0.2.1]>", {}, "jane", ""),
        ("<JANE@example.com>", {}, "jane", ""),
        ("<JANE@example.com>", {"lmtp_downcase_rcpt": "no"}, "JANE", ""),
        ("<JÜRGEN@example.com>", {}, "jürgen", ""),
        ("<Jane+Some.Folder@example.com>", {}, "jane", "Some.Folder"),
        ("<Jane+Some+More@example.com>", {"lmtp_downcase_rcpt": "no"}, "Jane", "Some+More"),
        ("<jane+@example.com>", {}, "jane", ""),
        ("<+shared.folder@example.com>", {}, "", "shared.folder"),
        ('<"jane+My Folder"@example.com>', {}, "jane", "My Folder"),
        ("<jane@example.com>", {"virtdomains": "userid"}, "jane@example.com", ""),
        ("<jane@Example.COM>", {"virtdomains": "on"}, "jane@example.com", ""),
        ("<jane>", {"virtdomains": "on"}, "jane", ""),
        ("<Jane+Box@Example.COM>", {"virtdomains": "userid"}, "jane@example.com", "Box"),
        ("<jane@[192.0.2.1]>", {"virtdomains": "userid"}, "jane@[192.0.2.1]", ""),
        ("<jane@example.com>", {"virtdomains": "userid", "defaultdomain": "Example.com"}, "jane", ""),
        ("<jane@EXAMPLE.com>", {"virtdomains": "userid", "defaultdomain": "example.com"}, "jane", ""),
        ("<jane@sub.example.com>", {"virtdomains": "on", "defaultdomain": "example.com"}, "jane@sub.example.com", ""),
        ("<jane@other.example>", {"virtdomains": "off", "defaultdomain": "example.com"}, "jane", ""),
        ("<PostMaster>", {}, "postmaster", ""),
        ("<POSTMASTER>", {"lmtp_downcase_rcpt": "no"}, "postmaster", ""),
        ("<Postmaster@example.com>", {"lmtp_downcase_rcpt": "no", "virtdomains": "on"}, "postmaster@example.com", ""),
        ("<Postmaster+Box@example.com>", {"lmtp_downcase_rcpt": "no"}, "postmaster", "Box"),
        ("<jane@example.com.>", {}, "jane", ""),
        ("<jane@example..com>", {}, "jane", ""),
        ("<jane@Example.com.>", {"virtdomains": "on"}, "jane@example.com", ""),
        ("<jane@example.com.>", {"virtdomains": "on", "defaultdomain": "example.com"}, "jane", ""),
        ("<jane@München.example>", {"virtdomains": "on"}, "jane@xn--mnchen-3ya.example", ""),
        ("<jane@xn--mnchen-3ya.example>", {"virtdomains": "on", "defaultdomain": "MÜNCHEN.example"}, "jane", ""),
        ("<jane@mu\u0308nchen.example>", {"virtdomains": "on", "defaultdomain": "xn--mnchen-3ya.example"}, "jane", ""),
        ("<jane@☃_.example>", {"virtdomains": "on"}, "jane@☃_.example", ""),
        ("<ju\u0308rgen+Bu\u0308cher@x>", {}, "jürgen", "Bücher"),
    ],
)
def test_whom_a_recipient_means(path: str, options: dict[str, str], userid: str, detail: str) -> None:
    meant = recipient(path, **options)
    assert (meant.userid, meant.detail) == (userid, detail)


@pytest.mark.parametrize(
    ("path", "options", "expected"),
    [
        ("<mary-ann>", {}, ["mary-ann/"]),
        ("<mary-ann+x>", {}, ["mary-ann+x/", "mary-ann/x"]),
        ("<mary-ann_x>", {"recipient_delimiter": "+-_"}, ["mary-ann_x/", "mary-ann/x", "mary/ann_x"]),
        ("<-a->", {"recipient_delimiter": "-"}, ["-a-/", "-a/", "/a-"]),
        (
            "<a+b@münchen.example>",
            {"virtdomains": "on"},
            [f"{user}@{domain}/{detail}" for user, detail in (("a+b", ""), ("a", "b")) for domain in IN_BOTH_SPELLINGS],
        ),
    ],
)
def test_the_ways_to_divide_an_address(path: str, options: dict[str, str], expected: list[str]) -> None:
    address, _ = parse_path(path)
    assert address
    ways = recipients_of(address, cached_config(tuple(options.items())))
    assert [f"{way.userid}/{way.detail}" for way in ways] == expected


def test_few_of_many_ways_to_divide_an_address_are_tried() -> None:
    ways = recipients_of(Address("+".join("abcdefghijklmnopqrstuvwxyz"), ""), cached_config(()))
    assert [way.user for way in ways][:2] == ["+".join("abcdefghijklmnopqrstuvwxyz"), "a+b+c+d+e+f+g+h+i"]
    assert [way.user for way in ways][-1] == "a"
    assert len(ways) == lmtpd.DIVISIONS


def test_without_the_package_idna_a_domain_has_one_spelling_and_the_log_says_so() -> None:
    lines: list[str] = []
    with (
        mock.patch.dict("sys.modules", idna=None),
        mock.patch.object(lmtpd.log, "_logged", set()),
        mock.patch.object(lmtpd.log, "_emit", lambda _, line: lines.append(line)),
    ):
        assert lmtpd.domain_spellings("Mu\u0308nchen.example") == ["münchen.example"]
        assert lmtpd.domain_spellings("example.com") == ["example.com"]
        assert lmtpd.domain_spellings("bücher.example") == ["bücher.example"]  # said once
    [line] = lines
    assert line.startswith('domain-has-one-spelling domain="mu\\u0308nchen.example" cause="the Python package idna is')


def test_a_recipient_keeps_the_address_as_it_was_given() -> None:
    assert str(recipient('<"Jane Doe+x"@Example.COM>').address) == '"Jane Doe+x"@Example.COM'


# ----------------------------------------------------------------------
# The store
# ----------------------------------------------------------------------

TEMPLATES = ("%p/%u", "%p/%n", "%p/%d/%n", "%p/%u/Maildir", "%p/users/%d/%n/100%%", "/spool/%n", "/spool/%d/x/%u")
NASTY = st.sampled_from(
    [
        *"/.%+@\\\0\n\r\x7f ",
        "..",
        "../",
        "/..",
        "./",
        "\u2028",
        "\u202e",
        "é",
        "a",
        "b" * 130,
        "é" * 70,
        "new",
        "%p",
        "%u",
    ]
)
NASTY_NAMES = st.lists(NASTY | st.text(max_size=2), max_size=5).map("".join)


def names_in_the_store(recipient: Recipient, config: Config) -> list[str]:
    """The names below the spool of all paths that looking for the recipient touches."""
    asked: list[str] = []

    def absent(path: str, _guarded: bool) -> NoReturn:
        asked.append(path)
        raise FileNotFoundError(2, "absent")

    with (
        mock.patch.object(lmtpd, "open_directory", absent),
        mock.patch("os.scandir", return_value=nullcontext(["somebody"])),
        suppress(UserUnknown),
    ):
        asked.append(f"{MaildirStore(config).find(recipient).path}/new")
    assert all(path.startswith("/spool/") for path in asked), asked
    return [name for path in asked for name in path.removeprefix("/spool/").split("/")]


@settings(max_examples=1000, deadline=None)
@given(
    NASTY_NAMES,
    NASTY_NAMES,
    st.sampled_from(TEMPLATES),
    st.sampled_from(["off", "userid", "on"]),
    st.booleans(),
    st.booleans(),
)
def test_no_recipient_names_a_place_outside_the_store(
    local: str, domain: str, template: str, virtdomains: str, downcase: bool, autocreate: bool
) -> None:
    config = cached_config(
        (
            ("maildir_path", template),
            ("virtdomains", virtdomains),
            ("lmtp_downcase_rcpt", str(downcase)),
            ("autocreate_post", str(autocreate)),
        )
    )
    # What the parser of addresses would refuse is tried as well: each keeps its own watch.
    for name in names_in_the_store(recipients_of(Address(local, domain), config)[-1], config):
        assert name
        assert not name.startswith(".")
        assert not any(
            unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") for character in name
        )
        assert len(name.encode()) <= 255


@pytest.mark.parametrize(
    "path",
    [
        *(
            '<"../jane">',
            "</etc/passwd>",
            "<..>",
            "<.>",
            "<.hidden>",
            "<../../etc>",
            "<jane/new>",
            "<jane/../joe>",
            "</>",
        ),
        *(r'<".\./jane">', "<jane/>", '<"jane/."@example.com>', "<+detail>", f"<{'a' * 256}>", f"<{'é' * 128}>"),
    ],
)
@pytest.mark.parametrize("virtdomains", ["off", "on"])
def test_a_name_that_no_folder_may_have_is_an_unknown_user(path: str, virtdomains: str) -> None:
    config = cached_config((("virtdomains", virtdomains), ("autocreate_post", "yes"), ("maildir_path", "%p/%n")))
    assert names_in_the_store(recipient(path, virtdomains=virtdomains), config) == []


@pytest.mark.parametrize(
    "path", ["<jane>", "<j.a.n.e>", f"<{'a' * 255}>", f"<{'é' * 127}>", '<"jane doe">', "<%p>", "<~>"]
)
def test_a_name_that_a_folder_may_have_is_looked_for(path: str) -> None:
    meant = recipient(path)
    assert set(names_in_the_store(meant, cached_config(()))) == {meant.user, "new", "cur"}


# ----------------------------------------------------------------------
# What is odd, and must not surprise
# ----------------------------------------------------------------------


def test_the_limit_of_a_path_is_one_of_octets() -> None:
    assert parsed(f"<{'é' * 450}>") == ("é" * 450, "")
    with pytest.raises(ValueError, match="too long"):
        parse_path(f"<{'é' * 451}>")


@pytest.mark.parametrize("text", [" \u017fIZE=1", " \ufb01X", " \u0131d=1"])
def test_a_keyword_is_ascii_before_its_case_is_changed(text: str) -> None:
    with pytest.raises(ValueError, match="malformed parameter"):
        parse_parameters(text)


@pytest.mark.parametrize(
    "path", ['<"a\nb"@x>', '<"a\\\0"@x>', "<jane@[1\r\n]>", "<jane@[\x7f]>", '<"\u2028"@x>', '<"\ud800"@x>']
)
def test_control_characters_are_nowhere_in_a_path(path: str) -> None:
    with pytest.raises(ValueError, match=r"^the "):
        parse_path(path)


@pytest.mark.parametrize("template", ["%p/%n--%d", "%p/%d--%n/x", "%p/x%u"])
def test_no_name_made_of_several_is_too_long_for_a_folder(template: str) -> None:
    options = {"maildir_path": template, "virtdomains": "on", "autocreate_post": "yes"}
    meant = recipient(f"<{'a' * 128}@{'b' * 126}>", **options)
    assert names_in_the_store(meant, cached_config(tuple(options.items()))) == []
