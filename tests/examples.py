"""How many examples a property is tried with."""

from __future__ import annotations

from typing import Final

from hypothesis import settings

#: The profile of ``make test-fast`` (``--hypothesis-profile``); it is registered in conftest.py.
FAST: Final = "fast"

_FEWER: Final = 5


def examples(number: int) -> int:
    """Return *number*, or a fifth of it in ``make test-fast``; called when a module is imported."""
    return -(-number // _FEWER) if settings.get_current_profile_name() == FAST else number
