"""Whole sessions: what a client sends, in plaintext and by TLS, through ConnectionHandler into a real store.

An input is a digit for the scene, a character for how the octets arrive, and what the client sends. From the first
octets of a TLS record on, 0x16 0x03 0x01, the client sends the rest by TLS, if the server has agreed to STARTTLS.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import socket
import ssl
import struct
import subprocess
import termios
import time
import types
from base64 import b64encode
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import ClassVar, NamedTuple
from unittest import mock

from argon2 import PasswordHasher
from authority import Authority
from fuzz_target import Target, forget_records, log_into, scratch_folder
from harness import Site, config_of, wait_for
from scramp import ScramClient, ScramMechanism
from test_fuzz import BEGIN, CORPUS, DICTIONARY, Model

import lmtpd

TLS_START = b"\x16\x03\x01"
READ_SIZES = (65536, 1, 2, 7, 100, 3, 1000, 4096)
USERS = ("jane", "joe", "full", "shared", "../outside")
TROUBLE = ("internal-error", "traceback", "delivery-failed", "spooling-failed", "identity-not-restored")
OWN_FILES = ("maildirfolder", "maildirsize", "subscriptions", "courierimapsubscribed", "dovecot-keywords")
PASSWORD = "secret"
CLIENT_NONCE, SERVER_NONCE = "rOprNGfwEbeRWgbNEkqO", "hvYDpWUa2RaTCAfuxFIlj"
PROXY_HEADERS = [
    b"PROXY TCP4 192.0.2.1 192.0.2.2 50000 24\r\n",
    b"PROXY TCP6 2001:db8::1 2001:db8::2 50000 24\r\n",
    b"PROXY UNKNOWN\r\n",
    lmtpd.PROXY_V2_SIGNATURE + b"\x20\x00\x00\x00",
    lmtpd.PROXY_V2_SIGNATURE + b"\x21\x11\x00\x0c\xc0\x00\x02\x01\xc0\x00\x02\x02\xc3\x50\x00\x18",
    lmtpd.PROXY_V2_SIGNATURE + b"\x21\x21\x00\x24" + bytes(32) + b"\xc3\x50\x00\x18",
    lmtpd.PROXY_V2_SIGNATURE + b"\x21\x31\x00\xd8" + bytes(216),
]
SCRIPT = """
require ["fileinto", "mailbox", "copy", "imap4flags", "reject", "editheader", "variables", "body", "duplicate", "mime"];
if header :contains "subject" "reject" { reject "no"; }
elsif header :contains "subject" "discard" { discard; }
elsif header :contains "subject" "twice" { fileinto :create "a/b"; keep :flags "\\\\Seen"; }
elsif header :matches "subject" "file *" { fileinto :create "${1}"; }
elsif body :contains "edit" { addheader "X-Edited" "yes"; deleteheader "received"; }
elsif duplicate { fileinto :create "twice"; }
"""


class Stream(Model):
    """What a client expects on one stream: that before TLS, or that within it.

    codes: of the replies to data.
    """

    def __init__(self, sent: bytes, answers: bytes, on_socket: bool, codes: tuple[bytes, ...]) -> None:
        super().__init__(sent, answers, on_socket)
        self.has_tls = False
        self._codes = codes

    def _step(self, line: bytes, reply: bytes) -> bool:
        if line[:8].upper() == b"STARTTLS" and reply.startswith(b"220"):
            self.has_tls = True
            return False
        return super()._step(line, reply)

    def _bdat(self, line: bytes, reply: bytes) -> bool:
        if reply.startswith(b"530"):
            self._sent = self._sent[int(line.split()[1]) :]
            return True
        return super()._bdat(line, reply)

    def _end_of_message(self, message: bytes, reply: bytes) -> None:
        for recipient in range(self._recipients):
            reply = self._next() if recipient else reply
            assert reply[:3] in self._codes, reply
            if reply.startswith(b"250"):
                self.stored.append(message)
        self._reset()


class Client:
    """The client at the other end of a socket. It acts when the server waits for it, so one thread is enough.

    It sends all that is plaintext, then, if there is a secret and the server has agreed, that by TLS. Then it leaves.
    answers, secret_answers: what the server has said.
    """

    def __init__(
        self, ours: socket.socket, theirs: socket.socket, sent: bytes, secret: bytes | None, context: ssl.SSLContext
    ) -> None:
        self._sock, self._theirs, self._to_send, self._secret = ours, theirs, sent, secret
        self.answers, self.secret_answers = b"", b""
        self.has_tls = False
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing) if secret is not None else None
        self._begun = self._left = False
        ours.setblocking(False)

    def act(self) -> None:
        """Does what there is to do, unless the server has something to read."""
        self.receive()
        if self._left or self._unread():
            return
        data = self._next()
        try:
            if data:
                self._sock.sendall(data)
                return
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # the server has left
        self._left = True

    def receive(self) -> None:
        """Takes what has come from the server."""
        try:
            while data := self._sock.recv(1 << 20):
                if self._begun:
                    self._incoming.write(data)
                else:
                    self.answers += data
        except OSError:
            pass  # nothing more has come, or the server has left
        if self.has_tls and self._tls:
            try:
                while data := self._tls.read(1 << 20):
                    self.secret_answers += data
            except ssl.SSLError:
                pass

    def _unread(self) -> int:
        return int.from_bytes(fcntl.ioctl(self._theirs, termios.FIONREAD, bytes(4)), "little")

    def _next(self) -> bytes:
        if self._to_send:
            data, self._to_send = self._to_send, b""
            return data
        if not self._tls or not self.answers.rpartition(b"\r\n2")[2].startswith(b"20 2.0.0 Ready to start TLS"):
            return b""
        self._begun = True
        try:
            if not self.has_tls:
                self._tls.do_handshake()
                self.has_tls = True
                self.receive()
            if self._secret:
                self._tls.write(self._secret)
                self._secret = b""
            else:
                self._tls.unwrap()
        except ssl.SSLError:
            pass  # more has to come, or the server does not speak TLS
        return self._outgoing.read()


class DrivenWire(lmtpd.Wire):
    """A wire whose client acts whenever lmtpd waits for it."""

    client: ClassVar[Client | None] = None

    def _wait(self, poll: object, timeout: float) -> bool:
        if self.client and poll is self._readable:
            self.client.act()
        elif self.client:
            self.client.receive()
        return super()._wait(poll, timeout)  # type: ignore[arg-type]


class Kind(NamedTuple):
    """What a scene is for.

    by_tcp: whether clients come by TCP, and so are not trusted. expects_proxy: -H. has_script: whether a Sieve script
    says what becomes of messages; else each recipient with 250 has one file. header_changes: whether lmtpd changes
    fields of a message.
    """

    by_tcp: bool = False
    expects_proxy: bool = False
    has_script: bool = False
    header_changes: bool = False


class Scene:
    """A store, and lmtpd with some options before it."""

    def __init__(
        self, root: Path, log: list[str], contexts: tuple[ssl.SSLContext, ...], kind: Kind, options: dict[str, str]
    ) -> None:
        self.root, self.log, self._contexts, self._kind = root, log, contexts, kind
        self.spool, own = root / "spool", root / "lib"
        own.mkdir(parents=True)
        for user in USERS:
            for folder in ("", "tmp", "new", "cur"):
                (self.spool / user / folder).mkdir(parents=True, exist_ok=True)
        (self.spool / "full/maildirsize").write_text("10S\n10 1\n")
        (self.spool / "full/new/1.M0P0.host,S=10").write_text("0123456789")
        script = root / "default.sieve"
        if kind.has_script:
            script.write_text(SCRIPT)
        always = {
            "configdirectory": str(own),
            "partition-default": str(self.spool),
            "duplicatesuppression": "no",
            "lmtp_max_bad_commands": "0",
            "lmtp_max_idle_commands": "0",
            "sieve_default": str(script) if kind.has_script else "",
        }
        always = {name: value for name, value in always.items() if value}
        self._config = config_of(**{**always, **options})
        self._codes = (b"250", b"552", b"554", b"452", *([b"550"] if kind.has_script else []))
        self._arguments = lmtpd.Arguments({**lmtpd.NO_ARGUMENTS, "-H": kind.expects_proxy})
        self._stop = lmtpd.Stop(lmtpd.ShutdownFile(f"{root}/shutdown"))
        self._stop.wakeup.open()
        self._tls = lmtpd.load_tls_context(self._config)
        self._handler = lmtpd.ConnectionHandler(self._config, self._arguments, "lmtp", self._tls, (), self._stop)
        self.before = self.tree()

    def tree(self) -> set[str]:
        return {os.path.join(folder, name) for folder, _, files in os.walk(self.root) for name in ("", *files)}

    def check(self, sent: bytes, on_socket: bool, context: int) -> None:
        """One session. Raises AssertionError if it does not go as it should."""
        self.log.clear()
        on_socket = on_socket or self._kind.by_tcp or self._kind.expects_proxy
        has_secret = on_socket and self._tls is not None and TLS_START in sent
        clear, _, secret = sent.partition(TLS_START) if has_secret else (sent, b"", b"")
        try:
            if on_socket:
                answers, secret_answers = self._on_socket(clear, secret if has_secret else None, context)
            else:
                answers, secret_answers = self._on_files(clear), None
            self._check_log()
            stored = self._check_answers(clear, answers, on_socket, secret, secret_answers)
            self._check_store(stored, self.tree())
        finally:
            self._clear()

    def _on_files(self, sent: bytes) -> bytes:
        source, sink = os.memfd_create("sent"), os.memfd_create("answers")
        try:
            os.write(source, sent)
            os.lseek(source, 0, os.SEEK_SET)
            self._serve(source, sink, lmtpd.Peer("standard input"))
            return os.pread(sink, 1 << 24, 0)
        finally:
            os.close(source)
            os.close(sink)

    def _on_socket(self, sent: bytes, secret: bytes | None, context: int) -> tuple[bytes, bytes | None]:
        ours, theirs = tcp_pair() if self._kind.by_tcp else socket.socketpair()
        with ours, theirs:
            client = Client(ours, theirs, sent, secret, self._contexts[context])
            with mock.patch.object(DrivenWire, "client", client):
                self._serve(theirs.fileno(), theirs.fileno(), lmtpd.Peer.of_socket(theirs))
            client.receive()
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # leaves no TIME_WAIT
            return client.answers, client.secret_answers if client.has_tls else None

    def _serve(self, source: int, sink: int, peer: lmtpd.Peer) -> None:
        kept = os.dup(0), os.dup(1)
        os.dup2(source, 0)
        os.dup2(sink, 1)
        try:
            self._handler.serve(peer)
        finally:
            for number, fd in enumerate(kept):
                os.dup2(fd, number)
                os.close(fd)

    def _check_log(self) -> None:
        for line in self.log:
            assert line.isascii(), line
            assert line.isprintable(), line
            assert not line.startswith(TROUBLE), self.log

    def _check_answers(
        self, sent: bytes, answers: bytes, on_socket: bool, secret: bytes, secret_answers: bytes | None
    ) -> list[bytes]:
        """The messages that were answered 250."""
        if self._kind.expects_proxy:
            rest = after_proxy_header(sent)
            if not answers:
                assert self.log[0].startswith("connection-refused"), self.log
                return []
            assert rest is not None, "a PROXY header that is none was taken"
            sent = rest
        stream = Stream(sent, answers, on_socket, self._codes)
        stream.check()
        if secret_answers is None:
            return stream.stored
        assert stream.has_tls
        greeting = b"220 Ready\r\n"  # within TLS there is none
        within = Stream(secret, greeting + secret_answers, True, self._codes)
        within.check()
        assert not within.has_tls
        return stream.stored + within.stored

    def _check_store(self, stored: list[bytes], tree: set[str]) -> None:
        assert self.before <= tree, self.before - tree
        made = [Path(path) for path in tree - self.before if not path.endswith("/")]
        made = [path for path in made if not is_of_database(path)]
        files = [path for path in made if path.parts[-2] in ("new", "cur")]
        others = [path.name for path in made if path.parts[-2] not in ("new", "cur")]
        assert set(others) <= set(OWN_FILES), others
        assert all(str(path).startswith(f"{self.spool}/") for path in made), made
        files.sort(key=lambda path: int(path.name.partition("Q")[2].partition(".")[0]))
        if not self._kind.has_script:
            assert len(files) == len(stored), (files, stored)
        for number, path in enumerate(files):
            octets = path.read_bytes()
            size = re.search(r",S=(\d+)", path.name)
            assert size, path
            assert int(size[1]) == len(octets), path
            candidates = stored if self._kind.has_script else stored[number : number + 1]
            assert any(is_whole(octets, message, self._kind.header_changes) for message in candidates), (octets, stored)

    def _clear(self) -> None:
        made = {path for path in self.tree() - self.before if not is_of_database(Path(path))}
        for path in made:
            if not path.endswith("/"):
                os.unlink(path)
        for path in made:
            shutil.rmtree(path, ignore_errors=True)
        if self._kind.has_script:
            forget_records(self.root / "lib/deliver.db")


def is_whole(octets: bytes, message: bytes, header_changes: bool) -> bool:
    """Whether the file has all of the message, save fields that are taken out or changed."""
    if header_changes or b"return-path" in message.lower():
        message = message.partition(b"\n\n")[2]
    return octets.endswith(message)


def is_of_database(path: Path) -> bool:
    return path.name.startswith("deliver.db")


def after_proxy_header(sent: bytes) -> bytes | None:
    """What follows a PROXY header; None if there is none."""
    if sent.startswith(lmtpd.PROXY_V2_SIGNATURE):
        end = 16 + int.from_bytes(sent[14:16], "big")
        return sent[end:] if len(sent) >= max(end, 16) else None
    line, eol, rest = sent.partition(b"\r\n")
    return rest if eol and line.startswith(b"PROXY ") else None


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """The two ends of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        return ours, listener.accept()[0]


def encoded(text: str) -> bytes:
    return b64encode(text.encode())


def scram_commands(name: str, user: str, password: str, authenticates: tuple[bytes, int]) -> bytes:
    """AUTH with SCRAM as a client sends it that knows the server's nonce before."""
    salt, iterations = authenticates
    client = ScramClient([name], user, password, c_nonce=CLIENT_NONCE)
    first = client.get_client_first()
    server_first = f"r={CLIENT_NONCE}{SERVER_NONCE},s={b64encode(salt).decode()},i={iterations}"
    client.set_server_first(server_first)
    return b"AUTH %s %s\r\n%s\r\n\r\n" % (name.encode(), encoded(first), encoded(client.get_client_final()))


@contextmanager
def saslauthd(folder: Path) -> Iterator[str]:
    """A saslauthd(8) that knows the user a, in a mount namespace of its own; the path of its socket."""
    crypted = subprocess.run(
        ["openssl", "passwd", "-1", "-salt", "saltsalt", PASSWORD], capture_output=True, text=True, check=True
    ).stdout.strip()
    folder.mkdir()
    passwd = folder / "passwd"
    passwd.write_text(Path("/etc/passwd").read_text() + f"a:{crypted}:60001:60001::/:/bin/false\n")
    run = f'mount --bind "{passwd}" /etc/passwd && exec saslauthd -d -a getpwent -n 1 -m "{folder}"'
    process = subprocess.Popen(["unshare", "--mount", "sh", "-c", run], stderr=subprocess.DEVNULL)
    try:
        wait_for((folder / "mux").exists, "saslauthd")
        yield str(folder / "mux")
    finally:
        process.kill()
        process.wait()


class Sessions(Target):
    """Whole sessions, on sockets and files, with AUTH, STARTTLS, PROXY headers and Sieve."""

    name = "session"
    token = re.compile(rb"[A-Za-z0-9]+|\r\n|[^A-Za-z0-9\r\n]")
    unit = re.compile(rb"[^\n]*\n?")
    inner_words = (
        *(b",", b"=", b"\0", b"n,,", b"y,,", b"p=tls-unique,,", b"p=x,,", b"n,a=b,", b"m=x,", b"r=", b"c=biws,", b"p="),
        *(b"a", b"b", b"n=a", b"n==2C", b"=3D", "é".encode(), "\u00ad".encode(), "\u0661".encode(), b"\xff", b"secret"),
    )

    def __init__(self) -> None:
        self._log: list[str] = []
        with ExitStack() as stack:
            self._root = scratch_folder(stack)
            self._scenes = self._make_scenes(stack)
            stack.enter_context(mock.patch.object(lmtpd, "Wire", DrivenWire))
            clock = types.ModuleType("time")
            clock.__dict__.update({**vars(time), "sleep": lambda _: None})
            stack.enter_context(mock.patch.object(lmtpd, "time", clock))
            log_into(self._log, stack)
            make_server = ScramMechanism.make_server
            stack.enter_context(
                mock.patch.object(
                    ScramMechanism,
                    "make_server",
                    lambda self, verifier, binding: make_server(self, verifier, binding, SERVER_NONCE),
                )
            )
            self._stack = stack.pop_all()

    def _make_scenes(self, stack: ExitStack) -> list[Scene]:
        passwords = self._root / "passwords"
        lines, self._scram = [f"c:{PasswordHasher(1, 8, 1).hash(PASSWORD)}\n"], {}
        for user, name in (("a", "SCRAM-SHA-256"), ("b", "SCRAM-SHA-1")):
            salt, *keys, iterations = ScramMechanism(name).make_auth_info(
                PASSWORD, iteration_count=4096, salt=b"0123456789ab"
            )
            self._scram[name] = salt, iterations
            values = ",".join(b64encode(key).decode() for key in (salt, *keys))
            lines.append(f"{user}:{{{name}}}{iterations},{values}\n")
        passwords.write_text("".join(lines))
        passwords.chmod(0o600)
        site = Site()
        stack.callback(site.close)
        authority = Authority(site)
        server, key = authority.sign("mx.example.com")
        certificate = authority.sign("a")
        tls = {
            "allowstarttls": "yes",
            "tls_server_cert": str(server),
            "tls_server_key": str(key),
            "tls_client_ca_file": str(authority.file),
        }
        contexts = []
        for version in (ssl.TLSVersion.TLSv1_3, ssl.TLSVersion.TLSv1_2):
            for has_certificate in (False, True):
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
                context.maximum_version = version
                if has_certificate:
                    context.load_cert_chain(*certificate)
                contexts.append(context)
        by_file = {"sasl_pwcheck_method": "file", "sasl_password_file": str(passwords), "admins": "a b c"}
        by_saslauthd = {
            "sasl_pwcheck_method": "saslauthd",
            "sasl_saslauthd_path": stack.enter_context(saslauthd(self._root / "saslauthd")),
            "admins": "a",
        }
        scenes: list[tuple[Kind, dict[str, str]]] = [
            (Kind(), {}),
            (
                Kind(),
                {
                    "autocreate_post": "yes",
                    "maxmessagesize": "2000",
                    "virtdomains": "userid",
                    "lmtp_detail_create": "yes",
                    "lmtp_delivered_to": "yes",
                    "lmtp_fuzzy_mailbox_match": "yes",
                },
            ),
            (
                Kind(),
                {
                    "lmtp_max_bad_commands": "2",
                    "lmtp_max_idle_commands": "4",
                    "lmtp_max_recipients": "2",
                    "chatty": "yes",
                    "debug": "yes",
                    "reject8bit": "yes",
                },
            ),
            (Kind(by_tcp=True), {"allowplaintext": "yes", **by_file}),
            (Kind(by_tcp=True), {"allowplaintext": "yes", "soft_noauth": "no", **by_saslauthd}),
            (Kind(by_tcp=True), {"tls_required": "yes", **tls, **by_file}),
            (Kind(expects_proxy=True), {**tls, **by_file}),
            (Kind(has_script=True, header_changes=True), {"duplicatesuppression": "yes"}),
            (
                Kind(header_changes=True),
                {
                    "munge8bit": "yes",
                    "lmtp_strict_rfc2821": "no",
                    "unixhierarchysep": "no",
                    "postuser": "bb",
                    "lmtp_catchall_mailbox": "jane",
                    "lmtp_strict_quota": "yes",
                    "virtdomains": "on",
                    "defaultdomain": "example.com",
                    "recipient_delimiter": "+-",
                    "default_quota": "1000",
                    "shared_maildir": str(self._root / "8/spool/shared"),
                },
            ),
        ]
        return [
            Scene(self._root / str(number), self._log, tuple(contexts), kind, options)
            for number, (kind, options) in enumerate(scenes)
        ]

    def __call__(self, data: bytes) -> None:
        if len(data) < 2:
            return
        scene, options = self._scenes[(data[0] - ord("0")) % len(self._scenes)], data[1] & 63
        with (
            mock.patch.object(lmtpd, "READ_SIZE", READ_SIZES[options & 7]),
            mock.patch.object(lmtpd, "MEMORY_LIMIT", 10 if options & 16 else 256 * 1024),
        ):
            lmtpd.log.debugging = False
            scene.check(data[2:], not options & 8, options >> 4 & 3)

    def close(self) -> None:
        self._stack.close()

    def seeds(self) -> Iterator[bytes]:
        mail = BEGIN + b"DATA\r\nSubject: a\r\nMessage-ID: <1@x>\r\nDate: now\r\n\r\nbody\r\n.\r\n"
        for one in CORPUS:
            yield b"0@" + one
            yield b"1@" + one
        yield b"0H" + CORPUS[1].replace(b"\r\n", b"\n")
        yield b"0P" + CORPUS[1]
        yield b"2@" + b"LHLO a\r\nVRFY a\r\nHELP\r\nNOOP\r\nRSET\r\n" + mail
        plain = b"AUTH PLAIN %s\r\n"
        for user in "abc":
            yield b"3@LHLO x\r\n" + plain % encoded(f"\0{user}\0{PASSWORD}") + mail + b"QUIT\r\n"
        yield b"3@AUTH LOGIN\r\n%s\r\n%s\r\n" % (encoded("a"), encoded(PASSWORD)) + mail
        yield b"3@AUTH PLAIN\r\n%s\r\n" % encoded(f"a\0a\0{PASSWORD}") + mail
        for name, user in (("SCRAM-SHA-256", "a"), ("SCRAM-SHA-1", "b")):
            yield b"3@" + scram_commands(name, user, PASSWORD, self._scram[name]) + mail
            yield b"5@STARTTLS\r\n" + TLS_START + scram_commands(name, user, PASSWORD, self._scram[name]) + mail
        yield b"4@LHLO x\r\n" + plain % encoded(f"\0a\0{PASSWORD}") + mail
        yield b"4@" + plain % encoded("\0a\0wrong") + plain % encoded("\0b\0wrong") + mail
        yield b"5@LHLO x\r\nBDAT 3 LAST\r\nabcSTARTTLS\r\n" + TLS_START + b"LHLO x\r\nAUTH EXTERNAL =\r\n" + mail
        yield b"5PLHLO x\r\nSTARTTLS\r\n" + TLS_START + b"LHLO x\r\nAUTH EXTERNAL =\r\n" + mail + b"QUIT\r\n"
        yield b"5pLHLO x\r\nSTARTTLS\r\n" + TLS_START + plain % encoded(f"\0a\0{PASSWORD}") + mail
        yield b"5ASTARTTLS\r\nLHLO injected\r\n" + TLS_START + mail
        for header in PROXY_HEADERS:
            yield b"6@" + header + plain % encoded(f"\0a\0{PASSWORD}") + mail
            yield b"6@" + header + b"STARTTLS\r\n" + TLS_START + plain % encoded(f"\0a\0{PASSWORD}") + mail
        for subject in (b"reject", b"discard", b"twice", b"file x/y", b"file ../z"):
            yield b"7@" + mail.replace(b"Subject: a", b"Subject: " + subject)
        yield b"7@" + mail + mail + mail.replace(b"body", b"edit")
        yield b"8@" + mail.replace(b"<jane>", b"<bb+shared.x>\r\nRCPT TO:<x\xff-y@EXAMPLE.com>\r\nRCPT TO:<full>")
        yield "8@LHLO \xe9\r\n".encode("latin-1") + mail.replace(b"Subject: a", b"Subject: \xe4")

    def words(self) -> list[bytes]:
        verbs = [b"%s\r\n" % verb.encode() for verb in lmtpd.Session.VERBS]
        more = [b"AUTH PLAIN ", b"AUTH LOGIN\r\n", b"AUTH SCRAM-SHA-256 ", b"AUTH EXTERNAL =\r\n", b"MAIL FROM:<>\r\n"]
        more += [b"RCPT TO:<full>\r\n", b"RCPT TO:<new+a/b>\r\n", b"RCPT TO:<postmaster>\r\n", b"IGNOREQUOTA", b"SIZE="]
        more += [b"BODY=8BITMIME", b" SMTPUTF8", b" AUTH=", TLS_START, b"Message-ID: <1@x>\r\n", b"Return-Path: "]
        short = [word for word in DICTIONARY if len(word) < 100]
        return [*short, *verbs, *more, encoded(f"\0a\0{PASSWORD}"), BEGIN, *PROXY_HEADERS[:5]]
