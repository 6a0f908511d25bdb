"""Inputs that fuzzing has found keep to the rules. How they are made is in faults/README.md."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import lmtpd

sys.path.append(str(Path(__file__).parent / "faults"))

from fuzz import CORPUS, TARGETS, corpus_of, target_of

if TYPE_CHECKING:
    from fuzz_target import Target

INPUTS = [(name, file) for name in TARGETS for file in corpus_of(name)]
FILES_LIMIT, SIZE_LIMIT = 120, 200_000  # of the whole corpus; bytes
MAIL = b"Subject: a\n\n" + b"b\n" * 20
SESSION = b"0@MAIL FROM:<>\r\nRCPT TO:<jane>\r\nDATA\r\n" + MAIL.replace(b"\n", b"\r\n") + b".\r\n"
SCRIPT = b'0\nrequire "vacation"; vacation :subject "a${unicode:0a}b" "c";\n%%\nTo: jane@example.com\n\n'


class Targets:
    """The targets by their names. Each is made when it is needed, and lasts until another one is: both change lmtpd."""

    def __init__(self) -> None:
        self._present: Target | None = None

    def run(self, name: str, octets: bytes) -> None:
        if not self._present or self._present.name != name:
            self.close()
            self._present = target_of(name)
        self._present(octets)

    def close(self) -> None:
        if self._present:
            self._present.close()
            self._present = None


@pytest.fixture(scope="module")
def targets() -> Iterator[Targets]:
    targets = Targets()
    yield targets
    targets.close()


@pytest.mark.parametrize(("name", "file"), INPUTS, ids=[f"{name}-{file.name}" for name, file in INPUTS])
def test_input(targets: Targets, name: str, file: Path) -> None:
    targets.run(name, file.read_bytes())


def test_the_corpus_is_small() -> None:
    files = [path for path in CORPUS.rglob("*") if path.is_file()]
    assert {path.parent.name for path in files} == set(TARGETS)
    assert len(files) <= FILES_LIMIT
    assert sum(path.stat().st_size for path in files) <= SIZE_LIMIT


def without_last_octet(function: Callable[..., bytes]) -> Callable[..., bytes]:
    return lambda *arguments: function(*arguments)[:-1]


# Changes of lmtpd, and an input that a target must then refuse.
CHANGES = [
    ("session", "with_lf", without_last_octet(lmtpd.with_lf), SESSION),
    ("sieve", "folded_field", lambda name, value: f"{name}: {value}\nX-Injected: a\n".encode(), SCRIPT),
    ("mail", "html_to_text", lambda markup: markup * 2, b"Content-Type: text/html\n\n<p>a</p>\n"),
    ("mail", "NOT_IN_FIELDS", {}, b"Subject: a\rb\n\n"),
    ("files", "from_modified_utf7", str, "folder\nü".encode()),
    ("sql", "ServerRecords._recorded", lambda _, keys: keys, b"0\n1\n2\nT\nD1\nC\nZ\n1\n2\nn\nC\n1\n2\nT\nC\nZT\n"),
]


@pytest.mark.parametrize(("target", "name", "change", "octets"), CHANGES, ids=[f"{row[0]}-{row[1]}" for row in CHANGES])
def test_a_fault_is_found(
    targets: Targets, target: str, name: str, change: object, octets: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets.run(target, octets)
    monkeypatch.setattr(f"lmtpd.{name}", change)
    with pytest.raises(AssertionError):
        targets.run(target, octets)
