from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from clusterproxy.addon.index import Index


@given(st.lists(st.tuples(st.sampled_from("abc"), st.lists(st.integers(0, 3), max_size=4))))
def test_it_finds_what_was_put_last(puts: list[tuple[str, list[int]]]) -> None:
    index: Index[int] = Index()
    wanted: dict[str, set[int]] = {}
    for name, keys in puts:
        index.put(name, keys)
        wanted[name] = set(keys)
        for key in range(4):
            assert set(index.under(key)) == {each for each in wanted if key in wanted[each]}
        assert set(index.names()) == {each for each in wanted if wanted[each]}


def test_nothing_is_left_of_what_is_gone() -> None:
    index: Index[str] = Index()
    index.put("a", ["k", "l"])
    index.put("a", ())
    index.put("never there", ())
    assert not any(vars(index).values())
