"""A delivery of several parts: all of them are stored, or none, and the recipient gets one reply."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import pytest
from harness import Site, config_of
from mailboxes import letter

import lmtpd
from lmtpd import Address, Config, Delivery, DeliveryAgent, Envelope, Incoming, Message, Placement, Reply

DELIVERED = Reply(250, "2.1.5", "Ok")


class FilingAgent(DeliveryAgent):
    """Places each message into the INBOX and into these folders, as a filter would."""

    folders: Sequence[str] = ("Lists",)

    def plan(self, message: Message, delivery: Delivery) -> list[Placement]:
        mailbox = delivery.destination.mailbox
        names = [mailbox.new_folder(name) for name in self.folders]
        return [Placement(message, mailbox, folder) for folder in (lmtpd.INBOX, *names)]


class Scene:
    """A store with two users, and an agent for it."""

    def __init__(self, site: Site, **options: str) -> None:
        site.add_user("joe")
        self.site = site
        paths = {"configdirectory": str(site.configdirectory), "partition-default": str(site.spool)}
        self.config: Config = config_of(**{**paths, "duplicatesuppression": "no", **options})
        self.agent = FilingAgent(self.config)

    def deliver(self, *users: str, message: bytes = b"") -> list[str]:
        """The reply to each user's copy."""
        envelope = Envelope(None)
        for user in users:
            envelope.destinations.append(self.agent.router.find(Address(user, ""), envelope, 0, False))
        incoming = Incoming(b"Return-Path: <>\n", self.config, self.agent.drafts(envelope))
        try:
            incoming.write((message or letter()).replace(b"\r\n", b"\n"))
            incoming.complete()
            return [str(reply) for reply in self.agent.deliver(incoming, envelope, DELIVERED)]
        finally:
            incoming.discard()

    def stored(self) -> list[Path]:
        """The message files of all users, drafts included."""
        return sorted(path for path in self.site.spool.glob("*/**/*.*,S=*"))


@pytest.fixture
def scene(site: Site) -> Scene:
    return Scene(site)


def test_all_parts_share_one_file_and_one_reply(scene: Scene, site: Site) -> None:
    assert scene.deliver("jane", "joe") == ["250 2.1.5"] * 2
    copies = [site.files(user, folder)[0] for user in ("jane", "joe") for folder in ("", ".Lists")]
    assert scene.stored() == sorted(copies)
    assert len({copy.stat().st_ino for copy in copies}) == 1
    assert all(not any((site.spool / user / "tmp").iterdir()) for user in ("jane", "joe"))


def test_a_large_message_becomes_the_file_of_all_parts(scene: Scene, site: Site) -> None:
    assert scene.deliver("jane", message=letter(lmtpd.MEMORY_LIMIT + 1000)) == ["250 2.1.5"]
    assert len({path.stat().st_ino for path in scene.stored()}) == 1
    assert len(scene.stored()) == 2
    assert not any((site.spool / "jane/tmp").iterdir())


def test_the_parts_are_counted_each(scene: Scene, site: Site) -> None:
    (site.spool / "jane/maildirsize").write_text("1000000S,100C\n0 0\n")
    assert scene.deliver("jane") == ["250 2.1.5"]
    usage = (site.spool / "jane/maildirsize").read_text().split("\n")[1:-1]
    size = len(site.messages("jane")[0])
    assert usage == ["0 0", f"{size} 1", f"{size} 1"]


def test_if_one_part_fails_none_of_that_recipient_is_left(scene: Scene, site: Site) -> None:
    """The other recipient's parts are stored, and the books of the quota agree with the folders."""
    (site.spool / "jane/.Lists").touch()
    (site.spool / "jane/maildirsize").write_text("1000000S,100C\n0 0\n")
    assert scene.deliver("jane", "joe") == ["451 4.3.0", "250 2.1.5"]
    assert [path.parts[-3] for path in scene.stored()] == [".Lists", "joe"]
    lines = [line.split() for line in (site.spool / "jane/maildirsize").read_text().splitlines()[1:]]
    assert [sum(map(int, column)) for column in zip(*lines)] == [0, 0]


def failing_fsync(path: Path) -> Callable[[int], None]:
    """An fsync(2) that fails for this directory, and does nothing for others."""

    def fsync(fd: int) -> None:
        if os.path.samestat(os.fstat(fd), path.stat()):
            raise OSError(errno.EIO, "broken")

    return fsync


def test_a_copy_that_can_neither_be_synced_nor_removed_is_logged(scene: Scene, site: Site) -> None:
    """The disk has become read-only, for example."""
    unlink = os.unlink

    def fail(name: str, **arguments: int) -> None:
        if ",S=" in name:
            raise OSError(errno.EROFS, "Read-only file system")
        unlink(name, **arguments)

    lines: list[str] = []
    with (
        mock.patch.object(os, "fsync", failing_fsync(site.spool / "jane/new")),
        mock.patch.object(os, "unlink", fail),
        mock.patch.object(lmtpd.log, "_emit", lambda _, line: lines.append(line)),
    ):
        assert scene.deliver("jane") == ["451 4.3.0"]
    [file] = site.files("jane")
    log = "\n".join(lines)
    where = f"recipient=<jane> mailbox={site.spool}/jane"
    assert f'copy-left-behind {where} file="{file.name}" cause="{file}: Read-only file system' in log
    assert f'delivery-failed {where} cause="{site.spool}/jane/new: broken' in log


@pytest.mark.parametrize("broken", ["jane/new", "jane/.Lists/new"])
def test_a_part_that_cannot_be_synced_takes_the_others_back(scene: Scene, site: Site, broken: str) -> None:
    assert scene.deliver("jane") == ["250 2.1.5"]
    before = scene.stored()
    with mock.patch.object(os, "fsync", failing_fsync(site.spool / broken)):
        assert scene.deliver("jane", "joe") == ["451 4.3.0", "250 2.1.5"]
    assert [path.parts[-3] for path in scene.stored() if path not in before] == [".Lists", "joe"]


def test_a_recipient_who_shares_a_part_that_was_taken_back_shares_the_failure(site: Site) -> None:
    scene = Scene(site, duplicatesuppression="yes")
    (site.spool / "jane/.Lists").touch()
    assert scene.deliver("jane", "jane") == ["451 4.3.0"] * 2
    assert scene.stored() == []
    (site.spool / "jane/.Lists").unlink()
    assert scene.deliver("jane", "jane") == ["250 2.1.5"] * 2
    assert len(scene.stored()) == 2


@pytest.mark.parametrize(
    ("codes", "decides"),
    [([250], None), ([552], 552), ([552, 451], 451), ([451, 552], 451), ([250, 550], 550), ([452, 451], 451)],
)
def test_a_temporary_failure_decides_before_a_permanent_one(scene: Scene, codes: list[int], decides: int) -> None:
    """The client has to try again, for what may still be stored."""
    destination = scene.agent.router.find(Address("jane", ""), Envelope(None), 0, False)
    delivery = Delivery(destination, None, Message())
    for code in codes:
        delivery.placements.append(Placement(Message(), destination.mailbox, lmtpd.INBOX))
        if code >= 400:
            delivery.fail(Reply(code, f"{code // 100}.0.0", "x"), delivery.placements[-1])
    assert (delivery.failure and delivery.failure.code) == decides
    assert [bool(placement.failure) for placement in delivery.placements] == [code >= 400 for code in codes]


def test_a_changed_message_is_a_file_of_its_own(scene: Scene, site: Site) -> None:
    def plan(message: Message, delivery: Delivery) -> list[Placement]:
        destination = delivery.destination
        mailbox = destination.mailbox
        if destination.recipient.user != "jane":
            return [Placement(message, mailbox, lmtpd.INBOX)]
        changed = Message()
        changed.content = b"X-Changed: yes\n" + message.content
        changed.size = len(changed.content)
        folders = (lmtpd.INBOX, mailbox.new_folder("Lists"))
        return [Placement(message, mailbox, ".Archive"), *(Placement(changed, mailbox, folder) for folder in folders)]

    with mock.patch.object(scene.agent, "plan", plan):
        assert scene.deliver("jane", "joe") == ["250 2.1.5"] * 2
    [inbox], [lists], [archive] = (site.files("jane", folder) for folder in ("", ".Lists", ".Archive"))
    [joes] = site.files("joe")
    assert inbox.samefile(lists)
    assert archive.samefile(joes)
    assert inbox.read_bytes() == b"X-Changed: yes\n" + joes.read_bytes()
    assert not any((site.spool / "jane/tmp").iterdir())


@pytest.mark.parametrize(
    ("error", "options", "reply"),
    [
        (lmtpd.UserUnknown(), {}, "550 5.1.1"),
        (lmtpd.MailboxFull("/x", "2 messages", "1 messages"), {}, "452 4.2.2"),
        (lmtpd.MailboxFull("/x", "2 messages", "1 messages"), {"lmtp_over_quota_perm_failure": "yes"}, "552 5.2.2"),
        (lmtpd.StoreUnavailable(), {}, "451 4.3.0"),
        (lmtpd.StoreUnavailable(permanent=True), {}, "550 5.2.1"),
        (OSError(errno.ENOSPC, "full"), {}, "452 4.3.1"),
        (OSError(errno.EIO, "broken"), {}, "451 4.3.0"),
        (lmtpd.LmtpError(Reply(421, "4.3.2", "x")), {}, "421 4.3.2"),
    ],
)
def test_the_errors_of_a_store_and_their_replies(error: Exception, options: dict[str, str], reply: str) -> None:
    assert str(lmtpd.reply_to(error, config_of(**options))) == reply


def test_a_maildir_is_listed_once_in_a_transaction(site: Site) -> None:
    """With folders to compare, for each of forty sub-addresses."""
    scene = Scene(site, lmtp_fuzzy_mailbox_match="yes", quota_exclude_folders="Trash")
    for number in range(40):
        folder = site.spool / f"jane/.List_{number}"
        for name in ("tmp", "new", "cur"):
            (folder / name).mkdir(parents=True)
    scene.agent = DeliveryAgent(scene.config)  # type: ignore[assignment]
    with mock.patch.object(os, "scandir", wraps=os.scandir) as scandir:
        assert scene.deliver(*(f"jane+list {number}" for number in range(40))) == ["250 2.1.5"] * 40
    assert scandir.call_count == 1
    assert all(len(site.files("jane", f".List_{number}")) == 1 for number in range(40))


@pytest.mark.parametrize("users", [("jane", "joe"), ("jane", "joe", "jane+x"), ("jane", "jane+x", "joe")])
def test_a_file_system_that_is_full_for_one_recipient_is_not_the_end(scene: Scene, users: tuple[str, ...]) -> None:
    """A large message is spooled at the other recipient's, who gets it."""
    spool = lmtpd.Maildir.spool

    def full_for_jane(mailbox: lmtpd.Maildir) -> lmtpd.Draft:
        if mailbox.path.endswith("/jane"):
            raise OSError(errno.ENOSPC, "full")
        return spool(mailbox)

    scene.agent = DeliveryAgent(scene.config)  # type: ignore[assignment]
    with mock.patch.object(lmtpd.Maildir, "spool", full_for_jane):
        replies = scene.deliver(*users, message=letter(lmtpd.MEMORY_LIMIT + 1000))
    assert replies == ["250 2.1.5"] * len(users)


def test_shared_folders_are_listed_once_in_a_transaction(site: Site) -> None:
    site.add_user("shared", "shared/.A-list")
    shared = {"postuser": "bb", "shared_maildir": str(site.spool / "shared")}
    scene = Scene(site, **shared, lmtp_fuzzy_mailbox_match="yes")
    scene.agent = DeliveryAgent(scene.config)  # type: ignore[assignment]
    with mock.patch.object(os, "scandir", wraps=os.scandir) as scandir:
        assert scene.deliver(*["bb+a list"] * 5) == ["250 2.1.5"] * 5
    assert scandir.call_count == 1
    assert len(site.files("shared", ".A-list")) == 5


def test_one_recipients_failure_is_not_that_of_another_with_the_same_folder(site: Site) -> None:
    """What was taken back for the first is stored for the second, and is a duplicate for the third."""
    scene = Scene(site, duplicatesuppression="yes")
    plan = scene.agent.plan

    def plan_both_for_the_first(message: Message, delivery: Delivery) -> list[Placement]:
        return plan(message, delivery)[: 2 if delivery.destination.detail == "both" else 1]

    (site.spool / "jane/.Lists").mkdir()
    (site.spool / "jane/.Lists/new").touch()
    site.give(site.spool / "jane/.Lists")
    with mock.patch.object(scene.agent, "plan", plan_both_for_the_first):
        assert scene.deliver("jane+both", "jane", "jane") == ["451 4.3.0", "250 2.1.5", "250 2.1.5"]
    assert len(scene.stored()) == 1
    assert len(site.files("jane")) == 1


@pytest.mark.parametrize(
    "message", [b"", b"Subject: large\r\n\r\n" + b"0123456789\r\n" * 50_000], ids=["small", "large"]
)
@pytest.mark.parametrize("delivered_to", ["no", "yes"])
@pytest.mark.parametrize("failures", range(5))
def test_a_recipient_is_never_a_duplicate_of_what_was_not_stored(
    site: Site, failures: int, delivered_to: str, message: bytes
) -> None:
    """Each of four addresses of one mailbox gets a try of its own, until the first succeeds."""
    scene = Scene(site, duplicatesuppression="yes", lmtp_delivered_to=delivered_to)
    scene.agent = DeliveryAgent(scene.config)  # type: ignore[assignment]
    fail, tries = failing_fsync(site.spool / "jane/new"), []

    def fsync(fd: int) -> None:
        if os.path.samestat(os.fstat(fd), (site.spool / "jane/new").stat()):
            tries.append(fd)
            if len(tries) <= failures:
                fail(fd)

    with mock.patch.object(os, "fsync", fsync):
        replies = scene.deliver("jane", "jane+a", "jane+b", "jane+c", message=message)
    assert replies == ["451 4.3.0"] * failures + ["250 2.1.5"] * (4 - failures)
    assert len(scene.stored()) == len(site.files("jane")) == (failures < 4)
    assert not site.files("jane", kind="tmp")
    for file in site.files("jane"):
        assert f",S={file.stat().st_size}," in file.name
        delivered_to_lines = [line for line in file.read_bytes().split(b"\n")[:2] if line.startswith(b"Delivered-To: ")]
        wanted = ["jane", "jane+a", "jane+b", "jane+c"][failures].encode()
        assert delivered_to_lines == ([b"Delivered-To: " + wanted] if delivered_to == "yes" else [])
