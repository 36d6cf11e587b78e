"""A text that identifies a function or an argument, to tell whether saved results were made with the same one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from hashlib import sha256
from pathlib import Path as File
from types import CodeType, FunctionType, MethodType
from typing import Any

__all__ = ["describe"]


def describe(value: Any) -> str:
    """A text that identifies a function or an argument, and is the same in each run of the program.

    It contains the name, bytecode and defaults of a function, and the numbers and strings that it reads from outside,
    and the same for the functions of its file that it uses, such as the one below a decorator; the value of a number, a
    string or a container of them; the name of a class; and the class of any other object.
    """
    if isinstance(value, partial):
        arguments = [describe(value.func), *map(describe, value.args)]
        arguments += [f"{name}={describe(arg)}" for name, arg in value.keywords.items()]
        return f"partial({', '.join(arguments)})"
    if isinstance(value, MethodType):
        return f"{describe(value.__self__)}.{describe(value.__func__)}"
    if isinstance(value, FunctionType):
        parts = [part for function in _with_helpers(value) for part in _parts(function)]
        return f"{value.__qualname__}#{sha256(' '.join(parts).encode()).hexdigest()[:8]}"
    if isinstance(value, type):
        return value.__qualname__
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{describe(key)}: {describe(x)}' for key, x in value.items())}}}"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(describe, value))})"
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(map(describe, value)))}}}"
    simple = value is None or value is ... or isinstance(value, int | float | complex | str | bytes | File)
    return repr(value) if simple else type(value).__qualname__


def _with_helpers(function: FunctionType) -> list[FunctionType]:
    """The function, and the functions of its file that it uses, directly or not."""
    found = [function]
    for each in found:  # it grows meanwhile
        for x in _outside(each).values():
            same_file = isinstance(x, FunctionType) and x.__module__ == function.__module__
            if same_file and all(x is not other for other in found):
                found.append(x)
    return found


def _parts(function: FunctionType) -> list[str]:
    read = {name: x for name, x in _outside(function).items() if isinstance(x, int | float | str)}
    return [
        _code(function.__code__),
        describe(function.__defaults__),
        describe(function.__kwdefaults__),
        describe(read),
    ]


def _outside(function: FunctionType) -> dict[str, Any]:
    """The global variables and those of enclosing functions that a function, or one inside it, reads."""
    code = function.__code__
    found = {name: function.__globals__[name] for name in _names(code) if name in function.__globals__}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    return found


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield from _names(const)


def _code(code: CodeType) -> str:
    constants = [_code(const) if isinstance(const, CodeType) else describe(const) for const in code.co_consts]
    return " ".join([code.co_code.hex(), *code.co_names, *constants])
