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
    """Delivers a message, by default a new one; the reply to the final dot, or the refusal.

    mail, rcpt: what stands behind the addresses in these commands.
    """
    octets = address if isinstance(address, bytes) else address.encode()
    assert client.command(f"MAIL FROM:<sender@example.com> SMTPUTF8 {mail}").startswith("250")
    if not (reply := client.command(b"RCPT TO:<%s> %s" % (octets, rcpt.encode()))).startswith("250"):
        client.command("RSET")
        return reply
    assert client.command("DATA").startswith("354")
    client.send((message or letter()) + b".\r\n")
    return client.reply()[-1]


def messages_in(imap: imaplib.IMAP4, folder: str) -> int:
    """How many messages IMAP sees in a folder, given its name on the wire."""
    status, [line] = imap.status(f'"{folder}"', "(MESSAGES)")
    assert status == "OK", line
    match = re.search(rb"\(MESSAGES (\d+)\)", line)
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
