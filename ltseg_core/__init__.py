"""ltseg: long-tailed semantic segmentation, five papers and their baselines under one protocol."""

__version__ = "0.1.0"
