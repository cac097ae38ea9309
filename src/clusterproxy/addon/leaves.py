"""Keeps certificates in secrets: issued when they are missing, renewed in time, left alone otherwise."""

from __future__ import annotations

import base64
import binascii
import logging
from typing import TYPE_CHECKING, Final

from clusterproxy.kube.resource import SECRETS, map_at

from .certificates import issue, not_after, why_reissue
from .contention import last_writer
from .objects import NameTaken, find, owners_of

if TYPE_CHECKING:
    from datetime import datetime

    from clusterproxy.kube.api import KubeApi
    from clusterproxy.kube.resource import Object

    from .certificates import Authority, Leaf
    from .contention import Contention

_log = logging.getLogger("clusterproxy.addon")

TLS_SECRET: Final = "kubernetes.io/tls"

# The keys of a secret that may be made anew with the right type, as the original does.
_OURS: Final = frozenset({"tls.crt", "tls.key", "ca.crt"})


def secret_data(secret: Object) -> dict[str, bytes]:
    """Return a secret's data, decoded; what is no base64 is left out, as if it were missing."""
    data: dict[str, bytes] = {}
    for key, text in map_at(secret, "data").items():
        try:
            data[key] = base64.b64decode(text, validate=True)
        except (binascii.Error, TypeError, ValueError):
            continue
    return data


def encoded(data: dict[str, bytes]) -> dict[str, str]:
    """Return data as a secret's JSON has them."""
    return {key: base64.b64encode(value).decode() for key, value in data.items()}


async def ensure_leaf(
    api: KubeApi,
    namespace: str,
    name: str,
    leaf: Leaf,
    authority: Authority,
    *,
    owner: Object | None,
    now: datetime,
    contention: Contention,
) -> tuple[datetime, str | None]:
    """Keep the certificate of *leaf* in a secret; return when it ends, and why it was issued if it was.

    A secret of another type, or one that must not be changed, is replaced by a new one.

    Raises:
      ConflictingWriter: it was changed so often that it is left alone for a while.
      NameTaken: a secret of that name holds something else.
      KubeError: what the apiserver says; :class:`Conflict` if somebody else changed the secret.
    """
    live = await find(api, SECRETS, name, namespace)
    data = {} if live is None else secret_data(live)
    reason = "it is not there" if live is None else why_reissue(data, leaf, (authority,), now)
    if reason is None and live is not None and live.get("type") != TLS_SECRET:
        reason = f"its type is {live.get('type')}"
    if reason is None:
        return not_after(data["tls.crt"]), None
    called, wanted = f"Secret {namespace}/{name}", (leaf, authority.crt)
    contention.check(called, wanted, reason, last_writer(live or {}))
    crt, key = issue(authority, leaf, now)
    fresh: Object = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "namespace": namespace},
        "type": TLS_SECRET,
        "data": encoded({"tls.crt": crt, "tls.key": key}),
    }
    changeable = (
        live is not None and live.get("type") == TLS_SECRET and live.get("immutable") is not True
    )
    if live is not None and changeable:
        fresh["metadata"] = live["metadata"]
        fresh["data"] = {**map_at(live, "data"), **fresh["data"]}
    if owner is not None:
        add_owner(fresh, owner)
    if live is None:
        await api.create(SECRETS, fresh)
    elif changeable:
        await api.replace(SECRETS, fresh)
    elif owners_of(live) or data.keys() <= _OURS:
        await api.delete(SECRETS, name, namespace, uid=live["metadata"]["uid"])
        await api.create(SECRETS, fresh)
    else:
        raise NameTaken(
            f"{called} is there already and holds something else: delete it, or name another one in "
            "spec.authentication.dump.secrets"
        )
    contention.written(called, wanted)
    _log.info("issued the certificate in secret %s/%s: %s", namespace, name, reason)
    return not_after(crt), reason


def add_owner(obj: Object, owner: Object) -> bool:
    """Add an owner reference if none of its UID is there; return whether it was added."""
    owners = obj["metadata"].setdefault("ownerReferences", [])
    if any(other.get("uid") == owner["uid"] for other in owners):
        return False
    # One of the same name and another UID is that of a configuration that is gone.
    owners[:] = [
        other
        for other in owners
        if (other.get("kind"), other.get("name")) != (owner["kind"], owner["name"])
    ]
    owners.append(owner)
    return True
