"""The model that tests of verify inject faults into, faults that several of them inject, and modules with a fault."""

import copy
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch

from mixtral_triton import Mixtral
from mixtral_triton.model import generate
from mixtral_triton.model.layer import ForwardContext, Layer
from tests.support.models import random_model

Patch = pytest.MonkeyPatch
Inject = Callable[[Patch], None]
SIZES: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_key_value_heads": 2, "sliding_window": 7}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
all_dtypes = pytest.mark.parametrize("dtype", DTYPES)


def small_model(dtype: torch.dtype = torch.float32, **sizes: Any) -> Mixtral:
    return random_model(dtype=dtype, gain=1.0, **SIZES | sizes)


def replace_by(place: Any, name: str, change: Callable[[Any], Any]) -> Inject:
    """change(function) in the place of the function `place.name`."""
    return lambda patch: patch.setattr(place, name, change(getattr(place, name)))


def in_step(name: str, change: Callable[..., Any]) -> Inject:
    """change(result, step) after a method of a step."""
    return replace_by(generate.Step, name, lambda f: lambda step, *args: (x := f(step, *args), change(x, step))[0])


def change_state(change: Callable[[ForwardContext], Any]) -> Inject:
    """`change` a new ForwardContext, which all layers of a forward share."""
    return replace_by(
        ForwardContext, "__init__", lambda init: lambda context, *args: (init(context, *args), change(context))[0]
    )


def in_router(**changes: Any) -> Inject:
    """The layers' routers use other values than the config has."""

    def faulty(route: Any) -> Any:
        def changed(layer: Layer, *args: Any) -> Any:
            layer = copy.copy(layer)
            layer.config = replace(layer.config, **changes)
            return route(layer, *args)

        return changed

    return replace_by(Layer, "route", faulty)


def module_with_fault(module: ModuleType, folder: Path, *changes: tuple[str, str]) -> Any:
    """`module` imported from a copy in `folder`, with the first text of each change replaced by the second: for faults
    in a kernel's source, which no patch of a function can inject."""
    source = Path(str(module.__file__)).read_text()
    for old, new in changes:
        if old not in source:
            raise ValueError(f"module_with_fault: {module.__name__} does not contain {old!r}")
        source = source.replace(old, new)
    name = f"{module.__name__}_fault_{folder.name}".replace("-", "_")
    file = folder / f"{name.rpartition('.')[2]}.py"
    file.write_text(source)
    spec = spec_from_file_location(name, file)
    faulty = module_from_spec(spec)
    sys.modules[name] = faulty  # dataclasses and the JIT look modules up there
    # torch's operator stays that of the right module.
    with mock.patch("mixtral_triton.kernels.operation.call.register"):
        spec.loader.exec_module(faulty)
    return faulty
