"""The benchmark's tasks that need no files: splits that share nothing, reproducible batches, measures against loops."""

import dataclasses
import importlib
import itertools
import math
import sys
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from benchmarks import suites, tasks
from benchmarks.tasks import language, networks, segmentation, textures
from benchmarks.tasks.digits import Split
from benchmarks.trials import Trial, train
from wcr_optim.parameters import prunable_weights

assert_same = partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)

OFFLINE = ("digits_mlp", "digits_cnn", "digits_resnet", "textures", "mosaics", "tissue")


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


class TestEveryTask:
    @pytest.mark.parametrize("name", OFFLINE)
    def test_batches_depend_on_seed_and_scale_alone(self, name):
        task = tasks.task(name)
        first, again = (list(task.batches(3, 4, 1)) for _ in range(2))
        assert len(first) == 4
        assert_same(first, again)
        assert_same(first[:2], list(task.batches(3, 2, 1)))
        assert not torch.equal(first[0][0], next(task.batches(4, 1, 1))[0])
        assert len(next(task.batches(3, 1, 4))[0]) == 4 * len(first[0][0])
        assert all(tensor.device.type == "cpu" for batch in first for tensor in batch)

    @pytest.mark.parametrize("name", OFFLINE)
    def test_training_lowers_the_loss_and_reaches_every_parameter(self, name):
        task = tasks.task(name)
        network = task.model(0)
        assert_same(network.state_dict(), task.model(0).state_dict())
        batch = next(task.batches(0, 1, 1))
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
        losses = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = task.loss(network, batch)
            loss.backward()
            assert all(p.grad is not None and p.grad.any() for p in network.parameters())
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]

    @pytest.mark.parametrize("name", OFFLINE)
    def test_measured_numbers_are_percents_and_stay_the_same(self, name):
        task = tasks.task(name)
        network = task.model(0).eval()
        found = task.evaluate(network, "validation")
        assert found == task.evaluate(network, "validation")
        found = found if isinstance(found, dict) else {task.metric: found}
        assert next(iter(found)) == task.metric
        assert all(0 <= value <= 100 for value in found.values())
        if task.calibration is not None:
            assert all(len(batch) for batch in task.calibration())

    def test_batches_are_no_larger_than_the_data(self, monkeypatch):
        orders = iter([torch.tensor([2, 0, 1]), torch.tensor([1, 2, 0])])  # a third epoch is an error, not endless
        monkeypatch.setattr(torch, "randperm", lambda *_, **__: next(orders))
        found = list(tasks.epochs(torch.arange(3), torch.arange(3), 8, 0, 2))
        assert [inputs.tolist() for inputs, _ in found] == [[2, 0, 1], [1, 2, 0]]

    def test_a_name_is_the_same_everywhere_and_only_once(self):
        known = tasks.names()
        for module in set(known.values()):
            assert all(known[name] == module for name in importlib.import_module(module).TASKS)
        for name in OFFLINE:
            assert tasks.task(name).name == name
        with pytest.raises(ValueError, match="no task 'digit'; choose one of"):
            tasks.task("digit")

    def test_a_missing_package_is_named_with_how_to_install_it(self, monkeypatch, capsys):
        def needs_a_package():
            importlib.import_module("no_such_package")

        monkeypatch.setattr(tasks, "task", tasks.task.__wrapped__)  # what is cached is not loaded anew
        monkeypatch.setitem(textures.TASKS, "textures", needs_a_package)
        with pytest.raises(ImportError, match=r"'no_such_package'; install it with: pip install 'wcr_optim\[bench\]'"):
            tasks.task("textures")
        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
        monkeypatch.delitem(sys.modules, "benchmarks.tasks.digits")
        with pytest.raises(SystemExit):
            suites.main("vision", ["--tasks", "digits_mlp"])
        assert "sklearn.datasets" in (said := capsys.readouterr().err)
        assert said.endswith("; install it with: pip install 'wcr_optim[bench]'\n")


class TestNetworks:
    @pytest.mark.parametrize(
        ("build", "shape", "count"),
        [
            (lambda: networks.ResNet(3, 10, (16, 32, 64), 3), (2, 3, 32, 32), 272_474),
            (lambda: networks.ResNet(3, 10, (64, 128, 256, 512), 2), (2, 3, 32, 32), 11_173_962),
            (lambda: networks.VisionTransformer(3, 10, 32, 4), (2, 3, 32, 32), 2_693_578),
        ],
        ids=["resnet20", "resnet18", "vit"],
    )
    def test_size_and_logits(self, build, shape, count):
        network = build()
        assert parameters(network) == count
        assert network(torch.randn(shape)).shape == (2, 10)

    def test_a_residual_block_is_the_sum_of_its_paths(self):
        x = torch.randn(2, 4, 6, 6)
        same = networks.Residual(4, 4).eval()
        assert_same(same(x), torch.relu(same.second(torch.relu(same.first(x))) + x))
        wider = networks.Residual(4, 8, stride=2).eval()
        assert wider(x).shape == (2, 8, 3, 3)
        nn.init.zeros_(wider.second[0].weight)
        assert_same(wider(x), torch.relu(wider.shortcut(x)))

    def test_a_unet_keeps_the_size_and_uses_each_level_once(self):
        network = networks.UNet(1, 3, (4, 8, 16)).eval()
        x = torch.randn(2, 1, 16, 24)
        a = network.down[0](x)
        b = network.down[1](network.pool(a))
        c = network.down[2](network.pool(b))
        up = network.up[0](torch.cat([network.upsample(c), b], 1))
        up = network.up[1](torch.cat([network.upsample(up), a], 1))
        assert_same(network(x), network.classifier(up))
        assert network(x).shape == (2, 3, 16, 24)

    def test_positions_and_class_token_are_never_pruned_and_no_block_starts_like_another(self):
        network = networks.VisionTransformer(3, 10, 32, 4, width=24, depth=2)
        assert not {"cls_token", "pos_embed"} & prunable_weights(network).keys()
        first, second = network.blocks.layers
        assert not torch.equal(first.linear1.weight, second.linear1.weight)


class TestTextures:
    @given(height=st.integers(56, 300), width=st.integers(56, 300))
    @settings(max_examples=20, deadline=None)
    def test_cells_lie_inside_and_have_gaps_between_them(self, height, width):
        places = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
        found = [cell for _, cell in textures.cells(places)]
        assert len(found) == ((height + 8) // 64) * ((width + 8) // 64)
        boxes = [(cell[:, 0, 0], cell[:, -1, -1]) for cell in found]
        assert all(cell.shape == (2, 56, 56) for cell in found)
        for (top, bottom), (other_top, other_bottom) in itertools.combinations(boxes, 2):
            assert ((other_top - bottom > 8) | (top - other_bottom > 8)).any(), "at least 8 pixels between them"

    @pytest.mark.parametrize("name", textures.PHOTOGRAPHS)
    def test_each_photograph_has_cells_of_all_parts(self, name):
        counts = dict.fromkeys(textures.PATCHES, 0)
        for part, _ in textures.cells(textures.photograph(name)):
            counts[part] += 1
        assert counts["train"] > counts["validation"] >= 2
        assert counts["test"] >= 2

    def test_patches_come_from_the_cells_of_their_own_part(self, monkeypatch):
        """The photographs are replaced by ones whose gray value is 0, 1 or 2 by part."""
        value = dict(zip(textures.PATCHES, range(3), strict=True))

        def painted(name):
            image = torch.full((512, 512), math.nan)
            for part, cell in textures.cells(image):
                cell.fill_(value[part])
            return image

        monkeypatch.setattr(textures, "photograph", painted)
        for part, split in textures.load.__wrapped__().items():
            assert split.images.shape == (len(textures.PHOTOGRAPHS) * textures.PATCHES[part], 1, 24, 24)
            assert (split.images == value[part]).all()
            assert split.labels.bincount().tolist() == [textures.PATCHES[part]] * len(textures.PHOTOGRAPHS)

    def test_patches_are_the_same_at_every_call(self):
        assert_same(
            [tuple(s) for s in textures.load().values()], [tuple(s) for s in textures.load.__wrapped__().values()]
        )

    def test_flips_are_the_four_mirrorings(self):
        images = torch.arange(6.0).view(1, 1, 2, 3).repeat(64, 1, 1, 1)
        found = textures.flipped(images, torch.Generator().manual_seed(0))
        wanted = [images[0], images[0].flip(-1), images[0].flip(-2), images[0].flip(-1, -2)]
        which = [[torch.equal(image, one) for one in wanted] for image in found]
        assert all(sum(row) == 1 for row in which)
        assert all(any(column) for column in zip(*which, strict=True))


def plain_overlap(predicted, masks, classes, first_class):
    """Loop over classes and pixels."""
    dice, iou = [], []
    for label in range(first_class, classes):
        both = either = total = 0
        for a, b in zip(predicted.flatten().tolist(), masks.flatten().tolist(), strict=True):
            both += a == label and b == label
            either += a == label or b == label
            total += (a == label) + (b == label)
        if total:
            dice.append(2 * both / total)
            iou.append(both / either)
    return [100 * sum(values) / len(values) if values else math.nan for values in (dice, iou)]


class TestSegmentation:
    @given(seed=st.integers(0, 2**16), classes=st.integers(2, 4), first_class=st.integers(0, 1), size=st.integers(1, 5))
    @settings(max_examples=30, deadline=None)
    def test_overlap_is_that_of_a_loop(self, seed, classes, first_class, size):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(3, classes, size, size, generator=generator)
        masks = torch.randint(classes, (3, size, size), generator=generator)
        # The images are the logits already; the parameter tells the device.
        network = nn.Conv2d(classes, classes, 1, bias=False)
        nn.init.dirac_(network.weight)
        found = segmentation.overlap(network, Split(logits, masks), first_class, batch=2)
        wanted = plain_overlap(logits.argmax(1), masks, classes, first_class)
        assert list(found.values()) == pytest.approx(wanted, nan_ok=True)
        perfect = nn.functional.one_hot(masks, classes).permute(0, 3, 1, 2).float()
        assert segmentation.overlap(network, Split(perfect, masks))["dice"] == pytest.approx(100)

    def test_voronoi_is_the_nearest_point_of_a_loop(self):
        mask = segmentation.voronoi(3, torch.Generator().manual_seed(5))
        generator = torch.Generator().manual_seed(5)
        count = int(torch.randint(3, 8, (), generator=generator))
        points = (48 * torch.rand(count, 2, generator=generator)).tolist()
        labels = torch.randint(3, (count,), generator=generator).tolist()
        for row, column in itertools.product(range(0, 48, 5), range(0, 48, 5)):
            distances = [math.hypot(row + 0.5 - y, column + 0.5 - x) for y, x in points]
            assert mask[row, column] == labels[distances.index(min(distances))]

    @pytest.mark.parametrize("part", ["train", "validation", "test"])
    def test_mosaics_use_rows_of_their_own_part_only(self, part, monkeypatch):
        def only_here(name):
            image = torch.full((512, 512), math.nan)
            image[segmentation.ROWS[part]] = torch.randn(image[segmentation.ROWS[part]].shape)
            return image

        monkeypatch.setattr(segmentation, "photograph", only_here)
        monkeypatch.setattr(segmentation, "MOSAICS", {"train": 8, "validation": 8, "test": 8})
        for name, split in segmentation.mosaics.__wrapped__().items():
            assert split.images.isnan().all() == (name != part)
            assert split.images.isnan().any() == (name != part)
        ends = [(rows.start, rows.stop) for rows in segmentation.ROWS.values()]
        assert all(after - before >= 16 for (_, before), (after, _) in itertools.pairwise(ends))

    def test_mosaics_show_each_texture_where_the_mask_says_so(self, monkeypatch):
        """Textures of +-1 stripes in steps of 1, 2 and 4 columns: the longest run of a row tells which one it is."""
        stripes = {name: 2.0**k for k, name in enumerate(segmentation.TEXTURES)}
        columns = torch.arange(512)
        monkeypatch.setattr(
            segmentation, "photograph", lambda name: (((columns // stripes[name]) % 2) * 2 - 1).expand(512, 512)
        )
        monkeypatch.setattr(segmentation, "MOSAICS", {"train": 6, "validation": 1, "test": 1})
        split = segmentation.mosaics.__wrapped__()["train"]
        inside = 0
        for image, mask in zip(split.images, split.labels, strict=True):
            for label, period in ((0, 2), (1, 4), (2, 8)):
                shifted_same = (mask[:, :-period] == label) & (mask[:, period:] == label)
                shifted_same &= mask.unfold(1, period + 1, 1).float().std(-1) == 0
                here, there = image[0, :, :-period][shifted_same], image[0, :, period:][shifted_same]
                torch.testing.assert_close(here, there)
                half = period // 2
                opposite = image[0, :, half : half - period][shifted_same]
                assert (here * opposite < 0).all()
                inside += int(shifted_same.sum())
        assert inside > 1000

    def test_stains_are_found_where_they_were_put(self):
        from skimage import color

        amounts = np.zeros((40, 60, 3))
        amounts[5:20, 5:25, 0] = 0.12  # haematoxylin
        amounts[5:20, 35:55, 2] = 0.12  # DAB
        amounts[25:35, 5:25, :] = (0.12, 0, 0.12)  # both: counts as DAB
        labels = segmentation.stains((255 * color.hed2rgb(amounts)).round().astype(np.uint8))
        wanted = torch.zeros(40, 60, dtype=torch.long)
        wanted[5:20, 5:25], wanted[5:20, 35:55], wanted[25:35, 5:25] = 1, 2, 2
        assert (labels == wanted).double().mean() > 0.95, "smoothing blurs the borders alone"
        assert_same(labels[10:15, 10:20], wanted[10:15, 10:20])
        assert_same(labels[10:15, 40:50], wanted[10:15, 40:50])
        assert_same(labels[28:32, 10:20], wanted[28:32, 10:20])

    def test_a_whole_batch_is_turned_with_its_masks(self):
        images = torch.randn(2, 1, 4, 4)
        masks = (images[:, 0] > 0).long()
        seen = set()
        for seed in range(40):
            turned, beside = segmentation.turned(images, masks, torch.Generator().manual_seed(seed))
            assert_same((turned[:, 0] > 0).long(), beside)
            seen.add(tuple(turned.flatten().tolist()))
        assert len(seen) == 8


TINY = language.Size("language_tiny", 16, 24, 1, 2, 16, 4, 5, 1e-3, 4, 6, 1e-3, 20)


class TestLanguage:
    def test_sizes_are_as_told(self):
        assert parameters(language.model()) == 381_600
        with torch.device("meta"):
            assert parameters(language.model(language.LARGE)) == 25_960_960

    def test_likelihood_is_that_of_a_loop_over_bytes(self):
        network = language.model(TINY).eval()
        text = language.load().validation[:500]
        found = language.likelihood(network, text, TINY.context, TINY.evaluated)
        nats = []
        with torch.no_grad():
            for start in torch.linspace(0, len(text) - TINY.context - 1, TINY.evaluated).long().tolist():
                window = text[start : start + TINY.context + 1].long()
                odds = network(window[None, :-1]).logits[0].double().log_softmax(-1)
                nats += [-odds[k, byte].item() for k, byte in enumerate(window[1:].tolist())]
        mean = sum(nats) / len(nats)
        assert found["bits_per_byte"] == pytest.approx(mean / math.log(2), rel=1e-5)
        assert found["perplexity"] == pytest.approx(2 ** found["bits_per_byte"], rel=1e-6)

    def test_pretraining_is_done_once_and_kept(self, tmp_path, monkeypatch):
        started = language.model(TINY)
        first = language.pretrained(0, tmp_path, TINY)
        assert [path.suffix for path in tmp_path.iterdir()] == [".pt"], "nothing half written is left"
        assert not torch.equal(first.lm_head.weight, started.lm_head.weight)
        monkeypatch.setattr(language, "loss", None)  # a second training would fail
        assert_same(first.state_dict(), language.pretrained(0, tmp_path, TINY).state_dict())

    @pytest.mark.parametrize("bad", [b"", b"nonsense", "half", "other"])
    def test_a_network_that_cannot_be_read_is_named(self, bad, tmp_path):
        path = tmp_path / f"language_tiny-{language.load().sha256[:12]}-6-0.pt"
        torch.save({} if bad == "other" else language.model(TINY).state_dict(), path)
        if bad != "other":
            path.write_bytes(path.read_bytes()[:1000] if bad == "half" else bad)
        with pytest.raises(ValueError, match=f"{path.name} cannot be read .*; delete it, and the network is trained"):
            language.pretrained(0, tmp_path, TINY)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_compiled_training_is_that_of_plain_training(self, monkeypatch):
        def trained(compiled):
            task = dataclasses.replace(tasks.task("language"), model=built, compiled=compiled)
            monkeypatch.setattr(tasks, "task", lambda name: task)
            network = train(Trial("language", "adamw+wcr", 0, 0.1, steps=8), "cuda").network
            return [w.cpu() for w in network.parameters()]

        def built(seed):
            torch.manual_seed(seed)
            return language.model(TINY)

        for plain, compiled in zip(trained(False), trained(True), strict=True):
            assert (plain - compiled).abs().mean() < 1e-4  # of 4e-3 that they move, and bfloat16 rounds otherwise

    @pytest.mark.parametrize("size", [language.SMALL, language.LARGE])
    def test_sharpness_is_measured_on_as_many_bytes_in_either_size(self, size):
        batch = language.TASKS[size.name]().sharpness_batch()
        assert batch[:, 1:].numel() == language.SHARPNESS_BYTES

    def test_batches_are_windows_of_the_text(self):
        text = torch.arange(200, dtype=torch.uint8)
        first, again = (list(language.batches(text, 16, 4, 1, 3)) for _ in range(2))
        assert_same(first, again)
        for windows in first:
            assert windows.shape == (4, 17)
            assert (windows.diff() == 1).all()

    def test_parts_of_the_corpus_share_no_file(self):
        corpus = language.load()
        assert min(len(part) for part in corpus[:4]) > 100_000
        assert len(corpus.sha256) == 64
