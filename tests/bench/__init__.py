"""Benchmarks: commands that print a table and one line of JSON. They are no tests."""

import os

# Before torch is there: threads that wait by spinning do not finish at all where other processes want the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
