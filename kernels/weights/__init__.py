"""How weights and caches are stored: one file a format, experts in host memory, and a weight as kernels see it."""
