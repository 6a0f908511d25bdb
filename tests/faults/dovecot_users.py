"""Dovecot's user database, for sites that ask it about each recipient."""

from __future__ import annotations

import contextlib
import os
import pwd
import signal
import sqlite3
from collections.abc import Mapping
from pathlib import Path

from harness import STORE_USER
from peers import PASSWORD, Peer, answers, dovecot_users_conf, dovecot_version, program


class DovecotUsers(Peer):
    """Dovecot's authentication service with the users in an SQLite database.

    Not in a passwd-file: when that is missing, Dovecot 2.3 now and then answers that the user does not exist.

    homes: of each user. accounts: of each user, if Dovecot is to say as whom the mail is written.
    """

    name = "Dovecot"

    def __init__(self, folder: Path, homes: Mapping[str, Path], accounts: Mapping[str, str] | None = None) -> None:
        super().__init__(folder)
        self.socket = self.folder / "run/auth-userdb"
        self._database = self.folder / "users.db"
        self._fields = "home, uid, gid" if accounts else "home"
        self._ask("CREATE TABLE users (name, home, uid, gid)")
        for name, home in homes.items():
            account = pwd.getpwnam((accounts or {}).get(name, STORE_USER))
            self._ask(f"INSERT INTO users VALUES ('{name}', '{home}', {account.pw_uid}, {account.pw_gid})")
        self.conf = self.folder / "dovecot.conf"
        databases = self._databases() if dovecot_version() < (2, 4) else self._24_databases()
        self.conf.write_text(dovecot_users_conf(self.folder, self.log, databases))

    def _databases(self) -> str:
        sql = self.folder / "sql.conf"
        query = f"SELECT {self._fields} FROM users WHERE name = '%u'"
        sql.write_text(f"driver = sqlite\nconnect = {self._database}\nuser_query = {query}\n")
        passwords = f"passdb {{\n  driver = static\n  args = password={PASSWORD}\n}}\n"
        return f"{passwords}userdb {{\n  driver = sql\n  args = {sql}\n}}\n"

    def _24_databases(self) -> str:
        """The same in the language of Dovecot 2.4."""
        query = f"SELECT {self._fields} FROM users WHERE name = '%{{user}}'"
        database = f"sql_driver = sqlite\nsqlite_path = {self._database}\n"
        return f"{database}passdb static {{\n  password = {PASSWORD}\n}}\nuserdb sql {{\n  query = {query}\n}}\n"

    def _ask(self, statement: str) -> None:
        with contextlib.closing(sqlite3.connect(self._database, timeout=30)) as database, database:
            database.execute(statement)

    def break_down(self) -> None:
        """Makes every question about a user one that can't be answered at the moment."""
        self._ask("ALTER TABLE users RENAME TO gone")

    def mend(self) -> None:
        """Ends what break_down() did."""
        self._ask("ALTER TABLE gone RENAME TO users")

    def start(self) -> None:
        self.run([program("dovecot"), "-F", "-c", str(self.conf)], lambda: answers(str(self.socket)))

    def stop(self) -> None:
        """Ends them all: those that have a client would go on without their master for a while."""
        os.killpg(self.process.pid, signal.SIGTERM)
