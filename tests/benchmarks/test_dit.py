"""The `dit` benchmark's counts and equalities; what is kept at full width is a guard: it may not creep up."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sage.planning.saved import block_bytes
from megatron_sage.planning.traffic import Place
from tests.parallel.pool import run_on_ranks


def full_width(recompute: str, grid: tuple[int, int, int], words: int) -> tuple[float, float]:
    """(kept bytes, formula) of a block per token, as the difference of models of three and two blocks."""
    from benchmarks.dit import FULL
    from megatron_sage.model.conditions import TextCondition
    from megatron_sage.model.config import HunyuanVideoConfig
    from megatron_sage.model.transformer import build_chunks
    from megatron_sage.parallel.groups import initialize
    from megatron_sage.parallel.kept import KeptBytes

    tokens, kept = grid[0] * grid[1] * grid[2], []
    sizes = {"text_embed_dim": 16, "text_embed_2_dim": 16, "image_embed_dim": 16}  # embeddings are no part of a block
    groups = initialize()
    for layers in (2, 3):
        config = HunyuanVideoConfig.from_diffusers(
            {**FULL, **sizes, "num_layers": layers}, dtype=torch.bfloat16, recompute=recompute
        )
        (model,) = build_chunks(config, groups.collection)
        text = TextCondition(*(torch.zeros(1, length, 16, dtype=torch.bfloat16) for length in (words, 0, 0)))
        with KeptBytes(model.parameters()) as found:
            model(torch.zeros(tokens, 1, config.in_channels), torch.tensor([500.0]), text, grid)
        kept.append(found.total)
        del model
    return (kept[1] - kept[0]) / (tokens + words), block_bytes(Place(config, 0, tokens, 1), words, False) / (
        tokens + words
    )


@pytest.mark.parametrize(
    ("recompute", "most"),
    [("none", 70_000), pytest.param("selective", 29_000, marks=pytest.mark.nightly), ("full", 4_200)],
)
def test_kept_bytes_of_full_width(recompute: str, most: float) -> None:
    """bf16: 17 tensors of 2,048 channels and attention's statistics, 7 without the MLP's, the block's input alone.

    The formula leaves out the modulations, 24 rows of a block whatever the number of tokens.
    """
    ((kept, formula),) = run_on_ranks(
        1, "tests.benchmarks.test_dit:full_width", recompute=recompute, grid=(3, 7, 11), words=29
    )
    modulations = 0 if recompute == "full" else 24 * 2048 * 2 / (3 * 7 * 11 + 29)
    assert formula <= most
    assert formula <= kept <= formula + modulations + 1


def measured(folder: str) -> dict[str, Any]:
    from benchmarks import common, dit

    found = []
    for recompute, words in (("none", (3, 0, 0)), ("full", (5, 2, 4))):
        case = dit.Case("small", (2, 3, 5), words, (7, 3, 4), 2, "fp32", False, recompute)
        found.append(dit.measure(case, 1))
    kept = [{"dtype": "fp32", "recompute": "none", "ours": 1.0}]
    common.write("dit", {"cases": found, "kept": kept}, dit._markdown(found, kept), Path(folder))
    return {"cases": found}


def test_both_sides_compute_the_same_and_are_counted(tmp_path: Path) -> None:
    (found,) = run_on_ranks(1, "tests.benchmarks.test_dit:measured", folder=str(tmp_path))
    for row, tokens in zip(found["cases"], ((33, 44), (41, 44)), strict=True):
        assert 0 < row["error"] < 1e-6
        assert (row["tokens"]["ours"], row["tokens"]["diffusers"]) == tokens
        assert 0 < row["peak_bytes"]["ours"] < row["peak_bytes"]["diffusers"]
        assert all(math.isfinite(one["median"]) for part in row["ratio"].values() for one in part.values())
    content = json.loads((tmp_path / "dit.json").read_text())
    assert content["machine"]["torch"] == torch.__version__ and content["cases"] == found["cases"]
    assert (tmp_path / "dit.md").read_text().count("| small |") == 2
