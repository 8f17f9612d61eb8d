"""The state of a run, all of it: whatever is left out would make a resumed run another run.

Tensors are saved as shards under global names, so that each rank writes what it holds and any layout loads it; the
rest is plain numbers in `state.json`.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch.distributed.checkpoint.api import CheckpointException

from megatron_sage.anchor import BaseModel
from megatron_sage.checkpoint.keymap import KeyMap
from megatron_sage.checkpoint.staging import on_all_ranks
from megatron_sage.checkpoint.store import CheckpointStore, newest, opened
from megatron_sage.checkpoint.torch_dist import MegatronDirectory, first_failure
from megatron_sage.errors import UserError
from megatron_sage.model.lora import has_adapters
from megatron_sage.model.lora_targets import is_adapter
from megatron_sage.training import random_state
from megatron_sage.training.trainer import Trainer

VERSION = 2  # of state.json


class TrainState:
    """What it takes to continue: policy, optimizer, moving anchor, lambda controller, counters, prompts, random state.

    Not in it: the initial model, the base of a run with adapters (they are read again from `model.weights`, and their
    checksum is compared), and everything that follows from the configuration.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        engine = trainer.engine
        self.adapters = has_adapters(engine.chunks)
        base = BaseModel(engine.chunks, engine.groups) if self.adapters else None
        initial = f"{base.checksum:016x}" if base else trainer.reference.checksums.get("fixed")
        lora = {key: value for key, value in asdict(engine.config.lora).items() if key != "export"}
        self.identity: dict[str, Any] = {  # what a checkpoint and the run that goes on from it must have in common
            "model": {k: v for k, v in engine.model_config.to_diffusers().items() if not k.startswith("_")},
            "lora": lora if self.adapters else None,
            "optimizer.name": engine.config.optimizer.name,
            "optimizer.distributed": engine.config.optimizer.distributed,
            "optimizer.ema_decay": engine.config.optimizer.ema_decay is not None,
            "references": trainer.reference.kinds,
            "initial model": initial,
        }

    def sharded(self, loading: bool) -> dict[str, Any]:
        """By chunk: two chunks of a rank have copies of the timestep's embedder under one name."""
        trainer = self.trainer
        state: dict[str, Any] = {
            "policy": self._policy(),
            "optimizer": trainer.optimizer.sharded_state_dict(self._shards(), is_loading=loading),
        }
        if trainer.reference.moving is not None:
            state["anchor"] = _with_data(self._shards(), trainer.reference.moving.state_dict(), "anchor")
        if trainer.ema is not None:
            state["ema"] = _with_data(self._shards(), trainer.ema.state_dict(), "ema")
        return state

    def _policy(self) -> dict[str, Any]:
        """Of a run with adapters, the adapters."""
        shards = self._shards()
        if not self.adapters:
            return shards
        return {chunk: {n: s for n, s in found.items() if is_adapter(n)} for chunk, found in shards.items()}

    def _shards(self) -> dict[str, Any]:
        return {str(number): chunk.sharded_state_dict() for number, chunk in enumerate(self.trainer.engine.chunks)}

    def plain(self) -> dict[str, Any]:
        """Everything that is no tensor of the model."""
        trainer = self.trainer
        return {
            "version": VERSION,
            "iteration": trainer.iteration,
            "optimizer_steps": trainer.optimizer_steps,
            "controller": trainer.controller.state_dict(),
            "guard": trainer.guard.state_dict(),
            "cursor": trainer.cursor.state_dict(),
            "quantisation": trainer.engine.quantisation.state_dict(trainer.engine.groups.pp),
            "identity": self.identity,
            "world_size": trainer.engine.groups.world_size,
        }

    def save(self, store: CheckpointStore) -> None:
        """Hand everything to the store. All ranks call."""
        state = self.sharded(loading=False) | {"random": random_state.sharded()}
        config = self.trainer.engine.model_config.to_diffusers()
        texts = {"state.json": json.dumps(self.plain(), indent=1), "config.json": json.dumps(config, indent=1)}
        store.save(self.trainer.iteration, state, texts)

    def load(self, directory: Path) -> None:
        """Continue from the newest checkpoint under `directory`. All ranks call.

        Raises UserError where there is none, it is damaged, or it was made by a run that this one cannot continue.
        """
        source = newest(directory)
        if source is None:
            raise UserError(f"training.resume=yes: {directory} holds no checkpoint: set it to no, or to auto")
        checkpoint, plain = opened(source)
        with on_all_ranks():
            self._check(source, checkpoint, plain)
        trainer, state = self.trainer, self.sharded(loading=True)
        if plain["world_size"] == trainer.engine.groups.world_size:
            state["random"] = random_state.sharded()
        try:
            loaded = dist_checkpointing.load(state, str(source))
        except CheckpointException as failure:
            raise first_failure(source, failure) from failure
        for number, chunk in enumerate(trainer.engine.chunks):
            chunk.load_state_dict(loaded["policy"][str(number)], strict=not self.adapters)
        trainer.optimizer.load_state_dict(loaded["optimizer"])
        if trainer.reference.moving is not None:
            trainer.reference.moving.load_state_dict(loaded["anchor"])
        if trainer.ema is not None:
            trainer.ema.load_state_dict(loaded["ema"])
        trainer.iteration = plain["iteration"]
        trainer.optimizer_steps = plain["optimizer_steps"]
        trainer.controller.load_state_dict(plain["controller"])
        trainer.guard.load_state_dict(plain["guard"])
        trainer.cursor.load_state_dict(plain["cursor"])
        trainer.engine.quantisation.load_state_dict(plain.get("quantisation", {}))
        if "random" in loaded:
            random_state.restore(loaded["random"])

    def _check(self, source: Path, checkpoint: MegatronDirectory, plain: dict[str, Any]) -> None:
        config = self.trainer.engine.config
        if plain.get("version") != VERSION:
            raise UserError(
                f"{source / 'state.json'}: version {plain.get('version')}, this program reads {VERSION}: go on with "
                "the one that wrote it"
            )
        theirs, ours = plain["identity"], self.identity
        for key in (k for k in ours["model"] if theirs["model"].get(k) != ours["model"][k]):
            raise UserError(
                f"model.pretrained={config.model.pretrained}: {source} is of another model, with {key} "
                f"{theirs['model'].get(key)} where this one has {ours['model'][key]}: name its own, or start anew"
            )
        if theirs["references"] != ours["references"]:
            raise UserError(
                f"kl.strategy={config.kl.strategy}: {source} was saved with the position references "
                f"{_listed(theirs['references'])}, this run's are {_listed(ours['references'])}: keep them, or start "
                "anew"
            )
        for key in ("lora", "optimizer.name", "optimizer.distributed", "optimizer.ema_decay"):
            if theirs[key] != ours[key]:
                raise UserError(f"{key}={ours[key]}: {source} was saved with {theirs[key]}: keep it, or start anew")
        if theirs["initial model"] != ours["initial model"]:
            raise UserError(
                f"model.weights={config.model.weights}: is not the model that {source} began with (checksum "
                f"{ours['initial model']}, was {theirs['initial model']}): restore it"
            )
        if not self.adapters:
            checkpoint.check(KeyMap.from_config(self.trainer.engine.model_config.to_diffusers()).shapes("ours"))


def _listed(references: dict[str, str]) -> str:
    return " and ".join(references.values()) or "none"


def _with_data(shards: dict[str, Any], tensors: dict[str, Any], prefix: str) -> dict[str, ShardedTensor]:
    """The model's shards with other data of the same shape, under names of their own."""
    renamed = {}
    for name, tensor in tensors.items():
        chunk, _, parameter = name.partition(".")
        shard = shards[chunk][parameter]
        shard.key, shard.data, shard.dtype = f"{prefix}.{shard.key}", tensor, tensor.dtype
        renamed[name] = shard
    return renamed
