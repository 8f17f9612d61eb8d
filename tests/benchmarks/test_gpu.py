"""`python -m benchmarks.gpu`: that every section runs, counts what the planner counts, and survives what fails.

Never a time: they mean nothing at these sizes. Where there is a GPU the same tests run on it.
"""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu import block, command, passes, syncs
from benchmarks.gpu.__main__ import NAMES, main
from benchmarks.gpu.bench import Bench, Ceilings, Row
from benchmarks.gpu.models import Chain, config_of, network_of, random_dit, random_prompt
from benchmarks.gpu.optimizer import newton_schulz_flops
from benchmarks.gpu.sizes import SMALL, tokens
from megatron_sage.parallel.device import device
from megatron_sage.parallel.groups import Groups
from megatron_sage.planning.flops import Text, stage_flops
from megatron_sage.planning.traffic import Place
from tests.parallel.pool import run_on_ranks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL_RUN = ["--device", DEVICE, "--small"]
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="says what is skipped without CUDA")


def not_json(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON")


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "gpu.json").read_text(), parse_constant=not_json)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("gpu")
    assert main([*SMALL_RUN, "--out", str(where)]) == 0
    return where


@pytest.fixture(scope="module")
def sections(folder: Path) -> dict[str, list[Row]]:
    return {name: section["rows"] for name, section in read(folder)["sections"].items()}


@pytest.fixture(scope="module")
def bench(one_rank: Groups) -> Bench:
    torch.manual_seed(1)
    return Bench(SMALL, one_rank, device(), ceilings=Ceilings(1e12, 2e12, 1e12, 1e10, 1e10))


def named(rows: list[Row], part: str) -> list[Row]:
    found = [row for row in rows if part in row["name"]]
    assert found, part
    return found


def test_every_section_has_rows_with_positive_floors(folder: Path, sections: dict[str, list[Row]]) -> None:
    assert tuple(sections) == NAMES == tuple(command.SECTIONS)
    assert {"torch", "gpu", "date", "cpu"} <= read(folder)["machine"].keys()
    for name, rows in sections.items():
        assert rows, name
        for row in rows:
            assert "error" not in row
            if "ms" in row:
                assert 0 < row["ms_min"] <= row["ms"] <= row["ms_max"] and row["floor_ms"] > 0 and row["floor"], row
                assert row["times_floor"] == pytest.approx(row["ms"] / row["floor_ms"])
            elif "skipped" in row:
                assert row["skipped"]
            else:
                assert "expected" in row or row["floor_ms"] > 0, row
    text = (folder / "gpu.md").read_text()
    assert all(f"## {name}" in text for name in NAMES)
    assert all(row["name"].replace("|", "/") in text for rows in sections.values() for row in rows)


def test_compiled_functions_are_in_the_blocks(sections: dict[str, list[Row]]) -> None:
    for row in named(sections["block"], "elementwise"):
        assert row["modules"] == 2 and row["compiled"], row  # the block and its attention
        assert row["graph_breaks"] == 0


@without_cuda
def test_what_needs_a_gpu_says_so(sections: dict[str, list[Row]]) -> None:
    assert "CUDA" in named(sections["block"], "FP8 by Transformer Engine")[0]["skipped"]
    assert "a GPU" in named(sections["attention"], "Transformer Engine")[0]["skipped"]
    assert "CUDA" in named(sections["anchor"], "hidden")[0]["skipped"]
    assert "torchrun" in sections["collectives"][0]["skipped"]
    assert "nothing is pinned" in named(sections["ceiling"], "host to device")[0]["what"]


@pytest.mark.parametrize(("recompute", "blocks"), [("none", 1), ("none", 3), ("full", 2)])
def test_flops_of_blocks_are_those_that_torch_counts(bench: Bench, recompute: str, blocks: int) -> None:
    grid = (2, 3, 5)
    chain = Chain(bench, random_dit(bench, blocks + 1, recompute=recompute), grid, blocks)
    with FlopCounterMode(display=False) as forward:
        out = chain.run()
    with FlopCounterMode(display=False) as backward:
        torch.autograd.backward(out, chain.gradients)
    formula = chain.flops()
    length = tokens(grid) + SMALL.text
    assert formula.forward.attention == blocks * 4 * length**2 * chain.dit.config.hidden_size
    if not bench.cuda:  # there torch counts attention too
        assert forward.get_total_flops() == formula.forward.gemm
        assert backward.get_total_flops() == formula.backward.gemm + formula.again.gemm


def test_rows_of_blocks_have_the_planners_flops_and_bytes(bench: Bench, sections: dict[str, list[Row]]) -> None:
    for name, grid in SMALL.grids.items():
        for blocks in SMALL.blocks:
            place = [Place(config_of(bench, n), 0, tokens(grid), 1) for n in (blocks + 1, 1)]
            more, least = (stage_flops(p, Text(SMALL.text)) for p in place)
            case = f"{name}, {blocks} block(s), forward"
            expected = more.forward.total - least.forward.total
            (row,) = [row for row in sections["block"] if row["name"] == case]
            assert row["flops"] == expected
            expected += more.backward.total - least.backward.total
            for recompute in block.RECOMPUTE:
                (row,) = named(sections["block"], f"{case} + backward, recompute {recompute}")
                assert row["flops"] == expected and row["mfu"] == pytest.approx(1 / row["times_floor"])
                assert row["hfu"] > row["mfu"]
                # the modulations of both streams, six rows each, are not in the formula: it is of tokens
                rows = 0 if recompute == "full" else 2 * 6 * blocks * place[0].config.hidden_size * 2
                assert row["kept_bytes"] == row["kept_bytes_formula"] + rows


def test_attention_counts_the_models_flops(sections: dict[str, list[Row]], bench: Bench) -> None:
    hidden = config_of(bench, 1).hidden_size
    for name, grid in SMALL.grids.items():
        forward = 4 * (tokens(grid) + SMALL.text) ** 2 * hidden
        measured = [row for row in named(sections["attention"], name) if "ms" in row]
        assert len(measured) >= 4  # at least the math kernel and torch's choice
        for row in measured:
            assert row["flops"] == forward * (2 if row["name"].endswith("backward") else 1)


def test_a_rollout_runs_each_block_for_both_branches(sections: dict[str, list[Row]], bench: Bench) -> None:
    (step,) = named(sections["rollout"], "rollout step")
    assert step["blocks_forwards"] == 2 * max(SMALL.blocks) * SMALL.steps
    config = config_of(bench, max(SMALL.blocks))
    place = Place(config, 0, tokens(SMALL.grid), 1)
    texts = (Text(SMALL.text), Text(SMALL.unconditional))
    assert step["flops"] == sum(stage_flops(place, text).forward.total for text in texts)


@pytest.mark.parametrize("blocks", [1, 3])
def test_the_copy_alone_loads_what_a_streamed_pass_loads(
    bench: Bench, sections: dict[str, list[Row]], monkeypatch: pytest.MonkeyPatch, blocks: int
) -> None:
    dit = random_dit(bench, blocks)
    anchor = passes.Anchor([dit], bench.groups)
    loaded: list[int] = []
    load = passes.Unit.load

    def counted(unit: Any, buffer: torch.Tensor) -> None:
        loaded.append(unit.bytes)
        load(unit, buffer)

    monkeypatch.setattr(passes.Unit, "load", counted)
    network, prompt = network_of(bench, dit, SMALL.grid), random_prompt(bench)
    x_SBC = bench.random(tokens(SMALL.grid), 1, dit.config.out_channels, dtype=torch.float32)
    passes.reference_pass(bench, network, prompt, x_SBC, anchor)
    streamed = sorted(loaded)
    loaded.clear()
    passes._copy(bench, anchor)
    assert sorted(loaded) == streamed and sum(loaded) == passes.copied_bytes(bench, anchor)
    assert named(sections["anchor"], "streamed")[0]["equal"] is True


def test_offloaded_trajectories_have_the_same_bytes_and_numbers(sections: dict[str, list[Row]]) -> None:
    off, on = named(sections["offload"], "offload_trajectories")
    assert off["kept_bytes"] == on["kept_bytes"] == off["kept_bytes_formula"] > 0
    assert off["equal"] and on["equal"]


def test_optimizers_step_all_parameters_and_newton_schulz_is_counted(
    bench: Bench, sections: dict[str, list[Row]]
) -> None:
    from megatron_sage.config.schema import Config, OptimizerConfig
    from megatron_sage.training.optimizer import build_optimizer, wrap

    dit = random_dit(bench, SMALL.optimizer_blocks)
    trained = [p for p in dit.parameters() if p.requires_grad]
    rows = [row for row in sections["optimizer"] if "ms" in row]
    assert len(rows) == 5 and {row["parameters"] for row in rows} == {sum(p.numel() for p in trained)}
    ddp = wrap([dit], bench.groups)
    muon = build_optimizer(Config(optimizer=OptimizerConfig(name="muon")), ddp, torch.bfloat16).chained_optimizers[1]
    for parameter in trained:
        parameter.main_grad.normal_()
    muon.prepare_grads()
    with FlopCounterMode(display=False) as counted:
        muon.step_with_ready_grads()
    (row,) = named(rows, "Muon")
    assert row["flops"] == newton_schulz_flops(muon.optimizer) == counted.get_total_flops()


def test_no_phase_reads_a_number_but_megatrons_one(sections: dict[str, list[Row]]) -> None:
    for row in sections["syncs"]:
        if not isinstance(row["expected"], str):
            assert row["count"] == row["expected"], row
    assert len(sections["syncs"]) == 4


def test_a_wait_is_counted(bench: Bench) -> None:
    x = torch.ones(3, device=bench.device)
    with syncs.counted(bench.cuda) as found:
        x.sum().item()
        bool((x > 0).all())
    assert found.count == 2 and any("test_gpu.py" in place for place in found.places)


def test_an_unknown_section_fails_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL_RUN, "--only", "rollout,ancor"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --only ancor: unknown section; did you mean anchor?") and said.count("\n") == 1


def test_a_failing_section_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks(bench: Bench) -> Iterator[Row]:
        yield {"name": "one row", "count": 1, "expected": 1}
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setitem(command.SECTIONS, "rollout", breaks)
    assert main([*SMALL_RUN, "--only", "rollout,attention", "--out", str(tmp_path)]) == 1
    found = read(tmp_path)["sections"]
    assert list(found) == ["ceiling", "attention", "rollout"]
    assert found["rollout"]["error"] == "RuntimeError: first line second line"
    assert [row["name"] for row in found["rollout"]["rows"]] == ["one row"]
    assert found["attention"]["rows"] and "error" not in found["attention"]
    assert "**failed**: RuntimeError" in (tmp_path / "gpu.md").read_text()
    assert all(json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{"))


def test_without_a_ceiling_nothing_has_a_floor(bench: Bench) -> None:
    def no_gemm(bench: Bench) -> Iterator[Row]:
        raise RuntimeError("no GEMM")
        yield {}

    blind = dataclasses.replace(bench, ceilings=Ceilings())
    found = command.measure(blind, {"ceiling": no_gemm, "offload": command.SECTIONS["offload"]})
    assert "did not measure" in found["offload"]["error"] and command.broken(found["offload"])


def test_nothing_is_begun_when_the_time_is_over(tmp_path: Path) -> None:
    assert main([*SMALL_RUN, "--minutes", "1e-9", "--out", str(tmp_path)]) == 0
    for section in read(tmp_path)["sections"].values():
        assert "--minutes" in section["skipped"] and not section["rows"]


def test_what_does_not_fit_is_skipped_with_the_bytes(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    need = block.need(bench, SMALL.grid, 1, "none")
    for free, fits in ((need / 0.85 * 1.01, True), (need / 0.85 * 0.99, False)):
        monkeypatch.setattr(Bench, "free", lambda self, free=free: free)
        rows = list(block._case(bench, "case", SMALL.grid, 1, "none"))
        assert all("ms" in row for row in rows) if fits else "needs 0.0 GB of device memory" in rows[0]["skipped"]


def test_memory_that_does_not_suffice_after_all_is_a_row_that_fails(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(block, "random_dit", out_of_memory)
    found = command.measure(bench, {"block": lambda b: block._case(b, "case", SMALL.grid, 1, "none")})
    assert "out of memory" in found["block"]["rows"][0]["error"] and command.broken(found["block"])


def test_numbers_that_json_does_not_know_are_refused() -> None:
    with pytest.raises(ValueError, match="mfu is inf"):
        command.finite({"name": "row", "ms": 1.0, "mfu": math.inf})


@pytest.mark.parametrize(("arguments", "said"), [(["--device", "cpu"], "add --small"), (["--minutes", "0"], "> 0")])
def test_wrong_arguments_fail_in_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("error: ") and error.count("\n") == 1


@without_cuda
def test_a_gpu_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--small", "--only", "syncs"]) == 2
    assert "torch finds no CUDA device here" in capsys.readouterr().err


def ranks(names: list[str]) -> dict[str, Any]:
    from megatron_sage.parallel.groups import initialize

    bench = Bench(SMALL, initialize(), device())
    return command.measure(bench, {name: command.SECTIONS[name] for name in names})


def test_collectives_of_two_ranks() -> None:
    found = run_on_ranks(2, "tests.benchmarks.test_gpu:ranks", names=["collectives"])
    for section in found:
        assert "error" not in section["collectives"]
        rows = {row["name"]: row for row in section["collectives"]["rows"]}
        assert len(rows) == 3 * (1 + len(SMALL.grids))
        for name, grid in SMALL.grids.items():
            stream = tokens(grid) // 2 * 64 * 2  # this rank's tokens, 64 channels of two bytes
            assert rows[f"all-to-all, q, k, v over context, {name}"]["bytes"] == 3 * stream / 2
            for operation in ("all-gather", "reduce-scatter"):
                assert rows[f"{operation}, the stream over tensor, {name}"]["bytes"] == stream


@pytest.mark.nightly
def test_all_sections_on_two_ranks() -> None:
    for found in run_on_ranks(2, "tests.benchmarks.test_gpu:ranks", names=list(NAMES), timeout=600):
        assert not [name for name, section in found.items() if command.broken(section)]


@pytest.mark.nightly
def test_a_whole_block_is_traced(bench: Bench) -> None:
    whole = dataclasses.replace(bench, sizes=dataclasses.replace(SMALL, compile_block=True))
    rows = named(list(block._compiled(whole, "small", SMALL.grid)), "of the block")
    assert [row["compiled"] for row in rows if "ms" in row] == [["DoubleStreamBlock"]] * 2
