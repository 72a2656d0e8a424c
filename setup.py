"""Package description; the versions that the tests run with are in constraints.txt."""

from setuptools import find_packages, setup

setup(
    name="dalle_scale",
    version="0.1.0",
    description="Train image generators from captioned images at any size",
    author="the dalle_scale authors",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["dalle_scale", "dalle_scale.*"]),
    package_data={"dalle_scale.nn": ["*.c", "*.cpp"], "dalle_scale.report": ["templates/*"]},
    install_requires=[
        "torch>=2.6",
        "torchvision>=0.21",
        "deepspeed>=0.19.2,<0.20",
        "webdataset>=1.0",
        "transformers>=5.0",
        "sentencepiece>=0.2.3",
        "open-clip-torch>=3.0",
        "simplejpeg>=1.9",
        "pillow>=12",
        "pyarrow>=20",
        "fsspec>=2025.3",
        "aiohttp>=3.12",
        "yarl>=1.17",
        "isal>=1.7",
        "py3langid>=0.3",
        "numpy>=2.0",
        "pydantic>=2.6",
        "pyyaml>=6.0",
        "safetensors>=0.5",
        "jinja2>=3.1",
        "tensorboard>=2.18",
        "tqdm>=4.66",
    ],
    extras_require={
        "test": [
            "pytest>=9.0",
            "pytest-random-order>=1.2",
            "pytest-timeout>=2.4",
            "pytest-xdist>=3.8",
            "hypothesis>=6.100",
            "vector-quantize-pytorch>=1.30",  # an independent quantizer
            "diffusers>=0.42",  # independent diffusion steps
            "torch-fidelity>=0.4,<0.5",
            "torchmetrics>=1.4",  # other implementations of SSIM, LPIPS and the Frechet distance
            "triton>=3.4; platform_system == 'Linux'",  # comes with torch for CUDA, not with torch for CPUs
            "ruff",
            "mypy",
            "types-PyYAML",
        ],
        "eval": ["torch-fidelity>=0.4,<0.5"],  # the Inception of FID
        "benchmarks": ["matplotlib>=3.10"],
        "wandb": ["wandb"],
    },
)
