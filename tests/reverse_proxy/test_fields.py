"""Which fields go on. What is seen on the wire is in the other tests."""

from __future__ import annotations

import time

import pytest

from clusterproxy.reverse_proxy.fields import (
    announcement,
    append_forwarded_for,
    connection_options,
    end_to_end,
    first,
    is_printable,
    join_cookies,
    joined,
    trailers_of,
    upgrade_of,
    wants_trailers,
)


def test_hop_by_hop() -> None:
    names = (b"connection", b"keep-alive", b"te", b"a", b"x", b"host", b"content-length")
    headers = [(name, b"1") for name in names]
    assert end_to_end(headers, frozenset({b"x", b"host"})) == [(b"a", b"1"), (b"host", b"1")]


def test_options() -> None:
    headers = [(b"connection", b"A, b"), (b"c", b"d"), (b"connection", b"Upgrade")]
    assert connection_options(headers) == {b"a", b"b", b"upgrade"}


def test_many_options_take_no_longer() -> None:
    headers = [(b"connection", b"o%d" % number) for number in range(9_900)]
    began = time.process_time()
    assert len(connection_options(headers)) == 9_900
    # It was a second, for which everybody else waited.
    assert time.process_time() - began < 0.3


@pytest.mark.parametrize(
    ("prior", "then"),
    [([], b"192.0.2.1"), ([b"a"], b"a, 192.0.2.1"), ([b"a, b", b"c"], b"a, b, c, 192.0.2.1")],
)
def test_forwarded_for_is_one_field(prior: list[bytes], then: bytes) -> None:
    headers = [(b"a", b"b"), *((b"x-forwarded-for", value) for value in prior), (b"c", b"d")]
    append_forwarded_for(headers, "192.0.2.1")
    assert headers == [(b"a", b"b"), (b"c", b"d"), (b"x-forwarded-for", then)]


def test_a_peer_without_an_address_is_not_named() -> None:
    headers = [(b"x-forwarded-for", b"a"), (b"x-forwarded-for", b"b")]
    append_forwarded_for(headers, "")
    assert headers == [(b"x-forwarded-for", b"a"), (b"x-forwarded-for", b"b")]


@pytest.mark.parametrize(
    ("value", "connection", "protocol"),
    [
        (b"websocket", {b"upgrade"}, b"websocket"),
        (b"websocket", set[bytes](), b""),
        (b"H2C", {b"upgrade"}, b""),
        (b"websocket, h2c", {b"upgrade"}, b""),
    ],
)
def test_upgrades(value: bytes, connection: set[bytes], protocol: bytes) -> None:
    assert upgrade_of([(b"upgrade", value)], frozenset(connection)) == protocol


def test_trailers() -> None:
    fields = [
        (b"x-sum", b"1"), (b"authorization", b"1"), (b"impersonate-user", b"1"), (b"cluster-proxy-proto", b"1"),
        (b"x-remote-user", b"1"), (b"content-length", b"1"), (b"host", b"1"), (b"if-match", b"1"),
    ]  # fmt: skip
    assert trailers_of(fields) == [(b"x-sum", b"1")]
    assert announcement(b"x-b, X-A , authorization, a b, te") == b"X-A, X-B"
    assert announcement(b"") == b""


def test_cookies() -> None:
    assert join_cookies([(b"cookie", b"a")]) == [(b"cookie", b"a")]
    assert join_cookies([(b"cookie", b"a"), (b"b", b"c"), (b"cookie", b"d")]) == [
        (b"b", b"c"),
        (b"cookie", b"a; d"),
    ]


def test_small_questions() -> None:
    headers = [(b"a", b"1"), (b"b", b"2"), (b"a", b"3")]
    assert first(headers, b"a") == b"1"
    assert first(headers, b"c") == b""
    assert joined(headers, b"a") == b"1, 3"
    assert wants_trailers([(b"te", b"gzip, Trailers")])
    assert not wants_trailers([(b"te", b"gzip")])
    assert is_printable(b"a ~")
    assert not is_printable(b"\x7f")
