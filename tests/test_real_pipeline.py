"""From a HunyuanVideo-1.5 directory to a trained one that diffusers runs: the real classes, small and random."""

import csv
import importlib
import json
import os
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from megatron_sage.errors import UserError
from tests import hv15
from tests.parallel.pool import run_on_ranks

TEXTS = ['a cat walks past a sign that says "open"', "rain on a lake", "a paper boat, “Ariel”, in the rain"]
FRAMES, HEIGHT, WIDTH, STEPS = 9, 48, 80, 3
SHAPE = (32, 3, 3, 5)
JOB = "tests.test_real_pipeline:command"


def command(name: str, argv: list[str], processes: int = 1) -> int:
    """One command of the command line, on this rank."""
    from megatron_sage.__main__ import COMMANDS, _train

    main = importlib.import_module(COMMANDS[name][0]).main if COMMANDS[name][0] else _train
    os.environ["WORLD_SIZE"] = str(processes)
    try:
        return main(argv)
    finally:
        del os.environ["WORLD_SIZE"]


def run(name: str, *argv: Any, processes: int = 1) -> None:
    status = run_on_ranks(processes, JOB, name=name, argv=[str(a) for a in argv], processes=processes, timeout=240)
    assert status == [0] * processes


class Journey:
    """A random model, its prompts, and a run that has trained it."""

    def __init__(self, task: str, folder: Path) -> None:
        self.task, self.folder, self.base = task, folder, folder / "base"
        hv15.build_pipeline(task, seed=5, num_layers=3).save_pretrained(self.base)
        rng = np.random.default_rng(1)
        self.images = []
        with (folder / "prompts.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["index", "prompt", *(["image"] if task == "i2v" else [])])
            for number, text in enumerate(TEXTS):
                image = Image.fromarray(rng.integers(0, 256, (51, 70 + number, 3), dtype=np.uint8))
                image.save(folder / f"{number}.png")
                self.images.append(image)
                writer.writerow([number, text, *([f"{number}.png"] if task == "i2v" else [])])
        run("convert", "hf-to-megatron", self.base, folder / "megatron")

    def settings(self, output: str, **changes: Any) -> list[str]:
        values: dict[str, Any] = {
            "output_dir": self.folder / output,
            "model.pretrained": self.base,
            "model.weights": self.folder / "megatron",
            "precision.dtype": "fp32",
            "precision.threads": 1,
            "video.frames": FRAMES,
            "video.height": HEIGHT,
            "video.width": WIDTH,
            "sampler.num_steps": STEPS,
            "sampler.guidance_scale": 2.0,
            "sampler.micro_batch": 2,
            "grpo.group_size": 2,
            "grpo.clip_range": 1e-3,
            "reward.function": "tests.training.world:BrightnessReward",
            "optimizer.lr": 1e-3,
            "data.prompts": self.folder / "prompts.csv",
            "data.embedding_cache": self.folder / "cache",
            "training.iterations": 2,
        }
        return [f"{key}={value}" for key, value in (values | changes).items()]

    def theirs(self, directory: Path, noise: torch.Tensor) -> tuple[torch.Tensor, np.ndarray]:
        """Latents and frames that diffusers makes of every prompt; frames uint8 [videos, F, H, W, 3]."""
        cls = hv15.HunyuanVideo15Pipeline if self.task == "t2v" else hv15.HunyuanVideo15ImageToVideoPipeline
        pipeline = cls.from_pretrained(directory)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.guider = pipeline.guider.new(guidance_scale=2.0)
        pipeline.video_processor.calculate_default_height_width = lambda **_: (HEIGHT, WIDTH)
        latents, frames = [], []
        for number, text in enumerate(TEXTS):
            extra = {"image": self.images[number]} if self.task == "i2v" else {"height": HEIGHT, "width": WIDTH}
            common = {"num_frames": FRAMES, "num_inference_steps": STEPS, "latents": noise[number][None].clone()}
            found = pipeline(prompt=text, output_type="latent", **extra, **common).frames[0]
            latents.append(found)
            with torch.no_grad():
                pixels = pipeline.vae.decode(found[None] / pipeline.vae.config.scaling_factor).sample
            frames.append(pipeline.video_processor.postprocess_video(pixels, output_type="np")[0])
        return torch.stack(latents), np.stack(frames) * 255

    def ours(self, directory: Path, weights: Path, noise: torch.Tensor, processes: int = 1, **layout: Any) -> Path:
        """Where `sample` has written latents and videos of every prompt."""
        save_file({"latents": noise}, self.folder / "noise.safetensors")
        out = self.folder / f"samples_{directory.name}_{processes}"
        changes = {"model.pretrained": directory, "model.weights": weights} | layout
        options = ["--noise", self.folder / "noise.safetensors", "--latents", "--out", out]
        settings = [s for s in self.settings("unused", **changes) if not s.startswith("output_dir")]
        run("sample", *settings, "--prompts", self.folder / "prompts.csv", *options, processes=processes)
        return out


@pytest.fixture(scope="module", params=["t2v", "i2v"])
def journey(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Journey:
    trip = Journey(request.param, tmp_path_factory.mktemp(request.param))
    run("encode", *trip.settings("run"))
    run("train", *trip.settings("run"))
    return trip


def test_a_trained_model_is_exported_and_diffusers_samples_what_we_sample(journey: Journey) -> None:
    trained = journey.folder / "trained"
    run("export", journey.folder / "run", trained)
    rng = np.random.default_rng(2)
    noise = torch.from_numpy(rng.standard_normal((3, *SHAPE), dtype=np.float32))
    before, _ = journey.theirs(journey.base, noise)
    expected, frames = journey.theirs(trained, noise)
    assert float((expected - before).norm() / before.norm()) > 1e-4, "the run has changed nothing"
    out = journey.ours(trained, journey.folder / "run" / "checkpoints" / "iteration_000002", noise)
    for number in range(3):
        made = load_file(out / f"{number:04d}.safetensors")["latents"]
        assert float((made - expected[number]).norm() / expected[number].norm()) <= 1e-5
        with av.open(str(out / f"{number:04d}.mp4")) as container:
            video = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        assert video.shape == (FRAMES, HEIGHT, WIDTH, 3)
        # H.264 with shared colours is no judge of single pixels, but of a wrong picture
        assert np.abs(video.astype(float).mean() - frames[number].mean()) < 6
    index = json.loads((out / "index.json").read_text())
    assert [row["prompt"] for row in index] == TEXTS


@pytest.mark.nightly
def test_evaluate_scores_the_videos_that_diffusers_makes(journey: Journey) -> None:
    """Base and trained checkpoint, from the noise that every evaluation with this seed begins with."""
    from megatron_sage.parallel.noise import EVALUATION, INITIAL, gaussian
    from tests.training.world import BrightnessReward

    draws = [gaussian((3 * 3 * 5, 32), 0, EVALUATION, number, 0, INITIAL) for number in range(3)]
    noise = torch.stack([draw.T.reshape(SHAPE) for draw in draws])
    trained, out, config = journey.folder / "judged", journey.folder / "evaluation", journey.folder / "empty.yaml"
    run("export", journey.folder / "run", trained)
    config.write_text("{}\n")
    checkpoints = [f"run={journey.folder / 'run/checkpoints/iteration_000002'}", f"export={trained}"]
    given = [*("--prompts", journey.folder / "prompts.csv"), "--steps", STEPS, "--out", out]
    named = [text for checkpoint in checkpoints for text in ("--checkpoint", checkpoint)]
    run("evaluate", config, *journey.settings("unused"), *given, *named)
    found = {}
    for name in ("base", "run", "export"):
        lines = (out / "rows" / name / "rank_00000.jsonl").read_text().splitlines()
        found[name] = np.array([list(json.loads(line)["scores"].values()) for line in lines])
    for name, directory in (("base", journey.base), ("run", trained)):
        _, frames = journey.theirs(directory, noise)
        videos = list(np.floor(frames + 0.5).astype(np.uint8))
        expected = np.stack(list(BrightnessReward()(videos, TEXTS, 24.0).values()), axis=1)
        np.testing.assert_allclose(found[name], expected, atol=2e-5)
    np.testing.assert_array_equal(found["run"], found["export"])
    assert np.ptp(found["base"], axis=0).max() > 1e-3 and np.abs(found["run"] - found["base"]).max() > 1e-4


def test_no_encoder_is_needed_once_the_cache_is_full(journey: Journey, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [journey.base / name for name in ("text_encoder", "text_encoder_2", "image_encoder")]
    hidden = [path for folder in folders for path in folder.glob("*.safetensors")]
    for path in hidden:
        path.rename(path.with_suffix(".away"))
    try:
        run("train", *journey.settings("without", **{"training.iterations": 1}))
    finally:
        for path in hidden:
            path.with_suffix(".away").rename(path)
    rows = [
        [json.loads(line) for line in (journey.folder / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("run", "without")
    ]
    keys = [key for key in rows[0][0] if not key.startswith("seconds/")]
    assert {key: rows[0][0][key] for key in keys} == {key: rows[1][0][key] for key in keys}


def refused(*argv: Any) -> str:
    with pytest.raises(UserError) as error:
        run(*argv)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_cannot_be_exported_is_refused_in_one_line(journey: Journey) -> None:
    folder = journey.folder
    assert "--base DIR" in refused("export", folder / "megatron", folder / "x1")
    assert "model_index.json" in refused("export", folder / "run", folder / "x2", "--base", folder)
    assert "neither a run" in refused("export", folder / "cache", folder / "x3", "--base", journey.base)
    other = folder / "other"
    if not other.exists():
        hv15.build_pipeline(journey.task, seed=6, num_layers=2).save_pretrained(other)
    assert "num_layers is 2" in refused("export", folder / "run", folder / "x4", "--base", other)
    assert "not an empty directory" in refused("export", folder / "run", journey.base)
    assert not [path for path in folder.iterdir() if path.name.startswith(("x", "."))]


def test_text_and_image_models_want_their_own_prompts(journey: Journey) -> None:
    settings = journey.settings("refused")
    if journey.task == "t2v":
        found = refused("sample", *settings, "--prompt", "a", "--image", journey.folder / "0.png")
        assert "text-to-video: no prompt may have an image" in found
    else:
        assert "every prompt needs an image" in refused("sample", *settings, "--prompt", "a")


@pytest.mark.parametrize("journey", ["t2v"], indirect=True)
def test_adapters_are_merged_into_the_export(journey: Journey) -> None:
    """From the checkpoint and from the adapter file: both are the base plus alpha / rank * B A."""
    changes = {"lora.rank": 2, "lora.alpha": 3.0, "lora.targets": "[to_q, to_out.0, ff.net.2]"}
    run("train", *journey.settings("adapted", **changes))
    base = load_file(journey.base / "transformer" / "diffusion_pytorch_model.safetensors")
    adapters = load_file(journey.folder / "adapted/export/transformer_lora/pytorch_lora_weights.safetensors")
    for name, source, options in (
        ("merged1", "adapted", []),
        ("merged2", "adapted/export/transformer_lora", ["--link"]),
    ):
        target = journey.folder / name
        run("export", journey.folder / source, target, *options)
        assert (target / "vae").is_symlink() == bool(options)
        merged = load_file(target / "transformer" / "diffusion_pytorch_model.safetensors")
        assert merged.keys() == base.keys()
        for key, weight in merged.items():
            module = f"transformer.{key.removesuffix('.weight')}"
            expected = base[key]
            if f"{module}.lora_A.weight" in adapters:
                product = adapters[f"{module}.lora_B.weight"] @ adapters[f"{module}.lora_A.weight"]
                assert float(product.norm()) > 0
                expected = expected + 1.5 * product
            torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-7)
