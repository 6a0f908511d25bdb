"""Every program that starts lmtpd, the real one, with Postfix's load generator as the client."""

from __future__ import annotations

import grp
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Site
from peers import finish, smtp_source
from starters import USER, Inetd, SocketActivate, Starter, Xinetd

UNITS = Path(__file__).parent.parent / "units"

Start = Callable[[list[str], Path], Starter]

# Each connection is handed over.
PER_CONNECTION: dict[str, Start] = {
    "socket-activate --accept --inetd": lambda command, _: SocketActivate(command, accept=True, inetd=True),
    "socket-activate --accept": lambda command, _: SocketActivate(command, accept=True),
    "socket-activate --accept --inetd, unix": lambda command, folder: SocketActivate(
        command, accept=True, inetd=True, address=str(folder / "lmtp")
    ),
    "inetd nowait": lambda command, _: Inetd(command),
    "inetd nowait, unix": lambda command, folder: Inetd(command, address=str(folder / "lmtp")),
    "inetd nowait, as shipped": lambda command, _: ShippedInetd(command),
    "xinetd nowait": lambda command, _: Xinetd(command),
    "xinetd nowait, as shipped": lambda command, _: ShippedXinetd(command),
}
# The listening socket is.
LISTENING: dict[str, Start] = {
    "socket-activate --inetd": lambda command, _: SocketActivate(command, inetd=True),
    "socket-activate": lambda command, _: SocketActivate(command),
    "socket-activate, unix": lambda command, folder: SocketActivate(command, address=str(folder / "lmtp")),
    "socket-activate, several": lambda command, folder: SocketActivate(
        command, address=str(folder / "lmtp"), more_addresses=(str(folder / "another"),)
    ),
    "inetd wait": lambda command, _: Inetd(command, wait=True),
    "inetd wait, unix": lambda command, folder: Inetd(command, wait=True, address=str(folder / "lmtp")),
    "inetd wait, as shipped": lambda command, _: ShippedInetd(command, wait=True),
    "xinetd wait": lambda command, _: Xinetd(command, wait=True),
    "xinetd wait, as shipped": lambda command, _: ShippedXinetd(command, wait=True),
}


class ShippedInetd(Inetd):
    """inetd with the line for `wait` or `nowait` from units/, at another port, user and path."""

    def command_line(self) -> list[str]:
        program, *arguments = self._command
        style = "wait." if self._wait else "nowait."
        (line,) = [line.lstrip("#").split("\t") for line in (UNITS / "inetd.conf").open() if f"\t{style}" in line]
        line[0], line[4], line[5] = f"127.0.0.1:{self.address}", USER, program
        line[6] = " ".join([line[6].strip(), *arguments])
        conf = self.folder / "inetd.conf"
        conf.write_text("\t".join(line) + "\n")
        return ["inetd", "-i", str(conf)]


class ShippedXinetd(Xinetd):
    """xinetd with the entry from units/, at another port, user and path."""

    def command_line(self) -> list[str]:
        command = super().command_line()
        program, *arguments = self._command
        changes = {
            "port": str(self.address),
            "user": USER,
            "group": grp.getgrgid(os.getegid()).gr_name,
            "server": f"{program}\n\tserver_args = {' '.join(arguments)}",
            "wait": "yes" if self._wait else "no",
        }
        entry = (UNITS / "xinetd").read_text()
        for name, value in changes.items():
            entry = re.sub(rf"^\t{name}\t+= .*$", f"\t{name} = {value}", entry, count=1, flags=re.MULTILINE)
        (self.folder / "xinetd.conf").write_text(entry)
        return command


def deliver_with(start: Start, site: Site, folder: Path) -> None:
    # On TCP only -a makes smtp-source trusted, which can't authenticate.
    with start(site.command("-a"), folder) as starter:
        # A connection for each message, four at once; then one connection for all.
        for options in (["-s", "4", "-m", "20"], ["-d", "-m", "10"]):
            finish(smtp_source(starter.place, *options))
    assert len(site.messages("jane")) == 30
    assert not site.files("jane", kind="tmp")


@pytest.mark.parametrize("way", PER_CONNECTION)
def test_per_connection(site: Site, tmp_path: Path, way: str) -> None:
    deliver_with(PER_CONNECTION[way], site, tmp_path)


@pytest.mark.parametrize("way", LISTENING)
def test_listening(site: Site, tmp_path: Path, way: str) -> None:
    deliver_with(LISTENING[way], site, tmp_path)
