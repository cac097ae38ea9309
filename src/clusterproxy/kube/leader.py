"""One of several leads: client-go's leader election over a Lease (tools/leaderelection, its resourcelock/leaselock.go).

The record is Go's, so that a Go manager and ours never both lead. Whether another's lease has run out is judged by how long
it was *seen* unchanged on our own clock: wrong clocks elsewhere do no harm.
"""

from __future__ import annotations

import logging
import random
import socket
import time
import uuid
from functools import partial
from typing import TYPE_CHECKING, Final

import attrs
import trio

from clusterproxy.errors import (
    AlreadyExists,
    ClusterProxyError,
    Conflict,
    KubeError,
    KubeUnavailable,
    NotFound,
)

from .lease import micro_time
from .resource import LEASES, text_at, value_at

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from .api import KubeApi
    from .events import EventRecorder
    from .resource import Object

_log = logging.getLogger("clusterproxy.kube")

# leaderelection.go: JitterFactor.
_JITTER: Final = 1.2
_RELEASE_LIMIT_S: Final = 2.0


class LeadershipLost(ClusterProxyError):
    """Another one leads, or may lead by now. controller-runtime ends its process then."""


def make_identity() -> str:
    """Return a name for this process that no other one has, as controller-runtime makes it."""
    return f"{socket.gethostname()}_{uuid.uuid4()}"


@attrs.frozen(kw_only=True)
class LeaderTimes:
    """How long things take, in seconds; the defaults are those of controller-runtime and client-go.

    Attributes:
      lease: how long others wait for a leader that is not heard of.
      renew_deadline: how long the leader goes on without success in renewing; less than *lease*.
      retry_period: between attempts.
    """

    lease: float = 15.0
    renew_deadline: float = 10.0
    retry_period: float = 2.0


class LeaderElection:
    """A candidate.

    Args:
      identity: see :func:`make_identity`.
      events: gets an Event ``LeaderElection`` at the begin and end of leading.

    Attributes:
      leading: whether it leads now.
    """

    def __init__(
        self,
        api: KubeApi,
        *,
        namespace: str,
        name: str,
        identity: str,
        times: LeaderTimes | None = None,
        events: EventRecorder | None = None,
    ) -> None:
        self._api = api
        self._namespace = namespace
        self._name = name
        self._identity = identity
        self._times = times or LeaderTimes()
        self._events = events
        self._lease: Object = {}
        self._seen_at = 0.0
        self._renewed_at = 0.0
        self._trouble = ""
        self.leading = False

    async def run(self, work: Callable[[], Awaitable[None]]) -> None:
        """Wait until it is our turn to lead, and do *work*.

        Raises:
          LeadershipLost: the lease went to another one, or could not be renewed in time; *work* was cancelled.
          Whatever *work* raises.

        Cancellation: *work* is cancelled, then the lease is given up, which may take 2 s.
        """
        await self._acquire()
        failure: Exception | None = None
        lost = ""
        self.leading = True
        try:
            async with trio.open_nursery() as nursery:

                async def hold() -> None:
                    nonlocal lost
                    lost = await self._hold()
                    nursery.cancel_scope.cancel()

                async def watch_the_clock() -> None:
                    # Not by a deadline around the request: a name that is looked up cannot be given up.
                    nonlocal lost
                    while True:
                        end = self._renewed_at + self._times.renew_deadline
                        if end <= trio.current_time():
                            break
                        await trio.sleep_until(end)
                    lost = f"not renewed within {self._times.renew_deadline:g} s: {self._trouble}"
                    nursery.cancel_scope.cancel()

                nursery.start_soon(hold)
                nursery.start_soon(watch_the_clock)
                try:
                    await work()
                except Exception as error:
                    failure = error
                nursery.cancel_scope.cancel()
        finally:
            self.leading = False
            self._note("stopped leading")
            if not lost:
                with trio.CancelScope(deadline=trio.current_time() + _RELEASE_LIMIT_S, shield=True):
                    await self._release()
        if lost:
            raise LeadershipLost(f"lease {self._namespace}/{self._name}: {lost}") from failure
        if failure is not None:
            raise failure

    async def _acquire(self) -> None:
        _log.info("waiting to lead by lease %s/%s", self._namespace, self._name)
        while not await self._try():
            period = self._times.retry_period
            await trio.sleep(period * (1 + _JITTER * random.random()))  # noqa: S311
        _log.info("leading by lease %s/%s as %s", self._namespace, self._name, self._identity)
        self._note("became leader")

    async def _hold(self) -> str:
        """Renew the lease until another one has it; return who."""
        while True:
            await trio.sleep(self._times.retry_period)
            if not await self._try() and self._holder not in ("", self._identity):
                return f"taken by {self._holder}"

    @property
    def _holder(self) -> str:
        return text_at(self._lease, "spec", "holderIdentity")

    async def _try(self) -> bool:
        """Take or renew the lease; return whether it is ours (leaderelection.go: tryAcquireOrRenew)."""
        began = trio.current_time()
        try:
            if not self.leading:
                await self._look()
            if not self._may_take():
                return False
            # Its version sees to it that nobody took it since we looked.
            await self._write(self._lease_of_ours())
        except (Conflict, AlreadyExists, NotFound) as error:
            self._report(error)
            if not await self._renew_again():
                return False
        except KubeError as error:
            self._report(error)
            return False
        self._renewed_at = began
        self._trouble = ""
        return True

    async def _renew_again(self) -> bool:
        """Have a look, and renew what is our own yet: a renewal without an answer may have been done."""
        try:
            await self._look()
            if not self.leading or self._holder != self._identity:
                # The next attempt must not be made with what has changed.
                return False
            await self._write(self._lease_of_ours())
        except KubeError as error:
            self._report(error)
            return False
        return True

    async def _look(self) -> None:
        try:
            get = partial(self._api.get, LEASES, self._name, self._namespace)
            found = await self._ask(get)
        except NotFound:
            found = {}
        else:
            if not isinstance(found.get("spec"), dict):
                found["spec"] = {}
        if found.get("spec") != self._lease.get("spec") or not found:
            self._seen_at = trio.current_time()
        self._lease = found

    def _may_take(self) -> bool:
        if self._holder in ("", self._identity):
            return True
        return trio.current_time() >= self._seen_at + self._duration()

    def _duration(self) -> float:
        seconds = value_at(self._lease, "spec", "leaseDurationSeconds")
        return seconds if isinstance(seconds, int) else self._times.lease

    def _lease_of_ours(self) -> Object:
        now = micro_time(time.time())
        spec: Object = {
            **(value_at(self._lease, "spec") or {}),
            "holderIdentity": self._identity,
            "leaseDurationSeconds": int(self._times.lease),
            "renewTime": now,
        }
        if self._holder != self._identity:
            spec["acquireTime"] = now
            # The first holder of a new lease is no change.
            spec["leaseTransitions"] = self._transitions() + bool(self._lease)
        return self._with_spec(spec)

    def _transitions(self) -> int:
        count = value_at(self._lease, "spec", "leaseTransitions")
        return count if isinstance(count, int) else 0

    def _with_spec(self, spec: Object) -> Object:
        metadata = self._lease.get("metadata")
        if not metadata:
            metadata = {"name": self._name, "namespace": self._namespace}
        return {
            "apiVersion": LEASES.api_version,
            "kind": LEASES.kind,
            "metadata": metadata,
            "spec": spec,
        }

    async def _write(self, lease: Object) -> None:
        write = self._api.replace if self._lease else self._api.create
        self._lease = await self._ask(partial(write, LEASES, lease))
        self._seen_at = trio.current_time()

    async def _ask(self, call: Callable[[], Awaitable[Object]]) -> Object:
        """Make a call that leaves time for another one.

        One of several apiservers may be gone without a word, and the next connection leads to another. As
        controller-runtime (pkg/leaderelection/leader_election.go, the timeout of its client).
        """
        limit = self._times.renew_deadline / 2
        with trio.move_on_after(limit):
            return await call()
        raise KubeUnavailable(f"no answer within {limit:g} s")

    async def _release(self) -> None:
        """Let another one lead at once (leaderelection.go: release)."""
        now = micro_time(time.time())
        try:
            await self._look()
            if self._holder != self._identity:
                return
            await self._write(
                self._with_spec(
                    {
                        **self._lease["spec"],
                        "holderIdentity": "",
                        "leaseDurationSeconds": 1,
                        "renewTime": now,
                        "acquireTime": now,
                    }
                )
            )
        except KubeError as error:
            _log.warning("lease %s/%s not given up: %s", self._namespace, self._name, error)

    def _report(self, error: KubeError) -> None:
        quiet = isinstance(error, Conflict | AlreadyExists) or error.message == self._trouble
        self._trouble = error.message
        level = logging.DEBUG if quiet else logging.WARNING
        _log.log(level, "lease %s/%s: %s", self._namespace, self._name, error)

    def _note(self, what: str) -> None:
        if self._events is not None and self._lease:
            self._events.note(self._lease, "Normal", "LeaderElection", f"{self._identity} {what}")
