"""Random cases by hypothesis: few in the default run, many more with `slow`."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis.strategies import SearchStrategy

Test = Callable[..., None]


def random_cases(few: int, many: int, **strategies: SearchStrategy[Any]) -> Callable[[Test], Test]:
    """Run a test with arguments that are drawn from `strategies`: `few` times, and `many` times with `slow`.

    The same cases are drawn each time. A failure is shown as it was drawn: to make it smaller takes minutes in Triton's
    interpreter.
    """

    def decorate(test: Test) -> Test:
        @functools.wraps(test)
        def run(*args: Any, cases: int, **kwargs: Any) -> None:
            drawn = given(**strategies)(test)
            phases = [Phase.explicit, Phase.generate]
            settings(max_examples=cases, deadline=None, derandomize=True, phases=phases)(drawn)(*args, **kwargs)

        signature = inspect.signature(test)
        cases = inspect.Parameter("cases", inspect.Parameter.KEYWORD_ONLY)
        kept = [parameter for name, parameter in signature.parameters.items() if name not in strategies]
        run.__signature__ = signature.replace(parameters=[*kept, cases])  # type: ignore[attr-defined]
        return pytest.mark.parametrize("cases", [few, pytest.param(many, marks=pytest.mark.slow)])(run)

    return decorate
