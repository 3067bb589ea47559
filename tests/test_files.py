"""Writing and reading safetensors files; most of it is tested through `wcr_optim.pruning.sparse_file`."""

import pytest
import safetensors.torch
import torch

from wcr_optim.files import WeightFileError, read_safetensors, write_safetensors


def test_metadata_and_arrays(tmp_path):
    arrays = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(True)}
    write_safetensors(arrays, tmp_path / "x.safetensors", {"made by": "a test"})
    metadata, found = read_safetensors(tmp_path / "x.safetensors")
    assert metadata == {"made by": "a test"}
    assert found.keys() == arrays.keys()
    assert all(torch.equal(found[name], array) for name, array in arrays.items())


def test_a_dtype_that_safetensors_does_not_know(tmp_path, monkeypatch):
    def save_file(*arguments, **options):
        raise KeyError(torch.uint16)

    monkeypatch.setattr(safetensors.torch, "save_file", save_file)
    with pytest.raises(ValueError, match=r"does not know torch.uint16: pip install -U safetensors"):
        write_safetensors({}, tmp_path / "x.safetensors", {})
    assert not list(tmp_path.iterdir())


def test_a_file_that_may_not_be_read_is_no_damaged_file(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    write_safetensors({}, path, {})

    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(PermissionError):
        read_safetensors(path)
    monkeypatch.undo()
    path.write_bytes(b"x")
    with pytest.raises(WeightFileError, match="not a sound safetensors file"):
        read_safetensors(path)
