"""Files that appear whole or not at all, and safetensors; more of it is tested through `pruning.sparse_file`."""

import errno
import os

import pytest
import safetensors.torch
import torch

from wcr_optim import files
from wcr_optim.files import WeightFileError, read_safetensors, write_safetensors, written_whole
from wcr_optim.pruning import Masks, SweepResult, SweepRow


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


WRITERS = {
    "safetensors": lambda path: write_safetensors({"a": torch.ones(2)}, path, {}),
    "masks": Masks({"w": torch.ones(2, 2, dtype=torch.bool)}).save,
    "table": SweepResult((SweepRow(0.5, 1, 2, {"score": 1.0}),), "global", False).to_csv,
}


@pytest.mark.parametrize("kind", list(WRITERS))
def test_a_place_that_cannot_be_written_is_named(tmp_path, kind):
    with pytest.raises(FileNotFoundError, match=r"missing/out': there is no folder"):
        WRITERS[kind](tmp_path / "missing" / "out")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match=r"folder': it is a folder"):
        WRITERS[kind](tmp_path / "folder")
    assert [path.name for path in tmp_path.rglob("*")] == ["folder"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
@pytest.mark.parametrize("kind", list(WRITERS))
def test_no_device_and_no_pipe_gives_way_to_a_file(tmp_path, kind):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name in ("pipe", "link"):
        with pytest.raises(OSError, match=rf"{name}': it is a device or a pipe"):
            WRITERS[kind](tmp_path / name)
    assert (tmp_path / "pipe").is_fifo()
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("kind", list(WRITERS))
def test_the_file_that_was_asked_for_is_named(tmp_path, monkeypatch, kind):
    def full(path, mode="r", *arguments, **options):
        if "x" in mode:
            raise OSError(errno.ENOSPC, "No space left on device", path)
        return open(path, mode, *arguments, **options)

    monkeypatch.setattr(files, "open", full, raising=False)
    with pytest.raises(OSError, match=r"No space left on device: '.*out'"):
        WRITERS[kind](tmp_path / "out")


@pytest.mark.parametrize("kind", list(WRITERS))
def test_permissions_of_files(tmp_path, kind):
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    WRITERS[kind](tmp_path / "new")
    assert (tmp_path / "new").stat().st_mode == ordinary.stat().st_mode
    ordinary.chmod(0o640)
    (tmp_path / "link").symlink_to(ordinary)
    WRITERS[kind](tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert ordinary.stat().st_mode & 0o777 == 0o640
    assert ordinary.read_bytes() == (tmp_path / "new").read_bytes()


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_interrupted_block_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "x"
    path.write_bytes(b"old")

    def interrupted():
        with written_whole(path) as temporary:
            temporary.write_bytes(b"half")
            raise error

    with pytest.raises(error):
        interrupted()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
