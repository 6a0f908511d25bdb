"""Flags and keywords that a message is delivered with, and the file of keywords that is Dovecot's as much as ours."""

from __future__ import annotations

import imaplib
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import PATIENCE, Site
from mailboxes import deliver_in, letter, owner
from peers import Courier, Dovecot

import lmtpd
from lmtpd import INBOX, Config, Directory, DovecotLock, Incoming, Maildir

# When it is told to, delivers a message with each of the keywords, one after the other.
DELIVER = """
import sys
sys.path.insert(0, sys.argv[1])
from mailboxes import deliver_in
sys.stdin.readline()
for keyword in sys.argv[3:]:
    deliver_in(sys.argv[2], keyword)
"""


def deliver(site: Site, *flags: str, folder: str = INBOX) -> str:
    """The same; the name of the file, with the folder it is in."""
    before = stored(site)
    deliver_in(str(site.conf), *flags, folder=folder)
    [path] = stored(site) - before
    return str(path.relative_to(site.spool / "jane"))


def stored(site: Site) -> set[Path]:
    return {path for part in ("new", "cur", "tmp") for path in site.spool.glob(f"jane/**/{part}/*")}


def letters(name: str) -> str:
    """The flags in the name of a file in cur/."""
    match = re.fullmatch(r"(?:\.[^/]+/)?cur/[^:]+:2,([A-Za-z]*)", name)
    assert match, name
    assert list(match[1]) == sorted(match[1])
    return match[1]


def keyword_file(site: Site, folder: str = "") -> Path:
    return site.spool / "jane" / folder / "dovecot-keywords"


def set_keywords(site: Site, content: str) -> None:
    keyword_file(site).write_text(content)
    site.give(keyword_file(site))


def lock(site: Site, content: str, age: float = 0) -> Path:
    """Locks jane's INBOX in somebody's name, so many seconds ago."""
    path = site.spool / "jane/dovecot-uidlist.lock"
    path.write_text(content)
    site.give(path)
    os.utime(path, (time.time() - age,) * 2)
    return path


def flags_in(imap: imaplib.IMAP4, folder: str = "INBOX") -> dict[str, set[str]]:
    """The flags that IMAP shows, by the subject of the message."""
    assert imap.select(folder, readonly=True)[0] == "OK"
    found = {}
    for item in imap.fetch("1:*", "(FLAGS BODY.PEEK[HEADER.FIELDS (SUBJECT)])")[1]:
        if isinstance(item, tuple):
            match = re.search(rb"FLAGS \((.*?)\)", item[0])
            assert match, item
            found[item[1].decode().strip()[len("Subject: ") :]] = set(match[1].decode().split()) - {r"\Recent"}
    return found


@pytest.fixture
def dovecot(site: Site) -> Iterator[Dovecot]:
    with Dovecot(site) as dovecot:
        yield dovecot


# Flags


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([r"\Seen"], "S"),
        ([r"\Answered"], "R"),
        ([r"\Flagged"], "F"),
        ([r"\Draft"], "D"),
        ([r"\Deleted"], "T"),
        ([r"\seen", r"\SEEN", r"\FlAgGeD"], "FS"),
        ([r"\Seen", r"\Deleted", r"\Draft", r"\Answered", r"\Flagged"], "DFRST"),
    ],
)
def test_flags_are_in_the_name_of_the_file(site: Site, flags: list[str], expected: str) -> None:
    assert letters(deliver(site, *flags)) == expected
    assert not keyword_file(site).exists()


def test_without_flags_a_message_is_new(site: Site) -> None:
    assert re.fullmatch(r"new/[^:]+", deliver(site))


def test_both_servers_see_the_flags(site: Site, dovecot: Dovecot) -> None:
    wanted = [[r"\Seen"], [r"\Answered", r"\Flagged"], [r"\Draft"], [r"\Deleted"], []]
    for flags in wanted:
        deliver(site, *flags)
    expected = {" ".join(flags): set(flags) for flags in wanted}
    imap = dovecot.login("jane")
    assert flags_in(imap) == expected
    imap.logout()
    imap = Courier(site).login(site.spool / "jane")
    assert flags_in(imap) == expected
    imap.logout()


@pytest.mark.parametrize(
    "flag",
    [
        r"\Recent",
        r"\Nonsense",
        "\\",
        "",
        "a b",
        "a\nb",
        "1 a\n2 b",
        "a\0b",
        "a\x7f",
        "ü",
        "a)",
        "a]",
        "{a",
        "%",
        "*",
        '"a"',
        "a\\",
    ],
)
def test_what_is_no_flag_is_refused_and_nothing_is_stored(site: Site, flag: str) -> None:
    with pytest.raises(ValueError, match=r"flag|keyword"):
        deliver_in(str(site.conf), r"\Seen", "$Label1", flag)
    assert stored(site) == set()


def test_one_message_with_other_flags_for_each(site: Site) -> None:
    """The file is shared all the same."""
    site.add_user("joe")
    config = Config.load(str(site.conf))
    jane, joe = (Maildir(f"{config.partition}/{name}", owner(), config) for name in ("jane", "joe"))
    incoming = Incoming(b"Return-Path: <>\n", config, (jane.spool() for _ in range(1)))
    incoming.write(letter().replace(b"\r\n", b"\n"))
    incoming.complete()
    for placed in (
        jane.place(incoming.message, INBOX, [r"\Seen"], may_move=False),
        joe.place(incoming.message, INBOX, [r"\Flagged", "$Label1"]),
    ):
        placed.sync()
        placed.close()
    incoming.discard()
    [first], [second] = site.files("jane", kind="cur"), site.files("joe", kind="cur")
    assert first.name.endswith(":2,S")
    assert second.name.endswith(":2,Fa")
    assert first.stat().st_ino == second.stat().st_ino


def test_a_message_born_deleted_counts_only_if_such_messages_do(site: Site) -> None:
    quota = site.spool / "jane/maildirsize"
    for exclude, messages in (("no", 1), ("yes", 0)):
        quota.write_text("100000S\n0 0\n")
        site.give(quota)
        site.configure(quota_exclude_deleted=exclude)
        deliver(site, r"\Deleted")
        assert sum(int(line.split()[1]) for line in quota.read_text().splitlines()[1:]) == messages


# Keywords


def test_dovecot_sees_keywords_that_it_has_never_met(site: Site, dovecot: Dovecot) -> None:
    assert letters(deliver(site, "$Label1", r"\Seen", "NonJunk")) == "Sab"
    assert letters(deliver(site, "NonJunk")) == "b"
    assert keyword_file(site).read_text() == "0 $Label1\n1 NonJunk\n"
    assert flags_in(dovecot.login("jane")) == {
        r"$Label1 \Seen NonJunk": {r"\Seen", "$Label1", "NonJunk"},
        "NonJunk": {"NonJunk"},
    }


def test_keywords_of_dovecot_are_kept_and_used(site: Site, dovecot: Dovecot) -> None:
    deliver(site)
    imap = dovecot.login("jane")
    imap.select("INBOX")
    imap.store("1", "+FLAGS", "($Work Private)")
    before = keyword_file(site).read_text()
    assert letters(deliver(site, "Private")) == "b"
    assert letters(deliver(site, "$work")) == "a", "keywords have no case"
    assert keyword_file(site).read_text() == before == "0 $Work\n1 Private\n"
    assert letters(deliver(site, "Urgent")) == "c"
    imap.store("1", "+FLAGS", "(Later)")
    assert keyword_file(site).read_text() == "0 $Work\n1 Private\n2 Urgent\n3 Later\n"
    expected = {
        "": {"$Work", "Private", "Later"},
        "Private": {"Private"},
        "$work": {"$Work"},
        "Urgent": {"Urgent"},
    }
    assert flags_in(imap) == flags_in(dovecot.login("jane")) == expected


def test_each_folder_has_its_own_keywords(site: Site, dovecot: Dovecot) -> None:
    site.add_user("jane/.Lists")
    assert letters(deliver(site, "$One")) == "a"
    assert letters(deliver(site, "$Two", folder=".Lists")) == "a"
    assert keyword_file(site, ".Lists").read_text() == "0 $Two\n"
    imap = dovecot.login("jane")
    assert flags_in(imap) == {"$One": {"$One"}}
    assert flags_in(imap, "Lists") == {"$Two": {"$Two"}}


@pytest.mark.parametrize("content", ["0 $One\n2 $Three\n", "2 $Three\n0 $One\n", "0 $One\nnonsense\n2 $Three\n"])
def test_a_list_with_gaps_or_faults(site: Site, dovecot: Dovecot, content: str) -> None:
    set_keywords(site, content)
    assert letters(deliver(site, "$Three")) == "c"
    deliver(site, "$Two")
    deliver(site, "$One")
    assert flags_in(dovecot.login("jane")) == {name: {name} for name in ("$One", "$Two", "$Three")}


def test_there_are_letters_for_26_keywords(site: Site, dovecot: Dovecot) -> None:
    names = [f"$Label{number}" for number in range(26)]
    for name in names:
        deliver(site, name)
    full = keyword_file(site).read_text()
    assert letters(deliver(site, "$Last", r"\Seen", "$Label3")) == "Sd"
    assert letters(deliver(site, "$Last")) == ""
    assert keyword_file(site).read_text() == full
    seen = flags_in(dovecot.login("jane"))
    assert {name: seen[name] for name in names} == {name: {name} for name in names}


def test_the_list_belongs_to_the_user(site: Site) -> None:
    deliver(site, "$Label1")
    status, maildir = keyword_file(site).stat(), (site.spool / "jane").stat()
    assert (status.st_uid, status.st_gid) == (maildir.st_uid, maildir.st_gid)
    assert not list(site.spool.glob("jane/*.lock"))
    assert site.files("jane", kind="tmp") == []


# Others who write the list


def delivering(site: Site, *keywords: str) -> list[str]:
    """The command of a process that delivers with these keywords."""
    return [sys.executable, "-c", DELIVER, str(Path(__file__).parent), str(site.conf), *keywords]


def in_processes(site: Site, work: list[list[str]]) -> None:
    """Delivers with these keywords, each list of them in a process of its own, all at the same time."""
    children = [subprocess.Popen(delivering(site, *keywords), stdin=subprocess.PIPE) for keywords in work]
    try:
        time.sleep(0.5)
        for child in children:
            assert child.stdin
            child.stdin.close()
        assert [child.wait(PATIENCE) for child in children] == [0] * len(work)
    finally:
        for child in children:
            child.kill()
            child.wait()


def numbers_in(site: Site) -> list[int]:
    return [int(line.split()[0]) for line in keyword_file(site).read_text().splitlines()]


def test_dovecot_and_many_deliveries_add_keywords_at_the_same_time(site: Site, dovecot: Dovecot) -> None:
    ours = [[f"$p{process}k{number}" for number in range(4)] for process in range(4)]
    theirs = [f"$d{number}" for number in range(10)]
    deliver(site)
    imap = dovecot.login("jane")
    imap.select("INBOX")

    def store() -> None:
        for keyword in theirs:
            imap.store("1", "+FLAGS", f"({keyword})")
            time.sleep(0.1)

    thread = threading.Thread(target=store)
    thread.start()
    in_processes(site, ours)
    thread.join()
    imap.logout()
    assert numbers_in(site) == list(range(26))
    seen = flags_in(dovecot.login("jane"))
    assert seen == {"": set(theirs), **{name: {name} for names in ours for name in names}}
    assert not list(site.spool.glob("jane/*.lock"))


def dead_process() -> int:
    """The id of a process that is no more."""
    child = subprocess.Popen(["true"])
    child.wait()
    return child.pid


@pytest.mark.parametrize("whose", ["of a dead process", "old, of another host", "empty for a while"])
def test_a_stale_lock_is_in_nobodys_way(site: Site, whose: str) -> None:
    if whose == "of a dead process":
        path = lock(site, f"{dead_process()}:{socket.gethostname()}")
    else:
        path = lock(site, "1:elsewhere", age=3600) if "host" in whose else lock(site, "", age=90)
    began = time.monotonic()
    assert letters(deliver(site, "$Label1")) == "a"
    assert time.monotonic() - began < 10
    assert not path.exists()


def test_a_stale_lock_is_taken_by_one_at_a_time(site: Site) -> None:
    for attempt in range(3):
        keyword_file(site).unlink(missing_ok=True)
        lock(site, f"{dead_process()}:{socket.gethostname()}")
        names = [[f"$a{attempt}p{process}k{number}" for number in range(3)] for process in range(8)]
        in_processes(site, names)
        known = {line.split()[1] for line in keyword_file(site).read_text().splitlines()}
        assert known == {name for several in names for name in several}
        assert numbers_in(site) == list(range(24))


def test_a_stale_lock_that_somebody_else_has_just_taken_is_not_stale(site: Site) -> None:
    """One process is slow to remove it, another slow to write the list that it protects."""
    lock(site, f"{dead_process()}:{socket.gethostname()}")
    strace = ["strace", "-f", "-o", "/dev/null", "-e"]
    slow_to_remove = [*strace, "inject=?unlink,unlinkat:delay_enter=2s:when=1"]
    slow_to_write = [*strace, "inject=?rename,?renameat,renameat2:delay_enter=4s:when=1"]
    children = []
    for slow, keyword in ((slow_to_remove, "$One"), (slow_to_write, "$Two")):
        children.append(subprocess.Popen([*slow, *delivering(site, keyword)], stdin=subprocess.DEVNULL))
        time.sleep(1)
    assert [child.wait(PATIENCE) for child in children] == [0, 0]
    assert sorted(line.split()[1] for line in keyword_file(site).read_text().splitlines()) == ["$One", "$Two"]


def test_a_lock_that_is_held_is_waited_for(site: Site) -> None:
    path = lock(site, f"{os.getpid()}:{socket.gethostname()}")
    timer = threading.Timer(1.5, path.unlink)
    began = time.monotonic()
    timer.start()
    assert letters(deliver(site, "$Label1")) == "a"
    assert time.monotonic() - began >= 1.5
    timer.join()


def test_a_lock_is_nothing_to_one_who_adds_no_keyword(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmtpd, "LOCK_PATIENCE", 0)
    set_keywords(site, "0 $Label1\n")
    path = lock(site, f"{os.getpid()}:{socket.gethostname()}")
    assert letters(deliver(site, "$Label1", r"\Seen")) == "Sa"
    assert path.exists()


def test_nothing_is_stored_when_a_lock_is_held_for_too_long(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmtpd, "LOCK_PATIENCE", 1)
    path = lock(site, f"{os.getpid()}:{socket.gethostname()}")
    with pytest.raises(OSError, match="too long"):
        deliver_in(str(site.conf), "$Label1")
    assert stored(site) == set()
    assert path.exists()


def test_dovecot_waits_for_our_lock_and_we_for_dovecots(site: Site, dovecot: Dovecot) -> None:
    """A STORE of Dovecot while a lock like ours is held; it goes on when that is gone."""
    deliver(site)
    imap = dovecot.login("jane")
    imap.select("INBOX")
    finished: list[float] = []

    def store() -> None:
        imap.store("1", "+FLAGS", "($x)")
        finished.append(time.monotonic())

    with DovecotLock(Directory(str(site.spool / "jane"), owner()), INBOX, lmtpd.LOCK_FILE, lmtpd.LOCK_PATIENCE):
        site.give(site.spool / "jane/dovecot-uidlist.lock")
        began = time.monotonic()
        thread = threading.Thread(target=store)
        thread.start()
        time.sleep(1)
        assert not finished
        set_keywords(site, "0 $ours\n")
    thread.join(PATIENCE)
    assert time.monotonic() - began < 20
    assert keyword_file(site).read_text() == "0 $ours\n1 $x\n"
