from __future__ import annotations

import gc
import signal

import pytest
from examples import FAST
from hypothesis import HealthCheck, settings

# What they assert is to be explained as in a test.
pytest.register_assert_rewrite("harness", "kube")

pytest_plugins = ["kube.fixtures", "oidc"]

# Programs end by it as from a terminal; a shell that runs the tests in the background has all of them ignore it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes is the machine's business, and `make bench`'s.
settings.register_profile("whole", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("whole")
settings.register_profile(FAST, settings.get_profile("whole"), derandomize=True, max_examples=20)


def pytest_collection_finish() -> None:
    """Spare the garbage collector the modules and tests: they stay, and each run would look at them."""
    gc.collect()
    gc.freeze()
