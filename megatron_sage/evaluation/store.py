"""The directory of an evaluation: what it was made with, and a row for every finished video.

    settings.json                     what decides the numbers, and the prompts
    rows/NAME/source.json             which weights NAME stands for
    rows/NAME/rank_00000.jsonl        a line for each video that this rank finished
    videos/NAME/0003_01.mp4           prompt 3, sample 1

A row is appended and synced after its video has its name, so that what a killed evaluation leaves is whole rows and at
most one cut line, which does not count. The directory may be shared by several machines: each rank writes a file of
its own, all read all of them.
"""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sage.errors import UserError
from megatron_sage.evaluation.measures import Key

if TYPE_CHECKING:
    from megatron_sage.config import Config
    from megatron_sage.data.prompts import PromptRow
    from megatron_sage.evaluation.sources import Source

SETTINGS, VERSION = "settings.json", 1
# What cannot change a video or a score; everything else, and whatever is added to the configuration later, can.
_NO_MATTER: tuple[str, ...] = (
    *("name", "output_dir", "parallel", "grpo", "kl", "optimizer", "data", "training", "lora", "model.weights"),
    *("evaluation.prompts", "evaluation.videos", "precision.threads", "precision.recompute"),
    *("sampler.sde_type", "sampler.num_steps", "sampler.eta", "sampler.sde_window"),
    *("sampler.latent_dtype", "sampler.offload_trajectories"),
)


def settings_of(config: "Config", rows: Sequence["PromptRow"]) -> dict[str, Any]:
    """Dotted key -> value of all that decides the results, but for weights and prompts.

    The model's directory is told by its content: the transformer's configuration, and names and sizes of the VAE's
    and the encoders' files; first frames by theirs.
    """
    from megatron_sage.checkpoint.torch_dist import file_checksum  # imports torch: `rate` does without
    from megatron_sage.engine import read_transformer_config

    flat = _flat(dataclasses.asdict(config), "")
    kept = {k: v for k, v in flat.items() if not any(k == no or k.startswith(f"{no}.") for no in _NO_MATTER)}
    root = Path(config.model.pretrained)
    described: list[Any] = [read_transformer_config(config.model.pretrained)]
    for part in ("vae", *(f"{kind}{n}" for kind in ("text_encoder", "tokenizer") for n in ("", "_2")), "image_encoder"):
        files = sorted(file for file in (root / part).glob("*") if file.is_file())
        described += [(part, file.name, file.stat().st_size) for file in files]
    kept["model.pretrained"] = _digest(described)
    images = [None if row.image is None else (row.image.name, file_checksum(row.image)) for row in rows]
    kept["first frames"] = _digest(images) if any(images) else None
    return kept


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _flat(tree: dict[str, Any], prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found


def check_directory(
    out: Path, settings: dict[str, Any], rows: Sequence["PromptRow"], sources: Sequence["Source"]
) -> None:
    """Refuse, in one line, results of other settings, prompts or weights under the same names. Writes nothing."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; name a directory")
    if (out / SETTINGS).is_file():
        before = read_settings(out)
        theirs, ours = before["settings"], json.loads(json.dumps(settings))
        for key in sorted(theirs.keys() | ours.keys()):
            if theirs.get(key) != ours.get(key):
                raise UserError(
                    f"--out {out}: holds an evaluation with {key}={theirs.get(key)}, now {ours.get(key)}: choose "
                    "another --out, or keep it"
                )
        old, new = before["prompts"], [row.text for row in rows]
        if old != new:
            place = next((k for k, pair in enumerate(zip(old, new, strict=False)) if pair[0] != pair[1]), None)
            what = f"number {place} is another" if place is not None else f"{len(old)} of them, now {len(new)}"
            raise UserError(f"--out {out}: holds an evaluation of other prompts ({what}): choose another --out")
    elif out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise UserError(f"--out {out}: is not empty and holds no evaluation ({SETTINGS}); choose another")
    for source in sources:
        file = _source_file(out, source.name)
        if file.is_file() and (old := _read_json(file)).get("fingerprint") != source.fingerprint:
            raise UserError(
                f"{source.name}={source.path}: {out} has {source.name} with other weights ({old.get('path')}, checksum "
                f"{old.get('fingerprint')}, now {source.fingerprint}): choose another name, or another --out"
            )


def write_settings(
    out: Path, settings: dict[str, Any], rows: Sequence["PromptRow"], sources: Sequence["Source"]
) -> None:
    """What `check_directory` compares, for the next time; on rank 0."""
    write_json(out / SETTINGS, {"version": VERSION, "settings": settings, "prompts": [row.text for row in rows]})
    for source in sources:
        said = {"name": source.name, "path": str(source.path), "kind": source.kind, "fingerprint": source.fingerprint}
        write_json(_source_file(out, source.name), said)


def read_settings(out: Path) -> dict[str, Any]:
    """settings.json of an evaluation's directory; UserError where it is none."""
    content = _read_json(out / SETTINGS)
    if content.get("version") != VERSION or not isinstance(content.get("prompts"), list):
        raise UserError(f"{out / SETTINGS}: not of this version of `evaluate`; choose another --out")
    return content


def read_sources(out: Path) -> list[dict[str, Any]]:
    """Every checkpoint that was begun here, `base` first, then by name."""
    found = [_read_json(file) for file in sorted(out.glob("rows/*/source.json"))]
    return sorted(found, key=lambda source: (source["name"] != "base", source["name"]))


def _source_file(out: Path, name: str) -> Path:
    return out / "rows" / name / "source.json"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; is this the --out of an `evaluate`?") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); choose another --out") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a JSON object; choose another --out")
    return found


def write_json(path: Path, content: Any) -> Path:
    """Whole or not at all, and on the disk."""
    return write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> Path:
    """Whole or not at all, and on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def video_name(name: str, key: Key) -> str:
    """Relative to the evaluation's directory."""
    return f"videos/{name}/{key[0]:04d}_{key[1]:02d}.mp4"


def read_rows(out: Path, name: str) -> dict[Key, dict[str, Any]]:
    """Finished videos of one checkpoint: {(prompt, sample): row}; a score that is not finite is NaN.

    The last line of a file may be cut off; a video that is missing or of another size does not count as finished.
    Raises UserError for anything else that is broken.
    """
    found: dict[Key, dict[str, Any]] = {}
    for file in sorted((out / "rows" / name).glob("rank_*.jsonl")):
        whole = file.read_bytes().decode("utf-8", errors="replace").rpartition("\n")[0]
        for number, line in enumerate(whole.split("\n") if whole else [], start=1):
            try:
                row = json.loads(line)
                key = (int(row["prompt"]), int(row["sample"]))
                scores = {k: math.nan if v is None else float(v) for k, v in row["scores"].items()}
                video, size = row["video"], row["bytes"]
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise UserError(f"{file}, line {number}: not a row of an evaluation; delete the line") from error
            if video is None or _has_size(out / video, size):
                found[key] = row | {"scores": scores}
    return found


def _has_size(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size


class RowLog:
    """Appends this rank's rows for one checkpoint; each is on the disk before the next video is begun."""

    def __init__(self, out: Path, name: str, rank: int) -> None:
        self.path = out / "rows" / name / f"rank_{rank:05d}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab")
        content = self.path.read_bytes()
        if content and not content.endswith(b"\n"):  # cut off when this rank was killed
            self._file.truncate(content.rfind(b"\n") + 1)

    def append(self, key: Key, scores: dict[str, float], video: Path | None, out: Path) -> None:
        """`video`: the file that was written; None: the latents or pixels were not finite."""
        row = {
            "prompt": key[0],
            "sample": key[1],
            "scores": {k: v if math.isfinite(v) else None for k, v in scores.items()},
            "video": None if video is None else video.relative_to(out).as_posix(),
            "bytes": 0 if video is None else video.stat().st_size,
        }
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """The file."""
        self._file.close()
