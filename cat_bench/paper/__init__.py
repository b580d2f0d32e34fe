"""The exhibits of the paper: one file per table or figure, found by its name."""
