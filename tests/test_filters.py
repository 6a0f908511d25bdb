"""Filters as the README sets them up, by its very commands, on a machine with lmtpd and Postfix."""

from __future__ import annotations

import pytest
from container import Machine, readme_blocks
from harness import wait_for
from test_systemd import connect

FILTERS = "## Filters"
SPOOL = "var/spool/lmtpd"
USERS = ("jane", "joe")


@pytest.fixture(scope="module")
def machine(installed: Machine) -> Machine:
    """A machine after the README's commands, save those for another package, which print what the README shows."""
    user, question, site, _ = readme_blocks(FILTERS)
    answer, _ = readme_blocks(FILTERS, "")
    joe = " ".join(f"/{SPOOL}/joe/{name}" for name in ("tmp", "new", "cur"))
    installed.shell(f"install -d -o lmtpd -g lmtpd -m 700 /{SPOOL}/joe {joe}")
    assert installed.shell(user) == ""
    assert installed.shell(question) == answer
    installed.shell(site)
    return installed


def folder_of(machine: Machine, user: str, *fields: str) -> str:
    """The directory in which a message with these fields is, with its flags; it is removed."""
    client = connect(machine)
    client.hello()
    text = "".join(f"{field}\r\n" for field in fields)
    [reply] = client.deliver(f"{text}\r\nx\r\n".encode(), user)
    assert reply.startswith("250")
    client.close()
    [message] = (machine.root / SPOOL / user).rglob("*,S=*")
    message.unlink()
    return str(message.parent.parent.relative_to(machine.root / SPOOL / user)) + message.name.partition(":2,")[2]


@pytest.mark.parametrize(
    ("field", "folder"),
    [
        ("List-Id: <debian-user.lists.debian.org>", ".Lists.debian-user"),
        ("From: boss@example.com", ".F"),
        ("From: joe@example.com", "."),
        ("X-Spam-Flag: YES", ".Junk"),
    ],
)
def test_mail_goes_where_the_users_script_wants_it(machine: Machine, field: str, folder: str) -> None:
    assert folder_of(machine, "jane", field) == folder


@pytest.mark.parametrize(
    ("field", "folder"),
    [("List-Id: <x.example>", ".Lists"), ("From: x@example.com", "."), ("X-Spam-Flag: YES", ".Junk")],
)
def test_a_user_without_a_script_has_that_of_the_site(machine: Machine, field: str, folder: str) -> None:
    assert folder_of(machine, "joe", field) == folder


def test_the_user_finds_errors_beside_the_script(machine: Machine) -> None:
    """Last: the script is wrong then."""
    folder = machine.root / "var/lib/lmtpd/sieve/jane"
    (folder / "active.sieve").write_text("filinto;\n")
    assert folder_of(machine, "jane", "From: x@example.com") == "."
    wait_for((folder / "active.log").exists, "the file with the errors")
    assert "active.sieve:1:1: there is no command filinto" in (folder / "active.log").read_text()
