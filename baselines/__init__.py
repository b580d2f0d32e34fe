"""The baselines: one file an architecture, found by its name."""
