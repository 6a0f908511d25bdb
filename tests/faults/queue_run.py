#!/usr/bin/env python3
"""Has a real Postfix deliver a queue of messages through lmtpd's pool, while much goes wrong; then looks for each one.

Usage:
  queue_run.py [options]
  queue_run.py --help

Options:
  --messages N    How many messages [default: 10000].
  --rounds N      How often each outage comes [default: 6].
  --seed N        Decides which faults come when; printed, and by default another one each time.
  --short         Outages of a second, and short waits in lmtpd.
  --log FILE      Where to write the faults, and the logs of lmtpd, Postfix and Dovecot.
  --help          Show this text.

Prints a table, and its first violations on standard error; the exit status is 1 if there are any. It needs root, and
leaves nothing behind, even if it is killed: all is in a mount and a process namespace of its own.
"""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path

from docopt import docopt

sys.path.append(str(Path(__file__).parent.parent))

from power_loss import INSIDE, confine, enter
from queue_check import Verdict
from queue_faults import Faults
from queue_site import QueueSite, letter

VIOLATIONS_SHOWN = 20
PATIENCE = 600  # seconds after the last fault until the queue must be empty
RETRY = 2.0  # seconds after which Postfix is told to try again all it has


def deliver(site: QueueSite, faults: Faults, count: int, rounds: int) -> None:
    """Half of the messages are in the queue when it begins; the others come with the outages."""
    letters = [letter(number) for number in range(count)]
    site.send(letters[: count // 2])
    site.begin()
    faults.run(rounds, letters[count // 2 :])
    end = time.monotonic() + PATIENCE
    while site.postfix.messages() and time.monotonic() < end:
        site.flush()
        time.sleep(RETRY)


def main() -> int:
    arguments = docopt(__doc__)
    if INSIDE not in os.environ:
        return confine()
    folder = enter()
    place = folder / "disk"
    place.mkdir()
    count, is_short = int(arguments["--messages"]), arguments["--short"]
    seed = int(arguments["--seed"] or random.SystemRandom().randrange(1 << 32))
    print(f"seed {seed}", flush=True)
    site = QueueSite(place, is_short)
    faults = Faults(site, seed, 0.5 if is_short else 3)
    started = time.monotonic()
    deliver(site, faults, count, int(arguments["--rounds"]))
    seconds = time.monotonic() - started
    left = site.finish()
    if arguments["--log"]:
        happened = "".join(f"{fault}\n" for fault in faults.happened)
        Path(arguments["--log"]).write_text(
            happened + site.log_text() + site.postfix.log.read_text() + site.users.log.read_text()
        )
    verdict = Verdict(site, faults.happened, count, left)
    verdict.print_table(seconds)
    for violation in verdict.violations[:VIOLATIONS_SHOWN]:
        print(violation, file=sys.stderr)
    site.close()
    return 1 if verdict.violations else 0


if __name__ == "__main__":
    sys.exit(main())
