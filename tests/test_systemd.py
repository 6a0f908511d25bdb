"""lmtpd under a real systemd, with a real Postfix: installed by units/install."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from container import TOP, Machine
from harness import PATIENCE, Client, wait_for
from harness import connect as connect_to

SERVICES = ["lmtpd@.service", "lmtpd-pool.service"]
UNITS = ["lmtpd.socket", "lmtpd-pool.socket", *SERVICES, "lmtpd-check.service", "start-lmtpd-check.service"]
UNIT_FOLDER = "/etc/systemd/system/"
MAILDIR = "var/spool/lmtpd/jane"
MAILDIR_OF_JOE = "var/spool/lmtpd/joe"
SESSION = "LHLO x\nMAIL FROM:<>\nRCPT TO:<jane>\nDATA\n{}\n\nx\n.\nQUIT\n"
MESSAGE = b"From: <sender@example.com>\r\nSubject: one\r\n\r\nHello.\r\n"


@pytest.fixture
def machine(installed: Machine) -> Iterator[Machine]:
    """The same with lmtpd.socket listening, jane's Maildir empty and no drop-in but Postfix's."""
    empty_maildir(installed)
    installed.run("systemctl", "start", "lmtpd.socket")
    yield installed
    reset(installed, "lmtpd@.service", "lmtpd.socket")


@pytest.fixture
def pool(installed: Machine) -> Iterator[Machine]:
    """The same with lmtpd-pool.socket in place of lmtpd.socket."""
    empty_maildir(installed)
    installed.shell("systemctl disable --now lmtpd.socket; systemctl enable --now lmtpd-pool.socket")
    yield installed
    installed.run("systemctl", "disable", "lmtpd-pool.socket")
    reset(installed, "lmtpd-pool.service", "lmtpd-pool.socket")


def empty_maildir(machine: Machine) -> None:
    """Removes jane's messages, and what is remembered of them."""
    for path in (*(machine.root / MAILDIR).rglob("*"), *(machine.root / "var/lib/lmtpd").glob("deliver.db*")):
        if path.is_file():
            path.unlink()


def install_drop_in(machine: Machine, unit: str, name: str, text: str) -> None:
    folder = machine.root / f"etc/systemd/system/{unit}.d"
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    machine.run("systemctl", "daemon-reload")


def reset(machine: Machine, service: str, listener: str) -> None:
    """Ends what a test may have left running, and its drop-ins."""
    machine.run("systemctl", "stop", listener)
    machine.run("systemctl", "kill", "--signal=KILL", service.replace("@", "@*"), check=False)
    for unit in (service, listener):
        for path in (machine.root / f"etc/systemd/system/{unit}.d").glob("test*.conf"):
            path.unlink()
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "reset-failed")


def messages(machine: Machine, folder: str = "new") -> list[Path]:
    return list((machine.root / MAILDIR / folder).iterdir())


def send(machine: Machine, *options: str, to: str = "jane@example.com") -> None:
    """Sends mail to Postfix with its own load generator; a bounce goes to jane."""
    machine.run("smtp-source", "-f", "jane@example.com", "-t", to, *options, "inet:127.0.0.1:25", timeout=120)


def connect(machine: Machine) -> Client:
    """A client on lmtpd's unix socket: from outside, and as root, who may."""
    return Client(connect_to(str(machine.root / "run/lmtpd/lmtp")))


def start_message(client: Client) -> None:
    """Takes a session to the middle of a message."""
    client.hello()
    client.command("MAIL FROM:<sender@example.com>")
    client.command("RCPT TO:<jane>")
    assert client.command("DATA").startswith("354")
    client.send(MESSAGE)


def services(machine: Machine) -> list[str]:
    """The instances of lmtpd@.service that run."""
    listed = machine.run("systemctl", "list-units", "--plain", "--no-legend", "--state=running", "lmtpd@*").stdout
    return [line.split()[0] for line in listed.splitlines()]


# --- the units ---


def imported(machine: Machine, *command: str, stdin: str = "") -> tuple[set[str], str]:
    """The modules that Python imports for the command, run cold as the account of the service, and what it prints."""
    run = machine.run("runuser", "-u", "lmtpd", "--", "env", "PYTHONPROFILEIMPORTTIME=1", *command, stdin=stdin)
    lines = [line for line in run.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip() for line in lines}, run.stdout


def test_the_command_starts_cheaply(installed: Machine) -> None:
    """All that it takes to deliver a message is a few modules, most of them built into Python.

    The scripts that installers make of an entry point import more than that.
    """
    command = "/usr/local/bin/lmtpd"
    [python] = re.findall(r"\A#!(\S+)\n", installed.run("cat", command).stdout)
    nothing, _ = imported(installed, python, "-c", "pass")
    plain, said = imported(installed, command, stdin=SESSION.format("Subject: x"))
    assert said.count("\n250 2.1.5 ") == 2
    assert plain - nothing <= {"__future__", "_socket", "errno", "itertools", "lmtpd", "select", "syslog"}
    # What has an id and a date is looked up in a database, by the only process that may do so at the moment.
    database, _ = imported(installed, python, "-c", "import fcntl, sqlite3, zlib")
    named, said = imported(installed, command, stdin=SESSION.format("Message-ID: <cold@example.com>\nDate: now"))
    assert said.count("\n250 2.1.5 ") == 2
    assert named - plain == database - nothing - plain


@pytest.mark.parametrize("unit", UNITS)
def test_verify_is_silent(installed: Machine, unit: str) -> None:
    verified = installed.run("systemd-analyze", "verify", UNIT_FOLDER + unit)
    assert verified.stdout + verified.stderr == ""


@pytest.mark.parametrize("unit", [*SERVICES, "lmtpd-check.service"])
def test_exposure_is_at_most_1_5(installed: Machine, unit: str) -> None:
    installed.run("systemd-analyze", "security", "--offline=true", "--threshold=15", UNIT_FOLDER + unit)


@pytest.mark.parametrize("unit", SERVICES)
def test_each_weakness_of_the_sandbox_is_explained(installed: Machine, unit: str) -> None:
    report = installed.run("systemd-analyze", "security", "--offline=true", UNIT_FOLDER + unit).stdout
    comments = "".join(line for line in (TOP / "units" / unit).read_text().splitlines() if line.startswith("#"))
    weak = [line.split()[1] for line in report.splitlines() if line.startswith("✗")]
    unexplained = [name for name in weak if name.split("=")[0].split("/")[0] + "=" not in comments]
    assert unexplained == []


# Another address of the machine's own, which stands for another host: no packet gets to it, either.
ELSEWHERE = "192.0.2.7"
ADD_ADDRESS = f"""\
import fcntl, socket, struct
address = struct.pack("16sHH4s8x", b"lo:1", socket.AF_INET, 0, socket.inet_aton("{ELSEWHERE}"))
fcntl.ioctl(socket.socket(), 0x8916, address)  # SIOCSIFADDR
"""
# Says what comes of connecting to a server at each address, and of being one.
REACH = f"""\
import errno, socket

def tried(action):
    try:
        return action()
    except OSError as error:
        return errno.errorcode.get(error.errno, "timed out")

def greeted(*address):
    with socket.create_connection(address, timeout=2) as connection:
        return connection.recv(3).decode()

def listens():
    with socket.socket() as server:
        server.listen()
    return "listens"

with open("/var/lib/lmtpd/reached", "w") as file:
    for host in ("localhost", "127.0.0.1", "::1", "{ELSEWHERE}"):
        print(host, tried(lambda: greeted(host, 25)), file=file)
    print("netlink", tried(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)), file=file)
    print("server", tried(listens), file=file)
"""


@pytest.mark.parametrize("unit", SERVICES)
def test_the_sandbox_has_a_way_to_a_server_on_this_host_and_no_other(installed: Machine, unit: str) -> None:
    """A program in the place of lmtpd tries, with Postfix as the server at all addresses."""
    (installed.root / "run/reach.py").write_text(REACH)
    installed.run("python3", "-c", ADD_ADDRESS)
    assert installed.run("python3", "-c", f"import smtplib; smtplib.SMTP('{ELSEWHERE}')").stdout == ""
    program = "[Service]\nType=oneshot\nRestart=no\nWatchdogSec=0\nStandardInput=null\nStandardOutput=journal\n"
    install_drop_in(installed, unit, "test.conf", program + "ExecStart=\nExecStart=/usr/bin/python3 /run/reach.py\n")
    try:
        installed.run("systemctl", "start", unit.replace("@", "@reach"))
        reached = (installed.root / "var/lib/lmtpd/reached").read_text().splitlines()
    finally:
        reset(installed, unit, "lmtpd-pool.socket")
        (installed.root / "var/lib/lmtpd/reached").unlink(missing_ok=True)
    assert reached == [
        *("localhost 220", "127.0.0.1 220", "::1 220", f"{ELSEWHERE} timed out"),
        *("netlink EAFNOSUPPORT", "server EPERM"),
    ]


@contextlib.contextmanager
def broken(machine: Machine) -> Iterator[None]:
    """Has a wrong configuration meanwhile, and clients that have been turned away by it."""
    conf = machine.root / "etc/imapd.conf"
    good = conf.read_text()
    machine.run("systemctl", "reset-failed")
    conf.write_text("no colon\n")
    try:
        for _ in range(5):
            client = connect(machine)
            assert client.reply()[-1].startswith("421 4.3.0")
            client.close()
        yield
    finally:
        conf.write_text(good)


def failed(machine: Machine) -> set[str]:
    """Those of lmtpd's units that have failed."""
    listed = machine.run("systemctl", "list-units", "--failed", "--plain", "--no-legend", "*lmtpd*").stdout
    return {line.split()[0] for line in listed.splitlines()}


def check_faults_are_mended(machine: Machine) -> None:
    """The log of the failed check names the fault; when that is mended, the check can be started again and passes."""
    assert "'no colon' is not of the form 'option: value'" in machine.journal("--unit=lmtpd-check.service")
    machine.run("systemctl", "restart", "lmtpd-check.service")
    assert failed(machine) == set()


def check_mail_elsewhere(machine: Machine) -> None:
    """With the drop-in for it, in the places that it names, mail is stored in another folder; without, it waits."""
    drop_in = (TOP / "units/elsewhere.conf").read_text()
    paths = [Path(path) for path in re.findall(r"^#\s+(/etc/systemd/system/\S+)$", drop_in, re.MULTILINE)]
    [folder] = re.findall(r"^#\s+(install -d .*)$", drop_in, re.MULTILINE)
    assert len(paths) == 2
    conf = machine.root / "etc/imapd.conf"
    old = conf.read_text()
    conf.write_text(old.replace("/var/spool/lmtpd", "/srv/mail"))
    maildir = machine.root / "srv/mail/jane"
    machine.shell(f"""
{folder}
install -d -o lmtpd -g lmtpd -m 700 /srv/mail/jane /srv/mail/jane/tmp /srv/mail/jane/new /srv/mail/jane/cur
""")
    try:
        for expected, count in (("451", 0), ("250", 1)):
            client = connect(machine)
            client.hello()
            assert client.deliver(MESSAGE, "jane")[0][:3] == expected
            client.close()
            assert len(list((maildir / "new").iterdir())) == count
            for path in paths:
                install_drop_in(machine, path.parent.stem, path.name, drop_in)
            machine.run("systemctl", "stop", "lmtpd-pool.service")
        assert "/srv/mail" in machine.properties("lmtpd-check.service", "ReadWritePaths")["ReadWritePaths"]
    finally:
        conf.write_text(old)
        for path in paths:
            (machine.root / str(path).lstrip("/")).unlink(missing_ok=True)
        machine.run("rm", "-r", "/srv/mail")


# --- a service for each connection ---


def test_mail_through_postfix(machine: Machine) -> None:
    send(machine)
    wait_for(lambda: messages(machine), "the message")
    (message,) = messages(machine)
    text = message.read_text()
    assert text.startswith("Return-Path: <jane@example.com>\n")
    assert "with LMTPA" in text.partition("Received:")[2].partition("\n\n")[0]
    owner = machine.run("stat", "--format=%U %a", f"/{MAILDIR}/new/{message.name}").stdout.split()
    assert owner == ["lmtpd", "600"]


def test_the_journal_shows_the_delivery(machine: Machine) -> None:
    before = machine.journal("--identifier=lmtpd", "--output=cat")
    send(machine)
    wait_for(lambda: messages(machine), "the message")
    wait_for(lambda: not services(machine), "the end of the session")
    new = machine.journal("--identifier=lmtpd")[len(before) :]
    assert re.search(r'delivered session=\S+ .* recipient=<jane@example.com> .* reply="250 2.1.5"', new), new
    warnings = machine.journal("--identifier=lmtpd", "--priority=warning")
    assert warnings == ""


@contextlib.contextmanager
def redirecting(machine: Machine, **options: str) -> Iterator[None]:
    """Has all mail redirected to joe, who has a Maildir meanwhile, with these options."""
    conf, script = machine.root / "etc/imapd.conf", machine.root / "etc/redirect.sieve"
    old = conf.read_text()
    script.write_text('redirect "joe@example.com";\n')
    lines = {"sieve_default": "/etc/redirect.sieve", **options}.items()
    conf.write_text(old + "".join(f"{name}: {value}\n" for name, value in lines))
    folders = " ".join(f"/{MAILDIR_OF_JOE}{part}" for part in ("", "/tmp", "/new", "/cur"))
    machine.shell(f"install -d -o lmtpd -g lmtpd -m 700 {folders}")
    try:
        yield
    finally:
        conf.write_text(old)
        script.unlink()
        machine.shell(f"rm -r /{MAILDIR_OF_JOE}")


def check_redirect_by_smtp(machine: Machine) -> None:
    """What a filter sends reaches Postfix, which brings it to lmtpd again."""
    with redirecting(machine, smtp_backend="host", smtp_host="localhost:25"):
        send(machine)
        folder = machine.root / MAILDIR_OF_JOE / "new"
        wait_for(lambda: list(folder.iterdir()), "the redirected message")
        [message] = folder.iterdir()
        assert message.read_text().startswith("Return-Path: <jane@example.com>\n")
    assert messages(machine) == []


def check_redirect_by_sendmail(machine: Machine) -> None:
    """The log says why it cannot work, and what to set; the message is not lost."""
    with redirecting(machine):
        client = connect(machine)
        client.hello()
        [reply] = client.deliver(MESSAGE, "jane")
        client.close()
        assert reply.startswith("451 4.4.0")
        log = machine.journal("--identifier=lmtpd", "--priority=err")
    hint = "(with NoNewPrivileges= no sendmail can work: set smtp_backend: host, and smtp_host)"
    line = [line for line in log.splitlines() if line.startswith("mail-not-sent")][-1]
    assert hint in line
    assert " action=redirect " in line
    assert messages(machine) == []


def test_a_filter_sends_by_smtp(machine: Machine) -> None:
    check_redirect_by_smtp(machine)


def test_a_filter_cannot_send_by_sendmail(machine: Machine) -> None:
    check_redirect_by_sendmail(machine)


def test_postfix_learns_who_is_unknown(machine: Machine) -> None:
    send(machine, to="nobody-here@example.com")
    wait_for(lambda: messages(machine), "the bounce")
    (bounce,) = messages(machine)
    assert "550 5.1.1" in bounce.read_text()


def test_nobody_but_postfix_may_connect(machine: Machine) -> None:
    connecting = "import socket; socket.socket(socket.AF_UNIX).connect('/run/lmtpd/lmtp')"
    for user, allowed in (("nobody", False), ("postfix", True)):
        tried = machine.run("setpriv", f"--reuid={user}", "--clear-groups", "python3", "-c", connecting, check=False)
        assert (tried.returncode == 0) is allowed, tried.stderr


@pytest.mark.parametrize(("field", "value"), [("NoNewPrivs", "1"), ("Seccomp", "2"), ("CapBnd", "0000000000000000")])
def test_the_sandbox_is_in_force(machine: Machine, field: str, value: str) -> None:
    """systemd may ignore what the machine it runs on can't do: delivery has to work under the real thing."""
    client = connect(machine)
    client.hello()
    (service,) = services(machine)
    process = machine.root / "proc" / machine.properties(service, "MainPID")["MainPID"]
    status = dict(line.split(":\t", 1) for line in (process / "status").read_text().splitlines())
    assert status[field] == value
    mounts = {fields[4]: fields[5].split(",") for fields in map(str.split, (process / "mountinfo").open())}
    assert "ro" in mounts["/"]
    assert "rw" in mounts["/var/spool/lmtpd"]
    client.close()


def test_a_burst_leaves_the_socket_open(machine: Machine) -> None:
    """More than 200 connections in two seconds, and more at once than MaxConnections, which is small here."""
    install_drop_in(machine, "lmtpd.socket", "test.conf", "[Socket]\nMaxConnections=20\n")
    machine.run("systemctl", "restart", "lmtpd.socket")
    deadline = time.monotonic() + PATIENCE
    for _ in range(500):
        connect(machine).close()
    assert time.monotonic() < deadline
    assert machine.properties("lmtpd.socket", "ActiveState") == {"ActiveState": "active"}
    wait_for(lambda: is_quiet(machine), "the end of the burst")
    send(machine)
    # A connection too many is dropped, and then Postfix would wait for minutes if it were not asked to try again.
    wait_for(lambda: machine.run("postqueue", "-f") and messages(machine), "the message")


def test_the_limit_of_connections_is_that_of_the_manual_page(machine: Machine) -> None:
    """A drop-in changes it without a restart. One connection more is closed without a reply."""
    [shown] = re.findall(r"^(\[Socket\]\nMaxConnections=128\n)", (TOP / "man/lmtpd.8").read_text(), re.MULTILINE)
    assert machine.properties("lmtpd.socket", "MaxConnections") == {"MaxConnections": "64"}
    install_drop_in(machine, "lmtpd.socket", "test.conf", shown)
    assert machine.properties("lmtpd.socket", "MaxConnections") == {"MaxConnections": "128"}
    install_drop_in(machine, "lmtpd.socket", "test.conf", shown.replace("128", "1"))
    first, second = connect(machine), connect(machine)
    assert first.reply()[0].startswith("220")
    assert second.reply() == []
    first.close()
    second.close()


def test_postfix_opens_as_many_connections_as_the_manual_page_says(machine: Machine) -> None:
    page = (TOP / "man/lmtpd.8").read_text()
    for name, value in (
        ("lmtp_destination_concurrency_limit", "$default_destination_concurrency_limit"),
        ("default_destination_concurrency_limit", "20"),
        ("initial_destination_concurrency", "5"),
    ):
        assert machine.run("postconf", "-dh", name).stdout == f"{value}\n"
        assert f".Ic {name}" in page or f"Postfix begins with {value} connections" in page


def is_quiet(machine: Machine) -> bool:
    """Whether no connection is served, nor one that has waited to be."""
    if services(machine):
        return False
    time.sleep(1)
    return not services(machine)


def test_much_mail(machine: Machine) -> None:
    send(machine, "-s", "10", "-m", "100")
    wait_for(lambda: len(messages(machine)) == 100, "all messages")
    assert not messages(machine, "tmp")
    wait_for(lambda: "empty" in machine.run("mailq").stdout, "an empty queue")


def test_stop_lets_the_message_in_hand_be_finished(machine: Machine) -> None:
    client = connect(machine)
    start_message(client)
    (service,) = services(machine)
    stop = machine.start("systemctl", "stop", service)
    wait_for(lambda: machine.properties(service, "ActiveState") == {"ActiveState": "deactivating"}, "the stop")
    client.send(b".\r\n")
    assert client.reply()[-1].startswith("250")
    assert client.command("NOOP")[:9] in ("421 4.3.2", "")
    assert stop.wait(PATIENCE) == 0
    client.close()
    assert len(messages(machine)) == 1
    assert machine.properties(service, "Result") == {"Result": "success"}


def test_no_half_message_after_a_second_stop(machine: Machine) -> None:
    client = connect(machine)
    start_message(client)
    (service,) = services(machine)
    machine.run("systemctl", "kill", "--kill-whom=main", service)
    time.sleep(0.5)
    assert services(machine) == [service]
    machine.run("systemctl", "kill", "--kill-whom=main", service)
    wait_for(lambda: not services(machine), "the end")
    reply = client.reply()
    assert not reply or reply[0].startswith("421")
    client.close()
    assert not messages(machine)


def test_a_broken_configuration_is_a_failed_unit_until_it_is_mended(machine: Machine) -> None:
    with broken(machine):
        wait_for(lambda: failed(machine) == {"lmtpd-check.service"}, "the failed check, and no failed connection")
        assert "status=78/CONFIG" in machine.journal("--unit=lmtpd@*")
    client = connect(machine)
    client.hello()
    client.close()
    check_faults_are_mended(machine)


def test_mail_in_another_folder(machine: Machine) -> None:
    check_mail_elsewhere(machine)


def test_tcp_with_the_drop_in(machine: Machine) -> None:
    machine.run("systemctl", "stop", "lmtpd.socket")
    before = machine.journal("--unit=lmtpd.socket", "--priority=warning")
    machine.run("python3", "-c", ADD_ADDRESS)
    inner = f"ListenStream={ELSEWHERE}:24\n"
    install_drop_in(machine, "lmtpd.socket", "test-tcp.conf", (TOP / "units/tcp.conf").read_text() + inner)
    machine.run("systemctl", "start", "lmtpd.socket")
    session = "import smtplib; c = smtplib.LMTP('{}', 24); print(c.mail('a@example.com')[0])"
    # Nobody is trusted on TCP before authenticating. Other hosts can connect, though the sandbox keeps lmtpd from them.
    for address in ("127.0.0.1", "::1", ELSEWHERE):
        assert machine.run("python3", "-c", session.format(address)).stdout == "430\n"
    preauthorised = "[Service]\nExecStart=\nExecStart=/usr/local/bin/lmtpd -a\n"
    install_drop_in(machine, "lmtpd@.service", "test.conf", preauthorised)
    assert machine.run("python3", "-c", session.format("127.0.0.1")).stdout == "250\n"
    assert machine.journal("--unit=lmtpd.socket", "--priority=warning") == before


# --- a pool of workers ---


def pool_pid(machine: Machine) -> int:
    return int(machine.properties("lmtpd-pool.service", "MainPID")["MainPID"])


def pool_options(machine: Machine, options: str, more: str = "") -> None:
    text = f"[Service]\nExecStart=\nExecStart=/usr/local/bin/lmtpd {options}\n{more}"
    install_drop_in(machine, "lmtpd-pool.service", "test.conf", text)


def wait_for_state(machine: Machine, state: str) -> None:
    wait_for(lambda: machine.properties("lmtpd-pool.service", "ActiveState") == {"ActiveState": state}, state)


def test_pool_mail_through_postfix(pool: Machine) -> None:
    send(pool)
    wait_for(lambda: messages(pool), "the message")
    first = pool_pid(pool)
    send(pool, "-s", "10", "-m", "200")
    wait_for(lambda: len(messages(pool)) == 201, "all messages")
    assert not messages(pool, "tmp")
    wait_for(lambda: "empty" in pool.run("mailq").stdout, "an empty queue")
    assert pool_pid(pool) == first
    assert "jane" in pool.journal("--unit=lmtpd-pool.service")


def test_pool_a_filter_sends_by_smtp(pool: Machine) -> None:
    check_redirect_by_smtp(pool)


def test_pool_a_filter_cannot_send_by_sendmail(pool: Machine) -> None:
    check_redirect_by_sendmail(pool)


def test_pool_says_what_it_does(pool: Machine) -> None:
    client = connect(pool)
    client.hello()
    wait_for_state(pool, "active")
    status = pool.properties("lmtpd-pool.service", "StatusText", "TasksMax", "MemoryMax")
    assert re.search(r"\d", status["StatusText"]), status
    assert status["TasksMax"] == "128"
    client.close()


def test_pool_is_idle_and_comes_back(pool: Machine) -> None:
    pool_options(pool, "-T 1")
    for count in (1, 2, 3):
        client = connect(pool)
        client.hello()
        assert client.deliver(MESSAGE, "jane")[0].startswith("250")
        client.command("QUIT")
        client.close()
        wait_for_state(pool, "inactive")
        assert pool.properties("lmtpd-pool.service", "Result") == {"Result": "success"}
        assert len(messages(pool)) == count


def test_pool_loses_no_connection_while_it_leaves(pool: Machine) -> None:
    """Connections that come at the moment when the idle pool exits are served by the next."""
    pool_options(pool, "-T 1")
    for count in range(1, 6):
        client = connect(pool)
        client.hello()
        assert client.deliver(MESSAGE, "jane")[0].startswith("250"), count
        client.close()
        process = pool.root / "proc" / str(pool_pid(pool)) / "cmdline"
        deadline = time.monotonic() + PATIENCE
        # Empty as soon as the process exits, before systemd can have noticed.
        while alive(process):
            assert time.monotonic() < deadline
    assert len(messages(pool)) == 5


def alive(cmdline: Path) -> bool:
    try:
        return cmdline.read_bytes() != b""
    except OSError:
        return False


def test_pool_reload_takes_the_new_configuration(pool: Machine) -> None:
    conf = pool.root / "etc/imapd.conf"
    old = conf.read_text()
    client = connect(pool)
    client.hello()
    first = pool_pid(pool)
    conf.write_text(old + "serverinfo: off\n")
    try:
        pool.run("systemctl", "reload", "lmtpd-pool.service")
        client.close()
        wait_for(lambda: pool_pid(pool) != first, "the old pool's end")
        client = connect(pool)
        assert client.reply()[0].startswith("220")
        assert pool_pid(pool) not in (0, first)
        client.close()
    finally:
        conf.write_text(old)


def test_pool_stop_lets_the_message_in_hand_be_finished(pool: Machine) -> None:
    client, idle = connect(pool), connect(pool)
    start_message(client)
    idle.hello()
    stop = pool.start("systemctl", "stop", "lmtpd-pool.service")
    wait_for_state(pool, "deactivating")
    client.send(b".\r\n")
    assert client.reply()[-1].startswith("250")
    assert client.command("NOOP")[:9] in ("421 4.3.2", "")
    assert stop.wait(PATIENCE) == 0
    assert len(messages(pool)) == 1
    assert pool.properties("lmtpd-pool.service", "Result") == {"Result": "success"}
    client.close()
    idle.close()


def test_pool_survives_a_killed_worker(pool: Machine) -> None:
    clients = [connect(pool), connect(pool)]
    for client in clients:
        start_message(client)
    parent = pool_pid(pool)
    children = [int(pid) for pid in pool.run("pgrep", "--parent", str(parent)).stdout.split()]
    assert len(children) >= 2
    pool.run("kill", "-KILL", str(children[0]))
    finished = 0
    for client in clients:
        try:
            client.send(b".\r\n")
            finished += client.reply()[-1:] != []
        except OSError:
            pass
        client.close()
    assert finished == 1
    assert len(messages(pool)) == 1
    assert pool_pid(pool) == parent


def test_pool_watchdog(pool: Machine) -> None:
    """A parent that hangs is ended and started again."""
    pool_options(pool, "", "WatchdogSec=2s\n")
    client = connect(pool)
    client.hello()
    client.close()
    first = pool_pid(pool)
    time.sleep(5)
    assert pool_pid(pool) == first, "the watchdog bit a healthy parent"
    pool.run("kill", "-STOP", str(first))
    wait_for(lambda: pool_pid(pool) not in (0, first), "the restart")
    assert "Watchdog timeout" in pool.journal("--unit=lmtpd-pool.service")
    client = connect(pool)
    client.hello()
    assert client.deliver(MESSAGE, "jane")[0].startswith("250")
    client.close()


def test_pool_a_broken_configuration_is_a_failed_unit_until_it_is_mended(pool: Machine) -> None:
    with broken(pool):
        wait_for(lambda: failed(pool) == {"lmtpd-pool.service", "lmtpd-check.service"}, "the failed units")
    client = connect(pool)
    client.hello()
    client.close()
    assert failed(pool) <= {"lmtpd-check.service"}  # a check that began late finds nothing wrong any more
    check_faults_are_mended(pool)


def test_pool_with_a_broken_configuration_keeps_its_socket(pool: Machine) -> None:
    """The mail waits, and is delivered as soon as the mistake is mended."""
    with broken(pool):
        # More starts than systemd puts up with by default: 5 of a service in 10 seconds, 20 by a socket in 2.
        for _ in range(40):
            client = connect(pool)
            assert client.reply()[-1].startswith("421 4.3.0")
            client.close()
        send(pool)
        wait_for(lambda: "status=deferred" in pool.journal("--identifier=postfix/lmtp"), "the mail to be deferred")
        assert pool.properties("lmtpd-pool.socket", "ActiveState") == {"ActiveState": "active"}
    wait_for(lambda: pool.run("postqueue", "-f") and messages(pool), "a good start")


def test_pool_mail_in_another_folder(pool: Machine) -> None:
    check_mail_elsewhere(pool)


# --- the container itself ---


def test_a_machine_leaves_nothing_behind(base: Path) -> None:
    machine = Machine(base)
    try:
        assert machine.run("hostname").stdout == "mx.example.com\n"
        init = Path("/proc", machine.root.parent.name)
        assert init.exists()
    finally:
        machine.close()
    assert not init.exists()
    assert machine.console.stem not in Path("/proc/self/mountinfo").read_text()
    assert not list(Path("/sys/fs/cgroup").rglob(machine.cgroup))
    assert not list(machine.console.parent.glob(f"{machine.console.stem}*"))
