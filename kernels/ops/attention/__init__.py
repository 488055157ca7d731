"""Attention: prefill, over a cache, and a decode step; start at op.py."""
