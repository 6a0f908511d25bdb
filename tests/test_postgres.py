"""The PostgreSQL of the tests: that it does what tests/postgres.py says."""

from __future__ import annotations

import os
import pwd
import select
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from harness import PATIENCE, STORE_USER, wait_for
from peers import PASSWORD
from postgres import ACCOUNT, USER, Database, Postgres, scratch_server
from psycopg import pq

COMMAND = b"INSERT INTO things VALUES ('one')"


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with scratch_server() as server:
        yield server


@pytest.fixture
def database(server: Postgres) -> Iterator[Database]:
    with server.database() as database:
        yield database


def connect(database: Database, host: str = "127.0.0.1", **options: str) -> psycopg.Connection[tuple[Any, ...]]:
    """A connection as lmtpd makes one."""
    settings = {"user": USER, "password": PASSWORD, "dbname": database.name, "connect_timeout": "2", **options}
    return psycopg.connect(host=host, port=database.server.port, autocommit=True, **settings)  # type: ignore[arg-type]


def test_a_client_makes_tables_and_the_test_looks_at_them(database: Database) -> None:
    with connect(database) as connection:
        connection.execute("CREATE TABLE things (name text)")
        connection.execute(COMMAND)
        assert len(database.clients("idle")) == 1
    assert database.records("things") == 1
    assert database.execute("UPDATE things SET name = %s", "two") == 1
    assert database.column("SELECT name FROM things") == ["two"]


def test_only_the_right_password_lets_in(database: Database) -> None:
    for host in ("127.0.0.1", str(database.server.socket_folder)):
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            connect(database, host, password="wrong")


def test_the_stores_owner_needs_no_password_on_the_unix_socket(database: Database) -> None:
    account = pwd.getpwnam(STORE_USER)
    pid = os.fork()
    if pid == 0:
        os.setgid(account.pw_gid)
        os.setuid(account.pw_uid)
        with connect(database, str(database.server.socket_folder), user=STORE_USER, password="") as connection:
            found = connection.execute("SELECT current_user").fetchone()
        os._exit(0 if found == (STORE_USER,) else 1)
    assert os.waitpid(pid, 0)[1] == 0


def test_while_it_is_paused_it_answers_nobody(database: Database) -> None:
    database.execute("CREATE TABLE things (name text)")
    database.execute(f"ALTER TABLE things OWNER TO {USER}")
    with connect(database) as connection:
        with database.server.paused():
            with pytest.raises(psycopg.OperationalError, match="timeout"):
                connect(database)
            connection.pgconn.send_query(COMMAND)
            assert select.select([connection.pgconn.socket], [], [], 0.5) == ([], [], [])
        result = connection.pgconn.get_result()
        assert result
        assert result.status == pq.ExecStatus.COMMAND_OK
        assert connection.pgconn.get_result() is None
    assert database.records("things") == 1


@pytest.mark.parametrize("how", ["crash", "close"])
def test_after_a_restart_what_was_committed_is_there(database: Database, how: str) -> None:
    with connect(database) as connection:
        connection.execute("CREATE TABLE things (name text)")
        connection.execute(COMMAND)
        getattr(database.server, how)()
        with pytest.raises(psycopg.OperationalError):
            connection.execute(COMMAND)
    with pytest.raises(psycopg.OperationalError, match="refused"):
        connect(database)
    database.server.start()
    assert database.records("things") == 1


def test_it_runs_as_its_account_and_leaves_nothing(server: Postgres) -> None:
    pids = [server.process.pid, *server.backends()]
    assert len(pids) > 1
    assert {Path(f"/proc/{pid}").stat().st_uid for pid in pids} == {pwd.getpwnam(ACCOUNT).pw_uid}
    server.process.kill()
    server.process.wait(PATIENCE)
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "all to end")
    assert not list(server.folder.joinpath("program").iterdir())
    assert not os.path.ismount(server.folder / "program")
    server.start()
