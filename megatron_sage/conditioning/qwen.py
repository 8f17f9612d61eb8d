"""Qwen2.5-VL's language model and ByT5: what HunyuanVideo-1.5 reads of a prompt, as its diffusers pipeline does.

The language model sees the prompt in a chat template behind a fixed system message; its states two layers below the
top, without the template's first 108 tokens, are the first stream. ByT5 sees the quoted parts of the prompt only, which
are what the video shall show as writing; a prompt without quotes has no token in the second stream.
"""

import re
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from megatron_sage.conditioning.embedding import PromptEmbedding
from megatron_sage.conditioning.fingerprint import Fingerprinted, Record, Shapes
from megatron_sage.conditioning.loading import class_of, load_model, load_processor, read_json

VERSION = "HunyuanVideo-1.5 text 1"  # of everything below: a change that changes embeddings must change it
# The released template breaks these lines with a backslash inside the string: the indent is part of the message.
SYSTEM_MESSAGE = (" " * 9).join(
    (
        "You are a helpful assistant. Describe the video by detailing the following aspects:",
        "1. The main content and theme of the video.",
        "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects.",
        "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects.",
        "4. background environment, light, style and atmosphere.",
        "5. camera angles, movements, and transitions used in the video.",
    )
)
TEMPLATE_TOKENS = 108  # of the template before the prompt, with Qwen's tokenizer
PROMPT_TOKENS = 1000
GLYPH_TOKENS = 256
SKIPPED_LAYERS = 2
QUOTED = re.compile(r'"(.*?)"|“(.*?)”')

QWEN = ("Qwen2_5_VLTextModel", "Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLModel")


def glyph_text(prompt: str) -> str | None:
    """What ByT5 reads: `Text "a". Text "b". ` of the quoted parts, each once, in their order; None without any."""
    parts = dict.fromkeys(straight or curly for straight, curly in QUOTED.findall(prompt))
    return ". ".join(f'Text "{part}"' for part in parts) + ". " if parts else None


class HunyuanTextEncoder(Fingerprinted):
    """The text encoders of a diffusers directory; weights are loaded by the first `encode`.

    Args:
        pretrained: the pipeline's root, with text_encoder, text_encoder_2, tokenizer and tokenizer_2.
        dtype: of both models; None: as stored.
        record: the cache's list of encoders, which names weights that have been deleted.
    """

    label = "hunyuan-text"
    folders = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    weight_folders = ("text_encoder", "text_encoder_2")
    loaded = ("_qwen", "_byt5", "_tokenizer", "_tokenizer_2")

    def __init__(
        self, pretrained: Path, device: torch.device | str, dtype: torch.dtype | None, record: Record | None = None
    ) -> None:
        self.qwen_class = class_of(pretrained, "text_encoder", QWEN)
        super().__init__(pretrained, record, version=VERSION, model=self.qwen_class, dtype=str(dtype))
        self.device, self.dtype = device, dtype
        class_of(pretrained, "text_encoder_2", ("T5EncoderModel",))
        config = read_json(pretrained / "text_encoder" / "config.json")
        width = config.get("hidden_size") or config.get("text_config", {}).get("hidden_size")
        width_2 = read_json(pretrained / "text_encoder_2" / "config.json").get("d_model")
        self.shapes: Shapes = {
            "encoder_hidden_states": (None, width),
            "encoder_hidden_states_2": (None, width_2),
        }

    @torch.no_grad()
    def encode(self, text: str) -> PromptEmbedding:
        """The valid tokens of one prompt, in the encoders' dtype, on the CPU; an empty prompt is one space."""
        ids, mask = self._tokens(text)
        # Padded to the full length, though padding is dropped: a GEMM of another size rounds differently.
        states = self._qwen(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        states, mask = states[0, TEMPLATE_TOKENS:], mask[0, TEMPLATE_TOKENS:]
        states_2, mask_2 = self._glyphs(text)
        return PromptEmbedding(*(x.cpu() for x in (states, mask.bool(), states_2, mask_2.bool()))).valid()

    def _tokens(self, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask [1, 1108]."""
        conversation = [
            {"role": "system", "content": SYSTEM_MESSAGE},
            {"role": "user", "content": text or " "},
        ]
        found = self._tokenizer.apply_chat_template(
            [conversation],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            padding="max_length",
            max_length=PROMPT_TOKENS + TEMPLATE_TOKENS,
            truncation=True,
            return_tensors="pt",
        )
        return found["input_ids"].to(self.device), found["attention_mask"].to(self.device)

    def _glyphs(self, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        """States [L2, D2] and mask [L2]; L2 = 0 without quoted text."""
        quoted = glyph_text(text)
        if quoted is None:
            width = self._byt5.config.d_model
            return torch.zeros(0, width, dtype=self._byt5.dtype), torch.zeros(0)
        found = self._tokenizer_2(
            quoted, padding="max_length", max_length=GLYPH_TOKENS, truncation=True, return_tensors="pt"
        ).to(self.device)
        states = self._byt5(input_ids=found.input_ids, attention_mask=found.attention_mask.float())[0]
        return states[0], found.attention_mask[0]

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import Qwen2Tokenizer

        # The crop of the template's tokens needs padding on the right, whatever the saved tokenizer says.
        return load_processor(Qwen2Tokenizer, self.root / "tokenizer", padding_side="right")

    @cached_property
    def _tokenizer_2(self) -> Any:
        from transformers import ByT5Tokenizer

        return load_processor(ByT5Tokenizer, self.root / "tokenizer_2")

    @cached_property
    def _qwen(self) -> Any:
        """The language model up to the layer that is read: hidden_states[-3] is before the top norm."""
        import transformers

        model: Any = load_model(
            getattr(transformers, self.qwen_class), self.root / "text_encoder", self.device, self.dtype
        )
        if self.qwen_class == "Qwen2_5_VLForConditionalGeneration":
            model = model.model
        if self.qwen_class != "Qwen2_5_VLTextModel":
            model = model.language_model
        del model.layers[len(model.layers) - SKIPPED_LAYERS :]
        model.norm = torch.nn.Identity()
        return model

    @cached_property
    def _byt5(self) -> Any:
        from transformers import T5EncoderModel

        return load_model(T5EncoderModel, self.root / "text_encoder_2", self.device, self.dtype)
