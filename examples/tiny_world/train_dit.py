"""Train the tiny world's DiT: diffusers' HunyuanVideo15Transformer3DModel by flow matching on the codec's latents.

Needs the codec of train_codec.py. The clips are encoded once into `latents.safetensors`; the held-out captions
(clips.held_out) are never seen. 10 % of the captions are dropped, for classifier-free guidance.
"""

import argparse
import json
import time
from pathlib import Path

import clips
import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideo15Transformer3DModel
from safetensors.torch import load_file, save_file

from megatron_sage.conditioning.patch_codec import PatchCodec
from megatron_sage.conditioning.words import WordEncoder

SHIFT = 3.0
CONFIG = {
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "num_layers": 4,
    "num_refiner_layers": 2,
    "rope_axes_dim": (8, 12, 12),
    "text_embed_dim": 64,
    "text_embed_2_dim": 32,
    "image_embed_dim": 32,
    "task_type": "t2v",
}


def encode_clips(root: Path, per_scene: int, seed: int) -> tuple[torch.Tensor, list[str]]:
    """Latents [n, 32, 21, 2, 3], scaled to unit std, and their captions; kept in `latents.safetensors`."""
    scenes = clips.all_scenes()
    unseen = set(clips.held_out(scenes))
    scenes = [scene for scene in scenes if scene not in unseen for _ in range(per_scene)]
    captions = [scene.caption for scene in scenes]
    file = root / "latents.safetensors"
    if file.exists():
        return load_file(file)["latents"], captions
    codec = PatchCodec.from_pretrained(root / "vae").float().eval()
    rng = np.random.default_rng(seed)
    latents = []
    for scene in scenes:
        video = torch.from_numpy(clips.render(scene, rng)).permute(3, 0, 1, 2)[None] * 2 - 1
        with torch.no_grad():
            latents.append(codec.encode(video).latent_dist.mode() * codec.config.scaling_factor)
    save_file({"latents": torch.cat(latents)}, file)
    return torch.cat(latents), captions


def text_inputs(encoder: WordEncoder, captions: list[str]) -> dict[str, torch.Tensor]:
    """diffusers' text arguments, padded to the longest caption of the batch."""
    embeddings = [encoder.encode(caption) for caption in captions]
    longest = max(e.encoder_hidden_states.shape[0] for e in embeddings)
    states = torch.zeros(len(captions), longest, encoder.dim)
    mask = torch.zeros(len(captions), longest)
    for row, embedding in enumerate(embeddings):
        length = embedding.encoder_hidden_states.shape[0]
        states[row, :length] = embedding.encoder_hidden_states
        mask[row, :length] = 1
    return {
        "encoder_hidden_states": states,
        "encoder_attention_mask": mask,
        "encoder_hidden_states_2": torch.zeros(len(captions), 1, encoder.dim_2),
        "encoder_attention_mask_2": torch.zeros(len(captions), 1),
        "image_embeds": torch.zeros(len(captions), 1, CONFIG["image_embed_dim"]),
    }


def fresh_model(seed: int) -> HunyuanVideo15Transformer3DModel:
    """A new DiT whose modulations and output start at zero (adaLN-Zero)."""
    torch.manual_seed(seed)
    model = HunyuanVideo15Transformer3DModel(**CONFIG)
    for name, parameter in model.named_parameters():
        if "norm1.linear" in name or "norm1_context.linear" in name or name.startswith("proj_out"):
            torch.nn.init.zeros_(parameter)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path("runs/tiny_world"))
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--per-scene", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    encoder = WordEncoder(dim=CONFIG["text_embed_dim"], dim_2=CONFIG["text_embed_2_dim"])
    latents, captions = encode_clips(args.root, args.per_scene, args.seed)
    model = fresh_model(args.seed)
    average = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01)
    generator = torch.Generator().manual_seed(args.seed)
    log = (args.root / "dit_log.jsonl").open("w")
    begin, step, mean = time.time(), 0, None
    while (done := (time.time() - begin) / (60 * args.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / 100) * max(0.02, min(1.0, 2 * (1 - done)))
        rows = torch.randint(len(captions), (args.batch,), generator=generator)
        dropped = torch.rand(args.batch, generator=generator) < 0.1
        x0 = latents[rows]
        u = torch.rand(args.batch, generator=generator)
        sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
        noise = torch.randn(x0.shape, generator=generator)
        s = sigma[:, None, None, None, None]
        noisy = (1 - s) * x0 + s * noise
        text = text_inputs(encoder, [" " if d else captions[r] for r, d in zip(rows, dropped, strict=True)])
        condition = torch.zeros(args.batch, 33, *x0.shape[2:])
        velocity = model(torch.cat([noisy, condition], 1), 1000 * sigma, **text, return_dict=False)[0]
        loss = (velocity - (noise - x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        keep = min(0.998, step / (step + 10))
        with torch.no_grad():
            for name, value in model.state_dict().items():
                average[name].lerp_(value, 1 - keep)
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        if step % 100 == 0:
            row = {"step": step, "minutes": round((time.time() - begin) / 60, 2), "loss": round(mean, 4)}
            log.write(json.dumps(row) + "\n")
            log.flush()
            print(row, flush=True)
        if step % 500 == 0:
            save(model, average, encoder, args.root)
    save(model, average, encoder, args.root)


def save(model: torch.nn.Module, average: dict[str, torch.Tensor], encoder: WordEncoder, root: Path) -> None:
    """The averaged weights, in float16, in the diffusers directory layout."""
    final = HunyuanVideo15Transformer3DModel(**CONFIG)
    final.load_state_dict(average)
    final.half().save_pretrained(root / "transformer")
    FlowMatchEulerDiscreteScheduler(shift=SHIFT).save_pretrained(root / "scheduler")
    encoder.save_pretrained(root / "text_encoder")


if __name__ == "__main__":
    main()
