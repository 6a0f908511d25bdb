from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from container import DEBIAN_13, OWN, Machine, make_installation
from file_systems import mounted, unmount_all
from harness import Site
from hypothesis import HealthCheck, settings
from recipes import make_site
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

# The tests wait more than they compute.
WORKERS_FOR_A_PROCESSOR = 3
# The files that take longest, the longest first.
LONGEST = (
    "install",
    "queue_run",
    "users",
    "faults",
    "shared_store",
    "sql",
    "systemd",
    "dovecot24",
    "site",
    "recipes",
    "differential",
    "auth",
    "service",
    "master",
    "mime",
    "duplicates",
    "several_machines",
    "from_cyrus",
    "quota",
    "hostile",
    "managesieve",
    "clients",
    "tls",
    "debian13",
    "sieve_limits",
)
# The name, in the environment, of a folder that this process and the workers, which run the tests, have in common. It
# is in memory: trusted attributes, which a machine's layers need, are not to be had everywhere.
SHARED = "LMTPD_TEST_SHARED"

# What is found must not depend on how fast it is looked for.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


@pytest.fixture
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    """A scratch site with one user, jane. Its parameter is the type of the file system, see mounted()."""
    file_system: str = getattr(request, "param", "")
    site = Site(str(mounted(file_system, Path(os.environ[SHARED]))) if file_system else "")
    site.has_unnamed_drafts = file_system in ("ext4", "xfs")
    site.add_user("jane")
    yield site
    site.close()


@pytest.fixture(scope="module")
def base() -> Path:
    """The Debian root of which the module's machines are copies."""
    return OWN


def layer_of(base: Path, name: str, make: Callable[[Path, Path], None]) -> Path:
    """A layer above that root, made by the worker that comes first."""
    layer = Path(os.environ[SHARED], f"{base.name}-{name}")
    with layer.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not layer.exists():
            make(base, layer)
    return layer


@pytest.fixture(scope="module")
def installation(base: Path) -> Path:
    """The layer of machines that have lmtpd and Postfix."""
    return layer_of(base, "installation", make_installation)


@pytest.fixture(scope="module")
def whole_site(base: Path) -> Path:
    """The layer of machines on which the README's eight commands have been run."""
    return layer_of(base, "site", make_site)


@pytest.fixture(scope="module")
def installed(base: Path, installation: Path) -> Iterator[Machine]:
    """A machine of the module's own with lmtpd.socket enabled and Postfix in front of it."""
    machine = Machine(base, installation)
    yield machine
    machine.close()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-seconds", type=float, default=15, help="how long sessions are mutated (default: 15)")


def pytest_configure(config: pytest.Config) -> None:
    if SHARED not in os.environ:
        os.environ[SHARED] = tempfile.mkdtemp(prefix="lmtpd-test-", dir="/dev/shm")
        Path(os.environ[SHARED]).chmod(0o755)
        config.add_cleanup(remove_shared)


def remove_shared() -> None:
    """Removes the folder that the workers have in common, and what is mounted in it."""
    shared = Path(os.environ.pop(SHARED))
    unmount_all(shared)
    shutil.rmtree(shared)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """How many workers "-n auto" means; none for a few tests, which would wait for them, nor for a debugger."""
    if config.option.keyword or config.option.usepdb:
        return 0
    workers = WORKERS_FOR_A_PROCESSOR * len(os.sched_getaffinity(0))
    paths = {argument.partition("::")[0] for argument in config.args}
    if all(map(os.path.isfile, paths)):
        workers = min(workers, len(paths))
    return workers if workers > 1 else 0


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadFileScheduling:
    """A worker runs all tests of a file; where these are for machines of two Debians, all tests for one of them."""
    scheduler = LoadFileScheduling(config, log)
    root = re.compile(rf"\[(?:{OWN.name}|{DEBIAN_13.name})\b")
    scheduler._split_scope = lambda nodeid: (nodeid.partition("::")[0], *root.findall(nodeid))
    return scheduler


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first, so that no worker is left with one when the others have nothing to do any more."""
    order = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A test that did not run is a test that failed: there is no reason here that excuses it."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
