"""Where the mail that lmtpd sends ends up in the tests: an SMTP server, and a program in place of sendmail(8)."""

from __future__ import annotations

import asyncio
import collections
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword, Session, TLSSetupException
from harness import PATIENCE, Site, wait_for

# The keywords of EHLO's reply that a client may build on, beside STARTTLS and AUTH.
EXTENSIONS = ("PIPELINING", "SIZE", "8BITMIME", "SMTPUTF8", "DSN", "ENHANCEDSTATUSCODES")
# The options of MAIL and of RCPT, and the keyword without which they are not to be used.
MAIL_OPTIONS = {"SIZE": "SIZE", "BODY": "8BITMIME", "SMTPUTF8": "SMTPUTF8", "RET": "DSN", "ENVID": "DSN"}
RCPT_OPTIONS = {"NOTIFY": "DSN", "ORCPT": "DSN"}


@dataclass(frozen=True)
class Mail:
    """A message that was handed over. reverse_path: "" for the null one.

    options: of MAIL, as they were written. recipient_options: those of each RCPT. octets: without the dots that were
    stuffed. secure: whether it came by TLS. user: who had authenticated, "" for nobody.
    """

    reverse_path: str
    options: tuple[str, ...]
    recipients: tuple[str, ...]
    recipient_options: tuple[tuple[str, ...], ...]
    octets: bytes
    secure: bool = False
    user: str = ""


class Sink:
    """An SMTP server on loopback that keeps what it gets, and replies as it is told.

    tls: the settings with which it offers STARTTLS. users: their passwords, with which it offers AUTH, by TLS only, or
    in_clear. required: it takes nothing from anybody who has not authenticated.

    replies: the reply to each command, by its name in lower case, in place of the usual one; "connect" is for the
    greeting, "message" for what follows the final dot, and the empty reply hangs up. A reply of several lines has CR LF
    between them; 421 hangs up after it. refuse: the reply for a recipient. hold: an event that is waited for before a
    reply, by the names that replies has. extensions: what it announces and takes, "STARTTLS" and "AUTH" among them.
    mails: what was accepted; what is held counts. commands: all lines of commands, of all clients.
    """

    def __init__(
        self,
        tls: ssl.SSLContext | None = None,
        users: Mapping[str, str] | None = None,
        in_clear: bool = False,
        required: bool = False,
        mechanisms: tuple[str, ...] = ("PLAIN", "LOGIN"),
    ) -> None:
        self.tls, self.users, self.in_clear, self.required = tls, dict(users or {}), in_clear, required
        self.mechanisms = mechanisms
        self.mails: list[Mail] = []
        self.commands: list[str] = []
        self.replies: dict[str, str] = {}
        self.refuse: dict[str, str] = {}
        self.hold: dict[str, threading.Event] = {}
        self.extensions = {*EXTENSIONS, "STARTTLS", "AUTH"}
        self.faults: list[Exception] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # aiosmtpd sends replies line by line
        self.address: tuple[str, int] = self._socket.getsockname()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def port(self) -> int:
        return self.address[1]

    def clear(self) -> None:
        """Forgets what came, and how to reply; announces everything again."""
        for kept in (self.mails, self.commands, self.replies, self.refuse, self.hold):
            kept.clear()
        self.extensions = {*EXTENSIONS, "STARTTLS", "AUTH"}

    def wait(self, number: int) -> list[Mail]:
        """The mails, as soon as there are so many."""
        wait_for(lambda: len(self.mails) >= number, f"{number} mails")
        return self.mails

    def __enter__(self) -> Sink:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE)
        assert not self.faults, self.faults

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._loop.create_server(lambda: Conversation(self), sock=self._socket))
        self._loop.run_forever()
        clients = asyncio.all_tasks(self._loop)
        for client in clients:
            client.cancel()
        self._loop.run_until_complete(asyncio.gather(*clients, return_exceptions=True))
        self._socket.close()
        self._loop.close()


class Conversation(SMTP):
    """What the server does for one client. It is stricter than others: what was not announced is refused."""

    line_length_limit = 1 << 20  # tests look at how long the lines are

    def __init__(self, sink: Sink) -> None:
        super().__init__(
            self,
            data_size_limit=None,
            enable_SMTPUTF8=True,
            hostname="sink.example.net",
            ident="ESMTP",
            tls_context=sink.tls,
            timeout=2 * PATIENCE,
            auth_required=sink.required,
            auth_require_tls=not sink.in_clear,
            authenticator=self._authenticate_user,
            loop=sink._loop,
        )
        self.sink = sink
        self._user = ""
        self._mail: tuple[str, tuple[str, ...]] | None = None
        self._recipients: list[tuple[str, tuple[str, ...]]] = []
        self.command_size_limits = collections.defaultdict(lambda: 1 << 14)
        self._smtp_methods = {name: self._with_replies(name, method) for name, method in self._smtp_methods.items()}

    def _with_replies(self, name: str, method: Callable[[str | None], Awaitable[None]]) -> Callable[..., Any]:
        async def run(argument: str | None) -> None:
            self.sink.commands.append(name if argument is None else f"{name} {argument}")
            if not await self._has_replied(name.lower()):
                await method(argument)

        return run

    async def _has_replied(self, point: str) -> bool:
        """Waits, or replies, where a test has said so."""
        while point in self.sink.hold and not self.sink.hold[point].is_set():
            await asyncio.sleep(0.005)
        if point not in self.sink.replies:
            return False
        reply = self.sink.replies[point]
        if reply:
            await self.push(reply)
        if reply[:3] in {"", "421"}:
            self._hang_up()
        return True

    def _hang_up(self) -> None:
        assert self.transport is not None
        self.transport.close()
        raise asyncio.CancelledError

    async def _handle_client(self) -> None:
        if await self._has_replied("connect"):
            self._hang_up()
        await super()._handle_client()

    def _create_envelope(self) -> Envelope:
        self._mail, self._recipients = None, []
        return Envelope()

    def _authenticate_user(
        self, server: SMTP, session: Session, envelope: Envelope, mechanism: str, data: LoginPassword
    ) -> AuthResult:
        name, password = data.login.decode(), data.password.decode()
        if self.sink.users.get(name) != password:
            return AuthResult(success=False, handled=False)
        self._user = name
        return AuthResult(success=True)

    async def handle_EHLO(  # noqa: N802
        self, server: SMTP, session: Session, envelope: Envelope, hostname: str, responses: list[str]
    ) -> list[str]:
        """What is announced."""
        session.host_name = hostname
        lines = [responses[0][4:], *(name for name in EXTENSIONS if name in self.sink.extensions)]
        if self.sink.tls and not session.ssl and "STARTTLS" in self.sink.extensions:
            lines.append("STARTTLS")
        if self.sink.users and (session.ssl or self.sink.in_clear) and "AUTH" in self.sink.extensions:
            lines.append(f"AUTH {' '.join(self.sink.mechanisms)}")
        return [f"250-{line}" for line in lines[:-1]] + [f"250 {lines[-1]}"]

    async def smtp_MAIL(self, arg: str | None) -> None:  # noqa: N802
        if await self.check_helo_needed() or await self.check_auth_needed("MAIL"):
            return
        parsed = self._path(arg or "", "FROM:", MAIL_OPTIONS)
        if isinstance(parsed, str):
            await self.push(parsed)
        elif self._mail is not None:
            await self.push("503 5.5.1 Nested MAIL")
        elif not parsed[0].isascii() and "SMTPUTF8" not in parsed[1]:
            await self.push("553 5.6.7 Not without SMTPUTF8")
        else:
            self._mail = parsed
            await self.push("250 2.1.0 Ok")

    async def smtp_RCPT(self, arg: str | None) -> None:  # noqa: N802
        assert self.envelope is not None
        parsed = self._path(arg or "", "TO:", RCPT_OPTIONS)
        if isinstance(parsed, str):
            await self.push(parsed)
        elif self._mail is None:
            await self.push("503 5.5.1 No MAIL before")
        elif not parsed[0].isascii() and "SMTPUTF8" not in self._mail[1]:
            await self.push("553 5.6.7 Not without SMTPUTF8")
        elif parsed[0] in self.sink.refuse:
            await self.push(self.sink.refuse[parsed[0]])
        else:
            self._recipients.append(parsed)
            self.envelope.rcpt_tos.append(parsed[0])  # DATA wants to see one
            await self.push("250 2.1.5 Ok")

    def _path(self, argument: str, keyword: str, known: Mapping[str, str]) -> tuple[str, tuple[str, ...]] | str:
        """The address and the options behind FROM: or TO:, or what is wrong with them."""
        rest = argument[len(keyword) :]
        end = rest.rfind(">")
        if argument[: len(keyword)].upper() != keyword or not rest.startswith("<") or end < 0:
            return f"501 5.5.4 Syntax: {keyword}<address>"
        if rest[end + 1 :] and not rest[end + 1 :].startswith(" "):
            return "501 5.5.4 Syntax: a blank before the options"
        options = tuple(rest[end + 1 :].split())
        for option in options:
            if known.get(option.partition("=")[0].upper(), "?") not in self.sink.extensions:
                return f"555 5.5.4 {option} is not known"
        return rest[1:end], options

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:  # noqa: N802
        """Keeps the message, unless the reply has been said to be another."""
        assert self._mail is not None
        assert envelope.original_content is not None
        reply = self.sink.replies.get("message", "250 2.0.0 Ok")
        if reply.startswith("2"):
            paths, options = zip(*self._recipients)
            mail = Mail(*self._mail, paths, options, envelope.original_content, bool(session.ssl), self._user)
            self.sink.mails.append(mail)
        await self._wait_for_message_reply(reply)
        return reply

    async def _wait_for_message_reply(self, reply: str) -> None:
        while "message" in self.sink.hold and not self.sink.hold["message"].is_set():
            await asyncio.sleep(0.005)
        if reply[:3] in {"", "421"}:
            if reply:
                await self.push(reply)
            self._hang_up()

    async def handle_exception(self, error: Exception) -> str:
        """A fault of the server, which the test is told at its end."""
        if not isinstance(error, TLSSetupException):  # the client does not like the certificate
            self.sink.faults.append(error)
        return "451 4.3.0 Fault of the sink"


@dataclass(frozen=True)
class Run:
    """A run of the script: its arguments, and what it got on its standard input."""

    arguments: tuple[str, ...]
    octets: bytes


SENDMAIL = """\
#!/bin/sh
# Keeps what sendmail(8) would send, each run in a folder of its own.
cd '{folder}' || exit 75
number=0
until mkdir "runs/$number" 2>/dev/null; do
    number=$((number + 1))
done
printf '%s\\0' "$@" >"runs/$number/arguments"
cat >"runs/$number/octets"
: >"runs/$number/complete"
while [ -e hold ]; do
    sleep 0.02
done
for last; do :; done
cat words >&2
[ ! -e "status-$last" ] || exit "$(cat "status-$last")"
exit "$(cat status)"
"""


class SendmailScript:
    """A program to be named by the option sendmail, in a scratch folder of the site.

    It runs as whom lmtpd runs as. Whatever came, it exits with that status, having written the words to its standard
    error; as long as it is held it does not.
    """

    def __init__(self, site: Site, status: int = 0, words: str = "") -> None:
        self.folder = site.root / "sendmail"
        for folder in (self.folder, self.folder / "runs"):
            folder.mkdir()
            site.give(folder)
        self.path = self.folder / "sendmail"
        self.path.write_text(SENDMAIL.format(folder=self.folder))
        self.path.chmod(0o755)
        self.exit_with(status, words=words)

    def exit_with(self, status: int, recipient: str = "", words: str = "") -> None:
        """Makes the script exit so from now on, or for that recipient alone."""
        (self.folder / (f"status-{recipient}" if recipient else "status")).write_text(str(status))
        (self.folder / "words").write_text(words)

    def hold(self) -> None:
        """Keeps the script from ending once it has read the message."""
        (self.folder / "hold").touch()

    def release(self) -> None:
        """Lets it end."""
        (self.folder / "hold").unlink(missing_ok=True)

    @property
    def runs(self) -> list[Run]:
        """The runs that have read their message, in the order in which they began."""
        found = (path.parent for path in self.folder.glob("runs/*/complete"))
        return [self._run(path) for path in sorted(found, key=lambda path: int(path.name))]

    @staticmethod
    def _run(folder: Path) -> Run:
        arguments = (folder / "arguments").read_bytes().decode().split("\0")
        return Run(tuple(arguments[:-1]), (folder / "octets").read_bytes())

    def wait(self, number: int) -> list[Run]:
        """The runs, as soon as there are so many."""
        wait_for(lambda: len(self.runs) >= number, f"{number} runs of sendmail")
        return self.runs
