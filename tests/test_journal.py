"""What lmtpd logs is found in a real journal by its fields."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from container import Machine
from harness import wait_for
from test_systemd import MESSAGE, connect, empty_maildir, messages, pool, reset, services  # noqa: F401

EVENTS_7 = Path(__file__).parent.parent / "man" / "lmtpd-events.7"
FACILITY_MAIL, FACILITY_LOCAL3 = "2", "19"
PRIORITY_WARNING, PRIORITY_INFO = "4", "6"
DATED = b"Message-ID: <%b@example.org>\r\nDate: Sun, 22 Nov 2026 12:00:00 +0000\r\n" + MESSAGE


@pytest.fixture
def machine(installed: Machine) -> Iterator[Machine]:
    """A machine with lmtpd.socket listening, whose journal has nothing of lmtpd."""
    empty_maildir(installed)
    installed.shell("journalctl --sync; journalctl --rotate; journalctl --vacuum-time=1us 2>&1")
    installed.run("systemctl", "start", "lmtpd.socket")
    assert installed.journal("--identifier=lmtpd") == ""
    yield installed
    reset(installed, "lmtpd@.service", "lmtpd.socket")


def deliver(machine: Machine, *recipients: str, name: str = "one") -> str:
    """Delivers a message to them, waits for the end of the process, and returns the session's id."""
    client = connect(machine)
    client.hello()
    client.deliver(DATED % name.encode(), *recipients)
    found = re.search(r"SESSIONID=<(\S+)>", client.command("RSET"))
    assert found
    client.leave()
    wait_for(lambda: not services(machine), "the end of the session")
    return str(found[1])


def entries(machine: Machine, *matches: str) -> list[dict[str, object]]:
    """The journal's entries of lmtpd that match, with their fields."""
    text = machine.journal("--output=json", "--all", "SYSLOG_IDENTIFIER=lmtpd", *matches)
    return [json.loads(line) for line in text.splitlines()]


def example(beginning: str) -> str:
    """The commands of the page in the block that begins so."""
    found: list[str] = re.findall(r"^\.Bd -literal.*?\n(.*?)^\.Ed$", EVENTS_7.read_text(), re.MULTILINE | re.DOTALL)
    [command] = [block.replace("\\e", "\\") for block in found if block.startswith(beginning)]
    return command


def test_a_delivery_is_found_by_each_of_its_fields(machine: Machine) -> None:
    session = deliver(machine, "jane@example.com")
    [file] = messages(machine)
    [entry] = entries(machine)
    assert entry["LMTPD_FILE"] == file.name
    for match in (
        "LMTPD_RECIPIENT=jane@example.com",
        "LMTPD_SENDER=sender@example.com",
        "LMTPD_MSGID=one@example.org",
        f"LMTPD_SESSION={session}",
        "LMTPD_EVENT=delivered",
        "LMTPD_MAILBOX=/var/spool/lmtpd/jane",
    ):
        assert [found["LMTPD_FILE"] for found in entries(machine, match)] == [file.name], match
    assert entries(machine, "LMTPD_RECIPIENT=joe@example.com") == []


def test_a_delivery_is_one_line_with_the_facility_and_the_priority_of_syslog(machine: Machine) -> None:
    deliver(machine, "jane@example.com")
    [entry] = entries(machine)
    assert (entry["SYSLOG_FACILITY"], entry["PRIORITY"]) == (FACILITY_MAIL, PRIORITY_INFO)
    assert str(entry["_SYSTEMD_UNIT"]).startswith("lmtpd@")
    message = str(entry["MESSAGE"])
    assert re.fullmatch(
        r"delivered session=(\S+) msgid=<one@example\.org> size=\d+ sender=<sender@example\.com> "
        r'recipient=<jane@example\.com> mailbox=/var/spool/lmtpd/jane file="\S+" reply="250 2\.1\.5" ms=\d+',
        message,
    ), message
    assert machine.journal("--identifier=lmtpd").splitlines() == [message]


def test_the_facility_is_that_of_the_option(machine: Machine) -> None:
    conf = machine.root / "etc/imapd.conf"
    before = conf.read_text()
    conf.write_text(before + "syslog_facility: local3\n")
    try:
        deliver(machine, "jane@example.com")
    finally:
        conf.write_text(before)
    assert [entry["SYSLOG_FACILITY"] for entry in entries(machine)] == [FACILITY_LOCAL3]


def test_the_lines_of_a_worker_are_found(pool: Machine) -> None:  # noqa: F811
    with contextlib.closing(connect(pool)) as client:
        client.hello()
        assert client.deliver(DATED % b"by-a-worker", "jane@example.com")[0].startswith("250")
        [entry] = wait_for(lambda: entries(pool, "LMTPD_MSGID=by-a-worker@example.org"), "the line")
        assert entry["LMTPD_EVENT"] == "delivered"
        assert entry["_SYSTEMD_UNIT"] == "lmtpd-pool.service"
        assert entry["_PID"] == str(entry["LMTPD_SESSION"]).split("-")[1]


def test_a_refused_recipient_is_a_second_line(machine: Machine) -> None:
    session = deliver(machine, "jane@example.com", "nobody@example.com")
    assert [entry["LMTPD_EVENT"] for entry in entries(machine, f"LMTPD_SESSION={session}")] == ["refused", "delivered"]
    [refused] = entries(machine, "LMTPD_RECIPIENT=nobody@example.com")
    assert (refused["LMTPD_REPLY"], refused["PRIORITY"]) == ("550 5.1.1 User unknown", PRIORITY_INFO)
    assert len(entries(machine)) == 2


def test_each_recipient_of_a_transaction_that_is_cut_off_finds_it(machine: Machine) -> None:
    client = connect(machine)
    client.hello()
    for command in ("MAIL FROM:<sender@example.com>", "RCPT TO:<jane@example.com>", "RCPT TO:<jane+a@example.com>"):
        assert client.command(command).startswith("250")
    client.close()
    wait_for(lambda: not services(machine), "the end of the session")
    for address in ("jane@example.com", "jane+a@example.com"):
        [entry] = entries(machine, f"LMTPD_RECIPIENT={address}")
        assert (entry["LMTPD_EVENT"], entry["PRIORITY"]) == ("transaction-cut-off", PRIORITY_WARNING)


def test_the_pages_command_counts_events_and_replies(machine: Machine) -> None:
    for name in ("one", "two", "three"):
        deliver(machine, "jane@example.com", "nobody@example.com", name=name)
    deliver(machine, "jane@example.com", name="one")
    machine.run("journalctl", "--sync")
    shown = machine.shell(example("journalctl -t lmtpd -S today -o cat"))
    assert sorted(line.split(maxsplit=1) for line in shown.splitlines()) == [
        ["1", 'duplicate reply="250 2.1.5"'],
        ["3", 'delivered reply="250 2.1.5"'],
        ["3", 'refused reply="550 5.1.1 User unknown"'],
    ]


def searches(**values: str) -> dict[str, str]:
    """The page's searches, by the comment before each, with these values of the fields of the journal."""
    found = dict(re.findall(r"^# (.*)\n(journalctl .*)$", example("# what happened"), re.MULTILINE))
    assert len(found) == 8
    for field, value in values.items():
        found = {comment: re.sub(rf"(LMTPD_{field}=)\S+", rf"\1{value}", found[comment]) for comment in found}
    return found


def found_events(machine: Machine, command: str) -> list[str]:
    """The events of the lines that the page's command finds."""
    machine.run("journalctl", "--sync")
    return re.findall(r"lmtpd\[\d+\]: (\S+) ", machine.run(*shlex.split(command)).stdout)


def test_the_pages_command_says_why_mail_is_deferred(machine: Machine) -> None:
    deliver(machine, "jane@example.com", name="before")
    quota = machine.root / "var/spool/lmtpd/jane/maildirsize"
    quota.write_text("10S\n100 1\n")
    commands = searches()
    try:
        deliver(machine, "jane@example.com", name="big")
    finally:
        quota.unlink()
    for comment in ("why mail for a recipient is deferred: warnings and errors", "problems today"):
        assert found_events(machine, commands[comment]) == ["over-quota"]


def test_the_pages_searches_find_the_mail(machine: Machine) -> None:
    session = deliver(machine, "jane@example.com", "nobody@example.com")
    deliver(machine, "jane@example.com")
    found = {comment: found_events(machine, command) for comment, command in searches(SESSION=session).items()}
    assert found == {
        "what happened to mail for a recipient": ["delivered", "duplicate"],
        "what happened to a message": ["delivered", "duplicate"],
        "all lines of a session": ["refused", "delivered"],
        "which mail was refused today": ["refused"],
        "which mail came twice today, and was stored once": ["duplicate"],
        "what was stored in a folder": [],
        "problems today": [],
        "why mail for a recipient is deferred: warnings and errors": [],
    }


def test_the_pages_search_for_a_folder(machine: Machine) -> None:
    """The recipient there is the address with the detail."""
    maildir = machine.root / "var/spool/lmtpd/jane"
    machine.shell(
        "cd /var/spool/lmtpd/jane; install -d -o lmtpd -g lmtpd -m 700 .lists .lists/tmp .lists/new .lists/cur"
    )
    try:
        deliver(machine, "jane+lists@example.com")
    finally:
        shutil.rmtree(maildir / ".lists")
    folder = searches(MAILBOX="/var/spool/lmtpd/jane/.lists")["what was stored in a folder"]
    assert found_events(machine, folder) == ["delivered"]
    for address, events in {"jane@example.com": [], "jane+lists@example.com": ["delivered"]}.items():
        command = searches(RECIPIENT=address)["what happened to mail for a recipient"]
        assert found_events(machine, command) == events


def test_postfix_logs_the_session(machine: Machine) -> None:
    """By it, the pages' commands lead from the log of Postfix to that of lmtpd, and back."""
    message = "Message-ID: <posted@example.org>\nSubject: x\n\nx\n"
    machine.run("sendmail", "-f", "sender@example.com", "jane@example.com", stdin=message)
    [delivered] = wait_for(lambda: entries(machine, "LMTPD_MSGID=posted@example.org"), "the delivery")
    logged = wait_for(lambda: re.findall("status=sent .*", machine.journal("-t", "postfix/lmtp")), "Postfix's line")
    assert logged == [f"status=sent (250 2.1.5 Ok SESSIONID=<{delivered['LMTPD_SESSION']}>)"]
    ours, theirs = example("journalctl LMTPD_SESSION").splitlines()
    session = "lmtpd-4780-1795374589374747"
    ours, theirs = (command.replace(session, str(delivered["LMTPD_SESSION"])) for command in (ours, theirs))
    assert found_events(machine, ours) == ["delivered"]
    assert logged[0] in machine.run(*shlex.split(theirs)).stdout
