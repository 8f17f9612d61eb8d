"""HunyuanVideo-1.5 pipelines of random weights, saved in the released layout by diffusers and transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from transformers import (
    ByT5Tokenizer,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    Qwen2Tokenizer,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
)

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def write_pipeline(directory: Path, task: str = "t2v", seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """A whole pipeline, `task` t2v or i2v, as `save_pretrained` writes it."""
    build_pipeline(task, seed).to(dtype).save_pretrained(directory)
    return directory


def build_pipeline(task: str = "t2v", seed: int = 0, shift: float = 5.0, **transformer: Any) -> Any:
    """The pipeline in memory, float32; `transformer` changes the DiT's config (heads, layers, ...)."""
    torch.manual_seed(seed)
    parts: dict[str, Any] = {
        "text_encoder": text_encoder(),
        "tokenizer": tokenizer(),
        "transformer": dit(**transformer),
        "vae": vae(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=shift),
        "text_encoder_2": glyph_encoder(),
        "tokenizer_2": ByT5Tokenizer(),
        "guider": ClassifierFreeGuidance(guidance_scale=6.0),
    }
    if task == "t2v":
        return HunyuanVideo15Pipeline(**parts)
    return HunyuanVideo15ImageToVideoPipeline(
        image_encoder=image_encoder(),
        feature_extractor=SiglipImageProcessorPil(size={"height": 42, "width": 42}, resample=3),
        **parts,
    )


def randomize(model: torch.nn.Module, seed: int, scale: float = 1.0) -> None:
    """Weights from numpy, so that no zero or equal initial value hides an error; matrices keep the signal's size."""
    rng = np.random.default_rng(seed)
    for parameter in model.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
        values = rng.standard_normal(parameter.shape, dtype=np.float32) * np.float32(scale * fan_in**-0.5)
        parameter.data.copy_(
            torch.from_numpy(values) + (1.0 if parameter.ndim == 1 and bool((parameter == 1).all()) else 0.0)
        )


def dit(**changes: Any) -> HunyuanVideo15Transformer3DModel:
    """4 heads of 16, two blocks."""
    config = {
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "num_layers": 2,
        "num_refiner_layers": 2,
        "text_embed_dim": 24,
        "text_embed_2_dim": 20,
        "image_embed_dim": 18,
        "rope_axes_dim": (4, 6, 6),
        "target_size": 64,
    } | changes
    model = HunyuanVideo15Transformer3DModel(**config)
    randomize(model, 1, 0.5)
    return model.eval()


def vae() -> AutoencoderKLHunyuanVideo15:
    """The smallest that its class admits."""
    return AutoencoderKLHunyuanVideo15(block_out_channels=(8, 8, 16, 64, 64), layers_per_block=1).eval()


def tokenizer() -> Qwen2Tokenizer:
    """Qwen's class over single bytes, with a chat template of the released form."""
    from tokenizers.pre_tokenizers import ByteLevel

    vocabulary = {token: number for number, token in enumerate(sorted(ByteLevel.alphabet()))}
    built = Qwen2Tokenizer(
        vocab=vocabulary, merges=[], pad_token=SPECIAL[0], eos_token=SPECIAL[2], additional_special_tokens=SPECIAL[1:2]
    )
    built.chat_template = TEMPLATE
    built.padding_side = "right"
    return built


def text_encoder() -> Qwen2_5_VLTextModel:
    """Qwen2.5-VL's language model, four layers of width 24."""
    config = Qwen2_5_VLTextConfig(
        vocab_size=264,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 1], "rope_theta": 1e6},
    )
    return Qwen2_5_VLTextModel(config).eval()


def glyph_encoder() -> T5EncoderModel:
    """ByT5's class, two layers of width 20."""
    config = T5Config(
        vocab_size=384, d_model=20, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config).eval()


def image_encoder() -> SiglipVisionModel:
    """SigLIP's class: 9 tokens of width 18 from 42 x 42 pixels."""
    config = SiglipVisionConfig(
        hidden_size=18, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=42, patch_size=14
    )
    return SiglipVisionModel(config).eval()
