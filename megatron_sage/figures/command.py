"""`megatron-sage figures`: make the method's figures anew."""

import argparse
from pathlib import Path

from megatron_sage.config.loading import nearest
from megatron_sage.errors import UserError
from megatron_sage.figures.registry import FIGURES

DEFAULT_OUT, DEFAULT_STUDY = "docs/figures", "docs/study"


def main(argv: list[str]) -> int:
    """Command line of `figures`; see `--help`. UserError for an unknown name or a directory that cannot be made."""
    parser = argparse.ArgumentParser(
        prog="megatron-sage figures",
        description="Make a figure: NAME.png and NAME.csv with the numbers in it. Without a name: list them.",
    )
    parser.add_argument("name", nargs="?", default="list", metavar="NAME", help="a figure, `all` or `list` (default)")
    parser.add_argument("--out", default=DEFAULT_OUT, help=f"directory for the files; default: {DEFAULT_OUT}")
    parser.add_argument(
        "--study",
        default=DEFAULT_STUDY,
        metavar="DIR",
        help=f"results.csv and curves.csv that reward_curves and kl_strategies draw; default: {DEFAULT_STUDY}",
    )
    arguments = parser.parse_args(argv)
    if arguments.name == "list":
        width = max(map(len, FIGURES))
        print("\n".join(f"{name:{width}}  {text}" for name, (_, text) in FIGURES.items()))
        return 0
    names = list(FIGURES) if arguments.name == "all" else [_known(arguments.name)]
    out = Path(arguments.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot make this directory ({error.strerror}); name another") from error
    for name in names:
        for path in FIGURES[name][0](out, Path(arguments.study)):
            print(f"wrote {path}", flush=True)
    return 0


def _known(name: str) -> str:
    if name not in FIGURES:
        choices = [*FIGURES, "all", "list"]
        match = nearest(name, choices)
        cure = f"did you mean {match}? " if match else ""
        raise UserError(f"{name}: unknown figure; {cure}choose from {', '.join(choices)}")
    return name
