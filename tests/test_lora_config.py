"""Settings of adapters that are refused, each in one line with its cure."""

import pytest

from megatron_sage.config import load_config, validate
from tests.test_config import files, refusal  # noqa: F401  (a fixture)

PP3 = ["parallel.pipeline=3", "parallel.pipeline_layout=Et*6|t*5|tL"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lora.alpha=8"], "lora.alpha=8.0: has no effect without adapters; set lora.rank"),
        (["lora.rank=0"], "lora.rank=0: must be >= 1; null trains all weights"),
        (["lora.rank=4", "lora.alpha=0"], "lora.alpha=0.0: must be > 0"),
        (["lora.rank=4", "lora.targets=[]"], "lora.targets=[]: must name at least one linear layer; choose from norm1"),
        (["lora.rank=4", "lora.targets=[to_q,to_w]"], "lora.targets[1]=to_w: no such layer; did you mean to_"),
        (["lora.rank=4", "lora.targets=[attn.to_out.0]"], "did you mean to_out.0? choose from"),
        (["lora.rank=4", "lora.targets=[to_q,to_q]"], "lora.targets[1]=to_q: is named twice"),
        (["lora.rank=1025"], "lora.rank=1025: must be <= 1024, the smaller size of to_q (1024 to 1024 channels)"),
        (["lora.rank=2048", "lora.targets=[ff.net.2]"], "the smaller size of ff.net.2 (4096 to 1024 channels)"),
        (
            ["lora.rank=4", "lora.targets=[to_add_out]", *PP3],
            "lora.targets=['to_add_out']: leaves pipeline stage 2 without a trained adapter",
        ),
        (
            ["lora.rank=4", "parallel.pipeline=3", "parallel.pipeline_layout=E|t*6|t*6L"],
            "leaves pipeline stage 0 without a trained adapter",
        ),
    ],
)
def test_refusals(files: list[str], overrides: list[str], message: str) -> None:  # noqa: F811
    line = refusal([*files, *overrides], world_size=3 if any("pipeline" in o for o in overrides) else 1)
    assert message in line


@pytest.mark.parametrize(
    "overrides",
    [
        ["lora.rank=1024", "lora.alpha=0.5"],
        ["lora.rank=4", "lora.targets=[to_add_out,to_q]", *PP3],
        ["lora.rank=4", "lora.targets=[to_add_out]", "parallel.pipeline=3"],
    ],
)
def test_what_fits_is_taken(files: list[str], overrides: list[str]) -> None:  # noqa: F811
    validate(load_config(None, [*files, *overrides]), 3 if any("pipeline" in o for o in overrides) else 1)
