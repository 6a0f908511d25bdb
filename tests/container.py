"""A booted systemd: a throw-away copy of a Debian root that need_container in setup.sh makes.

Needs root, and nothing else of the host: not that it runs systemd itself, nor any one layout of its cgroups.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

TOP = Path(__file__).parent.parent
ROOTS = Path(
    os.environ.get("LMTPD_TEST_ROOTS")
    or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "lmtpd-tests")
)
# The roots of the host's own release and of Debian 13, which may be the same.
OWN: Path = ROOTS / re.findall(r"^VERSION_CODENAME=(\w+)", Path("/etc/os-release").read_text(), re.MULTILINE)[0]
DEBIAN_13 = ROOTS / "trixie"
BOOT_PATIENCE = 90.0
STOP_PATIENCE = 60.0
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
    "HOME": "/root",
}

# What goes on around systemd-nspawn, in a mount namespace of its own, so that no mount is ever left behind:
#
# - A writable layer in memory over the cached root and other layers. (--volatile=overlay does the same, but locks the
#   root, and then two test runs could not have a machine each.) It may be kept, to be such a layer in its turn.
# - Where the host has no pure cgroup v2 at /sys/fs/cgroup (no systemd, or v1, or both as on "hybrid" hosts), one is
#   mounted there for systemd-nspawn to see. The host's own mounts and its v1 hierarchies are not touched. A
#   controller that the host has in v1 is then missing in the machine: its systemd works without, but limits such as
#   MemoryMax= are not enforced.
# - A cgroup of its own below the topmost one, since only that may hold processes and have controllers at once.
#   systemd-nspawn --keep-unit puts the machine into it.
# - SIGTERM (also when the test run dies) shuts the machine down in order; what remains is removed after it.
AROUND_NSPAWN = r"""
set -eu
lower=$1 top=$2 kept=$3; shift 3
[ "$(stat -f -c %T /sys/fs/cgroup)" = cgroup2fs ] || mount -t cgroup2 none /sys/fs/cgroup
group=/sys/fs/cgroup/lmtpd-tests-$$
mkdir "$group"
echo $$ >"$group/cgroup.procs"
mount -t tmpfs -o mode=755 none "$top"
mkdir "$top/upper" "$top/work" "$top/root"
mount -t overlay -o "lowerdir=$lower,upperdir=$top/upper,workdir=$top/work" none "$top/root"
status=0
setpriv --pdeathsig TERM systemd-nspawn --directory="$top/root" "$@" </dev/null &
nspawn=$!
trap 'kill "$nspawn"' TERM
while kill -0 "$nspawn" 2>/dev/null; do
    status=0
    wait "$nspawn" || status=$?
done
echo $$ >/sys/fs/cgroup/cgroup.procs
find "$group" -depth -type d -exec rmdir {} +
[ -z "$kept" ] || cp --archive "$top/upper/." "$kept"
exit "$status"
"""

NSPAWN_OPTIONS = [
    "--boot",
    "--register=no",
    "--keep-unit",
    "--private-network",
    # Without these its systemd leaves IPAddressDeny= and IPAddressAllow= out.
    "--capability=CAP_BPF",
    "--system-call-filter=bpf",
    "--notify-ready=yes",
    "--console=pipe",
    "--link-journal=no",
    "--resolv-conf=off",
    "--timezone=off",
]


class Machine:
    """A booted machine with its own network (loopback only), users, files and systemd.

    `root` is its root folder, as seen from the host: files can be read, written and connected to there. (An absolute
    symbolic link in it would lead to the host's files.)

    base: the root that it is a copy of. layers: folders with what other machines have changed, the uppermost first.
    kept: where to keep, after its end, what this one has changed.
    """

    def __init__(self, base: Path, *layers: Path, kept: Path | None = None, hostname: str = "mx.example.com") -> None:
        if not base.is_dir():
            raise RuntimeError(f"{base} is missing: run tests/run, or need_container of tests/setup.sh")
        # Keeps need_container of another test run from making the root anew meanwhile.
        self._lock = base.with_suffix(".lock").open("a")
        fcntl.flock(self._lock, fcntl.LOCK_SH)
        # Its name is the machine's too, and must be fit for a host name.
        self._top = Path(tempfile.gettempdir(), f"lmtpd-machine-{os.urandom(6).hex()}")
        self._top.mkdir(0o700)
        self._layers = [*map(str, layers), str(base)]
        self._kept = str(kept or "")
        self._hostname = hostname
        self.console = self._top.with_suffix(".console")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as status:
            name = f"\0{self._top.name}"
            status.bind(name)
            self._around = self._start(name.replace("\0", "@"))
            self.cgroup = f"lmtpd-tests-{self._around.pid}"
            try:
                self._leader = self._boot(status)
            except BaseException:
                self.close()
                raise
        self.root = Path(f"/proc/{self._leader}/root")

    def _start(self, notify_socket: str) -> subprocess.Popen[bytes]:
        around = ["setpriv", "--pdeathsig", "TERM", "unshare", "--mount", "sh", "-c", AROUND_NSPAWN, "sh"]
        machine = ["--machine", self._top.name, f"--hostname={self._hostname}", *NSPAWN_OPTIONS]
        with self.console.open("wb") as console:
            return subprocess.Popen(
                [*around, ":".join(self._layers), str(self._top), self._kept, *machine],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                env={**os.environ, "NOTIFY_SOCKET": notify_socket},
            )

    def _boot(self, status: socket.socket) -> int:
        """Waits until the machine says that it is up; the process id of its init."""
        leader: int | None = None
        status.settimeout(1)
        deadline = time.monotonic() + BOOT_PATIENCE
        while time.monotonic() < deadline and self._around.poll() is None:
            try:
                fields = dict(line.split("=", 1) for line in status.recv(4096).decode().splitlines())
            except socket.timeout:
                continue
            leader = int(fields.get("X_NSPAWN_LEADER_PID", leader or 0)) or None
            if fields.get("READY") == "1" and leader:
                return leader
        raise RuntimeError("The machine does not boot:\n" + self.console.read_text(errors="replace"))

    def network(self, *command: str) -> str:
        """Runs a program of the host in the machine's network namespace; what it prints."""
        inside = ["nsenter", f"--net={self.root.parent}/ns/net"]
        return subprocess.run([*inside, *command], capture_output=True, text=True, check=True).stdout

    def join(self, other: Machine) -> None:
        """Joins this machine to another one by a cable: each has an interface "lan", which is down."""
        pair = ["lan", "type", "veth", "peer", "name", "lan", "netns", other.root.parent.name]
        self.network("ip", "link", "add", *pair)

    def start(self, *command: str, **popen: Any) -> subprocess.Popen[str]:
        """A command in the machine, as root, not waited for."""
        inside = ["nsenter", "--target", str(self._leader), "--all", "--root", "--wd"]
        child: subprocess.Popen[str] = subprocess.Popen([*inside, *command], env=ENVIRONMENT, text=True, **popen)
        return child

    def run(
        self, *command: str, stdin: str = "", check: bool = True, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command in the machine, as root. With `check`, its failure is the test's."""
        child = self.start(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            out, err = child.communicate(stdin, timeout)
        finally:
            child.kill()
            child.wait()
        assert not check or child.returncode == 0, f"{command}: status {child.returncode}\n{out}{err}"
        return subprocess.CompletedProcess(command, child.returncode, out, err)

    def shell(self, script: str, timeout: float = 120) -> str:
        """Runs a shell script in the machine that stops at the first failure; what it prints."""
        return self.run("sh", "-eu", stdin=script, timeout=timeout).stdout

    def journal(self, *arguments: str) -> str:
        """The journal's messages, complete up to now."""
        self.run("journalctl", "--sync")
        return self.run("journalctl", "--no-pager", "--output=cat", *arguments).stdout

    def properties(self, unit: str, *names: str) -> dict[str, str]:
        """What `systemctl show` says of the unit."""
        shown = self.run("systemctl", "show", "--property", ",".join(names), unit).stdout
        return dict(line.split("=", 1) for line in shown.splitlines())

    def close(self) -> None:
        """Shuts the machine down; nothing of it is left."""
        self._around.terminate()
        try:
            self._around.wait(STOP_PATIENCE)
        except subprocess.TimeoutExpired:
            # Ending its init ends the machine at once.
            if hasattr(self, "_leader"):
                os.kill(self._leader, 9)
            self._around.wait(STOP_PATIENCE)
        shutil.rmtree(self._top)
        self.console.unlink()
        self._lock.close()


def readme_blocks(title: str, language: str = "sh") -> list[str]:
    """The README's blocks in that language under that heading; by default the commands."""
    section = (TOP / "README.md").read_text().partition(f"\n{title}\n")[2]
    section = re.split(r"^#+ ", section, maxsplit=1, flags=re.MULTILINE)[0]
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    found = [text for kind, text in blocks if kind == language]
    assert found, f"README.md has no such block in {title!r}"
    return found


# How often Postfix looks whether its probe of an address has been answered: not every three seconds, but not for less
# time than usual.
OFTEN = ("address_verify_poll_delay=1s", "address_verify_poll_count=40")
# What the machines of most tests have beside lmtpd: a user, and Postfix in front.
BASE_STATE = f"""\
cat >/etc/imapd.conf <<END
configdirectory: /var/lib/lmtpd
partition-default: /var/spool/lmtpd
servername: mx.example.com
END
cd /var/spool/lmtpd
install -d -o lmtpd -g lmtpd -m 700 jane jane/tmp jane/new jane/cur
postconf -e 'mydestination = example.com' 'local_transport = lmtp:unix:private/lmtpd' 'local_recipient_maps ='
postconf -e 'smtpd_recipient_restrictions = permit_mynetworks, reject_unauth_destination, reject_unverified_recipient'
postconf -e 'unverified_recipient_reject_code = 550' {" ".join(OFTEN)}
systemctl reload postfix
"""


def make_installation(base: Path, layer: Path) -> None:
    """Makes a layer for machines of that base: all that units/install and BASE_STATE change in one.

    A machine boots from it in a fraction of the time that these take. So who changes it can have one of his own,
    and what has been set up has to outlive the boot.
    """
    unfinished = layer.with_suffix(".unfinished")
    unfinished.mkdir()
    machine = Machine(base, kept=unfinished)
    try:
        copy_source(machine)
        machine.run("/root/lmtpd/units/install", timeout=300)
        machine.shell(BASE_STATE)
    finally:
        machine.close()
    unfinished.rename(layer)


def copy_source(machine: Machine) -> None:
    """Unpacks lmtpd's source to /root/lmtpd. What pip needs for extras is at hand: no network is in there."""
    source = machine.root / "root/lmtpd"
    source.mkdir()
    for name in ("lmtpd.py", "setup.py", "README.md", "LICENSE"):
        shutil.copy(TOP / name, source)
    for name in ("man", "units"):
        shutil.copytree(TOP / name, source / name)
    (machine.root / "etc/pip.conf").write_text("[global]\nno-index = true\nfind-links = /opt/wheels\n")
