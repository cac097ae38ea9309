"""The apiserver that is asked over the network, by way of the official ``kubernetes`` package.

Import this where it is needed only: it costs memory.
"""

from __future__ import annotations

import json
import math
import random
from collections import deque
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast
from urllib.parse import urlencode

import trio
from urllib3 import HTTPHeaderDict
from urllib3.util import Timeout

from clusterproxy import __version__
from clusterproxy.errors import ConfigError, Gone, KubeError, KubeUnavailable

from .answer import Answer
from .api import Listing, Patch
from .body import TRANSPORT_ERRORS, WatchEvents, read_answer, unavailable
from .exchange import CONNECT_TIMEOUT_S, Exchange, in_thread
from .request import Request, check_namespace, complete, own_path, path_of
from .resource import text_at, value_at
from .session import POOL_SIZE, Session, Sessions, Target
from .throttle import Throttle

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence

    from urllib3.response import BaseHTTPResponse

    from .api import WatchEvent
    from .resource import Object, Resource

    OnRequest = Callable[[str, Resource, int, float], object]

T = TypeVar("T")

REQUEST_TIMEOUT_S: Final = 30.0
USER_AGENT: Final = f"clusterproxy/{__version__}"

_PAGE: Final = 500
_ATTEMPTS: Final = 3
_LONGEST_WAIT_S: Final = 10.0
# As client-go (tools/cache/reflector.go: minWatchTimeout).
_WATCH_S: Final = (300, 600)
_WATCH_GRACE_S: Final = 30.0


@asynccontextmanager
async def open_kube_api(
    kubeconfig: str = "",
    *,
    qps: float = 20.0,
    burst: int = 30,
    user_agent: str = USER_AGENT,
    on_request: OnRequest | None = None,
    timeout_s: float = REQUEST_TIMEOUT_S,
) -> AsyncGenerator[KubeClient, None]:
    """Open a client of an apiserver.

    Args:
      kubeconfig: a file; without one the service account of the pod.
      qps, burst: see :class:`clusterproxy.kube.throttle.Throttle`; the defaults are controller-runtime's.
      on_request: called after each request with the verb (``get``, ``list``, ``watch``, ``create``, ``update``,
        ``patch``, ``delete``), the resource, the HTTP status (0 without an answer) and the seconds that it took; of a
        watch those until it began.
      timeout_s: for a whole request, of a watch until it begins.

    Raises:
      ConfigError: there is no usable configuration (``kubeconfig``).

    Resource handling: at the end idle connections are closed; calls must have ended.
    """
    sessions = await trio.to_thread.run_sync(Sessions, kubeconfig)
    client = KubeClient(sessions, Throttle(qps, burst), user_agent, on_request, timeout_s)
    try:
        yield client
    finally:
        sessions.close()


class KubeClient:
    """A :class:`clusterproxy.kube.api.KubeApi`; made by :func:`open_kube_api`."""

    def __init__(
        self,
        sessions: Sessions,
        throttle: Throttle,
        user_agent: str,
        on_request: OnRequest | None,
        timeout_s: float,
    ) -> None:
        self._sessions = sessions
        self._throttle = throttle
        self._user_agent = user_agent
        self._on_request = on_request
        self._timeout_s = timeout_s
        self._limiter = trio.CapacityLimiter(POOL_SIZE)
        self._watch_limiter = trio.CapacityLimiter(math.inf)

    async def get(self, resource: Resource, name: str, namespace: str | None = None) -> Object:
        """Return an object."""
        path = path_of(resource, namespace, name)
        return await self._object(Request(verb="get", method="GET", resource=resource, path=path))

    async def list(
        self,
        resource: Resource,
        namespace: str | None = None,
        *,
        label_selector: str = "",
        field_selector: str = "",
        keep: Callable[[Object], Object] | None = None,
    ) -> Listing:
        """Return a collection, read in pages; of each object what *keep* returns for it."""
        selectors = _selectors(label_selector, field_selector)
        items: list[Object] = []
        token = ""
        anew = False
        while True:
            query = selectors | {"limit": str(_PAGE)} | ({"continue": token} if token else {})
            request = Request(
                verb="list",
                method="GET",
                resource=resource,
                path=resource.path(namespace),
                query=query,
            )
            try:
                page = await self._object(request)
            except Gone:
                # The collection went on changing for longer than its versions are kept.
                if not token or anew:
                    raise
                anew = True
                token = ""
                items.clear()
                continue
            items += _items(request.call, resource, page, keep)
            previous, token = token, text_at(page, "metadata", "continue")
            if not token:
                return Listing(items, text_at(page, "metadata", "resourceVersion"))
            if token == previous:
                raise KubeUnavailable(f"{request.call}: the list goes in a circle")

    @asynccontextmanager
    async def watch(
        self,
        resource: Resource,
        namespace: str | None = None,
        *,
        label_selector: str = "",
        field_selector: str = "",
        resource_version: str = "",
    ) -> AsyncGenerator[AsyncIterator[WatchEvent], None]:
        """Watch a collection. No thread runs while nobody waits for an event: what comes, waits in the connection.

        Cancellation: a wait for an event that is cancelled ends the watch.
        """
        seconds = random.randint(*_WATCH_S)  # noqa: S311
        query = _selectors(label_selector, field_selector) | {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(seconds),
        }
        if resource_version:
            query["resourceVersion"] = resource_version
        request = Request(
            verb="watch",
            method="GET",
            resource=resource,
            path=resource.path(namespace),
            query=query,
        )
        exchange = Exchange()
        # Filled by the thread: when the call is cancelled at its very end, nobody gets what the thread returns.
        opened = deque[Any]()
        work = partial(self._open_watch, exchange, opened, request)
        try:
            found = await self._answer(request, work, exchange)
            if isinstance(found, Answer):
                raise found.error()
            deadline = trio.current_time() + seconds + _WATCH_GRACE_S
            yield WatchEvents(request.call, exchange, found, deadline, self._watch_limiter)
        finally:
            for response in opened:
                response.close()
            exchange.finish()

    async def create(
        self, resource: Resource, obj: Object, *, subresource: str | None = None
    ) -> Object:
        """Create an object where its metadata say, or a part of one (``serviceaccounts/token``)."""
        namespace = text_at(obj, "metadata", "namespace") or None
        if subresource is None:
            check_namespace(resource, namespace)
            path = resource.path(namespace)
        else:
            path = path_of(resource, namespace, text_at(obj, "metadata", "name"), subresource)
        return await self._object(
            Request(
                verb="create",
                method="POST",
                resource=resource,
                path=path,
                body=complete(resource, obj),
            )
        )

    async def replace(
        self, resource: Resource, obj: Object, *, subresource: str | None = None
    ) -> Object:
        """Replace an object. With a ``resourceVersion`` only if it is still that one (:class:`Conflict`)."""
        return await self._object(
            Request(
                verb="update",
                method="PUT",
                resource=resource,
                path=own_path(resource, obj, subresource),
                body=complete(resource, obj),
            )
        )

    async def patch(
        self,
        resource: Resource,
        name: str,
        patch: Object | Sequence[Object],
        namespace: str | None = None,
        *,
        kind: Patch = Patch.MERGE,
        subresource: str | None = None,
    ) -> Object:
        """Change an object."""
        return await self._object(
            Request(
                verb="patch",
                method="PATCH",
                resource=resource,
                path=path_of(resource, namespace, name, subresource),
                body=patch,
                content_type=kind,
            )
        )

    async def apply(
        self,
        resource: Resource,
        obj: Object,
        *,
        field_manager: str,
        force: bool = False,
        subresource: str | None = None,
    ) -> Object:
        """Apply an object on the server's side: what *field_manager* said before and says no more, goes."""
        query = {"fieldManager": field_manager} | ({"force": "true"} if force else {})
        return await self._object(
            Request(
                verb="patch",
                method="PATCH",
                resource=resource,
                path=own_path(resource, obj, subresource),
                query=query,
                body=complete(resource, obj),
                content_type=Patch.APPLY,
            )
        )

    async def delete(
        self,
        resource: Resource,
        name: str,
        namespace: str | None = None,
        *,
        uid: str | None = None,
        resource_version: str | None = None,
    ) -> None:
        """Delete an object; with *uid* or *resource_version* only if it is that one (:class:`Conflict`)."""
        conditions = {"uid": uid, "resourceVersion": resource_version}
        options: Object = {"apiVersion": "v1", "kind": "DeleteOptions"}
        if uid or resource_version:
            options["preconditions"] = {key: value for key, value in conditions.items() if value}
        await self._object(
            Request(
                verb="delete",
                method="DELETE",
                resource=resource,
                path=path_of(resource, namespace, name),
                body=options,
            )
        )

    async def target(self, refused: Target | None = None) -> Target:
        """Return how to connect to the apiserver, for streams that are no requests; anew after it has *refused* one.

        Raises:
          KubeUnavailable: credentials cannot be read.
        """
        if refused is not None:
            await self._renew("streams", self._sessions.current())
        session = await self._current("streams")
        try:
            return await trio.to_thread.run_sync(
                session.target, self._user_agent, limiter=self._limiter
            )
        except ValueError as error:
            raise KubeUnavailable(str(error)) from error

    async def _object(self, request: Request) -> Object:
        exchange = Exchange()
        answer = await self._answer(request, partial(self._ask, exchange, request), exchange)
        return answer.object()

    async def _answer(
        self,
        request: Request,
        work: Callable[[Session], T | Answer | KubeError],
        exchange: Exchange,
    ) -> T | Answer:
        """Make a request, and again where the apiserver asks for it or wants newer credentials."""
        attempts = 0
        renewed = False
        while True:
            await self._throttle.wait()
            session = await self._current(request.call)
            found = await self._timed(request, partial(work, session), exchange)
            if not isinstance(found, Answer):
                return found
            if found.status == 401 and not renewed:
                renewed = True
                await self._renew(request.call, session)
            elif (
                found.status in (429, 503)
                and found.retry_after is not None
                and attempts < _ATTEMPTS
            ):
                attempts += 1
                await trio.sleep(min(found.retry_after, _LONGEST_WAIT_S))
            else:
                return found

    async def _timed(
        self, request: Request, work: Callable[[], T | Answer | KubeError], exchange: Exchange
    ) -> T | Answer:
        began = trio.current_time()
        name = f"kube {request.verb} {request.resource.plural}"
        found: T | Answer | KubeError = KubeUnavailable(
            f"{request.call}: no answer within {self._timeout_s:g} s"
        )
        with trio.move_on_after(self._timeout_s):
            found = await in_thread(exchange, work, name, self._limiter)
        if self._on_request is not None:
            status = found.status if isinstance(found, Answer | KubeError) else 200
            self._on_request(request.verb, request.resource, status, trio.current_time() - began)
        if isinstance(found, KubeError):
            raise found
        return found

    async def _current(self, call: str) -> Session:
        session = self._sessions.current()
        if session.over:
            await self._renew(call, session)
            session = self._sessions.current()
        return session

    async def _renew(self, call: str, session: Session) -> None:
        try:
            await trio.to_thread.run_sync(self._sessions.renew, session, limiter=self._limiter)
        except ConfigError as error:
            raise KubeUnavailable(f"{call}: {error.message}") from error

    # What follows runs in threads.

    def _ask(self, exchange: Exchange, request: Request, session: Session) -> Answer | KubeError:
        with exchange:
            try:
                return read_answer(request.call, self._send(request, session))
            except TRANSPORT_ERRORS as error:
                return unavailable(request.call, error)
            finally:
                exchange.finish()

    def _open_watch(
        self,
        exchange: Exchange,
        opened: deque[BaseHTTPResponse],
        request: Request,
        session: Session,
    ) -> BaseHTTPResponse | Answer | KubeError:
        with exchange:
            try:
                response = self._send(request, session)
                if response.status == 200:
                    opened.append(response)
                    return response
                return read_answer(request.call, response)
            except TRANSPORT_ERRORS as error:
                return unavailable(request.call, error)

    def _send(self, request: Request, session: Session) -> BaseHTTPResponse:
        headers = HTTPHeaderDict(session.identity)
        headers.update({"Accept": "application/json", "User-Agent": self._user_agent})
        authorization = session.authorization()
        if authorization is not None:
            headers["Authorization"] = authorization
        body = None
        if request.body is not None:
            body = json.dumps(request.body).encode()
            headers["Content-Type"] = request.content_type
        query = f"?{urlencode(request.query)}" if request.query else ""
        # The time for all is trio's business. Redirects are not followed: the token is for this host.
        return session.pool.urlopen(
            request.method,
            f"{session.host}{request.path}{query}",
            body=body,
            headers=headers,
            preload_content=False,
            retries=False,
            redirect=False,
            timeout=Timeout(connect=CONNECT_TIMEOUT_S, read=None),
        )


def _selectors(label_selector: str, field_selector: str) -> dict[str, str]:
    both = {"labelSelector": label_selector, "fieldSelector": field_selector}
    return {key: value for key, value in both.items() if value}


def _items(
    call: str, resource: Resource, page: Object, keep: Callable[[Object], Object] | None
) -> list[Object]:
    items: Any = value_at(page, "items") or []
    if not isinstance(items, list) or not all(
        isinstance(item, dict) for item in cast("list[object]", items)
    ):
        raise KubeUnavailable(f"{call}: the list has items that are no objects")
    items = cast("list[Object]", items)
    for item in items:
        # Left out in lists of most kinds.
        item.setdefault("apiVersion", resource.api_version)
        item.setdefault("kind", resource.kind)
    return items if keep is None else list(map(keep, items))
