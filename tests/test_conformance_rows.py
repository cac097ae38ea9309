"""Each row of the list of behaviours that this step has to show is named by a test: rendering (C), OCM (D), Helm (I)."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent
PLACES = ("addon/test_*.py", "kube/test_*.py", "programs/test_hub_chart.py")
LAST = {"C": 18, "D": 12, "I": 7}


def test_every_row_is_named_by_a_test() -> None:
    rows = {f"{group}{number}" for group, last in LAST.items() for number in range(1, last + 1)}
    text = "".join(path.read_text() for place in PLACES for path in sorted(TESTS.glob(place)))
    # In a comment, a docstring, or the name of a test.
    named = {row.upper() for row in re.findall(r"(?:\b|(?<=test_))([CDIcdi][0-9]{1,2})(?=\b|_)", text)}  # fmt: skip
    assert rows <= named, f"no test says that it shows {sorted(rows - named)}"
