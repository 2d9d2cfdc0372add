"""The bounds of numbers: each is refused in one line that names it, and its own value is accepted."""

import pytest

from hydrarun.config.bounds import BOUNDS, describe_excess, find_wide_numbers

EACH = [(section, name) for section, fields in BOUNDS.items() for name in fields]


@pytest.mark.parametrize(("section", "name"), EACH)
def test_both_bounds_are_accepted_and_what_lies_beyond_is_not(section, name):
    least, most = BOUNDS[section][name]
    assert describe_excess(least, least, most) is describe_excess(most, least, most) is None
    assert describe_excess(most + 1, least, most) == f"{most + 1} is above {most}."
    assert str(least - 1) in describe_excess(least - 1, least, most)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -0.5])
def test_a_fraction_is_finite(value):
    assert describe_excess(value, 0.0, 1_000) == f"{value} is not a finite number >= 0."


@pytest.mark.parametrize("value", [None, "1e9", [1], "???"])
def test_what_is_no_number_is_left_to_the_check_of_types(value):
    assert describe_excess(value, 1, 2) is None


def test_a_number_of_any_key_fits_64_bits():
    """A longer one has no float, and above 4,300 digits not even a text."""
    config = {"a": [1, {"b": 2**64}], "c": {"d": 2**64 - 1, "e": -(10**5000), "f": True, "g": "x"}}
    assert list(find_wide_numbers(config)) == [
        ("a[1].b", "a whole number of 65 bits; 64 at most."),
        ("c.e", "a whole number of 16610 bits; 64 at most."),
    ]
