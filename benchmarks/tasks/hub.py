"""Real data sets through Hugging Face `datasets`: from a local folder where it is there, from the hub otherwise."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from PIL.Image import Image
    from torch import Tensor

FOLDER = "WCR_OPTIM_DATA"
"""Environment variable: the folder that holds one folder for each local data set."""

SPLITS = {"validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
SHARE = 0.1  # of the training data, where there is no validation or no test


def load(name: str, hub: str | None = None, config: str | None = None) -> DatasetDict:
    """Load a data set and see to it that it has train, validation and test.

    Taken is the folder of that name in $WCR_OPTIM_DATA, in any form that `datasets` reads: what `save_to_disk` wrote;
    parquet, JSON, CSV or text files; images in a folder for each class, below one for each split. If there is none,
    the hub is asked. A missing validation or test split is drawn from the training data, the same at every call.

    Args:
        name: Of the folder.
        hub: Name on the hub; None if it is not there (default: None)
        config: Of the data set on the hub (default: None)

    Returns:
        The splits train, validation and test.

    Raises:
        ImportError: If `datasets` is not installed.
        FileNotFoundError: If the data set is neither in the folder nor can be had from the hub. The message says how
            to get it.
        ValueError: If a file of the folder is broken, or if there are no training data.

    """
    datasets = imported()
    path = local(name)
    if path is not None:
        found = _read(path)
    elif hub is None:
        raise FileNotFoundError(f"task {name} reads a folder of your own: {wanted(name)}")
    else:
        try:
            found = datasets.load_dataset(hub, config)
        except (OSError, RuntimeError) as error:
            arguments = f"{hub!r}, {config!r}" if config else f"{hub!r}"
            raise FileNotFoundError(
                f"data set {hub} could not be had from the hub ({error}); where there is a network run "
                f"datasets.load_dataset({arguments}).save_to_disk({name!r}), and {wanted(name)}"
            ) from error
    if isinstance(found, datasets.Dataset):
        found = datasets.DatasetDict(train=found)
    return with_all_splits(found, path or hub)


def _read(path: Path) -> Any:
    """Return what `datasets` finds in a folder.

    Raises:
        ValueError: If a file is broken.

    """
    datasets = imported()
    saved = any((path / file).exists() for file in ("dataset_dict.json", "state.json"))
    try:
        return datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(str(path))
    except (datasets.exceptions.DatasetGenerationError, ValueError, StopIteration) as error:
        # What is wrong stands in the cause, over several lines; an empty file makes a bare StopIteration.
        told = " ".join(str(error.__cause__ or error).split()) or "a file is empty"
        raise ValueError(f"{path} cannot be read: {told}") from error


def imported() -> Any:
    """Return the package `datasets`.

    Raises:
        ImportError: If it is not installed.

    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError("real data sets need the package datasets: pip install 'wcr_optim[bench]'") from error
    return datasets


def local(name: str) -> Path | None:
    """Return the folder of a data set in $WCR_OPTIM_DATA, None if there is none."""
    folder = os.environ.get(FOLDER)
    path = Path(folder, name) if folder else None
    return path if path is not None and path.is_dir() else None


def wanted(name: str) -> str:
    """Say in the imperative where a data set is looked for, and what is there."""
    folder = os.environ.get(FOLDER)
    if not folder:
        return f"set {FOLDER} to the folder that holds {name}/ (it is not set)"
    return f"put {name}/ into {FOLDER}={folder} (no such folder there)"


def column(rows: Dataset, *names: str) -> str:
    """Return the first of some column names that a data set has.

    Raises:
        ValueError: If it has none of them.

    """
    for name in names:
        if name in rows.column_names:
            return name
    raise ValueError(f"the data set has none of the columns {', '.join(names)}; it has {', '.join(rows.column_names)}")


def called(image: Image, where: str) -> str:
    """Return the path of an image's file; where it is, if it comes from no file of its own."""
    return str(getattr(image, "filename", "")) or where


def checked(found: object, where: str) -> Image:
    """Return what a data set holds if it is an image.

    Raises:
        ValueError: If it is something else.

    """
    from PIL import Image

    if not isinstance(found, Image.Image):
        raise ValueError(
            f"{where} is {str(found)[:60]!r} and no image; for paths of files use datasets' cast_column with "
            "datasets.Image() and save_to_disk"
        )
    return found


def rgb(found: object, where: str) -> Image:
    """Return an image with three channels of 8 bits.

    Args:
        found: What a data set holds.
        where: Its split, row and column, for an error.

    Raises:
        ValueError: If it is no image, or one of more than 8 bits: Pillow would make all above 255 white, and how many
            of its bits an image uses (a scanner often 12 of 16) is not known here.

    """
    image = checked(found, where)
    if image.mode.startswith(("I", "F")):
        raise ValueError(
            f"{called(image, where)} has more than 8 bits (Pillow's mode {image.mode}); save it with 8 bits, as values "
            "from 0 to 255, to which all images are scaled alike"
        )
    return image.convert("RGB")


def with_all_splits(found: Mapping[str, Dataset], where: object) -> DatasetDict:
    """Return train, validation and test, of which the latter two are drawn from train if they are not there.

    Args:
        found: Data sets by split.
        where: What to call it in an error.

    Raises:
        ValueError: If there is no train.

    """
    datasets = imported()
    if "train" not in found:
        raise ValueError(f"{where} has no split called train; it has {', '.join(found)}")
    splits = {"train": found["train"]}
    for split, names in SPLITS.items():
        held = next((name for name in names if name in found), None)
        if held is None:
            parts = splits["train"].train_test_split(test_size=SHARE, seed=0)
            splits["train"], splits[split] = parts["train"], parts["test"]
        else:
            splits[split] = found[held]
    return datasets.DatasetDict(splits)


def fingerprint(parts: Iterable[Tensor]) -> str:
    """Return the SHA-256 of tensors and their shapes: results on other data must not be taken for these."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr((part.dtype, tuple(part.shape))).encode())
        digest.update(part.contiguous().numpy())
    return digest.hexdigest()
