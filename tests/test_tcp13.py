"""The README's recipe for TCP on Debian 13, which changes a machine: so it has one of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from container import DEBIAN_13, OWN

if OWN != DEBIAN_13:  # else they run on it anyway
    from test_clients import TestReadme, on_tcp, tcp_machine  # noqa: F401


@pytest.fixture(scope="module")
def base() -> Path:
    return DEBIAN_13
