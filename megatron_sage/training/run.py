"""`megatron-sage train`: from a validated config to a finished run directory."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_sage.checkpoint.store import CheckpointStore, newest
from megatron_sage.config import Config, dump
from megatron_sage.data.prompts import DataReport, read_dataset
from megatron_sage.engine import (
    Engine,
    build_engine,
    encode_prompts,
    initialize_groups,
    load_codec,
    prepare_embeddings,
)
from megatron_sage.errors import UserError
from megatron_sage.model.lora_targets import is_adapter
from megatron_sage.monitoring.monitor import Monitor
from megatron_sage.parallel import groups as process_groups
from megatron_sage.parallel.context import choose_backend
from megatron_sage.parallel.control import Stopped
from megatron_sage.parallel.device import device
from megatron_sage.reporting.progress import Reporter
from megatron_sage.reporting.report import write_report
from megatron_sage.reporting.schedule import write_schedule
from megatron_sage.rewards.build import accounts, build_reward
from megatron_sage.training.evaluation import describe_evaluation, evaluate
from megatron_sage.training.export import write_export
from megatron_sage.training.metrics import MetricsLog, environment
from megatron_sage.training.optimizer import build_optimizer, wrap
from megatron_sage.training.precision import calibrate
from megatron_sage.training.state import TrainState
from megatron_sage.training.supervision import Supervision
from megatron_sage.training.trainer import Trainer


def train(config: Config) -> int:
    """Run training from start (or the newest checkpoint) to end; the config has been validated.

    Returns 0 when done, 75 when a signal stopped the run and its state was saved.
    """
    if config.precision.threads:
        torch.set_num_threads(config.precision.threads)
    if config.reward.url is not None:
        build_reward(config.reward)  # a server that is missing or does not fit shows before the first collective
    groups = initialize_groups(config)
    reporter = Reporter(groups.rank == 0)
    _start_directory(Path(config.output_dir), config, groups)
    with Supervision(config, groups) as supervision, Monitor(config, groups, supervision.control, reporter) as monitor:
        _train(config, groups, reporter, supervision, monitor)
    # Not in a `finally`: the command line prints an error of one rank alone only while the groups still exist.
    process_groups.shutdown()
    return supervision.exit_code


def _train(
    config: Config, groups: process_groups.Groups, reporter: Reporter, supervision: Supervision, monitor: Monitor
) -> None:
    main = groups.rank == 0
    directory = Path(config.output_dir)
    data, held_out_data = _read_data(config, groups, reporter)
    rows, held_out = data.rows, held_out_data.rows if held_out_data else []
    prepare_embeddings(config, groups, [*rows, *held_out])
    engine = build_engine(config, groups)
    engine.control = supervision.control
    ddp = wrap(engine.chunks, groups, config.optimizer.distributed)
    optimizer = build_optimizer(config, ddp, engine.dtype)
    prompts = encode_prompts(config, engine, [*rows, *held_out])
    codec, reward = load_codec(config), build_reward(config.reward, device())
    for line in accounts(reward):
        reporter.line(line)
    trainer = supervision.trainer = Trainer(engine, ddp, optimizer, prompts[: len(rows)], codec, reward, reporter)
    trainer.cursor.digest = data.digest
    validation = prompts[len(rows) :]
    state, checkpoints, settings = TrainState(trainer), directory / "checkpoints", config.training
    if resumes(config):
        state.load(checkpoints)
    store = CheckpointStore(checkpoints, settings.keep_last, settings.keep_every, settings.async_save)
    log = MetricsLog(directory / "metrics.jsonl", main, trainer.iteration)
    references = MetricsLog(directory / "references.jsonl", main and bool(trainer.reference.kinds), trainer.iteration)
    _say_layout(config, engine, reporter)
    monitor.start(trainer)
    try:
        calibrate(engine, trainer.prompts)
        if validation and trainer.iteration == 0:
            evaluate("before", engine, validation, codec, reward, reporter)
        if config.training.iterations == 0:
            if main:
                reporter.line(f"{directory / 'evaluation.json'}: {describe_evaluation(directory)}")
            return
        _iterate(config, state, store, log, references, supervision, monitor)
        if groups.pp_size > 1:
            write_schedule(trainer.schedule, groups.pp, directory)
        if validation:
            evaluate("after", engine, validation, codec, reward, reporter)
    except Stopped:
        engine.control.enter("save")
        state.save(store)
        store.finish()
        reporter.line(f"stopped: the state of {trainer.iteration} iterations is in {checkpoints}")
        raise
    engine.control.enter("export")
    write_export(engine, directory / "export", trainer.ema)
    if main:
        reporter.line(f"report: {write_report(directory)}")
    dist.barrier(group=dist.group.WORLD)


def _read_data(
    config: Config, groups: process_groups.Groups, reporter: Reporter
) -> tuple[DataReport, DataReport | None]:
    """Training and held-out prompts, read by rank 0: all ranks hold the same rows or stop.

    Where damaged images may be skipped, each is decoded; else the first one stops the run when it is encoded. What was
    skipped or doubled is said once and kept in data.json.
    """
    paths = [path for path in (config.data.prompts, config.evaluation.prompts) if path]
    found: list[Any] = [None]
    if groups.rank == 0:
        try:
            found = [[read_dataset(config.data, path, decode=config.data.skip_unreadable) for path in paths]]
        except UserError as error:
            found = [error]
    dist.broadcast_object_list(found, src=0, group=dist.group.WORLD)
    if isinstance(found[0], UserError):
        raise found[0]
    reports: list[DataReport] = found[0]
    for note in [note for report in reports for note in report.notes]:
        reporter.line(note)
    if groups.rank == 0:
        summary = json.dumps([report.summary() for report in reports], indent=1, ensure_ascii=False)
        (Path(config.output_dir) / "data.json").write_text(summary + "\n", encoding="utf-8")
    return reports[0], reports[1] if len(reports) > 1 else None


def resumes(config: Config) -> bool:
    """Whether the run goes on from a checkpoint; `auto` where there is one."""
    found = newest(Path(config.output_dir) / "checkpoints") is not None
    return config.training.resume == "yes" or (config.training.resume == "auto" and found)


def _say_layout(config: Config, engine: Engine, reporter: Reporter) -> None:
    groups, settings = engine.groups, engine.model_config
    parameters = sum(p.numel() for chunk in engine.chunks for p in chunk.parameters())
    adapters = sum(p.numel() for chunk in engine.chunks for n, p in chunk.named_parameters() if is_adapter(n))
    trained = f", {adapters:,} of them adapters and trained" if config.lora.rank is not None else ""
    forwards = {part: network.branches for part, network in engine.networks().items()}
    reporter.line(
        f"guidance {config.sampler.guidance_scale}, cfg_in_training {config.grpo.cfg_in_training}: "
        + ", ".join(f"{count} forward{'s' * (count > 1)} a step in the {part}" for part, count in forwards.items())
    )
    reporter.line(
        f"{config.name}: {groups.world_size} ranks = TP {groups.tp_size} x CP {groups.cp_size} x PP {groups.pp_size} x "
        f"DP {groups.dp_size}; {parameters:,} parameters on this one{trained}; "
        f"{engine.shape.shard.num_tokens} video tokens, {engine.shape.shard.local} on a rank"
    )
    if groups.cp_size > 1:
        chosen, reason = choose_backend(settings.num_attention_heads, groups.tp_size, groups.cp_size)
        if config.parallel.context_backend != "auto":
            chosen, reason = config.parallel.context_backend, "as configured"
        reporter.line(f"context-parallel attention: {chosen} ({reason})")
    if groups.pp_size > 1:
        stages = [" + ".join(f"{len(blocks)}" for blocks in chunks) for chunks in settings.stage_blocks]
        kind = "interleaved 1F1B" if len(settings.stage_blocks[0]) > 1 else "1F1B"
        reporter.line(f"pipeline: blocks of each stage {', '.join(stages)}; {kind}")


def _iterate(
    config: Config,
    state: TrainState,
    store: CheckpointStore,
    log: MetricsLog,
    references: MetricsLog,
    supervision: Supervision,
    monitor: Monitor,
) -> None:
    """All iterations, each with its line of metrics; a checkpoint at the end and every `save_interval`.

    `references` gets the checksums of the references' weights, each iteration's, before its updates.
    """
    trainer = state.trainer
    while trainer.iteration < config.training.iterations:
        number = trainer.iteration
        row, stop = trainer.run_iteration()
        log.write({"iteration": number} | row)
        references.write({"iteration": number} | trainer.reference.used)
        monitor.iteration(number, row)
        monitor.reporter.line(_line(number, config.training.iterations, row))
        due = config.training.save_interval and trainer.iteration % config.training.save_interval == 0
        if due or stop or trainer.iteration == config.training.iterations:
            supervision.control.enter("save")
            state.save(store)
        store.poll()
        if stop:
            store.finish()
            raise UserError(f"{stop}; the run is saved in {store.directory}")
        supervision.progress(trainer.iteration)
        supervision.control.end_phase()  # a signal that came while the iteration could not be dropped
    store.finish()


def _line(number: int, total: int, row: dict[str, Any]) -> str:
    def show(key: str, form: str) -> str:
        return format(row[key], form) if key in row else "-"

    return (
        f"iteration {number + 1}/{total}  reward {show('reward/mean', '.4f')} ± {show('reward/std', '.4f')}"
        f"  loss {show('loss', '.3e')}  kl {show('kl/position', '.2e')}  clip {show('clip_fraction', '.2f')}"
        f"  grad {show('grad_norm', '.3f')}  {show('seconds/total', '.1f')} s"
    )


def _start_directory(directory: Path, config: Config, groups: process_groups.Groups) -> None:
    """The run's directory with its config; refused where another run's results would be mixed with this one's."""
    problem: list[str | None] = [None]
    if groups.rank == 0:
        if (directory / "metrics.jsonl").exists() and config.training.resume == "no":
            problem = [
                f"output_dir={directory}: holds a run already: choose another, delete it, or set training.resume=yes"
            ]
        else:
            try:
                directory.mkdir(parents=True, exist_ok=True)
                (directory / "config.yaml").write_text(dump(config))
                (directory / "environment.json").write_text(json.dumps(environment(groups.world_size), indent=1) + "\n")
            except OSError as error:
                problem = [f"output_dir={directory}: cannot be written: {error.strerror}; choose another"]
    dist.broadcast_object_list(problem, src=0, group=dist.group.WORLD)
    if problem[0]:
        raise UserError(problem[0])
