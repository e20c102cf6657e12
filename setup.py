"""Package metadata; the packages are top-level folders, as they stand in the repository."""

from pathlib import Path

from setuptools import setup

EVAL = ["opencv-python-headless>=4.10", "matplotlib>=3.9"]  # tracking points, drawing plots

setup(
    name="customttt",
    version="0.1.0",
    description="Personal video generation that a person can read: CustomTTT and Customize-A-Video in plain PyTorch",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=["model", "lora", "weights", "sampling", "train", "eval"],
    package_data={"weights": ["tiny/*", "tiny/**/*"], "eval": ["judge.safetensors", "pairs/*.csv"]},
    py_modules=["customttt"],
    install_requires=[
        "torch>=2.6,<2.14",
        "transformers>=5.6",
        "safetensors>=0.4.5",
        "einops>=0.8",
        "lion-pytorch>=0.2",
        "av>=17",
        "numpy>=1.26",
        "tqdm",
        "huggingface_hub>=1,<3",
        "pyyaml",
        "jsonargparse[signatures]>=4.40",
    ],
    extras_require={
        "eval": EVAL,
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "diffusers>=0.42,<0.43",
            "peft>=0.17",
            "pillow>=10",
            "hypothesis>=6.100",
            "accelerate",
            *EVAL,
        ],
        "dev": ["ruff>=0.9", "mypy>=1.14", "pre-commit>=4", "types-PyYAML", "types-tqdm"],
    },
    entry_points={"console_scripts": ["customttt=customttt:main"]},
)
