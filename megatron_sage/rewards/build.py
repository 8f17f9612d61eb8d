"""The reward of a run, out of its configuration."""

from typing import Any

from megatron_sage.config.schema import RewardConfig
from megatron_sage.rewards.composite import Several, WithWatch, check_weights
from megatron_sage.rewards.protocol import Reward, load_reward
from megatron_sage.rewards.remote import RemoteReward


def build_reward(config: RewardConfig, device: Any = None) -> Reward:
    """What is trained on, one reward or several, with what is only watched.

    Models are loaded here and not at the first call, so that a fault shows before training. A class with a parameter
    `device` is given `device`, unless its settings say another one. With `reward.url` they are all on that server.
    """
    if config.url is not None:
        return RemoteReward(config)
    reward = load_reward(config.function, "reward.function", config.settings, device)
    if config.more:
        rewards = {"reward.function": reward}
        for i, more in enumerate(config.more):
            key = f"reward.more[{i}].function"
            rewards[key] = load_reward(more.function, key, more.settings, device)
        reward = Several(rewards)
    check_weights(config.weights, reward.dimensions)
    if config.watch is None:
        return reward
    return WithWatch(reward, load_reward(config.watch, "reward.watch", config.watch_settings, device))


def accounts(reward: Reward) -> list[str]:
    """What each reward says of the weights that it loaded, a line each; those that load none say nothing."""
    if isinstance(reward, WithWatch):
        return accounts(reward.trained) + accounts(reward.watched)
    if isinstance(reward, Several):
        return [line for one in reward.rewards.values() for line in accounts(one)]
    return [str(reward.account)] if hasattr(reward, "account") else []
