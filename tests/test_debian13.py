"""The units and the README's recipes on a machine of Debian 13, save the whole site, which is in test_dovecot24.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from container import DEBIAN_13, OWN, Machine, readme_blocks
from test_site import PASSWORD, codes, submit, wait_for_mail
from test_systemd import MESSAGE, connect

if OWN != DEBIAN_13:  # else they run on it anyway
    from test_clients import TestReadme, on_tcp, tcp_machine  # noqa: F401
    from test_systemd import (  # noqa: F401
        machine,
        pool,
        test_a_broken_configuration_is_a_failed_unit_until_it_is_mended,
        test_each_weakness_of_the_sandbox_is_explained,
        test_exposure_is_at_most_1_5,
        test_mail_in_another_folder,
        test_mail_through_postfix,
        test_nobody_but_postfix_may_connect,
        test_pool_a_broken_configuration_is_a_failed_unit_until_it_is_mended,
        test_pool_mail_in_another_folder,
        test_pool_mail_through_postfix,
        test_pool_stop_lets_the_message_in_hand_be_finished,
        test_tcp_with_the_drop_in,
        test_the_command_starts_cheaply,
        test_the_sandbox_is_in_force,
        test_verify_is_silent,
    )


@pytest.fixture(scope="module")
def base() -> Path:
    return DEBIAN_13


@pytest.fixture
def other(base: Path, installation: Path) -> Iterator[Machine]:
    """A machine of the test's own, as the README's recipe for systemd and Postfix leaves it."""
    machine = Machine(base, installation)
    yield machine
    machine.close()


def test_dovecot_reads_the_maildirs_of_those_who_have_accounts(other: Machine) -> None:
    imapd_conf, maildirs = readme_blocks("## Recipes", "")
    main_cf, master_cf = readme_blocks("### Postfix alone", "")
    [without_userdb] = readme_blocks("### Dovecot reads the Maildirs")
    _, dovecot = readme_blocks("### Dovecot reads the Maildirs", "")
    (other.root / "etc/imapd.conf").write_text(imapd_conf)
    (other.root / "etc/dovecot/local.conf").write_text(dovecot)
    for name, text in (("main.cf", main_cf), ("master.cf", master_cf)):
        with (other.root / "etc/postfix" / name).open("a") as file:
            file.write(text)
    other.run("bash", "-ec", maildirs + without_userdb)
    # The machine has followed another recipe before.
    other.shell(f"""
systemctl disable --now lmtpd.socket
rm -f /var/spool/postfix/private/lmtpd
postconf -e mydestination= smtpd_authorized_xclient_hosts=127.0.0.1
useradd jane
echo jane:{PASSWORD} | chpasswd
systemctl restart dovecot postfix
""")
    assert codes(submit(other, "for an account", "jane@example.com")) == ["250", "250"]
    wait_for_mail(other, "for an account", "jane")


def test_mail_in_the_homes(other: Machine) -> None:
    [commands] = readme_blocks("### Mail in the homes of the host's accounts")
    other.shell("useradd -m -K HOME_MODE=0700 jane\ncd /root/lmtpd\n" + commands)
    client = connect(other)
    client.hello()
    assert client.deliver(MESSAGE, "jane")[0].startswith("250")
    client.close()
    assert other.shell("stat --format='%U:%G %a' /home/jane/Maildir/new/*") == "jane:jane 600\n"
