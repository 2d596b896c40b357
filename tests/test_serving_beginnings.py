"""What a byte string begins with, among many: against a look at every one of them."""

from __future__ import annotations

import os

from hypothesis import given
from hypothesis import strategies as st

from mq_ao.serving.beginnings import Beginnings

KEYS = st.lists(st.binary(max_size=6).map(lambda key: bytes(byte % 3 for byte in key)), max_size=20)


@given(keys=KEYS, gone=st.sets(st.integers(0, 19)), key=st.binary(max_size=8).map(lambda key: bytes(b % 3 for b in key)))
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
    assert beginnings.shared(key) == max((len(os.path.commonprefix([each, key])) for each in left), default=0)
