"""Sieve as Pigeonhole has it, on scripts and messages that nobody has thought of.

It goes on for so many seconds, with new ones all the time: tests/run --fuzz-seconds 600 -k sieve_generated
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from sieve_cases import Case
from sieve_grammar import cases
from sieve_peers import Peers, both_sides, shown

# What a run of all tests asks for: the examples that are always the same.
USUAL_SECONDS = 15


@pytest.fixture(scope="module")
def peers() -> Iterator[Peers]:
    with both_sides() as peers:
        yield peers


def compare(peers: Peers, case: Case) -> None:
    ours, theirs, said = peers.outcomes(case)
    assert ours == theirs, shown(case, ours, theirs, said)


def test_generated_scripts(peers: Peers, pytestconfig: pytest.Config) -> None:
    """The same ones in each run; then new ones, if more time is asked for."""
    common = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))

    @settings(common, max_examples=150, derandomize=True)
    @given(cases())
    def run(case: Case) -> None:
        compare(peers, case)

    @settings(common, max_examples=1000)
    @given(cases())
    def run_more(case: Case) -> None:
        if time.monotonic() < end:
            compare(peers, case)

    run()
    seconds: float = pytestconfig.getoption("fuzz_seconds")
    end = time.monotonic() + seconds
    while seconds > USUAL_SECONDS and time.monotonic() < end:
        run_more()
