"""What the measurements refuse to begin with, one line of `benchmarks COMMAND ...` each."""

import pytest
import torch

from benchmarks import arguments, demo
from benchmarks.__main__ import main as benchmarks


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("inference --rounds 0", "--rounds: must be at least 1, got 0"),
        ("inference --threads 0", "--threads: must be at least 1, got 0"),
        ("inference --layers 0", "--layers: must be at least 1, got 0"),
        ("inference --width -1", "--width: must be at least 1, got -1"),
        ("inference --batches 8 0", "--batches: must be at least 1, got 0"),
        ("inference --sparsities 0.5 1.5", "--sparsities: must lie in [0, 1], got 1.5"),
        ("inference --device tpu", "--device: unknown 'tpu'; choose of cpu, cuda"),
        ("inference --device cuda", "--device: there is no CUDA device here; leave it out"),
        ("inference --dtype float16", "--dtype float16 needs --device cuda"),
        ("pruning --mib 0", "--mib: must be at least 1, got 0"),
        ("pruning --mib 257", "--mib must be at most 256, got 257"),
        ("pruning --repeats 0", "--repeats: must be at least 1, got 0"),
        ("pruning --sparsity 2", "--sparsity: must lie in [0, 1], got 2"),
        ("pruning --sparsity nan", "--sparsity: must lie in [0, 1], got nan"),
        ("pruning --threads 0", "--threads: must be at least 1, got 0"),
        ("pruning --stream -1", "--stream: must be finite and not negative, got -1"),
        ("pruning --stream inf", "--stream: must be finite and not negative, got inf"),
        ("convergence --steps -3", "--steps: must be at least 1, got -3"),
        ("convergence --seeds 0", "--seeds: must be at least 1, got 0"),
        ("demo --strength -1", "--strength: must be finite and not negative, got -1"),
        ("demo --strength nan", "--strength: must be finite and not negative, got nan"),
        ("demo --methods ,", "--methods: name at least one"),
        ("ablations --base foo", "--base: invalid choice: 'foo'"),
        ("ablations --jobs 0", "--jobs: must be at least 1, got 0"),
        ("ablations --seeds 0", "--seeds: must be at least 1, got 0"),
        ("ablations --strengths 0", "--strengths: must be at least 1, got 0"),
        ("ablations --steps -5", "--steps: must be at least 1, got -5"),
        ("ablations --device cuda", "--device: there is no CUDA device here; leave it out"),
        ("ablations --tasks nonsense", "there is no task 'nonsense'; choose one of"),
        ("ablations --tasks language", "task language has no setting for --base sgd; it has adamw"),
        ("target train --optimizer adam", "--optimizer: unknown 'adam'; choose of sgd, adamw"),
        ("target train --method lone --strengths 0.1", "--method: unknown 'lone'; choose of none, l1"),
        ("target train --method l1 --strengths 0.1,-1", "--strengths: must be finite and not negative, got -1"),
        ("target train --jobs 0", "--jobs: must be at least 1, got 0"),
        ("target train --batch-scale 1,0", "--batch-scale: must be at least 1, got 0"),
        (
            "target train --goals 0.93",
            "--goals: networks are pruned to 0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, got",
        ),
        ("target train --options end", "--options: 'end' is not name=value;name=value with names of wd, tail_energy,"),
        ("target train --options ende=1", "'ende=1' is not name=value;name=value with names of wd, tail_energy,"),
        ("target train --options end=2", "--options: 'end=2': start and end are shares of the run"),
        ("target train --options wd=-1", "--options: 'wd=-1': weight_decay must be a finite number of at least 0"),
        ("target train --task digit", "there is no task 'digit'; choose one of"),
        (
            "target train --task textures --method l1",
            "no grid of strengths for textures with sgd; name them with --str",
        ),
        ("target test --lr-scale 2", "--lr-scale is of `benchmarks target train`; what is tested was chosen on"),
        ("target train --output setup.cfg/target.csv", "setup.cfg"),
        ("ablations --output setup.cfg", "setup.cfg"),
        ("ablations --page nothing.md", "there is no page nothing.md to renew"),
        (
            "target report --output nothing.csv",
            "nothing.csv has no runs on the test split; `benchmarks target test` adds",
        ),
    ],
)
def test_bad_arguments_are_named_before_anything_is_done(line, said, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        benchmarks(line.split())
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert not printed.out


def test_methods_and_forms_that_are_named_twice_run_once():
    options = demo._parser().parse_args(["--methods", "sgd,sam,sgd", "--forms", "wcr,wcr"])
    assert [method.name for method in demo._methods(options)] == ["sgd", "sgd+wcr", "sgd+sam", "sgd+sam+wcr"]


@pytest.mark.parametrize(
    ("line", "folder"),
    [
        ("demo", "--output"),
        ("convergence", "--output"),
        ("convergence", "--images"),
        ("report", "--images"),
        ("vision --quick", "--output"),
    ],
)
def test_what_pictures_need_is_looked_for_before_anything_is_trained(line, folder, capsys, monkeypatch, tmp_path):
    taken = tmp_path / "taken"
    taken.touch()
    for missing, said in ((False, "taken"), (True, "need matplotlib: pip install 'wcr_optim[bench]'")):
        if missing:
            monkeypatch.setattr(arguments, "find_spec", lambda name: None)
        with pytest.raises(SystemExit) as stopped:
            benchmarks([*line.split(), folder, str(tmp_path if missing else taken)])
        assert stopped.value.code == 2
        printed = capsys.readouterr()
        assert said in printed.err
        assert not printed.out
