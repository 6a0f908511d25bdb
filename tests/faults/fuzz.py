#!/usr/bin/env python3
"""Feeds lmtpd with octets that others could send or write, guided by the code that they reach.

Usage:
  fuzz.py [options] TARGET
  fuzz.py --run TARGET FILE...
  fuzz.py --lines TARGET FOLDER...
  fuzz.py --minimize TARGET FOLDER...
  fuzz.py --help

Options:
  --seconds N     How long it goes on [default: 60].
  --folder DIR    Where inputs that reach new code are kept, and those that break a rule [default: /tmp/lmtpd-fuzz].
  --size N        The most octets of an input [default: 4096].
  --run           Only run these inputs.
  --lines         Count the lines of lmtpd.py that the inputs in these folders reach.
  --minimize      Make the corpus of the target anew, of inputs in these folders: a few that reach most.
  --help          Show this text.

Targets: session, sieve, mail, files, sql. It needs root, and atheris: .venv/bin/python -m pip install atheris
An input that breaks a rule is kept in DIR/TARGET/faults, one for each place in the code, with its traceback.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import os
import re
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

from docopt import docopt

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

if TYPE_CHECKING:
    from fuzz_target import Target

CORPUS = Path(__file__).parent / "corpus"
# The module and the class of each target. They are imported late, for lmtpd must be imported by atheris.
TARGETS = {
    "session": ("fuzz_sessions", "Sessions"),
    "sieve": ("fuzz_scripts", "Scripts"),
    "mail": ("fuzz_mails", "Mails"),
    "files": ("fuzz_files", "Files"),
    "sql": ("fuzz_sql", "Answers"),
}
FAULT = "fault-"  # begins the names of inputs that have found a fault, and stay
FILES_LIMIT = 25  # of the corpus of a target
SIZE_OF_NAME = 1000  # octets that a file costs besides its own
CPU_LIMIT = 10.0  # seconds of CPU time for an input, while the code is traced


def target_of(name: str) -> Target:
    """The target of that name."""
    module, kind = TARGETS[name]
    target: Target = getattr(importlib.import_module(module), kind)()
    return target


def corpus_of(name: str) -> list[Path]:
    """The files of a target's corpus."""
    return sorted((CORPUS / name).iterdir())


class Faults:
    """The inputs that have broken a rule, one for each place in the code."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = self.runs = 0
        self.slowest = 0.0
        folder.mkdir(parents=True, exist_ok=True)

    def run(self, target: Target, data: bytes) -> None:
        """Runs an input, and keeps it if it breaks a rule."""
        self.runs += 1
        before = time.process_time()
        try:
            target(data)
            seconds = time.process_time() - before
            if seconds > self.slowest:
                self.slowest = seconds
                (self.folder.parent / "slowest").write_bytes(data)
            assert seconds < CPU_LIMIT, f"took {seconds:.1f} s"
        except Exception as error:
            self.count += 1
            self._keep(data, error)

    def _keep(self, data: bytes, error: Exception) -> None:
        frames = traceback.extract_tb(error.__traceback__)
        logged = re.findall(r"line (\d+), in \w+", str(error))[-2:]  # of a traceback in the log
        place = " ".join([f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[-4:]] + logged)
        name = hashlib.sha1(f"{type(error).__name__} {place}".encode()).hexdigest()[:8]
        kept = self.folder / name
        if not kept.exists() or kept.stat().st_size > len(data):
            kept.write_bytes(data)
            kept.with_suffix(".txt").write_text("".join(traceback.format_exception(error)))
            print(f"fault {name}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr, flush=True)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def quoted(word: bytes) -> str:
    """A word as the dictionaries of libFuzzer have it."""
    return '"' + "".join(f"\\x{octet:02x}" for octet in word) + '"\n'


def fuzz(name: str, seconds: int, size: int, folder: Path) -> int:
    """Fuzzes one target; never returns, for atheris ends the process."""
    try:
        import atheris
    except ImportError:
        print("atheris is missing: .venv/bin/python -m pip install atheris", file=sys.stderr)
        return 69
    with atheris.instrument_imports(include=["lmtpd"], enable_loader_override=False):
        import lmtpd  # noqa: F401
    from fuzz_target import Mutator

    found = folder / name / "corpus"
    found.mkdir(parents=True, exist_ok=True)
    target = target_of(name)
    faults, mutator = Faults(folder / name / "faults"), Mutator(target)
    for data in target.seeds():
        (found / hashlib.sha1(data).hexdigest()).write_bytes(data)
    words = folder / name / "words"
    words.write_text("".join(map(quoted, target.words())))

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        return mutator.change(data, seed)[:most] if seed % 2 else bytes(atheris.Mutate(data, most))

    start, descriptors = time.monotonic(), open_descriptors()

    def report() -> None:
        print(
            f"{name}: {faults.runs} runs, {faults.count} faults, {time.monotonic() - start:.0f} s, "
            f"{time.process_time():.0f} s of CPU time, slowest {faults.slowest:.2f} s, "
            f"descriptors {descriptors} to {open_descriptors()}",
            file=sys.stderr,
            flush=True,
        )

    def one(data: bytes) -> None:
        faults.run(target, data)
        if time.monotonic() - start > seconds:
            report()
            with contextlib.suppress(Exception):
                target.close()
            os._exit(0)

    options = [f"-dict={words}", f"-max_len={size}", "-timeout=60", "-rss_limit_mb=4096", "-print_final_stats=1"]
    atheris.Setup(
        [sys.argv[0], *options, f"-artifact_prefix={folder}/{name}/", str(found), *existing(name)],
        one,
        custom_mutator=mutate,
    )
    atheris.Fuzz()
    return 0


def existing(name: str) -> list[str]:
    return [str(CORPUS / name)] if (CORPUS / name).is_dir() else []


# What inputs reach


def steps_of(target: Target, data: bytes) -> set[tuple[int, int]]:
    """The steps from one line of lmtpd.py to another that an input makes."""
    import lmtpd

    steps: set[tuple[int, int]] = set()

    def trace(frame: FrameType, _event: str, _argument: object) -> Any:
        if frame.f_code.co_filename != lmtpd.__file__:
            return None
        before = frame.f_code.co_firstlineno

        def trace_line(frame: FrameType, event: str, _argument: object) -> Any:
            nonlocal before
            if event == "line":
                steps.add((before, frame.f_lineno))
                before = frame.f_lineno
            return trace_line

        return trace_line

    sys.settrace(trace)
    try:
        target(data)
    finally:
        sys.settrace(None)
    return steps


def lines_of(code: CodeType) -> set[int]:
    """The lines of all functions in some code."""
    found: set[int] = set()
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found |= lines_of(constant)
            if constant.co_flags & inspect.CO_OPTIMIZED:  # else the body of a class
                found |= {line for _, _, line in constant.co_lines() if line and line != constant.co_firstlineno}
    return found


def all_steps(target: Target, files: Sequence[Path]) -> dict[Path, set[tuple[int, int]]]:
    """The steps that each file makes; those that break a rule are left out."""
    found = {}
    for file in files:
        data = file.read_bytes()
        try:
            target(data)  # what happens only once does not count
            found[file] = steps_of(target, data)
        except Exception as error:
            print(f"{file}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
    return found


def show_lines(target: Target, files: Sequence[Path]) -> int:
    """Prints how many lines of lmtpd.py the inputs reach, of all lines in functions."""
    import lmtpd

    found = all_steps(target, files).values()
    reached = {line for steps in found for step in steps for line in step}
    lines = lines_of(compile(Path(lmtpd.__file__).read_bytes(), lmtpd.__file__, "exec"))
    steps = len(set().union(*found))
    print(f"{target.name}: {len(files)} inputs reach {len(reached & lines)} of {len(lines)} lines in {steps} steps")
    return 0


def minimize(target: Target, files: Sequence[Path]) -> int:
    """Writes the corpus of a target: the inputs that reach most for their size, until all is reached or it is full."""
    folder = CORPUS / target.name
    folder.mkdir(parents=True, exist_ok=True)
    found = all_steps(target, files)
    wanted = set().union(*found.values())
    left, chosen = set(wanted), list[bytes]()
    while left and len(chosen) < FILES_LIMIT:
        best = max(found, key=lambda file: len(found[file] & left) / (SIZE_OF_NAME + file.stat().st_size))
        if not found[best] & left:
            break
        left -= found[best]
        chosen.append(best.read_bytes())
    for old in folder.iterdir():
        if not old.name.startswith(FAULT):
            old.unlink()
    for data in chosen:
        (folder / hashlib.sha256(data).hexdigest()[:12]).write_bytes(data)
    size = sum(map(len, chosen))
    print(
        f"{target.name}: {len(chosen)} of {len(files)} inputs with {size} bytes make {len(wanted - left)} of"
        f" {len(wanted)} steps"
    )
    return 0


def main() -> int:
    options = docopt(__doc__)
    name = options["TARGET"]
    if name not in TARGETS:
        print(f"there is no target {name}", file=sys.stderr)
        return 64
    if options["--run"]:
        with target_of(name) as target:
            for file in options["FILE"]:
                target(Path(file).read_bytes())
        return 0
    inputs = [file for folder in options["FOLDER"] for file in sorted(Path(folder).iterdir())]
    if options["--lines"] or options["--minimize"]:
        with target_of(name) as target:
            return (show_lines if options["--lines"] else minimize)(target, inputs)
    return fuzz(name, int(options["--seconds"]), int(options["--size"]), Path(options["--folder"]))


if __name__ == "__main__":
    sys.exit(main())
