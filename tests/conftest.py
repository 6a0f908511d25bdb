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
