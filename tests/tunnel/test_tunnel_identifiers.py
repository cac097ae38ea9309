from __future__ import annotations

import pytest

from clusterproxy.tunnel.identifiers import Identifiers, destination_host


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", Identifiers()),
        ("host=a&host=b", Identifiers(hosts=("a", "b"))),
        (
            "host=h&ipv6=%3A%3A1&ipv4=1.2.3.4",
            Identifiers(hosts=("1.2.3.4", "::1", "h"), others=("ipv4=1.2.3.4", "ipv6=::1")),
        ),
        ("host=a&host=a&ipv4=a", Identifiers(hosts=("a",), others=("ipv4=a",))),
        ("host=A.example+b", Identifiers(hosts=("A.example b",))),
        ("cidr=10.0.0.0/8&uid=1&later=x", Identifiers(others=("cidr=10.0.0.0/8",))),
        ("default-route=true", Identifiers(default_route=True)),
        ("default-route=T&host=x", Identifiers(hosts=("x",), default_route=True)),
        ("default-route=1&default-route=false", Identifiers(default_route=True)),
        ("default-route=false&default-route=true", Identifiers()),
        ("default-route=yes", Identifiers()),
        ("default-route", Identifiers()),
    ],
)
def test_parse(text: str, expected: Identifiers) -> None:
    assert Identifiers.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "error"),
    [("host=%zz", 'invalid URL escape "%zz"'), ("a;b", "invalid semicolon separator in query")],
)
def test_errors_are_those_of_go(text: str, error: str) -> None:
    with pytest.raises(ValueError) as caught:
        Identifiers.parse(text)
    assert str(caught.value) == error


@pytest.mark.parametrize(
    ("address", "host"),
    [
        ("", ""),
        ("localhost", "localhost"),
        ("localhost:80", "localhost"),
        ("1.2.3.4:443", "1.2.3.4"),
        (":80", ""),
        ("::", "::"),
        ("::1", "::1"),
        ("[::1]:80", "::1"),
        ("[2001:db8::1]:443", "2001:db8::1"),
        ("2001:db8::1", "2001:db8::1"),
        # Without a port the brackets cost the last group: so it is upstream.
        ("[2001:db8::1]", "2001:db8:"),
    ],
)
def test_destination_host(address: str, host: str) -> None:
    assert destination_host(address) == host
