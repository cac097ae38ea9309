"""An apiserver that is played, for what a real one cannot be made to do: hang, refuse, answer nonsense, in no time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import trio

if TYPE_CHECKING:
    from collections.abc import Callable

    from clusterproxy.kube.resource import Object, Resource


class ScriptedApi:
    """Answers each call with what *answer* returns for ``(verb, name or object)``, or raises what that is.

    An answer of None never comes.
    """

    def __init__(self, answer: Callable[[str, Any], Any]) -> None:
        self.answer = answer
        self.calls: list[tuple[float, str, Any]] = []
        self.open = 0

    def called(self, verb: str) -> list[Any]:
        return [what for _, name, what in self.calls if name == verb]

    async def _call(self, verb: str, what: Any) -> Any:
        self.calls.append((trio.current_time(), verb, what))
        self.open += 1
        try:
            await trio.lowlevel.checkpoint()
            found = self.answer(verb, what)
            if isinstance(found, Exception):
                raise found
            if found is None:
                await trio.sleep_forever()
            return found
        finally:
            self.open -= 1

    async def get(self, _resource: Resource, name: str, _namespace: str | None = None) -> Any:
        return await self._call("get", name)

    async def list(self, *_args: Any, label_selector: str = "", **_options: Any) -> Any:
        return await self._call("list", label_selector)

    async def create(self, _resource: Resource, obj: Object) -> Any:
        return await self._call("create", obj)

    async def replace(self, _resource: Resource, obj: Object) -> Any:
        return await self._call("replace", obj)

    async def delete(
        self,
        _resource: Resource,
        name: str,
        _namespace: str | None = None,
        *,
        resource_version: str | None = None,
    ) -> None:
        await self._call("delete", (name, resource_version))
