"""The policy as this rank runs it: one function from latents to velocity for rollout, reference and training.

Shapes: S this rank's video tokens, B samples of one prompt, C = 32 latent channels.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_sage.model.transformer import HunyuanVideoDiT, TextCondition
from megatron_sage.parallel.control import Control
from megatron_sage.parallel.sequence import TokenShard, pad_tokens


@dataclass(frozen=True)
class Prompt:
    """One prompt, conditional and unconditional, each of batch 1 and without padding; its image in image-to-video."""

    text: str
    conditional: TextCondition
    unconditional: TextCondition
    image_SC: torch.Tensor | None = None  # image-to-video: what `image_channels` says of this rank's video tokens


@dataclass(frozen=True)
class VideoShape:
    """The latent grid of one video and this rank's share of its tokens."""

    grid: tuple[int, int, int]  # latent frames, height, width
    channels: int
    shard: TokenShard

    @property
    def elements(self) -> int:
        """Latent elements of a whole video: the D of the log-probability's mean."""
        return self.shard.num_tokens * self.channels


def image_channels(first_frame: torch.Tensor, shape: VideoShape) -> torch.Tensor:
    """What an image says of this rank's video tokens, [S, C + 1]: its latents [C, h, w] and mask 1 in the first latent
    frame, zeros in all others (and at padding tokens).
    """
    frames, height, width = shape.grid
    whole = first_frame.new_zeros(frames, height, width, shape.channels + 1)
    whole[0, :, :, :-1] = first_frame.movedim(0, -1)
    whole[0, :, :, -1] = 1
    return shape.shard.shard(whole.flatten(0, 2))


def model_input(
    x_SBC: torch.Tensor, in_channels: int, dtype: torch.dtype, image_SC: torch.Tensor | None = None
) -> torch.Tensor:
    """Latents followed by the condition latents and mask, zero for text-to-video: [S, B, in_channels]."""
    batch = x_SBC.shape[1]
    if image_SC is None:
        condition = x_SBC.new_zeros((x_SBC.shape[0], batch, in_channels - x_SBC.shape[-1]))
    else:
        condition = image_SC[:, None].expand(-1, batch, -1).to(x_SBC.dtype)
    return torch.cat([x_SBC, condition], dim=-1).to(dtype)


class EmbeddedTexts:
    """The last few texts that a pass without gradients has embedded: a group's samples share theirs at every step.

    A pass has one set of weights; another pass, or another model, has another of these.
    """

    def __init__(self, size: int = 8) -> None:
        """Flights of a group follow each other, so a few texts suffice: one a group on its way, and the negative."""
        self.size = size
        self._kept: OrderedDict[tuple[int, float], tuple[TextCondition, torch.Tensor]] = OrderedDict()

    def get(self, text: TextCondition, sigma: float, embed: Callable[[], torch.Tensor]) -> torch.Tensor:
        """[L_local, 1, H] of this text at this noise level."""
        key = (id(text), sigma)
        if key not in self._kept:
            self._kept[key] = text, embed()  # the text itself too, so that its id is not given to another
            if len(self._kept) > self.size:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key][1]


class Network:
    """The chunks of this rank's stage, and how guidance turns their forwards into a velocity.

    The two branches of guidance are forwards of their own because their texts have different lengths: padding one of
    them would bring back the mask that this model does without.
    """

    control = Control()  # every forward of a phase asks it first; this one never stops

    def __init__(
        self, chunks: Sequence[HunyuanVideoDiT], shape: VideoShape, guidance: float, device: torch.device
    ) -> None:
        self.chunks, self.shape, self.guidance, self.device = chunks, shape, guidance, device  # guidance 1: one branch
        self.group: dist.ProcessGroup | None = chunks[0].pp_group if chunks else None
        self.num_chunks = len(chunks)
        self.starts = bool(chunks) and chunks[0].pre_process
        self.ends = bool(chunks) and chunks[-1].post_process

    @property
    def branches(self) -> int:
        """Forwards of one velocity: 1 without guidance."""
        return 1 if self.guidance == 1.0 else 2

    def text(self, prompt: Prompt, branch: int) -> TextCondition:
        """What the branch reads."""
        return prompt.unconditional if branch else prompt.conditional

    def guided(self, velocities: Sequence[torch.Tensor]) -> torch.Tensor:
        """v = v_uncond + guidance * (v_cond - v_uncond) in float32."""
        conditional, *rest = (v.float() for v in velocities)
        return conditional if not rest else rest[0] + self.guidance * (conditional - rest[0])

    def forward(
        self,
        chunk: int,
        x_SBC: torch.Tensor | None,
        sigma: float | Sequence[float],
        prompt: Prompt,
        branch: int,
        packed: torch.Tensor | None = None,
        model: torch.nn.Module | None = None,
        texts: "EmbeddedTexts | None" = None,
    ) -> torch.Tensor:
        """One branch through one chunk: its velocity on the last one, packed tokens on the others.

        `x_SBC` is read on the first chunk of the first stage, `packed` on all others. `model`: the chunk in its DDP
        wrapper, where gradients are wanted. `sigma`, one or each sample's own, becomes the timestep 1000 * sigma in
        float32: in bfloat16 it would be off by up to 2 of 1000. `texts`: the pass's, where no gradients are wanted.
        """
        network = self.chunks[chunk]
        video_SBC = None
        if network.pre_process:
            assert x_SBC is not None
            video_SBC = model_input(x_SBC, network.config.in_channels, network.config.params_dtype, prompt.image_SC)
        timestep_B, text, embedded_LBH = self._timesteps(sigma), self.text(prompt, branch), None
        if texts is not None and network.pre_process:
            assert isinstance(sigma, float)
            embedded_LBH = texts.get(text, sigma, lambda: network.embed(text, timestep_B))
        more = {"packed_SBH": packed, "embedded_LBH": embedded_LBH}
        return (model or network)(video_SBC, timestep_B, text, self.shape.grid, **more)

    def _timesteps(self, sigma: float | Sequence[float]) -> torch.Tensor:
        if isinstance(sigma, float):  # filled on the device: nothing is copied there, nobody waits
            return torch.full((1,), 1000.0 * sigma, dtype=torch.float32, device=self.device)
        return torch.tensor([1000.0 * s for s in sigma], dtype=torch.float32).to(self.device, non_blocking=True)

    def packed_tokens(self, prompt: Prompt, branch: int) -> int:
        """Tokens of this rank that cross a stage boundary for one branch."""
        return self.chunks[0].packed_tokens(self.text(prompt, branch), self.shape.grid)

    def packed_like(self, prompt: Prompt, branch: int, batch: int) -> torch.Tensor:
        """An empty tensor for what crosses it."""
        config = self.chunks[0].config
        size = (self.packed_tokens(prompt, branch), batch, config.hidden_size)
        return torch.empty(size, dtype=config.params_dtype, device=self.device)

    def all_packed_tokens(self, prompt: Prompt) -> int:
        """Of all branches: what one micro-batch of training sends."""
        return sum(self.packed_tokens(prompt, branch) for branch in range(self.branches))

    def train_forward(
        self,
        model: torch.nn.Module,
        chunk: int,
        x_SBC: torch.Tensor | None,
        sigma: float | Sequence[float],
        prompt: Prompt,
        batch: int,
        length: int,
        largest: int | None = None,
    ) -> torch.Tensor:
        """All branches of a micro-batch through one chunk, for Megatron's schedules, which hand on ONE tensor.

        The branches' packed tokens lie one after the other, filled up to `length`, and the samples up to `largest`,
        the schedule's fixed sizes: the longest text and the largest micro-batch of the update decide. The filling is
        cut off again before anything is computed.

        Returns:
            The guided velocity [S, B, C] float32 on the last chunk, else the packed tokens [length, largest, H].
        """
        network, outputs, start = self.chunks[chunk], [], 0
        for branch in range(self.branches):
            packed = None
            if not network.pre_process:
                assert network.input_tensor is not None
                size = self.packed_tokens(prompt, branch)
                packed, start = network.input_tensor[start : start + size, :batch], start + size
            outputs.append(self.forward(chunk, x_SBC, sigma, prompt, branch, packed, model))
        if network.post_process:
            return self.guided(outputs)
        packed = pad_tokens(torch.cat(outputs), length)
        return packed if largest in (None, batch) else F.pad(packed, (0, 0, 0, largest - batch))
