"""What an administrator may write into imapd.conf and on the command line, and what he is told when it is wrong."""

from __future__ import annotations

import gzip
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import docopt
import pytest
from harness import AS_ROOT, LMTPD, PATIENCE, STORE_USER, Site, config_of
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import unpacked
from starters import SocketActivate
from test_service import logged

import lmtpd
from lmtpd import Config, ConfigError

USAGE, CONFIGURATION = 64, 78  # sysexits(3)
ALWAYS = "configdirectory: /lib\npartition-default: /spool\n"


class Conf:
    """A folder of configuration files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.main = folder / "imapd.conf"

    def write(self, text: str | bytes, name: str = "imapd.conf") -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    def load(self, text: str | bytes, service: str = "lmtp") -> Config:
        return Config.load(str(self.write(text)), service)

    def values(self, text: str | bytes) -> dict[str, str]:
        """What the file sets, without defaults and types."""
        settings, _ = lmtpd.read_settings(str(self.write(text)), [])
        return {name: value for name, (value, _) in settings.items()}

    def error(self, text: str | bytes) -> str:
        """What is said of the file, which cannot be used."""
        with pytest.raises(ConfigError) as caught:
            self.load(text)
        return str(caught.value)


@pytest.fixture
def conf(tmp_path: Path) -> Conf:
    return Conf(tmp_path)


# ----------------------------------------------------------------------
# The syntax of a file
# ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("\n\n  \n\t\n", {}),
        ("servername: a", {"servername": "a"}),  # no end of line at the end of the file
        ("servername:a\n", {"servername": "a"}),
        (" \tservername:\t a b \t\n", {"servername": "a b"}),
        ("SerVerName: MiXed\n", {"servername": "MiXed"}),
        ("servername: a\r\ndebug: yes\r\n", {"servername": "a", "debug": "yes"}),
        ("partition-a_1: /x\n", {"partition-a_1": "/x"}),
        ("1: 2\n", {"1": "2"}),
        ("servername: a: b:c\n", {"servername": "a: b:c"}),
        ("servername: bücher\n", {"servername": "bücher"}),
        ("syslog_prefix: a\x0bb\x0cc\x85d\u2028debug: yes\n", {"syslog_prefix": "a\x0bb\x0cc\x85d\u2028debug: yes"}),
    ],
)
def test_a_line_is_an_option_and_its_value(conf: Conf, text: str, expected: dict[str, str]) -> None:
    assert conf.values(text) == expected


def test_comments_begin_a_line_and_only_there(conf: Conf) -> None:
    text = "# servername: a\n  \t# debug: yes\n#\nsyslog_prefix: a # b\ncyrus_user: #c\nsasl_x: d#\n"
    assert conf.values(text) == {"syslog_prefix": "a # b", "cyrus_user": "#c", "sasl_x": "d#"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("admins: a \\\n b\n", {"admins": "a  b"}),
        ("admins: a\\\nb\\\nc\n", {"admins": "abc"}),
        ("admins:\\\n\\\n a\n", {"admins": "a"}),
        ("adm\\\nins: a\n", {"admins": "a"}),
        ("admins: a\\\n# no comment\n", {"admins": "a# no comment"}),
        ("# a comment \\\nadmins: a\n", {}),
        ("admins: a\\", {"admins": "a"}),  # nothing is there to continue on
        ("admins: a\\b\n", {"admins": "a\\b"}),
        ("admins: a\\ \n", {"admins": "a\\"}),  # the backslash is not the last character
    ],
)
def test_a_backslash_at_the_end_continues_the_line(conf: Conf, text: str, expected: dict[str, str]) -> None:
    assert conf.values(text) == expected


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("debug: yes\n\nnonsense\n", 3, "'nonsense'"),
        ("# 1\n: yes\n", 2, "': yes'"),
        ("two words: yes\n", 1, "'two words: yes'"),
        ("grüße: yes\n", 1, "grüße"),
        ("debug : yes\n", 1, "'debug : yes'"),
        ("-: yes\n", 1, "'-: yes'"),
        ("a.b: yes\n", 1, "a.b"),
        ("@exclude: /x\n", 1, "@exclude"),
        ("servername: a\ndebug:\n", 2, "debug has no value"),
        ("servername: a\ndebug: \t \n", 2, "debug has no value"),
        ("servername: a\n@include:\n", 2, "@include has no value"),
        ("debug: yes\nservername: a\nDebug: no\n", 3, "debug is set already at"),
        ("debug: yes\ndebug: yes\n", 2, "imapd.conf:1; remove one"),
        # The line where it begins is where an editor finds it.
        ("servername: a\\\nb\nadmins \\\n x\\\n y\n", 3, "'admins  x y'"),
        (ALWAYS + "debug: \\\n maybe\n", 3, "debug: 'maybe' must be yes or no"),
        (ALWAYS + "umask: 089\n", 3, "umask: '089' must be an octal number"),
        (ALWAYS + "umask: -1\n", 3, "umask: '-1' must be"),
        (ALWAYS + "lmtp_max_recipients: many\n", 3, "lmtp_max_recipients: 'many' must be a whole number"),
        (ALWAYS + "lmtp_max_recipients: -1\n", 3, "lmtp_max_recipients: '-1' must be"),
        (ALWAYS + "lmtp_max_recipients: 1.5\n", 3, "lmtp_max_recipients: '1.5' must be"),
        (ALWAYS + "lmtp_command_timeout: 5 m\n", 3, "lmtp_command_timeout: '5 m' must be a duration"),
        (ALWAYS + "maxmessagesize: 20 M\n", 3, "maxmessagesize: '20 M' must be a size"),
        (ALWAYS + "serverinfo: yes\n", 3, "serverinfo: 'yes' must be one of on, min, off"),
        (ALWAYS + "syslog_facility: local8\n", 3, "syslog_facility: 'local8' must be one of"),
        (ALWAYS + "maildir_path: %p/%x\n", 3, "maildir_path: '%p/%x' may contain only %p, %u, %n, %d, %h and %%"),
        (ALWAYS + "maildir_path: %p/%u/100%\n", 3, "may contain only"),
        (ALWAYS + "maildir_path: mail/%u\n", 3, "maildir_path: 'mail/%u' must be an absolute path"),
        (ALWAYS + "maildir_path: %%p/%u\n", 3, "must be an absolute path"),
        *(
            (f"{ALWAYS}debug_command: x {bad}\n", 3, f"debug_command: 'x {bad}' may contain %s, %d and %s")
            for bad in ("%d", "%", "%s %s", "%x", "%s %d %s %s", "%5s", "%s%")
        ),
        ("partition-default: /spool\nconfigdirectory: lib\n", 2, "configdirectory: 'lib' must be an absolute path"),
        ("configdirectory: /lib\npartition-default: spool\n", 2, "partition-default: 'spool' must be an absolute"),
    ],
)
def test_an_error_names_file_line_and_what_is_wrong(conf: Conf, text: str, line: int, what: str) -> None:
    error = conf.error(text)
    assert error.startswith(f"{conf.main}:{line}: ")
    assert what in error


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("partition-default: /spool\n", "configdirectory must be set; add a line 'configdirectory: ...'"),
        ("configdirectory: /lib\n", "partition-default must be set; add a line"),
        ("configdirectory: /lib\npartition-a: /a\npartition-b: /b\n", "partition-default must be set"),
        (ALWAYS + "defaultpartition: fast\n", "partition-fast must be set"),
    ],
)
def test_an_error_of_the_whole_file_names_it(conf: Conf, text: str | bytes, what: str) -> None:
    error = conf.error(text)
    assert error.startswith(f"{conf.main}: ")
    assert what in error


# ----------------------------------------------------------------------
# Files that include others
# ----------------------------------------------------------------------


def test_an_included_file_counts_as_if_it_stood_there(conf: Conf) -> None:
    other = conf.write("debug: yes\n", "elsewhere/more.conf")
    assert conf.values(f"servername: a\n@include: {other}\nchatty: yes\n") == {
        "servername": "a",
        "debug": "yes",
        "chatty": "yes",
    }


def test_an_included_path_is_relative_to_the_file_that_includes_it(
    conf: Conf, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf.write("@INCLUDE: deeper/c.conf\nsyslog_prefix: b\n", "sub/b.conf")
    conf.write("@include: ../d.conf\ncyrus_user: c\n", "sub/deeper/c.conf")
    conf.write("admins: d\n", "sub/d.conf")
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert conf.values("@include: sub/b.conf\n") == {"admins": "d", "cyrus_user": "c", "syslog_prefix": "b"}


@pytest.mark.parametrize(
    ("files", "where"),
    [
        ({"imapd.conf": "@include: a\n@include: a\n", "a": ""}, "imapd.conf:2"),
        ({"imapd.conf": "@include: imapd.conf\n"}, "imapd.conf:1"),
        ({"imapd.conf": "@include: a\n", "a": "\n@include: ../{folder}/a\n"}, "a:2"),
        ({"imapd.conf": "@include: a\n", "a": "@include: b\n", "b": "#\n\n@include: imapd.conf\n"}, "b:3"),
        ({"imapd.conf": "@include: a\n@include: b\n", "a": "@include: b\n", "b": ""}, "imapd.conf:2"),
    ],
)
def test_including_a_file_twice_is_an_error(conf: Conf, files: dict[str, str], where: str) -> None:
    for name, text in files.items():
        conf.write(text.replace("{folder}", conf.folder.name), name)
    error = conf.error(conf.main.read_text())
    assert error.startswith(f"{conf.folder / where}: ")
    assert "is included twice" in error


def test_a_symbolic_link_does_not_hide_that_a_file_is_included_twice(conf: Conf) -> None:
    other = conf.write("debug: yes\n", "a")
    (conf.folder / "b").symlink_to(other)
    assert "is included twice" in conf.error("@include: a\n@include: b\n")


def test_an_option_may_not_be_set_in_two_files(conf: Conf) -> None:
    other = conf.write("# a\ndebug: yes\n", "a")
    error = conf.error("@include: a\ndebug: no\n")
    assert error.startswith(f"{conf.main}:2: debug is set already at {other}:2")


def test_an_error_in_an_included_file_is_said_of_that_file(conf: Conf) -> None:
    other = conf.write("# a\ndebug: perhaps\n", "a")
    assert conf.error(ALWAYS + "@include: a\n").startswith(f"{other}:2: debug: 'perhaps'")


@pytest.mark.parametrize("name", ["missing", ".", "imapd.conf/x"])
def test_a_file_that_cannot_be_read_is_named_with_the_reason(conf: Conf, name: str) -> None:
    error = conf.error(f"@include: {name}\n")
    assert str(conf.folder / name) in error
    assert error.endswith(("No such file or directory", "Is a directory", "Not a directory"))


# ----------------------------------------------------------------------
# Values
# ----------------------------------------------------------------------


@pytest.mark.parametrize(("words", "expected"), [("yes on true t 1", True), ("no off false f 0", False)])
def test_switches(conf: Conf, words: str, expected: bool) -> None:
    for word in words.split():
        for spelling in (word, word.upper(), word.title()):
            assert conf.load(f"{ALWAYS}debug: {spelling}\n").debug is expected


@pytest.mark.parametrize("word", ["y", "n", "2", "enabled", "ja", "yes no", "00", "tru"])
def test_what_is_no_switch(word: str) -> None:
    with pytest.raises(ValueError, match="must be yes or no"):
        lmtpd.as_switch(word)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0), ("90", 90), ("60s", 60), ("5m", 300), ("1h30m", 5400), ("3d", 259200), ("1H30", 3630), ("1m1m", 120)],
)
def test_durations(text: str, seconds: int) -> None:
    assert lmtpd.as_duration(text) == seconds


@pytest.mark.parametrize("text", ["0", "2d"])
def test_a_value_beyond_what_is_allowed_is_refused(conf: Conf, text: str) -> None:
    assert f"lmtp_command_timeout: '{text}' must be from 1s to 1d" in conf.error(
        f"{ALWAYS}lmtp_command_timeout: {text}\n"
    )


@pytest.mark.parametrize("text", ["m", "5w", "5 m", "-5", "+5", "5mm", "1.5h", "0x5", "٣", "s5", "5²"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="must be a duration"):
        lmtpd.as_duration(text)


@pytest.mark.parametrize(
    ("text", "octets"),
    [
        ("0", 0),
        ("1000", 1000),
        ("64K", 65536),
        ("64k", 65536),
        ("20M", 20971520),
        ("20MB", 20971520),
        ("3g", 3221225472),
        ("7B", 7),
        ("007", 7),
    ],
)
def test_sizes(conf: Conf, text: str, octets: int) -> None:
    assert conf.load(f"{ALWAYS}maxmessagesize: {text}\n").maxmessagesize == octets


@pytest.mark.parametrize("text", ["M", "5X", "5 M", "-5", "1.5M", "5MM", "5KM", "5BB", "5BK", "0x5", "٣", "5²"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="must be a size"):
        lmtpd.as_octets(text)


def test_numbers_choices_and_masks(conf: Conf) -> None:
    config = conf.load(f"{ALWAYS}umask: 0027\nlmtp_max_recipients: 12\nvirtdomains: USERID\nsyslog_facility: Local7\n")
    assert config.umask == 0o27
    assert config.lmtp_max_recipients == 12
    assert config.virtdomains == "userid"
    assert config.syslog_facility == "local7"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("%p/%u", "/spool/jane@example.com"),
        ("%p/%d/%n", "/spool/example.com/jane"),
        ("/home/%n/Maildir", "/home/jane/Maildir"),
        ("/mail/100%%/%u%%", "/mail/100%/jane@example.com%"),
        ("/mail/%%u/%n", "/mail/%u/jane"),
        ("/mail/%%%n", "/mail/%jane"),
    ],
)
def test_templates(conf: Conf, template: str, expected: str) -> None:
    config = conf.load(f"{ALWAYS}maildir_path: {template}\n")
    values = {"p": config.partition, "u": "jane@example.com", "n": "jane", "d": "example.com"}
    assert lmtpd.expand(config.maildir_path, values) == expected


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("gdb", "gdb"),
        ("gdb -p %%%s", "gdb -p %/python"),
        ("gdb %s %d # %s 100%%", "gdb /python 123 # lmtp 100%"),
    ],
)
def test_the_debug_command(conf: Conf, template: str, expected: str) -> None:
    config = conf.load(f"{ALWAYS}debug_command: {template}\n")
    assert lmtpd.debug_command(config.debug_command, "/python", 123, "lmtp") == expected


def test_what_a_client_names_is_never_taken_for_a_template() -> None:
    assert lmtpd.expand("%p/%u", {"p": "/spool", "u": "%p%u%%"}) == "/spool/%p%u%%"


def test_special_uses_have_the_prefix_of_the_service_too(conf: Conf) -> None:
    config = conf.load(
        f"{ALWAYS}xlist-drafts: Drafts\nlmtp_xlist-drafts: Others\nlmtp_xlist-junk: Spam\nimap_xlist-sent: Sent\n"
    )
    assert config.special_uses == {"\\drafts": "Others", "\\junk": "Spam"}


def test_the_defaults_are_those_of_cyrus(conf: Conf) -> None:
    config = conf.load(ALWAYS)
    assert (config.configdirectory, config.partition) == ("/lib", "/spool")
    assert (config.serverinfo, config.virtdomains, config.syslog_facility) == ("on", "off", "mail")
    assert (config.umask, config.maxmessagesize, config.lmtp_command_timeout) == (0o77, 0, 360)
    assert (config.lmtp_downcase_rcpt, config.soft_noauth, config.singleinstancestore) == (True, True, True)
    assert (config.debug, config.chatty, config.autocreate_post) == (False, False, False)
    assert (config.munge8bit, config.reject8bit) == (False, False)
    assert config.servername == os.uname().nodename


@pytest.mark.parametrize("name", sorted(Config.table()))
def test_every_option_has_a_default_of_its_own_type_and_a_meaning(name: str) -> None:
    row = Config.table()[name]
    if row.default is None:
        assert name == "configdirectory"
    elif row.default:
        assert row.parse(row.default) is not None
    assert row.meaning


def test_the_only_partition_is_the_default_one(conf: Conf) -> None:
    assert conf.load("configdirectory: /lib\npartition-fast: /fast\n").partition == "/fast"


def test_defaultpartition_chooses(conf: Conf) -> None:
    partitions = "configdirectory: /lib\npartition-a: /a\npartition-default: /d\n"
    assert conf.load(partitions).partition == "/d"
    assert conf.load(f"{partitions}defaultpartition: a\n").partition == "/a"


def test_no_partition_is_needed_when_maildirs_are_elsewhere(conf: Conf) -> None:
    config = conf.load("configdirectory: /lib\nmaildir_path: /home/%n/100%%p\n")
    assert config.partition == "/home"


def test_settings_of_other_programs_are_noted_with_their_place(conf: Conf) -> None:
    config = conf.load(f"{ALWAYS}partition-other: /other\nimapidlepoll: 60\nimap_maxmessagesize: ?\n")
    assert config.ignored == [(f"{conf.main}:4", "imapidlepoll"), (f"{conf.main}:5", "imap_maxmessagesize")]


# ----------------------------------------------------------------------
# Options of one service
# ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["lmtp_maxmessagesize: 2\nmaxmessagesize: 1\n", "maxmessagesize: 1\nLMTP_Maxmessagesize: 2\n"]
)
def test_an_option_of_the_service_overrides_the_general_one(conf: Conf, text: str) -> None:
    assert conf.load(ALWAYS + text).maxmessagesize == 2
    assert conf.load(ALWAYS + text, "LMTP").maxmessagesize == 2
    assert conf.load(ALWAYS + text, "lmtpunix").maxmessagesize == 1


def test_an_error_in_an_option_of_the_service_is_said_of_its_line(conf: Conf) -> None:
    assert conf.error(f"{ALWAYS}debug: no\nlmtp_debug: never\n").startswith(f"{conf.main}:4: ")


@pytest.mark.parametrize(
    ("service", "size"), [(None, "1001"), ("lmtp", "1001"), ("lmtpunix", "1002"), ("other", "1000")]
)
def test_master_names_the_service(site: Site, monkeypatch: pytest.MonkeyPatch, service: str | None, size: str) -> None:
    site.configure(maxmessagesize="1000", lmtp_maxmessagesize="1001", LMTPunix_maxmessagesize="1002")
    monkeypatch.delenv("CYRUS_SERVICE", raising=False)
    if service:
        monkeypatch.setenv("CYRUS_SERVICE", service)
    assert f"250-SIZE {size}\r\n" in site.pipe(b"LHLO x\r\nQUIT\r\n").stdout.decode()


# ----------------------------------------------------------------------
# What the client and the administrator see when the program cannot start
# ----------------------------------------------------------------------


def run(arguments: Sequence[str], before: str = "") -> subprocess.CompletedProcess[str]:
    """Runs lmtpd in a process where the statements before were executed first."""
    program = f"import builtins, os, sys, lmtpd\n{before}\nsys.exit(lmtpd.main())"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def test_a_missing_file_is_fatal_and_the_client_keeps_the_mail(site: Site) -> None:
    site.conf.unlink()
    result = site.pipe(b"LHLO x\r\n")
    assert result.returncode == CONFIGURATION
    assert re.fullmatch(rb"421 4\.3\.0 [^/\r\n]+\r\n", result.stdout)
    assert f"{site.conf}: No such file or directory" in site.log_text()


def test_without_the_option_the_file_is_etc_imapd_conf() -> None:
    absent = (
        "def absent(name, *arguments, open=open, **options):\n"
        "    if name == '/etc/imapd.conf':\n"
        "        raise FileNotFoundError(2, 'was asked for')\n"
        "    return open(name, *arguments, **options)\n"
        "builtins.open = absent\n"
        "lmtpd.SYSLOG_SOCKET = '/nonexistent'\n"
    )
    result = run([], absent)
    assert result.returncode == CONFIGURATION
    assert re.fullmatch(r"421 4\.3\.0 [^/\n]+\n", result.stdout)
    assert "/etc/imapd.conf: was asked for" in result.stderr


@pytest.mark.parametrize("text", ["debug: maybe\n", "nonsense\n", "@include: /nonexistent\n"])
def test_a_bad_file_is_fatal_and_only_the_log_says_where(site: Site, text: str) -> None:
    with site.conf.open("a") as conf:
        conf.write(text)
    result = site.pipe(b"LHLO x\r\n")
    assert result.returncode == CONFIGURATION
    assert re.fullmatch(rb"421 4\.3\.0 [^/\r\n]+\r\n", result.stdout)
    assert site.log_text().startswith("<3>configuration-error cause=")
    assert "/" in site.log_text()


@pytest.mark.parametrize(
    "arguments",
    [["-x"], ["-C"], ["-U"], ["extra"], ["--nonsense"], ["-a=1"], ["-C", "/etc/imapd.conf", "extra"]],
)
def test_a_wrong_command_line_is_refused_with_the_usage(arguments: list[str]) -> None:
    result = subprocess.run([LMTPD, *arguments], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    assert result.returncode == USAGE
    *lines, last = result.stdout.decode("ascii").removesuffix("\r\n").split("\r\n")
    assert all(line.startswith("421-4.3.0 ") for line in lines)
    assert last.startswith("421 4.3.0 ")
    assert "lmtpd [-C config-file]" in result.stdout.decode()


COMMAND_LINE_WORDS = [
    *lmtpd.SERVING_OPTIONS,
    "/etc/imapd.conf",
    "5",
    "",
    "-",
    "--",
    "-Cx",
    "-T5",
    "-aD",
    "--check",
    "-f",
    "--help",
]


@given(st.lists(st.sampled_from(COMMAND_LINE_WORDS), max_size=8))
def test_plain_options_are_parsed_as_docopt_does(words: list[str]) -> None:
    plain = lmtpd.plain_options(words)
    if plain is not None:
        assert docopt.docopt(lmtpd.__doc__, words, help=False) == plain


@pytest.mark.parametrize("words", ["", "-a", "-C /etc/other.conf", "-H -C x -T 60 -U 0 -D -a", "-T 0"])
def test_plain_options_do_not_need_docopt(words: str) -> None:
    plain = lmtpd.plain_options(words.split())
    assert plain == docopt.docopt(lmtpd.__doc__, words.split())


@pytest.mark.parametrize("words", ["-a -a", "-C", "-C -a", "-Cx", "-aD", "--check", "x", "-T 5 x", "-T --"])
def test_all_other_words_are_left_to_docopt(words: str) -> None:
    assert lmtpd.plain_options(words.split()) is None


def test_help_and_version() -> None:
    for option, expected in (("--help", lmtpd.__doc__ or "?"), ("--version", lmtpd.__version__)):
        result = subprocess.run([LMTPD, option], capture_output=True, text=True, check=False)
        assert result.returncode == 0
        assert expected.strip() in result.stdout
        assert not result.stderr


def test_root_without_cyrus_user_is_refused(site: Site) -> None:
    site.configure(cyrus_user=None)
    result = run(["-C", str(site.conf)], "os.geteuid = lambda: 0\nlmtpd.SYSLOG_SOCKET = '/nonexistent'")
    assert result.returncode == CONFIGURATION
    assert re.fullmatch(r"421 4\.3\.0 [^/\n]+\n", result.stdout)
    assert "refusing to run as root: set cyrus_user to the account" in result.stderr


@pytest.mark.parametrize(("account", "what"), [("no-such-account", "no-such-account"), ("root", "must not be root")])
def test_an_account_that_will_not_do_is_refused(site: Site, account: str, what: str) -> None:
    site.configure(cyrus_user=account)
    result = run(["-C", str(site.conf)], "os.geteuid = lambda: 0\nlmtpd.SYSLOG_SOCKET = '/nonexistent'")
    assert result.returncode == CONFIGURATION
    assert re.fullmatch(r"421 4\.3\.0 [^/\n]+\n", result.stdout)
    assert what in result.stderr


def test_cyrus_user_does_not_matter_to_others(site: Site) -> None:
    site.configure(cyrus_user=STORE_USER if AS_ROOT else "no-such-account")
    result = site.pipe(b"QUIT\r\n")
    assert result.returncode == 0
    assert result.stdout.startswith(b"220 ")


# ----------------------------------------------------------------------
# Any file
# ----------------------------------------------------------------------

BLANK = st.text(" \t", max_size=3)
KEYS = st.text("abcxyz0189_-", min_size=1, max_size=8).filter(lambda key: key.strip("-_"))
VALUES = (
    st.text(st.characters(exclude_categories=["Cc", "Cs", "Zs", "Zl", "Zp"]) | st.sampled_from(" #:@\\"), min_size=1)
    .map(str.strip)
    .filter(lambda value: value and not value.endswith("\\"))
)
NOISE = st.sampled_from(["", " ", "\t", "#", "# servername: x", "  #: @include: /nowhere"])


@st.composite
def rendered(draw: st.DrawFn, key: str, value: str) -> str:
    """One of the many ways to write a setting."""
    key = "".join(draw(st.sampled_from([c.lower(), c.upper()])) for c in key)
    line = draw(BLANK) + key + ":" + draw(BLANK) + value + draw(BLANK)
    cuts = sorted({0, *draw(st.sets(st.integers(1, len(line)), max_size=3)), len(line)})
    return "\\\n".join(line[start:end] for start, end in zip(cuts, cuts[1:]))


@st.composite
def files(draw: st.DrawFn) -> tuple[dict[str, str], dict[str, tuple[str, str]]]:
    """Texts by file name, and the settings that they hold: by name, the value and "file:line"."""
    settings = draw(st.dictionaries(KEYS, VALUES, max_size=6))
    texts = dict.fromkeys(("main", "sub/one", "sub/two"), "")
    expected = {}

    def write(name: str, text: str) -> str:
        where = f"{name}:{texts[name].count(chr(10)) + 1}"
        texts[name] += text + "\n"
        return where

    def include() -> None:
        write("main", "@include: sub/one")
        write(*draw(st.sampled_from([("main", "@include:sub/two"), ("sub/one", " @include: two ")])))

    includes_first = draw(st.booleans())
    if includes_first:
        include()
    for key, value in settings.items():
        name = draw(st.sampled_from(sorted(texts)))
        for noise in draw(st.lists(NOISE, max_size=2)):
            write(name, noise)
        expected[key] = value, write(name, draw(rendered(key, value)))
    if not includes_first:
        include()
    if draw(st.booleans()):
        texts = {name: text.removesuffix("\n") for name, text in texts.items()}
    return texts, expected


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="lmtpd-test-") as name:
        (Path(name) / "sub").mkdir()
        yield Path(name)


@settings(max_examples=300, deadline=None)
@given(files())
def test_settings_are_the_same_however_they_are_written(
    folder: Path, case: tuple[dict[str, str], dict[str, tuple[str, str]]]
) -> None:
    texts, expected = case
    for name, text in texts.items():
        (folder / name).write_text(text, "utf-8")
    settings, read = lmtpd.read_settings(str(folder / "main"), [])
    assert sorted(read) == sorted(os.path.realpath(folder / name) for name in texts)
    assert settings == {key: (value, f"{folder}/{where}") for key, (value, where) in expected.items()}


MARKS = ("\n", "\r\n", "\r", "\\\n", "\\", ":", "#", " ", "@include:", "self", "sub/one", "%", "%p", "/", "²", "é")
WORDS = ("debug", "servername", "umask", "maildir_path", "lmtp_", "partition-", "yes", "077", "1h", "9" * 5000, ALWAYS)
FRAGMENTS = st.sampled_from(MARKS + WORDS)


@settings(max_examples=300, deadline=None)
@given(st.lists(FRAGMENTS | st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=5), max_size=25))
def test_whatever_a_file_holds_the_only_error_is_a_configuration_error(folder: Path, fragments: list[str]) -> None:
    file = folder / "self"
    file.write_text("".join(fragments), "utf-8")
    outcome = ""
    try:
        outcome = Config.load(str(file)).configdirectory
    except ConfigError as error:
        outcome = str(error)
    assert outcome == "/lib" or outcome.startswith(str(folder))  # an error says where


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60))
def test_octets_that_are_no_text_are_a_configuration_error_too(folder: Path, octets: bytes) -> None:
    file = folder / "self"
    file.write_bytes(octets)
    with pytest.raises(ConfigError) as caught:  # so little cannot set what must be set
        Config.load(str(file))
    assert str(caught.value).startswith(str(file))


UNITS = {"s": 1, "m": 60, "h": 60 * 60, "d": 24 * 60 * 60}


@given(
    st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from("smhdSMHD")), max_size=5),
    st.none() | st.integers(0, 10**6),
)
def test_a_duration_is_the_sum_of_its_parts(parts: list[tuple[int, str]], bare: int | None) -> None:
    text = "".join(f"{number}{unit}" for number, unit in parts) + ("" if bare is None else str(bare))
    assert lmtpd.as_duration(text) == sum(number * UNITS[unit.lower()] for number, unit in parts) + (bare or 0)


@given(st.text("019smhdk MG-+.²", max_size=6))
def test_a_duration_is_digits_and_units_and_nothing_else(text: str) -> None:
    if re.fullmatch(r"([0-9]+[smhd])*[0-9]*", text, re.IGNORECASE | re.ASCII):
        assert lmtpd.as_duration(text) >= 0
    else:
        with pytest.raises(ValueError, match="must be a duration"):
            lmtpd.as_duration(text)


@given(st.text("019kKmMgGbB -+.²", min_size=1, max_size=6))
def test_a_size_is_digits_and_one_unit(text: str) -> None:
    if match := re.fullmatch(r"([0-9]+)([kmg]?)b?", text, re.IGNORECASE | re.ASCII):
        assert lmtpd.as_octets(text) == int(match[1]) << {"": 0, "k": 10, "m": 20, "g": 30}[match[2].lower()]
    else:
        with pytest.raises(ValueError, match="must be a size"):
            lmtpd.as_octets(text)


@given(st.text(max_size=8), st.sampled_from(sorted(Config.table())))
def test_a_type_refuses_with_a_value_error_or_takes(text: str, name: str) -> None:
    outcome: object = None
    try:
        outcome = Config.table()[name].parse(text)
    except ValueError as error:
        outcome = str(error)
    assert isinstance(outcome, (str, int, tuple))


@given(st.text(max_size=20), st.text(max_size=20), st.text(max_size=20))
def test_a_template_is_filled_in_once(before: str, value: str, after: str) -> None:
    template = f"/{before.replace('%', '%%')}%u{after.replace('%', '%%')}".replace("\0", "")
    assert lmtpd.expand(template, {"u": value.replace("\0", "")}) == f"/{before}{value}{after}".replace("\0", "")


def test_the_harness_makes_a_configuration() -> None:
    config = config_of(maildir_path="%p/%d/%n", virtdomains="on")
    assert (config.partition, config.maildir_path, config.virtdomains) == ("/spool", "%p/%d/%n", "on")


# ----------------------------------------------------------------------
# What is odd, and must not surprise
# ----------------------------------------------------------------------


def test_a_missing_included_file_is_said_of_the_line_that_includes_it(conf: Conf) -> None:
    error = conf.error("# 1\n@include: missing\n")
    assert error.startswith(f"{conf.main}:2: ")
    assert str(conf.folder / "missing") in error


def test_octets_that_are_no_text_are_found_by_their_line(conf: Conf) -> None:
    error = conf.error(ALWAYS.encode() + b"admins: \xff\n")
    assert error.startswith(f"{conf.main}:3: ")
    assert "is not UTF-8 text" in error


@pytest.mark.parametrize("text", ["@include: a\0b\n", "configdirectory: /a\0b\npartition-default: /spool\n"])
def test_nul_in_a_file_is_a_configuration_error(conf: Conf, text: str) -> None:
    assert conf.error(text).startswith(f"{conf.main}:1: ")


def test_the_name_of_a_partition_is_the_same_in_any_case(conf: Conf) -> None:
    partitions = "configdirectory: /lib\npartition-Fast: /fast\npartition-default: /d\n"
    assert conf.load(f"{partitions}defaultpartition: Fast\n").partition == "/fast"


def test_a_partition_of_the_service_overrides_the_general_one(conf: Conf) -> None:
    assert conf.load(f"{ALWAYS}lmtp_partition-default: /other\n").partition == "/other"


@pytest.mark.parametrize("mask", ["1000", "7777", "7" * 30])
def test_a_mask_has_nine_bits(conf: Conf, mask: str) -> None:
    assert conf.error(f"{ALWAYS}umask: {mask}\n").startswith(f"{conf.main}:3: umask: '{mask}' must be")


@pytest.mark.parametrize("timeout", ["25d", "1000000d"])
def test_a_long_timeout_is_kept_or_refused_at_the_start(site: Site, timeout: str) -> None:
    site.configure(lmtp_command_timeout=timeout)
    result = site.pipe(b"LHLO x\r\nQUIT\r\n")
    assert result.stdout.startswith(b"220 ") or result.returncode == CONFIGURATION
    assert b"Internal error" not in result.stdout
    assert "traceback" not in site.log_text()


@pytest.mark.parametrize("text", ["maxmessagesize: 1\u212a\n", "tcp_\u212aeepalive: yes\n"])
def test_only_ascii_letters_have_another_case(conf: Conf, text: str) -> None:
    assert conf.error(ALWAYS + text).startswith(f"{conf.main}:3: ")


@pytest.mark.parametrize("option", ["tcp_keepalive_cnt", "tcp_keepalive_idle", "tcp_keepalive_intvl"])
@pytest.mark.parametrize("number", ["40000", "2147483647"])
def test_a_probe_that_the_system_cannot_do_is_refused(conf: Conf, option: str, number: str) -> None:
    assert f"{option}: '{number}' must be from 0 to " in conf.error(f"{ALWAYS}{option}: {number}\n")


# ----------------------------------------------------------------------
# Options that have no effect
# ----------------------------------------------------------------------


def logged_settings(site: Site) -> list[str]:
    """What a start logs of the settings, without the paths."""
    site.log.write_text("")
    site.pipe(b"QUIT\r\n")
    lines = site.log_text().replace(str(site.conf), "imapd.conf").splitlines()
    return [line for line in lines if "option" in line or "odd" in line]


@pytest.mark.parametrize(
    ("name", "similar"),
    [
        ("maxmesagesize", "maxmessagesize"),
        ("lmtp_stict_quota", "lmtp_strict_quota"),
        ("sieve_usehomedir", "sieveusehomedir"),
        ("something_else_entirely", '""'),
    ],
)
def test_a_name_that_nobody_knows_is_warned_of_with_the_nearest(site: Site, name: str, similar: str) -> None:
    site.configure(**{name: "1"})
    place = f"imapd.conf:{len(site.options)}"
    line = f"<4>unknown-option where={place} name={name} similar={similar}"
    assert logged_settings(site) == [line]
    assert logged_settings(site) == []  # each connection may have a process of its own
    os.utime(site.conf, (time.time() + 10**6, time.time() + 10**6))
    assert logged_settings(site) == [line]
    assert logged_settings(site) == []


def test_a_process_that_listens_warns_at_each_start(site: Site) -> None:
    site.configure(maxmesagesize="1", mailnotifier="x")
    for _ in range(2):
        with SocketActivate(logged(site), address=str(site.root / "lmtp")) as starter:
            starter.connect().hello()
    assert [line.split()[-2:] for line in site.log_text().splitlines() if "where=" in line] == [
        ["name=maxmesagesize", "similar=maxmessagesize"],
        ["where=" + f"{site.conf}:{len(site.options)}", "name=mailnotifier"],
    ] * 2


@pytest.mark.parametrize(
    "name",
    [
        *("imapidlepoll", "idlesocket", "quota_db", "sasl_canon_user_plugin", "jmap_future_option", "partition-x"),
        *(
            "imap_admins",
            "lmtp_admins",
            "lmtpunix_maxmessagesize",
            "httpd_tls_server_cert",
            "metapartition-x",
            "xlist-y",
        ),
        *("archivepartition-x", "searchpartition-x", "imap_sasl_mech_list"),
    ],
)
def test_an_option_of_cyrus_is_no_reason_to_warn(site: Site, name: str) -> None:
    site.configure(**{name: "/x"})
    assert logged_settings(site) == []


def test_an_option_that_changes_what_happens_to_mail_is_named_once(site: Site) -> None:
    site.configure(sieve_utf8fileinto="yes", lmtp_username_tolower="no", idlesocket="/run/idle")
    named = [
        "<6>option-without-effect where=imapd.conf:6 name=sieve_utf8fileinto",
        "<6>option-without-effect where=imapd.conf:7 name=lmtp_username_tolower",
    ]
    assert logged_settings(site) == named
    assert logged_settings(site) == []
    site.configure(debug="yes")
    for _ in range(2):
        events = [line.split()[0] for line in logged_settings(site)]
        assert events == ["<6>option-without-effect", "<6>option-without-effect", "<7>option-ignored"]


def test_every_option_of_cyrus_is_known(site: Site) -> None:
    """Those that its own manual page lists."""
    [page] = (unpacked("cyrus") / "usr/share/man/man5").glob("imapd.conf.5.gz")
    names = re.findall(r"^\\fB([a-z][a-z_0-9]+):\\fP", gzip.decompress(page.read_bytes()).decode(), re.MULTILINE)
    assert len(names) > 400
    unknown = [name for name in names if name not in Config.table() and not lmtpd.is_cyrus_option(name)]
    assert unknown == []


@pytest.mark.parametrize("umask", ["777", "0177", "100"])
def test_a_mask_that_takes_the_owners_rights_is_refused(conf: Conf, umask: str) -> None:
    with pytest.raises(ConfigError, match=r"umask: '.*' must be from 0 to 077"):
        conf.load(f"{ALWAYS}umask: {umask}\n")
