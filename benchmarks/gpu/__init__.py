"""Speed and memory on one GPU (or several), every number next to its floor: `python -m benchmarks.gpu --help`."""
