"""What the tests of folders, quota and flags have in common: letters, who sends them, and where they are counted."""

from __future__ import annotations

import imaplib
import itertools
import pwd
import re

from harness import AS_ROOT, STORE_USER, Client, Site

from lmtpd import INBOX, Config, Identity, Incoming, Maildir

NUMBERS = itertools.count()


def letter(size: int = 0) -> bytes:
    """A message that is not the same as any before, of so many octets when it is stored, but for its trace headers."""
    header = b"Message-ID: <%d@example.com>\r\nDate: Sun, 22 Nov 2026 12:00:00 +0000\r\n\r\n" % next(NUMBERS)
    return header + b"A body.\r\n" + b"0123456\r\n" * (max(size - len(header), 0) // 8)


def connected(site: Site, **options: str) -> Client:
    """A session of lmtpd with these options."""
    site.configure(**options)
    client = site.connect()
    client.hello()
    return client


def quoted(local_part: str) -> str:
    """An address of that local part, whatever is in it."""
    return '"' + local_part.replace("\\", "\\\\").replace('"', '\\"') + '"@example.com'


def send(client: Client, address: str | bytes, message: bytes = b"", mail: str = "", rcpt: str = "") -> str:
    """Delivers a message, by default a new one, to an address that may be of any characters; the last word to it."""
    [reply] = client.deliver(message or letter(), address, mail=f"SMTPUTF8 {mail}", rcpt=rcpt)
    return reply


def messages_in(imap: imaplib.IMAP4, folder: str) -> int:
    """How many messages IMAP sees in a folder, given its name on the wire."""
    status, parts = imap.status(f'"{folder}"', "(MESSAGES)")  # more than one part if the name is a literal
    assert status == "OK", parts
    match = re.search(
        rb"\(MESSAGES (\d+)\)", b"".join(part if isinstance(part, bytes) else b"".join(part) for part in parts)
    )
    assert match
    return int(match[1])


def owner() -> Identity:
    """The identity of the Maildirs' owner."""
    if not AS_ROOT:
        return Identity.of_process()
    account = pwd.getpwnam(STORE_USER)
    return Identity(account.pw_uid, account.pw_gid, ())


def deliver_in(conf: str, *flags: str, folder: str = INBOX) -> None:
    """Delivers a message to jane with these flags, as a filter would have it; its subject says which they are."""
    config = Config.load(conf)
    mailbox = Maildir(f"{config.partition}/jane", owner(), config)
    incoming = Incoming(b"Return-Path: <>\n", config, (mailbox.spool() for _ in range(1)))
    incoming.write(b"Subject: %s\n" % " ".join(flags).encode("ascii", "replace") + letter().replace(b"\r\n", b"\n"))
    incoming.complete()
    try:
        placed = mailbox.place(incoming.message, folder, flags)
        placed.sync()
        placed.close()
    finally:
        incoming.discard()
