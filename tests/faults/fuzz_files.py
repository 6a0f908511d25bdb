"""Files that lmtpd reads, and what daemons and servers answer.

The first line of an input says what the rest is: one of KINDS. Where it is several files, lines "%%" are between them.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import smtplib
import socket
import time
import types
from base64 import b64encode
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

from fuzz_target import Target, log_into, scratch_folder, served
from harness import config_of

import lmtpd
from lmtpd import Address, Config, ConfigError, Maildir, Message

DIVISION = b"\n%%\n"
TROUBLE = ("internal-error", "traceback", "delivery-failed", "identity-not-restored")
INCLUDE = re.compile(rb"@include\s*:\s*([^\n]*)", re.IGNORECASE)
COSTLY = re.compile(rb"\d{6}")  # iterations or memory that an administrator would not want
HERE = b"<host>"  # stands for the name of this host
MAIL = b"Subject: a\n\nbody\n"
AUTH = (
    b"LHLO x\r\nAUTH PLAIN %s\r\nAUTH SCRAM-SHA-1 %s\r\n%s\r\n%s\r\nAUTH LOGIN\r\n%s\r\n%s\r\nAUTH X =\r\n*\r\n"
    % tuple(
        b64encode(word)
        for word in (b"\0a\0secret", b"n,,n=a,r=x", b"c=biws,r=xy,p=" + b64encode(bytes(20)), b"", b"a", b"secret")
    )
)
FLAGS = (["\\Seen", "a"], ["b", "A", "$Junk"], ["c"])


class Files(Target):
    """Configuration, the files of a Maildir, names of folders, and the answers of others."""

    name = "files"
    token = re.compile(rb"[A-Za-z_]+|[0-9]+|\s+|.", re.DOTALL)

    def __init__(self) -> None:
        self._log: list[str] = []
        with ExitStack() as stack:
            self._root = scratch_folder(stack)
            for name in ("lib", "spool"):
                (self._root / name).mkdir()
            self._file = self._root / "file"
            clock = types.ModuleType("time")
            clock.__dict__.update({**vars(time), "sleep": lambda _: None})
            for name, value in (("time", clock), ("LOCK_PATIENCE", 0.002), ("SUBSCRIPTIONS_PATIENCE", 0.002)):
                stack.enter_context(mock.patch.object(lmtpd, name, value))
            log_into(self._log, stack)
            self._stop = lmtpd.Stop(lmtpd.ShutdownFile(f"{self._root}/shutdown"))
            self._stop.wakeup.open()
            self._configs = [self._config(), self._config(unixhierarchysep="no")]
            sockets = {"sasl_auth_socket_path": "/x", "sasl_saslauthd_path": "/x", "userdb_socket_path": "/x"}
            admins = {"admins": "a", "allowplaintext": "yes"}
            self._servers = {
                "userdb": self._config(userdb="dovecot", **sockets),
                "auth": self._config(sasl_pwcheck_method="dovecot", **sockets, **admins),
                "saslauthd": self._config(sasl_pwcheck_method="saslauthd", **sockets, **admins),
                "passwords": self._config(sasl_pwcheck_method="file", sasl_password_file=str(self._file), **admins),
                "smtp": self._config(
                    smtp_backend="host", smtp_host="localhost:25", smtp_auth_authname="a", smtp_auth_password="b"
                ),
            }
            self._stack = stack.pop_all()

    def _config(self, **options: str) -> Config:
        always = {"configdirectory": f"{self._root}/lib", "partition-default": f"{self._root}/spool"}
        return config_of(**{**always, **options})

    def __call__(self, data: bytes) -> None:
        kind, _, rest = data.partition(b"\n")
        run = KINDS.get(kind.decode("latin-1"))
        if not run:
            return
        self._log.clear()
        run(self, rest)
        for line in self._log:
            assert line.isascii(), line
            assert line.isprintable(), line
            assert not line.startswith(TROUBLE), self._log

    def close(self) -> None:
        self._stack.close()

    # Configuration

    def configuration(self, data: bytes) -> None:
        """imapd.conf, and a file that it may include."""
        if any(name.strip() != b"included.conf" for name in INCLUDE.findall(data)):
            return
        first, _, second = data.partition(DIVISION)
        self._file.write_bytes(first)
        (self._root / "included.conf").write_bytes(second)
        for service in ("lmtp", "lmtpunix"):
            try:
                config = Config.load(str(self._file), service)
                lmtpd.DeliveryAgent(config)
            except ConfigError:
                continue
            shown = self._shown(config, service)
            (self._root / "shown").write_text(shown, "utf-8")
            again = Config.load(str(self._root / "shown"), service)
            assert self._shown(again, service) == shown

    def _shown(self, config: Config, service: str) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as shown:
            lmtpd.show_config(config, service, True)
        return shown.getvalue()

    # Maildirs

    def maildir(self, data: bytes) -> None:
        """maildirsize, dovecot-keywords, subscriptions, the lock of both, and the names of message files."""
        usage, keywords, subscriptions, lock, names, *_ = [*data.split(DIVISION), b"", b"", b"", b"", b""]
        path = self._root / "spool/jane"
        for folder in ("tmp", "new", "cur"):
            (path / folder).mkdir(parents=True)
        try:
            files = {"maildirsize": usage, "dovecot-keywords": keywords, "subscriptions": subscriptions}
            for name, octets in files.items():
                if octets:
                    (path / name).write_bytes(octets)
            for name in ("dovecot-uidlist.lock", "subscriptions.lock"):
                if lock:
                    (path / name).write_bytes(lock.replace(HERE, socket.gethostname().encode()))
                if lock.startswith(b"old"):
                    os.utime(path / name, (1, 1))
            for each in names.split(b"\n")[:20]:
                if each and b"/" not in each and b"\0" not in each and len(each) < 250 and each not in (b".", b".."):
                    (path / "cur" / os.fsdecode(each)).touch()
            self._place(path)
        finally:
            shutil.rmtree(path)

    def _place(self, path: Path) -> None:
        mailbox = Maildir(str(path), lmtpd.Identity.of_process(), self._configs[0])
        for number, flags in enumerate(FLAGS):
            folder = mailbox.new_folder("INBOX" if number < 2 else "a/b")
            with contextlib.suppress(lmtpd.MailboxFull):
                mailbox.check_quota(folder, 10, 1)
            message = Message.of(MAIL)
            try:
                placed = mailbox.place(message, folder, flags, subscribes=True)
            except OSError:  # a lock, or a file that is too large
                continue
            finally:
                message.discard()
            placed.sync()
            placed.close()
            assert Path(placed.path).read_bytes() == MAIL
            usage = mailbox.quota.usage()
            assert not usage or min(usage.used) >= 0

    def folder(self, data: bytes) -> None:
        """The name of a folder, or of its directory."""
        text = data.decode("utf-8", "replace")
        assert lmtpd.from_modified_utf7(lmtpd.to_modified_utf7(text)) == text.replace("\0", "") or "\0" in text
        lmtpd.from_modified_utf7(data.decode("latin-1"))
        assert lmtpd.to_modified_utf7(text).isascii()
        lmtpd.similar_name(text)
        for config in self._configs:
            try:
                parts = lmtpd.folder_parts(text, config)
            except ValueError:
                continue
            directory = lmtpd.folder_directory(parts)
            assert "/" not in directory
            assert directory.isprintable()
            assert len(directory) <= 255
            assert not directory or directory.strip("."), directory
            assert lmtpd.folder_name(directory) == ("/".join(parts) or "INBOX")
            assert all("/" not in each for each in lmtpd.folder_spellings(text, config)), text
            mailbox = Maildir(f"{self._root}/spool", lmtpd.Identity.of_process(), config)
            mailbox.resolve(text)

    # Servers

    def answers(self, kind: str, data: bytes, commands: bytes) -> bytes:
        """A session, in which a daemon answers that; what the client is told."""

        def connect(_path: str) -> socket.socket:
            ours, theirs = socket.socketpair()
            kept.append(theirs)
            with contextlib.suppress(OSError):
                theirs.sendall(data[:65536])
                theirs.shutdown(socket.SHUT_WR)
            return ours

        kept: list[socket.socket] = []
        config = self._servers[kind]
        try:
            with mock.patch.object(lmtpd, "connect_to_service", connect):
                answers = served(commands, config, lmtpd.DeliveryAgent(config), self._stop, kind == "userdb")
        finally:
            for sock in kept:
                sock.close()
        assert all(re.fullmatch(rb"[2-5]\d\d[ -][ -~]*\r", line) for line in answers.split(b"\n")[:-1]), answers
        return answers

    def userdb(self, data: bytes) -> None:
        """What Dovecot says of a user."""
        self.answers("userdb", data, b"MAIL FROM:<>\r\nRCPT TO:<jane>\r\nRCPT TO:<joe+a>\r\nRSET\r\n")

    def auth(self, data: bytes) -> None:
        """What Dovecot says of a client."""
        self.answers("auth", data, AUTH + b"MAIL FROM:<>\r\n")

    def saslauthd(self, data: bytes) -> None:
        """What saslauthd says of a password."""
        answers = self.answers("saslauthd", data, AUTH + b"MAIL FROM:<>\r\n")
        size = int.from_bytes(data[:2], "big")
        is_right = len(data) >= 2 + size > 2 and data.startswith(b"OK", 2)
        assert is_right or b"235 " not in answers

    def passwords(self, data: bytes) -> None:
        """The file of password verifiers."""
        if COSTLY.search(data):
            return
        self._file.write_bytes(data)
        self._file.chmod(0o600)
        self.answers("passwords", b"", AUTH + b"MAIL FROM:<>\r\n")

    def smtp(self, data: bytes) -> None:
        """What the SMTP server says that mail is sent to."""
        kept: list[socket.socket] = []

        def connect(_server: smtplib.SMTP, _host: str, _port: int, _timeout: float) -> socket.socket:
            ours, theirs = socket.socketpair()
            kept.append(theirs)
            with contextlib.suppress(OSError):
                theirs.sendall(data[:65536])
            theirs.shutdown(socket.SHUT_WR)
            return ours

        submission = lmtpd.Submission(self._servers["smtp"])
        try:
            with mock.patch.object(smtplib.SMTP, "_get_socket", connect):
                for sender, is_automatic in ((Address("a", "b"), False), (None, True), (Address("ü", "b"), False)):
                    message = Message.of(MAIL)
                    recipients = [Address("c", "d"), Address("e f", "g")]
                    with contextlib.suppress(lmtpd.NotSent):
                        submission.send(message, sender, recipients, is_automatic)
        finally:
            for sock in kept:
                sock.close()
            (self._root / "lib/smtp.backoff").unlink(missing_ok=True)

    def notice(self, data: bytes) -> None:
        """The administrator's notice to clients."""
        file = self._root / "shutdown"
        file.write_bytes(data)
        try:
            self.answers("userdb", b"", b"LHLO x\r\nMAIL FROM:<>\r\n")
        finally:
            file.unlink()

    def seeds(self) -> Iterator[bytes]:
        table = Config.table()
        known = "".join(f"{name}: {row.default}\n" for name, row in table.items() if row.default)
        always = "configdirectory: /lib\npartition-default: /spool\n"
        odd = (
            "# a\n@include: included.conf\nadmins: a \\\n  b\nlmtp_maxmessagesize: 1M\nduplicate_expiry: 1d2h\n"
            "xlist-junk: Junk\nlmtp_xlist-drafts: D\nsieve_spamtest_text_value1: x\n"
            "sql_hostnames: db1:5432 [::1]:1 db2\n"
            "duplicate_db: sql\nsql_database: x\nsql_usessl: yes\nsmtp_host: [::1]:25/noauth/tls\numask: 027\n"
            "smtp_backend: host\nmaildir_path: /home/%u/Maildir/%d%%\nuserdb: passwd\nunixhierarchysep: no\nnosuch: 1\n"
            "defaultpartition: b\npartition-b: /b\nlmtp_over_quota: 1\nsieve_spamtest_status_header: X: ([0-9.]+)\n"
        )
        yield f"config\n{always}".encode()
        for start in range(0, len(known), 1500):
            yield f"config\n{always}{known[start : start + 1500]}".encode()
        yield f"config\n{always}{odd}\n%%\nlmtp_timeout: 1\nservername: x\n".encode()
        for line in odd.splitlines():
            yield f"config\n{always}{line}\n".encode()
        for usage in ("10S,1C\n5 1\n", "1000S\n-1 -1\n10 1\n", "x", "100C\n?\n"):
            rest = "0 a\n1 $Junk\n25 c\n%%\nV\t2\n\na\tb\n%%\n1:<host>\n%%\n1.M2P3.h,S=10:2,ST\nx"
            yield f"maildir\n{usage}\n%%\n{rest}".encode()
        yield b"maildir\n\n%%\n0 a\n%%\na\n%%\nold1:x\n%%\n"
        for name in ("a/b", "INBOX", "ü/日本", "&AOk-", ".", "a.b", "../x", "&-", "a\u0301", "\U0001f600&", "/a//b/"):
            yield f"folder\n{name}".encode()
        greeting = "VERSION\t1\t2\nSPID\t1\n"
        for fields in (
            "uid=1000\tgid=1000\thome=/home/jane\tmail=maildir:~/Maildir",
            "uid=8\tgid=8\tmail_path=/x/%h\tmail_driver=maildir\tquota_storage_size=1G\tquota_message_count=10",
            "home=/x\tquota_rule=*:storage=1G:messages=10\tquota_rule2=Trash:ignore\tsieve=file:~/s;active=~/a.sieve",
            "system_groups_user=root\tuid=1\tmail_inbox_path=.\tsieve=/x/\tmail=maildir:/a:LAYOUT=fs:INBOX=b\ta=\x01t\x010",
        ):
            yield f"userdb\n{greeting}USER\t1\tjane\t{fields}\nUSER\t2\tjoe@x\t{fields}\n".encode()
        yield f"userdb\n{greeting}NOTFOUND\t1\nFAIL\t2\treason=x\n".encode()
        offer = "VERSION\t1\t2\nMECH\tPLAIN\tplaintext\nMECH\tSCRAM-SHA-1\nMECH\tX\tprivate\nCUID\t1\nCOOKIE\tx\nDONE\n"
        yield f"auth\n{offer}OK\t1\tuser=a\n".encode()
        yield f"auth\n{offer}FAIL\t1\tuser=a\ttemp\nCONT\t2\tcj14\nFAIL\t2\tcode=temp_fail\n".encode()
        yield b"saslauthd\n\0\x02OK"
        yield b"saslauthd\n\0\x0bNO authentication failed"
        key = "A" * 27 + "="
        yield f"passwords\na:{{SCRAM-SHA-1}}4096,MDEyMzQ1Njc4OWFi,{key},{key}\n".encode()
        yield f"passwords\n#x\na:$argon2id$v=19$m=8,t=1,p=1$c2FsdHNhbHQ${'A' * 43}\nb:x\n".encode()
        replies = (
            "220 x ESMTP\n250-x\n250-SIZE 100\n250-PIPELINING\n250-AUTH PLAIN LOGIN\n250-DSN\n250 SMTPUTF8\n235 ok\n"
        )
        replies += "250 ok\n250 ok\n550-5.1.1 a\n550 b\n354 go\n250 ok\n"
        yield b"smtp\n" + replies.replace("\n", "\r\n").encode()
        yield b"smtp\n421 no\r\n"
        yield b"notice\nback soon \xff\nx"

    def words(self) -> list[bytes]:
        texts = [*(f"{kind}\n" for kind in KINDS), *(f"{name}: " for name in Config.table()), "\n%%\n", "@include: "]
        texts += [
            "lmtp_",
            "yes",
            "no",
            "off",
            "K",
            "1h",
            "-1",
            "%u",
            "%h",
            "9" * 30,
            "0" * 5000,
            "\\\n",
            "&",
            "-",
            ".",
            "/",
        ]
        texts += [
            "<host>",
            "USER\t1\t",
            "FAIL\t1\t",
            "NOTFOUND\t1",
            "CONT\t1\t",
            "OK\t1\t",
            "VERSION\n",
            "MECH\n",
            "DONE\n",
            "VERSION\t",
        ]
        texts += [
            f"{name}=" for name in (*lmtpd.MAILBOX_FIELDS, "uid", "gid", "home", "mail", "sieve", "quota_rule", "user")
        ]
        texts += [
            "\x01",
            "\x010",
            "\t",
            "²",
            "٣",
            "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
            "S,",
            "C\n",
        ]
        texts += [
            "250-",
            "250 ",
            "334 ",
            "235 ",
            "550 ",
            "\r\n",
            "STARTTLS",
            "AUTH ",
            "{SCRAM-SHA-1}",
            "$argon2id$",
            ",S=",
            ":2,",
        ]
        return [text.encode() for text in texts]


KINDS = {
    "config": Files.configuration,
    "maildir": Files.maildir,
    "folder": Files.folder,
    "userdb": Files.userdb,
    "auth": Files.auth,
    "saslauthd": Files.saslauthd,
    "passwords": Files.passwords,
    "smtp": Files.smtp,
    "notice": Files.notice,
}
