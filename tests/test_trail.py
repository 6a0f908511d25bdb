"""What the log tells of mail that was refused or cut off, and the names under which lmtpd finds users."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from pathlib import Path

import pytest
from harness import PATIENCE, Client, Site, wait_for

import lmtpd

MESSAGE = b"Subject: x\r\n\r\nA body.\r\n"


def lines(site: Site, event: str) -> list[str]:
    """The log's lines of an event, without the session's id."""
    return [re.sub(r" session=\S+", "", line) for line in site.log_text().splitlines() if f">{event} session" in line]


def connected(site: Site, **options: str) -> Client:
    site.configure(**options)
    client = site.connect()
    client.hello()
    return client


# A transaction that is cut off


def begin(client: Client, ending: bytes) -> None:
    """A transaction with two recipients, and the beginning of its message."""
    for command in ("MAIL FROM:<sender@example.com> SIZE=5000", "RCPT TO:<jane@x>", "RCPT TO:<jane+a@x>"):
        assert client.command(command).startswith("250")
    client.send(ending)


@pytest.mark.parametrize(
    ("ending", "received"),
    # The end of a line may belong to the end of the message, and does not count before more has come.
    [
        (b"", 0),
        (b"DATA\r\nSubject: x\r\n", 10),
        (b"DATA\r\nSubject: x\r\n\r\nhalf", 18),
        (b"BDAT 10\r\n0123456789", 10),
        (b"BDAT 10\r\n01234", 5),
    ],
)
def test_a_client_that_leaves_in_a_transaction_leaves_a_trace(site: Site, ending: bytes, received: int) -> None:
    client = connected(site)
    begin(client, ending)
    client.sock.shutdown(socket.SHUT_WR)
    assert site.child.wait(PATIENCE) == os.EX_OK
    transaction = 'sender=<sender@example.com> recipient="<jane@x>, <jane+a@x>" size=5000'
    expected = f'<4>transaction-cut-off {transaction} received={received} reason="end of file"'
    assert lines(site, "transaction-cut-off") == [expected]


def test_a_timeout_in_a_message_leaves_a_trace(site: Site) -> None:
    client = connected(site, lmtp_command_timeout="3s")
    begin(client, b"DATA\r\nSubject: x\r\n")
    assert client.reply()[0].startswith("354")
    assert client.reply()[0].startswith("421 4.4.2")
    [line] = wait_for(lambda: lines(site, "transaction-cut-off"), "the line", site.log)
    assert line.endswith('received=10 reason="421 4.4.2 Timeout, closing the connection"')


def test_a_process_that_has_to_end_leaves_a_trace(site: Site) -> None:
    site.figures = {"GRACE": 1}
    client = connected(site)
    begin(client, b"DATA\r\nSubject: x\r\n")
    assert client.reply()[0].startswith("354")
    site.child.terminate()
    [line] = wait_for(lambda: lines(site, "transaction-cut-off"), "the line", site.log)
    assert line.endswith("received=10 reason=terminated")


@pytest.mark.parametrize("end", ["QUIT", "RSET", "LHLO x"])
def test_a_client_that_ends_the_transaction_itself_is_nothing_to_report(site: Site, end: str) -> None:
    client = connected(site)
    begin(client, b"")
    assert client.command(end)[:1] == "2"
    client.close()
    assert site.child.wait(PATIENCE) == os.EX_OK
    assert lines(site, "transaction-cut-off") == []


def test_a_client_that_does_not_wait_for_the_reply_was_not_cut_off(site: Site) -> None:
    client = connected(site)
    begin(client, b"DATA\r\n" + MESSAGE + b".\r\n")
    client.close()
    assert site.child.wait(PATIENCE) == os.EX_OK
    assert lines(site, "transaction-cut-off") == []
    assert len(lines(site, "delivered")) == 2


# Refusals


def test_a_refused_recipient_is_logged_with_sender_and_size_and_what_follows_from_it_is_not(site: Site) -> None:
    client = connected(site)
    client.send(b"MAIL FROM:<sender@example.com> SIZE=123\r\nRCPT TO:<nobody@x>\r\nDATA\r\n")
    assert [client.reply()[0][:3] for _ in range(3)] == ["250", "550", "503"]
    transaction = "sender=<sender@example.com> recipient=<nobody@x> size=123"
    expected = f'<6>refused command="RCPT TO:<nobody@x>" {transaction} reply="550 5.1.1 User unknown"'
    assert lines(site, "refused") == [expected]


def test_what_follows_from_a_refusal_is_logged_with_debug(site: Site) -> None:
    client = connected(site, debug="yes")
    client.send(b"MAIL FROM:<>\r\nRCPT TO:<>\r\nRCPT TO:jane\r\nDATA\r\n")
    assert [client.reply()[0][:3] for _ in range(4)] == ["250", "550", "501", "503"]
    assert [line.split(" reply=")[0] for line in lines(site, "refused")] == [
        '<6>refused command="RCPT TO:<>" sender=<> recipient=<> size=0',
        '<6>refused command="RCPT TO:jane" sender=<> recipient=<> size=0',
        "<6>refused command=DATA",
    ]


def test_a_recipient_that_cannot_be_read_is_not_logged_as_the_one_before(site: Site) -> None:
    client = connected(site, lmtp_strict_rfc2821="no")
    assert client.command("MAIL FROM:<>").startswith("250")
    assert client.command("RCPT TO:<nobody@x>").startswith("550")
    for line in (b"RCPT TO:<jane@\xe9>", b"RCPT TO:<jane\x07>"):
        assert client.command(line).startswith("500")
    assert [re.findall("recipient=(\\S+)", line) for line in lines(site, "refused")] == [["<nobody@x>"], ["<>"], ["<>"]]


def test_data_without_a_recipient_is_the_clients_fault(site: Site) -> None:
    client = connected(site)
    assert client.command("DATA").startswith("503")
    assert client.command("MAIL FROM:<>").startswith("250")
    assert client.command("DATA").startswith("503")
    assert len(lines(site, "refused")) == 2


def test_too_many_recipients_are_logged_once_for_each_message(site: Site) -> None:
    client = connected(site, lmtp_max_recipients="1")
    for _ in range(2):
        replies = client.deliver(MESSAGE, "jane", "jane+a", "jane+b")
        assert [reply[:3] for reply in replies] == ["250", "452", "452"]
    assert len(lines(site, "refused")) == 2


def test_an_end_that_no_command_asked_for_is_no_refusal(site: Site) -> None:
    client = connected(site)
    site.child.terminate()
    assert client.reply()[0].startswith("421 4.3.2")
    client.close()
    assert site.child.wait(PATIENCE) == os.EX_OK
    assert lines(site, "refused") == []
    end = f'peer="unix socket, uid {os.getuid()}" reason="421 4.3.2 Shutting down, try again later"'
    assert lines(site, "disconnected") == [f"<6>disconnected {end}"]


def test_a_line_that_is_too_long_is_logged_with_its_beginning(site: Site) -> None:
    client = connected(site)
    assert client.command("MAIL FROM:<" + "a" * 9000).startswith("500")
    assert lines(site, "refused") == ['<6>refused command="MAIL FROM:<aaaaa" reply="500 5.5.2 Line too long"']


# The tokens of a command


@pytest.mark.parametrize("space", ["\t", " \t ", "\v", "\f", "\u00a0", "\u2003"])
def test_white_space_after_a_command_is_tolerated(site: Site, space: str) -> None:
    client = connected(site)
    for command, code in {
        "LHLO x": "250",
        "NOOP": "250",
        "VRFY jane": "252",
        "MAIL FROM:<a@b> SIZE=1": "250",
        "RCPT TO:<jane@x>": "250",
        "RSET": "250",
        "MAIL FROM:<>": "250",
        "RCPT TO:<jane>": "250",
        "BDAT 0 LAST": "250",
        "QUIT": "221",
    }.items():
        assert client.command(command + space).startswith(code), command


def test_a_sub_address_with_a_space_needs_no_quotes(site: Site) -> None:
    site.add_user("jane/.Some Folder")
    client = connected(site)
    assert client.deliver(MESSAGE, "jane+Some Folder")[0].startswith("250")
    assert b'\n\tfor <"jane+Some Folder">;' in site.messages("jane", ".Some Folder")[0]


@pytest.mark.parametrize(
    ("sender", "return_path"),
    [
        ("a@b..c", "a@b..c"),
        ("a@b.example.", "a@b.example."),
        ("a@B.Example", "a@B.Example"),
        ("#@[]", "#@[]"),
        (r"a\@b@c", '"a@b"@c'),
        ("a b@c", '"a b"@c'),
        ("a@", "a@mx.example.com"),
    ],
)
def test_an_odd_sender_is_no_reason_to_bounce(site: Site, sender: str, return_path: str) -> None:
    client = connected(site)
    assert client.deliver(MESSAGE, "jane", sender=sender)[0].startswith("250")
    assert site.messages("jane")[0].startswith(f"Return-Path: <{return_path}>\n".encode())


@pytest.mark.parametrize(("strict", "reply"), [("yes", "500 5.5.2"), ("no", "250 2.1.0")])
def test_octets_that_are_not_utf_8_in_an_address(site: Site, strict: str, reply: str) -> None:
    client = connected(site, lmtp_strict_rfc2821=strict)
    assert client.command(b"MAIL FROM:<m\xfcller@example.com>").startswith(reply)
    if strict == "no":
        assert client.command(b"RCPT TO:<jane@\xe9>").startswith("500")
        assert client.command(b"RCPT TO:<jane+\xe9@x>").startswith("250")
        assert client.command("BDAT 0 LAST").startswith("250")
        assert site.messages("jane")[0].startswith(b"Return-Path: <mXller@example.com>\n")
        assert client.command(b"NOOP \xe9").startswith("500")


# Who is meant


def test_a_user_whose_name_has_a_delimiter_gets_the_mail(site: Site) -> None:
    site.add_user("mary", "mary-ann", "mary-ann_b", "jane/.ann", "mary/.ann")
    client = connected(site, recipient_delimiter="+-_")
    for address, folder in {
        "mary-ann": "mary-ann",
        "Mary-Ann+x": "mary-ann",
        "mary-ann_b": "mary-ann_b",
        "mary-ann_b-c": "mary-ann_b",
        "mary+ann": "mary/.ann",
        "mary-x_y": "mary",
        "jane-ann": "jane/.ann",
    }.items():
        assert client.deliver(MESSAGE, address)[0].startswith("250"), address
        [file] = (site.spool / folder / "new").iterdir()
        file.unlink()


def test_a_user_is_made_of_the_part_before_the_first_delimiter(site: Site) -> None:
    client = connected(site, autocreate_post="yes")
    assert client.deliver(MESSAGE, "new+folder", "jane+folder")[1].startswith("250")
    assert sorted(path.name for path in site.spool.iterdir()) == ["jane", "new"]


@pytest.mark.parametrize("path", ["jane@münchen.example", "jane@xn--mnchen-3ya.example"])
@pytest.mark.parametrize(
    "address", ["jane@MÜNCHEN.example", "jane@xn--mnchen-3ya.example.", "jane@mu\u0308nchen.example"]
)
def test_a_domain_is_the_same_in_both_spellings(site: Site, path: str, address: str) -> None:
    site.add_user(path)
    client = connected(site, virtdomains="on")
    assert client.deliver(MESSAGE, address, mail="SMTPUTF8")[0].startswith("250")
    assert len(site.messages(path)) == 1


def test_a_domain_beyond_ascii_is_made_in_ascii(site: Site) -> None:
    client = connected(site, virtdomains="on", autocreate_post="yes", maildir_path="%p/%d.%n")
    addresses = "new@münchen.example", "new@xn--mnchen-3ya.example"
    assert client.deliver(MESSAGE, *addresses, mail="SMTPUTF8")[1].startswith("250")
    assert len(site.messages("xn--mnchen-3ya.example.new")) == 2


def test_characters_in_two_parts_are_those_in_one(site: Site) -> None:
    site.add_user("jürgen", "jürgen/.B&APw-cher", "jürgen/.Bu&Awg-ro")
    client = connected(site)
    for address in ("ju\u0308rgen", "JÜRGEN", "jürgen+Bu\u0308cher", "jürgen+Büro"):
        assert client.deliver(MESSAGE, address, mail="SMTPUTF8")[0].startswith("250")
    assert [len(site.messages("jürgen", folder)) for folder in ("", ".B&APw-cher", ".Bu&Awg-ro")] == [2, 1, 1]


def test_a_quoted_address_is_not_the_user_of_another_domain(site: Site) -> None:
    site.add_user("jane@other.example")
    client = connected(site, virtdomains="on", defaultdomain="example.com")
    assert client.deliver(MESSAGE, '"jane@other.example"@example.com')[0].startswith("550")
    assert client.deliver(MESSAGE, "jane@other.example")[0].startswith("250")


def test_the_mail_for_an_unknown_shared_folder_is_the_catch_alls(site: Site) -> None:
    client = connected(site, lmtp_catchall_mailbox="jane")
    assert client.deliver(MESSAGE, "+no.such.folder")[0].startswith("250")
    assert len(site.messages("jane")) == 1


# Names of files


@pytest.fixture(scope="module")
def locales(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for LOCPATH with a locale that is not UTF-8."""
    folder = tmp_path_factory.mktemp("locales")
    command = ["localedef", "--no-archive", "-i", "de_DE", "-f", "ISO-8859-1", str(folder / "de_DE.ISO-8859-1")]
    subprocess.run(command, check=True, timeout=PATIENCE)
    return folder


@pytest.mark.parametrize("locale", ["de_DE.ISO-8859-1", "C.UTF-8", "C", "POSIX", "no_SUCH.locale"])
def test_names_of_files_are_utf_8_whatever_the_locale(
    site: Site, locales: Path, monkeypatch: pytest.MonkeyPatch, locale: str
) -> None:
    for name in ("LANG", "LC_ALL", "PYTHONUTF8", "PYTHONCOERCECLOCALE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LC_ALL", locale)
    monkeypatch.setenv("LOCPATH", str(locales))
    site.add_user("jürgen", "jürgen/.台北")
    client = connected(site)
    assert client.deliver(MESSAGE, "jürgen", mail="SMTPUTF8")[0].startswith("250")
    assert client.deliver(MESSAGE, "jürgen+台北", mail="SMTPUTF8")[0].startswith("250")
    client.leave()
    assert site.child.wait(PATIENCE) == os.EX_OK
    assert len(site.messages("jürgen")) == len(site.messages("jürgen", ".台北")) == 1


# The journal


def test_an_entry_that_the_journal_would_drop_is_not_sent_to_it() -> None:
    """It takes 1,024 fields at most, and drops an entry with more without a word."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        journal = lmtpd.Journal(ours, "mail")
        addresses = lmtpd.Addresses(f"user{number}@example.com" for number in range(1200))
        assert not journal.send(lmtpd.LOG_INFO, "line", "event", {"recipient": addresses})
        assert journal.send(lmtpd.LOG_INFO, "line", "event", {"recipient": lmtpd.Addresses(addresses[:900])})
        assert theirs.recv(1 << 17).count(b"LMTPD_RECIPIENT=") == 900
