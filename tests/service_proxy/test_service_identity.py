"""Rows H4, H6 and H16: as whom a request goes on."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusterproxy.service_proxy.identity import (
    GroupMapping,
    Identity,
    Refused,
    asks_impersonation,
    bearer_token,
    impersonate,
    of_hub,
    without_token,
)

NOTHING = GroupMapping()


@pytest.mark.parametrize(
    ("value", "token"),
    [
        (b"Bearer a.b-c_~+/=", "a.b-c_~+/="),
        (b"bearer x", "x"),
        (b"BEARER x", "x"),
        (b"Bearer  x", ""),
        (b"Bearer x y", ""),
        (b"Bearer ", ""),
        (b"Bearer", ""),
        (b"Basic eDp5", ""),
        (b"x", ""),
        (b"", ""),
        (b"Bearer \xff", ""),
        (b"Bearer " + b"x" * 65_536, "x" * 65_536),
        (b"Bearer " + b"x" * 65_537, ""),
        (b"Bearer " + b"x" * 1_048_576, ""),
    ],
)
def test_token(value: bytes, token: str) -> None:
    assert bearer_token([(b"accept", b"x"), (b"authorization", value)]) == token


def test_no_token_and_several() -> None:
    assert bearer_token([(b"cookie", b"Bearer x")]) == ""
    with pytest.raises(Refused, match="more than one Authorization"):
        bearer_token([(b"authorization", b"Bearer x"), (b"authorization", b"Bearer x")])


@pytest.mark.parametrize(
    ("name", "asks"),
    [
        (b"impersonate-user", True),
        (b"impersonate-group", True),
        (b"impersonate-uid", True),
        (b"impersonate-extra-scopes", True),
        (b"impersonate-whatever-comes", True),
        (b"impersonate-", True),
        (b"impersonator", False),
        (b"impersonate", False),
        (b"impersonate_user", False),
        (b"x-impersonate-user", False),
    ],
)
def test_who_asks_to_be_somebody_else(name: bytes, asks: bool) -> None:
    assert asks_impersonation([(b"host", b"x"), (name, b"")]) is asks


def test_impersonation_leaves_nothing_of_the_clients_own() -> None:
    sent = [
        (b"host", b"h"),
        (b"authorization", b"Bearer theirs"),
        (b"accept", b"*/*"),
        (b"impersonate-user", b"admin"),
        (b"impersonate-extra-a%2fb", b"x"),
        (b"impersonate_user", b"admin"),
        (b"impersonate_group", b"system:masters"),
        *((b"impersonate-group", b"system:masters") for _ in range(1000)),
    ]
    identity = Identity("jürgen", ("a", "", "b c", "grüße"))
    assert impersonate(sent, identity, "ours") == [
        (b"host", b"h"),
        (b"accept", b"*/*"),
        (b"impersonate-user", "jürgen".encode()),
        (b"impersonate-group", b"a"),
        (b"impersonate-group", b"b c"),
        (b"impersonate-group", "grüße".encode()),
        (b"authorization", b"Bearer ours"),
    ]


@pytest.mark.parametrize(
    "name",
    ["a\r\nImpersonate-Group: system:masters", "a\n", "\r", "a\x00", "\x7f", "a\tb", " a", "a ", "\ud800"],
)  # fmt: skip
def test_names_that_a_header_cannot_carry(name: str) -> None:
    with pytest.raises(Refused, match="a header cannot carry the user name"):
        impersonate([], Identity(name), "t")
    with pytest.raises(Refused, match="a header cannot carry the group"):
        impersonate([], Identity("a", ("good", name)), "t")


def test_a_user_without_a_name_would_be_the_proxy_itself() -> None:
    with pytest.raises(Refused, match="no name"):
        impersonate([], Identity("", ("system:masters",)), "t")


@given(st.text(), st.lists(st.text(), max_size=3))
def test_what_goes_on_is_what_was_meant(user: str, groups: list[str]) -> None:
    try:
        sent = impersonate([(b"impersonate-user", b"x")], Identity(user, tuple(groups)), "t")
    except Refused:
        return
    assert [value.decode().strip(" \t") for name, value in sent if name == b"impersonate-user"] == [
        user
    ]
    carried = [value.decode() for name, value in sent if name == b"impersonate-group"]
    assert carried == [group for group in groups if group]
    assert not any(byte in value for _, value in sent for byte in b"\r\n\x00")


@pytest.mark.parametrize(
    ("username", "here"),
    [
        ("system:serviceaccount:ns:sa", "cluster:hub:system:serviceaccount:ns:sa"),
        ("system:serviceaccount:", "cluster:hub:system:serviceaccount:"),
        ("System:serviceaccount:ns:sa", "System:serviceaccount:ns:sa"),
        ("system:admin", "system:admin"),
        ("somebody", "somebody"),
    ],
)
def test_users_of_the_hub(username: str, here: str) -> None:
    groups = ("system:serviceaccounts", "system:masters", "system:authenticated")
    assert of_hub(Identity(username, groups), NOTHING) == Identity(here, groups)


def test_nobody_is_called_as_a_service_account_of_the_hub_is_here() -> None:
    with pytest.raises(Refused, match="would be a service account of the hub"):
        of_hub(Identity("cluster:hub:system:serviceaccount:ns:sa"), NOTHING)


@pytest.mark.parametrize(
    ("rules", "groups", "here"),
    [
        ((), ("a", "b", "a"), ("a", "b")),
        ((("system:masters", ""),), ("system:masters", "a"), ("a",)),
        ((("system:masters", "hub-admins"),), ("system:masters", "system:mastersx"), ("hub-admins", "system:mastersx")),
        (
            (("system:authenticated", "system:authenticated"), ("system:*", ""), ("*", "hub:*")),
            ("system:masters", "system:authenticated", "dev", ""),
            ("system:authenticated", "hub:dev", "hub:"),
        ),
        ((("a*", "x"), ("ab", "never")), ("ab", "ac"), ("x",)),
        ((("a*", "<*>*"),), ("a*b",), ("<*b>*",)),
    ],
)  # fmt: skip
def test_group_mapping(
    rules: tuple[tuple[str, str], ...], groups: tuple[str, ...], here: tuple[str, ...]
) -> None:
    assert of_hub(Identity("u", groups), GroupMapping(rules)).groups == here


def test_without_token() -> None:
    assert without_token([(b"authorization", b"x"), (b"a", b"b")]) == [(b"a", b"b")]
