"""Types for files that are checked when they are read, and what is wrong with one that does not pass."""

from typing import Annotated

from pydantic import BeforeValidator, Field, Strict, ValidationError

from fastssl.common.terminal import printable


def _number(value: object) -> object:
    """Raise ValueError for a bool, and for what can be converted to a number, such as a tensor."""
    if type(value) not in (int, float):
        raise ValueError(f"a {type(value).__name__} is no number")
    return value


# JSON and pickle have true and false, NaN and integers of any length, none of which is a number here.
Count = Annotated[int, Strict(), Field(ge=0, le=2**53)]  # of steps, epochs, images
Finite = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_number)]
Text = Annotated[str, Strict(), Field(max_length=5000)]


def first_problem(error: ValidationError) -> str:
    """Return the first thing that is wrong with a file, such as "loader.epoch: Input should be a valid integer"."""
    problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
    key = ".".join(map(str, problem["loc"]))
    message = problem["msg"].removeprefix("Value error, ")
    return printable(f"{key}: {message}" if key else message)[:200]
