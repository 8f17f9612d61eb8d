"""Parameters, operations and kept bytes by formula against instantiated models."""

import random
from typing import Any

import pytest
import torch

from megatron_sage.model.config import HunyuanVideoConfig
from megatron_sage.model.lora_targets import TARGETS, AdapterSettings
from megatron_sage.planning.flops import Text, model_forward, stage_flops
from megatron_sage.planning.saved import embedder_bytes, saved_by_chunks
from megatron_sage.planning.sizes import chunk_counts, total_parameters
from megatron_sage.planning.traffic import Place, buffer_elements
from tests.parallel.pool import run_on_ranks


def random_model(seed: int, heads: int = 4, least: int = 2) -> dict[str, Any]:
    """A small transformer/config.json."""
    draw = random.Random(seed)
    axes = [2 * draw.randint(1, 3) for _ in range(3)]
    return {
        "num_attention_heads": heads,
        "attention_head_dim": sum(axes),
        "rope_axes_dim": axes,
        "num_layers": draw.randint(least, 5),
        "num_refiner_layers": draw.randint(1, 3),
        "mlp_ratio": draw.choice([2.0, 4.0]),
        "in_channels": 2 * (channels := draw.randint(2, 9)) + 1,
        "out_channels": channels,
        "text_embed_dim": draw.randint(5, 40),
        "text_embed_2_dim": draw.randint(5, 40),
        "image_embed_dim": draw.randint(5, 40),
        "use_meanflow": draw.random() < 0.5,
    }


def built_counts(transformer: dict[str, Any], lora: AdapterSettings | None, **layout: Any) -> dict[str, Any]:
    """Of this rank's chunks: as counted, and as the formula has it."""
    from megatron_sage.model.lora import add_adapters
    from megatron_sage.model.transformer import build_chunks
    from megatron_sage.parallel.groups import initialize
    from megatron_sage.training.optimizer import wrap

    groups = initialize(
        layout.get("tensor", 1), layout.get("context", 1), layout.get("pipeline", 1),
        virtual_pipeline=layout.get("virtual_pipeline"),
    )  # fmt: skip
    config = HunyuanVideoConfig.from_diffusers(transformer, **layout)
    chunks = build_chunks(config, groups.collection)
    if lora is not None:
        add_adapters(chunks, lora)
    place = Place(config, groups.pp_rank, 10, 1, groups.dp_size, lora, distributed=True)
    counts = chunk_counts(config, groups.pp_rank, lora)
    muon = [
        sum(p.numel() for n, p in c.named_parameters() if "transformer_blocks" in n and p.ndim == 2 and p.requires_grad)
        for c in chunks
    ]
    return {
        "counted": [
            (sum(p.numel() for p in c.parameters()), sum(p.numel() for p in c.parameters() if p.requires_grad))
            for c in chunks
        ],
        "formula": [(count.elements, count.trained) for count in counts],
        "muon": (muon, [count.matrices for count in counts] if lora is None else muon),
        "buffers": ([sum(b.numel for b in ddp.buffers) for ddp in wrap(chunks, groups, True)], buffer_elements(place)),
    }


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (1, {}),
        (2, {"tensor": 2, "sequence_parallel": True}),
        (2, {"pipeline": 2, "virtual_pipeline": 2}),
        pytest.param(2, {"context": 2}, marks=pytest.mark.nightly),
        pytest.param(4, {"tensor": 2, "pipeline": 2}, marks=pytest.mark.nightly),
        pytest.param(4, {"tensor": 4}, marks=pytest.mark.nightly),
        pytest.param(3, {"pipeline": 3}, marks=pytest.mark.nightly),
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("adapters", [False, True])
def test_parameters_of_a_rank(ranks: int, layout: dict[str, Any], seed: int, adapters: bool) -> None:
    least = layout.get("pipeline", 1) * layout.get("virtual_pipeline", 1)
    transformer = random_model(seed, least=max(2, least))
    lora = (
        AdapterSettings(2, 2.0, tuple(random.Random(seed).sample(TARGETS, 5)) + ("norm1.linear",)) if adapters else None
    )
    function = "tests.planning.test_counts:built_counts"
    for found in run_on_ranks(ranks, function, transformer=transformer, lora=lora, **layout):
        assert found["counted"] == found["formula"]
        assert found["muon"][0] == found["muon"][1]
        assert found["buffers"][0] == found["buffers"][1]


def test_the_released_model() -> None:
    config = HunyuanVideoConfig.from_diffusers({})
    assert total_parameters(config) == 8_326_608_160
    assert total_parameters(HunyuanVideoConfig.from_diffusers({"use_meanflow": True})) == 8_331_330_848
    # PFLOP of one forward, padded text and 300 tokens (the last block's unused text is not computed here)
    for grid, text, expected in [((21, 30, 53), 1985, 0.746), ((21, 30, 53), 300, 0.685), ((21, 45, 80), 300, 2.961)]:
        found = model_forward(config, grid[0] * grid[1] * grid[2], Text(text)).total / 1e15
        assert found == pytest.approx(expected, abs=6e-4)


def counted_flops(
    transformer: dict[str, Any], grid: tuple[int, int, int], text: Text, batch: int, times: int, recompute: str
) -> tuple[int, int]:
    """(forward, backward), GEMMs, as torch counts them: it does not see attention on a CPU."""
    from torch.utils.flop_counter import FlopCounterMode

    from megatron_sage.model.conditions import TextCondition
    from megatron_sage.model.transformer import build_chunks
    from megatron_sage.parallel.groups import initialize

    config = HunyuanVideoConfig.from_diffusers(transformer, recompute=recompute)
    (model,) = build_chunks(config, initialize().collection)
    sizes = (
        (text.qwen, config.text_embed_dim),
        (text.glyph, config.text_embed_2_dim),
        (text.image, config.image_embed_dim),
    )
    condition = TextCondition(*(torch.randn(1, *size) for size in sizes))
    video = torch.randn(grid[0] * grid[1] * grid[2], batch, config.in_channels)
    time = torch.full((times,), 500.0)
    with FlopCounterMode(display=False) as forward:
        out = model(video, time, condition, grid, time if config.use_meanflow else None)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("recompute", ["none", pytest.param("selective", marks=pytest.mark.nightly), "full"])
@pytest.mark.parametrize("seed", [2, 3, pytest.param(4, marks=pytest.mark.nightly)])
def test_flops_of_a_forward_and_its_backward(seed: int, recompute: str) -> None:
    draw = random.Random(seed)
    grid = (draw.randint(1, 3), draw.randint(2, 4), draw.randint(2, 5))
    text = Text(draw.randint(1, 9), draw.randint(0, 3), draw.randint(0, 3))
    batch, transformer = draw.randint(1, 3), random_model(seed)
    times = batch if seed % 2 == 1 else 1
    given = {"grid": grid, "text": text, "batch": batch, "times": times, "recompute": recompute}
    ((forward, backward),) = run_on_ranks(
        1, "tests.planning.test_counts:counted_flops", transformer=transformer, **given
    )
    config = HunyuanVideoConfig.from_diffusers(transformer, recompute=recompute)
    formula = stage_flops(Place(config, 0, grid[0] * grid[1] * grid[2], batch, times=times), text)
    assert forward == formula.forward.gemm
    assert backward == formula.backward.gemm + formula.again.gemm


def kept_bytes(grid: tuple[int, int, int], words: tuple[int, int], **options: Any) -> tuple[int, float]:
    """(measured, formula) of this rank."""
    from megatron_sage.model.config import HunyuanVideoConfig
    from megatron_sage.parallel.groups import initialize
    from tests.parallel.test_activations import case, saved_bytes

    layout = {key: options.pop(key, 1) for key in ("tensor", "context", "pipeline")}
    found = saved_bytes(case(grid, words), **layout, embedders=True, **options)
    groups = initialize(**layout)
    config = HunyuanVideoConfig.from_diffusers(case(grid, words).config(), sequence_parallel=True, **layout, **options)
    place = Place(config, groups.pp_rank, grid[0] * grid[1] * grid[2], 2, times=2)
    return found, sum(saved_by_chunks(place, (Text(*words),)))


_NIGHTLY = pytest.mark.nightly


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.bfloat16},
        {"dtype": torch.bfloat16, "recompute": "selective"},
        {"dtype": torch.float32, "recompute": "full"},
        pytest.param({"dtype": torch.float32}, marks=_NIGHTLY),
        pytest.param({"dtype": torch.float32, "recompute": "selective"}, marks=_NIGHTLY),
        {"dtype": torch.bfloat16, "tensor": 2},
        pytest.param({"dtype": torch.bfloat16, "context": 2, "context_backend": "allgather"}, marks=_NIGHTLY),
        pytest.param({"dtype": torch.bfloat16, "tensor": 2, "context": 2}, marks=_NIGHTLY),
        pytest.param({"dtype": torch.float32, "pipeline": 2}, marks=_NIGHTLY),
    ],
    ids=str,
)
def test_bytes_kept_for_the_backward(options: dict[str, Any]) -> None:
    ranks = options.get("tensor", 1) * options.get("context", 1) * options.get("pipeline", 1)
    # many tokens, so that what the formula leaves out (statistics of the head norms, tables) is small
    found = run_on_ranks(ranks, "tests.planning.test_counts:kept_bytes", grid=(5, 12, 13), words=(31, 9), **options)
    for measured, formula in found:
        assert formula == pytest.approx(measured, rel=0.05)


def embedded_bytes(transformer: dict[str, Any], text: Text, times: int, **options: Any) -> tuple[int, float]:
    """(measured, formula) of what embedding a text keeps."""
    from megatron_sage.model.conditions import TextCondition
    from megatron_sage.model.transformer import build_chunks
    from megatron_sage.parallel.groups import initialize
    from megatron_sage.parallel.kept import KeptBytes

    layout = {key: options.get(key, 1) for key in ("tensor", "context")}
    config = HunyuanVideoConfig.from_diffusers(transformer, sequence_parallel=True, **options)
    (model,) = build_chunks(config, initialize(**layout).collection)
    sizes = ((text.qwen, config.text_embed_dim), (text.glyph, config.text_embed_2_dim))
    sizes += ((text.image, config.image_embed_dim),)
    tensors = [torch.randn(1, *size).to(config.params_dtype) for size in sizes]
    with KeptBytes([*model.parameters(), *tensors]) as kept:
        embedded_LBH = model.embed(TextCondition(*tensors), torch.linspace(100, 900, times))
    assert embedded_LBH.requires_grad
    return kept.total, embedder_bytes(Place(config, 0, 10, times, times=times), text)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": torch.bfloat16, "tensor": 2, "context": 2},
        {"recompute": "selective"},
        pytest.param({"dtype": torch.bfloat16, "recompute": "full"}, marks=_NIGHTLY),
    ],
    ids=str,
)
def test_bytes_kept_by_the_embedders(options: dict[str, Any], seed: int) -> None:
    """The same on every TP and CP rank: each embeds the whole text. With recomputation only the times are kept."""
    draw = random.Random(seed)
    text = Text(draw.randint(20, 90), draw.choice([0, 17]), draw.choice([0, 23]))
    ranks, times = options.get("tensor", 1) * options.get("context", 1), draw.randint(1, 3)
    given = {"transformer": random_model(seed), "text": text, "times": times}
    found = run_on_ranks(ranks, "tests.planning.test_counts:embedded_bytes", **given, **options)
    for measured, formula in found:
        if "recompute" in options:
            assert (measured, formula) == (4 * times, 0)
        else:
            assert formula == pytest.approx(measured, rel=0.03)
