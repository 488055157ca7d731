"""The operations: kernels, their tiles and launches, one file or folder each."""
