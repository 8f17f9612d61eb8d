"""A worker of a study: reads runs from standard input, trains and evaluates each, answers with one JSON line.

`python -m megatron_sage.study.work CACHE [key=value ...]`; a line in is {"cell": ..., "seed": ...}. One process does
run after run: importing costs more than a small run.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sage.config import Config, validate
from megatron_sage.data.prompts import read_rows
from megatron_sage.engine import build_engine, encode_prompts, initialize_groups, load_codec, prepare_embeddings
from megatron_sage.errors import UserError
from megatron_sage.reporting.progress import Reporter
from megatron_sage.rewards.build import build_reward
from megatron_sage.study.cells import Run
from megatron_sage.training.evaluation import held_out
from megatron_sage.training.optimizer import build_optimizer, wrap
from megatron_sage.training.trainer import Trainer

CURVE = ["reward/mean", "reward/std", "reward/VQ", "reward/MQ", "reward/TA", "kl/position", "kl/velocity"]
CURVE += ["lambda", "grad_norm", "clip_fraction"]


def execute(run: Run, config: Config) -> dict[str, Any]:
    """Train one run from the given weights, evaluate before and after: what goes into the study's tables."""
    begin = time.perf_counter()
    assert config.evaluation.prompts is not None
    taught, unseen = read_rows(config.data.prompts), read_rows(config.evaluation.prompts)
    groups = initialize_groups(config)
    prepare_embeddings(config, groups, [*taught, *unseen])
    engine = build_engine(config, groups)
    ddp = wrap(engine.chunks, engine.groups, config.optimizer.distributed)
    optimizer = build_optimizer(config, ddp, engine.dtype)
    prompts = encode_prompts(config, engine, [*taught, *unseen])
    codec, reward, silent = load_codec(config), build_reward(config.reward), Reporter(False)
    trainer = Trainer(engine, ddp, optimizer, prompts[: len(taught)], codec, reward, silent)
    validation = prompts[len(taught) :]
    before, _ = held_out("before", engine, validation, codec, reward, silent)
    rows = []
    for _ in range(config.training.iterations):
        row, reason = trainer.run_iteration()
        if reason is not None:
            raise UserError(reason)
        rows.append(row)
    after, _ = held_out("after", engine, validation, codec, reward, silent)
    return {
        "cell": run.cell,
        "seed": run.seed,
        "base": _means(before),
        "final": _means(after),
        "curves": [{key: row.get(key) for key in CURVE} for row in rows],
        "ratio_max": max(row.get("ratio/max", 1.0) for row in rows),
        "seconds": time.perf_counter() - begin,
    }


def _means(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Means over the held-out videos; nan where a video has no score."""
    names = [key for key in rows[0] if key not in ("index", "prompt")]
    return {name: float(np.mean([row[name] for row in rows])) for name in names}


def main() -> int:
    """Until the input ends. A run that fails is answered with its error; the worker goes on."""
    cache, overrides = sys.argv[1], sys.argv[2:]
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not mix with the answers
    for line in sys.stdin:
        run = Run(**json.loads(line))
        config = run.config(overrides, cache)
        config.output_dir = str(Path(cache).parent / "runs" / f"{run.cell}_seed{run.seed}")
        try:
            validate(config, 1)
            answer = execute(run, config)
        except UserError as error:
            answer = {"cell": run.cell, "seed": run.seed, "error": str(error)}
        print(json.dumps(answer), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
