"""What a recipient's own copy has: the field Delivered-To. What is done for a folder that is made: subscriptions."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest
from harness import Client, Site
from mailboxes import connected, letter, messages_in, send
from peers import Courier, Dovecot

LARGE = b"0123456789abcde\r\n" * 40_000


def header_of(message: bytes) -> list[str]:
    return message.partition(b"\n\n")[0].decode().replace("\n\t", " ").split("\n")


# Delivered-To


@pytest.mark.parametrize("extra", [b"", LARGE], ids=["small", "large"])
def test_each_copy_has_its_recipient(site: Site, extra: bytes) -> None:
    site.add_user("joe")
    client = connected(site, lmtp_delivered_to="yes")
    message = b"Delivered-To: list@example.org\r\n" + letter() + extra
    recipients = ["Jane+lists@Example.com", "joe@example.com", '"joe"@x']
    assert {reply[:9] for reply in client.deliver(message, *recipients)} == {"250 2.1.5"}
    copies = [*site.files("jane"), *site.files("joe")]
    wanted = ["Jane+lists@Example.com", "joe@example.com", "joe@x"]
    assert {header_of(copy.read_bytes())[1] for copy in copies} == {f"Delivered-To: {address}" for address in wanted}
    for copy in copies:
        first, _, rest = copy.read_bytes().partition(b"\n")
        assert first == b"Return-Path: <sender@example.com>"
        assert rest.partition(b"\n")[2].startswith(b"Received: ")
        assert b"\nDelivered-To: list@example.org\n" in rest
        assert rest.endswith(b"A body.\n" + extra.replace(b"\r\n", b"\n"))
        size = copy.stat().st_size
        assert f",S={size},W={size + rest.count(10) + 1}" in copy.name
        assert copy.stat().st_nlink == 1
    assert not site.files("jane", kind="tmp")
    assert not site.files("joe", kind="tmp")


def test_without_the_option_there_is_no_such_field(site: Site) -> None:
    assert send(connected(site), "jane").startswith("250")
    assert b"Delivered-To" not in site.messages("jane")[0]


def test_a_copy_with_its_recipient_is_a_duplicate_like_any_other(site: Site) -> None:
    client = connected(site, lmtp_delivered_to="yes", duplicatesuppression="yes")
    message = letter()
    assert {reply[:9] for reply in client.deliver(message, "jane+a", "jane+b")} == {"250 2.1.5"}
    assert send(client, "jane", message).startswith("250")
    assert len(site.messages("jane")) == 1
    assert "duplicate session" in site.log_text()


def test_many_recipients_take_no_more_files_or_memory_at_a_time(site: Site) -> None:
    """As many as a transaction may have, with fewer descriptors than that."""
    users = [f"user{number}" for number in range(600)]
    site.add_user(*users)
    client = connected(site, lmtp_delivered_to="yes")
    assert {reply[:9] for reply in client.deliver(letter() + LARGE, *users)} == {"250 2.1.5"}
    [last] = site.files("user599")
    assert header_of(last.read_bytes())[1] == "Delivered-To: user599"
    peak = next(line for line in Path(f"/proc/{client.server()}/status").read_text().splitlines() if "VmHWM" in line)
    assert int(peak.split()[1]) < 40_000  # KiB


def test_an_unicode_recipient(site: Site) -> None:
    site.add_user("jürgen")
    assert send(connected(site, lmtp_delivered_to="yes"), "jürgen@münchen.example").startswith("250")
    assert "\nDelivered-To: jürgen@münchen.example\n".encode() in site.messages("jürgen")[0]


# Subscriptions


def subscribed(site: Site) -> Client:
    """A session in which folders are made and subscribed to."""
    return connected(site, lmtp_detail_create="yes", lmtp_autosubscribe="yes")


def test_a_folder_that_is_made_is_subscribed_to(site: Site) -> None:
    client = subscribed(site)
    for address in ("jane+Lists/Entwürfe", "jane+Lists", "jane+Lists", "jane"):
        assert send(client, address).startswith("250")
    files = [site.spool / "jane" / name for name in ("subscriptions", "courierimapsubscribed")]
    assert files[0].read_text() == "V\t2\n\nLists\tEntw&APw-rfe\nLists\n"
    assert files[1].read_text() == "INBOX.Lists.Entw&APw-rfe\nINBOX.Lists\n"
    assert not (site.spool / "jane/subscriptions.lock").exists()


def test_a_folder_that_is_there_is_not(site: Site) -> None:
    site.add_user("jane/.Lists")
    assert send(subscribed(site), "jane+Lists").startswith("250")
    assert not (site.spool / "jane/subscriptions").exists()


def test_files_of_other_programs_are_added_to(site: Site) -> None:
    jane = site.spool / "jane"
    (jane / "subscriptions").write_text("Sent\nLists.old")
    (jane / "courierimapsubscribed").write_text("INBOX.Sent\nINBOX.Lists.new\n")
    assert send(subscribed(site), "jane+Lists/new").startswith("250")
    assert (jane / "subscriptions").read_text() == "Sent\nLists.old\nLists.new\n"
    assert (jane / "courierimapsubscribed").read_text() == "INBOX.Sent\nINBOX.Lists.new\n"


def test_the_folders_of_a_new_maildir_are_subscribed_to_as_well(site: Site) -> None:
    site.configure(
        autocreate_post="yes", autocreate_inbox_folders="Sent|Junk", autocreate_subscribe_folders="INBOX|Sent"
    )
    assert send(subscribed(site), "new+Lists").startswith("250")
    assert (site.spool / "new/subscriptions").read_text() == "V\t2\n\nINBOX\nSent\nJunk\nLists\n"
    assert (site.spool / "new/courierimapsubscribed").read_text() == "INBOX\nINBOX.Sent\nINBOX.Junk\nINBOX.Lists\n"


def test_a_file_that_cannot_be_written_is_no_reason_to_refuse_mail(site: Site) -> None:
    (site.spool / "jane/subscriptions").mkdir()
    assert send(subscribed(site), "jane+Lists").startswith("250")
    assert len(site.messages("jane", ".Lists")) == 1
    path = site.spool / "jane"
    assert f'mailbox={path}/.Lists cause="{path}/subscriptions: not a regular file' in site.log_text()


def test_a_file_that_a_user_has_made_huge_is_left_alone(site: Site) -> None:
    """Reading it would take the memory of all."""
    file = site.spool / "jane/subscriptions"
    with file.open("wb") as stream:
        stream.truncate(3 << 30)
    client = subscribed(site)
    assert send(client, "jane+Lists").startswith("250")
    assert f'cause="{file}: File too large' in site.log_text()
    peak = next(line for line in Path(f"/proc/{client.server()}/status").read_text().splitlines() if "VmHWM" in line)
    assert int(peak.split()[1]) < 40_000  # KiB


def test_a_lock_that_stays_delays_mail_once_and_not_for_each_folder(site: Site) -> None:
    (site.spool / "jane/subscriptions.lock").write_text(f"{os.getpid()}:{socket.gethostname()}")
    client = subscribed(site)
    replies = client.deliver(letter(), *(f"jane+folder{number}" for number in range(5)))
    assert {reply[:9] for reply in replies} == {"250 2.1.5"}
    assert site.log_text().count("not-subscribed") == 1
    assert f"{site.spool}/jane/subscriptions.lock: locked for too long" in site.log_text()


def test_none_is_lost_when_many_add_at_once(site: Site) -> None:
    site.figures = {"SUBSCRIPTIONS_PATIENCE": 60}  # the disk may be slow
    site.configure(lmtp_detail_create="yes", lmtp_autosubscribe="yes")
    clients = [connected(site) for _ in range(8)]

    def deliver(number: int, client: Client) -> None:
        for each in range(5):
            assert send(client, f"jane+f{number}x{each}").startswith("250")

    threads = [threading.Thread(target=deliver, args=pair) for pair in enumerate(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = [f"f{number}x{each}" for number in range(8) for each in range(5)]
    assert sorted((site.spool / "jane/subscriptions").read_text().splitlines()[2:]) == sorted(names)
    lines = (site.spool / "jane/courierimapsubscribed").read_text().splitlines()
    assert sorted(lines) == sorted(f"INBOX.{name}" for name in names)


def test_dovecot_shows_them_and_both_keep_what_the_other_has_added(site: Site) -> None:
    with Dovecot(site) as dovecot, dovecot.login("jane") as imap:
        assert imap.create("Own")[0] == imap.subscribe("Own")[0] == "OK"
        client = subscribed(site)
        for folder in ("Lists", "Lists/Python", "Entwürfe"):
            assert send(client, f"jane+{folder}").startswith("250")
        assert imap.create("Later")[0] == imap.subscribe("Later")[0] == "OK"
        assert send(client, "jane+Last").startswith("250")
        names = {line.split()[-1].strip(b'"') for line in imap.lsub()[1] if isinstance(line, bytes)}
        assert {b"Own", b"Lists", b"Later", b"Last", b"Entw&APw-rfe"} <= names
        assert messages_in(imap, "Last") == 1


def test_courier_shows_them(site: Site) -> None:
    with Courier(site).login(site.spool / "jane") as imap:
        client = subscribed(site)
        for folder in ("Lists", "Lists/Python"):
            assert send(client, f"jane+{folder}").startswith("250")
        names = {line.split()[-1].strip(b'"') for line in imap.lsub()[1] if isinstance(line, bytes)}
        assert {b"INBOX.Lists", b"INBOX.Lists.Python"} <= names
