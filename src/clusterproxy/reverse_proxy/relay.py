"""Serves requests: has it decided what becomes of each, and answers where that does not work out."""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import attrs
import trio

from clusterproxy.errors import ClusterProxyError

from .exchange import Answer, Decide, Forward, Request
from .incoming import ClientGone, phrase
from .observer import Observer
from .origin import UpstreamError
from .passage import Passage

if TYPE_CHECKING:
    from collections.abc import Callable

    from .incoming import Incoming

_log = logging.getLogger("clusterproxy.proxy")

# Of requests that failed, in the log; the metric counts all.
_WARNINGS_PER_S: Final = 10
_MAX_SHOWN: Final = 32


def bad_gateway(_request: Request, _forward: Forward, error: Exception) -> Answer:
    """Return the answer to a request that could not go on."""
    return Answer(502, str(error))


@attrs.define(kw_only=True)
class Relay:
    """Serves requests.

    Args:
      decide: says what becomes of a request.
      fail: says what the client is told when a request could not go on.
      observer: told what happens.
    """

    decide: Decide
    fail: Callable[[Request, Forward, Exception], Answer] = bad_gateway
    observer: Observer = attrs.field(factory=Observer)
    _second: int = attrs.field(default=0, init=False)
    _told: int = attrs.field(default=0, init=False)

    async def handle(self, incoming: Incoming) -> None:
        """Serve one request; never raises but Cancelled, which ends it as if its client had gone."""
        observer = self.observer
        observer.began()
        try:
            with incoming.scope:
                try:
                    await self._serve(incoming)
                except ClientGone as error:
                    await self._part(incoming, error)
                except Exception:
                    _log.exception("bug while serving a request")
                    await self._apologize(incoming)
        finally:
            if not incoming.finished or incoming.gone:
                incoming.abort()
            # 499 as nginx: the client left before there was an answer.
            observer.ended(incoming.request.method, incoming.status or 499)

    async def _part(self, incoming: Incoming, error: ClientGone) -> None:
        incoming.gone = True
        if error.status and not incoming.started:
            with suppress(ClientGone):
                words = f"{error.status} {phrase(error.status).decode()}: {error}"
                await incoming.answer(Answer(error.status, words))
                incoming.gone = False

    async def _apologize(self, incoming: Incoming) -> None:
        if incoming.started:
            incoming.abort()
            return
        with suppress(ClientGone):
            await incoming.answer(Answer(500, "Internal Server Error"))

    async def _serve(self, incoming: Incoming) -> None:
        verdict = await self.decide(incoming.request)
        if isinstance(verdict, Answer):
            await incoming.answer(verdict)
            return
        try:
            await Passage(incoming, verdict).run()
        except (
            UpstreamError,
            ClusterProxyError,
            OSError,
            trio.TooSlowError,
            trio.BrokenResourceError,
            trio.ClosedResourceError,
        ) as error:
            origin = verdict.origin
            self.observer.failed(origin.name)
            method = incoming.request.method[:_MAX_SHOWN]
            _log.log(self._level(), "request %s for %s failed: %s", method, origin.name, error)
            if incoming.started:
                incoming.abort()
            else:
                await incoming.answer(self.fail(incoming.request, verdict, error))

    def _level(self) -> int:
        """Anybody can have as many requests fail as he likes."""
        second = int(trio.current_time())
        if second != self._second:
            self._second, self._told = second, 0
        self._told += 1
        return logging.WARNING if self._told <= _WARNINGS_PER_S else logging.DEBUG
