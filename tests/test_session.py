"""The dialogue: what a client that talks LMTP to lmtpd is told."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from harness import PATIENCE, Client, Site

MESSAGE = b"Subject: a subject\r\n\r\nA body.\r\n"


@pytest.fixture
def client(site: Site) -> Iterator[Client]:
    client = site.connect()
    client.hello()
    yield client
    client.close()


def body(message: bytes) -> bytes:
    return message.partition(b"\n\n")[2]


# Greeting, LHLO and the simple verbs


def test_greeting_names_host_and_product(site: Site) -> None:
    assert site.connect().reply() == ["220 mx.example.com lmtpd 0.4.1 ready"]


@pytest.mark.parametrize(
    ("serverinfo", "greeting"), [("min", "220 mx.example.com LMTP ready"), ("off", "220 mx.example.com ready")]
)
def test_greeting_can_hide_the_product(site: Site, serverinfo: str, greeting: str) -> None:
    site.configure(serverinfo=serverinfo)
    client = site.connect()
    assert client.reply() == [greeting]
    client.send(b"LHLO client.example\r\n")
    client.reply()
    client.deliver(MESSAGE, "jane")
    assert b"lmtpd 0.4.1" not in site.messages("jane")[0]


def test_lhlo_lists_the_extensions(site: Site) -> None:
    site.configure(maxmessagesize="20K", lmtp_max_recipients="7")
    *extensions, last = site.connect().hello()
    assert extensions == [
        "250-mx.example.com",
        "250-8BITMIME",
        "250-ENHANCEDSTATUSCODES",
        "250-PIPELINING",
        "250-SIZE 20480",
        "250-SMTPUTF8",
        "250-CHUNKING",
        "250-LIMITS RCPTMAX=7",
        "250-IGNOREQUOTA",
        "250-TRACE",
        "250-AUTH EXTERNAL",
    ]
    assert re.fullmatch(r"250 Ok SESSIONID=<[!-~]+>", last)


@pytest.mark.parametrize(
    ("command", "reply"),
    [
        ("NOOP", "250 2.0.0"),
        ("noop with something", "250 2.0.0"),
        ("RSET", "250 2.0.0"),
        ("RSET ", "250 2.0.0"),
        ("RSET now", "501 5.5.4"),
        ("VRFY jane", "252 2.3.3"),
        ("VRFY", "501 5.5.4"),
        ("HELP", "214 2.0.0"),
        ("LHLO", "501 5.5.4"),
        ("HELO client.example", "500 5.5.2"),
        ("EHLO client.example", "500 5.5.2"),
        ("STARTTLS", "500 5.5.2"),
        ("", "500 5.5.2"),
        ("NOOP\0", "500 5.5.2"),
        ("NOOP\tx", "500 5.5.2"),
        (b"NOOP \xff", "500 5.5.2"),
        ("TRACE an-id_1.2", "250 2.0.0"),
        ("TRACE", "501 5.5.4"),
        ("TRACE " + "x" * 256, "501 5.5.4"),
        ("TRACE a b", "501 5.5.4"),
        ("QUIT now", "501 5.5.4"),
        ("QUIT", "221 2.0.0"),
        ("DATA", "503 5.5.1"),
        ("RCPT TO:<jane>", "503 5.5.1"),
        ("MAIL FROM:<a@example.com>", "250 2.1.0"),
        ("mail from:<a@example.com> body=8bitmime size=1 smtputf8", "250 2.1.0"),
        ("MAIL FROM:<>", "250 2.1.0"),
        ("MAIL FROM: <a@example.com>", "501 5.5.4"),
        ("MAIL FROM:a@example.com", "501 5.5.4"),
        ("MAIL <a@example.com>", "501 5.5.4"),
        ("MAIL", "501 5.5.4"),
        ("MAIL FROM:<a@example.com> BODY=BINARYMIME", "501 5.5.4"),
        ("MAIL FROM:<a@example.com> BODY", "501 5.5.4"),
        ("MAIL FROM:<a@example.com> SIZE=x", "501 5.5.4"),
        ("MAIL FROM:<a@example.com> SIZE=1 SIZE=2", "501 5.5.4"),
        ("MAIL FROM:<a@example.com> SMTPUTF8=yes", "555 5.5.4"),
        ("MAIL FROM:<a@example.com> UNHEARD=of", "555 5.5.4"),
        ("MAIL FROM:<é@example.com>", "553 5.6.7"),
        ("MAIL FROM:<é@example.com> SMTPUTF8", "250 2.1.0"),
    ],
)
def test_command(client: Client, command: str | bytes, reply: str) -> None:
    assert client.command(command)[:9] == reply


def test_trace_and_session_ids_are_told(client: Client) -> None:
    assert re.fullmatch(r"250 2\.0\.0 Ok SESSIONID=<[!-~]+> TRACEID=<abc>", client.command("TRACE abc"))


def test_help_lists_the_verbs_with_the_code_on_every_line(client: Client) -> None:
    client.send(b"HELP\r\n")
    lines = client.reply()
    assert all(line[4:].startswith("2.0.0 ") for line in lines)
    assert "LHLO STARTTLS AUTH MAIL RCPT DATA BDAT" in lines[0]


# The transaction


def test_a_refused_command_leaves_the_transaction_as_it_was(client: Client, site: Site) -> None:
    assert client.command("MAIL FROM:<a@example.com> SIZE=x").startswith("501")
    assert client.command("MAIL FROM:<a@example.com>").startswith("250")
    assert client.command("MAIL FROM:<b@example.com>").startswith("503 5.5.1")
    assert client.command("DATA").startswith("503 5.5.1")
    assert client.command("RCPT TO:<nobody>").startswith("550 5.1.1")
    assert client.command("RCPT TO:<jane> NOTIFY=NEVER").startswith("555")
    assert client.command("DATA").startswith("503 5.5.1")
    assert client.command("RCPT TO:<jane>").startswith("250")
    assert client.command("DATA now").startswith("501")
    assert client.command("NONSENSE").startswith("500")
    assert client.command("DATA").startswith("354")
    assert client.command(".").startswith("250 2.1.5")
    assert site.messages("jane")[0].startswith(b"Return-Path: <a@example.com>\n")


@pytest.mark.parametrize("reset", ["RSET", "LHLO again.example"])
def test_rset_and_lhlo_end_the_transaction(client: Client, reset: str) -> None:
    client.command("MAIL FROM:<a@example.com>")
    client.command("RCPT TO:<jane>")
    assert client.command(reset).startswith("250")
    assert client.command("RCPT TO:<jane>").startswith("503")
    assert client.command("MAIL FROM:<a@example.com>").startswith("250")


def test_every_accepted_recipient_gets_a_reply_in_order(client: Client, site: Site) -> None:
    site.add_user("joe")
    replies = client.deliver(MESSAGE, "jane", "nobody", "joe", "jane")
    assert [reply[:9] for reply in replies] == ["250 2.1.5", "550 5.1.1", "250 2.1.5", "250 2.1.5"]
    assert len(site.files("jane")) == 2
    assert len(site.files("joe")) == 1


def test_one_session_carries_many_messages(client: Client, site: Site) -> None:
    for _ in range(20):
        assert client.deliver(MESSAGE, "jane")[0].startswith("250")
    assert len(site.files("jane")) == 20


def test_recipients_are_limited(site: Site) -> None:
    site.configure(lmtp_max_recipients="2")
    client = site.connect()
    client.hello()
    client.command("MAIL FROM:<>")
    replies = [client.command("RCPT TO:<jane>")[:9] for _ in range(3)]
    assert replies == ["250 2.1.5", "250 2.1.5", "452 4.5.3"]


def test_pipelined_commands_are_answered_in_one_write(site: Site) -> None:
    trace = site.root / "strace"
    session = b"LHLO x\r\n" + b"MAIL FROM:<a@example.com>\r\nRCPT TO:<jane>\r\nRSET\r\n" * 20 + b"QUIT\r\n"
    subprocess.run(
        ["strace", "-f", "-e", "trace=write", "-o", str(trace), *site.command()],
        input=session,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        timeout=PATIENCE,
        check=True,
    )
    assert len(re.findall(r"write\(1,", trace.read_text())) == 1


def test_a_pipelined_session_in_one_piece(site: Site) -> None:
    site.add_user("joe")
    transaction = (
        b"MAIL FROM:<a@example.com>\r\nRCPT TO:<jane>\r\nRCPT TO:<nobody>\r\nRCPT TO:<joe>\r\nDATA\r\n"
        + MESSAGE
        + b".\r\n"
    )
    client = site.connect()
    client.send(b"LHLO x\r\n" + transaction * 3 + b"QUIT\r\n")
    codes = [client.reply()[-1][:3] for _ in range(2 + 3 * 7 + 1)]
    assert codes == ["220", "250", *(["250", "250", "550", "250", "354", "250", "250"] * 3), "221"]
    assert client.reply() == []


# Lines


def test_a_session_with_lf_works_at_a_shell(site: Site) -> None:
    result = site.pipe(b"LHLO x\nMAIL FROM:<a@example.com>\nRCPT TO:<jane>\nDATA\nSubject: x\n\nbody\n..\n.\nQUIT\n")
    assert result.returncode == 0
    assert b"\r" not in result.stdout
    assert result.stdout.endswith(b"\n221 2.0.0 Bye\n")
    assert body(site.messages("jane")[0]) == b"body\n.\n"


def test_a_session_that_began_with_crlf_never_falls_back(site: Site) -> None:
    result = site.pipe(b"LHLO x\r\nNOOP\nNOOP\r\nQUIT\r\n")
    assert result.stdout.splitlines()[-2:] == [b"500 5.5.2 Syntax error or unknown command, see HELP", b"221 2.0.0 Bye"]


def test_a_socket_never_speaks_lf(site: Site) -> None:
    client = site.connect()
    client.reply()
    client.send(b"LHLO x\nNOOP\r\n")
    assert client.reply() == ["500 5.5.2 Syntax error or unknown command, see HELP"]


def test_a_terminal_just_works(site: Site) -> None:
    master, terminal = os.openpty()
    child = subprocess.Popen(site.command(), stdin=terminal, stdout=terminal, stderr=subprocess.DEVNULL)
    os.close(terminal)
    os.write(master, b"LHLO x\nQUIT\n")
    seen = b""
    deadline = time.monotonic() + PATIENCE
    while b"221 2.0.0 Bye" not in seen and time.monotonic() < deadline:
        seen += os.read(master, 4096)
    assert child.wait(PATIENCE) == 0
    assert b"250-8BITMIME" in seen
    os.close(master)


@pytest.mark.parametrize(("length", "code"), [(8190, "250 2.0.0"), (8191, "500 5.5.2"), (100_000, "500 5.5.2")])
def test_command_lines_have_a_limit_and_the_rest_is_skipped(client: Client, length: int, code: str) -> None:
    assert client.command(b"NOOP " + b"x" * (length - 5))[:9] == code
    assert client.command("NOOP") == "250 2.0.0 Ok"


def test_too_many_bad_commands_end_the_session(site: Site) -> None:
    site.configure(lmtp_max_bad_commands="3")
    client = site.connect()
    client.hello()
    assert [client.command("NONSENSE")[:3] for _ in range(3)] == ["500"] * 3
    assert client.command("NONSENSE")[:3] == "500"
    assert client.reply() == ["421 4.7.0 Too many bad commands, closing the connection"]
    assert client.reply() == []


def test_unknown_users_are_no_bad_commands(site: Site) -> None:
    site.configure(lmtp_max_bad_commands="2")
    client = site.connect()
    client.hello()
    for _ in range(10):
        assert client.command("MAIL FROM:<>").startswith("250")
        assert client.command("RCPT TO:<nobody>").startswith("550")
        assert client.command("DATA").startswith("503 5.5.1")
        client.command("RSET")


@pytest.mark.parametrize(
    "before", [b"", b"LHLO x\r\n", b"LHLO x\r\nNOO", b"LHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<jane>\r\nDATA\r\nabc"]
)
def test_a_silent_client_is_told_and_left(site: Site, before: bytes) -> None:
    site.configure(lmtp_command_timeout="1s")
    client = site.connect()
    client.send(before)
    while (reply := client.reply())[-1][:3] != "421":
        pass
    assert reply == ["421 4.4.2 Timeout, closing the connection"]
    assert client.reply() == []
    assert site.child.wait(PATIENCE) == 0
    assert site.files("jane") == site.files("jane", kind="tmp") == []


def test_a_client_that_does_not_read_is_left(site: Site) -> None:
    site.configure(lmtp_command_timeout="1s", lmtp_max_idle_commands="0")
    client = site.connect()
    client.sock.settimeout(5)
    with pytest.raises((BrokenPipeError, ConnectionResetError, TimeoutError)):
        client.send(b"HELP\r\n" * 1_000_000)
    assert site.child.wait(PATIENCE) == 0
    assert "does not read the replies" in site.log_text()


# The end of DATA, and BDAT


@pytest.mark.parametrize(
    "false_end",
    [
        b"\n.\n",
        b"\n.\r\n",
        b"\r.\r",
        b"\r.\r\n",
        b"\r\n.\n",
        b"\r\n.\r",
        b"\n.\r",
        b"\r.\n",
        b"\r\n\0.\r\n"[:2] + b" .\r\n",
    ],
)
def test_no_smuggling_only_a_dot_on_a_line_of_its_own_ends_data(client: Client, site: Site, false_end: bytes) -> None:
    smuggled = b"MAIL FROM:<smuggled@example.com>\r\nRCPT TO:<jane>\r\nDATA\r\nSubject: smuggled\r\n\r\n"
    client.command("MAIL FROM:<a@example.com>")
    client.command("RCPT TO:<jane>")
    client.command("DATA")
    client.send(b"Subject: x\r\n\r\nbody" + false_end + smuggled + b"\r\n.\r\n")
    assert client.reply()[0].startswith("250 2.1.5")
    assert client.command("NOOP") == "250 2.0.0 Ok"
    (message,) = site.messages("jane")
    assert b"RCPT TO:<jane>" in message


def begin(client: Client, *recipients: str) -> None:
    client.command("MAIL FROM:<a@example.com>")
    for recipient in recipients:
        client.command(f"RCPT TO:<{recipient}>")


def test_bdat_in_chunks_cut_anywhere(client: Client, site: Site) -> None:
    content = b"Subject: x\r\n\r\n.\r\nbody\r\n"
    for cut in range(len(content) + 1):
        begin(client, "jane")
        client.send(b"BDAT %d\r\n%s" % (cut, content[:cut]))
        assert client.reply() == [f"250 2.0.0 {cut} bytes received"]
        client.send(b"BDAT %d LAST\r\n%s" % (len(content) - cut, content[cut:]))
        assert client.reply()[0].startswith("250 2.1.5")
    assert {body(message) for message in site.messages("jane")} == {b".\nbody\n"}


def test_bdat_pipelined_with_an_empty_last_chunk_and_two_recipients(client: Client, site: Site) -> None:
    site.add_user("joe")
    client.send(
        b"MAIL FROM:<>\r\nRCPT TO:<jane>\r\nRCPT TO:<joe>\r\nBDAT 5\r\na: b\nBDAT 4\r\n\r\nx\rBDAT 0 last\r\nNOOP\r\n"
    )
    codes = [client.reply()[-1][:9] for _ in range(8)]
    assert codes == [
        "250 2.1.0",
        "250 2.1.5",
        "250 2.1.5",
        "250 2.0.0",
        "250 2.0.0",
        "250 2.1.5",
        "250 2.1.5",
        "250 2.0.0",
    ]
    assert site.messages("joe")[0].endswith(b"\na: b\n\nx\r")


def test_octets_of_a_refused_bdat_are_never_commands(client: Client) -> None:
    client.send(b"BDAT 6 LAST\r\nNOOP\r\nRSET\r\n")
    assert client.reply()[0].startswith("503 5.5.1")
    assert client.reply()[0].startswith("250 2.0.0")
    begin(client, "nobody")
    client.send(b"BDAT 6\r\nNOOP\r\nRSET\r\n")
    assert client.reply()[0].startswith("503 5.5.1")
    assert client.reply()[0].startswith("250 2.0.0")


def test_only_bdat_goes_on_after_bdat(client: Client) -> None:
    begin(client, "jane")
    client.send(b"BDAT 3\r\na:b")
    assert client.reply()[0].startswith("250")
    assert client.command("DATA").startswith("503 5.5.1")
    assert client.command("RCPT TO:<jane>").startswith("503 5.5.1")
    assert client.command("MAIL FROM:<>").startswith("503 5.5.1")
    assert client.command("BDAT 0 LAST").startswith("250 2.1.5")


@pytest.mark.parametrize("argument", ["", "x", "-1", "1 FIRST", "1.5", "9" * 21, "1 LAST x"])
def test_a_malformed_bdat_ends_the_session(client: Client, site: Site, argument: str) -> None:
    begin(client, "jane")
    assert client.command(f"BDAT {argument}").startswith("501 5.5.4")
    assert client.reply() == []
    assert site.files("jane") == []


@pytest.mark.parametrize("verb", [b"BDAT", b"bdat"])
@pytest.mark.parametrize("length", [8200, 100_000])
def test_the_chunk_of_a_bdat_line_that_is_too_long_is_never_read_as_commands(
    client: Client, site: Site, verb: bytes, length: int
) -> None:
    begin(client, "jane")
    smuggled = b"RSET\r\nMAIL FROM:<smuggled>\r\nRCPT TO:<jane>\r\n"
    client.send(verb + b" %d%s LAST\r\n" % (len(smuggled), b" " * length) + smuggled)
    assert client.reply()[0][:9] == "501 5.5.4"
    assert client.reply() == []
    assert "smuggled" not in site.log_text()


@pytest.mark.parametrize(
    "ending",
    [b"DATA\r\nSubject: x\r\n\r\nbody\r\n", b"BDAT 10 LAST\r\nabc", b"BDAT 3\r\nabc", b"BDAT 3\r\nabcRSET\r\n"],
)
def test_what_is_not_finished_is_not_stored(client: Client, site: Site, ending: bytes) -> None:
    begin(client, "jane")
    client.send(ending)
    client.sock.shutdown(socket.SHUT_WR)
    assert site.child.wait(PATIENCE) == 0
    assert site.files("jane") == site.files("jane", kind="tmp") == []


# Messages that are refused


@pytest.mark.parametrize("command", ["DATA", "BDAT"])
def test_too_large_a_message_is_refused_for_each_recipient(site: Site, command: str) -> None:
    site.configure(maxmessagesize="1000")
    client = site.connect()
    client.hello()
    assert client.command("MAIL FROM:<> SIZE=1001") == "552 5.2.3 Messages may have at most 1000 bytes"
    assert client.command("MAIL FROM:<> SIZE=99999999999999999999999").startswith("552 5.2.3")
    begin(client, "jane", "jane")
    content = b"Subject: x\r\n\r\n" + b"x" * 985 + b"\r\n"
    if command == "DATA":
        client.command("DATA")
        client.send(content[1:] + b".\r\n")
        assert [client.reply()[0][:9] for _ in range(2)] == ["250 2.1.5"] * 2
        begin(client, "jane", "jane")
        client.command("DATA")
        client.send(content + b"x" * 500_000 + b"\r\n.\r\n")
    else:
        client.send(b"BDAT 1001\r\n" + content[:1001])
        assert client.reply()[0].startswith("552 5.3.4")
        client.send(b"BDAT 5 LAST\r\nNOOP\n")
    assert [client.reply()[0][:9] for _ in range(2)] == ["552 5.3.4"] * 2
    assert client.command("NOOP") == "250 2.0.0 Ok"
    assert len(site.files("jane")) == (2 if command == "DATA" else 0)


def test_nul_is_refused_for_each_recipient(client: Client, site: Site) -> None:
    assert [reply[:9] for reply in client.deliver(b"Subject: x\r\n\r\n\0\r\n", "jane", "jane")] == ["554 5.6.0"] * 2
    assert site.files("jane") == site.files("jane", kind="tmp") == []


@pytest.mark.parametrize(
    ("option", "replies", "subject"),
    [("", "250 2.1.5", b"caf\xe9"), ("munge8bit", "250 2.1.5", b"cafX"), ("reject8bit", "554 5.6.0", None)],
)
def test_8_bit_headers(site: Site, option: str, replies: str, subject: bytes | None) -> None:
    if option:
        site.configure(**{option: "yes"})
    client = site.connect()
    client.hello()
    assert client.deliver(b"Subject: caf\xe9\r\n\r\n\xe9\r\n", "jane")[0][:9] == replies
    for message in site.messages("jane"):
        assert b"\nSubject: %s\n\n\xe9\n" % (subject or b"") in message
    assert len(site.files("jane")) == (0 if subject is None else 1)


def test_smtputf8(client: Client, site: Site) -> None:
    site.add_user("jürgen")
    client.command("MAIL FROM:<müller@exämple.com> SMTPUTF8")
    assert client.command("RCPT TO:<Jürgen@example.com>").startswith("250")
    client.command("DATA")
    client.command("Subject: ü\r\n\r\n.")
    (message,) = site.messages("jürgen")
    assert message.startswith("Return-Path: <müller@exämple.com>\n".encode())
    assert b" with UTF8LMTPA id " in message
    assert "\n\tfor <Jürgen@example.com>;\n".encode() in message
    client.command("MAIL FROM:<>")
    assert client.command("RCPT TO:<jürgen>").startswith("553 5.6.7")


# Who is trusted, and what the client never sees


def over_tcp(site: Site, *arguments: str) -> Client:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        connection, _ = server.accept()
        with connection:
            site.start(connection, *arguments)
    return Client(client)


@pytest.mark.parametrize(("closed", "told"), [("<&-", b"421 4.3.0 System error"), (">&-", b""), ("<&- >&-", b"")])
def test_a_closed_standard_descriptor_is_an_error_of_the_system(site: Site, closed: str, told: bytes) -> None:
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", *site.command()]
    with site.log.open("ab") as log:
        result = subprocess.run(
            command, input=b"LHLO x\r\n", stdout=subprocess.PIPE, stderr=log, env=site.journal(), timeout=PATIENCE
        )
    assert result.returncode == os.EX_OSERR
    assert result.stdout.startswith(told)
    assert result.stdout.count(b"\r\n") == bool(told)
    assert 'system-error cause="standard input or output is closed"' in site.log_text()


@pytest.mark.parametrize(("soft_noauth", "reply"), [("yes", "430 4.7.0"), ("no", "530 5.7.0")])
def test_an_internet_client_has_to_authenticate(site: Site, soft_noauth: str, reply: str) -> None:
    site.configure(soft_noauth=soft_noauth)
    client = over_tcp(site)
    client.hello()
    assert client.command("MAIL FROM:<>")[:9] == reply
    assert client.command("RCPT TO:<jane>").startswith("503")
    assert client.command("QUIT").startswith("221")


def test_an_internet_client_is_trusted_with_a(site: Site) -> None:
    site.configure(tcp_keepalive="yes", tcp_keepalive_idle="1m", tcp_keepalive_cnt="3", tcp_keepalive_intvl="10")
    client = over_tcp(site, "-a")
    client.hello()
    assert client.deliver(MESSAGE, "jane")[0].startswith("250")
    assert (
        b"Received: from client.example ([127.0.0.1])\n\tby mx.example.com (lmtpd 0.4.1) with LMTPA id"
        in site.messages("jane")[0]
    )


def test_a_unix_client_is_known_by_its_uid(client: Client, site: Site) -> None:
    client.deliver(MESSAGE, "jane")
    assert f"(unix socket, uid {os.getuid()})\n".encode() in site.messages("jane")[0]


def test_standard_error_is_not_used_when_it_is_the_connection(site: Site) -> None:
    site.configure(debug="yes", chatty="yes")
    ours, theirs = socket.socketpair()
    with theirs:
        child = subprocess.Popen(site.command(), stdin=theirs.fileno(), stdout=theirs.fileno(), stderr=theirs.fileno())
    client = Client(ours)
    client.hello()
    client.deliver(MESSAGE, "jane")
    assert client.command("QUIT") == "221 2.0.0 Bye"
    assert client.reply() == []
    assert child.wait(PATIENCE) == 0


def test_an_exception_is_logged_and_never_seen_by_the_client(site: Site) -> None:
    fault = "import sys, lmtpd; lmtpd.Session.VERBS['VRFY'] = lambda *_: 1 / 0; sys.exit(lmtpd.main(sys.argv[1:]))"
    with site.log.open("ab") as log:
        result = subprocess.run(
            [sys.executable, "-c", fault, "-C", str(site.conf)],
            input=b"LHLO x\r\nVRFY jane\r\nNOOP\r\n",
            stdout=subprocess.PIPE,
            stderr=log,
            env=site.journal(),
            timeout=PATIENCE,
        )
    assert result.stdout.endswith(b"\r\n421 4.3.0 Internal error, try again later\r\n")
    assert "ZeroDivisionError" in site.log_text()
    assert b"ZeroDivision" not in result.stdout


def test_nothing_in_the_log_can_be_forged(site: Site) -> None:
    site.configure(chatty="yes", debug="yes")
    client = site.connect()
    client.send(b"LHLO x session=forged\r\nNOOP\n<3>forged\x1b[0m\r\nNOOP\x85\r\n")
    client.send(b'MAIL FROM:<"a\\" recipient=b"@example.com>\r\nRCPT TO:<jane>\r\nDATA\r\n')
    client.send(b"Message-ID: <a\xe2\x80\xa8b\n c\r\n reply=forged>\r\n\r\n.\r\nQUIT\r\n")
    while client.reply():
        pass
    for line in site.log_text().splitlines():
        assert re.fullmatch(r'<[3-7]>[a-z ]+( [a-z]+=([^ "]+|"([^"\\]|\\.)*"))+', line), line
        assert line.isascii()
        assert line.isprintable()
