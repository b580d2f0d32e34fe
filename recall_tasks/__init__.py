"""Recall tasks: one file a task, found by its name (none is built yet)."""
