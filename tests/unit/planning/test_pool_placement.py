# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Which models are on which nodes of a pool."""

from __future__ import annotations

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from kubediffusion_operator.planning.placement import Item, place


def nodes(count: int, limit: int = 10) -> dict[str, int]:
    return {f"n{number}": limit for number in range(count)}


def test_every_model_gets_one_before_any_gets_two() -> None:
    items = [Item("big", 3, 6), Item("small", 1, 4), Item("other", 1, 4)]
    placed = place(items, nodes(2), {})
    assert not placed.left
    assert {name: len(on) for name, on in placed.plan.items()} == {"big": 1, "small": 1, "other": 1}


def test_more_copies_go_to_more_nodes() -> None:
    placed = place([Item("a", 5, 4)], nodes(3), {})
    assert placed.plan == {"a": ("n0", "n1", "n2")}


def test_without_limits_load_is_spread() -> None:
    items = [Item(f"m{number}", 1) for number in range(4)]
    placed = place(items, nodes(2, 0), {})
    on = [node for names in placed.plan.values() for node in names]
    assert on.count("n0") == on.count("n1") == 2


def test_what_fits_nowhere_is_left_and_the_rest_is_placed() -> None:
    placed = place([Item("huge", 1, 11), Item("a", 1, 5)], nodes(1), {})
    assert placed.left == ("huge",)
    assert placed.plan == {"a": ("n0",)}


def test_without_nodes_all_are_left() -> None:
    assert place([Item("a", 1, 5)], {}, {"a": ("gone",)}).left == ("a",)


def test_a_newcomer_moves_nobody() -> None:
    now = {"a": ("n1",), "b": ("n1",)}
    placed = place([Item("a", 1, 3), Item("b", 1, 3), Item("c", 1, 6)], nodes(2), now)
    assert placed.plan == {"a": ("n1",), "b": ("n1",), "c": ("n0",)}


def test_second_copies_make_room_for_first_ones() -> None:
    now = {"a": ("n0", "n1")}
    placed = place([Item("a", 2, 6), Item("b", 1, 6)], nodes(2), now)
    assert not placed.left
    assert len(placed.plan["a"]) == 1


def test_all_is_packed_anew_only_where_that_places_more() -> None:
    # 5 + 4 and 5 + 4 do fit on two nodes of ten, but not beside 4 + 4.
    now = {"a": ("n0",), "b": ("n0",)}
    items = [Item("a", 1, 4), Item("b", 1, 4), Item("c", 1, 5), Item("d", 1, 6)]
    placed = place(items, nodes(2), now)
    assert not placed.left
    impossible = place([*items, Item("e", 1, 9)], nodes(2), now)
    assert impossible.left


def test_fewer_copies_leave_the_fullest_node() -> None:
    now = {"a": ("n0", "n1"), "b": ("n0",)}
    placed = place([Item("a", 1, 2), Item("b", 1, 2)], nodes(2), now)
    assert placed.plan == {"a": ("n1",), "b": ("n0",)}


def test_a_model_that_turned_out_larger_goes_where_it_fits() -> None:
    now = {"a": ("n0",), "b": ("n0",)}
    placed = place([Item("a", 1, 6), Item("b", 1, 8)], nodes(2), now)
    assert not placed.left
    assert placed.plan["a"] != placed.plan["b"]


def test_no_copies_wanted_none_kept() -> None:
    assert place([Item("a", 0, 1)], nodes(1), {"a": ("n0",)}).plan == {}


# ---------------------------------------------------------------- a model and those that help it


def test_a_model_goes_where_its_helpers_fit_too() -> None:
    items = [Item("dit", 1, 6, {"edges": 3}), Item("vae", 1, 5)]
    placed = place(items, nodes(2), {"vae": ("n0",)})
    assert placed.plan == {"dit": ("n1",), "vae": ("n0",)}


def test_two_models_on_one_node_share_a_helper() -> None:
    items = [Item("a", 1, 4, {"edges": 2}), Item("b", 1, 4, {"edges": 2})]
    placed = place(items, nodes(1), {})
    assert placed.plan == {"a": ("n0",), "b": ("n0",)}
    assert not placed.without


def test_a_model_goes_without_its_largest_helper_rather_than_not_at_all() -> None:
    items = [Item("dit", 1, 6, {"big": 5, "edges": 2}), Item("vae", 1, 2)]
    placed = place(items, nodes(1), {})
    assert placed.plan == {"dit": ("n0",), "vae": ("n0",)}
    assert not placed.left
    assert placed.without == {"dit": ("big",)}


def test_a_helper_that_comes_moves_its_model_to_where_both_fit() -> None:
    now = {"dit": ("n0",), "vae": ("n0",)}
    items = [Item("dit", 1, 5, {"edges": 3}), Item("vae", 1, 4)]
    placed = place(items, nodes(2), now)
    assert not placed.left
    assert not placed.without
    assert placed.plan["dit"] != placed.plan["vae"]


def test_a_helper_takes_nobodys_place() -> None:
    items = [Item("dit", 1, 5, {"edges": 5}), Item("vae", 1, 4)]
    placed = place(items, nodes(1), {"dit": ("n0",)})
    assert placed.plan == {"dit": ("n0",), "vae": ("n0",)}
    assert placed.without == {"dit": ("edges",)}


def test_without_room_for_the_model_nothing_is_said_of_its_helpers() -> None:
    placed = place([Item("dit", 1, 11, {"edges": 1})], nodes(1), {})
    assert (placed.left, placed.without) == (("dit",), {})


# A helper has one size, whichever model it is beside.
SIZES = {"h0": 2, "h1": 5, "h2": 0}
HELPERS = st.sets(st.sampled_from(sorted(SIZES))).map(
    lambda names: {name: SIZES[name] for name in sorted(names)}
)
ITEMS = st.lists(
    st.builds(
        Item,
        st.sampled_from([f"m{number}" for number in range(6)]),
        st.integers(0, 3),
        st.integers(0, 12),
        HELPERS,
    ),
    unique_by=lambda item: item.name,
    max_size=6,
)
LIMITS = st.dictionaries(st.sampled_from(["n0", "n1", "n2"]), st.integers(0, 20), max_size=3)
NOW = st.dictionaries(
    st.sampled_from([f"m{number}" for number in range(6)]),
    st.lists(st.sampled_from(["n0", "n1", "n2", "gone"]), unique=True, max_size=3).map(tuple),
    max_size=4,
)


@given(ITEMS, LIMITS, NOW)
def test_whatever_there_is_the_plan_keeps_to_the_limits(
    items: list[Item], limits: dict[str, int], now: dict[str, tuple[str, ...]]
) -> None:
    placed = place(items, limits, now)
    known = {item.name: item for item in items}
    for name, on in placed.plan.items():
        assert 1 <= len(on) <= known[name].copies
        assert len(set(on)) == len(on)
        assert set(on) <= set(limits)
    for node, limit in limits.items():
        there = [known[name] for name, on in placed.plan.items() if node in on]
        helpers = {
            name
            for item in there
            for name in item.helpers
            if name not in placed.without.get(item.name, ())
        }
        taken = sum(item.size for item in there) + sum(SIZES[name] for name in helpers)
        assert not limit or taken <= limit
    wanted = {item.name for item in items if item.copies}
    assert set(placed.left) == wanted - set(placed.plan)


@given(ITEMS, LIMITS, NOW, st.randoms())
def test_a_plan_is_settled_and_does_not_depend_on_the_order(
    items: list[Item],
    limits: dict[str, int],
    now: dict[str, tuple[str, ...]],
    random: Random,
) -> None:
    placed = place(items, limits, now)
    assert place(items, limits, placed.plan) == placed
    shuffled = list(items)
    random.shuffle(shuffled)
    assert place(shuffled, dict(reversed(limits.items())), now) == placed


@given(ITEMS, LIMITS, NOW)
def test_what_fits_stays(
    items: list[Item], limits: dict[str, int], now: dict[str, tuple[str, ...]]
) -> None:
    """Where all have a place and nobody wants fewer, one more node moves nothing."""
    before = place(items, limits, now)
    if before.left or before.without:
        return
    after = place(items, {**limits, "new": 0}, before.plan)
    for name, on in before.plan.items():
        assert set(on) <= set(after.plan[name])
