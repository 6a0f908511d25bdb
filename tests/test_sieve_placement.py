"""What scripts file: which files there are then, what is taken back when one copy fails, and what is remembered."""

from __future__ import annotations

import re
import resource
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from harness import PATIENCE, Site
from mailboxes import connected, letter, messages_in, send
from peers import Dovecot, program
from sieve import Sieve, script_text
from test_sieve_delivery import contents, filing, put
from test_users import JANE, JOE, Homes, homes_of

from lmtpd import MEMORY_LIMIT

FULL, FAILED, OK = "452 4.2.2", "451 4.3.0", "250 2.1.5"
TWO_FOLDERS = script_text("fileinto", 'fileinto "Lists";\nfileinto "Work";')
THREE_FOLDERS = script_text("fileinto", 'fileinto "A";\nfileinto "B";\nfileinto "C";')
EDITED = script_text("fileinto editheader", 'keep;\naddheader "X-Filed" "yes";\nfileinto "Lists";')
ONCE = script_text("fileinto duplicate", 'if duplicate { discard; } else { fileinto "Lists"; }')


def copies(maildir: Path) -> dict[str, list[Path]]:
    """The message files of a Maildir by their folders."""
    found: dict[str, list[Path]] = {}
    for path in sorted(maildir.glob("**/*,S=*")):
        folder, kind = path.parts[-3:-1]
        assert kind in {"new", "cur"}, path
        found.setdefault(folder.removeprefix(".") if folder.startswith(".") else "INBOX", []).append(path)
    return found


def inode(path: Path) -> int:
    return path.stat().st_ino


def scripts_for(site: Site, **scripts: str) -> dict[str, str]:
    """Gives these users scripts; the option that says where they are."""
    for user, script in scripts.items():
        put(site.root / f"scripts/{user}.sieve", script)
    return {"sieve_script": f"{site.root}/scripts/%u.sieve"}


@pytest.fixture(scope="module")
def homes() -> Iterator[Homes]:
    yield from homes_of("sql")


# Folders and files


def test_a_folder_that_is_made_is_subscribed(site: Site) -> None:
    Sieve(site).run(
        script_text("fileinto", 'fileinto "Lists";\nfileinto "Work/\N{LATIN SMALL LETTER U WITH DIAERESIS}";')
    )
    maildir = site.spool / "jane"
    assert (maildir / "courierimapsubscribed").read_text().split() == ["INBOX.Lists", "INBOX.Work.&APw-"]
    assert (maildir / "subscriptions").read_text().split() == ["V", "2", "Lists", "Work", "&APw-"]
    (maildir / "subscriptions").write_text("V\t2\n\n")
    Sieve(site).run(filing("Lists"))
    assert (maildir / "subscriptions").read_text() == "V\t2\n\n"  # the user has unsubscribed


def test_keep_for_a_sub_address_subscribes_only_if_the_site_wants_it(site: Site) -> None:
    """As without a script."""
    client = connected(site, lmtp_detail_create="yes", **scripts_for(site, jane="keep;"))
    assert send(client, "jane+made").startswith("250")
    assert contents(site.spool / "jane") == {"made": 1}
    assert not (site.spool / "jane/subscriptions").exists()


def test_dovecot_shows_flags_and_keywords(site: Site) -> None:
    commands = 'setflag ["$label1", "\\\\Seen"];\nkeep;\nfileinto :flags ["\\\\Flagged", "work"] "Lists";'
    options = scripts_for(site, jane=script_text("fileinto imap4flags", commands))
    assert send(connected(site, **options), "jane").startswith("250")
    with Dovecot(site) as dovecot:
        imap = dovecot.login("jane")
        found = {}
        for folder in ("INBOX", "Lists"):
            assert messages_in(imap, folder) == 1
            imap.select(folder, readonly=True)
            [line] = imap.fetch("1", "(FLAGS)")[1]
            assert isinstance(line, bytes)
            found[folder] = set(line.partition(b"(FLAGS (")[2].rstrip(b")").split()) - {b"\\Recent"}
        subscribed = imap.lsub()[1]
        imap.logout()
    assert found == {"INBOX": {b"$label1", b"\\Seen"}, "Lists": {b"\\Flagged", b"work"}}
    assert [line.split()[-1] for line in subscribed if isinstance(line, bytes)] == [b"Lists"]


@pytest.mark.parametrize("size", [0, MEMORY_LIMIT + 1000], ids=["small", "large"])
def test_copies_share_a_file_unless_their_header_is_edited(site: Site, size: int) -> None:
    site.add_user("joe", "jim")
    options = scripts_for(site, jane=EDITED, joe=TWO_FOLDERS)
    replies = connected(site, **options).deliver(message := letter(size), "jane", "joe", "jim")
    assert [reply[:9] for reply in replies] == [OK] * 3
    jane, joe, jim = (copies(site.spool / user) for user in ("jane", "joe", "jim"))
    assert {user: sorted(found) for user, found in (("jane", jane), ("joe", joe), ("jim", jim))} == {
        "jane": ["INBOX", "Lists"],
        "joe": ["Lists", "Work"],
        "jim": ["INBOX"],
    }
    [plain], [edited] = jane["INBOX"], jane["Lists"]
    assert {inode(path) for found in (joe, jim) for [path] in found.values()} == {inode(plain)}
    assert (plain.stat().st_nlink, edited.stat().st_nlink) == (4, 1)
    assert edited.read_bytes().replace(b"X-Filed: yes\n", b"") == plain.read_bytes()
    assert plain.read_bytes().endswith(message.replace(b"\r\n", b"\n"))
    for path in (plain, edited):
        octets = path.read_bytes()
        assert f",S={len(octets)},W={len(octets) + octets.count(10)}" in path.name
    assert not list(site.spool.glob("*/tmp/*"))


@pytest.mark.parametrize("delivered_to", ["no", "yes"])
def test_a_large_message_is_tested_and_filed(site: Site, delivered_to: str) -> None:
    filed = 'fileinto "Lists"; addheader "X" "y"; fileinto "Work"; addheader "Z" "y"; keep;'
    commands = f'if body :raw :contains "A body." {{ {filed} }}'
    options = scripts_for(site, jane=script_text("fileinto body editheader", commands), joe="discard;")
    site.add_user("joe")
    client = connected(site, lmtp_delivered_to=delivered_to, **options)
    message = letter(MEMORY_LIMIT * 3)
    assert [reply[:9] for reply in client.deliver(message, "jane", "joe")] == [OK, OK]
    found = copies(site.spool / "jane")
    assert sorted(found) == ["INBOX", "Lists", "Work"]
    body = message.partition(b"\r\n\r\n")[2].replace(b"\r\n", b"\n")
    for folder, added in (("Lists", []), ("Work", [b"X: y"]), ("INBOX", [b"X: y", b"Z: y"])):
        header, _, rest = found[folder][0].read_bytes().partition(b"\n\n")
        lines = header.split(b"\n")
        assert rest == body
        assert sorted(line for line in lines if line in {b"X: y", b"Z: y"}) == added
        assert (b"Delivered-To: jane@example.com" in lines or b"Delivered-To: jane" in lines) == (delivered_to == "yes")
    assert copies(site.spool / "joe") == {}
    assert not list(site.spool.glob("*/tmp/*"))
    assert not [path for path in site.configdirectory.glob("*") if path.stat().st_size > MEMORY_LIMIT]


def test_two_hundred_recipients_have_a_script_each(site: Site) -> None:
    names = [f"user{number}" for number in range(200)]
    site.add_user(*names)
    options = scripts_for(
        site, **{name: script_text("fileinto copy", f'fileinto :copy "of-{name}";') for name in names}
    )
    replies = connected(site, **options).deliver(letter(), *names)
    assert {reply[:9] for reply in replies} == {OK}
    for name in names:
        assert contents(site.spool / name) == {"INBOX": 1, f"of-{name}": 1}
    assert len({inode(path) for path in site.spool.glob("**/*,S=*")}) == 1


def test_many_edited_copies_need_few_descriptors(site: Site) -> None:
    """As many as are open at a time at most: one for each of 199 recipients, and 32 for the last."""
    names = [f"user{number}" for number in range(199)]
    site.add_user(*names)
    one = script_text("editheader", 'addheader "X" "y";')
    many = "\n".join(f'addheader "X-{number}" "y";\nfileinto "F{number}";' for number in range(32))
    options = scripts_for(site, **dict.fromkeys(names, one), jane=script_text("fileinto editheader", many))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))  # what most systems begin with
    try:
        client = connected(site, **options)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert {reply[:9] for reply in client.deliver(letter(), *names, "jane")} == {OK}
    assert len(list(site.spool.glob("**/*,S=*"))) == 199 + 32


# Sub-addresses


@pytest.mark.parametrize(
    ("wanted", "script", "placed"),
    [
        ("yes", "keep;", "Lists"),
        ("no", "keep;", "INBOX"),
        ("yes", filing("Work"), "Work"),
        ("yes", "nonsense;", "Lists"),
        ("no", "nonsense;", "INBOX"),
        ("no", None, "Lists"),  # who has no script gets mail as before
    ],
)
def test_where_keep_puts_mail_for_a_sub_address(site: Site, wanted: str, script: str | None, placed: str) -> None:
    sieve = Sieve(site, sieve_subaddress_folder=wanted)
    sieve.add_folder("Lists")
    assert list(sieve.run(script, detail="Lists").folders) == [placed]


# Failures


def test_one_copy_that_fails_is_the_failure_of_that_recipient_only(homes: Homes) -> None:
    jane, joe = homes.users.add("jane", JANE), homes.users.add("joe", JOE)
    for home, uid in ((jane, JANE), (joe, JOE)):
        put(home / ".dovecot.sieve", TWO_FOLDERS, uid)
    assert homes.deliver("jane", "joe") == [OK, OK]
    (jane / "Maildir/.Work/new").chmod(0o500)
    assert homes.deliver("jane", "joe") == [FAILED, OK]
    assert contents(jane / "Maildir") == {"Lists": 1, "Work": 1}
    assert contents(joe / "Maildir") == {"Lists": 2, "Work": 2}
    assert not list((jane / "Maildir/tmp").iterdir())


def test_a_file_in_place_of_a_folder_is_an_error_of_the_script(site: Site) -> None:
    sieve = Sieve(site)
    (site.spool / "jane/.Work").touch()
    outcome = sieve.run(TWO_FOLDERS)
    assert list(outcome.folders) == ["INBOX"]
    assert len(outcome.errors) == 1


def used(site: Site) -> tuple[int, int]:
    """The octets and messages that jane's maildirsize counts."""
    lines = [line.split() for line in (site.spool / "jane/maildirsize").read_text().splitlines()[1:]]
    octets, messages = (sum(map(int, column)) for column in zip(*lines))
    return octets, messages


def test_a_copy_beyond_the_quota_takes_the_others_back(site: Site) -> None:
    sieve = Sieve(site, lmtp_strict_quota="yes", default_quota_messages="2")
    (site.spool / "jane/maildirsize").write_text("2C\n0 0\n")
    outcome = sieve.run(THREE_FOLDERS)
    assert outcome.reply[:9] == FULL
    assert outcome.folders == {}
    assert used(site) == (0, 0)
    outcome = sieve.run(TWO_FOLDERS)
    assert sorted(outcome.folders) == ["Lists", "Work"]
    assert used(site)[1] == 2


def test_a_folder_that_does_not_count_takes_more(site: Site) -> None:
    options = {"lmtp_strict_quota": "yes", "quota_exclude_folders": "Trash"}
    sieve = Sieve(site, **options)
    (site.spool / "jane/maildirsize").write_text("1C\n0 0\n")
    script = script_text("fileinto copy", 'fileinto :copy "Trash";')
    assert sorted(sieve.run(script).folders) == ["INBOX", "Trash"]
    assert used(site)[1] == 1


# What is remembered


def test_a_message_that_comes_again_is_filed_once_in_each_folder(site: Site) -> None:
    sieve = Sieve(site, duplicatesuppression="yes")
    message = letter()
    assert sorted(sieve.run(TWO_FOLDERS, message).folders) == ["Lists", "Work"]
    outcome = sieve.run(TWO_FOLDERS, message)
    assert outcome.folders == {}
    assert outcome.reply.startswith("250")
    folders = [Path(event.fields["mailbox"]).name for event in outcome.events if event.name == "duplicate"]
    assert sorted(folders) == [".Lists", ".Work"]
    assert sorted(sieve.run(THREE_FOLDERS, message).folders) == ["A", "B", "C"]
    assert list(sieve.run("keep;", message).folders) == ["INBOX"]


def test_the_test_duplicate_remembers_what_is_stored_only(site: Site) -> None:
    sieve = Sieve(site)
    message = letter()
    sieve.add_folder("Lists")
    new = site.spool / "jane/.Lists/new"
    new.rmdir()
    new.touch()
    assert sieve.run(ONCE, message).reply[:9] == FAILED
    assert sieve.run(ONCE, message).reply[:9] == FAILED
    new.unlink()
    assert list(sieve.run(ONCE, message).folders) == ["Lists"]
    assert sieve.run(ONCE, message).is_discarded


def test_the_test_duplicate_remembers_beyond_the_process(site: Site) -> None:
    options = scripts_for(site, jane=ONCE)
    message = letter()
    for _ in range(2):
        assert send(connected(site, **options), "jane", message).startswith("250")
    assert contents(site.spool / "jane") == {"Lists": 1}
    site.add_user("joe")
    assert send(connected(site, **scripts_for(site, joe=ONCE)), "joe", message).startswith("250")
    assert contents(site.spool / "joe") == {"Lists": 1}


def test_the_test_duplicate_knows_the_other_recipients_of_the_transaction(site: Site) -> None:
    """The same mailbox is reached by two addresses, as by an alias."""
    client = connected(site, **scripts_for(site, jane=ONCE))
    assert [reply[:9] for reply in client.deliver(letter(), "jane", "jane+x")] == [OK, OK]
    assert contents(site.spool / "jane") == {"Lists": 1}


@pytest.mark.parametrize(
    ("arguments", "longest", "remembered"),
    [("", "90d", 7 * 86400), (":seconds 60", "90d", 60), (":seconds 864000", "1d", 86400), (":seconds 0", "90d", 0)],
)
def test_how_long_the_test_duplicate_remembers(site: Site, arguments: str, longest: str, remembered: int) -> None:
    sieve = Sieve(site, sieve_duplicate_max_expiration=longest)
    script = script_text("duplicate", f"if duplicate {arguments} {{ discard; }}")
    message, now = letter(), time.time()
    with mock.patch.object(time, "time") as clock:
        for seconds, is_known in ((0, False), (remembered - 1, True), (remembered + 1, False)):
            clock.return_value = now + max(seconds, 0)
            if remembered or not is_known:
                assert sieve.run(script, message).is_discarded == is_known, seconds


def test_last_counts_from_the_latest_message(site: Site) -> None:
    sieve = Sieve(site)
    script = script_text("duplicate", "if duplicate :seconds 60 :last { discard; }")
    message, now = letter(), time.time()
    with mock.patch.object(time, "time") as clock:
        for seconds, is_known in ((0, False), (50, True), (100, True), (161, False)):
            clock.return_value = now + seconds
            assert bool(sieve.run(script, message).folders) != is_known, seconds


# Killed


def test_nothing_is_lost_when_the_delivery_is_killed(site: Site) -> None:
    """At each of the calls that change something in the Maildir, one after the other; then the client tries again."""
    calls = "?link,?linkat,?rename,?renameat,?renameat2,fsync,?mkdir,?mkdirat,?unlink,?unlinkat"
    users = [f"user{number}" for number in range(100)]
    options = scripts_for(
        site, **dict.fromkeys(users, script_text("fileinto copy", THREE_FOLDERS.split("\n", 1)[1] + "keep;"))
    )
    site.configure(duplicatesuppression="yes", **options)
    for when, user in enumerate(users, 1):
        maildir = site.add_user(user)
        message = letter()
        session = b"LHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<%s>\r\nDATA\r\n%s.\r\nQUIT\r\n" % (user.encode(), message)
        command = [program("strace"), "-f", "-o", "/dev/null", "-e", f"inject={calls}:signal=KILL:when={when}"]
        replies = []
        for trace in (command, []):
            done = subprocess.run(
                [*trace, *site.command()],
                input=session,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                timeout=PATIENCE,
            )
            replies.append(re.search(rb"^250 2\.1\.5 Ok SESSIONID", done.stdout, re.MULTILINE) is not None)
            if replies == [True]:
                break
        for path in [path for paths in copies_seen(maildir).values() for path in paths]:
            assert path.read_bytes().endswith(message.replace(b"\r\n", b"\n"))
        assert sorted(copies_seen(maildir)) == ["A", "B", "C", "INBOX"], when
        if replies == [True]:
            assert when > 10
            return
        assert replies == [False, True]
    raise AssertionError("it has been killed each time")


def copies_seen(maildir: Path) -> dict[str, list[Path]]:
    """The message files by folder, without the drafts that a killed process leaves."""
    return {
        folder: paths
        for folder, path in {"INBOX": maildir, **{path.name[1:]: path for path in maildir.glob(".*")}}.items()
        if (paths := [*path.glob("new/*"), *path.glob("cur/*")])
    }
