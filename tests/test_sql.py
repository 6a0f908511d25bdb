"""The records of delivered messages, and of what scripts remember, in PostgreSQL, which several hosts share."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from authority import Authority
from harness import PATIENCE, STORE_USER, Client, Site, wait_for
from peers import PASSWORD, program
from postgres import SUPERUSER, USER, Database, Postgres, scratch_server
from sink import Sink
from starters import SocketActivate
from test_duplicates import deliver, logged, message
from test_questions import asked
from test_service import logged as with_log
from test_sieve_command import explained

import lmtpd

OK, CONFIG = os.EX_OK, os.EX_CONFIG
UNAVAILABLE = "duplicate-database-unavailable"
STORED = "250 2.1.5"


class Host(Site):
    """A host with a name, an imapd.conf and a configdirectory of its own. The Maildirs are those of another site.

    before: a command line that runs lmtpd.
    """

    def __init__(self, name: str, store: Site | None = None, **options: str) -> None:
        super().__init__(**options)
        self.name = name
        self.before: list[str] = []
        if store:
            self.spool = store.spool
            self.configure(servername=f"{name}.example.com", **{"partition-default": str(store.spool)})

    def command(self, *arguments: str) -> list[str]:
        named = ["unshare", "--uts", "sh", "-euc", 'hostname "$0"; exec "$@"', self.name]
        return [*named, *self.before, *super().command(*arguments)]

    def inject(self, call: str, fault: str) -> None:
        """Has strace change a system call of the processes that are started from now on."""
        # With -D, the process that was started is lmtpd, not strace.
        strace = [program("strace"), "-D", "-f", "-o", "/dev/null"]
        self.before = [*strace, "-e", f"trace={call}", "-e", f"inject={call}:{fault}"]

    def stop_at(self, call: str) -> None:
        """Lets the next process stop itself at the first of these system calls; go_on() has it go on."""
        self.inject(call, "signal=STOP:when=1")

    def go_on(self) -> None:
        self.before = []
        self.child.send_signal(signal.SIGCONT)


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with scratch_server() as server:
        yield server


@pytest.fixture
def database(server: Postgres) -> Iterator[Database]:
    if server.process.poll() is not None:
        server.start()
    with server.database() as database:
        yield database


@pytest.fixture
def site(database: Database) -> Iterator[Host]:
    site = Host("one", None, duplicatesuppression="yes", **database.options)
    site.add_user("jane", "joe")
    yield site
    site.close()


@pytest.fixture
def other(site: Host, database: Database) -> Iterator[Host]:
    """Another host, which has the same Maildirs and the same database."""
    other = Host("two", site, duplicatesuppression="yes", **database.options)
    yield other
    other.close()


def begin(site: Site, content: bytes, *recipients: str) -> Client:
    """Sends a message with a process of its own, but for the replies to the final dot."""
    client = site.connect()
    client.hello()
    client.send(b"MAIL FROM:<sender@example.com>\r\n")
    client.send(b"".join(f"RCPT TO:<{recipient}>\r\n".encode() for recipient in recipients))
    client.send(b"DATA\r\n")
    assert [client.reply()[-1][:3] for _ in range(len(recipients) + 2)] == ["250"] * (len(recipients) + 1) + ["354"]
    client.send(content + b".\r\n")
    return client


def end(client: Client, recipients: int = 1) -> list[str]:
    """The codes of the replies to the final dot."""
    try:
        return [client.reply()[-1][:9] for _ in range(recipients)]
    finally:
        client.close()


def holding(host: Host, database: Database, content: bytes, *recipients: str) -> Client:
    """A session of a host that has claimed the message, and has stopped before it was stored."""
    host.stop_at("fsync")
    client = begin(host, content, *recipients)
    wait_for(lambda: database.clients("idle in transaction"), "the claim", host.log)
    return client


def ids(site: Site, user: str) -> Counter[bytes]:
    """How often each Message-ID is there."""
    return Counter(re.findall(rb"(?m)^Message-ID: *(.*)$", b"\n".join(site.messages(user))))


def filtered(site: Site, script: str, *more: Site) -> None:
    """Gives all users of these hosts a script of the site."""
    (site.root / "script.sieve").write_text(script)
    for host in (site, *more):
        host.configure(sieve_default=str(site.root / "script.sieve"))


def send(client: Client, content: bytes, *recipients: str) -> list[str]:
    """Delivers in a session; the codes of the replies to the final dot."""
    return [reply[:9] for reply in client.deliver(content, *recipients)]


@contextmanager
def session(site: Site) -> Iterator[Client]:
    """A session with a process of its own."""
    client = site.connect()
    client.hello()
    yield client
    client.leave()
    site.child.wait(PATIENCE)


def verify_suppression(site: Site) -> None:
    """Fails unless the second of two messages is a duplicate, which are the first ones for jane."""
    with session(site) as client:
        for _ in range(2):
            assert send(client, message(), "jane") == [STORED]
    assert len(site.messages("jane")) == 1


def folder(site: Site, user: str, name: str) -> Path:
    """A new folder of a user's."""
    path = site.spool / user / f".{name}"
    for each in (path, *(path / part for part in ("tmp", "new", "cur"))):
        each.mkdir()
        site.give(each)
    return path


# What is recorded


def test_the_second_of_two_is_a_duplicate(site: Host, database: Database) -> None:
    for _ in range(2):
        assert deliver(site, message(), "jane") == [STORED]
    assert len(site.messages("jane")) == 1
    [line] = logged(site, "duplicate")
    assert "msgid=<1@example.com>" in line
    assert database.records() == 1
    assert not list(site.configdirectory.glob("deliver.db*"))
    assert UNAVAILABLE not in site.log_text()


def test_it_is_one_on_another_host(site: Host, other: Host, database: Database) -> None:
    for host in (site, other):
        assert deliver(host, message(), "jane", "joe") == [STORED] * 2
    assert len(site.messages("jane")) == len(site.messages("joe")) == 1
    assert (len(logged(site, "duplicate")), len(logged(other, "duplicate"))) == (0, 2)
    assert {path.name.rpartition(",S=")[0].rpartition(".")[2] for path in site.files("jane")} == {"one"}
    assert database.records() == 2


def test_the_tables_are_made_once(site: Host, database: Database) -> None:
    """Ten processes that find none at the same time do not disturb each other, nor do they later."""
    clients = [begin(site, message(number), "jane", "joe") for number in range(10)]
    assert [end(client, 2) for client in clients] == [[STORED] * 2] * 10
    assert database.records() == 20
    assert logged(site, "duplicate") == []
    assert database.records("script_records") == 0
    assert UNAVAILABLE not in site.log_text()


def test_the_records_can_be_read(site: Host, database: Database) -> None:
    """With psql, by administrators."""
    deliver(site, message(), "jane")
    assert database.column("SELECT message_id FROM deliveries") == ["<1@example.com>"]
    assert database.column("SELECT mailbox FROM deliveries") == [str(site.spool / "jane")]
    assert database.column("SELECT date FROM deliveries") == ["Fri, 27 Nov 2026 12:00:00 +0000"]
    assert database.column("SELECT at BETWEEN now() - interval '1 min' AND now() FROM deliveries") == [True]
    assert database.column("SELECT length(key) FROM deliveries") == [32]


def test_a_message_without_an_id_is_not_recorded(site: Host, database: Database) -> None:
    for _ in range(2):
        assert deliver(site, message(field="X-Other: x"), "jane") == [STORED]
    assert len(site.messages("jane")) == 2
    assert database.column("SELECT to_regclass('deliveries') IS NULL") == [True] or database.records() == 0


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("<\udcff@x>", "<\udcfe@x>"),
        ("<\udcc3@x>", "<ä@x>"),
        ("<\\\\303@x>", "<\\303@x>"),
        ("<'; DROP TABLE deliveries --@x>", "<' OR 1=1 --@x>"),
        (f"<{'x' * 980}1>", f"<{'x' * 980}2>"),
        ("<\U0001f600@x>", "<\ufffd@x>"),
    ],
    ids=["invalid UTF-8", "half a character", "backslash", "SQL", "long", "beyond the BMP"],
)
def test_ids_of_any_octets(site: Host, other: Host, database: Database, first: str, second: str) -> None:
    messages = [message(field=f"Message-ID: {text}") for text in (first, second)]
    for host in (site, other):
        with session(host) as client:
            for content in messages:
                assert send(client, content, "jane", "joe") == [STORED] * 2
    for user in ("jane", "joe"):
        assert len(site.messages(user)) == 2
    assert len(logged(other, "duplicate")) == 4
    assert database.records() == 4
    assert UNAVAILABLE not in site.log_text() + other.log_text()


def test_mailboxes_with_long_paths(site: Host, database: Database) -> None:
    """A key of the path itself would be too long for an index."""
    place = site.spool.joinpath(*["d" * 250] * 13)
    place.mkdir(parents=True)
    for user in ("jane", "joe"):
        (site.spool / user).rename(place / user)
    site.configure(maildir_path=f"{place}/%u")
    for _ in range(2):
        assert deliver(site, message(), "jane", "joe") == [STORED] * 2
    assert len(list((place / "jane/new").iterdir())) == 1
    assert database.records() == 2


def test_a_mailbox_whose_path_is_no_text(site: Host, database: Database) -> None:
    place = os.fsencode(site.spool) + b"/\xff\xfe"
    os.mkdir(place)
    for user in (b"jane", b"joe"):
        os.rename(os.fsencode(site.spool) + b"/" + user, place + b"/" + user)
    os.symlink(place, site.root / "link")
    site.configure(maildir_path=f"{site.root}/link/%u")
    for _ in range(2):
        assert deliver(site, message(), "jane", "joe") == [STORED] * 2
    assert len(os.listdir(place + b"/jane/new")) == 1


def test_many_recipients(site: Host, other: Host, database: Database) -> None:
    users = [f"user{number}" for number in range(300)]
    site.add_user(*users)
    for host in (site, other):
        assert deliver(host, message(), *users) == [STORED] * 300
    assert all(len(site.messages(user)) == 1 for user in users)
    assert database.records() == 300


# How long it is remembered


def test_after_the_expiry_it_is_stored_again(site: Host, other: Host, database: Database) -> None:
    for host in (site, other):
        host.configure(duplicate_expiry="1h")
        deliver(host, message(), "jane")
    assert len(site.messages("jane")) == 1
    assert database.execute("UPDATE deliveries SET at = at - interval '3601 s'") == 1
    deliver(other, message(), "jane")
    assert len(site.messages("jane")) == 2
    # And this is remembered in its turn.
    deliver(site, message(), "jane")
    assert len(site.messages("jane")) == 2


def test_three_days_are_the_default(site: Host, database: Database) -> None:
    for number, age in ((1, "2 days 23 hours"), (2, "3 days 1 hour")):
        deliver(site, message(number), "jane")
        assert database.execute("UPDATE deliveries SET at = at - %s::interval", age) >= 1
        deliver(site, message(number), "jane")
    assert len(site.messages("jane")) == 3


def test_old_records_go_by_themselves(site: Host, database: Database) -> None:
    """In a long session now and then, and in short ones at once. No delivery pays for a mountain of them."""
    deliver(site, message(0), "jane")
    columns = "message_id, date, mailbox, at"
    rows = f"SELECT sha256(number::text::bytea), {columns} FROM deliveries, generate_series(1, 5000) number"
    assert database.execute(f"INSERT INTO deliveries (key, {columns}) {rows}") == 5000
    database.execute("UPDATE deliveries SET at = at - interval '30 days'")
    client = site.connect()
    client.hello()
    counts = [database.records()]
    for number in range(1, 221):
        client.deliver(message(number), "jane")
        counts.append(database.records())
    client.leave()
    for number in range(300, 302):
        deliver(site, message(number), "jane")
        counts.append(database.records())
    changes = [before - after for before, after in zip(counts, counts[1:])]
    assert max(changes) <= 1000
    # More go than are added.
    assert counts[220] < counts[0]
    assert min(changes[220:]) > 0


def test_a_record_of_the_future_is_none(site: Host, database: Database) -> None:
    """It was made while the server's clock was wrong."""
    deliver(site, message(1), "jane")
    database.execute("UPDATE deliveries SET at = at + interval '400 days'")
    for _ in range(2):
        deliver(site, message(1), "jane")
    assert len(site.messages("jane")) == 2


def test_the_times_are_those_of_the_server(
    site: Host, other: Host, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host whose clock is ten days ahead neither stores a message twice, nor does another after it."""
    modules = site.root / "modules"
    modules.mkdir()
    (modules / "sitecustomize.py").write_text("import time\nnow = time.time\ntime.time = lambda: now() + 864000\n")
    deliver(site, message(1), "jane")
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(modules))
        for number in (1, 2):
            assert deliver(other, message(number), "jane") == [STORED]
    deliver(site, message(2), "jane")
    assert len(site.messages("jane")) == 2
    assert set(database.column("SELECT abs(extract(epoch FROM now() - at)) < 600 FROM deliveries")) == {True}


# Two hosts that get the same at the same moment


def test_four_hundred_messages_that_two_hosts_get_at_the_same_moment(site: Host, other: Host) -> None:
    """Each host has two connections; each message comes to both hosts at once, with its recipients in another order."""
    numbers = [range(0, 400, 2), range(1, 400, 2)]
    gates = [threading.Barrier(2), threading.Barrier(2)]

    def send(host: Host, connection: int) -> list[str]:
        client = host.connect()
        client.hello()
        recipients = ("jane", "joe") if host is site else ("joe", "jane")
        replies = []
        for number in numbers[connection]:
            gates[connection].wait(PATIENCE)
            replies += [reply[:9] for reply in client.deliver(message(number), *recipients)]
        client.leave()
        return replies

    with ThreadPoolExecutor(4) as threads:
        jobs = [threads.submit(send, host, connection) for host in (site, other) for connection in range(2)]
        assert [set(job.result()) for job in jobs] == [{STORED}] * 4
    for user in ("jane", "joe"):
        assert ids(site, user) == {b"<%d@example.com>" % number: 1 for number in range(400)}
    assert len(logged(site, "duplicate")) + len(logged(other, "duplicate")) == 800
    # Both have had a share in it, so that the one had to wait for the other.
    assert min(len(logged(host, "delivered")) for host in (site, other)) > 0
    assert UNAVAILABLE not in site.log_text() + other.log_text()


def test_the_second_host_waits_until_the_first_has_stored_the_message(
    site: Host, other: Host, database: Database
) -> None:
    first = holding(site, database, message(), "jane")
    second = begin(other, message(), "jane", "joe")
    wait_for(database.waiting, "the second host to wait")
    assert site.messages("jane") == []
    site.go_on()
    assert end(first) == [STORED]
    assert end(second, 2) == [STORED] * 2
    assert len(site.messages("jane")) == len(site.messages("joe")) == 1
    [line] = logged(other, "duplicate")
    assert str(site.spool / "jane") in line


def test_the_isolation_that_the_database_has_by_default_does_not_matter(
    site: Host, other: Host, database: Database
) -> None:
    database.execute(f"ALTER DATABASE {database.name} SET default_transaction_isolation = 'repeatable read'")
    clients = [host.connect() for host in (site, other)]
    for client in clients:
        client.hello()
    with ThreadPoolExecutor(2) as threads:
        for number in range(20):
            jobs = [threads.submit(client.deliver, message(number), "jane") for client in clients]
            assert [job.result()[0][:9] for job in jobs] == [STORED] * 2
    for client in clients:
        client.leave()
    assert len(site.messages("jane")) == 20
    assert UNAVAILABLE not in site.log_text() + other.log_text()


def test_other_messages_and_mailboxes_do_not_wait(site: Host, other: Host, database: Database) -> None:
    first = holding(site, database, message(), "jane")
    assert deliver(other, message(2), "jane") == [STORED]
    assert deliver(other, message(), "joe") == [STORED]
    assert database.waiting() == 0
    site.go_on()
    assert end(first) == [STORED]


def test_the_claim_of_a_host_that_was_killed_is_given_back(site: Host, other: Host, database: Database) -> None:
    first = holding(site, database, message(), "jane", "joe")
    second = begin(other, message(), "jane", "joe")
    wait_for(database.waiting, "the second host to wait")
    site.child.kill()
    assert end(second, 2) == [STORED] * 2
    first.close()
    site.before = []
    assert len(site.messages("jane")) == len(site.messages("joe")) == 1
    assert deliver(site, message(), "jane", "joe") == [STORED] * 2
    assert len(logged(site, "duplicate")) == 2


def test_a_message_that_another_host_stores_for_too_long_is_deferred(
    site: Host, other: Host, database: Database
) -> None:
    """Its other recipients get it, or are deferred, too; what comes later is a duplicate."""
    first = holding(site, database, message(), "jane")
    replies = deliver(other, message(), "jane", "joe")
    assert replies[0][:5] == "451 4"
    assert replies[1] in (STORED, replies[0])
    assert site.messages("jane") == []
    assert UNAVAILABLE not in other.log_text()
    # No back-off has begun by it.
    for _ in range(2):
        assert deliver(other, message(2), "joe") == [STORED]
    assert len(logged(other, "duplicate")) == 1
    site.go_on()
    assert end(first) == [STORED]
    assert deliver(other, message(), "jane", "joe") == [STORED] * 2
    for user in ("jane", "joe"):
        assert len(ids(site, user)) == sum(ids(site, user).values())
    assert len(site.messages("jane")) == 1


def test_no_claim_is_held_while_a_client_sends(site: Host, database: Database) -> None:
    deliver(site, message(1), "jane")
    client = site.connect()
    client.hello()
    client.send(b"MAIL FROM:<>\r\nRCPT TO:<jane>\r\nDATA\r\n" + message(2))
    assert [client.reply()[-1][:3] for _ in range(3)] == ["250", "250", "354"]
    assert database.clients("idle in transaction%") == []
    client.send(b".\r\n")
    assert end(client) == [STORED]


# What fails


def refuse_folder(site: Site, user: str) -> Callable[[], None]:
    """Takes the rights to a Maildir from its owner; what gives them back."""
    path = site.spool / user
    for each in (path, path / "tmp", path / "new"):
        os.chown(each, 0, 0)
        each.chmod(0o555)

    def restore() -> None:
        for each in (path, path / "tmp", path / "new"):
            each.chmod(0o755)
            site.give(each)

    return restore


def test_a_delivery_that_failed_gives_its_claim_back(site: Host, other: Host, database: Database) -> None:
    """The other recipients keep theirs."""
    restore = refuse_folder(site, "joe")
    replies = deliver(site, message(), "jane", "joe")
    assert replies[0] == STORED
    assert replies[1][0] == "4"
    assert database.records() == 1
    restore()
    assert deliver(other, message(), "jane", "joe") == [STORED] * 2
    assert len(site.messages("jane")) == len(site.messages("joe")) == 1
    assert len(logged(other, "duplicate")) == 1


def test_when_all_fail_nothing_is_recorded(site: Host, database: Database) -> None:
    deliver(site, message(0), "jane")
    restore = [refuse_folder(site, user) for user in ("jane", "joe")]
    assert [reply[0] for reply in deliver(site, message(), "jane", "joe")] == ["4", "4"]
    assert database.records() == 1
    for each in restore:
        each()
    assert deliver(site, message(), "jane", "joe") == [STORED] * 2
    assert database.records() == 3


def test_a_mailbox_that_was_full_gets_the_message_later(site: Host, other: Host, database: Database) -> None:
    for host in (site, other):
        host.configure(lmtp_strict_quota="yes")
    quota = site.spool / "jane/maildirsize"
    quota.write_text("10S\n0 0\n")
    site.give(quota)
    assert [reply[:3] for reply in deliver(site, message(), "jane", "joe")] == ["452", "250"]
    quota.unlink()
    assert deliver(other, message(), "jane", "joe") == [STORED] * 2
    assert len(site.messages("jane")) == len(site.messages("joe")) == 1


@pytest.mark.parametrize("when", ["1+", "2+"], ids=["file", "folder"])
def test_a_message_that_could_not_be_synced_is_no_duplicate(site: Host, database: Database, when: str) -> None:
    site.inject("fsync", f"error=EIO:when={when}")
    assert [reply[:5] for reply in deliver(site, message(), "jane", "joe")] == ["451 4"] * 2
    site.before = []
    assert deliver(site, message(), "jane", "joe") == [STORED] * 2
    assert len(site.messages("jane")) == len(site.messages("joe")) == 1


@pytest.mark.parametrize(("call", "count"), [("sendto", 7), ("recvfrom", 7), ("fsync", 3)])
def test_a_host_that_is_killed_at_any_moment(
    site: Host, other: Host, database: Database, call: str, count: int
) -> None:
    """The message comes again to another host, which stores it if the first one has not.

    The connection to the server uses these system calls, that to the client uses others. count: how many of them a
    delivery makes at least.
    """
    client = other.connect()
    client.hello()
    for when in range(1, count + 1):
        site.inject(call, f"signal=KILL:when={when}")
        victim = begin(site, message(when), "jane", "joe")
        assert site.child.wait(PATIENCE) == -signal.SIGKILL
        victim.close()
        assert [reply[:9] for reply in client.deliver(message(when), "jane", "joe")] == [STORED] * 2
    client.leave()
    wait_for(lambda: not database.clients(), "all connections to end")
    for user in ("jane", "joe"):
        assert set(ids(site, user)) == {b"<%d@example.com>" % when for when in range(1, count + 1)}


@pytest.mark.parametrize("call", ["sendto", "recvfrom"])
def test_a_connection_that_breaks_at_any_moment(site: Host, database: Database, call: str) -> None:
    """Mail flows, and what comes once is stored once."""
    site.figures = {"SERVER_PATIENCE": 2, "DATABASE_PATIENCE": 2}
    numbers = range(1, 10)
    for when in numbers:
        end_backoff(site)
        site.inject(call, f"error=ECONNRESET:when={when}")
        assert deliver(site, message(when), "jane", "joe") == [STORED] * 2
    for user in ("jane", "joe"):
        assert ids(site, user) == {b"<%d@example.com>" % when: 1 for when in numbers}
    assert "raceback" not in site.log_text()


def test_one_folder_of_two_that_fails(site: Host, other: Host, database: Database) -> None:
    """A recipient whose script files a message twice gets both or none."""
    path = folder(site, "jane", "two")
    filtered(site, 'require ["fileinto", "copy"]; fileinto :copy "two";', other)
    for each in (path / "tmp", path / "new"):
        os.chown(each, 0, 0)
        each.chmod(0o555)
    assert deliver(site, message(), "jane")[0][0] == "4"
    for each in (path / "tmp", path / "new"):
        each.chmod(0o755)
        site.give(each)
    assert deliver(other, message(), "jane") == [STORED]
    assert len(site.messages("jane")) == len(site.messages("jane", ".two")) == 1
    assert database.records() == 2


# A server that is not there for us


def verify_flow(site: Site, *causes: str, seconds: float = 40) -> None:
    """Fails unless mail flows without suppression, one line of the log says why, and no message waits long."""
    started = time.monotonic()
    for number in range(2):
        with session(site) as client:
            for _ in range(2):
                assert send(client, message(f"flow{number}"), "jane", "joe") == [STORED] * 2
    assert time.monotonic() - started < seconds
    assert all(count == 2 for name, count in ids(site, "jane").items() if name.startswith(b"<flow"))
    lines = logged(site, UNAVAILABLE)
    assert len(lines) == 1
    assert all(cause in lines[0] for cause in causes), lines
    assert PASSWORD not in site.log_text()
    assert "raceback" not in site.log_text()


def end_backoff(site: Site) -> None:
    (site.configdirectory / "deliver.backoff").unlink(missing_ok=True)


def verify_recovery(site: Site) -> None:
    """Fails unless duplicates are suppressed again after the back-off."""
    numbers = iter(range(1000, 9000))

    def is_suppressed() -> bool:
        before, number = len(logged(site, "duplicate")), next(numbers)
        with session(site) as client:
            for _ in range(2):
                assert send(client, message(number), "jane") == [STORED]
        return len(logged(site, "duplicate")) > before

    wait_for(is_suppressed, "duplicates to be suppressed again", site.log)


def test_a_server_that_is_down_stops_no_mail(site: Host, database: Database) -> None:
    deliver(site, message(), "jane")
    database.server.close()
    verify_flow(site, database.server.host.partition(":")[0], "refused")
    database.server.start()
    # The back-off is not over.
    assert deliver(site, message(), "jane") == [STORED]
    assert logged(site, "duplicate") == []


def test_when_it_is_back_it_is_used_after_the_back_off(site: Host, database: Database) -> None:
    site.figures = {"BACKOFF": 1}
    deliver(site, message(), "jane")
    database.server.close()
    assert deliver(site, message(), "jane") == [STORED]
    assert len(logged(site, UNAVAILABLE)) == 1
    database.server.start()
    verify_recovery(site)


@pytest.mark.parametrize("how", ["restart", "crash"])
def test_a_restart_within_a_session(site: Host, database: Database, how: str) -> None:
    site.figures = {"BACKOFF": 1}
    client = site.connect()
    client.hello()
    assert client.deliver(message(0), "jane")[0].startswith(STORED)
    if how == "crash":
        database.server.crash()
        database.server.start()
    else:
        database.server.restart()
    for number in range(1, 4):
        assert client.deliver(message(number), "jane")[0].startswith(STORED)
    assert len(logged(site, UNAVAILABLE)) <= 1

    def is_suppressed() -> bool:
        before = len(logged(site, "duplicate"))
        assert client.deliver(message(0), "jane")[0].startswith(STORED)
        return len(logged(site, "duplicate")) > before

    wait_for(is_suppressed, "duplicates to be suppressed again", site.log)
    client.leave()


def test_a_server_that_ends_while_a_message_is_stored(site: Host, other: Host, database: Database) -> None:
    """It is stored; the record is lost."""
    first = holding(site, database, message(), "jane")
    database.server.crash()
    site.go_on()
    assert end(first) == [STORED]
    assert len(site.messages("jane")) == 1
    assert len(logged(site, UNAVAILABLE)) == 1
    database.server.start()
    assert deliver(other, message(), "jane") == [STORED]
    assert len(site.messages("jane")) == 2


def test_a_connection_that_is_ended_by_an_administrator(site: Host, database: Database) -> None:
    client = site.connect()
    client.hello()
    assert client.deliver(message(0), "jane")[0].startswith(STORED)
    for pid in database.clients():
        database.execute("SELECT pg_terminate_backend(%s)", pid)
    wait_for(lambda: not database.clients(), "the connection to end")
    for number in (1, 2):
        assert client.deliver(message(number), "jane")[0].startswith(STORED)
    client.leave()
    assert len(site.messages("jane")) == 3
    assert len(logged(site, UNAVAILABLE)) <= 1


def test_a_server_that_does_not_answer_stops_no_mail(site: Host, database: Database) -> None:
    """From the start, or in the middle of a session."""
    site.figures = {"SERVER_PATIENCE": 2, "DATABASE_PATIENCE": 2}
    client = site.connect()
    client.hello()
    assert client.deliver(message(0), "jane")[0].startswith(STORED)
    with database.server.paused():
        started = time.monotonic()
        for number in range(1, 6):
            assert client.deliver(message(number), "jane", "joe")[0].startswith(STORED)
        assert time.monotonic() - started < 40
        assert len(logged(site, UNAVAILABLE)) == 1
        client.leave()
        end_backoff(site)
        site.log.write_text("")
        verify_flow(site)
    assert len(ids(site, "joe")) == 7


def test_a_server_that_answers_late_loses_nothing(site: Host, other: Host, database: Database) -> None:
    """What was sent to it before is done when it goes on, but nobody has a claim by that."""
    site.figures = other.figures = {"BACKOFF": 1, "SERVER_PATIENCE": 2, "DATABASE_PATIENCE": 2}
    deliver(site, message(0), "jane")
    with database.server.paused():
        assert deliver(site, message(1), "jane") == [STORED]
    wait_for(lambda: not database.clients(), "the late connections to end")
    verify_recovery(site)
    assert deliver(other, message(1), "joe") == [STORED]
    assert b"<1@example.com>" in ids(site, "joe")


def test_a_wrong_password(site: Host) -> None:
    site.configure(sql_passwd="wrong")
    verify_flow(site, "password authentication failed", USER)
    assert "wrong" not in site.log_text()


def test_no_password(site: Host) -> None:
    site.configure(sql_passwd=None)
    verify_flow(site, "password")


def test_a_database_that_is_missing(site: Host) -> None:
    site.configure(sql_database="nowhere")
    verify_flow(site, "nowhere", "does not exist")


def test_no_right_to_make_the_tables(server: Postgres, site: Host) -> None:
    with server.database(owner=SUPERUSER) as database:
        site.configure(sql_database=database.name)
        verify_flow(site, "permission denied")


def test_tables_that_another_has_made_need_no_other_rights(server: Postgres, site: Host, database: Database) -> None:
    """Than to read, add, change and delete records."""
    deliver(site, message(0), "jane")
    for table in ("deliveries", "script_records"):
        database.execute(f"ALTER TABLE {table} OWNER TO {SUPERUSER}")
        database.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON {table} TO {USER}")
    database.execute(f"ALTER DATABASE {database.name} OWNER TO {SUPERUSER}")
    for _ in range(2):
        deliver(site, message(1), "jane")
    assert len(site.messages("jane")) == 2
    assert UNAVAILABLE not in site.log_text()


def test_tables_of_another_program(site: Host, database: Database) -> None:
    database.execute("CREATE TABLE deliveries (something text)")
    database.execute("CREATE TABLE script_records (something text)")
    verify_flow(site, "deliveries")


@pytest.mark.parametrize(
    "setting", ["bytea_output = 'escape'", "datestyle = 'German'", "standard_conforming_strings = off"]
)
def test_settings_of_a_database_do_not_matter(site: Host, database: Database, setting: str) -> None:
    database.execute(f"ALTER DATABASE {database.name} SET {setting}")
    verify_suppression(site)
    assert UNAVAILABLE not in site.log_text()


def test_records_that_the_database_does_not_take_lose_no_mail(site: Host, database: Database) -> None:
    """A message is a duplicate only if there is a record of it."""
    deliver(site, message(0), "joe")
    database.execute(
        "CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';"
        "CREATE TRIGGER nothing BEFORE INSERT ON deliveries FOR EACH ROW EXECUTE FUNCTION nothing()"
    )
    with session(site) as client:
        for _ in range(2):
            assert send(client, message(1), "jane") == [STORED]
    assert len(site.messages("jane")) == 2


@pytest.mark.parametrize("mode", ["SHARE", "ACCESS EXCLUSIVE"])
def test_a_table_that_an_administrator_has_locked_stops_no_mail(site: Host, database: Database, mode: str) -> None:
    """CREATE INDEX takes the first of these locks, VACUUM FULL the second."""
    deliver(site, message(0), "jane")
    with database.server.connected(database.name) as connection:
        connection.execute("BEGIN")
        connection.execute(f"LOCK TABLE deliveries IN {mode} MODE".encode())
        verify_flow(site, "lock")


def test_tables_that_were_removed_are_made_again(site: Host, database: Database) -> None:
    site.figures = {"BACKOFF": 1}
    with session(site) as client:
        assert send(client, message(0), "jane") == [STORED]
        database.execute("DROP TABLE deliveries, script_records")
        for number in (1, 2):
            assert send(client, message(number), "jane") == [STORED]
    assert len(site.messages("jane")) == 3
    assert len(logged(site, UNAVAILABLE)) <= 1
    verify_recovery(site)


def test_too_many_connections(site: Host, database: Database) -> None:
    database.execute(f"ALTER ROLE {USER} CONNECTION LIMIT 0")
    try:
        verify_flow(site, "too many connections")
    finally:
        database.execute(f"ALTER ROLE {USER} CONNECTION LIMIT -1")


def test_a_database_that_only_reads(site: Host, database: Database) -> None:
    """As a standby does."""
    deliver(site, message(0), "jane")
    database.execute(f"ALTER DATABASE {database.name} SET default_transaction_read_only = on")
    verify_flow(site, "read-only")


def test_a_python_without_psycopg(site: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = site.root / "modules"
    modules.mkdir()
    (modules / "psycopg.py").write_text("raise ImportError('there is none')\n")
    monkeypatch.setenv("PYTHONPATH", str(modules))
    verify_flow(site, "psycopg")
    said = asked(site, "--check")
    assert said.status == CONFIG
    assert any("psycopg" in line for line in said.lines)


# Where the server is


def test_the_names_are_tried_one_after_the_other(site: Host, database: Database) -> None:
    port = site.options["sql_hostnames"].rpartition(":")[2]
    site.configure(sql_hostnames=f"/nonexistent, 127.0.0.1:1,127.0.0.1:{port}")
    verify_suppression(site)
    assert UNAVAILABLE not in site.log_text()


@pytest.mark.parametrize("account", [USER, STORE_USER])
def test_a_unix_socket(server: Postgres, site: Host, account: str) -> None:
    """By password, or by the account that lmtpd runs as."""
    with server.database(owner=account) as database:
        place = f"{server.socket_folder}:{server.port}"
        site.configure(**{**database.options, "sql_hostnames": place})
        if account == STORE_USER:
            site.configure(sql_passwd=None)
        verify_suppression(site)
        assert database.records() == 1


def test_the_environment_does_not_change_what_is_configured(
    site: Host, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "PGHOST": "192.0.2.1",
        "PGPORT": "1",
        "PGUSER": "somebody",
        "PGDATABASE": "nowhere",
        "PGPASSWORD": "wrong",
        "PGOPTIONS": "-c default_transaction_read_only=on",
        "PGCLIENTENCODING": "LATIN1",
        "PGTARGETSESSIONATTRS": "standby",
        "PGHOSTADDR": "192.0.2.1",
        "PGSERVICE": "elsewhere",
        "PGSSLMODE": "verify-full",
        "PGREQUIREAUTH": "none",
        "PGCONNECT_TIMEOUT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    verify_suppression(site)
    assert UNAVAILABLE not in site.log_text()


def test_a_server_with_another_encoding(server: Postgres, site: Host) -> None:
    server.execute("CREATE DATABASE latin OWNER lmtpd TEMPLATE template0 ENCODING 'SQL_ASCII' LOCALE 'C'")
    try:
        site.configure(sql_database="latin")
        for _ in range(2):
            for field in ("Message-ID: <ä@x>", "Message-ID: <\udcff@x>"):
                assert deliver(site, message(field=field), "jane") == [STORED]
        assert len(site.messages("jane")) == 2
    finally:
        server.execute("DROP DATABASE latin WITH (FORCE)")


@contextmanager
def server_with_tls(site: Site) -> Iterator[tuple[Database, Authority]]:
    """A database that takes no connection without TLS, and the authority of its certificate, for localhost."""
    authority = Authority(site)
    with Postgres(site.root / "postgres", authority.sign("localhost")) as server, server.database() as database:
        yield database, authority


def test_tls(site: Host) -> None:
    """The certificate and the name in it are verified; else mail flows without the server."""
    with server_with_tls(site) as (database, authority):
        name = f"localhost:{database.server.port}"
        site.configure(**{**database.options, "sql_hostnames": name, "sql_usessl": "yes"})
        site.configure(sql_tls_ca_file=str(authority.file))
        for _ in range(2):
            assert deliver(site, message(), "jane") == [STORED]
        assert len(site.messages("jane")) == database.records() == 1
        assert site.log_text().count(UNAVAILABLE) == 0
        cases: dict[str, dict[str, str | None]] = {
            "certificate verify failed": {"sql_tls_ca_file": None},
            "127.0.0.1": {"sql_tls_ca_file": str(authority.file), "sql_hostnames": database.server.host},
            "nowhere.pem": {"sql_hostnames": name, "sql_tls_ca_file": f"{site.root}/nowhere.pem"},
        }
        for cause, options in cases.items():
            site.configure(**options)
            site.log.write_text("")
            end_backoff(site)
            before = len(site.messages("jane"))
            assert deliver(site, message(), "jane") == [STORED]
            assert len(site.messages("jane")) == before + 1
            [line] = logged(site, UNAVAILABLE)
            assert cause in line


def test_without_tls_on_the_server_nothing_is_sent_to_it(site: Host, database: Database) -> None:
    site.configure(sql_usessl="yes", sql_hostnames=f"localhost:{database.server.port}")
    verify_flow(site, "SSL")


# What scripts remember


@pytest.fixture
def sink(site: Host, other: Host) -> Iterator[Sink]:
    """The server that both hosts send by."""
    with Sink() as sink:
        for host in (site, other):
            host.configure(smtp_backend="host", smtp_host=f"127.0.0.1:{sink.port}")
        yield sink


def letter(number: int) -> bytes:
    """A message that deserves an answer."""
    return b"From: sender@example.com\r\nTo: jane@example.com\r\n" + message(number)


def at_once(hosts: tuple[Host, ...], messages: list[bytes], *recipients: str) -> list[str]:
    """Each host gets its messages while the others get theirs; the codes of all replies."""
    clients = [begin(host, content, *recipients) for host, content in zip(hosts, messages)]
    return [reply for client in clients for reply in end(client, len(recipients))]


def test_a_sender_gets_one_answer_of_two_hosts(site: Host, other: Host, sink: Sink) -> None:
    filtered(site, 'require "vacation"; vacation "I am away.";', other)
    replies = at_once((site, other) * 2, [letter(number) for number in range(4)], "jane@example.com")
    assert replies == [STORED] * 4
    assert len(site.messages("jane")) == 4
    assert len(sink.mails) == 1
    assert len(logged(site, "no-answer")) + len(logged(other, "no-answer")) == 3


def test_a_redirect_is_followed_once_by_two_hosts(site: Host, other: Host, sink: Sink) -> None:
    filtered(site, 'redirect "other@example.net";', other)
    assert at_once((site, other) * 2, [letter(1)] * 4, "jane@example.com") == [STORED] * 4
    assert len(sink.mails) == 1
    assert len(logged(site, "mail-sent-before")) + len(logged(other, "mail-sent-before")) == 3


def test_a_mail_is_sent_again_if_the_host_that_sent_it_was_killed_before(
    site: Host, other: Host, sink: Sink, database: Database
) -> None:
    """The other host waits meanwhile."""
    filtered(site, 'redirect "other@example.net";', other)
    sink.hold["message"] = threading.Event()
    first = begin(site, letter(1), "jane@example.com")
    sink.wait(1)
    second = begin(other, letter(1), "jane@example.com")
    wait_for(database.waiting, "the second host to wait")
    site.child.kill()
    sink.hold["message"].set()
    assert end(second) == [STORED]
    first.close()
    assert len(sink.mails) == 2


def test_the_test_duplicate_is_that_of_all_hosts(site: Host, other: Host, database: Database) -> None:
    folder(site, "jane", "again")
    filtered(site, 'require ["duplicate", "fileinto"]; if duplicate { fileinto "again"; }', other)
    dates = ("Fri, 27 Nov 2026 12:00:00 +0000", "Fri, 27 Nov 2026 13:00:00 +0000")
    for host, date in zip((site, other), dates):
        content = b"Message-ID: <1@example.com>\r\nDate: " + date.encode() + b"\r\n\r\nA body.\r\n"
        assert deliver(host, content, "jane") == [STORED]
    assert len(site.messages("jane")) == len(site.messages("jane", ".again")) == 1
    assert database.column("SELECT mailbox FROM script_records") == [str(site.spool / "jane")]


def test_what_a_script_remembers_expires(site: Host, other: Host, database: Database) -> None:
    folder(site, "jane", "again")
    script = 'require ["duplicate", "fileinto"]; if duplicate :seconds 100 :uniqueid "x" { fileinto "again"; }'
    filtered(site, script, other)
    deliver(site, message(1), "jane")
    deliver(other, message(2), "jane")
    assert len(site.messages("jane", ".again")) == 1
    assert database.column(
        "SELECT until BETWEEN now() + interval '50 s' AND now() + interval '101 s' FROM script_records"
    )
    database.execute("UPDATE script_records SET until = until - interval '101 s'")
    deliver(site, message(3), "jane")
    assert len(site.messages("jane", ".again")) == 1
    deliver(other, message(4), "jane")
    assert len(site.messages("jane", ".again")) == 2


def test_old_records_of_scripts_go_by_themselves(site: Host, database: Database) -> None:
    filtered(site, 'require "duplicate"; if duplicate { discard; }')
    client = site.connect()
    client.hello()
    for number in range(50):
        client.deliver(message(number), "jane")
    assert database.records("script_records") == 50
    database.execute("UPDATE script_records SET until = now() - interval '1 day'")
    for number in range(50, 80):
        client.deliver(message(number), "jane")
    client.close()
    assert database.records("script_records") <= 31


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("a${hex:00}b", "a${hex:00}c"),
        ("a${hex:00}", "a"),
        ("\\\\0", "${hex:00}"),
        ("ä" * 400 + "1", "ä" * 400 + "2"),
    ],
    ids=["NUL", "NUL and none", "backslash", "long"],
)
def test_what_scripts_remember_may_have_any_octets(
    site: Host, other: Host, database: Database, first: str, second: str
) -> None:
    folder(site, "jane", "again")
    filtered(site, "keep;", other)
    with session(site) as one, session(other) as two:
        for number, (client, text) in enumerate(((one, first), (two, second), (two, first), (one, second))):
            requires = '["duplicate", "encoded-character", "fileinto"]'
            script = f'require {requires}; if duplicate :uniqueid "{text}" {{ fileinto "again"; }}'
            (site.root / "script.sieve").write_text(script)
            assert send(client, message(number), "jane") == [STORED]
    assert len(site.messages("jane")) == len(site.messages("jane", ".again")) == 2
    assert database.records("script_records") == 2
    assert UNAVAILABLE not in site.log_text() + other.log_text()


def test_without_the_server_nobody_gets_an_answer(site: Host, sink: Sink, database: Database) -> None:
    """Else each message would have one. A redirect is followed, for it must not be lost."""
    filtered(site, 'require ["vacation", "copy"]; redirect :copy "other@example.net"; vacation "I am away.";')
    database.server.close()
    for number in range(2):
        assert deliver(site, letter(number), "jane@example.com") == [STORED]
    assert {mail.recipients for mail in sink.mails} == {("other@example.net",)}
    assert len(sink.mails) == 2
    assert all("duplicate database" in line for line in logged(site, "mail-not-sent"))


# Who serves


@pytest.mark.parametrize("arguments", [(), ("-U", "1"), ("-U", "3")], ids=" ".join)
def test_the_workers_of_a_pool(site: Host, other: Host, database: Database, arguments: tuple[str, ...]) -> None:
    """Each has a connection of its own to the server, and ends it."""
    site.configure(lmtp_prefork="2")
    with SocketActivate(with_log(site, *arguments), address=str(site.root / "lmtp")) as starter:
        for _ in range(3):
            clients = [starter.connect() for _ in range(5)]
            for client in clients:
                client.hello()
            for client in clients:
                client.send(b"MAIL FROM:<>\r\n" + b"RCPT TO:<jane>\r\nDATA\r\n" + message() + b".\r\n")
            for client in clients:
                assert [client.reply()[-1][:3] for _ in range(4)] == ["250", "250", "354", "250"]
            assert len(database.clients()) <= 10
            for client in clients:
                client.leave()
    assert len(site.messages("jane")) == 1
    assert len(logged(site, "duplicate")) == 14
    assert deliver(other, message(), "jane") == [STORED]
    assert len(site.messages("jane")) == 1
    wait_for(lambda: not database.clients(), "the connections to end")
    assert UNAVAILABLE not in site.log_text()


def test_a_process_for_each_connection(site: Host, database: Database) -> None:
    """Started by systemd with Accept=yes. One that stores nothing does not ask the server."""
    command = with_log(site)
    with SocketActivate(command, accept=True, inetd=True, address=str(site.root / "lmtp")) as starter:
        client = starter.connect()
        client.hello()
        assert client.command("RSET").startswith("250")
        assert database.clients() == []
        for _ in range(2):
            assert client.deliver(message(), "jane")[0].startswith(STORED)
        assert len(database.clients()) == 1
        client.leave()
        wait_for(lambda: not database.clients(), "the connection to end")
    assert len(site.messages("jane")) == 1


def test_a_session_has_one_connection_to_the_server(site: Host, database: Database) -> None:
    client = site.connect()
    client.hello()
    seen = set()
    for number in range(20):
        assert client.deliver(message(number), "jane")[0].startswith(STORED)
        seen.update(database.clients())
    client.leave()
    assert len(seen) == 1


# The configuration, and questions about it


def test_a_configuration_in_order(site: Host) -> None:
    said = asked(site, "--check")
    assert (said.status, said.lines) == (OK, [f"{site.conf} is in order for the account {STORE_USER}"])


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"sql_hostnames": "127.0.0.1:1"}, "refused"),
        ({"sql_passwd": "wrong"}, "password authentication failed"),
        ({"sql_database": "nowhere"}, "does not exist"),
        ({"sql_hostnames": "/nonexistent"}, "No such file or directory"),
    ],
    ids=["down", "password", "database", "socket"],
)
def test_check_says_why_the_database_cannot_be_used(site: Host, options: dict[str, str], cause: str) -> None:
    site.configure(**options)
    said = asked(site, "--check")
    assert said.status == CONFIG
    [line] = said.lines
    assert line.startswith("error: ")
    assert cause in line
    assert PASSWORD not in line
    assert not list(site.configdirectory.glob("*.backoff"))


def test_check_makes_nothing(site: Host, database: Database) -> None:
    asked(site, "--check")
    assert database.column("SELECT tablename FROM pg_tables WHERE schemaname = 'public'") == []


def test_check_does_not_ask_if_nothing_is_to_be_recorded_there(site: Host) -> None:
    site.configure(duplicate_db="twoskip", sql_hostnames="127.0.0.1:1")
    assert asked(site, "--check").status == OK


@pytest.mark.parametrize("engine", ["mysql", "sqlite"])
def test_another_engine_is_a_configuration_error(site: Host, engine: str) -> None:
    site.configure(sql_engine=engine)
    said = asked(site, "--check")
    assert said.status == CONFIG
    assert any("sql_engine" in line and engine in line for line in said.lines)
    assert site.pipe(b"").stdout == b"421 4.3.0 Configuration error, see the log\r\n"
    # It matters only if it is used.
    site.configure(duplicate_db="twoskip")
    assert deliver(site, message(), "jane") == [STORED]


@pytest.mark.parametrize("kind", ["twoskip", "skiplist", "berkeley-nosync", "sqlite"])
def test_the_other_kinds_of_cyrus_are_the_file(site: Host, database: Database, kind: str) -> None:
    site.configure(duplicate_db=kind)
    verify_suppression(site)
    assert (site.configdirectory / "deliver.db").exists()
    assert database.column("SELECT tablename FROM pg_tables WHERE schemaname = 'public'") == []


@pytest.mark.parametrize("names", ["127.0.0.1:port", "127.0.0.1:99999", ":5432", ",", "a b"])
def test_names_that_are_none(site: Host, names: str) -> None:
    site.configure(sql_hostnames=names)
    said = asked(site, "--check")
    assert said.status == CONFIG
    assert any("sql_hostnames" in line for line in said.lines)


@pytest.mark.parametrize("value", ["pass'word", "back\\slash", "two words", "host=192.0.2.1", "ä", "a" * 500])
def test_a_password_of_any_characters(site: Host, database: Database, value: str) -> None:
    quoted = value.replace("'", "''")
    database.execute(f"ALTER ROLE {USER} PASSWORD '{quoted}'")
    try:
        site.configure(sql_passwd=value)
        verify_suppression(site)
    finally:
        database.execute(f"ALTER ROLE {USER} PASSWORD '{PASSWORD}'")


def test_the_password_is_not_shown(site: Host) -> None:
    said = asked(site, "--config")
    assert said.status == OK
    assert "duplicate_db: sql" in said.lines
    assert "# sql_passwd is set, and not shown" in said.lines
    assert not any(line.endswith(PASSWORD) for line in said.lines)


def test_explain_makes_nothing_and_knows_what_is_recorded(site: Host, database: Database) -> None:
    filtered(site, 'require "duplicate"; if duplicate { discard; }')
    said = explained(site, "jane", message=message())
    assert said.value["actions"] == "fileinto INBOX"
    assert database.column("SELECT tablename FROM pg_tables WHERE schemaname = 'public'") == []
    deliver(site, message(), "jane")
    before = (database.records(), database.records("script_records"))
    assert explained(site, "jane", message=message()).value["actions"] == "discard"
    assert (database.records(), database.records("script_records")) == before


def test_explain_does_without_the_server(site: Host, database: Database) -> None:
    filtered(site, 'require "duplicate"; if duplicate { discard; }')
    database.server.close()
    said = explained(site, "jane", message=message())
    assert said.value["actions"] == "fileinto INBOX"
    assert not list(site.configdirectory.glob("*.backoff"))


def test_a_claim_after_a_restart_is_settled_at_once(site: Host, database: Database) -> None:
    """It is on a new connection, where it must not wait for the next message."""
    client = site.connect()
    client.hello()
    client.deliver(message(1), "jane")
    database.server.restart()
    assert client.deliver(message(2), "jane")[0][:9] == STORED
    assert database.records() == 2
    assert database.clients("idle in transaction%") == []
    client.leave()


def test_a_claim_that_waits_in_vain_leaves_nothing_on_the_server(
    site: Host, other: Host, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each statement is prepared once on a connection, also if the one before it has failed."""
    monkeypatch.setitem(lmtpd.SESSION_SETTINGS, "lock_timeout", "50ms")
    first = holding(site, database, message(), "jane")
    records = lmtpd.ServerRecords(lmtpd.Config.load(str(other.conf), "lmtp"))
    prepared = []
    for _ in range(4):
        claim = lmtpd.Claim("<1@example.com>", "Fri, 27 Nov 2026 12:00:00 +0000", [f"{site.spool}/jane"])
        records.claim(claim)
        assert claim.busy
        records.settle(claim, [])
        connection = records._connection
        assert connection
        prepared.append(connection.run(("SELECT statement FROM pg_prepared_statements", ())))
    site.go_on()
    assert end(first) == [STORED]
    records._close()
    assert Counter(prepared[3]).most_common(1)[0][1] == 1
    assert len(prepared[3]) == len(prepared[1])
