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


def test_a_run_that_diverges_has_a_row_and_ends_no_other(tmp_path, capsys):
    path = tmp_path / "target.csv"
    command = ["--method", "none", "--output", str(path)]
    assert target.main(["train", *command, "--lr-scale", "1e30,1"]) == 0
    rows = runner.Results(path, target.COLUMNS, target.KEY, target.NUMBERS).read()
    assert [(row["lr_scale"], row["value"]) for row in rows if not row["value"]] == [("1e+30", "")]
    assert rows[0]["warned"].startswith("diverged: ")
    assert {row["lr_scale"] for row in rows} == {"1e+30", "1.0"}
    assert target.main(["test", *command]) == 0
    failing = [row | {"seed": "1", "value": "", "sparsity": ""} for row in rows if row["lr_scale"] == "1.0"][:1]
    tested = [row | {"split": "test"} for row in rows if row["lr_scale"] == "1.0"]
    assert ", 1 of 2 diverged |" in target.report([*tested, *(row | {"split": "test"} for row in failing)])


def test_a_strength_that_diverged_for_any_seed_is_not_chosen():
    def row(strength, value, seed=0):
        trial = target.Trial("digits_mlp", "sgd", "l1", strength, seed=seed)
        names = dict.fromkeys(target.MEASURED, "") | ({"sparsity": "0.9", "value": value} if value else {})
        return {name: str(text) for name, text in (vars(trial) | names).items()}

    rows = [row(1.0, "nan"), row(0.1, "97.5"), row(0.2, "98.0"), row(0.2, "", 1), row(0.3, "90.0")]
    more = [each | {"sparsity": "0.0"} for each in rows if each["value"]]
    assert target.chosen([*rows, *more], "digits_mlp", "sgd", "l1", 0.9) == 0.1
    assert target.chosen(rows[:1], "digits_mlp", "sgd", "l1", 0.9) is None


def test_what_nothing_was_chosen_for_is_named_and_what_needs_no_choice_is_run(tmp_path, capsys):
    path = tmp_path / "target.csv"
    assert target.main(["test", "--method", "none,l1", "--seeds", "0,1", "--output", str(path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("left out, as no run on the validation split chose a strength: l1") == 1
    assert {row["method"] for row in runner.Results(path, target.COLUMNS, target.KEY).read()} == {"none"}


def test_runs_on_other_data_are_not_added_to(tmp_path, capsys, monkeypatch):
    path = tmp_path / "target.csv"
    command = ["train", "--method", "none", "--output", str(path)]
    known = tasks.task("digits_mlp")
    monkeypatch.setattr(tasks, "task", lambda name: dataclasses.replace(known, data_hash="0123abcd"))
    assert target.main(command) == 0
    before = path.read_bytes()
    monkeypatch.setattr(tasks, "task", lambda name: dataclasses.replace(known, data_hash="4567cdef"))
    with pytest.raises(SystemExit):
        target.main(command)
    assert "on other data (sha256 0123abcd)" in capsys.readouterr().err
    assert path.read_bytes() == before


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
