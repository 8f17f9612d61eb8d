"""doctor: complete on this machine, and a missing or unfit piece is named with its cure."""

import json
import sys
import types
from pathlib import Path

import pytest

from megatron_sage import doctor


@pytest.fixture
def without_self_checks(monkeypatch):
    """They start torch.distributed, which another test of this process may be using."""
    monkeypatch.setattr(doctor, "_self_checks", lambda: iter(()))


def test_report_as_json(capsys, without_self_checks):
    assert doctor.main(["--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    by_name = {finding["name"]: finding for finding in findings}
    for name in ("python", "torch", "megatron-core", "diffusers", "transformers", "av", "gloo"):
        assert by_name[name]["status"] == "ok", by_name[name]
    assert {"transformer-engine", "apex", "deepspeed", "nvidia-dali-cuda130"} <= set(by_name)
    assert by_name["optimizer"]["section"] == "will be used" and "Adam" in by_name["optimizer"]["detail"]
    assert {finding["status"] for finding in findings} <= {"ok", "optional", "warning", "failed"}


def test_a_missing_package_fails_and_is_named(capsys, monkeypatch, without_self_checks):
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "einops" else real(name))
    assert doctor.main([]) == 1
    out, err = capsys.readouterr()
    assert err == "error: einops: not installed; make setup\n"
    assert "will be used" not in out, "imports that must fail are not tried"


def test_an_old_package_fails_with_the_range_it_misses(capsys, monkeypatch, without_self_checks):
    monkeypatch.setattr(doctor, "requires", lambda _: ["einops<0.9,>=0.8", 'scipy; extra == "dev"'])
    monkeypatch.setattr(doctor, "_version", lambda name: "0.3.0")
    findings = list(doctor._packages())
    assert next((f.name, f.status) for f in findings) == ("einops", "failed")
    assert findings[0].detail.startswith("0.3.0 does not fit") and ">=0.8" in findings[0].detail


def test_a_torchvision_of_another_torch_fails(monkeypatch):
    def broken(name: str) -> types.ModuleType:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(doctor, "_version", lambda name: "0.28.0")
    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    finding = doctor._torchvision()
    assert finding.status == "failed"
    assert "torchvision::nms" in finding.detail and "pip uninstall torchvision" in finding.detail


def test_pypis_apex_is_not_mistaken_for_nvidias(monkeypatch, tmp_path: Path):
    package = tmp_path / "apex"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('must not be imported to be recognised')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert doctor._apex().status == "warning" and "PyPI" in doctor._apex().detail
    (package / "optimizers").mkdir()
    assert "without its CUDA extensions" in doctor._apex().detail
    (tmp_path / "amp_C.py").write_text("")
    assert doctor._apex() == doctor.Finding("optional", "apex", "ok", "NVIDIA's")
    assert "apex" not in sys.modules


def test_self_checks_report_what_breaks(monkeypatch):
    def broken() -> str:
        raise OSError("no codec")

    monkeypatch.setattr(doctor, "_check_all_reduce", lambda: "fine")
    monkeypatch.setattr(doctor, "_check_video", broken)
    statuses = {finding.name: (finding.status, finding.detail) for finding in doctor._self_checks()}
    assert statuses["all_reduce"][0] == "ok"
    assert statuses["video"] == ("failed", "OSError: no codec")


def test_video_self_check_runs():
    assert "9 frames" in doctor._check_video()
