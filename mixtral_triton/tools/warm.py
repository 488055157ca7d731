"""Imported by the process that workers are forked from: what each of them would do anew."""

from __future__ import annotations

from triton.runtime.cache import triton_key

from . import offline as offline

triton_key()  # of all cache entries: a hash over Triton's own files, some seconds, once a process
