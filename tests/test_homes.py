"""Maildirs in homes: what is made there, what cannot be made, and what the administrator is told then."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Site
from test_users import JANE, LARGE, MESSAGE, Homes, homes_of, stored


@pytest.fixture(scope="module")
def homes() -> Iterator[Homes]:
    yield from homes_of("sql")


@pytest.fixture
def log(homes: Homes) -> Path:
    """The log, emptied."""
    homes.site.log.write_text("")
    return homes.site.log


def test_a_maildir_is_made_where_the_folder_of_homes_may_not_be_read(homes: Homes) -> None:
    homes.users.homes.chmod(0o711)
    homes.users.homes.parent.chmod(0o711)
    home = homes.users.add("unlisted", JANE, mail="maildir:~/deep/down/Mail")
    assert homes.deliver("unlisted", "unlisted") == ["250 2.1.5"] * 2
    assert len(stored(home / "deep/down/Mail")) == 2
    home = homes.users.add("itself", JANE, mail="maildir:~/")
    assert homes.deliver("itself") == ["250 2.1.5"]
    assert len(stored(home)) == 1


def test_what_cannot_be_made_is_refused_before_the_message_comes(homes: Homes, log: Path) -> None:
    home = homes.users.add("homeless", JANE)
    home.rmdir()
    client = homes.client()
    client.command("MAIL FROM:<>")
    assert client.command("RCPT TO:<homeless>").startswith("451 4.3.0")
    client.leave()
    cause = f"it is missing, and uid {JANE} has no right to make it in {homes.users.homes}"
    assert "<3>mailbox-not-accessible" in log.read_text()
    assert f'mailbox={home}/Maildir cause="{cause}"' in log.read_text()


@pytest.mark.parametrize("home", ["", "/", "nowhere"])
def test_without_a_home_there_is_no_maildir_in_the_root(homes: Homes, log: Path, home: str) -> None:
    name = f"rootless{len(home)}"
    homes.users.add_row(name, home, JANE)
    assert homes.deliver(name) == ["451 4.3.0"]
    cause = "the user's home directory is missing, relative or /"
    assert f'mailbox={name} cause="{cause}"' in log.read_text()
    assert not Path("/Maildir").exists()


@pytest.mark.parametrize("create", ["no", "yes"])
@pytest.mark.parametrize("kind", ["file", "link", "dangling"])
def test_what_is_no_folder_leads_to_the_inbox(homes: Homes, kind: str, create: str) -> None:
    homes.site.configure(lmtp_detail_create=create)
    name = f"odd-{kind}-{create}"
    home = homes.users.add(name, JANE)
    assert homes.deliver(name) == ["250 2.1.5"]
    folder = home / "Maildir/.folder"
    if kind == "file":
        folder.touch()
    else:
        folder.symlink_to("cur" if kind == "link" else "nowhere")
    os.chown(folder, JANE, JANE, follow_symlinks=False)
    assert homes.deliver(f"{name}+folder") == ["250 2.1.5"]
    homes.site.configure(lmtp_detail_create="no")
    assert len(stored(home / "Maildir")) == 2
    assert folder.is_symlink() == (kind != "file")


def test_a_folder_that_the_owner_of_all_maildirs_has_as_a_file_leads_to_the_inbox(site: Site) -> None:
    site.configure(lmtp_detail_create="yes")
    (site.spool / "jane/.folder").touch()
    client = site.connect()
    client.hello()
    assert client.deliver(MESSAGE, "jane+folder")[0].startswith("250")
    assert len(site.files("jane")) == 1


def test_a_link_of_roots_is_followed_but_not_one_of_the_users_behind_it(homes: Homes, log: Path) -> None:
    home = homes.users.add("moved", JANE, mail=f"maildir:{homes.site.root}/mail/moved")
    (homes.site.root / "mail").mkdir()
    (homes.site.root / "mail/moved").symlink_to(home / "Maildir")
    assert homes.deliver("moved") == ["451 4.3.0"]  # what the link leads to is not there
    (home / "Maildir").mkdir()
    os.chown(home / "Maildir", JANE, JANE)
    assert homes.deliver("moved") == ["250 2.1.5"]
    assert len(stored(home / "Maildir")) == 1
    (home / "Maildir").rename(home / "Mail")
    (home / "Maildir").symlink_to("Mail")
    log.write_text("")
    assert homes.deliver("moved") == ["451 4.3.0"]
    assert f"{home}/Maildir: a symbolic link that others than root can make is not followed" in log.read_text()


def test_links_of_roots_that_lead_to_each_other_end(homes: Homes, log: Path) -> None:
    place = homes.site.root / "circle"
    place.mkdir()
    homes.users.add("circle", JANE, mail=f"maildir:{place}/a/Maildir")
    (place / "a").symlink_to("b")
    (place / "b").symlink_to("../circle/a")
    assert homes.deliver("circle") == ["451 4.3.0"]
    assert os.strerror(40) in log.read_text()


def test_the_log_says_that_the_users_own_link_is_not_followed(homes: Homes, log: Path) -> None:
    home = homes.users.add("linked", JANE)
    (home / "Mail").mkdir()
    (home / "Maildir").symlink_to("Mail")
    assert homes.deliver("linked") == ["451 4.3.0"]
    cause = "a symbolic link that others than root can make is not followed; put the directory itself there"
    assert f'mailbox={home}/Maildir cause="{home}/Maildir: {cause} (as uid {JANE})"' in log.read_text()


# Errors name the place and who was refused


@pytest.mark.parametrize("message", [MESSAGE, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("place", ["tmp", "new"])
def test_an_error_names_the_path_and_the_user(homes: Homes, log: Path, place: str, message: bytes) -> None:
    name = f"locked-{place}-{len(message)}"
    home = homes.users.add(name, JANE)
    assert homes.deliver(name) == ["250 2.1.5"]
    (home / "Maildir" / place).chmod(0o500)
    assert homes.deliver(name, message=message) == ["451 4.3.0"]
    assert f'cause="{home}/Maildir/{place}/' in log.read_text()
    assert f"Permission denied (as uid {JANE})" in log.read_text()
    assert "Errno" not in log.read_text()


def test_a_message_that_cannot_be_spooled_names_the_file(site: Site) -> None:
    (site.spool / "jane/tmp").chmod(stat.S_IRUSR | stat.S_IXUSR)
    client = site.connect()
    client.hello()
    assert client.deliver(LARGE, "jane")[0].startswith("451")
    assert "spooling-failed" in site.log_text()
    assert f'cause="{site.spool}/jane/tmp/' in site.log_text()


def test_a_full_mailbox_is_logged_with_use_and_limit(site: Site) -> None:
    site.configure(default_quota="100", default_quota_messages="7")
    client = site.connect()
    client.hello()
    assert client.deliver(MESSAGE, "jane")[0].startswith("250")
    [size] = [file.stat().st_size for file in site.files("jane")]
    assert client.deliver(MESSAGE, "jane")[0].startswith("452 4.2.2")
    line = f'mailbox={site.spool}/jane used="{size} bytes, 1 messages" limit="100 bytes, 7 messages"'
    assert "<4>over-quota session=" in site.log_text()
    assert line in site.log_text()


def test_cyrus_spool_is_no_reason_to_refuse_mail_that_is_kept_elsewhere(homes: Homes) -> None:
    (homes.site.spool / "stage.").mkdir()
    home = homes.users.add("migrated", JANE, mail="maildir:~/Mail")
    homes.site.configure(maildir_path="%p/%u")
    try:
        assert homes.deliver("migrated") == ["250 2.1.5"]
    finally:
        homes.site.configure(maildir_path="%h/Maildir")
    assert len(stored(home / "Mail")) == 1


@pytest.mark.parametrize("trace", ["stage.", "nobody/cyrus.header"])
@pytest.mark.parametrize("autocreate", ["no", "yes"])
def test_cyrus_own_spool_is_none_for_maildirs(site: Site, trace: str, autocreate: str) -> None:
    site.configure(autocreate_post=autocreate)
    path = site.spool / trace
    path.parent.mkdir(exist_ok=True)
    path.touch()
    client = site.connect()
    client.hello()
    assert client.deliver(MESSAGE, "nobody", "jane")[0].startswith("451 4.3.0")
    assert f"{path} is of Cyrus, whose mail is not in Maildirs; lmtpd needs a partition of its own" in site.log_text()
    assert len(site.files("jane")) == 1
    assert not (site.spool / "nobody/new").exists()
