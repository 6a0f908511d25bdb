"""A site of Postfix, lmtpd and Dovecot as the README's commands set it up, and the mail it gets.

Every block is pasted from the README. The tests run in this order: those at the end change what the others need.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from container import OFTEN, Machine, readme_blocks
from harness import PATIENCE, wait_for
from recipes import offline, paste

from lmtpd import language_for

SITE = "## A whole site in eight commands"
SPOOL = "var/spool/lmtpd"
USERS = "etc/dovecot/users"
PASSWORD = "secret"  # the README's
ELSEWHERE = "/srv/elsewhere"
# Says what the server says to each recipient; nothing is sent when all are refused. XCLIENT makes a stranger of us.
SUBMIT = """\
import smtplib, sys
smtp = smtplib.SMTP("127.0.0.1", timeout=50)
smtp.ehlo()
assert smtp.docmd("XCLIENT", "NAME=mail.example.net ADDR=192.0.2.1")[0] == 220
smtp.ehlo()
smtp.mail("sender@example.net")
replies = [smtp.rcpt(recipient) for recipient in sys.argv[1:]]
if any(code == 250 for code, _ in replies):
    replies.append(smtp.data(sys.stdin.read()))
for code, text in replies:
    print(code, text.decode().replace("\\n", " "))
"""
FETCH = f"""\
import imaplib, sys
user, folder, *new = sys.argv[1:]
imap = imaplib.IMAP4("127.0.0.1", timeout=50)
imap.login(user, "{PASSWORD}")
if new:
    assert imap.create(folder)[0] == "OK"
assert imap.select(folder)[0] == "OK"
for number in imap.search(None, "ALL")[1][0].split():
    print(imap.fetch(number, "(BODY[HEADER.FIELDS (SUBJECT)])")[1][0][1].decode().strip())
"""
QUOTA = f"""\
import imaplib, sys
imap = imaplib.IMAP4("127.0.0.1", timeout=50)
imap.login(sys.argv[1], "{PASSWORD}")
print(imap.getquotaroot("INBOX")[1][1][0].decode())
"""


@pytest.fixture(scope="module")
def site(base: Path, whole_site: Path) -> Iterator[Machine]:
    """A machine after the eight commands and those for the users joe and ann. Mail for example.net goes to files."""
    machine = Machine(base, whole_site)
    try:
        joe, ann, _, _, _, _, _ = readme_blocks("### Users")
        paste(machine, joe, PASSWORD, PASSWORD)
        paste(machine, ann, PASSWORD, PASSWORD)
        catch_mail_for_elsewhere(machine)
        yield machine
    finally:
        machine.close()


def catch_mail_for_elsewhere(machine: Machine) -> None:
    """Has Postfix write mail for example.net to files, take XCLIENT from this host, and ask often for its probes."""
    machine.shell(f"install -d -m 777 {ELSEWHERE}")
    pipe = f"elsewhere unix - n n - 1 pipe flags=R user=nobody argv=/usr/bin/tee -a {ELSEWHERE}/${{recipient}}"
    machine.run("postconf", "-M", f"elsewhere/unix={pipe}")
    settings = ("transport_maps = inline:{example.net=elsewhere:}", "smtpd_authorized_xclient_hosts = 127.0.0.1")
    machine.run("postconf", "-e", *settings, *OFTEN)
    machine.run("postfix", "reload")


def wait_until_sent(machine: Machine) -> None:
    """Returns when nothing is in Postfix's queue."""
    wait_for(lambda: "Mail queue is empty" in machine.run("postqueue", "-p").stdout, "an empty queue")


def elsewhere(machine: Machine, recipient: str) -> str:
    """What has arrived for somebody elsewhere; it is forgotten."""
    wait_until_sent(machine)
    file = machine.root / ELSEWHERE.lstrip("/") / recipient
    text = file.read_text() if file.exists() else ""
    file.unlink(missing_ok=True)
    return text


def quota(size: str) -> str:
    """The fields by which Dovecot gives a user his quota."""
    return f"userdb_quota_rule=*:storage={size} userdb_quota_storage_size={size}"


def submit(machine: Machine, subject: str, *recipients: str, size: int = 0, field: str = "") -> list[str]:
    """Sends a message to Postfix as a stranger would; the replies to the recipients and, if any is taken, the text.

    field: one more of the header.
    """
    fields = f"Subject: {subject}\r\nTo: {', '.join(recipients)}\r\n" + (f"{field}\r\n" if field else "")
    text = f"{fields}\r\n" + ("x" * 70 + "\r\n") * (size // 72)
    return machine.run("python3", "-c", SUBMIT, *recipients, stdin=text, timeout=PATIENCE).stdout.splitlines()


def add_user(machine: Machine, name: str, extra: str = "") -> None:
    """Adds a user as the README does. Dovecot looks at the file once a second."""
    machine.shell(f'echo "{name}:$(doveadm pw -p {PASSWORD})::::::{extra}" >>/etc/dovecot/users')
    wait_for(lambda: machine.run("doveadm", "user", name, check=False).returncode == 0, name)


def maildir(user: str) -> str:
    return f"{SPOOL}/{user}/Maildir"


def codes(replies: list[str]) -> list[str]:
    return [reply[:3] for reply in replies]


def subjects(machine: Machine, user: str, folder: str = "INBOX") -> list[str]:
    """What the user sees in that folder with an IMAP client."""
    return machine.run("python3", "-c", FETCH, user, folder).stdout.splitlines()


def wait_for_mail(machine: Machine, subject: str, user: str, folder: str = "INBOX") -> None:
    wait_for(lambda: f"Subject: {subject}" in subjects(machine, user, folder), f"{subject} in {folder} of {user}")


def wait_for_folder(machine: Machine, user: str, folder: str) -> None:
    """Returns when a new message is in a folder that has not been there."""
    place = machine.root / maildir(user) / f".{folder}/new"
    wait_for(lambda: list(place.glob("*")), f"the folder {folder} of {user} and the message in it")


def limits_on_disk(machine: Machine, user: str) -> str:
    """The quota as lmtpd has written it into the user's Maildir."""
    return (machine.root / maildir(user) / "maildirsize").read_text().splitlines()[0]


def quota_by_doveadm(machine: Machine, user: str) -> tuple[int, int]:
    """The KiB that the user has in his mailbox, and those he may have, as Dovecot counts them."""
    shown = machine.run("doveadm", "-f", "tab", "quota", "get", "-u", user).stdout
    [storage] = [line.split("\t") for line in shown.splitlines() if "\tSTORAGE\t" in line]
    return int(storage[2]), int(storage[3])


def test_there_are_eight_commands(site: Machine) -> None:
    """One of them, apt-get, was left out, because the packages are there. Those inside $( ) give words to others."""
    commands = (site.root / "root/commands").read_text().split("\0")
    assert len(commands) == 7
    [block] = readme_blocks(SITE)
    assert block.startswith("apt-get install -y postfix dovecot-imapd\n./units/install\n")


def test_mail_to_a_user_is_in_the_inbox(site: Machine) -> None:
    assert codes(submit(site, "plain", "jane@example.com")) == ["250", "250"]
    wait_for_mail(site, "plain", "jane")


def test_the_maildir_is_made_for_the_account_that_delivers(site: Machine) -> None:
    submit(site, "first", "joe@example.com")
    wait_for_mail(site, "first", "joe")
    for folder in ("", "/Maildir", "/Maildir/tmp", "/Maildir/new", "/Maildir/cur"):
        found = site.run("stat", "--format=%U:%G %a", f"/{SPOOL}/joe{folder}").stdout
        assert found == "lmtpd:lmtpd 700\n", folder


def test_a_folder_by_its_address(site: Machine) -> None:
    submit(site, "no folder yet", "jane+lists@example.com")
    wait_for_mail(site, "no folder yet", "jane")
    site.run("python3", "-c", FETCH, "jane", "lists", "new")
    submit(site, "to the folder", "jane+lists@example.com")
    wait_for_mail(site, "to the folder", "jane", "lists")
    assert "Subject: to the folder" not in subjects(site, "jane")


def test_the_postmaster_is_somebody(site: Machine) -> None:
    assert codes(submit(site, "complaint", "Postmaster@example.com")) == ["250", "250"]
    wait_for_mail(site, "complaint", "jane")


def test_an_unknown_user_is_refused_before_the_message_is_taken(site: Machine) -> None:
    [reply] = submit(site, "nobody", "nobody-here@example.com")
    assert reply.startswith("550")
    assert "User unknown" in reply


def test_an_account_of_the_system_is_no_user(site: Machine) -> None:
    assert codes(submit(site, "to daemon", "daemon@example.com", "lmtpd@example.com")) == ["550", "550"]


def test_roots_mail_is_somebodys(site: Machine) -> None:
    """Such as cron's, which hands it to sendmail."""
    site.run("sendmail", "root", stdin="Subject: cron\n\nx\n")
    wait_for_mail(site, "cron", "jane")
    assert codes(submit(site, "to root", "root@example.com")) == ["250", "250"]
    wait_for_mail(site, "to root", "jane")


@pytest.mark.parametrize("domain", ["mx.example.com", "mail.example.com", "localhost", "localhost.example.com"])
def test_the_hosts_own_names_are_local(site: Machine, domain: str) -> None:
    assert codes(submit(site, f"to {domain}", f"jane@{domain}")) == ["250", "250"]
    wait_for_mail(site, f"to {domain}", "jane")


def test_aliases_work(site: Machine) -> None:
    site.shell("echo 'sales: jane, joe' >>/etc/aliases\nnewaliases")
    assert codes(submit(site, "an order", "sales@example.com")) == ["250", "250"]
    for user in ("jane", "joe"):
        wait_for_mail(site, "an order", user)


def test_commands_in_aliases_do_not_work(site: Machine) -> None:
    site.shell("echo 'program: \"|/usr/bin/touch /tmp/ran\"' >>/etc/aliases\nnewaliases")
    assert codes(submit(site, "run", "program@example.com")) == ["550"]


def test_from_this_host_mail_for_an_unknown_user_is_taken_and_bounces(site: Machine) -> None:
    site.run("sendmail", "-f", "jane@example.com", "nobody-here@example.com", stdin="Subject: local\n\nx\n")
    wait_for_mail(site, "Undelivered Mail Returned to Sender", "jane")


def test_only_dovecot_can_read_the_passwords(site: Machine) -> None:
    assert site.run("stat", "--format=%U:%G %a", "/etc/dovecot/users").stdout == "root:dovecot 640\n"


def test_dovecot_and_lmtpd_agree_on_the_quota(site: Machine) -> None:
    submit(site, "counted", "ann@example.com", size=2_000_000)
    wait_for_mail(site, "counted", "ann")
    assert limits_on_disk(site, "ann") == f"{20 * 1024 * 1024}S"
    on_disk = sum(path.stat().st_size for path in Path(site.root / maildir("ann")).glob("*/*,S=*"))
    used, limit = -(-on_disk // 1024), 20 * 1024
    assert quota_by_doveadm(site, "ann") == (used, limit)
    assert site.run("python3", "-c", QUOTA, "ann").stdout == f'"User quota" (STORAGE {used} {limit})\n'


def test_who_has_no_quota_of_his_own_has_that_of_all(site: Machine) -> None:
    submit(site, "plenty of room", "jane@example.com")
    wait_for_mail(site, "plenty of room", "jane")
    assert limits_on_disk(site, "jane") == f"{1024**3}S"
    assert quota_by_doveadm(site, "jane")[1] == 1024**2


def test_a_user_over_quota_is_put_off_until_there_is_room(site: Machine) -> None:
    add_user(site, "full", quota("1M"))
    assert codes(submit(site, "the last straw", "full@example.com", size=1_500_000)) == ["250", "250"]
    wait_for_mail(site, "the last straw", "full")
    submit(site, "waits", "full@example.com")
    wait_for(lambda: "452 4.2.2" in site.run("postqueue", "-p").stdout, "the refusal")
    assert subjects(site, "full") == ["Subject: the last straw"]
    for path in (site.root / maildir("full")).glob("*/*,S=*"):
        path.unlink()
    (site.root / maildir("full") / "maildirsize").unlink()
    site.run("postqueue", "-f")
    wait_for_mail(site, "waits", "full")


def test_the_senders_server_hears_that_the_user_is_full(site: Machine) -> None:
    """Nothing is known of him yet, so Postfix asks before it takes the message."""
    add_user(site, "stuffed", quota("1k"))
    folders = " ".join(f"/{maildir('stuffed')}{folder}" for folder in ("/..", "", "/cur", "/new"))
    site.shell(f"install -d -o lmtpd -g lmtpd -m 700 {folders}")
    (site.root / maildir("stuffed") / "cur/1.M0P1.mx,S=2000,W=2000:2,S").write_bytes(b"x" * 2000)
    assert codes(submit(site, "too much", "stuffed@example.com")) == ["450"]


def test_a_new_user_is_known_at_once(site: Machine) -> None:
    """Also when mail for him was refused a moment ago: not for longer than Postfix remembers that."""
    assert codes(submit(site, "too early", "newcomer@example.com")) == ["550"]
    add_user(site, "newcomer")
    wait_for(lambda: codes(submit(site, "welcome", "newcomer@example.com")) == ["250", "250"], "Postfix to ask again")
    wait_for_mail(site, "welcome", "newcomer")


def test_while_dovecot_restarts_no_mail_is_lost(site: Machine) -> None:
    site.run("systemctl", "stop", "dovecot.socket", "dovecot.service", check=False)
    assert codes(submit(site, "patience", "jane@example.com")) == ["250", "250"]
    wait_for(lambda: "451" in site.run("postqueue", "-p").stdout, "the deferral")
    site.run("systemctl", "start", "dovecot")
    site.run("postqueue", "-f")
    wait_for_mail(site, "patience", "jane")


def test_how_to_find_out(site: Machine) -> None:
    """Each command has an answer. (To a terminal, journalctl would show it page by page.)"""
    [block] = readme_blocks("## How to find out")
    submit(site, "sought", "jane@example.com")
    wait_for_mail(site, "sought", "jane")
    site.run("journalctl", "--sync")
    answers = [site.run("bash", "-c", command).stdout for command in block.splitlines()]
    assert len(answers) == 3
    assert f"\nmailbox  /{maildir('jane')}\n" in answers[1]
    assert "delivered" in answers[2]
    assert all("recipient=<jane@example.com>" in line for line in answers[2].splitlines() if "delivered" in line)


def test_filters_of_a_user(site: Machine) -> None:
    script, question = readme_blocks("### Filters")
    [answer] = readme_blocks("### Filters", "")
    assert paste(site, script).output == ""
    used = re.compile("^quota    [0-9]+ bytes, [0-9]+ messages of ", re.MULTILINE)
    assert used.sub("", site.shell(question)) == used.sub("", answer)
    submit(site, "help", "jane@example.com", field="List-Id: <debian-user.lists.debian.org>")
    wait_for_folder(site, "jane", "Lists.debian-user")
    assert subjects(site, "jane", "Lists.debian-user") == ["Subject: help"]
    submit(site, "urgent", "jane@example.com", field="From: boss@example.com")
    wait_for(lambda: list((site.root / maildir("jane")).glob("cur/*:2,F")), "the flagged message")


def test_spam_is_in_junk_for_everyone(site: Machine) -> None:
    [block] = readme_blocks("### Spam into Junk for everyone")
    paste(site, block)
    for user in ("jane", "joe"):
        submit(site, "buy", f"{user}@example.com", field="X-Spam-Flag: YES")
        wait_for_folder(site, user, "Junk")
        assert subjects(site, user, "Junk") == ["Subject: buy"]
        assert "Subject: buy" not in subjects(site, user)


def test_an_out_of_office_reaches_the_sender_once(site: Machine) -> None:
    block, question = readme_blocks("### Out of office")
    paste(site, block)
    assert paste(site, question).output.endswith("\nactions  vacation other@example.net, fileinto INBOX\n")
    for subject in ("one", "two"):
        submit(site, subject, "jane@example.com")
        wait_for_mail(site, subject, "jane")
    answer = elsewhere(site, "sender@example.net")
    assert answer.count("Subject: ") == 1
    for line in (
        "From: jane@example.com",
        "Subject: Auto: one",
        "Auto-Submitted: auto-replied",
        "I am away until Monday.",
    ):
        assert f"\n{line}\n" in answer
    assert "Return-Path: <MAILER-DAEMON>\n" in answer


def test_a_forward_arrives_elsewhere(site: Machine) -> None:
    [block] = readme_blocks("### Forward")
    paste(site, block)
    submit(site, "for both", "joe@example.com")
    wait_for_mail(site, "for both", "joe")
    forwarded = elsewhere(site, "joe@example.net")
    assert "Return-Path: <sender@example.net>\n" in forwarded
    assert forwarded.count("Subject: for both\n") == 1


def test_a_rejected_message_comes_back_as_a_bounce(site: Machine) -> None:
    script = site.root / SPOOL / "joe/.dovecot.sieve"
    before = script.read_text()
    script.write_text('require "reject";\nreject "I take no advertising.";\n')
    try:
        submit(site, "advertising", "joe@example.com")
        bounce = elsewhere(site, "sender@example.net")
    finally:
        script.write_text(before)
    assert "Return-Path: <MAILER-DAEMON>\n" in bounce
    assert "550 5.7.1 I take no advertising." in " ".join(bounce.split())


def test_nothing_of_it_is_an_error_in_the_log(site: Machine) -> None:
    warnings = site.journal("--identifier=lmtpd", "--priority=warning").splitlines()
    assert [line for line in warnings if "userdb" not in line and not line.startswith("over-quota")] == []


def test_mail_leaves_by_sendmail_outside_of_the_units(site: Machine) -> None:
    text = (site.root / "etc/imapd.conf").read_text().replace("smtp_backend: host", "smtp_backend: sendmail")
    (site.root / "etc/sendmail.conf").write_text(text)
    session = (
        "LHLO x\r\nMAIL FROM:<other@example.net>\r\n"
        "RCPT TO:<joe@example.com>\r\nRCPT TO:<jane@example.com>\r\nDATA\r\n"
        "From: other@example.net\r\nTo: jane@example.com\r\nSubject: by sendmail\r\n\r\n.. x\r\n.\r\nQUIT\r\n"
    )
    done = site.run("runuser", "-u", "lmtpd", "--", "/usr/local/bin/lmtpd", "-C", "/etc/sendmail.conf", stdin=session)
    assert done.stdout.count("250 2.1.5 Ok SESSIONID") == 2
    forwarded = elsewhere(site, "joe@example.net")
    assert "Return-Path: <other@example.net>\n" in forwarded
    assert "\n. x\n" in forwarded
    assert "Return-Path: <MAILER-DAEMON>\n" in elsewhere(site, "other@example.net")


def test_in_the_units_sendmail_cannot_work_and_the_log_says_what_to_do(site: Machine) -> None:
    conf = site.root / "etc/imapd.conf"
    before = conf.read_text()
    conf.write_text(before.replace("smtp_backend: host", "smtp_backend: sendmail"))
    try:
        submit(site, "not by sendmail", "joe@example.com")
        wait_for_mail(site, "not by sendmail", "joe")
        wait_for(lambda: "mail-not-sent" in site.journal("--identifier=lmtpd", "--priority=err"), "the error")
    finally:
        conf.write_text(before)
    assert "set smtp_backend: host" in site.journal("--identifier=lmtpd", "--priority=err")
    assert elsewhere(site, "joe@example.net") == ""


def test_a_user_finds_the_error_beside_the_script(site: Machine) -> None:
    home = site.root / SPOOL / "jane"
    (home / ".dovecot.sieve").write_text("filinto;\n")
    submit(site, "kept", "jane@example.com")
    wait_for_mail(site, "kept", "jane")
    assert ".dovecot.sieve:1:1: there is no command filinto" in (home / ".dovecot.log").read_text()
    (home / ".dovecot.sieve").unlink()


MANAGE = f"""\
import base64, socket, sys
connection = socket.create_connection(("127.0.0.1", 4190), 50)
replies = connection.makefile()
def reply():
    lines = []
    while not lines or not lines[-1].startswith(("OK", "NO", "BYE")):
        lines.append(replies.readline())
        assert lines[-1]
    return lines
offered = reply()
name = base64.b64encode(b"\\0" + sys.argv[1].encode() + b"\\0{PASSWORD}").decode()
script = sys.stdin.read()
for command in (
    f'AUTHENTICATE "PLAIN" "{{name}}"',
    f'PUTSCRIPT "mine" {{{{{{len(script)}}+}}}}\\r\\n{{script}}',
    'SETACTIVE "mine"',
):
    connection.sendall(f"{{command}}\\r\\n".encode())
    assert reply()[-1].startswith("OK"), command
print(*(line for line in offered if line.startswith('"SIEVE"')))
"""


def test_a_user_manages_a_filter(site: Machine) -> None:
    """The server offers nothing that lmtpd does not have, and lacks little of that."""
    [block] = readme_blocks("### Filters that users change themselves")
    paste(site, offline(site, block))
    script = 'require ["fileinto"];\nfileinto "Managed";\n'
    offered = site.run("python3", "-c", MANAGE, "jane", stdin=script).stdout
    submit(site, "managed", "jane@example.com")
    wait_for_folder(site, "jane", "Managed")
    assert subjects(site, "jane", "Managed") == ["Subject: managed"]
    own = language_for(()).capabilities - {"regex"}
    capabilities = set(offered.split('"')[3].split())
    assert capabilities <= own
    missing = {name for name in own - capabilities if not name.startswith("comparator-")}
    assert missing == {"ereject", "fcc"}


def test_another_quota_for_a_user_who_is_there(site: Machine) -> None:
    _, _, quota, *_ = readme_blocks("### Users")
    paste(site, quota)
    wait_for(lambda: quota_by_doveadm(site, "jane")[1] == 5 * 1024**2, "Dovecot to read the file")
    submit(site, "room for more", "jane@example.com")
    wait_for(lambda: limits_on_disk(site, "jane") == f"{5 * 1024**3}S", "lmtpd to write the quota")


def test_a_new_password(site: Machine) -> None:
    _, _, _, password, _, _, _ = readme_blocks("### Users")
    # Dovecot reads the file again if its size or the second of its change differ.
    wait_for(lambda: time.time() > int((site.root / USERS).stat().st_mtime) + 1, "another second")
    paste(site, password, "other", "other")
    login = "import imaplib, sys; print(imaplib.IMAP4('127.0.0.1', timeout=50).login('jane', sys.argv[1])[0])"
    wait_for(lambda: site.run("python3", "-c", login, "other", check=False).stdout == "OK\n", "the new password")
    assert site.run("python3", "-c", login, PASSWORD, check=False).returncode != 0
    paste(site, password, PASSWORD, PASSWORD)
    wait_for(lambda: site.run("python3", "-c", login, PASSWORD, check=False).stdout == "OK\n", "the old password")


def test_a_renamed_user_keeps_mail_and_filters(site: Machine) -> None:
    _, _, _, _, rename, _, _ = readme_blocks("### Users")
    before = subjects(site, "joe")
    paste(site, rename)
    wait_for(lambda: site.run("doveadm", "user", "joe", check=False).returncode != 0, "the old name to go")
    assert subjects(site, "joseph") == before
    for name in ("joseph", "joe"):
        assert codes(submit(site, f"as {name}", f"{name}@example.com")) == ["250", "250"]
        wait_for_mail(site, f"as {name}", "joseph")
        assert f"Subject: as {name}\n" in elsewhere(site, "joe@example.net")  # the filter forwards it


def test_mail_for_a_user_who_has_left_is_refused(site: Machine) -> None:
    _, _, _, _, _, remove, _ = readme_blocks("### Users")
    assert codes(submit(site, "the last", "ann@example.com")) == ["250", "250"]
    wait_for_mail(site, "the last", "ann")
    paste(site, remove)
    wait_for(lambda: codes(submit(site, "too late", "ann@example.com")) == ["550"], "the refusal")
    wait_until_sent(site)
    site.run("rm", "-rf", f"/{SPOOL}/ann")  # what came while Dovecot still knew her


def test_the_catch_all_takes_the_rest(site: Machine) -> None:
    _, _, _, _, _, _, catch_all = readme_blocks("### Users")
    conf = site.root / "etc/imapd.conf"
    before = conf.read_text()
    (site.root / SPOOL / "jane/.dovecot.sieve").unlink()
    paste(site, catch_all)
    # Postfix may still have a connection to a process that has read the file before.
    wait_for(lambda: codes(submit(site, "astray", "anything@example.com")) == ["250", "250"], "the catch-all")
    wait_for_mail(site, "astray", "jane")
    conf.write_text(before)


def test_a_pool(site: Machine) -> None:
    [block] = readme_blocks("### A pool, for much mail")
    paste(site, block)
    submit(site, "by the pool", "jane@example.com")
    wait_for_mail(site, "by the pool", "jane")
    assert site.properties("lmtpd-pool.service", "ActiveState") == {"ActiveState": "active"}
    site.shell("systemctl disable --now lmtpd-pool.socket; systemctl enable --now lmtpd.socket")


def test_postfix_starts_lmtpd(site: Machine) -> None:
    [block] = readme_blocks("### Postfix alone")
    paste(site, block)
    submit(site, "spawned", "jane@example.com")
    wait_for_mail(site, "spawned", "jane")
    assert "relay=mx.example.com[private/lmtpd-spawn]" in site.journal("--identifier=postfix/lmtp")
    site.shell("""
postconf -e 'local_transport = lmtp:unix:private/lmtpd'
systemctl enable --now lmtpd.socket
systemctl restart postfix
""")


@pytest.mark.parametrize(("name", "package"), [("inetd", "openbsd-inetd"), ("xinetd", "xinetd")])
def test_inetd_starts_lmtpd(site: Machine, name: str, package: str) -> None:
    [block] = readme_blocks(f"### {name}")
    paste(site, offline(site, block))
    submit(site, f"by {name}", "jane@example.com")
    wait_for_mail(site, f"by {name}", "jane")
    assert "relay=127.0.0.1[127.0.0.1]:24," in site.journal("--identifier=postfix/lmtp", "--lines=1")
    # Debian has the one or the other.
    site.shell(f"""
systemctl stop {name}
dpkg --purge {package}
postconf -e 'local_transport = lmtp:unix:private/lmtpd'
systemctl enable --now lmtpd.socket
systemctl restart postfix
""")


def test_several_domains(site: Machine) -> None:
    """Users have other names after it."""
    [block] = readme_blocks("### Several domains")
    paste(site, block)
    before = "Subject: spawned"
    assert before in subjects(site, "jane@example.com")
    assert subjects(site, "jane@example.org") == []
    for domain in ("example.com", "example.org"):
        assert codes(submit(site, f"to {domain}", f"jane@{domain}")) == ["250", "250"]
        wait_for_mail(site, f"to {domain}", f"jane@{domain}")
    assert "Subject: to example.com" not in subjects(site, "jane@example.org")
    assert codes(submit(site, "nobody", "joseph@example.org")) == ["550"]
    assert codes(submit(site, "to root", "root@example.com", "postmaster@example.org")) == ["250", "250", "250"]
    wait_for_mail(site, "to root", "jane@example.com")


def test_the_file_for_another_dovecot(site: Machine) -> None:
    """As after an upgrade of Debian, which brings Dovecot's own file back. It takes the changes of recipes away."""
    [block] = readme_blocks("## Upgrade, go back, remove")
    changed = (site.root / "etc/dovecot/local.conf").read_text()
    site.run("sed", "-i", "s/^#!include auth-system/!include auth-system/", "/etc/dovecot/conf.d/10-auth.conf")
    paste(site, block)
    assert (site.root / "etc/dovecot/local.conf~").read_text() == changed
    [domains] = readme_blocks("### Several domains")
    [command] = re.findall(r"\A(sed .*\\\n.*\n)", domains)
    paste(site, f"{command}systemctl restart dovecot\n")
    assert (site.root / "etc/dovecot/local.conf").read_text() == changed
    for domain in ("example.com", "example.org"):
        submit(site, f"once more to {domain}", f"jane@{domain}")
        wait_for_mail(site, f"once more to {domain}", f"jane@{domain}")


def test_mail_in_another_place(site: Machine) -> None:
    """And back again, for the tests of Debian 13 that come after this."""
    [block] = readme_blocks("### Mail in another place")
    user = "jane@example.com"
    before = subjects(site, user)
    paste(site, block)
    submit(site, "elsewhere", user)
    wait_for_mail(site, "elsewhere", user)
    assert subjects(site, user) == [*before, "Subject: elsewhere"]
    assert list((site.root / "srv/mail/example.com/jane/Maildir/cur").glob("*,S=*"))
    assert list((site.root / SPOOL).iterdir()) == []
    site.run("lmtpd", "--check")
    site.shell(block.replace(f"/{SPOOL}", "/srv/mail").replace("place=/srv/mail", f"place=/{SPOOL}"))
    assert subjects(site, user) == [*before, "Subject: elsewhere"]
    assert list((site.root / "srv/mail").iterdir()) == []
