"""A simulated GPU, whose kernels run, for a run of pytest: `pytest -n auto -m gpu -p tests.support.stub.plugin`."""

from contextlib import ExitStack
from unittest import mock

from .adapter import measure, small_benchmarks
from .gpu import gpu

simulation = ExitStack()  # until the process ends, in each process of pytest-xdist
simulation.enter_context(gpu(1, L2_cache_size=1 << 10)).driver.executes = True
simulation.enter_context(mock.patch.multiple(measure, **small_benchmarks()))
