"""Benchmarks: commands that print a table and one line of JSON. They are no tests."""
