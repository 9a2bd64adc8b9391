"""Packages of fedsim. ``algorithms/``, ``envs/`` and ``configs/`` stand at the top, where their users look for them;
they are imported as ``fedsim.algorithms``, ``fedsim.envs`` and ``fedsim.configs``."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "fedsim" / "__init__.py").read_text(encoding="utf-8")).group(1)

setup(
    name="fedsim-ray",
    version=VERSION,
    description="Simulates personalised federated adapter tuning of vision transformers at scale, on Ray",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[
        "fedsim",
        "fedsim.models",
        "fedsim.sequence",
        "fedsim.tracking",
        "fedsim.algorithms",
        "fedsim.envs",
        "fedsim.configs",
    ],
    package_dir={
        "fedsim": "fedsim",
        "fedsim.algorithms": "algorithms",
        "fedsim.envs": "envs",
        "fedsim.configs": "configs",
    },
    package_data={"fedsim": ["py.typed", "page.html", "grafana.json"], "fedsim.configs": ["*.yaml", "sweeps/*.yaml"]},
    # Lower bounds are tested, too: the tests pass with exactly these.
    install_requires=[
        "torch>=2.6",  # torch.func.functional_call over a leading client axis
        "torchvision>=0.21",  # CIFAR as published
        "timm>=1.0.22",  # the frozen backbones; the first that can be built on the meta device
        "ray[default,tune]>=2.60",  # actors, object store, dashboard, sweeps; local clusters ask for a token by default
        "numpy>=1.26",
        "omegaconf>=2.3.0",  # YAML and key=value overrides
        "pyyaml>=6.0.1",
        "safetensors>=0.4.3",  # weights and checkpoints that cannot execute code
        "tensorboard>=2.16.2",
        "pillow>=10.0.1",  # decoding images
        "rich>=13.0",  # progress line and tables
        "psutil>=5.9.8",  # memory plans and measurements
    ],
    extras_require={
        "report": ["matplotlib>=3.8", "jinja2>=3.1"],
        "wandb": ["wandb>=0.19"],
        "mlflow": ["mlflow>=2.14"],
        "docs": ["mkdocs>=1.6", "mkdocs-material>=9.8", "mkdocstrings>=1.0", "mkdocstrings-python>=2.0"],  # Python 3.11
        "test": [
            "pytest>=8.0",
            "pytest-timeout>=2.3",
            "hypothesis>=6.100",  # inputs that nobody meant
            "matplotlib>=3.8",
            "jinja2>=3.1",
            "ruff>=0.8",
            "mypy>=1.13",
        ],
    },
    entry_points={"console_scripts": ["fedsim = fedsim.__main__:main"]},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
