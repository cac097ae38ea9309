from __future__ import annotations

import subprocess
from contextlib import ExitStack

import pytest
from bench.namespaces import CLUSTER_ADDRESS, Line, gigabit_line, inside
from bench.programs import NotMeasured

pytestmark = pytest.mark.programs


def namespaces() -> set[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    return {line.split()[0] for line in listed.stdout.splitlines()}


def use_and_interrupt(line: Line) -> None:
    route = [*inside(line.hub), "ip", "route", "get", CLUSTER_ADDRESS]
    found = subprocess.run(route, capture_output=True, text=True, check=True).stdout
    assert "dev line0" in found
    assert {line.hub, line.cluster} <= namespaces()
    raise KeyboardInterrupt


def test_the_line_joins_two_namespaces_and_is_removed_when_interrupted() -> None:
    stack = ExitStack()
    try:
        line = stack.enter_context(gigabit_line())
    except NotMeasured as error:
        pytest.skip(str(error))
    with pytest.raises(KeyboardInterrupt), stack:
        use_and_interrupt(line)
    assert not {line.hub, line.cluster} & namespaces()
