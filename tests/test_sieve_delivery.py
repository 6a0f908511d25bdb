"""Whose script runs for a message, with whose rights it is read, and what becomes of one that cannot be used."""

from __future__ import annotations

import os
import pty
import socket
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import PATIENCE, Client, Site
from mailboxes import connected, letter, send
from sieve import DISCARDED, Sieve, script_text
from test_users import JANE, JOE, Homes, homes_of

LOG_LIMIT = 64 * 1024
WRONG = 'require "ihave";\nerror "not today";\n'  # an error at run time
UNKNOWN = "nonsense;\n"  # an error of the checker


def filing(folder: str) -> str:
    return script_text("fileinto", f'fileinto "{folder}";')


def put(path: Path, script: str, uid: int = JANE) -> Path:
    """Writes a script, and gives it and the folders that are made for it to that user."""
    missing = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script)
    for made in (*missing, path):
        os.chown(made, uid, uid)
    return path


def contents(maildir: Path) -> dict[str, int]:
    """The folders of a Maildir that have messages, and how many."""
    folders = {path.name[1:]: path for path in maildir.glob(".*") if path.is_dir()}
    counted = {
        name: sum(1 for kind in ("new", "cur") for _ in (path / kind).iterdir())
        for name, path in {"INBOX": maildir, **folders}.items()
    }
    return {name: count for name, count in counted.items() if count}


@pytest.fixture(scope="module")
def shared_homes() -> Iterator[Homes]:
    yield from homes_of("sql")


@pytest.fixture
def homes(shared_homes: Homes) -> Iterator[Homes]:
    """Users with accounts of their own, no options and an empty log; each test takes other names."""
    options = dict(shared_homes.site.options)
    shared_homes.site.log.write_text("")
    yield shared_homes
    added = {name: None for name in shared_homes.site.options if name not in options}
    shared_homes.site.configure(**added, **options)


# Whose script: the places


PLACES = ("field", "template", "home", "cyrus", "default")


@pytest.mark.parametrize("first", PLACES)
def test_the_first_place_that_is_configured_counts(homes: Homes, first: str) -> None:
    """Even though there are scripts at the others."""
    site, name = homes.site, f"ranked-{first}"
    field = {"sieve": "~/field.sieve"} if first == "field" else {}
    home = homes.users.add(name, JANE, **field)
    options = {
        "template": {"sieve_script": f"{site.root}/scripts/%u/active.sieve"},
        "home": {"sieveusehomedir": "yes"},
        "cyrus": {"sievedir": f"{site.root}/cyrus"},
    }
    for place in PLACES[PLACES.index(first) :]:
        site.configure(**options.get(place, {}))
    put(home / "field.sieve", filing("field"))
    put(site.root / f"scripts/{name}/active.sieve", filing("template"))
    put(home / ".sieve", filing("home"))
    put(site.root / f"cyrus/r/{name}/active.script", filing("cyrus"))
    (site.root / f"cyrus/r/{name}/defaultbc").symlink_to("active.bc")
    put(home / ".dovecot.sieve", filing("default"))
    assert homes.deliver(name) == ["250 2.1.5"]
    assert contents(home / "Maildir") == {first: 1}


@pytest.mark.parametrize(
    ("number", "field", "file"),
    [
        (1, "~/plain.sieve", "plain.sieve"),
        (2, "file:~/plain.sieve", "plain.sieve"),
        (3, "file:~/sieve;active=~/.active", ".active"),
        (4, "file:~/sieve;name=x;active=~/.active", ".active"),
        (5, "file:~/sieve", ".dovecot.sieve"),
        (6, "file:~/sieve/;bindir=~/bin", ".dovecot.sieve"),
    ],
)
def test_the_field_of_the_user_database(homes: Homes, number: int, field: str, file: str) -> None:
    """A folder of scripts has its active one at ~/.dovecot.sieve, where Dovecot puts the link unless it is told."""
    home = homes.users.add(f"field{number}", JANE, sieve=field)
    put(home / "sieve/one.sieve", filing("Other"))
    put(home / file, filing("Field"))
    assert homes.deliver(f"field{number}") == ["250 2.1.5"]
    assert contents(home / "Maildir") == {"Field": 1}


def test_a_field_that_is_no_file_is_named(homes: Homes) -> None:
    home = homes.users.add("no-file", JANE, sieve="dict:file:~/sieve")
    put(home / ".dovecot.sieve", "discard;")
    assert homes.deliver("no-file") == ["250 2.1.5"]
    assert contents(home / "Maildir") != {}
    assert "sieve=dict:file:~/sieve" in homes.site.log_text()


@pytest.mark.parametrize(
    ("template", "path"),
    [
        ("%p/../scripts/%u.sieve", "scripts/jane@other.example.sieve"),
        ("%p/../scripts/%n.sieve", "scripts/jane.sieve"),
        ("%p/../scripts/%d/%n/active", "scripts/other.example/jane/active"),
    ],
)
def test_the_variables_of_the_template(site: Site, template: str, path: str) -> None:
    maildir = site.add_user("jane@other.example")
    put(site.root / path, filing("Found"), maildir.stat().st_uid)
    client = connected(site, virtdomains="userid", sieve_script=template)
    assert client.deliver(letter(), "jane@other.example")[0].startswith("250")
    assert contents(maildir) == {"Found": 1}


def test_the_home_in_the_template(homes: Homes) -> None:
    homes.site.configure(sieve_script="%h/filters/%n.sieve")
    home = homes.users.add("at-home", JANE)
    put(home / "filters/at-home.sieve", filing("Found"))
    assert homes.deliver("at-home") == ["250 2.1.5"]
    assert contents(home / "Maildir") == {"Found": 1}


@pytest.mark.parametrize(
    ("user", "letter_of"),
    [("jane", "j"), ("zoe", "z"), ("4you", "q"), ("_x", "q"), ("\N{LATIN SMALL LETTER E WITH ACUTE}va", "q")],
)
def test_the_folder_of_a_user_of_cyrus(site: Site, user: str, letter_of: str) -> None:
    maildir = site.spool / user if user == "jane" else site.add_user(user)
    folder = site.root / "cyrus" / letter_of / user
    put(folder / "mine.script", filing("Cyrus"))
    put(folder / "mine.bc", "compiled")
    (folder / "defaultbc").symlink_to("mine.bc")
    assert send(connected(site, sievedir=f"{site.root}/cyrus"), user).startswith("250")
    assert contents(maildir) == {"Cyrus": 1}


@pytest.mark.parametrize(("domain", "letter_of"), [("other.example", "o"), ("4.example", "q")])
def test_the_folder_of_a_user_of_cyrus_in_a_domain(site: Site, domain: str, letter_of: str) -> None:
    maildir = site.add_user(f"jane@{domain}")
    folder = site.root / "cyrus/domain" / letter_of / domain / "j/jane"
    put(folder / "mine.script", filing("Cyrus"))
    (folder / "defaultbc").symlink_to(folder / "mine.bc")  # absolute, and nothing compiled
    client = connected(site, virtdomains="userid", sievedir=f"{site.root}/cyrus")
    assert client.deliver(letter(), f"jane@{domain}")[0].startswith("250")
    assert contents(maildir) == {"Cyrus": 1}


def test_a_script_of_cyrus_includes_another(site: Site) -> None:
    folder = site.root / "cyrus/j/jane"
    put(folder / "mine.script", script_text("include", 'include :personal "other";'))
    put(folder / "other.script", filing("Other"))
    (folder / "defaultbc").symlink_to("mine.bc")
    client = connected(site, sievedir=f"{site.root}/cyrus")
    assert send(client, "jane").startswith("250")
    assert contents(site.spool / "jane") == {"Other": 1}
    (folder / "defaultbc").unlink()
    assert send(client, "jane").startswith("250")
    assert contents(site.spool / "jane") == {"Other": 1, "INBOX": 1}


def test_shared_folders_run_no_script_of_a_user(site: Site) -> None:
    shared = site.add_user("shared")
    for folder in (".news", ".news/tmp", ".news/new", ".news/cur"):
        (shared / folder).mkdir()
        site.give(shared / folder)
    put(site.root / "scripts/jane.sieve", "discard;")
    put(site.root / "scripts/anyone.sieve", "discard;")
    options = {"postuser": "anyone", "shared_maildir": str(shared), "sieve_script": f"{site.root}/scripts/%u.sieve"}
    assert send(connected(site, **options), "anyone+news").startswith("250")
    assert contents(shared) == {"news": 1}


def test_mail_for_unknown_users_is_filtered_by_the_script_of_who_gets_it(site: Site) -> None:
    put(
        site.root / "scripts/jane.sieve",
        script_text("fileinto envelope", 'if envelope "to" "unknown@example.com" { fileinto "Strays"; }'),
    )
    put(site.root / "scripts/unknown.sieve", "discard;")
    client = connected(site, lmtp_catchall_mailbox="jane", sieve_script=f"{site.root}/scripts/%u.sieve")
    assert send(client, "unknown@example.com").startswith("250")
    assert contents(site.spool / "jane") == {"Strays": 1}


# Scripts of the site


def test_scripts_of_the_site_run_before_and_after(site: Site) -> None:
    sieve = Sieve(
        site,
        before=script_text("fileinto copy", 'fileinto :copy "Before";'),
        after=filing("After"),
        default=script_text("fileinto copy", 'fileinto :copy "Default";'),
    )
    outcome = sieve.run(script_text("fileinto copy", 'fileinto :copy "User";'))
    assert sorted(outcome.folders) == ["After", "Before", "User"]
    outcome = sieve.run(None)
    assert sorted(outcome.folders) == ["After", "Before", "Default"]
    outcome = sieve.run("discard;")
    assert sorted(outcome.folders) == ["Before"]


def test_a_folder_of_scripts_runs_in_the_order_of_their_names(site: Site) -> None:
    folder = site.root / "before.d"
    copies = {name: script_text("fileinto copy", f'fileinto :copy "{name}";') for name in ("20-b", "10-a", "30-c")}
    for name, script in copies.items():
        put(folder / f"{name}.sieve", script)
    put(folder / "25-off.disabled", "discard;")
    sieve = Sieve(site, sieve_before=str(folder))
    outcome = sieve.run(None)
    assert sorted(outcome.folders) == ["10-a", "20-b", "30-c", "INBOX"]
    scripts = " ".join(f"{folder}/{name}.sieve" for name in sorted(copies))
    assert [event["script"] for event in outcome.fields("delivered")] == [scripts] * 4


def test_a_missing_script_of_the_site_is_named_once(site: Site) -> None:
    sieve = Sieve(site, sieve_before=f"{site.root}/nowhere.sieve")
    events = [event for _ in range(3) for event in sieve.run(filing("Mine")).events]
    [fields] = [event.fields for event in events if event.name == "script-missing"]
    assert (fields["option"], fields["script"]) == ("sieve_before", f"{site.root}/nowhere.sieve")
    assert set(sieve.run(filing("Mine")).folders) == {"Mine"}


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_script_of_the_site_that_cannot_be_read_leaves_mail_in_the_inbox(site: Site, kind: str) -> None:
    path = put(site.root / "site.d/one.sieve", "discard;", 0)
    closed = path if kind == "file" else path.parent
    closed.chmod(0)
    client = connected(site, sieve_before=str(path.parent))
    assert send(client, "jane").startswith("250")
    assert contents(site.spool / "jane") == {"INBOX": 1}
    assert f"{closed}: Permission denied" in site.log_text()


def test_the_log_names_the_script_of_the_site_that_cannot_be_read(site: Site) -> None:
    (site.root / "before.sieve").mkdir()
    sieve = Sieve(site, sieve_before=f"{site.root}/before.sieve")
    (site.root / "before.sieve/one.sieve").mkdir()
    outcome = sieve.run("discard;")
    assert list(outcome.folders) == ["INBOX"]
    [error] = [event.fields for event in outcome.events if event.name == "script-error"]
    assert error["script"] == f"{site.root}/before.sieve/one.sieve"


def test_an_error_in_a_script_of_the_site_is_not_told_the_user(site: Site) -> None:
    sieve = Sieve(site, after=UNKNOWN)
    outcome = sieve.run("keep;")
    assert list(outcome.folders) == ["INBOX"]
    assert len(outcome.errors) == 1
    assert sorted(path.name for path in sieve.folder.iterdir()) == ["active.sieve"]
    assert not list(site.root.glob("*.log"))


# Scripts that cannot be read


UNUSABLE = ("closed", "closed folder", "fifo", "device", "folder", "loop", "of root", "of another")


@pytest.mark.parametrize("kind", UNUSABLE)
def test_mail_is_kept_when_the_script_cannot_be_read(homes: Homes, kind: str) -> None:
    name = f"odd-{kind.replace(' ', '-')}"
    home = homes.users.add(name, JANE)
    script = home / ".dovecot.sieve"
    if kind in {"closed", "closed folder"}:
        target = put(home / "sieve/active.sieve", "discard;")
        script.symlink_to(target)
        (target if kind == "closed" else target.parent).chmod(0)
    elif kind == "fifo":
        os.mkfifo(script)
        os.chown(script, JANE, JANE)
    elif kind == "device":
        script.symlink_to("/dev/zero")
    elif kind == "folder":
        script.mkdir()
    elif kind == "loop":
        script.symlink_to(".dovecot.sieve")
    else:
        owner = 0 if kind == "of root" else JOE
        secret = put(homes.site.root / f"secret-{owner}", "discard;", owner)
        secret.chmod(0o600)
        script.symlink_to(secret)
    assert homes.deliver(name) == ["250 2.1.5"]
    assert contents(home / "Maildir") == {"INBOX": 1}
    assert "<3>script-error session=" in homes.site.log_text()
    assert f"{script}: " in homes.site.log_text()


@pytest.mark.parametrize("kind", ["missing", "dangling", "below a file"])
def test_no_script_is_no_error(homes: Homes, kind: str) -> None:
    name = f"none-{kind.replace(' ', '-')}"
    home = homes.users.add(name, JANE)
    if kind == "dangling":
        (home / ".dovecot.sieve").symlink_to("sieve/gone.sieve")
    elif kind == "below a file":
        put(home / "sieve", "a file")
        (home / ".dovecot.sieve").symlink_to("sieve/gone.sieve")
    assert homes.deliver(name) == ["250 2.1.5"]
    assert contents(home / "Maildir") == {"INBOX": 1}
    assert "script" not in homes.site.log_text()


def test_a_script_that_another_owns_runs_if_the_user_may_read_it(homes: Homes) -> None:
    home = homes.users.add("borrower", JANE)
    lent = put(homes.site.root / "lent.sieve", filing("Lent"), JOE)
    (home / ".dovecot.sieve").symlink_to(lent)
    assert homes.deliver("borrower") == ["250 2.1.5"]
    assert contents(home / "Maildir") == {"Lent": 1}


def test_a_terminal_in_place_of_a_script_does_not_become_that_of_lmtpd(homes: Homes) -> None:
    """Its user could end the process with an interrupt, which would not even need another right."""
    home = homes.users.add("typist", JANE)
    master, slave = pty.openpty()
    try:
        terminal = Path(os.ttyname(slave))
        os.close(slave)
        os.chown(terminal, JANE, JANE)
        (home / ".dovecot.sieve").symlink_to(terminal)
        client, child = in_session_of_its_own(homes.site)
        assert client.deliver(letter(), "typist")[0].startswith("250")
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(") ")[2].split()
        client.close()
        child.wait(PATIENCE)
        session, terminal_number = fields[3:5]
        assert session == str(child.pid)  # only such a process gets a terminal
        assert terminal_number == "0"
    finally:
        os.close(master)


def in_session_of_its_own(site: Site) -> tuple[Client, subprocess.Popen[bytes]]:
    """Starts lmtpd as systemd does: the leader of a session without a terminal."""
    ours, theirs = socket.socketpair()
    with theirs, site.log.open("ab") as log:
        child = subprocess.Popen(
            site.command(),
            stdin=theirs.fileno(),
            stdout=theirs.fileno(),
            stderr=log,
            env=site.journal(),
            start_new_session=True,
        )
    client = Client(ours)
    client.hello()
    return client, child


# The file in which a user finds the errors


def test_errors_are_told_beside_the_script(homes: Homes) -> None:
    home = homes.users.add("told", JANE)
    script = put(home / "sieve/mine.sieve", UNKNOWN + "stop :now;\n")
    (home / ".dovecot.sieve").symlink_to("sieve/mine.sieve")
    assert homes.deliver("told") == ["250 2.1.5"]
    script.write_text(WRONG)
    assert homes.deliver("told") == ["250 2.1.5"]
    told = home / "sieve/mine.log"
    places = [line.split(" mine.sieve:")[1].split(": ")[0] for line in told.read_text().splitlines()]
    assert places == ["1:1", "2:6", "2"]
    status = told.stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (JANE, JANE, 0o600)
    assert contents(home / "Maildir") == {"INBOX": 2}
    assert not list(home.glob("*.log"))


@pytest.mark.parametrize("kind", ["link", "dangling link", "fifo", "folder", "closed folder", "file of root"])
def test_errors_are_told_nowhere_else(homes: Homes, kind: str) -> None:
    """Mail arrives in any case."""
    name = f"silent-{kind.replace(' ', '-')}"
    home = homes.users.add(name, JANE)
    put(home / "sieve/mine.sieve", WRONG)
    (home / ".dovecot.sieve").symlink_to("sieve/mine.sieve")
    told = home / "sieve/mine.log"
    victim = put(home / "victim", "precious\n")
    if kind == "link":
        told.symlink_to(victim)
    elif kind == "dangling link":
        told.symlink_to(home / "made")
    elif kind == "fifo":
        os.mkfifo(told)
        os.chown(told, JANE, JANE)
    elif kind == "folder":
        told.mkdir()
    elif kind == "closed folder":
        (home / "sieve").chmod(0o500)
    else:
        put(told, "of root\n", 0)
    assert homes.deliver(name) == ["250 2.1.5"]
    assert contents(home / "Maildir") == {"INBOX": 1}
    assert "<3>script-error" in homes.site.log_text()
    assert victim.read_text() == "precious\n"
    assert not (home / "made").exists()
    if kind == "closed folder":
        assert not told.exists()
    elif kind == "file of root":
        assert told.read_text() == "of root\n"


@pytest.mark.parametrize("size", [LOG_LIMIT - 200, LOG_LIMIT - 40, LOG_LIMIT, 10 * LOG_LIMIT])
def test_the_file_does_not_grow_beyond_its_limit(site: Site, size: int) -> None:
    sieve = Sieve(site)
    told = sieve.folder / "active.log"
    told.write_bytes(b"x" * (size - 1) + b"\n")
    for _ in range(5):
        sieve.run(WRONG)
        assert told.stat().st_size <= LOG_LIMIT
    assert told.read_text().endswith(" active.sieve:2: not today\n")


def test_one_long_error_does_not_exceed_the_limit(site: Site) -> None:
    sieve = Sieve(site, sieve_maxscriptsize="1024")
    outcome = sieve.run(script_text("ihave", f'error "{"x" * (2 * LOG_LIMIT)}";'))
    assert list(outcome.folders) == ["INBOX"]
    assert (sieve.folder / "active.log").stat().st_size <= LOG_LIMIT


def test_one_error_is_one_line_of_printable_text(site: Site) -> None:
    """Its text may be a stranger's: error can say what a header field has."""
    sieve = Sieve(site)
    sieve.run(script_text("ihave", 'error "one\ntwo\x1b[31m";'))
    [line] = (sieve.folder / "active.log").read_text().splitlines()
    assert line.isprintable()


def test_what_is_discarded_is_logged(homes: Homes) -> None:
    home = homes.users.add("discarder", JANE)
    put(home / ".dovecot.sieve", "discard;")
    assert homes.deliver("discarder") == ["250 2.1.5"]
    assert contents(home / "Maildir") == {}
    assert f"<6>{DISCARDED} session=" in homes.site.log_text()
