"""cat-bench: one harness for the Compress-and-Attend Transformer and its competitors."""

__version__ = "0.1.0"
