"""Joint attention over split video tokens against attention in one process: outputs, all gradients, what is kept."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_sage.errors import UserError
from megatron_sage.model.config import HunyuanVideoConfig
from megatron_sage.parallel.context import (
    AllGatherAttention,
    Heads,
    UlyssesAttention,
    WholeAttention,
    choose_backend,
)
from megatron_sage.parallel.sequence import TokenShard
from tests.parallel.pool import run_on_ranks

CORES: dict[str, Any] = {"ulysses": UlyssesAttention, "allgather": AllGatherAttention}
NAMES = ("video q", "video k", "video v", "text q", "text k", "text v")


class EqualParts:
    """Transformer Engine's contract without Transformer Engine: equal parts of one sequence, attention over all."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        from megatron_sage.parallel.context import Heads, attend

        lengths = [None] * self.group.size()
        torch.distributed.all_gather_object(lengths, [x.shape[0] for x in (q, k, v)], group=self.group)
        assert len({length for lengths_of in lengths for length in lengths_of}) == 1, lengths
        assert q.shape[0] * self.group.size() % (2 * self.group.size()) == 0
        return attend(Heads(q, *(AllParts.apply(x, self.group) for x in (k, v))))


class AllParts(torch.autograd.Function):
    """The parts of all ranks; a part's gradient is the sum of what all ranks' queries want of it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        whole = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
        torch.distributed.all_gather_into_tensor(whole, x.contiguous(), group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        whole = grad_outputs[0].contiguous()
        part = whole.new_empty(whole.shape[0] // ctx.group.size(), *whole.shape[1:])
        torch.distributed.reduce_scatter_tensor(part, whole, group=ctx.group)
        return part, None


def draw(video: int, text: int, batch: int, heads: int, dim: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(q, k, v of the video and of the text, gradients of both outputs)."""
    generator = torch.Generator().manual_seed(video * 100 + text)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    inputs = [normal(tokens, batch, heads, dim) for tokens in (video, text) for _ in range(3)]
    return inputs, [normal(tokens, batch, heads * dim) for tokens in (video, text)]


def fused(leaves: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The projections of video and text, [tokens, B, N, 3, D]."""
    return torch.stack(leaves[:3], dim=-2), torch.stack(leaves[3:], dim=-2)


def plain_heads(last: bool) -> Any:
    """Projections to heads without norm and rotation; the last block's text asks nothing."""

    def make(video: torch.Tensor, text: torch.Tensor, whole: bool = False) -> Heads:
        q, k, v = torch.cat([video, text]).unbind(-2)
        return Heads(q[: video.shape[0]] if last else q, k, v)

    return make


class LargestTensor(TorchDispatchMode):
    """The most elements of any tensor that an operation gives out."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


def attention_on_rank(backend: str, sizes: tuple[int, ...], last: bool) -> dict[str, Any]:
    """This rank's outputs, gradients (the text's summed over the ranks), largest tensor."""
    from megatron_sage.model.te_attention import TransformerEngineAttention
    from megatron_sage.parallel.groups import initialize

    groups = initialize(context=torch.distributed.get_world_size())
    inputs, gradients = draw(*sizes)
    shard = TokenShard(sizes[0], groups.cp_size, groups.cp_rank)
    mine = slice(shard.start, shard.start + shard.valid)
    leaves = [x[mine].clone() for x in inputs[:3]] + [x.clone() for x in inputs[3:]]
    leaves = [x.requires_grad_() for x in leaves]
    if backend == "equal parts":
        core = TransformerEngineAttention(None, groups.collection, EqualParts(groups.cp))  # type: ignore[arg-type]
    else:
        core = CORES[backend](None, groups.collection)
    with LargestTensor() as largest:
        video, text = core(*fused(leaves), shard, plain_heads(last))
        loss = (video * gradients[0][mine]).sum()
        if text is not None:
            # every rank has the text's answer, and each brings its share of the gradient: partial, as in the model
            share = (groups.cp_rank + 1) / sum(range(1, groups.cp_size + 1))
            loss = loss + (text * gradients[1]).sum() * share
        loss.backward()
    for leaf in leaves[4:] if last else leaves[3:]:
        torch.distributed.all_reduce(leaf.grad, group=groups.cp)
    return {
        "video": video.detach(),
        "text": None if text is None else text.detach(),
        "gradients": [leaf.grad for leaf in leaves],
        "largest": largest.elements,
    }


#         video text batch heads dim
SIZES = [(29, 7, 1, 12, 8), (5, 1, 3, 12, 4), (96, 24, 2, 12, 16), (2, 6, 1, 12, 8), (41, 7, 1, 12, 4)]


@pytest.mark.parametrize("last", [False, True], ids=["both streams", "last block"])
@pytest.mark.parametrize(
    "ranks", [pytest.param(2, marks=pytest.mark.nightly), 3, pytest.param(4, marks=pytest.mark.nightly)]
)
@pytest.mark.parametrize("backend", ["ulysses", "allgather", "equal parts"])
def test_split_tokens_give_the_whole_attention(backend: str, ranks: int, last: bool) -> None:
    for sizes in SIZES:
        total = sizes[0] + sizes[1]
        if backend == "equal parts" and (total % (2 * ranks) or -(-sizes[0] // ranks) > total // ranks):
            continue  # refused: test_equal_parts_or_the_equation
        inputs, gradients = draw(*sizes)
        leaves = [x.requires_grad_() for x in inputs]
        whole = WholeAttention()
        video, text = whole(*fused(leaves), TokenShard(sizes[0], 1, 0), plain_heads(last))
        loss = (video * gradients[0]).sum() + (0.0 if text is None else (text * gradients[1]).sum())
        loss.backward()
        function = "tests.parallel.test_context:attention_on_rank"
        found = run_on_ranks(ranks, function, backend=backend, sizes=sizes, last=last)
        close = {"rtol": 1e-5, "atol": 3e-6}
        torch.testing.assert_close(torch.cat([rank["video"] for rank in found]), video.detach(), **close)
        for rank in found:
            assert (rank["text"] is None) == last
            if text is not None:
                torch.testing.assert_close(rank["text"], text.detach(), **close)
        for index, (leaf, name) in enumerate(zip(leaves, NAMES, strict=True)):
            parts = [rank["gradients"][index] for rank in found]
            if leaf.grad is None:
                assert parts == [None] * ranks, name
                continue
            got = torch.cat(parts) if index < 3 else parts[0]
            torch.testing.assert_close(got, leaf.grad, **close, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("backend", ["ulysses", "allgather", "equal parts"])
def test_no_tensor_of_all_pairs_of_tokens_exists(backend: str) -> None:
    sizes = (640, 40, 1, 4, 4)
    found = run_on_ranks(2, "tests.parallel.test_context:attention_on_rank", backend=backend, sizes=sizes, last=False)
    for rank in found:
        assert rank["largest"] < 640 * 640 / 4


@pytest.mark.parametrize(
    ("video", "text", "ranks", "said"),
    [
        (29, 8, 2, "29 video + 8 text tokens = 37 cannot be divided over 2·context = 4"),
        (31, 1, 4, None),
        (33, 7, 4, None),
        (36, 0, 2, None),
        (9, 3, 3, None),
    ],
)
def test_equal_parts_or_the_equation(video: int, text: int, ranks: int, said: str | None) -> None:
    from megatron_sage.model.te_attention import text_slices

    shard = TokenShard(video, ranks, 0)
    if said is not None:
        with pytest.raises(UserError, match="parallel.context_backend") as caught:
            text_slices(shard, text)
        assert said in str(caught.value) and "\n" not in str(caught.value)
        return
    slices = text_slices(shard, text)
    parts = {shard.valid_on(rank) + stop - start for rank, (start, stop) in enumerate(slices)}
    assert parts == {(video + text) // ranks}
    assert slices[0][0] == 0 and slices[-1][1] == text
    assert all(before[1] == after[0] for before, after in zip(slices, slices[1:], strict=False))


def test_a_rank_with_more_video_than_an_equal_part_is_refused() -> None:
    from megatron_sage.model.te_attention import text_slices

    with pytest.raises(UserError, match="rank 0 has 3 video tokens, an equal part of 8 is 2"):
        text_slices(TokenShard(8 + 1 - 1, 4, 0, multiple=3), 0)


def test_transformer_engine_is_asked_for_by_name_only_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="parallel.context_backend=te_p2p: needs .*; choose ulysses"):
        from megatron_sage.model.te_attention import te_core

        te_core(HunyuanVideoConfig.from_diffusers({}, context=2, context_backend="te_p2p"))


@given(st.integers(1, 64), st.integers(1, 16), st.integers(1, 16))
def test_the_chosen_backend_is_legal_and_says_why(local_heads: int, tensor: int, context: int) -> None:
    backend, reason = choose_backend(local_heads * tensor, tensor, context)
    assert backend in CORES and reason
    if context > 1:
        assert (backend == "ulysses") == (local_heads % context == 0)


def test_heads_that_do_not_divide_are_refused_with_the_numbers() -> None:
    with pytest.raises(UserError, match="16 heads / tensor 4 = 4 cannot be divided over context=3"):
        HunyuanVideoConfig.from_diffusers({}, tensor=4, context=3, context_backend="ulysses")
    assert HunyuanVideoConfig.from_diffusers({}, tensor=4, context=3).context_backend == "allgather"
