"""Repairs that somebody undoes."""

from __future__ import annotations

from typing import Any

import pytest

from clusterproxy.addon.contention import (
    ConflictingWriter,
    Contention,
    differences,
    last_writer,
)


class Repairs:
    def __init__(self) -> None:
        self.now = 1000.0
        self.contention = Contention(lambda: self.now)

    def wait(self, wanted: object = "a") -> float:
        """Return for how long a repair has to wait."""
        try:
            self.contention.check("Service x/y", wanted, "spec.ports", "kubectl-edit")
        except ConflictingWriter as error:
            return error.seconds
        return 0.0

    def write(self, times: int = 1, wanted: object = "a") -> None:
        for _ in range(times):
            self.contention.written("Service x/y", wanted)


def test_a_few_repairs_are_made_at_once() -> None:
    repairs = Repairs()
    assert not repairs.wait()
    # Its creation, and five repairs.
    repairs.write(5)
    assert not repairs.wait()
    repairs.write()
    assert repairs.wait() == 1.0
    told = r"^Service x/y is changed again whenever it is repaired \(image\) by kubectl-edit: end"
    with pytest.raises(ConflictingWriter, match=told):
        repairs.contention.check("Service x/y", "a", "image", "kubectl-edit")
    with pytest.raises(ConflictingWriter, match="by somebody else"):
        repairs.contention.check("Service x/y", "a", "image")


def test_pauses_grow_to_a_minute() -> None:
    repairs = Repairs()
    repairs.write(6)
    pauses: list[float] = []
    for _ in range(9):
        pauses.append(repairs.wait())
        repairs.now += pauses[-1] - 0.5
        assert repairs.wait() == 0.5
        repairs.now += 0.5
        assert not repairs.wait()
        repairs.write()
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_what_is_newly_wanted_is_written_at_once() -> None:
    repairs = Repairs()
    repairs.write(9)
    assert not repairs.wait("b")
    repairs.write(1, "b")
    assert not repairs.wait("b")


def test_after_some_peace_all_is_forgotten() -> None:
    repairs = Repairs()
    repairs.write(9)
    repairs.now += 301
    assert not repairs.wait()
    repairs.write(5)
    assert not repairs.wait()


def test_objects_are_apart() -> None:
    repairs = Repairs()
    repairs.write(9)
    repairs.contention.check("Service x/z", "a", "spec.ports")


@pytest.mark.parametrize(
    ("live", "wanted", "paths"),
    [
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}, ["a.c"]),
        ({"a": 1}, {}, ["a"]),
        ({}, {"a": {"b": 1}}, ["a"]),
        ({"p": [{"port": 1}, {"port": 2}]}, {"p": [{"port": 1}, {"port": 3}]}, ["p[1].port"]),
        ({"p": [1]}, {"p": [1, 2]}, ["p"]),
        ({"p": [1]}, {"p": {"x": 1}}, ["p"]),
        (dict.fromkeys("abcdefg", 1), {}, ["a", "b", "c", "d", "e", "…"]),
        ({"a": 1}, {"a": 1}, []),
    ],
)
def test_differences(live: Any, wanted: Any, paths: list[str]) -> None:
    assert differences(live, wanted) == paths


def entry(manager: str, time: str, **more: Any) -> dict[str, Any]:
    return {"manager": manager, "time": time, "fieldsV1": {"f:spec": {}}, **more}


@pytest.mark.parametrize(
    ("entries", "writer"),
    [
        ([entry("a", "2026-01-01T00:00:00Z"), entry("b", "2026-01-02T00:00:00Z")], "b"),
        ([entry("a", "2026-01-03T00:00:00Z"), entry("clusterproxy", "2026-01-04T00:00:00Z")], "a"),
        (
            [
                entry("a", "2026-01-03T00:00:00Z"),
                entry("b", "2026-01-04T00:00:00Z", subresource="status"),
            ],
            "a",
        ),
        ([entry("clusterproxy", "2026-01-04T00:00:00Z")], ""),
        ([None, "text", {"manager": 7}], ""),
        ("rubbish", ""),
    ],
)
def test_last_writer(entries: Any, writer: str) -> None:
    assert last_writer({"metadata": {"managedFields": entries}}) == writer
    assert last_writer({}) == ""
