"""The README's way from Cyrus: a real Cyrus on a host of its own, as it were, and the whole site beside it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from authority import Authority
from container import DEBIAN_13, OWN, Machine, readme_blocks
from harness import STORE_USER, Site, wait_for
from peers import Cyrus
from recipes import offline, paste
from test_site import PASSWORD, add_user

OLD, NEW = "127.0.0.2", "127.0.0.1"
OLD_POSTFIX = "/etc/old-postfix"  # systemd would take /etc/postfix-old for an instance of postfix.service
TITLE = "## From Cyrus"
SCRIPT = 'require "fileinto";\nif header :contains "Subject" "invoice" { fileinto "INBOX.Lists.debian"; }\n'
# Where Cyrus's imapd.conf says something else than Debian's.
FOREIGN = {"altnamespace": "yes", "unixhierarchysep": "yes"}

# Fills a user's mailbox on the old server.
FILL = f"""\
import imaplib, sys
user, prefix, separator = sys.argv[1:]
imap = imaplib.IMAP4_SSL("old.example.com", timeout=50)
imap.login(user, "{PASSWORD}")
names = ["Lists", "Lists/debian", "Entw&APw-rfe", "Two words", "Sent"]
folders = ["INBOX"] + [prefix + name.replace("/", separator) for name in names]
for place, folder in enumerate(folders):
    quoted = '"' + folder + '"'
    if place:
        assert imap.create(quoted)[0] == "OK"
        assert place == 1 or imap.subscribe(quoted)[0] == "OK"
    for number, flags in enumerate(["", "\\\\Seen", "\\\\Seen \\\\Answered \\\\Flagged", "\\\\Draft $Label1 Work"]):
        date = f'"{{place + 1:02}}-Mar-2020 10:{{number:02}}:00 +0100"'
        text = f"Message-ID: <{{place}}.{{number}}@example.net>\\r\\nSubject: {{place}}.{{number}}\\r\\n\\r\\nx\\r\\n"
        assert imap.append(quoted, f"({{flags}})", date, text.encode())[0] == "OK"
# A message that is gone has left a gap in the UIDs.
imap.select("INBOX")
imap.store("2", "+FLAGS", "\\\\Deleted")
imap.expunge()
imap.setacl(prefix + "Lists", "joe" if user == "jane" else "jane", "lrs")
"""
# What users do while their mail is copied.
CHANGE = f"""\
import imaplib, sys
user, prefix, separator = sys.argv[1:]
imap = imaplib.IMAP4_SSL("old.example.com", timeout=50)
imap.login(user, "{PASSWORD}")
imap.select("INBOX")
imap.uid("STORE", "1", "+FLAGS", "\\\\Seen")
imap.uid("STORE", "3", "-FLAGS", "\\\\Flagged")
imap.uid("STORE", "4", "+FLAGS", "\\\\Deleted")
imap.expunge()
assert imap.rename(f'"{{prefix}}Two words"', prefix + "Renamed")[0] == "OK"
assert imap.create(prefix + "Empty")[0] == "OK"
"""
# All that a client sees of the user's mail.
LOOK = f"""\
import hashlib, imaplib, json, re, sys, time
host, user, prefix, separator = sys.argv[1:]
imap = imaplib.IMAP4(host, timeout=50) if host == "{NEW}" else imaplib.IMAP4_SSL("old.example.com", timeout=50)
imap.login(user, "{PASSWORD}")
def names(answer):
    for line in filter(None, answer[1]):
        name = re.search(r'\\) "." (.*)', line.decode())[1].strip('"')
        # What another user shares is not copied.
        if host == "{NEW}" or not name.startswith(("Other Users", "user.")):
            yield name, name.removeprefix(prefix).replace(separator, "/")
folders = {{}}
for name, plain in names(imap.list()):
    assert imap.select(f'"{{name}}"', readonly=True)[0] == "OK"
    validity = imap.response("UIDVALIDITY")[1][0].decode()
    messages = []
    for uid in imap.uid("SEARCH", "ALL")[1][0].split():
        [line] = imap.uid("FETCH", uid, "(FLAGS INTERNALDATE)")[1]
        flags = sorted(flag.decode() for flag in imaplib.ParseFlags(line) if flag != b"\\\\Recent")
        date = time.mktime(imaplib.Internaldate2tuple(line))
        text = imap.uid("FETCH", uid, "(BODY.PEEK[])")[1][0][1]
        subject = re.search(rb"^Subject: (.*)\\r$", text, re.MULTILINE)[1].decode()
        messages.append([subject, int(uid), flags, date, hashlib.sha256(text).hexdigest()])
    folders[plain] = [validity, messages]
print(json.dumps([folders, sorted(plain for _, plain in names(imap.lsub()))]))
"""
# Gives the old host its address, which Postfix looks for.
ADDRESS = f"""\
import fcntl, socket, struct
request = struct.pack("16sH2x4s8x", b"lo:old", socket.AF_INET, socket.inet_aton("{OLD}"))
fcntl.ioctl(socket.socket(socket.AF_INET, socket.SOCK_DGRAM), 0x8916, request)  # SIOCSIFADDR
"""
# A second Postfix in the machine, for that of the old host.
POSTFIX = f"""\
cp -a /etc/postfix {OLD_POSTFIX}
export MAIL_CONFIG={OLD_POSTFIX}
postconf -X local_transport smtpd_recipient_restrictions virtual_alias_maps
postconf -e inet_interfaces={OLD} myhostname=old.example.com mydestination=example.com alias_maps= \\
    queue_directory=/var/spool/old-postfix data_directory=/var/lib/old-postfix smtp_host_lookup=native \\
    mailbox_transport=lmtp:inet:[{OLD}]:2003
postconf -F '*/*/chroot=n'
install -d /var/spool/old-postfix
install -d -o postfix /var/lib/old-postfix
postfix start
"""


class OldServer(Cyrus):
    """Cyrus with IMAP, ManageSieve and LMTP on an address of a machine's own network. The host runs it, for Debian has
    it beside no other IMAP server."""

    def __init__(self, folder: Path, machine: Machine, certificate: tuple[Path, Path], **options: str) -> None:
        self.machine = machine
        ours = {
            "admins": "cyrus",
            "altnamespace": "no",
            "unixhierarchysep": "no",
            "servername": "old.example.com",
            "sievedir": str(folder / "sieve"),
            "sasl_pwcheck_method": "auxprop",
            "sasl_auxprop_plugin": "sasldb",
            "sasl_mech_list": "PLAIN",
            "sasl_sasldb_path": str(folder / "sasldb"),
            "tls_server_cert": str(certificate[0]),
            "tls_server_key": str(certificate[1]),
        }
        super().__init__(folder, ("jane", "joe"), (), **(ours | options))

    def _configure(self) -> None:
        super()._configure()
        services = "".join(
            f'  {name} cmd="{self.programs}/{program} -C {self.imapd_conf}" listen="{OLD}:{port}" prefork=0\n'
            for name, program, port in (
                ("imaps", "imapd -s", 993),
                ("sieve", "timsieved", 4190),
                ("lmtp", "lmtpd -a", 2003),
            )
        )
        self.cyrus_conf.write_text(f"START {{\n}}\nSERVICES {{\n{services}}}\nEVENTS {{\n}}\n")

    def _install(self) -> None:
        super()._install()
        for user in ("cyrus", *self.users):
            account = ["saslpasswd2", "-p", "-c", "-f", str(self.folder / "sasldb"), "-u", "old.example.com", user]
            subprocess.run(account, input=PASSWORD, text=True, check=True)
        shutil.chown(self.folder / "sasldb", STORE_USER, STORE_USER)

    def start(self) -> None:
        """Starts it; users get their mailboxes when they log in."""
        network = self.machine.root.parent / "ns/net"
        master = [str(self.programs / "master"), "-D", "-p", str(self.folder / "pid")]
        self.run(
            ["nsenter", f"--net={network}", *master, "-C", str(self.imapd_conf), "-M", str(self.cyrus_conf)],
            lambda: self.machine.run("bash", "-c", f"</dev/tcp/{OLD}/2003", check=False).returncode == 0,
            LD_LIBRARY_PATH=self.libraries,
        )

    def client(self, script: str, user: str) -> None:
        """Lets a client in the machine do this with the user's mailbox."""
        self.machine.run("python3", "-c", script, user, *self.names())

    def look(self, user: str) -> Any:
        """What a client sees of the user's mail."""
        return json.loads(self.machine.run("python3", "-c", LOOK, OLD, user, *self.names()).stdout)

    def names(self) -> tuple[str, str]:
        """What is before the names of folders, and between them."""
        separator = "/" if self.options["unixhierarchysep"] == "yes" else "."
        return ("" if self.options["altnamespace"] == "yes" else f"INBOX{separator}", separator)


def look(machine: Machine, user: str) -> Any:
    """What a client sees of the user's mail on the new server."""
    return json.loads(machine.run("python3", "-c", LOOK, NEW, user, "", ".").stdout)


def shown(seen: Any, folder: str) -> list[str]:
    """The subjects in a folder."""
    return [message[0] for message in seen[0][folder][1]]


@pytest.fixture(scope="module", params=sorted({OWN, DEBIAN_13}), ids=lambda root: root.name)
def base(request: pytest.FixtureRequest) -> Path:
    root: Path = request.param
    return root


class Hosts(NamedTuple):
    """The new host, and what the old one needs."""

    machine: Machine
    site: Site
    certificate: tuple[Path, Path]

    def old(self, name: str, **options: str) -> OldServer:
        return OldServer(self.site.root / name, self.machine, self.certificate, **options)


@pytest.fixture(scope="module")
def hosts(base: Path, whole_site: Path) -> Iterator[Hosts]:
    """A machine after the eight commands, with jane and joe, and with room for the servers of the old host."""
    site = Site()
    machine = Machine(base, whole_site)
    try:
        authority = Authority(site)
        certificate, key = authority.sign("old.example.com")
        key.chmod(0o644)
        (machine.root / "usr/local/share/ca-certificates/ours.crt").write_text(authority.file.read_text())
        machine.run("python3", "-c", ADDRESS)
        machine.shell(f"""
update-ca-certificates
printf '%s\\n' '{NEW} new.example.com' '{OLD} old.example.com' >>/etc/hosts
echo 'listen = {NEW}' >>/etc/dovecot/local.conf
postconf -e inet_interfaces={NEW}
systemctl restart dovecot postfix
""")
        add_user(machine, "joe")
        yield Hosts(machine, site, (certificate, key))
    finally:
        machine.close()
        site.close()


def test_mail_is_copied_from_folders_of_other_names(hosts: Hosts) -> None:
    first, *_ = readme_blocks(TITLE)
    ours = first.replace("imapc_list_prefix = INBOX\n", "").replace("separator = .", "separator = /")
    with hosts.old("foreign", **FOREIGN) as old:
        for user in old.users:
            old.client(FILL, user)
        paste(hosts.machine, ours)
        for user in old.users:
            assert look(hosts.machine, user) == old.look(user)
    hosts.machine.shell("rm -r /etc/dovecot/cyrus.conf /var/spool/lmtpd/jane /var/spool/lmtpd/joe")


def send(machine: Machine, subject: str) -> None:
    """Hands mail for jane to the old host's Postfix."""
    command = ["env", f"MAIL_CONFIG={OLD_POSTFIX}", "sendmail", "jane@example.com"]
    machine.run(*command, stdin=f"Subject: {subject}\n\nx\n")


def paste_on_the_old_host(machine: Machine, block: str) -> None:
    paste(machine, f"export MAIL_CONFIG={OLD_POSTFIX}\n{block}")


def queue(machine: Machine) -> str:
    return machine.run("env", f"MAIL_CONFIG={OLD_POSTFIX}", "postqueue", "-p").stdout


def upload(machine: Machine, user: str) -> None:
    """Makes SCRIPT the user's active script on the old server."""
    for action in ("--upload --localsieve /root/mine", "--activate"):
        command = (
            f"sieve-connect --nosrv --server old.example.com --user {user} --passwordfd 0 --remotesieve mine {action}"
        )
        machine.run(*command.split(), stdin=f"{PASSWORD}\n")


def test_the_way_from_cyrus(hosts: Hosts) -> None:
    """Nothing is lost or doubled: what came before the first copy, between it and the switch, and after that."""
    first, scripts, switch, last = readme_blocks(TITLE)
    machine = hosts.machine
    with hosts.old("old") as old:
        machine.shell(POSTFIX)
        for user in old.users:
            old.client(FILL, user)
        paste(machine, first)
        for user in old.users:
            assert look(machine, user) == old.look(user)
        shown_quotas = machine.run("doveadm", "quota", "get", "-A").stdout
        assert all(re.search(rf"^{user} .*STORAGE", shown_quotas, re.MULTILINE) for user in old.users), shown_quotas

        for user in old.users:
            old.client(CHANGE, user)
        send(machine, "meanwhile")
        wait_for(lambda: "Mail queue is empty" in queue(machine), "the old host to deliver")
        # The recipe installs the client.
        (machine.root / "root/mine").write_text(SCRIPT)
        install, _, rest = offline(machine, scripts).partition("\n")
        paste(machine, install)
        upload(machine, "jane")
        paste(machine, rest)
        paste_on_the_old_host(machine, switch)
        for subject in ("between", "invoice"):
            send(machine, subject)
        wait_for(lambda: queue(machine).count("Connection refused") == 2, "the mail to wait")
        before = {user: old.look(user) for user in old.users}
        paste(machine, last)
        assert {user: look(machine, user) for user in old.users} == before

        machine.run("env", f"MAIL_CONFIG={OLD_POSTFIX}", "postqueue", "-f")
        wait_for(lambda: "between" in shown(look(machine, "jane"), "INBOX"), "the mail that has waited")
        wait_for(lambda: "invoice" in shown(look(machine, "jane"), "Lists/debian"), "the mail that the script files")
        assert {user: old.look(user) for user in old.users} == before
    after = look(machine, "jane")
    assert shown(after, "INBOX") == ["0.0", "0.2", "meanwhile", "between"]
    assert shown(after, "Lists/debian") == ["2.0", "2.1", "2.2", "2.3", "invoice"]
    for folder in after[0].values():
        folder[1] = [message for message in folder[1] if message[0] not in ("between", "invoice")]
    assert after == before["jane"]
    assert not (machine.root / "etc/dovecot/cyrus.conf").exists()
    machine.run("lmtpd", "--check")
