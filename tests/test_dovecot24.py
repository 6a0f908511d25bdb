"""A site with Dovecot 2.4, which is that of Debian 13: what test_site.py tests, and what Dovecot says of its users."""

from __future__ import annotations

from pathlib import Path

import pytest
import test_site
from container import DEBIAN_13, OWN, Machine
from harness import wait_for
from test_site import PASSWORD, SPOOL, maildir, subjects
from test_systemd import connect

if OWN != DEBIAN_13:  # else they run on it anyway
    from test_site import *  # noqa: F403

site = test_site.site


@pytest.fixture(scope="module")
def base() -> Path:
    return DEBIAN_13


def add_users(machine: Machine, users: dict[str, str]) -> None:
    """Adds users with these fields. Dovecot looks at the file once a second."""
    lines = [f"{name}:{{PLAIN}}{PASSWORD}::::::{fields}\n" for name, fields in users.items()]
    with (machine.root / "etc/dovecot/users").open("a") as file:
        file.writelines(lines)
    wait_for(lambda: machine.run("doveadm", "user", *users, check=False).returncode == 0, f"{users}")


def deliver(machine: Machine, *users: str) -> list[str]:
    """Delivers a message to lmtpd itself; the last word to each user."""
    client = connect(machine)
    client.hello()
    replies = client.deliver(b"Subject: direct\r\n\r\n" + b"x" * 70 + b"\r\n", *users)
    client.close()
    return replies


def messages(machine: Machine, place: str) -> int:
    """How many messages are in the INBOX of the Maildir at that place, wherever Dovecot has put them."""
    return len(list((machine.root / SPOOL / place).glob("*/*,S=*")))


@pytest.mark.parametrize(
    ("user", "fields", "place"),
    [
        ("moved", "userdb_mail_path=~/mail", "moved/mail"),
        ("driven", "userdb_mail_driver=maildir userdb_mail_path=~/mail", "driven/mail"),
        ("straight", f"userdb_mail_path=/{SPOOL}/away", "away"),
        ("inbox", "userdb_mail_path=~/mail userdb_mail_inbox_path=~/mail", "inbox/mail"),
        ("dotted", "userdb_mail_path=~/mail userdb_mail_inbox_path=.", "dotted/mail"),
        ("guest", f"userdb_mail_home=/{SPOOL}/host userdb_mail_path=~/mail", "host/mail"),
    ],
)
def test_the_mail_is_where_dovecot_says(site: Machine, user: str, fields: str, place: str) -> None:
    add_users(site, {user: fields})
    assert deliver(site, user)[0].startswith("250")
    assert messages(site, place) == 1
    assert subjects(site, user) == ["Subject: direct"]


SIZES = ["3072", "3072B", "3k", "3K", "3KB", "3kib", "003K", "7M", "1G", "2T"]
NO_LIMIT = ["0", "unlimited"]


def test_sizes_are_those_that_dovecot_reads(site: Machine) -> None:
    users = {f"size{number}": f"userdb_quota_storage_size={size}" for number, size in enumerate(SIZES)}
    add_users(site, users)
    assert {reply[:3] for reply in deliver(site, *users)} == {"250"}
    headers = [(site.root / maildir(user) / "maildirsize").read_text().splitlines()[0] for user in users]
    shown = [site.run("doveadm", "-f", "tab", "quota", "get", "-u", user).stdout for user in users]
    limits = [line.split("\t")[3] for text in shown for line in text.splitlines() if "\tSTORAGE\t" in line]
    assert headers == [f"{int(limit) * 1024}S" for limit in limits]


def test_a_user_without_a_limit_has_no_quota(site: Machine) -> None:
    users = {f"free-{size}": f"userdb_quota_storage_size={size}" for size in NO_LIMIT}
    add_users(site, users)
    assert {reply[:3] for reply in deliver(site, *users)} == {"250"}
    assert not any((site.root / maildir(user) / "maildirsize").exists() for user in users)


def test_a_number_of_messages_is_a_limit(site: Machine) -> None:
    add_users(site, {"few": "userdb_quota_message_count=1"})
    replies = [deliver(site, "few")[0][:9] for _ in range(3)]
    assert replies == ["250 2.1.5", "250 2.1.5", "452 4.2.2"]  # the last one that fits may come when it is full
    assert "User quota\tMESSAGE\t2\t1\t200" in site.run("doveadm", "-f", "tab", "quota", "get", "-u", "few").stdout


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mail_driver", "mbox"),
        ("mail_path", "Maildir"),
        ("mail_inbox_path", "~/inbox"),
        ("mail_control_path", "~/control"),
        ("quota_storage_size", "1.5M"),
        ("quota_storage_percentage", "50"),
        ("quota_message_count", "1k"),
    ],
)
def test_mail_waits_for_a_user_with_a_field_that_is_not_understood(site: Machine, name: str, value: str) -> None:
    """To deliver to the wrong place, or beyond a limit, would be worse."""
    user = name.replace("_", "-")
    add_users(site, {user: f"userdb_{name}={value}"})
    assert deliver(site, user)[0].startswith("451 4.3.0")
    assert f"{name}={value}" in site.journal("--identifier=lmtpd", "--priority=warning")
    assert not (site.root / SPOOL / user).exists()
