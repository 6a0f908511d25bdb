"""The manual pages say what the program does."""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import docopt
import pytest
from harness import Site
from peers import INETD_CONF
from postgres import scratch_server

import lmtpd

TOP = Path(__file__).parent.parent
LMTPD_8 = TOP / "man" / "lmtpd.8"
IMAPD_CONF_5 = TOP / "man" / "imapd.conf.5"
EVENTS_7 = TOP / "man" / "lmtpd-events.7"
SIEVE_7 = TOP / "man" / "lmtpd-sieve.7"
PROGRAM = ast.parse((TOP / "lmtpd.py").read_text())
PRIORITIES = {"warning_once": "warning", "error": "err", "warning": "warning", "info": "info", "debug": "debug"}
PRIORITIES |= {"traceback": "err", "startup_error": "err"}


# Reading the pages


def section(page: Path, title: str, macro: str = "Sh") -> str:
    """The source of the section up to its first subsection, or with the macro Ss of the subsection."""
    found = re.search(rf"^\.{macro} {title}\n(.*?)(?=^\.S[hs] |\Z)", page.read_text(), re.MULTILINE | re.DOTALL)
    assert found, f"{page.name} has no section {title}"
    return found[1]


def whole_section(page: Path, title: str) -> str:
    """The source of the section with its subsections."""
    found = re.search(rf"^\.Sh {title}\n(.*?)(?=^\.Sh |\Z)", page.read_text(), re.MULTILINE | re.DOTALL)
    assert found, f"{page.name} has no section {title}"
    return found[1]


def items(source: str) -> dict[str, str]:
    """The list's items, each head with the source of its text."""
    _, *found = re.split(r"^\.It ", source, flags=re.MULTILINE)
    return dict(item.split("\n", 1) for item in found)


def blocks(source: str) -> list[str]:
    """The literal blocks of the source, as they are printed."""
    found = re.findall(r"^\.Bd -literal.*?\n(.*?)^\.Ed$", source, re.MULTILINE | re.DOTALL)
    return [block.replace("\\&", "").replace("\\e", "\\") for block in found]


def literals(page: Path, title: str = "EXAMPLES") -> list[str]:
    """The literal blocks of the section, as they are printed."""
    return blocks(section(page, title))


def printed(page: Path, title: str) -> list[str]:
    """The lines of the section as a reader sees them."""
    command = ["mandoc", "-Tascii", "-O", "width=200", str(page)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    text = re.sub(".\b", "", text)
    found = re.search(rf"^{title}\n(.*?)^\S", text, re.MULTILINE | re.DOTALL)
    assert found
    return [line.strip() for line in found[1].splitlines() if line.strip()]


# Figures


@pytest.mark.parametrize(
    ("page", "text", "name", "unit"),
    [
        (LMTPD_8, "or after (.*) seconds, it ends at once", "GRACE", 1),
        (LMTPD_8, "after (.*) seconds, the workers finish only their transactions", "RELOAD_PATIENCE", 1),
        (LMTPD_8, "after (.*) seconds more they end at once", "GRACE", 1),
        (LMTPD_8, "It command line Ta (.*) bytes with its end", "LINE_LIMIT", 1),
        (LMTPD_8, "It address Ta (.*) bytes", "PATH_LIMIT", 1),
        (LMTPD_8, "It reply line Ta (.*) bytes", "REPLY_LINE_LIMIT", 1),
        (LMTPD_8, "up to (.*) KiB of a message are kept in memory", "MEMORY_LIMIT", 1024),
        (LMTPD_8, "A message of more than (.*) KiB is written while it arrives", "MEMORY_LIMIT", 1024),
        (LMTPD_8, "If a header is larger than (.*) KiB, only its beginning", "MEMORY_LIMIT", 1024),
        (LMTPD_8, "cannot be right or is longer than (.*) bytes", "QUOTA_FILE_LIMIT", 1),
        (LMTPD_8, "line of changes or is older than (.*) minutes", "QUOTA_STALE", 60),
        (LMTPD_8, "a file name of more than (.*) bytes", "NAME_LIMIT", 1),
        (LMTPD_8, "a value of more than (.*) characters is cut", "FIELD_LIMIT", 1),
        (EVENTS_7, "it is not tried again for (.*) seconds", "BACKOFF", 1),
        (EVENTS_7, "connects to the user database for (.*) seconds", "BACKOFF", 1),
        (LMTPD_8, "1 to (.*) letters, digits, dots, hyphens and underscores", "TRACE_ID_LIMIT", 1),
        (SIEVE_7, "or one of more than (.*) bytes on the disk", "NAME_LIMIT", 1),
        (SIEVE_7, "it is remembered for (.*) days", "WEEK", lmtpd.DAY),
        (SIEVE_7, "It has (.*) KiB at most", "SCRIPT_LOG_LIMIT", 1024),
        (SIEVE_7, "depth of blocks and tests Ta (.*)", "BLOCKS_LIMIT", 1),
        (SIEVE_7, "actions of all scripts Ta (.*)", "ACTION_LIMIT", 1),
        (SIEVE_7, "depth of included scripts Ta (.*)", "INCLUDE_LIMIT", 1),
        (SIEVE_7, "It variables of a script Ta (.*)", "VARIABLES_LIMIT", 1),
        (SIEVE_7, "global variables Ta (.*)", "VARIABLES_LIMIT", 1),
        (SIEVE_7, "name of a variable Ta (.*)", "NAME_LENGTH_LIMIT", 1),
        (SIEVE_7, "value of a variable Ta (.*)", "VARIABLE_LIMIT", 1),
        (SIEVE_7, r"match variables, \$\{0\} to \$\{\d+\} Ta (.*)", "WILDCARD_LIMIT", 1),
        (SIEVE_7, "flags of a copy Ta (.*)", "FLAG_LIMIT", 1),
        (SIEVE_7, "length of a keyword Ta (.*)", "KEYWORD_LENGTH_LIMIT", 1),
        (SIEVE_7, "growth by Ic addheader Ta (.*)", "HEADER_GROWTH", 1),
        (SIEVE_7, "part, for Ic body , extracttext Ta (.*)", "TEXT_LIMIT", 1),
        (SIEVE_7, "depth of parts of a message Ta (.*)", "NESTING_LIMIT", 1),
        (SIEVE_7, "It parts of a message Ta (.*)", "PARTS_LIMIT", 1),
        (SIEVE_7, "work of all scripts Ta (.*)", "STEP_LIMIT", 1),
        (SIEVE_7, "comparison with (.*) characters of a long text", "STEP_OCTETS", 1),
        (SIEVE_7, "It command Ta (.*)", "COMMAND_STEPS", 1),
        (SIEVE_7, "search for a field Ta (.*)", "FIELD_STEPS", 1),
        (SIEVE_7, "It part Ta (.*)", "PART_STEPS", 1),
        (SIEVE_7, "folder that is looked up Ta (.*)", "LOOKUP_STEPS", 1),
        (SIEVE_7, "It included script Ta (.*)", "INCLUDE_STEPS", 1),
        (SIEVE_7, "character of an included script Ta (.*)", "INCLUDED_STEPS", 1),
        (SIEVE_7, "all parts, for Ic body Ta (.*)", "TEXTS_LIMIT", 1),
        (SIEVE_7, "whole body, for Ic body :raw Ta (.*)", "TEXTS_LIMIT", 1),
        (SIEVE_7, "string with variables Ta (.*)", "EXPANSION_LIMIT", 1),
        (SIEVE_7, "variables of waiting scripts Ta (.*)", "HELD_LIMIT", 1),
        (SIEVE_7, "records of the test Ic duplicate Ta (.*)", "RECORDS_LIMIT", 1),
        (SIEVE_7, "regular expressions of a script Ta (.*)", "REGEXES_LIMIT", 1),
        (SIEVE_7, "text of an error Ta (.*)", "ERROR_LIMIT", 1),
        (SIEVE_7, "regular expression with a variable Ta (.*)", "REGEX_STEPS", 1),
        (SIEVE_7, "errors of a script that are told Ta (.*)", "ERRORS_LIMIT", 1),
        (LMTPD_8, "rights of a user. The program has (.*) seconds", "SEND_PATIENCE", 1),
        (LMTPD_8, "The server has (.*) seconds for each reply", "SEND_PATIENCE", 1),
        (LMTPD_8, "no process sends anything for (.*) seconds", "BACKOFF", 1),
        (LMTPD_8, "Mail is recognized for (.*) days", "SENT_EXPIRY", lmtpd.DAY),
        (LMTPD_8, "a message with more than (.*) fields Received", "RECEIVED_LIMIT", 1),
        (LMTPD_8, "a message is redirected to at most (.*) addresses", "REDIRECT_LIMIT", 1),
        (SIEVE_7, "arrives with more than (.*) fields Received", "RECEIVED_LIMIT", 1),
        (SIEVE_7, "or .Ic :seconds says, by default (.*) days", "DEFAULT_DAYS", 1),
        (SIEVE_7, "addresses of Ic redirect Ta (.*)", "REDIRECT_LIMIT", 1),
        (SIEVE_7, "from one to (.*)\\.", "MAILTO_RECIPIENTS_LIMIT", 1),
        (SIEVE_7, "recipients of a notification Ta (.*)", "MAILTO_RECIPIENTS_LIMIT", 1),
        (SIEVE_7, "text of Ic reject No in a reply Ta (.*)", "REPLY_LINES", 1),
        (SIEVE_7, "line of that text Ta (.*)", "REPLY_LINE", 1),
        (SIEVE_7, "subject that an answer repeats Ta (.*)", "SUBJECT_LIMIT", 1),
        (SIEVE_7, "message ids in References Ta (.*)", "REFERENCES_LIMIT", 1),
        (IMAPD_CONF_5, "or is locked for more than (.*) seconds, every message is stored", "DATABASE_PATIENCE", 1),
    ],
)
def test_figures_are_the_programs(page: Path, text: str, name: str, unit: int) -> None:
    found = re.findall(text.replace("(.*)", r"(\d[\d,]*)"), page.read_text().replace("\n", " "))
    assert [int(figure.replace(",", "")) * unit for figure in found] == [getattr(lmtpd, name)]


# Reading the program


def calls() -> list[ast.Call]:
    return [node for node in ast.walk(PROGRAM) if isinstance(node, ast.Call)]


def copy_events() -> list[object]:
    """What the attribute event may be, which is logged with info."""
    assignments = [node for node in ast.walk(PROGRAM) if isinstance(node, ast.Assign)]
    return [
        value.value
        for node in assignments
        for target, value in zip(
            getattr(node.targets[0], "elts", node.targets), getattr(node.value, "elts", [node.value])
        )
        if isinstance(target, ast.Attribute) and target.attr == "event" and isinstance(value, ast.Constant)
    ]


def constants(node: ast.expr) -> list[object]:
    """The constants that an argument may be."""
    choices = [node.body, node.orelse] if isinstance(node, ast.IfExp) else [node]
    return [choice.value for choice in choices if isinstance(choice, ast.Constant)]


def other_events() -> list[object]:
    """What log_delivery() logs, with info, if there is no placement."""
    [function] = [node for node in PROGRAM.body if isinstance(node, ast.FunctionDef) and node.name == "log_delivery"]
    choices = [node for node in ast.walk(function) if isinstance(node, ast.IfExp)]
    return [value for choice in choices for value in constants(choice) if value]


# All pages


@pytest.mark.parametrize("page", [LMTPD_8, IMAPD_CONF_5, EVENTS_7, SIEVE_7], ids=lambda page: page.name)
def test_mandoc_has_nothing_to_say(page: Path) -> None:
    result = subprocess.run(["mandoc", "-Tlint", "-Wwarning", str(page)], capture_output=True, text=True)
    assert result.stdout + result.stderr == ""
    assert result.returncode == 0


# imapd.conf(5)


NAMES_OF_TYPES = {"text": "string", "octets": "bytes", "kibioctets": "kibibytes"}
FAMILIES = {  # options whose names have a part that the administrator chooses
    "partition- Ns Ar name": "path , No required",
    "sieve_spamtest_text_value Ns Ar N": "string , No default empty",
    "sieve_virustest_text_value Ns Ar N": "string , No default empty",
    "xlist- Ns Ar use": "string , No default empty",
}


def type_of(option: lmtpd.Option) -> str:
    name = option.parse.__qualname__.partition(".")[0].removeprefix("as_")
    return NAMES_OF_TYPES.get(name, name)


def head_of(name: str, option: lmtpd.Option) -> str:
    """What the page has to say of the option."""
    default = (
        "required"
        if option.default is None
        else "default Cm " + option.default.replace("\\", r"\e")
        if option.default
        else ""
    )
    return f"Ic {name} : Ar {type_of(option)} , No {default or 'default empty'}"


def heads() -> dict[str, str]:
    """The options that the page has to have: the heads of their items, and their names."""
    wanted = {head_of(*row): row[0] for row in lmtpd.Config.table().items()}
    return wanted | {f"Ic {name} : Ar {rest}": name for name, rest in FAMILIES.items()}


def groups() -> dict[str, str]:
    """The source of each group of options, by its title."""
    before, *parts = re.split(r"^\.Ss ", whole_section(IMAPD_CONF_5, "OPTIONS"), flags=re.MULTILINE)
    assert ".It" not in before
    return dict(part.split("\n", 1) for part in parts)


def option_items(source: str) -> list[tuple[str, str]]:
    """The head and the text of each option in the source of a group; lists inside the text are a part of it."""
    _, *found = re.split(r"^\.It (?=Ic )", source, flags=re.MULTILINE)
    return [(head, text) for head, _, text in (item.partition("\n") for item in found)]


def option_text(name: str) -> str:
    """What the page says of the option of the table."""
    texts = dict(item for source in groups().values() for item in option_items(source))
    return texts[head_of(name, lmtpd.Config.table()[name])]


def test_every_option_of_the_table_is_in_one_group() -> None:
    found = [head for source in groups().values() for head, _ in option_items(source)]
    assert sorted(found) == sorted(heads())


@pytest.mark.parametrize("title", groups())
def test_options_of_a_group_are_in_alphabetical_order(title: str) -> None:
    names = [heads()[head] for head, _ in option_items(groups()[title])]
    assert names == sorted(names)


def test_overview_has_every_group() -> None:
    assert re.findall(r"^\.It Sx (.*?) Ta ", section(IMAPD_CONF_5, "DESCRIPTION"), re.MULTILINE) == list(groups())


def test_index_has_the_group_of_every_option() -> None:
    wanted = [(heads()[head], title) for title, source in groups().items() for head, _ in option_items(source)]
    found = re.findall(r"^\.It Ic (.*?) Ta Sx (.*)$", section(IMAPD_CONF_5, "INDEX"), re.MULTILINE)
    assert found == sorted(wanted)


def test_every_type_is_explained() -> None:
    explained = {head.removeprefix("Ar ") for head in items(section(IMAPD_CONF_5, "TYPES"))}
    assert explained == {type_of(option) for option in lmtpd.Config.table().values()}


def test_every_choice_is_named() -> None:
    for name, option in lmtpd.Config.table().items():
        if type_of(option) == "choice":
            text = option_text(name)
            named = {word for line in re.findall(r"^\.(?:It )?Cm (.*)", text, re.MULTILINE) for word in line.split()}
            assert named - {","} >= set(inspect.getclosurevars(option.parse).nonlocals["allowed"])


def test_letters_of_maildir_path_are_those_that_are_replaced() -> None:
    option = lmtpd.Config.table()["maildir_path"]
    letters = inspect.getclosurevars(option.parse).nonlocals["variables"]
    assert set(re.findall(r"^\.It Cm %(.)$", option_text("maildir_path"), re.MULTILINE)) == {*letters, "%"}


def test_options_without_effect_are_not_in_the_table() -> None:
    lines = re.findall(r"^\.Ic (.*)", section(IMAPD_CONF_5, "OPTIONS WITHOUT EFFECT"), re.MULTILINE)
    names = {word for line in lines for word in line.split()} - {","}
    assert len(names) > 15
    for option in lmtpd.Config.table():
        assert not any(option == name or (name.endswith("_") and option.startswith(name)) for name in names)


def written(example: str, folder: Path) -> str:
    """A file with the example, and beside it the one that examples include."""
    (folder / "lmtpd.secret").write_text("smtp_auth_password: secret\n")
    file = folder / "imapd.conf"
    file.write_text(example.replace("@include: /etc/", f"@include: {folder}/"))
    return str(file)


@pytest.mark.parametrize("title", groups())
def test_a_group_begins_with_its_purpose_and_examples_that_load(tmp_path: Path, title: str) -> None:
    source = groups()[title]
    beginning = source.partition("\n.Bl ")[0]
    assert re.match(r"[A-Z]|\.Xr", beginning)
    examples = blocks(beginning)
    assert examples == blocks(source) != []
    options = {heads()[head] for head, _ in option_items(source)}
    families = tuple(name.partition(" ")[0] for name in options & set(FAMILIES))
    for example in examples:
        names = lmtpd.read_settings(written(example, tmp_path), [])[0]
        assert any({name, name.removeprefix("lmtp_")} & options or name.startswith(families) for name in names)
        required = {"configdirectory": "/var/lib/lmtpd", "partition-default": "/srv/mail"}
        missing = "".join(f"{name}: {value}\n" for name, value in required.items() if name not in names)
        config = lmtpd.Config.load(written(example + missing, tmp_path))
        assert (config.ignored, config.warnings) == ([], [])


def test_two_lines_are_enough(tmp_path: Path) -> None:
    [example] = literals(IMAPD_CONF_5, "DESCRIPTION")
    assert example.count("\n") == 2
    assert lmtpd.Config.load(written(example, tmp_path)).ignored == []


def test_examples_of_configuration_load(tmp_path: Path) -> None:
    minimal, larger = literals(IMAPD_CONF_5)
    config = lmtpd.Config.load(written(minimal, tmp_path))
    assert (config.partition, config.cyrus_user, config.ignored) == ("/srv/mail", "vmail", [])
    config = lmtpd.Config.load(written(larger, tmp_path), "lmtpinside")
    assert (config.servername, config.maxmessagesize, config.ignored) == ("mail.inside.example.com", 50 << 20, [])


def test_an_example_shows_the_syntax(tmp_path: Path) -> None:
    [example] = literals(IMAPD_CONF_5, "SYNTAX")
    assert lmtpd.read_settings(written(example, tmp_path), [])[0] == {
        "maxmessagesize": ("50M", f"{tmp_path}/imapd.conf:2")
    }


def test_the_first_line_of_maildirsize_is_the_quota(site: Site) -> None:
    """Also if root has written it, and nothing after it."""
    client = site.connect()
    client.hello()
    assert client.deliver(b"Subject: x\r\n\r\nx\r\n", "jane")[0].startswith("250")
    [line] = re.findall(r"^\.Dl (echo .*)$", groups()["Quota"], re.MULTILINE)
    subprocess.run(["sh", "-c", line.replace("/var/spool/lmtpd", str(site.spool))], check=True)
    [file] = site.files("jane")
    shown = question(site, "--explain", "jane@example.com").stdout
    assert f"\nquota    {file.stat().st_size} bytes, 1 messages of 20971520 bytes, 1000 messages\n" in shown
    assert client.deliver(b"Subject: y\r\n\r\nx\r\n", "jane")[0].startswith("250")
    assert (site.spool / "jane/maildirsize").read_text().startswith("20971520S,1000C\n")


# lmtpd(8)


def test_a_message_whose_record_is_removed_is_stored_again(site: Site) -> None:
    site.configure(duplicatesuppression="yes")
    block, _ = blocks(section(LMTPD_8, "Duplicates", "Ss"))
    head, _, code = block.partition("\n")
    assert head == "# runuser -u lmtpd -- python3 - '<one@example.org>' <<'EOF'"
    code = code.removesuffix("EOF\n").replace("/var/lib/lmtpd", str(site.configdirectory))
    is_stored_again_after(
        lambda: subprocess.run([sys.executable, "-", "<one@example.org>"], input=code, text=True, check=True), site
    )


def test_a_message_whose_record_is_removed_from_postgresql_is_stored_again(site: Site) -> None:
    _, block = blocks(section(LMTPD_8, "Duplicates", "Ss"))
    statement = re.fullmatch(r'# runuser -u postgres -- psql lmtpd -c "(.*)"\n', block)
    assert statement
    with scratch_server() as server, server.database() as database:
        site.configure(duplicatesuppression="yes", **database.options)
        is_stored_again_after(lambda: database.execute(statement[1]), site)


def is_stored_again_after(remove: Callable[[], object], site: Site) -> None:
    """Whether a message is a duplicate until its record is removed."""
    client = site.connect()
    client.hello()

    def count() -> int:
        date = b"Date: Sun, 22 Nov 2026 12:00:00 +0000"
        client.deliver(b"Message-ID: <one@example.org>\r\n" + date + b"\r\n\r\nx\r\n", "jane")
        return len(site.messages("jane"))

    assert [count(), count()] == [1, 1]
    for path in site.files("jane"):
        path.unlink()
    assert count() == 0  # a message that the user has deleted still counts
    remove()
    assert count() == 1


def usage(part: str) -> list[str]:
    """The lines of that part of the usage text."""
    found = re.search(rf"^{part}:\n((?:  .*\n)+)", lmtpd.__doc__, re.MULTILINE)
    assert found
    return found[1].splitlines()


def test_synopsis_is_the_usage() -> None:
    lines = [re.sub(r"<(\w+)>", r"\1", line.strip()).replace("...", " ...") for line in usage("Usage")]
    assert printed(LMTPD_8, "SYNOPSIS") == lines


def test_an_empty_command_line_is_what_docopt_makes_of_it() -> None:
    assert docopt.docopt(lmtpd.__doc__, []) == lmtpd.NO_ARGUMENTS == lmtpd.plain_options([])


def test_options_are_those_of_the_usage() -> None:
    wanted = {}
    for line in usage("Options"):
        option, meaning = re.split("  +", line.strip(), maxsplit=1)
        default = re.search(r"\[default: (.*)\]", meaning)
        wanted[re.sub(r"^-(\S+) ", r"-\1 Ar ", option).replace("-", "Fl ", 1)] = default[1] if default else ""
    documented = items(section(LMTPD_8, "OPTIONS"))
    assert list(documented) == list(wanted)
    for head, text in documented.items():
        assert wanted[head] in text


def test_overview_has_only_sections_that_are_there() -> None:
    named = re.findall(r"^\.It Sx (.*?) Ta ", section(LMTPD_8, "DESCRIPTION"), re.MULTILINE)
    titles = re.findall(r"^\.Sh (.*)$", LMTPD_8.read_text(), re.MULTILINE)
    assert named == [title for title in titles if title in named] != []


def test_verbs_are_those_of_the_session() -> None:
    verbs = [head.split()[1] for head in items(section(LMTPD_8, "Commands", "Ss"))]
    assert sorted(verbs) == sorted(lmtpd.Session.VERBS)


def replies() -> dict[str, str]:
    """The replies under REPLIES, each head with the source of its text."""
    return {head: text for head, text in items(whole_section(LMTPD_8, "REPLIES")).items() if re.match(r"Sy \d", head)}


def test_replies_are_those_that_are_given() -> None:
    given = set()
    for call in calls():
        if isinstance(call.func, ast.Name) and call.func.id == "Reply":
            [code], [enhanced] = constants(call.args[0]), constants(call.args[1])
            given.add(f"Sy {code} {enhanced}".rstrip())
    assert list(replies()) == sorted(given)


def test_each_failure_begins_with_the_texts_that_are_given() -> None:
    """The mail server's queue shows them, so administrators search for them."""
    given: dict[str, set[object]] = {}
    for call in calls():
        if isinstance(call.func, ast.Name) and call.func.id == "Reply" and ast.unparse(call.args[0])[0] in "45":
            [code], [enhanced] = constants(call.args[0]), constants(call.args[1])
            given.setdefault(f"Sy {code} {enhanced}", set()).update(constants(call.args[2]))
        if isinstance(call.func, ast.Name) and call.func.id == "refuse_to_start":
            given.setdefault("Sy 421 4.3.0", set()).update(constants(call.args[1]))
    documented = {}
    for head, text in replies().items():
        if head in given:
            beginning = re.match(r"(?:\.Ql .*\n|or\n)*", text)
            assert beginning
            documented[head] = set(re.findall(r"^\.Ql (.*?)(?: [,.])?$", beginning[0], re.MULTILINE))
    assert documented == given


def test_every_failure_has_an_action() -> None:
    failures = {head: text for head, text in replies().items() if head.startswith(("Sy 4", "Sy 5"))}
    assert failures
    assert [head for head, text in failures.items() if not re.search(r"^\.Sy Action :\n\S", text, re.MULTILINE)] == []


def test_replies_are_in_the_group_of_their_code() -> None:
    groups = re.split(r"^\.Ss ", whole_section(LMTPD_8, "REPLIES"), flags=re.MULTILINE)[1:]
    for group in groups:
        digits = set(re.findall(r"\b(\d)xx\b", group.partition("\n")[0]))
        assert {head[3] for head in items(group)} == digits


# lmtpd-events(7)


def events_of(call: ast.Call) -> list[str]:
    """The heads, in the page, of the events that a call of the log may log."""
    function = call.func
    if not isinstance(function, ast.Attribute) or ast.unparse(function.value) != "log" or not call.args:
        return []
    events = constants(call.args[0])
    if ast.unparse(call.args[0]) == "event":  # in log_delivery()
        events = [*copy_events(), *other_events()]
    return [f"Sy {event} Pq {PRIORITIES[function.attr]}" for event in events]


def fields_returned_by(name: str) -> set[str]:
    """The keys of the dictionary that the method returns."""
    [method] = [node for node in ast.walk(PROGRAM) if isinstance(node, ast.FunctionDef) and node.name == name]
    [returned] = [node.value for node in ast.walk(method) if isinstance(node, ast.Return)]
    assert isinstance(returned, ast.Dict)
    return {ast.literal_eval(key) for key in returned.keys if key}


def fields_logged() -> dict[str, set[str]]:
    """The fields of each event, by its head in the page."""
    several = {
        "self._fields(mail, delivery)": fields_returned_by("_fields"),
        "transaction.fields(recipients)": fields_returned_by("fields"),
        "fields": fields_returned_by("fields"),  # in log_refusal()
        "script": {"script"},  # in log_delivery()
    }
    logged = {"Sy traceback Pq err": {"line"}}  # by Log.traceback() itself
    for call in calls():
        for event in events_of(call):
            fields = logged.setdefault(event, set())
            for keyword in call.keywords:
                fields |= {keyword.arg} if keyword.arg else several[ast.unparse(keyword.value)]
    return logged


def event_groups() -> list[dict[str, str]]:
    """The page's events with the sources of their texts, by subsection."""
    found = re.search(r"^\.Sh EVENTS\n(.*?)(?=^\.Sh )", EVENTS_7.read_text(), re.MULTILINE | re.DOTALL)
    assert found
    return [items(group) for group in re.split(r"^\.Ss ", found[1], flags=re.MULTILINE)[1:]]


def event_items() -> dict[str, str]:
    return {head: text for group in event_groups() for head, text in group.items()}


def fields_documented() -> dict[str, set[str]]:
    """The fields of each event in the page, with those that it has in common with another one."""
    texts = event_items()
    own = {head: set(re.findall(r"^\.Ar (\w+)", text, re.MULTILINE)) for head, text in texts.items()}
    documented = {}
    for head, text in texts.items():
        documented[head] = set(own[head])
        for other, left_out in re.findall(
            r"^It has the fields of\n\.Sy (\S+) [.,](?:\nwithout\n\.Sy (\S+))?", text, re.MULTILINE
        ):
            documented[head] |= own[f"Sy {other} Pq info"] - {left_out}
    return documented


def test_events_and_fields_are_those_that_are_logged() -> None:
    assert fields_documented() == fields_logged()


def test_no_event_is_in_two_groups_and_each_group_is_sorted() -> None:
    groups = event_groups()
    assert sum(map(len, groups)) == len(event_items())
    for group in groups:
        assert list(group) == sorted(group)


@pytest.mark.parametrize("head", event_items())
def test_an_event_has_an_action_if_it_is_a_warning_or_an_error(head: str) -> None:
    actions = re.findall(r"^\.Pp\n\.Em Action :\n\w", event_items()[head], re.MULTILINE)
    assert len(actions) == head.endswith((" err", " warning"))


def test_other_pages_name_events_as_the_log_does() -> None:
    """Each event, and no spelling of it that nobody finds in the log."""
    events = {head.split()[1] for head in event_items()}
    spaced = {event.replace("-", " ") for event in events if "-" in event}
    for page in (LMTPD_8, IMAPD_CONF_5, SIEVE_7):
        marked = re.findall(r"^\.Sy (.+?)(?: [.,:;)]+)?$", page.read_text(), re.MULTILINE)
        assert not spaced & {each.lower() for each in marked}
        hyphenated = {each for each in marked if re.fullmatch("[a-z]+(-[a-z]+)+", each)}
        assert hyphenated <= events


def test_statuses_of_sendmail_are_those_that_are_permanent() -> None:
    found = re.search(r"the exit statuses (\d.*) of the program", LMTPD_8.read_text())
    assert found
    assert tuple(map(int, re.findall(r"\d+", found[1]))) == lmtpd.PERMANENT_STATUSES


def test_the_text_that_a_reply_has_in_place_of_the_users_is_the_programs() -> None:
    assert f"\n.Ql {lmtpd.PLAIN_REASON}\n" in section(SIEVE_7, "REJECT")


def test_exit_statuses_are_those_of_the_program() -> None:
    names = {
        node.attr
        for node in ast.walk(PROGRAM)
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("os.EX_")
    }
    wanted = {f"{getattr(os, name)} Pq Dv {name}" for name in names}
    assert set(items(section(LMTPD_8, "EXIT STATUS"))) == wanted


# The session under EXAMPLES


def timeless(text: str) -> str:
    """The text without what differs from run to run and from version to version."""
    text = re.sub(r"lmtpd-\d+-\d+", "SESSION", text)
    text = re.sub(r"lmtpd\.\d+\.\d+@", "ID@", text)
    text = re.sub(r"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d [-+]\d{4}", "DATE", text)
    return text.replace(lmtpd.PRODUCT, "PRODUCT")


def test_the_line_for_inetd_is_the_one_that_is_run() -> None:
    assert literals(LMTPD_8)[2] == INETD_CONF.splitlines(keepends=True)[0]


def test_example_session_goes_as_shown(site: Site) -> None:
    session, message, _ = literals(LMTPD_8)
    said, _, answered = session.partition("<<EOF\n")[2].partition("EOF\n")
    result = site.pipe(said.encode())
    assert timeless(result.stdout.decode()) == timeless(answered)
    assert timeless(site.messages("jane")[0].decode()) == timeless(message)
    shown = re.search(r"^\.Bd -literal.*?\n(refused .*?)^\.Ed$", section(LMTPD_8, "LOGGING"), re.MULTILINE | re.DOTALL)
    assert shown
    lines = shown[1].replace("\n    ", " ").splitlines()
    fields = re.compile(r"^(?:<\d>)?([\w-]+)|(\w+)=")
    assert [fields.findall(line) for line in lines] == [fields.findall(line) for line in site.log_text().splitlines()]


# lmtpd-sieve(7)


def test_capabilities_are_those_of_the_program() -> None:
    listed = [head.split()[1] for head in items(section(SIEVE_7, "CAPABILITIES"))]
    assert listed == sorted(lmtpd.language_for(()).capabilities)


def test_match_variables_are_those_of_the_program() -> None:
    last = re.search(r"^\.It match variables, \$\{0\} to \$\{(\d+)\} Ta", section(SIEVE_7, "LIMITS"), re.MULTILINE)
    assert last
    assert int(last[1]) == lmtpd.WILDCARD_LIMIT - 1


def test_overview_of_filters_has_every_section() -> None:
    text = SIEVE_7.read_text()
    named = re.findall(r"^\.It Sx (.*?) Ta ", section(SIEVE_7, "DESCRIPTION"), re.MULTILINE)
    titles = re.findall(r"^\.Sh (.*)$", text, re.MULTILINE)
    assert named == titles[titles.index("DESCRIPTION") + 1 : titles.index("FILES")]


@pytest.mark.parametrize("title", ["VACATION", "NOTIFY"])
def test_examples_of_scripts_have_no_errors(filtered_site: Site, title: str) -> None:
    [script] = literals(SIEVE_7, title)
    (filtered_site.root / "example.sieve").write_text(script)
    result = question(filtered_site, "--check-sieve", "example.sieve")
    assert (result.stdout, result.returncode) == ("", 0)


@pytest.fixture
def filtered_site(site: Site) -> Site:
    """A site whose user jane has the script of the page."""
    folder = site.root / "sieve" / "jane"
    folder.mkdir(parents=True)
    [script] = literals(SIEVE_7, "QUICK START")
    (folder / "filters.sieve").write_text(script)
    site.configure(sieve_script=f"{site.root}/sieve/%u/filters.sieve")
    return site


def here(text: str, site: Site) -> str:
    """The text of an example with this site's paths."""
    return text.replace("/srv/mail", str(site.spool)).replace("/srv/sieve", f"{site.root}/sieve")


def question(site: Site, *arguments: str, message: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(site.command(*arguments), input=message, capture_output=True, text=True, cwd=site.root)


def test_first_filter_does_what_the_page_says(filtered_site: Site) -> None:
    wanted = {
        "List-Id: <debian-user.lists.debian.org>": r"fileinto Lists/debian-user",
        "From: kids@school.example": r"fileinto INBOX \Flagged",
        "X-Spam-Flag: YES": r"fileinto Junk \Seen",
        "From: joe@example.org": "fileinto INBOX",
    }
    for field, actions in wanted.items():
        result = question(filtered_site, "--explain", "jane@example.com", message=f"{field}\n\n")
        assert result.stdout.splitlines()[-1] == f"actions  {actions}"


def test_explain_prints_what_the_page_shows(filtered_site: Site) -> None:
    options, session = literals(SIEVE_7, "CHECKING")[2:]
    assert "sieve_script: /srv/sieve/%u/filters.sieve\n" in options
    message, _, printed_text = session.partition("<<EOF\n")[2].partition("EOF\n")
    result = question(filtered_site, "--explain", "jane@example.com", message=message)
    assert (result.stdout, result.returncode) == (here(printed_text, filtered_site), 0)
    assert filtered_site.messages("jane") == []


def test_check_sieve_prints_what_the_page_shows(filtered_site: Site) -> None:
    session, script = literals(SIEVE_7, "CHECKING")[:2]
    (filtered_site.root / "wrong.sieve").write_text(script)
    result = question(filtered_site, "--check-sieve", "wrong.sieve")
    assert (result.stdout, result.returncode) == (session.partition("\n")[2], os.EX_CONFIG)
    right = question(filtered_site, "--check-sieve", "sieve/jane/filters.sieve")
    assert (right.stdout, right.returncode) == ("", 0)


def test_a_script_can_file_mail_for_sub_addresses(filtered_site: Site) -> None:
    [script] = literals(SIEVE_7, "SUB-ADDRESSES")
    (filtered_site.root / "sieve/jane/filters.sieve").write_text(script)
    filtered_site.configure(sieve_subaddress_folder="no")
    for name in ("cur", "new", "tmp"):
        (filtered_site.spool / "jane/.lists" / name).mkdir(parents=True)
    for detail, folder in {"+lists": "lists", "+other": "INBOX", "": "INBOX"}.items():
        result = question(filtered_site, "--explain", f"jane{detail}@example.com", message="Subject: x\n\n")
        assert result.stdout.splitlines()[-1] == f"actions  fileinto {folder}"
