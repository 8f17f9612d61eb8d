"""Several rewards in one run: settings that reach them, dimensions side by side, one line for what is wrong."""

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from megatron_sage.config import Config, dump, load_config
from megatron_sage.config.reward_rules import check_reward
from megatron_sage.config.schema import MoreReward, RewardConfig, VideoConfig
from megatron_sage.errors import UserError
from megatron_sage.rewards.build import build_reward

SHAPES = "megatron_sage.rewards.shapes:ShapesReward"


class Brightness:
    dimensions = ("bright",)

    def __init__(self, scale: float, offset: float = 0.0, device: str = "unset") -> None:
        self.scale, self.offset, self.device = scale, offset, device

    @classmethod
    def check_run(cls, video: VideoConfig, /, scale: float, **_: float) -> None:
        if scale == 0 or video.frames < 2:
            raise UserError(f"scale={scale}, {video.frames} frames: nothing to see")

    def __call__(self, videos, prompts, fps):
        return {"bright": np.array([self.scale * v.mean() + self.offset for v in videos])}


class Undecided:
    """Its dimensions are known only when it is made."""

    def __init__(self, name: str = "odd") -> None:
        self.dimensions = (name,)

    def __call__(self, videos, prompts, fps):
        return {name: np.full(len(videos), np.nan) for name in self.dimensions}


class Faulty:
    dimensions = ("wrong",)

    def __call__(self, videos, prompts, fps):
        return {"wrong": np.zeros((len(videos), 2))}


def plain(videos, prompts, fps):
    return {"length": np.array([float(len(v)) for v in videos])}


plain.dimensions = ("length",)  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def mine(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("my_rewards")
    for thing in (Brightness, Undecided, Faulty, plain):
        setattr(module, thing.__name__, thing)
    monkeypatch.setitem(sys.modules, "my_rewards", module)


def clips(n: int = 3) -> tuple[list[np.ndarray], list[str]]:
    rng = np.random.default_rng(n)
    return [rng.integers(0, 256, (4 + i, 8, 8, 3), dtype=np.uint8) for i in range(n)], [
        "a red circle moving left slowly"
    ] * n


def test_several_rewards_are_weighed_together(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        f"reward:\n  function: {SHAPES}\n  weights: {{TA: 1, bright: 0.5, length: 2}}\n  more:\n"
        "  - {function: 'my_rewards:Brightness', settings: {scale: 3}}\n  - function: my_rewards:plain\n"
        "  watch: my_rewards:Brightness\n"
    )
    overrides = ["reward.watch_settings.scale=1", "reward.watch_settings.offset=-7.5"]
    config = load_config(file, overrides)
    assert config.reward.more == [MoreReward("my_rewards:Brightness", {"scale": 3}), MoreReward("my_rewards:plain")]
    assert config.reward.watch_settings == {"scale": 1, "offset": -7.5}
    check_reward(config)
    again = tmp_path / "again.yaml"
    again.write_text(dump(config))
    assert load_config(again) == config

    reward = build_reward(config.reward, "cpu")
    assert reward.dimensions == ("VQ", "MQ", "TA", "bright", "length", "watch/bright")
    videos, prompts = clips()
    scores = reward(videos, prompts, 8.0)
    mean = np.array([v.mean() for v in videos])
    np.testing.assert_allclose(scores["bright"], 3 * mean)
    np.testing.assert_allclose(scores["watch/bright"], mean - 7.5)
    np.testing.assert_array_equal(scores["length"], [4, 5, 6])
    np.testing.assert_array_equal(scores["TA"], build_reward(RewardConfig())(videos, prompts, 8.0)["TA"])


def test_the_device_goes_to_those_that_take_one() -> None:
    config = RewardConfig(function="my_rewards:Brightness", settings={"scale": 1.0}, weights={"bright": 1.0})
    assert build_reward(config, "cuda:3").device == "cuda:3"  # type: ignore[attr-defined]
    assert build_reward(config).device == "unset"  # type: ignore[attr-defined]
    config.settings["device"] = "cpu"
    assert build_reward(config, "cuda:3").device == "cpu"  # type: ignore[attr-defined]


def test_what_is_not_finite_stays() -> None:
    more = [MoreReward("my_rewards:Undecided", {"name": "x"})]
    reward = build_reward(RewardConfig(more=more, weights={"x": 1.0}))
    assert np.isnan(reward(*clips(2), 8.0)["x"]).all()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["reward.settings.chekpoint=x"],
            "settings.chekpoint=x: .*ShapesReward has no such setting; it has none",
        ),
        (["reward.settings=[1]"], r"reward.settings=\[1\] \(command line\): expects a mapping such as {checkpoint"),
        (["reward.settings={scale: .nan}"], r"reward.settings.scale=nan \(command line\): must be finite"),
        (["reward.more={function: a}"], r"expects a list such as \[{function: module:name}\]"),
        (["reward.more=[a]"], r"reward.more\[0\]=a \(command line\): expects a mapping with function, settings"),
        (["reward.more=[{functon: 'a:b'}]"], r"reward.more\[0\].functon .*did you mean function\?"),
        (["reward.more=[{function: 3}]"], r"reward.more\[0\].function=3: expects text"),
        (["reward.more=[{settings: {}}]"], r"reward.more\[0\].function=: must be \"module:name\""),
        (["reward.more=[{function: 'my_rewards:Brightnes'}]"], "did you mean Brightness"),
        (["reward.more=[{function: 'my_rewards:Brightness'}]"], r"reward.more\[0\].settings.scale: is missing"),
        (["reward.more=[{function: 'my_rewards:Brightness', settings: {scale: 0}}]"], r"more\[0\].settings: scale=0"),
        (["reward.more=[{function: 'my_rewards:Brightness', settings: {scal: 1}}]"], "did you mean scale"),
        (["reward.more=[{function: 'my_rewards:plain', settings: {scale: 1}}]"], "takes no settings"),
        ([f"reward.more=[{{function: '{SHAPES}'}}]"], r"reward.more\[0\].function: its dimension VQ is also one of"),
        (["reward.more=[{function: 'my_rewards:plain'}]", "reward.weights.lenght=1"], "did you mean length"),
        (["reward.watch_settings.scale=1"], "there is no reward.watch"),
        (["reward.watch=my_rewards:Brightness"], "reward.watch_settings.scale: is missing"),
    ],
)
def test_each_fault_is_one_line(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        check_reward(load_config(None, overrides))
    assert "\n" not in str(caught.value)


def test_what_only_an_instance_knows_is_checked_when_it_is_made() -> None:
    config = Config()
    config.reward.more = [MoreReward("my_rewards:Undecided", {"name": "VQ"})]
    check_reward(config)
    with pytest.raises(UserError, match="dimension VQ is also one of reward.function"):
        build_reward(config.reward)
    config.reward.more[0].settings["name"] = "even"
    config.reward.weights = {"evn": 1.0}
    with pytest.raises(UserError, match=r"reward.weights.evn=1.0: .*did you mean even\?"):
        build_reward(config.reward)


def test_a_reward_of_the_wrong_shape_is_named() -> None:
    reward = build_reward(RewardConfig(more=[MoreReward("my_rewards:Faulty")]))
    with pytest.raises(UserError, match=r"reward.more\[0\].function: wrong has shape \[2, 2\] for 2 videos"):
        reward(*clips(2), 8.0)
