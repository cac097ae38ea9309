from __future__ import annotations

import pytest

# What they assert is to be explained as in a test.
pytest.register_assert_rewrite("harness", "kube")

pytest_plugins = ["kube.fixtures"]
