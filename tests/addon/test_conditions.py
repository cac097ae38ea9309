from __future__ import annotations

import copy
import re
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clusterproxy.addon.conditions import merge_conditions

NOW = datetime(2026, 11, 26, 6, 0, 0, 999_999, tzinfo=UTC)
OURS = {"type": "Ours", "status": "True", "reason": "Good", "message": "all is well"}
OTHERS = {
    "type": "Others",
    "status": "False",
    "reason": "Theirs",
    "message": "",
    "lastTransitionTime": "2020-01-01T00:00:00Z",
}


def merged(present: object, *wanted: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    return merge_conditions(present, wanted, now=NOW, generation=4, **options)


def test_a_new_condition_begins_now() -> None:
    assert merged(None, OURS) == [
        {**OURS, "lastTransitionTime": "2026-11-26T06:00:00Z", "observedGeneration": 4}
    ]


def test_others_stay_where_and_as_they_are() -> None:
    present = [
        OTHERS,
        {**OURS, "status": "False", "lastTransitionTime": "2020-01-01T00:00:00Z"},
        {},
        5,
    ]
    before = copy.deepcopy(present)
    after = merged(present, OURS)
    assert present == before
    assert after[0] == OTHERS
    assert after[1]["lastTransitionTime"] == "2026-11-26T06:00:00Z"
    assert after[2:] == [{}, 5]


def test_the_transition_time_changes_with_the_status_only() -> None:
    first = merged([], OURS)
    first[0]["lastTransitionTime"] = "2020-01-01T00:00:00Z"
    (second,) = merged(first, {**OURS, "reason": "Better", "message": "even more so"})
    assert second["lastTransitionTime"] == "2020-01-01T00:00:00Z"
    assert (second["reason"], second["message"]) == ("Better", "even more so")
    assert merged(first, OURS) == first


def test_a_condition_that_is_there_twice_is_there_once() -> None:
    assert len(merged([*merged([], OURS), *merged([], OURS)], OURS)) == 1


def test_what_is_withdrawn_goes() -> None:
    assert merged([OTHERS, *merged([], OURS)], withdrawn={"Ours"}) == [OTHERS]


@pytest.mark.parametrize(
    ("reason", "accepted"),
    [
        ("", "Unknown"),
        ("Not Found!", "NotFound"),
        ("500", "Unknown"),
        ("9Lives:", "Lives"),
        ("A" * 2000, "A" * 1024),
    ],
)
def test_a_reason_is_made_acceptable(reason: str, accepted: str) -> None:
    assert merged([], {**OURS, "reason": reason})[0]["reason"] == accepted


@settings(derandomize=True, deadline=None)
@given(
    st.lists(st.none() | st.text() | st.dictionaries(st.sampled_from(["type", "status"]), st.text() | st.lists(st.text()))),
    st.text(),
    st.builds(lambda length, end: "x" * length + end, st.sampled_from([0, 32764, 40000]), st.text()),
)  # fmt: skip
def test_what_is_written_is_what_the_apiserver_accepts(
    present: list[Any], reason: str, message: str
) -> None:
    after = merged(present, {**OURS, "reason": reason, "message": message})
    (ours,) = (each for each in after if type(each) is dict and each.get("type") == "Ours")
    assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", ours["reason"])
    assert len(ours["message"]) <= 32768
    for there in present:
        assert there in after or (isinstance(there, dict) and there.get("type") == "Ours")
