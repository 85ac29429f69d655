"""Files: written so that they are on the disk, known by size and hash, read without running code."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.utils._pytree import tree_leaves, tree_map_only

from kozero.folder import write_text


def write_file(path: Path, value: Any) -> dict[str, Any]:
    """Write tensors (.safetensors) or plain values (.json), wait until they are on the disk, and return what
    `fingerprint` does. Neither form can hold code."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in value.items()}, path)
    else:
        write_text(path, json.dumps(value))
    return fingerprint(path)


def fingerprint(path: Path) -> dict[str, Any]:
    """Bytes and SHA-256 of a file, which is on the disk by then. It is read from memory: about 1.5 GB/s."""
    with path.open("rb+") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
        return {"bytes": file.tell(), "sha256": digest}


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where a system can tell."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def tensor_bytes(files: Mapping[str, Any]) -> int:
    """Bytes of all tensors of some files."""
    return sum(leaf.nbytes for leaf in tree_leaves(dict(files)) if isinstance(leaf, torch.Tensor))


def on_host(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy in the memory of the machine, which a next step does not change."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), dict(values))
