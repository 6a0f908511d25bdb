"""The Maildir++ quota: what counts, who is refused, and that lmtpd, Dovecot and Courier come to the same sums."""

from __future__ import annotations

import errno
import fcntl
import imaplib
import os
import random
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
from file_systems import ALL_DRAFTS
from harness import PATIENCE, Client, Site
from mailboxes import connected, letter, owner, send
from peers import Courier, CourierImap, Dovecot

from lmtpd import INBOX, Config, Directory, Maildir

FULL = "452 4.2.2"
MEGABYTE = 1_000_000


class Kept(NamedTuple):
    """What a file maildirsize says: the limits, and the sums of its other lines."""

    limits: str
    octets: int
    messages: int


def quota_file(site: Site) -> Path:
    return site.spool / "jane/maildirsize"


def set_quota(site: Site, content: str | bytes, age: float = 0) -> None:
    """Gives jane a maildirsize that was written so many seconds ago."""
    path = quota_file(site)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    site.give(path)
    os.utime(path, (time.time() - age,) * 2)


def kept(site: Site) -> Kept:
    """What is in jane's maildirsize, which must be without a fault."""
    content = quota_file(site).read_text()
    assert re.fullmatch(r"(\d+[SC])(,\d+[SC])?\n( *-?\d+ +-?\d+ *\n)*", content), content
    limits, *lines = content.splitlines()
    return Kept(limits, *(sum(int(line.split()[column]) for line in lines) for column in (0, 1)))


def present(site: Site, *but: str) -> tuple[int, int]:
    """The octets and the number of jane's messages in all folders but some."""
    maildir = site.spool / "jane"
    folders = [maildir, *(path for path in maildir.glob(".*") if path.is_dir() and path.name not in but)]
    files = [path for folder in folders for part in ("new", "cur") for path in (folder / part).iterdir()]
    return sum(path.stat().st_size for path in files), len(files)


def rcpt(client: Client, mail: str = "", parameters: str = "", address: str = "jane") -> str:
    """What is said to the recipient; the transaction is given up."""
    assert client.command(f"MAIL FROM:<> {mail}").startswith("250")
    reply = client.command(f"RCPT TO:<{address}> {parameters}")
    client.command("RSET")
    return reply


def put(site: Site, name: str, size: int, folder: str = "") -> None:
    """Puts a message file of that size into jane's folder (NAME or PART/NAME)."""
    path = site.spool / "jane" / folder / (name if "/" in name else f"cur/{name}")
    path.write_bytes(b"Subject: x\n\n".ljust(size, b"x"))
    site.give(path)


# Reading and appending


def test_what_is_delivered_is_counted(site: Site) -> None:
    set_quota(site, "100000S,10C\n100 1\n")
    client = connected(site)
    assert send(client, "jane", letter(500)).startswith("250")
    [size] = [path.stat().st_size for path in site.files("jane")]
    assert quota_file(site).read_text() == f"100000S,10C\n100 1\n{size} 1\n"
    assert send(client, "jane", letter(5000)).startswith("250")
    assert kept(site) == ("100000S,10C", 100 + sum(path.stat().st_size for path in site.files("jane")), 3)


def test_each_folder_counts(site: Site) -> None:
    site.add_user("jane/.Lists")
    set_quota(site, "100000S\n0 0\n")
    assert [reply[:3] for reply in connected(site).deliver(letter(), "jane", "jane+Lists")] == ["250", "250"]
    assert kept(site)[1:] == present(site)
    assert kept(site).messages == 2


def test_without_a_quota_nothing_is_counted(site: Site) -> None:
    assert send(connected(site), "jane").startswith("250")
    assert not quota_file(site).exists()


@pytest.mark.parametrize("limits", ["0S", "0S,0C", "5C", "100000S", "5C,100000S", "0S,5C"])
def test_a_limit_that_is_not_there_limits_nothing(site: Site, limits: str) -> None:
    set_quota(site, f"{limits}\n50000 4\n")
    assert send(connected(site), "jane").startswith("250")
    assert kept(site) == (limits, 50000 + site.files("jane")[0].stat().st_size, 5)


@pytest.mark.parametrize(
    ("content", "is_full"),
    [
        ("1000S\n1000 1\n", False),
        ("1000S\n1001 1\n", True),
        ("10C\n50000 10\n", False),
        ("10C\n50000 11\n", True),
        ("1000S,10C\n1000 10\n", False),
        ("1000S,10C\n1001 1\n", True),
        ("1000S,10C\n1 11\n", True),
        ("10C,1000S\n1 11\n", True),
        ("1000S\n        1001            1\n", True),
    ],
)
@pytest.mark.parametrize("address", ["jane", "jane+Lists"])
def test_mail_is_refused_when_there_is_already_too_much(site: Site, content: str, is_full: bool, address: str) -> None:
    site.add_user("jane/.Lists")
    set_quota(site, content)
    assert rcpt(connected(site), address=address).startswith(FULL if is_full else "250 2.1.5")


def test_one_message_may_pass_the_limit(site: Site) -> None:
    set_quota(site, "1000S\n0 0\n")
    client = connected(site)
    assert send(client, "jane", letter(5000), mail="SIZE=5000").startswith("250")
    assert send(client, "jane").startswith(FULL)
    assert len(site.files("jane")) == 1


def test_too_much_is_a_fault_for_good_where_that_is_set(site: Site) -> None:
    set_quota(site, "1000S\n2000 1\n")
    assert rcpt(connected(site, lmtp_over_quota_perm_failure="yes")).startswith("552 5.2.2")
    set_quota(site, "1000S\n900 1\n")
    client = connected(site, lmtp_over_quota_perm_failure="yes", lmtp_strict_quota="yes")
    assert rcpt(client, mail="SIZE=200").startswith("552 5.2.2")
    assert send(client, "jane", letter(500)).startswith("552 5.2.2")


def test_one_full_mailbox_is_not_the_fault_of_the_others(site: Site) -> None:
    site.add_user("joe")
    set_quota(site, "1000S\n2000 1\n")
    client = connected(site)
    client.command("MAIL FROM:<>")
    assert client.command("RCPT TO:<jane>").startswith(FULL)
    assert client.command("RCPT TO:<joe>").startswith("250")
    client.command("DATA")
    client.send(letter() + b".\r\n")
    assert client.reply()[-1].startswith("250")


def test_the_owner_of_a_full_catch_all_is_not_bothered_either(site: Site) -> None:
    set_quota(site, "1000S\n2000 1\n")
    assert rcpt(connected(site, lmtp_catchall_mailbox="jane"), address="nobody").startswith(FULL)


# What is announced, strictly


def test_the_announced_size_counts_where_that_is_set(site: Site) -> None:
    set_quota(site, "10000S\n5000 1\n")
    assert rcpt(connected(site), mail="SIZE=6000").startswith("250")
    client = connected(site, lmtp_strict_quota="yes")
    assert rcpt(client, mail="SIZE=6000").startswith(FULL)
    assert rcpt(client, mail="SIZE=4000").startswith("250")
    assert rcpt(client).startswith("250")


def test_a_message_must_fit_where_that_is_set(site: Site) -> None:
    set_quota(site, "10000S\n5000 1\n")
    site.add_user("joe")
    client = connected(site, lmtp_strict_quota="yes")
    replies = client.deliver(letter(6000), "jane", "joe")
    assert [reply[:9] for reply in replies] == [FULL, "250 2.1.5"]
    assert site.files("jane") == site.files("jane", kind="tmp") == []
    assert quota_file(site).read_text() == "10000S\n5000 1\n"
    assert send(client, "jane", letter(4000)).startswith("250")
    assert kept(site) == ("10000S", 5000 + site.files("jane")[0].stat().st_size, 2)


def test_a_message_in_chunks_must_fit_too(site: Site) -> None:
    set_quota(site, "10000S\n5000 1\n")
    client, message = connected(site, lmtp_strict_quota="yes"), letter(6000)
    client.command("MAIL FROM:<>")
    assert client.command("RCPT TO:<jane>").startswith("250")
    client.send(b"BDAT %d LAST\r\n%s" % (len(message), message))
    assert client.reply()[-1].startswith(FULL)
    assert site.files("jane") == site.files("jane", kind="tmp") == []


def test_two_copies_in_one_mailbox_must_both_fit(site: Site) -> None:
    site.add_user("jane/.Lists", "jane/.Other")
    put(site, "1.a,S=3000:2,", 3000)
    set_quota(site, "10000S\n3000 1\n")
    client = connected(site, lmtp_strict_quota="yes")
    replies = client.deliver(letter(3000), "jane", "jane+Lists", "jane+Other")
    assert [reply[:9] for reply in replies] == ["250 2.1.5", "250 2.1.5", FULL]
    assert kept(site) == ("10000S", *present(site))


def test_messages_are_limited_strictly_too(site: Site) -> None:
    set_quota(site, "3C\n50 2\n")
    client = connected(site, lmtp_strict_quota="yes")
    assert send(client, "jane").startswith("250")
    set_quota(site, "3C\n50 3\n")
    assert send(client, "jane").startswith(FULL)
    assert len(site.files("jane")) == 1


def test_ignorequota_ignores_it_but_counts(site: Site) -> None:
    for strict in ("no", "yes"):
        set_quota(site, "1000S,1C\n2000 2\n")
        client = connected(site, lmtp_strict_quota=strict)
        assert rcpt(client, mail="SIZE=1000").startswith(FULL)
        assert send(client, "jane", mail="SIZE=1000", rcpt="IGNOREQUOTA").startswith("250")
        size = site.files("jane")[-1].stat().st_size
        assert quota_file(site).read_text() == f"1000S,1C\n2000 2\n{size} 1\n"


def test_a_duplicate_is_not_counted(site: Site) -> None:
    set_quota(site, "100000S\n0 0\n")
    client, message = connected(site, duplicatesuppression="yes"), letter()
    assert [send(client, "jane", message)[:3] for _ in range(3)] == ["250"] * 3
    assert kept(site)[1:] == present(site)
    assert kept(site).messages == 1


@ALL_DRAFTS
def test_what_is_taken_back_is_not_counted(site: Site) -> None:
    """The message's own file can be synced, the folder it is in cannot."""
    set_quota(site, "100000S\n500 1\n")
    faulty = ["strace", "-f", "-o", "/dev/null", "-e", "inject=fsync:error=EIO:when=2+", *site.command()]
    session = b"LHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<jane>\r\nDATA\r\n" + letter() + b".\r\nQUIT\r\n"
    done = subprocess.run(faulty, input=session, capture_output=True, timeout=PATIENCE, check=True)
    assert done.stdout.splitlines()[-2].startswith(b"451 4.3.0")
    assert site.files("jane") == []
    assert kept(site) == ("100000S", 500, 1)


# The default


def test_a_maildir_without_a_quota_gets_the_default(site: Site) -> None:
    site.add_user("jane/.Lists")
    put(site, "1.a,S=300:2,S", 300, ".Lists")
    put(site, "2.a", 400)
    client = connected(site, default_quota="10K", default_quota_messages="4")
    assert send(client, "jane", letter(1000)).startswith("250")
    assert kept(site) == ("10240S,4C", *present(site))
    assert send(client, "jane").startswith("250")
    assert send(client, "jane").startswith("250")
    assert send(client, "jane").startswith(FULL)
    assert kept(site) == ("10240S,4C", *present(site))
    status, message = quota_file(site).stat(), site.files("jane")[0].stat()
    assert (status.st_uid, status.st_gid, status.st_mode) == (message.st_uid, message.st_gid, message.st_mode)


@pytest.mark.parametrize(
    ("option", "limits"), [("default_quota", "5000S"), ("default_quota_messages", "5000C")], ids=["octets", "messages"]
)
def test_one_default_alone(site: Site, option: str, limits: str) -> None:
    assert send(connected(site, **{option: "5000"}), "jane").startswith("250")
    assert kept(site) == (limits, *present(site))


def test_a_quota_of_ones_own_is_stronger_than_the_default(site: Site) -> None:
    set_quota(site, "1000S\n500 1\n")
    assert send(connected(site, default_quota="100", default_quota_messages="1"), "jane").startswith("250")
    assert kept(site).limits == "1000S"


# Counting anew


@pytest.mark.parametrize(
    "content", ["", "1000S", "garbage\n", "garbage\n1 1\n", "S\n", "-5S\n1 1\n", "\0\xff\n", "1000S;\n"]
)
def test_a_file_that_says_nothing_gives_way_to_the_default(site: Site, content: str) -> None:
    put(site, "1.a,S=300:2,", 300)
    set_quota(site, content.encode("latin-1"))
    assert send(connected(site, default_quota="100K"), "jane").startswith("250")
    assert kept(site)[1:] == present(site)
    assert kept(site).limits in {"102400S", "1000S"}
    set_quota(site, content.encode("latin-1"))
    assert send(connected(site, default_quota="0"), "jane").startswith("250")


CORRUPT = {
    "no number": "100 x\n",
    "one column": "100\n",
    "three columns": "1 1 1\n",
    "an empty line": "100 1\n\n100 1\n",
    "less than nothing": "-5000 1\n",
    "fewer than none": "5000 1\n0 -2\n",
    "no line end": "100 1\n20",
    "binary": "\0\0\0\0\0\0\0\0\n",
    "a long line": "1 " * 1500 + "\n",
    "joined lines": "100 1         512            1\n",
    "more than 5120 octets": "1 1\n" * 1300,
    "a megabyte": "0 0\n" * 250_000,
}


@pytest.mark.parametrize("lines", CORRUPT.values(), ids=CORRUPT)
def test_a_file_that_cannot_be_believed_is_counted_anew(site: Site, lines: str) -> None:
    put(site, "1.a,S=300:2,", 300)
    set_quota(site, f"100000S,100C\n{lines}")
    client = connected(site)
    assert send(client, "jane").startswith("250")
    assert kept(site) == ("100000S,100C", *present(site))
    assert quota_file(site).stat().st_size < 100
    set_quota(site, f"200S,100C\n{lines}")
    assert rcpt(client).startswith(FULL), "the limits of the file still hold"
    assert kept(site) == ("200S,100C", *present(site))


def test_a_file_that_cannot_be_believed_does_not_get_worse_by_mail_that_ignores_it(site: Site) -> None:
    put(site, "1.a,S=300:2,", 300)
    set_quota(site, "100000S,100C\n100 1\n20")
    client = connected(site)
    assert send(client, "jane", rcpt="IGNOREQUOTA").startswith("250")
    assert send(client, "jane").startswith("250")
    assert kept(site) == ("100000S,100C", *present(site))


@pytest.mark.parametrize(
    ("lines", "age", "is_refused"),
    [
        ("200000 1\n", 0, True),
        ("200000 1\n", 840, True),
        ("200000 1\n", 960, False),
        ("200000 1\n0 0\n", 0, False),
        ("100 1\n200000 1\n", 0, False),
        ("1 200\n", 0, True),
        ("1 200\n", 960, False),
    ],
)
def test_too_much_is_believed_only_when_it_was_counted_lately(
    site: Site, lines: str, age: float, is_refused: bool
) -> None:
    put(site, "1.a,S=300:2,", 300)
    set_quota(site, f"100000S,100C\n{lines}", age)
    reply = send(connected(site), "jane")
    if is_refused:
        assert reply.startswith(FULL)
        assert quota_file(site).read_text() == f"100000S,100C\n{lines}"
    else:
        assert reply.startswith("250")
        assert kept(site) == ("100000S,100C", *present(site))


def test_what_is_old_and_not_too_much_is_believed(site: Site) -> None:
    set_quota(site, "100000S\n500 1\n", age=100_000)
    assert send(connected(site), "jane").startswith("250")
    assert quota_file(site).read_text().startswith("100000S\n500 1\n")


def test_what_is_too_much_indeed_stays_too_much(site: Site) -> None:
    put(site, "1.a,S=3000:2,", 3000)
    set_quota(site, "1000S\n2000 1\n5 1\n", age=1000)
    client = connected(site)
    assert send(client, "jane").startswith(FULL)
    assert kept(site) == ("1000S", 3000, 1)
    assert time.time() - quota_file(site).stat().st_mtime < 60, "the next one is refused without counting"


def recount(site: Site, **options: str) -> tuple[int, int]:
    """What lmtpd comes to when it has to count; nothing is delivered."""
    set_quota(site, f"{MEGABYTE}S\n")
    quota_file(site).write_text(f"{MEGABYTE}S\n{MEGABYTE + 1} 1\n0 0\n")
    assert rcpt(connected(site, **options)).startswith("250")
    return kept(site)[1:]


def test_what_counts(site: Site) -> None:
    """The size in the name is believed, as Dovecot and Courier do; drafts in tmp/ are not messages yet."""
    site.add_user("jane/.Lists", "jane/.Lists.Python", "jane/.Trash", "jane/other", "jane/.Spam")
    put(site, "new/1.a,S=100,W=105", 100)
    put(site, "2.a,S=200:2,RS", 10)
    put(site, "3.a:2,S", 30)
    put(site, "4.a,W=99:2,", 40, ".Lists")
    put(site, "5.a,S=500:2,", 500, ".Lists.Python")
    put(site, "6.a,S=600:2,", 600, ".Trash")
    put(site, "7.a,S=700:2,ST", 700)
    put(site, "8.a,S=x:2,T", 80, ".Spam")
    put(site, "tmp/9.a,S=9000", 9000)
    put(site, ".10.a,S=9000:2,", 9000)
    put(site, "new/11.a,S=9000", 9000, "other")
    (site.spool / "jane/.file").touch()
    (site.spool / "jane/.empty").mkdir()
    assert recount(site) == (100 + 200 + 30 + 40 + 500 + 600 + 700 + 80, 8)
    assert recount(site, quota_exclude_folders="Trash|Lists/Python|Nowhere") == (100 + 200 + 30 + 40 + 700 + 80, 6)
    assert recount(site, quota_exclude_deleted="yes") == (100 + 200 + 30 + 40, 4)


def test_dovecot_counts_the_same(site: Site) -> None:
    """Of the same files, with names that are not ours."""
    site.add_user("jane/.Lists", "jane/.Trash")
    put(site, "new/1.a,S=100,W=105", 100)
    put(site, "2.a,S=200:2,RS", 200)
    put(site, "3.a:2,S", 30)
    put(site, "4.a,W=99:2,", 40, ".Lists")
    put(site, "5.a,S=500:2,", 500, ".Trash")
    put(site, "6.a,S=600:2,T", 600)
    ours = recount(site, quota_exclude_folders="Trash")
    quota_file(site).unlink()
    with Dovecot(site, storage=MEGABYTE, messages=1000) as dovecot:
        dovecots = quota_of(dovecot.login("jane"))
        assert kept(site)[1:] == ours
        assert dovecots == in_imap(*ours)


# Folders that do not count


def test_mail_for_a_folder_that_does_not_count_is_not_counted(site: Site) -> None:
    site.add_user("jane/.Trash", "jane/.Lists.Old")
    set_quota(site, "10000S\n500 1\n")
    client = connected(site, quota_exclude_folders="Trash|Lists/Old")
    assert send(client, "jane+Trash", letter(1000)).startswith("250")
    assert send(client, "jane+Lists/Old", letter(1000)).startswith("250")
    assert quota_file(site).read_text() == "10000S\n500 1\n"


def test_a_folder_that_does_not_count_takes_mail_for_a_full_mailbox(site: Site) -> None:
    site.add_user("jane/.Trash")
    set_quota(site, "1000S\n2000 1\n")
    client = connected(site, quota_exclude_folders="Trash")
    assert send(client, "jane").startswith(FULL)
    assert send(client, "jane+Trash").startswith("250")


# Files that are none


@pytest.mark.parametrize("kind", ["folder", "fifo", "link", "dangling link", "link to itself", "unreadable"])
def test_whatever_maildirsize_is_mail_arrives_and_nothing_else_is_written(site: Site, kind: str) -> None:
    path, other = quota_file(site), site.root / "other"
    other.write_text("5S\n500 1\n")
    other.chmod(0o666)
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
        site.give(path)
    elif kind == "unreadable":
        path.touch(mode=0o000)
    else:
        path.symlink_to({"link": other, "dangling link": site.root / "nothing"}.get(kind, path))
    assert send(connected(site), "jane").startswith("250")
    assert send(connected(site, default_quota="1M"), "jane").startswith("250")
    assert len(site.files("jane")) == 2
    assert other.read_text() == "5S\n500 1\n"
    assert not (site.root / "nothing").exists()


# Many at once


def in_parallel(number: int, work: Callable[[int], None]) -> None:
    """Runs work(0), work(1), … at the same time; raises what one of them has raised."""
    faults: list[BaseException] = []

    def run(which: int) -> None:
        try:
            work(which)
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=run, args=(which,)) for which in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for fault in faults:
        raise fault


def test_twenty_writers_lose_no_line(site: Site) -> None:
    set_quota(site, f"{MEGABYTE}S,1000C\n0 0\n")
    clients = [connected(site) for _ in range(20)]

    def write(which: int) -> None:
        for _ in range(10):
            assert send(clients[which], "jane").startswith("250")

    in_parallel(20, write)
    assert kept(site) == (f"{MEGABYTE}S,1000C", *present(site))
    assert kept(site).messages == 200


def test_twenty_writers_who_have_to_count_lose_no_message(site: Site) -> None:
    """What they append while one of them counts may be counted twice, never not at all."""
    set_quota(site, f"{MEGABYTE}S,1000C\n" + "1 0\n" * 1250)
    clients = [connected(site) for _ in range(20)]

    def write(which: int) -> None:
        for _ in range(10):
            assert send(clients[which], "jane").startswith("250")

    in_parallel(20, write)
    assert kept(site).messages >= 200
    assert kept(site).limits == f"{MEGABYTE}S,1000C"
    assert recount(site) == present(site)
    assert present(site)[1] == 200
    assert site.files("jane", kind="tmp") == []


@pytest.mark.parametrize("site", ["tmpfs"], indirect=True)
def test_two_thousand_messages_are_counted_while_the_file_is_replaced_again_and_again(site: Site) -> None:
    """A small file is soon too long, and then a new count takes its place while others append to it."""
    site.figures = {"QUOTA_FILE_LIMIT": 200}
    set_quota(site, "1000000000S\n0 0\n")
    clients = [connected(site) for _ in range(5)]

    def write(which: int) -> None:
        for _ in range(400):
            assert send(clients[which], "jane").startswith("250")

    in_parallel(5, write)
    octets, messages = present(site)
    assert messages == 2000
    assert kept(site).messages >= messages
    assert kept(site).octets >= octets
    assert recount(site) == (octets, messages)


def test_who_appends_to_a_file_that_has_been_replaced_appends_again(site: Site) -> None:
    """Another program replaces it at the worst moment: between open(2) and write(2)."""
    set_quota(site, f"{MEGABYTE}S\n0 0\n")
    mailbox, write = mailbox_of(site), os.write
    replaced: list[int] = []

    def replace_first(fd: int, data: bytes) -> int:
        if not replaced:
            replaced.append(fd)
            quota_file(site).unlink()
            set_quota(site, f"{MEGABYTE}S\n500 5\n")
        return write(fd, data)

    with mock.patch.object(os, "write", replace_first):
        mailbox.charge(100, 1)
    assert quota_file(site).read_text() == f"{MEGABYTE}S\n500 5\n100 1\n"


@pytest.mark.parametrize("written", [b"", b"10"])
def test_a_usage_that_cannot_be_written_is_counted_anew(site: Site, written: bytes) -> None:
    """The limits, which stand in this file only, are kept. A part of the line may have been written."""
    set_quota(site, f"{MEGABYTE}S\n0 0\n")
    mailbox = mailbox_of(site)

    def fill_disk(fd: int, data: bytes) -> int:
        if fd == 2:  # the log
            return len(data)
        with quota_file(site).open("ab") as file:
            file.write(written)
        raise OSError(errno.ENOSPC, "full")

    with mock.patch.object(os, "write", fill_disk):
        mailbox.charge(100, 1)
    assert quota_file(site).read_bytes() == f"{MEGABYTE}S\n? 0\n".encode() + written
    assert send(connected(site), "jane").startswith("250")
    assert kept(site) == (f"{MEGABYTE}S", *present(site))


def test_a_mailbox_that_another_process_counts_takes_mail(site: Site) -> None:
    """Nobody waits for the count, and nobody counts at the same time."""
    set_quota(site, "10S\nunreadable\n")
    client = connected(site)
    with quota_file(site).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert send(client, "jane").startswith("250")
        assert quota_file(site).read_text().startswith("10S\nunreadable\n")
    assert send(client, "jane").startswith("452 4.2.2")
    assert kept(site) == ("10S", *present(site))


def count_while(site: Site, appended: str) -> None:
    """Delivers to jane while another program appends to her maildirsize, in the middle of the count."""
    set_quota(site, f"{MEGABYTE}S\nunreadable\n")
    scandir, seen = os.scandir, []

    def append_once(*arguments: int) -> object:
        seen.append(arguments)
        if len(seen) == 2:  # the first one lists the folders
            with quota_file(site).open("a") as file:
                file.write(appended)
        return scandir(*arguments)

    with mock.patch.object(os, "scandir", append_once):
        mailbox_of(site).check_quota(INBOX, 0, 0)


@pytest.mark.parametrize("line", ["-30 -1\n", f"{-30:>12} {-1:>12}\n", "0 -1\n"])
def test_a_deletion_during_the_count_is_not_subtracted_from_it(site: Site, line: str) -> None:
    """The message may have been gone when it was counted. Courier has spaces before its numbers."""
    put(site, "new/1.a,S=500", 500)
    count_while(site, line)
    assert kept(site)[1:] == (500, 1)


def test_an_addition_during_the_count_is_kept(site: Site) -> None:
    put(site, "new/1.a,S=500", 500)
    count_while(site, f"{30:>12} {1:>12}\n")
    assert kept(site)[1:] == (530, 2)


def test_an_addition_that_cannot_be_kept_makes_the_usage_unreadable(site: Site) -> None:
    put(site, "new/1.a,S=500", 500)
    with mock.patch.object(Directory, "append_to_file", side_effect=OSError(errno.ENOSPC, "full")):
        count_while(site, "30 1\n")
    assert quota_file(site).read_text() == f"{MEGABYTE}S\n?00 1\n"


def test_who_has_locked_a_file_that_was_replaced_leaves_the_count_to_others(site: Site) -> None:
    """They have just counted."""
    set_quota(site, f"{MEGABYTE}S\nunreadable\n")
    flock = fcntl.flock

    def replace_first(fd: int, operation: int) -> None:
        quota_file(site).unlink()
        set_quota(site, f"{MEGABYTE}S\n500 5\n")
        flock(fd, operation)

    with mock.patch.object(fcntl, "flock", replace_first):
        mailbox_of(site).check_quota(INBOX, 0, 0)
    assert quota_file(site).read_text() == f"{MEGABYTE}S\n500 5\n"


def mailbox_of(site: Site) -> Maildir:
    """jane's Maildir, for this process."""
    return Maildir(str(site.spool / "jane"), owner(), Config.load(str(site.conf)))


def test_other_programs_write_at_the_same_time(site: Site) -> None:
    set_quota(site, f"{MEGABYTE}S,1000C\n0 0\n")
    courier, client = Courier(site), connected(site)
    with Dovecot(site, storage=MEGABYTE, messages=1000) as dovecot:

        def write(which: int) -> None:
            for _ in range(15):
                if which == 0:
                    courier.deliver(site.spool / "jane", b"Subject: x\n\nx\n")
                elif which == 1:
                    dovecot.deliver("jane", b"Subject: x\n\nx\n")
                else:
                    assert send(client, "jane").startswith("250")

        in_parallel(3, write)
        assert kept(site)[1:] == present(site)
        assert kept(site).messages == 45


# The same 500 deliveries and deletions


def in_imap(octets: int, messages: int) -> tuple[int, int]:
    """As GETQUOTA says it: in units of 1024 octets, begun ones too."""
    return -(-octets // 1024), messages


def quota_of(imap: imaplib.IMAP4) -> tuple[int, int]:
    """What GETQUOTAROOT says is used: units of 1024 octets, messages."""
    line = str(imap.getquotaroot("INBOX")[1][1])
    storage, messages = (re.search(rf"{name} (\d+)", line) for name in ("STORAGE", "MESSAGE"))
    assert storage, line
    assert messages, line
    return int(storage[1]), int(messages[1])


class Household:
    """jane's Maildir, in which lmtpd, Dovecot and Courier put and remove messages."""

    FOLDERS = ("", "Lists", "Lists.Python", "Trash")

    def __init__(self, site: Site, dovecot: Dovecot, courier: Courier, seed: int) -> None:
        self.site, self.dovecot, self.courier = site, dovecot, courier
        self.client = connected(
            site, quota_exclude_folders="Trash", default_quota="10M", default_quota_messages="10000"
        )
        self.dovecot_imap = dovecot.login("jane")
        self.courier_imap: CourierImap = courier.login(site.spool / "jane")
        self.random = random.Random(seed)

    def step(self) -> None:
        """One delivery or deletion, somewhere."""
        puts = [self.by_lmtpd, self.by_dovecot, self.by_courier, self.by_dovecot_imap, self.by_courier_imap]
        removes = [self.from_dovecot, self.from_courier]
        self.random.choices([*puts, *removes], [8, 2, 2, 4, 4, 4, 4])[0](self.random.choice(self.FOLDERS))

    def message(self) -> bytes:
        return letter(self.random.randrange(100, 4000))

    def in_dovecot(self, folder: str) -> str:
        return folder or "INBOX"

    def in_courier(self, folder: str) -> str:
        return f"INBOX.{folder}" if folder else "INBOX"

    def by_lmtpd(self, folder: str) -> None:
        assert send(self.client, f"jane+{folder.replace('.', '/')}", self.message()).startswith("250")

    def by_dovecot(self, folder: str) -> None:
        self.dovecot.deliver("jane", self.message().replace(b"\r", b""), self.in_dovecot(folder))

    def by_courier(self, _folder: str) -> None:
        self.courier.deliver(self.site.spool / "jane", self.message().replace(b"\r", b""))

    def by_dovecot_imap(self, folder: str) -> None:
        self.append(self.dovecot_imap, self.in_dovecot(folder))

    def by_courier_imap(self, folder: str) -> None:
        self.append(self.courier_imap, self.in_courier(folder))

    def append(self, imap: imaplib.IMAP4, folder: str) -> None:
        assert imap.append(folder, "", "", self.message())[0] == "OK"

    def from_dovecot(self, folder: str) -> None:
        self.expunge(self.dovecot_imap, self.in_dovecot(folder))

    def from_courier(self, folder: str) -> None:
        self.expunge(self.courier_imap, self.in_courier(folder))

    def expunge(self, imap: imaplib.IMAP4, folder: str) -> None:
        """Removes one message or a few."""
        total = int(imap.select(folder)[1][0] or 0)
        if not total:
            return
        for number in self.random.sample(range(1, total + 1), self.random.randint(1, min(total, 3))):
            assert imap.store(str(number), "+FLAGS", r"(\Deleted)")[0] == "OK"
        assert imap.expunge()[0] == "OK"

    def close(self) -> None:
        self.dovecot_imap.logout()
        self.courier_imap.logout()
        self.client.close()


@contextmanager
def household(site: Site, seed: int) -> Iterator[Household]:
    site.add_user("jane/.Lists", "jane/.Lists.Python", "jane/.Trash")
    for folder in ("Lists", "Lists.Python", "Trash"):
        (site.spool / f"jane/.{folder}/maildirfolder").touch()
    set_quota(site, f"{10 * 1024 * 1024}S,10000C\n0 0\n")
    with Dovecot(site, storage=10 * 1024 * 1024, messages=10000) as dovecot:
        house = Household(site, dovecot, Courier(site), seed)
        yield house
        house.close()


def test_after_500_deliveries_and_deletions_all_three_have_the_same_sums(site: Site) -> None:
    with household(site, seed=int(os.environ.get("LMTPD_TEST_SEED", "5"))) as house:
        for number in range(500):
            house.step()
            assert kept(site)[1:] == present(site, ".Trash"), f"after step {number}"
        octets, messages = present(site, ".Trash")
        assert messages > 20
        # What each says when it is asked:
        assert quota_of(house.dovecot.login("jane")) == in_imap(octets, messages)
        assert quota_of(house.courier.login(site.spool / "jane")) == in_imap(octets, messages)
        assert refuses_from(site, house.client) == octets
        # What each comes to when it counts anew:
        assert recount(site) == (octets, messages)
        quota_file(site).unlink()
        quota_of(house.dovecot.login("jane"))
        assert kept(site)[1:] == (octets, messages)
        set_quota(site, f"{MEGABYTE}S\n-1 -1\n")
        house.by_courier("")
        assert kept(site)[1:] == present(site, ".Trash")


def refuses_from(site: Site, client: Client) -> int:
    """The used octets as lmtpd sees them, from the lowest limit at which it takes mail."""
    lines = quota_file(site).read_text().split("\n", 1)[1]
    low, high = 0, 100 * MEGABYTE
    while low < high:
        middle = (low + high) // 2
        set_quota(site, f"{middle or 1}S\n{lines}")
        low, high = (low, middle) if rcpt(client).startswith("250") else (middle + 1, high)
    return low


def test_a_disk_that_is_full_while_a_maildir_is_made_does_not_lift_the_quota(site: Site) -> None:
    """No file is larger than 5 octets meanwhile, so that one that were written in its place would be cut short."""
    site.configure(autocreate_post="yes", autocreate_quota="1024", autocreate_subscribe_folders="Sent")
    session = b"LHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<newcomer>\r\nDATA\r\n" + letter() + b".\r\nQUIT\r\n"
    full = subprocess.run(
        ["prlimit", "--fsize=5", *site.command()], input=session, capture_output=True, timeout=PATIENCE
    )
    assert b"\r\n452 4.3.1 " in full.stdout
    assert b"\r\n250 2.1.5 Ok SESSIONID" in site.pipe(session).stdout
    assert (site.spool / "newcomer/maildirsize").read_text().startswith("1048576S\n0 0\n")
    assert (site.spool / "newcomer/subscriptions").read_text() == "V\t2\n\nSent\n"
    assert not list((site.spool / "newcomer/tmp").iterdir())


def test_the_inbox_may_be_a_folder_that_does_not_count(site: Site) -> None:
    """The others count all the same."""
    lists = site.spool / "jane/.Lists"
    for path in (lists, lists / "tmp", lists / "new", lists / "cur"):
        path.mkdir()
        site.give(path)
    client = connected(site, quota_exclude_folders="INBOX")
    set_quota(site, f"{MEGABYTE}S\nunreadable\n")
    assert [send(client, address)[:3] for address in ("jane", "jane+Lists", "jane+Lists")] == ["250"] * 3
    sizes = [path.stat().st_size for path in site.files("jane", ".Lists")]
    assert kept(site)[1:] == (sum(sizes), 2)
