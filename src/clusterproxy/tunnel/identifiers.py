"""What an agent says that it can reach, and which destination that is compared with."""

from __future__ import annotations

from typing import Final

import attrs

from clusterproxy.gotext import parse_query

# strconv.ParseBool
_TRUE: Final = frozenset(("1", "t", "T", "TRUE", "true", "True"))


@attrs.frozen(kw_only=True)
class Identifiers:
    """The parsed ``agentidentifiers`` of an agent (upstream: proto/header/header.go).

    Attributes:
      hosts: its ipv4, ipv6 and host identifiers, exactly as given, in that order.
      default_route: whether it takes what nobody else claims.
      others: its ipv4, ipv6 and cidr identifiers, as ``key=value``. What is in a CIDR is never looked for, as upstream.
    """

    hosts: tuple[str, ...] = ()
    default_route: bool = False
    others: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Identifiers:
        """Parse a URL query string; unknown keys are ignored, as upstream does.

        Raises:
          ValueError: an encoding error, in Go's words.
        """
        values = parse_query(text)
        return cls(
            hosts=tuple(
                dict.fromkeys(
                    value for key in ("ipv4", "ipv6", "host") for value in values.get(key, ())
                )
            ),
            default_route=next(iter(values.get("default-route", ())), "") in _TRUE,
            others=tuple(
                f"{key}={value}"
                for key in ("ipv4", "ipv6", "cidr")
                for value in values.get(key, ())
            ),
        )


def destination_host(address: str) -> str:
    """Return the host of a dialled address (upstream: pkg/util/net.go, RemovePortFromHost)."""
    if address.count(":") < 2:
        return address.split(":", 1)[0]
    if "[" in address:
        address = address[: address.rindex(":")]
    return address.strip("[]")
