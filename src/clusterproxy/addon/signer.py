"""The CA's secret: made when it is missing, never overwritten, rotated step by step."""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING

import attrs

from clusterproxy.errors import AlreadyExists, ClusterProxyError
from clusterproxy.kube.resource import SECRETS, map_at

from .ca_rotation import Rotation, State, step
from .leaves import add_owner, encoded, secret_data
from .objects import find

if TYPE_CHECKING:
    from datetime import datetime

    from clusterproxy.kube.api import KubeApi
    from clusterproxy.kube.resource import Object

_log = logging.getLogger("clusterproxy.addon")


class SignerInvalid(ClusterProxyError):
    """What the CA's secret holds cannot be used; the text says where and what to do."""


@attrs.frozen
class Sight:
    """The CA's secret as it was at some time, and what it holds."""

    secret: Object = attrs.field(repr=False)
    state: State


class Signer:
    """The add-on's certificate authority, which is in a secret that survives everything else.

    Attributes:
      namespace, name: of the secret.
    """

    def __init__(self, api: KubeApi, namespace: str, name: str) -> None:
        self._api = api
        self.namespace = namespace
        self.name = name

    async def state(self, owner: Object | None, now: datetime) -> State:
        """Return the authority and whom to trust; make the secret if there is none.

        Raises:
          SignerInvalid: the secret is there and cannot be used. It is left as it is.
          KubeError: what the apiserver says.
        """
        secret = await find(self._api, SECRETS, self.name, self.namespace)
        if secret is None:
            secret = await self._create(owner, now)
        state = self._read(secret)
        if owner is not None and add_owner(secret, owner):
            await self._api.replace(SECRETS, secret)
        return state

    async def _create(self, owner: Object | None, now: datetime) -> Object:
        data, annotations = Rotation.begin(now).write()
        secret: Object = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {
                "name": self.name,
                "namespace": self.namespace,
                "annotations": annotations,
                "ownerReferences": [] if owner is None else [owner],
            },
            "type": "Opaque",
            "data": encoded(data),
        }
        try:
            created = await self._api.create(SECRETS, secret)
        except AlreadyExists:
            # A manager that has just lost the lease, or the administrator.
            return await self._api.get(SECRETS, self.name, self.namespace)
        _log.info("made a certificate authority in secret %s/%s", self.namespace, self.name)
        return created

    def _read(self, secret: Object) -> State:
        try:
            return Rotation.read(secret_data(secret), map_at(secret, "metadata", "annotations"))
        except ClusterProxyError as error:
            raise SignerInvalid(f"Secret {self.namespace}/{self.name}: {error}") from error

    async def look(self) -> Sight | None:
        """Return what the secret holds, None if there is no secret.

        Raises:
          SignerInvalid: the secret is there and cannot be used.
          KubeError: what the apiserver says.
        """
        secret = await find(self._api, SECRETS, self.name, self.namespace)
        return None if secret is None else Sight(secret, self._read(secret))

    async def advance(self, sight: Sight, now: datetime, *, delivered: bool, agents: bool) -> bool:
        """Take the step of a rotation that is due; return whether one was.

        Args:
          sight: what *delivered* and *agents* are about.
          now: the time.
          delivered, agents: see :func:`~.ca_rotation.step`.

        Raises:
          KubeError: what the apiserver says; :class:`Conflict` if the secret is another than that of *sight*.
        """
        following = step(sight.state, now, delivered=delivered, agents=agents)
        if following is None:
            return False
        data, annotations = following.write()
        secret = copy.deepcopy(sight.secret)
        kept = {
            key: value for key, value in map_at(secret, "data").items() if key not in Rotation.KEYS
        }
        secret["data"] = {**kept, **encoded(data)}
        foreign = {
            key: value
            for key, value in map_at(secret, "metadata", "annotations").items()
            if key not in Rotation.ANNOTATIONS
        }
        secret["metadata"]["annotations"] = {**foreign, **annotations}
        await self._api.replace(SECRETS, secret)
        _log.warning(
            "certificate authority %s/%s: %s, %s",
            self.namespace,
            self.name,
            following.phase,
            "which all have" if following.since else "which not all have yet",
        )
        return True
