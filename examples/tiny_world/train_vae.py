"""Train the tiny world's VAE: diffusers' AutoencoderKLHunyuanVideo15 at its smallest useful width.

Pieces of 17 frames first, whole clips of 81 frames at the end (the mid-block attention looks back over
all frames). The form covers a few per cent of a frame, so its pixels weigh five times more.
"""

import argparse
import json
import time
from pathlib import Path

import clips
import numpy as np
import torch
from diffusers import AutoencoderKLHunyuanVideo15


def piece(rng: np.random.Generator, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A random piece [1, 3, frames, H, W] in [-1, 1] and the weight of every pixel."""
    scenes = clips.all_scenes()
    start = int(rng.integers(0, clips.FRAMES - frames + 1))
    video = clips.render(scenes[rng.integers(len(scenes))], rng, frames, start)
    x = torch.from_numpy(video).permute(3, 0, 1, 2)[None] * 2 - 1
    coloured = (x.amax(1, keepdim=True) - x.amin(1, keepdim=True)) > 0.3
    return x, 1.0 + 4.0 * coloured


def latent_scale(vae: AutoencoderKLHunyuanVideo15, rng: np.random.Generator, count: int = 32) -> float:
    """1 / std of the latents, the VAE's `scaling_factor`."""
    with torch.no_grad():
        latents = [vae.encode(piece(rng, clips.FRAMES)[0]).latent_dist.mode() for _ in range(count)]
    return float(1.0 / torch.cat(latents).std())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/tiny_world"))
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    vae = AutoencoderKLHunyuanVideo15(block_out_channels=(8, 8, 16, 64, 64), layers_per_block=1)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0)
    args.out.mkdir(parents=True, exist_ok=True)
    log = (args.out / "vae_log.jsonl").open("w")
    begin, step, mean = time.time(), 0, None
    while (done := (time.time() - begin) / (60 * args.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / 50) * max(0.02, 0.5 * (1 + np.cos(np.pi * done)))
        x, weight = piece(rng, 17 if done < 0.7 or step % 4 else clips.FRAMES)
        posterior = vae.encode(x).latent_dist
        error = (vae.decode(posterior.sample()).sample - x).abs()
        loss = (error * weight).mean() + 1e-5 * posterior.kl().sum() / posterior.mean.numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        mean = error.mean().item() if mean is None else 0.98 * mean + 0.02 * error.mean().item()
        step += 1
        if step % 50 == 0:
            row = {"step": step, "minutes": round((time.time() - begin) / 60, 2), "l1": round(mean, 4)}
            log.write(json.dumps(row) + "\n")
            log.flush()
            print(row, flush=True)
        if step % 400 == 0:
            vae.save_pretrained(args.out / "vae")
    vae.eval()
    vae.register_to_config(scaling_factor=round(latent_scale(vae, rng), 5))
    vae.save_pretrained(args.out / "vae")
    print("scaling_factor", vae.config.scaling_factor)


if __name__ == "__main__":
    main()
