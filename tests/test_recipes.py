"""The README's recipes that begin elsewhere than after the eight commands, on Debian 12 and 13.

Those for a site are in test_site.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import test_systemd
from authority import Authority
from container import DEBIAN_13, OWN, TOP, Machine, readme_blocks
from harness import Site, wait_for
from recipes import offline, paste
from test_auth import PASSWORD as PASS_PHRASE
from test_clients import MESSAGE, content
from test_site import FETCH, PASSWORD, catch_mail_for_elsewhere, codes, subjects, submit, wait_for_mail

README = (TOP / "README.md").read_text()


@pytest.fixture(scope="module", params=sorted({OWN, DEBIAN_13}), ids=lambda root: root.name)
def base(request: pytest.FixtureRequest) -> Path:
    root: Path = request.param
    return root


@pytest.fixture
def machine(base: Path, installation: Path) -> Iterator[Machine]:
    """A machine of the test's own after units/install, with Postfix and Dovecot as Debian has them."""
    machine = Machine(base, installation)
    # Postfix and lmtpd have the configuration that other tests need.
    machine.shell("""
install -m 644 /opt/lmtpd/units/imapd.conf /etc/imapd.conf
postconf -X local_transport local_recipient_maps smtpd_recipient_restrictions unverified_recipient_reject_code
postconf -e 'mydestination = mx.example.com, localhost'
rm -r /var/spool/lmtpd/jane
""")
    yield machine
    machine.close()


def test_mail_in_the_homes(machine: Machine) -> None:
    [block] = readme_blocks("### Mail in the homes of the host's accounts")
    machine.shell(f"useradd -m -K HOME_MODE=0700 jane\necho jane:{PASSWORD} | chpasswd")
    paste(machine, block)
    catch_mail_for_elsewhere(machine)
    assert codes(submit(machine, "home", "jane@example.com")) == ["250", "250"]
    wait_for_mail(machine, "home", "jane")
    assert machine.shell("stat --format='%U:%G %a' /home/jane/Maildir /home/jane/Maildir/cur/*").splitlines() == [
        "jane:jane 700",
        "jane:jane 600",
    ]
    machine.run("sendmail", "root", stdin="Subject: cron\n\nx\n")
    wait_for_mail(machine, "cron", "jane")
    assert codes(submit(machine, "nobody", "nobody-here@example.com", "daemon@example.com")) == ["550", "550"]


# A site with Dovecot's LMTP server: users by full address in a file, whose mail belongs to vmail.
BEFORE = f"""\
useradd -r -d /var/vmail -s /usr/sbin/nologin vmail
install -d -o vmail -g vmail -m 700 /var/vmail
install -m 640 -g dovecot /dev/null /etc/dovecot/users
echo "jane@example.com:{{PLAIN}}{PASSWORD}::::::" >>/etc/dovecot/users
sed -i 's/^!include auth-system/#&/' /etc/dovecot/conf.d/10-auth.conf
postconf -e virtual_mailbox_domains=example.com virtual_transport=lmtp:unix:private/dovecot-lmtp
"""
LOCAL_CONF = {
    "2.3": """\
auth_username_format = %Lu
mail_location = maildir:~/Maildir
first_valid_uid = 100
passdb {
  driver = passwd-file
  args = /etc/dovecot/users
}
userdb {
  driver = passwd-file
  args = /etc/dovecot/users
  default_fields = uid=vmail gid=vmail home=/var/vmail/%d/%n
}
protocol lmtp {
  mail_plugins = sieve
}
""",
    "2.4": """\
auth_username_format = %{user | lower}
mail_driver = maildir
mail_path = ~/Maildir
mail_inbox_path = .
first_valid_uid = 100
passdb passwd-file {
  passwd_file_path = /etc/dovecot/users
}
userdb passwd-file {
  passwd_file_path = /etc/dovecot/users
  fields {
    uid:default = vmail
    gid:default = vmail
    home:default = /var/vmail/%{user | domain}/%{user | username}
  }
}
protocol lmtp {
  auth_username_format = %{user | lower}
  mail_plugins {
    sieve = yes
  }
}
""",
}
LMTP = """\
service lmtp {
  unix_listener /var/spool/postfix/private/dovecot-lmtp {
    mode = 0600
    user = postfix
  }
}
"""
SCRIPT = """\
require ["fileinto", "mailbox"];
if header :contains "Subject" "invoice" { fileinto :create "Invoices"; }
"""


def test_from_dovecots_lmtp(machine: Machine) -> None:
    """Mail and filters of before are there, and go on."""
    machine.run("bash", "-ec", offline(machine, "apt-get install -y dovecot-lmtpd dovecot-sieve\n"), timeout=120)
    version = machine.run("dovecot", "--version").stdout[:3]
    (machine.root / "etc/dovecot/local.conf").write_text(LOCAL_CONF[version] + LMTP)
    machine.shell(BEFORE)
    catch_mail_for_elsewhere(machine)
    machine.shell("systemctl restart dovecot postfix")
    address, home = "jane@example.com", "var/vmail/example.com/jane"
    submit(machine, "old", address)
    wait_for_mail(machine, "old", address)
    assert "relay=mx.example.com[private/dovecot-lmtp]" in machine.journal("--identifier=postfix/lmtp")
    (machine.root / home / ".dovecot.sieve").write_text(SCRIPT)
    submit(machine, "old invoice", address)
    folder = machine.root / home / "Maildir/.Invoices"
    wait_for(lambda: list(folder.glob("new/*")), "the folder")

    prepare, one_user, all_users = readme_blocks("## From Dovecot's LMTP")
    shown = paste(machine, prepare).output
    assert f"mailbox  /{home}/Maildir\n" in shown
    assert f"script   /{home}/.dovecot.sieve\n" in shown
    assert "reply    250 2.1.5 Ok\n" in shown
    assert re.search(rf"^home\t/{home}$", shown, re.MULTILINE)  # of doveadm user
    assert re.search(rf"^  home +: /{home}$", shown, re.MULTILINE)  # of doveadm user -u
    submit(machine, "not yet", address)
    wait_for_mail(machine, "not yet", address)
    assert "[private/lmtpd]" not in machine.journal("--identifier=postfix/lmtp")
    machine.shell(f"echo 'joe@example.com:{{PLAIN}}{PASSWORD}::::::' >>/etc/dovecot/users")
    wait_for(lambda: machine.run("doveadm", "user", "joe@example.com", check=False).returncode == 0, "joe")
    paste(machine, one_user)
    for user, relay in ((address, "lmtpd"), ("joe@example.com", "dovecot-lmtp")):
        submit(machine, "for one user", user)
        wait_for_mail(machine, "for one user", user)
        assert f"to=<{user}>, relay=mx.example.com[private/{relay}]" in machine.journal("--identifier=postfix/lmtp")
    paste(machine, all_users)
    submit(machine, "for all users", "joe@example.com")
    wait_for_mail(machine, "for all users", "joe@example.com")
    assert "to=<joe@example.com>, relay=mx.example.com[private/lmtpd]" in machine.journal("--identifier=postfix/lmtp")
    for subject, name in (("new", "INBOX"), ("new invoice", "Invoices")):
        submit(machine, subject, address)
        wait_for_mail(machine, subject, address, name)
    old = ["Subject: old", "Subject: not yet", "Subject: for one user"]
    assert subjects(machine, address) == [*old, "Subject: new"]
    assert subjects(machine, address, "Invoices") == ["Subject: old invoice", "Subject: new invoice"]
    machine.run("python3", "-c", FETCH, address, "lists", "new")
    submit(machine, "to the folder", "jane+lists@example.com")
    wait_for_mail(machine, "to the folder", address, "lists")
    owners = machine.shell(f"find /{home}/Maildir -name '*,S=*' -printf '%u:%g %m\\n' | sort -u")
    assert owners == "vmail:vmail 600\n"
    machine.shell("sed -i 's,home=/var/vmail/%d/%n,,; /home:default/d' /etc/dovecot/local.conf; doveadm reload")
    explain = ("lmtpd", "--explain", address)
    wait_for(lambda: "reply    451" in machine.run(*explain, check=False).stdout, "a user without a home")


# A client in the machine that README.md has set up, which verifies, authenticates if it is given a name, and delivers.
SMTPLIB = """\
import smtplib, ssl, sys
user, password, context = *sys.argv[1:], ssl.create_default_context(cafile="/root/ca.pem")
with smtplib.LMTP("127.0.0.1", 24) as client:
    if user:
        client._host = "mx.example.com"
        client.starttls(context=context)
        client.login(user, password)
    print(client.sock.version() if user else "in the clear")
    client.sendmail("sender@example.com", ["jane@example.com"], sys.stdin.read())
"""

CREDENTIALS = "LoadCredential=lmtpd.pem:/root/lmtpd.pem\nLoadCredential=lmtpd.passwords:/root/lmtpd.passwords\n"
ROOT_SERVICE = """\
[Service]
ExecStart=/usr/local/bin/lmtpd -C /etc/root.conf
StandardInput=socket
StandardError=journal
"""


TCP = "### TCP, TLS and passwords: Postfix on another host"
CERTIFICATE = "/etc/letsencrypt/live/mx.example.com"
ADDRESS = "192.0.2.10"  # the README's
# Adds it to the loopback device: ioctl SIOCSIFADDR of netdevice(7).
ADD_ADDRESS = f"""\
import fcntl, socket, struct
request = struct.pack("16sHH4s8x", b"lo:1", socket.AF_INET, 0, socket.inet_aton("{ADDRESS}"))
fcntl.ioctl(socket.socket(socket.AF_INET, socket.SOCK_DGRAM), 0x8916, request)
"""


@pytest.fixture(scope="module")
def on_tcp(installed: Machine) -> Machine:
    """The machine after the README's recipe for TCP up to lmtpd's side, with a certificate as from certbot."""
    command, certbot, _, ours, another_address, _, _ = readme_blocks(TCP)
    site = Site()
    try:
        authority = Authority(site)
        certificate, key = authority.sign("mx.example.com")
        folder = installed.root / CERTIFICATE.lstrip("/")
        folder.mkdir(parents=True)
        (folder.parent.parent / "renewal-hooks/deploy").mkdir(parents=True)
        (folder / "fullchain.pem").write_text(certificate.read_text())
        (folder / "privkey.pem").write_text(key.read_text())
        (installed.root / "root/ca.pem").write_text(authority.file.read_text())
    finally:
        site.close()
    for block in (command, certbot):
        paste(installed, block)
    paste(installed, offline(installed, ours), PASS_PHRASE, PASS_PHRASE)
    paste(installed, another_address)
    installed.run("python3", "-c", ADD_ADDRESS)
    return installed


@pytest.fixture
def tcp_machine(on_tcp: Machine) -> Iterator[Machine]:
    """The same with jane's Maildir empty, and after the test without the test's drop-ins."""
    test_systemd.empty_maildir(on_tcp)
    on_tcp.run("systemctl", "start", "lmtpd.socket")
    yield on_tcp
    test_systemd.reset(on_tcp, "lmtpd@.service", "lmtpd.socket")


def deliver_in(machine: Machine, user: str, password: str = PASS_PHRASE) -> str:
    """What the client in the machine prints, and in the end complains of."""
    done = machine.run("python3", "-c", SMTPLIB, user, password, stdin=MESSAGE.decode(), check=False)
    return done.stdout + done.stderr


class TestTcp:
    """The recipe for TCP, with a certificate as certbot and acme.sh bring it."""

    def check_delivery(self, machine: Machine) -> None:
        assert deliver_in(machine, "mta") == "TLSv1.3\n"
        (stored,) = test_systemd.messages(machine)
        message = stored.read_bytes()
        assert content(message) == MESSAGE.replace(b"\r\n", b"\n")
        assert b"(authenticated user=mta bits=256)" in message
        assert b" with LMTPSA (TLSv1.3 " in message
        assert " user=mta mechanism=PLAIN peer=[127.0.0.1]\n" in machine.journal("--identifier=lmtpd")

    def test_delivery_with_tls_and_a_password(self, tcp_machine: Machine) -> None:
        self.check_delivery(tcp_machine)

    @pytest.mark.parametrize(
        ("user", "password", "reply"),
        [("", "", "(530, b'5.7.0 "), ("mta", "wrong", "(535, b'5.7.8 "), ("root", PASS_PHRASE, "(535, b'5.7.8 ")],
    )
    def test_others_are_refused(self, tcp_machine: Machine, user: str, password: str, reply: str) -> None:
        assert reply in deliver_in(tcp_machine, user, password)
        assert test_systemd.messages(tcp_machine) == []

    def test_the_unix_socket_stays_as_it_was(self, tcp_machine: Machine) -> None:
        client = test_systemd.connect(tcp_machine)
        client.hello()
        assert client.deliver(MESSAGE, "jane")[0].startswith("250")
        client.close()
        assert b" with LMTPA id " in test_systemd.messages(tcp_machine)[0].read_bytes()

    def test_postfix_on_another_host(self, tcp_machine: Machine) -> None:
        """It is on this one, in fact, but comes in by the name and the port."""
        *_, theirs, check = readme_blocks(TCP)
        tcp_machine.shell(f"""
sed -i '1i {ADDRESS} mx.example.com' /etc/hosts
cp /root/ca.pem /etc/ssl/certs/ca-certificates.crt
openssl rehash /etc/ssl/certs
postconf -e lmtp_host_lookup=native lmtp_tls_loglevel=1
""")
        tcp_machine.run("cp", "/etc/postfix/main.cf", "/root/main.cf")
        try:
            paste(tcp_machine, offline(tcp_machine, theirs.replace("mta:secret", f"mta:{PASS_PHRASE}")))
            test_systemd.send(tcp_machine)
            [stored] = wait_for(lambda: test_systemd.messages(tcp_machine), "the message")
            message = stored.read_bytes()
            shown = paste(tcp_machine, check).output
            assert "Verification: OK" in shown
            wait_for(lambda: "status=deliverable" in tcp_machine.journal("--identifier=postfix/lmtp"), "the probe")
        finally:
            tcp_machine.shell("cp /root/main.cf /etc/postfix\npostfix reload")
        assert b"(authenticated user=mta bits=256)" in message
        assert b" with LMTPSA (TLSv1.3 " in message
        verified = f"Verified TLS connection established to mx.example.com[{ADDRESS}]:24: TLSv1.3"
        assert verified in tcp_machine.journal("--identifier=postfix/lmtp")

    @pytest.mark.parametrize("client", ["certbot", "acme.sh"])
    def test_a_renewed_certificate_is_used(self, tcp_machine: Machine, client: str) -> None:
        _, _, acme, *_ = readme_blocks(TCP)
        folder = CERTIFICATE
        hook = "/etc/letsencrypt/renewal-hooks/deploy/lmtpd"
        environment = [f"RENEWED_LINEAGE={folder}", "RENEWED_DOMAINS=mx.example.com"]
        if client == "acme.sh":
            folder = "/etc/lmtpd/mx.example.com"
            # It copies the files to the places that it is told, and then has the shell run the command.
            [hook] = re.findall(r"--reloadcmd '(.*)'", acme)
            assert f"--fullchain-file {folder}/fullchain.pem --key-file {folder}/privkey.pem" in acme
            tcp_machine.shell(f"{acme.splitlines()[0]}\ncp {CERTIFICATE}/*.pem {folder}")
            environment = ["PATH=/usr/bin:/bin"]
        tcp_machine.shell(f"""
cp {folder}/fullchain.pem /root/fullchain.pem
openssl req -x509 -key {folder}/privkey.pem -subj '/CN=renewed for {client}' -out {folder}/fullchain.pem
env -i {" ".join(environment)} sh -c '{hook}'
env -i RENEWED_LINEAGE=/etc/letsencrypt/live/another.example.com /usr/local/sbin/lmtpd-certificate
""")
        assert tcp_machine.run("stat", "--format=%U %a", "/etc/lmtpd.pem").stdout == "lmtpd 600\n"
        shown = tcp_machine.run("openssl", "s_client", "-starttls", "lmtp", "-connect", "127.0.0.1:24").stdout
        assert re.search(rf"subject=CN ?= ?renewed for {client}\n", shown)
        tcp_machine.shell(f"cp /root/fullchain.pem {folder}\nRENEWED_LINEAGE={folder} lmtpd-certificate")

    def with_credentials(self, machine: Machine) -> str:
        """Makes files that only root can read, and a configuration in which lmtpd has them from systemd."""
        machine.shell("for name in lmtpd.pem lmtpd.passwords; do install -m 600 /etc/$name /root/$name; done")
        return (machine.root / "etc/imapd.conf").read_text().replace("/etc/lmtpd.p", "lmtpd.p")

    def test_credentials_for_the_account_of_the_service(self, tcp_machine: Machine) -> None:
        conf = tcp_machine.root / "etc/imapd.conf"
        good = conf.read_text()
        conf.write_text(self.with_credentials(tcp_machine))
        test_systemd.install_drop_in(tcp_machine, "lmtpd@.service", "test.conf", f"[Service]\n{CREDENTIALS}")
        try:
            self.check_delivery(tcp_machine)
        finally:
            conf.write_text(good)

    def test_credentials_for_root(self, tcp_machine: Machine) -> None:
        """The key is read by root; the passwords, which are read for every AUTH, are out of cyrus_user's reach."""
        (tcp_machine.root / "etc/root.conf").write_text(self.with_credentials(tcp_machine) + "cyrus_user: lmtpd\n")
        units = tcp_machine.root / "run/systemd/system"
        (units / "root.socket").write_text("[Socket]\nListenStream=127.0.0.1:24\nAccept=yes\n")
        (units / "root@.service").write_text(ROOT_SERVICE + CREDENTIALS)
        tcp_machine.shell("systemctl daemon-reload; systemctl stop lmtpd.socket; systemctl start root.socket")
        try:
            assert "(454, b'4.7.0 " in deliver_in(tcp_machine, "mta")
            journal = tcp_machine.journal("--identifier=lmtpd")
            assert re.search(r"authentication-unavailable .*/lmtpd\.passwords: Permission denied", journal)
            assert test_systemd.messages(tcp_machine) == []
        finally:
            tcp_machine.run("systemctl", "stop", "root.socket")


def test_lines_are_120_characters_at_most() -> None:
    assert [line for line in README.splitlines() if len(line) > 120] == []


def test_blocks_can_be_pasted() -> None:
    """A shell that reads keys takes a tab for a question, and each block stands alone."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert len(blocks) > 20
    assert not any("\t" in block for block in blocks)
    assert not any(re.search(r"^cd ", block, re.MULTILINE) for block in blocks)


def test_the_units_that_are_named_are_there() -> None:
    named = set(re.findall(r"/opt/lmtpd/units/([a-z]+\.[a-z]+)", README)) | set(
        re.findall(r"`(?:units/)?(lmtpd[-@a-z]*\.(?:socket|service)|inetd\.conf|xinetd)`", README)
    )
    assert {"accounts.conf", "elsewhere.conf", "tcp.conf", "inetd.conf", "xinetd", "lmtpd.socket"} <= named
    assert not [name for name in named if not (TOP / "units" / name).exists()]
