"""Whole evaluations of a random tiny world: against training's own, resumed, killed, on several processes."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sage.__main__ import main
from megatron_sage.evaluation import store
from tests.evaluation import jobs
from tests.parallel.pool import run_on_ranks
from tests.resilience.test_kills import Runs
from tests.training import world

CLOSE = 1e-4  # a few of a video's 39168 numbers may round to another of 256 levels
VIDEOS = jobs.PROMPTS * jobs.SAMPLES
LORA = {"lora.rank": 2, "lora.targets": '["to_q","to_out.0"]', "lora.export": "merged", "optimizer.lr": 0.1}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    run_on_ranks(1, "tests.training.world:build", root=folder)
    return folder


def train(root: Path, name: str, **changes: Any) -> Path:
    """A run of one iteration with an evaluation of its own, by `training.evaluation`."""
    own = {
        "training.iterations": 1,
        "reward.function": "tests.training.world:BrightnessReward",
        "optimizer.lr": 3e-3,
        "evaluation.prompts": str(root / "prompts.txt"),
        "evaluation.samples_per_prompt": jobs.SAMPLES,
        "evaluation.num_steps": jobs.STEPS,
    }
    arguments = world.overrides(world.settings(root, name, **own | changes))
    run_on_ranks(1, "tests.training.world:train_job", arguments=arguments, processes=1)
    return root / name


@pytest.fixture(scope="module")
def trained(root: Path) -> Path:
    return train(root, "trained")


@pytest.fixture(scope="module")
def checkpoints(trained: Path) -> dict[str, Path]:
    return {"run": trained / "checkpoints/iteration_000001", "export": trained / "export"}


def evaluate(root: Path, out: Path, checkpoints: dict[str, Path], *more: str, ranks: int = 1, **changes: Any) -> Path:
    argv = jobs.arguments(root, out, checkpoints, *more, **changes)
    assert run_on_ranks(ranks, "tests.evaluation.jobs:evaluate_job", argv=argv, processes=ranks) == [0] * ranks
    return out


@pytest.fixture(scope="module")
def whole(root: Path, checkpoints: dict[str, Path]) -> Path:
    return evaluate(root, root / "whole", checkpoints)


def scores(out: Path, name: str) -> np.ndarray:
    """[videos, dimensions] in order."""
    rows = store.read_rows(out, name)
    return np.array([list(rows[key]["scores"].values()) for key in sorted(rows)])


def same_results(one: Path, other: Path) -> None:
    """Every number, bit for bit, and the same videos; x264 itself does not always write the same bytes."""
    assert (one / "results.csv").read_bytes() == (other / "results.csv").read_bytes()
    assert (one / "results.json").read_bytes() == (other / "results.json").read_bytes()
    for source in store.read_sources(one):
        mine, theirs = (store.read_rows(out, source["name"]) for out in (one, other))
        assert {k: row["scores"] for k, row in mine.items()} == {k: row["scores"] for k, row in theirs.items()}
        assert {k: row["video"] for k, row in mine.items()} == {k: row["video"] for k, row in theirs.items()}


def test_scores_are_those_that_training_finds(root: Path, trained: Path, whole: Path) -> None:
    """The run evaluated before and after its iteration with code of its own: same noise, so the same scores."""
    theirs = json.loads((trained / "evaluation.json").read_text())
    for name, moment in (("base", "before"), ("run", "after"), ("export", "after")):
        rows = theirs[moment]["samples"]
        expected = np.array([[row[d] for d in ("VQ", "MQ", "TA")] for row in rows])
        assert scores(whole, name) == pytest.approx(expected, abs=CLOSE), name
    assert np.abs(scores(whole, "run") - scores(whole, "base")).max() > 5e-3  # another model
    assert len(list((whole / "videos").rglob("*.mp4"))) == 3 * VIDEOS
    assert (whole / "gallery.html").is_file() and "| run |" in (whole / "results.md").read_text()


def test_resumed_is_uninterrupted_bit_for_bit(
    root: Path, checkpoints: dict[str, Path], whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "resumed"
    argv = jobs.arguments(root, out, checkpoints)
    said = run_on_ranks(1, "tests.evaluation.jobs:calls_job", argv=argv, processes=1, stop_after=4)
    assert said == [-1] and len(store.read_rows(out, "base")) == 4  # in the middle of a micro-batch
    evaluate(root, out, checkpoints)
    same_results(whole, out)
    before = {file: file.stat().st_mtime_ns for file in out.glob("videos/*/*.mp4")}
    rows = out / "rows/run/rank_00000.jsonl"
    rows.write_bytes(rows.read_bytes()[:-7])  # the last line is cut
    first = next(iter(sorted(before)))
    first.unlink()  # and a video is gone
    evaluate(root, out, checkpoints)
    same_results(whole, out)
    changed = {file for file, moment in before.items() if file.stat().st_mtime_ns != moment}
    assert len(changed) == 2 and first in changed  # nothing else was made again


LAYOUTS = [
    pytest.param({}, id="dp2"),
    pytest.param({"parallel.tensor": 2}, id="tp2"),
    pytest.param({"parallel.context": 2}, id="cp2", marks=pytest.mark.nightly),
    pytest.param({"parallel.pipeline": 2}, id="pp2", marks=pytest.mark.nightly),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_give_what_one_gives(
    root: Path,
    checkpoints: dict[str, Path],
    whole: Path,
    tmp_path: Path,
    layout: dict[str, Any],
) -> None:
    out = evaluate(root, tmp_path / "two", checkpoints, ranks=2, **layout)
    for name in ("base", *checkpoints):
        by_rank = [len(file.read_text().splitlines()) for file in sorted((out / "rows" / name).glob("*.jsonl"))]
        assert sum(by_rank) == VIDEOS and min(by_rank) >= 3, by_rank  # both work
        tolerance = 0 if not layout else CLOSE
        assert np.abs(scores(out, name) - scores(whole, name)).max() <= tolerance, name
    if not layout:
        same_results(whole, out)


def test_one_process_goes_on_where_two_were(
    root: Path, checkpoints: dict[str, Path], whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "mixed"
    shutil.copytree(whole, out)
    rows = (out / "rows/base/rank_00000.jsonl").read_text().splitlines(keepends=True)
    (out / "rows/base/rank_00000.jsonl").write_text("".join(rows[:2]))
    (out / "rows/base/rank_00001.jsonl").write_text(rows[5] + rows[7][:-3])
    evaluate(root, out, checkpoints)
    same_results(whole, out)


@pytest.mark.parametrize(
    ("more", "changes", "said"),
    [
        ([], {"seed": 4}, "with seed=3, now 4: choose another --out"),
        ([], {"sampler.guidance_scale": 3.0}, "sampler.guidance_scale=2.0, now 3.0"),
        ([], {"reward.function": "tests.training.world:SteadyReward"}, "reward.function=tests.training"),
        (["--steps", "5"], {}, "evaluation.num_steps=3, now 5"),
        (["--samples", "2"], {}, "evaluation.samples_per_prompt=3, now 2"),
        (["--limit", "2"], {}, "other prompts (3 of them, now 2)"),
        (["--prompts", "{root}/other.txt"], {}, "number 1 is another"),
        (["--checkpoint", "run={root}/megatron"], {}, "has run with other weights"),
        (["--checkpoint", "new={root}/trained"], {}, "no such directory"),
        (["--checkpoint", "new={trained}"], {}, "holds 1 checkpoints; name one of them, e.g."),
        (["--checkpoint", "base={root}/megatron"], {}, "is model.weights itself"),
        (["--checkpoint", "a/b={root}/megatron"], {}, "write NAME=PATH"),
        (["--checkpoint", "new={root}/hf/vae"], {}, "_class_name is"),
        (["--checkpoint", "new={root}"], {}, "neither a Megatron checkpoint"),
        (["--checkpoint", "new={small}"], {}, "is of another model, with num_layers 1"),
        (["--checkpoint", "new={torn}"], {}, "missing"),
        (["--out", "{root}/hf"], {}, "is not empty and holds no evaluation"),
        (["--limit", "0"], {}, "--limit 0: must be at least 1"),
        (["--steps", "0"], {}, "evaluation.num_steps=0"),
        (["--prompts", "{root}/none.txt"], {}, "No such file"),
        (["--no-base"], {}, "nothing is left to evaluate"),
    ],
)
def test_bad_input_is_one_line_before_the_first_collective(
    root: Path,
    trained: Path,
    whole: Path,
    small: Path,
    torn: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    changes: dict[str, Any],
    said: str,
) -> None:
    (root / "other.txt").write_text("\n".join([world.PROMPTS[0], "another", world.PROMPTS[2]]) + "\n")
    names = {"root": root if "root}/trained" not in "".join(more) else root / "nowhere", "trained": trained}
    filled = [text.format(**names, small=small, torn=torn) for text in more]
    monkeypatch.setattr("megatron_sage.evaluation.command.initialize_groups", lambda _: pytest.fail("a collective"))
    before = sorted(whole.rglob("*"))
    assert main(["evaluate", *jobs.arguments(root, whole, {}, *filled, **changes)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1, error
    assert sorted(whole.rglob("*")) == before


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model's weights."""
    folder = tmp_path_factory.mktemp("small")
    run_on_ranks(1, "tests.training.world:build", root=folder, num_layers=1)
    return folder / "megatron"


@pytest.fixture(scope="module")
def torn(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of which a file is gone."""
    folder = tmp_path_factory.mktemp("torn") / "megatron"
    shutil.copytree(root / "megatron", folder)
    next(folder.glob("*.distcp")).unlink()
    return folder


def test_changed_weights_under_an_old_name_are_refused(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same path with other content: where there is a manifest, and where there is none."""
    for manifest in (True, False):
        weights, out = tmp_path / f"weights{manifest}", tmp_path / f"out{manifest}"
        shutil.copytree(root / "megatron", weights)
        if not manifest:
            (weights / "manifest.json").unlink()
        evaluate(root, out, {"other": weights}, "--limit", "1", "--no-base")
        data = next(weights.glob("*.distcp"))
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
        if manifest:
            said = json.loads((weights / "manifest.json").read_text())
            said["files"][data.name]["crc32"] = "00000000"
            (weights / "manifest.json").write_text(json.dumps(said))
        argv = jobs.arguments(root, out, {"other": weights}, "--limit", "1", "--no-base")
        assert main(["evaluate", *argv]) == 2
        assert "has other with other weights" in capsys.readouterr().err


@pytest.mark.nightly
def test_adapters_of_a_run_and_their_base(
    root: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(root, "adapted", **LORA)
    path = run / "checkpoints/iteration_000001"
    adapters = {key: value for key, value in LORA.items() if key.startswith("lora.")}
    given = {"adapters": path, "merged": run / "export", "full": root / "trained/checkpoints/iteration_000001"}
    out = evaluate(root, tmp_path / "lora", given, **adapters)
    theirs = json.loads((run / "evaluation.json").read_text())
    for name, moment in (("base", "before"), ("adapters", "after"), ("merged", "after")):
        expected = np.array([[row[d] for d in ("VQ", "MQ", "TA")] for row in theirs[moment]["samples"]])
        assert scores(out, name) == pytest.approx(expected, abs=CLOSE), name
    # what was loaded before leaves nothing behind: full weights come after adapters
    assert np.abs(scores(out, "adapters") - scores(out, "base")).max() > 10 * CLOSE
    for name, same in (("full", "run"), ("base", "base")):
        assert np.abs(scores(out, name) - scores(whole, same)).max() <= CLOSE  # frozen linears have other last bits
    for changes, said in (({}, "set lora.rank=2"), (adapters | {"lora.rank": 3}, "lora.rank=3:")):
        assert main(["evaluate", *jobs.arguments(root, tmp_path / "x", {"a": path}, **changes)]) == 2
        assert said in capsys.readouterr().err
    two = evaluate(root, tmp_path / "two", {"adapters": path}, ranks=2, **adapters | {"parallel.tensor": 2})
    assert np.abs(scores(two, "adapters") - scores(out, "adapters")).max() <= CLOSE


@pytest.fixture(scope="module")
def runs(root: Path) -> Iterator[Runs]:
    found = Runs(root)
    yield found
    found.process.kill()
    found.process.wait()


class Evaluations:
    """Evaluations as processes of their own, out of the zygote."""

    def __init__(self, runs: Runs, argv: list[str], log: Path) -> None:
        self.runs, self.argv, self.log = runs, argv, log

    def start(self, ranks: int) -> list[int]:
        return self.runs.start_command(["evaluate", *self.argv], ranks, self.log)

    def wait(self) -> list[int]:
        return self.runs.wait()


KILLS = [(3, 1), pytest.param(20, 1, marks=pytest.mark.nightly), pytest.param(6, 2, marks=pytest.mark.nightly)]


@pytest.mark.parametrize(("kills", "ranks"), KILLS)
def test_killed_and_gone_on_is_uninterrupted(
    root: Path, checkpoints: dict[str, Path], whole: Path, runs: Runs, tmp_path: Path, kills: int, ranks: int
) -> None:
    """kill -9 when a random number of further rows is there, again and again."""
    chance, done = random.Random(kills), 0
    while done < kills:
        out = tmp_path / f"killed{done}"
        work = Evaluations(runs, jobs.arguments(root, out, checkpoints), tmp_path / "log.txt")
        while True:
            pids = work.start(ranks)
            target = count_rows(out) + chance.randrange(0, VIDEOS)
            deadline = time.monotonic() + 60
            while count_rows(out) < target and not any(map(ended, pids)) and time.monotonic() < deadline:
                time.sleep(0.001)
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            statuses = work.wait()
            done += -signal.SIGKILL in statuses
            if done >= kills or statuses == [0] * ranks:
                break
        work.start(ranks)
        assert work.wait() == [0] * ranks, (tmp_path / "log.txt").read_text()[-2000:]
        same_results(whole, out)


def count_rows(out: Path) -> int:
    return sum(file.read_bytes().count(b"\n") for file in out.glob("rows/*/*.jsonl"))


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
