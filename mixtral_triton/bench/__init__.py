"""Measuring, compiling for a GPU that need not be there, and planning a GPU's memory: a command each."""
