"""The benchmarks' machinery: names of methods, searches and choices, files of results, variants, sharpness."""

import csv
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import ablations, report, runner, suites, tasks, trials, tuning, ways
from benchmarks.__main__ import main as benchmarks
from benchmarks.curvature import largest_eigenvalue
from benchmarks.gradual import GradualPruning
from benchmarks.methods import LOWEST, PENALTIES, SHARPNESS, Method
from benchmarks.tasks import hub
from benchmarks.trials import COLUMNS, KEY, NUMBERS, Trial, moved, quantized, run_trial, steps_of
from benchmarks.variants import ExplicitStep, InLoss, Window
from wcr_optim import WCR, param_groups, pruning
from wcr_optim.moments import moments
from wcr_optim.penalties import ScaleFree


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_every_method_has_a_name_that_reads_back(base):
    for name in [base, f"{base}+random", *(f"{base}+{p}" for p in PENALTIES), *(f"{base}+{s}+wcr" for s in SHARPNESS)]:
        assert Method.of(name).name == name
        assert Method.of(name).label


@pytest.mark.parametrize("name", ["", "adam", "sgd+nothing", "sgd+wcr+sam", "sgd+sam+sam", "wcr"])
def test_names_that_say_nothing_are_refused(name):
    with pytest.raises(ValueError, match="no method"):
        Method.of(name)


@pytest.mark.parametrize("name", ["sgd+wcr+gradual", "sgd+sam+random", "sgd+target+gradual", "adamw+sam+prox"])
def test_parts_that_do_not_go_together_are_refused(name):
    """One of them would be left out, and the row would say it was there."""
    with pytest.raises(ValueError, match="is not measured"):
        Method.of(name)


@pytest.mark.parametrize("penalty", sorted(PENALTIES))
def test_a_penalty_reaches_the_weights_that_are_pruned_and_nothing_else(penalty):
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    biases = [model[0].bias.clone(), model[1].bias.clone()]
    before = model[0].weight.clone()
    optimizer = Method.of(f"sgd+{penalty}").optimizer(model, lr=0.1, weight_decay=0.0, strength=1e-2)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert not torch.equal(model[0].weight, before)
    assert all(torch.equal(b, layer.bias) for b, layer in zip(biases, model, strict=True))


def test_layers_of_a_penalty():
    def moved_layers(layers):
        model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3))
        before = [p.clone() for p in model.parameters()]
        optimizer = Method.of("sgd+l1").optimizer(model, 0.1, 0.0, 1e-2, layers=layers)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        return [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]

    assert moved_layers("weights") == [True, False] * 3
    assert moved_layers("inner") == [False, False, True, False, False, False]
    assert moved_layers("all") == [True] * 6


@pytest.mark.parametrize(("layers", "ratios"), [("weights", [1, 0]), ("inner", [1, 0, 0]), ("all", [1, 1])])
def test_layers_of_a_driven_penalty(layers, ratios):
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3))
    optimizer = Method.of("sgd+target").optimizer(model, 0.1, 0.0, layers=layers)
    assert [group["weight_concentration"] for group in optimizer.param_groups] == ratios


def test_proximal_steps_see_the_gradient_of_the_pruned_weights():
    pytest.importorskip("torchao.prototype.pat.optim", reason="needs torchao")
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    w = model[0].weight
    start = torch.tensor([[0.3, -0.05, 0.02], [-0.4, 0.07, -0.01]])
    with torch.no_grad():
        w.copy_(start)
    optimizer = Method.of("sgd+prox").optimizer(model, lr=0.1, weight_decay=0.0, strength=0.5)
    latent, velocity, pruned = start.clone(), torch.zeros_like(start), start.clone()
    for step in range(1, 6):

        def closure():
            optimizer.zero_grad()
            loss = 0.5 * w.square().sum() - w.sum()
            loss.backward()
            return loss

        assert optimizer.step(closure).item() == pytest.approx((0.5 * pruned.square() - pruned).sum().item())
        velocity = 0.9 * velocity + pruned - 1.0  # the gradient at the pruned weights
        latent = latent - 0.1 * velocity
        shrunk = latent.abs() - 0.1 * step * 0.5  # strength times all learning rates so far
        pruned = torch.where(shrunk > 0, shrunk * latent.sign(), 0.0)
        torch.testing.assert_close(w.detach(), pruned)


@pytest.mark.parametrize("count", [1, 3, 5, 10, 12, 25])
def test_grids_span_three_decades_with_as_many_runs_as_asked_for(count):
    strengths = [strength for strength, _ in tuning.grid("digits_mlp", "sgd+wcr", count)]
    assert len(strengths) == count == len(set(strengths))
    if count > 1:
        assert strengths[-1] / strengths[0] == pytest.approx(1000, rel=1e-2)
    rhos = [rho for _, rho in tuning.grid("digits_mlp", "sgd+sam", count)]
    assert len(set(rhos)) == count
    if count > 1:
        assert (rhos[0], rhos[-1]) == (0.005, 0.2)
        assert rhos == sorted(rhos)
    assert tuning.grid("digits_mlp", "sgd", count) == [(0.0, 0.0)]


def rows_of(method, strength, values, seed=0, split="validation", goal=0.0, options=""):
    trial = Trial("digits_mlp", method, seed, strength, 0.0, goal, options, split)
    measured = {"scope": "global", "recalibrated": False, "metric": "accuracy", "seconds": 1, "gradient_evaluations": 9}
    return [
        {name: str(value) for name, value in (dict.fromkeys(COLUMNS, "") | vars(trial) | measured | at).items()}
        for at in ({"sparsity": sparsity, "value": value} for sparsity, value in values.items())
    ]


def trials_of(table):
    """Return what stands in a table's column of trials, by the method's label."""
    head, _, *lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")]
    return {line[0]: line[head.index("trials")] for line in lines}


GOALS = (0.9, 0.95, 0.97, 0.98)


def accuracies(dense, pruned):
    return {0.0: dense} | dict.fromkeys(GOALS, pruned)


def test_the_validation_split_chooses_and_the_test_split_reports():
    rows = [
        *rows_of("sgd", 0.0, accuracies(98.0, 60.0)),
        *rows_of("sgd+wcr", 1e-3, accuracies(97.8, 80.0)),
        *rows_of("sgd+wcr", 1e-2, accuracies(95.0, 90.0)),
        *rows_of("sgd+wcr", 1e-1, accuracies(94.0, 90.0)),
        *rows_of("sgd+wcr", 1.0, accuracies(99.0, 99.0), options="wd=0"),
        *rows_of("sgd", 0.0, accuracies(97.9, 61.0), split="test"),
        *[
            r
            for seed, value in ((0, 88.0), (1, 90.0))
            for r in rows_of("sgd+wcr", 1e-2, accuracies(95.0, value), seed, "test")
        ],
        *rows_of("sgd+wcr", 1e-3, accuracies(97.5, 79.0), split="test"),
    ]
    assert tuning.chosen(rows, "digits_mlp", "sgd+wcr", 0.95) == (1e-2, 0.0)  # of equals the best dense one
    assert tuning.chosen(rows, "digits_mlp", "sgd+wcr", 0.95, careful=True) == (1e-3, 0.0)
    assert tuning.chosen(rows, "digits_mlp", "sgd+wcr", 0.95, options="wd=0") == (1.0, 0.0)
    assert tuning.chosen(rows, "digits_mlp", "sgd+l1", 0.95) is None
    found = report.cell(rows, "digits_mlp", "sgd+wcr", 0.95)
    assert (found.mean, found.spread, found.dense_mean, found.strength) == (89.0, pytest.approx(2**0.5), 95.0, 1e-2)
    assert report.cell(rows, "digits_mlp", "sgd+wcr", 0.95, careful=True).mean == 79.0
    text = report.section(rows, "digits_mlp")
    assert "| SGD + WCR | **89.0** ± 1.4 (95.0) at 0.01 |" in text
    assert trials_of(text.split("Only strengths")[0]) == {"SGD": "–", "SGD + WCR": "3"}, "not those with options"
    more = [*rows, *diverged("sgd+wcr", 10.0, 0, "validation"), *rows_of("sgd+wcr", 0.1, accuracies(1.0, 1.0), 7)]
    assert trials_of(report.table(more, "digits_mlp"))["SGD + WCR"] == "4", "one that diverged, but no further seed"
    assert "over 1 to 2 seeds on the test split" in text, "the baseline's one, and WCR's two"
    assert report.brief(rows).splitlines()[2:] == [
        "| digits_mlp, SGD, 98 % | 61.0 (97.9) | – | – | – | **89.0** ± 1.4 (95.0) | – | – | – |"
    ], "no row for a base without runs"
    assert "95 %: SGD + WCR 79.0 beside SGD 61.0: one seed says nothing of the difference" in text
    again = [row | {"seed": "2"} for row in rows if row["split"] == "test" and row["seed"] == "0"]
    assert "95 %: SGD + WCR 79.0 ± 0.0 is **ahead of** SGD 61.0 ± 0.0" in report.section(rows + again, "digits_mlp")
    trials = tuning.choices("digits_mlp", ["sgd", "sgd+wcr", "sgd+target"], rows, [0, 1])
    assert {t.strength for t in trials if t.method == "sgd+wcr"} == {1e-2, 1e-3}
    assert {t.goal for t in trials if t.method == "sgd+target"} == set(GOALS)
    for further in (
        tuning.choices("digits_mlp", ["sgd+wcr", "sgd+target"], rows, [0], told=[0.98, 0.99]),
        tuning.searches("digits_mlp", ["sgd+wcr", "sgd+target"], 3, [0], told=[0.98, 0.99]),
    ):
        assert [t.goal for t in further if t.method == "sgd+target"] == [*GOALS, 0.99]
        assert {t.goal for t in further if t.method == "sgd+wcr"} == {0.0}
    assert all(t.split == "test" for t in trials)


def test_other_ways_to_prune_are_of_what_was_chosen_for_the_middle_sparsity():
    def cnn(rows, **values):
        return [
            row | {"task": "digits_cnn", "recalibrated": "True", "prunable": "90", "parameters": "100"} | values
            for row in rows
        ]

    rows = cnn([*rows_of("sgd+l1", 0.1, accuracies(98.0, 90.0)), *rows_of("sgd+l1", 1.0, accuracies(98.0, 80.0))])
    for strength, seed, value in ((0.1, 0, 89.0), (0.1, 1, 91.0), (1.0, 0, 10.0)):
        test = rows_of("sgd+l1", strength, accuracies(98.0, value) | {0.99: value - 9}, seed, "test")
        rows += cnn(test)
        rows += cnn(test, scope="layer", value=str(value - 1))
        rows += cnn(test, recalibrated="False", value=str(value - 2))
        rows += cnn(test[-2:-1], scope="2:4", sparsity="0.5", value=str(value - 3))
    rows += cnn(diverged("sgd+l1", 0.1, 2, "test"))
    nothing = {"value": "nan", "seed": "1"}  # that no other column reads
    rows += cnn(test[-1:], scope="1:8", sparsity="0.875", strength="0.1", **nothing)
    rows += cnn(test[-1:], metric="loss", strength="0.1", **nothing)
    assert ways.of_task(rows, "digits_cnn", ["sgd", "sgd+l1"]).splitlines() == [
        "| How it is pruned | dense | 97 % global | 97 % per layer | 97 % global, statistics kept | 99 % global | "
        "2:4 (50 %) | 1:4 (75 %) | 1:8 (87.5 %) | 97 % global, int8 |",
        "|---|---|---|---|---|---|---|---|---|---|",
        "| SGD + l1, 1 of 3 diverged | 98.0 ± 0.0 | 90.0 ± 1.4 | 89.0 ± 1.4 | 88.0 ± 1.4 | 81.0 ± 1.4 | 87.0 ± 1.4 | "
        "– | – | – |",
    ]
    assert ways.kept(rows).splitlines()[2:] == [
        "| digits_cnn, SGD, 97 % | – | **88.0** ± 1.4 (90.0) | – | – | – | – | – | – |"
    ]
    fewer = [row for row in rows if row["sparsity"] != "0.99"]
    assert "int8" in ways.of_task(fewer, "digits_cnn", ["sgd+l1"])
    assert "99 %" not in ways.of_task(fewer, "digits_cnn", ["sgd+l1"])
    assert "Of 100 parameters 90 are pruned, so 90, 95, 97, 98 % are 81, 85.5, 87.3, 88.2 % of all." in report.section(
        rows, "digits_cnn"
    )


def test_a_value_that_no_table_reads_says_nothing_of_a_run():
    rows = [
        row for split in ("validation", "test") for row in rows_of("sgd+wcr", 0.1, accuracies(97.0, 61.0), 0, split)
    ]
    elsewhere, last = {"scope": "1:8", "value": "nan"}, rows[-1]
    rows += [rows[0] | elsewhere, last | elsewhere]
    found = report.cell(rows, "digits_mlp", "sgd+wcr", 0.9)
    assert (found.mean, found.failed) == (61.0, 0)
    rows += [last | {"value": "nan"}]
    assert report.cell(rows, "digits_mlp", "sgd+wcr", 0.9).failed == 1


def test_report_empties_no_table_for_want_of_results(tmp_path, capsys):
    page = tmp_path / "page.md"
    row = "| digits_mlp, SGD, 98 % | 60.0 (97.0) |"
    text = "".join(f"<!-- table: {name} -->\n\n{row}\n\n<!-- end -->\n" for name in ("brief", "digits_mlp"))
    page.write_text(text)
    arguments = ["--page", str(page), "--readme", str(page), "--images", str(tmp_path)]
    root, quick = Path(__file__).parents[1], tmp_path / "quick"
    short = [row | {"steps": "32"} for row in rows_of("sgd", 0.0, accuracies(97.0, 60.0), split="test")]
    runner.Results(quick / "vision.csv", COLUMNS, KEY).append(short)
    for folder, said in (
        (tmp_path / "typo", "has no runs of full length of task digits_mlp"),
        (quick, "has no runs of full length of task digits_mlp"),
        (root / "tests", "has no runs of full length"),
        (root / "docs/results", "no page"),
    ):
        pages = arguments if said != "no page" else ["--page", str(tmp_path / "none.md")]
        pages = pages if folder.name != "tests" else ["--page", str(root / "CHANGELOG.md"), *arguments[2:]]
        with pytest.raises(SystemExit) as stopped:
            report.main(["--results", str(folder), *pages])
        assert stopped.value.code == 2
        assert said in " ".join(capsys.readouterr().err.split())
    assert page.read_text() == text


def test_report_leaves_out_a_task_that_cannot_be_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv(hub.FOLDER, raising=False)
    page, readme = tmp_path / "page.md", tmp_path / "readme.md"
    page.write_text("".join(f"<!-- table: {name} -->\n<!-- end -->\n" for name in ("brief", "digits_mlp")))
    readme.write_text(page.read_text())
    rows = rows_of("sgd", 0.0, accuracies(97.0, 60.0), split="test")
    results = runner.Results(tmp_path / "vision.csv", COLUMNS, KEY)
    for found in (rows, [row | {"task": "images_resnet20"} for row in rows]):
        results.append(found)
    arguments = ["--page", str(page), "--readme", str(readme), "--images", str(tmp_path)]
    assert report.main(["--results", str(tmp_path), *arguments]) == 0
    assert f"images_resnet20: left out of {page} and {readme}, as it cannot be loaded" in capsys.readouterr().out
    assert "| SGD | 60.0" in page.read_text().replace("*", "")
    assert "| digits_mlp, SGD, 98 % | 60.0 (97.0) |" in readme.read_text().replace("*", "")


def test_what_is_no_one_shot_pruning_is_not_marked_as_the_best():
    rows = [
        *rows_of("sgd", 0.0, accuracies(97.8, 97.5), split="test"),
        *(row for goal in GOALS for row in rows_of("sgd+gradual", 0.0, accuracies(97.8, 97.5), 0, "test", goal)),
    ]
    text = report.table(rows, "digits_mlp")
    assert "| SGD | **97.5** (97.8) |" in text
    assert "| SGD + gradual pruning (not one-shot) | 97.5 (97.8) |" in text


def test_a_search_whose_best_strength_is_its_largest_goes_on():
    def further(**values):
        tried = {float(k[1:]) / 10000: accuracies(*v) for k, v in values.items()}
        rows = [row for strength, each in tried.items() for row in rows_of("sgd+l1", strength, each)]
        rows += rows_of("sgd", 0.0, accuracies(98.0, 60.0))
        return [
            (t.strength, t.seed, t.split, t.steps)
            for t in tuning.beyond("digits_mlp", ["sgd", "sgd+l1", "sgd+sam", "sgd+target"], 4, rows, [0, 1], 7)
        ]

    assert [s for s, _ in tuning.grid("digits_mlp", "sgd+l1", 4)] == [1e-4, 1e-3, 1e-2, 1e-1]
    nothing, some = (98.0, 60.0), (90.0, 80.0)
    assert further(s1=nothing, s10=nothing, s100=some, s1000=nothing) == []
    assert further(s1=nothing, s10=nothing, s100=nothing, s1000=some) == [
        (1.0, seed, "validation", 7) for seed in (0, 1)
    ]
    assert further(s1=nothing, s1000=some, s10000=some) == [], "no better"
    assert further(s1=nothing, s1000=some, s10000=(90.0, 81.0)) == [(10.0, seed, "validation", 7) for seed in (0, 1)]
    assert further(s1=nothing, s1000=some, s10000=(10.0, "nan")) == [], "one that diverged is beyond"
    assert further(s100=(90.0, 90.0), s1000=(98.0, 80.0)) != [], "the best within the tolerance is the largest"
    assert further(s1000=nothing, s1000000=some) == [], "six decades are enough"
    assert further() == []


@pytest.mark.parametrize(
    ("values", "next_rho"),
    [
        ((60.0, 70.0, 65.0), []),
        ((60.0, 70.0, 75.0), [0.3]),
        ((60.0, 70.0, 75.0, 80.0), [0.4]),
        ((60.0, 70.0, 75.0, 70.0), []),
    ],
)
def test_a_search_whose_best_rho_is_its_largest_goes_on(values, next_rho):
    assert tuning.grid("digits_mlp", "sgd+sam", 3) == [(0.0, 0.005), (0.0, 0.035), (0.0, 0.2)]
    rows = rows_of("sgd", 0.0, accuracies(98.0, 60.0))
    for rho, value in zip((0.005, 0.035, 0.2, 0.3), values, strict=False):
        rows += [row | {"rho": str(rho)} for row in rows_of("sgd+sam", 0.0, accuracies(98.0, value))]
    trials = tuning.beyond("digits_mlp", ["sgd", "sgd+sam"], 3, rows, [0])
    assert [(t.strength, t.rho) for t in trials] == [(0.0, rho) for rho in next_rho]


def test_rho_is_tried_up_to_a_last_one():
    assert tuning.grid("digits_mlp", "sgd+asam", 3, beyond=True)[-1] == (0.0, 16.0)
    rows = [row | {"rho": "16.0"} for row in rows_of("sgd+asam", 0.0, accuracies(98.0, 60.0))]
    assert tuning.beyond("digits_mlp", ["sgd+asam"], 3, rows, [0]) == []


def test_a_target_whose_goal_validation_chose_is_in_a_row_of_its_own():
    told = {0.9: (98.0, 97.0, 85.0), 0.95: (97.8, 97.5, 96.0), 0.98: (96.0, 97.6, 96.2)}

    def runs(split, shift=0.0):
        return [
            row
            for goal, (dense, at_90, further) in told.items()
            for row in rows_of(
                "sgd+target", 0.0, {0.0: dense, 0.9: at_90} | dict.fromkeys(GOALS[1:], further + shift), 0, split, goal
            )
        ]

    rows = [*rows_of("sgd", 0.0, accuracies(98.0, 60.0)), *rows_of("sgd", 0.0, accuracies(98.0, 60.0), split="test")]
    rows += runs("test", 0.1)
    cell = functools.partial(report.cell, rows, "digits_mlp", "sgd+target", careful=True)
    assert cell(0.95).mean == 96.1, "without a search, what it was told is what is wanted"
    assert cell(0.98) is None
    assert cell(0.98, search=True) is None
    strict = [*rows_of("sgd", 0.0, accuracies(99.0, 60.0)), *runs("validation")]
    assert report.cell(rows[5:] + strict, "digits_mlp", "sgd+target", 0.98, careful=True, search=True) is None
    rows += runs("validation")
    found = cell(0.98, search=True)
    assert (found.told, found.mean, found.dense_mean) == (0.95, 96.1, 97.8)
    assert cell(0.9, search=True).told == 0.95
    assert (cell(0.9, search=True).trials, cell(0.95).trials) == (3, 0)
    assert cell(0.95, search=True) is None
    assert cell(0.98) is None
    text = report.section(rows, "digits_mlp").replace("*", "")
    assert "| SGD + SparsityTarget, goal searched | 97.5 (97.8) told 95 % | – | 96.1 (97.8) told 95 % | 96.1" in text
    again = [row | {"seed": "1"} for row in rows if row["split"] == "test"]
    text = report.section(rows + again, "digits_mlp").replace("*", "")
    assert "98 %: SGD + SparsityTarget, goal searched 96.1 ± 0.0 is ahead of SGD 60.0 ± 0.0" in text
    assert report.summary(rows)["digits_mlp"]["sgd+target"]["0.98"]["goal_searched_within_tolerance"]["told"] == 0.95
    best = report.cell(rows, "digits_mlp", "sgd+target", 0.9, search=True)
    assert (best.told, best.mean, best.dense_mean) == (0.98, 97.6, 96.0), "whatever it costs dense"
    assert "goal searched | 97.6 (96.0) told 98 % |" in report.table(rows, "digits_mlp").replace("*", "")
    assert report.summary(rows)["digits_mlp"]["sgd+target"]["0.9"]["goal_searched_best"]["told"] == 0.98
    renamed = [row | {"options": "end=0.6"} if row["method"] == "sgd+target" else row for row in rows]
    assert report.cell(renamed, "digits_mlp", "sgd+target", 0.98, careful=True, search=True).told == 0.95


@pytest.mark.parametrize("careful", [False, True])
def test_cells_of_a_task_are_those_of_all_rows(careful):
    rows = tuning.of_run(runner.Results(Path("docs/results/language.csv"), COLUMNS, KEY, NUMBERS).read(), {})
    together = report.cells(rows, "language", careful=careful)
    assert {method for method, _ in together} == set(report.tested(rows, "language"))
    for method in ("adamw", "adamw+l1", "adamw+target", "adamw+sam", "adamw+sam+target", "adamw+gradual"):
        for search in (False, True):
            goals = tasks.task("language").goals
            alone = [report.cell(rows, "language", method, goal, careful=careful, search=search) for goal in goals]
            assert together[method, search] == alone


def test_a_rho_that_validation_chose_beside_a_target_is_in_the_row_of_what_was_searched():
    method = "sgd+sam+target"

    def run(rho, goal, value, split="validation"):
        rows = rows_of(method, 0.0, accuracies(98.0, value), split=split, goal=goal)
        return [row | {"rho": str(rho)} for row in rows]

    rows = [*run(0.05, 0.95, 90.0), *run(0.005, 0.95, 92.0), *run(0.005, 0.98, 91.0), *run(0.05, 0.95, 89.0, "test")]
    assert tuning.driven(rows, "digits_mlp", method, 0.95) == (0.005, 0.95)
    assert tuning.driven(rows, "digits_mlp", "sgd+sam", 0.95) is None
    searched = {(t.rho, t.goal) for t in tuning.searches("digits_mlp", [method], 10, [0])}
    assert searched == set(itertools.product((0.005, 0.015, 0.05), GOALS))
    assert [t.rho for t in tuning.searches("digits_mlp", [method], 1, [0])] == [0.05] * len(GOALS), "its authors'"
    tested = [(t.rho, t.goal) for t in tuning.choices("digits_mlp", [method], rows, [0])]
    assert tested == [*((0.05, goal) for goal in GOALS), (0.005, 0.95)]
    rows += run(0.005, 0.95, 93.0, "test")
    cell = functools.partial(report.cell, rows, "digits_mlp", method, 0.95)
    assert (cell().mean, cell().rho, cell().told) == (89.0, None, None), "without a search, the authors' rho"
    assert (cell(search=True).mean, cell(search=True).rho, cell(search=True).told) == (93.0, 0.005, None)
    text = report.table(rows, "digits_mlp").replace("*", "")
    assert "| SGD + SAM + SparsityTarget | – | 89.0 (98.0) | – | – |" in text
    assert (
        "| SGD + SAM + SparsityTarget, goal and rho searched | 93.0 (98.0) at 0.005 told 95 % | 93.0 (98.0) at 0.005 |"
        in text
    )
    rows += [*run(0.005, 0.98, 95.0), *run(0.005, 0.98, 94.0, "test")]
    assert "searched | 94.0 (98.0) at 0.005 told 98 % | 94.0" in report.table(rows, "digits_mlp").replace("*", "")
    assert report.summary(rows)["digits_mlp"][method]["0.95"]["goal_searched_best"]["rho"] == 0.005


def test_a_diverged_run_stays_in_the_file_and_chooses_nothing():
    (row,) = run_trial(Trial("digits_mlp", "sgd", options="lr=1e9", steps=5))
    assert row["value"] == ""
    assert row["warned"].startswith("diverged: the loss is nan")
    assert tuning.validation_means([{k: str(v) for k, v in row.items()}], "digits_mlp", "sgd", "lr=1e9") == {}


def test_a_run_that_cannot_be_made_is_an_error_and_no_result(monkeypatch):
    def broken(*arguments):
        raise ValueError("a library of an unknown version")

    monkeypatch.setitem(PENALTIES, "l1", broken)
    with pytest.raises(ValueError, match="unknown version"):
        run_trial(Trial("digits_mlp", "sgd+l1", steps=2))


def diverged(method, strength, seed=0, split="validation"):
    (row, *_) = rows_of(method, strength, {0.0: ""}, seed, split)
    return [row | {"metric": "", "sparsity": "", "scope": "", "recalibrated": "", "warned": "ValueError: NaN"}]


@pytest.mark.parametrize("other", [diverged("sgd+wcr", 1e-2, 1), rows_of("sgd+wcr", 1e-2, {0.0: "nan"}, 1)])
def test_a_strength_that_diverged_with_one_seed_is_not_chosen_for_what_the_others_reached(other):
    good = [*rows_of("sgd+wcr", 1e-3, accuracies(97.8, 80.0)), *rows_of("sgd+wcr", 1e-2, accuracies(97.0, 90.0))]
    assert tuning.chosen(good, "digits_mlp", "sgd+wcr", 0.95) == (1e-2, 0.0)
    assert tuning.chosen(good + other, "digits_mlp", "sgd+wcr", 0.95) == (1e-3, 0.0)


def test_a_choice_is_made_by_the_seeds_of_the_baseline():
    base = rows_of("sgd", 0.0, accuracies(98.0, 60.0))
    rows = [row for at, first in ((0.95, 90.0), (0.98, 91.0)) for row in told(at, first, 0)]
    rows += [row for at, other in ((0.95, 95.0), (0.98, 80.0)) for row in told(at, other, 1)]
    choice = functools.partial(tuning.driven, task="digits_mlp", method="sgd+target", goal=0.95)
    assert choice(rows) == (0.0, 0.95), "without a baseline, by all there are"
    assert choice(base + rows) == choice(base + rows, careful=True) == (0.0, 0.98)
    assert choice(base + [row | {"seed": "1"} for row in base] + rows) == (0.0, 0.95)


def told(goal, value, seed):
    return rows_of("sgd+target", 0.0, accuracies(98.0, value), seed, goal=goal)


def test_runs_that_diverged_stay_in_the_table():
    rows = [
        *rows_of("sgd", 0.0, accuracies(97.9, 61.0), split="test"),
        *diverged("sgd", 0.0, 1, "test"),
        *rows_of("sgd", 0.0, accuracies("nan", "nan"), 2, "test"),
        *diverged("sgd+target", 0.0, 0, "test"),
    ]
    rows[-1]["goal"] = "0.95"
    text = report.table(rows, "digits_mlp")
    assert "| SGD | **61.0** (97.9), 2 of 3 diverged |" in text
    assert "| SGD + SparsityTarget | – | diverged | – | – |" in text
    found = report.summary(rows)["digits_mlp"]
    assert found["sgd"]["0.95"]["best"]["diverged"] == 2
    assert found["sgd+target"]["0.95"] == {
        "best": {
            "mean": None,
            "standard_deviation": None,
            "values": (),
            "dense": (),
            "strength": None,
            "told": None,
            "rho": None,
            "diverged": 1,
        }
    }


def test_runs_of_other_lengths_and_options_are_kept_apart():
    def short(rows):
        return [row | {"steps": "20"} for row in rows]

    rows = [
        *rows_of("sgd+wcr", 1e-3, accuracies(97.8, 80.0)),
        *rows_of("sgd+wcr", 1e-2, accuracies(97.8, 70.0)),
        *short(rows_of("sgd+wcr", 1e-2, accuracies(97.8, 99.0))),
        *rows_of("sgd+target", 0.0, accuracies(97.8, 80.0), split="test", goal=0.95),
        *rows_of("sgd+target", 0.0, accuracies(97.8, 10.0), split="test", goal=0.95, options="end=0.4"),
    ]
    full, half = tuning.of_run(rows, {}), tuning.of_run(rows, {"digits_mlp": 20})
    assert tuning.chosen(full, "digits_mlp", "sgd+wcr", 0.95) == (1e-3, 0.0)
    assert tuning.chosen(half, "digits_mlp", "sgd+wcr", 0.95) == (1e-2, 0.0)
    assert report.cell(full, "digits_mlp", "sgd+target", 0.95).mean == 80.0
    other = tuning.of_run(rows, {}, "end=0.4")
    assert report.cell(other, "digits_mlp", "sgd+target", 0.95).mean == 10.0
    assert tuning.chosen(other, "digits_mlp", "sgd+wcr", 0.95) == (1e-3, 0.0)  # which the options do not concern
    assert " 640 steps. " in report.section(full, "digits_mlp")
    assert " 20 steps. " in report.section(half, "digits_mlp")


def test_filled_puts_text_between_the_markers_of_its_name_only():
    page = "a\n<!-- table: x -->\nold\n<!-- end -->\nb\n<!-- table: xy -->\nkept\n<!-- end -->\n"
    once = report.filled(page, "x", "new \\1")
    assert once == page.replace("old", "\nnew \\1\n")
    assert report.filled(once, "x", "new \\1") == once
    assert report.filled(page, "z", "new") == page


@pytest.mark.parametrize("method", ["sgd+wcr", "adamw+target", "sgd+gradual", "sgd+random", "sgd+sparse_sam+target"])
def test_a_run_on_the_test_split_is_measured_in_every_way(method):
    trial = Trial("digits_cnn", method, strength=1e-3, goal=0.95, split="test", steps=6)
    ticks = []
    rows = run_trial(trial, progress=lambda: ticks.append(None), sparsities=(0.0, 0.95))
    assert len(ticks) == 6 == steps_of(trial)
    assert all(set(row) == set(COLUMNS) for row in rows)
    assert float(rows[0]["sharpness"]) == float(rows[0]["sharpness"])
    assert rows[0]["gradient_evaluations"] == (12 if "sam" in method else 6)
    ways = {(row["scope"], row["recalibrated"]) for row in rows}
    if method != "sgd+random":
        assert ways >= {("global", True), ("global", False), ("layer", True), ("2:4", True), ("int8", True)}
    if method == "sgd+gradual":  # the masks hold as many zeros as wanted
        assert rows[0]["value"] == rows[1]["value"]


def test_options_reach_the_target_as_what_they_are():
    trial = Trial(
        "digits_mlp", "sgd+target", goal=0.9, options="every=2;end=0.4;scope=layer;max_dense_cost=1e3", steps=6
    )
    assert trial.settings == {"every": 2, "end": 0.4, "scope": "layer", "max_dense_cost": 1e3}
    rows = run_trial(trial, sparsities=(0.0, 0.9))
    assert all(float(row["tail"]) > 0 for row in rows)


def test_a_trial_repeats_itself_bit_for_bit():
    trial = Trial("digits_mlp", "sgd+cram+wcr", seed=3, strength=1e-3, split="test", steps=8)
    first, second = ([row["value"] for row in run_trial(trial)] for _ in range(2))
    assert first == second


def work(results_of, trial, progress):
    for _ in range(3):
        progress()
    time.sleep(0.01)
    return [dict.fromkeys(COLUMNS, "") | vars(trial) | {"sparsity": s, "value": results_of} for s in (0.0, 0.9)]


def test_rows_come_back_in_order_and_only_missing_runs_are_run(tmp_path, capfd):
    results = runner.Results(tmp_path / "r.csv", COLUMNS, KEY)
    trials = [Trial("digits_mlp", "sgd", seed) for seed in range(5)]
    runner.run_missing(functools.partial(work, 1.0), trials[:3], lambda trial: 3, results, jobs=2)
    runner.run_missing(functools.partial(work, 2.0), trials, lambda trial: 3, results, jobs=1)
    rows = results.read()
    assert sorted((int(row["seed"]), float(row["value"])) for row in rows if row["sparsity"] == "0.0") == [
        (0, 1.0),
        (1, 1.0),
        (2, 1.0),
        (3, 2.0),
        (4, 2.0),
    ]
    assert "3 of 5 runs are in" in capfd.readouterr().out
    results.append([dict(row) for row in rows if row["seed"] == "1"])  # by another command, meanwhile
    assert len(results.read()) == 10


def test_what_all_runs_need_is_prepared_once_and_only_if_there_is_one(tmp_path):
    results = runner.Results(tmp_path / "r.csv", COLUMNS, KEY)
    trials = [Trial("digits_mlp", "sgd", seed) for seed in range(3)]
    calls = []
    for count in (2, 2, 3, 3):
        runner.run_missing(
            functools.partial(work, 1.0),
            trials[:count],
            lambda trial: 3,
            results,
            jobs=1,
            prepare=lambda count=count: calls.append((count, len(results.keys()))),
        )
    assert calls == [(2, 0), (3, 2)]


@pytest.mark.parametrize("damage", ["cut", "word", "long", "nul"])
def test_a_damaged_line_is_named_and_left_alone(tmp_path, damage):
    path = tmp_path / "r.csv"
    whole = dict.fromkeys(COLUMNS, "1")
    runner.Results(path, COLUMNS, KEY, NUMBERS).append([whole, whole])
    lines = path.read_text().splitlines()
    ways = {"cut": "a,b", "word": lines[2].replace(",1,", ",9x9,"), "long": lines[2] + ",1", "nul": "\0" * 9}
    lines[2] = ways[damage]
    path.write_text("\n".join(lines) + "\n")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=rf"line 3 of .*{path.name} is damaged"):
        runner.Results(path, COLUMNS, KEY, NUMBERS).append([whole | {"seed": "2"}])
    assert path.read_bytes() == before


def test_a_file_without_its_last_newline_is_added_to(tmp_path):
    results = runner.Results(tmp_path / "r.csv", COLUMNS, KEY)
    results.append([dict.fromkeys(COLUMNS, "1")])
    results.path.write_text(results.path.read_text().rstrip("\n"))
    results.append([dict.fromkeys(COLUMNS, "2")])
    assert [row["value"] for row in results.read()] == ["1", "2"]


def test_a_file_of_other_columns_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "r.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="other columns"):
        runner.Results(path, COLUMNS, KEY).append([dict.fromkeys(COLUMNS, "")])
    assert path.read_text() == "a,b\n1,2\n"


@pytest.mark.parametrize("command", [functools.partial(suites.main, "vision"), ablations.main])
def test_results_on_other_data_are_named_and_not_added_to(command, tmp_path, monkeypatch, capsys):
    known = tasks.task("digits_mlp")
    found = [row | {"data_hash": "0123abcd"} for row in rows_of("sgd", 0.0, accuracies(98.0, 60.0), split="test")]
    for file in ("vision.csv", "ablations.csv"):
        runner.Results(tmp_path / file, COLUMNS, KEY).append(found)
    assert f"Data: {known.data}, sha256 0123abcd. " in report.section(found, "digits_mlp")
    assert f"Data: {known.data}. " in report.section(rows_of("sgd", 0.0, accuracies(98.0, 60.0)), "digits_mlp")
    monkeypatch.setattr(tasks, "task", lambda name: dataclasses.replace(known, data_hash="4567cdef"))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(SystemExit):
        command(["--tasks", "digits_mlp", "--output", str(tmp_path)])
    assert re.search(r"on other data \(sha256 0123abcd\) than is here\s+\(4567cdef\)", capsys.readouterr().err)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    rows = run_trial(Trial("digits_mlp", "sgd", steps=2), sparsities=(0.0,))
    assert [row["data_hash"] for row in rows] == ["4567cdef"]


@pytest.mark.parametrize("command", [functools.partial(suites.main, "vision"), ablations.main])
def test_results_from_another_kind_of_device_are_not_added_to(command, tmp_path, capsys):
    found = [row | {"device": "cuda"} for row in rows_of("sgd", 0.0, accuracies(98.0, 60.0), split="test")]
    for file in ("vision.csv", "ablations.csv"):
        runner.Results(tmp_path / file, COLUMNS, KEY).append(found)
    with pytest.raises(SystemExit):
        command(["--tasks", "digits_mlp", "--output", str(tmp_path)])
    said = " ".join(capsys.readouterr().err.split())
    assert "runs of task digits_mlp on cuda, and these would be on cpu; name another --output" in said


def test_the_bases_of_named_methods_are_run_too(tmp_path):
    command = ["--methods", "sgd+wcr", "--tasks", "digits_mlp", "--output", str(tmp_path), "--share", "0.01"]
    suites.main("vision", [*command, "--strengths", "1", "--seeds", "1", "--sparsities", "0.9", "--jobs", "1"])
    rows = runner.Results(tmp_path / "vision.csv", COLUMNS, KEY).read()
    assert {(row["method"], row["split"]) for row in rows} == {
        (method, split) for method in ("sgd", "sgd+wcr") for split in ("validation", "test")
    }


def test_a_method_of_ones_own_is_two_rows_of_one_file(tmp_path, monkeypatch, capsys):
    command = ["--methods", "sgd+mine", "--tasks", "digits_mlp", "--output", str(tmp_path), "--share", "0.01"]
    command += ["--strengths", "2", "--seeds", "1", "--jobs", "1"]
    monkeypatch.setitem(PENALTIES, "mine", lambda base, strength: WCR(base, strength, form="relative"))
    with pytest.raises(SystemExit):
        suites.main("vision", command)
    assert "LOWEST in methods.py holds them" in " ".join(capsys.readouterr().err.split())
    monkeypatch.setitem(LOWEST["sgd"], "mine", 1e-3)
    assert suites.main("vision", command) == 0
    assert "| SGD + mine | " in (tmp_path / "vision.md").read_text()
    assert (tmp_path / "digits_mlp_strengths.png").stat().st_size


@pytest.mark.parametrize("steps", ["0", "3"])
def test_one_task_after_another_leaves_the_first_in_what_is_written(steps, tmp_path):
    """Runs of the same share of its steps, or else of all of them."""
    other = {"task": "textures", "steps": steps, "recalibrated": "True"}
    first = [row | other for row in rows_of("sgd", 0.0, accuracies(80.0, 60.0), 0, "test")]
    runner.Results(tmp_path / "vision.csv", COLUMNS, KEY).append(first)
    command = ["--quick", "--share", "0.006", "--methods", "sgd", "--strengths", "1", "--seeds", "1", "--jobs", "1"]
    suites.main("vision", [*command, "--tasks", "digits_mlp", "--output", str(tmp_path)])
    written = (tmp_path / "vision.md").read_text()
    assert [line for line in written.splitlines() if line.startswith("## ")] == ["## textures", "## digits_mlp"]
    assert set(json.loads((tmp_path / "vision.json").read_text())) == {"textures", "digits_mlp"}


@pytest.mark.parametrize(
    "curvature",
    [
        lambda *arguments: torch.empty(1 << 60, dtype=torch.uint8),
        lambda *arguments: (_ for _ in ()).throw(torch.OutOfMemoryError("tried to allocate 60 GiB")),
    ],
)
def test_a_sharpness_without_the_memory_for_it_loses_no_run(curvature, monkeypatch):
    monkeypatch.setattr(trials, "curvature", curvature)
    rows = run_trial(Trial("digits_mlp", "sgd", split="test", steps=2), sparsities=(0.0, 0.9))
    assert {row["sharpness"] for row in rows} == {""}
    (warned,) = {row["warned"] for row in rows}
    assert re.match("no sharpness: .*allocate", warned)
    assert all(row["value"] for row in rows)


def test_what_else_goes_wrong_with_a_sharpness_is_an_error(monkeypatch):
    monkeypatch.setattr(trials, "curvature", lambda *arguments: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        run_trial(Trial("digits_mlp", "sgd", split="test", steps=2), sparsities=(0.0, 0.9))


def test_a_task_that_cannot_be_loaded_is_left_out_of_what_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv(hub.FOLDER, raising=False)
    rows = rows_of("sgd", 0.0, accuracies(98.0, 60.0), split="test")
    elsewhere = [row | {"task": "images_resnet20"} for row in rows]
    report.write(elsewhere + rows, tmp_path, "vision")
    assert "images_resnet20: left out of" in capsys.readouterr().out
    assert list(json.loads((tmp_path / "vision.json").read_text())) == ["digits_mlp"]
    assert (tmp_path / "vision.md").read_text().startswith("## digits_mlp\n")


def test_runs_that_are_named_twice_are_counted_once(tmp_path, capsys):
    results = runner.Results(tmp_path / "x.csv", COLUMNS, KEY)
    trial = Trial("digits_mlp", "sgd", steps=2)
    runner.run_missing(one_row, [trial, trial, trial], lambda trial: 1, results, 1)
    assert "0 of 1 runs are in" in capsys.readouterr().out


def one_row(trial, progress):
    return [vars(trial) | dict.fromkeys(trials.MEASURED, "")]


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_failing_trial_ends_the_run_with_its_error(jobs):
    threads = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        runner.run(fail, [1, 2], lambda trial: 1, jobs)
    assert torch.get_num_threads() == threads


def fail(trial, progress):
    return [{"value": trial / 0}]


def fail_or_wait(trial, progress):
    """The first trial fails once all have begun; the others would take an hour."""
    Path(trial).touch()
    if trial.endswith("fails"):
        while len(list(Path(trial).parent.iterdir())) < 2:
            time.sleep(0.01)
        raise ZeroDivisionError
    time.sleep(3600)


def test_a_failing_trial_does_not_wait_for_those_beside_it(tmp_path):
    trials = [str(tmp_path / name) for name in ("fails", "waits")]
    with pytest.raises(ZeroDivisionError):
        runner.run(fail_or_wait, trials, lambda trial: 1, jobs=2)
    assert not multiprocessing.active_children()


PARENT = """
import sys, time
from benchmarks import runner

def wait(trial, progress):
    import os, pathlib
    pathlib.Path(trial).write_text(str(os.getpid()))
    time.sleep(3600)

if __name__ == "__main__":
    runner.run(wait, sys.argv[1:], lambda trial: 1, jobs=2)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_command_leaves_no_process_behind(tmp_path, how):
    script, files = tmp_path / "parent.py", [tmp_path / "a", tmp_path / "b"]
    script.write_text(PARENT)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, str(script), *map(str, files)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while not all(file.exists() and file.read_text() for file in files):
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.05)
    process.send_signal(how)
    process.wait()
    for worker in (int(file.read_text()) for file in files):
        while _is_running(worker):
            time.sleep(0.05)  # for ever, if it is left behind


def _is_running(process):
    try:
        os.kill(process, 0)
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_a_killed_benchmark_continues_where_it_stopped(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "vision", "--tasks", "digits_mlp", "--methods", "sgd,sgd+wcr"]
    command += ["--seeds", "1", "--strengths", "3", "--share", "0.1", "--jobs", "1", "--output", str(tmp_path)]
    table = tmp_path / "vision.csv"
    process = subprocess.Popen(
        command,
        cwd=Path(__file__).parents[1],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    results = runner.Results(table, COLUMNS, KEY)
    while not results.keys():
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = results.keys()
    assert benchmarks(command[3:]) == 0
    rows = results.read()
    assert results.keys() > kept
    apart = [tuple(row[name] for name in (*KEY, "sparsity", "scope", "recalibrated", "metric")) for row in rows]
    assert len(apart) == len(set(apart))
    assert {row["strength"] for row in rows if row["method"] == "sgd+wcr" and row["split"] == "validation"} == {
        str(strength) for strength, _ in tuning.grid("digits_mlp", "sgd+wcr", 3)
    }
    assert (tmp_path / "vision.md").read_text().startswith("## digits_mlp")
    written = ("vision.json", *(f"digits_mlp{kind}.png" for kind in ("", "_strengths", "_tradeoff")))
    assert all((tmp_path / name).stat().st_size for name in written)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tasks", "nothing"], "there is no task 'nothing'"),
        (["--methods", "sgd+nothing"], "there is no method"),
        (["--seeds", "0"], "at least 1"),
        (["--sparsities", "1.5"], r"lie in \[0, 1\]"),
        (["--told", "0.9,1"], "both excluded"),
        (["--quick", "--full"], "not allowed with"),
        (["--tasks", "language", "--methods", "adamw"], "python -m benchmarks language"),
        (["--tasks", ""], "name at least one"),
        (["--share", "0"], "above 0"),
        (["--share", "nan"], "above 0"),
        (["--device", "cuda:0"], "unknown .cuda:0."),
        (["--methods", "sgd,sgd+target", "--options", "foo=1"], "'foo'"),
        (["--methods", "sgd,sgd+target", "--options", "end=7"], "end"),
        (["--methods", "sgd,sgd+target", "--options", "foo"], "name=value"),
        (["--methods", "sgd,sgd+wcr", "--options", "lr=0.5"], "none of --methods has it"),
        (["--options", "batch=0"], "option batch must be a whole number of at least 1, got 0"),
        (["--options", "batch=x"], "option batch must be a whole number of at least 1, got 'x'"),
        (["--options", "lr=-1"], "option lr must be finite and not negative, got -1"),
        (["--options", "wd="], "option wd must be finite and not negative, got ''"),
        (["--options", "layers=innner"], "option layers must be one of weights, inner, all, got 'innner'"),
        (["--output", __file__], "exists"),
    ],
)
def test_bad_arguments_say_what_is_wrong(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        suites.main("vision", arguments)
    assert stopped.value.code == 2
    assert re.search(said, " ".join(capsys.readouterr().err.split()))


@pytest.mark.parametrize("installed", [True, False])
def test_all_methods_are_those_of_the_protocol(installed, monkeypatch):
    monkeypatch.setattr(suites, "find_spec", lambda name: object() if installed else None)
    methods = suites.every_method("digits_mlp")
    assert len(set(methods)) == len(methods)
    assert {f"{base}+prox" for base in ("sgd", "adamw")} & set(methods) == (
        {"sgd+prox", "adamw+prox"} if installed else set()
    )
    penalties = ("", "+l1", "+l2", "+hoyer", "+wcr", "+scale_free", "+target")
    wanted = {base + penalty for base in ("sgd", "adamw") for penalty in penalties} | {"sgd+random", "sgd+gradual"}
    wanted |= {f"sgd+{method}{penalty}" for method in SHARPNESS for penalty in ("", "+wcr")}
    assert wanted <= set(methods)


@pytest.mark.parametrize("method", ["sgd", "sgd+wcr"])
def test_a_base_that_a_task_has_no_setting_for_is_refused(method, capsys):
    with pytest.raises(SystemExit):
        suites.main("language", ["--tasks", "language", "--methods", method])
    assert "no setting for the base" in capsys.readouterr().err


def test_ablations_run_end_to_end_and_runs_of_other_lengths_do_not_count(tmp_path, monkeypatch, capsys):
    few = {"How": [("flow", "wcr", ""), ("late", "wcr", "from=0.5")]}
    monkeypatch.setattr(ablations, "VARIANTS", few)
    short = dataclasses.replace(tasks.task("digits_mlp"), steps=6)
    monkeypatch.setattr(tasks, "task", lambda name: short)
    page = tmp_path / "page.md"
    empty = "<!-- table: ablations digits_mlp -->\n<!-- end -->\n"
    page.write_text(empty)
    command = ["--tasks", "digits_mlp", "--seeds", "1", "--strengths", "2", "--jobs", "1", "--output", str(tmp_path)]
    command += ["--page", str(page)]
    assert ablations.main([*command, "--steps", "2"]) == 0
    assert "| late | " in capsys.readouterr().out
    assert page.read_text() == empty
    assert ablations.main(command) == 0
    assert "| late | " in page.read_text()
    assert "| SGD + WCR | " in page.read_text()
    results = runner.Results(tmp_path / "ablations.csv", COLUMNS, KEY)
    full = [row for row in results.read() if row["steps"] == "0"]
    assert len(full) < len(results.read())
    assert page.read_text() == report.filled(empty, "ablations digits_mlp", ablations.report(full, "digits_mlp", "sgd"))


def test_ablations_around_another_base_leave_the_tables_of_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "VARIANTS", {"How": [("flow", "wcr", "")]})
    short = dataclasses.replace(tasks.task("digits_mlp"), steps=2)
    monkeypatch.setattr(tasks, "task", lambda name: short)
    page = tmp_path / "page.md"
    first = "<!-- table: ablations digits_mlp -->\nof SGD\n<!-- end -->\n"
    page.write_text(first + "<!-- table: ablations digits_mlp adamw -->\n<!-- end -->\n")
    command = ["--base", "adamw", "--tasks", "digits_mlp", "--seeds", "1", "--strengths", "1", "--jobs", "1"]
    assert ablations.main([*command, "--output", str(tmp_path), "--page", str(page)]) == 0
    assert page.read_text().startswith(first)
    assert "| AdamW + WCR | " in page.read_text()


def test_ablations_give_bits_per_byte_to_three_digits():
    rows = [
        row | {"task": "language", "metric": "bits_per_byte"}
        for seed, value in ((0, 1.851), (1, 1.871))
        for split in ("validation", "test")
        for row in rows_of("adamw+wcr", 0.3, dict.fromkeys((0.0, 0.5, 0.7, 0.8), value), seed, split)
    ]
    assert "| WCR with weight decay | 1.861 ± 0.014 (1.861) at 0.3 |" in ablations.report(rows, "language", "adamw")


def test_ablations_count_the_runs_that_diverged():
    def tested(options, value, seed=0):
        return [row | {"options": options} for row in rows_of("sgd+wcr", 1e-3, accuracies(97.0, value), seed, "test")]

    rows = [
        *rows_of("sgd+wcr", 1e-3, accuracies(97.0, 80.0)),
        *rows_of("sgd+wcr", 1e-3, accuracies(97.0, 80.0), options="wd=0"),
        *tested("", 80.0),
        *tested("", 82.0, 1),
        *diverged("sgd+wcr", 1e-3, 2, "test"),
        *tested("wd=0", "nan"),
    ]
    text = ablations.report(rows, "digits_mlp", "sgd")
    assert "| WCR with weight decay | 81.0 ± 1.4 (97.0) at 0.001, 1 of 3 diverged |" in text
    assert "| WCR without | diverged at 0.001 |" in text
    assert "| SGD + WCR, 1 of 3 diverged | 97.0 ± 0.0 | 81.0 ± 1.4 |" in text


def test_convergence_runs_end_to_end(tmp_path, capsys):
    assert (
        benchmarks(
            ["convergence", "--steps", "60", "--seeds", "1", "--output", str(tmp_path), "--images", str(tmp_path)]
        )
        == 0
    )
    assert "vanishing strength" in capsys.readouterr().out
    assert (tmp_path / "convergence.png").stat().st_size
    with (tmp_path / "convergence.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3 * 3
    first = {row["squared_norm"] for row in rows if row["problem"] == "convex" and row["step"] == "0"}
    assert len(first) == 1  # the same network before any of the rules acts


def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))
    x, y = torch.randn(16, 8), torch.randint(3, (16,))
    return model, lambda: nn.functional.cross_entropy(model(x), y)


def test_sharpness_is_the_largest_eigenvalue_of_the_hessian():
    model, loss = problem()
    weights = list(model.parameters())
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss(), weights, create_graph=True)])
    rows = [torch.autograd.grad(entry, weights, retain_graph=True) for entry in gradient]
    hessian = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    eigenvalues = torch.linalg.eigvalsh(hessian.double())
    expected = eigenvalues[eigenvalues.abs().argmax()].item()
    assert largest_eigenvalue(model, loss, iterations=200, tolerance=1e-6) == pytest.approx(expected, rel=1e-2)


def test_in_loss_equals_a_term_in_the_loss():
    results = []
    for decoupled in (True, False):
        model, loss = problem()
        weights = [w for w in model.parameters() if w.ndim > 1]
        optimizer = torch.optim.SGD(param_groups(model, weight_concentration=1e-3), lr=0.1, momentum=0.9)
        if decoupled:
            optimizer = InLoss(optimizer, ScaleFree(), 1e-3)
        for _ in range(5):
            optimizer.zero_grad()
            value = loss()
            if not decoupled:
                value = value + 1e-3 * ScaleFree().value(moments(weights, smoothing=1e-8)).sum()
            value.backward()
            optimizer.step()
        results.append([w.detach().clone() for w in weights])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("form", ["wcr", "scale_free"])
def test_without_a_bound_on_growth_one_step_of_the_flow_goes_all_the_way(form):
    smallest = {}
    for name in (form, f"{form}_unguarded"):
        w = nn.Parameter(torch.tensor([[0.8, 0.6, 0.3]]))
        w.grad = torch.zeros_like(w)
        PENALTIES[name](torch.optim.SGD([w], lr=1.0), 1000.0).step()
        smallest[name] = w[0, 2].item()
    assert smallest[form] > 0.2
    assert smallest[f"{form}_unguarded"] == 0


def test_an_explicit_step_equals_the_flow_to_first_order():
    errors = []
    for strength in (1e-4, 1e-5):
        after = []
        for make in (
            lambda base, s: WCR(base, s, form="scale_free"),
            lambda base, s: ExplicitStep(base, ScaleFree(), s),
        ):
            model, _ = problem()
            model.double()
            before = model[0].weight.detach().clone()
            optimizer = make(torch.optim.SGD(param_groups(model, weight_concentration=strength), lr=0.1), strength)
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            optimizer.step()
            after.append(model[0].weight.detach() - before)
        errors.append(((after[0] - after[1]).norm() / after[0].norm()).item())
    assert errors[0] < 2e-2
    assert errors[1] < 0.2 * errors[0]


def test_a_window_switches_the_penalty_on_and_off():
    model, _ = problem()
    optimizer = WCR(torch.optim.SGD(param_groups(model, weight_concentration=0.5), lr=0.1))
    window = Window(optimizer, "weight_concentration", 8, 0.25, 0.75)
    seen = []
    for _ in range(8):
        seen.append(optimizer.param_groups[0]["weight_concentration"])
        window.step()
    assert seen == [0.0, 0.0, 0.5, 0.5, 0.5, 0.5, 0.0, 0.0]
    assert optimizer.param_groups[1]["weight_concentration"] == 0.0


def test_gradual_pruning_follows_its_cubic_path():
    model = nn.Linear(100, 100)
    gradual = GradualPruning(model, 0.9, 400)
    reached = []
    for _ in range(400):
        with torch.no_grad():
            model.weight.add_(1e-3 * torch.randn(100, 100))
        gradual.step()
        reached.append((model.weight == 0).float().mean().item())
    assert reached[299] == pytest.approx(0.9, abs=1e-4) == reached[-1]
    assert reached[149] == pytest.approx(0.9 * (1 - 0.5**3), abs=0.01)
    assert all(b >= a - 1e-6 for a, b in itertools.pairwise(reached))


def test_gradual_pruning_lets_no_masked_weight_return_by_momentum():
    torch.manual_seed(0)
    model = nn.Linear(20, 20, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    gradual = GradualPruning(model, 0.8, 200)
    masked = torch.zeros_like(model.weight, dtype=torch.bool)
    for _ in range(200):
        # Where a weight is masked the loss pulls hardest, so that one step would outgrow all that is left.
        model.weight.grad = 100.0 * masked
        optimizer.step()
        gradual.step()
        assert (model.weight[masked] == 0).all()
        masked |= model.weight.detach() == 0
    assert masked.float().mean().item() == pytest.approx(0.8, abs=2e-3)


def test_quantized_rounds_each_channel_for_the_block_only():
    model = nn.Linear(16, 4)
    before = model.weight.detach().clone()
    masks = pruning.magnitude_masks(model, 0.5)
    with torch.no_grad(), pruning.applied(model, masks), quantized(model, masks, True):
        pruned = before * masks["weight"]
        step = pruned.abs().amax(1, keepdim=True) / 127
        assert ((model.weight - pruned).abs() <= step / 2 + 1e-8).all()
        assert torch.equal(model.weight == 0, (pruned / step).round() == 0)
    assert torch.equal(model.weight, before)


def test_quantized_finds_the_channels_of_a_transposed_layer():
    """GPT-2's Conv1D is a linear layer whose weight lies the other way around."""
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    linear, transposed = nn.Linear(16, 4), conv1d(4, 16)
    with torch.no_grad():
        linear.weight[2] *= 100.0
        transposed.weight.copy_(linear.weight.T)
    rounded = []
    for model in (linear, transposed):
        masks = pruning.magnitude_masks(model, 0.5)
        with torch.no_grad(), pruning.applied(model, masks), quantized(model, masks, True):
            rounded.append(model.weight.clone())
    torch.testing.assert_close(rounded[0], rounded[1].T, rtol=0, atol=0)


def test_moved_keeps_the_nesting():
    data = {"x": torch.ones(2), "y": (torch.zeros(1), [torch.ones(1)])}
    assert str(moved(data, "cpu")) == str(data)


def test_every_task_can_be_named():
    assert {"digits_mlp", "digits_cnn", "language"} <= set(tasks.names())
    with pytest.raises(ValueError, match="there is no task 'x'; choose one of"):
        tasks.task("x")
