"""A copy of a kernel's module with a fault in its source, for faults that no patch of a function can inject."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock


def module_with_fault(module: ModuleType, folder: Path, *changes: tuple[str, str]) -> Any:
    """`module` imported from a copy in `folder`, with the first text of each change replaced by the second."""
    source = Path(str(module.__file__)).read_text()
    for old, new in changes:
        if old not in source:
            raise ValueError(f"module_with_fault: {module.__name__} does not contain {old!r}")
        source = source.replace(old, new)
    name = f"{module.__name__}_fault_{folder.name}".replace("-", "_")
    file = folder / f"{name.rpartition('.')[2]}.py"
    file.write_text(source)
    spec = spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    faulty = module_from_spec(spec)
    sys.modules[name] = faulty  # dataclasses and the JIT look modules up there
    with mock.patch("mixtral_triton.kernels.call._register"):  # torch's operator stays that of the right module
        spec.loader.exec_module(faulty)
    return faulty
