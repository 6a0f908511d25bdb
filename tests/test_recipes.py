"""The README's recipes that begin elsewhere than after the eight commands, on Debian 12 and 13.

Those for a site are in test_site.py, that for TCP is in test_clients.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from container import DEBIAN_13, OWN, TOP, Machine, readme_blocks
from harness import wait_for
from recipes import offline, paste
from test_site import PASSWORD, catch_mail_for_elsewhere, codes, subjects, submit, wait_for_mail

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

    [block] = readme_blocks("## From Dovecot's LMTP")
    shown = paste(machine, block).output
    assert f"/{home}/Maildir\n" in shown
    assert f"/{home}/.dovecot.sieve\n" in shown
    for subject, name in (("new", "INBOX"), ("new invoice", "Invoices")):
        submit(machine, subject, address)
        wait_for_mail(machine, subject, address, name)
    assert subjects(machine, address) == ["Subject: old", "Subject: new"]
    assert subjects(machine, address, "Invoices") == ["Subject: old invoice", "Subject: new invoice"]
    owners = machine.shell(f"find /{home}/Maildir -name '*,S=*' -printf '%u:%g %m\\n' | sort -u")
    assert owners == "vmail:vmail 600\n"
    assert "relay=mx.example.com[private/lmtpd]" in machine.journal("--identifier=postfix/lmtp")


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
