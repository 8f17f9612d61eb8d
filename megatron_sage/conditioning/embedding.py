"""What the transformer is told of one prompt: two streams of token embeddings with their masks."""

from dataclasses import dataclass

import torch

from megatron_sage.errors import UserError


@dataclass(frozen=True)
class PromptEmbedding:
    """One prompt under the names of diffusers' forward arguments, without their batch axis.

    L tokens of D features come from the language model (Qwen2.5-VL in real runs), L2 of D2 from the glyph encoder
    (ByT5), which reads quoted text only: L2 may be 0. A mask is non-zero at valid tokens, wherever they stand.
    """

    encoder_hidden_states: torch.Tensor  # [L, D]
    encoder_attention_mask: torch.Tensor  # [L]
    encoder_hidden_states_2: torch.Tensor  # [L2, D2]
    encoder_attention_mask_2: torch.Tensor  # [L2]

    def __post_init__(self) -> None:
        streams = (
            ("encoder_hidden_states", self.encoder_hidden_states, self.encoder_attention_mask),
            ("encoder_hidden_states_2", self.encoder_hidden_states_2, self.encoder_attention_mask_2),
        )
        for name, states, mask in streams:
            if states.ndim != 2 or mask.shape != states.shape[:1]:
                raise UserError(
                    f"{name} {list(states.shape)} with mask {list(mask.shape)}: "
                    "expected [tokens, features] and [tokens] of one prompt, without a batch axis"
                )
        if not bool((self.encoder_attention_mask != 0).any()):
            raise UserError("encoder_attention_mask: no valid token; even an empty prompt must keep one")

    def valid(self) -> "PromptEmbedding":
        """The same prompt without its padding: padded and cropped storage give equal tensors."""
        keep, keep_2 = self.encoder_attention_mask != 0, self.encoder_attention_mask_2 != 0
        return PromptEmbedding(
            self.encoder_hidden_states[keep],
            self.encoder_attention_mask[keep],
            self.encoder_hidden_states_2[keep_2],
            self.encoder_attention_mask_2[keep_2],
        )


@dataclass(frozen=True)
class ImageEmbedding:
    """One reference image of image-to-video at one video size, without the batch axis.

    SigLIP's tokens for the transformer's text side, and the VAE's latents of the image, which stand in the condition
    channels of the first latent frame.
    """

    image_embeds: torch.Tensor  # [L3, D3]
    first_frame: torch.Tensor  # [C, h, w], float32, in the scale of the transformer's latents

    def __post_init__(self) -> None:
        if self.image_embeds.ndim != 2 or self.first_frame.ndim != 3:
            raise UserError(
                f"image_embeds {list(self.image_embeds.shape)}, first_frame {list(self.first_frame.shape)}: "
                "expected [tokens, features] and [channels, height, width] of one image, without a batch axis"
            )
