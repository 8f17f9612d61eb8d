"""Ours on real gloo ranks, tensor and sequence parallel, against diffusers in one process."""

import hashlib
from typing import Any

import pytest

from megatron_sage.parallel.groups import initialize
from tests.model.parity import (
    OUTPUT_TOLERANCE,
    Case,
    assert_parity,
    build,
    measure,
    measure_schedule,
    reference,
    run_samples,
)
from tests.parallel.pool import run_on_ranks

CASES = {
    # 24 video tokens, text 9 and 5: the text streams are padded
    "text-to-video": Case(qwen=(6, 5), byt5=(3, 0)),
    # 45 video tokens
    "odd image-to-video, MeanFlow": Case(grid=(3, 3, 5), qwen=(5, 5), byt5=(2, 2), image_to_video=True, meanflow=True),
    "16 heads, 4 blocks": Case(heads=16, head_dim=8, layers=4, grid=(1, 3, 7), qwen=(7, 2), byt5=(0, 1)),
    # at TP=4 the last ranks hold nothing but padding, in the video and in the text
    "fewer tokens than ranks": Case(grid=(1, 1, 5), qwen=(2, 2), byt5=(0, 0)),
}


def measure_rank(case: Case, path: str, tensor: int, context: int, **options: Any) -> tuple[float, dict[str, float]]:
    return measure(initialize(tensor=tensor, context=context), case, path, **options)


def check(name: str, tensor: int, context: int = 1, **options: Any) -> None:
    case = CASES[name]
    ranks = run_on_ranks(
        tensor * context,
        "tests.parallel.test_parity:measure_rank",
        case=case,
        path=reference(case),
        tensor=tensor,
        context=context,
        **options,
    )
    for rank, (output, gradients) in enumerate(ranks):
        assert_parity(output, gradients, rank)


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["replicated", "sequence parallel"])
@pytest.mark.parametrize("tensor", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_equals_diffusers(name: str, tensor: int, sequence_parallel: bool) -> None:
    check(name, tensor, sequence_parallel=sequence_parallel)


@pytest.mark.parametrize("backend", ["ulysses", "allgather"])
@pytest.mark.parametrize(("tensor", "context"), [(1, 2), (2, 2), (1, 4)])
@pytest.mark.parametrize("name", CASES)
def test_context_parallel_equals_diffusers(name: str, tensor: int, context: int, backend: str) -> None:
    check(name, tensor, context, context_backend=backend, sequence_parallel=True)


CASES_OF_A_PIPELINE = {
    "16 heads, 5 blocks": Case(heads=16, head_dim=8, layers=5, grid=(1, 3, 7), qwen=(7, 2, 7), byt5=(0, 1, 0)),
    "odd image-to-video, MeanFlow": Case(
        grid=(3, 3, 5), qwen=(5, 5), byt5=(2, 2), image_to_video=True, meanflow=True, layers=4
    ),
}


def measure_pipeline(
    case: Case, path: str, tensor: int, context: int, pipeline: int, **options: Any
) -> tuple[float, dict[str, float]]:
    virtual = options.get("virtual_pipeline")
    groups = initialize(tensor=tensor, context=context, pipeline=pipeline, virtual_pipeline=virtual)
    return measure_schedule(groups, case, path, **options)


@pytest.mark.parametrize(
    ("tensor", "context", "pipeline", "options"),
    [
        (1, 1, 2, {}),
        (2, 1, 2, {"sequence_parallel": True}),
        (1, 2, 2, {}),
        (1, 1, 4, {"recompute": "full"}),
        (1, 1, 2, {"virtual_pipeline": 2}),
        (1, 2, 1, {}),
    ],
)
@pytest.mark.parametrize("name", CASES_OF_A_PIPELINE)
def test_pipeline_equals_diffusers(
    name: str, tensor: int, context: int, pipeline: int, options: dict[str, Any]
) -> None:
    case = CASES_OF_A_PIPELINE[name]
    sizes = {"tensor": tensor, "context": context, "pipeline": pipeline}
    function = "tests.parallel.test_parity:measure_pipeline"
    ranks = run_on_ranks(tensor * context * pipeline, function, case=case, path=reference(case), **sizes, **options)
    assert len(ranks[0][1]) > 100 and all(output <= OUTPUT_TOLERANCE for output, _ in ranks)
    assert_parity(*ranks[0])


def test_four_interleaved_stages_equal_diffusers() -> None:
    case = Case(layers=9, grid=(1, 3, 5), qwen=(4, 2), byt5=(0, 1))
    sizes = {"tensor": 1, "context": 1, "pipeline": 4, "virtual_pipeline": 2}
    ranks = run_on_ranks(4, "tests.parallel.test_parity:measure_pipeline", case=case, path=reference(case), **sizes)
    assert all(output <= OUTPUT_TOLERANCE for output, _ in ranks)
    assert_parity(*ranks[0])


@pytest.mark.parametrize("backend", ["ulysses", "allgather"])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_changes_nothing_under_context_parallelism(recompute: str, backend: str) -> None:
    check("odd image-to-video, MeanFlow", 1, 2, context_backend=backend, recompute=recompute)


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["replicated", "sequence parallel"])
def test_recompute_changes_nothing(recompute: str, sequence_parallel: bool) -> None:
    check("odd image-to-video, MeanFlow", 2, sequence_parallel=sequence_parallel, recompute=recompute)


def fingerprint(case: Case, tensor: int) -> str:
    """Of everything that a forward and backward pass computes on this rank."""
    model = build(case, initialize(tensor=tensor), sequence_parallel=True)
    run = run_samples(model, case)
    digest = hashlib.sha256()
    for value in [*run.velocity, *(p.grad for p in model.parameters() if p.grad is not None)]:
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def test_two_runs_are_bit_identical() -> None:
    case = CASES["odd image-to-video, MeanFlow"]
    first, second = (run_on_ranks(2, "tests.parallel.test_parity:fingerprint", case=case, tensor=2) for _ in range(2))
    assert first == second
    assert first[0] != first[1]
