from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusterproxy.http1 import Request, Response


@pytest.mark.parametrize(
    ("target", "path", "query", "authority"),
    [
        ("/", "/", {}, "h:1"),
        ("/a%20b?x=1&y&x=2", "/a b", {"x": ["1", "2"], "y": [""]}, "h:1"),
        ("//x/y", "//x/y", {}, "h:1"),
        ("*", "*", {}, "h:1"),
        ("/p://q", "/p://q", {}, "h:1"),
        ("http://a:2/p?q=http://z/", "/p", {"q": ["http://z/"]}, "a:2"),
        ("http://a", "/", {}, "a"),
        ("http://a?x", "/", {"x": [""]}, "a"),
    ],
)
def test_targets(target: str, path: str, query: dict[str, list[str]], authority: str) -> None:
    request = Request.parse("GET", target, [("Host", "h:1"), ("X", "1"), ("x", "2")])
    assert (request.path, request.query, request.authority) == (path, query, authority)
    assert request.headers == {"host": "h:1", "x": "2"}
    assert request.target == target


@given(st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1))
def test_no_target_is_too_strange(target: str) -> None:
    assert Request.parse("GET", target).target == target


def test_text_response() -> None:
    assert Response.text("é", 500) == Response(500, b"\xc3\xa9", "text/plain; charset=utf-8")
