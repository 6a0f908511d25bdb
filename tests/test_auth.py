"""AUTH: who gets in, with which password, asked of whom; and what the log must never say."""

from __future__ import annotations

import hmac
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from base64 import b64decode, b64encode
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from unittest import mock

import argon2
import pytest
from harness import PATIENCE, Client, Site
from peers import PASSWORD as EVERYBODYS
from peers import Dovecot, Peer, answers, program
from scramp import ScramClient
from test_session import MESSAGE, over_tcp

import lmtpd

PASSWORD = "a pass,phrase"
MAIL = "MAIL FROM:<sender@example.com>"


def encoded(text: str | bytes) -> str:
    return b64encode(text.encode() if isinstance(text, str) else text).decode()


def plain(user: str, password: str, authorization: str = "") -> str:
    return encoded(f"{authorization}\0{user}\0{password}")


def verifier(scheme: str, password: str = PASSWORD) -> str:
    """A line's second half, made by the command that the manual page names."""
    if scheme == "argon2id":
        command = ["argon2", "saltsaltsalt", "-id", "-e"]
        return subprocess.run(command, input=password, capture_output=True, text=True, check=True).stdout.strip()
    command = ["doveadm", "pw", "-s", scheme, "-p", password]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


VERIFIERS = {
    "relay": verifier("argon2id"),
    "sha1": verifier("SCRAM-SHA-1"),
    "sha256": verifier("SCRAM-SHA-256"),
    "guest": verifier("argon2id"),
    "broken": "{SCRAM-SHA-256}4096,what,is,this",
    "short": "{SCRAM-SHA-256}1,c2FsdA==,a2V5,a2V5",
    "garbled": "$argon2id$v=19$m=4096",
    "strange": "{MD5}1234",
}


def write_passwords(site: Site, mode: int = 0o600) -> Path:
    file = site.root / "passwords"
    file.write_text("# who : verifier\n\n" + "".join(f"{user}:{value}\n" for user, value in VERIFIERS.items()))
    file.chmod(mode)
    site.give(file)
    return file


@pytest.fixture
def auth_site(site: Site) -> Site:
    """A site whose internet clients authenticate in the clear against a password file."""
    site.configure(
        sasl_pwcheck_method="file",
        sasl_password_file=str(write_passwords(site)),
        allowplaintext="yes",
        admins="relay sha1 sha256 broken short garbled strange",
    )
    return site


@pytest.fixture
def client(auth_site: Site) -> Iterator[Client]:
    client = over_tcp(auth_site)
    client.hello()
    yield client
    client.close()


def offered(client: Client) -> list[str]:
    """The mechanisms that LHLO lists."""
    lines = [line[4:].split() for line in client.hello()]
    found = [words[1:] for words in lines if words[0] == "AUTH"]
    return found[0] if found else []


def scram(client: Client, name: str, user: str, password: str = PASSWORD, binding: object = None) -> str:
    """The whole exchange as a client of SCRAM has it; the last reply."""
    peer = ScramClient([name], user, password, channel_binding=binding)
    reply = client.command(f"AUTH {name} {encoded(peer.get_client_first())}")
    if not reply.startswith("334 "):
        return reply
    peer.set_server_first(b64decode(reply[4:]).decode())
    reply = client.command(encoded(peer.get_client_final()))
    if not reply.startswith("334 "):
        return reply
    peer.set_server_final(b64decode(reply[4:]).decode())
    return client.command("")


# The dialogue, RFC 4954


def test_plain_with_an_initial_response_opens_the_way(auth_site: Site, client: Client) -> None:
    assert client.command(f"AUTH PLAIN {plain('relay', PASSWORD)}") == "235 2.7.0 Authentication successful"
    assert client.deliver(MESSAGE, "jane")[0].startswith("250")
    received = " ".join(auth_site.messages("jane")[0].decode().split())
    assert "([127.0.0.1]) (authenticated user=relay bits=0) by mx.example.com (lmtpd 0.4.1) with LMTPA id" in received
    assert "user=relay" in auth_site.log_text()


def test_plain_asked_for_its_response(client: Client) -> None:
    assert client.command("auth plain") == "334 "
    assert client.command(plain("relay", PASSWORD)).startswith("235")


def test_login(client: Client) -> None:
    assert client.command("AUTH LOGIN") == f"334 {encoded('Username:')}"
    assert client.command(encoded("relay")) == f"334 {encoded('Password:')}"
    assert client.command(encoded(PASSWORD)).startswith("235")


def test_login_with_an_initial_response(client: Client) -> None:
    assert client.command(f"AUTH LOGIN {encoded('relay')}") == f"334 {encoded('Password:')}"
    assert client.command(encoded(PASSWORD)).startswith("235")


@pytest.mark.parametrize(("name", "user"), [("SCRAM-SHA-1", "sha1"), ("SCRAM-SHA-256", "sha256")])
def test_scram(auth_site: Site, client: Client, name: str, user: str) -> None:
    auth_site.configure(allowplaintext="no")
    assert scram(client, name, user).startswith("235")
    assert client.deliver(MESSAGE, "jane")[0].startswith("250")


@pytest.mark.parametrize(
    ("name", "user", "password"),
    [
        ("SCRAM-SHA-256", "sha256", "wrong"),
        ("SCRAM-SHA-256", "nobody", PASSWORD),
        ("SCRAM-SHA-256", "sha1", PASSWORD),
        ("SCRAM-SHA-1", "relay", PASSWORD),
    ],
    ids=["wrong password", "unknown user", "verifier of another", "argon2"],
)
def test_scram_that_fails(client: Client, name: str, user: str, password: str) -> None:
    assert scram(client, name, user, password)[:9] == "535 5.7.8"
    assert client.command(MAIL).startswith("430")


def challenge(site: Site, name: str, user: str) -> tuple[bytes, int]:
    """The salt and the iterations that a client on a connection of its own is told."""
    client = over_tcp(site)
    client.hello()
    reply = client.command(f"AUTH {name} {encoded(ScramClient([name], user, PASSWORD).get_client_first())}")
    client.close()
    assert reply.startswith("334 ")
    fields = dict(field.split("=", 1) for field in b64decode(reply[4:]).decode().split(","))
    return b64decode(fields["s"]), int(fields["i"])


@pytest.mark.parametrize("name", ["SCRAM-SHA-1", "SCRAM-SHA-256"])
def test_scram_does_not_tell_who_exists(auth_site: Site, name: str) -> None:
    real = challenge(auth_site, name, {"SCRAM-SHA-1": "sha1", "SCRAM-SHA-256": "sha256"}[name])
    others = [challenge(auth_site, name, user) for user in ("nobody", "somebody", "relay", "nobody")]
    assert {(len(salt), iterations) for salt, iterations in [real, *others]} == {(len(real[0]), real[1])}
    assert len({salt for salt, _ in [real, *others]}) == 4
    assert others[0] == others[3]


def test_the_log_tells_who_does_not_exist(auth_site: Site, client: Client) -> None:
    assert scram(client, "SCRAM-SHA-256", "nobody").startswith("535")
    assert client.command(f"AUTH PLAIN {plain('nobody', PASSWORD)}").startswith("535")
    causes = re.findall(r'user=nobody peer=\S+ cause="([^"]*)"', auth_site.log_text())
    assert causes == ["no verifier for SCRAM-SHA-256", "unknown user"]


def test_an_unknown_user_takes_as_long_as_a_wrong_password(auth_site: Site) -> None:
    """The work that a password takes is done for a user who is not there, too."""
    file = lmtpd.PasswordFile(auth_site.options["sasl_password_file"])
    for user, cause in (("relay", "wrong password"), ("nobody", "unknown user")):
        with mock.patch("argon2.PasswordHasher.verify", side_effect=argon2.exceptions.VerifyMismatchError) as verify:
            with pytest.raises(lmtpd.AuthenticationFailed, match=cause):
                file.check(user, "wrong")
            assert verify.call_count == 1


def test_scram_is_offered_only_where_somebody_has_a_verifier(auth_site: Site) -> None:
    file = Path(auth_site.options["sasl_password_file"])
    for users, mechanisms in {
        ("sha1", "relay"): ["SCRAM-SHA-1"],
        ("sha256",): ["SCRAM-SHA-256"],
        ("relay",): [],
        (): [],
    }.items():
        file.write_text("".join(f"{user}:{VERIFIERS[user]}\n" for user in users))
        assert offered(over_tcp(auth_site)) == [*mechanisms, "PLAIN", "LOGIN"]
    client = over_tcp(auth_site)
    client.hello()
    assert client.command("AUTH SCRAM-SHA-1 biwsbj1h").startswith("504")


def test_a_client_has_little_time_to_authenticate(auth_site: Site) -> None:
    auth_site.configure(lmtp_auth_timeout="3s", lmtp_session_timeout="1h")
    client = over_tcp(auth_site)
    client.hello()
    started = time.monotonic()
    assert client.reply()[0].startswith("421 4.4.2 Session or authentication time limit")
    assert time.monotonic() - started < 30
    assert client.line() == b""


def test_a_client_that_has_authenticated_has_all_the_time(auth_site: Site) -> None:
    auth_site.configure(lmtp_auth_timeout="6s")
    client = over_tcp(auth_site)
    client.hello()
    assert client.command(f"AUTH PLAIN {plain('relay', PASSWORD)}").startswith("235")
    time.sleep(6.5)
    assert client.deliver(MESSAGE, "jane")[0].startswith("250")


def test_a_client_that_may_not_deliver_does_not_gain_time_by_its_password(auth_site: Site) -> None:
    auth_site.configure(lmtp_auth_timeout="6s")
    client = over_tcp(auth_site)
    client.hello()
    assert client.command(f"AUTH PLAIN {plain('guest', PASSWORD)}").startswith("235")
    assert client.reply()[0].startswith("421 4.4.2 Session or authentication time limit")


def test_scram_for_somebody_else_fails(client: Client) -> None:
    first = ScramClient(["SCRAM-SHA-256"], "sha256", PASSWORD).get_client_first().replace("n,,", "n,a=relay,")
    assert client.command(f"AUTH SCRAM-SHA-256 {encoded(first)}")[:9] == "535 5.7.8"


@pytest.mark.parametrize("user", ["sha1", "sha256"])
def test_a_scram_verifier_also_serves_plain(client: Client, user: str) -> None:
    assert client.command(f"AUTH PLAIN {plain(user, 'wrong')}")[:9] == "535 5.7.8"
    assert client.command(f"AUTH PLAIN {plain(user, PASSWORD)}").startswith("235")


@pytest.mark.parametrize(
    ("command", "reply"),
    [
        ("AUTH", "501 5.5.4"),
        ("AUTH CRAM-MD5", "504 5.5.4"),
        ("AUTH EXTERNAL", "504 5.5.4"),
        ("AUTH SCRAM-SHA-256-PLUS", "504 5.5.4"),
        ("AUTH PLAIN =", "501 5.5.2"),
        ("AUTH PLAIN *", "501 5.7.0"),
        ("AUTH PLAIN !", "501 5.5.2"),
        ("AUTH PLAIN AGE=", "501 5.5.2"),
        ("AUTH PLAIN /w==", "501 5.5.2"),
        (f"AUTH PLAIN {plain('relay', PASSWORD)} more", "501 5.5.2"),
        (f"AUTH PLAIN {plain('relay', PASSWORD, 'jane')}", "535 5.7.8"),
        (f"AUTH PLAIN {plain('relay', PASSWORD, 'relay')}", "235 2.7.0"),
        (f"AUTH PLAIN {plain('relay', 'wrong')}", "535 5.7.8"),
        (f"AUTH PLAIN {plain('relay', '')}", "535 5.7.8"),
        (f"AUTH PLAIN {plain('', '')}", "535 5.7.8"),
        (f"AUTH PLAIN {plain('nobody', PASSWORD)}", "535 5.7.8"),
        (f"AUTH PLAIN {plain('# who ', 'verifier')}", "535 5.7.8"),
        (f"AUTH PLAIN {plain('sha256', chr(7))}", "535 5.7.8"),
        (f"AUTH PLAIN {plain('broken', PASSWORD)}", "454 4.7.0"),
        (f"AUTH PLAIN {plain('short', PASSWORD)}", "454 4.7.0"),
        (f"AUTH PLAIN {plain('garbled', PASSWORD)}", "454 4.7.0"),
        (f"AUTH PLAIN {plain('strange', PASSWORD)}", "454 4.7.0"),
        (f"AUTH SCRAM-SHA-256 {encoded('nonsense')}", "535 5.7.8"),
        (f"AUTH SCRAM-SHA-256 {encoded('n,,n=broken,r=nonce')}", "454 4.7.0"),
        (f"AUTH SCRAM-SHA-256 {encoded('n,,n=short,r=nonce')}", "454 4.7.0"),
    ],
)
def test_auth_is_answered(client: Client, command: str, reply: str) -> None:
    assert client.command(command)[:9] == reply
    assert client.command("NOOP").startswith("250")


@pytest.mark.parametrize(
    ("response", "reply"),
    [("*", "501 5.7.0"), ("!", "501 5.5.2"), (b"\xff", "501 5.5.2"), ("a", "501 5.5.2"), ("", "501 5.5.2")],
)
def test_the_response_is_answered(client: Client, response: str | bytes, reply: str) -> None:
    assert client.command("AUTH PLAIN") == "334 "
    assert client.command(response)[:9] == reply
    assert client.command(f"AUTH PLAIN {plain('relay', PASSWORD)}").startswith("235")


def test_a_response_of_12288_octets_is_read(client: Client) -> None:
    longest = encoded("\0relay\0" + "x" * (12_288 // 4 * 3 - 7))
    assert len(longest) == 12_288
    client.command("AUTH PLAIN")
    assert client.command(longest)[:9] == "535 5.7.8"


@pytest.mark.parametrize("size", [12_292, 100_000, 3_000_000])
def test_a_longer_response_is_refused(client: Client, size: int) -> None:
    client.command("AUTH PLAIN")
    assert client.command("A" * size)[:9] == "500 5.5.6"
    assert client.command("NOOP").startswith("250")


def test_auth_after_auth(client: Client) -> None:
    client.command(f"AUTH PLAIN {plain('relay', PASSWORD)}")
    assert client.command(f"AUTH PLAIN {plain('relay', PASSWORD)}")[:9] == "503 5.5.1"


def test_the_third_failure_closes_and_each_takes_longer(auth_site: Site, client: Client) -> None:
    waits = []
    for reply in ("535 5.7.8", "535 5.7.8", "535 5.7.8"):
        before = time.monotonic()
        assert client.command(f"AUTH PLAIN {plain('relay', 'wrong')}")[:9] == reply
        waits.append(time.monotonic() - before)
    assert all(wait >= seconds for wait, seconds in zip(waits, (1, 2, 3)))
    assert client.line() == b""
    failures = [line for line in auth_site.log_text().splitlines() if "authentication-failed" in line]
    assert len(failures) == 3
    assert all("relay" in line and "wrong password" in line and "[127.0.0.1]" in line for line in failures)


# What is offered, and to whom


def test_passwords_are_not_taken_in_the_clear(auth_site: Site) -> None:
    auth_site.configure(allowplaintext=None)
    client = over_tcp(auth_site)
    assert offered(client) == ["SCRAM-SHA-256", "SCRAM-SHA-1"]
    for command in ("AUTH PLAIN", "AUTH LOGIN", f"AUTH PLAIN {plain('relay', PASSWORD)}"):
        assert client.command(command)[:10] == "538 5.7.11"
    assert scram(client, "SCRAM-SHA-256", "sha256").startswith("235")


def test_all_mechanisms_are_offered_with_allowplaintext(auth_site: Site) -> None:
    assert offered(over_tcp(auth_site)) == ["SCRAM-SHA-256", "SCRAM-SHA-1", "PLAIN", "LOGIN"]


def test_sasl_mech_list(auth_site: Site) -> None:
    auth_site.configure(sasl_mech_list="plain SCRAM-SHA-1 GSSAPI")
    client = over_tcp(auth_site)
    assert offered(client) == ["SCRAM-SHA-1", "PLAIN"]
    assert client.command("AUTH LOGIN")[:9] == "504 5.5.4"
    assert client.command("AUTH SCRAM-SHA-256")[:9] == "504 5.5.4"
    assert client.command(f"AUTH PLAIN {plain('relay', PASSWORD)}").startswith("235")


def test_sasl_minimum_layer_refuses_in_the_clear(auth_site: Site) -> None:
    auth_site.configure(sasl_minimum_layer="1")
    client = over_tcp(auth_site)
    assert offered(client) == []
    assert client.command("AUTH SCRAM-SHA-256")[:10] == "538 5.7.11"


@pytest.mark.parametrize("arguments", [(), ("-a",)], ids=["unix", "internet with -a"])
def test_trusted_peers_are_offered_only_external(auth_site: Site, arguments: tuple[str, ...]) -> None:
    client = over_tcp(auth_site, *arguments) if arguments else auth_site.connect()
    assert offered(client) == ["EXTERNAL"]
    assert client.command(f"AUTH PLAIN {plain('relay', PASSWORD)}")[:9] == "504 5.5.4"
    assert client.command("AUTH EXTERNAL =").startswith("235")
    assert client.deliver(MESSAGE, "jane")[0].startswith("250")


@pytest.mark.parametrize(
    ("identity", "reply"), [("", "235 2.7.0"), ("postman", "235 2.7.0"), ("root", "535 5.7.8"), ("é", "535 5.7.8")]
)
def test_external_of_a_trusted_peer(auth_site: Site, identity: str, reply: str) -> None:
    client = auth_site.connect()
    client.hello()
    assert client.command("AUTH EXTERNAL") == "334 "
    assert client.command(encoded(identity))[:9] == reply


# Authenticated is not yet allowed


@pytest.mark.parametrize(("soft_noauth", "reply"), [("yes", "430 4.7.0"), ("no", "530 5.7.0")])
def test_mail_before_auth(auth_site: Site, soft_noauth: str, reply: str) -> None:
    auth_site.configure(soft_noauth=soft_noauth)
    client = over_tcp(auth_site)
    client.hello()
    assert client.command(MAIL)[:9] == reply
    client.command(f"AUTH PLAIN {plain('relay', PASSWORD)}")
    assert client.command(MAIL).startswith("250")
    assert client.command("AUTH PLAIN")[:9] == "503 5.5.1"


@pytest.mark.parametrize(
    ("options", "user", "reply"),
    [
        ({"admins": "relay other"}, "guest", "550 5.7.1"),
        ({"admins": "rel"}, "relay", "550 5.7.1"),
        ({"admins": None}, "relay", "550 5.7.1"),
        ({"admins": "other", "lmtp_admins": "relay"}, "relay", "250 2.1.0"),
        ({"admins": "relay", "lmtp_admins": "other"}, "relay", "550 5.7.1"),
    ],
)
def test_only_admins_may_deliver(auth_site: Site, options: dict[str, str | None], user: str, reply: str) -> None:
    auth_site.configure(**options)
    client = over_tcp(auth_site)
    client.hello()
    assert client.command(f"AUTH PLAIN {plain(user, PASSWORD)}").startswith("235")
    assert client.command(MAIL)[:9] == reply


@pytest.mark.parametrize(
    ("value", "reply", "logged"),
    [
        ("<>", "250 2.1.0", "<>"),
        ("jane@example.com", "250 2.1.0", "jane@example.com"),
        ("e+3Dmc2@example.com", "250 2.1.0", "e=mc2@example.com"),
        ("a+0Ab+2Bc", "250 2.1.0", "a\\nb+c"),
        ("a+3d", "501 5.5.4", ""),
        ("a+3", "501 5.5.4", ""),
        ("a+", "501 5.5.4", ""),
        ("+XY", "501 5.5.4", ""),
        ("", "501 5.5.4", ""),
    ],
)
def test_the_auth_parameter_of_mail(auth_site: Site, value: str, reply: str, logged: str) -> None:
    client = auth_site.connect()
    client.hello()
    assert client.command(f"{MAIL} AUTH={value}" if value else f"{MAIL} AUTH")[:9] == reply
    assert not logged or logged in auth_site.log_text()
    assert client.command("NOOP").startswith("250")


# Never in the log


def test_no_password_is_ever_logged(auth_site: Site) -> None:
    auth_site.configure(debug="yes", chatty="yes", sasl_mech_list="PLAIN LOGIN")
    secret = "Open-Sesame-4711"
    forms = [secret, encoded(secret), plain("relay", secret), plain("", secret), encoded(secret).rstrip("=")]
    client = over_tcp(auth_site)
    client.hello()
    client.command(f"AUTH PLAIN {plain('relay', secret)}")
    client.command("AUTH PLAIN")
    client.command(plain("relay", secret, "jane"))
    client = over_tcp(auth_site)
    client.hello()
    client.command("AUTH LOGIN")
    client.command(encoded("relay"))
    client.command(encoded(secret))
    for line in (
        f"AUTH PLAIN {plain('relay', secret)} {secret}",
        f"auth  PLAIN  {plain('relay', secret)}",
        f" AUTH PLAIN {plain('relay', secret)}",
        f"AUTH\tPLAIN\t{plain('relay', secret)}",
        f"AUTH PLAIN\t{plain('relay', secret)}",
        f"AUTH UNHEARD {plain('relay', secret)}",
        f"AUTH {plain('relay', secret)}",
        f"AUTH={plain('relay', secret)}",
        f"AUTH PLAIN {plain('relay', secret)}\0",
        f"AUTH PLAIN {plain('relay', secret)}\xff".encode("latin-1"),
        f"AUTH PLAIN {plain('relay', secret)}" + "=" * 10_000,
    ):
        assert client.command(line)[:3] in {"500", "501", "504"}
    client.command("AUTH PLAIN")
    client.command(plain("relay", secret) + "=" * 20_000)
    client.command("AUTH PLAIN")
    client.command(f"{plain('relay', secret)}!")
    client = over_tcp(auth_site)
    client.hello()
    client.send(f"AUTH CRAM-MD5\r\n{plain('relay', secret)}\r\nAUTH CRAM-MD5\r\n{encoded(secret)}\r\nNOOP\r\n".encode())
    assert [client.reply()[0][:3] for _ in range(5)] == ["504", "500", "504", "500", "250"]  # pipelined all the same
    log = auth_site.log_text()
    assert log.count("authentication-failed") == 3
    for form in forms:
        assert form not in log
        assert form[: len(form) // 4 * 4 - 4] not in log


# The password file


def refusal(site: Site, user: str = "relay") -> str:
    client = over_tcp(site)
    client.hello()
    return client.command(f"AUTH PLAIN {plain(user, PASSWORD)}")[:9]


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o606])
def test_a_password_file_open_to_others_is_refused(auth_site: Site, mode: int) -> None:
    write_passwords(auth_site, mode)
    assert refusal(auth_site) == "454 4.7.0"
    assert "passwords" in auth_site.log_text()
    write_passwords(auth_site, 0o640)
    assert refusal(auth_site) == "235 2.7.0"


def test_a_missing_password_file(auth_site: Site) -> None:
    (auth_site.root / "passwords").unlink()
    assert refusal(auth_site) == "454 4.7.0"
    assert "No such file" in auth_site.log_text()


def test_a_password_file_of_somebody_else(auth_site: Site) -> None:
    file = write_passwords(auth_site)
    shutil.chown(file, "root")
    assert refusal(auth_site) == "454 4.7.0"
    assert "Permission denied" in auth_site.log_text()


def test_a_password_file_that_is_no_text(auth_site: Site) -> None:
    (auth_site.root / "passwords").write_bytes(b"\xff\xfe\n")
    assert refusal(auth_site) == "454 4.7.0"


def test_a_password_changed_holds_from_the_next_try(auth_site: Site, client: Client) -> None:
    file = auth_site.root / "passwords"
    file.write_text(f"relay:{verifier('argon2id', 'new')}\n")
    assert client.command(f"AUTH PLAIN {plain('relay', PASSWORD)}")[:9] == "535 5.7.8"
    assert client.command(f"AUTH PLAIN {plain('relay', 'new')}").startswith("235")


def test_a_password_file_that_systemd_passes(auth_site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = auth_site.root / "credentials"
    folder.mkdir()
    shutil.copy2(auth_site.root / "passwords", folder / "lmtp-users")
    auth_site.give(folder)
    auth_site.give(folder / "lmtp-users")
    auth_site.configure(sasl_password_file="lmtp-users")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(folder))
    assert refusal(auth_site) == "235 2.7.0"


@pytest.mark.parametrize("name", ["lmtp-users", "sub/users"])
def test_a_credential_that_systemd_does_not_pass(auth_site: Site, name: str) -> None:
    auth_site.configure(sasl_password_file=name)
    client = over_tcp(auth_site)
    assert client.reply()[0].startswith("421 4.3.0")
    assert auth_site.child.wait() == 78


# saslauthd


class Saslauthd(Peer):
    """saslauthd(8), which asks an IMAP server."""

    name = "saslauthd"

    def __init__(self, folder: Path, imap: tuple[str, int]) -> None:
        super().__init__(folder)
        self.folder.chmod(0o755)
        self.path = str(folder / "mux")
        self._server = f"{imap[0]}/{imap[1]}"

    def start(self) -> None:
        command = [program("saslauthd"), "-d", "-a", "rimap", "-O", self._server, "-m", str(self.folder), "-n", "1"]
        self.run(command, lambda: answers(self.path))


@pytest.fixture
def dovecot(auth_site: Site) -> Iterator[AuthDovecot]:
    with AuthDovecot(auth_site) as dovecot:
        yield dovecot


class AuthDovecot(Dovecot):
    """Dovecot with its authentication service on a socket that anybody may use, and every mechanism we can test."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.path = str(self.folder / "auth-client")
        mechanisms = "plain login scram-sha-1 scram-sha-256 cram-md5 xoauth2 oauthbearer"
        # Who knows the tokens; no test has one.
        if self.version >= (2, 4):
            mechanisms += "\noauth2_introspection_mode = auth\noauth2_introspection_url = http://127.0.0.1:9/"
        self.conf.write_text(
            self.conf.read_text() + f"auth_mechanisms = {mechanisms}\nauth_failure_delay = 0\n"
            f"service auth {{\n  unix_listener {self.path} {{\n    mode = 0666\n  }}\n}}\n"
        )
        self.folder.chmod(0o755)

    def ask(self, passdb: str, passdb_24: str) -> None:
        """Has another database know the passwords, said in the language of Dovecot 2.3 and of 2.4."""
        text = passdb if self.version < (2, 4) else passdb_24
        conf = re.sub(r"^passdb .*?^\}\n", text, self.conf.read_text(), count=1, flags=re.MULTILINE | re.DOTALL)
        self.conf.write_text(conf)

    def is_up(self) -> bool:
        return super().is_up() and answers(self.path)


@pytest.fixture
def saslauthd(auth_site: Site, dovecot: AuthDovecot) -> Iterator[Saslauthd]:
    with Saslauthd(auth_site.root / "saslauthd", dovecot.address) as saslauthd:
        auth_site.configure(sasl_pwcheck_method="saslauthd", sasl_saslauthd_path=saslauthd.path)
        yield saslauthd


def greeted(site: Site) -> Client:
    client = over_tcp(site)
    client.hello()
    return client


def test_saslauthd_offers_what_needs_the_password(auth_site: Site, saslauthd: Saslauthd) -> None:
    assert offered(over_tcp(auth_site)) == ["PLAIN", "LOGIN"]


def test_saslauthd_knows_right_from_wrong(auth_site: Site, saslauthd: Saslauthd) -> None:
    client = greeted(auth_site)
    assert client.command(f"AUTH PLAIN {plain('relay', 'wrong')}")[:9] == "535 5.7.8"
    assert client.command(f"AUTH PLAIN {plain('relay', 'x' * 300)}")[:9] == "535 5.7.8"
    client = greeted(auth_site)
    assert client.command(f"AUTH PLAIN {plain('relay', EVERYBODYS)}").startswith("235")
    assert client.deliver(MESSAGE, "jane")[0].startswith("250")
    client = greeted(auth_site)
    assert client.command(f"AUTH LOGIN {encoded('relay')}").startswith("334")
    assert client.command(encoded(EVERYBODYS)).startswith("235")


@pytest.mark.parametrize("answer", [b"\0\2XX", b"\0\0", b"\0\5OK", b""])
def test_saslauthd_that_says_neither_yes_nor_no(auth_site: Site, answer: bytes) -> None:
    """It is at fault, and not the password."""
    path = str(auth_site.root / "mux")
    auth_site.configure(sasl_pwcheck_method="saslauthd", sasl_saslauthd_path=path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        listener.settimeout(PATIENCE)
        os.chmod(path, 0o666)
        client = greeted(auth_site)
        client.send(f"AUTH PLAIN {plain('relay', PASSWORD)}\r\n".encode())
        connection, _ = listener.accept()
        with connection:
            connection.sendall(answer)
            connection.shutdown(socket.SHUT_WR)
            assert client.reply()[-1][:9] == "454 4.7.0"


def test_saslauthd_that_is_down_and_comes_back(auth_site: Site, saslauthd: Saslauthd) -> None:
    client = greeted(auth_site)
    saslauthd.close()
    assert client.command(f"AUTH PLAIN {plain('relay', EVERYBODYS)}")[:9] == "454 4.7.0"
    assert "authentication-unavailable" in auth_site.log_text()
    saslauthd.start()
    assert client.command(f"AUTH PLAIN {plain('relay', EVERYBODYS)}").startswith("235")


# Dovecot's authentication service


@pytest.fixture
def dovecot_site(auth_site: Site, dovecot: AuthDovecot) -> Site:
    auth_site.configure(sasl_pwcheck_method="dovecot", sasl_auth_socket_path=dovecot.path)
    return auth_site


def test_dovecot_s_mechanisms_are_offered(dovecot_site: Site) -> None:
    safe, plaintext = ["CRAM-MD5", "SCRAM-SHA-1", "SCRAM-SHA-256"], ["LOGIN", "OAUTHBEARER", "PLAIN", "XOAUTH2"]
    assert sorted(offered(over_tcp(dovecot_site))) == sorted(safe + plaintext)
    dovecot_site.configure(allowplaintext="no")
    client = over_tcp(dovecot_site)
    assert sorted(offered(client)) == safe
    for name in plaintext:
        assert client.command(f"AUTH {name}")[:10] == "538 5.7.11"
    assert client.command("AUTH DIGEST-MD5")[:9] == "504 5.5.4"


@pytest.mark.parametrize(("password", "reply"), [(EVERYBODYS, "235 2.7.0"), ("wrong", "535 5.7.8")])
@pytest.mark.parametrize("name", ["PLAIN", "PLAIN initial", "LOGIN", "CRAM-MD5", "SCRAM-SHA-1", "SCRAM-SHA-256"])
def test_every_mechanism_of_dovecot(dovecot_site: Site, name: str, password: str, reply: str) -> None:
    client = greeted(dovecot_site)
    if name == "PLAIN initial":
        answer = client.command(f"AUTH PLAIN {plain('relay', password)}")
    elif name == "PLAIN":
        assert client.command("AUTH PLAIN") == "334 "
        answer = client.command(plain("relay", password))
    elif name == "LOGIN":
        assert client.command("AUTH LOGIN") == f"334 {encoded('Username:')}"
        assert client.command(encoded("relay")) == f"334 {encoded('Password:')}"
        answer = client.command(encoded(password))
    elif name == "CRAM-MD5":
        challenge = client.command("AUTH CRAM-MD5")
        assert challenge.startswith("334 ")
        digest = hmac.new(password.encode(), b64decode(challenge[4:]), "md5").hexdigest()
        answer = client.command(encoded(f"relay {digest}"))
    else:
        answer = scram(client, name, "relay", password)
    assert answer[:9] == reply
    if reply.startswith("235"):
        assert client.deliver(MESSAGE, "jane")[0].startswith("250")
    else:
        assert "user=relay" in dovecot_site.log_text()


def test_dovecot_goes_on_after_a_cancelled_exchange(dovecot_site: Site) -> None:
    client = greeted(dovecot_site)
    for name in ("CRAM-MD5", "LOGIN", "SCRAM-SHA-256"):
        assert client.command(f"AUTH {name}").startswith("334")
        assert client.command("*")[:9] == "501 5.7.0"
    assert scram(client, "SCRAM-SHA-256", "relay", EVERYBODYS).startswith("235")


def test_dovecot_is_told_where_the_client_is(auth_site: Site) -> None:
    dovecot = AuthDovecot(auth_site)
    auth_site.configure(sasl_pwcheck_method="dovecot", sasl_auth_socket_path=dovecot.path)
    replies = []
    for net in ("127.0.0.0/8", "192.0.2.0/24"):
        dovecot.ask(
            f"passdb {{\n  driver = static\n  args = allow_nets={net} password={EVERYBODYS}\n}}\n",
            f"passdb static {{\n  password = {EVERYBODYS}\n  fields {{\n    allow_nets = {net}\n  }}\n}}\n",
        )
        with dovecot:
            replies.append(greeted(auth_site).command(f"AUTH PLAIN {plain('relay', EVERYBODYS)}")[:3])
    assert replies == ["235", "535"]


def test_dovecot_that_cannot_tell_is_no_reason_to_refuse_for_good(auth_site: Site) -> None:
    dovecot = AuthDovecot(auth_site)
    auth_site.configure(sasl_pwcheck_method="dovecot", sasl_auth_socket_path=dovecot.path)
    sql, database, query = dovecot.folder / "sql.conf", dovecot.folder / "db", "SELECT password FROM missing"
    sql.write_text(f"driver = sqlite\nconnect = {database}\npassword_query = {query}\n")
    dovecot.ask(
        f"passdb {{\n  driver = sql\n  args = {sql}\n}}\n",
        f"sql_driver = sqlite\nsqlite_path = {database}\npassdb sql {{\n  query = {query}\n}}\n",
    )
    with dovecot:
        client = greeted(auth_site)
        for _ in range(2):
            assert client.command(f"AUTH PLAIN {plain('relay', EVERYBODYS)}")[:9] == "454 4.7.0"
    assert "authentication-unavailable" in auth_site.log_text()
    assert "authentication-failed" not in auth_site.log_text()


def test_a_checker_that_only_cyrus_has_stops_no_mail(site: Site) -> None:
    """As in the imapd.conf that some distributions have for Cyrus."""
    site.configure(sasl_pwcheck_method="auxprop")
    client = site.connect()
    client.hello()
    assert client.deliver(MESSAGE, "jane")[0].startswith("250")
    other = over_tcp(site)
    assert offered(other) == []
    assert "set lmtp_sasl_pwcheck_method" in site.log_text()


def test_dovecot_that_is_down_and_comes_back(dovecot_site: Site, dovecot: AuthDovecot) -> None:
    client = greeted(dovecot_site)
    # Its processes may outlive their master for a moment, and what we are connected to is one of them.
    with suppress(ProcessLookupError):
        os.killpg(dovecot.process.pid, signal.SIGKILL)
    dovecot.close()
    for _ in range(2):
        assert client.command(f"AUTH PLAIN {plain('relay', EVERYBODYS)}")[:9] == "454 4.7.0"
    later = over_tcp(dovecot_site)
    assert offered(later) == []
    assert later.command("AUTH CRAM-MD5")[:9] == "454 4.7.0"
    assert "authentication-unavailable" in dovecot_site.log_text()
    dovecot.start()
    for each in (client, later):
        assert each.command(f"AUTH PLAIN {plain('relay', EVERYBODYS)}").startswith("235")


def test_mail_waits_while_nobody_can_say_how_to_authenticate(dovecot_site: Site, dovecot: AuthDovecot) -> None:
    """The client cannot know that it has to, so the mail must not bounce."""
    dovecot_site.configure(soft_noauth="no")
    with suppress(ProcessLookupError):
        os.killpg(dovecot.process.pid, signal.SIGKILL)
    dovecot.close()
    client = over_tcp(dovecot_site)
    assert offered(client) == []
    assert client.command(MAIL)[:9] == "430 4.7.0"
