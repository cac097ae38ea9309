from __future__ import annotations

import pytest

# What it asserts is to be explained as in a test.
pytest.register_assert_rewrite("harness")
