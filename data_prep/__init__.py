"""Fetch public data sets, check them, and convert them into the layout that `ltseg_core.data` reads.

    python -m data_prep camvid --root DIR

Raw data is never edited: an archive is read as a stream, converted into a working folder beside the
target, counted, and only then moved to its place in one step.
"""
