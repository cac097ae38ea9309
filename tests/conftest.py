from __future__ import annotations

import gc

import pytest
from examples import FAST
from hypothesis import settings

# What they assert is to be explained as in a test.
pytest.register_assert_rewrite("harness", "kube")

pytest_plugins = ["kube.fixtures", "oidc"]

settings.register_profile(FAST, derandomize=True, deadline=None, max_examples=20)


def pytest_collection_finish() -> None:
    """Spare the garbage collector the modules and tests: they stay, and each run would look at them."""
    gc.collect()
    gc.freeze()
