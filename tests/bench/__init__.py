"""Benchmarks: commands that print a table and one line of JSON. They are no tests."""

import os

# Before torch is there, and as ranks have it: threads that spin for ever while they wait do not finish at all where
# other processes want the cores.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
