"""Train the tiny world's video codec, a PatchCodec, on freshly drawn clips: a few minutes on two cores."""

import argparse
import json
import time
from pathlib import Path

import clips
import numpy as np
import torch

from megatron_sage.conditioning.patch_codec import PatchCodec


def batch(rng: np.random.Generator, count: int, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random pieces [count, 3, frames, H, W] in [-1, 1] and the weight of every pixel: a form covers few of them."""
    scenes = clips.all_scenes()
    starts = rng.integers(0, clips.FRAMES - frames + 1, count)
    videos = [clips.render(scenes[rng.integers(len(scenes))], rng, frames, int(start)) for start in starts]
    x = torch.from_numpy(np.stack(videos)).permute(0, 4, 1, 2, 3) * 2 - 1
    coloured = (x.amax(1, keepdim=True) - x.amin(1, keepdim=True)) > 0.1
    return x, 1.0 + 3.0 * coloured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path("runs/tiny_world"))
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--noise", type=float, default=0.05)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--frames", type=int, default=5, help="of each piece; short ones differ more from each other")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--resume", action="store_true", help="start from the codec in ROOT/vae")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    codec = PatchCodec.from_pretrained(args.root / "vae").float().train() if args.resume else PatchCodec()
    optimizer = torch.optim.AdamW(codec.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-4)
    args.root.mkdir(parents=True, exist_ok=True)
    log = (args.root / "codec_log.jsonl").open("w")
    begin, mean = time.time(), None
    for step in range(1, args.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, step / 50) * max(0.01, 0.5 * (1 + np.cos(np.pi * step / args.steps)))
        x, weight = batch(rng, args.batch, args.frames)
        z = codec.encode(x).latent_dist.mode()
        # noise on the latents: the decoder must forgive the errors of the generator that will write them
        error = (codec.decode(z + args.noise * torch.randn_like(z)).sample - x).abs()
        loss = ((error + 2 * error.square()) * weight).mean() + 1e-2 * (z.square().mean() - 1).square()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
        optimizer.step()
        mean = error.mean().item() if mean is None else 0.98 * mean + 0.02 * error.mean().item()
        if step % 100 == 0:
            row = {"step": step, "minutes": round((time.time() - begin) / 60, 2), "l1": round(mean, 4)}
            log.write(json.dumps(row) + "\n")
            log.flush()
            print(row, flush=True)
    with torch.no_grad():
        latents = codec.encode(batch(rng, 32, clips.FRAMES)[0]).latent_dist.mode()
    codec.register_to_config(scaling_factor=round(float(1 / latents.std()), 5))
    codec.half().save_pretrained(args.root / "vae")
    print("scaling_factor", codec.config.scaling_factor)


if __name__ == "__main__":
    main()
