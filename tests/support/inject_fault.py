"""A module of the package with a fault that a person would make: its source with a few words changed."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any


def spoilt(module: ModuleType, folder: Path, *changes: tuple[str, str]) -> Any:
    """`module` once more, from a file in `folder`, each first text of `changes` replaced by the second."""
    source = Path(str(module.__file__)).read_text()
    for old, new in changes:
        if old not in source:
            raise ValueError(f"spoilt: {module.__name__} does not hold {old!r}")
        source = source.replace(old, new)
    name = f"{module.__name__}_spoilt_{folder.name}".replace("-", "_")
    file = folder / f"{name.rpartition('.')[2]}.py"
    file.write_text(source)
    spec = spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"spoilt: {file} does not load")
    made = module_from_spec(spec)
    sys.modules[name] = made  # where dataclasses and the JIT look for it
    spec.loader.exec_module(made)
    return made
