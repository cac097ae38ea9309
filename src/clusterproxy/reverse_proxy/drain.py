"""The orderly end of a server (Go's http.Server.Shutdown behind a pause)."""

from __future__ import annotations

import trio

from clusterproxy.errors import ConfigError


class Drain:
    """When a program that is told to end does so.

    After :meth:`begin` it is not ready; its listeners stay open for *min_s*, so that load balancers hear of it;
    then they close, and what is under way may go on until *timeout_s* after the beginning. Both 0: it ends at once.
    Servers of one program share it.

    Raises:
      ConfigError: a value is negative, or *min_s* more than *timeout_s*.
    """

    def __init__(self, min_s: float, timeout_s: float) -> None:
        if min_s < 0:
            raise ConfigError("min-drain-duration", "--min-drain-duration must not be negative")
        if timeout_s < 0:
            raise ConfigError("drain-timeout", "--drain-timeout must not be negative")
        if min_s > timeout_s:
            raise ConfigError(
                "min-drain-duration", "--min-drain-duration must not be more than --drain-timeout"
            )
        self.min_s = min_s
        self.timeout_s = timeout_s
        self._begun = trio.Event()
        self._began = 0.0

    @property
    def draining(self) -> bool:
        """Whether the program is ending: ``/readyz`` says 503 ``draining``."""
        return self._begun.is_set()

    def begin(self) -> None:
        """End, beginning now. Idempotent."""
        if not self._begun.is_set():
            self._began = trio.current_time()
            self._begun.set()

    async def wait_begun(self) -> None:
        """Wait until the end begins."""
        await self._begun.wait()

    async def wait_closing(self) -> None:
        """Wait until listeners are to close."""
        await self._begun.wait()
        await trio.sleep_until(self._began + self.min_s)

    @property
    def deadline(self) -> float:
        """When what is left is cut off; infinite before the beginning."""
        return self._began + self.timeout_s if self._begun.is_set() else float("inf")
