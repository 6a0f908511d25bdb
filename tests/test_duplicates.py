"""Duplicate suppression: what is stored once, what is never lost by it, and a database that is not there for us."""

from __future__ import annotations

import os
import pwd
import random
import re
import shutil
import sqlite3
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
from harness import PATIENCE, STORE_USER, Client, Site
from peers import program
from postgres import Database, Postgres, scratch_server

import lmtpd

DAY = 24 * 3600
LARGE_BODY = b"x" * 1_000_000 + b"\r\n"


# The test's fixture "site" has its records in a file, and then in PostgreSQL. More about the latter is in test_sql.py.
IN_EITHER = pytest.mark.parametrize("site", ["file", "sql"], indirect=True)


class SqlSite(Site):
    """A site whose records are in a database of PostgreSQL."""

    def __init__(self, database: Database) -> None:
        super().__init__()
        self.database = database
        self.configure(**database.options)


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with scratch_server() as server:
        yield server


@pytest.fixture
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    """A site with two users. Its parameter is the kind of the database, a file by default."""
    with ExitStack() as stack:
        if getattr(request, "param", "file") == "sql":
            server: Postgres = request.getfixturevalue("server")
            site: Site = SqlSite(stack.enter_context(server.database()))
        else:
            site = Site()
        stack.callback(site.close)
        site.configure(duplicatesuppression="yes")
        site.add_user("jane", "joe")
        yield site


def message(number: object = 1, field: str = "Message-ID: <{}@example.com>", body: bytes = b"A body.\r\n") -> bytes:
    header = f"{field.format(number)}\r\nDate: Fri, 27 Nov 2026 12:00:00 +0000\r\nSubject: x\r\n\r\n"
    return header.encode("utf-8", "surrogateescape") + body


def deliver(site: Site, content: bytes, *recipients: str) -> list[str]:
    """Delivers with a process of its own; the codes of the replies to the final dot."""
    client = site.connect()
    try:
        client.hello()
        replies = client.deliver(content, *recipients)
        client.command("QUIT")
        return [reply[:9] for reply in replies]
    finally:
        client.close()
        site.child.wait(PATIENCE)


def database(site: Site) -> Path:
    return site.configdirectory / "deliver.db"


@contextmanager
def opened(site: Site) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(database(site), timeout=PATIENCE)) as connection:
        yield connection


def records(site: Site) -> int:
    if isinstance(site, SqlSite):
        return site.database.records()
    with opened(site) as connection:
        count: int = connection.execute("SELECT count(*) FROM deliveries").fetchone()[0]
        return count


def age(site: Site, seconds: int) -> int:
    """Makes the records of deliveries older by so many seconds; how many there are."""
    if isinstance(site, SqlSite):
        return site.database.execute("UPDATE deliveries SET at = at - make_interval(secs => %s)", seconds)
    with opened(site) as connection, connection:
        return connection.execute("UPDATE deliveries SET at = at - ?", (seconds,)).rowcount


def add_records(site: Site, count: int, at: float) -> None:
    """Many records of deliveries at that time."""
    with opened(site) as connection, connection:
        rows = ((f"<old{number}@example.com>", "/nowhere", int(at)) for number in range(count))
        connection.executemany("INSERT INTO deliveries (message_id, date, mailbox, at) VALUES (?, '', ?, ?)", rows)


def logged(site: Site, event: str) -> list[str]:
    return [line for line in site.log_text().splitlines() if re.match(rf"<\d>{event} ", line)]


# What a duplicate is


@IN_EITHER
def test_the_same_message_is_stored_once_and_its_sender_is_content(site: Site) -> None:
    assert deliver(site, message(), "jane") == ["250 2.1.5"]
    assert deliver(site, message(), "jane") == ["250 2.1.5"]
    assert len(site.messages("jane")) == 1
    [line] = logged(site, "duplicate")
    assert "msgid=<1@example.com>" in line
    assert str(site.spool / "jane") in line


@IN_EITHER
def test_it_is_one_also_within_a_session(site: Site) -> None:
    client = site.connect()
    client.hello()
    for _ in range(3):
        assert client.deliver(message(), "jane")[0].startswith("250 2.1.5")
    client.close()
    assert len(site.messages("jane")) == 1


@IN_EITHER
@pytest.mark.parametrize("body", [b"A body.\r\n", LARGE_BODY], ids=["small", "large"])
def test_a_recipient_who_is_named_twice_gets_one(site: Site, body: bytes) -> None:
    recipients = ("jane", "joe", "jane@example.com", "jane+nowhere", "joe")
    assert deliver(site, message(body=body), *recipients) == ["250 2.1.5"] * 5
    assert len(site.messages("jane")) == len(site.messages("joe")) == 1
    assert len(logged(site, "duplicate")) == 3
    assert site.files("jane", kind="tmp") == site.files("joe", kind="tmp") == []


@IN_EITHER
def test_another_mailbox_is_another_matter(site: Site) -> None:
    deliver(site, message(), "jane")
    assert deliver(site, message(), "joe", "jane") == ["250 2.1.5"] * 2
    assert len(site.messages("jane")) == len(site.messages("joe")) == 1


@IN_EITHER
def test_another_folder_is_another_matter(site: Site) -> None:
    folder = site.spool / "jane/.lists"
    for path in (folder, *(folder / part for part in ("tmp", "new", "cur"))):
        path.mkdir()
        site.give(path)
    for _ in range(2):
        assert deliver(site, message(), "jane", "jane+lists") == ["250 2.1.5"] * 2
    assert len(site.messages("jane")) == len(site.messages("jane", ".lists")) == 1


@IN_EITHER
@pytest.mark.parametrize(
    "field",
    ["X-Other: {}", "Message-ID:", "Message-ID: \r\n\t", "Message-ID: <>", "Message-ID: < >", "References: <{}@a.com>"],
)
def test_without_a_message_id_nothing_is_a_duplicate(site: Site, field: str) -> None:
    for _ in range(2):
        assert deliver(site, message(field=field), "jane") == ["250 2.1.5"]
    assert len(site.messages("jane")) == 2
    assert logged(site, "duplicate") == []


@IN_EITHER
def test_a_recipient_who_is_named_twice_gets_one_of_a_message_without_an_id(site: Site) -> None:
    assert deliver(site, message(field="X-Other: x"), "jane", "joe", "jane") == ["250 2.1.5"] * 3
    assert len(site.messages("jane")) == len(site.messages("joe")) == 1


@pytest.mark.parametrize(
    "field", ["message-id:<{}@example.com>", "Message-ID:\r\n\t<{}@example.com> ", "Message-Id : <{}@example.com>"]
)
def test_how_the_field_is_written_does_not_matter(site: Site, field: str) -> None:
    deliver(site, message(), "jane")
    deliver(site, message(field=field), "jane")
    assert len(site.messages("jane")) == 1


@IN_EITHER
@pytest.mark.parametrize(
    "other", ["Message-ID: <{}@EXAMPLE.com>", "Message-ID: <{}@example.com", "Message-ID: '; DROP TABLE delivered --"]
)
def test_another_id_is_another_message(site: Site, other: str) -> None:
    deliver(site, message(), "jane")
    deliver(site, message(field=other), "jane")
    assert len(site.messages("jane")) == 2
    assert records(site) == 2


@IN_EITHER
def test_ids_that_differ_in_an_octet_that_is_no_text_are_different(site: Site) -> None:
    for field in ("Message-ID: <\udcff@x>", "Message-ID: <\udcfe@x>", "Message-ID: <\udcff@x>", "Message-ID: <?@x>"):
        assert deliver(site, message(field=field), "jane") == ["250 2.1.5"]
    assert len(site.messages("jane")) == 3


@IN_EITHER
def test_another_date_is_another_message(site: Site) -> None:
    """Devices and cron jobs may give each message the same id. The first of two fields counts."""
    field = "Message-ID: <same@example.com>\r\nDate: {}"
    for date in ("Fri, 27 Nov 2026 12:00:00 +0000", "Sat, 28 Nov 2026 12:00:00 +0000", "x" * 900):
        for _ in range(2):
            assert deliver(site, message(date, field=field), "jane") == ["250 2.1.5"]
    assert len(site.messages("jane")) == 3
    assert len(logged(site, "duplicate")) == 3


@IN_EITHER
@pytest.mark.parametrize("date", [b"", b"Date:\r\n", b"Date: \r\n\t\r\n"])
def test_without_a_date_nothing_is_a_duplicate(site: Site, date: bytes) -> None:
    """Cyrus adds the Date, and so stores what comes a second later."""
    for _ in range(2):
        assert deliver(site, b"Message-ID: <1@example.com>\r\n" + date + b"\r\nbody\r\n", "jane") == ["250 2.1.5"]
    assert len(site.messages("jane")) == 2
    assert logged(site, "duplicate") == []


def test_the_database_of_version_0_1_0_is_replaced(site: Site) -> None:
    """Its records had no dates, and would make wanted mail a duplicate."""
    with opened(site) as connection, connection:
        connection.execute("PRAGMA journal_mode = WAL")
        columns = "message_id TEXT, mailbox TEXT, at REAL, UNIQUE (message_id, mailbox)"
        connection.execute(f"CREATE TABLE delivered ({columns})")
        row = ("<1@example.com>", str(site.spool / "jane"), time.time() - 60)
        connection.execute("INSERT INTO delivered VALUES (?, ?, ?)", row)
    site.give(database(site))
    for _ in range(2):
        assert deliver(site, message(), "jane") == ["250 2.1.5"]
    assert len(site.messages("jane")) == 1
    with opened(site) as connection:
        tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        assert sorted(tables) == [("deliveries",), ("script_records",)]


def test_a_long_id_is_an_id_and_one_beyond_all_measure_is_none(site: Site) -> None:
    for ending in ("a", "b", "a"):
        assert deliver(site, message("x" * 900 + ending), "jane") == ["250 2.1.5"]
    assert len(site.messages("jane")) == 2
    for _ in range(2):
        assert deliver(site, message("x" * 100_000), "joe") == ["250 2.1.5"]
    assert len(site.messages("joe")) == 2
    assert sum(path.stat().st_size for path in site.configdirectory.iterdir()) < 500_000


def test_switched_off_everything_is_stored_and_nothing_recorded(site: Site) -> None:
    site.configure(duplicatesuppression="no")
    for _ in range(2):
        assert deliver(site, message(), "jane", "jane") == ["250 2.1.5"] * 2
    assert len(site.messages("jane")) == 4
    assert list(site.configdirectory.iterdir()) == []


def test_the_database_is_nobody_elses_to_read(site: Site) -> None:
    deliver(site, message(), "jane")
    account = pwd.getpwnam(STORE_USER)
    for path in site.configdirectory.iterdir():
        status = path.stat()
        assert (status.st_uid, stat.S_IMODE(status.st_mode) & 0o077) == (account.pw_uid, 0), path


def test_the_database_may_be_elsewhere(site: Site) -> None:
    elsewhere = site.root / "elsewhere"
    elsewhere.mkdir()
    site.give(elsewhere)
    site.configure(duplicate_db_path=str(elsewhere / "seen.db"))
    for _ in range(2):
        deliver(site, message(), "jane")
    assert len(site.messages("jane")) == 1
    assert (elsewhere / "seen.db").exists()
    assert not database(site).exists()


# How long it is remembered


@IN_EITHER
def test_after_the_expiry_it_is_stored_again(site: Site) -> None:
    site.configure(duplicate_expiry="1h")
    deliver(site, message(), "jane")
    deliver(site, message(), "jane")
    assert len(site.messages("jane")) == 1
    assert age(site, 3601) == 1
    deliver(site, message(), "jane")
    assert len(site.messages("jane")) == 2
    # And this is remembered in its turn.
    deliver(site, message(), "jane")
    assert len(site.messages("jane")) == 2


@IN_EITHER
def test_three_days_are_the_default(site: Site) -> None:
    deliver(site, message("new"), "jane")
    for number, seconds in ((1, 3 * DAY - 600), (2, 3 * DAY + 600)):
        deliver(site, message(number), "jane")
        assert age(site, seconds) >= 1
        deliver(site, message(number), "jane")
    assert len(site.messages("jane")) == 4


def test_old_records_go_by_themselves(site: Site) -> None:
    site.configure(duplicate_expiry="1s")
    client = site.connect()
    client.hello()
    for number in range(50):
        client.deliver(message(number), "jane")
    time.sleep(2.1)
    for number in range(50, 100):
        client.deliver(message(number), "jane")
    client.close()
    site.child.wait(PATIENCE)
    assert records(site) <= 51


def test_a_mountain_of_old_records_is_taken_away_in_small_parts(site: Site) -> None:
    """No delivery pays for all of them, and each takes away more than it adds."""
    deliver(site, message(0), "jane")
    mountain = 200_000
    add_records(site, mountain, time.time() - 30 * DAY)
    counts = [records(site)]
    client = site.connect()
    client.hello()
    for number in range(1, 11):
        client.deliver(message(number), "jane")
        counts.append(records(site))
    client.close()
    taken = [before - after for before, after in zip(counts, counts[1:])]
    assert counts[-1] < counts[0]
    assert max(taken) <= 20


# Many at once


def test_two_hundred_processes_at_once(site: Site) -> None:
    """None of them has to wait for ever; how long, is a matter of the machine."""
    site.figures = {"DATABASE_PATIENCE": PATIENCE}
    clients = [site.connect() for _ in range(200)]
    try:
        for client in clients:
            client.hello()
        for number, client in enumerate(clients):
            client.send(b"MAIL FROM:<>\r\nRCPT TO:<jane>\r\nRCPT TO:<joe>\r\nDATA\r\n" + message(number) + b".\r\n")
        for client in clients:
            replies = [client.reply()[-1] for _ in range(6)]
            assert [reply[:3] for reply in replies] == ["250", "250", "250", "354", "250", "250"]
    finally:
        for client in clients:
            client.close()
    assert len(site.messages("jane")) == len(site.messages("joe")) == 200
    assert logged(site, "duplicate") == []
    # Each was recorded, crowd or not.
    assert records(site) == 400


def test_processes_that_make_the_database_at_the_same_time_do_not_find_it_locked(site: Site) -> None:
    """Ten of them, ten times."""
    for turn in range(10):
        clients = [site.connect() for _ in range(10)]
        for client in clients:
            client.hello()
            client.send(b"MAIL FROM:<>\r\nRCPT TO:<jane>\r\nDATA\r\n")
            assert [client.reply()[-1][:3] for _ in range(3)] == ["250", "250", "354"]
        for number, client in enumerate(clients):
            client.send(message(100 * turn + number) + b".\r\n")
        for client in clients:
            assert client.reply()[-1][:3] == "250"
            client.close()
        assert records(site) == 10
        assert "duplicate-database-unavailable" not in site.log_text()
        for child in site.configdirectory.glob("deliver.db*"):
            child.unlink()


@IN_EITHER
def test_a_message_that_comes_on_many_connections_is_stored_once(site: Site) -> None:
    site.figures = {"DATABASE_PATIENCE": PATIENCE}
    clients = [site.connect() for _ in range(20)]
    for client in clients:
        client.hello()
        client.send(b"MAIL FROM:<>\r\nRCPT TO:<jane>\r\nDATA\r\n" + message() + b".\r\n")
    for client in clients:
        assert [client.reply()[-1][:3] for _ in range(4)] == ["250", "250", "354", "250"]
        client.close()
    assert len(site.messages("jane")) == 1
    assert len(logged(site, "duplicate")) == 19


# A database that is not there for us


def write_noise(path: Path) -> None:
    path.write_bytes(random.Random(5).randbytes(8192))


def write_noise_behind_the_header(path: Path) -> None:
    path.write_bytes(b"SQLite format 3\0" + random.Random(5).randbytes(20_000))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2 + 100)


def damage_the_pages(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[200:] = random.Random(5).randbytes(len(content) - 200)
    path.write_bytes(content)


def make_it_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def make_it_read_only(path: Path) -> None:
    os.chown(path, 0, 0)
    path.chmod(0o444)
    os.chown(path.parent, 0, 0)
    path.parent.chmod(0o555)


def make_it_unreadable(path: Path) -> None:
    os.chown(path, 0, 0)
    path.chmod(0o600)


def take_its_folder_away(path: Path) -> None:
    shutil.rmtree(path.parent)


def make_it_a_link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def give_it_other_columns(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DROP TABLE deliveries")
        connection.execute("CREATE TABLE deliveries (something, other)")


@pytest.mark.parametrize(
    "damage",
    [
        write_noise,
        write_noise_behind_the_header,
        truncate,
        damage_the_pages,
        make_it_a_folder,
        make_it_read_only,
        make_it_unreadable,
        take_its_folder_away,
        make_it_a_link_to_itself,
        give_it_other_columns,
    ],
    ids=lambda damage: damage.__name__.replace("_", " "),
)
def test_a_broken_database_stops_no_mail(site: Site, damage: Callable[[Path], None]) -> None:
    deliver(site, message(0), "jane")
    add_records(site, 2000, time.time())
    with opened(site) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    # What SQLite keeps beside it would mend it.
    for path in site.configdirectory.glob("deliver.db-*"):
        path.unlink()
    damage(database(site))
    started = time.monotonic()
    for number in range(1, 4):
        assert deliver(site, message(number), "jane", "joe") == ["250 2.1.5"] * 2
    assert time.monotonic() - started < 30
    assert len(site.messages("joe")) == 3
    warnings = [line for line in site.log_text().splitlines() if re.match(r"<[34]>", line)]
    assert warnings
    assert all("deliver.db" in line for line in warnings)


def test_a_database_that_was_removed_is_made_again(site: Site) -> None:
    client = site.connect()
    client.hello()
    client.deliver(message(1), "jane")
    for path in site.configdirectory.iterdir():
        path.unlink()
    assert client.deliver(message(2), "jane")[0].startswith("250")
    client.close()
    site.child.wait(PATIENCE)
    for _ in range(2):
        assert deliver(site, message(3), "jane") == ["250 2.1.5"]
    assert len(site.messages("jane")) == 3


def test_a_database_that_somebody_has_locked_stops_no_mail(site: Site) -> None:
    deliver(site, message(0), "jane")
    site.figures = {"DATABASE_PATIENCE": 1, "BACKOFF": 1000}
    with opened(site) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        client = site.connect()
        client.hello()
        for number in range(1, 5):
            assert client.deliver(message(number), "jane", "joe")[0].startswith("250")
        connection.rollback()
    assert len(site.messages("joe")) == 4
    # The wait for it was in vain once, and not for each message.
    assert site.log_text().count("locked") == 1
    client.close()
    # From now on, it works again, also for a process that has to be told so.
    os.utime(site.configdirectory / "deliver.backoff", (0, 0))
    for _ in range(2):
        deliver(site, message(5), "jane")
    assert len(site.messages("jane")) == 6


@pytest.fixture
def small_disk(site: Site) -> Iterator[Path]:
    """A file system of 64 KiB, for the database."""
    folder = site.root / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,mode=0777", "lmtpd-test", folder], check=True)
    site.configure(duplicate_db_path=str(folder / "deliver.db"))
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("full", [True, False], ids=["from the start", "on the way"])
def test_a_full_disk_stops_no_mail(site: Site, small_disk: Path, full: bool) -> None:
    if full:
        subprocess.run(["dd", "if=/dev/zero", f"of={small_disk}/rest", "bs=4k"], stderr=subprocess.DEVNULL)
    client = site.connect()
    client.hello()
    for number in range(400):
        content = message(f"{number}{'x' * 200}")
        assert client.deliver(content, "jane")[0].startswith("250"), number
    client.close()
    site.child.wait(PATIENCE)
    assert len(site.messages("jane")) == 400
    assert "disk is full" in site.log_text() or "unable to open" in site.log_text()


# Nothing is lost by it


SESSION = b"LHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<jane>\r\nRCPT TO:<joe>\r\nDATA\r\n%s.\r\nQUIT\r\n"


def strace(site: Site, *options: str) -> bytes:
    """Delivers a message to jane and joe under strace; the replies."""
    with site.log.open("ab") as log:
        return subprocess.run(
            [program("strace"), "-f", *options, *site.command()],
            input=SESSION % message(),
            stdout=subprocess.PIPE,
            stderr=log,
            timeout=PATIENCE,
            env=site.journal(),
        ).stdout


def test_a_record_is_written_when_the_message_is_on_the_disk(site: Site) -> None:
    deliver(site, message(0), "jane")
    trace = site.root / "trace"
    calls = "trace=write,pwrite64,pwritev,fsync,fdatasync,link,linkat,rename,renameat,renameat2"
    replies = strace(site, "-y", "-s", "16", "-e", calls, "-o", str(trace))
    assert replies.count(b"250 2.1.5 Ok SESSIONID") == 2
    lines = trace.read_text().splitlines()
    synced = [n for n, line in enumerate(lines) if re.search(r"fsync\(\d+<.*/(jane|joe)/new>\)\s+= 0", line)]
    recorded = [n for n, line in enumerate(lines) if re.search(r"write(64|v)?\(\d+<.*deliver\.db(-wal)?>", line)]
    assert len(synced) == 2
    assert recorded
    assert min(recorded) > max(synced)


@IN_EITHER
@pytest.mark.parametrize("when", ["1+", "2+"], ids=["file", "folder"])
def test_a_message_that_failed_is_no_duplicate_when_it_comes_again(site: Site, when: str) -> None:
    replies = strace(site, "-o", "/dev/null", "-e", f"inject=fsync:error=EIO:when={when}")
    assert replies.count(b"451 4.3.0") == 2
    assert deliver(site, message(), "jane", "joe") == ["250 2.1.5"] * 2
    assert len(site.messages("jane")) == len(site.messages("joe")) == 1


@pytest.mark.parametrize("call", ["rename,renameat,renameat2", "fsync", "pwrite64", "fdatasync"])
def test_a_message_whose_delivery_was_killed_is_stored_when_it_comes_again(site: Site, call: str) -> None:
    deliver(site, message(0), "jane")
    calls = ",".join(f"?{name}" for name in call.split(","))
    for when in range(1, 6):
        strace(site, "-o", "/dev/null", "-e", f"inject={calls}:signal=KILL:when={when}")
    assert deliver(site, message(), "jane", "joe") == ["250 2.1.5"] * 2
    assert site.messages("jane")
    assert site.messages("joe")


@IN_EITHER
def test_no_message_is_lost_however_often_lmtpd_is_killed(site: Site) -> None:
    """Whoever is not answered sends again, as every MTA does."""
    chance = random.Random(25)
    waiting = list(range(300))
    kills = 10 if isinstance(site, SqlSite) else 40
    while waiting:
        client = site.connect()
        client.hello()
        client.send(b"".join(session_of(number, b"x" * chance.randrange(3000)) for number in waiting[:30]))
        if kills:
            time.sleep(chance.random() * (0.5 if isinstance(site, SqlSite) else 0.1))  # psycopg is slow to import
            site.child.kill()
            kills -= 1
        for _ in range(len(waiting[:30])):
            if not was_delivered(client):
                break
            waiting.pop(0)
        client.close()
    ids = {number for number in range(300) if any(f"<{number}@".encode() in text for text in site.messages("jane"))}
    assert ids == set(range(300))
    if not isinstance(site, SqlSite):  # the killings leave the database whole
        with opened(site) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def session_of(number: int, body: bytes) -> bytes:
    return b"MAIL FROM:<>\r\nRCPT TO:<jane>\r\nDATA\r\n" + message(number, body=body + b"\r\n.\r\n")


def was_delivered(client: Client) -> bool:
    """Whether a session_of() was answered to its end."""
    try:
        replies = [client.reply() for _ in range(4)]
    except OSError:
        return False
    return bool(replies[-1]) and replies[-1][-1].startswith("250")


def test_a_python_without_a_database_keeps_no_mail_out(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = site.root / "modules"
    modules.mkdir()
    (modules / "sqlite3.py").write_text("raise ImportError('there is none')\n")
    monkeypatch.setenv("PYTHONPATH", str(modules))
    for number in range(2):
        assert deliver(site, message(number), "jane") == ["250 2.1.5"]
    assert "duplicate-database-unavailable" in site.log_text()
    assert "traceback" not in site.log_text()


def test_a_path_that_is_no_text_keeps_no_mail_out(site: Site) -> None:
    """As that of a home whose name is not UTF-8; what is raised after a message is stored would bring it once more."""
    records = lmtpd.records_of(lmtpd.Config.load(str(site.conf)))
    claim = lmtpd.Claim("<1@example.com>", "", ["/home/\udcff"])
    records.settle(claim, claim.mailboxes)
    records.claim(claim)
    assert not claim.delivered


@IN_EITHER
def test_messages_that_come_on_two_connections_at_the_same_moment_are_stored_once(site: Site) -> None:
    """To two folders, which the connections name in another order."""
    recipients = [("jane", "joe"), ("joe", "jane")]
    clients = [site.connect() for _ in recipients]
    for client in clients:
        client.hello()
    with ThreadPoolExecutor(2) as threads:
        for number in range(50):
            jobs = [
                threads.submit(client.deliver, message(number), *order) for client, order in zip(clients, recipients)
            ]
            assert [reply[:9] for job in jobs for reply in job.result()] == ["250 2.1.5"] * 4
    assert len(site.messages("jane")) == len(site.messages("joe")) == 50


def test_a_message_that_another_process_stores_for_too_long_is_deferred(site: Site) -> None:
    site.figures = {"DATABASE_PATIENCE": 0.2}
    held = lmtpd.FileLocks(f"{site.configdirectory}/deliver.db.lock")
    first, second = message(1), message(2)
    identity, date = (re.search(rb"(?m)^%s: (.*?)\r?$" % name, first) for name in (b"Message-ID", b"Date"))
    assert identity
    assert date
    key = "\0".join((identity[1].decode(), date[1].decode(), str(site.spool / "jane")))
    assert held.take(key, 0)
    (site.configdirectory / "deliver.db.lock").chmod(0o666)
    try:
        assert deliver(site, first, "jane", "joe") == ["451 4.2.0", "250 2.1.5"]
        assert deliver(site, second, "jane") == ["250 2.1.5"]
    finally:
        held.close()
    assert deliver(site, first, "jane", "joe") == ["250 2.1.5"] * 2
    assert len(site.messages("jane")) == 2
    assert len(site.messages("joe")) == 1


def test_processes_that_have_a_removed_database_open_use_the_new_one(site: Site) -> None:
    old, new = site.connect(), site.connect()
    for client in (old, new):
        client.hello()
        client.deliver(message(1), "jane")
    for file in site.configdirectory.glob("deliver.db*"):
        file.unlink()
    for client in (new, old):
        client.deliver(message(2), "jane")
    assert len(site.messages("jane")) == 2


class NoMemory:
    """A database for which there is no memory left."""

    def execute(self, *_: object) -> None:
        raise MemoryError

    def close(self) -> None:
        pass


def test_without_memory_for_the_database_mail_is_stored(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """No method of the records raises, and no lock is left that others would wait for."""
    site.configure(duplicatesuppression="yes")
    config = lmtpd.Config.load(str(site.conf), "lmtp")
    records, others = lmtpd.FileRecords(config), lmtpd.FileRecords(config)
    monkeypatch.setattr(records, "_open", NoMemory)
    (site.configdirectory / "deliver.db").touch()
    claim = lmtpd.Claim("<1@example.com>", "today", [f"{site.spool}/jane"])
    records.claim(claim)
    assert not claim.delivered
    records.settle(claim, claim.mailboxes)
    records.add(f"{site.spool}/jane", {"a": 60})
    (site.configdirectory / "deliver.backoff").unlink()
    claim = lmtpd.Claim(claim.message_id, claim.date, claim.mailboxes)
    others.claim(claim)
    assert (claim.busy, claim.delivered) == (set(), set())
