"""Long lists in messages."""

from atlas_jax.wording import shorten


def test_a_list_of_the_limit_is_whole_and_a_longer_one_ends_with_the_number_of_the_others():
    assert shorten(list("abc"), 3) == ["a", "b", "c"]
    assert shorten(list("abcd"), 3) == ["a", "b", "c", "and 1 more"]
    assert shorten([], 3) == []
