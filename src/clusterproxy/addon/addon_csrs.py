"""Approves the agents' certificate requests, and signs those that the add-on's own authority signs."""

from __future__ import annotations

import logging
import random
from typing import TYPE_CHECKING, Final

from clusterproxy.errors import NotFound
from clusterproxy.kube.api import Change
from clusterproxy.kube.resource import CERTIFICATE_SIGNING_REQUESTS, text_at

from .certificate_request import RequestRefused
from .csr import (
    Verdict,
    approval,
    approved,
    cluster_of,
    is_ours,
    needs_signature,
    requester,
    signed,
)
from .index import Index
from .registration import is_owned
from .turns import Turns

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from clusterproxy.kube.api import KubeApi, WatchEvent
    from clusterproxy.kube.events import EventRecorder
    from clusterproxy.kube.resource import Object

    from .certificates import Authority
    from .fleet import Fleet

_log = logging.getLogger("clusterproxy.addon")

# A klusterlet asks for two certificates, and for no more while ten of its requests are open. Whoever asks for more waits.
_TURNS_AT_ONCE: Final = 40
_TURN_S: Final = 1.0
# So that they do not all come again at once.
_SPREAD_S: Final = 30.0


class RequestReconciler:
    """Decides on one request after the other.

    Args:
      authority: returns the one that signs, None while there is none.
      clock: returns the time.
    """

    def __init__(
        self,
        api: KubeApi,
        fleet: Fleet,
        events: EventRecorder,
        authority: Callable[[], Authority | None],
        clock: Callable[[], datetime],
    ) -> None:
        self._api = api
        self._fleet = fleet
        self._events = events
        self._authority = authority
        self._clock = clock
        self._told: dict[str, str] = {}
        self._turns = Turns(_TURNS_AT_ONCE, _TURN_S)
        self._open: Index[str] = Index()
        fleet.requests.subscribe(self._note)

    def open_requests(self, cluster: str | None = None) -> list[str]:
        """Return the requests that may yet be decided on: those that a cluster has made for itself, or all of them."""
        return self._open.names() if cluster is None else self._open.under(cluster)

    def _note(self, event: WatchEvent) -> None:
        # Of one that is decided on nothing but its name is known.
        is_open = event.change is not Change.DELETED and is_ours(event.object)
        name, cluster = text_at(event.object, "metadata", "name"), cluster_of(event.object)
        # What somebody else has asked for stays refused, and must not be in the way of the cluster's own.
        of = cluster if requester(event.object) == cluster else ""
        self._open.put(name, [of] if is_open else ())

    async def reconcile(self, name: str) -> float | None:
        """Approve or sign a request if that is right; it is looked at again when anything changes that matters.

        Raises:
          KubeError: what the apiserver says.
        """
        request = self._fleet.requests.items.get(("", name))
        if request is None or not is_ours(request):
            self._told.pop(name, None)
            return None
        authority = self._authority()
        if authority is None:
            return None
        if name not in self._told and (wait := self._turns.take(requester(request))) > 0:
            return wait + random.uniform(0, _SPREAD_S)  # noqa: S311
        try:
            if (decided := await self._approve(request, authority)) is not None:
                await self._sign(decided, authority)
        except NotFound:
            # Whoever made it has taken it back.
            self._told.pop(name, None)
        return None

    async def _approve(self, request: Object, authority: Authority) -> Object | None:
        """Return the request if it is approved now."""
        if needs_signature(request):
            return request
        cluster, addon = self._of(request)
        decision = approval(request, cluster, addon, authority.crt)
        if decision.verdict is Verdict.APPROVE:
            decided = await self._api.replace(
                CERTIFICATE_SIGNING_REQUESTS, approved(request, decision), subresource="approval"
            )
            _log.info(
                "approved %s of cluster %s for %s",
                text_at(request, "metadata", "name"),
                cluster_of(request),
                text_at(request, "spec", "signerName"),
            )
            return decided
        if decision.verdict is Verdict.LEAVE_PENDING:
            self._refuse(request, decision.reason, decision.message)
        return None

    async def _sign(self, request: Object, authority: Authority) -> None:
        if not needs_signature(request):
            return
        cluster, addon = self._of(request)
        try:
            with_certificate = signed(request, cluster, addon, authority, self._clock())
        except RequestRefused as refusal:
            self._refuse(request, refusal.reason, refusal.message)
            return
        await self._api.replace(
            CERTIFICATE_SIGNING_REQUESTS, with_certificate, subresource="status"
        )
        _log.info(
            "signed %s of cluster %s", text_at(request, "metadata", "name"), cluster_of(request)
        )

    def _of(self, request: Object) -> tuple[Object | None, Object | None]:
        cluster = cluster_of(request)
        addon = self._fleet.addon(cluster)
        # One that nobody has installed gets nothing.
        return self._fleet.cluster(cluster), addon if addon and is_owned(addon) else None

    def _refuse(self, request: Object, reason: str, message: str) -> None:
        name = text_at(request, "metadata", "name")
        if self._told.get(name) == message:
            return
        self._told[name] = message
        _log.warning("CertificateSigningRequest %s is left as it is: %s", name, message)
        self._events.note(request, "Warning", reason, message)
