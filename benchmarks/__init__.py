"""What is timed and counted: one command per table, `python -m benchmarks.NAME` from the repository's root."""
