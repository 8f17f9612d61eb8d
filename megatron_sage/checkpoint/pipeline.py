"""`megatron-sage export`: a trained transformer in a directory that diffusers' `from_pretrained` runs.

The transformer comes from a run, one of its checkpoints, converted weights or an exported directory; everything else
(encoders, VAE, scheduler) from the pipeline directory that the run began with. Adapters are merged.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from safetensors import SafetensorError, safe_open

from megatron_sage.checkpoint import configs
from megatron_sage.checkpoint.convert import OneLineParser, megatron_to_hf
from megatron_sage.checkpoint.hf import DEFAULT_MAX_SHARD_BYTES, open_hf, plan_hf_files, write_hf_metadata
from megatron_sage.checkpoint.lora import FILE, METADATA_KEY, PREFIX
from megatron_sage.checkpoint.progress import byte_progress
from megatron_sage.checkpoint.safetensors_io import SafetensorsWriter
from megatron_sage.checkpoint.staging import on_all_ranks, process_group, staged_directory
from megatron_sage.checkpoint.store import newest
from megatron_sage.checkpoint.torch_dist import MegatronDirectory, read_object
from megatron_sage.errors import UserError
from megatron_sage.model.lora_targets import TARGETS, child_name, diffusers_path

INDEX = "model_index.json"
_ADAPTER = re.compile(r"(transformer_blocks\.\d+\.)lora\.\w+\.(\w+)\.lora_([AB])\.weight")

Adapters = dict[str, tuple[torch.Tensor, torch.Tensor, float]]  # name of the weight -> A, B, alpha / rank


def export_pipeline(source: Path, target: Path, base: Path | None = None, link: bool = False) -> Path:
    """Write `target` as a diffusers pipeline with the transformer of `source`; all ranks call.

    Args:
        source: a run's directory (its newest checkpoint), a checkpoint iteration_NNNNNN, a Megatron weights directory,
            a transformer directory of diffusers, or a directory with pytorch_lora_weights.safetensors.
        base: the pipeline directory of everything else; None: `model.pretrained` of the run that `source` lies in.
        link: symbolic links to the other parts, in place of copies.

    Raises:
        UserError: in one line, for a source that is none, a base of another model, a target that is not empty.
    """
    with process_group():
        with on_all_ranks():
            checkpoint = newest(source / "checkpoints") if (source / "checkpoints").is_dir() else source
            if checkpoint is None:
                raise UserError(f"{source / 'checkpoints'}: holds no complete checkpoint yet; name another source")
            base = base or _base_of_run(source)
            components = _components(base)
        with staged_directory(target) as staging:
            _write_transformer(checkpoint, base, staging / "transformer")
            if dist.get_rank() == 0:
                for name in [INDEX, *components]:
                    _bring(base / name, staging / name, link)
    return target


def _write_transformer(checkpoint: Path, base: Path, target: Path) -> None:
    if (checkpoint / "metadata.json").is_file():
        adapters = _adapters_of_checkpoint(checkpoint)
        if not adapters:
            with on_all_ranks():
                _same_model(configs.read_config(checkpoint, configs.DIFFUSERS_CLASS), checkpoint, base)
            megatron_to_hf(checkpoint, target)
            return
    elif (checkpoint / FILE).is_file():
        adapters = _adapters_of_file(checkpoint / FILE)
    elif (checkpoint / "config.json").is_file() or (checkpoint / "transformer" / "config.json").is_file():
        adapters, directory = {}, configs.transformer_directory(checkpoint)
        with on_all_ranks():
            _same_model(open_hf(directory)[1], checkpoint, base)
        base = directory
    else:
        raise UserError(
            f"{checkpoint}: neither a run, a Megatron checkpoint, a transformer directory nor adapters ({FILE})"
        )
    _write_merged(base, adapters, target)


def _write_merged(base: Path, adapters: Adapters, target: Path) -> None:
    """A transformer directory with W + alpha / rank * B A, added in float32 and rounded once to the stored dtype."""
    with on_all_ranks():
        files, config, keymap = open_hf(base)
        for name, (a, b, _) in adapters.items():
            shape = files.specs[name].shape if name in files.specs else None
            if shape != (b.shape[0], a.shape[1]):
                raise UserError(
                    f"{base}: {name} is {shape}, its adapter is for {(b.shape[0], a.shape[1])}: another model"
                )
    dtypes = {binding: files.specs[binding.diffusers[0]].dtype for binding in keymap.bindings}
    plans = plan_hf_files(keymap, dtypes, "diffusers", DEFAULT_MAX_SHARD_BYTES)
    total = sum(spec.nbytes for plan in plans for spec in plan.specs.values())
    with staged_directory(target) as staging, byte_progress(f"{base} -> {target.name}", total) as advance:
        if dist.get_rank() == 0:
            for plan in plans:
                with SafetensorsWriter(staging / plan.name, plan.specs) as writer:
                    for name, spec in plan.specs.items():
                        weight = files.read(name)
                        if name in adapters:
                            a, b, scale = adapters[name]
                            weight = (weight.float() + scale * b.float() @ a.float()).to(weight.dtype)
                        writer.write(name, weight)
                        advance(spec.nbytes)
            write_hf_metadata(staging, plans, config, "diffusers")


def _adapters_of_checkpoint(directory: Path) -> Adapters:
    """Of a run with adapters; empty for one without."""
    checkpoint = MegatronDirectory(directory)
    found = {name: match for name in checkpoint.specs if (match := _ADAPTER.fullmatch(name))}
    if not found:
        return {}
    checkpoint.verify()
    lora = read_object(directory / "state.json")["identity"]["lora"]
    scale = (lora["alpha"] or lora["rank"]) / lora["rank"]
    targets = {child_name(target): target for target in TARGETS}
    tensors = checkpoint.read(list(found))
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for name, match in found.items():
        block, target, matrix = match.groups()
        pairs.setdefault(f"{block}{diffusers_path(targets[target])}.weight", {})[matrix] = tensors[name]
    return {name: (pair["A"], pair["B"], scale) for name, pair in pairs.items()}


def _adapters_of_file(path: Path) -> Adapters:
    try:
        with safe_open(path, framework="pt") as file:
            settings = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
            tensors = {name.removeprefix(PREFIX): file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); export the adapters again") from error
    pairs: Adapters = {}
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        module = name.removesuffix(".lora_A.weight")
        a, b = tensors[name], tensors.get(f"{module}.lora_B.weight")
        if b is None:
            raise UserError(f"{path}: {module} has a lora_A and no lora_B; export the adapters again")
        rank = a.shape[0]
        pairs[f"{module}.weight"] = a, b, settings.get(f"{PREFIX}lora_alpha", rank) / rank
    if len(tensors) != 2 * len(pairs):
        raise UserError(f"{path}: holds {len(tensors)} tensors that are not all pairs of lora_A and lora_B")
    return pairs


def _base_of_run(source: Path) -> Path:
    """`model.pretrained` of the run directory in or under which `source` lies."""
    for directory in (source, *source.absolute().parents):
        path = directory / "config.yaml"
        if path.is_file():
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
            pretrained = content.get("model", {}).get("pretrained") if isinstance(content, dict) else None
            if pretrained:
                return Path(pretrained)
    raise UserError(
        f"{source}: lies in no run's directory, so the rest of the pipeline is unknown; name it: --base DIR"
    )


def _components(base: Path) -> list[str]:
    """Names of the pipeline's directories besides the transformer's."""
    if not (base / INDEX).is_file():
        raise UserError(f"{base}: has no {INDEX}, so it is no diffusers pipeline; name one: --base DIR")
    index = read_object(base / INDEX)
    names = [name for name, value in index.items() if isinstance(value, list) and value[0] is not None]
    missing = [name for name in names if not (base / name).is_dir()]
    if missing or "transformer" not in names:
        raise UserError(
            f"{base}: {INDEX} names {missing or 'no transformer'}, which is missing; fetch the pipeline again"
        )
    return [name for name in names if name != "transformer"]


def _same_model(config: dict[str, Any], source: Path, base: Path) -> None:
    theirs = open_hf(base)[1]
    ours = configs.complete(config, source / "config.json")
    theirs = configs.complete(theirs, base / "transformer" / "config.json")
    for key in sorted(theirs):
        if not key.startswith("_") and ours.get(key) != theirs[key]:
            raise UserError(
                f"{base}: {key} is {theirs[key]}, in {source} it is {ours.get(key)}: another model; --base DIR"
            )


def _bring(source: Path, target: Path, link: bool) -> None:
    if link:
        os.symlink(source.absolute(), target)
    elif source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copyfile(source, target)


def main(argv: Sequence[str]) -> int:
    """`megatron-sage export SOURCE OUT`. Returns the exit status; raises UserError with one line."""
    parser = OneLineParser(prog="megatron-sage export", description=__doc__)
    parser.add_argument("source", type=Path, help="run, checkpoint, Megatron weights, transformer or adapter directory")
    parser.add_argument("target", type=Path, metavar="OUT", help="directory to create")
    parser.add_argument("--base", type=Path, help="pipeline of everything else (the run's model.pretrained)")
    parser.add_argument("--link", action="store_true", help="link to the other parts in place of copying them")
    options = parser.parse_args(argv)
    export_pipeline(options.source, options.target, options.base, options.link)
    if os.environ.get("RANK", "0") == "0":
        print(f"{options.target}: a diffusers pipeline")
    return 0
