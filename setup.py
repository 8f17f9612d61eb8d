"""Package metadata. `make setup` installs the exact versions of requirements.lock; the ranges here are what fits."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

CORE = [
    # `make setup` installs torch first and on its own (requirements-torch.txt): as a mere dependency pip would fetch
    # the newest CUDA build, several GB. The range holds the releases that the rest of this list was chosen for.
    "torch>=2.11,<2.14",
    "megatron-core==0.16.*",  # the last minor release whose metadata admits Python 3.11
    "einops>=0.8,<0.9",  # megatron-core imports it without declaring it
    "psutil>=7,<8",  # likewise; without it a distributed checkpoint save hangs
    "diffusers>=0.42,<0.43",  # its HunyuanVideo-1.5 classes are the reference of the parity checks
    "transformers>=5.23,<6",
    "accelerate>=1.15,<2",  # diffusers loads large checkpoints through it
    "safetensors>=0.8,<0.9",
    "huggingface-hub>=2.4,<3",
    "numpy>=2.2,<3",
    "pillow>=12",
    "omegaconf>=2.3,<2.4",  # 2.4 conflicts with hydra-core 1.3
    "PyYAML>=6,<7",
    "rich>=14,<16",
    "matplotlib>=3.10,<4",
    "scipy>=1.16,<2",  # the statistics of `study`
    "av>=16,<19",  # 18 is the last for Python 3.11
    "tensorboard>=2.20,<3",
    "packaging>=24.2",
    "urllib3>=2.5,<3",  # the client of a reward server
]

EXTRAS = {
    # The range that megatron-core 0.16 names.
    "gpu": ["transformer-engine[core_cu13,pytorch]>=2.9,<2.12"],
    "deepspeed": ["deepspeed>=0.19,<0.20"],
    "dali": ["nvidia-dali-cuda130>=1.52,<3"],
    "parquet": ["pyarrow>=21,<27"],
    "wandb": ["wandb>=0.22,<0.32"],
    "rewards": ["ray[serve]>=2.60,<3", "fastapi>=0.141,<1"],  # `serve-rewards`; its client needs urllib3 alone
    "dev": [
        "pytest>=9,<10",
        "pytest-timeout>=2.4,<3",
        "pytest-xdist>=3.8,<4",
        "hypothesis>=6.150,<7",
        "peft>=0.21,<0.22",  # the judge of the adapters
        "ray[serve]>=2.60,<3",
        "fastapi>=0.141,<1",
        "pyarrow>=21,<27",
        "nvidia-dali-cuda130>=1.52,<3",  # its CPU pipelines are compared with Pillow
        "selenium>=4.40,<5",  # reports in Debian's Chromium
        "wandb>=0.22,<0.32",  # in offline mode
        "ruff>=0.17,<0.18",
        "mypy>=2.4,<3",
        "types-PyYAML>=6,<7",
        "pre-commit>=4.5,<5",
        "setuptools>=77",
    ],
}


def version() -> str:
    """The package's version, read without importing it."""
    text = (ROOT / "megatron_sage" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'__version__ = "([^"]+)"', text)
    if found is None:
        raise RuntimeError("megatron_sage/__init__.py has no __version__")
    return found.group(1)


def long_description() -> str:
    """The README, where there is one."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.is_file() else ""


setup(
    name="megatron-sage",
    version=version(),
    description="SAGE-GRPO alignment of HunyuanVideo-1.5 on Megatron-core",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["megatron_sage", "megatron_sage.*"]),
    package_data={
        "megatron_sage": [
            "py.typed",
            "**/*.html",
            "**/*.css",
            "**/*.js",
            "**/*.json",
            "**/*.txt",
            "planning/gpus/*.yaml",
        ]
    },
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["megatron-sage = megatron_sage.__main__:main"]},
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
