"""lmtpd with other figures than its own, for tests that would have to wait for too long.

    impatient.py GRACE=2 BACKOFF=0.5 -- -C imapd.conf

sets these constants of the module, and goes on as the command lmtpd does with the arguments after the dashes.
"""

from __future__ import annotations

import sys

import lmtpd


def change(setting: str) -> None:
    """Sets NAME=VALUE; ends the process if lmtpd has no such number."""
    name, _, value = setting.partition("=")
    before = getattr(lmtpd, name, None)
    if not isinstance(before, (int, float)):
        sys.exit(f"lmtpd has no number {name}")
    setattr(lmtpd, name, type(before)(value))


if __name__ == "__main__":
    end = sys.argv.index("--")
    for setting in sys.argv[1:end]:
        change(setting)
    del sys.argv[1 : end + 1]
    lmtpd.command()
