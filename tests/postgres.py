"""PostgreSQL, unpacked by need_postgresql of tests/setup.sh, with databases for lmtpd's records."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import psycopg
from harness import PATIENCE, STORE_USER, free_port
from peers import PASSWORD, Peer, PeerError, libraries, unpacked
from psycopg.sql import SQL, Identifier, Literal

# The account that PostgreSQL runs as. It refuses root, and the store's owner is its client.
ACCOUNT = "nobody"
SUPERUSER = "postgres"
USER = "lmtpd"
# Its programs look whether its account can reach them, so they are mounted where it can. In the namespaces, nothing is
# left of the mount, nor of the shared memory of a server that was killed. The server ends with the process that has
# started it, however that ends.
PRIVATE = """\
mount --bind "$1" "$2"
shift 2
exec setpriv --reuid="$0" --regid=nogroup --clear-groups --pdeathsig=INT "$@"
"""
SETTINGS = """\
listen_addresses = '127.0.0.1'
max_connections = 250
shared_buffers = 16MB
dynamic_shared_memory_type = mmap
wal_level = minimal
max_wal_senders = 0
fsync = off
full_page_writes = off
timezone = UTC
log_timezone = UTC
"""


class Postgres(Peer):
    """PostgreSQL with a cluster of its own, on a port of loopback and on a unix socket.

    It asks for passwords by SCRAM; only the store's owner is known by his account, on the unix socket.
    certificate: the files of a certificate and its key; then nobody gets in by TCP without TLS.
    """

    name = "PostgreSQL"

    def __init__(self, folder: Path, certificate: tuple[Path, Path] | None = None) -> None:
        super().__init__(folder)
        self._root = unpacked("postgresql")
        self._program = folder / "program"
        self._program.mkdir()
        self._data = folder / "data"
        # What a socket's path may have is soon reached.
        self.socket_folder = folder
        self.port = free_port()
        self._numbers = count(1)
        self._paused: list[int] = []
        shutil.chown(folder, ACCOUNT)
        self._make_cluster()
        (self._data / "postgresql.conf").write_text(
            f"{SETTINGS}port = {self.port}\nunix_socket_directories = '{self.socket_folder}'\n"
        )
        self._configure(certificate)

    def _command(self, name: str, *arguments: str) -> list[str]:
        """A program of PostgreSQL as its account runs it. The process becomes that program."""
        [found] = self._root.glob(f"usr/lib/postgresql/*/bin/{name}")
        program = str(self._program / found.relative_to(self._root))
        private = ["unshare", "--mount", "--ipc", "sh", "-euc", PRIVATE, ACCOUNT, str(self._root), str(self._program)]
        return [*private, "env", f"LD_LIBRARY_PATH={self._libraries()}", program, *arguments]

    def _libraries(self) -> str:
        return libraries(self._root).replace(str(self._root), str(self._program))

    def _make_cluster(self) -> None:
        password = self.folder / "password"
        password.write_text(PASSWORD)
        options = ["--no-sync", "--encoding=UTF8", "--locale=C.UTF-8", f"--username={SUPERUSER}"]
        command = self._command("initdb", *options, f"--pwfile={password}", f"--pgdata={self._data}")
        made = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
        if made.returncode:
            raise PeerError(f"initdb: {made.returncode}\n{made.stdout}{made.stderr}")

    def _configure(self, certificate: tuple[Path, Path] | None) -> None:
        """Who gets in, and how."""
        if certificate:
            for name, path in zip(("server.crt", "server.key"), certificate):
                shutil.copy(path, self._data / name)
                (self._data / name).chmod(0o600)
                shutil.chown(self._data / name, ACCOUNT)
            with (self._data / "postgresql.conf").open("a") as conf:
                conf.write("ssl = on\n")
        (self._data / "pg_hba.conf").write_text(
            f"local all {STORE_USER} peer\n"
            "local all all scram-sha-256\n"
            f"{'hostssl' if certificate else 'host'} all all 127.0.0.1/32 scram-sha-256\n"
        )

    @property
    def host(self) -> str:
        """The server's port, as sql_hostnames has it."""
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        self.run(self._command("postgres", "-D", str(self._data)), self._takes_connections)
        if USER not in self.column("SELECT rolname FROM pg_roles"):
            for role in (USER, STORE_USER):
                self.execute(SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(Identifier(role), Literal(PASSWORD)))

    def _takes_connections(self) -> bool:
        try:
            self.column("SELECT 1")
        except psycopg.OperationalError:
            return False
        return True

    def stop(self) -> None:
        """Asks the server to end its clients' connections, and then itself."""
        self.resume()
        self.process.send_signal(signal.SIGINT)

    def crash(self) -> None:
        """Ends the server at once, as a power loss does; the next start recovers the databases."""
        self.process.send_signal(signal.SIGQUIT)
        self.process.wait(PATIENCE)

    def restart(self) -> None:
        """Stops the server and starts it again."""
        self.close()
        self.start()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While the block runs, the server is stopped and answers nobody; the kernel still takes what is sent."""
        self.pause()
        try:
            yield
        finally:
            self.resume()

    def pause(self) -> None:
        """Stops the server's processes, see paused()."""
        # The server first, which starts the others.
        os.kill(self.process.pid, signal.SIGSTOP)
        self._paused = [self.process.pid]
        for pid in self.backends():
            os.kill(pid, signal.SIGSTOP)
            self._paused.append(pid)

    def resume(self) -> None:
        """Lets what pause() has stopped go on."""
        while self._paused:
            os.kill(self._paused.pop(), signal.SIGCONT)

    def backends(self) -> list[int]:
        """The processes that the server has started."""
        return [
            int(pid) for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        ]

    @contextmanager
    def connected(self, database: str = SUPERUSER) -> Iterator[psycopg.Connection[tuple[Any, ...]]]:
        """A connection of the superuser. Each command is a transaction, unless it begins one."""
        with psycopg.connect(
            host=str(self.socket_folder),
            port=self.port,
            user=SUPERUSER,
            password=PASSWORD,
            dbname=database,
            autocommit=True,
        ) as connection:
            yield connection

    def execute(self, command: Any, values: Sequence[object] = (), database: str = SUPERUSER) -> int:
        """Runs a command as the superuser; how many rows it has changed."""
        with self.connected(database) as connection:
            return connection.execute(command, values or None).rowcount

    def column(self, query: Any, values: Sequence[object] = (), database: str = SUPERUSER) -> list[Any]:
        """The first column of a query's rows, asked by the superuser."""
        with self.connected(database) as connection:
            return [row[0] for row in connection.execute(query, values or None)]

    @contextmanager
    def database(self, owner: str = USER) -> Iterator[Database]:
        """A new database, which is dropped at the end of the block."""
        database = Database(self, f"mail{next(self._numbers)}", owner)
        names = {"name": Identifier(database.name), "owner": Identifier(owner)}
        self.execute(SQL("CREATE DATABASE {name} OWNER {owner} TEMPLATE template0").format(**names))
        try:
            yield database
        finally:
            if self.process.poll() is None:
                self.resume()
                self.execute(SQL("DROP DATABASE {name} WITH (FORCE)").format(**names))


class Database:
    """A database of a server, for the records of a site or of several. owner: the user of the database."""

    def __init__(self, server: Postgres, name: str, owner: str) -> None:
        self.server, self.name, self.owner = server, name, owner

    @property
    def options(self) -> dict[str, str]:
        """The options of imapd.conf with which lmtpd uses the database."""
        return {
            "duplicate_db": "sql",
            "sql_engine": "pgsql",
            "sql_hostnames": self.server.host,
            "sql_user": self.owner,
            "sql_passwd": PASSWORD,
            "sql_database": self.name,
        }

    def execute(self, command: Any, *values: object) -> int:
        """Runs a command as the superuser; how many rows it has changed."""
        return self.server.execute(command, values, self.name)

    def column(self, query: Any, *values: object) -> list[Any]:
        """The first column of a query's rows, asked by the superuser."""
        return self.server.column(query, values, self.name)

    def records(self, table: str = "deliveries") -> int:
        """How many records the table has."""
        number: int = self.column(SQL("SELECT count(*) FROM {}").format(Identifier(table)))[0]
        return number

    def clients(self, state: str = "%") -> list[int]:
        """The backends that serve others than the superuser in the database, and are in a state like that one."""
        query = "SELECT pid FROM pg_stat_activity WHERE datname = %s AND usename <> %s AND state LIKE %s"
        return self.column(query, self.name, SUPERUSER, state)

    def waiting(self) -> int:
        """How many clients wait for a lock."""
        query = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND wait_event_type = 'Lock'"
        number: int = self.column(query, self.name)[0]
        return number


@contextmanager
def scratch_server() -> Iterator[Postgres]:
    """A server in a scratch folder, for the tests of a module."""
    with tempfile.TemporaryDirectory(prefix="lmtpd-test-") as folder:
        os.chmod(folder, 0o755)
        with Postgres(Path(folder, "postgres")) as server:
            yield server
