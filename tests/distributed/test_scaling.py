"""The cost model of benchmarks/scaling.py: it counts what happens, and its formulas are those of its docstring."""

import csv
from pathlib import Path

import pytest
import torch.distributed as dist
from processes import run_processes

from benchmarks import scaling
from benchmarks.scaling import CLUSTER, MODELS, Link, Machine, Size, cost

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")


def _counts(rank):
    ranks = dist.get_world_size()
    rows = scaling.counted_rows({ranks: {"counted": scaling.counted(8, 128)}})
    assert [row["what"].split(": ")[1] for row in rows] == ["step", "perturbation", "target", "masks"]
    for row in rows:
        assert row["measured"] == row["model"], row


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_model_knows_every_exchange(ranks):
    run_processes(_counts, ranks)


def test_an_all_reduce_takes_the_faster_of_a_tree_and_a_ring():
    machine = Machine(1e12, 0.0, Link(1e-6, 1e9), Link(1e-5, 1e8), node=4)
    assert machine.all_reduce(1, 10**9) == 0.0
    assert machine.all_reduce(2, 0) == pytest.approx(2e-6)
    assert machine.all_reduce(4, 0) == pytest.approx(4e-6)
    assert machine.all_reduce(16, 0) == pytest.approx(2 * (2 * 1e-6 + 2 * 1e-5))
    ring = 2 * 15 * (1e-5 + 1e9 / 16 / 1e8)
    assert machine.all_reduce(16, 10**9) == pytest.approx(ring)


def test_cost_of_a_step():
    model = Size("small", 3.2e6, 10)
    machine = Machine(1e9, 1e-3, Link(0.0, 1e9), Link(0.0, 1e9))
    found = cost(model, 16, machine)
    assert found.size == 160
    assert found.kernels == pytest.approx(12 * 2e5 / 1e9 + 2e-3)
    assert found.eager == pytest.approx(12 * 2e5 / 1e9 + 30e-3)
    assert found.adamw == pytest.approx(28 * 2e5 / 1e9)
    assert found.state == 16 * 2e5
    assert found.links == pytest.approx(8 * 3.2e6 * 15 / 16)
    assert found.masks == 4e5
    for model in MODELS:
        exchanges = [cost(model, ranks).exchange for ranks in (8, 64, 512, 4096)]
        assert exchanges == sorted(exchanges)
        assert cost(model, 4096).kernels < cost(model, 8).kernels


def test_this_machine_is_fitted_and_tabled(tmp_path):
    """Times that a machine of known speed would have taken give back that machine."""
    options = type("Options", (), {"tensors": 10, "side": 256})()
    truth = Machine(2e9, 1e-5, Link(1e-4, 1e8), Link(1e-4, 1e8))

    def spread(seconds):
        return [seconds, 1.1 * seconds, seconds, 1.2 * seconds]

    def found(ranks):
        sides = {"large": 256, "small": 32}
        passes = {name: cost(Size(name, 10 * side**2, 10), ranks, truth).eager for name, side in sides.items()}
        reduce = {str(size): spread(truth.all_reduce(ranks, size)) for size in (160, 8960, 2**20)}
        timed = {name: {"pass": spread(s), "step": spread(2 * s), "reduce": reduce} for name, s in passes.items()}
        return {**timed, "counted": {}}

    results = {ranks: found(ranks) for ranks in (1, 2, 4)}
    machine = scaling.fitted(results[1], results[2], options)
    assert machine.memory == pytest.approx(truth.memory)
    assert machine.launch == pytest.approx(truth.launch)
    assert machine.inside.latency == pytest.approx(truth.inside.latency)
    assert machine.inside.bandwidth == pytest.approx(truth.inside.bandwidth)
    rows = scaling.measured_rows(results, machine, options)
    for row in rows:
        if row["what"].startswith("all-reduce"):
            assert float(row["model"]) == pytest.approx(float(row["measured"]), rel=1e-2)
    scaling.write(tmp_path / "scaling.csv", rows, scaling.model_rows(CLUSTER))
    with (tmp_path / "scaling.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(rows) + len(MODELS) * len(scaling.RANKS) * 10
    assert {line["kind"] for line in lines} == {"here", "cluster"}


def test_the_documentation_has_the_models_numbers():
    page = (Path(scaling.__file__).parents[1] / "docs" / "scaling.md").read_text(encoding="utf-8")
    for row in scaling.model_rows():
        assert f"| {' | '.join(row.values())} |" in page


def test_bad_options_are_refused(capsys):
    with pytest.raises(SystemExit):
        scaling.main(["--rounds", "1"])
    assert "--rounds must be at least 2" in capsys.readouterr().err
    with pytest.raises(ValueError, match="fewer than 32768 weights, got 100"):
        scaling.mask_exchanges(100)
