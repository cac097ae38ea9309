"""Collections of an apiserver, kept up to date by a watch, for what plays nodes and services in tests."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final, Never, Self

import httpx
import trio

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from kube.control_plane import ControlPlane

Object = dict[str, Any]

MERGE: Final = "application/merge-patch+json"
_RETRY_S: Final = 0.2


class Calls:
    """Calls to an apiserver as an administrator, which outlast its restarts."""

    def __init__(self, plane: ControlPlane) -> None:
        self.plane = plane
        # Whoever needs two requests at once gets two connections: none is kept.
        self._client = httpx.AsyncClient(
            base_url=plane.server,
            verify=plane.admin_tls,
            limits=httpx.Limits(max_keepalive_connections=0),
            timeout=10.0,
            trust_env=False,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def ask(
        self, method: str, path: str, body: Any = None, content_type: str = "application/json"
    ) -> Object | None:
        """Return the answer, or None where there is no such object; tries again until there is an answer."""
        content = None if body is None else json.dumps(body)
        headers = {"Content-Type": content_type}
        while True:
            await trio.lowlevel.checkpoint_if_cancelled()
            try:
                # A request that is cancelled leaves its socket open, of which Python complains in another test.
                with trio.CancelScope(shield=True):
                    answer = await self._client.request(
                        method, path, content=content, headers=headers
                    )
            except httpx.TransportError:
                await trio.sleep(_RETRY_S)
                continue
            if answer.status_code == 404:
                return None
            if answer.status_code in (409, 429) or answer.is_server_error:
                await trio.sleep(_RETRY_S)
                continue
            if not answer.is_success:
                raise AssertionError(f"{method} {path}: {answer.status_code} {answer.text}")
            found: Object = answer.json()
            return found

    def stream(self, path: str, **parameters: str) -> AbstractAsyncContextManager[httpx.Response]:
        """Open a watch."""
        return self._client.stream(
            "GET", path, params=parameters, timeout=httpx.Timeout(10.0, read=None)
        )


class Mirror:
    """The objects of a collection by their names, as a watch tells them.

    Attributes:
      changed: set with the next change, and then another event stands here.
    """

    def __init__(self, calls: Calls, path: str, selector: str = "") -> None:
        self.items: dict[str, Object] = {}
        self.changed = trio.Event()
        self._calls = calls
        self._path = path
        self._selector = {"labelSelector": selector} if selector else {}

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> Never:
        """Keep the objects up to date; started when they were all read for the first time."""
        query = str(httpx.QueryParams(self._selector))
        while True:
            listing = await self._calls.ask("GET", f"{self._path}?{query}")
            assert listing is not None
            self.items = {item["metadata"]["name"]: item for item in listing["items"]}
            self._wake()
            task_status.started()
            task_status = trio.TASK_STATUS_IGNORED
            try:
                await self._watch(listing["metadata"]["resourceVersion"])
            except httpx.HTTPError:
                await trio.sleep(_RETRY_S)

    async def _watch(self, version: str) -> None:
        parameters = {"watch": "true", "resourceVersion": version, **self._selector}
        async with self._calls.stream(self._path, **parameters) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                event = json.loads(line)
                if event["type"] == "ERROR":
                    return
                name = event["object"]["metadata"]["name"]
                if event["type"] == "DELETED":
                    self.items.pop(name, None)
                else:
                    self.items[name] = event["object"]
                self._wake()

    def _wake(self) -> None:
        self.changed.set()
        self.changed = trio.Event()
