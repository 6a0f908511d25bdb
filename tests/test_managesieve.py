"""Scripts that users manage by ManageSieve, with Dovecot's server and two clients: what is active counts at once."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from harness import Client, Site
from mailboxes import letter, messages_in
from peers import PASSWORD
from pigeonhole import ManageSieve
from sievelib.managesieve import Client as SieveLib

pytestmark = pytest.mark.filterwarnings("ignore:Credentials are sent:UserWarning")  # they are, on loopback

USERS = {
    "plain": "",
    "storage": "userdb_sieve=file:~/sieve;active=~/.dovecot.sieve",
    "elsewhere": "userdb_sieve=file:~/filters;active=~/filters/in-use.sieve",
    "directory": "userdb_sieve=file:~/sieve",
    "file": "userdb_sieve=~/mail.sieve",
}


def filing(folder: str) -> str:
    return f'require ["fileinto"];\nfileinto "{folder}";\n'


class Editor:
    """A client with which a user manages scripts."""

    def __init__(self, server: ManageSieve, user: str) -> None:
        self.server, self.user = server, user

    def put(self, name: str, script: str) -> None:
        """Uploads a script."""
        raise NotImplementedError

    def activate(self, name: str) -> None:
        raise NotImplementedError

    def deactivate(self) -> None:
        raise NotImplementedError

    def delete(self, name: str) -> None:
        raise NotImplementedError

    def list(self) -> tuple[str, set[str]]:
        """The name of the active script, "" for none, and those of all."""
        raise NotImplementedError

    def close(self) -> None:
        """Ends the session."""


class SieveConnect(Editor):
    """sieve-connect, which logs in for each command."""

    def put(self, name: str, script: str) -> None:
        with tempfile.NamedTemporaryFile("w", prefix="lmtpd-test-", suffix=".sieve") as file:
            file.write(script)
            file.flush()
            self._run("--upload", "--localsieve", file.name, "--remotesieve", name)

    def activate(self, name: str) -> None:
        self._run("--activate", "--remotesieve", name)

    def deactivate(self) -> None:
        self._run("--deactivate")

    def delete(self, name: str) -> None:
        self._run("--delete", "--remotesieve", name)

    def list(self) -> tuple[str, set[str]]:
        found = re.findall(r'^"([^"]*)"( ACTIVE)?', self._run("--list"), re.MULTILINE)
        return "".join(name for name, active in found if active), {name for name, _ in found}

    def _run(self, *command: str) -> str:
        return self.server.sieve_connect(self.user, *command)


class SieveLibrary(Editor):
    """The client of sievelib, with one session for everything."""

    def __init__(self, server: ManageSieve, user: str) -> None:
        super().__init__(server, user)
        self._client = SieveLib(*server.address)
        assert self._client.connect(user, PASSWORD, starttls=False, authmech="PLAIN")

    def put(self, name: str, script: str) -> None:
        assert self._client.putscript(name, script), self._client.errmsg

    def activate(self, name: str) -> None:
        assert self._client.setactive(name), self._client.errmsg

    def deactivate(self) -> None:
        self.activate("")

    def delete(self, name: str) -> None:
        assert self._client.deletescript(name), self._client.errmsg

    def list(self) -> tuple[str, set[str]]:
        active, others = self._client.listscripts()
        return active or "", {*others, *([active] if active else [])}

    def close(self) -> None:
        self._client.logout()
        self._client.sock.close()


class Scene(NamedTuple):
    """A site whose users are those of the ManageSieve server."""

    site: Site
    server: ManageSieve


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    site = Site(userdb="dovecot", maildir_path="%h/Maildir")
    editors = {f"{user}-{name}": fields for user, fields in USERS.items() for name in ("connect", "library")}
    try:
        with ManageSieve(site.root / "dovecot", **editors) as server:
            site.configure(userdb_socket_path=str(server.socket))
            yield Scene(site, server)
    finally:
        site.close()


@pytest.fixture
def client(scene: Scene) -> Iterator[Client]:
    """A session, all whose messages one process delivers."""
    client = scene.site.connect()
    client.hello()
    yield client
    client.close()


@pytest.fixture(params=[SieveConnect, SieveLibrary], ids=["connect", "library"])
def kind(request: pytest.FixtureRequest) -> type[Editor]:
    kind: type[Editor] = request.param
    return kind


@pytest.fixture
def editor(scene: Scene, kind: type[Editor], request: pytest.FixtureRequest) -> Iterator[Editor]:
    """A client for a user whom the test's parameter names, else "plain"."""
    user = request.node.callspec.params.get("user", "plain")
    editor = kind(scene.server, f"{user}-{'connect' if kind is SieveConnect else 'library'}")
    yield editor
    for name in editor.list()[1]:
        editor.deactivate()
        editor.delete(name)
    editor.close()


def deliver(client: Client, user: str) -> None:
    [reply] = client.deliver(letter(), user)
    assert reply.startswith("250"), reply


def counts(server: ManageSieve, user: str, *folders: str) -> list[int]:
    """How many messages a new session finds in each folder, the INBOX first; 0 for one that is not there."""
    imap = server.login(user)
    present = [name for name in folders if imap.status(name, "(MESSAGES)")[0] == "OK"]
    found = [messages_in(imap, name) if name in {"INBOX", *present} else 0 for name in ("INBOX", *folders)]
    imap.logout()
    return found


def bodies(server: ManageSieve, user: str, folder: str) -> list[bytes]:
    """The messages in a folder, without their headers."""
    imap = server.login(user)
    assert imap.select(folder, readonly=True)[0] == "OK"
    status, found = imap.fetch("1:*", "(BODY.PEEK[TEXT])")
    assert status == "OK"
    imap.logout()
    return [part[1] for part in found if isinstance(part, tuple)]


@pytest.mark.parametrize("user", list(USERS))
def test_what_is_uploaded_and_activated_counts_at_the_next_message(
    scene: Scene, client: Client, editor: Editor, user: str
) -> None:
    """One session of lmtpd sees it all: the link, the changed file, the other file, and that there is none."""
    deliver(client, editor.user)
    assert counts(scene.server, editor.user, "One", "Two") == [1, 0, 0]
    editor.put("first", filing("One"))
    deliver(client, editor.user)
    assert counts(scene.server, editor.user, "One", "Two") == [2, 0, 0]  # nobody has activated it
    editor.activate("first")
    assert editor.list() == ("first", {"first"})
    deliver(client, editor.user)
    assert counts(scene.server, editor.user, "One", "Two") == [2, 1, 0]
    assert bodies(scene.server, editor.user, "One") == [b"A body.\r\n"]
    editor.put("first", filing("Two"))
    deliver(client, editor.user)
    assert counts(scene.server, editor.user, "One", "Two") == [2, 1, 1]
    editor.put("second", filing("One"))
    editor.activate("second")
    assert editor.list() == ("second", {"first", "second"})
    deliver(client, editor.user)
    assert counts(scene.server, editor.user, "One", "Two") == [2, 2, 1]
    editor.deactivate()
    assert editor.list() == ("", {"first", "second"})
    deliver(client, editor.user)
    assert counts(scene.server, editor.user, "One", "Two") == [3, 2, 1]
    editor.delete("first")
    editor.delete("second")
    deliver(client, editor.user)
    assert counts(scene.server, editor.user, "One", "Two") == [4, 2, 1]


# What else is in the folder of scripts


def active_file(server: ManageSieve, user: str) -> Path:
    """The file of the script that a user has activated."""
    link = server.homes / user / ".dovecot.sieve"
    assert link.is_symlink()
    return link.resolve()


def test_a_script_of_the_same_size_with_an_older_time_counts(scene: Scene, client: Client, editor: Editor) -> None:
    folders = "Older", "Newer"
    editor.put("first", filing("Newer"))
    editor.activate("first")
    deliver(client, editor.user)
    before = active_file(scene.server, editor.user).stat()
    editor.put("first", filing("Older"))
    file = active_file(scene.server, editor.user)
    assert file.stat().st_size == before.st_size
    os.utime(file, (before.st_atime - 1000, before.st_mtime - 1000))
    deliver(client, editor.user)
    assert counts(scene.server, editor.user, *folders)[1:] == [1, 1]


def test_a_script_includes_another_that_was_uploaded(scene: Scene, client: Client, editor: Editor) -> None:
    start = counts(scene.server, editor.user)[0]
    editor.put("included", filing("Included"))
    editor.put("active", 'require ["include"];\ninclude :personal "included";\n')
    editor.activate("active")
    deliver(client, editor.user)
    assert counts(scene.server, editor.user, "Included") == [start, 1]
    editor.put("included", "discard;\n")
    deliver(client, editor.user)
    assert counts(scene.server, editor.user, "Included") == [start, 1]
    editor.delete("included")
    deliver(client, editor.user)  # an error, which keeps the message
    assert counts(scene.server, editor.user, "Included") == [start + 1, 1]


def test_what_a_script_does_wrong_is_told_in_a_file_that_the_server_does_not_list(
    scene: Scene, client: Client, editor: Editor
) -> None:
    editor.put("wrong", 'require ["ihave"];\nerror "not today";\n')
    editor.activate("wrong")
    deliver(client, editor.user)
    file = active_file(scene.server, editor.user)
    told = file.with_suffix(".log")
    assert told.read_text().endswith(" wrong.sieve:2: not today\n")
    assert (told.stat().st_uid, told.stat().st_mode & 0o777) == (file.stat().st_uid, 0o600)
    assert editor.list() == ("wrong", {"wrong"})
    told.unlink()


def test_flags_and_keywords_are_those_that_imap_shows(scene: Scene, client: Client, editor: Editor) -> None:
    commands = 'setflag "$label1";\nfileinto :flags ["\\\\Seen", "\\\\Flagged", "work"] "Marked";\nkeep;\n'
    editor.put("marks", f'require ["fileinto", "imap4flags"];\n{commands}')
    editor.activate("marks")
    deliver(client, editor.user)
    imap = scene.server.login(editor.user)
    found = {}
    for folder in ("Marked", "INBOX"):
        imap.select(folder, readonly=True)
        [line] = imap.fetch("*", "(FLAGS)")[1]
        assert isinstance(line, bytes)
        flags = re.search(rb"FLAGS \(([^)]*)\)", line)
        assert flags
        found[folder] = {flag.decode() for flag in flags[1].split()} - {"\\Recent"}
    subscribed = imap.lsub()[1]
    imap.logout()
    assert found == {"Marked": {"\\Seen", "\\Flagged", "work"}, "INBOX": {"$label1"}}
    assert any(isinstance(line, bytes) and line.endswith(b' "/" Marked') for line in subscribed)
