"""Configuration: what is read, what is refused, and that every refusal is one line with a cure."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sage.config import Config, data_parallel_size, dump, load_config, validate
from megatron_sage.config.loading import known_keys
from megatron_sage.config.schema import ALIASES, MoreReward
from megatron_sage.errors import UserError

LEAVES = [key for key in known_keys() if not any(other.startswith(key + ".") for other in known_keys())]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Overrides that name a model of eight heads and a prompt file, both made up."""
    for part in ("transformer", "vae"):
        (tmp_path / "model" / part).mkdir(parents=True)
    architecture = {"_class_name": "HunyuanVideo15Transformer3DModel", "num_attention_heads": 8, "num_layers": 12}
    (tmp_path / "model" / "transformer" / "config.json").write_text(json.dumps(architecture))
    (tmp_path / "model" / "vae" / "config.json").write_text("{}")
    for part in ("model/text_encoder", "weights"):
        (tmp_path / part).mkdir()
    (tmp_path / "prompts.txt").write_text("a red circle moves left\n")
    return [
        f"model.pretrained={tmp_path / 'model'}",
        f"model.weights={tmp_path / 'weights'}",
        f"data.prompts={tmp_path / 'prompts.txt'}",
    ]


def refusal(overrides: list[str], path: Path | None = None, world_size: int = 1) -> str:
    """The one line with which these settings are refused."""
    with pytest.raises(UserError) as caught:
        validate(load_config(path, overrides), world_size)
    line = str(caught.value)
    assert line and "\n" not in line
    return line


def test_defaults_with_files_are_valid(files):
    config = load_config(None, files)
    validate(config, 1)
    assert config.output_dir == "runs/run"
    assert config.reward.weights == {"VQ": 0.5, "MQ": 0.5, "TA": 1.0}


def test_file_then_overrides(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "name: tiny\n"
        "sampler:\n  num_steps: 12\n  eta: 1e-1\n"
        "kl:  # all commented out\n"
        "reward:\n  weights: {CLIP: 1}\n"
        "training:\n  save_interval: ${sampler.num_steps}\n"
    )
    config = load_config(path, ["sampler.num_steps=7", "optimizer.lr=1e-4", "training.resume=true"])
    assert (config.name, config.output_dir) == ("tiny", "runs/tiny")
    assert (config.sampler.num_steps, config.sampler.eta) == (7, 0.1)
    assert config.optimizer.lr == 1e-4 and config.training.resume == "yes"
    assert config.reward.weights == {"CLIP": 1.0}, "a file's weights replace the default's"
    assert config.training.save_interval == 7, "interpolation sees the overrides"
    assert config.kl == Config().kl


def test_override_of_a_mapping_adds_or_replaces():
    assert load_config(None, ["reward.weights.TA=2"]).reward.weights == {"VQ": 0.5, "MQ": 0.5, "TA": 2.0}
    assert load_config(None, ["reward.weights={TA: 2}"]).reward.weights == {"TA": 2.0}
    assert load_config(None, ["reward={weights: {TA: 3}}"]).reward.weights == {"TA": 3.0}


def test_megatron_names_are_aliases(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("parallel:\n  tensor_model_parallel_size: 2\n  sequence_parallel: false\n")
    config = load_config(path, ["parallel.data_parallel_size=3"])
    assert (config.parallel.tensor, config.parallel.sequence, config.parallel.data) == (2, False, 3)
    path.write_text("parallel:\n  tensor_model_parallel_size: 2\n  tensor: 4\n")
    assert "the same setting" in refusal([], path)
    assert set(ALIASES.values()) <= set(LEAVES)


def test_text_settings_take_numbers_from_the_command_line_as_text():
    assert load_config(None, ["name=2026"]).name == "2026"
    assert load_config(None, ["data.embedding_cache=null"]).data.embedding_cache is None


@settings(max_examples=40, deadline=None)
@given(
    name=st.text("abcXYZ019_-.", min_size=1, max_size=12),
    steps=st.integers(1, 10**6),
    lr=st.floats(0, 1e6, allow_nan=False),
    equalizer=st.booleans(),
    threads=st.none() | st.integers(1, 512),
    weights=st.dictionaries(st.text("ABCabc_", min_size=1, max_size=6), st.floats(-1e3, 1e3), max_size=4),
)
def test_dump_reads_back_to_the_same(tmp_path_factory, name, steps, lr, equalizer, threads, weights):
    config = Config(name=name, output_dir="out")
    config.sampler.num_steps, config.optimizer.lr = steps, lr
    config.grpo.equalizer, config.precision.threads, config.reward.weights = equalizer, threads, weights
    path = tmp_path_factory.mktemp("dump") / "config.yaml"
    path.write_text(dump(config))
    assert load_config(path) == config


@settings(max_examples=150, deadline=None)
@given(key=st.sampled_from(LEAVES), data=st.data())
def test_a_slip_of_the_finger_is_refused_with_the_key_that_was_meant(key, data):
    section, dot, name = key.rpartition(".")
    where = data.draw(st.integers(0, len(name) - 1))
    slip = data.draw(st.sampled_from(["drop", "double", "swap", "upper"]))
    mistyped = {
        "drop": name[:where] + name[where + 1 :],
        "double": name[:where] + name[where] + name[where:],
        "swap": name[:where] + name[where : where + 2][::-1] + name[where + 2 :],
        "upper": name[:where] + name[where].upper() + name[where + 1 :],
    }[slip]
    wrong = f"{section}{dot}{mistyped}"
    if wrong in [*known_keys(), *ALIASES] or not mistyped:
        return
    line = refusal([f"{wrong}=1"])
    assert line.startswith(f"{wrong} (command line): unknown key")
    meant = "optimizer.beta" if name.startswith("beta") else key  # beta may be beta1 or beta2
    assert f"did you mean {meant}" in line or len(name) < 4, line


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sampler.group_size=4", "did you mean grpo.group_size?"),
        ("learning_rate=1", "known here: name, output_dir"),
        ("training.steps=1", "known here: training.iterations, training.save_interval, training.async_save"),
        ("lr=1", "did you mean optimizer.lr?"),
        ("optimiser.lr=1", "did you mean optimizer"),
        ("grpo.group_size.x=1", "expects a whole number"),
        ("grpo=4", "is a section; set grpo.group_size"),
        ("grpo.group_size", "an override is written key=value"),
        ("=3", "an override is written key=value"),
        ("seed=[1", "not valid YAML"),
        ("name=${nothing}", "'nothing' not found"),
        ("grpo.group_size=4.0", "expects a whole number, not float"),
        ("grpo.group_size=true", "expects a whole number, not bool"),
        ("grpo.group_size=four", "expects a whole number, not str"),
        ("grpo.group_size=null", "expects a whole number"),
        ("grpo.equalizer=1", "expects true or false, not int"),
        ('grpo.equalizer="true"', "expects true or false, not str"),
        ("optimizer.lr=fast", "expects a number, not str"),
        ("optimizer.lr=true", "expects a number, not bool"),
        ("optimizer.lr=.nan", "must be finite"),
        ("sampler.eta=.inf", "must be finite"),
        ("reward.weights=1", "expects a mapping"),
        ("reward.weights.TA=high", "reward.weights.TA=high (command line): expects a number"),
        ("sampler.sde_type=sage", "did you mean sage_grpo?"),
        ("sampler.sde_type=ode", "draws no noise"),
        ("kl.schedule=two-stage", "did you mean two_stage?"),
        ("kl.feedback=loosen", "choose from relax, tighten"),
        ("precision.dtype=float16", "choose from fp32, bf16"),
        ("precision.dtype=fp8", "is the format of GEMMs"),
        ("precision.recompute=all", "choose from none, selective, full"),
    ],
)
def test_names_and_types(override, said):
    assert said in refusal([override])


RULES = [
    ("seed=-1", "must be >= 0"),
    ("name=a/b", "it names a directory"),
    ("output_dir='  '", "must name a directory"),
    ("parallel.context=0", "must be >= 1"),
    ("parallel.pipeline=0", "must be >= 1"),
    ("parallel.virtual_pipeline=0", "must be >= 1"),
    ("parallel.virtual_pipeline=2", "needs parallel.pipeline > 1"),
    ("parallel.pipeline_layout=Et|tL", "needs parallel.pipeline > 1"),
    ("parallel.tensor=0", "must be >= 1"),
    ("parallel.data=0", "must be >= 1"),
    ("precision.threads=0", "must be >= 1"),
    ("video.frames=80", "must be 4n+1 (the VAE makes one latent of 4 frames after the first); try 77 or 81"),
    ("video.frames=0", "must be >= 1"),
    ("video.height=470", "multiple of 16 (the VAE's compression); try 464 or 480"),
    ("video.width=8", "must be >= 16"),
    ("video.fps=0", "must be > 0"),
    ("sampler.num_steps=0", "must be >= 1"),
    ("sampler.shift=0", "must be > 0"),
    ("sampler.eta=0", "must be > 0"),
    ("sampler.guidance_scale=0.5", "must be >= 1"),
    ("sampler.micro_batch=3", "must divide grpo.group_size=4"),
    ("grpo.group_size=1", "must be >= 2"),
    ("grpo.prompts_per_iteration=0", "must be >= 1"),
    ("grpo.updates_per_rollout=0", "must be >= 1"),
    ("grpo.updates_per_rollout=81", "must be <= 4 micro-batches · 20 trained steps = 80"),
    ("grpo.clip_range=0", "must be > 0"),
    ("grpo.advantage_clip=-1", "must be > 0"),
    ("kl.lambda_min=1", "must not be above kl.lambda_max"),
    ("kl.warmup_steps=0", "must be >= 1"),
    ("kl.window=0", "must be >= 1"),
    ("kl.anchor_interval=0", "must be >= 1"),
    ("kl.target=0", "must be > 0"),
    ("kl.gain=2", "must be <= 1"),
    ("optimizer.lr=-1e-5", "must be >= 0"),
    ("optimizer.beta2=1", "must be < 1"),
    ("optimizer.eps=0", "must be > 0"),
    ("reward.function=nothing", "module:name"),
    ("reward.function=no_such_module:Reward", "cannot be imported"),
    ("reward.function=megatron_sage.rewards.shapes:ShapeReward", "did you mean ShapesReward?"),
    ("reward.weights={}", "at least one dimension"),
    ("reward.weights={ta: 1}", "did you mean TA? choose from VQ, MQ, TA"),
    ("model.pretrained=''", "must name a model directory"),
    ("model.pretrained=/nowhere", "has no transformer/config.json"),
    ("model.weights=/nowhere", "no such directory; make it: megatron-sage convert hf-to-megatron"),
    ("model.weights=null", "must name a Megatron checkpoint directory"),
    ("data.prompts=''", "must name a text file"),
    ("data.prompts=/nowhere.txt", "no such file"),
    ("evaluation.prompts=/nowhere.txt", "no such file"),
    ("training.iterations=-1", "must be >= 0"),
    ("training.save_interval=-1", "must be >= 0"),
    ("evaluation.samples_per_prompt=0", "must be >= 1"),
    ("evaluation.num_steps=0", "must be >= 1"),
]


@pytest.mark.parametrize(("override", "said"), RULES)
def test_each_rule(files, override, said):
    line = refusal([*files, override])
    assert line.startswith(override.partition("=")[0]) and said in line


def test_eta_beyond_one_is_refused_for_cps_alone(files):
    validate(load_config(None, [*files, "sampler.eta=1.5"]), 1)
    assert "must be <= 1 for cps" in refusal([*files, "sampler.eta=1.5", "sampler.sde_type=cps"])


def test_the_last_cps_step_is_deterministic_and_gives_no_update(files):
    line = refusal([*files, "sampler.sde_type=cps", "grpo.updates_per_rollout=80"])
    assert "4 micro-batches · 19 trained steps = 76" in line


@pytest.mark.parametrize(
    ("overrides", "world_size", "equation"),
    [
        (["parallel.tensor=2"], 3, "world size 3 ≠ TP·CP·PP·DP = 2·1·1·1 = 2"),
        (["parallel.tensor=4"], 2, "world size 2 ≠ TP·CP·PP·DP = 4·1·1·1 = 4"),
        (["parallel.tensor=2", "parallel.data=3"], 4, "world size 4 ≠ TP·CP·PP·DP = 2·1·1·3 = 6"),
    ],
)
def test_world_size_equation(files, overrides, world_size, equation):
    assert refusal([*files, *overrides], world_size=world_size).startswith(equation)


def test_layouts_that_fit(files):
    config = load_config(None, [*files, "parallel.tensor=2", "grpo.prompts_per_iteration=6"])
    validate(config, 6)
    assert data_parallel_size(config, 6) == 3
    assert "multiple of the data-parallel size 4" in refusal(
        [*files, "parallel.tensor=2", "grpo.prompts_per_iteration=6"], world_size=8
    )


def test_heads_are_read_from_the_model(files):
    line = refusal([*files, "parallel.tensor=3", "grpo.prompts_per_iteration=3"], world_size=3)
    assert line == "parallel.tensor=3: must divide the model's 8 attention heads; choose from 1, 2, 4, 8"


LAYOUT_RULES = [
    (["parallel.hierarchical_context=[1, 1]"], 1, "exactly with te_a2a+p2p"),
    (["parallel.context=3", "parallel.context_backend=ulysses"], 3, "8 heads / tensor 1 = 8 heads cannot be divided"),
    (["parallel.tensor=2", "parallel.context=8", "parallel.context_backend=ulysses"], 16, "/ tensor 2 = 4 heads"),
    (["parallel.context=2", "parallel.context_backend=te_p2p"], 2, "needs a GPU and the package transformer-engine"),
    (["parallel.context=2", "parallel.context_backend=te_a2a+p2p"], 2, "hierarchical_context=[a2a ranks, p2p ranks]"),
    (
        ["parallel.context=4", "parallel.context_backend=te_a2a+p2p", "parallel.hierarchical_context=[2, 3]"],
        4,
        "2·3 must be two sizes whose product is context=4",
    ),
    (["parallel.pipeline=16"], 16, "16 stages · 1 chunks = 16 > 12 blocks"),
    (["parallel.pipeline=4", "parallel.virtual_pipeline=4"], 4, "4 stages · 4 chunks = 16 > 12 blocks"),
    (["parallel.pipeline=2", "parallel.pipeline_layout=Et*5|t*6L"], 2, "holds 11 blocks, the model has 12"),
    (["parallel.pipeline=2", "parallel.pipeline_layout=Et*6|t*3|t*3L"], 2, "3 parts between the bars, expected 2"),
    (["parallel.pipeline=2", "parallel.pipeline_layout=t*6|t*6L"], 2, "must start with the only E"),
    (["parallel.pipeline=2", "parallel.pipeline_layout=Ex|tL"], 2, "not a layout"),
    (
        ["parallel.pipeline=3", "parallel.virtual_pipeline=2", "grpo.updates_per_rollout=2"],
        3,
        "divisible by parallel.pipeline=3, but 80 pairs / 2 updates gives 40",
    ),
]


@pytest.mark.parametrize(("overrides", "world_size", "said"), LAYOUT_RULES)
def test_layouts_that_cannot_be(files, overrides, world_size, said):
    line = refusal([*files, *overrides], world_size=world_size)
    assert line.startswith("parallel.") and said in line


@pytest.mark.parametrize(
    ("overrides", "world_size"),
    [
        (["parallel.context=3"], 3),
        (["parallel.tensor=2", "parallel.context=4", "parallel.context_backend=ulysses"], 8),
        (["parallel.pipeline=5"], 5),
        (["parallel.pipeline=2", "parallel.virtual_pipeline=3"], 2),
        (["parallel.pipeline=2", "parallel.pipeline_model_parallel_layout=Et*7|t*5L"], 2),
        (["parallel.pipeline_model_parallel_size=2", "parallel.context_parallel_size=2"], 4),
    ],
)
def test_layouts_of_every_kind(files, overrides, world_size):
    validate(load_config(None, [*files, *overrides]), world_size)


def test_another_architecture_is_named(files, tmp_path):
    path = tmp_path / "model" / "transformer" / "config.json"
    path.write_text('{"_class_name": "WanTransformer3DModel"}')
    assert "_class_name=WanTransformer3DModel" in refusal(files)
    path.write_text('{"_class_name": "HunyuanVideo15Transformer3DModel", "use_meanflow": true}')
    assert "use_meanflow=true" in refusal(files)
    path.write_text('{"_class_name": ')
    assert f"{path}: not valid JSON" in refusal(files)


def test_unusable_files(files, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n \n")
    assert "the file is empty" in refusal(files)
    (tmp_path / "prompts.txt").write_bytes(b"\xff\xfe\xff")
    assert "not UTF-8" in refusal(files)
    (tmp_path / "model" / "vae" / "config.json").unlink()
    assert "has no vae/config.json" in refusal(files)


def test_a_model_without_text_encoder(files, tmp_path):
    (tmp_path / "model" / "text_encoder").rmdir()
    assert "has no text_encoder/" in refusal(files)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sampler: [1]\n", "sampler=[1] ({path}): is a section"),
        ("- a\n", "{path}: expects sections such as 'sampler:'"),
        ("seed: 1\nseed: 2\n", "{path}, line 2: not valid YAML: found duplicate key"),
        ("seed: [1\n", "{path}, line 2: not valid YAML"),
        ("grpo: {groupsize: 4}\n", "grpo.groupsize ({path}): unknown key; did you mean grpo.group_size?"),
        ("name: 5\n", "name=5 ({path}): expects text, not int"),
        ("3: 4\n", "3 ({path}): unknown key"),
    ],
)
def test_files_that_are_refused(tmp_path, text, said):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert said.format(path=path) in refusal([], path)


def test_a_config_built_in_python_is_checked_like_a_file(files):
    config = load_config(None, files)
    broken = dataclasses.replace(config, kl=dataclasses.replace(config.kl, schedule="three_stage"))
    with pytest.raises(UserError, match=r"kl\.schedule=three_stage: unknown; did you mean two_stage"):
        validate(broken, 1)


def test_every_field_says_its_unit_or_source():
    """A setting without a comment is a setting that nobody can choose."""
    source = Path(load_config.__code__.co_filename).with_name("schema.py").read_text()
    fields = [line for line in source.splitlines() if line.startswith("    ") and ": " in line and " = " in line]
    settings_lines = [line for line in fields if not re.search(r"default_factory=[A-Z]", line)]
    assert len(settings_lines) == len(LEAVES) + len(dataclasses.fields(MoreReward))
    assert all("  # " in line for line in settings_lines)


def test_names_agree_with_the_method():
    from megatron_sage.grpo.sde import SDE_TYPES

    for sde_type in set(SDE_TYPES) - {"ode"}:
        assert load_config(None, [f"sampler.sde_type={sde_type}"]).sampler.sde_type == sde_type


def test_dump_is_plain_yaml():
    assert yaml.safe_load(dump(Config()))["kl"]["lambda_min"] == 1e-7
