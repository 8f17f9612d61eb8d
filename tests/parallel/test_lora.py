"""Adapters on real gloo ranks: PEFT's numbers at every layout, whole training runs, checkpoints across layouts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.model.lora_parity import LoraCase, random_case, reference
from tests.model.parity import OUTPUT_TOLERANCE, Case, assert_parity
from tests.parallel.pool import run_on_ranks

MEASURE = "tests.model.lora_parity:measure"
# 24 video tokens, text 9 and 5: the text streams are padded for two ranks; more than one block on a stage
EVERYTHING = LoraCase(Case(qwen=(6, 5), byt5=(3, 0), layers=3))


def check(lora: LoraCase, ranks: int, **layout: Any) -> None:
    found = run_on_ranks(ranks, MEASURE, lora=lora, path=reference(lora), **layout)
    assert all(output <= OUTPUT_TOLERANCE for output, _ in found)
    assert_parity(*found[0])


LAYOUTS = {
    "tp2-sp": {"tensor": 2, "sequence_parallel": True},
    "tp2": {"tensor": 2, "sequence_parallel": False},
    "cp2": {"context": 2},
    "pp2": {"pipeline": 2},
}
MORE_LAYOUTS = {
    "tp2-sp recompute": (2, {"tensor": 2, "sequence_parallel": True, "recompute": "full"}),
    "tp2 recompute": (2, {"tensor": 2, "recompute": "selective"}),
    "cp2 all-gather, recompute": (2, {"context": 2, "context_backend": "allgather", "recompute": "full"}),
    "tp4-sp": (4, {"tensor": 4, "sequence_parallel": True}),
    "tp2-sp-cp2": (4, {"tensor": 2, "context": 2, "sequence_parallel": True}),
    "tp2-sp-pp2": (4, {"tensor": 2, "pipeline": 2, "sequence_parallel": True}),
    "cp2-pp2 recompute": (4, {"context": 2, "pipeline": 2, "recompute": "full"}),
    "pp2 interleaved": (2, {"pipeline": 2, "virtual_pipeline": 2}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_peft(name: str) -> None:
    check(EVERYTHING, 2, **LAYOUTS[name])


@pytest.mark.nightly
@pytest.mark.parametrize("name", MORE_LAYOUTS)
def test_more_layouts_equal_peft(name: str) -> None:
    ranks, layout = MORE_LAYOUTS[name]
    check(LoraCase(Case(qwen=(6, 5), byt5=(3, 0), layers=4)), ranks, **layout)


@pytest.mark.nightly
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("seed", range(100, 106))
def test_random_cases_equal_peft(name: str, seed: int) -> None:
    check(random_case(seed), 2, **LAYOUTS[name])


def train(arguments: list[str], processes: int, folder: str | None = None) -> dict[str, Any] | None:
    """A run's metrics and, put together on rank 0, its adapters; the base must come out with the same bits.

    `folder`: both kinds of export, and the model's part of a distributed checkpoint.
    """
    from megatron_sage.checkpoint import saving
    from megatron_sage.checkpoint.lora import gather_adapters
    from megatron_sage.model.lora_targets import is_adapter
    from megatron_sage.training.export import write_export
    from tests.parallel.iterations import prepare

    trainer = prepare(arguments, processes)
    engine = trainer.engine
    named = [(n, p) for chunk in engine.chunks for n, p in chunk.named_parameters()]
    base = {n: p.clone() for n, p in named if not is_adapter(n)}
    assert {n for n, p in named if p.requires_grad} == {n for n, p in named if is_adapter(n)}
    buffered = sum(buffer.numel_unpadded for ddp in trainer.replay.ddp for buffer in ddp.buffers)
    assert buffered == sum(p.numel() for _, p in named if p.requires_grad)  # gradients of the adapters alone
    rows = [trainer.run_iteration()[0] for _ in range(engine.config.training.iterations)]
    assert all(p.equal(base[n]) for n, p in named if n in base)
    adapters = {n: v.numpy().copy() for n, v in gather_adapters(engine.chunks, "param") if v is not None}
    if folder is not None:
        for engine.config.lora.export in ("separate", "merged"):
            write_export(engine, Path(folder))
        (Path(folder) / "state").mkdir(exist_ok=True)
        saving.save(engine.chunks[0].sharded_state_dict(), Path(folder) / "state")
    return {"rows": rows, "adapters": adapters} if engine.groups.rank == 0 else None


def load(arguments: list[str], processes: int, folder: str) -> dict[str, Any]:
    """The adapters of a distributed checkpoint, on another layout."""
    from megatron.core import dist_checkpointing

    from megatron_sage.checkpoint.lora import gather_adapters
    from tests.parallel.iterations import prepare

    chunks = prepare(arguments, processes).engine.chunks
    (chunk,) = chunks
    chunk.load_state_dict(dist_checkpointing.load(chunk.sharded_state_dict(), str(Path(folder) / "state")))
    return {n: v.numpy().copy() for n, v in gather_adapters(chunks, "param") if v is not None}


def sampled(root: str, folder: str) -> list[np.ndarray]:
    """diffusers' output with the base and the exported adapters, the merged weights, the base."""
    import torch
    from diffusers import HunyuanVideo15Transformer3DModel as Model

    base, adapted = (Model.from_pretrained(f"{root}/hf/transformer") for _ in range(2))
    adapted.load_lora_adapter(f"{folder}/transformer_lora", use_safetensors=True)
    merged = Model.from_pretrained(f"{folder}/transformer")
    torch.manual_seed(0)
    config = base.config
    given = {
        "hidden_states": torch.randn(1, config.in_channels, 2, 3, 3),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 4, config.text_embed_dim),
        "encoder_attention_mask": torch.ones(1, 4),
        "encoder_hidden_states_2": torch.randn(1, 3, config.text_embed_2_dim),
        "encoder_attention_mask_2": torch.ones(1, 3),
        "image_embeds": torch.zeros(1, 2, config.image_embed_dim),
    }
    with torch.no_grad():
        return [model(**given, return_dict=False)[0].numpy() for model in (adapted, merged, base)]


LORA = {
    "lora.rank": 3,
    "lora.alpha": 4.5,
    "lora.targets": "[to_q,to_v,to_out.0,add_k_proj,to_add_out,ff.net.0.proj,ff.net.2,norm1.linear]",
    "optimizer.lr": 1e-2,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    run_on_ranks(1, "tests.training.world:build", root=folder, matrix_scale=1.0)
    return folder


def arguments_of(root: Path, name: str, **changes: Any) -> list[str]:
    from tests.parallel import iterations
    from tests.training import world

    return world.overrides(iterations.settings(root, name, **(LORA | changes)))


def run(root: Path, name: str, ranks: int = 1, folder: Path | None = None, **changes: Any) -> dict[str, Any]:
    given = {"arguments": arguments_of(root, name, **changes), "processes": ranks}
    return run_on_ranks(ranks, "tests.parallel.test_lora:train", folder=folder and str(folder), **given)[0]


@pytest.fixture(scope="module")
def single(root: Path) -> dict[str, Any]:
    return run(root, "single", folder=root / "out")


def test_a_run_trains_and_its_exports_agree(root: Path, single: dict[str, Any]) -> None:
    assert all(row["ratio/initial_deviation"] <= 1e-6 and row["grad_norm"] > 0 for row in single["rows"])
    separate, merged, base = run_on_ranks(1, "tests.parallel.test_lora:sampled", root=str(root), folder=f"{root}/out")[
        0
    ]
    scale = np.abs(base).max()
    assert np.abs(separate - base).max() > 1e-3 * scale
    assert np.abs(separate - merged).max() <= 3e-6 * scale


RUNS = [
    pytest.param(2, {"parallel.tensor": 2}, id="tp2-sp"),
    pytest.param(2, {"parallel.tensor": 2, "parallel.sequence": False}, id="tp2", marks=pytest.mark.nightly),
    pytest.param(2, {"parallel.context": 2, "precision.recompute": "full"}, id="cp2-recompute"),
    pytest.param(
        2, {"parallel.pipeline": 2, "precision.recompute": "full", "sampler.micro_batch": 1}, id="pp2-recompute"
    ),
    pytest.param(2, {}, id="dp2", marks=pytest.mark.nightly),
    pytest.param(1, {"precision.recompute": "selective"}, id="selective", marks=pytest.mark.nightly),
    pytest.param(
        4,
        {"parallel.tensor": 2, "parallel.context": 2, "precision.recompute": "full"},
        id="tp2-cp2",
        marks=pytest.mark.nightly,
    ),
]


@pytest.mark.parametrize(("ranks", "changes"), RUNS)
def test_a_run_on_any_layout_is_the_run_on_one_rank(
    root: Path, single: dict[str, Any], ranks: int, changes: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    found = run(root, request.node.callspec.id, ranks, **changes)
    for mine, theirs in zip(found["rows"], single["rows"], strict=True):
        assert mine["reward/mean"] == pytest.approx(theirs["reward/mean"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        assert mine["kl/position"] == pytest.approx(theirs["kl/position"], rel=1e-3, abs=1e-12)
    assert found["adapters"].keys() == single["adapters"].keys()
    for name, value in single["adapters"].items():
        assert np.abs(found["adapters"][name] - value).max() <= 1e-3 * 3 * 1e-2, name  # of three steps of lr


def test_adapters_go_from_one_rank_to_two(root: Path, single: dict[str, Any]) -> None:
    given = {"arguments": arguments_of(root, "loaded", **{"parallel.tensor": 2}), "processes": 2}
    found, _ = run_on_ranks(2, "tests.parallel.test_lora:load", folder=f"{root}/out", **given)
    for name, value in single["adapters"].items():
        assert np.array_equal(found[name], value), name


@pytest.mark.nightly
def test_a_bf16_run_trains(root: Path, single: dict[str, Any]) -> None:
    changes = {"parallel.tensor": 2, "precision.dtype": "bf16", "grpo.allow_clip_below_floor": True}
    found = run(root, "bf16", 2, **changes)
    assert [row["reward/mean"] for row in found["rows"]] == pytest.approx(
        [row["reward/mean"] for row in single["rows"]], rel=0.05
    )
    moved = [name for name, value in found["adapters"].items() if ".lora_B." in name and value.any()]
    assert len(moved) == len(found["adapters"]) / 2


@pytest.mark.nightly
def test_a_resumed_run_is_the_uninterrupted_run(root: Path) -> None:
    def whole(name: str, **changes: Any) -> list[dict[str, Any]]:
        arguments = arguments_of(root, name, **changes)
        run_on_ranks(2, "tests.parallel.test_lora:train_command", arguments=arguments, processes=2)
        rows = [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in row.items() if not k.startswith("seconds/")} for row in rows]

    layout = {"parallel.tensor": 2}
    expected = whole("whole", **layout)
    whole("resumed", **layout, **{"training.iterations": 2})
    assert whole("resumed", **layout, **{"training.resume": "yes"}) == expected
    files = [root / name / "export/transformer_lora/pytorch_lora_weights.safetensors" for name in ("whole", "resumed")]
    assert files[0].read_bytes() == files[1].read_bytes()


def train_command(arguments: list[str], processes: int) -> None:
    from megatron_sage.config import load_config, validate
    from megatron_sage.training.run import train

    config = load_config(None, arguments)
    validate(config, processes)
    train(config)
