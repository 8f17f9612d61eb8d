"""The quickstart's promise, in a directory of its own: convert, train under torchrun at TP = 2, improve, export."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "examples" / "quickstart" / "quickstart.yaml"


def quickstart(folder: Path, *overrides: str) -> Path:
    """Run the quickstart's two commands into `folder`; the run's directory."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    weights, out = folder / "weights", folder / "run"
    module = ["-m", "megatron_sage"]
    convert = [sys.executable, *module, "convert", "hf-to-megatron", "examples/tiny_world/model", str(weights)]
    subprocess.run(convert, check=True, cwd=ROOT, env=environment)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *module]
    places = [f"model.weights={weights}", f"output_dir={out}"]
    subprocess.run([*launch, "train", str(CONFIG), *places, *overrides], check=True, cwd=ROOT, env=environment)
    return out


def check_results(run: Path, iterations: int) -> dict[str, float]:
    """Every file that a run promises; the paired difference of the held-out reward."""
    from diffusers import HunyuanVideo15Transformer3DModel

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == list(range(iterations))
    assert max(row["ratio/initial_deviation"] for row in rows) <= 1e-6
    assert len(list((run / "samples" / "after").glob("*.mp4"))) == 8
    assert "http" not in (run / "report.html").read_text().replace("http://www.w3.org", "")
    assert (run / "checkpoints" / f"iteration_{iterations:06d}" / "metadata.json").is_file()
    HunyuanVideo15Transformer3DModel.from_pretrained(run / "export" / "transformer")
    return json.loads((run / "evaluation.json").read_text())["difference"]


def test_one_short_iteration(tmp_path: Path) -> None:
    short = ["training.iterations=1", "grpo.prompts_per_iteration=1", "grpo.group_size=2", "sampler.micro_batch=2"]
    run = quickstart(tmp_path, *short, "evaluation.samples_per_prompt=1", "evaluation.num_steps=1")
    check_results(run, 1)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_held_out_reward_rises(tmp_path: Path) -> None:
    difference = check_results(quickstart(tmp_path), 18)
    assert difference["mean"] > 3 * difference["stderr"] > 0
