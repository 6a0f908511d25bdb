"""The README's recipes, as an administrator follows them: pasted as they are into a shell on a machine."""

from __future__ import annotations

import os
import pty
import re
import select
import termios
import time
from pathlib import Path
from typing import NamedTuple

from container import Machine, copy_source, readme_blocks

PATIENCE = 300.0
TRACES = "/run/pasted"
PACKAGE = re.compile(r"[a-z0-9][-+.a-z0-9]+")
START, END = "\a>\a", "\a<\a"
# Bash runs the traps for each command that is pasted, but not for those inside $( ). PS0 is shown before the first one
# runs, and PROMPT_COMMAND after the last one.
RC = f"""\
unset HISTFILE
shopt -u checkwinsize
PS0='{START}'
PROMPT_COMMAND='printf "{END}"'
trap 'printf "%s\\n" "$BASH_COMMAND" >>{TRACES}/failed' ERR
trap '[[ $BASH_COMMAND == "$PROMPT_COMMAND" ]] || printf "%s\\0" "$BASH_COMMAND" >>{TRACES}/commands' DEBUG
"""


class Pasted(NamedTuple):
    """What came of a block."""

    output: str
    commands: list[str]


def paste(machine: Machine, block: str, *typed: str, folder: str = "/") -> Pasted:
    """Pastes a block of commands into an interactive shell of root's in that folder.

    typed: the answers to what the commands ask. A command that fails is the test's failure.
    """
    machine.shell(f"rm -rf {TRACES}\ninstall -d {TRACES}\ncat >{TRACES}/rc <<'END OF RC'\n{RC}END OF RC\n")
    ours, theirs = pty.openpty()
    try:
        shell = machine.start(
            *("env", f"--chdir={folder}", "TERM=xterm", "setsid", "--wait", "--ctty"),
            *("bash", "--rcfile", f"{TRACES}/rc", "-i"),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        try:
            output = _dialogue(ours, block, list(typed))
        finally:
            shell.kill()
            shell.wait()
    finally:
        os.close(ours)
    traces = machine.root / TRACES.lstrip("/")
    failed = (traces / "failed").read_text() if (traces / "failed").exists() else ""
    assert not failed, f"failed: {failed}\n{output}"
    return Pasted(output, (traces / "commands").read_text().split("\0")[:-1])


def _dialogue(terminal: int, block: str, typed: list[str]) -> str:
    """Pastes as terminals do, in brackets, and types the answers; what is shown until the next prompt."""
    shown = ""
    answered = 0
    deadline = time.monotonic() + PATIENCE
    while shown.count(END) < 2:
        assert time.monotonic() < deadline, f"the shell waits:\n{shown}"
        if select.select([terminal], [], [], 0.1)[0]:
            had_prompt = END in shown
            shown += os.read(terminal, 65536).decode(errors="replace")
            if END in shown and not had_prompt:
                os.write(terminal, f"\033[200~{block}\033[201~\r".encode())
        # A program throws away what is typed before it has switched the echo off.
        asked = len(re.findall("(?i)password: ", shown.rpartition(START)[2])) if START in shown else 0
        if answered < min(asked, len(typed)) and not termios.tcgetattr(terminal)[3] & termios.ECHO:
            os.write(terminal, f"{typed[answered]}\r".encode())
            answered += 1
    assert answered == len(typed), f"nobody asked for {typed[answered:]}:\n{shown}"
    output = shown.split(END)[1].partition(START)[2].replace(START, "").replace("\r\n", "\n")
    return re.sub("\033\\[\\?2004[hl]\r?", "", output)


def offline(machine: Machine, block: str) -> str:
    """The block with the packages that it gets from Debian at hand: no network is in the machine."""

    def install(match: re.Match[str]) -> str:
        files = _files(machine, match[1].split())
        return f"dpkg --install {' '.join(files)}\n" if files else ""

    return re.sub(r"^apt-get install -y (.*)\n", install, block, flags=re.MULTILINE)


def _files(machine: Machine, packages: list[str]) -> list[str]:
    """The files of packages and of those that they depend on, as far as the machine has them to be installed."""
    listed = machine.shell(r"""
for file in /opt/packages/*.deb; do
    dpkg-deb --show --showformat="$file\t\${Package}, \${Provides}\t\${Pre-Depends}, \${Depends}\n" "$file"
done
""")
    lines = [line.split("\t") for line in listed.splitlines()]
    found: list[str] = []
    wanted = list(packages)
    for package in wanted:
        for file, names, depends in lines:
            if package in re.findall(PACKAGE, names) and file not in found:
                found.append(file)
                wanted += re.findall(PACKAGE, depends)
    return sorted(found)


def make_site(base: Path, layer: Path) -> None:
    """Makes a layer for machines of that base: all that the README's eight commands change in a fresh one."""
    [block] = readme_blocks("## A whole site in eight commands")
    unfinished = layer.with_suffix(".unfinished")
    unfinished.mkdir()
    machine = Machine(base, kept=unfinished)
    try:
        copy_source(machine)
        # As the packages leave it when they are installed with a network at hand.
        machine.shell("""
systemctl enable dovecot.service
echo mail.example.com >/etc/mailname
postconf -e myorigin=/etc/mailname
""")
        done = paste(machine, offline(machine, block), folder="/root/lmtpd")
        (machine.root / "root/commands").write_text("\0".join(done.commands))
    finally:
        machine.close()
    unfinished.rename(layer)
