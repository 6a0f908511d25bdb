"""The metrics of a pool: a file that readers of OpenMetrics understand, with the counts of what has happened."""

from __future__ import annotations

import os
import signal
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from harness import PATIENCE, Client, Site, free_port, wait_for
from peers import unpacked
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from test_service import open_session, pool

MESSAGE = b"Subject: x\r\n\r\nx\r\n"
Samples = dict[tuple[str, str], float]


@pytest.fixture
def file(site: Site) -> Path:
    """Where the metrics of the site's pool are, written as soon as something has changed."""
    folder = site.root / "metrics"
    folder.mkdir()
    site.give(folder)
    site.figures = {"METRICS_INTERVAL": 0}
    site.configure(metrics_path=f"{folder}/lmtpd.prom")
    return folder / "lmtpd.prom"


def samples(file: Path) -> Samples:
    """The value of each sample, by its name and the reply or state."""
    if not file.exists():
        return {}
    return {
        (sample.name, " ".join(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(file.read_text())  # type: ignore[no-untyped-call]
        for sample in family.samples
    }


def converse(client: Client) -> None:
    assert client.deliver(MESSAGE, "jane", "nobody")[0].startswith("250")
    assert client.deliver(MESSAGE, "jane", "jane")[0].startswith("250")


def test_replies_are_counted(site: Site, file: Path) -> None:
    with pool(site) as starter:
        client = open_session(starter)
        converse(client)
        wait_for(lambda: samples(file).get(("lmtpd_delivery_seconds_count", "250 2.1.5")) == 3, "three deliveries")
        found = samples(file)
        assert found["lmtpd_refusals_total", "550 5.1.1"] == 1
        assert 0 <= found["lmtpd_delivery_seconds_sum", "250 2.1.5"] < 60
        wait_for(lambda: samples(file).get(("lmtpd_workers", "busy")) == 1, "a busy worker")
        client.close()
        wait_for(lambda: samples(file).get(("lmtpd_workers", "busy")) == 0, "no busy worker")
        assert samples(file)["lmtpd_connections_total", ""] == 1
    assert file.stat().st_mode & 0o777 == 0o644
    assert list(file.parent.iterdir()) == [file]


def test_the_last_counts_are_written_at_the_end(site: Site, file: Path) -> None:
    site.figures = {}
    with pool(site) as starter:
        converse(open_session(starter))
        starter.process.terminate()
        wait_for(lambda: samples(file).get(("lmtpd_delivery_seconds_count", "250 2.1.5")) == 3, "three deliveries")


def test_a_file_that_cannot_be_written_harms_nobody(site: Site, file: Path) -> None:
    site.configure(metrics_path=f"{file.parent}/missing/lmtpd.prom")
    with pool(site) as starter:
        converse(open_session(starter))
        wait_for(lambda: "metrics-not-written" in site.log_text(), "the warning")
        assert site.log_text().count("metrics-not-written") == 1
        converse(open_session(starter))


def test_node_exporter_shows_them(site: Site, file: Path) -> None:
    with pool(site) as starter:
        converse(open_session(starter))
        wait_for(lambda: samples(file).get(("lmtpd_delivery_seconds_count", "250 2.1.5")) == 3, "three deliveries")
    address = f"127.0.0.1:{free_port()}"
    program = unpacked("node-exporter") / "usr/bin/prometheus-node-exporter"
    collector = [
        "--collector.disable-defaults",
        "--collector.textfile",
        f"--collector.textfile.directory={file.parent}",
    ]
    with subprocess.Popen(
        [program, *collector, f"--web.listen-address={address}"], stderr=subprocess.DEVNULL
    ) as exporter:
        try:
            shown = wait_for(lambda: fetched(f"http://{address}/metrics"), "node_exporter").splitlines()
        finally:
            exporter.terminate()
    assert 'lmtpd_delivery_seconds_count{code="250",status="2.1.5"} 3' in shown
    assert 'lmtpd_refusals_total{code="550",status="5.1.1"} 1' in shown
    assert "node_textfile_scrape_error 0" in shown


def fetched(url: str) -> str:
    """What is there; "" while nobody listens."""
    try:
        with urllib.request.urlopen(url, timeout=PATIENCE) as response:
            text: str = response.read().decode()
    except urllib.error.URLError:
        return ""
    return text


def test_a_full_pipe_keeps_nobody_waiting(site: Site, file: Path) -> None:
    """Counts are lost, and no reply: the parent is stopped while more is reported than the pipe holds."""
    site.configure(lmtp_max_idle_commands="0", lmtp_max_bad_commands="0")
    with pool(site) as starter:
        client = open_session(starter)
        wait_for(lambda: samples(file).get(("lmtpd_workers", "busy")) == 1, "a busy worker")
        os.kill(starter.process.pid, signal.SIGSTOP)
        try:
            client.send(b"MAIL FROM:<>\r\n" + b"RCPT TO:<nobody>\r\n" * 8500 + b"NOOP\r\n")
            replies = [client.line() for _ in range(8502)]
        finally:
            os.kill(starter.process.pid, signal.SIGCONT)
        assert replies[-1].startswith(b"250")
        wait_for(lambda: ("lmtpd_refusals_total", "550 5.1.1") in samples(file), "the counts")
        assert 0 < samples(file)["lmtpd_refusals_total", "550 5.1.1"] <= 8500


def test_what_others_have_put_in_the_way_is_removed(site: Site, file: Path) -> None:
    os.mkfifo(f"{file}.new")
    with pool(site) as starter:
        converse(open_session(starter))
        wait_for(lambda: samples(file).get(("lmtpd_delivery_seconds_count", "250 2.1.5")) == 3, "three deliveries")
    assert list(file.parent.iterdir()) == [file]
