"""The first of ordered candidates that passes a test which takes long, from a guess."""

from __future__ import annotations

from collections.abc import Callable

_STEP = 8
"""From the guess to what is tried beside it."""


def first_passing(passes: Callable[[int], bool], count: int, guess: int) -> int:
    """The first index that passes, if all behind it do; else one that passes while that before it does not.

    Steps of growing width lead away from the guess until one index passes and another does not; then halves.

    Args:
        passes: the test; it is not asked of the last index, which passes.
        count: of the candidates, at least 1.
        guess: what is tried first; it may lie outside.
    """
    failing, passing = -1, count - 1
    untried = {True, False}
    index, step = guess, _STEP
    while passing - failing > 1:
        index = min(max(index, failing + 1), passing - 1)
        passed = passes(index)
        failing, passing = (failing, index) if passed else (index, passing)
        untried.discard(passed)
        if untried:
            index, step = index - step if passed else index + step, 2 * step
        else:
            index = (failing + passing) // 2
    return passing
