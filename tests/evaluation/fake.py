"""An evaluation's directory with made-up scores and clips, as `evaluate` leaves it."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_sage.evaluation import store
from megatron_sage.reporting.video import write_mp4

PROMPTS = ["a red circle", "a </script><b>\"bold\"</b> & 'quoted' square", "ein Dreieck – 三角形 🔺 \u2028 <!-- x"]
DIMENSIONS = ("VQ", "MQ", "TA")


def clip(seed: int, frames: int = 17, height: int = 32, width: int = 48) -> np.ndarray:
    """A square that moves; its colour tells the seed."""
    rng = np.random.default_rng(seed)
    colour = rng.integers(90, 250, 3)
    video = np.full((frames, height, width, 3), 25, np.uint8)
    for place in range(frames):
        video[place, 8:22, 2 + place : 16 + place] = colour
    return video


def scores(name: str, prompt: int, sample: int) -> dict[str, float]:
    rng = np.random.default_rng([*name.encode(), prompt, sample])
    lift = 0.0 if name == "base" else 0.4
    return {dimension: float(np.round(rng.normal(lift, 1.0), 3)) for dimension in DIMENSIONS}


def write_evaluation(
    out: Path,
    names: Sequence[str] = ("base", "sage"),
    prompts: Sequence[str] = PROMPTS,
    samples: int = 2,
    broken: Sequence[tuple[str, int, int]] = (),
    weights: dict[str, float] | None = None,
    scale: int = 4,
) -> Path:
    """`broken`: (checkpoint, prompt, sample) of videos that were not finite."""
    weights = weights or {"VQ": 0.5, "MQ": 0.5, "TA": 1.0}
    settings = {"evaluation.samples_per_prompt": samples, "seed": 0}
    settings |= {f"reward.weights.{name}": weight for name, weight in weights.items()}
    store.write_json(out / store.SETTINGS, {"version": store.VERSION, "settings": settings, "prompts": list(prompts)})
    for number, name in enumerate(names):
        said = {"name": name, "path": f"runs/{name}", "kind": "weights", "fingerprint": f"{number:016x}"}
        store.write_json(out / "rows" / name / "source.json", said)
        log = store.RowLog(out, name, 0)
        for prompt in range(len(prompts)):
            for sample in range(samples):
                key = (prompt, sample)
                if (name, *key) in broken:
                    log.append(key, dict.fromkeys(DIMENSIONS, math.nan), None, out)
                    continue
                video = write_mp4(
                    out / store.video_name(name, key), clip(100 * number + 10 * prompt + sample), 16, scale
                )
                log.append(key, scores(name, *key), video, out)
        log.close()
    return out


def embedded_data(page: Path) -> dict:
    """The JSON in a page."""
    text = page.read_text(encoding="utf-8")
    begin = text.index('<script type="application/json" id="data">') + len('<script type="application/json" id="data">')
    return json.loads(text[begin : text.index("</script>", begin)])
