"""Into the Maildir: what is stored, that it is durable, and what happens when it cannot be."""

from __future__ import annotations

import errno
import os
import pwd
import re
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from file_systems import ALL_DRAFTS
from harness import AS_ROOT, PATIENCE, STORE_USER, Client, Site

MESSAGE = b"Message-ID: <id@example.com>\r\nDate: Sun, 22 Nov 2026 12:00:00 +0000\r\nSubject: x\r\n\r\nA body.\r\n"
LARGE = MESSAGE + b"0123456789abcdef" * 62 + b"\r\n" + b"x" * 1_000_000 + b"\r\n"
pytestmark = ALL_DRAFTS


@pytest.fixture
def client(site: Site) -> Iterator[Client]:
    client = site.connect()
    client.hello()
    yield client
    client.close()


@pytest.fixture
def small_disk(site: Site) -> Iterator[Path]:
    """A file system of 256 KiB, in which joe has his Maildir."""
    folder = site.root / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k,mode=0777", "lmtpd-test", folder], check=True)
    joe = folder / "joe"
    for part in (joe, joe / "tmp", joe / "new", joe / "cur"):
        part.mkdir()
        site.give(part)
    (site.spool / "joe").symlink_to(joe)
    yield joe
    subprocess.run(["umount", folder], check=True)


def logged(site: Site, event: str) -> list[dict[str, str]]:
    """The fields of the log lines of that event."""
    lines = [line for line in site.log_text().splitlines() if re.match(rf"<\d>{event} ", line)]
    return [dict(re.findall(r'([a-z]+)=("(?:[^"\\]|\\.)*"|\S+)', line)) for line in lines]


# What is stored


def test_the_message_is_stored_as_it_arrived_behind_its_trace_headers(client: Client, site: Site) -> None:
    everything = bytes(range(1, 256)).replace(b"\r\n", b"").replace(b"\n", b"").replace(b"\r", b"")
    sent = MESSAGE + everything + b"\r\n.\r\n..\r\na\rb\nc\r\n\r\n"
    assert client.deliver(sent, "jane@example.com")[0].startswith("250 2.1.5 Ok SESSIONID=<")
    (message,) = site.messages("jane")
    trace, _, rest = message.partition(b"Message-ID")
    assert b"Message-ID" + rest == sent.replace(b"\r\n", b"\n")
    assert re.fullmatch(
        rb"Return-Path: <sender@example\.com>\n"
        rb"Received: from client\.example \(unix socket, uid \d+\)\n"
        rb"\tby mx\.example\.com \(lmtpd 0\.4\.1\) with LMTPA id lmtpd-\d+-\d+\n"
        rb"\tfor <jane@example\.com>;\n"
        rb"\t[A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d [+-]\d{4}\n",
        trace,
    )


def test_missing_fields_are_added_and_an_old_return_path_is_taken_out(client: Client, site: Site) -> None:
    client.deliver(b"return-path: <old>\r\n\t(folded)\r\nSubject: x\r\n\r\nReturn-Path: <in the body>\r\n", "jane")
    (message,) = site.messages("jane")
    header, _, body = message.partition(b"\n\n")
    assert header.count(b"Return-Path:") == 1
    assert b"old" not in header
    assert len(re.findall(rb"^Message-ID: <lmtpd\.\d+\.\d+@mx\.example\.com>$", header, re.MULTILINE)) == 1
    assert len(re.findall(rb"^Date: ", header, re.MULTILINE)) == 1
    assert body == b"Return-Path: <in the body>\n"


def test_text_without_a_header_becomes_the_body(client: Client, site: Site) -> None:
    client.deliver(b"Only a text.\r\nfoo: bar\r\n", "jane")
    assert site.messages("jane")[0].partition(b"\n\n")[2] == b"Only a text.\nfoo: bar\n"


@pytest.mark.parametrize(
    ("sender", "field"), [("", "<>"), ("bare", "<bare@mx.example.com>"), ('"a b"@x.example', '<"a b"@x.example>')]
)
def test_return_path(client: Client, site: Site, sender: str, field: str) -> None:
    client.deliver(MESSAGE, "jane", sender=sender)
    assert site.messages("jane")[0].startswith(f"Return-Path: {field}\n".encode())


def test_for_is_named_only_when_there_is_one_recipient(client: Client, site: Site) -> None:
    client.deliver(MESSAGE, "jane", "jane")
    assert all(b"\tfor <" not in message for message in site.messages("jane"))


@pytest.mark.parametrize("content", [MESSAGE, LARGE], ids=["small", "large"])
def test_the_file_is_named_by_the_rules_of_maildir(client: Client, site: Site, content: bytes) -> None:
    before = time.time()
    client.deliver(content, "jane")
    (file,) = site.files("jane")
    match = re.fullmatch(r"(\d+)\.M(\d{6})P(\d+)R[0-9a-f]{12}Q\d+\.([^/:,]+),S=(\d+),W=(\d+)", file.name)
    assert match
    assert before - 1 <= int(match[1]) + int(match[2]) / 1e6 <= time.time()
    assert int(match[3]) == site.child.pid
    assert match[4] == socket.gethostname()
    assert int(match[5]) == file.stat().st_size
    assert int(match[6]) == len(file.read_bytes().replace(b"\n", b"\r\n"))
    assert site.files("jane", kind="tmp") == []


@pytest.mark.parametrize(("umask", "mode"), [("077", 0o600), ("027", 0o640)])
def test_the_file_belongs_to_the_account_and_has_the_mode_that_are_set(site: Site, umask: str, mode: int) -> None:
    site.configure(umask=umask)
    client = site.connect()
    client.hello()
    client.deliver(MESSAGE, "jane")
    status = site.files("jane")[0].stat()
    assert stat.S_IMODE(status.st_mode) == mode
    assert status.st_uid == (pwd.getpwnam(STORE_USER).pw_uid if AS_ROOT else os.getuid())


def test_the_process_gives_up_root_for_good(site: Site) -> None:
    site.connect().hello()
    account = pwd.getpwnam(STORE_USER)
    status = Path(f"/proc/{site.child.pid}/status").read_text()
    assert re.search(rf"^Uid:(\t{account.pw_uid}){{4}}$", status, re.MULTILINE)
    assert re.search(rf"^Gid:(\t{account.pw_gid}){{4}}$", status, re.MULTILINE)
    assert re.search(rf"^Groups:\t({account.pw_gid} )?$", status, re.MULTILINE)


# Recipients


def test_the_userid_is_found_in_the_address(site: Site) -> None:
    client = site.connect()
    client.hello()
    for address in (
        "jane",
        "jane@example.com",
        "JANE@anywhere.example",
        "jane+detail@example.com",
        '"jane"',
        "@a.example:jane@b.example",
    ):
        assert client.deliver(MESSAGE, address)[0].startswith("250"), address
    assert len(site.files("jane")) == 6


def test_virtual_domains(site: Site) -> None:
    site.configure(virtdomains="userid", defaultdomain="example.com", maildir_path="%p/%d/%n")
    client = site.connect()
    client.hello()
    (site.spool / "b.example").mkdir()
    site.add_user("b.example/jane")
    assert client.deliver(MESSAGE, "Jane@B.Example")[0].startswith("250")
    assert client.deliver(MESSAGE, "jane@c.example")[0].startswith("550")
    assert len(site.files("b.example/jane")) == 1
    site.configure(maildir_path="%p/%u")
    site.add_user("jane@b.example")
    client = site.connect()
    client.hello()
    assert client.deliver(MESSAGE, "jane@b.example", "jane@example.com", "jane")[2].startswith("250")
    assert [len(site.files(user)) for user in ("jane@b.example", "jane")] == [1, 2]


@pytest.mark.parametrize(
    "address",
    [
        "../jane",
        "..",
        ".",
        ".hidden",
        '"."',
        '"../jane"',
        "jane/../jane",
        "/etc",
        "+jane",
        '"a\\\\b/c"',
        "x" * 256,
        "x" * 800,
        "jane/new",
    ],
)
def test_no_recipient_names_a_place_outside_the_store(client: Client, site: Site, address: str) -> None:
    client.command("MAIL FROM:<>")
    assert client.command(f"RCPT TO:<{address}>") == "550 5.1.1 User unknown"


def test_postmaster_is_known_in_any_case(site: Site) -> None:
    site.configure(lmtp_downcase_rcpt="no")
    site.add_user("postmaster", "Joe")
    client = site.connect()
    client.hello()
    assert client.deliver(MESSAGE, "PostMaster", "Joe", "joe")[1].startswith("250")


def test_a_maildir_is_made_for_an_unknown_user_only_if_asked_for(site: Site) -> None:
    client = site.connect()
    client.hello()
    assert client.deliver(MESSAGE, "new")[0].startswith("550")
    assert not (site.spool / "new").exists()
    site.configure(autocreate_post="yes", virtdomains="on", maildir_path="%p/%d/%n/Maildir")
    client = site.connect()
    client.hello()
    assert client.deliver(MESSAGE, "new@x.example", "large@x.example")[1].startswith("250")
    assert client.deliver(LARGE, "spooled@x.example", "second@x.example")[1].startswith("250")
    for user in ("new", "large", "spooled", "second"):
        maildir = site.spool / "x.example" / user / "Maildir"
        assert sorted(part.name for part in maildir.iterdir()) == ["cur", "new", "tmp"]
        assert len(list((maildir / "new").iterdir())) == 1
        assert stat.S_IMODE(maildir.stat().st_mode) == 0o700


@pytest.mark.parametrize("autocreate", ["yes", "no"])
def test_a_spool_that_is_not_there_has_no_unknown_users(site: Site, autocreate: str) -> None:
    site.configure(**{"partition-default": str(site.root / "not mounted"), "autocreate_post": autocreate})
    client = site.connect()
    client.hello()
    client.command("MAIL FROM:<>")
    assert client.command("RCPT TO:<jane>")[:9] == "451 4.3.0"


# One file for many, of any size


@pytest.mark.parametrize("content", [MESSAGE, LARGE], ids=["small", "large"])
def test_a_thousand_recipients_share_one_inode(client: Client, site: Site, content: bytes) -> None:
    users = [f"user{number}" for number in range(1000)]
    site.add_user(*users)
    client.send(b"MAIL FROM:<>\r\n" + b"".join(b"RCPT TO:<%s>\r\n" % user.encode() for user in users) + b"DATA\r\n")
    assert {client.reply()[0][:3] for _ in range(1001)} == {"250"}
    assert client.reply()[0].startswith("354")
    client.send(content + b".\r\n")
    assert {client.reply()[0][:9] for _ in users} == {"250 2.1.5"}
    statuses = [site.files(user)[0].stat() for user in users]
    assert len({status.st_ino for status in statuses}) == 1
    assert statuses[0].st_nlink == 1000


def test_single_instance_store_can_be_turned_off(site: Site) -> None:
    site.configure(singleinstancestore="no")
    site.add_user("joe")
    client = site.connect()
    client.hello()
    client.deliver(LARGE, "jane", "joe")
    files = site.files("jane") + site.files("joe")
    assert [file.stat().st_nlink for file in files] == [1, 1]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_message_of_1_gib_takes_less_than_32_mib_of_memory(site: Site) -> None:
    client = site.connect()
    client.hello()
    for command in ("MAIL FROM:<>", "RCPT TO:<jane>", "DATA"):
        client.command(command)
    line = b"x" * 1022 + b"\r\n"
    client.send(b"Subject: x\r\n\r\n")
    for _ in range(1024):
        client.send(line * 1024)
    client.send(b".\r\n")
    client.sock.settimeout(300)
    assert client.reply()[0].startswith("250")
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{site.child.pid}/status").read_text())
    assert peak
    assert int(peak[1]) < 32 * 1024
    assert site.files("jane")[0].stat().st_size > 1023 * 1024 * 1024


@pytest.mark.parametrize("content", [MESSAGE, LARGE[:100_000] + b"\r\n"], ids=["small", "large"])
@pytest.mark.parametrize("recipients", [("jane", "joe"), ("joe", "jane")])
def test_mailboxes_on_two_file_systems(
    client: Client, site: Site, small_disk: Path, content: bytes, recipients: tuple[str, str]
) -> None:
    assert [reply[:3] for reply in client.deliver(content, *recipients)] == ["250", "250"]
    assert site.messages("jane") == site.messages("joe")
    assert site.files("jane", kind="tmp") == site.files("joe", kind="tmp") == []


# Durable before 250


@pytest.mark.parametrize("content", [MESSAGE, LARGE], ids=["small", "large"])
def test_file_and_folder_are_synced_before_250_is_said(site: Site, content: bytes) -> None:
    site.add_user("joe")
    trace = site.root / "strace"
    session = b"LHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<jane>\r\nRCPT TO:<joe>\r\nDATA\r\n" + content + b".\r\nQUIT\r\n"
    calls = "trace=write,fsync,fdatasync,ioctl,openat,link,linkat,rename,renameat,renameat2,close"
    result = subprocess.run(
        ["strace", "-f", "-y", "-s", "16", "-e", calls, "-o", str(trace), *site.command()],
        input=session,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        timeout=PATIENCE,
        check=True,
    )
    assert result.stdout.count(b"250 2.1.5 Ok SESSIONID") == 2
    lines = trace.read_text().splitlines()
    named = [
        r"openat\(.*/jane/tmp>, .*O_EXCL",
        r"write\(\d+<.*/jane/tmp/",
        r"fsync\(\d+<.*/jane/tmp/.* = 0",
        r"linkat\(.*/jane/tmp>, .*/jane/new>, .* = 0",
        r"renameat2?\(.*/jane/tmp>, .*/joe/new>, .* = 0",
    ]
    unnamed = [
        r"openat\(.*/jane/tmp\", .*O_TMPFILE",
        r"write\(\d+<.*/jane/tmp/",
        r"ioctl\(\d+<.*/jane/tmp/.*, FS_IOC_FIEMAP, .*fm_flags=FIEMAP_FLAG_SYNC,.* = 0",
        r"linkat\(.*\"/proc/self/fd/\d+\", .*/jane/new>, .* = 0",
        r"linkat\(.*\"/proc/self/fd/\d+\", .*/joe/new>, .* = 0",
    ]
    steps = [
        *(unnamed if site.has_unnamed_drafts else named),
        r"fsync\(\d+<.*/jane/new>\) = 0",
        r"fsync\(\d+<.*/joe/new>\) = 0",
    ]
    at = 0
    for step in steps:
        at = next((n for n, line in enumerate(lines[at:], at) if re.search(step, line)), -1)
        assert at >= 0, step
    said = [n for n, line in enumerate(lines) if re.search(r"write\(1<", line)]
    assert said[-1] > at
    assert not any(re.search(r"write\(\d+<.*/tmp/", line) for line in lines[at:])


@pytest.mark.parametrize("moment", ["sync", "first copy", "second copy"])
def test_a_process_killed_in_the_middle_leaves_nothing_to_be_seen(site: Site, moment: str) -> None:
    site.add_user("joe")
    if moment == "sync":
        calls, number = sync_of_draft(site, LARGE, "jane", "joe")
    elif moment == "first copy":
        calls, number = "?link,?linkat", 1
    elif site.has_unnamed_drafts:
        calls, number = "?link,?linkat", 2
    else:
        calls, number = "?rename,?renameat,?renameat2", 1
    session = b"LHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<jane>\r\nRCPT TO:<joe>\r\nDATA\r\n" + LARGE + b".\r\nQUIT\r\n"
    result = subprocess.run(
        [
            "strace",
            "-f",
            "-o",
            "/dev/null",
            "-e",
            f"inject={calls}:signal=KILL:retval=0:when={number}",
            *site.command(),
        ],
        input=session,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        timeout=PATIENCE,
    )
    assert b"250 2.1.5 Ok SESSIONID" not in result.stdout
    assert site.files("joe") == []
    if moment != "second copy":
        assert site.files("jane") == []


def sync_of_draft(site: Site, content: bytes, *recipients: str) -> tuple[str, int]:
    """The system call that syncs the draft of that message, and its number among those of the name."""
    if not site.has_unnamed_drafts:
        return "fsync", 1
    trace = site.root / "trace"
    traced(site, ["-e", "trace=ioctl", "-o", str(trace)], content, *recipients)
    for user in recipients:
        for file in site.files(user):
            file.unlink()
    calls = [line for line in trace.read_text().splitlines() if "ioctl(" in line]
    [number] = [number for number, line in enumerate(calls, 1) if "FS_IOC_FIEMAP" in line]
    return "ioctl", number


def failing(site: Site, inject: str, content: bytes, *recipients: str) -> list[str]:
    """Delivers while system calls fail; the replies to the final dot. inject: for strace(1), between blanks."""
    injects = [option for each in inject.split() for option in ("-e", f"inject={each}")]
    return traced(site, ["-o", "/dev/null", *injects], content, *recipients)


def traced(site: Site, options: list[str], content: bytes, *recipients: str) -> list[str]:
    """Delivers under strace(1); the replies to the final dot."""
    rcpt = b"".join(b"RCPT TO:<%s>\r\n" % recipient.encode() for recipient in recipients)
    with site.log.open("ab") as log:
        result = subprocess.run(
            ["strace", "-f", *options, *site.command()],
            input=b"LHLO x\r\nMAIL FROM:<>\r\n" + rcpt + b"DATA\r\n" + content + b".\r\nQUIT\r\n",
            stdout=subprocess.PIPE,
            stderr=log,
            timeout=PATIENCE,
            env=site.journal(),
            check=True,
        )
    return [line.decode() for line in result.stdout.split(b"\r\n")[-2 - len(recipients) : -2]]


@pytest.mark.parametrize("content", [MESSAGE, LARGE], ids=["small", "large"])
@pytest.mark.parametrize(
    ("error", "reply"), [("ENOSPC", "452 4.3.1"), ("EDQUOT", "452 4.3.1"), ("EIO", "451 4.3.0"), ("EROFS", "451 4.3.0")]
)
@pytest.mark.parametrize("first", ["file", "folders"])
def test_a_sync_that_fails_is_a_temporary_failure(
    site: Site, content: bytes, error: str, reply: str, first: str
) -> None:
    site.add_user("joe")
    # The first sync is that of the draft, or the one by which lmtpd looks at the file system.
    inject = f"fsync:error={error}:when={'1+' if first == 'file' and not site.has_unnamed_drafts else '2+'}"
    if first == "file" and site.has_unnamed_drafts:
        call, number = sync_of_draft(site, content, "jane", "joe")
        inject += f" {call}:error={error}:when={number}"
    replies = failing(site, inject, content, "jane", "joe")
    assert [told[:9] for told in replies] == [reply, reply]
    for user in ("jane", "joe"):
        assert site.files(user) == site.files(user, kind="tmp") == []
    assert os.strerror(getattr(errno, error)) in site.log_text()


@pytest.mark.parametrize("content", [MESSAGE, LARGE], ids=["small", "large"])
def test_a_disk_that_takes_nothing_and_does_not_say_why_is_a_temporary_failure(site: Site, content: bytes) -> None:
    trace = site.root / "trace"
    traced(site, ["-y", "-e", "trace=write", "-o", str(trace)], content, "jane")
    writes = [line for line in trace.read_text().splitlines() if "write(" in line]
    number = next(number for number, line in enumerate(writes, 1) if f"{site.spool}/jane/tmp/" in line)
    [stored] = site.files("jane")
    stored.unlink()
    assert failing(site, f"write:retval=0:when={number}", content, "jane")[0].startswith("451 4.3.0")
    assert site.files("jane") == site.files("jane", kind="tmp") == []
    assert "nothing was written" in site.log_text()


@pytest.mark.parametrize("content", [MESSAGE, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("error", ["EXDEV", "EPERM", "ENOSYS", "EACCES", "EINVAL", "EIO", "ESTALE"])
def test_where_no_link_can_be_made_each_recipient_gets_a_copy(site: Site, content: bytes, error: str) -> None:
    site.add_user("joe", "jim")
    replies = failing(site, f"linkat:error={error}", content, "jane", "joe", "jim")
    assert [reply[:9] for reply in replies] == ["250 2.1.5"] * 3
    files = [file for user in ("jane", "joe", "jim") for file in site.files(user)]
    assert len(files) == len({file.stat().st_ino for file in files}) == 3
    assert len({file.read_bytes() for file in files}) == 1
    assert [site.files(user, kind="tmp") for user in ("jane", "joe", "jim")] == [[], [], []]


@pytest.mark.parametrize("error", ["EXDEV", "EACCES", "EIO"])
def test_a_draft_that_cannot_be_moved_is_copied(site: Site, error: str) -> None:
    """Moving the copy works."""
    assert failing(site, f"renameat:error={error}:when=1", MESSAGE, "jane")[0][:9] == "250 2.1.5"
    assert len(site.files("jane")) == 1
    assert site.files("jane", kind="tmp") == []


@pytest.mark.parametrize("error", ["EOPNOTSUPP", "ENOTTY", "EPERM"])
def test_where_the_data_cannot_be_waited_for_the_file_is_synced(site: Site, error: str) -> None:
    call, number = sync_of_draft(site, MESSAGE, "jane")
    if not site.has_unnamed_drafts:
        call = "ioctl"
    trace = site.root / "trace"
    options = ["-y", "-e", "trace=fsync,ioctl", "-o", str(trace), "-e", f"inject={call}:error={error}:when={number}"]
    assert traced(site, options, MESSAGE, "jane")[0][:9] == "250 2.1.5"
    assert len(site.files("jane")) == 1
    assert [line for line in trace.read_text().splitlines() if re.search(r"fsync\(\d+<.*/jane/tmp/.* = 0", line)]


@pytest.mark.parametrize("error", ["EOPNOTSUPP", "EISDIR", "EINVAL", "ENOENT"])
def test_where_no_file_without_a_name_can_be_made_it_has_a_name(site: Site, error: str) -> None:
    trace = site.root / "trace"
    traced(site, ["-e", "trace=openat", "-o", str(trace)], MESSAGE, "jane")
    calls = [line for line in trace.read_text().splitlines() if "openat(" in line]
    numbers = [number for number, line in enumerate(calls, 1) if "O_TMPFILE" in line]
    # The first one only looks at the file system.
    assert len(numbers) == (2 if site.has_unnamed_drafts else 0)
    for stored, number in enumerate(numbers, 2):
        assert failing(site, f"openat:error={error}:when={number}", MESSAGE, "jane")[0][:9] == "250 2.1.5"
        assert len(site.files("jane")) == stored
        assert site.files("jane", kind="tmp") == []


@pytest.mark.parametrize("error", ["EINVAL", "EOPNOTSUPP"])
def test_a_file_system_that_cannot_sync_directories_gets_mail(site: Site, error: str) -> None:
    """One sync is that of the file, the others are those of directories: CIFS has no such thing."""
    site.configure(autocreate_post="yes")
    trace = site.root / "trace"
    traced(site, ["-y", "-e", "trace=fsync", "-o", str(trace)], MESSAGE, "newcomer")
    synced = [line.partition("fsync(")[2] for line in trace.read_text().splitlines() if "fsync(" in line]
    [file] = [number for number, line in enumerate(synced, 1) if "/tmp/" in line]
    assert file > 1
    for user, when in (("second", f"1..{file - 1}"), ("third", f"{file + 1}+")):
        assert failing(site, f"fsync:error={error}:when={when}", MESSAGE, user)[0][:9] == "250 2.1.5"
        assert len(site.files(user)) == 1


def test_an_error_of_close_after_the_sync_is_none_of_the_delivery(site: Site) -> None:
    """Of the descriptors of the message's file, of new/ and, if it is open, of tmp/."""
    trace = site.root / "trace"
    traced(site, ["-y", "-e", "trace=close", "-o", str(trace)], MESSAGE, "jane")
    [stored] = site.files("jane")
    stored.unlink()
    calls = [line for line in trace.read_text().splitlines() if "close(" in line]
    after = [number for number, line in enumerate(calls, 1) if f"<{site.spool}/jane/" in line]
    for number in after[-2 if site.has_unnamed_drafts else -3 :]:
        assert failing(site, f"close:error=EIO:when={number}", MESSAGE, "jane")[0][:9] == "250 2.1.5"
        [stored] = site.files("jane")
        stored.unlink()
        assert site.files("jane", kind="tmp") == []


def test_the_fault_of_one_recipient_is_not_the_fault_of_the_next(site: Site) -> None:
    site.add_user("joe", "jim")
    replies = failing(site, "fsync:error=EIO:when=3", MESSAGE, "jane", "joe", "jim")
    assert [reply[:3] for reply in replies] == ["250", "451", "250"]
    assert [len(site.files(user)) for user in ("jane", "joe", "jim")] == [1, 0, 1]


@pytest.mark.parametrize("content", [MESSAGE, LARGE], ids=["small", "large"])
def test_a_mailbox_that_cannot_be_written_does_not_hurt_the_others(client: Client, site: Site, content: bytes) -> None:
    site.add_user("joe", "jim")
    for folder in ("joe/tmp", "joe/new"):
        os.chown(site.spool / folder, 0, 0)
    assert [reply[:9] for reply in client.deliver(content, "joe", "jane", "joe", "jim")] == [
        "451 4.3.0",
        "250 2.1.5",
        "451 4.3.0",
        "250 2.1.5",
    ]
    assert "Permission denied" in site.log_text()
    assert [len(site.files(user)) for user in ("jane", "joe", "jim")] == [1, 0, 1]
    assert [len(site.files(user, kind="tmp")) for user in ("jane", "joe", "jim")] == [0, 0, 0]


@pytest.mark.parametrize("content", [LARGE[:300_000] + b"\r\n", LARGE], ids=["at the end", "on the way"])
def test_a_full_disk_is_a_temporary_failure(client: Client, site: Site, small_disk: Path, content: bytes) -> None:
    assert client.deliver(content, "joe")[0] == "452 4.3.1 Mail storage is full, try again later"
    assert list((small_disk / "new").iterdir()) == list((small_disk / "tmp").iterdir()) == []
    assert "No space left on device" in site.log_text()
    assert client.deliver(MESSAGE, "joe", "jane")[1].startswith("250")


def test_a_file_size_limit_is_a_temporary_failure(site: Site) -> None:
    result = subprocess.run(
        ["bash", "-c", 'ulimit -f 10; exec "$@"', "bash", *site.command()],
        input=b"MAIL FROM:<>\r\nRCPT TO:<jane>\r\nDATA\r\n" + LARGE + b".\r\nQUIT\r\n",
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        timeout=PATIENCE,
        check=True,
    )
    assert result.stdout.split(b"\r\n")[-3].startswith(b"452 4.3.1")
    assert site.files("jane") == site.files("jane", kind="tmp") == []


def test_a_missing_tmp_is_made_again(client: Client, site: Site) -> None:
    (site.spool / "jane" / "tmp").rmdir()
    assert client.deliver(MESSAGE, "jane")[0].startswith("250")


def test_a_maildir_that_goes_away_is_a_temporary_failure(client: Client, site: Site) -> None:
    client.command("MAIL FROM:<>")
    client.command("RCPT TO:<jane>")
    (site.spool / "jane").rename(site.spool / "gone")
    client.command("DATA")
    assert client.command(".")[:9] == "451 4.3.0"


# The log


def test_one_line_is_logged_for_each_delivery(client: Client, site: Site) -> None:
    site.add_user("joe")
    os.chown(site.spool / "joe" / "new", 0, 0)
    client.deliver(MESSAGE, "jane+x@example.com", "joe")
    client.command("QUIT")
    (delivered,) = logged(site, "delivered")
    (file,) = site.files("jane")
    assert delivered.pop("session").startswith("lmtpd-")
    assert int(delivered.pop("ms")) < 10_000
    assert delivered == {
        "msgid": "<id@example.com>",
        "size": str(file.stat().st_size),
        "sender": "<sender@example.com>",
        "recipient": "<jane+x@example.com>",
        "mailbox": str(site.spool / "jane"),
        "file": f'"{file.name}"',
        "reply": '"250 2.1.5"',
    }
    (failed,) = logged(site, "not-delivered")
    assert (failed["recipient"], failed["reply"]) == ("<joe>", '"451 4.3.0"')
