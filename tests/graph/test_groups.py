import pytest

from mpsearch.graph.groups import connected


def test_items_without_common_keys_stay_apart():
    assert connected([{"a"}, {"b"}, set()]) == [0, 1, 2]


def test_a_later_item_joins_two_groups_into_one():
    assert connected(["a", "b", "c", "ab"]) == [0, 0, 2, 0]
    assert connected(["a", "b", "c", "ba"]) == [0, 0, 2, 0]


def test_joining_two_groups_keeps_what_each_had_joined_before():
    assert connected(["a", "b", "ac", "bc"]) == [0, 0, 0, 0]


@pytest.mark.parametrize("count", [1, 50])
def test_a_chain_is_one_group_named_by_its_first_item(count: int):
    chain = [{i, i + 1} for i in range(count)]
    assert connected(chain) == [0] * count
    assert connected(chain[::-1]) == [0] * count
