"""Whether a class keeps to its role as far as can be seen without running it: names, options, arguments of methods."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

from vmsnap.roles.needs import Module, Program
from vmsnap.roles.options import Option

_NEEDED_FOR = {
    "clones": ("plan_clone", "clone", "delete_clone", "clone_reader"),
    "changes": ("changed_extents",),
    "writes": ("writer",),
    "freezes": ("plan_freeze", "prepare_freeze", "freeze_disks", "check_frozen", "thaw_disks", "thaw_owned"),
}
"""A capability, and the methods that must be the driver's own where it says that it has it."""


def breaches(driver: type[Any], role: type[Any], name: str) -> list[str]:
    """In what a driver's class does not keep to its role, one clause each; empty where nothing is wrong.

    :param name: that of its entry point
    """
    lacking = sorted(getattr(driver, "__abstractmethods__", ()))
    if lacking:
        return [f"it lacks {', '.join(lacking)}"]
    return [*_of_names(driver, name), *_of_options(driver), *_of_capabilities(driver, role), *_of_methods(driver, role)]


def _of_names(driver: type[Any], name: str) -> Iterator[str]:
    called = getattr(driver, "name", None)
    if called != name:
        yield f"its entry point is named {name!r} and its class {called!r}"


def _of_options(driver: type[Any]) -> Iterator[str]:
    for attribute, kinds in (("options", (Option,)), ("needs", (Program, Module))):
        declared = getattr(driver, attribute, ())
        if not isinstance(declared, Sequence) or not all(isinstance(each, kinds) for each in declared):
            yield f"its {attribute} are no sequence of {' or '.join(kind.__name__ for kind in kinds)}"
            return
    names = [option.name for option in driver.options]
    if len(set(names)) < len(names):
        yield "it declares an option twice"


def _of_capabilities(driver: type[Any], role: type[Any]) -> Iterator[str]:
    for capability, methods in _NEEDED_FOR.items():
        if getattr(driver, capability, False) is True:
            left = [method for method in methods if getattr(driver, method, None) is getattr(role, method, None)]
            if left:
                yield f"it says that it has {capability!r}, and lacks {', '.join(left)}"


def _of_methods(driver: type[Any], role: type[Any]) -> Iterator[str]:
    for method, asked in inspect.getmembers(role, inspect.isfunction):
        own = getattr(driver, method, None)
        if own is asked or (method.startswith("_") and method != "__init__"):
            continue
        if not callable(own):
            yield f"its {method} is no method"
        elif inspect.isfunction(own) and (problem := _refusal(inspect.signature(own), inspect.signature(asked))):
            yield f"its {method} does not take what the role gives: {problem}"


def _refusal(own: inspect.Signature, asked: inspect.Signature) -> str:
    """Why a method cannot be called as the role's can be, with all arguments or with the fewest; empty where it can."""
    parameters = list(asked.parameters.values())
    required = [each for each in parameters if each.default is inspect.Parameter.empty]
    for given in (parameters, required):
        positional = [each.name for each in given if each.kind is not inspect.Parameter.KEYWORD_ONLY]
        named = {each.name: None for each in given if each.kind is inspect.Parameter.KEYWORD_ONLY}
        # those with a default are given by their names as well
        by_name = {each.name: None for each in given if each not in required} | named
        first = [name for name in positional if name not in by_name]
        for arguments, keywords in ((positional, named), (first, by_name)):
            try:
                own.bind(*arguments, **keywords)
            except TypeError as e:
                return str(e)
    return ""
