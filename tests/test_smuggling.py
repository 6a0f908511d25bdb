"""SMTP smuggling with Postfix as the relay in front: what it took for one message is one message in the store.

The vectors are those that lmtpd itself is given in test_message.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from harness import Client, Site, connect
from peers import Postfix
from test_message import FALSE_ENDS

SMUGGLED = b"MAIL FROM:<>\r\nRCPT TO:<jane@example.com>\r\nDATA\r\nSubject: smuggled %d\r\n\r\nsmuggled\r\n.\r\n"


@pytest.fixture(scope="module", params=["yes", "no"])
def relay(request: pytest.FixtureRequest) -> Iterator[tuple[Site, Postfix, bool]]:
    """A Postfix that refuses bare line feeds or that takes them for line ends, as it once did."""
    site = Site()
    site.add_user("jane")
    postfix = Postfix(site)
    with (postfix.conf / "main.cf").open("a") as conf:
        conf.write(f"smtpd_forbid_bare_newline = {request.param}\n")
        conf.write("smtpd_forbid_bare_newline_exclusions =\n")
    try:
        with postfix:
            yield site, postfix, request.param == "yes"
    finally:
        site.close()


def submit(postfix: Postfix, message: bytes, chunking: bool) -> int:
    """Sends what a smuggler would; how many messages Postfix has taken."""
    client = Client(connect(postfix.address))
    client.reply()
    assert client.command("EHLO smuggler.example").startswith("250")
    assert client.command("MAIL FROM:<>").startswith("250")
    assert client.command("RCPT TO:<jane@example.com>").startswith("250")
    if chunking:
        client.send(b"BDAT %d LAST\r\n" % len(message) + message)
    else:
        assert client.command("DATA").startswith("354")
        client.send(message + b"\r\n.\r\n")
    taken = 0
    try:
        client.send(b"QUIT\r\n")
        while reply := client.reply():
            taken += "queued as" in reply[-1]
    except ConnectionError:
        pass
    client.close()
    return taken


@pytest.mark.parametrize("chunking", [False, True], ids=["DATA", "BDAT"])
def test_the_store_has_as_many_messages_as_the_relay_has_taken(
    relay: tuple[Site, Postfix, bool], chunking: bool
) -> None:
    site, postfix, strict = relay
    for file in site.files("jane"):  # those of the test before
        file.unlink()
    postfix.log.write_text("")
    taken = {}
    for number, vector in enumerate(FALSE_ENDS):
        message = b"Subject: vector %d\r\n\r\nbefore" % number + vector + SMUGGLED % number
        taken[number] = submit(postfix, message if chunking else message[: -len(b"\r\n.\r\n")], chunking)
    postfix.wait_until_sent()
    refused = len(re.findall(r"status=bounced", postfix.log.read_text()))
    stored = [message.partition(b"\n\n") for message in site.messages("jane")]
    for number, messages in taken.items():
        real = [body for head, _, body in stored if b"\nSubject: vector %d\n" % number in head]
        smuggled = [body for head, _, body in stored if b"\nSubject: smuggled %d\n" % number in head]
        # With two the relay itself has taken the vector for an end.
        assert len(smuggled) == max(messages - 1, 0), FALSE_ENDS[number]
        assert len(real) <= 1
        assert all(body.startswith(b"before") for body in real)
    assert len(stored) == sum(taken.values()) - refused
    assert len(stored) > 10
    # Postfix 3.10 takes none of them for an end, whatever it is told.
    smuggles = not strict and not chunking and postfix.version() < (3, 10)
    assert max(taken.values()) == (2 if smuggles else 1)


def test_nothing_in_a_chunk_is_a_command_however_it_is_cut(site: Site) -> None:
    client = site.connect()
    client.hello()
    for number, vector in enumerate(FALSE_ENDS):
        message = b"Subject: vector\r\n\r\nbefore" + vector + SMUGGLED % number
        cut = message.index(b"before") + 6 + len(vector)
        client.send(b"MAIL FROM:<>\r\nRCPT TO:<jane>\r\nBDAT %d\r\n" % cut + message[:cut])
        client.send(b"BDAT %d LAST\r\n" % (len(message) - cut) + message[cut:])
        codes = [client.reply()[0][:3] for _ in range(4)]
        assert codes == ["250", "250", *(["554", "554"] if b"\0" in vector else ["250", "250"])]
        assert client.command("NOOP") == "250 2.0.0 Ok"
    assert len(site.files("jane")) == sum(b"\0" not in vector for vector in FALSE_ENDS)
    assert all(b"\nSubject: smuggled" in message for message in site.messages("jane"))
