"""Each fault of a machine, of versions and of files made on purpose, and the cure that doctor names."""

import json
import resource
from pathlib import Path

import pytest

from megatron_sage.diagnosis import machine, model_files, versions
from megatron_sage.diagnosis.finding import GIB, Finding


def only(found: object) -> Finding:
    (finding,) = list(found)  # type: ignore[call-overload]
    return finding


def test_rdma_ports_are_read_and_a_dead_one_is_named(tmp_path: Path) -> None:
    for name, state in (("mlx5_0", "4: ACTIVE"), ("mlx5_1", "1: DOWN")):
        port = tmp_path / name / "ports" / "1"
        port.mkdir(parents=True)
        for file, text in (("state", state), ("rate", "400 Gb/sec (4X NDR)"), ("link_layer", "InfiniBand")):
            (port / file).write_text(text + "\n")
    first, second = machine.rdma(8, machine.rdma_devices(tmp_path))
    assert first.status == "ok" and "400 Gb/sec" in first.detail
    assert second.status == "warning" and "port is DOWN" in second.detail and "ibstat mlx5_1" in second.detail


def test_no_rdma_matters_with_gpus_only(tmp_path: Path) -> None:
    assert machine.rdma_devices(tmp_path / "absent") == []
    assert only(machine.rdma(0, [])).status == "optional"
    found = only(machine.rdma(8, []))
    assert found.status == "warning" and "--device=/dev/infiniband" in found.detail


@pytest.mark.parametrize(
    ("gpus", "free", "status"), [(8, 64 * 2**20, "failed"), (8, GIB // 2, "warning"), (8, 16 * GIB, "ok"), (0, 1, "ok")]
)
def test_shared_memory(tmp_path: Path, gpus: int, free: int, status: str) -> None:
    found = only(machine.shared_memory(gpus, tmp_path, free))
    assert found.status == status and ("--shm-size" in found.detail) == (status != "ok")
    assert only(machine.shared_memory(gpus, tmp_path / "absent")).status == ("failed" if gpus else "warning")


def test_limits() -> None:
    files, locked = machine.files_and_locks(512, True, files=1024, locked=65536 * 1024)
    assert files.status == "failed" and "ulimit -n 65536" in files.detail
    assert locked.status == "warning" and "ulimit -l unlimited" in locked.detail
    for few in (
        machine.files_and_locks(8, False, 1024, 64),
        machine.files_and_locks(512, True, *[resource.RLIM_INFINITY] * 2),
    ):
        assert [finding.status for finding in few] == ["ok", "ok"]


@pytest.mark.parametrize(
    ("free", "kept", "status"),
    [(150, 3, "failed"), (350, 3, "warning"), (500, 3, "ok"), (500, None, "warning"), (9999, None, "ok")],
)
def test_disk(tmp_path: Path, free: int, kept: int | None, status: str) -> None:
    assert only(machine.disk(str(tmp_path / "runs" / "new"), 100, kept, free)).status == status


def test_an_output_dir_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = only(machine.disk(str(tmp_path / "file" / "run"), 100, 1))
    assert found.status == "failed" and "choose another output_dir" in found.detail


def test_versions_against_the_lock(tmp_path: Path) -> None:
    lock = tmp_path / "requirements.lock"
    lock.write_text("# comment\nav==18.1.0\nnumpy==2.4.6  # why\nabsent==1.0\n")
    have = {"av": "18.1.0", "numpy": "2.2.0"}
    found = only(versions.against_lock(have.get, lock))
    assert found.status == "warning" and "2 of 3 packages" in found.detail and "make setup" in found.detail
    assert "numpy 2.2.0 (locked 2.4.6)" in found.detail and "absent missing (locked 1.0)" in found.detail
    assert only(versions.against_lock({**have, "numpy": "2.4.6", "absent": "1.0"}.get, lock)).status == "ok"
    assert only(versions.against_lock(have.get, tmp_path / "none")).status == "optional"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.hv15 import write_pipeline

    return write_pipeline(tmp_path_factory.mktemp("model"), "i2v")


def statuses(root: Path) -> dict[str, Finding]:
    return {finding.name: finding for finding in model_files.directory_findings(root)}


def test_a_whole_pipeline_is_well(pipeline: Path) -> None:
    found = statuses(pipeline)
    assert set(found) >= {"transformer", "vae", "text encoders", "image encoder"}
    assert {finding.status for finding in found.values()} == {"ok"}, found


@pytest.mark.parametrize(
    ("part", "file", "name"),
    [
        ("transformer", "diffusion_pytorch_model.safetensors", "transformer"),
        ("vae", "diffusion_pytorch_model.safetensors", "vae"),
        ("text_encoder", "model.safetensors", "text encoders"),
        ("text_encoder_2", "model.safetensors", "text encoders"),
        ("image_encoder", "model.safetensors", "image encoder"),
    ],
)
@pytest.mark.parametrize("fault", ["cut", "absent"])
def test_a_file_that_is_cut_off_or_absent_is_named(pipeline: Path, part: str, file: str, name: str, fault: str) -> None:
    path = pipeline / part / file
    content = path.read_bytes()
    try:
        path.write_bytes(content[: len(content) // 2])
        if fault == "absent":
            path.unlink()
        found = statuses(pipeline)
    finally:
        path.write_bytes(content)
    assert found[name].status == "failed" and part in found[name].detail
    assert sum(finding.status == "failed" for finding in found.values()) == 1


def test_wrong_shapes_and_missing_parts(pipeline: Path, tmp_path: Path) -> None:
    config = pipeline / "transformer" / "config.json"
    text = config.read_text()
    try:
        config.write_text(json.dumps(json.loads(text) | {"num_layers": json.loads(text)["num_layers"] + 1}))
        assert statuses(pipeline)["transformer"].status == "failed"
    finally:
        config.write_text(text)
    assert statuses(tmp_path / "none")[str(tmp_path / "none")].status == "failed"
    (tmp_path / "model_config.json").write_text("{}")
    assert statuses(tmp_path)["VideoAlign"].status == "failed"
