"""`verify` against diffusers' own autograd: alone, on tensor-parallel ranks, and once through torchrun."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sage import verify
from megatron_sage.checkpoint.distributed import load_hf_weights
from megatron_sage.errors import UserError
from tests.checkpoint.synthetic import Tensors, random_tensors, tiny_config, write_hf
from tests.parallel.pool import run_on_ranks

CONFIG = tiny_config(use_meanflow=True)
LINES = {"text-to-video": False, "image-to-video": True}


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root directory with the transformer below it."""
    tensors = random_tensors(CONFIG, torch.float32)
    tensors = {name: t + name.endswith("norm_q.weight") if t.ndim == 1 else 3 * t for name, t in tensors.items()}
    root = tmp_path_factory.mktemp("model")
    write_hf(root / "transformer", CONFIG, tensors, files=2)
    return root


def made_inputs(image_to_video: bool = False) -> Tensors:
    """Four samples, three text lengths, scattered masks of awkward types; with images, one sample's are all zero."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    image = normal(4, 3, 6) * image_to_video
    image[2] = 0.0
    return {
        "hidden_states": normal(4, 65, 2, 3, 5).bfloat16(),
        "timestep": torch.tensor([999.7, 0.3, 512.0, 77.7]),
        "timestep_r": torch.tensor([900.0, 0.0, 256.5, 33.3]),
        "encoder_hidden_states": normal(4, 5, 12),
        "encoder_attention_mask": torch.tensor(
            [[0, 1, 0, 1, 1], [1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [0, 0, 0, 0, 1]], dtype=torch.int32
        ),
        "encoder_hidden_states_2": normal(4, 4, 10).half(),
        "encoder_attention_mask_2": torch.tensor(
            [[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 0], [1, 1, 1, 1]], dtype=torch.bool
        ),
        "image_embeds": image,
        "grad_output": normal(4, 32, 2, 3, 5),
    }


def expected(hf: Path, inputs: Tensors) -> Tensors:
    """What diffusers computes, padded and masked, in fp32."""
    from diffusers import HunyuanVideo15Transformer3DModel

    model = HunyuanVideo15Transformer3DModel.from_pretrained(hf / "transformer")
    arguments = {name: t.long() if "mask" in name else t.float() for name, t in inputs.items()}
    gradient = arguments.pop("grad_output")
    video = arguments["hidden_states"].requires_grad_()
    (sample,) = model(**arguments, return_dict=False)
    sample.backward(gradient)
    found = {"sample": sample.detach(), "grad_input.hidden_states": video.grad}
    for name, parameter in model.named_parameters():
        found[f"grad.{name}"] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return found


def assert_close(found: Tensors, reference: Tensors) -> None:
    assert found.keys() == reference.keys()
    for name, theirs in reference.items():
        assert found[name].dtype is torch.float32 and found[name].shape == theirs.shape, name
        scale = reference[name.replace("to_k.bias", "to_q.bias")] if "refiner" in name else theirs
        tolerance = (1e-6 if name == "sample" else 1e-5) * float(scale.abs().max())
        assert float((found[name] - theirs).abs().max()) <= tolerance, name


def run(argv: list[Any]) -> int:
    return verify.main([str(item) for item in argv])


@pytest.mark.parametrize("name", LINES)
def test_given_inputs(one_rank: object, hf: Path, tmp_path: Path, name: str) -> None:
    inputs = made_inputs(LINES[name])
    save_file(inputs, tmp_path / "in")
    assert run([hf, "--inputs", tmp_path / "in", "--save", tmp_path / "out"]) == 0
    assert_close(load_file(tmp_path / "out"), expected(hf, inputs))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def verify_on_rank(argv: list[str]) -> int:
    return verify.main(argv)


@pytest.mark.parametrize(
    ("world", "name", "overrides"),
    [
        (2, "image-to-video", ["parallel.tensor=2", "parallel.sequence=true", "precision.recompute=full"]),
        (4, "text-to-video", ["parallel.tensor=4", "parallel.sequence=false", "precision.recompute=selective"]),
    ],
)
def test_given_inputs_on_ranks(hf: Path, tmp_path: Path, world: int, name: str, overrides: list[str]) -> None:
    inputs = made_inputs(LINES[name])
    save_file(inputs, tmp_path / "in")
    argv = [str(hf), *overrides, "--inputs", str(tmp_path / "in"), "--save", str(tmp_path / "out")]
    assert run_on_ranks(world, "tests.test_verify:verify_on_rank", timeout=400, argv=argv) == [0] * world
    assert_close(load_file(tmp_path / "out"), expected(hf, inputs))


def test_torchrun(hf: Path, tmp_path: Path) -> None:
    """The command as a user types it, in bf16 and with two data-parallel replicas' worth of nothing to share."""
    inputs = made_inputs()
    save_file(inputs, tmp_path / "in")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["parallel.tensor=2", "precision.dtype=bf16", "--inputs", tmp_path / "in", "--save", tmp_path / "out"]
    command = [*launcher, "-m", "megatron_sage", "verify", hf, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(item) for item in command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sample [4, 32, 2, 3, 5]") == 1  # rank 0 speaks for all
    found, reference = load_file(tmp_path / "out"), expected(hf, inputs)
    assert found.keys() == reference.keys()
    difference = (found["sample"] - reference["sample"]).abs().max() / reference["sample"].abs().max()
    assert 1e-4 < float(difference) < 3e-2  # bf16 weights and activations, fp32 timesteps


def test_without_gradient(one_rank: object, hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = made_inputs()
    whole = expected(hf, inputs)["sample"]
    del inputs["grad_output"]
    save_file(inputs, tmp_path / "in")
    assert run([hf / "transformer", "--inputs", tmp_path / "in", "--save", tmp_path / "out"]) == 0
    found = load_file(tmp_path / "out")
    assert list(found) == ["sample"]
    assert float((found["sample"] - whole).abs().max()) <= 1e-6 * float(whole.abs().max())
    assert "no grad_output" in capsys.readouterr().out


def test_random_inputs_agree(one_rank: object, hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([hf, "--grid", 1, 3, 3, "precision.recompute=selective"]) == 0
    out = capsys.readouterr().out
    for line in ("output", "block 0 video", "block 0 text", "block 1 video", "gradient of hidden_states", "passed"):
        assert line in out
    assert out.count("155 of 155") == 0 and out.count("141 of 141 parameter gradients agree") == 2


def test_a_wrong_weight_is_found(
    one_rank: object, hf: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_wrongly(model: list[Any], directory: Path) -> None:
        load_hf_weights(model, directory)
        with torch.no_grad():
            model[0].transformer_blocks["1"].ff.linear_fc1.bias[3] += 0.01

    monkeypatch.setattr(verify, "load_hf_weights", load_wrongly)
    assert run([hf, "--grid", 1, 2, 3]) == 1
    out = capsys.readouterr().out
    assert "FAILED" in out and "ours differs from diffusers" in out
    rows = {line.split("│")[1].strip(): line for line in out.splitlines() if line.startswith("│")}
    assert "ok" in rows["block 0 video"] and "FAILED" in rows["block 1 video"]


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"image_embeds": None}, "'image_embeds' is missing"),
    "MeanFlow's second time": ({"timestep_r": None}, "'timestep_r' is missing"),
    "unknown": ({"time_step": torch.zeros(4)}, "'time_step' is unknown"),
    "channels": ({"hidden_states": torch.zeros(4, 64, 2, 3, 5)}, "hidden_states has shape [4, 64, 2, 3, 5]"),
    "batch": ({"timestep": torch.zeros(3)}, "timestep has shape [3], expected [4]"),
    "mask length": ({"encoder_attention_mask": torch.ones(4, 6)}, "encoder_attention_mask has shape [4, 6]"),
    "gradient": ({"grad_output": torch.zeros(4, 32, 2, 3, 4)}, "grad_output has shape [4, 32, 2, 3, 4]"),
    "rank": ({"image_embeds": torch.zeros(4, 6)}, "image_embeds has shape [4, 6]"),
    "no text": (
        {"encoder_attention_mask": torch.eye(4, 5)[[0, 1, 2, 2]] * torch.tensor([1, 1, 0, 0])[:, None]},
        "sample 2",
    ),
    "NaN": ({"timestep": torch.full((4,), float("nan"))}, "timestep holds NaN"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_bad_inputs(one_rank: object, hf: Path, tmp_path: Path, name: str) -> None:
    changes, fragment = FAULTS[name]
    inputs = made_inputs() | changes
    save_file({key: value for key, value in inputs.items() if value is not None}, tmp_path / "in")
    refuse([hf, "--inputs", tmp_path / "in", "--save", tmp_path / "out"], str(tmp_path / "in"), fragment)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "fragments"),
    [
        (["parallel.tensor=2"], ["TP·CP·PP·DP = 2·1·1·1 = 2", "world size 1"]),
        (["parallel.tenser=1"], ["parallel.tenser"]),
        (["parallel.context=2"], ["TP·CP·PP·DP = 1·2·1·1 = 2", "world size 1"]),
        (["parallel.pipeline_layout=Et*3L"], ["parallel.pipeline_layout", "parallel.pipeline > 1"]),
        (["precision.dtype=fp16"], ["precision.dtype"]),
        (["--save", "x"], ["--save", "--inputs"]),
        (["--inputs", "/nowhere/x"], ["/nowhere/x"]),
        (["--inputs", "x", "--save", "/nowhere/y"], ["/nowhere/y"]),
        (["--grid", "1", "0", "3"], ["--grid"]),
        (["--what"], ["--what"]),
    ],
)
def test_bad_arguments(one_rank: object, hf: Path, argv: list[str], fragments: list[str]) -> None:
    refuse([hf, *argv], *fragments)


def refuse(argv: list[Any], *fragments: str) -> None:
    with pytest.raises(UserError) as caught:
        run(argv)
    assert "\n" not in str(caught.value)
    for fragment in fragments:
        assert fragment in str(caught.value)
