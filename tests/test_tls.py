"""STARTTLS, certificates, and the clients that administrators have in front of lmtpd."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from authority import Authority, secure
from harness import PATIENCE, Client, Site, connect, free_port
from starters import Inetd, SocketActivate
from test_auth import MAIL, PASSWORD, encoded, plain, scram, write_passwords
from test_service import logged
from test_session import MESSAGE, over_tcp

import lmtpd


@pytest.fixture
def authority(site: Site) -> Authority:
    return Authority(site)


@pytest.fixture
def tls_site(site: Site, authority: Authority) -> Site:
    """A site with STARTTLS, and a key that only root can read."""
    certificate, key = authority.sign("mx.example.com")
    key.chmod(0o600)
    site.configure(
        allowstarttls="yes",
        tls_server_cert=str(certificate),
        tls_server_key=str(key),
        tls_client_ca_file=str(authority.file),
        sasl_pwcheck_method="file",
        sasl_password_file=str(write_passwords(site)),
        admins="relay sha1 sha256",
    )
    return site


@pytest.fixture
def context(authority: Authority) -> ssl.SSLContext:
    return authority.client_context()


def secured(site: Site, context: ssl.SSLContext) -> Client:
    """A client that has started TLS and said LHLO, twice."""
    client = over_tcp(site)
    client.hello()
    secure(client, context)
    client.send(b"LHLO client.example\r\n")
    client.reply()
    return client


def extensions(client: Client) -> str:
    client.send(b"LHLO client.example\r\n")
    return "\n".join(client.reply())


def received(site: Site) -> str:
    return " ".join(site.messages("jane")[-1].decode().partition("\n\n")[0].split())


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_mail_over_tls(tls_site: Site, context: ssl.SSLContext, version: ssl.TLSVersion) -> None:
    context.minimum_version = context.maximum_version = version
    client = over_tcp(tls_site)
    client.reply()
    before = extensions(client)
    assert "250-STARTTLS" in before
    assert "PLAIN" not in before
    sock = secure(client, context)
    after = extensions(client)
    assert "STARTTLS" not in after
    assert "PLAIN LOGIN" in after
    assert client.command("STARTTLS")[:9] == "503 5.5.1"
    assert client.command(f"AUTH PLAIN {plain('relay', PASSWORD)}").startswith("235")
    assert client.deliver(MESSAGE, "jane")[0].startswith("250")
    cipher = sock.cipher()
    assert cipher
    assert (
        f"([127.0.0.1]) (authenticated user=relay bits={cipher[2]}) by mx.example.com (lmtpd 0.4.1) "
        f"with LMTPSA ({sock.version()} with cipher {cipher[0]} ({cipher[2]} bits)) id" in received(tls_site)
    )
    assert client.command("QUIT").startswith("221")
    sock.suppress_ragged_eofs = False  # type: ignore[attr-defined]
    assert sock.recv(1) == b""


def shaken_hands(
    client: Client, context: ssl.SSLContext, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO
) -> ssl.SSLObject:
    """TLS whose octets the test carries; the last ones of the handshake have yet to be sent."""
    assert client.command("STARTTLS").startswith("220")
    tls = context.wrap_bio(incoming, outgoing, server_hostname="mx.example.com")
    while True:
        try:
            tls.do_handshake()
            return tls
        except ssl.SSLWantReadError:
            client.send(outgoing.read())
            incoming.write(client.sock.recv(65536))


def test_a_command_together_with_the_end_of_the_handshake(tls_site: Site, context: ssl.SSLContext) -> None:
    """As Exim sends it with TLS 1.3, in which the client has the last word."""
    client = over_tcp(tls_site)
    client.hello()
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = shaken_hands(client, context, incoming, outgoing)
    assert tls.version() == "TLSv1.3"
    tls.write(b"NOOP\r\n")
    client.send(outgoing.read())
    incoming.write(client.sock.recv(65536))
    assert tls.read() == b"250 2.0.0 Ok\r\n"


def test_the_end_that_comes_together_with_the_last_words_is_not_waited_for(
    tls_site: Site, context: ssl.SSLContext
) -> None:
    tls_site.configure(debug="yes")
    client = over_tcp(tls_site)
    client.hello()
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = shaken_hands(client, context, incoming, outgoing)
    tls.write(b"NOOP\r\n")
    with pytest.raises(ssl.SSLWantReadError):
        tls.unwrap()
    client.send(outgoing.read())
    assert tls_site.child.wait(PATIENCE / 2) == 0
    assert "disconnected session=" in tls_site.log_text()
    assert tls_site.log_text().rstrip().endswith('reason="end of file"')


def test_tls_over_pipes(tls_site: Site, context: ssl.SSLContext) -> None:
    """A pipe is trusted, but for one on which a proxy speaks for a client on the internet."""
    ours, theirs = socket.socketpair()
    command = ["sh", "-c", 'cat | "$@" | cat', "sh", *tls_site.command("-H")]
    with theirs, tls_site.log.open("ab") as log:
        process = subprocess.Popen(command, stdin=theirs.fileno(), stdout=theirs.fileno(), stderr=log)
    client = Client(ours)
    client.send(b"PROXY TCP4 192.0.2.1 192.0.2.2 50000 24\r\n")
    client.reply()
    secure(client, context)
    assert client.command(f"AUTH PLAIN {plain('relay', PASSWORD)}").startswith("235")
    assert client.deliver(MESSAGE, "jane")[0].startswith("250")
    assert "([192.0.2.1]) (authenticated user=relay" in received(tls_site)
    assert client.command("QUIT").startswith("221")
    client.close()
    process.wait(PATIENCE)  # its status is that of cat, which may have had something left to write


def test_last_words_to_a_client_that_has_not_read_are_readable(tls_site: Site, context: ssl.SSLContext) -> None:
    tls_site.configure(lmtp_max_idle_commands="0")
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = Client(socket.create_connection(server.getsockname()))
        connection, _ = server.accept()
        with connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
            tls_site.start(connection)
    client.hello()
    secure(client, context)
    for _ in range(50):  # more than what the system keeps of a connection, in parts that are answered before the next
        client.send(b"HELP\r\n" * 300)
        time.sleep(0.02)
    tls_site.child.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    said = b"".join(iter(lambda: client.sock.recv(65536), b""))
    *lines, last, _ = said.split(b"\r\n")
    assert last == b"421 4.3.2 Shutting down, try again later"
    assert {line[:3] for line in lines} == {b"214"}
    assert tls_site.child.wait(PATIENCE) == 0


def test_a_new_certificate_is_used_by_the_next_connection(tls_site: Site, authority: Authority) -> None:
    with Inetd(logged(tls_site), wait=True) as starter:

        def shown() -> bytes:
            client = starter.connect()
            client.hello()
            certificate = secure(client, authority.client_context()).getpeercert(binary_form=True)
            assert client.command("QUIT").startswith("221")
            client.close()
            return certificate or b""

        before = shown()
        assert shown() == before
        certificate, key = authority.sign("mx.example.com")
        assert str(certificate) == tls_site.options["tls_server_cert"]
        key.chmod(0o600)
        assert shown() != before
        assert "files-changed" in tls_site.log_text()


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
def test_old_versions_are_refused(tls_site: Site, context: ssl.SSLContext, version: ssl.TLSVersion) -> None:
    tls_site.configure(tls_versions="tls1_0 tls1_1 tls1_2 tls1_3")
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = version
    client = over_tcp(tls_site)
    client.hello()
    with pytest.raises(ssl.SSLError):
        secure(client, context)
    assert tls_site.child.wait(PATIENCE) == 0
    assert "TLS: " in tls_site.log_text()


@pytest.mark.parametrize(
    ("versions", "agreed"), [("tls1_2", "TLSv1.2"), ("tls1_3", "TLSv1.3"), ("tls1_2 tls1_3", "TLSv1.3")]
)
def test_tls_versions(tls_site: Site, context: ssl.SSLContext, versions: str, agreed: str) -> None:
    tls_site.configure(tls_versions=versions)
    client = over_tcp(tls_site)
    client.hello()
    assert secure(client, context).version() == agreed


def test_tls_ciphers(tls_site: Site, context: ssl.SSLContext) -> None:
    tls_site.configure(tls_ciphers="ECDHE-ECDSA-AES256-GCM-SHA384", tls_versions="tls1_2")
    client = over_tcp(tls_site)
    client.hello()
    assert secure(client, context).cipher() == ("ECDHE-ECDSA-AES256-GCM-SHA384", "TLSv1.2", 256)


def test_the_layer_can_be_too_weak(tls_site: Site, context: ssl.SSLContext) -> None:
    tls_site.configure(tls_ciphers="ECDHE-ECDSA-AES128-GCM-SHA256", tls_versions="tls1_2", sasl_minimum_layer="256")
    client = secured(tls_site, context)
    assert "AUTH" not in extensions(client)
    assert client.command("AUTH PLAIN")[:10] == "538 5.7.11"


# Client certificates


@pytest.mark.parametrize("where", ["file", "folder"])
@pytest.mark.parametrize("demand", ["optional", "require"])
def test_a_certificate_authenticates(tls_site: Site, authority: Authority, where: str, demand: str) -> None:
    if where == "folder":
        tls_site.configure(tls_client_ca_file=None, tls_client_ca_dir=str(authority.hashed()))
    tls_site.configure(tls_client_certs=demand)
    client = secured(tls_site, authority.client_context(authority.sign("relay")))
    assert "AUTH EXTERNAL " in extensions(client)
    assert client.command(f"AUTH EXTERNAL {encoded('sha1')}")[:9] == "535 5.7.8"
    assert client.command("AUTH EXTERNAL =").startswith("235")
    assert client.deliver(MESSAGE, "jane")[0].startswith("250")
    assert "authenticated user=relay" in received(tls_site)


def test_a_certificate_of_no_admin(tls_site: Site, authority: Authority) -> None:
    client = secured(tls_site, authority.client_context(authority.sign("stranger")))
    assert client.command(MAIL)[:9] == "430 4.7.0"
    assert client.command("AUTH EXTERNAL =").startswith("235")
    assert client.command(MAIL)[:9] == "550 5.7.1"


@pytest.mark.parametrize(("demand", "certificate"), [("off", True), ("optional", False)])
def test_no_certificate_no_external(tls_site: Site, authority: Authority, demand: str, certificate: bool) -> None:
    tls_site.configure(tls_client_certs=demand)
    client = secured(tls_site, authority.client_context(authority.sign("relay") if certificate else None))
    assert "EXTERNAL" not in extensions(client)
    assert client.command("AUTH EXTERNAL =")[:9] == "504 5.5.4"


def refuses(site: Site, context: ssl.SSLContext) -> bool:
    """Whether TLS fails; in TLS 1.3 the client learns it when it reads."""
    try:
        secured(site, context).close()
    except (ssl.SSLError, ConnectionError):
        site.child.wait(PATIENCE)
        return "TLS: " in site.log_text()
    return False


@pytest.mark.parametrize("demand", ["optional", "require"])
def test_certificates_that_are_refused(tls_site: Site, authority: Authority, demand: str) -> None:
    good, bad = authority.sign("relay"), authority.sign("thief")
    tls_site.configure(tls_client_certs=demand, tls_crl_file=str(authority.revoked(bad[0])))
    context = authority.client_context(good)
    assert not refuses(tls_site, context)
    context.load_cert_chain(*bad)
    assert refuses(tls_site, context)


def test_a_certificate_that_is_required(tls_site: Site, context: ssl.SSLContext) -> None:
    tls_site.configure(tls_client_certs="require")
    assert refuses(tls_site, context)


@pytest.mark.parametrize(("name", "user"), [("SCRAM-SHA-1-PLUS", "sha1"), ("SCRAM-SHA-256-PLUS", "sha256")])
def test_scram_is_bound_to_the_channel(tls_site: Site, context: ssl.SSLContext, name: str, user: str) -> None:
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    client = secured(tls_site, context)
    assert isinstance(client.sock, ssl.SSLSocket)
    binding = client.sock.get_channel_binding("tls-unique")
    assert binding
    assert f" {name} " in extensions(client)
    assert scram(client, name, user, binding=("tls-unique", bytes(len(binding))))[:9] == "535 5.7.8"
    assert scram(client, name, user, binding=("tls-unique", binding)).startswith("235")
    client = secured(tls_site, context)
    assert scram(client, name.removesuffix("-PLUS"), user).startswith("235")


# Hostile clients


def test_what_was_sent_in_the_clear_is_thrown_away(tls_site: Site, context: ssl.SSLContext) -> None:
    client = over_tcp(tls_site)
    client.hello()
    client.send(b"STARTTLS\r\nTRACE injected\r\nMAIL FROM:<>\r\n")
    assert client.reply()[0].startswith("220")
    client.sock = context.wrap_socket(client.sock, server_hostname="mx.example.com")
    assert client.command("NOOP") == "250 2.0.0 Ok"
    assert "injected" not in client.command("TRACE mine")


def test_authentication_and_name_are_forgotten(tls_site: Site, context: ssl.SSLContext) -> None:
    client = over_tcp(tls_site)
    client.hello()
    assert scram(client, "SCRAM-SHA-256", "sha256").startswith("235")
    secure(client, context)
    assert client.command(MAIL)[:9] == "430 4.7.0"
    assert client.command(f"AUTH PLAIN {plain('relay', PASSWORD)}").startswith("235")
    client.deliver(MESSAGE, "jane")
    assert "client.example" not in received(tls_site)


@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01\x02\x00"])
def test_a_handshake_that_stalls_is_cut_off(tls_site: Site, sent: bytes) -> None:
    tls_site.configure(lmtp_command_timeout="1s")
    client = over_tcp(tls_site)
    client.hello()
    client.command("STARTTLS")
    client.send(sent)
    before = time.monotonic()
    assert client.line() == b""
    assert time.monotonic() - before < 10
    assert tls_site.child.wait(PATIENCE) == 0
    assert "the handshake takes too long" in tls_site.log_text()


def test_a_handshake_in_drops_is_cut_off(tls_site: Site) -> None:
    tls_site.configure(lmtp_command_timeout="2s")
    client = over_tcp(tls_site)
    client.hello()
    client.command("STARTTLS")
    before = time.monotonic()
    with pytest.raises(OSError):  # noqa: PT011, PT012
        for octet in b"\x16\x03\x01\x02\x00" + bytes(100):
            client.send(bytes([octet]))
            time.sleep(0.2)
    assert time.monotonic() - before < 10


@pytest.mark.parametrize("sent", [b"NOOP\r\n" * 3, b"\x16\x03\x01\xff\xff" + b"x" * 70_000, b"\0" * 100])
def test_nonsense_instead_of_a_handshake(tls_site: Site, sent: bytes) -> None:
    client = over_tcp(tls_site)
    client.hello()
    client.command("STARTTLS")
    with pytest.raises(OSError):  # noqa: PT011, PT012
        client.send(sent)
        while client.line():
            pass
        raise ConnectionError
    assert tls_site.child.wait(PATIENCE) == 0
    assert "internal-error" not in tls_site.log_text()


@pytest.mark.parametrize("count", [1, 20_000])
def test_pipelines_are_answered_in_full(tls_site: Site, context: ssl.SSLContext, count: int) -> None:
    tls_site.configure(lmtp_max_idle_commands="0")
    client = secured(tls_site, context)
    client.send(b"NOOP\r\n" * count)
    assert [client.reply() for _ in range(count)] == [["250 2.0.0 Ok"]] * count


@pytest.mark.parametrize("bdat", [False, True])
def test_large_messages(tls_site: Site, context: ssl.SSLContext, bdat: bool) -> None:
    client = secured(tls_site, context)
    client.command(f"AUTH PLAIN {plain('relay', PASSWORD)}")
    body = MESSAGE + b"A line of a large message, again and again.\r\n" * 200_000
    if bdat:
        client.command(MAIL)
        client.command("RCPT TO:<jane>")
        client.send(b"BDAT 3000000\r\n" + body[:3_000_000])
        assert client.reply()[0].startswith("250")
        client.send(b"BDAT %d LAST\r\n" % (len(body) - 3_000_000) + body[3_000_000:])
        assert client.reply()[0].startswith("250")
    else:
        assert client.deliver(body, "jane")[0].startswith("250")
    assert tls_site.messages("jane")[0].endswith(b"\n\n" + body.replace(b"\r\n", b"\n").partition(b"\n\n")[2])


# Settings


def test_the_key_is_readable_by_root_only(tls_site: Site, context: ssl.SSLContext) -> None:
    status = os.stat(tls_site.options["tls_server_key"])
    assert (stat.S_IMODE(status.st_mode), status.st_uid) == (0o600, 0)
    assert tls_site.options["cyrus_user"] == "mail"
    client = secured(tls_site, context)
    status_file = Path(f"/proc/{tls_site.child.pid}/status").read_text()
    assert not re.search(r"^Uid:.*\b0\b", status_file, re.MULTILINE)
    client.close()


def break_settings(site: Site, what: str) -> None:
    key = Path(site.options["tls_server_key"])
    if what == "no key":
        key.unlink()
    elif what == "encrypted key":
        command = ["openssl", "pkcs8", "-topk8", "-in", str(key), "-out", f"{key}.new", "-passout", "pass:secret"]
        subprocess.run(command, check=True)
        shutil.move(f"{key}.new", key)
    elif what == "no certificate":
        site.configure(tls_server_cert=str(site.root / "none"))
    elif what == "another key":
        command = ["openssl", "genpkey", "-algorithm", "ed25519", "-out", str(key)]
        subprocess.run(command, check=True)
    else:
        name, value = what.split(": ")
        site.configure(**{name: value})


BROKEN = [
    "no key",
    "encrypted key",
    "no certificate",
    "another key",
    "tls_ciphers: nonsense",
    "tls_versions: tls1_0 tls1_1",
    "tls_client_ca_file: /nowhere",
    "tls_crl_file: /nowhere",
]


@pytest.mark.parametrize("what", BROKEN)
def test_starttls_that_cannot_be_offered(tls_site: Site, what: str) -> None:
    break_settings(tls_site, what)
    client = over_tcp(tls_site)
    client.reply()
    assert "STARTTLS" not in extensions(client)
    assert client.command("STARTTLS")[:3] == "500"
    assert "starttls-not-offered" in tls_site.log_text()


@pytest.mark.parametrize("what", BROKEN)
def test_tls_that_is_required_and_cannot_be_had(tls_site: Site, what: str) -> None:
    tls_site.configure(tls_required="yes")
    break_settings(tls_site, what)
    client = over_tcp(tls_site)
    assert client.reply() == ["421 4.7.0 TLS is required, but not possible now, try again later"]
    assert client.line() == b""
    assert "<3>starttls-not-offered cause=" in tls_site.log_text()
    assert tls_site.child.wait(PATIENCE) == 0


def test_a_certificate_that_cannot_be_read_is_the_trouble_of_tcp_alone(tls_site: Site) -> None:
    """A renewed certificate with the wrong owner: mail comes in on the unix socket, and TLS is back after chown."""
    tls_site.configure(tls_required="yes")
    certificate, port = Path(tls_site.options["tls_server_cert"]), free_port()
    content = certificate.read_text()
    certificate.write_text("")
    unix = str(tls_site.root / "lmtp")
    with SocketActivate(logged(tls_site), address=unix, more_addresses=(f"127.0.0.1:{port}",)) as starter:
        client = starter.connect()
        client.hello()
        assert client.deliver(MESSAGE, "jane")[0].startswith("250")
        assert Client(connect(("127.0.0.1", port))).reply()[0].startswith("421 4.7.0 TLS is required")
        assert tls_site.log_text().count("starttls-not-offered") == 1
        client.leave()
        certificate.write_text(content)
        with suppress(OSError):  # the pool leaves for the change, and this starter starts no other
            Client(connect(("127.0.0.1", port))).reply()
        assert starter.process.wait(PATIENCE) == 0
    assert "files-changed" in tls_site.log_text()


@pytest.mark.parametrize("change", [lambda file: os.chown(file, 0, 8), lambda file: file.chmod(0o644)])
def test_a_change_of_the_owner_or_the_permissions_of_a_file_is_one(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    file = tmp_path / "certificate"
    file.touch(mode=0o600)
    snapshot = lmtpd.Snapshot([str(file)])
    assert not snapshot.is_outdated()
    time.sleep(0.02)  # the clock of the file system is coarse
    change(file)
    assert snapshot.is_outdated()


def test_tls_that_is_required(tls_site: Site, context: ssl.SSLContext) -> None:
    tls_site.configure(tls_required="yes", allowplaintext="yes")
    client = over_tcp(tls_site)
    client.hello()
    for command in (
        MAIL,
        "RCPT TO:<jane>",
        "DATA",
        "RSET",
        "VRFY x",
        "HELP",
        "TRACE x",
        "AUTH PLAIN",
        "AUTH PLAIN AGEAYg==",
    ):
        assert client.command(command)[:9] == "530 5.7.0"
    client.send(b"BDAT 12 LAST\r\nNOOP\r\nQUIT\r\n")  # octets of a message, not commands
    assert client.reply()[0].startswith("530 5.7.0")
    assert client.command("NOOP").startswith("250")
    secure(client, context)
    assert client.command(f"AUTH PLAIN {plain('relay', PASSWORD)}").startswith("235")
    assert client.deliver(MESSAGE, "jane")[0].startswith("250")


def test_no_starttls_for_trusted_peers(tls_site: Site) -> None:
    tls_site.configure(tls_required="yes")
    for client in (tls_site.connect(), over_tcp(tls_site, "-a")):
        client.reply()
        assert "STARTTLS" not in extensions(client)
        assert client.command("STARTTLS")[:3] == "500"
        assert client.deliver(MESSAGE, "jane")[0].startswith("250")


def test_a_key_that_systemd_passes(tls_site: Site, context: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch) -> None:
    key = Path(tls_site.options["tls_server_key"])
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(key.parent))
    tls_site.configure(tls_server_key=key.name)
    assert secured(tls_site, context).command("NOOP").startswith("250")
