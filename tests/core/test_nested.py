"""The paths of nested values, as messages and comparisons write them."""

from __future__ import annotations

from hydrarun.core.nested import iterate_leaves


def test_each_value_has_its_path():
    node = {"a": 1, "b": {"c": [2, {"d": None}], 3: "x"}, "e": {}, "f": []}
    assert list(iterate_leaves(node)) == [("a", 1), ("b.c[0]", 2), ("b.c[1].d", None), ("b.3", "x")]
    assert list(iterate_leaves("x", "y")) == [("y", "x")]
