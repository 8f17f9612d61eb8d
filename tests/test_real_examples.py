"""examples/real: every file loads, keeps every rule, and says the memory that its README's formula gives."""

import json
import math
import re
from pathlib import Path

import pytest
from PIL import Image

from megatron_sage.config import Config, load_config, validate
from megatron_sage.errors import UserError

EXAMPLES = Path(__file__).parents[1] / "examples" / "real"
FILES = sorted(EXAMPLES.glob("*.yaml"))
NAME = re.compile(r"(t2v|i2v)_(480p|720p)_([ab])_(full|lora)_(\d+)gpu")
SIZES = {"480p": (480, 848), "720p": (720, 1280)}
SHIFTS = {("480p", "t2v"): 5, ("480p", "i2v"): 5, ("720p", "t2v"): 9, ("720p", "i2v"): 7}
MODEL = {"_class_name": "HunyuanVideo15Transformer3DModel", "num_attention_heads": 16, "num_layers": 54}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directories that the files name, with the released model's config.json."""
    root = tmp_path_factory.mktemp("place")
    for model in {load_config(path).model.pretrained for path in FILES}:
        for part, content in (("transformer", MODEL), ("vae", {}), ("text_encoder", {})):
            (root / model / part).mkdir(parents=True)
            (root / model / part / "config.json").write_text(json.dumps(content))
        if model.endswith("i2v"):
            (root / model / "image_encoder").mkdir()
        (root / f"{model}-megatron").mkdir()
    (root / "data").mkdir()
    Image.new("RGB", (8, 8)).save(root / "data" / "a.png")
    for name in ("t2v", "t2v_held_out"):
        (root / "data" / f"{name}.txt").write_text("a cat\n")
    for name in ("i2v", "i2v_held_out"):
        (root / "data" / f"{name}.csv").write_text("prompt,image\na cat,a.png\n")
    return root


@pytest.fixture(autouse=True)
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In that directory, with a reward model that needs no files."""
    from megatron_sage.rewards.videoalign import VideoAlign

    monkeypatch.chdir(place)
    monkeypatch.setattr(VideoAlign, "check_run", lambda *_, **__: None)


def memory(config: Config, task: str) -> float:
    """README's formula, in GB."""
    parallel, video = config.parallel, config.video
    tensor, context, pipeline = parallel.tensor, parallel.context, parallel.pipeline
    parameters = 8_157_072_384 / (tensor * pipeline) + 169_535_776
    tokens = (video.frames // 4 + 1) * (video.height // 16) * (video.width // 16) / (tensor * context)
    tokens += (1985 if task == "i2v" else 1256) / tensor
    assert parallel.data is not None
    state = 2.0 if config.lora.rank else 6 + 12 / (context * parallel.data)
    return (parameters * state + tokens * (2 * 54 * 4096 + 115_000)) / 1e9


def test_there_is_one_of_each_kind() -> None:
    kinds = [NAME.fullmatch(path.stem).groups() for path in FILES]  # type: ignore[union-attr]
    assert {kind[:2] for kind in kinds} == {(task, size) for task in ("t2v", "i2v") for size in SIZES}
    assert {kind[2:4] for kind in kinds} == {(letter, what) for letter in "ab" for what in ("full", "lora")}
    numbers = {int(kind[4]) for kind in kinds}
    assert min(numbers) == 8 and max(numbers) == 512


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_keeps_every_rule(path: Path) -> None:
    task, size, letter, what, gpus = NAME.fullmatch(path.stem).groups()  # type: ignore[union-attr]
    config = load_config(path)
    validate(config, int(gpus))
    assert config.name == path.stem
    assert (config.video.height, config.video.width) == SIZES[size]
    assert config.sampler.shift == SHIFTS[size, task] and config.sampler.guidance_scale == 6
    assert config.model.pretrained.endswith(f"{size}_{task}")
    assert config.reward.weights["VQ"] == (1.0 if letter == "a" else 0.5)
    assert (config.lora.rank is not None) == (what == "lora")
    said = re.search(r"kept activations: (\d+) GB a GPU", path.read_text())
    assert said is not None and math.isclose(int(said[1]), memory(config, task), abs_tol=0.51)
    with pytest.raises(UserError, match="world size"):
        validate(config, int(gpus) + 1)
