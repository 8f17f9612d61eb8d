"""The text side's input."""

from dataclasses import dataclass

import torch

from megatron_sage.errors import UserError


@dataclass(frozen=True)
class TextCondition:
    """Embeddings of a micro-batch, padding tokens already dropped: all samples have the same three lengths.

    A length may be 0 for `byt5_BLD` (no glyph text) and `image_BLD` (text-to-video), not for `qwen_BLD`.
    """

    qwen_BLD: torch.Tensor
    byt5_BLD: torch.Tensor
    image_BLD: torch.Tensor

    @property
    def batch(self) -> int:
        """Samples."""
        return self.qwen_BLD.shape[0]

    @property
    def num_tokens(self) -> int:
        """Tokens of one sample, all three kinds together."""
        return self.qwen_BLD.shape[1] + self.byt5_BLD.shape[1] + self.image_BLD.shape[1]

    @classmethod
    def from_padded(
        cls,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor,
        encoder_hidden_states_2: torch.Tensor,
        encoder_attention_mask_2: torch.Tensor,
        image_embeds: torch.Tensor,
    ) -> "TextCondition":
        """Drop the padding of diffusers' forward arguments.

        All-zero `image_embeds` mean text-to-video, as in diffusers, where the decision is taken over the whole batch.

        Raises:
            UserError: the samples' valid lengths differ: run them as separate micro-batches.
        """
        text_to_video = not bool(image_embeds.any())
        return cls(
            qwen_BLD=_valid(encoder_hidden_states, encoder_attention_mask, "encoder_attention_mask"),
            byt5_BLD=_valid(encoder_hidden_states_2, encoder_attention_mask_2, "encoder_attention_mask_2"),
            image_BLD=image_embeds[:, :0] if text_to_video else image_embeds,
        )


def _valid(x_BLD: torch.Tensor, mask_BL: torch.Tensor, name: str) -> torch.Tensor:
    mask = mask_BL.bool()
    lengths = mask.sum(dim=1).tolist()
    if len(set(lengths)) > 1:
        raise UserError(
            f"{name}: samples of one micro-batch have {lengths} valid tokens: run different lengths one after the other"
        )
    return x_BLD[mask].view(x_BLD.shape[0], -1, x_BLD.shape[2])
