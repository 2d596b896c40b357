"""What a byte string begins with, among many: against a look at every one of them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mq_ao.serving.beginnings import Beginnings

KEY = st.lists(st.integers(0, 2), max_size=8).map(bytes)


def common(one: bytes, other: bytes) -> int:
    return max(size for size in range(min(len(one), len(other)) + 1) if one[:size] == other[:size])


@given(keys=st.lists(KEY, max_size=20), gone=st.sets(st.integers(0, 19)), key=KEY)
def test_they_are_found_as_by_looking_at_all(keys: list[bytes], gone: set[int], key: bytes) -> None:
    beginnings = Beginnings()
    for each in keys:
        beginnings.add(each)
    for place in gone:
        if place < len(keys):
            beginnings.remove(keys[place])
    left = [each for place, each in enumerate(keys) if place not in gone]
    fitting = [each for each in left if key.startswith(each)]
    assert beginnings.longest(key) == max(fitting, key=len, default=None)
    assert beginnings.shared(key) == max((common(each, key) for each in left), default=0)
