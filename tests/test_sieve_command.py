"""What the command line says about scripts: --check-sieve and --explain, which change nothing."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from harness import LMTPD, PATIENCE, Site
from mailboxes import connected, letter, send
from peers import lmtpd_for_others
from sieve import script_text
from test_sieve_delivery import contents, filing, put
from test_users import JANE, homes_of

OK, USAGE, NO_INPUT, CONFIG = os.EX_OK, os.EX_USAGE, os.EX_NOINPUT, os.EX_CONFIG


class Said:
    """What a command has printed. status: its exit status."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        self.status, self.lines, self.complaints = done.returncode, done.stdout.splitlines(), done.stderr

    def values(self, name: str) -> list[str]:
        """What stands behind that word in the lines that begin with it."""
        return [line[9:] for line in self.lines if line[:9].rstrip() == name]

    @property
    def value(self) -> dict[str, str]:
        """The lines that are there once, by the words that they begin with."""
        return {line[:9].rstrip(): line[9:] for line in self.lines}


def run(*command: str, text: bytes = b"", **environment: str) -> Said:
    done = subprocess.run(command, input=text, capture_output=True, timeout=PATIENCE, env={**os.environ, **environment})
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    output = (part.decode("utf-8", "surrogateescape") for part in (done.stdout, done.stderr))
    return Said(subprocess.CompletedProcess(command, done.returncode, *output))


def checked(site: Site, *scripts: Path | str) -> Said:
    return run(*site.command("--check-sieve", *map(str, scripts)))


def explained(site: Site, address: str, *options: str, message: bytes = b"") -> Said:
    before = state_of(site)
    said = run(*site.command("--explain", address, *options), text=message or letter())
    assert state_of(site) == before
    return said


def state_of(site: Site) -> set[tuple[str, int, int]]:
    """All files of a site but those of the database, which is opened, each with what shows a change."""
    unasked = (site.log, site.configdirectory, *site.configdirectory.glob("deliver.db*"))
    paths = (path for path in site.root.rglob("*") if path not in unasked)
    return {(str(path), path.lstat().st_size, path.lstat().st_mtime_ns) for path in paths}


# --check-sieve


def test_nothing_is_said_of_scripts_without_errors(site: Site) -> None:
    scripts = [put(site.root / f"{name}.sieve", filing(name)) for name in ("one", "two")]
    said = checked(site, *scripts)
    assert (said.status, said.lines, said.complaints) == (OK, [], "")


def test_each_error_is_named_with_its_place(site: Site) -> None:
    wrong = put(site.root / "wrong.sieve", 'keep;\n  nonsense;\nfileinto "x";\n')
    other = put(site.root / "other.sieve", "keep\n")
    good = put(site.root / "good.sieve", "keep;")
    said = checked(site, wrong, good, other)
    assert said.status == CONFIG
    places = [line.split(": ")[0] for line in said.lines]
    assert places[:2] == [f"{wrong}:2:3", f"{wrong}:3:1"]
    assert [place.rsplit(":", 2)[0] for place in places] == [str(wrong), str(wrong), str(other)]
    assert all(line.split(": ", 1)[1] for line in said.lines)


@pytest.mark.parametrize("order", [("missing", "wrong"), ("wrong", "missing")])
def test_a_file_that_cannot_be_read_does_not_end_the_check(site: Site, order: tuple[str, str]) -> None:
    put(site.root / "wrong.sieve", "nonsense;")
    said = checked(site, *(site.root / f"{name}.sieve" for name in order))
    assert said.status == NO_INPUT
    assert len(said.lines) == 1
    assert f"{site.root}/missing.sieve: No such file or directory" in said.complaints


def test_a_folder_is_no_script(site: Site) -> None:
    said = checked(site, site.root)
    assert (said.status, said.lines) == (NO_INPUT, [])
    assert f"{site.root}: Is a directory" in said.complaints


def test_a_script_can_be_checked_where_lmtpd_is_not_configured(site: Site) -> None:
    good, wrong = put(site.root / "good.sieve", filing("x")), put(site.root / "wrong.sieve", "nonsense;")
    for conf in (site.root / "nowhere.conf", site.root / "no-folder/imapd.conf"):
        check = (LMTPD, "-C", str(conf), "--check-sieve")
        assert run(*check, str(good)).status == OK
        assert run(*check, str(wrong)).status == CONFIG


def test_a_user_without_rights_can_check_a_script(site: Site) -> None:
    site.conf.chmod(0o600)
    good, wrong = put(site.root / "good.sieve", filing("x")), put(site.root / "wrong.sieve", "nonsense;")
    setpriv = ("setpriv", "--reuid", str(JANE), "--regid", str(JANE), "--clear-groups")
    for script, status in ((good, OK), (wrong, CONFIG)):
        assert (
            run(*setpriv, lmtpd_for_others(site), "-C", str(site.conf), "--check-sieve", str(script)).status == status
        )


def test_the_site_says_what_a_script_may_use_and_how_large_it_may_be(site: Site) -> None:
    filed, marked = put(site.root / "filed.sieve", filing("x")), put(site.root / "marked.sieve", "")
    marked.write_text(script_text("imap4flags", 'keep :flags "x";'))
    assert checked(site, filed, marked).status == OK
    site.configure(sieve_extensions="fileinto")
    said = checked(site, filed, marked)
    assert said.status == CONFIG
    assert {line.split(":")[0] for line in said.lines} == {str(marked)}
    site.configure(sieve_extensions=None, sieve_maxscriptsize="1")
    filed.write_text("#" * 2000 + "\nkeep;")
    assert checked(site, filed).status == CONFIG


def test_names_of_scripts_and_what_is_in_them_may_be_of_any_characters(site: Site) -> None:
    odd = Path(os.fsdecode(os.fsencode(site.root) + b"/\xff\xc3\xbc.sieve"))
    put(odd, script_text("\N{SNOWMAN}", "keep;"))
    for encoding in ("utf-8:strict", "ascii:strict", "latin-1:strict"):
        said = run(*site.command("--check-sieve", str(odd)), PYTHONIOENCODING=encoding)
        assert said.status == CONFIG
        assert len(said.lines) == 1
        said = run(*site.command("--check-sieve", f"{odd}.gone"), PYTHONIOENCODING=encoding)
        assert said.status == NO_INPUT


# --explain


def test_what_would_happen_is_explained(site: Site) -> None:
    script = put(site.root / "scripts/jane.sieve", script_text("fileinto imap4flags", TESTS))
    site.configure(sieve_script=f"{site.root}/scripts/%u.sieve")
    said = explained(site, "jane@example.com", message=b"Subject: hello\r\nTo: jane\r\n\r\nA body.\r\n")
    assert said.status == OK
    assert said.value == {
        "user": "jane",
        "userdb": "maildir",
        "mailbox": f"{site.spool}/jane",
        "folder": "INBOX",
        "quota": "none",
        "script": str(script),
        "reply": "250 2.1.5 Ok",
        "test": said.values("test")[-1],
        "actions": "fileinto Lists \\Seen, fileinto INBOX",
    }
    places = [test.split(": ")[0] for test in said.values("test")]
    assert set(places) == {f"{script}:2", f"{script}:3"}
    assert contents(site.spool / "jane") == {}


TESTS = """\
if header :is "Subject" "other" { discard; }
elsif header :is "Subject" "hello" { fileinto :flags "\\\\Seen" "Lists"; keep; }
"""


def test_the_sender_counts(site: Site) -> None:
    put(site.root / "scripts/jane.sieve", script_text("envelope", 'if envelope "from" "a@example.org" { discard; }'))
    site.configure(sieve_script=f"{site.root}/scripts/%u.sieve")
    for options, actions in (
        ((), "fileinto INBOX"),
        (("-f", "a@example.org"), "discard"),
        (("-f", ""), "fileinto INBOX"),
    ):
        assert explained(site, "jane", *options).value["actions"] == actions


def test_without_a_script_the_folder_is_explained(site: Site) -> None:
    for folder in (".Lists", ".Lists/tmp", ".Lists/new", ".Lists/cur"):
        (site.spool / "jane" / folder).mkdir()
    said = explained(site, "jane+Lists@example.com")
    assert said.value == {
        "user": "jane",
        "userdb": "maildir",
        "mailbox": f"{site.spool}/jane",
        "folder": "Lists",
        "quota": "none",
        "script": "none",
        "reply": "250 2.1.5 Ok",
        "actions": "fileinto Lists",
    }


def test_an_unknown_user_gets_the_reply_that_a_client_would(site: Site) -> None:
    said = explained(site, "nobody@example.com")
    assert (said.status, said.lines) == (OK, ["reply    550 5.1.1 User unknown"])


@pytest.mark.parametrize("address", ["", "<>", "<jane", "jane>x"])
def test_what_is_no_address_is_refused(site: Site, address: str) -> None:
    """In words for a person: no client waits for a reply."""
    said = explained(site, address)
    assert said.status == USAGE
    assert said.complaints
    assert said.lines == []


@pytest.mark.parametrize(
    ("script", "place"), [("keep;\nnonsense;\n", "2:1"), ('require "ihave";\nerror "not today";\n', "2")]
)
def test_an_error_is_explained_and_not_told_the_user(site: Site, script: str, place: str) -> None:
    path = put(site.root / "scripts/jane.sieve", script)
    site.give(path.parent)
    site.configure(sieve_script=f"{site.root}/scripts/%u.sieve")
    said = explained(site, "jane")
    [error] = said.values("error")
    assert error.startswith(f"{path}:{place}: ")
    assert said.value["actions"] == "fileinto INBOX"
    assert send(connected(site), "jane").startswith("250")
    assert error.split(": ", 1)[1] in path.with_suffix(".log").read_text()


def test_a_script_that_cannot_be_read_is_explained(site: Site) -> None:
    path = put(site.root / "scripts/jane.sieve", "discard;", 0)
    path.chmod(0)
    site.configure(sieve_script=f"{site.root}/scripts/%u.sieve")
    said = explained(site, "jane")
    [error] = said.values("error")
    assert error.startswith(f"{path}: Permission denied")
    assert said.value["actions"] == "fileinto INBOX"


def test_scripts_of_the_site_that_cannot_be_read_are_explained(site: Site) -> None:
    path = put(site.root / "site.d/one.sieve", "discard;", 0)
    path.parent.chmod(0)
    site.configure(sieve_before=str(path.parent))
    said = run(*site.command("--explain", "jane"), text=letter())
    assert said.status == OK
    [error] = said.values("error")
    assert error.startswith(f"{path.parent}: Permission denied")
    assert said.value["actions"] == "fileinto INBOX"


@pytest.mark.parametrize("eol", [b"\r\n", b"\n"], ids=["CR LF", "LF"])
@pytest.mark.parametrize("size", [0, 1_000_000])
def test_the_message_is_read_with_either_line_end(site: Site, eol: bytes, size: int) -> None:
    commands = 'if allof (header :is "Subject" "x", body :raw :contains "\nThe end\n", size :over 10) { discard; }'
    put(site.root / "scripts/jane.sieve", script_text("body", commands.replace("\n", "\r\n")))
    site.configure(sieve_script=f"{site.root}/scripts/%u.sieve")
    message = b"Subject: x\n\nA body.\n" + b"0123456\n" * (size // 8) + b"The end\n"
    assert explained(site, "jane", message=message.replace(b"\n", eol)).value["actions"] == "discard"


def test_what_is_remembered_is_asked_but_not_changed(site: Site) -> None:
    put(site.root / "scripts/jane.sieve", script_text("duplicate", "if duplicate { discard; }"))
    site.configure(sieve_script=f"{site.root}/scripts/%u.sieve")
    message = letter()
    for _ in range(2):
        assert explained(site, "jane", message=message).value["actions"] == "fileinto INBOX"
    assert send(connected(site), "jane", message).startswith("250")
    said = run(*site.command("--explain", "jane"), text=message)
    assert said.value["actions"] == "discard"
    assert contents(site.spool / "jane") == {"INBOX": 1}


def test_a_missing_maildir_is_not_made(site: Site) -> None:
    site.configure(autocreate_post="yes", autocreate_users="anyone")
    said = explained(site, "new")
    assert said.value["mailbox"] == f"{site.spool}/new"
    assert not (site.spool / "new").exists()


def test_a_script_in_a_home_is_read_with_the_rights_of_its_user() -> None:
    for homes in homes_of("sql"):
        home = homes.users.add("jane", JANE)
        script = put(home / "sieve/mine.sieve", filing("Mine"))
        script.chmod(0o600)
        (home / ".dovecot.sieve").symlink_to("sieve/mine.sieve")
        said = run(*homes.site.command("--explain", "jane"), text=letter())
        assert said.value["script"] == f"{home}/.dovecot.sieve"
        assert said.value["actions"] == "fileinto Mine"
        secret = put(homes.site.root / "secret", "discard;", 0)
        secret.chmod(0o600)
        (home / ".dovecot.sieve").unlink()
        (home / ".dovecot.sieve").symlink_to(secret)
        said = run(*homes.site.command("--explain", "jane"), text=letter())
        assert said.value["actions"] == "fileinto INBOX"
        assert not (home / "Maildir").exists()


def test_odd_characters_can_be_printed_anywhere(site: Site) -> None:
    commands = 'if header :contains "Subject" "\N{SNOWMAN}" { fileinto "\N{SNOWMAN}"; }'
    put(site.root / "scripts/jane.sieve", script_text("fileinto", commands))
    site.configure(sieve_script=f"{site.root}/scripts/%u.sieve")
    message = "Subject: \N{SNOWMAN}".encode() + b" \xff\r\n\r\n"
    for encoding in ("utf-8:strict", "ascii:strict", "latin-1:strict"):
        said = run(*site.command("--explain", "jane"), text=message, PYTHONIOENCODING=encoding)
        assert said.status == OK
        assert len(said.values("actions")) == 1
