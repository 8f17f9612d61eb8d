"""The checkpoint converter, as `megatron-sage convert`: python tools/convert.py hf-to-megatron SRC DST."""

import sys

from megatron_sage.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
