"""Compiling native.cpp, once for a machine."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

SOURCE = Path(__file__).with_name("native.cpp")
# Loops are vectorised for the processor at hand. Results stay IEEE's: a NaN is a NaN, and sums keep their order.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")
X86_FLAGS = ("-mprefer-vector-width=512",)


class BuildError(RuntimeError):
    """Why there is no library; a sentence that names the way out."""


def load() -> ctypes.CDLL:
    """Return the compiled library, from the cache or compiled now, which takes seconds.

    Raises:
        BuildError: If there is no compiler or it fails.

    """
    return _load(os.environ.get("CXX", "g++"), str(cache_folder()))


def cache_folder() -> Path:
    """Return where compiled libraries are kept: WCR_OPTIM_CACHE, or wcr_optim in the user's cache folder."""
    return Path(os.environ.get("WCR_OPTIM_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "wcr_optim"))


@lru_cache(maxsize=4)
def _load(compiler: str, folder: str) -> ctypes.CDLL:
    command = shutil.which(compiler)
    if command is None:
        raise BuildError(f"there is no C++ compiler {compiler!r}; install one, or name one in CXX")
    flags = FLAGS + (X86_FLAGS if platform.machine() in ("x86_64", "AMD64") else ())
    library = _writable(Path(folder).expanduser()) / f"native-{_key(command, flags)}.so"
    if not library.exists():
        _build(command, flags, library)
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise BuildError(f"the compiled library does not load: {error}") from error


def _key(command: str, flags: tuple[str, ...]) -> str:
    """Name what the library depends on: the source, the compiler and the processor it compiled for."""
    parts = [SOURCE.read_bytes(), command.encode(), " ".join(flags).encode(), platform.machine().encode()]
    parts.append(str(Path(command).resolve().stat().st_mtime_ns).encode())
    processor = Path("/proc/cpuinfo")
    if processor.exists():
        first = processor.read_text().split("\n\n")[0]
        parts += [line.encode() for line in first.splitlines() if line.startswith(("flags", "Features", "model"))]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _writable(folder: Path) -> Path:
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder if os.access(folder, os.W_OK) else Path(tempfile.mkdtemp(prefix="wcr_optim-"))


def _build(command: str, flags: tuple[str, ...], library: Path) -> None:
    # Several processes may build at once: each into a file of its own, which then takes the library's place whole.
    part = library.with_suffix(f".{os.getpid()}.part")
    try:
        result = subprocess.run(
            [command, *flags, str(SOURCE), "-o", str(part)], capture_output=True, text=True, check=False
        )
        if result.returncode != 0:
            raise BuildError(f"{command} failed: {_first_line(result.stderr)}; name another compiler in CXX")
        part.replace(library)
    finally:
        part.unlink(missing_ok=True)


def _first_line(text: str) -> str:
    lines = [line for line in text.splitlines() if "error" in line] or text.splitlines() or ["it says nothing"]
    return lines[0].strip()
