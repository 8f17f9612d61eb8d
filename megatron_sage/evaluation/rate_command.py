"""`megatron-sage rate make | table`: blind ratings of two checkpoints' videos by people."""

import argparse
import csv
import io
from pathlib import Path

from megatron_sage.errors import UserError
from megatron_sage.evaluation import store
from megatron_sage.evaluation.rating import KEY, make_rating
from megatron_sage.evaluation.votes import Ratings, read_ratings, table

NOTE = (
    "A tie counts half. 95 % intervals over prompts and raters (docs/evaluation.md); with one rater over prompts alone."
)


def main(argv: list[str]) -> int:
    """Command line of `rate`; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="megatron-sage rate",
        description="Blind ratings: `make` writes a page for each rater from a finished evaluation, `table` counts the "
        "files that they send back.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="make | table")
    make = commands.add_parser("make", help="pages to be rated", prog="megatron-sage rate make")
    make.add_argument("evaluation", help="--out of `evaluate`")
    make.add_argument("--pairs", action="append", required=True, metavar="NAME,NAME", help="e.g. base,sage; repeatable")
    make.add_argument("--raters", type=int, default=1, help="pages, each with an order of its own (1)")
    make.add_argument("--samples", type=int, default=1, help="videos of each prompt (1)")
    make.add_argument("--limit", type=int, help="only the first so many prompts")
    make.add_argument("--seed", type=int, default=0, help="of orders and sides (0)")
    make.add_argument("--out", help="a new directory; default: EVALUATION/rating")
    count = commands.add_parser("table", help="win rates from answers", prog="megatron-sage rate table")
    count.add_argument("files", nargs="+", help="answers_*.json")
    count.add_argument("--key", required=True, help=f"{KEY} of the study")
    count.add_argument("--csv", help="write the table there as well")
    arguments = parser.parse_args(argv)
    if arguments.command == "make":
        evaluation = Path(arguments.evaluation)
        out = Path(arguments.out) if arguments.out else evaluation / "rating"
        given = (arguments.raters, arguments.seed, arguments.samples, arguments.limit)
        print("\n".join(make_rating(evaluation, out, arguments.pairs, *given)))
        return 0
    ratings = read_ratings([Path(file) for file in arguments.files], Path(arguments.key))
    if not ratings.votes:
        raise UserError(f"{arguments.files[0]}: no answers at all; nothing to count")
    if arguments.csv:
        store.write_text(Path(arguments.csv), as_csv(ratings))
    print(as_markdown(ratings), end="")
    return 0


def as_markdown(ratings: Ratings) -> str:
    """The table and what is to be known about the files."""
    lines = ["| pair | question | better | same | worse | win rate | prompts | raters |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in table(ratings):
        rate = f"{100 * row['rate']:.1f} % ({100 * row['low']:.0f} to {100 * row['high']:.0f})"
        cells = [row["pair"], row["question"], row["better"], row["same"], row["worse"], rate]
        lines.append(f"| {' | '.join(map(str, [*cells, row['prompts'], row['raters']]))} |")
    return "\n".join([*lines, "", NOTE, *ratings.remarks]) + "\n"


def as_csv(ratings: Ratings) -> str:
    """One line a pair and question."""
    rows, text = table(ratings), io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
