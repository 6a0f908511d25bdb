"""Users as Dovecot and the system know them, each with an account of his own, and the traps that a user can set."""

from __future__ import annotations

import fcntl
import os
import pwd
import re
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from container import Machine
from harness import PATIENCE, STORE_USER, Client, Site, connect, wait_for
from peers import Peer, answers, dovecot_users_conf, dovecot_version, program

MESSAGE = b"Subject: x\r\n\r\nA body.\r\n"
# Too large to be kept in memory: it is spooled into a draft.
LARGE = MESSAGE + b"0123456789abcdef" * 62 + b"\r\n" + b"x" * 1_000_000 + b"\r\n"
JANE, JOE = 20001, 20002  # user ids, and the same for the groups
NO_ID = 2**32 - 1  # which setreuid(2) takes for "leave it as it is"


COLUMNS = (
    "home",
    "uid",
    "gid",
    "mail",
    "quota_rule",
    "mail_driver",
    "mail_path",
    "quota_storage_size",
    "quota_message_count",
    "sieve",
    "user",
)
QUERY = f"SELECT {', '.join(COLUMNS)} FROM users WHERE name ="


def as_dovecot_24_says(fields: dict[str, str]) -> dict[str, str]:
    """The same as the fields mail and quota_rule in the language of Dovecot 2.4."""
    new = {name: value for name, value in fields.items() if name not in ("mail", "quota_rule")}
    if "mail" in fields:
        new["mail_driver"], new["mail_path"], *_ = fields["mail"].split(":")
    names = {"storage": "quota_storage_size", "messages": "quota_message_count"}
    for limit in fields.get("quota_rule", "*").split(":")[1:]:
        name, _, value = limit.partition("=")
        new[names[name]] = value
    return new


class Users(Peer):
    """Dovecot's authentication service, with its users in a file or in an SQLite database."""

    name = "Dovecot"

    def __init__(self, site: Site, kind: str) -> None:
        super().__init__(site.root / "users")
        self.kind = kind
        self._is_old = dovecot_version() < (2, 4)
        self.socket = self.folder / "run/auth-userdb"
        self.homes = site.root / "home"
        self.homes.mkdir(exist_ok=True)
        self._conf = self.folder / "dovecot.conf"
        self._file = self.folder / "users.passwd"
        self._database = self.folder / "users.db"
        self._file.touch()
        self._create_table()
        databases = self._databases() if self._is_old else self._24_databases()
        self._conf.write_text(dovecot_users_conf(self.folder, self.log, databases))

    def _databases(self) -> str:
        """Who there is."""
        sql = self.folder / "sql.conf"
        sql.write_text(f"driver = sqlite\nconnect = {self._database}\nuser_query = {QUERY} '%u'\n")
        arguments = sql if self.kind == "sql" else self._file
        return f"""\
passdb {{
  driver = static
  args = nopassword=y
}}
userdb {{
  driver = {self.kind}
  args = {arguments}
}}
"""

    def _24_databases(self) -> str:
        """The same in the language of Dovecot 2.4."""
        users = f"query = {QUERY} '%{{user}}'" if self.kind == "sql" else f"passwd_file_path = {self._file}"
        return f"""\
sql_driver = sqlite
sqlite_path = {self._database}
passdb static {{
  fields {{
    nopassword = yes
  }}
}}
userdb {self.kind} {{
  {users}
}}
"""

    def open_to_all(self) -> None:
        """Gives the socket the owner and the permissions that it has unless it is configured."""
        text = (
            self._conf.read_text().replace("mode = 0600", "mode = 0666").replace(f"user = {STORE_USER}", "user = root")
        )
        self._conf.write_text(text)

    def _create_table(self) -> None:
        with sqlite3.connect(self._database) as database:
            database.execute(f"CREATE TABLE users (name, {', '.join(COLUMNS)})")
        database.close()

    def break_down(self) -> None:
        """Makes every question about a user of the SQL database one that can't be answered at the moment."""
        with sqlite3.connect(self._database) as database:
            database.execute("ALTER TABLE users RENAME TO gone")
        database.close()

    def mend(self) -> None:
        """Ends what break_down() did."""
        with sqlite3.connect(self._database) as database:
            database.execute("ALTER TABLE gone RENAME TO users")
        database.close()

    def add(self, name: str, uid: int, **fields: str) -> Path:
        """A user with an empty home of his own, which is returned. fields: mail, quota_rule."""
        home = self.homes / name
        home.mkdir(mode=0o700)
        if 0 <= uid < NO_ID:
            os.chown(home, uid, uid)
        self.add_row(name, str(home), uid, **fields)
        return home

    def add_row(self, name: str, home: str, uid: int | str, **fields: str) -> None:
        """A user whose home and user id are what the texts say."""
        if not self._is_old:
            fields = as_dovecot_24_says(fields)
        extra = " ".join(f"userdb_{key}={value}" for key, value in fields.items())
        with self._file.open("a") as file:
            file.write(f"{name}:x:{uid}:{uid}::{home}::{extra}\n")
        with sqlite3.connect(self._database) as database:
            row = {"name": name, "home": home, "uid": uid, "gid": uid}
            row |= {column: fields[column] for column in COLUMNS if column in fields}
            marks = ", ".join(f":{column}" for column in row)
            database.execute(f"INSERT INTO users ({', '.join(row)}) VALUES ({marks})", row)
        database.close()

    def start(self) -> None:
        self.run([program("dovecot"), "-F", "-c", str(self._conf)], lambda: answers(str(self.socket)))

    def stop(self) -> None:
        """Ends them all: those that have a client would go on without their master for a while."""
        os.killpg(self.process.pid, signal.SIGTERM)

    def restart(self) -> None:
        self.close()
        self.start()


class Homes(NamedTuple):
    """A site whose users have accounts of their own."""

    site: Site
    users: Users

    def client(self) -> Client:
        client = self.site.connect()
        client.sock.settimeout(20)
        client.hello()
        return client

    def deliver(self, *names: str, message: bytes = MESSAGE) -> list[str]:
        """Delivers on a connection of its own; the code and enhanced code for each recipient, at whichever time."""
        client = self.client()
        try:
            replies = client.deliver(message, *names)
            client.command("QUIT")
            return [reply[:9] for reply in replies]
        finally:
            client.close()


def homes_of(kind: str) -> Iterator[Homes]:
    site = Site(userdb="dovecot", maildir_path="%h/Maildir", duplicatesuppression="no")
    try:
        with Users(site, kind) as users:
            site.configure(userdb_socket_path=str(users.socket))
            yield Homes(site, users)
    finally:
        site.close()


@pytest.fixture(params=["passwd-file", "sql"])
def homes(request: pytest.FixtureRequest) -> Iterator[Homes]:
    yield from homes_of(request.param)


@pytest.fixture(scope="module")
def many_homes() -> Iterator[Homes]:
    """The same for many tests, each with users of its own; Dovecot sees a change of a file only after a second."""
    yield from homes_of("sql")


def stored(maildir: Path) -> list[Path]:
    return list((maildir / "new").iterdir()) if (maildir / "new").is_dir() else []


def owner(path: Path) -> tuple[int, int, int]:
    """Whose it is, and its permissions."""
    status = path.lstat()
    return status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)


# Who exists and where: Dovecot says it


def test_a_users_maildir_is_made_in_his_home_and_belongs_to_him(homes: Homes) -> None:
    home = homes.users.add("jane", JANE)
    assert homes.deliver("jane") == ["250 2.1.5"]
    maildir = home / "Maildir"
    [file] = stored(maildir)
    assert owner(file) == (JANE, JANE, 0o600)
    for folder in (maildir, maildir / "tmp", maildir / "new", maildir / "cur"):
        assert owner(folder) == (JANE, JANE, 0o700), folder


def test_where_dovecot_says_that_a_users_mail_is(homes: Homes) -> None:
    elsewhere = homes.site.root / "elsewhere"
    elsewhere.mkdir()
    os.chown(elsewhere, JANE, JANE)
    home = homes.users.add("jane", JANE, mail=f"maildir:{elsewhere}/jane:INDEX=/var/indexes")
    other = homes.users.add("joe", JOE, mail="maildir:~/Mail")
    assert homes.deliver("jane", "joe") == ["250 2.1.5", "250 2.1.5"]
    assert len(stored(elsewhere / "jane")) == len(stored(other / "Mail")) == 1
    assert list(home.iterdir()) == []


def test_the_name_that_dovecot_has_for_a_user_is_that_of_his_maildir(homes: Homes) -> None:
    """He reads the mail that is there, however he was addressed."""
    home = homes.users.add("jane", JANE)
    homes.site.configure(maildir_path=f"{homes.users.homes}/%u/Maildir", lmtp_downcase_rcpt="no")
    assert homes.deliver("jane", "Jane") == ["250 2.1.5", "250 2.1.5"]
    assert len(stored(home / "Maildir")) == 2


def test_mail_that_is_no_maildir_is_not_made_one(homes: Homes) -> None:
    home = homes.users.add("jane", JANE, mail="mbox:~/mail")
    assert homes.deliver("jane")[0].startswith("451")
    assert list(home.iterdir()) == []
    assert "mbox" in homes.site.log_text()


def test_the_quota_that_dovecot_gives_a_user_holds(homes: Homes) -> None:
    home = homes.users.add("jane", JANE, quota_rule="*:storage=1k:messages=3")
    assert homes.deliver("jane", message=MESSAGE + b"x" * 900 + b"\r\n") == ["250 2.1.5"]
    maildirsize = home / "Maildir/maildirsize"
    assert maildirsize.read_text().splitlines()[0] == "1024S,3C"
    assert owner(maildirsize)[:2] == (JANE, JANE)
    assert homes.deliver("jane") == ["452 4.2.2"]
    assert len(stored(home / "Maildir")) == 1


def test_an_unknown_user_is_refused_for_good(homes: Homes) -> None:
    homes.users.add("jane", JANE)
    assert homes.deliver("nobody", "jane") == ["550 5.1.1", "250 2.1.5"]


@pytest.mark.parametrize(
    "name", ['"ja\\\tne"', "jane%", "'; DROP TABLE users --", "ja\\\\ne", "x" * 64, "../jane", "."]
)
def test_an_odd_name_is_an_unknown_user(many_homes: Homes, name: str) -> None:
    quoted = name if name.startswith('"') else f'"{name}"'
    assert many_homes.deliver(quoted)[0][:1] == "5"
    assert many_homes.deliver("nobody") == ["550 5.1.1"]


# When Dovecot is not there


def test_while_dovecot_is_down_mail_waits(homes: Homes) -> None:
    home = homes.users.add("jane", JANE)
    homes.users.close()
    assert homes.deliver("jane", "nobody") == ["451 4.3.0", "451 4.3.0"]
    assert "userdb" in homes.site.log_text()
    homes.users.start()
    assert homes.deliver("jane", "nobody") == ["250 2.1.5", "550 5.1.1"]
    assert len(stored(home / "Maildir")) == 1


def test_a_restart_of_dovecot_between_two_messages_goes_unnoticed(homes: Homes) -> None:
    home = homes.users.add("jane", JANE)
    client = homes.client()
    for _ in range(3):
        assert client.deliver(MESSAGE, "jane")[0].startswith("250 2.1.5")
        homes.users.restart()
    client.close()
    assert len(stored(home / "Maildir")) == 3


def test_a_session_outlives_an_absence_of_dovecot(homes: Homes) -> None:
    homes.users.add("jane", JANE)
    client = homes.client()
    assert client.deliver(MESSAGE, "jane")[0].startswith("250 2.1.5")
    homes.users.close()
    client.command("MAIL FROM:<>")
    assert client.command("RCPT TO:<jane>").startswith("451 4.3.0")
    homes.users.start()
    assert client.command("RCPT TO:<jane>").startswith("250")
    client.close()


@pytest.fixture
def sql_homes() -> Iterator[Homes]:
    yield from homes_of("sql")


def test_a_user_database_that_fails_is_no_reason_to_bounce(sql_homes: Homes) -> None:
    sql_homes.users.add("jane", JANE)
    sql_homes.users.break_down()
    assert sql_homes.deliver("jane", "nobody") == ["451 4.3.0", "451 4.3.0"]
    sql_homes.users.mend()
    assert sql_homes.deliver("jane", "nobody") == ["250 2.1.5", "550 5.1.1"]


def test_a_user_database_that_hangs_costs_one_connection_time_and_not_all(sql_homes: Homes) -> None:
    """Each connection has a process of its own."""
    home = sql_homes.users.add("jane", JANE)
    assert sql_homes.deliver("jane") == ["250 2.1.5"]
    sql_homes.site.figures = {"SERVICE_TIMEOUT": 2, "BACKOFF": 300}
    group = sql_homes.users.process.pid
    os.killpg(group, signal.SIGSTOP)
    try:
        assert [sql_homes.deliver("jane") for _ in range(4)] == [["451 4.3.0"]] * 4
    finally:
        os.killpg(group, signal.SIGCONT)
    causes = re.findall(r'user-database-unavailable .* cause="[^"]*: ([^"]*)"', sql_homes.site.log_text())
    assert causes == ["does not answer", *["not asked again yet after a timeout"] * 3]
    os.utime(sql_homes.site.configdirectory / "userdb.backoff", (0, 0))
    sql_homes.site.figures = {}
    assert sql_homes.deliver("jane") == ["250 2.1.5"]
    assert len(stored(home / "Maildir")) == 2


def test_a_name_that_no_directory_can_have_is_no_reason_to_bounce(sql_homes: Homes) -> None:
    """Dovecot knows the user, by another name."""
    sql_homes.users.add("jane", JANE, user=".jane")
    sql_homes.site.configure(maildir_path=f"{sql_homes.users.homes}/%u/Maildir")
    assert sql_homes.deliver("jane", "nobody") == ["451 4.3.0", "550 5.1.1"]
    assert "mailbox-not-accessible" in sql_homes.site.log_text()


def test_a_socket_that_tells_lmtpd_nothing_is_no_reason_to_bounce(sql_homes: Homes) -> None:
    """Dovecot tells every account of the host who itself is, and not who others are."""
    users = sql_homes.users
    users.open_to_all()
    users.restart()
    users.add("jane", JANE)
    assert sql_homes.deliver("jane", "nobody") == ["451 4.3.0", "550 5.1.1"]


def test_one_connection_serves_a_session(many_homes: Homes) -> None:
    many_homes.users.add("lookups", JANE)
    trace = many_homes.site.root / "trace"
    session = (
        b"LHLO x\r\n"
        + (b"MAIL FROM:<>\r\n" + b"RCPT TO:<nobody>\r\nRCPT TO:<lookups>\r\n" * 5 + b"RSET\r\n") * 5
        + b"QUIT\r\n"
    )
    strace(many_homes.site, trace, "connect", session)
    connections = [line for line in trace.read_text().splitlines() if "auth-userdb" in line]
    assert len(connections) == 1


def strace(site: Site, trace: Path, calls: str, session: bytes) -> bytes:
    """Runs a session under strace; what lmtpd replies."""
    return subprocess.run(
        ["strace", "-f", "-y", "-s", "200", "-e", f"trace={calls}", "-o", str(trace), *site.command()],
        input=session,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        timeout=PATIENCE,
        check=True,
    ).stdout


# Many accounts in one transaction


def test_what_was_delivered_is_remembered_by_lmtpds_own_account(homes: Homes) -> None:
    homes.site.configure(duplicatesuppression="yes")
    places = {name: homes.users.add(name, uid) for name, uid in (("jane", JANE), ("joe", JOE))}
    for _ in range(2):
        message = b"Message-ID: <1@example.com>\r\nDate: Fri, 27 Nov 2026 12:00:00 +0000\r\n" + MESSAGE
        assert homes.deliver("jane", "joe", "jane", message=message) == ["250 2.1.5"] * 3
    assert [len(stored(home / "Maildir")) for home in places.values()] == [1, 1]
    accounts = {path.stat().st_uid for path in homes.site.configdirectory.iterdir()}
    assert accounts == {pwd.getpwnam(STORE_USER).pw_uid}


@pytest.mark.parametrize("message", [MESSAGE, LARGE], ids=["small", "large"])
def test_each_recipient_has_a_file_of_his_own(homes: Homes, message: bytes) -> None:
    accounts = {f"user{number}": JANE + number for number in range(5)}
    places = {name: homes.users.add(name, uid) for name, uid in accounts.items()}
    places["again"] = homes.users.add("again", JANE)  # the first one's account
    assert homes.deliver(*places, "user0+nowhere", message=message) == ["250 2.1.5"] * 7
    contents = set()
    for name, home in places.items():
        files = stored(home / "Maildir")
        uid = accounts.get(name, JANE)
        assert {owner(file) for file in files} == {(uid, uid, 0o600)}
        assert {file.stat().st_nlink for file in files} <= {1, 2, 3} if uid == JANE else {1}
        contents |= {file.read_bytes() for file in files}
        assert list((home / "Maildir/tmp").iterdir()) == []
    assert len(contents) == 1


def test_what_a_user_does_to_his_file_is_not_in_the_file_of_another(many_homes: Homes) -> None:
    """The spooled message must not be where the first recipient can write: he could forge the mail of the others."""
    first, second = many_homes.users.add("forger", JANE), many_homes.users.add("victim", JOE)
    client = many_homes.client()
    for command in ("MAIL FROM:<>", "RCPT TO:<forger>", "RCPT TO:<victim>"):
        assert client.command(command).startswith("250")
    client.command("DATA")
    client.send(LARGE)
    # lmtpd has all of it when it asks for more.
    wait_for(lambda: not unread_by_peer(client.sock), "lmtpd to have read")
    for file in first.rglob("tmp/*"):
        with file.open("r+b") as draft:
            draft.seek(500_000)
            draft.write(b"FORGED")
    client.send(b".\r\n")
    assert [client.reply()[-1][:3] for _ in range(2)] == ["250", "250"]
    client.close()
    [file] = stored(second / "Maildir")
    assert b"FORGED" not in file.read_bytes()


def unread_by_peer(sock: socket.socket) -> int:
    """The octets that were sent and not yet read, see SIOCOUTQ in unix(7)."""
    return int.from_bytes(fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)), sys.byteorder)


def test_the_fault_of_one_account_is_not_that_of_the_others(many_homes: Homes) -> None:
    places = {name: many_homes.users.add(name, uid) for name, uid in (("left", JANE), ("shut", JOE), ("right", JOE))}
    os.chown(places["shut"], 0, 0)
    places["shut"].chmod(0o700)
    for message in (MESSAGE, LARGE):
        assert many_homes.deliver("shut", "left", "shut", "right", message=message) == [
            *["451 4.3.0", "250 2.1.5", "451 4.3.0", "250 2.1.5"]
        ]
    assert list(places["shut"].iterdir()) == []


def test_a_full_disk_of_one_is_not_that_of_the_others(many_homes: Homes) -> None:
    places = [many_homes.users.add(name, JANE) for name in ("fullest", "roomy")]
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size=64k,uid={JANE}", "lmtpd-test", places[0]], check=True)
    try:
        assert many_homes.deliver("fullest", "roomy", message=LARGE) == ["452 4.3.1", "250 2.1.5"]
    finally:
        subprocess.run(["umount", places[0]], check=True)


def test_an_account_that_lmtpd_can_not_take_on_is_a_temporary_failure(homes: Homes) -> None:
    """Not started by root, lmtpd has only its own."""
    homes.users.add("jane", JANE)
    own = homes.users.add("joe", JOE)
    done = as_user(homes, JOE, "RCPT TO:<jane>", "RCPT TO:<joe>")
    assert [line[:9] for line in done[2:4]] == ["451 4.3.0", "250 2.1.5"]
    assert done[5].startswith("250 2.1.5")
    [file] = stored(own / "Maildir")
    assert owner(file)[0] == JOE
    [refused] = [line for line in homes.site.log_text().splitlines() if line.startswith("<3>")]
    assert "jane" in refused
    assert f"cannot act as the user with the id {JANE}" in refused


@pytest.mark.parametrize("call", ["setgroups", "setresgid"])
@pytest.mark.parametrize("number", range(2, 6))
def test_a_process_that_cannot_return_to_its_own_identity_ends(homes: Homes, call: str, number: int) -> None:
    """Every second call takes a user's identity on, the others give it back; the first one is made at the start."""
    home = homes.users.add("jane", JANE)
    transaction = "MAIL FROM:<>", "RCPT TO:<jane>", "DATA", MESSAGE.decode() + "."
    session = "\r\n".join(["LHLO x", *transaction, "RSET", *transaction, "QUIT", ""])
    faulty = ["strace", "-f", "-o", "/dev/null", "-e", f"inject={call}:error=ENOMEM:when={number}"]
    with homes.site.log.open("ab") as log:
        done = subprocess.run(
            [*faulty, *homes.site.command()],
            input=session.encode(),
            stdout=subprocess.PIPE,
            stderr=log,
            env=homes.site.journal(),
            timeout=PATIENCE,
        )
    replies = [line[:9] for line in done.stdout.decode().splitlines() if line[3] == " "]
    if number % 2:
        assert done.returncode == os.EX_OSERR
        assert "<3>identity-not-restored session=" in homes.site.log_text()
        assert "221 2.0.0" not in replies
    else:
        assert done.returncode == 0
        assert "451 4.3.0" in replies
        assert replies[-2:] == ["250 2.1.5", "221 2.0.0"], "the next message is delivered"
        assert len(stored(home / "Maildir")) in (1, 2)
        assert {owner(file)[0] for file in stored(home / "Maildir")} == {JANE}


def as_user(homes: Homes, uid: int, *recipients: str) -> list[str]:
    """A session with an lmtpd that this account has started; the last lines of its replies."""
    for path in (homes.users.socket, homes.users.socket.parent, homes.site.configdirectory):
        os.chown(path, uid, uid)
    session = ["LHLO x", "MAIL FROM:<>", *recipients, "DATA", MESSAGE.decode() + ".", "QUIT", ""]
    with homes.site.log.open("ab") as log:
        replies = subprocess.run(
            ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", *homes.site.command()],
            input="\r\n".join(session).encode(),
            stdout=subprocess.PIPE,
            stderr=log,
            env=homes.site.journal(),
            timeout=PATIENCE,
            check=True,
        ).stdout.decode()
    return [line for line in replies.splitlines()[1:] if line[3] == " "]


@pytest.mark.parametrize("uid", [0, NO_ID, -1])
def test_nobody_is_delivered_to_as_root(many_homes: Homes, uid: int) -> None:
    home = many_homes.users.add(f"user{uid}", uid)
    assert many_homes.deliver(f"user{uid}")[0][:1] in "45"
    assert list(home.iterdir()) == []


# The account is taken on for the user's Maildir, and for nothing else


def test_the_account_is_taken_on_for_the_maildir_alone(many_homes: Homes) -> None:
    home = many_homes.users.add("minutes", JANE, quota_rule="*:storage=10M")
    with Traced(many_homes.site, "%file,setresuid,connect") as client:
        for message in (MESSAGE, LARGE):
            assert client.deliver(message, "minutes", "nobody", "minutes+folder")[0].startswith("250 2.1.5")
        lines = client.end()
    cyrus_user = pwd.getpwnam(STORE_USER).pw_uid
    acts = acts_of(lines)
    assert {uid for uid, path in acts if Path(home) in Path(path).parents or path == str(home)} == {JANE}
    as_jane = {path for uid, path in acts if uid == JANE and not path.startswith(("/proc/", "/sys/"))}
    assert [path for path in as_jane if not is_in(path, home) and not is_in(str(home), Path(path))] == []
    assert {uid for uid, path in acts if not is_in(path, home)} <= {JANE, cyrus_user}


def test_no_group_of_the_process_is_the_users(many_homes: Homes) -> None:
    many_homes.users.add("alone", JANE)
    with Traced(many_homes.site, "setgroups,setresuid") as client:
        assert client.deliver(MESSAGE, "alone")[0].startswith("250 2.1.5")
        lines = client.end()
    groups, at_delivery = "", set()
    for line in lines:
        if found := re.search(r"setgroups\(\d+, (\S*)\)\s+= 0", line):
            groups = found[1]
        if re.search(rf"setresuid\(-1, {JANE}, -1\)\s+= 0", line):
            at_delivery.add(groups)
    assert at_delivery <= {f"[{JANE}]", "[]", "NULL"}
    assert at_delivery


def is_in(path: str, folder: Path) -> bool:
    return Path(path) == folder or folder in Path(path).parents


def acts_of(lines: list[str]) -> list[tuple[int, str]]:
    """As which user each path was used, after the first question to Dovecot."""
    uid, started = 0, False
    acts: list[tuple[int, str]] = []
    for line in lines:
        started = started or "auth-userdb" in line
        if found := re.search(r"setresuid\(-1, (\d+), -1\)\s+= 0", line):
            uid = int(found[1])
        elif started and (found := re.search(r' [a-z0-9]+\((?:(?:AT_FDCWD|\d+)<([^>]*)>, )?"([^"]*)"', line)):
            acts.append((uid, os.path.normpath(os.path.join(found[1] or "/", found[2]))))
    assert acts
    return acts


class Traced(Client):
    """A client of an lmtpd whose system calls are written down."""

    def __init__(self, site: Site, calls: str) -> None:
        self._trace = site.root / "trace"
        command = [program("strace"), "-f", "-y", "-s", "300", "-e", f"trace={calls}", "-o", str(self._trace)]
        ours, theirs = socket.socketpair()
        with theirs, site.log.open("ab") as log:
            self._child = subprocess.Popen(
                [*command, *site.command()],
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=log,
                env=site.journal(),
            )
        super().__init__(ours)
        self.sock.settimeout(20)

    def __enter__(self) -> Traced:
        self.hello()
        return self

    def end(self) -> list[str]:
        """Ends the session; the system calls."""
        self.command("QUIT")
        self._child.wait(PATIENCE)
        return self._trace.read_text().splitlines()

    def __exit__(self, *_: object) -> None:
        self.close()
        # strace ends when its lmtpd has, which has lost its client.
        self._child.wait(PATIENCE)


# Traps: what a user may put into his home

PARTS = ("tmp", "new", "cur")
# A place in the home, and what it is a symbolic link to among another's files; "nowhere" is not there yet.
LINKS = [
    ("Maildir", "Maildir"),
    ("Maildir", "nowhere"),
    *((f"Maildir/{part}", f"Maildir/{part}") for part in PARTS),
    *((f"Maildir/{part}", "nowhere") for part in PARTS),
    ("Maildir/.folder", "Maildir/.folder"),
    ("Maildir/.folder", "nowhere"),
    *((f"Maildir/.folder/{part}", f"Maildir/.folder/{part}") for part in PARTS),
    *((f"Maildir/.folder/{part}", "nowhere") for part in PARTS),
    ("Maildir/.folder/maildirfolder", "nowhere"),
    *((f"Maildir/{name}", f"Maildir/{name}") for name in ("maildirsize", "dovecot-keywords", "dovecot-attributes")),
    *((f"Maildir/{name}", "nowhere") for name in ("maildirsize", "dovecot-uidlist.lock", "subscriptions")),
    ("Maildir/courierimapsubscribed", "nowhere"),
]
FILES = ("maildirsize", "dovecot-keywords", "dovecot-attributes", "subscriptions")
# Places where a user may put something that is neither file nor folder.
PLACES = [
    "Maildir",
    *(f"Maildir/{name}" for name in (*PARTS, *FILES, ".folder", ".folder/new", ".folder/maildirfolder")),
]


class Trap(NamedTuple):
    """A user with a Maildir, and what he wants to get at: another's."""

    homes: Homes
    name: str
    home: Path
    victim: Path

    def lay(self, place: str, make: Callable[[Path], None]) -> None:
        """Puts something of the user's in place of what is there."""
        path = self.home / place
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        make(path)
        os.lchown(path, JANE, JANE)

    def spring(self) -> list[str]:
        """Delivers to the user and to his folder, small and large; the replies. The victim must not notice."""
        before = everything_of(self.victim)
        replies = []
        with Traced(self.homes.site, "%file") as client:
            for message in (MESSAGE, LARGE):
                for name in (self.name, f"{self.name}+folder"):
                    replies += client.deliver(message, name)
            lines = client.end()
        assert everything_of(self.victim) == before
        assert [line for line in lines if re.search(rf"= \d+<{self.victim}", line)] == [], "it was opened"
        assert {reply[:9] for reply in replies} <= {"250 2.1.5", "451 4.3.0"}
        return replies

    def check_deliveries(self, replies: list[str]) -> None:
        """What was said to be delivered must be in the user's own home."""
        found = [path for path in self.home.rglob("new/*") if path.is_file()]
        assert len(found) == len([reply for reply in replies if reply.startswith("250")])
        assert {owner(path)[:2] for path in found} <= {(JANE, JANE)}
        if any(reply.startswith("451") for reply in replies):
            assert str(self.home) in self.homes.site.log_text()


def everything_of(folder: Path) -> dict[str, tuple[object, ...]]:
    """Each path, with what there is to be known of it."""
    found: dict[str, tuple[object, ...]] = {}
    for path in (folder, *folder.rglob("*")):
        status = path.lstat()
        times = status.st_mtime_ns, status.st_ctime_ns
        content = path.read_bytes() if path.is_file() else b""
        found[str(path)] = (status.st_mode, status.st_uid, status.st_nlink, *times, content)
    return found


def make_maildir(path: Path, uid: int, folder_mode: int, file_mode: int) -> None:
    """A Maildir with a folder and all that may be in it besides."""
    for folder in (path, *(path / part for part in PARTS), path / ".folder", *(path / ".folder" / p for p in PARTS)):
        folder.mkdir()
        folder.chmod(folder_mode)
        os.chown(folder, uid, uid)
    for name, content in (
        ("maildirsize", "1000000S\n10 1\n"),
        (".folder/maildirfolder", ""),
        *((f, "") for f in FILES),
    ):
        file = path / name
        if not file.exists():
            file.write_text(content)
        file.chmod(file_mode)
        os.chown(file, uid, uid)


@pytest.fixture(params=["of root", "open to all"])
def trap(request: pytest.FixtureRequest, many_homes: Homes) -> Trap:
    name = f"trap{len(list(many_homes.users.homes.iterdir()))}"
    home = many_homes.users.add(name, JANE, quota_rule="*:storage=50M")
    make_maildir(home / "Maildir", JANE, 0o700, 0o600)
    victim = many_homes.site.root / f"victim-{name}"
    victim.mkdir()
    victim.chmod(0o777)
    if request.param == "of root":
        make_maildir(victim / "Maildir", 0, 0o700, 0o600)
    else:
        make_maildir(victim / "Maildir", JOE, 0o777, 0o666)
    return Trap(many_homes, name, home, victim)


@pytest.mark.parametrize(("place", "target"), LINKS)
def test_a_symbolic_link_leads_nowhere(trap: Trap, place: str, target: str) -> None:
    trap.lay(place, lambda path: path.symlink_to(trap.victim / target))
    trap.check_deliveries(trap.spring())


@pytest.mark.parametrize("place", ["Maildir", "Maildir/new"])
def test_a_relative_symbolic_link_leads_nowhere(trap: Trap, place: str) -> None:
    up = "../" * (place.count("/") + 2)
    trap.lay(place, lambda path: path.symlink_to(f"{up}{trap.victim.name}/{place}"))
    trap.check_deliveries(trap.spring())


@pytest.mark.parametrize("there", [True, False], ids=["there", "to be made"])
def test_no_folder_above_the_maildir_is_a_symbolic_link(trap: Trap, there: bool) -> None:
    name = f"{trap.name}-above"
    home = trap.homes.users.add(name, JANE, mail="maildir:~/mail/Maildir")
    (home / "mail").symlink_to(trap.victim)
    if not there:
        shutil.rmtree(trap.victim / "Maildir")
    above = trap._replace(name=name, home=home)
    replies = above.spring()
    assert {reply[:3] for reply in replies} == {"451"}
    above.check_deliveries(replies)


@pytest.mark.parametrize(
    "place", ["Maildir/subscriptions", "Maildir/courierimapsubscribed", "Maildir/.folder", "Maildir/new"]
)
def test_a_maildir_in_the_making_is_no_way_out(trap: Trap, place: str) -> None:
    """The user has begun one, with a link where lmtpd is going to write."""
    shutil.rmtree(trap.home / "Maildir")
    (trap.home / "Maildir").mkdir(mode=0o700)
    os.chown(trap.home / "Maildir", JANE, JANE)
    trap.lay(place, lambda path: path.symlink_to(trap.victim / "nowhere"))
    options = {"autocreate_inbox_folders": "folder|other", "autocreate_subscribe_folders": "folder|other"}
    trap.homes.site.configure(autocreate_post="yes", lmtp_detail_create="yes", **options)
    try:
        trap.check_deliveries(trap.spring())
    finally:
        trap.homes.site.configure(autocreate_post=None, lmtp_detail_create=None, **dict.fromkeys(options))


@pytest.mark.parametrize("place", PLACES)
def test_a_fifo_does_not_stop_the_mail_of_others(trap: Trap, place: str) -> None:
    trap.lay(place, make_fifo)
    trap.check_deliveries(trap.spring())


@pytest.mark.parametrize("place", PLACES)
def test_an_endless_device_fills_no_memory(trap: Trap, place: str) -> None:
    trap.lay(place, make_device)
    trap.check_deliveries(trap.spring())


@pytest.mark.parametrize("place", [f"Maildir/{name}" for name in FILES])
def test_a_hard_link_to_the_file_of_another_changes_nothing_there(many_homes: Homes, place: str) -> None:
    name = f"hard{len(list(many_homes.users.homes.iterdir()))}"
    home = many_homes.users.add(name, JANE, quota_rule="*:storage=50M")
    make_maildir(home / "Maildir", JANE, 0o700, 0o600)
    victim = many_homes.site.root / f"victim-{name}"
    make_maildir(victim, 0, 0o700, 0o600)
    (home / place).unlink()
    os.link(victim / Path(place).name, home / place)
    before = everything_of(victim)
    for message in (MESSAGE, LARGE):
        assert many_homes.deliver(name, message=message)[0] in ("250 2.1.5", "451 4.3.0")
    after = everything_of(victim)
    # That lmtpd has replaced the link is no harm: it shows in the count of links, and in the time of that change.
    assert [(row[:2], row[3], row[5]) for row in after.values()] == [(r[:2], r[3], r[5]) for r in before.values()]


# Gives each of two paths the place of the other, at once and again and again: see renameat2(2). A thread would hold up
# the client.
EXCHANGE = """\
import ctypes, os, sys
at_fdcwd, rename_exchange = -100, 2
exchange = ctypes.CDLL(None).renameat2
one, other = map(os.fsencode, sys.argv[1:])
print("ready", flush=True)
while not exchange(at_fdcwd, one, at_fdcwd, other, rename_exchange):
    pass
"""


@pytest.mark.parametrize("place", ["Maildir", "Maildir/new", "Maildir/tmp", "Maildir/.folder"])
def test_a_link_that_comes_and_goes_leads_nowhere(trap: Trap, place: str) -> None:
    """The user changes a folder into a link and back, as fast as he can, while his mail is delivered."""
    before = everything_of(trap.victim)
    path, link = trap.home / place, trap.home / "link"
    link.symlink_to(trap.victim / place)
    client = trap.homes.client()
    command = ["setpriv", "--pdeathsig", "KILL", sys.executable, "-I", "-c", EXCHANGE]
    flicker = subprocess.Popen([*command, str(path), str(link)], stdout=subprocess.PIPE)
    replies = []
    try:
        assert flicker.stdout
        assert flicker.stdout.readline() == b"ready\n"
        for _ in range(150):
            assert client.command("MAIL FROM:<>").startswith("250")
            if not client.command(f"RCPT TO:<{trap.name}+folder>").startswith("250"):
                client.command("RSET")
                continue
            client.command("DATA")
            client.send(MESSAGE + b".\r\n")
            replies.append(client.reply()[-1])
    finally:
        flicker.kill()
        flicker.communicate()
        client.close()
    assert flicker.returncode == -signal.SIGKILL
    assert everything_of(trap.victim) == before
    assert {reply[:3] for reply in replies} <= {"250", "451", "452"}
    if path.is_symlink():
        path.unlink()
        link.rename(path)
    found = [path for path in trap.home.rglob("new/*") if path.is_file()]
    assert len(found) == len([reply for reply in replies if reply.startswith("250")])


# Delivers with a keyword, which LMTP has no way to ask for. Memory is limited, so that an endless file shows.
WITH_KEYWORD = """\
import os, resource, sys
import lmtpd
lmtpd.LOCK_PATIENCE = min(1, lmtpd.LOCK_PATIENCE)
resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
config = lmtpd.Config.load(sys.argv[1])
lmtpd.drop_privileges(config.cyrus_user, keep=True)
os.umask(config.umask)
mailbox = lmtpd.MaildirStore(config).find(lmtpd.recipients_of(lmtpd.Address(sys.argv[2], ""), config)[-1])
incoming = lmtpd.Incoming(b"", config, iter(()))
incoming.write(b"Subject: x\\n\\nx\\n")
incoming.complete()
try:
    mailbox.place(incoming.message, flags=["$Label1"]).sync()
except OSError as error:
    print(error)
"""


def deliver_with_keyword(trap: Trap) -> str:
    """What there is to be said about it; nothing if it is delivered."""
    run = subprocess.run(
        [sys.executable, "-I", "-c", WITH_KEYWORD, str(trap.homes.site.conf), trap.name],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("dovecot-keywords", "Maildir/dovecot-keywords"),
        ("dovecot-keywords", "nowhere"),
        ("dovecot-uidlist.lock", "Maildir/subscriptions"),
        ("dovecot-uidlist.lock", "nowhere"),
    ],
)
def test_no_keyword_is_written_through_a_link(trap: Trap, name: str, target: str) -> None:
    before = everything_of(trap.victim)
    trap.lay(f"Maildir/{name}", lambda path: path.symlink_to(trap.victim / target))
    assert deliver_with_keyword(trap) != ""
    assert everything_of(trap.victim) == before


def make_fifo(path: Path) -> None:
    os.mkfifo(path, 0o600)


def make_device(path: Path) -> None:
    os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 5))


def make_endless_file(path: Path) -> None:
    path.touch(0o600)
    os.truncate(path, 2**40)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        *(("dovecot-keywords", make) for make in (make_fifo, make_device, make_endless_file)),
        *(("dovecot-uidlist.lock", make) for make in (make_fifo, make_device)),
    ],
)
def test_a_file_of_keywords_that_is_none_harms_nobody(trap: Trap, name: str, make: Callable[[Path], None]) -> None:
    trap.lay(f"Maildir/{name}", make)
    deliver_with_keyword(trap)


def test_keywords_are_the_users_own(trap: Trap) -> None:
    (trap.home / "Maildir/dovecot-keywords").unlink()
    assert deliver_with_keyword(trap) == ""
    assert owner(trap.home / "Maildir/dovecot-keywords") == (JANE, JANE, 0o600)


def test_a_home_that_root_has_moved_is_found(many_homes: Homes) -> None:
    home = many_homes.users.add("moved", JANE)
    home.rename(many_homes.site.root / "elsewhere")
    home.symlink_to(many_homes.site.root / "elsewhere")
    assert many_homes.deliver("moved") == ["250 2.1.5"]
    assert len(stored(many_homes.site.root / "elsewhere/Maildir")) == 1


# Users of the system, in a machine of their own


@pytest.fixture(scope="module")
def machine(installed: Machine) -> Machine:
    """A machine with lmtpd, which root runs, for the accounts of the system; mail is in the homes."""
    installed.shell("""
cat >/etc/imapd.conf <<END
configdirectory: /var/lib/lmtpd
cyrus_user: lmtpd
userdb: passwd
maildir_path: %h/Maildir
duplicatesuppression: no
END
groupadd team
useradd -m -K HOME_MODE=0700 jane
useradd -m -K HOME_MODE=0700 -G team joe
useradd -m -K HOME_MODE=0700 -u 500 service
useradd -m ann.b
""")
    return installed


def deliver_in(machine: Machine, *names: str) -> list[str]:
    """Delivers with an lmtpd that root starts; for each recipient the code and enhanced code, at whichever time."""
    ours, theirs = socket.socketpair()
    with theirs:
        child = machine.start("lmtpd", stdin=theirs, stdout=theirs)
    client = Client(ours)
    try:
        client.hello()
        replies = client.deliver(MESSAGE, *names, sender="")
        client.command("QUIT")
    finally:
        client.close()
        child.wait(PATIENCE)
    return [reply[:9] for reply in replies]


def shown(machine: Machine, path: str) -> str:
    """Owner, group and mode of what the pattern matches."""
    return machine.shell(f"stat --format='%U:%G %a' {path}")


def test_mail_is_in_the_users_home_and_his(machine: Machine) -> None:
    assert deliver_in(machine, "jane", "joe@example.com", "ann.b") == ["250 2.1.5"] * 3
    for name in ("jane", "joe", "ann.b"):
        assert shown(machine, f"/home/{name}/Maildir/new/*") == f"{name}:{name} 600\n"
        assert shown(machine, f"/home/{name}/Maildir") == f"{name}:{name} 700\n"


def test_a_question_that_the_system_cannot_answer_is_no_reason_to_bounce(machine: Machine) -> None:
    machine.run("chmod", "600", "/etc/passwd")
    try:
        assert deliver_in(machine, "jane") == ["451 4.3.0"]
    finally:
        machine.run("chmod", "644", "/etc/passwd")


def test_a_name_service_that_is_not_there_hides_nobody(machine: Machine) -> None:
    """Who is unknown to all that are there is unknown."""
    conf = machine.root / "etc/nsswitch.conf"
    before = conf.read_text()
    conf.write_text("passwd: files missing\ngroup: files missing\n")
    try:
        assert deliver_in(machine, "nobody-here", "jane") == ["550 5.1.1", "250 2.1.5"]
    finally:
        conf.write_text(before)


@pytest.mark.parametrize("name", ["nobody-here", "service", "root", "mail", "nobody"])
def test_who_is_no_user_or_one_of_the_system_gets_no_mail(machine: Machine, name: str) -> None:
    assert deliver_in(machine, name) == ["550 5.1.1"]
    assert machine.run("ls", "-A", "/home/service").stdout.count("Maildir") == 0


def test_the_lowest_user_id_that_gets_mail_is_an_option(machine: Machine) -> None:
    conf = machine.root / "etc/imapd.conf"
    before = conf.read_text()
    conf.write_text(before + "passwd_min_uid: 500\n")
    try:
        assert deliver_in(machine, "service") == ["250 2.1.5"]
        assert shown(machine, "/home/service/Maildir/new/*") == "service:service 600\n"
    finally:
        conf.write_text(before)


def test_the_users_groups_are_his_for_the_delivery(machine: Machine) -> None:
    """joe may write where his group may, and jane, who isn't in it, may not."""
    machine.shell("""
install -d -m 770 -g team /srv/team
for name in jane joe; do install -d -o $name -g $name -m 700 /srv/team/$name; done
""")
    conf = machine.root / "etc/imapd.conf"
    before = conf.read_text()
    conf.write_text(before.replace("%h/Maildir", "/srv/team/%u/Maildir"))
    try:
        assert deliver_in(machine, "jane", "joe") == ["451 4.3.0", "250 2.1.5"]
        assert shown(machine, "/srv/team/joe/Maildir/new/*") == "joe:joe 600\n"
    finally:
        conf.write_text(before)


def test_lmtpd_that_a_user_has_started_delivers_to_him_alone(machine: Machine) -> None:
    session = "LHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<jane>\r\nRCPT TO:<joe>\r\nDATA\r\nSubject: own\r\n\r\n.\r\nQUIT\r\n"
    machine.shell("install -d -o joe /var/lib/joe; sed s,/var/lib/lmtpd,/var/lib/joe, /etc/imapd.conf >/etc/joe.conf")
    run = machine.run("runuser", "-u", "joe", "--", "lmtpd", "-C", "/etc/joe.conf", stdin=session)
    codes = [line[:9] for line in run.stdout.splitlines() if line[3:4] == " "]
    assert codes[3:7] == ["451 4.3.0", "250 2.1.5", "354 Go ah", "250 2.1.5"]


def test_the_unit_for_mail_in_the_homes(machine: Machine) -> None:
    """Its sandbox leaves what is needed to act as other users."""
    machine.shell(
        """
systemd-sysusers /opt/lmtpd/units/lmtpd.sysusers
chown -R lmtpd /var/lib/lmtpd
echo 'configdirectory: /var/lib/lmtpd' >/etc/imapd.conf
printf '%s\\n' 'cyrus_user: lmtpd' 'userdb: passwd' 'maildir_path: %h/Maildir' >>/etc/imapd.conf
install -D -m 644 /opt/lmtpd/units/accounts.conf /etc/systemd/system/lmtpd@.service.d/accounts.conf
systemctl daemon-reload
"""
    )
    count = len(machine.shell("ls /home/jane/Maildir/new").split())
    client = Client(connect(str(machine.root / "run/lmtpd/lmtp")))
    client.hello()
    for name in ("nobody-here", "service"):
        client.command("MAIL FROM:<>")
        assert client.command(f"RCPT TO:<{name}>").startswith("550 5.1.1")
        client.command("RSET")
    for message in (MESSAGE, LARGE):
        replies = client.deliver(message, "jane", "joe")
        assert [reply[:3] for reply in replies] == ["250", "250"]
    client.close()
    owners = shown(machine, "/home/jane/Maildir/new/*").splitlines()
    assert owners == ["jane:jane 600"] * (count + 2)


def test_the_check_of_the_configuration_for_mail_in_the_homes(machine: Machine) -> None:
    """With the same drop-in the check can do what lmtpd does, and finds no fault."""
    place = "/etc/systemd/system/lmtpd-.service.d/accounts.conf"
    machine.shell(f"install -D -m 644 /opt/lmtpd/units/accounts.conf {place}; systemctl daemon-reload")
    machine.run("systemctl", "start", "lmtpd-check.service")
    shown = machine.properties("lmtpd-check.service", "User", "ReadWritePaths")
    assert shown["User"] == "root"
    assert "/home" in shown["ReadWritePaths"]
