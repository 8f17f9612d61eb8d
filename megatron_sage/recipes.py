"""Runs by name: a base, and short functions that change it. `megatron-sage recipes list` prints them.

A name is BASE_VARIANT, e.g. hv15_480p_b_sage_dual or tiny_b_sage_dual. The variants are the 19 rows of SAGE-GRPO's main
table (arXiv 2603.21872) and its ablations; every variant exists on every base, so that what will run on a cluster can
be tried on two cores first.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from megatron_sage.config import Config, dump, load_config
from megatron_sage.config.loading import nearest
from megatron_sage.errors import UserError

Change = Callable[[Config], None]


def hv15_480p() -> Config:
    """HunyuanVideo-1.5 text-to-video, 81 frames at 480p, SAGE with the dual moving KL, reward setting B.

    Eight GPUs a replica; 16 prompts x 4 videos an iteration are 2 prompts for each of 8 replicas (64 GPUs), and fit
    1, 2, 4, 8 and 16 replicas. Not verified on a GPU.
    """
    config = Config()
    config.model.pretrained = "models/HunyuanVideo-1.5-480p_t2v"
    config.model.weights = "models/HunyuanVideo-1.5-480p_t2v-megatron"
    config.parallel.tensor = 8
    config.precision.recompute = "full"
    config.sampler.offload_trajectories = True
    config.grpo.prompts_per_iteration = 16
    config.reward.function = "megatron_sage.rewards.videoalign:VideoAlign"
    config.reward.settings = {"checkpoint": "models/VideoReward", "base": "models/Qwen2-VL-2B-Instruct"}
    config.data.prompts = "data/prompts.txt"
    config.evaluation.prompts = "data/prompts_held_out.txt"
    config.optimizer.distributed = True
    config.training.save_interval, config.training.async_save = 10, True
    config.training.keep_last, config.training.keep_every = 3, 50
    return config


def tiny() -> Config:
    """The tiny world of examples/tiny_world on CPU cores: what the quickstart trains, on one process or more.

    A KL that is a mean over elements does nothing measurable here at the paper's lambda (1e-5): with 0.1 it bites
    within 20 iterations (with 1 hardly anything is learnt), so that the strategies differ.
    """
    config = Config()
    config.model.pretrained = "examples/tiny_world/model"
    config.model.weights = "runs/tiny_world_megatron"
    config.precision.dtype = "fp32"
    config.precision.threads = 1
    video, sampler, grpo = config.video, config.sampler, config.grpo
    video.frames, video.height, video.width, video.fps = 81, 32, 48, 16.0
    sampler.num_steps, sampler.shift, sampler.guidance_scale, sampler.micro_batch = 4, 3.0, 1.0, 16
    grpo.group_size, grpo.prompts_per_iteration, grpo.updates_per_rollout, grpo.clip_range = 16, 8, 2, 1e-3
    config.kl.lambda_min, config.kl.lambda_max, config.kl.warmup_steps, config.kl.target = 1e-3, 0.1, 8, 0.01
    optimizer = config.optimizer
    optimizer.lr, optimizer.warmup_steps, optimizer.beta2, optimizer.eps = 1.5e-3, 8, 0.95, 1e-5
    config.data.prompts = "examples/tiny_world/prompts_train.txt"
    config.training.iterations = 18
    config.evaluation.prompts = "examples/tiny_world/prompts_held_out.txt"
    config.evaluation.samples_per_prompt, config.evaluation.num_steps = 4, 4
    return config


BASES: dict[str, Callable[[], Config]] = {"hv15_480p": hv15_480p, "tiny": tiny}


def setting_a(config: Config) -> None:
    """Averaged: equal weights. Their common factor does not matter, advantages divide by the spread."""
    config.reward.weights = {"VQ": 1.0, "MQ": 1.0, "TA": 1.0}


def setting_b(config: Config) -> None:
    """Alignment-focused."""
    config.reward.weights = {"VQ": 0.5, "MQ": 0.5, "TA": 1.0}


def dance(config: Config) -> None:
    config.sampler.sde_type = "dance_grpo"


def flow(config: Config) -> None:
    config.sampler.sde_type = "flow_grpo"


def cps(config: Config) -> None:
    config.sampler.sde_type = "cps"


def sage(config: Config) -> None:
    config.sampler.sde_type = "sage_grpo"


def no_kl(config: Config) -> None:
    config.kl.strategy = "none"


def fixed_kl(config: Config) -> None:
    config.kl.strategy = "fixed"


def step_kl(config: Config) -> None:
    config.kl.strategy = "step"


def moving_kl(config: Config) -> None:
    config.kl.strategy = "moving"


def dual_moving_kl(config: Config) -> None:
    config.kl.strategy, config.kl.position = "dual", "moving"


def dual_fixed_kl(config: Config) -> None:
    config.kl.strategy, config.kl.position = "dual", "fixed"


def no_equalizer(config: Config) -> None:
    config.grpo.equalizer = False


def fixed_lambda(config: Config) -> None:
    config.kl.schedule = "fixed"


def milder_lambda(config: Config) -> None:
    """Warm-up only, to a tenth (which is what null means with this schedule)."""
    config.kl.schedule = "milder"
    if config.kl.lambda_max is not None:
        config.kl.lambda_max /= 10


def tightening_lambda(config: Config) -> None:
    config.kl.feedback = "tighten"


def no_training(config: Config) -> None:
    config.training.iterations = 0


SETTINGS: dict[str, Change] = {"a": setting_a, "b": setting_b}
SAMPLERS: dict[str, Change] = {"dance": dance, "flow": flow, "cps": cps, "sage": sage}

# variant -> (what it is, the changes that make it)
VARIANTS: dict[str, tuple[str, tuple[Change, ...]]] = {"base": ("the model as it is: evaluation only", (no_training,))}
for _letter, _setting in SETTINGS.items():
    for _name, _sampler in SAMPLERS.items():
        for _kl, _strategy in {"none": no_kl, "fixed": fixed_kl, "dual": dual_moving_kl}.items():
            if _kl != "dual" or _name == "sage":
                _row = f"setting {_letter.upper()}, {_name}, KL {_kl}{' moving' * (_kl == 'dual')}"
                VARIANTS[f"{_letter}_{_name}_{_kl}"] = (_row, (_setting, _sampler, _strategy))
TABLE = tuple(VARIANTS)  # the rows of the paper's main table, in its order

for _name, _sampler in SAMPLERS.items():
    VARIANTS[f"b_{_name}_none_no_equalizer"] = (
        f"ablation: {_name} without the equalizer",
        (setting_b, _sampler, no_kl, no_equalizer),
    )
VARIANTS |= {
    "b_sage_step": ("ablation: step KL alone", (setting_b, sage, step_kl)),
    "b_sage_moving": ("ablation: moving anchor alone", (setting_b, sage, moving_kl)),
    "b_sage_dual_fixed": ("ablation: dual KL with the initial model", (setting_b, sage, dual_fixed_kl)),
    "b_sage_dual_lambda_fixed": ("ablation: lambda constant", (setting_b, sage, dual_moving_kl, fixed_lambda)),
    "b_sage_dual_lambda_milder": ("ablation: milder lambda", (setting_b, sage, dual_moving_kl, milder_lambda)),
    "b_sage_dual_lambda_tighten": (
        "ablation: feedback of the other sign",
        (setting_b, sage, dual_moving_kl, tightening_lambda),
    ),
}
for _letter, _setting in SETTINGS.items():  # not in the paper's table, but in a full grid of it
    for _name, _sampler in SAMPLERS.items():
        VARIANTS.setdefault(
            f"{_letter}_{_name}_dual",
            (f"setting {_letter.upper()}, {_name}, KL dual moving", (_setting, _sampler, dual_moving_kl)),
        )


def names() -> list[str]:
    """All recipes."""
    return [f"{base}_{variant}" for base in BASES for variant in VARIANTS]


def recipe(name: str) -> Config:
    """The configuration of a recipe; UserError with the nearest name for an unknown one."""
    base, variant = _split(name)
    config = BASES[base]()
    for change in VARIANTS[variant][1]:
        change(config)
    config.name = name
    return config


def differences(config: Config, base: Config) -> dict[str, Any]:
    """Dotted keys whose values differ from the base's, the run's name apart."""
    mine, theirs = _flat(dataclasses.asdict(config)), _flat(dataclasses.asdict(base))
    return {key: value for key, value in mine.items() if key != "name" and value != theirs.get(key)}


def main(argv: list[str]) -> int:
    """`recipes list` and `recipes show NAME`."""
    if argv in ([], ["list"]):
        for base in BASES:
            print(f"{base}: {(BASES[base].__doc__ or '').splitlines()[0]}")
            width = max(map(len, VARIANTS)) + len(base) + 1
            for variant, (meaning, _) in VARIANTS.items():
                name = f"{base}_{variant}"
                found = differences(recipe(name), BASES[base]())
                shown = " ".join(f"{key}={_short(value)}" for key, value in found.items()) or "the base itself"
                print(f"  {name:{width}}  {meaning}: {shown}")
        print("\nmegatron-sage train --recipe NAME [CONFIG] [key=value ...]; megatron-sage recipes show NAME")
        return 0
    if len(argv) == 2 and argv[0] == "show":
        print(dump(load_config(None, [], recipe(argv[1]))), end="")
        return 0
    raise UserError(f"recipes {' '.join(argv)}: unknown; use recipes list, or recipes show NAME")


def _split(name: str) -> tuple[str, str]:
    for base in BASES:
        if name.removeprefix(f"{base}_") in VARIANTS and name.startswith(f"{base}_"):
            return base, name.removeprefix(f"{base}_")
    match = nearest(name, names())
    cure = f"did you mean {match}? " if match else ""
    raise UserError(f"recipe {name}: unknown; {cure}`megatron-sage recipes list` prints all")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and not key.startswith("weights"):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def _short(value: Any) -> str:
    return "{" + ", ".join(f"{k}: {v}" for k, v in value.items()) + "}" if isinstance(value, dict) else str(value)
