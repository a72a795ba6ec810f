"""A user's function by import path."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def import_function(path: str, what: str) -> Callable[..., Any]:
    """The callable at ``package.module:function``; ValueError saying which part of the path is wrong.

    what: what it is for, for the message. An error inside the module is raised as it is, with this path before it.
    """
    module_name, colon, name = path.partition(":")
    if not (module_name and colon and name):
        raise ValueError(f"{what} {path!r} is no import path; write package.module:function")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{what} {path!r}: module {error.name!r} was not found; install it, or put its folder on PYTHONPATH"
        ) from error
    except Exception as error:
        raise ValueError(f"{what} {path!r}: importing {module_name} raised {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        known = ", ".join(sorted(key for key, value in vars(module).items() if callable(value) and key[0] != "_"))
        raise ValueError(f"{what} {path!r}: {module_name} has no function {name!r}; it has {known or 'none'}")
    return function
