from __future__ import annotations

from collections.abc import Iterator

import pytest
from harness import Site


@pytest.fixture
def site() -> Iterator[Site]:
    """A scratch site with one user, jane."""
    site = Site()
    site.add_user("jane")
    yield site
    site.close()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A test that did not run is a test that failed: there is no reason here that excuses it."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
