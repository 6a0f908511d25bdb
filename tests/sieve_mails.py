"""The mails that scripts send, in a form in which lmtpd's and Pigeonhole's can be compared."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from email import message_from_bytes
from email.message import Message
from email.policy import compat32
from email.utils import getaddresses

from sieve_fields import Field, fields_of
from sink import Mail

# Fields that one of both adds to what it sends, and that say nothing of what the script wants.
EXTRAS = {
    *("x-sieve", "x-sieve-redirected-from", "return-path", "delivered-to"),
    *("precedence", "x-auto-response-suppress", "x-priority", "user-agent"),
}
# Those whose values are made of nothing but the time and the place. lmtpd adds them to a message that has none.
NEW = ("message-id", "date")
ADDRESSES = ("from", "to", "cc")
# How the parts are written down; the text that comes of it is compared.
ENCODING = {"mime-version", "content-type", "content-transfer-encoding", "content-disposition"}
# The author of a report is the postmaster or the recipient (RFC 8098, section 3); it may refer to the message.
OF_REPORTS = {"from", "in-reply-to", "references"}
EXPLANATION = re.compile(r"Your message to (<.*?>) was [^:]*:\n*")
# The text of a notification for which the script has none.
NOTICE = re.compile(r"Notification of new message\.|There is new mail for .*", re.DOTALL)


@dataclass(frozen=True, order=True)
class Sent:
    """A mail to one recipient. parts: the type and the text of each, for a message that is passed on its octets."""

    reverse_path: str
    recipient: str
    fields: tuple[Field, ...]
    parts: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        lines = [f"mail from <{self.reverse_path}> to <{self.recipient}>"]
        lines += [f"    {name}: {value}" for name, value in self.fields]
        lines += [f"    {kind} {text[:2000]!r}" for kind, text in self.parts]
        return "\n".join(lines)


def sent(mails: tuple[Mail, ...], originals: tuple[bytes, ...]) -> tuple[Sent, ...]:
    """All of them, without an order. originals: the messages that they may come of."""
    return tuple(sorted(one for mail in mails for one in _for_each(mail, originals)))


def _for_each(mail: Mail, originals: tuple[bytes, ...]) -> Iterator[Sent]:
    octets = mail.octets.replace(b"\r\n", b"\n")
    header, _, body = octets.partition(b"\n\n")
    known = {value for original in originals for name, value in fields_of(original.partition(b"\n\n")[0], set())}
    found = dict(fields_of(header, set()))
    drop, parts = EXTRAS, [("", repr(body))]
    if found.get("auto-submitted", "").startswith("auto-") and found.get("message-id") not in known:
        message = message_from_bytes(octets, policy=compat32)
        drop = drop | ENCODING | (OF_REPORTS if message.get_content_type() == "multipart/report" else set())
        parts = list(_parts(message))
    else:
        drop = drop | {name for name in NEW if found.get(name) not in known}
    fields = tuple(sorted(_told(name, value, known) for name, value in fields_of(header, drop)))
    for recipient in mail.recipients:
        yield Sent(mail.reverse_path, recipient, fields, tuple(parts))


def _told(name: str, value: str, known: set[str]) -> Field:
    """A field without what differs each time."""
    if name in NEW and value not in known:
        return name, "new"
    if name in ADDRESSES:
        return name, ", ".join(sorted(f"{phrase} <{address}>" for phrase, address in getaddresses([value])))
    if name == "auto-submitted":
        return name, re.sub(r"\s*\(.*?\)", "", value)
    if name == "importance":
        return name, value.lower()
    if name == "references":
        return name, " ".join(value.split())
    return name, value


def _parts(message: Message) -> Iterator[tuple[str, str]]:
    """The type and the text of each part, none of which is a message itself."""
    kind = message.get_content_type()
    if kind == "message/rfc822" or kind == "text/rfc822-headers":
        yield "header", _returned_header(message)
    elif kind == "message/disposition-notification":
        yield kind, _disposition(message)
    elif message.is_multipart():
        for part in message.get_payload():
            if isinstance(part, Message):
                yield from _parts(part)
    else:
        text = _text(message).strip()
        yield kind, NOTICE.sub("news", EXPLANATION.sub(r"no, says \1: ", text))


def _text(part: Message) -> str:
    payload = part.get_payload(decode=True)
    assert isinstance(payload, bytes)
    return payload.decode(str(part.get_content_charset("utf-8")), "replace").replace("\r\n", "\n")


def _returned_header(part: Message) -> str:
    """The fields of a message that is sent back."""
    octets = part.as_bytes().partition(b"\n\n")[2] if part.is_multipart() else _text(part).encode()
    header = octets.lstrip(b"\n").partition(b"\n\n")[0]
    return "\n".join(f"{name}: {value}" for name, value in sorted(fields_of(header, EXTRAS)))


def _disposition(part: Message) -> str:
    """What the recipient's program says that it has done, without its own name."""
    fields = fields_of(part.as_bytes().partition(b"\n\n")[2], {"reporting-ua"})
    return "\n".join(sorted(f"{name}: {value.replace('; ', ';')}" for name, value in fields))
