"""What an iteration costs in counts, which no noisy machine changes: host syncs, forwards, operations, collectives.

Every job runs the phases of an iteration at several sizes in one process, so that what must not grow can be compared.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.parallel.pool import run_on_ranks

LAYERS = 4
MODEL = {"num_attention_heads": 8, "attention_head_dim": 12, "num_layers": LAYERS, "rope_axes_dim": (4, 4, 4)}
# Denoising steps, samples of a group, updates (and pairs of a forward). 15 video tokens, texts of 1, 3, 6 or 9 words,
# two samples a micro-batch.
SIZES = [(2, 2, 1), (3, 4, 2)]

MODULATION = 1  # gathers of a block and branch: of both streams' [B, 6H] together


class Counts:
    """Of one phase on this rank."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.phases = trainer, {}

    @contextmanager
    def phase(self, name: str, operations: bool = False) -> Iterator[None]:
        from torch.utils.flop_counter import FlopCounterMode

        from megatron_sage.parallel.traffic import CollectiveCounter
        from tests.host_syncs import HostSyncs

        forwards, attentions, handles = Counter(), Counter(), []
        for number, chunk in enumerate(self.trainer.engine.chunks):
            handles.append(chunk.register_forward_pre_hook(lambda *_, number=number: forwards.update([number])))
            for block in chunk.transformer_blocks.values():
                handles.append(block.attn.register_forward_pre_hook(lambda *_: attentions.update(["attention"])))
        with ExitStack() as stack:
            collectives = stack.enter_context(CollectiveCounter(self.trainer.engine.groups))
            flops = stack.enter_context(FlopCounterMode(display=False)) if operations else None
            syncs = stack.enter_context(HostSyncs())
            yield
        for handle in handles:
            handle.remove()
        self.phases[name] = {
            "forwards": dict(forwards),
            "attentions": attentions["attention"],
            "gemm": None if flops is None else flops.get_total_flops(),  # a CPU's attention is not among them
            "calls": dict(collectives.calls),
            "syncs": dict(syncs.where),
        }


def phases(arguments: list[str], processes: int) -> list[dict[str, Any]]:
    """At each of `SIZES`: counts of the phases, and what the formulas have for them."""
    from tests.parallel import iterations

    trainer = iterations.prepare(arguments, processes)
    config = trainer.engine.config
    for number in range(len(trainer.prompts)):
        trainer.prompts[number]  # read from the disk and copied to the device once, when asked for first
    found = []
    for steps, samples, updates in SIZES:
        operations = processes == 1 or not found  # counting them takes as long as the rest
        config.sampler.num_steps, config.grpo.group_size, config.grpo.updates_per_rollout = steps, samples, updates
        config.grpo.replay_batch = updates  # 1 or 2 pairs a forward
        trainer._choose_steps()
        counts = Counts(trainer)
        with counts.phase("rollout", operations):
            trajectories, _ = trainer._roll_out()
        rewards, row, _ = trainer._score(trajectories)
        with counts.phase("advantages"):
            trainer._assign_advantages(trajectories, rewards, row)
        with counts.phase("reference", operations):
            trainer._reference_pass(trajectories)
        pairs = [(n, step) for n in range(len(trajectories)) for step in trainer.table.trained_steps]
        with counts.phase("replay", operations):
            statistics = trainer.replay.gradients(trajectories, pairs, lambda number: None)
        # torch's AdamW reads a counter of each parameter, which is on the host even where the parameter is not
        trainer.optimizer.step_with_ready_grads = lambda: True
        with counts.phase("optimizer"):
            trainer._step(statistics)
        found.append({"counted": counts.phases, **expected(trainer, trajectories, pairs)})
    return found


def expected(trainer: Any, trajectories: list[Any], pairs: list[tuple[int, int]]) -> dict[str, Any]:
    """Forwards of each chunk, GEMM operations, and the sizes that the tests' own formulas start from."""
    from megatron_sage.planning.flops import Text, stage_flops
    from megatron_sage.planning.plan import places_of
    from megatron_sage.planning.traffic import Place

    engine, groups = trainer.engine, trainer.engine.groups
    config, model = engine.config, engine.model_config
    assert places_of(config, model.to_diffusers())[groups.pp_rank].config.stage_blocks == model.stage_blocks
    steps, references = config.sampler.num_steps, len(trainer.reference.kinds)
    batches = trainer.replay.batches(trajectories, pairs)
    gemm: dict[str, float] = {"replay": 0.0}

    def parts(network: Any, prompt: Any, batch: int, times: int = 1) -> list[Any]:
        place = Place(model, groups.pp_rank, engine.shape.shard.num_tokens, batch, times=times)
        texts = [network.text(prompt, branch) for branch in range(network.branches)]
        lengths = [Text(t.qwen_BLD.shape[1], t.byt5_BLD.shape[1], t.image_BLD.shape[1]) for t in texts]
        return [stage_flops(place, text, groups.cp_rank, groups.tp_rank) for text in lengths]

    def without_gradient(network: Any, steps: int) -> float:
        """Every distinct text, of a prompt or the negative, is embedded once a step."""
        total, seen = 0.0, set()
        for trajectory in trajectories:
            found = parts(network, trajectory.prompt, len(trajectory.samples))
            for branch, part in enumerate(found):
                text = id(network.text(trajectory.prompt, branch))
                total += part.without_gradient(steps, 0 if text in seen else steps).gemm
                seen.add(text)
        return total

    gemm["rollout"] = without_gradient(engine.rollout_network(), steps)
    gemm["reference"] = references * without_gradient(engine.training_network(), len(trainer.table.trained_steps))
    for batch in batches:
        size = sum(len(trajectories[number].samples) for number, _ in batch)
        for p in parts(engine.training_network(), trajectories[batch[0][0]].prompt, size, len(batch)):
            gemm["replay"] += p.forward.gemm + p.backward.gemm + p.again.gemm
    branches = engine.rollout_network().branches, engine.training_network().branches
    return {
        "forwards": {
            "rollout": len(trajectories) * steps * branches[0],
            "reference": len(pairs) * branches[1] * references,
            "replay": len(batches) * branches[1],
        },
        "gemm": gemm,
        "blocks": [len(blocks) for blocks in model.stage_blocks[groups.pp_rank]],
        "has_last": any(LAYERS - 1 in blocks for blocks in model.stage_blocks[groups.pp_rank]),
        "ends": (groups.is_first_stage, groups.is_last_stage),
        "micro_batches": len(batches),
    }


LAYOUTS: dict[str, dict[str, Any]] = {
    "alone": {"kl.position": "both", "kl.step_kl": "closed_form", "precision.recompute": "full"},
    "tp2-sp": {"parallel.tensor": 2},
    "pp2": {"parallel.pipeline": 2},
    "tp2": {"parallel.tensor": 2, "parallel.sequence": False, "sampler.guidance_scale": 1.0},
    "cp2-ulysses": {"parallel.context": 2, "grpo.cfg_in_training": "distilled"},
    "cp2-allgather": {"parallel.context": 2, "parallel.context_backend": "allgather", "kl.position": "both"},
    "tp2-cp2": {"parallel.tensor": 2, "parallel.context": 2, "precision.recompute": "full"},
    "pp2-interleaved": {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2},
}
QUICK = ("alone", "tp2-sp")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    run_on_ranks(1, "tests.training.world:build", root=folder, **MODEL)
    return folder


@pytest.fixture(
    scope="module", params=[pytest.param(n, marks=[] if n in QUICK else pytest.mark.nightly) for n in LAYOUTS]
)
def counted(root: Path, request: pytest.FixtureRequest) -> tuple[dict[str, Any], list[list[dict[str, Any]]]]:
    """(settings, [rank][size]) of a layout."""
    from tests.training import world

    name, options = request.param, LAYOUTS[request.param]
    ranks = options.get("parallel.tensor", 1) * options.get("parallel.context", 1) * options.get("parallel.pipeline", 1)
    arguments = world.overrides(world.settings(root, f"counts_{name}", **options))
    return options, run_on_ranks(ranks, "tests.training.test_counts:phases", arguments=arguments, processes=ranks)


Counted = tuple[dict[str, Any], list[list[dict[str, Any]]]]


def test_host_syncs_do_not_grow(counted: Counted) -> None:
    """Whatever the number of steps, flights and pairs: none in the reference pass, one for each update and chunk in the
    replay (is any sample trained?), two behind a rollout (how busy was the pipeline?), four beside the optimizer's
    own step (statistics, gradient norm, is all finite: a flag to the device and its sum back)."""
    for sizes in counted[1]:
        for one in sizes:
            found = {name: Counter(phase["syncs"]) for name, phase in one["counted"].items()}
            totals = {name: where.total() for name, where in found.items()}
            assert totals["rollout"] <= 2 and totals["reference"] == 0 and totals["replay"] <= len(one["blocks"]), found
            assert totals["optimizer"] <= 4, found
            assert found["advantages"] == Counter(sizes[0]["counted"]["advantages"]["syncs"]), found


def test_forwards_are_those_of_the_method(counted: Counted) -> None:
    """Each chunk: flights · steps · branches, references · pairs · branches, training forwards · branches."""
    options, ranks = counted
    again = 2 if options.get("precision.recompute") == "full" else 1
    for one in (one for sizes in ranks for one in sizes):
        for phase, number in one["forwards"].items():
            counts = one["counted"][phase]
            assert counts["forwards"] == dict.fromkeys(range(len(one["blocks"])), number), phase
            assert counts["attentions"] == sum(one["blocks"]) * number * (again if phase == "replay" else 1), phase


def test_operations_are_the_planner_s(counted: Counted) -> None:
    """GEMMs of every phase, exactly; attention is no operation that torch counts on a CPU."""
    for one in (one for sizes in counted[1] for one in sizes if one["counted"]["replay"]["gemm"] is not None):
        for phase, gemm in one["gemm"].items():
            assert one["counted"][phase]["gemm"] == gemm > 0, phase


def block_calls(options: dict[str, Any], last: bool) -> tuple[Counter, Counter]:
    """(forward, backward) of one block and branch, by operation and group."""
    forward, backward = Counter(), Counter()
    columns, rows = (3, 2) if last else (4, 4)  # qkv and fc1, proj and fc2; of both streams, the last block's video
    if options.get("parallel.tensor", 1) > 1:
        forward["all_gather", "tp"] = MODULATION
        if options.get("parallel.sequence", True):
            forward["all_gather", "tp"] += columns
            forward["reduce_scatter", "tp"] = rows
            backward["all_gather", "tp"] = rows + columns
            backward["reduce_scatter", "tp"] = columns + MODULATION
        else:
            forward["all_reduce", "tp"] = rows
            backward["all_reduce", "tp"] = columns
    if options.get("parallel.context", 1) > 1:
        if options.get("parallel.context_backend") == "allgather":
            forward["all_gather", "cp"] = backward["all_gather", "cp"] = backward["reduce_scatter", "cp"] = 1
        else:
            forward["all_to_all", "cp"] = backward["all_to_all", "cp"] = 2
    if options.get("precision.recompute") == "full":
        backward += forward
    return forward, backward


def chunk_calls(options: dict[str, Any], one: dict[str, Any]) -> tuple[Counter, Counter]:
    """(forward, backward) of all blocks of a rank for one branch."""
    forward, backward = Counter(), Counter()
    for number in range(sum(one["blocks"])):
        parts = block_calls(options, one["has_last"] and number == sum(one["blocks"]) - 1)
        forward, backward = forward + parts[0], backward + parts[1]
    return forward, backward


def times(calls: Counter, number: int) -> Counter:
    return Counter({key: value * number for key, value in calls.items()})


def test_calls_of_collectives(counted: Counted) -> None:
    """By operation and group: of a rollout's and a reference's forwards, and of a training micro-batch.

    What an update has besides is found by comparing sizes: it is the same at all of them.
    """
    options, ranks = counted
    tensor, context = options.get("parallel.tensor", 1), options.get("parallel.context", 1)
    sequence = tensor > 1 and options.get("parallel.sequence", True)
    token_group = "tp_cp" if sequence else "cp"
    for sizes in ranks:
        besides = []
        for one in sizes:
            forward, backward = chunk_calls(options, one)
            groups = {"tp", "cp"} if max(tensor, context) > 1 else set()
            for phase in ("rollout", "reference"):
                found = Counter({k: n for k, n in one["counted"][phase]["calls"].items() if k[1] in groups})
                found.pop(("all_reduce", "cp"), None)  # a step's log-probability, where that is the token group
                assert found == times(forward, one["forwards"][phase]), phase
            branches = one["forwards"]["replay"] // one["micro_batches"]
            expected = times(forward + backward, branches)
            if tensor > 1:
                expected["all_reduce", "tp"] += branches * len(one["blocks"])  # gradient of SiLU(temb), of each chunk
            if sequence and one["ends"][0]:
                expected["all_gather", "tp"] += branches  # the text's gradient, for embedders that are whole
            if sequence and one["ends"][1]:
                expected["all_reduce", "tp"] += branches  # scale and shift of the final norm
            found = Counter(one["counted"]["replay"]["calls"])
            for key in [key for key in found if key[0] == "send"]:
                del found[key]  # sent bytes are those of the formulas: tests/parallel/test_traffic.py
            found.subtract(times(expected, one["micro_batches"]))
            if (sequence or context > 1) and one["ends"][1]:  # sums over tokens, of every pair
                terms = 1 + len([1 for key in ("kl.position",) if options.get(key) == "both"]) + 1
                pairs = one["forwards"]["reference"] // branches // (terms - 1)
                found["all_reduce", token_group] -= pairs * terms
            besides.append({key: value for key, value in found.items() if value})
        assert all(rest == besides[0] and min(rest.values(), default=1) > 0 for rest in besides), besides
        assert sum(besides[0].values()) <= 8, besides  # gradients, copies, number of pairs, statistics
