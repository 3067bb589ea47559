"""The packed object: a mapping of names to boolean tensors that survives copies, files and damage."""

import copy
import io
import os
import pickle
import re
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from wcr_optim.pruning import Masks

SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9)
BOOLEANS = st.dictionaries(st.text(max_size=5), SHAPES.flatmap(lambda shape: hnp.arrays(bool, shape)), max_size=4)


def tensors(arrays):
    return {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}


def example():
    return Masks({"a.weight": torch.rand(3, 7) < 0.5, "b.weight": torch.rand(2, 2, 2) < 0.5})


@settings(max_examples=100, deadline=None)
@given(BOOLEANS)
def test_a_mapping_of_what_went_in(arrays):
    given_masks = tensors(arrays)
    masks = Masks(given_masks)
    assert list(masks) == list(given_masks)
    assert len(masks) == len(given_masks)
    for name, mask in given_masks.items():
        assert name in masks
        assert masks[name].dtype is torch.bool
        assert torch.equal(masks[name], mask)
        assert masks.kept_by_name[name] == int(mask.sum())
    assert masks.shapes == {name: mask.shape for name, mask in given_masks.items()}
    assert masks.kept == sum(int(mask.sum()) for mask in given_masks.values())
    assert masks.total == sum(mask.numel() for mask in given_masks.values())


@settings(max_examples=50, deadline=None)
@given(BOOLEANS)
def test_copies_and_files_are_equal(arrays):
    masks = Masks(tensors(arrays))
    assert copy.deepcopy(masks) == masks
    assert pickle.loads(pickle.dumps(masks)) == masks
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "masks.pt")
        masks.save(path)
        loaded = Masks.load(path)
    assert loaded == masks
    assert list(loaded) == list(masks)


def test_a_large_mask_in_any_layout():
    mask = torch.rand(64, 32, 5, 7) < 0.3
    for layout in (mask, mask.to(memory_format=torch.channels_last), mask.transpose(0, 1)):
        assert torch.equal(Masks({"w": layout})["w"], layout)


def test_one_bit_per_weight(tmp_path):
    masks = Masks({f"{i}": torch.rand(1000, 1000) < 0.05 for i in range(4)})
    assert len(pickle.dumps(masks)) < 4e6 / 8 + 2000
    masks.save(tmp_path / "masks")
    assert os.path.getsize(tmp_path / "masks") < 4e6 / 8 + 4000


def test_sparsity():
    masks = Masks({"a": torch.tensor([True, False, False, False]), "b": torch.tensor([[True]])})
    assert masks.sparsity == pytest.approx(3 / 5)
    assert Masks({}).sparsity == 0.0
    assert repr(masks) == "Masks(2 tensors, 2 of 5 weights kept, sparsity 60.00%)"


def test_equality():
    masks = example()
    assert masks == Masks({name: masks[name] for name in reversed(list(masks))})
    assert masks != Masks({"a.weight": masks["a.weight"]})
    assert masks != Masks({**masks, "a.weight": ~masks["a.weight"]})
    assert masks != Masks({"a.weight": masks["a.weight"].reshape(7, 3), "b.weight": masks["b.weight"]})
    assert masks != dict(masks)
    with pytest.raises(TypeError, match="unhashable"):
        hash(masks)


def test_unpacked_masks_are_new():
    masks = example()
    masks["a.weight"].zero_()
    assert masks == copy.deepcopy(masks)
    assert masks["a.weight"].any()


def test_an_unknown_name():
    with pytest.raises(KeyError):
        example()["c"]
    assert example().get("c") is None
    assert "c" not in example()


@pytest.mark.parametrize("mask", [torch.ones(3), torch.ones(3, dtype=torch.uint8), np.ones(3, bool), [True]])
def test_only_booleans(mask):
    with pytest.raises(TypeError, match="mask of w must be a boolean tensor"):
        Masks({"w": mask})


# ------------------------------------------------------------------------------------------------------------- files


def test_a_truncated_or_flipped_file_gives_a_clear_error(tmp_path):
    path = tmp_path / "masks"
    example().save(path)
    sound = path.read_bytes()
    for end in range(0, len(sound), 37):
        path.write_bytes(sound[:end])
        with pytest.raises(ValueError, match="not a sound file of masks"):
            Masks.load(path)
    path.write_bytes(b"\x00" * 1000)
    with pytest.raises(ValueError, match="not a sound file of masks"):
        Masks.load(path)


class Trap:
    def __reduce__(self):
        return os.mkdir, ("sprung",)


def test_nothing_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": "wcr_optim.masks", "version": 1, "shapes": {}, "bits": Trap()}, "masks")
    with pytest.raises(ValueError, match="not a sound file of masks"):
        Masks.load("masks")
    assert os.listdir() == ["masks"]


SOUND = {"format": "wcr_optim.masks", "version": 1, "shapes": {"w": [3, 3]}, "bits": torch.tensor([255, 1]).byte()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "does not say 'wcr_optim.masks'"),
        ({"version": 2}, "has version 2, this release reads 1"),
        ({"shapes": {"w": [3, -3]}}, "shapes are malformed"),
        ({"shapes": {"w": [3.0, 3]}}, "shapes are malformed"),
        ({"shapes": {3: [3, 3]}}, "shapes are malformed"),
        ({"shapes": [["w", [3, 3]]]}, "shapes are malformed"),
        ({"shapes": {"w": [2**40, 2**40]}}, "more elements than 64 bits can count"),
        ({"shapes": {"w": [3, 3], "v": [0, 2**70]}}, "mask of v has a shape of more elements than 64 bits can count"),
        (
            {"shapes": {"w": [2**39]}, "bits": torch.zeros(1, dtype=torch.uint8).expand(2**36)},
            "not stored one after the other",
        ),
        ({"bits": torch.tensor([255, 0, 1, 0]).byte()[::2]}, "not stored one after the other"),
        ({"bits": torch.tensor([255, 1]).byte().to_sparse()}, "not stored one after the other"),
        ({"shapes": {"w": [30, 3]}}, "take 12 bytes"),
        ({"bits": torch.tensor([255.0, 1.0])}, "take 2 bytes"),
        ({"bits": torch.tensor([[255, 1]]).byte()}, "take 2 bytes"),
        ({"bits": None}, "take 2 bytes"),
        ({"bits": torch.tensor([255, 3]).byte()}, "mask of w has bits beyond its last weight"),
    ],
)
def test_malformed_content_is_refused(tmp_path, change, message):
    path = tmp_path / "masks"
    torch.save(SOUND, path)
    assert Masks.load(path)["w"].all()
    torch.save({**SOUND, **change}, path)
    with pytest.raises(ValueError, match=re.escape(message)):
        Masks.load(path)


def test_a_compressed_file_is_refused_before_it_takes_memory(tmp_path, monkeypatch):
    torch.save(SOUND, tmp_path / "masks")
    with zipfile.ZipFile(tmp_path / "masks") as plain, zipfile.ZipFile(tmp_path / "packed", "w", 8) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(ValueError, match=r"torch\.save compresses nothing"):
        Masks.load(tmp_path / "packed")


def test_other_objects_are_refused(tmp_path):
    for content in (torch.zeros(3), [1, 2], {"w": torch.zeros(3)}):
        torch.save(content, tmp_path / "masks")
        with pytest.raises(ValueError, match="not a sound file of masks"):
            Masks.load(tmp_path / "masks")


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        Masks.load(tmp_path / "none")


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "masks"
    old = example()
    old.save(path)

    def fails(content, file):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(OSError, match="no space left"):
        Masks({"other": torch.ones(2, dtype=torch.bool)}).save(path)
    assert Masks.load(path) == old
    assert os.listdir(tmp_path) == ["masks"]


def test_save_through_a_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "masks")
    masks = example()
    masks.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert Masks.load(tmp_path / "masks") == masks


def test_pieces_must_fit_the_shapes():
    piece = torch.ones(4, dtype=torch.bool)
    shapes = {"a": torch.Size([2, 2]), "b": torch.Size([4])}
    assert Masks.from_chunks(shapes, [[piece], [piece]]).kept == 8
    with pytest.raises(ValueError, match="more masks than the 2 shapes"):
        Masks.from_chunks(shapes, [[piece], [piece], [piece]])


def test_pickles_of_a_view_carry_no_more():
    buffer = io.BytesIO()
    pickle.dump(example(), buffer)
    assert buffer.tell() < 2000
