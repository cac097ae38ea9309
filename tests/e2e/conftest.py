"""A hub and two managed clusters, as OCM leaves them: registered, and without add-ons."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from e2e.network import prepare

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from e2e.world import World


TIMINGS = pytest.StashKey[dict[str, float]]()


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Tell how long what has taken."""
    for what, seconds in config.stash.get(TIMINGS, {}).items():
        terminalreporter.write_line(f"{seconds:6.1f} s  {what}")


@pytest.fixture(scope="session")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the run's own file system; its network is the run's own, too."""
    if "CLUSTERPROXY_E2E" not in os.environ:
        pytest.skip("needs namespaces of its own: make e2e")
    folder = tmp_path_factory.mktemp("roots")
    prepare(folder)
    return folder


@pytest.fixture(scope="session")
def bare(
    request: pytest.FixtureRequest, roots: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    """The clusters, without the add-on."""
    # Imports the client of Kubernetes.
    from e2e.world import World

    with World(tmp_path_factory.mktemp("world"), roots) as world:
        request.config.stash[TIMINGS] = world.timings
        yield world


@pytest.fixture(scope="session")
def world(bare: World) -> World:
    """The clusters with the add-on, available in both."""
    bare.install()
    return bare
