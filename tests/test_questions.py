"""The questions --check, --config and --explain: the answers are right for root and the account, and write nothing."""

from __future__ import annotations

import os
import pwd
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from authority import Authority
from harness import PATIENCE, STORE_USER, Site
from test_sieve_command import Said, explained, run, state_of

OK, USAGE, CONFIG = os.EX_OK, os.EX_USAGE, os.EX_CONFIG
AS_ACCOUNT = ("setpriv", f"--reuid={STORE_USER}", f"--regid={STORE_USER}", "--clear-groups")


def asked(site: Site, *question: str, before: tuple[str, ...] = ()) -> Said:
    """The answer; nothing on the disk has changed."""
    state = state_of(site)
    said = run(*before, *site.command(*question))
    assert state_of(site) == state
    return said


@contextmanager
def userdb_socket(site: Site, mode: int = 0o666) -> Iterator[socket.socket]:
    """The site's user database is a listening socket of the test's."""
    path = f"{site.root}/auth-userdb"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        os.chmod(path, mode)
        site.configure(userdb="dovecot", userdb_socket_path=path)
        yield listener


@pytest.fixture
def authority(site: Site) -> Authority:
    return Authority(site)


# --check


@pytest.mark.parametrize("before", [(), AS_ACCOUNT], ids=["root", "account"])
def test_a_configuration_in_order(site: Site, before: tuple[str, ...]) -> None:
    said = asked(site, "--check", before=before)
    assert (said.status, said.lines) == (OK, [f"{site.conf} is in order for the account {STORE_USER}"])


def test_without_cyrus_user_root_checks_as_the_owner_of_configdirectory(site: Site) -> None:
    site.configure(cyrus_user=None)
    said = asked(site, "--check")
    assert (said.status, said.lines) == (OK, [f"{site.conf} is in order for the account {STORE_USER}"])


def test_every_error_of_the_file_is_named(site: Site) -> None:
    wrong = "maxmessagesize: lots\nnonsense\numask: 999\npostmaster:\nadmins: a\nadmins: b\n"
    count = len(site.conf.read_text().splitlines())
    with site.conf.open("a") as file:
        file.write(wrong)
    said = asked(site, "--check")
    assert said.status == CONFIG
    assert set(said.lines) == {
        f"error: {site.conf}:{count + 1}: maxmessagesize: 'lots' must be a size such as 1000, 64K or 20M",
        f"error: {site.conf}:{count + 2}: 'nonsense' is not of the form 'option: value'",
        f"error: {site.conf}:{count + 3}: umask: '999' must be an octal number",
        f"error: {site.conf}:{count + 4}: postmaster has no value; remove the line to get the default",
        f"error: {site.conf}:{count + 6}: admins is set already at {site.conf}:{count + 5}; remove one of the two",
    }


def test_a_client_is_not_told_the_errors_and_the_log_has_the_first(site: Site) -> None:
    site.configure(umask="999", debug="perhaps")
    assert site.pipe(b"").stdout == b"421 4.3.0 Configuration error, see the log\r\n"
    assert "umask: '999'" in site.log_text() or "debug: 'perhaps'" in site.log_text()
    assert "(and 1 more: see lmtpd --check)" in site.log_text()


def test_a_missing_file_is_the_only_error(site: Site) -> None:
    site.conf.unlink()
    said = asked(site, "--check")
    assert (said.status, said.lines) == (CONFIG, [f"error: {site.conf}: No such file or directory"])


def test_an_option_is_not_called_missing_if_a_file_could_not_be_read(site: Site) -> None:
    site.conf.write_text("@include: nowhere.conf\npartition-default relative\n")
    said = asked(site, "--check")
    assert (said.status, said.lines) == (
        CONFIG,
        [
            f"error: {site.conf}:1: {site.conf.parent}/nowhere.conf: No such file or directory",
            f"error: {site.conf}:2: 'partition-default relative' is not of the form 'option: value'",
        ],
    )


def test_unknown_and_unused_options_are_notes(site: Site) -> None:
    site.configure(lmtp_maxchildd="3", allowapop="yes", no_such_thing="1")
    said = asked(site, "--check")
    assert said.status == OK
    lines = site.conf.read_text().splitlines()
    where = {line.partition(":")[0]: f"{site.conf}:{number}" for number, line in enumerate(lines, 1)}
    assert set(said.lines[:-1]) == {
        f"note: {where['lmtp_maxchildd']}: lmtp_maxchildd: unknown option; perhaps lmtp_maxchild is meant",
        f"note: {where['allowapop']}: allowapop: lmtpd has no such option; Cyrus has it",
        f"note: {where['no_such_thing']}: no_such_thing: unknown option",
    }


def test_odd_settings_are_notes(site: Site) -> None:
    site.configure(lmtp_prefork="5", lmtp_maxchild="2")
    said = asked(site, "--check")
    assert (said.status, said.lines[0][:24]) == (OK, "note: lmtp_prefork is 5,")


@pytest.mark.parametrize("option", ["configdirectory", "partition-default", "shared_maildir", "sieve_global_dir"])
def test_a_directory_that_is_missing(site: Site, option: str) -> None:
    site.configure(**{option: f"{site.root}/nowhere"})
    said = asked(site, "--check", before=AS_ACCOUNT)
    assert said.status == CONFIG
    assert f"error: {option.removesuffix('-default')}: {site.root}/nowhere: No such file or directory" in said.lines


@pytest.mark.parametrize("option", ["metrics_path", "duplicate_db_path"])
def test_a_file_in_a_directory_that_is_missing(site: Site, option: str) -> None:
    site.configure(**{option: f"{site.root}/nowhere/file"})
    said = asked(site, "--check")
    assert (said.status, said.lines) == (CONFIG, [f"error: {option}: {site.root}/nowhere: No such file or directory"])


def test_a_partition_has_to_be_writable_only_if_mailboxes_are_made_in_it(site: Site) -> None:
    site.configure(**{"metapartition-default": "/nonexistent", "partition-other": "/nonexistent"})
    site.configure(defaultpartition="default")
    os.chown(site.spool, 0, 0)
    site.spool.chmod(0o755)
    assert asked(site, "--check").status == OK
    site.configure(autocreate_post="yes")
    said = asked(site, "--check")
    assert (said.status, said.lines) == (CONFIG, [f"error: partition: {site.spool}: Permission denied"])


def test_root_is_refused_as_it_is_for_serving(site: Site) -> None:
    """If nothing says as which account lmtpd delivers."""
    site.configure(cyrus_user=None)
    os.chown(site.configdirectory, 0, 0)
    for question in (("--check",), ("--explain", "jane")):
        said = asked(site, *question)
        assert said.status == CONFIG
        assert "refusing to run as root: set cyrus_user" in "".join([*said.lines, said.complaints])
    os.chown(site.configdirectory, 54321, -1)
    assert "uid 54321, has no account" in asked(site, "--check").lines[0]


def test_the_user_database_does_not_answer(site: Site) -> None:
    site.configure(userdb="dovecot", userdb_socket_path=f"{site.root}/auth-userdb")
    said = asked(site, "--check")
    assert said.status == CONFIG
    cause = f"{site.root}/auth-userdb: No such file or directory"
    assert said.lines == [f"error: userdb_socket_path: {cause} (is Dovecot running, and may {STORE_USER} connect?)"]


def test_the_user_database_refuses_the_account(site: Site) -> None:
    with userdb_socket(site, mode=0o600):
        said = asked(site, "--check")
    assert said.status == CONFIG
    assert "auth-userdb: Permission denied" in said.lines[0]


def test_a_socket_that_is_not_dovecots(site: Site) -> None:
    with userdb_socket(site) as listener:
        process = subprocess.Popen(site.command("--check"), stdout=subprocess.PIPE, text=True)
        with listener.accept()[0] as connection:
            connection.sendall(b"220 mx.example.com ESMTP\n")
            answer, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == CONFIG
    assert "auth-userdb: is not a socket of Dovecot's authentication service (" in answer


def test_passwords(site: Site) -> None:
    """They are checked only if somebody may authenticate."""
    site.configure(sasl_pwcheck_method="file", sasl_password_file=f"{site.root}/passwords")
    assert asked(site, "--check").status == OK
    site.configure(admins="mta")
    said = asked(site, "--check")
    assert said.lines == [f"error: sasl_password_file: {site.root}/passwords: No such file or directory"]
    site.configure(sasl_password_file=None)
    assert asked(site, "--check").lines == ["error: sasl_pwcheck_method: file needs sasl_password_file"]
    site.configure(sasl_pwcheck_method="auxprop")
    assert asked(site, "--check").status == CONFIG
    site.configure(sasl_pwcheck_method="saslauthd", sasl_saslauthd_path=f"{site.root}/mux")
    assert "is saslauthd running" in asked(site, "--check").lines[0]


def test_a_certificate(site: Site, authority: Authority) -> None:
    certificate, key = authority.sign("mx.example.com")
    key.chmod(0o600)
    site.configure(allowstarttls="yes", tls_server_cert=str(certificate), tls_server_key=str(key))
    assert asked(site, "--check").status == OK  # root reads the key, as lmtpd does if root starts it
    said = asked(site, "--check", before=AS_ACCOUNT)
    assert said.status == CONFIG
    assert f"{key}: Permission denied" in said.lines[0]
    site.configure(tls_server_cert=f"{site.root}/none.pem")
    assert f"{site.root}/none.pem: No such file or directory" in asked(site, "--check").lines[0]
    site.configure(allowstarttls="no", tls_required="yes")
    assert asked(site, "--check").lines == ["error: tls_required: allowstarttls must be yes"]


def test_scripts_of_the_site(site: Site) -> None:
    folder = site.root / "before"
    folder.mkdir()
    (folder / "10-right.sieve").write_text("keep;\n")
    (folder / "20-wrong.sieve").write_text("keep;\nnonsense;\n")
    (folder / "ignored.txt").write_text("nonsense")
    site.configure(sieve_before=str(folder), sieve_after=f"{site.root}/none.sieve")
    said = asked(site, "--check")
    assert said.status == CONFIG
    assert len(said.lines) == 2
    assert said.lines[0].startswith(f"error: sieve_before: {folder}/20-wrong.sieve:2:1: ")
    assert said.lines[1] == f"error: sieve_after: {site.root}/none.sieve: No such file or directory"


def test_a_pipe_is_no_script(site: Site) -> None:
    os.mkfifo(site.root / "pipe.sieve")
    site.configure(sieve_before=f"{site.root}/pipe.sieve")
    said = asked(site, "--check")
    assert (said.status, said.lines) == (CONFIG, [f"error: sieve_before: {site.root}/pipe.sieve: is no plain file"])


def test_what_the_store_refuses_does_not_hide_the_rest(site: Site) -> None:
    site.configure(maildir_path="%h/Maildir", shared_maildir=f"{site.root}/nowhere", no_such_thing="1")
    lines = asked(site, "--check").lines
    assert lines[0] == "error: maildir_path: %h needs userdb: passwd or dovecot"
    assert [line.split(": ")[0] for line in lines] == ["error", "error", "note"]


def test_a_server_that_takes_no_mail_is_a_note(site: Site) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        site.configure(smtp_backend="host", smtp_host=f"127.0.0.1:{port}")
        said = asked(site, "--check")
    assert said.status == OK
    assert said.lines[0].startswith(f"note: smtp_host: 127.0.0.1:{port}: Connection refused")
    site.configure(smtp_host="a..b:25")
    assert asked(site, "--check").lines[0].startswith("note: smtp_host: a..b:25: ")
    site.configure(smtp_backend="sendmail", sendmail=f"{site.root}/sendmail")
    assert asked(site, "--check").lines[0].startswith(f"note: sendmail: {site.root}/sendmail cannot be run")


# --config


def test_what_differs_from_the_defaults_is_shown(site: Site) -> None:
    site.configure(default_quota="20M", debug="off", umask="0077", smtp_auth_password="secret", allowapop="1")
    site.configure(**{"xlist-junk": "Spam"})
    said = asked(site, "--config", before=AS_ACCOUNT)
    assert said.status == OK
    assert said.lines == [
        f"configdirectory: {site.configdirectory}",
        f"cyrus_user: {STORE_USER}",
        "default_quota: 20M",
        "duplicatesuppression: no",
        "servername: mx.example.com",
        "# smtp_auth_password is set, and not shown",
        f"partition-default: {site.spool}",
        "xlist-junk: Spam",
    ]


def test_what_is_shown_can_be_read_again(site: Site) -> None:
    site.configure(lmtp_maxmessagesize="3M", recipient_delimiter="+-")
    short = asked(site, "--config").lines
    assert "maxmessagesize: 3M" in short
    everything = asked(site, "--config", "all").lines
    assert len(everything) > 90
    site.conf.write_text("\n".join(everything) + "\n")
    again = asked(site, "--config")
    assert (again.status, again.lines) == (OK, short)


def test_a_reader_of_the_answer_may_stop(site: Site) -> None:
    said = run("sh", "-c", '"$@" | head -1', "sh", *site.command("--config", "all"))
    assert (said.lines, said.complaints) == (["# admins is empty"], "")


def test_an_answer_that_cannot_be_written(site: Site) -> None:
    said = run("sh", "-c", '"$@" >/dev/full', "sh", *site.command("--config"))
    assert (said.status, said.lines) == (os.EX_IOERR, [])
    assert "No space left on device" in said.complaints
    assert run("sh", "-c", '"$@" <&- >&-', "sh", *site.command("--explain", "jane")).status == OK


def test_a_wrong_configuration_cannot_be_shown(site: Site) -> None:
    site.configure(umask="999")
    said = asked(site, "--config")
    assert (said.status, said.lines) == (CONFIG, [])
    assert "umask: '999'" in said.complaints


# --explain


@pytest.mark.parametrize("before", [(), AS_ACCOUNT], ids=["root", "account"])
@pytest.mark.parametrize("user", [STORE_USER, None], ids=["cyrus_user", "no cyrus_user"])
def test_a_user_without_a_message(site: Site, before: tuple[str, ...], user: str | None) -> None:
    site.configure(cyrus_user=user, default_quota="20M")
    said = asked(site, "--explain", "jane@example.com", before=before)
    assert said.status == OK
    assert said.value == {
        "user": "jane",
        "userdb": "maildir",
        "mailbox": f"{site.spool}/jane",
        "folder": "INBOX",
        "quota": "nothing of 20971520 bytes",
        "script": "none",
        "reply": "250 2.1.5 Ok",
    }


def test_the_count_of_a_full_mailbox(site: Site) -> None:
    """It is made anew, and not written."""
    site.configure(default_quota="1000")
    message = site.spool / "jane/cur/1.x:2,S"
    message.write_bytes(b"x" * 1500)
    os.chown(message, pwd.getpwnam(STORE_USER).pw_uid, -1)
    said = asked(site, "--explain", "jane")
    assert said.value["quota"] == "1500 bytes, 1 messages of 1000 bytes"
    assert said.value["reply"].startswith("452 4.2.2")
    assert said.complaints.count("over-quota recipient=<jane>") == 1
    assert not (site.spool / "jane/maildirsize").exists()


def test_the_user_database_is_named(site: Site) -> None:
    site.configure(userdb="passwd", passwd_min_uid="0", maildir_path="%p/%u")
    assert asked(site, "--explain", STORE_USER).value["userdb"] == "passwd"


def test_a_user_database_that_is_down_is_told_and_no_process_waits_for_it(site: Site) -> None:
    site.configure(userdb="dovecot", userdb_socket_path=f"{site.root}/auth-userdb")
    said = asked(site, "--explain", "jane")
    assert len(said.lines) == 1
    assert said.value["reply"].startswith("451 4.3.0 ")
    assert f"{site.root}/auth-userdb: No such file or directory" in said.complaints
    assert not Path(site.configdirectory, "userdb.backoff").exists()


def test_a_user_database_that_hangs_up(site: Site) -> None:
    with userdb_socket(site) as listener:
        process = subprocess.Popen(site.command("--explain", "jane"), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        listener.accept()[0].close()
        answer, _ = process.communicate(timeout=PATIENCE)
    assert (process.returncode, answer[:13]) == (OK, b"reply    451 ")


def test_a_database_that_cannot_be_read_is_left_alone(site: Site) -> None:
    """No process may do without it for a while, only because a question was asked."""
    script = site.root / "scripts/jane.sieve"
    script.parent.mkdir()
    script.write_text('require "duplicate"; if duplicate { discard; }')
    database = site.configdirectory / "deliver.db"
    for content in (b"no database", b""):
        database.write_bytes(content)
        site.give(database)
        site.configure(sieve_script=f"{site.root}/scripts/%u.sieve")
        said = run(*site.command("--explain", "jane"), text=b"Subject: x\r\nMessage-ID: <1@x>\r\n\r\n")
        assert said.value["actions"] == "fileinto INBOX"
        assert database.read_bytes() == content
        assert not (site.configdirectory / "deliver.backoff").exists()


def test_the_user_who_gets_the_mail_of_others_is_named(site: Site) -> None:
    site.configure(lmtp_catchall_mailbox="jane")
    assert asked(site, "--explain", "nobodyx@example.com").value["user"] == "jane, for nobodyx, who is unknown"


def test_a_sub_address_with_a_message(site: Site) -> None:
    said = explained(site, "jane+nowhere")
    assert (said.value["folder"], said.value["actions"]) == ("INBOX", "fileinto INBOX")


@pytest.mark.parametrize(
    "wrong", [("--check", "x"), ("--config", "everything"), ("--explain",), ("--check", "--config"), ("--check", "-a")]
)
def test_a_wrong_command_line(site: Site, wrong: tuple[str, ...]) -> None:
    assert run(*site.command(*wrong)).status == USAGE
