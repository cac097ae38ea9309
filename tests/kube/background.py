"""Async code that runs beside a test in a thread of its own, whatever the test's own loop does."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Final, Self

import trio

if TYPE_CHECKING:
    from types import TracebackType

_WITHIN_S: Final = 30.0


class Background:
    """A context manager in whose block :meth:`main` runs; subclasses say what that is.

    Leaving the block cancels it, waits for its end, and raises what it raised.
    """

    def __init__(self) -> None:
        self._thread = threading.Thread(target=self._run, name=type(self).__name__)
        self._ready = threading.Event()
        self._error: BaseException | None = None
        self._scope = trio.CancelScope()
        self._token: trio.lowlevel.TrioToken | None = None

    @property
    def alive(self) -> bool:
        """Whether it still works; what ended it is raised at the end of the block."""
        return self._thread.is_alive()

    async def main(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Do the work for ever; tell *task_status* when the block may begin."""
        raise NotImplementedError

    def _run(self) -> None:
        try:
            trio.run(self._supervise)
        except BaseException as error:
            self._error = error
        finally:
            self._ready.set()

    async def _supervise(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        with self._scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(self.main)
                self._ready.set()

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._ready.wait(_WITHIN_S) or self._error is not None:
            self.__exit__(None, None, None)
            raise AssertionError(f"{type(self).__name__} did not start within {_WITHIN_S} s")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._token is not None and self._thread.is_alive():
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._scope.cancel)
        self._thread.join()
        if self._error is not None:
            raise self._error
