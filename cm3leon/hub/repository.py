"""Models on the Hugging Face Hub: found in its cache, downloaded, and uploaded by `push`.

The library `huggingface_hub` has its own settings: HF_HUB_OFFLINE=1 reads only the cache, HF_HOME
is where the cache lies, and the token is that of HF_TOKEN or of the library's login. No token is
read, written or logged here.
"""

from __future__ import annotations

import glob
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cm3leon.hub.folder import EXTRAS, IMAGE_TOKENIZER, is_hub_folder
from cm3leon.loggers.base import reason
from cm3leon.stages.files import GEOMETRY, TOKENIZER, WEIGHTS
from cm3leon.tokenizers.text import LAYOUT
from cm3leon.types import UserError
from cm3leon.weights import ADAPTERS

NAME = re.compile(r"[\w.-]+/[\w.-]+")
"""A model on the Hub, as org/name."""
READ = ["*.json", "*.safetensors"]
"""What is downloaded: settings and weights, but no pickles, no code and no images."""
UPLOADED = (
    "README.md",
    "sample*.png",
    "config.json",
    "generation_config.json",
    EXTRAS,
    WEIGHTS,
    "model-?????-of-?????.safetensors",
    f"{WEIGHTS}.index.json",
    TOKENIZER,
    "tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    LAYOUT,
    f"{IMAGE_TOKENIZER}/*.safetensors",
    f"{IMAGE_TOKENIZER}/config.json",
    f"{IMAGE_TOKENIZER}/{GEOMETRY}",
    *ADAPTERS[:2],
)
"""What `export` writes; other files of the folder are not uploaded."""


def model_folder(given: str | Path, *, revision: str | None = None, where: str = "run") -> Path:
    """The folder of a model: a path, or the snapshot of a model on the Hub.

    A snapshot that is not cached is downloaded. A name is only looked up on the Hub if no folder
    here has its first part: with a folder runs, runs/digits is a path, whether runs has digits or
    not.

    Args:
        revision: a branch, a tag or a commit on the Hub; None = its main branch.
        where: the option that names the model, for messages.

    Raises:
        UserError: for a model that is neither here nor can be downloaded from the Hub.
    """
    path = Path(given)
    local = path.exists() or not NAME.fullmatch(str(given)) or path.parent.exists()
    if local:
        if revision is not None:
            raise UserError(
                f"revision is given, which only a model on the Hub has, but {where} is {given}, a "
                "path; leave it out"
            )
        return path

    hub = _library(f"{where}: there is no folder {given} here, and a model on the Hub")
    try:
        return Path(hub.snapshot_download(str(given), revision=revision, allow_patterns=READ))
    except (OSError, ValueError, hub.errors.HTTPError) as error:
        why = reason(error).rstrip(".")
        raise UserError(
            f"{where}: there is no folder {given} here, and no model of that name could be had "
            f"from the Hub: {why}"
        ) from error


def _library(needs: str) -> Any:
    """The library huggingface_hub. Raises UserError if it is not installed."""
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise UserError(
            f"{needs} needs the package huggingface_hub: pip install huggingface_hub"
        ) from error
    return huggingface_hub


@dataclass(frozen=True)
class Upload:
    """The files of a folder that are uploaded to the Hub."""

    folder: Path

    @property
    def files(self) -> list[Path]:
        """The files, in the order of their names.

        Raises:
            UserError: for a folder that is not an export.
        """
        adapter = (self.folder / ADAPTERS[0]).is_file()
        if not (self.folder / "README.md").is_file() and not adapter:
            raise UserError(
                f"folder: {self.folder} has no README.md; give a folder that `export to=hf` or "
                "to=peft wrote"
            )
        if not (self.folder / EXTRAS).is_file() and not adapter and not is_hub_folder(self.folder):
            raise UserError(
                f"folder: {self.folder} is not a folder that `export` wrote; make one with "
                "export to=hf run=DIR out=DIR"
            )

        found = set[Path]()
        for pattern in UPLOADED:
            found.update(self.folder.glob(pattern))
        return sorted(file for file in found if file.is_file())

    def listed(self) -> list[str]:
        """A line for each file with its size, then their sum, and the files that are not
        uploaded."""
        sizes = {file.relative_to(self.folder): file.stat().st_size for file in self.files}
        lines = [f"{size:>16,} bytes  {file.as_posix()}" for file, size in sizes.items()]
        lines.append(f"{sum(sizes.values()):>16,} bytes in {len(sizes)} files")

        # Hidden files, such as those of git, go without saying.
        others = []
        for path in sorted(self.folder.rglob("*")):
            file = path.relative_to(self.folder)
            if path.is_file() and file not in sizes and not file.parts[0].startswith("."):
                others.append(file.as_posix())
        if others:
            lines.append(f"left here, as no export wrote it: {', '.join(others)}")
        return lines


def push(folder: Path, name: str, *, private: bool, revision: str | None, message: str) -> str:
    """Upload a folder as a model, which is created if it does not exist.

    Args:
        name: as org/name.
        private: whether a new model is private; a model that exists keeps its visibility.
        revision: the branch; None = the main one.

    Returns:
        The address of the commit.

    Raises:
        UserError: for a name of another form, a login that is missing or not allowed to upload, a
            Hub that cannot be reached, and files that are missing there afterwards.
    """
    if not NAME.fullmatch(name):
        raise UserError(f"to is {name}; it must be the name of a model on the Hub, as org/name")

    hub = _library("push")
    api = hub.HfApi(library_name="cm3leon")
    files = [file.relative_to(folder).as_posix() for file in Upload(folder).files]
    try:
        api.create_repo(name, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            revision=revision,
            allow_patterns=[glob.escape(file) for file in files],
            commit_message=message,
        )
        there = set(api.list_repo_files(name, revision=revision))
    except (OSError, ValueError, hub.errors.HTTPError) as error:
        why = reason(error).rstrip(".")
        raise UserError(
            f"to: {name} could not be uploaded: {why}; log in with `hf auth login`, or set HF_TOKEN"
        ) from error

    # The library silently leaves out files that a .gitignore of the model names.
    if missing := sorted(set(files) - there):
        raise UserError(
            f"to: {name} has {len(files) - len(missing)} of {len(files)} files after the upload; "
            f"{missing[0]} is not there: does a .gitignore of the model name it?"
        )
    return str(commit.commit_url)
