"""The units on a machine of Debian 13."""

from __future__ import annotations

from pathlib import Path

import pytest
from container import DEBIAN_13, OWN

if OWN != DEBIAN_13:  # else they run on it anyway
    from test_systemd import (  # noqa: F401
        machine,
        pool,
        test_a_broken_configuration_is_a_failed_unit_until_it_is_mended,
        test_each_weakness_of_the_sandbox_is_explained,
        test_exposure_is_at_most_1_5,
        test_mail_in_another_folder,
        test_mail_through_postfix,
        test_nobody_but_postfix_may_connect,
        test_pool_a_broken_configuration_is_a_failed_unit_until_it_is_mended,
        test_pool_mail_in_another_folder,
        test_pool_mail_through_postfix,
        test_pool_stop_lets_the_message_in_hand_be_finished,
        test_tcp_with_the_drop_in,
        test_the_command_starts_cheaply,
        test_the_sandbox_is_in_force,
        test_verify_is_silent,
    )


@pytest.fixture(scope="module")
def base() -> Path:
    return DEBIAN_13
