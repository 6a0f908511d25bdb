"""The servers of the tests that take mail keep what they are given, and reply as they are told."""

from __future__ import annotations

import smtplib
import ssl
import subprocess
import threading
from collections.abc import Iterator

import pytest
from authority import Authority
from harness import PATIENCE, Site
from sink import Mail, Run, SendmailScript, Sink

MESSAGE = b"Subject: hello\r\n\r\n.a dot\r\n..\r\n\xff\r\n"


@pytest.fixture
def sink() -> Iterator[Sink]:
    with Sink() as sink:
        yield sink


def client_of(sink: Sink) -> smtplib.SMTP:
    return smtplib.SMTP(*sink.address, local_hostname="client.example", timeout=PATIENCE)


def test_what_is_sent_is_kept(sink: Sink) -> None:
    with client_of(sink) as client:
        client.ehlo()
        assert set(client.esmtp_features) == {
            *("pipelining", "size", "8bitmime", "smtputf8", "dsn", "enhancedstatuscodes")
        }
        options = ["BODY=8BITMIME", "RET=HDRS"]
        client.sendmail("joe@example.org", "Ann@example.net", MESSAGE, options, ["NOTIFY=NEVER"])
        client.sendmail("", ["a@example.net", "b@example.net"], b"x\r\n")
    assert sink.wait(2) == [
        Mail(
            "joe@example.org", (f"size={len(MESSAGE)}", *options), ("Ann@example.net",), (("NOTIFY=NEVER",),), MESSAGE
        ),
        Mail("", ("size=3",), ("a@example.net", "b@example.net"), ((), ()), b"x\r\n"),
    ]
    assert sink.commands[0] == "EHLO client.example"
    assert sink.commands[-1] == "QUIT"
    sink.clear()
    assert not sink.mails
    assert not sink.commands


def test_options_that_are_not_announced_are_refused(sink: Sink) -> None:
    sink.extensions -= {"8BITMIME", "DSN", "SMTPUTF8"}
    with client_of(sink) as client:
        client.ehlo()
        assert "8bitmime" not in client.esmtp_features
        assert client.docmd("MAIL FROM:<> BODY=8BITMIME")[0] == 555
        assert client.docmd("MAIL FROM:<> SMTPUTF8")[0] == 555
        assert client.docmd("MAIL FROM:<>")[0] == 250
        assert client.docmd("RCPT TO:<a@example.net> NOTIFY=NEVER")[0] == 555


def test_addresses_in_utf8_need_smtputf8(sink: Sink) -> None:
    with client_of(sink) as client:
        client.ehlo()
        client.command_encoding = "utf-8"
        assert client.docmd("MAIL FROM:<ä@example.net>")[0] == 553
        assert client.docmd("MAIL FROM:<ä@example.net> SMTPUTF8")[0] == 250
        assert client.docmd("RCPT TO:<ö@example.net>")[0] == 250


@pytest.mark.parametrize("point", ["mail", "rcpt", "data", "message"])
def test_it_refuses_where_it_is_told(sink: Sink, point: str) -> None:
    sink.replies[point] = "451 4.3.0 later"
    with client_of(sink) as client, pytest.raises(smtplib.SMTPException, match=r"4\.3\.0 later"):
        client.sendmail("joe@example.org", "ann@example.net", MESSAGE)
    assert not sink.mails


def test_it_refuses_by_its_greeting(sink: Sink) -> None:
    sink.replies["connect"] = "421 4.3.2 Not now"
    with pytest.raises(smtplib.SMTPConnectError, match="Not now"):
        client_of(sink)


def test_it_has_no_ehlo(sink: Sink) -> None:
    sink.replies["ehlo"] = "502 5.5.1 No"
    with client_of(sink) as client:
        client.sendmail("joe@example.org", "ann@example.net", b"x\r\n")
    assert sink.wait(1)[0].options == ()


def test_it_hangs_up(sink: Sink) -> None:
    sink.replies["message"] = ""
    with client_of(sink) as client, pytest.raises(smtplib.SMTPServerDisconnected):
        client.sendmail("joe@example.org", "ann@example.net", MESSAGE)
    assert not sink.mails


def test_it_refuses_a_recipient(sink: Sink) -> None:
    sink.refuse["later@example.net"] = "450 4.2.0 Later"
    with client_of(sink) as client:
        refused = client.sendmail("joe@example.org", ["later@example.net", "ann@example.net"], MESSAGE)
    assert refused == {"later@example.net": (450, b"4.2.0 Later")}
    assert sink.wait(1)[0].recipients == ("ann@example.net",)


def test_it_holds_a_reply(sink: Sink) -> None:
    sink.hold["message"] = threading.Event()
    with client_of(sink) as client:
        sending = threading.Thread(target=client.sendmail, args=("joe@example.org", "ann@example.net", MESSAGE))
        sending.start()
        sink.wait(1)
        assert sending.is_alive()
        sink.hold["message"].set()
        sending.join(PATIENCE)
        assert not sending.is_alive()


def test_it_ends_while_it_holds_a_reply() -> None:
    with Sink() as sink:
        sink.hold["mail"] = threading.Event()
        client = client_of(sink)
        client.ehlo()
        client.putcmd("MAIL FROM:<>")
    client.close()


def test_it_has_tls_and_users(site: Site) -> None:
    authority = Authority(site)
    certificate, key = authority.sign("sink.example.net")
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate, key)
    with Sink(tls, {"mx": "secret"}, required=True) as sink, client_of(sink) as client:
        client.ehlo()
        assert "starttls" in client.esmtp_features
        assert "auth" not in client.esmtp_features
        client._host = "sink.example.net"  # type: ignore[attr-defined]
        client.starttls(context=authority.client_context())
        client.ehlo()
        assert client.docmd("MAIL FROM:<>")[0] == 530
        with pytest.raises(smtplib.SMTPAuthenticationError):
            client.login("mx", "wrong")
        client.login("mx", "secret")
        client.sendmail("joe@example.org", "ann@example.net", MESSAGE)
        [mail] = sink.wait(1)
        assert (mail.secure, mail.user) == (True, "mx")


def test_it_has_users_without_tls() -> None:
    with Sink(users={"mx": "secret"}, in_clear=True, mechanisms=("LOGIN",)) as sink, client_of(sink) as client:
        client.login("mx", "secret")
        client.sendmail("joe@example.org", "ann@example.net", MESSAGE)
        assert sink.wait(1)[0].user == "mx"


def test_the_script_keeps_what_it_is_given(site: Site) -> None:
    script = SendmailScript(site)
    for recipient in ("a@example.net", "b c@example.net"):
        command = [str(script.path), "-i", "-f", "", "--", recipient]
        assert subprocess.run(command, input=MESSAGE, timeout=PATIENCE).returncode == 0
    assert script.wait(2) == [
        Run(("-i", "-f", "", "--", "a@example.net"), MESSAGE),
        Run(("-i", "-f", "", "--", "b c@example.net"), MESSAGE),
    ]


def test_the_script_exits_as_it_is_told(site: Site) -> None:
    script = SendmailScript(site, 75, "not now\n")
    script.exit_with(67, "none@example.net", "not now\n")
    for recipient, status in (("a@example.net", 75), ("none@example.net", 67)):
        done = subprocess.run([str(script.path), recipient], input=MESSAGE, stderr=subprocess.PIPE, timeout=PATIENCE)
        assert (done.returncode, done.stderr) == (status, b"not now\n")


def test_the_script_is_held(site: Site) -> None:
    script = SendmailScript(site)
    script.hold()
    with subprocess.Popen([str(script.path), "a@example.net"], stdin=subprocess.PIPE) as running:
        assert running.stdin is not None
        running.stdin.close()
        script.wait(1)
        assert running.poll() is None
        script.release()
        assert running.wait(PATIENCE) == 0
