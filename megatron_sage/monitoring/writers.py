"""TensorBoard and Weights & Biases, written by rank 0. A resumed run goes on in the same chart, no step twice."""

import json
import math
import os
import secrets
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from megatron_sage.config import Config
from megatron_sage.errors import UserError

TENSORBOARD, WANDB = "tensorboard", "wandb.json"


class Writer(Protocol):
    """Where an iteration's numbers go."""

    def write(self, iteration: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


def finite(row: dict[str, Any]) -> dict[str, float]:
    """What a chart can show: a nan would end the line of its curve for good in some of them."""
    numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return {key: float(value) for key, value in numbers.items() if math.isfinite(value)}


def build_writers(config: Config, first: int) -> list[Writer]:
    """`first`: the iteration that this process begins with; what an earlier one wrote from there on is replaced."""
    settings, directory = config.logging, Path(config.output_dir)
    writers: list[Writer] = []
    if settings.tensorboard:
        writers.append(TensorBoard(directory / TENSORBOARD, first))
    if settings.wandb is not None:
        writers.append(WeightsAndBiases(config, directory))
    return writers


class TensorBoard:
    """Event files in RUN/tensorboard, complete after every iteration."""

    def __init__(self, directory: Path, first: int) -> None:
        """Raises UserError where the package is missing or the directory cannot be written."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(f"logging.tensorboard=true: {error}; pip install tensorboard") from error
        try:
            # purge_step tells readers to forget the steps that a killed process wrote and this one does again
            self._writer = SummaryWriter(str(directory), purge_step=first or None)
        except OSError as error:
            raise UserError(f"{directory}: cannot be written: {error.strerror}") from error

    def write(self, iteration: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, iteration)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """One W&B run for a run's directory, however often it is resumed; its id is in RUN/wandb.json.

    What was logged is not logged again: a resumed run repeats the iterations behind its checkpoint, to the same
    numbers at the same layout, and W&B takes each step once. Offline, RUN/wandb/offline-run-* has one folder for each
    process; `wandb sync` puts them into one run, in their order.
    """

    def __init__(self, config: Config, directory: Path) -> None:
        """Raises UserError where W&B refuses to start."""
        try:
            import wandb
        except ImportError as error:
            raise UserError(f"logging.wandb: {error}; pip install 'megatron-sage[wandb]'") from error
        settings = {"name": config.name} | dict(config.logging.wandb or {})
        self._file, mode = directory / WANDB, config.logging.wandb_mode
        known = json.loads(self._file.read_text()) if self._file.exists() else {}
        self._id, self._next = known.get("id") or secrets.token_hex(4), int(known.get("next", 0))
        try:
            self._run = wandb.init(
                dir=str(directory),
                id=self._id,
                mode=mode,
                resume="allow" if mode == "online" else None,  # offline there is nothing to ask
                config=asdict(config),
                settings=wandb.Settings(console="off", silent=True),
                **settings,
            )
        except (wandb.Error, OSError) as error:
            raise UserError(
                f"logging.wandb: W&B did not start: {' '.join(str(error).split())}; log in, or set "
                "logging.wandb_mode=offline"
            ) from error
        self._remember()

    def write(self, iteration: int, values: dict[str, float]) -> None:
        if iteration < self._next:
            return
        self._run.log(values, step=iteration)
        self._next = iteration + 1
        self._remember()

    def _remember(self) -> None:
        partial = self._file.with_name(f".{WANDB}.tmp")
        partial.write_text(json.dumps({"id": self._id, "next": self._next}) + "\n")
        os.replace(partial, self._file)

    def close(self) -> None:
        self._run.finish()
