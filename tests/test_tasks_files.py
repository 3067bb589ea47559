"""Tasks on real data, with small files made here: folders of images, parquet, JSON, a saved model and its tokenizer."""

import json
import math
from dataclasses import replace

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks import tasks
from benchmarks.tasks import hub, images, instructions, masks
from wcr_optim import AdamW, param_groups, pruning


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return a folder for data sets; what is prepared of them goes beside it, and the hub is out of reach."""
    monkeypatch.setenv(hub.FOLDER, str(tmp_path / "data"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    path = tmp_path / "data"
    path.mkdir()
    return path


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def picture(path, pixels) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)


def saved(path, image: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def deep(values: np.ndarray, mode: str) -> Image.Image:
    """Return an image of one channel of 16 or 32 bits."""
    kinds = {"I;16": "<u2", "I;16B": ">u2", "I": "i4", "F": "f4"}
    return Image.frombytes(mode, values.shape[::-1], values.astype(kinds[mode]).tobytes())


class TestHub:
    @pytest.mark.parametrize("form", ["saved", "parquet", "json"])
    def test_forms_of_a_folder(self, form, folder):
        rows = datasets.Dataset.from_dict({"x": list(range(50))})
        if form == "saved":
            datasets.DatasetDict(train=rows).save_to_disk(folder / "some")
        else:
            (folder / "some").mkdir()
            path = str(folder / "some" / f"train.{form}")
            rows.to_parquet(path) if form == "parquet" else rows.to_json(path)
        found = hub.load("some")
        assert [len(found[split]) for split in ("train", "validation", "test")] == [40, 5, 5]
        assert sorted(x for part in found.values() for x in part["x"]) == list(range(50))
        again = hub.load("some")
        assert all(found[split]["x"] == again[split]["x"] for split in found)

    def test_splits_that_are_there_stay_as_they_are(self, folder):
        rows = datasets.Dataset.from_dict({"x": list(range(20))})
        parts = {"train": rows, "valid": rows.select([3]), "test": rows.select([5])}
        datasets.DatasetDict(parts).save_to_disk(folder / "some")
        found = hub.load("some")
        assert {split: len(part) for split, part in found.items()} == {"train": 20, "validation": 1, "test": 1}
        assert found["validation"]["x"][:] == [3]

    def test_what_is_missing_is_named(self, folder, monkeypatch):
        with pytest.raises(FileNotFoundError, match=f"of your own: put mine/ into {hub.FOLDER}={folder}"):
            hub.load("mine")
        with pytest.raises(FileNotFoundError, match=r"load_dataset\('who/what', 'small'\).save_to_disk\('some'\)"):
            hub.load("some", "who/what", "small")
        datasets.DatasetDict(test=datasets.Dataset.from_dict({"x": [1]})).save_to_disk(folder / "some")
        with pytest.raises(ValueError, match="no split called train; it has test"):
            hub.load("some")
        monkeypatch.delenv(hub.FOLDER)
        with pytest.raises(FileNotFoundError, match=f"set {hub.FOLDER} to the folder that holds mine/"):
            hub.load("mine")

    @pytest.mark.parametrize(
        ("file", "text", "told"),
        [
            ("train.jsonl", '{"x": 1}\n{"x": 2\n', "JSON parse error"),
            ("train.json", '[{"x": 1}, {"x": 2]', "character"),
            ("train.csv", "a,b\n1,2\n1,2,3\n", "Expected 2 fields in line 3, saw 3"),
            ("train.jsonl", "", "a file is empty"),
            ("train.parquet", "none", "Parquet file size is 4 bytes"),
            ("dataset_dict.json", "{", "Expecting property name"),
        ],
    )
    def test_a_broken_file_is_one_line_with_the_folder_and_the_cause(self, file, text, told, folder):
        (folder / "some").mkdir()
        (folder / "some" / file).write_text(text)
        with pytest.raises(ValueError, match=rf"^{folder}/some cannot be read: .*{told}") as error:
            hub.load("some")
        assert "\n" not in str(error.value)
        assert error.value.__cause__ is not None

    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
    def test_images_of_8_bits_become_rgb(self, mode):
        image = Image.fromarray(noise(8, 8, 3)).convert(mode)
        assert np.array_equal(np.array(hub.rgb(image, "x")), np.array(image.convert("RGB")))

    @pytest.mark.parametrize("mode", ["I;16", "I;16B", "I", "F"])
    def test_images_of_more_bits_are_refused(self, mode, tmp_path):
        image = deep(np.arange(64).reshape(8, 8) * 60, mode)
        with pytest.raises(ValueError, match=rf"^train: row 3 has more than 8 bits \(Pillow's mode {mode}\); save"):
            hub.rgb(image, "train: row 3")
        path = tmp_path / "scan.tif"
        saved(path, image)
        with Image.open(path) as read, pytest.raises(ValueError, match=f"^{path} has more than 8 bits"):
            hub.rgb(read, "train: row 3")

    def test_columns_are_named(self):
        rows = datasets.Dataset.from_dict({"a": [1], "b": [2]})
        assert hub.column(rows, "c", "b", "a") == "b"
        with pytest.raises(ValueError, match="none of the columns c, d; it has a, b"):
            hub.column(rows, "c", "d")


def trained(task, steps: int, lr: float):
    network = task.model(0)
    optimizer = AdamW(param_groups(network, exclude=task.exclude), lr=lr, weight_concentration=1e-3)
    network.train()
    for batch in task.batches(0, steps, 1):
        optimizer.zero_grad()
        loss = task.loss(network, batch)
        loss.backward()
        optimizer.step()
    return network.eval(), loss.item()


class TestImages:
    def test_a_folder_of_classes_is_learned(self, folder):
        """Two classes, dark and light, in pictures of different sizes and modes."""
        for split, count in (("train", 20), ("test", 6)):
            for k in range(count):
                light = k % 2
                pixels = noise(20 + k, 30, 3, seed=k) // 4 + 150 * light
                picture(folder / "images" / split / ("light" if light else "dark") / f"{k}.png", pixels)
        picture(folder / "images" / "train" / "dark" / "gray.png", noise(64, 64) // 4)
        source = next(source for source in images.SOURCES if source.name == "images")
        task = images._task(replace(source, side=16), "resnet20")
        assert task.calibration is not None
        assert images._task(replace(source, side=16), "vit").calibration is None, "it has no statistics to estimate"
        again = images._task(replace(source, side=16), "resnet18")
        assert task.data_hash == again.data_hash != images._task(replace(source, side=17), "resnet20").data_hash
        picture(folder / "images" / "train" / "dark" / "gray.png", noise(64, 64, seed=9) // 4)
        assert images._task(replace(source, side=16), "resnet20").data_hash != task.data_hash
        batch, labels = next(task.batches(0, 1, 1))
        assert batch.shape[1:] == (3, 16, 16)
        assert batch.dtype == torch.float32
        assert set(labels.tolist()) == {0, 1}
        network, _ = trained(task, 8, 3e-3)
        found = pruning.sweep(
            network, lambda n: task.evaluate(n, "test"), [0.0, 0.5], calibration=task.calibration(), progress=False
        )
        assert found.values()[0] == 100

    @pytest.mark.parametrize("name", ["cifar100_resnet20", "cifar100_vit"])
    def test_a_data_set_as_on_the_hub(self, name, folder):
        rows = {
            "img": [Image.fromarray(noise(32, 32, 3, seed=k)) for k in range(30)],
            "fine_label": [k % 5 for k in range(30)],
            "coarse_label": [0] * 30,
        }
        data = datasets.Dataset.from_dict(rows).cast_column("img", datasets.Image())
        (folder / "cifar100").mkdir()
        data.to_parquet(str(folder / "cifar100" / "train-00000-of-00001.parquet"))
        data.to_parquet(str(folder / "cifar100" / "test-00000-of-00001.parquet"))
        task = tasks.task.__wrapped__(name)
        assert task.steps == images.EPOCHS
        network, loss = trained(task, 2, 1e-3)
        assert network(next(task.batches(0, 1, 1))[0]).shape[1] == 5
        assert math.isfinite(loss)
        assert 0 <= task.evaluate(network, "test") <= 100

    def test_unknown_labels_are_named(self, folder):
        for split, labels in (("train", [0, 1] * 10), ("test", [0, 2])):
            pictures = [Image.fromarray(noise(32, 32, 3)) for _ in labels]
            data = datasets.Dataset.from_dict({"img": pictures, "label": labels})
            (folder / "cifar10").mkdir(exist_ok=True)
            data.cast_column("img", datasets.Image()).to_parquet(str(folder / "cifar10" / f"{split}.parquet"))
        with pytest.raises(ValueError, match=r"cifar10 test: row 1 has 2 in the column label, .*; those have 0, 1$"):
            images.load(images.SOURCES[0])

    def test_a_label_between_those_of_training_is_unknown_unless_the_data_set_names_it(self, folder):
        self.labelled(folder, "train", [0, 2] * 5)
        self.labelled(folder, "validation", [0, 2])
        self.labelled(folder, "test", [0, 1, 1, 1])
        with pytest.raises(ValueError, match=r"cifar10 test: row 1 has 1 in the column label, .*; those have 0, 2$"):
            images.load(images.SOURCES[0])
        for split, labels in (("train", [0, 2] * 5), ("validation", [0, 2]), ("test", [0, 1, 1, 1])):
            self.labelled(folder, split, labels, names=["a", "b", "c"])
        found = images.load(images.SOURCES[0])
        assert found.classes == 3
        assert found.splits["test"].labels.tolist() == [0, 1, 1, 1]
        self.labelled(folder, "test", [0, -1], names=["a", "b", "c"])  # as the hub has it where labels are kept back
        with pytest.raises(ValueError, match=r"labels of cifar10 test must lie in \[0, 2\] as in train, got \[-1, 0\]"):
            images.load(images.SOURCES[0])

    def labelled(self, folder, split, labels, pictures=None, names=None):
        pictures = pictures or [Image.fromarray(noise(32, 32, 3)) for _ in labels]
        data = datasets.Dataset.from_dict({"img": pictures, "label": labels})
        if not isinstance(pictures[0], str):
            data = data.cast_column("img", datasets.Image())
        if names is not None:
            data = data.cast_column("label", datasets.ClassLabel(names=names))
        (folder / "cifar10").mkdir(exist_ok=True)
        data.to_parquet(str(folder / "cifar10" / f"{split}.parquet"))

    def test_labels_of_text_are_classes_in_the_order_of_the_alphabet(self, folder):
        self.labelled(folder, "train", ["dog", "cat"] * 5)
        self.labelled(folder, "validation", ["cat"])
        self.labelled(folder, "test", ["dog", "cat"])
        found = images.load(images.SOURCES[0])
        assert found.classes == 2
        assert found.splits["train"].labels.tolist() == [1, 0] * 5
        assert found.splits["test"].labels.tolist() == [1, 0]
        self.labelled(folder, "test", ["dog", "cow"])
        with pytest.raises(ValueError, match=r"cifar10 test: row 1 has 'cow' in the column label, .* have cat, dog$"):
            images.load(images.SOURCES[0])

    def test_missing_labels_and_images_are_named(self, folder):
        self.labelled(folder, "train", [0, 1] * 10)
        self.labelled(folder, "test", [0, None])
        with pytest.raises(ValueError, match="cifar10 test: row 1 has None in the column label; make labels all whole"):
            images.load(images.SOURCES[0])
        self.labelled(folder, "test", [0, 1], ["a.png", "b.png"])
        self.labelled(folder, "train", [0, 1] * 10, ["a.png"] * 20)
        with pytest.raises(ValueError, match=r"cifar10 train: row 0 of the column img is 'a.png' and no image; for"):
            images.load(images.SOURCES[0])

    def test_images_of_16_bits_are_named(self, folder):
        for k in range(12):
            saved(folder / "images" / "train" / "ab"[k % 2] / f"{k}.png", deep(np.full((8, 8), 1000 + k), "I;16"))
        source = next(source for source in images.SOURCES if source.name == "images")
        with pytest.raises(ValueError, match=rf"^{folder}/images/train/./\d+.png has more than 8 bits \(.* I;16\)"):
            images.load(source)

    @pytest.mark.parametrize("mirrored", [True, False])
    def test_shifts_are_those_of_a_loop(self, mirrored):
        pictures = torch.randint(1, 256, (6, 3, 16, 16), dtype=torch.uint8)
        found = images.shifted(pictures, torch.Generator().manual_seed(1), mirrored=mirrored)
        generator = torch.Generator().manual_seed(1)
        top, left = torch.randint(5, (2, 6, 1, 1), generator=generator).flatten(1).tolist()
        mirror = torch.randint(2, (6, 1, 1), generator=generator).flatten().tolist() if mirrored else [0] * 6
        for k, image in enumerate(pictures):
            padded = torch.zeros(3, 20, 20, dtype=torch.uint8)
            padded[:, 2:18, 2:18] = image
            wanted = padded[:, top[k] : top[k] + 16, left[k] : left[k] + 16]
            assert torch.equal(found[k], wanted.flip(-1) if mirror[k] else wanted)

    def test_training_images_are_normalized(self, folder):
        some = {"train": images.Split(torch.randint(256, (64, 3, 8, 8)).byte(), torch.zeros(64, dtype=torch.long))}
        train = some["train"].images.double()
        mean, deviation = (x.float().view(3, 1, 1) for x in (train.mean((0, 2, 3)), train.std((0, 2, 3))))
        normal = images.Images(some, 1, mean, deviation).normalized(some["train"].images)
        torch.testing.assert_close(normal.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
        torch.testing.assert_close(normal.std((0, 2, 3)), torch.ones(3), atol=1e-4, rtol=0)


@pytest.fixture
def small(monkeypatch):
    """Make the masks' images and the network small, so that a step takes no time."""
    monkeypatch.setattr(masks, "SIDE", 32)
    monkeypatch.setattr(masks, "WIDTHS", (8, 16, 32))


class TestMasks:
    def paint(self, folder, count, values=(0, 255), size=(40, 48)):
        for k in range(count):
            mask = np.zeros(size, dtype=np.uint8)
            for place, value in enumerate(values):
                mask[:, place * size[1] // len(values) :] = value
            picture(folder / "masks" / f"{k}.png", mask)
            picture(folder / "images" / f"{k}.jpg", np.stack([mask] * 3, -1))

    @pytest.mark.usefixtures("small")
    @pytest.mark.parametrize("split", [True, False])
    def test_two_values_are_background_and_foreground(self, split, folder):
        if split:
            for name in ("train", "val", "test"):
                self.paint(folder / "masks" / name, 10)
        else:
            self.paint(folder / "masks", 12)
        task = masks.TASKS["masks"]()
        batch, labels = next(task.batches(0, 1, 1))
        assert batch.shape[1:] == (3, 32, 32)
        assert labels.unique().tolist() == [0, 1]
        network, _ = trained(task, 12, 3e-3)
        network.train()  # batch statistics: the running ones have seen too few batches
        assert task.evaluate(network, "test")["dice"] > 90

    @pytest.mark.usefixtures("small")
    def test_statistics_are_estimated_on_images_of_all_names(self, folder):
        self.paint(folder / "masks" / "train", 80)
        for name in ("val", "test"):
            self.paint(folder / "masks" / name, 2)
        for k in range(80):  # those whose names come first are black
            picture(folder / "masks" / "train" / "images" / f"{k}.jpg", np.full((40, 48, 3), 0 if k < 64 else 255))
        task = masks.TASKS["masks"]()
        means = torch.cat([part.mean((1, 2, 3)) for part in task.calibration()])
        assert len(means) == 64
        assert 5 <= (means > 0).sum() <= 16
        assert len(task.sharpness_batch()[0]) == 4

    @pytest.mark.usefixtures("small")
    def test_other_masks_are_other_data(self, folder):
        self.paint(folder / "masks", 12)
        before = masks.TASKS["masks"]().data_hash
        assert masks.TASKS["masks"]().data_hash == before != ""
        picture(folder / "masks" / "masks" / "3.png", np.full((40, 48), 255))
        assert masks.TASKS["masks"]().data_hash != before

    @pytest.mark.usefixtures("small")
    def test_more_values_are_classes(self, folder):
        self.paint(folder / "masks", 10, (0, 1, 2))
        assert masks.load().classes == 3
        for part in masks.load().splits.values():
            assert part.labels.unique().tolist() == [0, 1, 2]

    @pytest.mark.usefixtures("small")
    @pytest.mark.parametrize(("values", "classes"), [((0, 127, 254), 3), ((1, 2, 5), 4), ((0, 1, 2), 3), ((7, 9), 2)])
    def test_classes_are_the_values_there_are_and_the_background(self, values, classes, folder):
        self.paint(folder / "masks", 10, values)
        found = masks.load()
        assert found.classes == classes
        for part in found.splits.values():
            assert part.labels.unique().tolist() == list(range(classes - len(values), classes))

    def save(self, folder, count, made):
        """Save masks with their images."""
        for k in range(count):
            mask = made(k)
            saved(folder / "masks" / f"{k}.tif", mask)
            saved(folder / "images" / f"{k}.png", Image.new("RGB", mask.size))

    @pytest.mark.usefixtures("small")
    @pytest.mark.parametrize("mode", ["I;16", "I;16B", "I", "F"])
    def test_masks_of_more_bits_keep_their_values(self, mode, folder):
        values = np.array([0, 300, 1000, 40000]).repeat(8)[:, None].repeat(32, 1)
        self.save(folder / "masks", 10, lambda k: deep(values, mode))
        found = masks.load()
        assert found.classes == 4
        assert torch.equal(found.splits["test"].labels[0], torch.arange(4).repeat_interleave(8)[:, None].expand(32, 32))
        for wrong in (-1, 70000) if mode == "I" else (0.5, math.nan, math.inf) if mode == "F" else ():
            saved(folder / "masks" / "masks" / "3.tif", deep(np.full((32, 32), wrong), mode))
            with pytest.raises(ValueError, match=r"masks/3.tif has values other than whole numbers from 0 to 65535"):
                masks.load()

    @pytest.mark.usefixtures("small")
    def test_classes_are_indices_of_a_palette(self, folder):
        """Two of its colours are of one gray value."""
        values = np.array([0, 1, 2, 255], dtype=np.uint8).repeat(8)[:, None].repeat(32, 1)

        def painted(colours):
            mask = Image.fromarray(values)
            mask.putpalette(colours + [0] * (765 - len(colours)) + [224, 224, 192])
            return mask

        self.save(folder / "masks", 10, lambda k: painted([0, 0, 0, 100, 0, 0, 0, 51, 0]))
        gray = Image.fromarray(np.full((32, 32), 3, dtype=np.uint8))
        gray.putpalette([0, 0, 0, 100, 0, 0, 0, 51, 0, 70, 70, 70])
        saved(folder / "masks" / "masks" / "0.tif", gray)  # one class in one mask, of a gray colour
        found = masks.load()
        assert found.classes == 5
        assert (torch.cat([split.labels for split in found.splits.values()]) == 3).flatten(1).all(1).sum() == 1
        saved(folder / "masks" / "masks" / "0.tif", painted([0, 0, 0, 100, 0, 0, 0, 51, 0]))
        found = masks.load()
        assert found.classes == 4
        assert torch.equal(found.splits["test"].labels[0], torch.arange(4).repeat_interleave(8)[:, None].expand(32, 32))
        saved(folder / "masks" / "masks" / "9.tif", painted([0, 0, 0, 0, 51, 0, 100, 0, 0]))
        with pytest.raises(ValueError, match=r".tif has the colour \(\d+, .* at index 1 of its palette, a mask before"):
            masks.load()
        saved(folder / "masks" / "masks" / "9.tif", Image.fromarray(values))
        with pytest.raises(ValueError, match=r"masks/9.tif has no palette \(Pillow's mode L\), and others have; save"):
            masks.load()

    @pytest.mark.usefixtures("small")
    @pytest.mark.parametrize("mode", ["1", "LA", "RGB", "RGBA", "black first", "white first"])
    def test_masks_without_colours_are_gray_in_any_mode(self, mode, folder):
        """Some files are gray, as of programs that save each in the smallest form it has."""
        mask = Image.fromarray(np.array([0, 255], dtype=np.uint8).repeat(16)[:, None].repeat(32, 1))

        def other():
            if "first" not in mode:
                return mask.convert(mode)
            one = mode == "black first"
            indexed = Image.fromarray((np.array(mask) == (255 if one else 0)).astype(np.uint8))
            indexed.putpalette([0, 0, 0, 255, 255, 255] if one else [255, 255, 255, 0, 0, 0])
            return indexed

        self.save(folder / "masks", 10, lambda k: other() if k % 2 else mask)
        found = masks.load()
        assert found.classes == 2
        wanted = torch.arange(2).repeat_interleave(16)
        assert all(torch.equal(labels[:, 0], wanted) for labels in found.splits["train"].labels)

    @pytest.mark.usefixtures("small")
    @pytest.mark.parametrize("mode", ["RGB", "RGBA"])
    def test_masks_of_colours_are_refused(self, mode, folder):
        self.save(folder / "masks", 10, lambda k: Image.new(mode, (32, 32), (0, 0, 255 * (k == 4))))
        with pytest.raises(ValueError, match=r"masks/4.tif has colours; save the class of a pixel as its gray"):
            masks.load()

    @pytest.mark.usefixtures("small")
    def test_masks_whose_values_are_smeared_are_refused(self, folder):
        self.paint(folder / "masks", 10)
        ring = np.hypot(*np.mgrid[-20:20, -24:24]) < 15
        path = folder / "masks" / "masks"
        (path / "3.png").unlink()
        picture(path / "3.jpg", ring * 255)
        with pytest.raises(ValueError, match=r"3.jpg \(JPEG, \d+ values\) cannot .* Save masks as PNG, with 64"):
            masks.load()
        with Image.open(path / "3.jpg") as smeared:
            smeared.resize((480, 400)).resize((48, 40)).save(path / "3.png")
        (path / "3.jpg").unlink()
        with pytest.raises(ValueError, match=r"3.png \(PNG, \d+ values\) cannot be read as classes: JPEG and smooth"):
            masks.load()

    @pytest.mark.usefixtures("small")
    def test_images_of_16_bits_are_named(self, folder):
        self.paint(folder / "masks", 10)
        (folder / "masks" / "images" / "3.jpg").unlink()
        saved(folder / "masks" / "images" / "3.png", deep(np.full((40, 48), 1000), "I;16"))
        with pytest.raises(ValueError, match=rf"^{folder}/masks/images/3.png has more than 8 bits"):
            masks.load()

    @pytest.mark.usefixtures("small")
    @pytest.mark.parametrize("kind", ["images", "masks"])
    def test_two_files_of_one_name_are_named(self, kind, folder):
        self.paint(folder / "masks", 10)
        saved(folder / "masks" / kind / "3.tiff", Image.new("L", (48, 40)))
        with pytest.raises(ValueError, match=rf"/{kind}/3.(jpg|png) and .*/{kind}/3.tiff have one name; keep one"):
            masks.load()

    @pytest.mark.usefixtures("small")
    def test_columns_image_and_mask(self, folder):
        rows = {
            "image": [Image.fromarray(noise(32, 32, 3, seed=k)) for k in range(20)],
            "mask": [Image.fromarray(np.full((32, 32), k % 2, dtype=np.uint8)) for k in range(20)],
        }
        data = datasets.Dataset.from_dict(rows)
        for name in rows:
            data = data.cast_column(name, datasets.Image())
        data.save_to_disk(folder / "masks")
        assert {name: len(part.images) for name, part in masks.load().splits.items()} == {
            "train": 16,
            "validation": 2,
            "test": 2,
        }

    @pytest.mark.usefixtures("small")
    @pytest.mark.parametrize("column", ["image", "mask"])
    def test_a_row_without_an_image_or_a_mask_is_named(self, column, folder):
        rows = {name: [Image.new("L", (32, 32))] * 20 for name in ("image", "mask")}
        rows[column] = [None, *rows[column][1:]]
        data = datasets.Dataset.from_dict(rows)
        for name in rows:
            data = data.cast_column(name, datasets.Image())
        datasets.DatasetDict(train=data, test=data).save_to_disk(folder / "masks")
        with pytest.raises(ValueError, match=rf"masks \w+: row \d+ of the column {column} is 'None' and no image"):
            masks.load()

    @pytest.mark.usefixtures("small")
    def test_what_does_not_fit_is_named(self, folder):
        with pytest.raises(FileNotFoundError, match="of your own: put masks/ into"):
            masks.load()
        self.paint(folder / "masks", 3)
        (folder / "masks" / "masks" / "1.png").unlink()
        with pytest.raises(ValueError, match="1 names are in only one of them, the first '1'"):
            masks.load()
        self.paint(folder / "masks", 3)
        picture(folder / "masks" / "masks" / "1.png", noise(10, 10) // 128)
        with pytest.raises(ValueError, match=r"an image of \(48, 40\) pixels has a mask of \(10, 10\)"):
            masks.load()

    @pytest.mark.usefixtures("small")
    def test_classes_that_training_never_saw_are_named(self, folder):
        self.paint(folder / "masks" / "train", 6, (0, 1, 2))
        self.paint(folder / "masks" / "test", 2, (0, 1, 7))
        with pytest.raises(ValueError, match=r"masks of test .* the value 7 \(.*/test/masks/0.png\), .* only 0, 1, 2$"):
            masks.load()

    @pytest.mark.usefixtures("small")
    def test_a_third_value_beside_two_of_training_is_named(self, folder):
        self.paint(folder / "masks" / "train", 6, (0, 1))
        self.paint(folder / "masks" / "test", 2, (0, 1, 2))
        with pytest.raises(ValueError, match=r"masks of test .* the value 2 \(.*/test/masks/0.png\), .* only 0, 1$"):
            masks.load()

    @pytest.mark.usefixtures("small")
    def test_masks_of_one_class_are_refused(self, folder):
        self.paint(folder / "masks" / "train", 6, (0,))
        with pytest.raises(ValueError, match=r"masks of train in .* are 0 all over; they need background and fore"):
            masks.load()
        for values in ((7, 9), (0, 1, 2)):
            self.paint(folder / "masks" / "train", 6, values)
            self.paint(folder / "masks" / "val", 2, values[:1])
            with pytest.raises(ValueError, match=f"validation in .* are {values[0]} all over, .* a folder validation/"):
                masks.load()

    @pytest.mark.usefixtures("small")
    def test_folders_that_would_not_be_read_are_named(self, folder):
        self.paint(folder / "masks" / "train", 6)
        self.paint(folder / "masks" / "tets", 2)
        (folder / "masks" / ".git").mkdir()
        with pytest.raises(ValueError, match=r"not read: tets; call them one of train, validation, .*, test, or"):
            masks.load()
        (folder / "masks" / "tets").rename(folder / "masks" / "test")
        (folder / "masks" / "test" / "images").rename(folder / "masks" / "test" / "image")
        with pytest.raises(ValueError, match=r"test needs a mask for each image, .*: 2 names are in only one of them"):
            masks.load()
        self.paint(folder / "masks", 6)
        with pytest.raises(ValueError, match="not read: test, train; call them one of images, masks, or"):
            masks.load()


@pytest.fixture
def model(tmp_path, monkeypatch):
    """Save a Llama of 20 k parameters and a tokenizer of bytes, and name them as the model to fine-tune."""
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "</s>"]
    bytes_only = Tokenizer(models.BPE(vocab={symbol: k for k, symbol in enumerate(alphabet)}, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    path = tmp_path / "model"
    PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token="</s>").save_pretrained(path)
    config = LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(path)
    monkeypatch.setenv(instructions.MODEL, str(path))
    return path


def lines(path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows))


def questions(count: int) -> list[dict]:
    """Make questions whose answer is the color that they name."""
    colors = ["red", "green", "dark blue"]
    return [
        {
            "question": f"{k}: what is {colors[k % 3]}?",
            "choices": {"label": ["A", "B", "C"], "text": colors},
            "answerKey": "ABC"[k % 3],
        }
        for k in range(count)
    ]


class TestInstructions:
    def test_other_rows_or_another_model_are_other_data(self, folder, model):
        rows = [{"instruction": f"Say {k}.", "output": "yes"} for k in range(30)]
        lines(folder / "instructions" / "train.jsonl", rows)
        hashes = [instructions.TASKS["instructions"]().data_hash for _ in range(2)]
        LlamaForCausalLM.from_pretrained(model).double().save_pretrained(model)
        hashes.append(instructions.TASKS["instructions"]().data_hash)
        lines(folder / "instructions" / "train.jsonl", [*rows[:-1], {"instruction": "Say 29.", "output": "no"}])
        hashes.append(instructions.TASKS["instructions"]().data_hash)
        assert hashes[0] == hashes[1] != ""
        assert len(set(hashes)) == 3

    def test_sharpness_is_measured_on_no_more_tokens_than_fit(self):
        row = instructions.Encoded(tuple(range(500)), 10, 490)
        assert instructions._sharpness_batch([row] * 9)["input_ids"].shape == (4, 500)
        assert instructions._sharpness_batch([row])["input_ids"].shape == (1, 500)

    def test_an_answer_is_learned(self, folder, model):
        rows = [{"instruction": f"Say {k}.", "input": "loud" * (k % 2), "output": "yes, yes, yes"} for k in range(30)]
        lines(folder / "instructions" / "train.jsonl", rows)
        task = instructions.TASKS["instructions"]()
        assert task.exclude == ("lm_head",)
        assert torch.equal(*(next(task.batches(0, 1, 1))["input_ids"] for _ in range(2)))
        before = task.evaluate(task.model(0).eval(), "validation")
        network, _ = trained(task, 15, 1e-2)
        after = task.evaluate(network, "validation")
        assert before > 8
        assert after < before / 2
        assert after == task.evaluate(network, "validation")

    def test_losses_are_those_of_rows_alone(self, model):
        """Padding changes nothing, and neither the prompt nor its last token's prediction of itself counts."""
        tokenizer = instructions.pretrained("AutoTokenizer")
        network = instructions.pretrained("AutoModelForCausalLM").eval()
        examples = [instructions.Example("Q: " + "x" * k, (" answer" * (4 - k),)) for k in range(4)]
        rows = [instructions.encoded(tokenizer, example, 0) for example in examples]
        found = instructions.answer_losses(network, rows, batch=4)
        for row, example, value in zip(rows, examples, found.tolist(), strict=True):
            text = example.prompt + example.answers[0]
            assert bytes(tokenizer.decode(row.tokens), "utf-8") == bytes(text + "</s>", "utf-8")
            assert row.size == len(example.answers[0])
            with torch.no_grad():
                odds = network(torch.tensor([row.tokens])).logits[0].log_softmax(-1)
            start = len(example.prompt)
            wanted = -sum(odds[k - 1, row.tokens[k]].item() for k in range(start, len(row.tokens)))
            assert value == pytest.approx(wanted, rel=1e-5)
        batch = instructions.collated(rows)
        counted = sum(len(row.tokens) - row.prompt for row in rows)
        assert instructions.loss(network, batch).item() == pytest.approx(found.sum().item() / counted, rel=1e-5)
        assert instructions.bits_per_byte(network, rows) == pytest.approx(
            found.sum().item() / math.log(2) / sum(row.size for row in rows)
        )

    def test_long_examples_are_cut(self, model):
        tokenizer = instructions.pretrained("AutoTokenizer")
        row = instructions.encoded(tokenizer, instructions.Example("p" * 600, ("a" * 600,)), 0)
        assert len(row.tokens) == instructions.TOKENS
        assert row.tokens[-1] == tokenizer.eos_token_id
        assert row.prompt == instructions.TOKENS - instructions.TOKENS // 2 - 1
        assert row.size == instructions.TOKENS // 2  # of one byte each: bits per byte of what is measured

    def test_accuracy_is_the_share_of_right_choices_of_a_loop(self, folder, model):
        lines(folder / "commonsense" / "train.jsonl", questions(60))
        task = instructions.TASKS["commonsense"]()
        assert (task.metric, task.best) == ("accuracy", max)
        network = task.model(0).eval()
        tokenizer = instructions.pretrained("AutoTokenizer")
        right = 0
        examples = instructions.load("commonsense")["test"]
        for example in examples:
            per_byte = []
            for k, answer in enumerate(example.answers):
                row = instructions.encoded(tokenizer, example, k)
                per_byte.append(instructions.answer_losses(network, [row]).item() / len(answer))
            right += per_byte.index(min(per_byte)) == example.right
        assert task.evaluate(network, "test") == pytest.approx(100 * right / len(examples))

    def test_hidden_test_answers_make_validation_the_test(self, folder):
        rows = questions(40)
        lines(folder / "commonsense" / "train.jsonl", rows)
        lines(folder / "commonsense" / "validation.jsonl", rows[:7])
        lines(folder / "commonsense" / "test.jsonl", [row | {"answerKey": ""} for row in rows[:5]])
        found = instructions.load("commonsense")
        assert {split: len(part) for split, part in found.items()} == {"train": 36, "validation": 4, "test": 7}
        assert [example.right for example in found["test"]] == [0, 1, 2, 0, 1, 2, 0]

    def test_zero_is_an_answer(self, folder):
        lines(folder / "instructions" / "train.jsonl", [{"instruction": "2 - 2?", "input": 0, "output": 0}] * 30)
        (found,) = set(instructions.load("instructions")["train"])
        assert found == instructions.Example("Instruction: 2 - 2?\nInput: 0\nAnswer:", (" 0",))

    @pytest.mark.parametrize(
        ("wrong", "said"),
        [
            ({"choices": ["red", "green"]}, r"choices must be label and text, .*, got \['red', 'green'\]"),
            ({"answerKey": "E"}, r"answerKey must be one of the labels \['A', 'B', 'C'\], got 'E'"),
            ({"choices": {"label": ["A"], "text": ["red", "green"]}}, "choices must have as many labels as texts"),
        ],
    )
    def test_rows_that_cannot_be_laid_out_are_named(self, wrong, said, folder):
        rows = [{"question": "0: ?", "choices": None, "answerKey": ""}] + [row | wrong for row in questions(1)]
        for split in ("train", "validation", "test"):
            lines(folder / "commonsense" / f"{split}.jsonl", rows)
        with pytest.raises(ValueError, match=f"commonsense train: row 1, '0: what is red.': {said}"):
            instructions.load("commonsense")

    def test_a_tied_output_layer_needs_no_exclusion(self, model):
        config = LlamaConfig.from_pretrained(model)
        config.tie_word_embeddings = True
        LlamaForCausalLM(config).save_pretrained(model)
        assert instructions.output_layer() == ()

    def test_what_is_missing_is_named(self, folder, monkeypatch):
        lines(folder / "instructions" / "train.jsonl", [{"prompt": "a", "output": "b"}] * 20)
        with pytest.raises(ValueError, match="none of the columns instruction; it has prompt, output"):
            instructions.load("instructions")
        monkeypatch.setenv(instructions.MODEL, str(folder / "nowhere"))
        with pytest.raises(FileNotFoundError, match=f"no model at .*nowhere.*; set {instructions.MODEL} to a folder"):
            instructions.pretrained("AutoModelForCausalLM")
