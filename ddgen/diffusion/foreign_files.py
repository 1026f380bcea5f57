"""The files of somebody else's diffusers pipeline: finding them, checking them, and loading them."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
import yaml
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError

from ddgen.errors import UserError

INDEX_NAME = "model_index.json"
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5"}
VOCABULARIES = {"tokenizer.json", "vocab.json", "vocab.txt", "merges.txt"}
IDENTITY = {".safetensors", ".json", ".txt", ".model", ".py"}
"""What decides the images: weights, configurations, vocabularies and code."""


@dataclass(frozen=True)
class PipelineFiles:
    """A diffusers pipeline on disk.

    Attributes:
        source: ``--generator`` as it was given.
        folder: Where the files are.
        index: The contents of model_index.json.
    """

    source: str
    folder: Path
    index: dict[str, Any]

    @property
    def is_own(self) -> bool:
        """Whether it is a generator that ddgen wrote."""
        return "LatentDiffusionPipeline" in self.index["_class_name"]

    @property
    def components(self) -> dict[str, tuple[str, str]]:
        """Name -> library and class of every component that is there."""
        pairs = {name: value for name, value in self.index.items() if isinstance(value, list) and len(value) == 2}
        return {name: (str(a), str(b)) for name, (a, b) in pairs.items() if a is not None and name != "_class_name"}

    @property
    def absent(self) -> list[str]:
        """Names of the components that the pipeline is stored without."""
        return [name for name, value in self.index.items() if value == [None, None]]

    @property
    def licence(self) -> str:
        """What its card tells of its licence."""
        card = self.folder / "README.md"
        header = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL) if (
            card.is_file()
        ) else None  # fmt: skip
        try:
            told = yaml.safe_load(header[1]) if header else None
        except yaml.YAMLError:
            told = None
        licence = told.get("license_name") or told.get("license") if isinstance(told, dict) else None
        return str(licence) if licence else "see its page"

    def fingerprint(self) -> str:
        """Returns a hash of all weights, configurations, vocabularies and code."""
        digest = hashlib.sha256()
        folders = [self.folder, *(self.folder / name for name in self.components)]
        for path in sorted(path for folder in folders if folder.is_dir() for path in folder.iterdir()):
            if path.suffix in IDENTITY and path.is_file():
                with path.open("rb") as file:
                    content = hashlib.file_digest(file, "sha256").hexdigest()
                digest.update(f"{path.relative_to(self.folder)} {content}\n".encode())
        return digest.hexdigest()[:32]


def find_pipeline(source: str, *, trust_remote_code: bool) -> PipelineFiles:
    """Finds a pipeline in a folder or on the hub, and checks that it can be loaded safely.

    Args:
        source: ``--generator``: a folder or a hub id.
        trust_remote_code: Whether Python files beside the weights may be run.

    Raises:
        UserError: Nothing there, weights that are not safetensors, code that is not trusted, or no vocabulary.
    """
    path = Path(source).expanduser()
    if not path.is_dir():
        if path.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
            raise UserError(f"--generator {source}: no such folder; give that of a diffusers pipeline, or a hub id")
        path = _download(source, trust_remote_code)
    files = PipelineFiles(source, path, _read_index(source, path))
    if not files.is_own:
        _check_code(files, trust_remote_code)
        for name, (library, class_name) in files.components.items():
            _check_component(files, name, library, class_name)
    return files


def load_pipeline(files: PipelineFiles, dtype: torch.dtype, *, trust_remote_code: bool) -> Any:
    """Loads a pipeline as diffusers does, from safetensors only.

    Args:
        files: From `find_pipeline`.
        dtype: Of its weights.
        trust_remote_code: Whether Python files beside the weights may be run.

    Raises:
        UserError: Whatever diffusers says, on one line; or weights that are missing.
    """
    with _quiet_loading() as said:
        try:
            # a required component that is stored as absent must be named again, or diffusers refuses its own folder
            absent: dict[str, Any] = dict.fromkeys(files.absent)
            pipeline = DiffusionPipeline.from_pretrained(
                str(files.folder), use_safetensors=True, dtype=dtype, trust_remote_code=trust_remote_code, **absent
            )
        except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError) as error:
            raise UserError(f"--generator {files.source}: diffusers cannot load it: {one_line(error)}") from None
        except SafetensorError as error:
            raise UserError(
                f"--generator {files.source}: a .safetensors file is damaged ({one_line(error)}); copy it again"
            ) from None
    # both libraries fill what a file lacks with random numbers, and only mention it
    random = next((text for text in said if "newly initialized" in text), None)
    if random is not None:
        raise UserError(
            f"--generator {files.source}: weights are missing from its files, so that a part would stay random:"
            f" {one_line(random)}"
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def one_line(cause: object, length: int = 300) -> str:
    """Returns what somebody else's error says as one line, shortened."""
    text = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(cause)).split())
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _download(source: str, trust_remote_code: bool) -> Path:
    with _quiet_loading():
        try:
            index_path = Path(hf_hub_download(source, INDEX_NAME))
            if PipelineFiles(source, index_path.parent, _read_index(source, index_path.parent)).is_own:
                return Path(snapshot_download(source))
            return Path(DiffusionPipeline.download(source, use_safetensors=True, trust_remote_code=trust_remote_code))
        except HFValidationError:
            cause = "neither a folder nor a hub id; give one of the two"
        except GatedRepoError:
            cause = "its owner wants you to ask for access; do so on its page, then `hf auth login`"
        except RepositoryNotFoundError:
            cause = "no such folder, and no such model on the hub (or a private one: `hf auth login`)"
        except LocalEntryNotFoundError:  # a kind of EntryNotFoundError
            cause = (
                "not on this machine, and the hub cannot be reached or is switched off by HF_HUB_OFFLINE;"
                " download it where there is a network (`hf download`), or give a folder"
            )
        except EntryNotFoundError:
            cause = f"no diffusers pipeline: the hub's model has no {INDEX_NAME}"
        except (OSError, ValueError, AttributeError) as error:
            cause = _cause_of_download(error)
    raise UserError(f"--generator {source}: {cause}")


def _cause_of_download(error: Exception) -> str:
    text = one_line(error)
    if "trust_remote_code" in text:
        return f"brings code of its own; read it, then --trust_remote_code runs it ({text})"
    if "safetensors" in text:
        return "has no safetensors weights, and pickled ones can run anything; choose a model that has them"
    if "not fully cached" in text:
        return "only a part of it is on this machine, and the hub cannot be reached; download it where there is one"
    return f"cannot be downloaded: {text}"


def _read_index(source: str, folder: Path) -> dict[str, Any]:
    path = folder / INDEX_NAME
    if not path.is_file():
        raise UserError(
            f"--generator {source}: no diffusers pipeline ({INDEX_NAME} is missing); give the folder of one"
        )
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"--generator {source}: {INDEX_NAME} is not JSON ({one_line(error)}); copy it again") from None
    if not isinstance(index, dict) or "_class_name" not in index:
        raise UserError(f"--generator {source}: {INDEX_NAME} names no pipeline class; give the folder of a pipeline")
    return index


def _check_code(files: PipelineFiles, trust_remote_code: bool) -> None:
    """Names the code that would have to be run; a pipeline class that diffusers lacks is refused."""
    kind = files.index["_class_name"]
    code = [files.folder / f"{kind[0]}.py"] if isinstance(kind, list) else []
    code += [files.folder / name / f"{library}.py" for name, (library, _) in files.components.items()]
    code = [path for path in code if path.is_file()]
    if code and not trust_remote_code:
        raise UserError(
            f"--generator {files.source}: brings code of its own; read {code[0]}, then --trust_remote_code runs it"
        )
    if isinstance(kind, str) and not hasattr(diffusers, kind):
        raise UserError(
            f"--generator {files.source}: diffusers {diffusers.__version__} has no {kind}; a newer one may, or"
            " --trust_remote_code where the pipeline brings its code"
        )


def _check_component(files: PipelineFiles, name: str, library: str, class_name: str) -> None:
    """Refuses pickled weights, and a tokenizer without words, which transformers would silently make."""
    folder = files.folder / name if (files.folder / name).is_dir() else files.folder
    found = [path for path in folder.iterdir() if path.is_file()]
    pickles = sorted(path.name for path in found if path.suffix in PICKLES)
    if pickles and not any(path.suffix == ".safetensors" for path in found):
        raise UserError(
            f"--generator {files.source}: {name} has pickled weights only ({pickles[0]}), which can run anything; where"
            " you trust it, load it in diffusers and save_pretrained() writes safetensors"
        )
    words = any(path.name in VOCABULARIES or path.suffix == ".model" for path in found)
    if "Tokenizer" in class_name and library == "transformers" and not words:
        raise UserError(
            f"--generator {files.source}: {name} has no vocabulary ({class_name}); copy the folder {name} again"
        )


@contextmanager
def _quiet_loading() -> Iterator[list[str]]:
    """Keeps what diffusers, transformers and the hub say, and their progress bars, to itself; yields what was said."""
    said: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "huggingface_hub")]
    before = [(logger.handlers[:], logger.propagate, logger.level) for logger in loggers]
    bars = diffusers.utils.logging.is_progress_bar_enabled(), transformers.logging.is_progress_bar_enabled()
    for logger in loggers:
        logger.handlers, logger.propagate = [listener], False
        logger.setLevel(logging.WARNING)
    diffusers.utils.logging.disable_progress_bar()
    transformers.logging.disable_progress_bar()
    try:
        yield said
    finally:
        for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)
        if bars[0]:
            diffusers.utils.logging.enable_progress_bar()
        if bars[1]:
            transformers.logging.enable_progress_bar()
