"""Command line: `megatron-sage COMMAND ...`, also `python -m megatron_sage`, alone or under torchrun.

Bad input ends in one line and exit status 2; a run that a signal stopped after saving in 75; anything else keeps its
traceback, for it is a fault of the program.
Every command is imported only when it runs: importing torch takes seconds, `--help` should not.
"""

import argparse
import errno
import importlib
import os
import sys
import time
import warnings
from typing import NoReturn

from megatron_sage import __version__
from megatron_sage.errors import USER_ERROR, OutOfMemory, UserError

# command: (module whose main(argv) runs it, what it does)
COMMANDS = {
    "train": ("", "improve a model by SAGE-GRPO: train [--recipe NAME] [CONFIG] key=value ..."),
    "sample": ("megatron_sage.generate", "make videos from prompts"),
    "evaluate": ("megatron_sage.evaluation.command", "compare checkpoints: videos, scores, tables, a gallery"),
    "rate": (
        "megatron_sage.evaluation.rate_command",
        "blind ratings by people: rate make, rate table",
    ),
    "convert": ("megatron_sage.checkpoint.convert", "convert checkpoints between Hugging Face, official and Megatron"),
    "export": ("megatron_sage.checkpoint.pipeline", "write a trained model as a pipeline that diffusers runs"),
    "encode": ("megatron_sage.conditioning.command", "encode prompts and images into the cache that training reads"),
    "verify": ("megatron_sage.verify", "compare the model with diffusers' on the same weights and inputs"),
    "serve-rewards": ("megatron_sage.rewards.serving.command", "score videos for runs on other processes or hosts"),
    "plan": ("megatron_sage.planning.command", "layouts of N GPUs: memory, time, traffic; or a dry run of one rank"),
    "recipes": ("megatron_sage.recipes", "list the named runs, or show one: recipes show NAME"),
    "figures": ("megatron_sage.figures.command", "draw the method's figures: figures NAME"),
    "study": ("megatron_sage.study.command", "compare samplers, KL strategies and schedules on the tiny world"),
    "report": ("megatron_sage.reporting.report", "write a run's report.html"),
    "scaling": ("megatron_sage.scaling.command", "measure a run on more and more devices: scaling CONFIG --out DIR"),
    "status": ("megatron_sage.monitoring.status", "say in one line how a run is: status RUN_DIR"),
    "doctor": ("megatron_sage.doctor", "say what this machine has and what will be used"),
}

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)  # a user's to mend, wherever it shows

_SILENT_SECONDS = 10.0  # at most: torchrun ends a silent process once the speaking one has ended


class _Parser(argparse.ArgumentParser):
    """Reports a wrong argument in one line, as every other error of a user."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns the exit status: 2 for bad input, after one line on stderr."""
    # Megatron says this at every import, up to four times a process; `doctor` says once what is used instead.
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    try:
        command, arguments = _parse(sys.argv[1:] if argv is None else argv)
        if command == "train":
            return _train(arguments)
        return int(importlib.import_module(COMMANDS[command][0]).main(arguments))
    except UserError as error:
        return _report(error)
    except OSError as error:
        if error.errno not in _DISK:
            raise
        return _report(
            UserError(
                f"{error.filename or 'a file'}: cannot be written: {error.strerror}; free space, or write elsewhere"
            )
        )
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parse(argv: list[str]) -> tuple[str, list[str]]:
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items())
    parser = _Parser(
        prog="megatron-sage",
        description="SAGE-GRPO alignment of HunyuanVideo-1.5 on Megatron-core.",
        epilog=f"commands:\n{listing}\n\n`megatron-sage COMMAND --help` explains one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"megatron-sage {__version__}")
    parser.add_argument("command", metavar="COMMAND", help="one of the commands below")
    parser.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER, help="the command's own arguments")
    options = parser.parse_args(argv)
    if options.command not in COMMANDS:
        from megatron_sage.config.loading import nearest

        match = nearest(options.command, list(COMMANDS))
        cure = f"did you mean {match}? " if match else ""
        raise UserError(f"{options.command}: unknown command; {cure}choose from {', '.join(COMMANDS)}")
    return options.command, options.arguments


def _train(argv: list[str]) -> int:
    from megatron_sage.config import dump, load_config, validate
    from megatron_sage.recipes import recipe

    parser = _Parser(
        prog="megatron-sage train",
        description="Improve a model by SAGE-GRPO. Alone, or: torchrun --nproc-per-node N -m megatron_sage train ...",
        epilog="Example: megatron-sage train examples/quickstart/quickstart.yaml training.iterations=3",
    )
    parser.add_argument("--recipe", metavar="NAME", help="start from a named run; `megatron-sage recipes list`")
    parser.add_argument("settings", metavar="CONFIG key=value", nargs="*", help="YAML file, then dotted overrides")
    parser.add_argument(
        "--print-config", action="store_true", help="check and print the whole configuration, then stop"
    )
    options = parser.parse_intermixed_args(argv)
    paths = [text for text in options.settings if "=" not in text]
    if len(paths) > 1:
        raise UserError(f"{paths[1]}: one configuration file at most ({paths[0]} is one); overrides are key=value")
    base = recipe(options.recipe) if options.recipe else None
    config = load_config(paths[0] if paths else None, [text for text in options.settings if "=" in text], base)
    validate(config, _environment_number("WORLD_SIZE", 1))
    if options.print_config:
        if _environment_number("RANK", 0) == 0:
            print(dump(config), end="")
        return 0
    from megatron_sage.training.run import train

    return train(config)


def _environment_number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise UserError(f"{name}={text}: this environment variable is set by torchrun and must be a number; unset it")
    return int(text)


def _report(error: UserError) -> int:
    """Prints the line. Under torchrun, only where no other process prints the same."""
    rank, local_rank = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0")
    # Before the process groups exist every rank fails alike, so the first of each machine speaks for it (a file may
    # be missing on one machine only). Afterwards an error may be one rank's own: it must not be lost.
    distributed = sys.modules.get("torch.distributed")
    started = distributed is not None and distributed.is_available() and distributed.is_initialized()
    if local_rank == "0" or started:
        prefix = "error" if rank == "0" else f"error (rank {rank})"
        text = str(error) if isinstance(error, OutOfMemory) else " ".join(str(error).split())
        print(f"{prefix}: {text}", file=sys.stderr, flush=True)
    else:
        # torchrun ends all processes as soon as one fails: a silent one that is faster would take the line with it.
        time.sleep(_SILENT_SECONDS)
    return USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
