"""Follows the TLS profile while a program runs."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final, Never

import trio

from clusterproxy.errors import ConfigError

from .api import Change
from .reflector import Reflector
from .resource import CONFIG_MAPS
from .tls_profile import CONFIG_MAP, TlsProfile, parse_tls_profile

if TYPE_CHECKING:
    from collections.abc import Callable

    from .api import KubeApi, WatchEvent

_log = logging.getLogger("clusterproxy.kube")

# Servers should not be started with one profile and restarted with another.
_PATIENCE_S: Final = 5.0


class ProfileWatch:
    """The TLS profile that is in force.

    Args:
      changed: called when it may be another.

    Attributes:
      profile: None while there was none that is good: servers go on with what they have.
      problem: what is wrong with the one that is configured, empty if nothing.
    """

    def __init__(self, api: KubeApi, namespace: str, changed: Callable[[], None]) -> None:
        self._reflector = Reflector(
            api, CONFIG_MAPS, namespace, field_selector=f"metadata.name={CONFIG_MAP}"
        )
        self._namespace = namespace
        self._changed = changed
        self.profile: TlsProfile | None = None
        self.problem = ""

    async def start(self, nursery: trio.Nursery) -> None:
        """Follow it in a nursery, for a listener that is to be opened with it; return when it is known.

        If it cannot be read that is told in the log, and :attr:`profile` is None for now.

        Raises:
          ConfigError: it has a mistake. A listener that demands less than somebody wanted is worse than none.
        """
        await nursery.start(self.run)
        if self.profile is None:
            if self._reflector.synced.is_set():
                raise ConfigError("tls-profile", self.problem)
            _log.warning("TLS profile: the defaults hold until it can be read: %s", self.problem)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> Never:
        """Follow it until cancelled; started when it is known, or it takes too long to find out."""
        self._reflector.subscribe(self._take)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._reflector.run)
            told = False
            with trio.move_on_after(_PATIENCE_S):
                await self._reflector.synced.wait()
            if not self._reflector.synced.is_set():
                self.problem = f"ConfigMap {self._namespace}/{CONFIG_MAP} cannot be read: {self._reflector.trouble}"
                told = True
                task_status.started()
                await self._reflector.synced.wait()
            if not self._reflector.items:
                # There is none, and _take was not called.
                self.profile, self.problem = TlsProfile(), ""
                self._changed()
            if not told:
                task_status.started()
        raise AssertionError  # pragma: no cover  the nursery ends by cancellation only

    def _take(self, event: WatchEvent) -> None:
        config_map = None if event.change is Change.DELETED else event.object
        try:
            profile = parse_tls_profile(config_map)
        except ConfigError as error:
            # What was good before holds until the mistake is mended.
            self.problem = error.message
            _log.error("TLS profile: %s", error.message)
        else:
            for warning in profile.warnings:
                _log.warning("TLS profile: %s", warning)
            self.problem = ""
            self.profile = profile
        self._changed()
