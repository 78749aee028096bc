"""A worker's checkpoint on disk: whole or not there, never half; an optimizer's state survives it bit for bit."""

from __future__ import annotations

import resource
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from diloco.errors import StorageError
from diloco.worker import checkpoint


def _tensors(value: float, n: int = 10) -> dict[str, Tensor]:
    return {"model/w": torch.full((n,), value), "inner/0.step": torch.tensor(value)}


def test_a_checkpoint_gives_back_tensors_and_meta_exactly(tmp_path: Path) -> None:
    """Every dtype and shape, NaN payloads and tied tensors included; meta is JSON."""
    w = torch.randn(3, 5)
    tensors = {
        "a": w,
        "tied": w,
        "half": torch.randn(4).bfloat16(),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "n": torch.tensor(7),
        "nan": torch.tensor([float("nan"), -0.0]),
    }
    checkpoint.save(tmp_path, 12, tensors, {"step": 12, "list": [1, None, "x"]})
    found = checkpoint.load(tmp_path)
    assert found is not None
    assert found[1] == {"step": 12, "list": [1, None, "x"]}
    assert found[0].keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[0][name].dtype == value.dtype and found[0][name].shape == value.shape
        torch.testing.assert_close(found[0][name], value, rtol=0, atol=0, equal_nan=True)


def test_the_newest_checkpoint_is_loaded_and_the_older_one_removed(tmp_path: Path) -> None:
    """One folder remains, also when a step is saved twice."""
    assert checkpoint.load(tmp_path / "none") is None
    for step, value in ((10, 1.0), (20, 2.0), (20, 3.0)):
        checkpoint.save(tmp_path, step, _tensors(value), {"value": value})
    found = checkpoint.load(tmp_path)
    assert found is not None and found[1] == {"value": 3.0} and float(found[0]["model/w"][0]) == 3.0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000020"]


@pytest.mark.parametrize("limit", [100, 5000])
def test_a_disk_that_fills_up_leaves_the_last_checkpoint_as_it_was(tmp_path: Path, limit: int) -> None:
    """The tensors do not fit: StorageError that says so, the old checkpoint loads, nothing half stays behind."""
    checkpoint.save(tmp_path, 10, _tensors(1.0), {"value": 1.0})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(StorageError, match="free space"):
            checkpoint.save(tmp_path, 20, _tensors(2.0, 10_000), {"value": 2.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    found = checkpoint.load(tmp_path)
    assert found is not None and found[1] == {"value": 1.0}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000010"]


@pytest.mark.parametrize("name", ["tensors.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_a_damaged_checkpoint_is_refused_with_a_way_out(tmp_path: Path, name: str, damage: str) -> None:
    """Cut short, one byte changed, or missing: never loaded, and the message says how to start afresh."""
    folder = checkpoint.save(tmp_path, 10, _tensors(1.0), {"value": 1.0})
    path = folder / name
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[:-3])
    else:
        # In the manifest: a digit of the digest.
        at = data.index(b'"sha256": "') + 12 if name == "manifest.json" else len(data) - 1
        data[at] ^= 1
        path.write_bytes(data)
    with pytest.raises(StorageError, match="start this worker afresh"):
        checkpoint.load(tmp_path)


def test_leftovers_of_a_crash_while_writing_do_not_matter(tmp_path: Path) -> None:
    """A half-written folder or pointer is ignored by load and removed or replaced by the next save."""
    checkpoint.save(tmp_path, 10, _tensors(1.0), {"value": 1.0})
    (tmp_path / ".partial-00000020").mkdir()
    (tmp_path / ".partial-00000020" / "tensors.safetensors").write_bytes(b"half")
    (tmp_path / ".latest").write_text("step-0000", encoding="utf-8")
    found = checkpoint.load(tmp_path)
    assert found is not None and found[1] == {"value": 1.0}
    checkpoint.save(tmp_path, 20, _tensors(2.0), {"value": 2.0})
    found = checkpoint.load(tmp_path)
    assert found is not None and found[1] == {"value": 2.0}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000020"]


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_an_optimizer_continues_bit_for_bit_from_its_flattened_state(tmp_path: Path, kind: str) -> None:
    """Three steps, flatten, disk, unflatten, three steps = six steps; groups and betas come back."""

    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Linear(4, 4)
        groups = [
            {"params": [model.weight], "weight_decay": 0.1},
            {"params": [model.bias], "weight_decay": 0.0},
        ]
        if kind == "adamw":
            return model, torch.optim.AdamW(groups, lr=0.1, betas=(0.8, 0.9))
        return model, torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int) -> None:
        for step in range(first, first + 3):
            generator = torch.Generator().manual_seed(step)
            loss = model(torch.randn(2, 4, generator=generator)).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    straight, optimizer = make()
    steps(straight, optimizer, 0)
    tensors, meta = checkpoint.flatten_optimizer(optimizer.state_dict())
    packed = checkpoint.pack({"model": dict(straight.named_parameters()), "inner": tensors})
    checkpoint.save(tmp_path, 3, packed, {"inner": meta})
    steps(straight, optimizer, 3)

    found = checkpoint.load(tmp_path)
    assert found is not None
    resumed, continued = make()
    with torch.no_grad():
        for name, value in checkpoint.unpack(found[0], "model").items():
            dict(resumed.named_parameters())[name].copy_(value)
    continued.load_state_dict(
        checkpoint.unflatten_optimizer(checkpoint.unpack(found[0], "inner"), found[1]["inner"])
    )
    assert continued.param_groups[0].get("betas") == optimizer.param_groups[0].get("betas")
    steps(resumed, continued, 3)
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
