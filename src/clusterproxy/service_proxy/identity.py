"""As whom a request goes on: impersonation, as headers say it. Pure.

Source: upstream ``pkg/serviceproxy/authentication.go``; RFC 9110 section 5.5 for what a header can carry.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import attrs

from clusterproxy.gotext import quote

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clusterproxy.reverse_proxy.exchange import Headers

AUTHORIZATION: Final = b"authorization"
_PREFIX: Final = b"impersonate-"
# Only the apiserver's own spelling counts as a request for impersonation; but none of a client's is left beside ours.
_LOOKALIKE: Final = b"impersonate_"

_SERVICE_ACCOUNT: Final = "system:serviceaccount:"
_HUB: Final = "cluster:hub:"

_BEARER: Final = re.compile(rb"(?i:Bearer) ([!-~]+)")
# A token with all groups of a large company fits; who sends more has no token.
_LONGEST_TOKEN: Final = 65_536
# The end of a name must not be space, which a header loses on its way.
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")


class Refused(Exception):
    """An identity or a request that must not go on; the text is for the client."""


@attrs.frozen
class Identity:
    """Whom a token belongs to."""

    username: str
    groups: tuple[str, ...] = ()


def bearer_token(headers: Headers) -> str:
    """Return the token that a request has, empty without one.

    What is no bearer token is none, too: other credentials are nothing to send to a token review.

    Raises:
      Refused: there are several, and who gets the request might take another than was looked at.
    """
    values = [value for name, value in headers if name == AUTHORIZATION]
    if len(values) > 1:
        raise Refused("authentication failed: more than one Authorization header")
    found = _BEARER.fullmatch(values[0]) if values else None
    if found is None or len(found[1]) > _LONGEST_TOKEN:
        return ""
    return found[1].decode()


def asks_impersonation(headers: Headers) -> bool:
    """Whether the client itself wants to be somebody else, which is for the apiserver to judge."""
    return any(name.startswith(_PREFIX) for name, _ in headers)


def check_not_of_hub(user: Identity) -> None:
    """Refuse a name that service accounts of the hub have on this cluster, and nobody else.

    Raises:
      Refused: it is one.
    """
    if user.username.startswith(_HUB):
        raise Refused(f"{quote(user.username)} would be a service account of the hub")


def of_hub(user: Identity, mapping: GroupMapping) -> Identity:
    """Return who a user of the hub is on this cluster.

    Raises:
      Refused: the name is that of another.
    """
    check_not_of_hub(user)
    prefix = _HUB if user.username.startswith(_SERVICE_ACCOUNT) else ""
    return Identity(prefix + user.username, mapping.groups(user.groups))


def impersonate(headers: Headers, identity: Identity, token: str) -> Headers:
    """Return the headers with which a request goes on as *identity*, by the right of *token*.

    Raises:
      Refused: a header cannot carry the name as it is.
    """
    # Without a name the apiserver would see no impersonation at all.
    if not identity.username:
        raise Refused("the user has no name")
    kept = [
        (name, value)
        for name, value in headers
        if name != AUTHORIZATION and not name.startswith((_PREFIX, _LOOKALIKE))
    ]
    said = [(b"impersonate-user", _carried("user name", identity.username))]
    # A group without a name is none.
    groups = (group for group in identity.groups if group)
    said += [(b"impersonate-group", _carried("group", group)) for group in groups]
    return [*kept, *said, (AUTHORIZATION, b"Bearer " + token.encode())]


def without_token(headers: Headers) -> Headers:
    """Return the headers without the token."""
    return [(name, value) for name, value in headers if name != AUTHORIZATION]


def _carried(what: str, text: str) -> bytes:
    """Return what a header has for *text*: UTF-8, as from a Go program."""
    if _CONTROL.search(text) or text != text.strip(" "):
        raise Refused(f"a header cannot carry the {what} {quote(text)}")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise Refused(f"a header cannot carry the {what} {quote(text)}") from error


@attrs.frozen
class GroupMapping:
    """What the hub's groups are called on this cluster; ours, and empty by default: they keep their names.

    Attributes:
      rules: pairs of a group and what becomes of it, the first that fits counts. A ``*`` at the end of the first stands for
        any rest, and in the second for that rest. An empty second means that the group is left out.
    """

    rules: tuple[tuple[str, str], ...] = ()

    def groups(self, groups: Sequence[str]) -> tuple[str, ...]:
        """Return the groups by their names here, without those that are left out, each once."""
        return tuple(dict.fromkeys(filter(None, map(self._name, groups))))

    def _name(self, group: str) -> str:
        for pattern, becomes in self.rules:
            if pattern == group:
                return becomes
            if pattern.endswith("*") and group.startswith(pattern[:-1]):
                return becomes.replace("*", group[len(pattern) - 1 :], 1)
        return group
