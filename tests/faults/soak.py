#!/usr/bin/env python3
"""Delivers very many messages through one pool, and looks whether its processes grow.

Usage:
  soak.py [options]
  soak.py --help

Options:
  --messages N     How many messages are delivered [default: 1000000].
  --connections N  On how many connections at once [default: 10].
  --reconnect      A connection for each message.
  --help           Show this text.

Prints a row now and then: the memory that each process has written to (Anonymous, in KiB) and its open descriptors, for
the parent and for the largest worker. What a worker has from its parent counts in both. The exit status is 1 if a
message is missing. It needs Postfix's smtp-source.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from docopt import docopt

sys.path.append(str(Path(__file__).parent.parent))

from harness import Site
from peers import program
from starters import SocketActivate

MESSAGES_AT_ONCE = 10_000  # the store is emptied after so many
ROWS_PER_DECADE = (1, 2, 5)


class Size(NamedTuple):
    """memory: in KiB, without what is from files. It does not depend on how many processes share it."""

    memory: int
    descriptors: int


def size_of(process: int) -> Size:
    """The size of a process. Source: proc(5), smaps_rollup."""
    rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
    found = re.search(r"^Anonymous:\s+(\d+)", rollup, re.MULTILINE)
    assert found
    return Size(int(found[1]), len(list(Path(f"/proc/{process}/fd").iterdir())))


def children_of(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def arrived(site: Site) -> list[Path]:
    return list((site.spool / "jane/new").iterdir())


def deliver(starter: SocketActivate, messages: int, connections: int, reconnect: bool) -> None:
    """Delivers so many messages. smtp-source gives each a Message-ID of its own."""
    kept_open = [] if reconnect else ["-d"]
    numbers = ["-m", str(messages), "-s", str(connections), "-l", "2000"]
    command = [program("smtp-source"), "-L", *kept_open, *numbers, "-f", "sender@example.com", "-t", "jane"]
    subprocess.run([*command, f"unix:{starter.address}"], check=True)


def soak(messages: int, connections: int, reconnect: bool) -> int:
    """Prints the rows; how many messages are missing."""
    site = Site(lmtp_prefork=str(connections), duplicatesuppression="yes")
    site.add_user("jane")
    missing = delivered = 0
    rows = {digit * 10**power for digit in ROWS_PER_DECADE for power in range(4, 9)} | {messages}
    start = time.monotonic()
    print(f"{'messages':>10} {'a second':>9} {'parent':>15} {'largest worker':>17} {'deliver.db':>11}")
    try:
        with SocketActivate(site.command(), address=str(site.root / "lmtp")) as starter:
            while delivered < messages:
                now = min(MESSAGES_AT_ONCE, messages - delivered)
                deliver(starter, now, connections, reconnect)
                delivered += now
                files = arrived(site)
                missing += now - len(files)
                for file in files:
                    file.unlink()
                if delivered in rows:
                    parent = starter.process.pid
                    workers = [size_of(worker) for worker in children_of(parent)]
                    sizes = [f"{size.memory:,} KiB {size.descriptors:>3}" for size in (size_of(parent), max(workers))]
                    database = (site.configdirectory / "deliver.db").stat().st_size >> 20
                    rate = delivered / (time.monotonic() - start)
                    print(
                        f"{delivered:>10,} {rate:>9,.0f} {sizes[0]:>15} {sizes[1]:>17} {database:>7,} MiB", flush=True
                    )
    finally:
        site.close()
    print(f"missing: {missing}")
    return missing


if __name__ == "__main__":
    options = docopt(__doc__)
    sys.exit(bool(soak(int(options["--messages"]), int(options["--connections"]), options["--reconnect"])))
