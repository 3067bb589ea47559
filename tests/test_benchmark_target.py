"""SparsityTarget against tuned strengths: what is kept of the runs, with a task of a few steps."""

import dataclasses

import pytest

from benchmarks import runner, target, tasks


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    few = dataclasses.replace(tasks.task("digits_mlp"), steps=4, goals=(0.9, 0.95))
    monkeypatch.setattr(tasks, "task", lambda name: few)


def test_strengths_are_trained_chosen_tested_and_reported(tmp_path, capsys):
    path = tmp_path / "target.csv"
    methods = ["--method", "none,l1,target:relative", "--options", "end=0.5;wd=0", "--output", str(path)]
    assert target.main(["train", *methods, "--strengths", "1e-3,1e-2,1e-3", "--goals", "0.9"]) == 0
    assert "0 of 4 runs are in" in capsys.readouterr().out
    assert target.main(["test", *methods, "--seeds", "0,1"]) == 0
    rows = runner.Results(path, target.COLUMNS, target.KEY).read()
    assert {(row["method"], row["options"]) for row in rows if row["split"] == "test"} == {
        ("none", ""),
        ("l1", ""),
        ("target:relative", "end=0.5;wd=0"),
    }
    assert len({row["strength"] for row in rows if row["method"] == "l1" and row["split"] == "validation"}) == 2
    assert target.main(["test", *methods, "--seeds", "0,1"]) == 0
    assert runner.Results(path, target.COLUMNS, target.KEY).read() == rows, "runs that are there are not repeated"
    capsys.readouterr()
    assert target.main(["report", "--output", str(path)]) == 0
    assert "| target:relative end=0.5, wd=0 | " in capsys.readouterr().out


def test_a_failing_run_leaves_those_that_ended_before_it(tmp_path, monkeypatch):
    def work(trial, progress):
        if trial.seed == 2:
            raise ZeroDivisionError
        return trained(trial, progress)

    trained = target.run_trial
    monkeypatch.setattr(target, "run_trial", work)
    path = tmp_path / "target.csv"
    with pytest.raises(ZeroDivisionError):
        target.main(["train", "--method", "none", "--seeds", "0,1,2", "--output", str(path)])
    rows = runner.Results(path, target.COLUMNS, target.KEY).read()
    assert {row["seed"] for row in rows} == {"0", "1"}


def test_a_file_of_other_columns_is_refused(tmp_path, capsys):
    path = tmp_path / "target.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit):
        target.main(["train", "--method", "none", "--output", str(path)])
    assert "has other columns than this version writes; name another file" in capsys.readouterr().err
    assert path.read_text() == "a,b\n1,2\n"
