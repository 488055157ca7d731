"""The model: a forward of layers over a cache, its loader, and what generates with it."""
