"""Mail that scripts send leaves by the sendmail(8) of Postfix and of Exim, as their packages install them.

They are started as lmtpd starts them, at /usr/sbin/sendmail and with the bits by which they gain the rights to write to
their queues. What is theirs alone in the file system is seen by lmtpd and its children only.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from collections.abc import Iterator
from email import message_from_bytes
from pathlib import Path

import pytest
from harness import PATIENCE, Client, Site, wait_for
from peers import PostfixQueue, program, programs_running, unpacked
from sieve import script_text
from sink import Mail, SendmailScript, Sink

SENDER = "sender@example.org"
FORWARD = 'redirect "joe@example.net";'
NUMBERS = itertools.count()
AROUND = ["unshare", "--mount", "sh", "-euc"]
FOR_EXIM = """
mount -t overlay -o "lowerdir=$1:/etc" none /etc
mount --bind "$2" /usr/sbin/sendmail
shift 2
exec "$@"
"""
# What Debian's configuration says, without which -f is for trusted users only.
EXIM_CONF = """\
local_from_check = false
local_sender_retain = true
untrusted_set_sender = *
primary_hostname = mx.example.org
exim_path = /usr/sbin/sendmail
spool_directory = {folder}/spool
log_file_path = {folder}/log-%s
keep_environment =
acl_not_smtp = from_programs
begin acl
from_programs:
  {acl}
  accept
begin routers
all:
  driver = manualroute
  route_list = * elsewhere.example.net byname
  self = send
  transport = smtp
begin retry
* * F,1h,1h
begin transports
smtp:
  driver = smtp
  port = {port}
"""


class House(Site):
    """A site whose lmtpd sees another sendmail than that of the system. around: the command that makes it so."""

    around: tuple[str, ...] = ()

    def command(self, *arguments: str) -> list[str]:
        return [*self.around, *super().command(*arguments)]

    def deliver(self, message: bytes, sender: str = SENDER) -> str:
        """Delivers a message to jane; the reply."""
        client = self.connect()
        client.hello()
        [reply] = client.deliver(message, "jane@example.com", sender=sender)
        client.leave()
        self.child.wait(PATIENCE)
        return reply

    def write(self, script: str) -> None:
        """Makes that jane's script."""
        (self.root / "sieve/jane.sieve").write_text(script)


class EximQueue:
    """Exim, which sends all to the sink."""

    def __init__(self, house: House, sink: Sink) -> None:
        self.folder = house.root / "exim"
        self.etc = self.folder / "etc"
        (self.etc / "exim4").mkdir(parents=True)
        for name, line in {
            "passwd": "Debian-exim:x:64999:64999::/nonexistent:/bin/false",
            "group": "Debian-exim:x:64999:",
            "hosts": "127.0.0.1 elsewhere.example.net",
        }.items():
            (self.etc / name).write_text(Path("/etc", name).read_text() + f"\n{line}\n")
        os.chown(self.folder, 64999, 64999)
        self._port = sink.port
        house.around = (*AROUND, FOR_EXIM, "sh", str(self.etc), str(unpacked("exim") / "usr/sbin/exim4"))
        self.accept()

    def _configure(self, acl: str) -> None:
        text = EXIM_CONF.format(folder=self.folder, port=self._port, acl=acl)
        (self.etc / "exim4/exim4.conf").write_text(text)

    def refuse(self) -> None:
        """Makes it refuse mail, but for its own reports."""
        self._configure("deny\n  ! senders = :\n  message = is not allowed to submit mail")

    def accept(self) -> None:
        self._configure("")

    def wait_until_sent(self) -> None:
        """Returns when no message is left in the queue."""
        wait_for(lambda: not list(self.folder.glob("spool/input/*-H")), "Exim's queue to become empty")


def postfix_queue(house: House, sink: Sink) -> PostfixQueue:
    """Postfix, which the house's lmtpd sees as the system's, and which sends all to the sink."""
    queue = PostfixQueue(house, sink.port)
    house.around = queue.around
    return queue


@pytest.fixture
def sink() -> Iterator[Sink]:
    with Sink() as sink:
        yield sink


@pytest.fixture
def house() -> Iterator[House]:
    house = House(smtp_backend="sendmail", duplicatesuppression="yes")
    (house.root / "sieve").mkdir()
    house.configure(sieve_script=f"{house.root}/sieve/%u.sieve")
    house.add_user("jane")
    yield house
    house.close()


@pytest.fixture(params=["Postfix", "Exim"])
def queue(request: pytest.FixtureRequest, house: House, sink: Sink) -> Iterator[PostfixQueue | EximQueue]:
    if request.param == "Exim":
        yield EximQueue(house, sink)
    else:
        with postfix_queue(house, sink) as postfix:
            yield postfix


def letter(body: bytes = b".A body.\r\n") -> bytes:
    """A message that is not the same as any before."""
    number = next(NUMBERS)
    header = f"From: {SENDER}\r\nTo: jane@example.com\r\nSubject: {number}\r\nMessage-ID: <{number}@example.org>\r\n"
    return f"{header}Date: Sun, 22 Nov 2026 12:00:00 +0000\r\n\r\n".encode() + body


def sent_to(sink: Sink, recipient: str) -> list[Mail]:
    return [mail for mail in sink.mails if mail.recipients == (recipient,)]


@pytest.mark.parametrize("sender", [SENDER, '"a b"@example.org', "-f@example.org", ""])
def test_a_forward_keeps_the_senders_address(
    house: House, queue: PostfixQueue | EximQueue, sink: Sink, sender: str
) -> None:
    house.write(FORWARD)
    message = letter(b".\r\n..A body.\r\n.\r\n")
    assert house.deliver(message, sender).startswith("250")
    queue.wait_until_sent()
    [mail] = sink.mails
    assert (mail.reverse_path, mail.recipients) == (sender, ("joe@example.net",))
    assert mail.octets.endswith(b"\r\n\r\n.\r\n..A body.\r\n.\r\n")
    fields = message_from_bytes(mail.octets)
    assert fields["Subject"] == message_from_bytes(message)["Subject"]
    assert [fields["Return-Path"], fields["Sender"]] == [None, None]
    assert house.files("jane") == []


def test_an_answer_has_no_sender(house: House, queue: PostfixQueue | EximQueue, sink: Sink) -> None:
    house.write(script_text("vacation", 'vacation "I am away.";'))
    for _ in range(2):
        assert house.deliver(letter()).startswith("250")
    queue.wait_until_sent()
    [mail] = sink.mails
    assert (mail.reverse_path, mail.recipients) == ("", (SENDER,))
    fields = message_from_bytes(mail.octets)
    assert (fields["From"], fields["Auto-Submitted"]) == ("jane@example.com", "auto-replied")
    assert len(house.files("jane")) == 2


def test_what_sendmail_refuses_is_put_off(house: House, queue: PostfixQueue | EximQueue, sink: Sink) -> None:
    """The log says why, as sendmail does. The sender, who gets a reply at every try, gets no mail as well."""
    house.write(FORWARD)
    message = letter()
    queue.refuse()
    for _ in range(2):
        assert house.deliver(message).startswith("451 4.4.0")
    queue.wait_until_sent()
    assert house.files("jane") == []
    assert house.log_text().count("is not allowed to submit mail") == 2
    assert sink.mails == []
    queue.accept()
    for _ in range(2):
        assert house.deliver(message).startswith("250")
    queue.wait_until_sent()
    assert [mail.recipients for mail in sink.mails] == [("joe@example.net",)]


def test_a_stopped_postfix_takes_mail_and_sends_it_later(house: House, sink: Sink) -> None:
    house.write(FORWARD)
    postfix = postfix_queue(house, sink)
    with postfix:
        pass
    assert house.deliver(letter()).startswith("250")
    assert sink.mails == []
    with postfix:
        sink.wait(1)
        postfix.wait_until_sent()
    assert [mail.recipients for mail in sink.mails] == [("joe@example.net",)]


def test_a_program_that_does_not_end_is_ended(house: House, sink: Sink) -> None:
    """Postfix' sendmail tries for ever to write to a queue that it must not write to, and so does its child."""
    house.write(FORWARD)
    house.figures = {"SEND_PATIENCE": 2, "BACKOFF": 0}
    message = letter()
    with postfix_queue(house, sink) as postfix:
        maildrop = postfix.queue / "maildrop"
        mode = maildrop.stat().st_mode
        maildrop.chmod(0o700)
        client = begin(house, message)
        namespace = os.readlink(f"/proc/{house.child.pid}/ns/mnt")
        assert client.reply()[-1].startswith("451 4.4.0")
        client.leave()
        house.child.wait(PATIENCE)
        assert processes_in(namespace) == []
        assert "has not ended after 2 seconds" in house.log_text()
        maildrop.chmod(mode)
        assert house.deliver(message).startswith("250")
        postfix.wait_until_sent()
    assert [mail.recipients for mail in sink.mails] == [("joe@example.net",)]


def begin(house: House, message: bytes) -> Client:
    """Sends a message up to its final dot, and does not wait for the reply."""
    client = house.connect()
    client.hello()
    for command in (f"MAIL FROM:<{SENDER}>", "RCPT TO:<jane@example.com>", "DATA"):
        assert client.command(command)[0] in "23"
    client.send(message + b".\r\n")
    return client


def processes_in(namespace: str) -> list[str]:
    """The names of the processes that see what lmtpd saw."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(process / "ns/mnt") == namespace:
                found.append((process / "comm").read_text())
        except OSError:  # it has ended
            pass
    return found


# A part of a message is not sent: sendmail takes the end of its input for the end of the message


DELIVERED = b"\r\n250 2.1.5 Ok SESSIONID"
LONG = b"0123456789abcdef\r\n" * 50_000


def calls_in(trace: Path) -> list[int]:
    """The numbers of the calls of write(2) by which lmtpd wrote something else than replies and its log."""
    lines = [line for line in trace.read_text().splitlines() if line.startswith("write(")]
    return [number for number, line in enumerate(lines, 1) if not re.match(r"write\([12]<", line)]


def traced(site: Site, message: bytes, *inject: str) -> bytes:
    """Delivers a message under strace(1); the replies. The calls of lmtpd itself are traced, not those of others."""
    session = b"LHLO x\r\nMAIL FROM:<%s>\r\nRCPT TO:<jane@example.com>\r\nDATA\r\n%s.\r\nQUIT\r\n"
    options = ["-y", "-s", "8", "-e", "trace=write", "-o", str(site.root / "trace"), *inject]
    with site.log.open("ab") as log:
        return subprocess.run(
            [program("strace"), *options, *site.command()],
            input=session % (SENDER.encode(), message),
            stdout=subprocess.PIPE,
            stderr=log,
            env=site.journal(),
            timeout=PATIENCE,
        ).stdout


def test_half_a_message_is_not_sent_when_lmtpd_is_killed(house: House) -> None:
    sendmail = SendmailScript(house)
    house.configure(sendmail=str(sendmail.path))
    house.write(FORWARD)
    assert DELIVERED in traced(house, letter(LONG))
    calls = calls_in(house.root / "trace")
    for part in range(1, 8):
        message = letter(LONG)
        kill = f"inject=write:signal=KILL:when={calls[len(calls) * part // 8]}"
        assert DELIVERED not in traced(house, message, "-e", kill)
        assert house.deliver(message).startswith("250")
    wait_for(lambda: not programs_running(str(sendmail.path)), "all runs to end")
    assert len(sendmail.runs) >= 8
    end = b"\n\n" + LONG.replace(b"\r\n", b"\n")
    assert [len(run.octets) for run in sendmail.runs if not run.octets.endswith(end)] == []


def test_half_a_message_is_not_sent_by_a_program_that_is_too_slow(house: House) -> None:
    """It is ended, and does not see the end of its input before."""
    slow = house.root / "slow"
    slow.write_text(
        "#!/bin/sh\nhead -c 100 >/dev/null\nsleep 4\ncat >/dev/null\ntouch '{}'\n".format(house.root / "sent")
    )
    slow.chmod(0o755)
    house.root.chmod(0o777)  # whoever runs it may write here
    house.configure(sendmail=str(slow))
    house.figures = {"SEND_PATIENCE": 1, "BACKOFF": 0}
    house.write(FORWARD)
    assert house.deliver(letter(LONG)).startswith("451 4.4.0")
    assert programs_running(str(slow)) == []
    assert not (house.root / "sent").exists()
