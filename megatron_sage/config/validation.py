"""The rules that a configuration must keep, all checked before the first collective.

A rule that fails on one rank alone after the process groups exist leaves the other ranks waiting for ever; every
check here reads only the configuration, the world size and files, so all ranks stop at the same line.
"""

import dataclasses
import json
import operator
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from megatron_sage.config.layout import check_model_layout, check_schedule, check_world
from megatron_sage.config.loading import bind
from megatron_sage.config.logging_rules import check_logging
from megatron_sage.config.reward_rules import check_reward
from megatron_sage.config.schema import Config, lambda_max
from megatron_sage.config.state_rules import (
    check_fp8_blocks,
    check_lora,
    check_lora_sizes,
    check_optimizer,
    check_precision,
    check_state,
)
from megatron_sage.data.backend import check_backend
from megatron_sage.errors import UserError

ARCHITECTURE = "HunyuanVideo15Transformer3DModel"

_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}
# key, comparison, bound, cure
_BOUNDS: list[tuple[str, str, float, str]] = [
    ("seed", ">=", 0, "use a non-negative number"),
    ("seed", "<", 2**63, "use a number of at most 63 bits"),
    ("precision.threads", ">=", 1, "null leaves the choice to PyTorch"),
    ("video.frames", ">=", 1, "81 is the usual length"),
    ("video.height", ">=", 16, "one latent row is 16 pixels"),
    ("video.width", ">=", 16, "one latent column is 16 pixels"),
    ("video.fps", ">", 0, "24 is the model's rate"),
    ("sampler.num_steps", ">=", 1, "20 is the usual number"),
    ("sampler.shift", ">", 0, "1 is an unshifted schedule, 5 the 480p default"),
    ("sampler.eta", ">", 0, "without noise there is no exploration and no log-probability to train on"),
    ("sampler.guidance_scale", ">=", 1, "1 switches guidance off"),
    ("sampler.micro_batch", ">=", 1, "1 needs the least memory"),
    ("grpo.group_size", ">=", 2, "an advantage compares samples of one prompt"),
    ("grpo.prompts_per_iteration", ">=", 1, "one prompt is the least"),
    ("grpo.updates_per_rollout", ">=", 1, "1 is fully on-policy"),
    ("grpo.replay_batch", ">=", 1, "1 needs the least memory"),
    ("sampler.sde_window.size", ">=", 1, "null trains all steps"),
    ("sampler.sde_window.start", ">=", 0, "0 begins at the first step with noise"),
    ("sampler.sde_window.stride", ">=", 1, "1 is the usual stride"),
    ("sampler.sde_window.interval", ">=", 1, "1 moves the window with every iteration"),
    ("grpo.clip_range", ">", 0, "1e-4 is the usual range"),
    ("grpo.advantage_clip", ">", 0, "5 is the usual bound"),
    ("kl.position_weight", ">=", 0, "0 switches the term off"),
    ("kl.velocity_weight", ">=", 0, "0 switches the term off"),
    ("kl.anchor_interval", ">=", 1, "10 is the usual interval"),
    ("kl.lambda_min", ">=", 0, "1e-7 is the usual bound"),
    ("kl.warmup_steps", ">=", 1, "1 starts the feedback at once"),
    ("kl.window", ">=", 1, "1 looks at the last value alone"),
    ("kl.target", ">", 0, "the feedback divides by it"),
    ("kl.gain", ">", 0, "kl.schedule=fixed has no feedback"),
    ("kl.gain", "<=", 1, "more than 1 could make lambda negative"),
    ("optimizer.lr", ">=", 0, "1e-5 is the usual rate"),
    ("optimizer.warmup_steps", ">=", 0, "0 switches the warm-up off"),
    ("optimizer.weight_decay", ">=", 0, "0 switches it off"),
    ("optimizer.beta1", ">=", 0, "0.9 is the usual value"),
    ("optimizer.beta1", "<", 1, "0.9 is the usual value"),
    ("optimizer.beta2", ">=", 0, "0.999 is the usual value"),
    ("optimizer.beta2", "<", 1, "0.999 is the usual value"),
    ("optimizer.eps", ">", 0, "1e-8 is the usual value"),
    ("optimizer.grad_clip", ">=", 0, "0 switches clipping off"),
    ("precision.fp8_first_bf16", ">=", 0, "0 keeps none"),
    ("precision.fp8_last_bf16", ">=", 0, "0 keeps none"),
    ("kl.initial_weight", ">=", 0, "0 only measures the term"),
    ("optimizer.offload_fraction", ">", 0, "optimizer.offload=none keeps all state on the device"),
    ("optimizer.offload_fraction", "<=", 1, "1 is everything"),
    ("optimizer.muon_momentum", ">=", 0, "0.95 is the usual value"),
    ("optimizer.muon_momentum", "<", 1, "0.95 is the usual value"),
    ("optimizer.muon_steps", ">=", 1, "5 is the usual number"),
    ("optimizer.ema_decay", ">", 0, "null keeps no average"),
    ("optimizer.ema_decay", "<", 1, "0.999 is a usual value"),
    ("optimizer.max_nonfinite", ">=", 0, "0 stops at the first"),
    ("reward.timeout_seconds", ">", 0, "240 is the usual time"),
    ("reward.retries", ">=", 0, "0 asks once"),
    ("reward.in_flight", ">=", 1, "1 waits for each part before the next is sent"),
    ("reward.overlap_groups", ">=", 1, "null scores a rollout as a whole"),
    ("lora.rank", ">=", 1, "null trains all weights"),
    ("lora.alpha", ">", 0, "null takes the rank"),
    ("training.keep_last", ">=", 1, "null keeps all"),
    ("training.keep_every", ">=", 1, "null keeps none but the last"),
    ("training.stall_seconds", ">", 0, "null never ends a run"),
    ("training.iterations", ">=", 0, "0 evaluates the given model and stops"),
    ("training.save_interval", ">=", 0, "0 saves only at the end"),
    ("evaluation.samples_per_prompt", ">=", 1, "evaluation.prompts=null switches evaluation off"),
    ("evaluation.num_steps", ">=", 1, "40 is the usual number"),
    ("evaluation.videos", ">=", 0, "0 shows none"),
    ("logging.peak_tflops", ">", 0, "null takes a known GPU's data sheet"),
]


def validate(config: Config, world_size: int, training: bool = True) -> None:
    """Raises UserError, one line, at the first rule that `config` breaks on `world_size` processes.

    `training=False`: only what sampling needs; its prompts may come from elsewhere, and nothing is rewarded or learnt.
    """
    for rule, _ in rules(config, world_size, training):
        rule()


def rules(config: Config, world_size: int, training: bool = True) -> list[tuple[Callable[[], object], bool]]:
    """All rules in their order, each raising UserError; True: where any so far is broken, the rest cannot be judged."""
    found: list[tuple[Callable[[], object], bool]] = [
        (lambda: _check_types(config), True),
        *((partial(_check_bound, config, *bound), False) for bound in _BOUNDS),
        (lambda: _check_names(config), False),
        (lambda: check_world(config.parallel, world_size), True),
        (lambda: _check_video(config), False),
        (lambda: check_precision(config), False),
        (lambda: check_lora(config), False),
        (lambda: _check_files(config), False),
    ]
    if not training:
        return found
    return found + [
        (lambda: _check_groups(config, data_parallel_size(config, world_size)), True),
        (lambda: _check_method(config), False),
        (lambda: check_optimizer(config), False),
        (lambda: check_state(config), False),
        (lambda: check_reward(config), False),
        (lambda: check_logging(config), False),
        (lambda: _check_prompt_files(config), False),
        (lambda: _check_updates(config, world_size), False),
    ]


def validate_layout(config: Config, world_size: int, transformer: dict[str, Any]) -> None:
    """The same rules for planning: without files, and without what this machine, which will not run it, lacks.

    `transformer`: the model's config.json.
    """
    _check_values(config)
    replicas = check_world(config.parallel, world_size)
    _check_video(config)
    check_precision(config, here=False)
    check_lora(config)
    _check_sizes(config, transformer, "transformer/config.json", here=False)
    _check_groups(config, replicas)
    _check_method(config)
    check_optimizer(config, here=False)
    check_state(config)
    _check_updates(config, world_size)


def _check_values(config: Config) -> None:
    _check_types(config)
    for bound in _BOUNDS:
        _check_bound(config, *bound)


def _check_types(config: Config) -> None:
    """Again: a Config built in Python has not passed through load_config."""
    bind(Config, dataclasses.asdict(config), "", {})


def _check_bound(config: Config, key: str, comparison: str, bound: Any, cure: str) -> None:
    value = _get(config, key)
    if value is not None and not _COMPARE[comparison](value, bound):
        _refuse(key, value, f"must be {comparison} {bound}; {cure}")


def data_parallel_size(config: Config, world_size: int) -> int:
    """Model replicas: what `world_size` leaves after tensor, context and pipeline parallelism."""
    parallel = config.parallel
    return world_size // (parallel.tensor * parallel.context * parallel.pipeline)


def _get(config: Config, key: str) -> Any:
    return operator.attrgetter(key)(config)


def _refuse(key: str, value: Any, rule: str) -> None:
    raise UserError(f"{key}={'null' if value is None else value}: {rule}")


def _check_names(config: Config) -> None:
    if not re.fullmatch(r"\w[\w.+-]*", config.name):
        _refuse("name", config.name, "must be letters, digits, '.', '_', '+' or '-', for it names a directory")
    if not config.output_dir.strip():
        _refuse("output_dir", config.output_dir, "must name a directory, e.g. runs/{name}")
    if Path(config.output_dir).is_file():
        _refuse("output_dir", config.output_dir, "is a file; name a directory")


def _check_groups(config: Config, replicas: int) -> None:
    if config.grpo.prompts_per_iteration % replicas:
        rule = f"must be a multiple of the data-parallel size {replicas}; each replica takes whole prompts"
        _refuse("grpo.prompts_per_iteration", config.grpo.prompts_per_iteration, rule)
    if config.grpo.group_size % config.sampler.micro_batch:
        rule = f"must divide grpo.group_size={config.grpo.group_size}, so that a group is whole micro-batches"
        _refuse("sampler.micro_batch", config.sampler.micro_batch, rule)


def _check_video(config: Config) -> None:
    frames = config.video.frames
    if frames % 4 != 1:
        below = frames - (frames - 1) % 4
        rule = f"must be 4n+1 (the VAE makes one latent of 4 frames after the first); try {below} or {below + 4}"
        _refuse("video.frames", frames, rule)
    for key in ("height", "width"):
        size = getattr(config.video, key)
        if size % 16:
            below = size // 16 * 16
            rule = f"must be a multiple of 16 (the VAE's compression); try {below} or {below + 16}"
            _refuse(f"video.{key}", size, rule)


def _check_method(config: Config) -> None:
    kl = config.kl
    if config.training.iterations == 0 and config.evaluation.prompts is None:
        _refuse("training.iterations", 0, "only evaluates, and there is nothing to: name evaluation.prompts")
    if kl.lambda_min > lambda_max(kl):
        _refuse("kl.lambda_min", kl.lambda_min, f"must not be above kl.lambda_max={lambda_max(kl)}")
    if kl.lambda_min == 0 and kl.gain == 1:
        _refuse("kl.gain", kl.gain, "must be below 1 with kl.lambda_min=0: lambda could fall to 0 and never rise again")
    if kl.strategy == "dual" and not (kl.position_weight or kl.velocity_weight):
        _refuse("kl.position_weight", kl.position_weight, "dual needs a weight other than 0; or set kl.strategy=none")
    if config.sampler.sde_type.startswith("cps") and config.sampler.eta > 1:
        # std = σ'·sin(ηπ/2) turns back beyond η = 1: more noise asked for, less given.
        _refuse("sampler.eta", config.sampler.eta, "must be <= 1 for cps, whose noise is σ·sin(ηπ/2)")


def _check_files(config: Config) -> None:
    root = config.model.pretrained
    if not root:
        _refuse("model.pretrained", "", "must name a model directory in the diffusers layout")
    transformer = Path(root) / "transformer" / "config.json"
    if not transformer.is_file():
        _refuse("model.pretrained", root, f"has no transformer/config.json ({transformer}); name the model's root")
    if not (Path(root) / "vae" / "config.json").is_file():
        _refuse("model.pretrained", root, "has no vae/config.json; name the model's root, not its transformer")
    if not (Path(root) / "text_encoder").is_dir():
        _refuse("model.pretrained", root, "has no text_encoder/; name the model's root")
    _check_architecture(config, transformer)
    weights, cure = config.model.weights, f"make it: megatron-sage convert hf-to-megatron {root} DIRECTORY"
    if not weights:
        _refuse("model.weights", weights, f"must name a Megatron checkpoint directory; {cure}")
    elif not Path(weights).is_dir():
        _refuse("model.weights", weights, f"no such directory; {cure}")
    cache = config.data.embedding_cache
    if cache is not None and Path(cache).exists() and not Path(cache).is_dir():
        _refuse("data.embedding_cache", cache, "is a file; name a directory")


def _check_prompt_files(config: Config) -> None:
    _check_prompts(config, "data.prompts", config.data.prompts)
    if config.evaluation.prompts is not None:
        _check_prompts(config, "evaluation.prompts", config.evaluation.prompts)
    check_backend(config.data.backend)


def _check_architecture(config: Config, path: Path) -> None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}; fetch it again") from error
    name = content.get("_class_name") if isinstance(content, dict) else None
    if name != ARCHITECTURE:
        raise UserError(f"{path}: _class_name={name}: this program trains {ARCHITECTURE} only")
    _check_sizes(config, content, path)


def _check_sizes(config: Config, content: dict[str, Any], path: str | Path, here: bool = True) -> None:
    if content.get("use_meanflow"):
        raise UserError(
            f"{path}: use_meanflow=true: the step-distilled model takes the next step's time as well, which only "
            "`convert` and `verify` support; name the base model"
        )
    sizes = [content.get("num_attention_heads"), content.get("num_layers", 54)]  # diffusers' default
    for key, value in zip(("num_attention_heads", "num_layers"), sizes, strict=True):
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{path}: {key}={value}: expects a whole number >= 1")
    check_model_layout(config.parallel, sizes[0], sizes[1], here)
    check_fp8_blocks(config, sizes[1])
    check_lora_sizes(config, content)


def _check_prompts(config: Config, key: str, path: str) -> None:
    """The file through its own reader; images must exist, but none is decoded here."""
    from megatron_sage.data.prompts import read_dataset
    from megatron_sage.data.tables import is_text

    if not path:
        _refuse(key, "", "must name a text file, one prompt a line, or a .csv, .tsv, .jsonl or .parquet file")
    if not Path(path).is_file():
        _refuse(key, path, "no such file; it holds one prompt a line, or is a .csv, .tsv, .jsonl or .parquet file")
    data = config.data
    if key == "data.prompts" and is_text(Path(path)):
        for name in ("prompt_column", "image_column"):
            if (value := getattr(data, name)) is not None:
                _refuse(f"data.{name}", value, f"{path} is plain text and has no columns; use csv, or set it to null")
    try:
        read_dataset(data, path)
    except UserError as error:
        raise UserError(f"{key}: {error}") from error


def _check_updates(config: Config, world_size: int) -> None:
    """The window must lie within the steps with noise; an update needs at least one (micro-batch, step) pair."""
    from megatron_sage.grpo.schedule import shifted_sigmas  # imports torch: only where it is needed
    from megatron_sage.grpo.sde import step_coefficients

    sampler, window, updates = config.sampler, config.sampler.sde_window, config.grpo.updates_per_rollout
    sigmas = shifted_sigmas(sampler.num_steps, sampler.shift)
    noisy = int((step_coefficients(sampler.sde_type, sigmas, sampler.eta).std > 0).sum())
    if noisy == 0:
        _refuse("sampler.num_steps", sampler.num_steps, f"no step of {sampler.sde_type} has noise then; use more steps")
    trained = noisy if window.size is None else window.size
    if trained > noisy:
        _refuse("sampler.sde_window.size", trained, f"must be <= the {noisy} steps with noise; null trains all of them")
    if window.size is not None and window.start + trained > noisy:
        rule = f"the window of {trained} must end within the {noisy} steps with noise; use at most {noisy - trained}"
        _refuse("sampler.sde_window.start", window.start, rule)
    prompts = config.grpo.prompts_per_iteration // data_parallel_size(config, world_size)
    micro_batches = prompts * config.grpo.group_size // sampler.micro_batch
    if updates > micro_batches * trained:
        rule = f"must be <= {micro_batches} micro-batches · {trained} trained steps = {micro_batches * trained}"
        _refuse("grpo.updates_per_rollout", updates, rule)
    check_schedule(config, micro_batches * trained)
