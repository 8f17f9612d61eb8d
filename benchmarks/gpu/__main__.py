"""python -m benchmarks.gpu [--only NAME,...] [--minutes 8] [--small] [--device cuda|cpu] [--out FOLDER]

One GPU; or torchrun --nproc-per-node N -m benchmarks.gpu, for the collectives as well. Rows are printed as JSON as they
come; gpu.json and gpu.md are written beside the benchmarks (with --small: into runs/benchmarks).
"""

import argparse
import difflib
import os
import sys

NAMES = ("ceiling", "block", "attention", "rollout", "anchor", "offload", "optimizer", "syncs", "collectives")


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, 1 where a section failed, 2 for bad input."""
    options = _parse(argv)
    if unknown := [name for name in options.only if name not in NAMES]:
        match = difflib.get_close_matches(unknown[0].lower(), NAMES, n=1)
        cure = f"did you mean {match[0]}? " if match else ""
        return _report(f"--only {unknown[0]}: unknown section; {cure}choose from {', '.join(NAMES)}")
    if options.minutes <= 0:
        return _report(f"--minutes {options.minutes:g}: must be > 0")
    if options.device == "cpu" and not options.small:
        return _report("--device cpu: the released model's sizes take a CPU days; add --small")
    if options.device == "cpu" and "torch" not in sys.modules:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported: the whole program asks torch for a GPU
    try:
        from benchmarks.gpu.command import run
        from megatron_sage.errors import UserError
    except ModuleNotFoundError as error:
        package = {"megatron": "megatron-core"}.get(str(error.name), error.name)
        return _report(f"the package {package} is not installed; benchmarks/README.md says what must be there")
    try:
        return run(options)
    except UserError as error:
        return _report(str(error))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description="Speed and memory on a GPU, every number next to its floor."
    )
    parser.add_argument(
        "--only",
        metavar="NAME,...",
        default=[],
        type=lambda text: [name.strip() for name in text.split(",") if name.strip()],
        help=f"these sections, and `ceiling`, on which all floors stand; of {', '.join(NAMES)}",
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="nothing is begun after so many (default: 8)")
    parser.add_argument("--small", action="store_true", help="tiny sizes: to see that it runs, never for its times")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to see that it runs")
    parser.add_argument("--out", metavar="FOLDER", help="where gpu.json and gpu.md go")
    return parser.parse_args(argv)


def _report(line: str) -> int:
    print(f"error: {line}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
