"""Pigeonhole, Dovecot's Sieve, from Debian's package: the peer that our Sieve is compared with."""

from __future__ import annotations

import base64
import imaplib
import itertools
import os
import pwd
import re
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

from harness import AS_ROOT, PATIENCE, STORE_USER, Client, connect, free_port, wait_for
from peers import PASSWORD, Peer, PeerError, answers, dovecot_version, program
from sink import Mail

SEPARATOR = "/"
DOMAIN = "example.com"
FLAGS = {"D": r"\Draft", "F": r"\Flagged", "R": r"\Answered", "S": r"\Seen", "T": r"\Deleted"}
SPECIAL_USE = {"Archive": r"\Archive", "Drafts": r"\Drafts", "Junk": r"\Junk", "Sent": r"\Sent", "Trash": r"\Trash"}

# What a script may ask for, beside what is there by default.
EXTENSIONS = (
    *("+editheader", "+imapflags", "+spamtest", "+spamtestplus", "+virustest", "+vacation-seconds", "+mboxmetadata"),
    *("+servermetadata", "+special-use", "+vnd.dovecot.environment", "+enotify"),
)

# Settings of its plugin; the site of the tests has options of the same names.
SCORES = {
    "sieve_spamtest_status_type": "score",
    "sieve_spamtest_status_header": r"X-Spam-Score: (-?[[:digit:]]+\.[[:digit:]]+)",
    "sieve_spamtest_max_value": "10",
    "sieve_virustest_status_type": "text",
    "sieve_virustest_status_header": "X-Virus-Status: ([[:alpha:]]+)",
    "sieve_virustest_text_value1": "Clean",
    "sieve_virustest_text_value2": "Replaced",
    "sieve_virustest_text_value3": "Cured",
    "sieve_virustest_text_value4": "Suspect",
    "sieve_virustest_text_value5": "Infected",
}


@dataclass(frozen=True, order=True)
class Stored:
    """A message in a folder: the folder's name in UTF-8 with "/", its flags and keywords, its octets."""

    folder: str
    flags: tuple[str, ...]
    octets: bytes


@dataclass(frozen=True)
class Result:
    """What became of a case: the last reply to each delivery, what is stored, which folders are there.

    mails: what was sent.
    """

    replies: tuple[str, ...]
    stored: tuple[Stored, ...]
    folders: tuple[str, ...]
    subscribed: tuple[str, ...]
    mails: tuple[Mail, ...] = ()


def decoded(name: str) -> str:
    """The name of a folder that is in modified UTF-7 on disk."""

    def shifted(match: re.Match[str]) -> str:
        if not match[1]:
            return "&"
        text = match[1].replace(",", "/")
        return base64.b64decode(text + "=" * (-len(text) % 4)).decode("utf-16-be", "surrogatepass")

    return re.sub("&([^-]*)-", shifted, name)


def keywords_of(folder: Path) -> dict[str, str]:
    """The keyword that each letter in the names of a folder's messages stands for."""
    file = folder / "dovecot-keywords"
    if not file.exists():
        return {}
    numbered = (line.split(" ", 1) for line in file.read_text(errors="surrogateescape").splitlines())
    return {chr(ord("a") + int(number)): name for number, name in numbered}


def folders_in(maildir: Path) -> dict[str, Path]:
    """The folders of a Maildir++, by name."""
    found = {"INBOX": maildir}
    for path in maildir.glob(".*"):
        if path.is_dir():
            found[decoded(path.name[1:].replace(".", SEPARATOR))] = path
    return found


def stored_in(maildir: Path) -> tuple[Stored, ...]:
    """Everything in a Maildir++, in the order of the folders, the flags and the octets."""
    found = []
    for name, folder in folders_in(maildir).items():
        letters = {**FLAGS, **keywords_of(folder)}
        for message in itertools.chain(folder.glob("new/*"), folder.glob("cur/*")):
            flags = message.name.partition(":2,")[2]
            found.append(Stored(name, tuple(sorted(letters.get(flag, flag) for flag in flags)), message.read_bytes()))
    return tuple(sorted(found))


def result_of(maildir: Path, replies: tuple[str, ...], mails: tuple[Mail, ...] = ()) -> Result:
    """What became of a case whose user has that Maildir."""
    subscriptions = maildir / "subscriptions"
    lines = subscriptions.read_text().splitlines() if subscriptions.exists() else []
    # Dovecot's format has a line that says so, an empty one, and tabs between the parts of a name.
    names = [
        decoded(line.replace("\t", SEPARATOR).replace(".", SEPARATOR)) for line in lines if line[:2] not in {"", "V\t"}
    ]
    return Result(replies, stored_in(maildir), tuple(sorted(folders_in(maildir))), tuple(sorted(names)), mails)


class Pigeonhole(Peer):
    """Dovecot's LMTP server with its Sieve, for users that need not be known: each case takes a new one.

    settings: of its plugin section, in addition to those above. submission: where it sends mail to, by SMTP; without
    one it can send none. Scripts of the site are a user's own here, scripts/USER/before.sieve, after.sieve and
    default.sieve, so that one instance does for all cases.
    """

    name = "Pigeonhole"

    def __init__(self, folder: Path, submission: tuple[str, int] | None = None, **settings: str) -> None:
        super().__init__(folder)
        self.submission = submission
        self.mail, self.homes, self.scripts = folder / "mail", folder / "home", folder / "scripts"
        self.global_scripts = folder / "global"
        for place in (self.mail, self.homes, self.scripts, self.global_scripts):
            place.mkdir()
            self._give(place)
        self.address = f"{folder}/run/lmtp"
        self.conf = folder / "dovecot.conf"
        self.settings = {
            "sieve": "file:~/sieve;active=~/.dovecot.sieve",
            "sieve_before": f"{self.scripts}/%n/before.sieve",
            "sieve_after": f"{self.scripts}/%n/after.sieve",
            "sieve_default": f"{self.scripts}/%n/default.sieve",
            "sieve_global": str(self.global_scripts),
            "sieve_extensions": " ".join(EXTENSIONS),
            "sieve_plugins": "",
            "recipient_delimiter": "+",
            **SCORES,
            **settings,
        }
        self.conf.write_text(self._conf())
        self._client: Client | None = None

    def _give(self, path: Path) -> None:
        if AS_ROOT:
            account = pwd.getpwnam(STORE_USER)
            os.chown(path, account.pw_uid, account.pw_gid)

    def _conf(self) -> str:
        assert dovecot_version() < (2, 4), "the configuration is that of Dovecot 2.3"
        account = pwd.getpwnam(STORE_USER)
        mailboxes = "".join(
            f"  mailbox {name} {{\n    special_use = {use}\n  }}\n" for name, use in SPECIAL_USE.items()
        )
        sending = "submission_host = {}:{}".format(*self.submission or ("127.0.0.1", 1))
        plugin = "".join(f"  {name} = {value}\n" for name, value in self.settings.items() if value)
        return f"""\
base_dir = {self.folder}/run
state_dir = {self.folder}/run
log_path = {self.log}
protocols = lmtp
listen = 127.0.0.1
ssl = no
first_valid_uid = {account.pw_uid}
hostname = mx.example.com
postmaster_address = postmaster@{DOMAIN}
mail_location = maildir:{self.mail}/%n
mail_fsync = never
{sending}
recipient_delimiter = +
lmtp_save_to_detail_mailbox = yes
lda_mailbox_autocreate = yes
lda_mailbox_autosubscribe = yes
userdb {{
  driver = static
  args = uid={account.pw_uid} gid={account.pw_gid} home={self.homes}/%n allow_all_users=yes
}}
passdb {{
  driver = static
  args = nopassword=yes
}}
namespace inbox {{
  inbox = yes
  separator = {SEPARATOR}
{mailboxes}}}
protocol lmtp {{
  mail_plugins = sieve
}}
service lmtp {{
  process_min_avail = 1
}}
plugin {{
{plugin}}}
"""

    def start(self) -> None:
        self.run([program("dovecot"), "-F", "-c", str(self.conf)], self._is_up)

    def _is_up(self) -> bool:
        try:
            self._client = Client(connect(self.address))
        except OSError:
            return False
        if not self._client.hello():
            self._client.close()
            self._client = None
        return self._client is not None

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
        super().close()

    def install(self, user: str, script: str | bytes, /, **others: str | bytes) -> None:
        """Makes this the active script of a user. others: scripts of his by name, for include."""
        home = self.homes / user
        folder = home / "sieve"
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in {"active": script, **others}.items():
            (folder / f"{name}.sieve").write_bytes(text if isinstance(text, bytes) else text.encode())
        active = home / ".dovecot.sieve"
        if not active.is_symlink():
            active.symlink_to("sieve/active.sieve")
        for path in (home, folder):
            self._give(path)

    def install_site(self, user: str, **scripts: str | bytes) -> None:
        """Makes these the scripts of the site for a user: before, after, default."""
        folder = self.scripts / user
        folder.mkdir(exist_ok=True)
        self._give(folder)
        for name, text in scripts.items():
            (folder / f"{name}.sieve").write_bytes(text if isinstance(text, bytes) else text.encode())

    def deliver(self, user: str, message: bytes, sender: str = "sender@example.org", detail: str = "") -> str:
        """Delivers a message with CR LF line ends; the reply to it, "" when the process has died of it."""
        address = f"{user}+{detail}@{DOMAIN}" if detail else f"{user}@{DOMAIN}"
        if self._client is None:
            wait_for(self._is_up, "another process of Pigeonhole", self.log)
        assert self._client is not None
        [reply] = self._client.deliver(message, address, sender=sender)
        if not reply:
            self._client.close()
            self._client = None
        return reply

    def result(self, user: str, *replies: str) -> Result:
        """What has become of everything that was delivered to a user."""
        return result_of(self.mail / user, replies)

    def complaints(self, user: str) -> str:
        """What it has written for the user about his script."""
        file = self.homes / user / ".dovecot.sieve.log"
        return file.read_text(errors="replace") if file.exists() else ""

    def forget(self, user: str) -> None:
        """Removes what belongs to a user."""
        for place in (self.mail, self.homes, self.scripts):
            shutil.rmtree(place / user, ignore_errors=True)


class ManageSieve(Peer):
    """Dovecot's IMAP and ManageSieve servers, for users with homes of their own, of whom lmtpd learns from it.

    users: their names, each with the extra fields of the user database. Each has an account and a home of his own, the
    mail in ~/Maildir. Several services read the users' file, and each would notice a change at a time of its own.
    """

    name = "ManageSieve"
    FIRST_UID = 21001

    def __init__(self, folder: Path, **users: str) -> None:
        super().__init__(folder)
        self.imap_address = ("127.0.0.1", free_port())
        self.address = ("127.0.0.1", free_port())
        self.socket = folder / "run/auth-userdb"
        self.homes = folder / "home"
        self.homes.mkdir()
        self.conf = folder / "dovecot.conf"
        lines = []
        for uid, (user, fields) in enumerate(users.items(), self.FIRST_UID):
            home = self.homes / user
            home.mkdir(mode=0o700)
            os.chown(home, uid, uid)
            lines.append(f"{user}:{{PLAIN}}{PASSWORD}:{uid}:{uid}::{home}::{fields}\n")
        (folder / "users").write_text("".join(lines))
        self.conf.write_text(self._conf())

    def _conf(self) -> str:
        assert dovecot_version() < (2, 4), "the configuration is that of Dovecot 2.3"
        return f"""\
base_dir = {self.folder}/run
state_dir = {self.folder}/run
log_path = {self.log}
protocols = imap sieve
listen = 127.0.0.1
ssl = no
disable_plaintext_auth = no
mail_location = maildir:~/Maildir
first_valid_uid = {self.FIRST_UID}
passdb {{
  driver = passwd-file
  args = {self.folder}/users
}}
userdb {{
  driver = passwd-file
  args = {self.folder}/users
}}
namespace inbox {{
  inbox = yes
  separator = {SEPARATOR}
}}
service auth {{
  unix_listener auth-userdb {{
    mode = 0600
    user = {STORE_USER}
  }}
}}
service imap-login {{
  chroot =
  inet_listener imap {{
    port = {self.imap_address[1]}
  }}
  inet_listener imaps {{
    port = 0
  }}
}}
service managesieve-login {{
  chroot =
  inet_listener sieve {{
    port = {self.address[1]}
  }}
}}
"""

    def start(self) -> None:
        self.run([program("dovecot"), "-F", "-c", str(self.conf)], self._is_up)

    def _is_up(self) -> bool:
        return answers(self.imap_address) and answers(self.address) and answers(str(self.socket))

    def stop(self) -> None:
        """Ends them all: those that have a client would go on without their master for a while."""
        os.killpg(self.process.pid, signal.SIGTERM)

    def login(self, user: str) -> imaplib.IMAP4:
        """An IMAP connection, logged in."""
        imap = imaplib.IMAP4(*self.imap_address, timeout=PATIENCE)
        imap.login(user, PASSWORD)
        return imap

    def sieve_connect(self, user: str, *command: str) -> str:
        """Runs Debian's client; what it says."""
        host, port = self.address
        place = ["--server", host, "--port", str(port), "--user", user, "--passwordfd", "0", "--clearchan"]
        done = subprocess.run(
            [program("sieve-connect"), *place, "--authmech", "PLAIN", *command],
            input=f"{PASSWORD}\n",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE,
        )
        if done.returncode != 0:
            raise PeerError(f"sieve-connect: {done.stdout}")
        return done.stdout
