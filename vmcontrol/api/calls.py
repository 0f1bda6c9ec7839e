"""How an XML-RPC method is declared, and how it is called with what a caller sent.

A method is a coroutine function with the mark `exposed` or `waits`. The annotations of its arguments say how each is
read (vmcontrol.api.arguments); one without is passed on as it came. A method that returns None answers True.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar, get_type_hints

from vmcontrol.api.arguments import BadArgument, VmName
from vmcontrol.hypervisors.interface import VmNotFound

M = TypeVar("M", bound=Callable[..., Awaitable[object]])
Method = Callable[..., Awaitable[object]]
"""With an attribute `given_up` that is true, it is cancelled when its caller goes away; else it is finished."""


def exposed(method: M) -> M:
    """Mark a method as callable over XML-RPC under its own name."""
    method.exposed = True  # type: ignore[attr-defined]
    return method


def waits(method: M) -> M:
    """An exposed method that is given up when its caller goes away. Others go on: a VM must not stay half saved."""
    method.given_up = True  # type: ignore[attr-defined]
    return exposed(method)


def functions_of(part: object) -> dict[str, Method]:
    """The exposed methods of an object or class, by name."""
    found = inspect.getmembers(part, inspect.iscoroutinefunction)
    return {name: function for name, function in found if getattr(function, "exposed", False)}


def callable_method(name: str, function: Method, name_of: Callable[[str], Awaitable[str]]) -> Method:
    """The function, called with arguments as they came. name_of: the name of a VM that was given by name or id."""
    signature = inspect.signature(function)
    hints = get_type_hints(function, include_extras=True)
    read = {argument: hint.__metadata__ for argument, hint in hints.items() if hasattr(hint, "__metadata__")}

    async def call(*arguments: object) -> object:
        try:
            bound = signature.bind(*arguments)
        except TypeError as error:
            raise BadArgument(f"{usage(name, function)}: {error}") from None
        given = bound.arguments
        for argument in [one for one in given if one in read]:
            given[argument] = read[argument][0](given[argument], argument)
        try:
            for argument in [one for one in given if VmName in read.get(one, ())]:
                given[argument] = await name_of(given[argument])
            answer = await function(*bound.args)
        except VmNotFound as error:
            raise BadArgument(f"No VM by the name/id {arguments[0] if arguments else ''} found") from error
        return True if answer is None else answer

    call.given_up = getattr(function, "given_up", False)  # type: ignore[attr-defined]
    return call


def help_text(functions: Mapping[str, Method], name: str) -> str:
    """Text about one method, or about all of them if the name is empty. Raises BadArgument."""
    if name and name not in functions:
        raise BadArgument(f"No such method: {name}")
    names = [name] if name else sorted(functions)
    return "\n\n".join(f"{usage(one, functions[one])}:\n{inspect.getdoc(functions[one]) or ''}" for one in names)


def usage(name: str, function: Callable[..., object]) -> str:
    """Name and arguments of a method."""
    parts = [
        argument.name if argument.default is argument.empty else f"{argument.name}={argument.default!r}"
        for argument in inspect.signature(function).parameters.values()
        if argument.name != "self"
    ]
    return f"{name}({', '.join(parts)})"
