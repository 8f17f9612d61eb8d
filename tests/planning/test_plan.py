"""`megatron-sage plan`: which layouts it finds, what it prints, what it refuses."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_sage.__main__ import main
from megatron_sage.config import Config, load_config
from megatron_sage.errors import UserError
from megatron_sage.planning.flops import Text
from megatron_sage.planning.layout import model_config
from megatron_sage.planning.machine import Gpu, known_gpus, load_gpu
from megatron_sage.planning.plan import Plan, make_plan
from megatron_sage.planning.printing import as_json, as_text
from megatron_sage.planning.wires import Wires
from megatron_sage.recipes import recipe

TEXTS = (Text(300), Text(6))
KEYS = ("tensor", "context", "pipeline", "data")


def plan(gpus: int, gpu: Gpu | None = None, base: Config | None = None, **changes: Any) -> Plan:
    overrides = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in changes.items()]
    config = load_config(None, overrides, base or recipe("hv15_480p_b_sage_dual"))
    return make_plan(config, {"num_attention_heads": 16, "num_layers": 54}, gpus, gpu or load_gpu("h100-80"), TEXTS)


def test_every_layout_is_planned_or_has_a_reason() -> None:
    found = plan(24, grpo__prompts_per_iteration=24)
    sizes = Counter(tuple(getattr(layout, key) for key in KEYS) for layout, _ in [*found.layouts, *found.rejected])
    every = [(t, c, p, 24 // (t * c * p)) for t in range(1, 25) for c in range(1, 25) for p in range(1, 25)
             if 24 % (t * c * p) == 0]  # fmt: skip
    assert set(sizes) == set(every)
    assert all(count == (1 if size[0] == 1 else 2) for size, count in sizes.items())  # with and without SP
    for layout, _ in found.layouts:
        assert 16 % layout.tensor == 0
    for layout, reason in found.rejected:
        assert "\n" not in reason
        assert 16 % layout.tensor or "memory" in reason or "interleaved" in reason or "data-parallel" in reason
    seconds = [estimate.seconds for _, estimate in found.layouts]
    assert seconds and seconds == sorted(seconds)


def test_rejections_name_the_rule() -> None:
    found = plan(64)
    reasons = {tuple(getattr(layout, key) for key in KEYS): reason for layout, reason in found.rejected}
    assert "must divide the model's 16 attention heads" in reasons[32, 1, 1, 2]
    assert "64 > 54 blocks" in reasons[1, 1, 64, 1]
    assert "multiple of the data-parallel size 64" in reasons[1, 1, 1, 64]


def test_what_does_not_fit_is_rejected_with_its_largest_parts_and_a_cure() -> None:
    small = load_gpu("h100-80")
    small.memory_bytes = 24e9
    found = plan(8, small, precision__recompute="none", optimizer__distributed=False)
    reasons = [reason for _, reason in found.rejected if reason.startswith("memory: ")]
    assert reasons and all("GB" in reason and "; " in reason for reason in reasons)
    assert any("precision.recompute=full" in reason for reason in reasons)
    host = load_gpu("h200")
    host.host_memory_bytes = 1e9
    assert any(reason.startswith("host memory: ") for _, reason in plan(8, host).rejected)


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--recipe", "hv15_480p_b_sage_dual", "--gpus", "16", "--gpu", "b200", "--json", "parallel.tensor=4"]
    assert main(["plan", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters_total"] == 8_326_608_160
    assert found["flops_forward"] == pytest.approx(6.85207e14, rel=1e-5)
    assert found["layouts"] and {layout["tensor"] for layout in found["layouts"]} == {4}
    for layout in found["layouts"]:
        assert layout["tensor"] * layout["context"] * layout["pipeline"] * layout["data"] == 16
        assert set(layout["phases"]) == {"rollout", "decode", "reward", "reference", "train", "optimizer", "save"}
        for phase in layout["phases"].values():
            assert {"seconds", "flops", "memory_bytes", "nvlink_bytes", "network_bytes", "host_bytes"} <= set(phase)
        assert layout["seconds_per_iteration"] == pytest.approx(sum(p["seconds"] for p in layout["phases"].values()))
        assert layout["memory"]["peak_bytes"] == max(p["memory_bytes"] for p in layout["phases"].values())
        assert 0 < layout["mfu"] < 1
    assert all({"tensor", "context", "pipeline", "data", "reason"} <= set(one) for one in found["rejected"])


def test_text_names_the_assumptions() -> None:
    found = plan(16)
    text = as_text(found, 3)
    for part in ("TP", "MFU", "assumptions: gemm_efficiency", "nothing was measured on a GPU", "rejected"):
        assert part in text
    assert as_json(found)["assumptions"] == dataclasses.asdict(found.gpu.assumptions)


def estimate_of(found: Plan, *sizes: int) -> Any:
    return next(e for layout, e in found.layouts if tuple(getattr(layout, key) for key in KEYS) == sizes)


def test_costs_follow_the_settings() -> None:
    """Directions that hold whatever the numbers are."""
    big = load_gpu("b200")
    base = estimate_of(plan(16, big), 4, 1, 1, 4)
    none = estimate_of(plan(16, big, precision__recompute="none"), 4, 1, 1, 4)
    assert none.phases["train"].flops < base.phases["train"].flops
    assert none.worst[2] > base.worst[2]
    device = estimate_of(plan(16, big, kl__anchor_placement="device"), 4, 1, 1, 4)
    assert device.memory[0].static - base.memory[0].static == pytest.approx(base.memory[0].host["anchor"])
    assert device.phases["reference"].host_bytes == 0 < base.phases["reference"].host_bytes
    without = estimate_of(plan(16, big, kl__strategy="none"), 4, 1, 1, 4)
    assert without.phases["reference"].seconds == 0 and "anchor" not in without.memory[0].host
    one = estimate_of(plan(16, big, sampler__guidance_scale=1), 4, 1, 1, 4)
    assert one.phases["rollout"].flops == pytest.approx(base.phases["rollout"].flops / 2, rel=0.02)
    whole = estimate_of(plan(16, big, optimizer__distributed=False), 4, 1, 1, 4)
    assert whole.memory[0].device["optimizer"] == pytest.approx(4 * base.memory[0].device["optimizer"])
    offloaded = estimate_of(plan(16, big, optimizer__offload="hybrid"), 4, 1, 1, 4)
    assert offloaded.memory[0].device["optimizer"] == 0 < offloaded.memory[0].host["optimizer"]
    adapters = estimate_of(plan(16, big, lora__rank=16), 4, 1, 1, 4)
    assert adapters.memory[0].device["gradients"] < base.memory[0].device["gradients"] / 100
    window = estimate_of(plan(16, big, sampler__sde_window__size=4), 4, 1, 1, 4)
    assert window.phases["train"].flops == pytest.approx(base.phases["train"].flops * 4 / 20)
    assert base.phases["train"].flops / base.phases["rollout"].flops > 3.5  # recompute full: forward, again, backward


def test_groups_and_nodes() -> None:
    """Ranks are numbered tp, cp, dp, pp; a node holds consecutive ones."""
    wires = Wires(tensor=4, context=2, data=2, pipeline=2, node=8)
    assert [wires.group(name) for name in ("tp", "cp", "tp_cp", "dp", "dp_cp", "pp")] == [
        (4, 1), (2, 1), (8, 1), (2, 2), (4, 2), (2, 2)
    ]  # fmt: skip
    assert wires.crossing() == ["dp_cp", "pp"]
    assert Wires(8, 1, 1, 1, 4).group("tp") == (8, 2)
    inside, outside = wires.split(Counter({("all_gather", "tp"): 400, ("send", "pp"): 7}))
    assert (inside, outside) == (300, 7)
    # a ring of 4 over 2 nodes leaves each once: half of what a rank sends on average
    inside, outside = wires.split(Counter({("all_reduce", "dp_cp"): 100}))
    assert inside == outside == pytest.approx(75)


def test_gpu_files(tmp_path: Path) -> None:
    assert set(known_gpus()) >= {"h100-80", "h200", "b200"}
    for name in known_gpus():
        gpu = load_gpu(name)
        assert gpu.source and gpu.memory_bytes > 7e10 and gpu.fp8_flops > gpu.bf16_flops
    path = tmp_path / "mine.yaml"
    whole = "memory_bytes: 4e10\nbf16_flops: 312e12\nmemory_bandwidth: 1.5e12\nnvlink_bandwidth: 3e11\n"
    whole += "network_bandwidth: 2.5e10\nhost_bandwidth: 3e10\nhost_memory_bytes: 1e12\n"
    path.write_text(whole + "assumptions:\n  gemm_efficiency: 0.4\n")
    assert load_gpu(str(path)).assumptions.gemm_efficiency == 0.4
    for text, part in [
        (whole + "memory_byte: 1\n", "did you mean memory_bytes?"),
        (whole + "assumptions: {gemm_eficiency: 1}\n", "did you mean gemm_efficiency?"),
        (whole + "assumptions: {gemm_efficiency: 1.5}\n", "must be > 0 and <= 1"),
        ("memory_bytes: 4e10\n", "must be given"),
        (whole + "gpus_per_node: many\n", "expects a whole number"),
        ("- 1\n", "expects keys"),
        ("a: [", "not readable as YAML"),
    ]:
        path.write_text(text)
        with pytest.raises(UserError, match=part.replace("?", r"\?")) as caught:
            load_gpu(str(path))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "--gpus None"),
        (["--gpus", "8", "--gpu", "h1000"], "choose from"),
        (["--gpus", "8", "--text-tokens", "0"], "--text-tokens 0: must be >= 1"),
        (["--gpus", "8", "sampler.num_stepz=3"], "did you mean sampler.num_steps?"),
        (["--gpus", "8", "precision.fp8=e4m3", "precision.fp8_recipe=mxfp8"], "Blackwell"),
        (["--gpus", "4", "--dry-run", "--rank", "4"], "--rank 4: must be >= 0 and < 4"),
        (["--gpus", "2048", "--dry-run"], "--gpus 2048: a dry run takes 1 to 1024"),
        (["--gpus", "4", "--dry-run", "parallel.tensor=3"], "world size 4"),
        (["--gpus", "4", "--dry-run", "parallel.pipeline=4", "parallel.virtual_pipeline=2",
          "sampler.micro_batch=4", "grpo.prompts_per_iteration=1"], "interleaved"),
        (["--gpus", "8", "--dry-run", "parallel.context_backend=te_a2a"], "Transformer Engine"),
    ],
)  # fmt: skip
def test_errors_are_one_line(arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    odd = "sampler.num_steps=3" if "interleaved" in part else "seed=0"
    assert main(["plan", odd, "grpo.prompts_per_iteration=8", *arguments]) == 2
    line = capsys.readouterr().err.strip()
    assert part in line and "\n" not in line


def test_a_configuration_that_needs_transformer_engine_is_rejected_by_name() -> None:
    found = plan(8, parallel__context_backend="te_p2p")
    assert any("te_p2p" in reason for _, reason in found.rejected)


@pytest.mark.parametrize("fp8", ["none", "hybrid"])
def test_the_model_is_the_engine_s(fp8: str) -> None:
    from megatron_sage import engine

    config = load_config(
        None, [f"precision.fp8={fp8}", "parallel.tensor=2", "parallel.pipeline=2", "precision.recompute=selective"]
    )
    ours, theirs = model_config(config, {}), engine.model_config(config, {})
    for name, value in vars(theirs).items():
        if name not in ("fp8_amax_history_len", "fp8_amax_compute_algo", "activation_func"):
            assert getattr(ours, name) == value or callable(value) or "layout" in name, name
