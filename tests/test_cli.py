"""The command line, mostly inside this process: a new one costs seconds of imports."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_sage.__main__ import COMMANDS, main


@pytest.fixture(autouse=True)
def not_under_torchrun(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def model(tmp_path: Path) -> list[str]:
    """Overrides that name a made-up model and a prompt file."""
    for part, content in (
        ("transformer", {"_class_name": "HunyuanVideo15Transformer3DModel", "num_attention_heads": 2}),
        ("vae", {}),
    ):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(content))
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "prompts.txt").write_text("a blue square moves up\n")
    return [f"model.pretrained={tmp_path}", f"model.weights={tmp_path}", f"data.prompts={tmp_path / 'prompts.txt'}"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["trian"], "did you mean train?"),
        (["train", "sampler.num_step=3"], "did you mean sampler.num_steps?"),
        (["train", "no_such.yaml"], "no_such.yaml: no such configuration file"),
        (["train", "a.yaml", "b.yaml"], "one configuration file at most"),
        (["train", "--dry"], "unrecognized arguments: --dry"),
        (["train"], "model.pretrained=: must name a model directory"),
        ([], "COMMAND"),
    ],
)
def test_bad_input_is_one_line_and_status_2(capsys, argv, said):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and said in err


def test_print_config_checks_and_prints(capsys, model):
    assert main(["train", "sampler.num_steps=3", "--print-config", *model]) == 0
    assert "num_steps: 3" in capsys.readouterr().out
    assert main(["train", "--print-config", *model, "video.frames=82"]) == 2
    assert "try 81 or 85" in capsys.readouterr().err


def test_world_size_comes_from_torchrun(capsys, monkeypatch, model):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", "--print-config", *model, "parallel.tensor=2"]) == 0
    assert main(["train", "--print-config", *model]) == 2
    assert "grpo.prompts_per_iteration=1: must be a multiple of the data-parallel size 2" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert main(["train", "--print-config", *model]) == 2
    assert "WORLD_SIZE=two" in capsys.readouterr().err


def test_one_process_of_a_machine_speaks(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)  # other tests of this process may have
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    assert main(["train", "seed=-1"]) == 2
    assert capsys.readouterr().err == ""
    assert waited and waited[0] >= 1, "torchrun would end the speaking process before its line"
    monkeypatch.setenv("RANK", "8")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert main(["train", "seed=-1"]) == 2
    assert capsys.readouterr().err.startswith("error (rank 8): seed=-1")


def test_other_faults_keep_their_traceback(monkeypatch):
    def broken(*_: object) -> None:
        raise RuntimeError("a fault of the program")

    monkeypatch.setattr("megatron_sage.config.load_config", broken)
    with pytest.raises(RuntimeError, match="a fault of the program"):
        main(["train"])


def test_help_is_fast_and_imports_nothing_heavy():
    code = (
        "import sys, megatron_sage.__main__ as m\ntry: m.main(['--help'])\nexcept SystemExit as e: assert not e.code\n"
    )
    code += "assert not {'torch', 'megatron', 'diffusers'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert all(f"  {name}" in done.stdout for name in COMMANDS)


def test_module_and_status_of_a_new_process(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "megatron_sage", "train", "grpo.group_size=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, cwd=tmp_path, env=environment)
    assert done.returncode == 2
    assert done.stderr == "error: grpo.group_size=1: must be >= 2; an advantage compares samples of one prompt\n"


def test_every_command_has_its_program():
    """A renamed module must fail here, not in a user's shell."""
    package = Path(__file__).parents[1] / "megatron_sage"
    for name, (module, _) in COMMANDS.items():
        path = package.parent / (module or "megatron_sage.training.run").replace(".", "/")
        source = path.with_suffix(".py").read_text()
        assert f"def {'main' if module else 'train'}(" in source, name
