"""Versions that agree with each other, and a tree that mentions no machine."""

import ast
import re
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]


def lock() -> dict[str, Version]:
    """Pinned versions by canonical name."""
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if line and line[0] != "#"]
    pins = [re.fullmatch(r"([A-Za-z0-9._-]+)==([^\s;]+)", line) for line in lines]
    assert all(pins), [line for line, pin in zip(lines, pins, strict=True) if pin is None]
    names = [canonicalize_name(pin[1]) for pin in pins if pin]
    assert len(names) == len(set(names)), "a package is pinned twice"
    return {canonicalize_name(pin[1]): Version(pin[2]) for pin in pins if pin}


def declared() -> dict[str, list[Requirement]]:
    """The lists of setup.py, read without running it."""
    found: dict[str, list[Requirement]] = {}
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            if node.targets[0].id == "CORE":
                found["core"] = [Requirement(text) for text in ast.literal_eval(node.value)]
            if node.targets[0].id == "EXTRAS":
                for extra, texts in ast.literal_eval(node.value).items():
                    found[extra] = [Requirement(text) for text in texts]
    return found


@pytest.mark.parametrize("group", ["core", "dev"])
def test_lock_satisfies_the_ranges(group):
    pins = lock()
    for requirement in declared()[group]:
        if requirement.name != "torch":
            pinned = pins[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(pinned, prereleases=True), f"{requirement}: lock has {pinned}"


def test_lock_holds_no_torch_and_no_cuda():
    dali = r"nvidia-(dali|libnvcomp|nvimgcodec|nvjpeg|nvtiff)"  # its decoders: nothing of theirs is torch's
    banned = r"(torch|torchvision|torchaudio|triton|nvidia|cuda|cupy)"
    wrong = [name for name in lock() if re.match(banned, name) and not re.match(dali, name)]
    assert not wrong


def test_torch_pin_fits_the_range():
    lines = (ROOT / "requirements-torch.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and line[0] != "#"]
    accepted = next(r for r in declared()["core"] if r.name == "torch").specifier
    assert {pin.name for pin in pins} == {"torch"}
    for pin in pins:
        (only,) = pin.specifier
        assert only.operator == "==" and accepted.contains(only.version)
    linux = [pin for pin in pins if pin.marker and pin.marker.evaluate({"sys_platform": "linux"})]
    assert [str(pin.specifier) for pin in linux] == [f"=={next(iter(linux[0].specifier)).version}"]
    assert "+cpu" in str(linux[0].specifier), "on Linux only the CPU build may match, or pip would fetch CUDA"


def test_extras_are_there():
    assert set(declared()) == {"core", "gpu", "deepspeed", "dali", "parquet", "rewards", "dev", "wandb"}
    everything = [canonicalize_name(r.name) for group in declared().values() for r in group]
    assert not {"apex", "torchvision", "torchaudio"} & set(everything), "apex on PyPI is not NVIDIA's"


def test_imports_of_the_package_are_declared():
    """Every outside package that a module imports at its top stands in setup.py's core list.

    Two modules are for an extra: `model.specs` and `serve-rewards` import them where they are asked for.
    """
    extras = {"te_linear.py": {"transformer-engine"}, "deployments.py": {"ray", "fastapi", "starlette"}}
    distributions = {
        "yaml": "pyyaml",
        "PIL": "pillow",
        "megatron": "megatron-core",
        "huggingface_hub": "huggingface-hub",
    }
    core = {canonicalize_name(r.name) for r in declared()["core"]}
    import sys

    for path in (ROOT / "megatron_sage").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            else:
                continue
            for name in {name.partition(".")[0] for name in names} - {"megatron_sage"} - set(sys.stdlib_module_names):
                allowed = core | extras.get(path.name, set())
                assert canonicalize_name(distributions.get(name, name)) in allowed, f"{path}: {name}"


def tracked() -> list[Path]:
    """Text files of the tree: git's where this is a checkout, else those of the known folders."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode == 0 and listing.stdout:
        paths = [ROOT / name for name in listing.stdout.split("\0") if name]
    else:
        paths = [
            p for folder in ("megatron_sage", "tests", "examples", "tools", "docs") for p in (ROOT / folder).rglob("*")
        ]
    endings = {".py", ".md", ".txt", ".toml", ".yaml", ".yml", ".sh", ".cfg", ".lock", ".html", ""}
    return [path for path in paths if path.is_file() and path.suffix in endings]


def test_no_file_mentions_a_machine():
    """Paths of the machine that wrote a file work nowhere else."""
    pattern = re.compile(r"/(?:work|root|opt/wheels|home/\w+)/|\.\./shared\b")
    for path in tracked():
        if path == Path(__file__).resolve():
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert not pattern.search(line), f"{path.relative_to(ROOT)}:{number}: {line.strip()}"


def test_scripts_are_executable_and_sound():
    for name in ("tools/setup_env.sh", ".ci/run"):
        path = ROOT / name
        assert path.stat().st_mode & 0o100, f"{name} is not executable"
        checked = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, timeout=30, check=False)
        assert checked.returncode == 0, checked.stderr


def test_makefile_has_what_the_readme_promises():
    makefile = (ROOT / "Makefile").read_text()
    for target in ("setup", "quickstart", "test", "test-long", "lint", "clean"):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    assert re.search(r"^test: setup", makefile, re.MULTILINE)
    assert re.search(r"^quickstart: setup", makefile, re.MULTILINE)
