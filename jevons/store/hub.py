"""Fetching a checkpoint from a hub with `huggingface_hub`: resumed where it stopped, checked against hub and index."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jevons.config import ConfigError, ModelConfig
from jevons.store.files import CheckpointError, StoreError, fsync, write_text
from jevons.store.safetensors_io import INDEX, SINGLE, read_headers

NOTE = ".pulled.json"  # file name -> the blob that lies there whole
_KEPT = (".json", ".jinja", ".model", ".txt")  # config, index, tokenizer and template; weights are asked for by name


def pull(repo: str, directory: str | Path, revision: str = "main", endpoint: str | None = None,
         report: Callable[[str], None] = lambda line: None) -> Path:
    """Fetch `repo` (owner/name) into `directory`, all of it from one commit; the directory.

    Only files that lie flat in the repository and belong to a safetensors checkpoint are fetched, config.json first: what
    cannot be run is refused before its weights are on the way. Killed and called again it goes on at the byte where it
    stopped. Sizes and checksums are the hub's, names and shards the index's. Raises ConfigError, CheckpointError, and
    StoreError for what hub or disk refuse.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError

    directory = Path(directory)
    if (directory / "config.json").exists() and not (directory / NOTE).is_file():
        raise StoreError(None, f"{directory} holds a checkpoint that was not pulled; give another directory with --out")
    try:
        info = HfApi(endpoint=endpoint).model_info(repo, revision=revision, files_metadata=True)
        files = {f.rfilename: f for f in info.siblings or [] if Path(f.rfilename).name == f.rfilename}
        directory.mkdir(parents=True, exist_ok=True)
        note = json.loads((directory / NOTE).read_text(encoding="utf-8")) if (directory / NOTE).is_file() else {}

        def fetch(name: str) -> Path:
            path, blob = directory / name, str(files[name].blob_id)
            if note.get(name) != blob or not path.is_file() or path.stat().st_size != files[name].size:
                note.pop(name, None)
                _download(repo, files[name], info.sha, path, endpoint)
                note[name] = blob
                write_text(directory / NOTE, json.dumps(note))
            return path

        if "config.json" not in files:
            raise CheckpointError(f"{repo} at {revision} has no config.json; it is no Hugging Face checkpoint")
        fetch("config.json")
        ModelConfig.load(directory)
        weights = [SINGLE]
        if INDEX in files and SINGLE not in files:
            weights = sorted(set(json.loads(fetch(INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        if missing := [name for name in weights if name not in files]:
            raise CheckpointError(f"{repo} at {revision} lacks {missing[0]!r:.200}; only safetensors checkpoints can be pulled")
        names = sorted(name for name in files if name.endswith(_KEPT)) + weights
        left = sum(files[n].size for n in names if note.get(n) != str(files[n].blob_id))
        if left > (free := shutil.disk_usage(directory).free):
            raise StoreError(28, f"{repo} needs {left / 1e9:.1f} GB more, {directory} has {free / 1e9:.1f} GB free")
        report(f"{repo} at {info.sha}: {len(names)} files, {sum(files[n].size for n in names) / 1e9:.2f} GB")
        for name in names:
            fetch(name)
    except (ConfigError, CheckpointError, StoreError):
        raise
    except (HTTPError, HFValidationError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(None, f"{repo} could not be pulled: {' '.join(str(error).split())}") from error
    read_headers(directory)  # every shard whole, and holding what the index says
    return directory


def _download(repo: str, file: Any, commit: str, path: Path, endpoint: str | None) -> None:
    """One file, by way of a partial one that a later call continues. `hf_hub_download` starts anew after a kill."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    partial = path.with_name(f".{path.name}.{str(file.blob_id)[:16]}.incomplete")
    if partial.exists() and partial.stat().st_size > file.size:
        partial.unlink()
    with open(partial, "ab") as out:
        http_get(hf_hub_url(repo, path.name, revision=commit, endpoint=endpoint), out, resume_size=out.tell(),
                 headers=build_hf_headers(), expected_size=file.size, displayed_filename=path.name)
    if file.lfs is not None:
        with open(partial, "rb") as whole:
            digest = hashlib.file_digest(whole, "sha256").hexdigest()
        if digest != file.lfs.sha256:
            partial.unlink()
            raise CheckpointError(f"{path} came damaged: its SHA-256 is {digest}, the hub's is {file.lfs.sha256}; pull again")
    fsync(partial)
    os.replace(partial, path)
