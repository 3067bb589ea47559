"""Safetensors files, written whole or not at all and read without trust."""

from __future__ import annotations

import os
import secrets
import stat
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor


class WeightFileError(ValueError):
    """The file is damaged or of another kind, or it does not fit the model that it was to be loaded into."""


def check_shape(name: str, shape: Sequence[int]) -> None:
    """Raise ValueError unless a shape that a file claims is one that a tensor can have.

    Args:
        name: What to call it in the message.
        shape: Extents of at least 0.
    """
    product = 1
    for extent in shape:
        product *= max(extent, 1)  # strides are computed from the other extents even where one is zero
        if product >= 2**63:
            raise ValueError(f"{name} has a shape of more elements than 64 bits can count")


def write_safetensors(arrays: dict[str, Tensor], path: str | os.PathLike[str], metadata: dict[str, str]) -> None:
    """Write a safetensors file completely or not at all, with the permissions that an ordinary new file gets.

    Args:
        arrays: Contiguous tensors that share no memory.
        path: Where to write. An existing file is replaced and keeps its permissions and the symbolic links to it.
        metadata: What the header says beside the tensors.

    Raises:
        OSError: If it cannot be written; an existing file is as before.
        ValueError: If the installed safetensors does not know a dtype, or an array has the name that the format keeps
            for its metadata.
        ImportError: If safetensors is not installed.
    """
    safetensors = _safetensors()
    if "__metadata__" in arrays:
        raise ValueError("safetensors keeps the name '__metadata__' for itself: give the tensor another one")
    with written_whole(path) as temporary:
        try:
            safetensors.torch.save_file(arrays, temporary, metadata=metadata)
        except safetensors.SafetensorError as error:
            raise OSError(f"cannot write {os.fspath(path)!r}: {error}") from error
        except KeyError as error:  # versions before 0.6 have no unsigned integers, the oldest no 8-bit floats
            raise ValueError(
                f"this version of safetensors does not know {error}: pip install -U safetensors"
            ) from error


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Let a block write a file that appears only when the block is done, or not at all.

    Args:
        path: Where to write. An existing file is replaced and keeps its permissions and the symbolic links to it; a new
            one gets those of an ordinary new file.

    Yields:
        An empty file in the same folder to write to.

    Raises:
        OSError: If it cannot be written; an existing file is as before, as it is after any exception in the block.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {os.fspath(path)!r}: there is no folder {os.fspath(target.parent)!r}")
    if target.is_dir():
        raise IsADirectoryError(f"cannot write {os.fspath(path)!r}: it is a folder")
    if os.path.exists(path) and not os.path.isfile(path):  # which a file would take the place of
        raise OSError(f"cannot write {os.fspath(path)!r}: it is a device or a pipe, no regular file")
    try:
        try:
            with open(temporary, "xb") as file:
                mode = os.fstat(file.fileno()).st_mode
        except OSError as error:  # which names a file that nobody asked for
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        if target.exists():
            mode = target.stat().st_mode
        yield temporary
        # Some versions of safetensors leave a file that only its owner may read.
        os.chmod(temporary, stat.S_IMODE(mode))
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read the metadata and the arrays of a safetensors file, as they are.

    Args:
        path: A regular file.

    Returns:
        The metadata, and tensors that may be backed by the file: copy what is to outlive it.

    Raises:
        WeightFileError: If it is not a sound safetensors file.
        FileNotFoundError: If there is no such file.
        ImportError: If safetensors is not installed.
    """
    safetensors = _safetensors()
    # A pipe would block for ever, and opening a folder fails with no more than an error number.
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise WeightFileError(f"{os.fspath(path)!r} is not a regular file")
    with open(path, "rb"):  # the usual OSError if it may not be read
        pass
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {}), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise WeightFileError(f"{os.fspath(path)!r} is not a sound safetensors file: {error}") from error


def check_uncompressed(path: str | os.PathLike[str]) -> None:
    """Raise WeightFileError if a file of torch.save would grow when it is read: its entries are stored as they are.

    Compressed ones, and several that lie over each other, would take a thousand times the file's size of memory.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except zipfile.BadZipFile:
        return  # of the format before, or damaged: torch.load tells
    claimed = sum(entry.file_size for entry in entries)
    if claimed > os.path.getsize(path) or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise WeightFileError(
            f"refused {os.fspath(path)!r}: its entries claim {claimed} bytes of a file of {os.path.getsize(path)}; "
            f"torch.save compresses nothing, so something else wrote or packed it: save it anew with torch.save"
        )


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("safetensors files need the package of that name: pip install 'wcr_optim[files]'") from error
    return safetensors
