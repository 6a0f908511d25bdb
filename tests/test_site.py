"""A site of Postfix, lmtpd and Dovecot as the README sets it up, by its very commands, and the mail it gets."""

from __future__ import annotations

from pathlib import Path

import pytest
from container import Machine, readme_blocks
from harness import PATIENCE, wait_for

SITE = "### A whole site"
SPOOL = "var/spool/lmtpd"
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
def site(installed: Machine) -> Machine:
    """A machine after the README's commands, save the last: those for a catch-all and for scripts."""
    prepare, jane, *joe, connect, _, _, _, _ = readme_blocks(SITE)
    release = int(has_dovecot_24(installed))
    # Dovecot is in the machine already, where no network is to install it from.
    installed.shell(prepare.replace("apt-get install -y dovecot-imapd\n", ""))
    (installed.root / "etc/dovecot/local.conf").write_text(readme_blocks(SITE, "")[release])
    installed.shell(jane + joe[release] + connect)
    installed.shell("postconf -e smtpd_authorized_xclient_hosts=127.0.0.1\npostfix reload")
    return installed


@pytest.fixture(scope="module")
def filters(site: Machine) -> Machine:
    """The machine after the README's commands for scripts. Mail for example.net is written to files."""
    site.shell("".join(readme_blocks(SITE)[-3:]))
    site.shell(f"install -d -m 777 {ELSEWHERE}")
    pipe = f"elsewhere unix - n n - 1 pipe flags=R user=nobody argv=/usr/bin/tee -a {ELSEWHERE}/${{recipient}}"
    site.run("postconf", "-M", f"elsewhere/unix={pipe}")
    site.shell("postconf -e 'transport_maps = inline:{example.net=elsewhere:}'\npostfix reload")
    return site


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


def has_dovecot_24(machine: Machine) -> bool:
    return not machine.run("dovecot", "--version").stdout.startswith("2.3.")


def quota(machine: Machine, size: str) -> str:
    """The field by which Dovecot gives a user his quota."""
    return f"userdb_quota_storage_size={size}" if has_dovecot_24(machine) else f"userdb_quota_rule=*:storage={size}"


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


def codes(replies: list[str]) -> list[str]:
    return [reply[:3] for reply in replies]


def subjects(machine: Machine, user: str, folder: str = "INBOX") -> list[str]:
    """What the user sees in that folder with an IMAP client."""
    return machine.run("python3", "-c", FETCH, user, folder).stdout.splitlines()


def wait_for_mail(machine: Machine, subject: str, user: str, folder: str = "INBOX") -> None:
    wait_for(lambda: f"Subject: {subject}" in subjects(machine, user, folder), f"{subject} in {folder} of {user}")


def limits_on_disk(machine: Machine, user: str) -> str:
    """The quota as lmtpd has written it into the user's Maildir."""
    return (machine.root / SPOOL / user / "maildirsize").read_text().splitlines()[0]


def quota_by_doveadm(machine: Machine, user: str) -> tuple[int, int]:
    """The KiB that the user has in his mailbox, and those he may have, as Dovecot counts them."""
    shown = machine.run("doveadm", "-f", "tab", "quota", "get", "-u", user).stdout
    [storage] = [line.split("\t") for line in shown.splitlines() if "\tSTORAGE\t" in line]
    return int(storage[2]), int(storage[3])


def test_mail_to_a_user_is_in_the_inbox(site: Machine) -> None:
    assert codes(submit(site, "plain", "jane@example.com")) == ["250", "250"]
    wait_for_mail(site, "plain", "jane")


def test_the_maildir_is_made_for_the_account_that_delivers(site: Machine) -> None:
    submit(site, "first", "joe@example.com")
    wait_for_mail(site, "first", "joe")
    for folder in ("", "/tmp", "/new", "/cur"):
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
    assert codes(submit(site, "root", "root@example.com", "lmtpd@example.com")) == ["550", "550"]


def test_dovecot_and_lmtpd_agree_on_the_quota(site: Machine) -> None:
    submit(site, "counted", "joe@example.com", size=2_000_000)
    wait_for_mail(site, "counted", "joe")
    assert limits_on_disk(site, "joe") == f"{20 * 1024 * 1024}S"
    on_disk = sum(path.stat().st_size for path in Path(site.root / SPOOL / "joe").glob("*/*,S=*"))
    used, limit = -(-on_disk // 1024), 20 * 1024
    assert quota_by_doveadm(site, "joe") == (used, limit)
    assert site.run("python3", "-c", QUOTA, "joe").stdout == f'"User quota" (STORAGE {used} {limit})\n'


def test_who_has_no_quota_of_his_own_has_that_of_all(site: Machine) -> None:
    submit(site, "plenty of room", "jane@example.com")
    wait_for_mail(site, "plenty of room", "jane")
    assert limits_on_disk(site, "jane") == f"{1024**3}S"
    assert quota_by_doveadm(site, "jane")[1] == 1024**2


def test_a_user_over_quota_is_put_off_until_there_is_room(site: Machine) -> None:
    add_user(site, "full", quota(site, "1M"))
    assert codes(submit(site, "the last straw", "full@example.com", size=1_500_000)) == ["250", "250"]
    wait_for_mail(site, "the last straw", "full")
    submit(site, "waits", "full@example.com")
    wait_for(lambda: "452 4.2.2" in site.run("postqueue", "-p").stdout, "the refusal")
    assert subjects(site, "full") == ["Subject: the last straw"]
    for path in (site.root / SPOOL / "full").glob("*/*,S=*"):
        path.unlink()
    (site.root / SPOOL / "full/maildirsize").unlink()
    site.run("postqueue", "-f")
    wait_for_mail(site, "waits", "full")


def test_the_senders_server_hears_that_the_user_is_full(site: Machine) -> None:
    """Nothing is known of him yet, so Postfix asks before it takes the message."""
    add_user(site, "stuffed", quota(site, "1k"))
    site.shell(f"install -d -o lmtpd -g lmtpd -m 700 /{SPOOL}/stuffed /{SPOOL}/stuffed/cur /{SPOOL}/stuffed/new")
    (site.root / SPOOL / "stuffed/cur/1.M0P1.mx,S=2000,W=2000:2,S").write_bytes(b"x" * 2000)
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


def test_the_catch_all_takes_the_rest(site: Machine) -> None:
    conf = site.root / "etc/imapd.conf"
    before = conf.read_text()
    site.shell(readme_blocks(SITE)[-4])
    try:
        assert codes(submit(site, "astray", "anything@example.com")) == ["250", "250"]
        wait_for_mail(site, "astray", "jane")
    finally:
        conf.write_text(before)


@pytest.mark.parametrize("user", ["jane", "joe"])
def test_spam_is_in_junk_for_everyone(filters: Machine, user: str) -> None:
    submit(filters, "buy", f"{user}@example.com", field="X-Spam-Flag: YES")
    wait_for(lambda: list((filters.root / SPOOL / user / ".Junk/new").glob("*")), "the folder and the message in it")
    assert subjects(filters, user, "Junk") == ["Subject: buy"]
    assert "Subject: buy" not in subjects(filters, user)
    assert elsewhere(filters, "sender@example.net") == elsewhere(filters, "joe@example.net") == ""


def test_an_out_of_office_reaches_the_sender_once(filters: Machine) -> None:
    for subject in ("one", "two"):
        submit(filters, subject, "jane@example.com")
        wait_for_mail(filters, subject, "jane")
    answer = elsewhere(filters, "sender@example.net")
    assert answer.count("Subject: ") == 1
    for line in (
        "From: jane@example.com",
        "Subject: Auto: one",
        "Auto-Submitted: auto-replied",
        "I am away until Monday.",
    ):
        assert f"\n{line}\n" in answer
    assert "Return-Path: <MAILER-DAEMON>\n" in answer


def test_a_forward_arrives_elsewhere(filters: Machine) -> None:
    submit(filters, "for both", "joe@example.com")
    wait_for_mail(filters, "for both", "joe")
    forwarded = elsewhere(filters, "joe@example.net")
    assert "Return-Path: <sender@example.net>\n" in forwarded
    assert forwarded.count("Subject: for both\n") == 1


def test_a_rejected_message_comes_back_as_a_bounce(filters: Machine) -> None:
    script = filters.root / "var/lib/lmtpd/sieve/joe/active.sieve"
    before = script.read_text()
    script.write_text('require "reject";\nreject "I take no advertising.";\n')
    try:
        submit(filters, "advertising", "joe@example.com")
        bounce = elsewhere(filters, "sender@example.net")
    finally:
        script.write_text(before)
    assert "Return-Path: <MAILER-DAEMON>\n" in bounce
    assert "550 5.7.1 I take no advertising." in " ".join(bounce.split())


def test_nothing_of_it_is_an_error_in_the_log(site: Machine) -> None:
    warnings = site.journal("--identifier=lmtpd", "--priority=warning").splitlines()
    assert [line for line in warnings if "userdb" not in line and not line.startswith("over-quota")] == []


def test_mail_leaves_by_sendmail_outside_of_the_units(filters: Machine) -> None:
    text = (filters.root / "etc/imapd.conf").read_text().replace("smtp_backend: host", "smtp_backend: sendmail")
    (filters.root / "etc/sendmail.conf").write_text(text)
    session = (
        "LHLO x\r\nMAIL FROM:<other@example.net>\r\n"
        "RCPT TO:<joe@example.com>\r\nRCPT TO:<jane@example.com>\r\nDATA\r\n"
        "From: other@example.net\r\nTo: jane@example.com\r\nSubject: by sendmail\r\n\r\n.. x\r\n.\r\nQUIT\r\n"
    )
    done = filters.run(
        "runuser", "-u", "lmtpd", "--", "/usr/local/bin/lmtpd", "-C", "/etc/sendmail.conf", stdin=session
    )
    assert done.stdout.count("250 2.1.5 Ok SESSIONID") == 2
    forwarded = elsewhere(filters, "joe@example.net")
    assert "Return-Path: <other@example.net>\n" in forwarded
    assert "\n. x\n" in forwarded
    assert "Return-Path: <MAILER-DAEMON>\n" in elsewhere(filters, "other@example.net")


def test_in_the_units_sendmail_cannot_work_and_the_log_says_what_to_do(filters: Machine) -> None:
    conf = filters.root / "etc/imapd.conf"
    before = conf.read_text()
    conf.write_text(before.replace("smtp_backend: host", "smtp_backend: sendmail"))
    try:
        submit(filters, "not by sendmail", "joe@example.com")
        wait_for_mail(filters, "not by sendmail", "joe")
        wait_for(lambda: "mail-not-sent" in filters.journal("--identifier=lmtpd", "--priority=err"), "the error")
    finally:
        conf.write_text(before)
    assert "set smtp_backend: host" in filters.journal("--identifier=lmtpd", "--priority=err")
    assert elsewhere(filters, "joe@example.net") == ""
