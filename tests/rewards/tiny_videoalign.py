"""A small VideoAlign with random weights in the released layout, and the original's arithmetic written down plainly.

The reference here shares no code with `megatron_sage.rewards`: Hugging Face's classes, PEFT's unmerged forward, one
video at a time, Qwen2-VL's chat template, torchvision's rounding of resized uint8 images.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
REWARDS = ["<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>"]
CHAT = (  # chat_template.json of Qwen2-VL-2B-Instruct
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}"
    "<|im_end|>\n{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in "
    "content or 'image_url' in content %}{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}"
    "Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == "
    "'video' or 'video' in content %}{% set video_count.value = video_count.value + 1 %}{% if add_vision_id %}Video "
    "{{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}"
    "{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "<|im_start|>assistant\n{% endif %}"
)
INFERENCE = {
    "VQ_mean": 3.6757, "VQ_std": 2.2476, "MQ_mean": 1.1646, "MQ_std": 1.3811, "TA_mean": 2.8105, "TA_std": 2.5121,
}  # fmt: skip


def tokenizer(directory: Path, corpus: list[str]) -> Any:
    """A Qwen2 tokenizer with a few hundred merges, saved to `directory`; its special tokens stand last."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False))
    model = json.loads(raw.to_str())["model"]
    found = Qwen2Tokenizer(
        vocab=model["vocab"], merges=[tuple(m) for m in model["merges"]], additional_special_tokens=SPECIAL
    )
    found.save_pretrained(directory)
    return found


def base(directory: Path, corpus: list[str], hidden: int = 64, layers: int = 2) -> Any:
    """config.json in the flat layout of the released Qwen2-VL-2B-Instruct, and a tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    words = tokenizer(directory, corpus)
    ids = {t: words.convert_tokens_to_ids(t) for t in SPECIAL}
    config = {
        "architectures": ["Qwen2VLForConditionalGeneration"], "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"], "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"], "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"], "hidden_act": "silu", "hidden_size": hidden, "initializer_range": 0.02,
        "intermediate_size": 96, "max_position_embeddings": 32768, "max_window_layers": 28, "model_type": "qwen2_vl",
        "num_attention_heads": 4, "num_hidden_layers": layers, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2", "use_cache": True, "use_sliding_window": False,
        "vision_config": {
            "depth": 2, "embed_dim": 32, "mlp_ratio": 4, "num_heads": 2, "in_chans": 3, "hidden_size": hidden,
            "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": [hidden // 32, 3 * hidden // 64, 3 * hidden // 64]},
        "vocab_size": len(words) + 276,  # padded, as the released one is; cut when the reward tokens are added
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    return words


def model_config(base_name: str, output_dim: int, rank: int, alpha: int) -> dict[str, Any]:
    """model_config.json with the sections and names of VideoAlign's training program."""
    return {
        "data_config": {
            "meta_data": "x.csv", "data_dir": "/x", "max_frame_pixels": 200704, "num_frames": None, "fps": 2.0,
            "eval_dim": ["VQ", "MQ", "TA"], "prompt_template_type": "detailed_special", "sample_type": "uniform",
        },
        "training_args": {"output_dir": "rm_output"},
        "model_config": {
            "model_name_or_path": base_name, "output_dim": output_dim, "use_special_tokens": True,
            "reward_token": "special", "torch_dtype": "bfloat16",
        },
        "peft_lora_config": {
            "lora_enable": True, "vision_lora": False, "lora_r": rank, "lora_alpha": alpha, "lora_dropout": 0.05,
            "lora_namespan_exclude": ["lm_head", "rm_head", "embed_tokens", "visual"], "use_rslora": False,
            "num_lora_modules": -1,
        },
        "inference_config": INFERENCE,
    }  # fmt: skip


def released(directory: Path, output_dim: int = 1, rank: int = 4, alpha: int = 8, seed: int = 0, **sizes: int) -> Any:
    """Writes DIR/model_config.json, DIR/checkpoint-7/model.pth and DIR/qwen/; returns (PEFT model, tokenizer)."""
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    from megatron_sage.rewards.videoalign_prompt import question  # a corpus to learn merges from, nothing more

    words = base(directory / "qwen", [question("a cat runs over the grass")], **sizes)
    config = Qwen2VLConfig.from_pretrained(directory / "qwen")
    words.add_special_tokens({"additional_special_tokens": REWARDS})
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(config).float()  # config.json says bf16
    model.rm_head = torch.nn.Linear(config.text_config.hidden_size, output_dim, bias=False)
    model.resize_token_embeddings(len(words))
    kinds = (torch.nn.Linear, torch.nn.Embedding)
    excluded = ("lm_head", "rm_head", "embed_tokens", "visual")
    targets = [n for n, m in model.named_modules() if isinstance(m, kinds) and not any(e in n for e in excluded)]
    lora = LoraConfig(target_modules=targets, r=rank, lora_alpha=alpha, lora_dropout=0.05, task_type="CAUSAL_LM")
    peft = get_peft_model(model, lora).eval()
    for name, weight in peft.named_parameters():  # PEFT starts with B = 0, norms with 1: nothing would be tested
        if weight.dim() < 2 or "lora_B" in name or "rm_head" in name:
            weight.data.add_(torch.randn_like(weight) * 0.2)
    place = directory / "checkpoint-7"
    place.mkdir(parents=True)
    torch.save({old(key): value for key, value in peft.state_dict().items()}, place / "model.pth")
    content = model_config(str(directory / "qwen"), output_dim, rank, alpha)
    (directory / "model_config.json").write_text(json.dumps(content, indent=4))
    return peft, words


def old(key: str) -> str:
    """A key of a PEFT model under transformers 5 as transformers 4.45 called it."""
    key = key.replace("base_model.model.model.visual.", "base_model.model.visual.")
    return key.replace("base_model.model.model.language_model.", "base_model.model.model.")


def size_of(height: int, width: int, most: int = 200704) -> tuple[int, int]:
    h, w = max(28, round(height / 28) * 28), max(28, round(width / 28) * 28)
    if h * w > most:
        shrink = math.sqrt(height * width / most)
        return math.floor(height / shrink / 28) * 28, math.floor(width / shrink / 28) * 28
    if h * w < 100352:
        grow = math.sqrt(100352 / (height * width))
        return math.ceil(height * grow / 28) * 28, math.ceil(width * grow / 28) * 28
    return h, w


@torch.no_grad()
def original(peft: Any, words: Any, video: np.ndarray, prompt: str, fps: float, mrope: bool = False) -> np.ndarray:
    """VQ, MQ, TA [3] of one clip, normalised, the way of KwaiVGI/VideoAlign's inference.py."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from megatron_sage.rewards.videoalign_prompt import question

    total = len(video)
    number = round(min(max(total / fps * 2.0, 4), min(768, total) // 2 * 2) / 2) * 2
    frames = torch.from_numpy(video)[torch.linspace(0, total - 1, number).round().long()].permute(0, 3, 1, 2)
    size = size_of(*frames.shape[-2:])
    large = torch.nn.functional.interpolate(frames.float(), size, mode="bicubic", antialias=True)
    large = large.clamp(0, 255).round().byte().permute(0, 2, 3, 1).numpy()
    processor = Qwen2VLImageProcessorPil(do_resize=False)
    rows = [
        processor(images=[image], return_tensors="pt")["pixel_values"].reshape(-1, 3, 2, 14, 14)[:, :, 0]
        for image in large
    ]
    pairs = [torch.stack(rows[i : i + 2], dim=2).flatten(1) for i in range(0, number, 2)]
    grid = torch.tensor([[number // 2, size[0] // 14, size[1] // 14]])
    content = [{"type": "video", "video": "x.mp4"}, {"type": "text", "text": question(prompt)}]
    text = words.apply_chat_template(
        [{"role": "user", "content": content}], chat_template=CHAT, tokenize=False, add_generation_prompt=True
    )
    text = text.replace("<|video_pad|>", "<|video_pad|>" * (int(grid.prod()) // 4))
    ids = torch.tensor([words(text)["input_ids"]])
    where = {"position_ids": torch.arange(ids.shape[1]).view(1, 1, -1).expand(3, 1, -1)}
    if mrope:
        where = {"mm_token_type_ids": (ids == words.convert_tokens_to_ids("<|video_pad|>")).int() * 2}
    inner = peft.base_model.model
    video_inputs = {"pixel_values_videos": torch.cat(pairs), "video_grid_thw": grid}
    hidden = inner.model(input_ids=ids, attention_mask=torch.ones_like(ids), **video_inputs, **where)[0]
    logits = inner.rm_head(hidden)
    at = torch.isin(ids, torch.tensor(words.convert_tokens_to_ids(REWARDS)))
    scores = logits[at].view(3, -1)
    raw = scores.diagonal() if scores.shape[1] == 3 else scores[:, 0]
    names = ("VQ", "MQ", "TA")
    return np.array(
        [(float(x) - INFERENCE[f"{n}_mean"]) / INFERENCE[f"{n}_std"] for x, n in zip(raw, names, strict=True)]
    )
