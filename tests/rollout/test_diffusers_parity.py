"""Latents of our denoising loop against diffusers' pipelines: same weights, noise, texts and image, at any layout."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.parallel.pool import run_on_ranks

PROMPTS = ['a cat walks past a sign that says "open" and another, “closed”', "rain"]
FRAMES, HEIGHT, WIDTH, STEPS = 9, 48, 80, 4  # 3 x 3 x 5 = 45 video tokens: divisible by no layout here
SHAPE = (32, 3, 3, 5)
MODEL = {"num_attention_heads": 4, "num_layers": 3}  # three blocks divide over no two stages


def theirs(task: str, folder: Path, guidance: float) -> dict[str, torch.Tensor]:
    """What diffusers' pipeline makes of both prompts, with all that goes into its denoising loop."""
    from PIL import Image

    from tests import hv15

    pipeline = hv15.build_pipeline(task, seed=3, **MODEL)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.guider = pipeline.guider.new(guidance_scale=guidance)
    pipeline.save_pretrained(folder / task)
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))
    pipeline.video_processor.calculate_default_height_width = lambda **_: (HEIGHT, WIDTH)
    found: dict[str, torch.Tensor] = {"noise": torch.from_numpy(rng.standard_normal((2, *SHAPE), dtype=np.float32))}
    for number, prompt in enumerate([*PROMPTS, ""]):
        names = ("qwen", "qwen_mask", "byt5", "byt5_mask")
        embedded = pipeline.encode_prompt(prompt, device="cpu", dtype=torch.float32)
        found |= {f"{number}.{name}": x.detach().contiguous() for name, x in zip(names, embedded, strict=True)}
    if task == "i2v":
        found["image"] = pipeline.encode_image(image, 1, "cpu", torch.float32).detach()
        args = (pipeline.vae, pipeline.video_processor, image, HEIGHT, WIDTH, torch.device("cpu"))
        found["first_frame"] = pipeline._get_image_latents(*args)[0, :, 0].detach().contiguous()
    made = []
    for number, prompt in enumerate(PROMPTS):
        size = {"image": image} if task == "i2v" else {"height": HEIGHT, "width": WIDTH}
        noise = found["noise"][number][None].clone()
        common = {"num_frames": FRAMES, "num_inference_steps": STEPS, "latents": noise, "output_type": "latent"}
        made.append(pipeline(prompt=prompt, **size, **common).frames[0])
    return found | {"latents": torch.stack(made)}


def ours(arguments: list[str], processes: int, inputs: str) -> np.ndarray:
    """Latents [2, C, T, h, w] of both prompts on this rank."""
    from megatron_sage.config import load_config, validate
    from megatron_sage.engine import build_engine, initialize_groups, step_table
    from megatron_sage.model.conditions import TextCondition
    from megatron_sage.parallel import noise
    from megatron_sage.rollout.policy import Prompt, image_channels
    from megatron_sage.rollout.sampler import Flight, sample_latents
    from megatron_sage.rollout.scoring import whole_latents

    config = load_config(None, arguments)
    validate(config, processes, training=False)
    given = load_file(inputs)
    engine = build_engine(config, initialize_groups(config))
    no_image = torch.zeros(1, 0, engine.model_config.image_embed_dim)
    conditions = [
        TextCondition.from_padded(
            *(given[f"{number}.{name}"] for name in ("qwen", "qwen_mask", "byt5", "byt5_mask")),
            given.get("image", no_image),
        )
        for number in range(3)
    ]
    image_SC = image_channels(given["first_frame"], engine.shape) if "image" in given else None
    prompts = [Prompt(text, conditions[i], conditions[2], image_SC) for i, text in enumerate(PROMPTS)]

    def noise_of(flight: Any, step: int) -> torch.Tensor:
        assert step == noise.INITIAL
        return engine.shape.shard.shard(given["noise"][flight.group].flatten(1).T[:, None]).contiguous()

    engine.eval()
    flights = [Flight(number, [0], prompt) for number, prompt in enumerate(prompts)]
    table, _ = step_table("ode", config.sampler.num_steps, config.sampler.shift, 0.0)
    found = sample_latents(engine.network(), table, flights, seed=0, stream=noise.SAMPLE, noise_of=noise_of)
    return torch.cat([whole_latents(x_SBC, engine.shape, engine.token_group) for x_SBC in found]).numpy()


@pytest.fixture(scope="module", params=["t2v", "i2v"])
def judge(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of a saved pipeline with its inputs, and what diffusers made of them."""
    folder = tmp_path_factory.mktemp("hv15")
    found = theirs(request.param, folder, guidance=6.0)
    save_file({name: x.contiguous() for name, x in found.items()}, folder / "inputs.safetensors")
    (folder / request.param).rename(folder / "hf")
    run_on_ranks(1, "tests.rollout.test_diffusers_parity:convert", folder=folder)
    return folder, found


def convert(folder: Path) -> None:
    from megatron_sage.checkpoint.convert import hf_to_megatron

    hf_to_megatron(folder / "hf", folder / "megatron")


@pytest.mark.parametrize(
    ("tensor", "context", "pipeline"),
    [
        (1, 1, 1),
        (2, 1, 1),
        (1, 2, 1),
        (1, 1, 2),
        pytest.param(2, 2, 1, marks=pytest.mark.nightly),
        pytest.param(1, 2, 2, marks=pytest.mark.nightly),
        pytest.param(2, 1, 2, marks=pytest.mark.nightly),
        pytest.param(1, 1, 3, marks=pytest.mark.nightly),
        pytest.param(2, 2, 2, marks=pytest.mark.nightly),
    ],
)
def test_same_latents_as_diffusers(
    judge: tuple[Path, dict[str, Any]], tensor: int, context: int, pipeline: int
) -> None:
    folder, found = judge
    processes = tensor * context * pipeline
    settings = {
        "model.pretrained": folder / "hf",
        "model.weights": folder / "megatron",
        "precision.dtype": "fp32",
        "video.frames": FRAMES,
        "video.height": HEIGHT,
        "video.width": WIDTH,
        "sampler.num_steps": STEPS,
        "sampler.guidance_scale": 6.0,
        "parallel.tensor": tensor,
        "parallel.context": context,
        "parallel.pipeline": pipeline,
    }
    made = run_on_ranks(
        processes,
        "tests.rollout.test_diffusers_parity:ours",
        arguments=[f"{key}={value}" for key, value in settings.items()],
        processes=processes,
        inputs=str(folder / "inputs.safetensors"),
    )
    expected = found["latents"].numpy()
    assert float(np.abs(expected - found["noise"].numpy()).max()) > 0.1  # something was denoised
    for rank in made:
        assert np.linalg.norm(rank - expected) <= 1e-5 * np.linalg.norm(expected)
        assert np.abs(rank - expected).max() <= 1e-5 * np.abs(expected).max()
