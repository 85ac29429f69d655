"""Files: written so that they are on the disk, known by size and hash, read without running code."""

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from kozero.folder import write_text

TENSORS = ".safetensors"
PIECE = 2**24  # bytes that are hashed while they are written
DTYPES = {  # as safetensors names them
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def write_file(path: Path, value: Any) -> dict[str, Any]:
    """Write tensors (.safetensors) or plain values (.json), wait until they are on the disk, and return what
    `fingerprint` does. Neither form can hold code."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == TENSORS:
        return write_tensors(path, value)
    write_text(path, json.dumps(value))
    return fingerprint(path)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """A file in the format of safetensors (https://github.com/huggingface/safetensors#format): 8 bytes with the length
    of the header, the header in JSON, then the tensors' bytes. Returns what `fingerprint` does.

    The library's own writer makes a copy of all tensors first, and what it has written must be read again for its
    hash. Here each tensor is taken from where it lies and hashed while it is written, and the disk begins when the
    first are: 1.5 s for 1.4 GB, where the library, a hash and fsync took 3.3, and torch.save with fsync 2.0.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # so that all begin aligned
    header, end = {}, 0
    for name in names:
        begin, end = end, end + tensors[name].nbytes
        header[name] = {"dtype": DTYPES[tensors[name].dtype], "shape": list(tensors[name].shape),
                        "data_offsets": [begin, end]}  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as hasher, ThreadPoolExecutor(1) as disk:
        synced = disk.submit(os.fsync, file.fileno())
        for piece in pieces(struct.pack("<Q", len(text)) + text, (tensors[name] for name in names)):
            hashed = hasher.submit(digest.update, piece)
            while piece:
                piece = piece[file.write(piece) :]
            hashed.result()
            if synced.done():
                synced.result()
                synced = disk.submit(os.fsync, file.fileno())
        synced.result()
        os.fsync(file.fileno())
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def pieces(header: bytes, tensors: Iterator[torch.Tensor]) -> Iterator[memoryview]:
    """The bytes of a file, PIECE at once at most; of a GPU's tensors one is on the host at a time."""
    yield memoryview(header)
    for tensor in tensors:
        flat = memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        yield from (flat[start : start + PIECE] for start in range(0, len(flat), PIECE))


def fingerprint(path: Path) -> dict[str, Any]:
    """Bytes and SHA-256 of a file, which is on the disk by then. It is read from memory: about 1.5 GB/s."""
    with path.open("rb+") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
        return {"bytes": file.tell(), "sha256": digest}


def to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensor_bytes(files: Mapping[str, Any]) -> int:
    """Bytes of all tensors of some files."""
    return sum(tensor.nbytes for name, value in files.items() if name.endswith(TENSORS) for tensor in value.values())


def on_host(files: Mapping[str, Any]) -> dict[str, Any]:
    """The files with their tensors copied to the memory of the machine, where a next step does not change them."""
    return {
        name: {k: t.detach().to("cpu", copy=True) for k, t in value.items()} if name.endswith(TENSORS) else value
        for name, value in files.items()
    }
