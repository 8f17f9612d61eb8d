"""Named runs: every one resolves, is what its name says, and passes all rules once its files are there."""

import json
from pathlib import Path

import pytest

from megatron_sage.__main__ import main
from megatron_sage.config import Config, validate
from megatron_sage.errors import UserError
from megatron_sage.recipes import BASES, TABLE, VARIANTS, differences, names, recipe

SDE = {"dance": "dance_grpo", "flow": "flow_grpo", "cps": "cps", "sage": "sage_grpo"}
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that looks like HunyuanVideo-1.5's."""
    root = tmp_path_factory.mktemp("model")
    content = {"_class_name": "HunyuanVideo15Transformer3DModel", "num_attention_heads": 16, "num_layers": 54}
    for part, config in (("transformer", content), ("vae", {}), ("text_encoder", {})):
        (root / part).mkdir()
        (root / part / "config.json").write_text(json.dumps(config))
    (root / "prompts.txt").write_text("a cat\n")
    for file in ("VideoReward/model_config.json", "VideoReward/checkpoint-1/model.pth", "qwen/tokenizer.json"):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text("{}")
    (root / "qwen" / "config.json").write_text('{"model_type": "qwen2_vl"}')
    return root


def with_files(config: Config, model: Path) -> Config:
    config.model.pretrained = config.model.weights = str(model)
    config.data.prompts = config.evaluation.prompts = str(model / "prompts.txt")
    if config.reward.settings:  # VideoAlign's directories
        config.reward.settings = {"checkpoint": str(model / "VideoReward"), "base": str(model / "qwen")}
    return config


@pytest.mark.parametrize("name", names())
def test_every_recipe_keeps_every_rule(name: str, model: Path) -> None:
    config = with_files(recipe(name), model)
    assert config.name == name
    for world in (8, 64, 128) if name.startswith("hv15") else (1, 2):
        validate(config, world)


def test_the_table_is_the_papers() -> None:
    """19 rows in its order: the model itself, then A and B with four samplers, each without and with a fixed KL."""
    assert len(TABLE) == 19 and TABLE[0] == "base" and TABLE[-1] == "b_sage_dual"
    for variant in TABLE[1:]:
        letter, sampler, kl = variant.split("_")
        config = recipe(f"hv15_480p_{variant}")
        assert config.sampler.sde_type == SDE[sampler] and config.kl.strategy == kl
        weights = config.reward.weights
        assert weights == ({"VQ": 0.5, "MQ": 0.5, "TA": 1.0} if letter == "b" else {"VQ": 1.0, "MQ": 1.0, "TA": 1.0})
    base = recipe("hv15_480p_base")
    assert base.training.iterations == 0 and base.evaluation.prompts is not None


def test_the_defaults_are_the_papers() -> None:
    config = recipe("hv15_480p_b_sage_dual")
    sampler, grpo, kl = config.sampler, config.grpo, config.kl
    assert (config.video.frames, config.video.height, config.video.width) == (81, 480, 848)
    assert (sampler.num_steps, sampler.shift, sampler.eta, sampler.guidance_scale) == (20, 5.0, 0.5, 6.0)
    assert (grpo.group_size, grpo.clip_range, grpo.cfg_in_training, grpo.equalizer) == (4, 1e-4, "on", True)
    assert (kl.position, kl.position_weight, kl.velocity_weight, kl.anchor_interval) == ("moving", 1.0, 0.1, 10)
    assert (kl.lambda_min, kl.lambda_max, kl.schedule, kl.feedback) == (1e-7, None, "two_stage", "relax")
    assert (config.optimizer.lr, config.optimizer.weight_decay, config.evaluation.num_steps) == (1e-5, 0.01, 40)


def test_the_ablations_change_one_thing() -> None:
    for base in BASES:
        for sampler in SDE:
            on, off = recipe(f"{base}_b_{sampler}_none"), recipe(f"{base}_b_{sampler}_none_no_equalizer")
            assert differences(off, on) == {"grpo.equalizer": False}
        dual = recipe(f"{base}_b_sage_dual")
        for variant, changes in {
            "b_sage_none": {"kl.strategy": "none"},
            "b_sage_fixed": {"kl.strategy": "fixed"},
            "b_sage_step": {"kl.strategy": "step"},
            "b_sage_moving": {"kl.strategy": "moving"},
            "b_sage_dual_fixed": {"kl.position": "fixed"},
            "b_sage_dual_lambda_fixed": {"kl.schedule": "fixed"},
            "b_sage_dual_lambda_tighten": {"kl.feedback": "tighten"},
        }.items():
            assert differences(recipe(f"{base}_{variant}"), dual) == changes
    from megatron_sage.config.schema import lambda_max

    for base in BASES:
        tops = [lambda_max(recipe(f"{base}_b_sage_dual{end}").kl) for end in ("", "_lambda_milder")]
        assert tops[1] == pytest.approx(tops[0] / 10)


def test_unknown_names_have_a_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="did you mean tiny_b_sage_dual"):
        recipe("tiny_b_sage_dul")
    assert main(["train", "--recipe", "hv15_480p_c_sage_none"]) == 2
    assert main(["recipes", "shwo"]) == 2
    assert capsys.readouterr().err.count("error: ") == 2


def test_the_list_names_all_with_their_difference(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "list"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    assert set(lines) == set(names()) and len(names()) == len(BASES) * len(VARIANTS)
    assert "sampler.sde_type=cps" in lines["hv15_480p_b_cps_none"] and "kl.strategy=none" in lines["tiny_a_sage_none"]


def test_a_recipe_then_a_file_then_overrides(
    capsys: pytest.CaptureFixture[str], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import yaml

    for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    file = model / "mine.yaml"
    paths = {
        "model": {"pretrained": str(model), "weights": str(model)},
        "data": {"prompts": str(model / "prompts.txt")},
    }
    file.write_text(yaml.safe_dump(paths | {"evaluation": {"prompts": None}, "kl": {"gain": 0.5, "window": 7}}))
    command = ["train", "--recipe", "tiny_b_cps_fixed", str(file), "kl.window=3", "--print-config"]
    assert main(command) == 0
    found = yaml.safe_load(capsys.readouterr().out)
    assert found["kl"]["strategy"] == "fixed" and found["kl"]["gain"] == 0.5 and found["kl"]["window"] == 3
    assert found["name"] == "tiny_b_cps_fixed" and found["output_dir"] == "runs/tiny_b_cps_fixed"
    assert main(["recipes", "show", "tiny_b_cps_fixed"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["video"]["height"] == 32
