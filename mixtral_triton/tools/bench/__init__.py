"""Benchmark each operation against its peers and its floor, on the current GPU or by what is known without one."""
