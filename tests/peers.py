"""The programs lmtpd works with, each run from Debian's package in a scratch folder of its own.

The configurations at the top have the paths of an installed system. The classes below put the scratch folder's in their
place and add only what keeps an instance to itself: its own folders, a port on loopback, a log file.
"""

from __future__ import annotations

import contextlib
import imaplib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from harness import AS_ROOT, LMTPD, PATIENCE, STORE_USER, Address, Client, Site, connect, free_port, wait_for
from starters import listening

import lmtpd

PASSWORD = "secret"

POSTFIX_MAIN_CF = """\
virtual_mailbox_domains = example.com
virtual_transport = lmtp:unix:private/lmtpd
lmtpd_time_limit = 3600s
"""

POSTFIX_MASTER_CF = """\
lmtpd     unix  -       n       n       -       -       spawn
    user=mail argv=/usr/local/bin/lmtpd -C /etc/imapd.conf
"""

DOVECOT_CONF = """\
mail_location = maildir:/var/spool/imap/%n
first_valid_uid = 8
userdb {
  driver = static
  args = uid=mail gid=mail home=/var/spool/imap/%n
}
"""

# The same for Dovecot 2.4, which has other names for it.
DOVECOT_24_CONF = """\
mail_driver = maildir
mail_path = /var/spool/imap/%{user | username}
mail_inbox_path = .
first_valid_uid = 8
userdb static {
  fields {
    uid = mail
    gid = mail
    home = /var/spool/imap/%{user | username}
  }
}
"""

INETD_CONF = """\
127.0.0.1:2003 stream tcp nowait.6000 mail /usr/local/bin/lmtpd lmtpd -a -C /etc/imapd.conf
/run/lmtpd.sock stream unix nowait.6000 mail /usr/local/bin/lmtpd lmtpd -C /etc/imapd.conf
"""

AS_THE_SYSTEMS = """\
for file in main.cf master.cf; do
    mount --bind "$1/$file" "/etc/postfix/$file"
done
shift
exec "$@"
"""

P = TypeVar("P", bound="Peer")
L = TypeVar("L", bound="Listener")


class PeerError(AssertionError):
    """A peer could not be started, or did not do its part; its log says why."""


def answers(address: Address) -> bool:
    """Whether somebody listens there."""
    try:
        connect(address).close()
    except OSError:
        return False
    return True


def program(name: str) -> str:
    """The path of a program, looked for where daemons are, too."""
    path = shutil.which(name, path=f"{os.environ['PATH']}:/usr/local/sbin:/usr/sbin:/sbin")
    if path is None:
        raise PeerError(f"{name} is not installed: tests/run installs what the tests need")
    return path


def programs_running(path: str) -> list[str]:
    """The ids of the processes that have this path, of a program or a script, in their command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if path.encode() in (process / "cmdline").read_bytes().split(b"\0"):
                found.append(process.name)
    return found


def unpacked(name: str) -> Path:
    """The folder that need_cyrus or need_exim of tests/setup.sh has unpacked a program in."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", f"lmtpd-tests-{name}")
    if not folder.is_dir():
        raise PeerError(f"{folder} is missing: tests/run unpacks it (need_{name} in tests/setup.sh)")
    return folder


def libraries(root: Path) -> str:
    """The LD_LIBRARY_PATH for a program that was unpacked there."""
    return ":".join(sorted({str(library.parent) for library in root.rglob("*.so.*")}))


def reachable(path: Path) -> bool:
    """Whether the store's owner, too, gets to path: a tree below /root is closed to him."""
    return all(parent.stat().st_mode & 0o001 for place in (path.absolute(), path.resolve()) for parent in place.parents)


def for_others(root: Path, folder: Path) -> Path:
    """An unpacked program that the store's owner, too, gets to: itself, or a copy in that folder."""
    return root if reachable(root) else Path(shutil.copytree(root, folder / "program", symlinks=True))


def python_for_others() -> str:
    """A Python that the store's owner can run: the tests' own, or else Debian's."""
    for python in (Path(sys.executable), Path("/usr/bin/python3")):
        if python.exists() and reachable(python):
            return str(python)
    raise PeerError(f"{STORE_USER} can run neither {sys.executable} nor /usr/bin/python3")


def lmtpd_for_others(site: Site) -> str:
    """A path of lmtpd that the store's owner can run, for starters that become him first."""
    if reachable(Path(LMTPD)) and reachable(Path(sys.executable)):
        return LMTPD
    folder = site.root / "program"
    if not folder.exists():
        folder.mkdir()
        for library in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
            for name in ("lmtpd.py", "docopt.py", "systemd"):
                source = Path(library) / name
                if source.is_dir():
                    shutil.copytree(source, folder / name)
                elif source.exists():
                    shutil.copy(source, folder)
        start = f"import sys\nsys.path.insert(0, {str(folder)!r})\nimport lmtpd\nsys.exit(lmtpd.main())\n"
        (folder / "lmtpd").write_text(f"#!{python_for_others()}\n{start}")
        (folder / "lmtpd").chmod(0o755)
        subprocess.run([python_for_others(), "-m", "compileall", "-q", str(folder)], check=True, capture_output=True)
    return str(folder / "lmtpd")


def own_copy(site: Site) -> Path:
    """A command of lmtpd, in a folder with a module of its own, lmtpd.py, which a test may change."""
    installed = Path(lmtpd_for_others(site))
    folder = site.root / "copy"
    folder.mkdir()
    shutil.copy(lmtpd.__file__, folder / "lmtpd.py")
    start = installed.read_text().splitlines(keepends=True)
    place = next(number for number, line in enumerate(start) if "import lmtpd" in line or "from lmtpd" in line)
    start[place:place] = [f"import sys\nsys.path.insert(0, {str(folder)!r})\n"]
    command = folder / "lmtpd"
    command.write_text("".join(start))
    command.chmod(0o755)
    return command


def recipe(text: str, site: Site, **paths: str) -> str:
    """A configuration from above, with this site's paths and its owner in place of an installed system's."""
    replacements = {
        "/usr/local/bin/lmtpd": lmtpd_for_others(site),
        "/etc/imapd.conf": str(site.conf),
        "/var/spool/imap": str(site.spool),
        **paths,
    }
    for old, new in replacements.items():
        text = text.replace(old, new)
    return text


def smtp_source(address: Address, *options: str, to: str = "jane@example.com") -> subprocess.Popen[bytes]:
    """Starts Postfix's load generator, which reads every reply and gives up on one that is not expected."""
    if isinstance(address, str):
        place = f"unix:{address}"
    else:
        place = "inet:[{}]:{}".format(*address) if ":" in address[0] else "inet:{}:{}".format(*address)
    command = [program("smtp-source"), "-L", "-f", "sender@example.com", "-t", to, *options, place]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(load: subprocess.Popen[bytes], patience: float = PATIENCE) -> None:
    """Waits until it has sent everything."""
    try:
        said = load.communicate(timeout=patience)[1]
    finally:
        load.kill()
    assert load.returncode == 0, said


class Peer:
    """A server in the foreground, its output in a log, ended by its own process id."""

    name = ""
    process: subprocess.Popen[bytes]

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "log"

    def run(self, command: list[str], ready: Callable[[], bool], **environment: str) -> None:
        """Starts the command and waits until ready() holds."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        try:
            wait_for(lambda: self._ready(ready), f"{self.name} to start", self.log)
        except BaseException:
            self.close()
            raise

    def _ready(self, ready: Callable[[], bool]) -> bool:
        if self.process.poll() is not None:
            raise PeerError(f"{self.name} ended: {self.process.returncode}\n{self.log.read_text(errors='replace')}")
        return ready()

    def start(self) -> None:
        raise NotImplementedError

    def stop(self) -> None:
        """Asks the server to end."""
        self.process.terminate()

    def close(self) -> None:
        """Ends the server and what it started."""
        if self.process.poll() is None:
            self.stop()
            try:
                self.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()

    def __enter__(self: P) -> P:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Listener:
    """A listening socket that starts lmtpd for each connection with the socket as 0, 1 and 2, as inetd does."""

    def __init__(self, site: Site, *arguments: str, tcp: bool = False) -> None:
        self._command = site.command(*arguments)
        self._children: list[subprocess.Popen[bytes]] = []
        self._socket = socket.socket(socket.AF_INET if tcp else socket.AF_UNIX)
        self._socket.bind(("127.0.0.1", 0) if tcp else str(site.root / "listener"))
        self._socket.listen(128)
        self.address: Address = self._socket.getsockname()
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection = self._socket.accept()[0]
            except OSError:
                return
            with connection:
                self._children.append(self.start(connection))

    def start(self, connection: socket.socket) -> subprocess.Popen[bytes]:
        """Starts lmtpd on a connection."""
        fd = connection.fileno()
        return subprocess.Popen(self._command, stdin=fd, stdout=fd, stderr=fd)

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(PATIENCE)
        for child in self._children:
            try:
                child.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()

    def __enter__(self: L) -> L:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class LoggedListener(Listener):
    """A listening socket on a port, whose lmtpd writes its log to the site's, as it does to systemd's journal."""

    def __init__(self, site: Site, *arguments: str) -> None:
        self.site = site
        super().__init__(site, *arguments, tcp=True)

    @property
    def port(self) -> str:
        return str(self.address[1])

    def start(self, connection: socket.socket) -> subprocess.Popen[bytes]:
        with self.site.log.open("ab") as log:
            fd = connection.fileno()
            return subprocess.Popen(self._command, stdin=fd, stdout=fd, stderr=log, env=self.site.journal())


class Inetd(Peer):
    """inetd(8) of OpenBSD with two lines: a port on loopback and a unix socket."""

    name = "inetd"

    def __init__(self, site: Site) -> None:
        super().__init__(site.root / "inetd")
        self.address: Address = str(self.folder / "lmtpd.sock")
        self.tcp_address = ("127.0.0.1", free_port())
        self.conf = self.folder / "inetd.conf"
        self.conf.write_text(
            recipe(
                INETD_CONF,
                site,
                **{"/run/lmtpd.sock": str(self.address), "127.0.0.1:2003": f"127.0.0.1:{self.tcp_address[1]}"},
            )
        )

    def start(self) -> None:
        self.run([program("inetd"), "-i", str(self.conf)], lambda: answers_lmtp(self.address))


class SystemdSocketActivate(Peer):
    """systemd's own activation tool, which starts lmtpd as a unit with Accept=yes and StandardInput=socket does."""

    name = "systemd-socket-activate"

    def __init__(self, site: Site) -> None:
        super().__init__(site.root / "systemd")
        self.address: Address = str(self.folder / "lmtpd.sock")
        self._command = [program(self.name), "--accept", "--inetd", "-l", str(self.address), "--", *site.command()]

    def start(self) -> None:
        self.run(self._command, lambda: listening(str(self.address)))


def answers_lmtp(address: Address) -> bool:
    """Whether an LMTP server greets there. It is left with QUIT, so nothing stays behind."""
    try:
        client = Client(connect(address))
    except OSError:
        return False
    try:
        greeting = client.reply()
        client.command("QUIT")
    except OSError:
        return False
    finally:
        client.close()
    return bool(greeting)


class Postfix(Peer):
    """A whole Postfix with its own queue: takes mail on a port and delivers it as main_cf and master_cf say.

    By default it has its spawn(8) run lmtpd for example.com.
    """

    name = "Postfix"

    def __init__(self, site: Site, main_cf: str = POSTFIX_MAIN_CF, master_cf: str = POSTFIX_MASTER_CF) -> None:
        super().__init__(site.root / "postfix")
        self.address = ("127.0.0.1", free_port())
        self.conf = self.folder / "conf"
        self.queue = self.folder / "queue"
        self.data = self.folder / "data"
        for folder in (self.conf, self.queue, self.data):
            folder.mkdir()
        shutil.chown(self.data, "postfix")
        (self.conf / "main.cf").write_text(each_once(self._private_main_cf() + recipe(main_cf, site)))
        (self.conf / "master.cf").write_text(self._private_master_cf() + recipe(master_cf, site))

    def _private_main_cf(self) -> str:
        """What keeps the instance to itself."""
        return f"""\
compatibility_level = 3.6
queue_directory = {self.queue}
data_directory = {self.data}
maillog_file = {self.log}
maillog_file_prefixes = {self.folder}
myhostname = mx.example.org
mydestination =
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
mynetworks = 127.0.0.0/8
alias_maps =
minimal_backoff_time = 1s
queue_run_delay = 1s
"""

    def _private_master_cf(self) -> str:
        """The services that a message from smtpd to lmtp, and its bounce, go through."""
        return f"""\
127.0.0.1:{self.address[1]} inet n - n - - smtpd
postlog   unix-dgram n - n - 1 postlogd
pickup    unix  n - n 60 1 pickup
cleanup   unix  n - n - 0 cleanup
qmgr      unix  n - n 300 1 qmgr
rewrite   unix  - - n - - trivial-rewrite
bounce    unix  - - n - 0 bounce
defer     unix  - - n - 0 bounce
trace     unix  - - n - 0 bounce
proxymap  unix  - - n - - proxymap
anvil     unix  - - n - 1 anvil
showq     unix  n - n - - showq
scache    unix  - - n - 1 scache
retry     unix  - - n - - error
error     unix  - - n - - error
smtp      unix  - - n - - smtp
lmtp      unix  - - n - - lmtp
tlsmgr    unix  - - n 1000 1 tlsmgr
"""

    def start(self) -> None:
        self.run([program("postfix"), "-c", str(self.conf), "start-fg"], lambda: answers(self.address))

    def stop(self) -> None:
        command = [program("postfix"), "-c", str(self.conf), "stop"]
        try:
            subprocess.run(command, check=False, capture_output=True, timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            os.kill(int((self.queue / "pid/master.pid").read_text()), signal.SIGKILL)

    def queued(self) -> str:
        """The queue's listing, one JSON object for each message; empty when everything has left."""
        listing = subprocess.run(
            [program("postqueue"), "-c", str(self.conf), "-j"], check=True, capture_output=True, text=True
        )
        return listing.stdout

    @staticmethod
    def version() -> tuple[int, ...]:
        """The numbers of its version."""
        command = [program("postconf"), "-d", "-h", "mail_version"]
        shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return tuple(map(int, re.findall(r"\d+", shown)[:2]))

    def wait_until_sent(self) -> None:
        """Returns when no message is left in the queue."""
        wait_for(lambda: not self.messages(), "Postfix's queue to become empty", self.log)

    def messages(self) -> set[str]:
        """The files of the messages in the queue.

        While a message moves to another folder, the listing may miss it. Here the folders are in the order in which
        messages go through them.
        """
        names = ("maildrop", "incoming", "active", "deferred", "active", "hold", "corrupt")
        return {path.name for name in names for path in (self.queue / name).rglob("*") if path.is_file()}


class PostfixQueue(Postfix):
    """Postfix, which sends all to a port of loopback.

    around: the command in front of another one that sees this Postfix as the one of the system: /usr/sbin/sendmail puts
    mail into its queue. The bits by which its programs gain rights do not let them take another configuration.
    """

    def __init__(self, site: Site, port: int) -> None:
        elsewhere = f"default_transport = smtp:[127.0.0.1]:{port}\nsmtp_host_lookup = native\n"
        super().__init__(site, elsewhere, "")
        # The daemons must not find one that is just being written.
        self._seen = Path(shutil.copytree(self.conf, self.folder / "seen"))
        self.around = ("unshare", "--mount", "sh", "-euc", AS_THE_SYSTEMS, "sh", str(self._seen))

    def refuse(self) -> None:
        """Makes it refuse mail of this host's users for now. The file stays the same: it is mounted."""
        usual = (self.conf / "main.cf").read_text()
        (self._seen / "main.cf").write_text(each_once(usual + "authorized_submit_users = root\n"))

    def accept(self) -> None:
        (self._seen / "main.cf").write_text((self.conf / "main.cf").read_text())


def each_once(main_cf: str) -> str:
    """The settings, each with its last value only.

    Each program of Postfix warns of a setting that is there twice, postlogd too, by a message to itself: when others
    have filled its socket before, it waits for itself for ever.
    """
    settings = {
        name.strip(): value.strip() for name, _, value in (line.partition("=") for line in main_cf.splitlines())
    }
    return "".join(f"{name} = {value}\n" for name, value in settings.items() if name)


class Exim:
    """Exim, unpacked by need_exim of tests/setup.sh, with its own queue: all mail goes to a port, by LMTP.

    Debian's knows its user by name, so it runs where an account of that name seems to be, and where mx.example.com is
    this host. Nothing of it stays when it ends: nobody else sees these files in the place of the system's.
    """

    PRIVATE_FILES = 'for file in passwd group hosts; do mount --bind "$1/$file" /etc/$file; done; shift; exec "$@"'

    def __init__(self, site: Site, port: str, transport: str, authenticators: str) -> None:
        self.folder = site.root / "exim"
        self.spool = self.folder / "spool"
        self.spool.mkdir(parents=True)
        for folder in (self.folder, self.spool):
            site.give(folder)
        self._root = unpacked("exim")
        self._program = self._root / "usr/sbin/exim4"
        self._write_private_files()
        self.conf = self.folder / "conf"
        self.conf.write_text(self._conf(port) + f"{transport}begin authenticators\n{authenticators}")

    def _write_private_files(self) -> None:
        for name, line in {
            "passwd": "Debian-exim:x:64999:64999::/nonexistent:/bin/false",
            "group": "Debian-exim:x:64999:",
            "hosts": "127.0.0.1 mx.example.com",
        }.items():
            (self.folder / name).write_text(Path("/etc", name).read_text() + f"\n{line}\n")

    def _conf(self, port: str) -> str:
        """The configuration up to the transport's options."""
        return f"""\
primary_hostname = mx.example.org
exim_path = {self._program}
exim_user = {STORE_USER}
exim_group = {STORE_USER}
spool_directory = {self.spool}
log_file_path = {self.folder}/log-%s
keep_environment = LD_LIBRARY_PATH
tls_advertise_hosts =
begin routers
all:
  driver = manualroute
  route_list = * mx.example.com byname
  self = send
  transport = lmtp
begin retry
* * F,1h,1h
begin transports
lmtp:
  driver = smtp
  protocol = lmtp
  port = {port}
"""

    def send(self, message: bytes) -> str:
        """Tries once to deliver a message to jane@example.com, which stays in the queue if that fails; Exim's log."""
        self._run("-odq", "-oi", "-f", "sender@example.com", "jane@example.com", text=message.replace(b"\r\n", b"\n"))
        self._run("-qff")
        return (self.folder / "log-main").read_text()

    def _run(self, *options: str, text: bytes = b"") -> None:
        """Runs Exim, and whatever it starts, to the end."""
        private = ["unshare", "--mount", "sh", "-euc", self.PRIVATE_FILES, "sh", str(self.folder)]
        command = [*private, str(self._program), "-C", str(self.conf), *options]
        output = self.folder / "output"
        with output.open("wb") as sink:
            exim = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=sink,
                stderr=sink,
                env={**os.environ, "LD_LIBRARY_PATH": libraries(self._root)},
                start_new_session=True,
            )
        try:
            exim.communicate(text, PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(exim.pid, signal.SIGKILL)
            exim.wait()
        if exim.returncode or output.read_bytes():
            raise PeerError(f"Exim: status {exim.returncode}\n{output.read_text()}")

    def queued(self) -> list[Path]:
        """The messages in the queue."""
        return list((self.spool / "input").glob("*-H"))


def dovecot_version() -> tuple[int, ...]:
    version = subprocess.run([program("dovecot"), "--version"], check=True, capture_output=True, text=True).stdout
    return tuple(map(int, re.findall(r"\d+", version)[:3]))


def dovecot_24_head() -> str:
    """What a configuration has to begin with from Dovecot 2.4 on."""
    version = ".".join(map(str, dovecot_version()))
    return f"dovecot_config_version = {version}\ndovecot_storage_version = {version}\n"


def dovecot_users_conf(folder: Path, log: Path, databases: str) -> str:
    """A configuration of Dovecot for its authentication service alone, which tells lmtpd who the users are.

    databases: the part of it that says where the users are.
    """
    return f"""\
{"" if dovecot_version() < (2, 4) else dovecot_24_head()}\
base_dir = {folder}/run
state_dir = {folder}/run
log_path = {log}
protocols =
ssl = no
{databases}\
service auth {{
  unix_listener auth-userdb {{
    mode = 0600
    user = {STORE_USER}
  }}
}}
"""


class Dovecot(Peer):
    """Dovecot's IMAP server on the Maildirs of a site, as whose owner it reads them.

    separator: between the parts of a folder's name. public: a Maildir that everybody sees below "Public".
    storage, messages: the quota in octets and messages, kept in maildirsize; Trash does not count.
    """

    name = "Dovecot"

    def __init__(
        self, site: Site, separator: str = ".", public: Path | None = None, storage: int = 0, messages: int = 0
    ) -> None:
        super().__init__(site.root / "dovecot")
        self.separator, self.public = separator, public
        self.storage, self.messages = storage, messages
        self.address = ("127.0.0.1", free_port())
        self.conf = self.folder / "dovecot.conf"
        self.version = dovecot_version()
        old = self.version < (2, 4)
        private = self._private_conf() if old else self._private_24_conf()
        text = recipe(DOVECOT_CONF if old else DOVECOT_24_CONF, site)
        wanted = self._namespaces_conf(old) + (self._quota_conf() if old else self._quota_24_conf())
        self.conf.write_text(private + text + wanted)

    def _private_conf(self) -> str:
        """What keeps the instance to itself: folders, a port, a password for everyone."""
        return f"""\
base_dir = {self.folder}/run
state_dir = {self.folder}/run
log_path = {self.log}
protocols = imap
listen = 127.0.0.1
ssl = no
disable_plaintext_auth = no
passdb {{
  driver = static
  args = password={PASSWORD}
}}
service imap-login {{
  chroot =
  inet_listener imap {{
    port = {self.address[1]}
  }}
  inet_listener imaps {{
    port = 0
  }}
}}
"""

    def _private_24_conf(self) -> str:
        """The same in the language of Dovecot 2.4."""
        return f"""\
{dovecot_24_head()}\
base_dir = {self.folder}/run
state_dir = {self.folder}/run
log_path = {self.log}
protocols {{
  imap = yes
}}
listen = 127.0.0.1
ssl = no
auth_allow_cleartext = yes
passdb static {{
  password = {PASSWORD}
}}
service imap-login {{
  chroot =
  inet_listener imap {{
    port = {self.address[1]}
  }}
  inet_listener imaps {{
    port = 0
  }}
}}
"""

    def _namespaces_conf(self, old: bool) -> str:
        """The user's own folders, and those of everybody."""
        conf = f"namespace inbox {{\n  inbox = yes\n  separator = {self.separator}\n}}\n"
        if self.public:
            place = f"location = maildir:{self.public}" if old else f"mail_path = {self.public}"
            prefix = f"prefix = Public{self.separator}\n  separator = {self.separator}"
            conf += f"namespace public {{\n  type = public\n  {prefix}\n  {place}\n}}\n"
        return conf

    def _quota_conf(self) -> str:
        if not self.storage and not self.messages:
            return ""
        return f"""\
mail_plugins = quota
protocol imap {{
  mail_plugins = quota imap_quota
}}
plugin {{
  quota = maildir:User quota
  quota_rule = *:bytes={self.storage}:messages={self.messages}
  quota_rule2 = Trash:ignore
}}
"""

    def _quota_24_conf(self) -> str:
        if not self.storage and not self.messages:
            return ""
        return f"""\
mail_plugins = quota
protocol imap {{
  mail_plugins = quota imap_quota
}}
quota "User quota" {{
  quota_driver = maildir
}}
quota_storage_size = {self.storage} B
quota_message_count = {self.messages}
namespace inbox {{
  mailbox Trash {{
    quota_ignore = yes
  }}
}}
"""

    def start(self) -> None:
        self.run([program("dovecot"), "-F", "-c", str(self.conf)], self.is_up)

    def is_up(self) -> bool:
        """Whether all that clients connect to is there; it is not at once."""
        return answers(self.address)

    def login(self, user: str) -> imaplib.IMAP4:
        """An IMAP connection, logged in."""
        imap = imaplib.IMAP4(*self.address, timeout=PATIENCE)
        imap.login(user, PASSWORD)
        return imap

    def deliver(self, user: str, message: bytes, folder: str = "INBOX") -> None:
        """Delivers by Dovecot's own delivery agent."""
        agent = program("doveadm").replace("/bin/doveadm", "/lib/dovecot/dovecot-lda")
        command = [agent, "-c", str(self.conf), "-d", user, "-m", folder]
        done = subprocess.run(command, input=message, capture_output=True, timeout=PATIENCE)
        if done.returncode != 0:
            raise PeerError(f"dovecot-lda: {done.stderr.decode(errors='replace')}{self.log.read_text()[-2000:]}")


class CourierImap(imaplib.IMAP4):
    """A connection to an imapd that was started for it, with the user already known."""

    def __init__(self, command: list[str], **environment: str) -> None:
        self._program, self._variables = command, environment
        super().__init__()
        # It may complain before it says PREAUTH, and Python looks at the first line only.
        self.state = "AUTH"

    def _create_socket(self, timeout: float | None = None) -> socket.socket:
        ours, theirs = socket.socketpair()
        ours.settimeout(PATIENCE)
        with theirs:
            fd = theirs.fileno()
            self.process = subprocess.Popen(
                self._program, stdin=fd, stdout=fd, stderr=subprocess.DEVNULL, env=self._variables, **as_store_user()
            )
        return ours

    def shutdown(self) -> None:
        super().shutdown()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def as_store_user() -> dict[str, Any]:
    """The arguments of subprocess that make a program run as the owner of the Maildirs."""
    return {"user": STORE_USER, "group": STORE_USER, "extra_groups": []} if AS_ROOT else {}


class Courier:
    """Courier's programs, unpacked by need_courier of tests/setup.sh. Names of its folders begin with "INBOX."."""

    def __init__(self, site: Site) -> None:
        root = for_others(unpacked("courier"), site.root / "courier")
        self._programs = root / "usr/bin"
        self._settings = self._shipped_settings(root / "etc/courier/imapd")
        self._environment = {"LD_LIBRARY_PATH": libraries(root), "LC_ALL": "C.UTF-8", "PATH": os.environ["PATH"]}

    @staticmethod
    def _shipped_settings(file: Path) -> dict[str, str]:
        """What Debian's configuration says, as the script that starts imapd puts it into the environment."""
        return dict(re.findall(r'^([A-Z_]+)="?([^"$\n]*)"?$', file.read_text(), re.MULTILINE))

    def login(self, maildir: Path) -> CourierImap:
        """An IMAP connection to a Maildir."""
        # Its locks wait for a service of the desktop that is not there.
        user = {"AUTHENTICATED": maildir.name, "AUTHADDR": maildir.name, "MAILDIR": str(maildir), "IMAP_USELOCKS": "0"}
        return CourierImap(
            [str(self._programs / "imapd"), str(maildir)],
            **{**self._settings, "HOME": str(maildir.parent), **user, **self._environment},
        )

    def run(self, name: str, *arguments: str, message: bytes = b"") -> int:
        """Runs one of its programs on a message; its exit status."""
        done = subprocess.run(
            [str(self._programs / name), *arguments],
            input=message,
            capture_output=True,
            env=self._environment,
            timeout=PATIENCE,
            **as_store_user(),
        )
        return done.returncode

    def make(self, maildir: Path, folder: str = "", quota: str = "") -> None:
        """Makes a Maildir, or a folder in it ("a.b", in UTF-8), or sets its quota ("1000000S,100C")."""
        options = ["-f", folder] if folder else ["-q", quota] if quota else []
        if self.run("maildirmake.courier", *options, str(maildir)) != 0:
            raise PeerError(f"maildirmake {options} {maildir} fails")

    def deliver(self, maildir: Path, message: bytes) -> None:
        """Delivers a message, by the quota that maildirsize says."""
        if self.run("deliverquota.courier", str(maildir), message=message) != 0:
            raise PeerError(f"deliverquota {maildir} fails")


class Cyrus(Peer):
    """Cyrus' master(8) and lmtpd(8), unpacked by need_cyrus of tests/setup.sh.

    `address` is a unix socket, whose clients are trusted, `tcp_address` a port served by `lmtpd -a`. The users get
    their mailboxes, with `folders` in each, when the first mail comes; nobody else is known.
    """

    name = "Cyrus"

    def __init__(self, folder: Path, users: tuple[str, ...] = ("jane",), folders: tuple[str, ...] = (), **options: str):
        super().__init__(folder)
        self.address: Address = str(folder / "lmtp")
        self.tcp_address = ("127.0.0.1", free_port())
        self.users = users
        self._install()
        self.options = {
            "configdirectory": str(folder / "lib"),
            "partition-default": str(folder / "spool"),
            "defaultpartition": "default",
            "cyrus_user": STORE_USER,
            "servername": "mx.example.com",
            "autocreate_post": "yes",
            "autocreate_quota": "0",
            "autocreate_users": " ".join(users),
            "duplicatesuppression": "no",
            **options,
        }
        if folders:
            self.options["autocreate_inbox_folders"] = "|".join(folders)
        self._configure()

    def _install(self) -> None:
        root = for_others(unpacked("cyrus"), self.folder)
        self.programs = root / "usr/lib/cyrus/bin"
        self.libraries = libraries(root)

    def _configure(self) -> None:
        self.imapd_conf = self.folder / "imapd.conf"
        self.imapd_conf.write_text("".join(f"{name}: {value}\n" for name, value in self.options.items()))
        lmtpd = f"{self.programs}/lmtpd -C {self.imapd_conf}"
        host, port = self.tcp_address
        self.cyrus_conf = self.folder / "cyrus.conf"
        self.cyrus_conf.write_text(
            "START {\n}\nSERVICES {\n"
            f'  lmtpunix cmd="{lmtpd}" listen="{self.address}" prefork=1\n'
            f'  lmtp cmd="{lmtpd} -a" listen="{host}:{port}" prefork=0\n'
            "}\nEVENTS {\n}\n"
        )
        for path in (self.folder, *(self.folder / name for name in ("lib", "lib/socket", "lib/proc", "spool"))):
            path.mkdir(exist_ok=True)
            shutil.chown(path, STORE_USER, STORE_USER)

    def start(self) -> None:
        """Starts master(8); returns when every user has his mailboxes."""
        self.run(
            [
                *[str(self.programs / "master"), "-D", "-p", str(self.folder / "pid")],
                *["-C", str(self.imapd_conf), "-M", str(self.cyrus_conf)],
            ],
            lambda: answers_lmtp(self.address),
            LD_LIBRARY_PATH=self.libraries,
        )
        client = self.connect()
        client.hello()
        client.command("MAIL FROM:<>")
        for user in self.users:
            if not client.command(f"RCPT TO:<{user}>").startswith("250"):
                raise PeerError(f"Cyrus makes no mailbox for {user}")
        client.command("QUIT")
        client.close()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def connect(self) -> Client:
        return Client(connect(self.address))

    def messages(self, user: str) -> list[bytes]:
        """The user's stored messages, oldest first, whichever way Cyrus names his folder."""
        found = [path for path in (self.folder / "spool").rglob("[0-9]*.") if self._belongs(path, user)]
        return [path.read_bytes() for path in sorted(found, key=lambda path: int(path.name[:-1]))]

    def stored(self) -> set[Path]:
        """The files of all messages."""
        return set((self.folder / "spool").rglob("[0-9]*."))

    def place(self, message: Path) -> str:
        """The user and the folder that has a message, as Site.place has it; Cyrus says example.com!user.jane.lists."""
        header = (message.parent / "cyrus.header").read_bytes()
        found = re.search(rb' N ("[^"]*"|\S+) ', header)
        assert found is not None, header
        *domain, folder = found[1].decode().strip('"').split("!")
        _, user, *rest = (part.replace("^", ".") for part in re.split(r"[.\x1f]", folder))
        return "/".join(["@".join([user, *domain]), *rest])

    @staticmethod
    def _belongs(path: Path, user: str) -> bool:
        header = (path.parent / "cyrus.header").read_bytes()
        return f"user.{user}".encode() in header or f"user\x1f{user}".encode() in header
