"""A user's own function as a peer: found by its name, and called as the operation is."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from operator import attrgetter
from typing import Any

from ...kernels.op import Op
from .peers import Args, Function, Peer

NEEDS = "needs MODULE:FUNCTION, as in my_module:my_function"


def own_peer(name: str, function: Callable[..., Any]) -> Peer:
    """`function` beside an operation: it gets the operation's arguments, by position and in the operation's order."""
    if not callable(function):
        raise ValueError(f"peer {name!r} is a {type(function).__name__}, needs a function")
    return Peer(name, None, "", partial(_called_alike, function))


def arguments(op: Op, args: Args) -> dict[str, Any]:
    """What `op` takes, in its order, with defaults: up to the last one that a case gives."""
    defaults = {name: parameter.default for name, parameter in op.signature.parameters.items()}
    last = max(list(defaults).index(name) for name in args)
    return dict(list(defaults.items())[: last + 1])


def _called_alike(function: Callable[..., Any], op: Op, args: Args) -> Function:
    taken = arguments(op, args)
    try:
        inspect.signature(function).bind(*taken)
    except TypeError as error:
        raise TypeError(f"{error}; it is called with ({', '.join(taken)})") from error
    except ValueError:  # a function of C that does not tell
        pass
    return lambda **given: function(*({**taken, **given}[name] for name in taken))


def imported(text: str) -> Peer:
    """The peer that `--peer` names, of a module that is installed or in the current folder.

    ValueError: no such module, or it does not import; no such name in it; not a function.
    """
    module, _, name = text.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), *name.split("."))):
        raise ValueError(f"--peer is {text!r}, {NEEDS}")
    try:
        function = attrgetter(name)(_module(module))
    except AttributeError as error:
        raise ValueError(f"--peer is {text!r}: {error}; {NEEDS}") from error
    if not callable(function):
        raise ValueError(f"--peer is {text!r}, which is a {type(function).__name__}, needs a function")
    return own_peer(text, function)


def _module(name: str) -> Any:
    """First of the current folder, as `python -m` does it; what it imports later is found there, too."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        return import_module(name)
    except Exception as error:  # the module's own code may raise anything
        said = f"{type(error).__name__}: {error}"
        raise ValueError(f"--peer needs a module {name!r} that imports, in this folder or installed: {said}") from error
    finally:
        sys.path.remove(here)
        if here not in sys.path:
            sys.path.append(here)
