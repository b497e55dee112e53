"""Cases of parametrized tests, of which the fast tests run some."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def some_slow(cases: Iterable[Any], fast: Collection[Any]) -> list[Any]:
    """Return the cases as parameters, all but the `fast` ones marked slow.

    A case is one argument, or a tuple of several.
    """
    cases = list(cases)
    assert all(case in cases for case in fast), "a fast case that there is not"
    slow = pytest.mark.slow
    return [
        case
        if case in fast
        else pytest.param(*case, marks=slow)
        if isinstance(case, tuple)
        else pytest.param(case, marks=slow)
        for case in cases
    ]
