"""How recognisable the tiny model's samples are: attributes read by rule from videos of held-out captions.

The rule (`megatron_sage.rewards.shapes.read_attributes`) never saw the model; it reads clean clips right. The DiT runs
as diffusers' own class here. Prints one JSON object with the share read right, the chance level and mean scores.
"""

import argparse
import json
from pathlib import Path

import clips
import numpy as np
import torch
from diffusers import HunyuanVideo15Transformer3DModel
from train_dit import SHIFT, text_inputs

from megatron_sage.conditioning.codec import VideoCodec
from megatron_sage.conditioning.words import WordEncoder
from megatron_sage.grpo.schedule import shifted_sigmas
from megatron_sage.parallel import noise
from megatron_sage.reporting.video import write_mp4
from megatron_sage.rewards.shapes import ShapesReward, read_attributes

CHANCE = {"colour": 1 / 4, "form": 1 / 3, "direction": 1 / 4, "speed": 1 / 2}


@torch.no_grad()
def sample(
    model: HunyuanVideo15Transformer3DModel, encoder: WordEncoder, captions: list[str], steps: int, guidance: float
) -> torch.Tensor:
    """Euler steps of the ODE; latents [n, 32, 21, 2, 3]."""
    count = len(captions)
    x = torch.stack([noise.gaussian((32, 21, 2, 3), 0, noise.SAMPLE, number) for number in range(count)])
    condition = torch.zeros(count, 33, 21, 2, 3)
    sigmas = shifted_sigmas(steps, SHIFT).tolist()
    for now, following in zip(sigmas, sigmas[1:], strict=False):
        branches = []
        for texts in (captions, [" "] * count):
            inputs = torch.cat([x, condition], 1)
            time = torch.full((count,), 1000 * now)
            branches.append(model(inputs, time, **text_inputs(encoder, texts), return_dict=False)[0])
        x = x - (now - following) * (branches[1] + guidance * (branches[0] - branches[1]))
    return x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path("examples/tiny_world/model"))
    parser.add_argument("--samples", type=int, default=6, help="of each of the 16 held-out captions")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--videos", type=Path, help="write the clips there")
    args = parser.parse_args()
    model = HunyuanVideo15Transformer3DModel.from_pretrained(args.root / "transformer").float().eval()
    encoder = WordEncoder.from_pretrained(args.root / "text_encoder")
    codec = VideoCodec.from_pretrained(args.root / "vae")
    scenes = [scene for scene in clips.held_out(clips.all_scenes()) for _ in range(args.samples)]
    captions = [scene.caption for scene in scenes]
    latents = sample(model, encoder, captions, args.steps, args.guidance)
    videos = [codec.decode(latent) for latent in latents]
    right = dict.fromkeys(CHANCE, 0)
    for scene, video in zip(scenes, videos, strict=True):
        read = read_attributes(video, fps=clips.FPS)
        for name in right:
            right[name] += getattr(read, name) == getattr(scene, name)
    scores = ShapesReward()(videos, captions, clips.FPS)
    if args.videos:
        for number, video in enumerate(videos):
            write_mp4(args.videos / f"{number:03d}.mp4", video, clips.FPS, scale=6)
    result = {
        "videos": len(videos),
        "read_right": {name: round(count / len(videos), 3) for name, count in right.items()},
        "chance": {name: round(value, 3) for name, value in CHANCE.items()},
        "scores": {name: round(float(np.mean(values)), 3) for name, values in scores.items()},
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
