from __future__ import annotations

import os

import pytest
import safetensors.torch
import torch
from torch import nn

from hellm._files import atomic_path
from hellm.training.checkpoint import (
    load_checkpoint,
    load_training_state,
    read_model,
    save_checkpoint,
    save_training_state,
)


def trained(seed, steps=3):
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    train(model, optimizer, steps)
    return model, optimizer


def train(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.rand(4, 3)).square().sum().backward()
        optimizer.step()


def test_restored_training_goes_on_with_the_same_bits(tmp_path):
    model, optimizer = trained(0)
    save_training_state(tmp_path / "last", model, optimizer, {"epoch": 3, "losses": [0.1]})
    train(model, optimizer, 4)
    other, other_optimizer = trained(1, steps=0)
    state = load_training_state(tmp_path / "last", other, other_optimizer)
    train(other, other_optimizer, 4)
    assert state == {"epoch": 3, "losses": [0.1]}
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_weights_alone_can_be_read(tmp_path):
    model, optimizer = trained(0)
    save_training_state(tmp_path / "last", model, optimizer, {"epoch": 3})
    other, _ = trained(1)
    assert read_model(tmp_path / "last", other)["epoch"] == 3
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_views_are_saved_alone(tmp_path):
    big = torch.arange(10_000.0)
    save_checkpoint(tmp_path / "c", {"a": big[:3], "b": big[:3], "c": big.view(100, 100).T[:2]}, {})
    tensors, _ = load_checkpoint(tmp_path / "c")
    assert torch.equal(tensors["a"], big[:3]) and torch.equal(tensors["c"], big.view(100, 100).T[:2])
    assert (tmp_path / "c").stat().st_size < 2_000


@pytest.mark.parametrize("failing", ["write", "sync", "rename"])
def test_failed_write_leaves_the_previous_checkpoint(tmp_path, monkeypatch, failing):
    path = tmp_path / "last"
    save_checkpoint(path, {"a": torch.ones(3)}, {"epoch": 1})

    def full(*arguments, **keywords):
        if failing == "write":
            arguments[1].write_bytes(b"half")
        raise OSError("No space left on device")

    target = {"write": (safetensors.torch, "save_file"), "sync": (os, "fsync"), "rename": (os, "replace")}[failing]
    monkeypatch.setattr(*target, full)
    with pytest.raises(OSError, match=r"last cannot be written: the disk is full$"):
        save_checkpoint(path, {"a": torch.zeros(3)}, {"epoch": 2})
    monkeypatch.undo()
    tensors, state = load_checkpoint(path)
    assert state == {"epoch": 1} and torch.equal(tensors["a"], torch.ones(3))
    assert [file.name for file in tmp_path.iterdir()] == ["last"]


def test_content_is_on_disk_before_the_name_changes(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(os, "fsync", lambda number, real=os.fsync: (order.append("fsync"), real(number)))
    monkeypatch.setattr(os, "replace", lambda *names, real=os.replace: (order.append("replace"), real(*names)))
    with atomic_path(tmp_path / "file") as temporary:
        temporary.write_text("text")
        assert temporary.parent == tmp_path and not (tmp_path / "file").exists()
    assert order == ["fsync", "replace"]
    assert (tmp_path / "file").read_text() == "text"


def test_checkpoint_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "other").touch()
    save_checkpoint(tmp_path / "c", {"a": torch.ones(1)}, {})
    assert (tmp_path / "c").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_wrong_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"checkpoint .*absent does not exist"):
        load_checkpoint(tmp_path / "absent")
    (tmp_path / "text").write_text("no checkpoint")
    with pytest.raises(ValueError, match=r"text: damaged, or not the file that must be there"):
        load_checkpoint(tmp_path / "text")
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "bare")
    with pytest.raises(ValueError, match=r"bare must carry a training state in its header, got none"):
        load_checkpoint(tmp_path / "bare")


def test_weights_of_another_model_are_refused(tmp_path):
    model, optimizer = trained(0)
    save_training_state(tmp_path / "last", model, optimizer, {})
    with pytest.raises(
        ValueError, match=r"last does not fit the model: bias must be \(5,\), got \(2,\); the settings \(config"
    ):
        read_model(tmp_path / "last", nn.Linear(3, 5))
    with pytest.raises(ValueError, match=r"last does not fit the model: bias must be absent, got \(2,\)"):
        read_model(tmp_path / "last", nn.Linear(3, 2, bias=False))
