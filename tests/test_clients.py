"""STARTTLS and AUTH with the clients that people have: each verifies lmtpd, or lmtpd it, and brings a message."""

from __future__ import annotations

import os
import re
import smtplib
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import test_tls
from authority import Authority
from harness import PATIENCE, Client, Site, wait_for
from peers import PASSWORD as EVERYBODYS
from peers import Exim, LoggedListener, Postfix, libraries, program, unpacked
from test_auth import PASSWORD, AuthDovecot, encoded

authority = test_tls.authority
tls_site = test_tls.tls_site

# Nothing needs to be added to it, and its lines are those that clients like to get wrong.
MESSAGE = (
    b"Date: Sun, 22 Nov 2026 20:00:00 +0000\r\nFrom: <sender@example.com>\r\nTo: <jane@example.com>\r\n"
    b"Subject: a subject\r\nMessage-ID: <one@example.com>\r\n\r\n"
    b"A line.\r\n..\r\n.dot\r\nQ\r\nR\r\nRCPT TO:<jane>\r\n\r\n\ttab \r\n" + b"x" * 990 + b"\r\nlast\r\n"
)


@pytest.fixture
def listener(tls_site: Site) -> Iterator[LoggedListener]:
    """lmtpd on a port, where clients have to start TLS and to authenticate."""
    tls_site.configure(tls_required="yes")
    with LoggedListener(tls_site) as listener:
        yield listener


@pytest.fixture
def stranger() -> Iterator[Authority]:
    """An authority that nobody trusts."""
    site = Site()
    yield Authority(site)
    site.close()


def content(message: bytes) -> bytes:
    """A stored message without the trace that lmtpd, and perhaps another before it, have put before it."""
    return re.sub(rb"\AReturn-Path: .*\n(Received: .*\n([\t ].*\n)+)+", b"", message)


def check_delivery(site: Site, user: str, mechanism: str, version: str = "TLSv1.3") -> None:
    """The one message came as it was, over TLS, and header and log say who brought it."""
    (message,) = site.messages("jane")
    assert content(message) == MESSAGE.replace(b"\r\n", b"\n")
    received = test_tls.received(site)
    assert re.search(rf"\(authenticated user={user} bits=\d{{3}}\)", received)
    assert f"with LMTPSA ({version} with cipher " in received
    assert f" user={user} mechanism={mechanism} peer=[127.0.0.1]\n" in site.log_text()


class Dialogue(Client):
    """A program that passes on lines between its standard input and output and an LMTP server, as a Client."""

    def __init__(self, listener: LoggedListener, *command: str, **environment: str) -> None:
        ours, theirs = socket.socketpair()
        self._errors = listener.site.root / "errors"
        with theirs, self._errors.open("wb") as errors:
            fd = theirs.fileno()
            self.program = subprocess.Popen(
                command, stdin=fd, stdout=fd, stderr=errors, env={**os.environ, **environment}
            )
        super().__init__(ours)

    def errors(self) -> str:
        """What the program has had to say beside the dialogue."""
        return self._errors.read_text()

    def finish(self) -> int:
        """Waits until the program ends, as it does when the server has gone; its exit status."""
        return self.program.wait(PATIENCE)

    def close(self) -> None:
        super().close()
        self.program.kill()
        self.program.wait()

    def __enter__(self) -> Dialogue:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class TestOpenssl:
    """openssl s_client, which starts TLS, and leaves the rest to the person at the keyboard."""

    def dialogue(self, listener: LoggedListener, authority: Authority, *options: str) -> Dialogue:
        command = ["openssl", "s_client", "-starttls", "lmtp", "-connect", f"127.0.0.1:{listener.port}"]
        trust = ["-CAfile", str(authority.file), "-verify_return_error", "-verify_hostname", "mx.example.com"]
        return Dialogue(listener, *command, *trust, *options)

    def wait_for_keys(self, client: Dialogue, count: int) -> None:
        """Returns when the program has read that many commands for new keys."""
        wait_for(lambda: client.errors().count("KEYUPDATE") == count, "new keys")

    # Without -quiet a line that begins with R (as RCPT does) asks for new keys, and one with Q leaves.
    @pytest.mark.parametrize(("option", "version"), [("-tls1_2", "TLSv1.2"), ("-tls1_3", "TLSv1.3")])
    def test_delivery_with_a_certificate(
        self, tls_site: Site, listener: LoggedListener, authority: Authority, option: str, version: str
    ) -> None:
        certificate, key = authority.sign("relay")
        identity = ["-cert", str(certificate), "-key", str(key)]
        with self.dialogue(listener, authority, "-quiet", option, *identity) as client:
            assert client.command("LHLO client.example").startswith("250 Ok")
            assert client.command("AUTH EXTERNAL =").startswith("235")
            assert client.deliver(MESSAGE, "jane")[0].startswith("250")
            assert client.command("QUIT") == "221 2.0.0 Bye"
            assert client.finish() == 0
        check_delivery(tls_site, "relay", "EXTERNAL", version)

    def test_new_keys_in_mid_session(self, listener: LoggedListener, authority: Authority) -> None:
        with self.dialogue(listener, authority, "-brief", "-tls1_3") as client:
            assert client.command("NOOP") == "250 2.0.0 Ok"
            for count, key in enumerate([b"K", b"k", b"K"], 1):
                client.send(key + b"\n")
                self.wait_for_keys(client, count)
                assert client.command("NOOP") == "250 2.0.0 Ok"

    def test_renegotiation_is_refused(self, listener: LoggedListener, authority: Authority) -> None:
        with self.dialogue(listener, authority, "-brief", "-tls1_2") as client:
            assert client.command("NOOP") == "250 2.0.0 Ok"
            client.send(b"R\n")
            assert client.line() == b""
            assert client.finish() == 1
            assert "no renegotiation" in client.errors()

    def test_the_server_has_to_be_verified(self, tls_site: Site, listener: LoggedListener, stranger: Authority) -> None:
        with self.dialogue(listener, stranger, "-quiet") as client:
            assert client.finish() == 1
            assert "certificate verify failed" in client.errors()
        wait_for(lambda: "TLSV1_ALERT_UNKNOWN_CA" in tls_site.log_text(), "the end of the session")

    def test_the_client_has_to_be_verified(
        self, tls_site: Site, listener: LoggedListener, authority: Authority, stranger: Authority
    ) -> None:
        certificate, key = stranger.sign("relay")
        identity = ["-cert", str(certificate), "-key", str(key)]
        with self.dialogue(listener, authority, "-quiet", *identity) as client:
            assert client.line() == b""
            assert client.finish() == 1
            assert "unknown ca" in client.errors()
        assert "authenticated" not in tls_site.log_text()


class TestSwaks:
    """swaks, the Swiss Army knife for SMTP: in one command from LHLO to QUIT."""

    def run(self, listener: LoggedListener, *options: str) -> subprocess.CompletedProcess[str]:
        to = ["--server", "127.0.0.1", "--port", listener.port, "--protocol", "LMTP", "--to", "jane@example.com"]
        command = [program("swaks"), *to, "--from", "sender@example.com", "--data", "-", *options]
        text = MESSAGE.decode().replace("\r\n", "\n").removesuffix("\n")  # it adds the last one
        return subprocess.run(command, input=text, capture_output=True, text=True, timeout=PATIENCE)

    def auth(self, mechanism: str, user: str, password: str = PASSWORD) -> list[str]:
        return ["--auth", mechanism, "--auth-user", user, "--auth-password", password]

    @pytest.mark.parametrize("version", ["tlsv1_2", "tlsv1_3"])
    @pytest.mark.parametrize(("mechanism", "user"), [("PLAIN", "relay"), ("LOGIN", "sha256")])
    def test_delivery_with_a_password(
        self,
        tls_site: Site,
        listener: LoggedListener,
        authority: Authority,
        mechanism: str,
        user: str,
        version: str,
    ) -> None:
        tls = ["--tls", *self.verify(authority), "--tls-protocol", version]
        done = self.run(listener, *tls, *self.auth(mechanism, user))
        assert done.returncode == 0, done.stdout
        check_delivery(tls_site, user, mechanism, version.replace("tlsv1_", "TLSv1."))

    @staticmethod
    def verify(authority: Authority) -> list[str]:
        """The options for a server whose certificate is of that authority; old versions do not look at its name."""
        looks_at_name = "tls-verify-target" in Path(program("swaks")).read_text(errors="replace")
        name = ["--tls-verify-target", "mx.example.com"] if looks_at_name else []
        return ["--tls-verify", *name, "--tls-ca-path", str(authority.file)]

    def test_a_wrong_password(self, tls_site: Site, listener: LoggedListener) -> None:
        done = self.run(listener, "--tls", *self.auth("PLAIN", "relay", "wrong"))
        assert "535 5.7.8 Authentication failed" in done.stdout
        assert done.returncode == 28
        assert 'user=relay peer=[127.0.0.1] cause="wrong password"' in tls_site.log_text()
        assert tls_site.messages("jane") == []

    def test_without_tls_or_auth_there_is_no_delivery(self, tls_site: Site, listener: LoggedListener) -> None:
        assert "530 5.7.0" in self.run(listener).stdout
        assert "430 4.7.0" in self.run(listener, "--tls").stdout
        assert tls_site.messages("jane") == []

    def test_the_server_has_to_be_verified(self, tls_site: Site, listener: LoggedListener, stranger: Authority) -> None:
        tls = ["--tls", *self.verify(stranger)]
        tls_site.configure(debug="yes")
        done = self.run(listener, *tls, *self.auth("PLAIN", "relay"))
        assert done.returncode == 29
        wait_for(lambda: "disconnected session" in tls_site.log_text(), "the end of the session")
        assert "authenticated session" not in tls_site.log_text()
        assert tls_site.messages("jane") == []

    def test_a_certificate_is_shown(self, listener: LoggedListener, authority: Authority) -> None:
        certificate, key = authority.sign("relay")
        done = self.run(
            listener, "--tls", "--tls-cert", str(certificate), "--tls-key", str(key), "--quit-after", "LHLO"
        )
        assert done.returncode == 0
        assert "250-AUTH EXTERNAL " in done.stdout

    def test_cram_md5_of_dovecot(self, tls_site: Site, authority: Authority) -> None:
        with AuthDovecot(tls_site) as dovecot:
            tls_site.configure(sasl_pwcheck_method="dovecot", sasl_auth_socket_path=dovecot.path)
            with LoggedListener(tls_site) as listener:
                tls = ["--tls", *self.verify(authority)]
                done = self.run(listener, *tls, *self.auth("CRAM-MD5", "relay", EVERYBODYS))
        assert done.returncode == 0, done.stdout
        check_delivery(tls_site, "relay", "CRAM-MD5")


class TestLmtptest:
    """lmtptest, Cyrus' own client: it starts TLS, authenticates, and leaves the rest to the person at the keyboard."""

    def dialogue(self, listener: LoggedListener, *options: str) -> Dialogue:
        root = unpacked("cyrus")
        command = [str(root / "usr/lib/cyrus/bin/lmtptest"), "-p", listener.port, *options, "127.0.0.1"]
        return Dialogue(listener, *command, LD_LIBRARY_PATH=libraries(root))

    def transcript(self, client: Dialogue) -> str:
        """What it shows of its dialogue before it is the person's turn."""
        shown = b""
        while not (match := re.match(rb"(.*\nSecurity strength factor: \d+\r?\n)(.*)", shown, re.DOTALL)):
            more = client.sock.recv(65536)
            assert more, shown
            shown += more
        assert not match[2]
        return shown.decode()

    def check_success(self, client: Dialogue) -> str:
        """Delivers the message once the program has authenticated; the transcript."""
        with client:
            transcript = self.transcript(client)
            assert "\nAuthenticated." in transcript, transcript
            assert client.deliver(MESSAGE, "jane")[0].startswith("250")
            assert client.command("QUIT") == "221 2.0.0 Bye"
            assert client.finish() == 0
        return transcript

    @pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
    @pytest.mark.parametrize(
        ("mechanism", "user"),
        [("PLAIN", "relay"), ("LOGIN", "relay"), ("SCRAM-SHA-1", "sha1"), ("SCRAM-SHA-256", "sha256")],
    )
    def test_delivery_with_a_password(self, tls_site: Site, mechanism: str, user: str, version: str) -> None:
        tls_site.configure(tls_required="yes", tls_versions=version.lower().replace("v", "").replace(".", "_"))
        with LoggedListener(tls_site) as listener:
            options = ["-t", "", "-m", mechanism, "-a", user, "-w", PASSWORD]
            transcript = self.check_success(self.dialogue(listener, *options))
        assert f"TLS connection established: {version} with cipher" in transcript
        check_delivery(tls_site, user, mechanism, version)

    def test_delivery_with_a_certificate(self, tls_site: Site, listener: LoggedListener, authority: Authority) -> None:
        certificate, key = authority.sign("relay")
        both = tls_site.root / "relay.pem"
        both.write_text(certificate.read_text() + key.read_text())
        self.check_success(self.dialogue(listener, "-t", str(both), "-m", "EXTERNAL"))
        check_delivery(tls_site, "relay", "EXTERNAL")

    def test_scram_that_is_bound_to_the_channel(self, tls_site: Site) -> None:
        tls_site.configure(tls_versions="tls1_2")
        with LoggedListener(tls_site) as listener:
            options = ["-t", "", "-m", "SCRAM-SHA-256-PLUS", "-a", "sha256", "-w", PASSWORD]
            transcript = self.check_success(self.dialogue(listener, *options))
        # It names the mechanism without -PLUS, but does ask for the binding.
        assert f"\nC: AUTH SCRAM-SHA-256 {encoded('p=tls-unique,,n=sha256')[:28]}" in transcript
        check_delivery(tls_site, "sha256", "SCRAM-SHA-256", "TLSv1.2")

    def test_scram_without_tls(self, tls_site: Site) -> None:
        with LoggedListener(tls_site) as listener:
            options = ["-m", "SCRAM-SHA-256", "-a", "sha256", "-w", PASSWORD]
            self.check_success(self.dialogue(listener, *options))
        assert "(authenticated user=sha256 bits=0)" in test_tls.received(tls_site)

    @pytest.mark.parametrize(
        ("mechanism", "user", "cause"),
        [
            ("PLAIN", "relay", "wrong password"),
            ("SCRAM-SHA-256", "sha256", "(The client keys don't match|wrong password)"),
            ("SCRAM-SHA-256", "relay", "no verifier for SCRAM-SHA-256"),
        ],
    )
    def test_a_wrong_password(
        self, tls_site: Site, listener: LoggedListener, mechanism: str, user: str, cause: str
    ) -> None:
        with self.dialogue(listener, "-t", "", "-m", mechanism, "-a", user, "-w", "wrong") as client:
            assert "S: 535 5.7.8" in self.transcript(client)
            assert client.command("MAIL FROM:<>")[:9] == "430 4.7.0"
        assert re.search(rf'user={user} peer=\[127.0.0.1\] cause="{cause}', tls_site.log_text())


POSTFIX_TO_TCP = """\
virtual_mailbox_domains = example.com
virtual_transport = lmtp:inet:127.0.0.1:{port}
lmtp_tls_security_level = verify
lmtp_tls_CAfile = {authority}
lmtp_tls_verify_cert_match = mx.example.com
lmtp_sasl_auth_enable = yes
lmtp_sasl_password_maps = texthash:{passwords}
"""


class TestPostfix:
    """Postfix's lmtp(8), with a queue that keeps what could not be delivered."""

    def postfix(
        self, listener: LoggedListener, authority: Authority, user: str, *more: str, password: str = PASSWORD
    ) -> Postfix:
        passwords = listener.site.root / "sasl_passwd"
        passwords.write_text(f"127.0.0.1 {user}:{password}\n")
        main_cf = POSTFIX_TO_TCP.format(port=listener.port, authority=authority.file, passwords=passwords)
        return Postfix(listener.site, main_cf + "".join(f"{line}\n" for line in more), "")

    def submit(self, postfix: Postfix) -> None:
        with smtplib.SMTP(*postfix.address, timeout=PATIENCE) as smtp:
            smtp.sendmail("sender@example.com", ["jane@example.com"], MESSAGE)

    # By default Postfix sends no passwords that can be read at the other end.
    @pytest.mark.parametrize(
        ("mechanism", "user", "options"),
        [
            ("SCRAM-SHA-256", "sha256", []),
            ("SCRAM-SHA-1", "sha1", ["lmtp_sasl_mechanism_filter = scram-sha-1"]),
            ("PLAIN", "relay", ["lmtp_sasl_mechanism_filter = plain", "lmtp_sasl_tls_security_options = noanonymous"]),
            ("LOGIN", "relay", ["lmtp_sasl_mechanism_filter = login", "lmtp_sasl_tls_security_options = noanonymous"]),
        ],
    )
    def test_delivery_with_a_password(
        self,
        tls_site: Site,
        listener: LoggedListener,
        authority: Authority,
        mechanism: str,
        user: str,
        options: list[str],
    ) -> None:
        with self.postfix(listener, authority, user, *options) as postfix:
            self.submit(postfix)
            postfix.wait_until_sent()
            assert "status=sent (250 2.1.5 Ok SESSIONID=" in postfix.log.read_text()
        check_delivery(tls_site, user, mechanism)

    def test_tls_1_2(self, tls_site: Site, listener: LoggedListener, authority: Authority) -> None:
        with self.postfix(listener, authority, "sha256", "lmtp_tls_mandatory_protocols = TLSv1.2") as postfix:
            self.submit(postfix)
            postfix.wait_until_sent()
        check_delivery(tls_site, "sha256", "SCRAM-SHA-256", "TLSv1.2")

    def check_deferral(self, postfix: Postfix, reason: str) -> None:
        """The message stays in the queue, for that reason, and is not in the mailbox."""
        with postfix:
            self.submit(postfix)
            entry = f'"delay_reason": "{reason}'
            wait_for(lambda: re.search(entry, postfix.queued()), "the reason in the queue", postfix.log)
            wait_for(lambda: " status=deferred (" in postfix.log.read_text(), "the same in the log", postfix.log)

    def test_the_server_has_to_be_verified(self, tls_site: Site, listener: LoggedListener, stranger: Authority) -> None:
        postfix = self.postfix(listener, stranger, "sha256")
        self.check_deferral(postfix, "Server certificate not (verified|trusted)")
        assert "untrusted issuer /CN=Test authority" in postfix.log.read_text()
        assert tls_site.messages("jane") == []
        assert "authenticated" not in tls_site.log_text()

    def test_the_server_has_to_be_the_right_one(
        self, tls_site: Site, listener: LoggedListener, authority: Authority
    ) -> None:
        other = "lmtp_tls_verify_cert_match = other.example.com"
        self.check_deferral(self.postfix(listener, authority, "sha256", other), "Server certificate not verified")
        assert tls_site.messages("jane") == []

    def test_a_wrong_password(self, tls_site: Site, listener: LoggedListener, authority: Authority) -> None:
        postfix = self.postfix(listener, authority, "sha256", password="wrong")
        self.check_deferral(postfix, ".*SASL authentication failed")
        assert "authentication-failed" in tls_site.log_text()
        assert tls_site.messages("jane") == []


EXIM_TRANSPORT = """\
  hosts_require_tls = *
  hosts_require_auth = *
  tls_verify_certificates = {authority}
  tls_verify_hosts = *
  tls_verify_cert_hostnames = *
  tls_require_ciphers = {ciphers}
"""
EXIM_AUTHENTICATORS = {
    "PLAIN": "client_send = ^{user}^{password}",
    "LOGIN": "client_send = : {user} : {password}",
}


def exim_authenticator(mechanism: str, user: str, password: str) -> str:
    send = EXIM_AUTHENTICATORS[mechanism].format(user=user, password=password)
    return f"{mechanism}:\n  driver = plaintext\n  public_name = {mechanism}\n  {send}\n"


class TestExim:
    """Exim's smtp transport, which verifies with GnuTLS."""

    CIPHERS = {"TLSv1.2": "NORMAL:-VERS-TLS1.3", "TLSv1.3": "NORMAL"}

    def exim(
        self, listener: LoggedListener, authority: Authority, version: str, authenticator: str, more: str = ""
    ) -> Exim:
        transport = EXIM_TRANSPORT.format(authority=authority.file, ciphers=self.CIPHERS[version])
        return Exim(listener.site, listener.port, transport + more, authenticator)

    @pytest.mark.parametrize("version", CIPHERS)
    @pytest.mark.parametrize(("mechanism", "user"), [("PLAIN", "relay"), ("LOGIN", "sha256")])
    def test_delivery_with_a_password(
        self,
        tls_site: Site,
        listener: LoggedListener,
        authority: Authority,
        mechanism: str,
        user: str,
        version: str,
    ) -> None:
        exim = self.exim(listener, authority, version, exim_authenticator(mechanism, user, PASSWORD))
        log = exim.send(MESSAGE)
        assert f"CV=yes A={mechanism} " in log
        assert exim.queued() == []
        check_delivery(tls_site, user, mechanism, version)

    @pytest.mark.parametrize("version", CIPHERS)
    def test_delivery_with_a_certificate(
        self, tls_site: Site, listener: LoggedListener, authority: Authority, version: str
    ) -> None:
        certificate, key = authority.sign("relay")
        tls_site.give(key)  # as who Exim reads it
        shown = f"  tls_certificate = {certificate}\n  tls_privatekey = {key}\n"
        external = "external:\n  driver = external\n  public_name = EXTERNAL\n  client_send = relay\n"
        exim = self.exim(listener, authority, version, external, shown)
        assert "CV=yes A=external " in exim.send(MESSAGE)
        assert exim.queued() == []
        check_delivery(tls_site, "relay", "EXTERNAL", version)

    @pytest.mark.parametrize("version", CIPHERS)
    def test_the_server_has_to_be_verified(
        self, tls_site: Site, listener: LoggedListener, stranger: Authority, version: str
    ) -> None:
        exim = self.exim(listener, stranger, version, exim_authenticator("PLAIN", "relay", PASSWORD))
        assert "(certificate verification failed): certificate invalid" in exim.send(MESSAGE)
        assert len(exim.queued()) == 1
        assert tls_site.messages("jane") == []
        assert "authenticated" not in tls_site.log_text()

    @pytest.mark.parametrize("version", CIPHERS)
    def test_a_wrong_password(
        self, tls_site: Site, listener: LoggedListener, authority: Authority, version: str
    ) -> None:
        exim = self.exim(listener, authority, version, exim_authenticator("PLAIN", "relay", "wrong"))
        assert "535 5.7.8 Authentication failed" in exim.send(MESSAGE)
        assert len(exim.queued()) == 1
        assert 'user=relay peer=[127.0.0.1] cause="wrong password"' in tls_site.log_text()
        assert tls_site.messages("jane") == []
