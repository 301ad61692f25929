"""Check the arguments of functions that users call by their annotations, like options of commands.

    @checked
    def draw(self, prompt: Text, *, n: PositiveInt = 1, first: Literal["text", "image"] = "text"):
        ...

`draw("a dog", n=0)` then raises UserError("n is 0; it must be a whole number, at least 1"), and
with `n=np.int64(2)` the function gets 2. `Annotated[T, check]` is checked by calling
`check(value, where)`, and types that configs do not have are checked by `isinstance`.
"""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin

import numpy as np

from cm3leon.config import Component, ComponentChecker, Range, checked_value
from cm3leon.types import UserError

P = ParamSpec("P")
R = TypeVar("R")

RENAMED = {"most": "max_tokens", "way": "execution"}
"""Names of arguments and options in earlier versions, which still work, and their present names."""
PLAIN = (bool, int, float, str, Path, types.NoneType, Any)
"""Types that configs have, too."""


def any_text(value: Any, where: str) -> str:
    """Check for any Unicode text.

    Half of a surrogate pair, which a command line that is not UTF-8 leaves, is refused.
    """
    if not isinstance(value, str):
        raise _not_a("a text", value, where)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where} is {value!a}, which is not Unicode text") from error
    return value


def worded_text(value: Any, where: str) -> str:
    """Check for a text that is not blank."""
    if not any_text(value, where).strip():
        raise UserError(f"{where} is empty; it must be a text")
    return value


Text = Annotated[str, any_text]
"""Any text, also an empty one."""
Worded = Annotated[str, worded_text]
"""A text with a character that is not a space."""


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap a function so that its arguments are checked, and converted to their annotated types.

    Calls then raise UserError for a wrong argument, naming it, and for a list the index in it.
    """
    signature = inspect.signature(function)
    hints = functools.cache(lambda: typing.get_type_hints(function, include_extras=True))

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        given = {current_name(name, signature.parameters): kwargs[name] for name in kwargs}
        bound = signature.bind(*args, **given)
        for name, value in bound.arguments.items():
            if name in hints():
                bound.arguments[name] = argument(hints()[name], value, name)
        return function(*bound.args, **bound.kwargs)

    return call


def current_name(name: str, known: Collection[str]) -> str:
    """Translate an earlier name of a known argument or option into the present one."""
    new = RENAMED.get(name, name)
    return new if name not in known and new in known else name


def argument(annotation: Any, value: Any, where: str) -> Any:
    """Convert a value to its annotated type; numbers and arrays of NumPy become Python's.

    Raises:
        UserError: for a value of another type, naming it by `where`.
    """
    origin, members = get_origin(annotation), get_args(annotation)
    if isinstance(value, np.generic):
        value = value.item()

    # Types made of types: their members are checked in turn.
    if origin in (Union, types.UnionType):
        return _one_of(members, value, where)
    if origin is Annotated:
        return _annotated(members[0], members[1:], value, where)
    if origin is Sequence:
        return [
            argument(members[0], item, f"{where}.{index}")
            for index, item in enumerate(_items(value, where))
        ]
    if origin is tuple and isinstance(value, (np.ndarray, list, tuple)):
        value = [item.item() if isinstance(item, np.generic) else item for item in value]

    # Types of configs are checked as there, all others by their class.
    if annotation in PLAIN or origin in (Literal, tuple):
        return checked_value(annotation, value, where)
    if not isinstance(value, origin or annotation):
        raise _not_a((origin or annotation).__name__, value, where)
    return value


def _one_of(members: Sequence[Any], value: Any, where: str) -> Any:
    """Convert a value to the first member of a union that accepts it."""
    if value is None and types.NoneType in members:
        return None
    refusals = []
    for member in members:
        if member is types.NoneType:
            continue
        try:
            return argument(member, value, where)
        except UserError as error:
            refusals.append(error)
    # Lists come last in our unions, and the message about a list names the item that is wrong.
    raise refusals[-1 if isinstance(value, (list, tuple)) else 0]


def _annotated(base: Any, metadata: Sequence[Any], value: Any, where: str) -> Any:
    for check in metadata:
        if isinstance(check, ComponentChecker):
            return value if isinstance(value, Component) else check.check(value, where)
        if not isinstance(check, Range):
            return check(value, where)
    return checked_value(Annotated[base, *metadata], value, where)


def _items(value: Any, where: str) -> list[Any]:
    if isinstance(value, (str, bytes)) or not isinstance(value, (Sequence, Iterator, np.ndarray)):
        raise _not_a("a list", value, where)
    return list(value)


def _not_a(what: str, value: Any, where: str) -> UserError:
    return UserError(f"{where} is of type {type(value).__name__}; it must be {what}")
