"""A worker's own checkpoint: tensors as safetensors, numbers as JSON, written so that a crash leaves the old one.

A checkpoint is a folder `step-00000120/` with `tensors.safetensors` and `manifest.json` (SHA-256 of the tensors
file); `latest` names the newest complete one. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diloco.errors import StorageError


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Path:
    """Write one checkpoint, make it the latest, remove older ones. Raises StorageError; the old one then stays."""
    final = folder / f"step-{step:08d}"
    partial = folder / f".partial-{step:08d}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        # Clones: tied or overlapping tensors share memory, which the format refuses.
        save_file(
            {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()},
            partial / "tensors.safetensors",
        )
        manifest = {"step": step, "sha256": _sha256(partial / "tensors.safetensors"), "meta": dict(meta)}
        (partial / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        for name in ("tensors.safetensors", "manifest.json"):
            _fsync(partial / name)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        pointer = folder / ".latest"
        pointer.write_text(final.name, encoding="utf-8")
        _fsync(pointer)
        os.replace(pointer, folder / "latest")
        _fsync(folder)
    except (OSError, SafetensorError) as error:  # the library does not raise OSError for a full disk
        shutil.rmtree(partial, ignore_errors=True)
        raise StorageError(
            f"cannot write a checkpoint to {str(folder)!r}: {error}; free space there, the last one is intact"
        ) from None
    for old in folder.glob("step-*"):
        if old != final:
            shutil.rmtree(old, ignore_errors=True)
    return final


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The latest checkpoint's tensors and meta, or None if there is none. StorageError if it is damaged."""
    pointer = folder / "latest"
    if not pointer.exists():
        return None
    current = folder / pointer.read_text(encoding="utf-8").strip()
    try:
        manifest = json.loads((current / "manifest.json").read_text(encoding="utf-8"))
        if _sha256(current / "tensors.safetensors") != manifest["sha256"]:
            raise ValueError("the tensors file does not have the digest in the manifest")
        tensors: dict[str, Tensor] = load_file(current / "tensors.safetensors")
        return tensors, dict(manifest["meta"])
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise StorageError(
            f"the checkpoint {str(current)!r} cannot be used: {error}; remove {str(pointer)!r} to start this worker afresh"
        ) from None


def flatten_optimizer(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A torch optimizer's state_dict as named tensors and JSON-able numbers."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value
            else:
                numbers.setdefault(str(index), {})[key] = _to_json(value)
    return tensors, {"numbers": numbers, "param_groups": _to_json(state["param_groups"])}


def unflatten_optimizer(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `flatten_optimizer`, tuples and dtypes included."""
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    for index, entries in meta["numbers"].items():
        state.setdefault(int(index), {}).update(_from_json(entries))
    return {"state": state, "param_groups": _from_json(meta["param_groups"])}


def _to_json(value: Any) -> Any:
    """Tuples and dtypes as objects of one key; options of parameter groups have them."""
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, tuple):
        return {"tuple": [_to_json(v) for v in value]}
    if isinstance(value, list):
        return [_to_json(v) for v in value]
    return {k: _to_json(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_from_json(v) for v in value]
    if not isinstance(value, Mapping):
        return value
    if value.keys() == {"dtype"}:
        return getattr(torch, value["dtype"])
    if value.keys() == {"tuple"}:
        return tuple(_from_json(v) for v in value["tuple"])
    return {k: _from_json(v) for k, v in value.items()}


def pack(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """One flat mapping out of several, keys prefixed by ``part/``."""
    return {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def unpack(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    return {k.split("/", 1)[1]: v for k, v in tensors.items() if k.startswith(f"{part}/")}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
