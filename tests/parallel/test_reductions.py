"""Sums over ranks: the loss's, and the replicated parameters' gradients as Megatron completes them."""

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

from megatron_sage.parallel.groups import initialize
from megatron_sage.parallel.reductions import sum_over_shards
from tests.model.parity import Case, build, run_samples
from tests.parallel.pool import run_on_ranks

CASE = Case(qwen=(5, 5), byt5=(2, 2))


def loss_of_a_sum() -> tuple[float, float, bool]:
    groups = initialize(tensor=torch.distributed.get_world_size())
    x = torch.tensor(float(groups.tp_rank + 1), requires_grad=True)
    square = x * x
    total = sum_over_shards(square, groups.tp)
    (total**2).backward()
    untouched = float(square.detach()) == (groups.tp_rank + 1) ** 2
    return float(total.detach()), float(x.grad), untouched


def test_the_gradient_of_a_sharded_sum_is_whole() -> None:
    ranks = run_on_ranks(3, "tests.parallel.test_reductions:loss_of_a_sum")
    total = 1 + 4 + 9
    for rank, (value, gradient, untouched) in enumerate(ranks):
        assert value == total
        assert gradient == 2 * total * 2 * (rank + 1)  # not times the number of ranks
        assert untouched


def compare_with_megatron(sequence_parallel: bool, tensor: int, context: int) -> list[str]:
    """Names of the parameters whose gradient is not bit-equal to what Megatron's DDP and finalize_model_grads give."""
    groups = initialize(tensor=tensor, context=context)
    ours, wrapped = (build(CASE, groups, sequence_parallel=sequence_parallel) for _ in range(2))
    run_samples(ours, CASE)
    groups.collection.embd = groups.collection.pos_embd = None
    wrapped.config.calculate_per_token_loss = True  # sums, as in training: no average over DP x CP
    ddp = DistributedDataParallel(
        wrapped.config, DistributedDataParallelConfig(), wrapped, pg_collection=groups.collection
    )
    run_samples_without_reduction(ddp.module)
    finalize_model_grads([ddp], pg_collection=groups.collection)
    different = []
    for (name, a), b in zip(ours.named_parameters(), wrapped.parameters(), strict=True):
        expected = torch.zeros_like(a) if a.grad is None else a.grad
        if a.requires_grad and not torch.equal(expected, b.main_grad):
            different.append(name)
    return different


def run_samples_without_reduction(model: torch.nn.Module) -> None:
    import tests.model.parity as parity

    reduce, parity.complete_gradients = parity.complete_gradients, lambda *args: None
    try:
        run_samples(model, CASE)
    finally:
        parity.complete_gradients = reduce


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["replicated", "sequence parallel"])
@pytest.mark.parametrize(("tensor", "context"), [(2, 1), (1, 2), (2, 2)])
def test_gradients_become_what_megatron_makes_of_them(tensor: int, context: int, sequence_parallel: bool) -> None:
    ranks = run_on_ranks(
        tensor * context,
        "tests.parallel.test_reductions:compare_with_megatron",
        sequence_parallel=sequence_parallel,
        tensor=tensor,
        context=context,
    )
    assert ranks == [[]] * (tensor * context)
