"""units/install on fresh Debians: what it installs, upgrades under load and removes.

The tests of each machine run in this order: they are its history.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator

import pytest
from container import DEBIAN_13, OWN, TOP, Machine, copy_source
from harness import wait_for
from test_systemd import MESSAGE, connect, install_drop_in, start_message

import lmtpd

INSTALL = "/root/lmtpd/units/install"
SYSTEM = "etc/systemd/system"
SPOOL = "/var/spool/lmtpd"
IMAPD_CONF = f"configdirectory: /var/lib/lmtpd\npartition-default: {SPOOL}\nduplicatesuppression: no\n"
NEXT, LAST = "8.0.0", "9.0.0"
# What changes on a machine without any doing.
RESTLESS = (
    *("/dev", "/proc", "/sys", "/run/systemd", "/run/udev", "/run/log", "/tmp", "/var/tmp", "/var/log"),
    *("/var/lib/postfix", "/var/lib/systemd", "/var/spool/postfix/[a-oq-z]*", "/var/spool/postfix/public"),
)
PRUNED = " -o ".join(f"-path '{path}'" for path in RESTLESS)


@pytest.fixture(scope="module", params=sorted({OWN, DEBIAN_13}), ids=lambda root: root.name)
def fresh(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """A machine to which lmtpd's source has been unpacked."""
    machine = Machine(request.param)
    try:
        copy_source(machine)
        # Before there can be anything of lmtpd's.
        (machine.root / "root/before").write_text("\n".join(sorted(files(machine))))
        yield machine
    finally:
        machine.close()


def files(machine: Machine, *folders: str, seen: str = "%p") -> set[str]:
    """What is seen of each file in these folders, or on the machine, save what is restless."""
    found = machine.run("sh", "-c", rf"find {' '.join(folders) or '/'} \( {PRUNED} \) -prune -o -printf '{seen}\n'")
    return set(found.stdout.splitlines())


def state(machine: Machine) -> set[str]:
    """What lmtpd's files are and when they were changed. (A folder's time tells of what came and went.)"""
    lines = files(machine, "/etc", "/opt", "/root", "/usr/local", seen="%y %m %U %p %l %T@")
    return {line.rpartition(" ")[0] if line.startswith("d") else line for line in lines}


def run(machine: Machine, command: str = INSTALL) -> list[str]:
    """The lines that it prints. Nothing of it fails, nor complains."""
    done = machine.run("sh", "-c", command, timeout=300)
    assert done.stderr == ""
    return done.stdout.splitlines()


def refused(machine: Machine, command: str) -> tuple[int, str]:
    """The exit status of a command that has to fail without a change, and what it complains of."""
    before = state(machine)
    done = machine.run("sh", "-c", command, check=False)
    assert done.stdout == ""
    assert state(machine) == before
    return done.returncode, done.stderr


def next_release(machine: Machine, version: str, **changes: str) -> str:
    """Unpacks a later release, with a line at the end of some units; its units/install."""
    folder = machine.root / "root" / version
    shutil.copytree(machine.root / "root/lmtpd", folder)
    module = folder / "lmtpd.py"
    module.write_text(module.read_text().replace(f'__version__ = "{lmtpd.__version__}"', f'__version__ = "{version}"'))
    for unit, line in changes.items():
        with (folder / "units" / unit).open("a") as file:
            file.write(line + "\n")
    return f"/root/{version}/units/install"


def releases(machine: Machine) -> list[str]:
    """The versions of the releases that are kept."""
    return sorted(path.name.partition("-")[0] for path in (machine.root / "opt/lmtpd/releases").iterdir())


def greeting(machine: Machine) -> str:
    client = connect(machine)
    [line] = client.reply()
    client.close()
    return line


def shown(machine: Machine, unit: str, name: str) -> str:
    return machine.properties(unit, name)[name]


def mail(machine: Machine) -> list[str]:
    return machine.run("find", SPOOL, "-name", "*,S=*").stdout.splitlines()


class Load:
    """A client that delivers one message after the other, on a connection for each, until the end of the block.

    It is in no hurry until the release with that version is complete: the installed one is not touched before.
    """

    def __init__(self, machine: Machine, version: str) -> None:
        self._machine = machine
        self._version = version
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._deliver)
        self.greetings: list[str] = []
        self.replies: list[str] = []
        self.errors: list[Exception] = []

    def __enter__(self) -> Load:
        self._thread.start()
        self.wait_for_more()
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        self._thread.join()

    def _deliver(self) -> None:
        while not self._enough.is_set():
            try:
                client = connect(self._machine)
                self.greetings += client.reply() or ["nothing"]
                client.command("LHLO client.example")
                self.replies += client.deliver(MESSAGE, "jane")
                client.close()
            except Exception as error:  # an assertion of the client's, too
                self.errors.append(error)
                return
            if not [*(self._machine.root / "opt/lmtpd/releases").glob(f"{self._version}-*/identity")]:
                self._enough.wait(0.1)

    def wait_for_more(self) -> None:
        """Returns when more messages have been delivered, from now on."""
        count = len(self.replies)
        wait_for(lambda: self.errors or len(self.replies) > count + 3, "more messages")


# --- Arguments ---


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("--frobnicate", 'There is no argument "--frobnicate"'),
        ("now", 'There is no argument "now"'),
        ("--with", "--with needs the names of extras"),
        ("--with auth,magic", 'There is no extra "magic"; there are auth idna regex sql'),
        ("--remove --with=auth", "--with cannot go with --remove"),
    ],
)
def test_wrong_arguments(fresh: Machine, arguments: str, complaint: str) -> None:
    status, said = refused(fresh, f"{INSTALL} {arguments}")
    assert (status, said) == (64, f"units/install: {complaint}; see --help.\n")


def test_help_names_all_extras_of_the_package() -> None:
    """Anybody may ask for it."""
    [extras] = re.findall(r"extras_require=(\{.*?\})", (TOP / "setup.py").read_text(), re.DOTALL)
    said = subprocess.run([TOP / "units/install", "--help"], check=True, capture_output=True, text=True).stdout
    [named] = re.findall(r"--with EXTRA,\.\.\. (.*) --remove", " ".join(said.split()))
    assert re.findall(r"(\w+) \(", named) == sorted(ast.literal_eval(extras))
    [known] = re.findall(r"^known_extras=\((.*)\)$", (TOP / "units/install").read_text(), re.MULTILINE)
    assert known.split() == sorted(ast.literal_eval(extras))


def test_only_root_can_install(fresh: Machine) -> None:
    shutil.copy(TOP / "units/install", fresh.root / "tmp/install")
    status, said = refused(fresh, "setpriv --reuid=nobody --clear-groups /tmp/install")
    assert (status, said) == (77, "units/install: Only root can do this.\n")


def test_without_systemd(fresh: Machine) -> None:
    status, said = refused(fresh, f"unshare --mount sh -c 'mount -t tmpfs none /run; {INSTALL}'")
    assert status == 69
    assert "systemd does not run here" in said


def test_nothing_to_remove(fresh: Machine) -> None:
    assert run(fresh, f"{INSTALL} --remove") == ["lmtpd is not installed"]


# --- Install ---


def test_install(fresh: Machine) -> None:
    """Wherever one is, and whatever rights new files of one's own have."""
    tree = files(fresh, "/root", seen="%p %m %T@")
    said = run(fresh, f"umask 077; cd /; {INSTALL}")
    assert files(fresh, "/root", seen="%p %m %T@") == tree
    release = said[0].rpartition(" ")[2]
    assert re.fullmatch(rf"/opt/lmtpd/releases/{lmtpd.__version__}-\d{{8}}-\d{{6}}", release)
    assert said[0] == f"Installed lmtpd {lmtpd.__version__} in {release}"
    assert {"Made the account lmtpd", f"Made the folder {SPOOL}", "Wrote /etc/imapd.conf"} < set(said)
    assert said[-2:] == [
        "Enabled lmtpd.socket",
        "Started lmtpd.socket at /run/lmtpd/lmtp /var/spool/postfix/private/lmtpd",
    ]
    assert fresh.run("readlink", "-f", "/opt/lmtpd/current", "/opt/lmtpd/units").stdout.splitlines() == [
        release,
        f"{release}/share/lmtpd/units",
    ]
    for unit in ("lmtpd.socket", "lmtpd@.service", "lmtpd-pool.socket", "lmtpd-pool.service", "lmtpd-check.service"):
        assert fresh.run("cmp", f"/root/lmtpd/units/{unit}", f"/{SYSTEM}/{unit}").stdout == ""
    assert fresh.run("cmp", "/root/lmtpd/units/imapd.conf", "/etc/imapd.conf").stdout == ""


def test_the_command_and_the_pages_are_found_by_everybody(fresh: Machine) -> None:
    as_nobody = ("setpriv", "--reuid=nobody", "--clear-groups", "--")
    assert fresh.run(*as_nobody, "lmtpd", "--version").stdout == f"lmtpd {lmtpd.__version__}\n"
    for page in (TOP / "man").iterdir():
        name, number = page.name.rsplit(".", 1)
        place = fresh.run(*as_nobody, "man", "-w", number, name).stdout
        assert place.startswith("/opt/lmtpd/releases/")
        assert place.endswith(f"/{page.name}\n")


def test_the_socket_listens(fresh: Machine) -> None:
    assert greeting(fresh).endswith(f" lmtpd {lmtpd.__version__} ready")
    assert fresh.run("systemctl", "is-enabled", "lmtpd.socket").stdout == "enabled\n"
    assert fresh.run("systemctl", "is-enabled", "lmtpd-pool.socket", check=False).stdout == "disabled\n"
    owners = fresh.shell(f"stat -c '%U:%G %a' {SPOOL} /var/lib/lmtpd /run/lmtpd/lmtp /var/spool/postfix/private/lmtpd")
    assert owners.splitlines() == ["lmtpd:lmtpd 750"] * 2 + ["postfix:postfix 660"] * 2


def test_again_changes_nothing(fresh: Machine) -> None:
    before = state(fresh)
    started = shown(fresh, "lmtpd.socket", "ActiveEnterTimestampMonotonic")
    assert run(fresh) == ["Kept /etc/imapd.conf"]
    assert state(fresh) == before
    assert shown(fresh, "lmtpd.socket", "ActiveEnterTimestampMonotonic") == started


def test_the_installed_script_has_nothing_to_install(fresh: Machine) -> None:
    status, said = refused(fresh, "/opt/lmtpd/units/install")
    assert status == 66
    assert "There is no lmtpd.py in " in said


# --- Upgrade ---


def test_upgrade_under_load(fresh: Machine) -> None:
    """lmtpd.socket: no message is lost, no connection refused, and a session of the old release goes on."""
    (fresh.root / "etc/imapd.conf").write_text(IMAPD_CONF)
    fresh.shell(f"cd {SPOOL}; install -d -o lmtpd -g lmtpd -m 700 jane jane/tmp jane/new jane/cur")
    upgrade = next_release(fresh, NEXT, **{"lmtpd@.service": "[Service]\nTasksMax=17"})
    old = connect(fresh)
    start_message(old)
    with Load(fresh, NEXT) as load:
        said = run(fresh, upgrade)
        load.wait_for_more()
    old.send(b".\r\n")
    assert old.reply()[-1].startswith("250")
    old.close()
    assert load.errors == []
    assert {reply[:9] for reply in load.replies} == {"250 2.1.5"}
    assert len(mail(fresh)) == len(load.replies) + 1
    versions = [line.split()[-2] for line in load.greetings]
    assert versions == sorted(versions)
    assert {*versions} == {lmtpd.__version__, NEXT}
    assert said[0].startswith(f"Installed lmtpd {NEXT} in /opt/lmtpd/releases/{NEXT}-")
    assert said[1:] == ["Kept /etc/imapd.conf", f"Installed /{SYSTEM}/lmtpd@.service"]
    assert (fresh.root / "etc/imapd.conf").read_text() == IMAPD_CONF
    assert releases(fresh) == sorted([lmtpd.__version__, NEXT])
    assert shown(fresh, "lmtpd@one.service", "TasksMax") == "17"
    assert fresh.run("lmtpd", "--version").stdout == f"lmtpd {NEXT}\n"


def test_upgrade_of_the_pool_under_load(fresh: Machine) -> None:
    """The same with lmtpd-pool.socket, which the administrator has taken instead; lmtpd.socket stays off."""
    fresh.shell("systemctl disable --now lmtpd.socket; systemctl enable --now lmtpd-pool.socket")
    upgrade = next_release(fresh, LAST, **{"lmtpd-pool.service": "[Service]\nTasksMax=129"})
    count = len(mail(fresh))
    old = connect(fresh)
    start_message(old)
    with Load(fresh, LAST) as load:
        first = shown(fresh, "lmtpd-pool.service", "MainPID")
        upgrading = fresh.start(upgrade, stdout=subprocess.PIPE)
        wait_for(
            lambda: shown(fresh, "lmtpd-pool.service", "ActiveState") == "reloading" or upgrading.poll() is not None,
            "the end of the old pool",
            patience=300,  # to install a release takes a minute on a busy machine
        )
        assert upgrading.poll() is None
        old.send(b".\r\n")
        assert old.reply()[-1].startswith("250")
        old.close()
        said = upgrading.communicate(timeout=300)[0].splitlines()
        # The old workers leave when their sessions have ended; systemd does not wait for that.
        wait_for(lambda: load.errors or f" {LAST} " in load.greetings[-1], "the new pool")
        load.wait_for_more()
    assert load.errors == []
    assert {reply[:9] for reply in load.replies} == {"250 2.1.5"}
    assert len(mail(fresh)) == count + len(load.replies) + 1
    assert {line.split()[-2] for line in load.greetings} == {NEXT, LAST}
    assert said[-2] == "Reloaded lmtpd-pool.service"
    assert said[-1].startswith(f"Removed /opt/lmtpd/releases/{lmtpd.__version__}-")
    assert releases(fresh) == [NEXT, LAST]
    assert shown(fresh, "lmtpd-pool.service", "MainPID") not in ("0", first)
    assert shown(fresh, "lmtpd-pool.service", "TasksMax") == "129"
    assert shown(fresh, "lmtpd.socket", "ActiveState") == "inactive"
    assert fresh.run("systemctl", "is-enabled", "lmtpd.socket", check=False).stdout == "disabled\n"


def test_what_the_administrator_has_changed(fresh: Machine) -> None:
    """Drop-ins taken from a release follow the next one; changed ones stay; of a changed unit a copy is kept."""
    system = fresh.root / SYSTEM
    fresh.run(
        "install", "-D", "-m", "644", "/opt/lmtpd/units/accounts.conf", f"/{SYSTEM}/lmtpd-.service.d/accounts.conf"
    )
    install_drop_in(fresh, "lmtpd.socket", "postfix.conf", "# mine\n")
    install_drop_in(fresh, "lmtpd@.service", "mine.conf", "# mine\n")
    changed = (system / "lmtpd@.service").read_text() + "# mine\n"
    (system / "lmtpd@.service").write_text(changed)
    upgrade = next_release(
        fresh,
        "9.1.0",
        **{"accounts.conf": "# new", "postfix.conf": "# new", "lmtpd-pool.socket": "[Socket]\nBacklog=99"},
    )
    said = run(fresh, upgrade)
    assert f"Kept the changed /{SYSTEM}/lmtpd@.service as /{SYSTEM}/lmtpd@.service.old" in said
    assert (system / "lmtpd@.service.old").read_text() == changed
    assert not (system / "lmtpd@.service").read_text().endswith("# mine\n")
    assert (system / "lmtpd-.service.d/accounts.conf").read_text().endswith("# new\n")
    assert (system / "lmtpd-pool.socket.d/postfix.conf").read_text().endswith("# new\n")
    assert (system / "lmtpd.socket.d/postfix.conf").read_text() == "# mine\n"
    assert (system / "lmtpd@.service.d/mine.conf").read_text() == "# mine\n"
    assert "Started lmtpd-pool.socket at /run/lmtpd/lmtp /var/spool/postfix/private/lmtpd" in said
    assert shown(fresh, "lmtpd-pool.socket", "Backlog") == "99"
    (system / "lmtpd-.service.d/accounts.conf").unlink()
    (system / "lmtpd@.service.old").unlink()


def test_extras_stay(fresh: Machine) -> None:
    """An upgrade, too, has those that were asked for once."""
    run(fresh, f"{INSTALL} --with auth")
    run(fresh, next_release(fresh, "9.2.0"))
    for extra in ("scramp", "argon2"):
        place = fresh.run("/opt/lmtpd/current/bin/python", "-c", f"import {extra}; print({extra}.__file__)").stdout
        assert extra != "scramp" or place.startswith("/opt/lmtpd/")
    assert (fresh.root / "opt/lmtpd/extras").read_text() == "auth\n"
    # One that cannot be had is not asked for again. (No network is in there.)
    status, said = refused(fresh, f"{INSTALL} --with regex")
    assert status == 70
    assert "google-re2" in said


def test_an_upgrade_that_fails_changes_nothing(fresh: Machine) -> None:
    upgrade = next_release(fresh, "9.3.0")
    (fresh.root / "root/9.3.0/setup.py").write_text("raise SystemExit('no such luck')\n")
    status, said = refused(fresh, upgrade)
    assert status == 70
    assert "no such luck" in said
    assert re.search(r"^units/install: This failed: \S+/bin/python \S+/pip install ", said, re.MULTILINE)
    assert list((fresh.root / "tmp").rglob("lmtpd.py")) == []


def test_the_older_source_goes_back_to_its_version(fresh: Machine) -> None:
    run(fresh, f"/root/{NEXT}/units/install")
    assert fresh.run("lmtpd", "--version").stdout == f"lmtpd {NEXT}\n"
    wait_for(lambda: greeting(fresh).endswith(f" lmtpd {NEXT} ready"), "the version")


def test_one_at_a_time(fresh: Machine) -> None:
    status, said = refused(fresh, f"flock /opt/lmtpd {INSTALL}")
    assert (status, said) == (75, "units/install: Another units/install runs.\n")


# --- Remove ---


def test_remove(fresh: Machine) -> None:
    """What stays: mail, records, configuration, account and the administrator's drop-ins, and nothing else."""
    stored = mail(fresh)
    old = connect(fresh)
    start_message(old)
    removal = fresh.start("/opt/lmtpd/units/install", "--remove")
    wait_for(lambda: shown(fresh, "lmtpd-pool.service", "ActiveState") == "deactivating", "the stop")
    old.send(b".\r\n")
    assert old.reply()[-1].startswith("250")
    old.close()
    assert removal.wait(120) == 0
    assert set(stored) < set(mail(fresh))
    before = set((fresh.root / "root/before").read_text().splitlines())
    new = {path for path in files(fresh) - before if not path.startswith(("/root/", SPOOL, "/var/lib/lmtpd"))}
    assert new == {
        "/etc/imapd.conf",
        f"/{SYSTEM}/lmtpd.socket.d",
        f"/{SYSTEM}/lmtpd.socket.d/postfix.conf",
        f"/{SYSTEM}/lmtpd@.service.d",
        f"/{SYSTEM}/lmtpd@.service.d/mine.conf",
        f"/{SYSTEM}/lmtpd-.service.d",
    }
    assert before - files(fresh) == set()
    assert (fresh.root / "etc/imapd.conf").read_text() == IMAPD_CONF
    assert fresh.run("getent", "passwd", "lmtpd").returncode == 0
    assert "lmtpd" not in fresh.run("systemctl", "list-units", "--all", "*lmtpd*.s*", "--plain", "--no-legend").stdout


def test_install_after_remove(fresh: Machine) -> None:
    """It goes on with the mail and the configuration of before."""
    stored = mail(fresh)
    (fresh.root / SYSTEM / "lmtpd.socket.d/postfix.conf").unlink()
    said = run(fresh)
    assert "Kept /etc/imapd.conf" in said
    assert "Made the account lmtpd" not in said
    client = connect(fresh)
    client.hello()
    assert client.deliver(MESSAGE, "jane")[0].startswith("250")
    client.close()
    assert len(mail(fresh)) == len(stored) + 1


def test_missing_packages_are_installed(fresh: Machine) -> None:
    """From the machine's package sources, here one with an empty package; another is out of reach."""
    fresh.shell("""
dpkg --purge --force-depends python3-idna
mkdir -p /srv/packages /root/empty/DEBIAN
cd /root/empty
printf '%s\n' 'Package: python3-idna' 'Version: 99' 'Architecture: all' 'Maintainer: x' 'Description: x' >DEBIAN/control
dpkg-deb --build . /srv/packages/idna.deb
cd /srv/packages
(cat /root/empty/DEBIAN/control
echo Filename: ./idna.deb
echo Size: "$(stat -c %s idna.deb)"
echo SHA256: "$(sha256sum idna.deb | cut -d ' ' -f 1)") >Packages
rm -f /etc/apt/sources.list.d/* /etc/apt/sources.list
echo 'deb [trusted=yes] file:/srv/packages ./' >/etc/apt/sources.list
echo 'deb [trusted=yes] file:/srv/elsewhere ./' >>/etc/apt/sources.list
""")
    said = fresh.run(INSTALL).stdout.splitlines()
    assert said[0] == "Installed the packages python3-idna"
    assert fresh.run("dpkg-query", "--show", "python3-idna").stdout == "python3-idna\t99\n"


def test_an_installation_by_hand_is_replaced(fresh: Machine) -> None:
    """There was no script for earlier releases: their virtual environment is /opt/lmtpd itself."""
    run(fresh, f"{INSTALL} --remove")
    fresh.shell(
        """
/usr/bin/python3 -m venv --system-site-packages /opt/lmtpd
/opt/lmtpd/bin/pip install --quiet --no-deps --no-build-isolation --use-pep517 /root/lmtpd
ln -s /opt/lmtpd/bin/lmtpd /usr/local/bin/lmtpd
cd /opt/lmtpd/share/lmtpd/units
install -m 644 lmtpd*.socket lmtpd*.service /etc/systemd/system/
install -D -m 644 postfix.conf /etc/systemd/system/lmtpd.socket.d/postfix.conf
systemctl daemon-reload
systemctl enable --now lmtpd.socket
""",
        timeout=300,
    )
    upgrade = next_release(fresh, "9.4.0", **{"lmtpd@.service": "[Service]\nTasksMax=17"})
    with Load(fresh, "9.4.0") as load:
        said = run(fresh, upgrade)
        load.wait_for_more()
    assert load.errors == []
    assert {reply[:9] for reply in load.replies} == {"250 2.1.5"}
    assert load.greetings[-1].endswith(" lmtpd 9.4.0 ready")
    assert not [line for line in said if line.startswith("Kept the changed")]
    assert {path.name for path in (fresh.root / "opt/lmtpd").iterdir()} == {"current", "releases", "units"}
