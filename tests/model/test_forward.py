"""Refusals of the forward pass, determinism, and what recompute keeps."""

from typing import Any

import pytest
import torch

from megatron_sage.errors import UserError
from megatron_sage.model import TextCondition
from megatron_sage.parallel.groups import Groups
from megatron_sage.parallel.kept import KeptBytes
from tests.model.parity import Case, build, random_inputs, run_samples, tokens

CASE = Case(grid=(2, 3, 4), qwen=(6, 6), byt5=(3, 3))


def condition(batch: int = 2, qwen: int = 6, byt5: int = 3, image: int = 0) -> TextCondition:
    return TextCondition(torch.randn(batch, qwen, 24), torch.randn(batch, byt5, 20), torch.randn(batch, image, 28))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"video_SBC": torch.randn(23, 2, 65)}, r"shape \(23, 2, 65\), expected \[24 tokens"),
        ({"video_SBC": torch.randn(24, 2, 33)}, "65 channels"),
        ({"timestep_B": torch.zeros(3)}, r"batch 2; .* have \[3, 2, 2, 2\]"),
        ({"text": condition(batch=3)}, r"have \[2, 3, 3, 3\]"),
        ({"timestep_B": torch.zeros(2, dtype=torch.bfloat16)}, "timestep: torch.bfloat16 .* pass float32"),
        ({"text": condition(qwen=0)}, "no valid token"),
        ({"timestep_r_B": torch.zeros(2)}, "timestep_r is given, the model's use_meanflow is False"),
    ],
)
def test_wrong_inputs_are_refused(one_rank: Groups, changes: dict[str, Any], message: str) -> None:
    model = build(Case(layers=1), one_rank)
    arguments = {
        "video_SBC": torch.randn(24, 2, 65),
        "timestep_B": torch.tensor([1.0, 2.0]),
        "text": condition(),
        "grid": (2, 3, 4),
        **changes,
    }
    with pytest.raises(UserError, match=message):
        model(**arguments)


def test_two_runs_are_bit_identical(one_rank: Groups) -> None:
    first, second = build(CASE, one_rank), build(CASE, one_rank)
    runs = [run_samples(model, CASE) for model in (first, second)]
    assert all(torch.equal(a, b) for a, b in zip(runs[0].velocity, runs[1].velocity, strict=True))
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad), name


def saved_bytes(groups: Groups, layers: int, **options: Any) -> int:
    """Bytes that the forward pass keeps alive for the backward pass, weights excluded."""
    case = Case(layers=layers)
    model = build(case, groups, **options)
    inputs = random_inputs(case)
    with KeptBytes(model.parameters()) as kept:
        model(tokens(inputs["hidden_states"]), inputs["timestep"], condition(), case.grid)
    return kept.total


def test_recompute_keeps_less_for_the_backward_pass(one_rank: Groups) -> None:
    """Per block, as the difference between models of 3 and of 2 blocks."""
    none, selective, full = (
        saved_bytes(one_rank, 3, recompute=mode) - saved_bytes(one_rank, 2, recompute=mode)
        for mode in ("none", "selective", "full")
    )
    print(none, selective, full)
    batch, hidden, image_tokens, text_tokens = 2, 64, 24, 9
    assert full == 4 * batch * hidden * (image_tokens + text_tokens)  # the two streams that enter a block
    assert selective < 0.6 * none


def test_core_attention_can_be_recomputed(one_rank: Groups) -> None:
    plain = build(CASE, one_rank)
    recomputed = build(CASE, one_rank, recompute="selective", recompute_modules=["core_attn"])
    runs = [run_samples(model, CASE) for model in (plain, recomputed)]
    assert torch.equal(runs[0].velocity[0], runs[1].velocity[0])
    torch.testing.assert_close(
        plain.transformer_blocks["0"].attn.img_qkv.weight.grad,
        recomputed.transformer_blocks["0"].attn.img_qkv.weight.grad,
    )


def test_padded_conditions_lose_their_padding() -> None:
    states, mask = torch.randn(2, 4, 24), torch.tensor([[1, 0, 1, 0], [0, 1, 1, 0]])
    glyphs, no_glyph = torch.randn(2, 3, 20), torch.zeros(2, 3, dtype=torch.long)
    text = TextCondition.from_padded(states, mask, glyphs, no_glyph, torch.zeros(2, 5, 28))
    assert torch.equal(text.qwen_BLD, torch.stack([states[0, [0, 2]], states[1, [1, 2]]]))
    assert (text.byt5_BLD.shape, text.image_BLD.shape) == ((2, 0, 20), (2, 0, 28))
    assert (text.batch, text.num_tokens) == (2, 2)
    image = torch.zeros(2, 5, 28)
    image[1, 4, 3] = 1.0  # one nonzero anywhere in the batch makes all of it image-to-video, as in diffusers
    assert TextCondition.from_padded(states, mask, glyphs, no_glyph, image).num_tokens == 7


def test_ragged_conditions_are_refused() -> None:
    mask = torch.tensor([[1, 1], [1, 0]])
    with pytest.raises(UserError, match=r"encoder_attention_mask_2: .* \[2, 1\] valid tokens"):
        TextCondition.from_padded(
            torch.randn(2, 2, 24), torch.ones(2, 2), torch.randn(2, 2, 20), mask, torch.zeros(2, 5, 28)
        )


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_what_samples_share_is_embedded_once_for_all(one_rank: Groups, recompute: str) -> None:
    """Fewer texts or timesteps are the same as equal ones for each sample: velocities and all gradients."""
    torch.manual_seed(3)
    one = condition(batch=1, image=2)
    many = TextCondition(*(x.expand(4, -1, -1).contiguous() for x in (one.qwen_BLD, one.byt5_BLD, one.image_BLD)))
    video, gradient = torch.randn(24, 4, 65), torch.randn(24, 4, 32)
    equal, own = torch.full((4,), 611.0), torch.tensor([611.0, 20.0, 900.0, 3.0])
    pairs = torch.tensor([611.0, 20.0])
    of_pairs = pairs.repeat_interleave(2)
    for given, shared in [
        ((equal, many), (equal[:1], one)),
        ((own, many), (own, one)),
        ((equal, many), (equal, one)),
        ((of_pairs, many), (pairs, one)),
        ((of_pairs, many), (pairs, many)),
    ]:
        found = []
        for timestep, text in (given, shared):
            model = build(CASE, one_rank, recompute=recompute)
            velocity = model(video, timestep, text, (2, 3, 4))
            velocity.backward(gradient)
            found.append([velocity.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        for theirs, mine in zip(*found, strict=True):  # a bias of keys has no gradient but rounding
            torch.testing.assert_close(mine, theirs, rtol=0, atol=3e-6 * max(1.0, float(theirs.abs().max())))
