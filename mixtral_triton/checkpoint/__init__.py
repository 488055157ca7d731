"""A checkpoint's folder: its config, its tensors, a rank's part of them; checks of a caller's arguments."""
