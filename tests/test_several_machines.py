"""The README's recipe for several machines: mx with Debian 12, store2 with Debian 13, and a network of their own."""

from __future__ import annotations

import re
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import NamedTuple

import pytest
from authority import Authority
from conftest import layer_of
from container import DEBIAN_13, OWN, Machine, readme_blocks
from harness import Site, wait_for
from recipes import make_site, offline, paste
from test_man import LMTPD_8, blocks, section
from test_recipes import TCP
from test_site import (
    FETCH,
    PASSWORD,
    add_user,
    catch_mail_for_elsewhere,
    codes,
    elsewhere,
    maildir,
    subjects,
    submit,
    wait_for_mail,
    wait_until_sent,
)

SEVERAL = "### Several machines"
ADDRESSES = {"mx": "192.0.2.10", "store2": "192.0.2.20"}  # the README's
STORES = "/etc/postfix/stores"
PASS_PHRASE = "correct horse"

# Sends a numbered message to the recipient again and again until there is a file; prints how many. It gets slower, or a
# slow machine would have most to do.
FLOW = """\
import pathlib, smtplib, sys, time
smtp = smtplib.SMTP("127.0.0.1", timeout=50)
for number in range(5000):
    if pathlib.Path("/run/enough").exists():
        break
    header = f"Message-ID: <{number}@flow>\\r\\nDate: Sat, 28 Nov 2026 12:00:00 +0000\\r\\nSubject: {number}"
    smtp.sendmail("sender@example.net", sys.argv[1:], header + "\\r\\n\\r\\nx\\r\\n")
    time.sleep(0.05 if number < 150 else 0.2)
print(number)
"""
# Logs in, flags the first message, and stays until the server ends it; prints what identifies the messages of then.
READ = f"""\
import imaplib, sys
imap = imaplib.IMAP4("127.0.0.1", timeout=50)
imap.login(sys.argv[1], "{PASSWORD}")
imap.select()
imap.store("1", "+FLAGS", "\\\\Flagged")
uids = imap.fetch("1:5", "(UID FLAGS BODY.PEEK[HEADER.FIELDS (SUBJECT)])")[1]
print(imap.response("UIDVALIDITY"), str(uids).replace(r"\\\\Recent", "").replace("Flagged )", "Flagged)"), flush=True)
if "stay" in sys.argv:
    while imap.readline():
        pass
"""


class Machines(NamedTuple):
    """Both, after the recipe."""

    mx: Machine
    store2: Machine


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    booted: list[Machine] = []
    with ExitStack() as stack:
        for base, name in ((OWN, "mx"), (DEBIAN_13, "store2")):
            machine = Machine(base, layer_of(base, "site", make_site), hostname=f"{name}.example.com")
            stack.callback(machine.close)
            booted.append(machine)
        machines = Machines(*booted)
        prepare(*machines)
        yield machines


def prepare(mx: Machine, store2: Machine) -> None:
    """Joins the machines, and follows the recipe."""
    mx.join(store2)
    catch_mail_for_elsewhere(mx)
    with ThreadPoolExecutor() as threads:
        for task in [threads.submit(equip, machine, name) for machine, name in zip((mx, store2), ADDRESSES)]:
            task.result()
    give_certificate(mx, store2)
    let_root_log_in(mx, store2)
    command, certbot, _, ours, another_address, _, _ = readme_blocks(TCP)
    for block in (command, certbot):
        paste(store2, block.replace("mx.example.com", "store2.example.com"))
    paste(store2, offline(store2, ours), PASS_PHRASE, PASS_PHRASE)
    paste(store2, another_address.replace(ADDRESSES["mx"], ADDRESSES["store2"]))
    second, first, *_ = readme_blocks(SEVERAL)
    paste(store2, second)
    transports = mx.run("postconf", "-h", "transport_maps").stdout.strip()
    paste(mx, offline(mx, first.replace("mta:secret", f"mta:{PASS_PHRASE}")))
    mx.shell(f'postconf -e "transport_maps = $(postconf -h transport_maps), {transports}"; postfix reload')


def equip(machine: Machine, name: str) -> None:
    """Gives the machine its address, the names of both, and what the recipe takes for granted."""
    machine.network("ip", "address", "add", f"{ADDRESSES[name]}/24", "dev", "lan")
    machine.network("ip", "link", "set", "lan", "up")
    hosts = "".join(f"{address} {name}.example.com {name}\n" for name, address in ADDRESSES.items())
    # No name server is there, and the index of manual pages would take longer to make than all the rest.
    machine.shell(f"""
rm -f /var/lib/man-db/auto-update
cat >>/etc/hosts <<END
{hosts}END
postconf -e lmtp_host_lookup=native smtp_host_lookup=native lmtp_tls_loglevel=1
""")
    install = offline(machine, f"apt-get install -y rsync sqlite3 openssh-{'client' if name == 'mx' else 'server'}\n")
    paste(machine, f"export DEBIAN_FRONTEND=noninteractive\n{install}")


def give_certificate(mx: Machine, store2: Machine) -> None:
    """Gives store2 a certificate as from certbot, whose authority mx knows."""
    site = Site()
    try:
        authority = Authority(site)
        certificate, key = authority.sign("store2.example.com")
        folder = store2.root / "etc/letsencrypt/live/store2.example.com"
        folder.mkdir(parents=True)
        (folder.parent.parent / "renewal-hooks/deploy").mkdir(parents=True)
        (folder / "fullchain.pem").write_text(certificate.read_text())
        (folder / "privkey.pem").write_text(key.read_text())
        with (mx.root / "etc/ssl/certs/ca-certificates.crt").open("a") as known:
            known.write(authority.file.read_text())
    finally:
        site.close()


def let_root_log_in(mx: Machine, store2: Machine) -> None:
    mx.shell("install -d -m 700 /root/.ssh\nssh-keygen -q -t ed25519 -N '' -f /root/.ssh/id_ed25519")
    store2.shell("install -d -m 700 /root/.ssh\nsystemctl start ssh")
    (store2.root / "root/.ssh/authorized_keys").write_text((mx.root / "root/.ssh/id_ed25519.pub").read_text())
    mx.shell("ssh-keyscan store2.example.com >/root/.ssh/known_hosts 2>/dev/null")


@pytest.fixture(scope="module")
def ann(machines: Machines) -> str:
    """A new user on store2, as the README makes one, and the first message. joe is on mx."""
    add_user(machines.mx, "joe")
    add_user(machines.store2, "ann")
    paste(machines.mx, readme_blocks(SEVERAL)[2])
    submit(machines.mx, "first", "ann@example.com")
    wait_for_mail(machines.store2, "first", "ann")
    return "ann@example.com"


def test_each_user_has_the_mail_on_one_machine(machines: Machines, ann: str) -> None:
    assert codes(submit(machines.mx, "to both", ann, "joe@example.com")) == ["250", "250", "250"]
    wait_for_mail(machines.mx, "to both", "joe")
    wait_for_mail(machines.store2, "to both", "ann")
    assert not (machines.mx.root / maildir("ann")).exists()
    assert not (machines.store2.root / maildir("joe")).exists()
    machines.store2.run("python3", "-c", FETCH, "ann", "lists", "new")
    submit(machines.mx, "to a folder", "ann+lists@example.com")
    wait_for_mail(machines.store2, "to a folder", "ann", "lists")
    assert codes(submit(machines.mx, "nobody", "nobody-here@example.com")) == ["550"]


def test_between_the_machines_mail_is_encrypted_and_authenticated(machines: Machines, ann: str) -> None:
    submit(machines.mx, "secret", ann)
    wait_for_mail(machines.store2, "secret", "ann")
    verified = "Verified TLS connection established to store2.example.com[192.0.2.20]:24: TLSv1.3"
    assert verified in machines.mx.journal("--identifier=postfix/lmtp")
    assert " user=mta mechanism=PLAIN peer=[192.0.2.10]\n" in machines.store2.journal("--identifier=lmtpd")


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("lmtp_tls_policy_maps =", "status=bounced .*said: 530 5.7.0 Must issue a STARTTLS command"),
        ("lmtp_sasl_auth_enable = no", "status=deferred .*said: 430 4.7.0 Authentication required"),
        ("lmtp_tls_CAfile =", "status=deferred .*Server certificate not (trusted|verified)"),
    ],
)
def test_without_encryption_or_password_nothing_is_taken(machines: Machines, setting: str, said: str) -> None:
    address = "nobody@example.com"
    machines.mx.shell(f"""
cp /etc/postfix/main.cf {STORES} /root
echo '{address} lmtp:inet:[store2.example.com]:24' >>{STORES}
postconf -e '{setting}'
postfix reload
""")
    since = time.time()
    machines.mx.run("sendmail", "-f", "joe@example.com", address, stdin="Subject: refused\n\nx\n")
    [line] = wait_for(lambda: deliveries(machines.mx, address, since), "Postfix")
    machines.mx.shell(f"cp /root/main.cf /etc/postfix\ncp /root/stores {STORES}\npostsuper -d ALL\npostfix reload")
    assert re.search(said, line)


def deliveries(machine: Machine, recipient: str, since: float = 0, service: str = "lmtp") -> list[str]:
    """What Postfix's log has about deliveries to the recipient."""
    lines = machine.journal(f"--identifier=postfix/{service}", f"--since=@{since}").splitlines()
    return [line for line in lines if f" to=<{recipient}>," in line]


def test_mail_of_scripts_finds_the_machine_of_the_user(machines: Machines, ann: str) -> None:
    """A script of a user on store2 sends mail to a user on mx, and elsewhere."""
    script = 'require "copy"; redirect :copy "joe@example.com"; redirect :copy "ann@example.net";\n'
    place = machines.store2.root / maildir("ann").replace("/Maildir", "/.dovecot.sieve")
    place.write_text(script)
    submit(machines.mx, "passed on", ann)
    for machine, user in ((machines.store2, "ann"), (machines.mx, "joe")):
        wait_for_mail(machine, "passed on", user)
    wait_until_sent(machines.store2)
    assert "Subject: passed on" in elsewhere(machines.mx, "ann@example.net")
    place.unlink()


def test_if_a_machine_is_down_mail_for_its_users_waits(machines: Machines, ann: str) -> None:
    machines.store2.network("ip", "link", "set", "lan", "down")
    machines.mx.run("sendmail", ann, "joe@example.com", stdin="Subject: down\n\nx\n")
    wait_for_mail(machines.mx, "down", "joe")
    wait_for(lambda: "No route to host" in machines.mx.run("postqueue", "-p").stdout, "the deferral")
    [queued] = queue(machines.mx)
    assert queued == ann
    machines.store2.network("ip", "link", "set", "lan", "up")
    machines.mx.run("postqueue", "-f")
    wait_for_mail(machines.store2, "down", "ann")
    wait_until_sent(machines.mx)
    assert subjects(machines.mx, "joe").count("Subject: down") == 1
    assert subjects(machines.store2, "ann").count("Subject: down") == 1


def queue(machine: Machine) -> list[str]:
    """The recipients whose mail waits."""
    return re.findall(r'"address": "([^"]*)"', machine.run("postqueue", "-j").stdout)


def numbers(machine: Machine, user: str) -> Counter[int]:
    """How often each numbered message is in the INBOX."""
    files = (machine.root / maildir(user)).glob("[nc]*/*,S=*")
    return Counter(int(re.findall(rb"^Subject: (\d+)$", file.read_bytes(), re.MULTILINE)[0]) for file in files)


# Stops lmtpd on mx while it delivers: until a message has been in the active queue for two seconds. It goes on when the
# recipe waits for the deliveries that have begun.
HOLD = r"""
active() { postqueue -p | grep -o '^[0-9A-Za-z]*\*' | sort; }
for try in $(seq 30); do
    pkill -STOP -x lmtpd
    begun=$(active)
    sleep 2
    [ -z "$(comm -12 <(echo "$begun") <(active))" ] || break
done
echo held
until pgrep -f '^tail --pid'; do sleep 0.1; done
sleep 1
pkill -CONT -x lmtpd
"""


@pytest.mark.usefixtures("ann")
def test_a_user_moves_while_mail_flows(machines: Machines) -> None:
    """Each message is there once afterwards, with the flags and UIDs that it had; also one that comes again.

    Records are copied as lmtpd(8) says.
    """
    mx, store2 = machines
    *_, copy, switch = readme_blocks(SEVERAL)
    [records] = blocks(section(LMTPD_8, "Moving a user", "Ss"))
    before, add, after = switch.partition('    echo "$line" | ssh')
    assert add
    switch = before + records + add + after
    flow = mx.start("python3", "-c", FLOW, "jane@example.com", stdout=subprocess.PIPE)
    try:
        wait_for(lambda: len(numbers(mx, "jane")) > 30, "the first messages")
        reader = mx.start("python3", "-c", READ, "jane", "stay", stdout=subprocess.PIPE)
        assert reader.stdout
        seen = reader.stdout.readline()
        holder = mx.start("bash", "-c", HOLD, stdout=subprocess.PIPE)
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        output = paste(mx, copy + switch).output
        assert holder.wait(60) == 0
        assert "reply    250 2.1.5 Ok" in output
        at_switch = max(numbers(store2, "jane"))
        wait_for(lambda: max(numbers(store2, "jane")) > at_switch + 20, "messages after the switch")
        mx.run("touch", "/run/enough")
        sent = int(flow.communicate(timeout=60)[0])
    finally:
        flow.kill()
        flow.wait()
    reader.wait(60)
    mx.run("postqueue", "-f")
    wait_for(lambda: not queue(mx), "an empty queue", patience=300)
    assert numbers(store2, "jane") == dict.fromkeys(range(sent), 1)
    waited = deliveries(mx, "jane@example.com", service="error")
    assert len(waited) > 10
    assert "status=deferred (This user moves to store2.example.com)" in waited[0]
    assert "AUTHENTICATIONFAILED" in mx.run("python3", "-c", READ, "jane", check=False).stderr
    assert store2.run("python3", "-c", READ, "jane").stdout == seen
    mx.run("rm", "/run/enough")
    again = mx.run("python3", "-c", FLOW.replace("5000", "3"), "jane@example.com")
    assert again.stdout == "2\n"
    wait_until_sent(mx)
    assert store2.journal("--identifier=lmtpd").count("duplicate") >= 3
    assert numbers(store2, "jane") == dict.fromkeys(range(sent), 1)


def test_dovecot_passes_the_session_of_a_mail_client_on(machines: Machines) -> None:
    """jane has moved, and her client still connects to mx."""
    mx, store2 = machines
    seen = store2.run("python3", "-c", READ, "jane").stdout
    certificate = "/etc/letsencrypt/live/store2.example.com"
    if store2.run("dovecot", "--version").stdout.startswith("2.3"):
        settings = f"ssl_cert = <{certificate}/fullchain.pem\nssl_key = <{certificate}/privkey.pem\n"
    else:
        settings = (
            f"ssl_server_cert_file = {certificate}/fullchain.pem\nssl_server_key_file = {certificate}/privkey.pem\n"
        )
    with (store2.root / "etc/dovecot/local.conf").open("a") as file:
        file.write(settings)
    store2.run("systemctl", "restart", "dovecot")
    both, line = blocks(section(LMTPD_8, "Mail clients", "Ss"))
    versions = dict(re.findall(r"^# Dovecot (.*)\n((?:(?!#).*\n)*)", both, re.MULTILINE))
    with (mx.root / "etc/dovecot/local.conf").open("a") as file:
        file.write(both.partition("#")[0] + versions[mx.run("dovecot", "--version").stdout[:3]])
    (mx.root / "etc/dovecot/elsewhere").write_text(line)
    mx.run("systemctl", "restart", "dovecot")
    assert mx.run("python3", "-c", READ, "jane").stdout == seen
    assert mx.run("python3", "-c", READ.replace(PASSWORD, "wrong"), "jane", check=False).returncode
    assert "reply    550 5.1.1" in mx.run("lmtpd", "--explain", "jane@example.com").stdout


def test_the_table_in_sqlite(machines: Machines, ann: str) -> None:
    main_cf, _, settings, _, question = blocks(section(LMTPD_8, "The table in SQL or LDAP", "Ss"))
    mx = machines.mx
    paste(mx, offline(mx, "apt-get install -y postfix-sqlite\n"))
    (mx.root / "etc/postfix/stores.cf").write_text(settings)
    mx.shell(f"""
sqlite3 /etc/postfix/users.db <<END
CREATE TABLE users (address TEXT, host TEXT);
INSERT INTO users VALUES ('{ann}', 'store2.example.com'), ('joe@example.com', NULL);
END
sed -i '/^{ann} /d' {STORES}
postconf -e '{main_cf.strip().replace("pgsql:", "sqlite:")}'
postfix reload
""")
    asked = question.removeprefix("# ").replace("pgsql:", "sqlite:")
    assert mx.shell(asked.replace("jane@example.com", ann)) == "lmtp:inet:[store2.example.com]:24\n"
    mx.run("sendmail", "ann+elsewhere@example.com", "joe@example.com", stdin="Subject: by SQL\n\nx\n")
    wait_for_mail(machines.store2, "by SQL", "ann")
    wait_for_mail(mx, "by SQL", "joe")
