"""How much anonymous memory a piece of work takes at most: in a process of its own, watched by a thread."""

import os
import subprocess
import sys

import pytest

STATUS = "/proc/self/status"
needs_proc = pytest.mark.skipif(not os.path.exists(STATUS), reason=f"reads anonymous memory from {STATUS}")
WATCH = """
import sys, threading, torch

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

def sample():
    while not done.wait(0.001):
        peak[0] = max(peak[0], anonymous())

{setup}
torch.ones(100).to(torch.bfloat16).sum()
base, peak, done = anonymous(), [0], threading.Event()
thread = threading.Thread(target=sample)
thread.start()
{work}
done.set(), thread.join()
print(max(peak[0], anonymous()) - base, size)
"""


def anonymous_peak(setup: str, work: str, *args: str) -> tuple[int, int]:
    """Bytes that the lines of `work` take at most after those of `setup`, and the `size` that they set.

    Both find `args` in sys.argv[1:].
    """
    command = [sys.executable, "-c", WATCH.replace("{setup}", setup).replace("{work}", work), *args]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    peak, size = map(int, result.stdout.split())
    return peak, size
