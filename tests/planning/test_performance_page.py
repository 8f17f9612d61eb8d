"""Numbers of docs/performance.md that the planner computes are those of this version."""

import re
from pathlib import Path

import pytest

from megatron_sage.config import load_config
from megatron_sage.model.config import HunyuanVideoConfig
from megatron_sage.planning.estimate import Estimate
from megatron_sage.planning.flops import Text, model_forward
from megatron_sage.planning.machine import load_gpu
from megatron_sage.planning.plan import Layout, Plan, evaluate
from megatron_sage.recipes import recipe

PAGE = (Path(__file__).parents[2] / "docs" / "performance.md").read_text()
TEXTS = Text(300), Text(6)


def planned(*overrides: str) -> Estimate:
    """Of the page's recipe on 64 H100."""
    config = load_config(None, list(overrides), recipe("hv15_480p_b_sage_dual"))
    parallel = config.parallel
    parallel.data = 64 // (parallel.tensor * parallel.context * parallel.pipeline)
    layout = Layout(parallel.tensor, parallel.context, parallel.pipeline, parallel.data, parallel.sequence)
    plan = Plan(config, load_gpu("h100-80"), 64, {"num_attention_heads": 16, "num_layers": 54}, TEXTS)
    return evaluate(config, plan, layout)


def cells(first: str) -> list[str]:
    (line,) = (line for line in PAGE.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def sizes(name: str) -> list[str]:
    found = dict.fromkeys(("TP", "CP", "PP"), 1) | {k: int(n) for k, n in re.findall(r"(TP|CP|PP) (\d+)", name)}
    return [f"parallel.{key}={found[k]}" for key, k in (("tensor", "TP"), ("context", "CP"), ("pipeline", "PP"))]


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("CP 2 · PP 2 · DP 16", []),
        ("CP 4 · DP 16", []),
        ("CP 8 `allgather` · DP 8", ["parallel.context_backend=allgather"]),
        ("TP 4 · CP 2 · DP 8", []),
        ("TP 8 · DP 8", []),
    ],
)
def test_layouts(name: str, more: list[str]) -> None:
    found = planned(*sizes(name), *more)
    _, seconds, nvlink, peak = cells(name)
    assert found.seconds == pytest.approx(float(seconds), abs=1)
    moved = sum(phase.nvlink_bytes for phase in found.phases.values())
    assert moved / 1e12 == pytest.approx(float(nvlink), rel=0.03)
    assert found.worst[2] / 1e9 == pytest.approx(float(peak), abs=1)


def test_recomputation() -> None:
    _, seconds, memory = cells("`precision.recompute` `full` → `selective` → `none`")
    for kind, s, gb in zip(
        ("full", "selective", "none"), re.findall(r"\d+", seconds), re.findall(r"\d+", memory), strict=True
    ):
        found = planned("parallel.tensor=8", f"precision.recompute={kind}")
        assert found.seconds == pytest.approx(float(s), abs=1), kind
        assert found.phases["train"].memory_bytes / 1e9 == pytest.approx(float(gb), abs=1), kind


def test_one_forward() -> None:
    config = HunyuanVideoConfig.from_diffusers({})
    for column, tokens in ((1, 21 * 30 * 53), (2, 21 * 45 * 80)):
        found = model_forward(config, tokens, TEXTS[0])
        assert cells("video tokens")[column] == f"{tokens:,}"
        assert cells("PFLOP")[column] == f"{found.total / 1e15:.3f}"
        assert cells("attention")[column] == f"{found.attention / found.total:.0%}".replace("%", " %")
        video = found.blocks * tokens / (tokens + TEXTS[0].total) / found.total
        assert cells("GEMMs of the blocks, video")[column] == f"{video:.1%}".replace("%", " %")
