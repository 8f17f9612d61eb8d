"""The whole method learns, for every sampler, and the equalizer and the trust region do what they are for.

Bounds are set from seeds 0, 1 and 2 (mean rollout reward, last five iterations minus first five; worst of the seeds):
gain with equalizer dance 0.63, flow 2.11, cps 2.79, sage 1.98; of that owed to the equalizer 0.11, 1.25, 0.62, 1.26;
sage with the dual KL at weight 0.01 1.98, at weight 100 at most 0.11. An implementation far from this has a wrong sign
or factor.
"""

import functools
from collections.abc import Iterator

import pytest
import torch

from tests.grpo.toy import Toy

SEED = 1
GAIN = {"dance_grpo": 0.5, "flow_grpo": 1.5, "cps": 2.0, "sage_grpo": 1.5}
OWED_TO_EQUALIZER = {"dance_grpo": 0.0, "flow_grpo": 0.7, "cps": 0.3, "sage_grpo": 0.7}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small are slower on more threads, and the numbers do not depend on the machine's cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def gain(sde_type: str, equalizer: bool = True, kl_weight: float = 0.0) -> float:
    toy = Toy(sde_type, equalizer, kl_weight, SEED)
    first, last = toy.train()
    assert toy.initial_deviation < 1e-6, "ratio is not 1 before the first update"
    assert 0 < sum(toy.clipped) / len(toy.clipped) < 0.2, "the clip must act, and not on everything"
    assert -3.6 < first < -2.8, "the pre-trained model does not make the data"
    return last - first


@pytest.mark.parametrize("sde_type", GAIN)
def test_learns(sde_type: str):
    assert gain(sde_type) > GAIN[sde_type]


@pytest.mark.parametrize("sde_type", OWED_TO_EQUALIZER)
def test_equalizer_helps(sde_type: str):
    assert gain(sde_type) - gain(sde_type, equalizer=False) > OWED_TO_EQUALIZER[sde_type]


def test_dual_kl_with_a_moving_anchor_lets_it_learn_and_holds_it_when_strong():
    assert gain("sage_grpo", kl_weight=1e-2) > GAIN["sage_grpo"]
    assert gain("sage_grpo", kl_weight=100.0) < 0.6


def test_the_same_seed_gives_the_same_numbers():
    histories = []
    for _ in range(2):
        toy = Toy("sage_grpo", equalizer=True, kl_weight=1e-2, seed=SEED)
        histories.append([toy.iterate(iteration) for iteration in range(3)])
    assert histories[0] == histories[1]
