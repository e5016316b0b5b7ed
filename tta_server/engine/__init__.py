"""The device side: load a source model, run many streams through it at once, step their policies."""
