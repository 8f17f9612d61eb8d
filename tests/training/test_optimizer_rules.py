"""Which optimizers are refused, and that the line names the key, the rule and the cure."""

import importlib.util
from unittest import mock

import pytest

from megatron_sage.config import Config
from megatron_sage.config.state_rules import check_optimizer
from megatron_sage.errors import UserError

REFUSED = [
    ({"name": "muon", "distributed": True}, r"optimizer\.distributed=True: .*muon.*set false"),
    ({"name": "muon", "offload": "hybrid"}, r"optimizer\.offload=hybrid: .*set none"),
    ({"offload": "hybrid"}, r"optimizer\.offload=hybrid: .*set optimizer\.distributed=true"),
    ({"offload_fraction": 0.5}, r"optimizer\.offload_fraction=0\.5: .*offload=hybrid: set 1"),
    (
        {"distributed": True, "offload": "deepspeed", "offload_fraction": 0.5},
        r"optimizer\.offload_fraction=0\.5: .*set 1",
    ),
    ({"distributed": True, "offload": "deepspeed"}, r"optimizer\.offload=deepspeed: .*pip install"),
]
ACCEPTED = [
    {},
    {"distributed": True},
    {"name": "muon"},
    {"distributed": True, "offload": "hybrid", "offload_fraction": 0.5},
]


def config(**settings: object) -> Config:
    found = Config()
    for name, value in settings.items():
        setattr(found.optimizer, name, value)
    return found


@pytest.mark.parametrize("settings, line", REFUSED)
def test_refused(settings: dict[str, object], line: str) -> None:
    with mock.patch.object(importlib.util, "find_spec", lambda name: None), pytest.raises(UserError, match=line):
        check_optimizer(config(**settings))


@pytest.mark.parametrize("settings", ACCEPTED)
def test_accepted(settings: dict[str, object]) -> None:
    check_optimizer(config(**settings))


def test_muon_has_nothing_to_train_beside_adapters() -> None:
    found = config(name="muon")
    found.lora.rank = 4
    with pytest.raises(UserError, match=r"optimizer\.name=muon: .*lora\.rank.*set adamw"):
        check_optimizer(found)


def test_deepspeed_is_accepted_where_it_is_installed() -> None:
    with mock.patch.object(importlib.util, "find_spec", lambda name: object()):
        check_optimizer(config(distributed=True, offload="deepspeed"))
