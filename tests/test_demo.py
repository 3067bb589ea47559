"""The demo's whole path, on one epoch, and what it refuses."""

import csv

import pytest

from benchmarks.__main__ import main as benchmarks
from benchmarks.demo import SPARSITIES
from benchmarks.tasks import digits


@pytest.fixture
def few_images(monkeypatch):
    few = {name: digits.Split(*(part[:256] for part in split)) for name, split in digits.load().items()}
    monkeypatch.setattr(digits, "load", lambda: few)


def test_demo_trains_prunes_prints_and_draws(few_images, tmp_path, capfd):
    assert benchmarks(["demo", "--epochs", "2", "--seeds", "2", "--jobs", "1", "--output", str(tmp_path)]) == 0
    printed = capfd.readouterr().out
    for label in ("SGD ", "SGD + WCR", "SGD + scale-free WCR"):
        assert label in printed
    with (tmp_path / "demo.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["seed"]) for row in rows[:: len(SPARSITIES)]] == [
        (method, seed) for seed in "01" for method in ("sgd", "sgd+wcr", "sgd+scale_free")
    ]
    assert [float(row["sparsity"]) for row in rows[: len(SPARSITIES)]] == list(SPARSITIES)
    assert len({row["value"] for row in rows}) > 3, "trained networks differ"
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--methods", "sgd,adam"], "unknown 'adam'"),
        (["--forms", "l3"], "unknown 'l3'"),
        (["--seeds", "0"], "--seeds: must be at least 1, got 0"),
    ],
)
def test_bad_options_are_named(arguments, match, capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmarks(["demo", *arguments])
    assert stopped.value.code == 2
    assert match in capsys.readouterr().err


def test_unknown_benchmark_is_named(capsys):
    assert benchmarks(["dmeo"]) == 2
    assert "unknown benchmark 'dmeo'; choose one of demo" in capsys.readouterr().err
    assert benchmarks([]) == 0
    assert "demo" in capsys.readouterr().out


def test_demo_runs_every_sharpness_aware_method_with_and_without_a_penalty(few_images, tmp_path, capfd):
    methods = "sgd,sam,ssam,sparse_sam,cram"
    arguments = ["--methods", methods, "--wcr", "both", "--forms", "wcr", "--output", str(tmp_path)]
    assert benchmarks(["demo", *arguments, "--epochs", "1", "--seeds", "1", "--jobs", "1"]) == 0
    printed = capfd.readouterr().out
    for label in ("SGD", "SAM", "SSAM", "SparseSAM", "CrAM+"):
        for end in (" ", " + WCR"):
            assert any(line.startswith(label + end) for line in printed.splitlines()), label + end
    with (tmp_path / "demo.csv").open() as file:
        methods_run = {row["method"] for row in csv.DictReader(file)}
    assert methods_run == {f"{method}{end}" for method in methods.split(",") for end in ("", "+wcr")}
