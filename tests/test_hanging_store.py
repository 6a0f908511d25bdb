"""A file system that hangs while a message is stored: the answer is late, and the message is there once.

What hangs is the data: MooseFS' chunk servers are stopped. Names of files can still be looked up, so a message gets as
far as the end of its data.
"""

from __future__ import annotations

import smtplib
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from cluster import Host, MooseFS
from harness import STORE_USER, wait_for
from mailboxes import letter, send
from peers import Postfix, program
from postgres import scratch_server

POSTFIX_MAIN_CF = """\
virtual_mailbox_domains = example.com
virtual_transport = lmtp:unix:{address}
lmtp_data_done_timeout = {patience}s
minimal_backoff_time = {backoff}s
"""
GIVEN_UP = "timed out while sending end of data"


@pytest.fixture
def cluster() -> Iterator[MooseFS]:
    with MooseFS() as cluster:
        yield cluster


def host_of(cluster: MooseFS, name: str, **options: str) -> Host:
    host = cluster.host(name)
    host.configure(duplicatesuppression="yes", lmtp_prefork="2", **options)
    return host


class Hanging:
    """While the "with" block runs, nothing can be written to files of the store, nor read from them."""

    def __init__(self, cluster: MooseFS) -> None:
        self._servers = cluster.chunk_servers

    def end(self) -> None:
        """Ends it before the block does."""
        for server in self._servers:
            server.go_on()

    def __enter__(self) -> Hanging:
        for server in self._servers:
            server.stop()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


def wait_for_drafts(host: Host, number: int = 1) -> None:
    """Returns when so many messages are being written."""
    wait_for(lambda: len(host.files("jane", kind="tmp")) == number, f"{number} drafts", host.log)


@contextmanager
def postfix(host: Host, patience: int = 600, backoff: int = 300) -> Iterator[Postfix]:
    """A Postfix that delivers to the host. patience, backoff: seconds; Postfix' own unless a test has others."""
    address = host.serve()
    main_cf = POSTFIX_MAIN_CF.format(address=address, patience=patience, backoff=backoff)
    with Postfix(host, main_cf, "") as server:
        with smtplib.SMTP(*server.address) as client:
            client.sendmail("sender@example.net", ["jane@example.com"], letter())
        yield server


def log_of(server: Postfix) -> str:
    return server.log.read_text(errors="replace")


def flush(server: Postfix) -> None:
    """Has Postfix try all mail again now."""
    subprocess.run([program("postqueue"), "-c", str(server.conf), "-f"], check=True)


def test_a_client_that_waits_gets_a_late_answer(cluster: MooseFS) -> None:
    host = host_of(cluster, "one")
    host.add_user("jane")
    with Hanging(cluster) as hang, postfix(host) as server:
        wait_for_drafts(host)
        assert not host.files("jane")
        hang.end()
        server.wait_until_sent()
        assert "status=sent" in log_of(server)
        assert "status=deferred" not in log_of(server)
        assert len(host.messages("jane")) == 1


def test_a_client_that_gives_up_does_not_deliver_twice(cluster: MooseFS) -> None:
    """lmtpd stores the message when the file system goes on, and knows it when the client comes again."""
    host = host_of(cluster, "one")
    host.add_user("jane")
    with Hanging(cluster) as hang, postfix(host, patience=1) as server:
        wait_for(lambda: GIVEN_UP in log_of(server), "Postfix to give up", server.log)
        hang.end()
        wait_for(lambda: host.files("jane"), "the message", host.log)
        assert server.queued()
        flush(server)
        server.wait_until_sent()
        assert len(host.messages("jane")) == 1
        assert "\n<6>duplicate " in host.log_text()


def come_again(cluster: MooseFS, first: Host, second: Host) -> None:
    """Gives a message for jane to the first host, gives up, and comes to the second while the store still hangs."""
    first.add_user("jane")
    message = letter()
    addresses = {host: host.serve() for host in {first, second}}
    with Hanging(cluster) as hang:
        impatient = first.connect_to(addresses[first])
        impatient.hello()
        for command in ("MAIL FROM:<sender@example.com>", "RCPT TO:<jane>"):
            assert impatient.command(command).startswith("250")
        assert impatient.command("DATA").startswith("354")
        impatient.send(message + b".\r\n")
        wait_for_drafts(first)
        impatient.close()
        client = second.connect_to(addresses[second])
        client.hello()
        assert send(client, "jane", message).startswith("4")
        hang.end()
        wait_for(lambda: "\n<6>delivered " in f"\n{first.log_text()}", "the message", first.log)
        assert send(client, "jane", message).startswith("250")
        client.leave()
    assert len(second.messages("jane")) == 1


def test_a_client_that_comes_again_too_early_is_deferred(cluster: MooseFS) -> None:
    """The message is claimed by the process that hangs; it is not known yet whether it will be stored."""
    host = host_of(cluster, "one")
    come_again(cluster, host, host)


def test_a_client_that_turns_to_another_host_is_deferred_too(cluster: MooseFS) -> None:
    """The hosts have their records in one database."""
    with scratch_server() as server, server.database(STORE_USER) as database:
        options = {**database.options, "sql_hostnames": f"{server.socket_folder}:{server.port}"}
        del options["sql_passwd"]
        come_again(cluster, host_of(cluster, "one", **options), host_of(cluster, "two", **options))
