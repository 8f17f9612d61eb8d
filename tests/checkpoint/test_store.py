"""Checkpoints appear whole or not at all, are thinned out as asked, and refused in one line when damaged."""

import io
import json
import os
import pickle
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

from megatron_sage.checkpoint import saving, torch_dist
from megatron_sage.checkpoint.store import CheckpointStore, complete, newest, opened
from megatron_sage.errors import UserError
from megatron_sage.parallel.groups import Groups, initialize
from tests import disk
from tests.parallel.pool import run_on_ranks


@pytest.fixture(scope="module", autouse=True)
def groups() -> Groups:
    return initialize()


def state(value: float = 1.0, elements: int = 1000) -> dict[str, Any]:
    weights = torch.arange(elements, dtype=torch.float32) * value
    return {
        "weights": ShardedTensor.from_rank_offsets("a.weight", weights),
        "steps": ShardedObject("run.object", {"step": 3}, (1,), (0,)),
        "common": {"lr": 0.5},
    }


def save(directory: Path, *iterations: int, **options: Any) -> CheckpointStore:
    checkpoints = CheckpointStore(directory, **options)
    for iteration in iterations:
        checkpoints.save(iteration, state(iteration), {"state.json": json.dumps({"iteration": iteration})})
    checkpoints.finish()
    return checkpoints


def load(path: Path) -> tuple[torch.Tensor, dict[str, Any]]:
    _, plain = opened(path)
    wanted = state(0.0)
    loaded = dist_checkpointing.load(wanted, str(path))
    assert loaded["steps"] == {"step": 3} and loaded["common"] == {"lr": 0.5}
    return loaded["weights"], plain


@pytest.mark.parametrize("background", [False, True])
def test_what_was_saved_comes_back(tmp_path: Path, background: bool) -> None:
    save(tmp_path / "run", 3, 7, background=background)
    found = newest(tmp_path / "run")
    assert found is not None and found.name == "iteration_000007"
    weights, plain = load(found)
    assert torch.equal(weights, torch.arange(1000) * 7.0) and plain == {"iteration": 7}
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"iteration_000003", "iteration_000007"}


def test_a_background_save_holds_what_was_there_when_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors change while it is written, and it is invisible until then."""
    released, write = threading.Event(), saving.StreamingWriter.write

    def slow(self: saving.StreamingWriter) -> Any:
        assert released.wait(30)
        return write(self)

    monkeypatch.setattr(saving.StreamingWriter, "write", slow)
    checkpoints = CheckpointStore(tmp_path, background=True)
    content = state(2.0)
    checkpoints.save(1, content, {"state.json": "{}"})
    content["weights"].data.zero_()
    checkpoints.poll()
    assert newest(tmp_path) is None
    released.set()
    checkpoints.finish()
    weights, _ = load(tmp_path / "iteration_000001")
    assert torch.equal(weights, torch.arange(1000) * 2.0)


@given(
    iterations=st.lists(st.integers(1, 60), min_size=1, max_size=8, unique=True).map(sorted),
    last=st.integers(1, 4) | st.none(),
    every=st.integers(1, 9) | st.none(),
)
@settings(max_examples=12, deadline=None)
def test_what_stays(iterations: list[int], last: int | None, every: int | None) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        save(Path(directory), *iterations, keep_last=last, keep_every=every)
        stay = {i for i in iterations if last is None or i in iterations[-last:] or (every and i % every == 0)}
        assert {path.name for path in Path(directory).iterdir()} == {f"iteration_{i:06d}" for i in stay}


def test_an_iteration_is_not_written_twice(tmp_path: Path) -> None:
    save(tmp_path, 4)
    before = (tmp_path / "iteration_000004" / "manifest.json").stat().st_mtime_ns
    save(tmp_path, 4)
    assert (tmp_path / "iteration_000004" / "manifest.json").stat().st_mtime_ns == before


def test_what_a_killed_process_left_is_removed_and_never_seen(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for name in (".iteration_000002.partial", ".iteration_000000.deleted"):
        shutil.copytree(tmp_path / "iteration_000001", tmp_path / name)
    found = newest(tmp_path)
    assert found is not None and found.name == "iteration_000001"
    CheckpointStore(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["iteration_000001"]


def data_file(path: Path) -> Path:
    return next(path.glob("*.distcp"))


def flip(offset: Callable[[int], int], name: str | None = None) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        file = data_file(path) if name is None else path / name
        content = bytearray(file.read_bytes())
        content[offset(len(content))] ^= 16
        file.write_bytes(content)

    return change


def cut(name: str | None = None) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        file = data_file(path) if name is None else path / name
        os.truncate(file, file.stat().st_size // 2)

    return change


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit in the middle": (flip(lambda n: n // 2), "damaged: checksum"),
    "first bit": (flip(lambda n: 0), "damaged: checksum"),
    "last bit": (flip(lambda n: n - 1), "damaged: checksum"),
    "bit of the table": (flip(lambda n: n // 2, ".metadata"), "damaged: checksum"),
    "bit of the state": (flip(lambda n: n // 2, "state.json"), "damaged: checksum"),
    "bit of the common state": (flip(lambda n: n // 2, "common.pt"), "damaged: checksum"),
    "cut": (cut(), "truncated"),
    "table cut": (cut(".metadata"), "truncated"),
    "manifest cut": (cut("manifest.json"), "unreadable"),
    "data missing": (lambda path: data_file(path).unlink(), "missing"),
    "state missing": (lambda path: (path / "state.json").unlink(), "missing"),
    "manifest missing": (lambda path: (path / "manifest.json").unlink(), "manifest.json: missing"),
    "manifest empty": (lambda path: (path / "manifest.json").write_text("{}"), "lists no files"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damage_is_refused_in_one_line(tmp_path: Path, fault: str) -> None:
    save(tmp_path, 1, 2)
    change, said = FAULTS[fault]
    change(tmp_path / "iteration_000002")
    with pytest.raises(UserError, match=said) as caught:
        opened(tmp_path / "iteration_000002")
    assert "\n" not in str(caught.value) and "iteration_000002" in str(caught.value)
    load(tmp_path / "iteration_000001")


@settings(max_examples=25, deadline=None)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), data=st.data())
def test_any_flipped_bit_is_noticed(where: float, bit: int, data: st.DataObject, tmp_path_factory: Any) -> None:
    path = _once(tmp_path_factory) / "iteration_000001"
    file = data.draw(st.sampled_from(sorted(p for p in path.iterdir() if p.name != "manifest.json")))
    content = file.read_bytes()
    broken = bytearray(content)
    broken[int(where * len(broken))] ^= 1 << bit
    file.write_bytes(broken)
    try:
        with pytest.raises(UserError, match="damaged"):
            opened(path)
    finally:
        file.write_bytes(content)


_saved: list[Path] = []


def _once(factory: Any) -> Path:
    if not _saved:
        _saved.append(factory.mktemp("flips"))
        save(_saved[0], 1)
    return _saved[0]


class Evil:
    """Unpickled, it leaves a file behind."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.file}",))


def trust(path: Path) -> None:
    """A manifest that fits: whoever writes the files writes that too."""
    files = {
        file.name: {"bytes": file.stat().st_size, "crc32": f"{torch_dist.file_checksum(file):08x}"}
        for file in path.iterdir()
        if file.name != "manifest.json"
    }
    (path / "manifest.json").write_text(json.dumps({"files": files}))


@pytest.mark.parametrize("where", [".metadata", "common.pt", "object"])
def test_nothing_is_unpickled(tmp_path: Path, where: str) -> None:
    save(tmp_path / "run", 1)
    path, trace = tmp_path / "run" / "iteration_000001", tmp_path / "trace"
    if where == ".metadata":
        (path / where).write_bytes(pickle.dumps(Evil(trace)))
    elif where == "common.pt":
        torch.save({"plain": Evil(trace)}, path / where)
    else:
        content, table = io.BytesIO(), pickle.loads((path / ".metadata").read_bytes())
        torch.save(Evil(trace), content)
        (index,) = [index for index in table.storage_data if index.fqn.startswith("run.object")]
        info = table.storage_data[index]
        file = path / info.relative_path
        table.storage_data[index] = type(info)(info.relative_path, file.stat().st_size, len(content.getvalue()))
        with file.open("ab") as out:
            out.write(content.getvalue())
        (path / ".metadata").write_bytes(pickle.dumps(table))
    trust(path)
    with pytest.raises(UserError) as caught:
        opened(path)
    assert "\n" not in str(caught.value) and not trace.exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with disk.small_disk(tmp_path / "disk", "1m") as mount:
        yield mount


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("free", [0, 3, 20, 150])
def test_a_full_disk_leaves_the_checkpoint_before(small_disk: Path, free: int, background: bool) -> None:
    """Full at different moments: at the first file, in the data, at the tables."""
    save(small_disk / "run", 1)
    filler = small_disk / "filler"
    with filler.open("wb") as out:  # all but `free` kB
        out.write(b"\0" * (shutil.disk_usage(small_disk).free // 4096 * 4096 - free * 1024 // 4096 * 4096))
    checkpoints = CheckpointStore(small_disk / "run", background=background)
    with pytest.raises(UserError, match="No space left on device") as caught:
        checkpoints.save(2, state(2.0, elements=60_000), {"state.json": "{}"})
        checkpoints.finish()
    assert "\n" not in str(caught.value)
    assert [path.name for path in (small_disk / "run").iterdir()] == ["iteration_000001"]
    load(small_disk / "run" / "iteration_000001")
    filler.unlink()
    checkpoints.save(2, state(2.0, elements=60_000), {"state.json": "{}"})  # and it can go on
    checkpoints.finish()
    assert len(complete(small_disk / "run")) == 2


def test_a_read_only_directory_is_refused(small_disk: Path) -> None:
    save(small_disk / "run", 1)
    checkpoints = CheckpointStore(small_disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(UserError, match="cannot write here"):
        checkpoints.save(2, state(2.0), {"state.json": "{}"})
    load(small_disk / "run" / "iteration_000001")


def fail_on_one_rank(directory: Path, when: str) -> str:
    initialize()
    rank = torch.distributed.get_rank()
    save_once = CheckpointStore(directory, background=when == "background")
    original = saving.StreamingWriter.write

    def full(self: saving.StreamingWriter) -> Any:
        if rank == 1:
            raise OSError(28, "No space left on device")
        return original(self)

    saving.StreamingWriter.write = full  # type: ignore[method-assign]
    content = {"w": ShardedTensor.from_rank_offsets("w", torch.full((4,), float(rank)), (0, rank, 2))}
    try:
        save_once.save(1, content, {"state.json": "{}"})
        save_once.finish()
    except UserError as error:
        return str(error)
    finally:
        saving.StreamingWriter.write = original  # type: ignore[method-assign]
    return ""


@pytest.mark.parametrize("when", ["at once", "background"])
def test_one_rank_without_space_stops_them_all(tmp_path: Path, when: str) -> None:
    function = "tests.checkpoint.test_store:fail_on_one_rank"
    found = run_on_ranks(2, function, directory=tmp_path / "run", when=when)
    assert all("No space left on device" in message for message in found)
    assert list((tmp_path / "run").iterdir()) == []
