"""What SparsityTarget refuses, schedules of the strength, the plot."""

import copy
import math
import re

import numpy as np
import pytest
import torch
from reference import through_file
from target_reference import BASES, driven, student

from wcr_optim import WCR, L2Decay, SparsityTarget, StrengthSchedule


class TestRefusals:
    def optimizer(self):
        return WCR(BASES["sgd"](student().parameters()), form="per_unit")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"sparsity": 0.0}, "sparsity must lie"),
            ({"sparsity": 1.5}, "1.5"),
            ({"sparsity": math.nan}, "nan"),
            ({"tail_energy": 0.0}, "tail_energy must lie"),
            ({"tail_energy": 1.0}, "tail_energy must lie"),
            ({"max_dense_cost": 0.0}, "max_dense_cost must be positive"),
            ({"max_dense_cost": -1.0}, "-1.0"),
            ({"scope": "row"}, "'row'"),
            ({"every": 0}, "every must be"),
            ({"start": 0.8}, "start and end"),
            ({"end": 1.2}, "start and end"),
            ({"end": 0.0}, "start and end"),
            ({"start": 0.6}, "start and end"),
            ({"total_steps": None}, "epochs \\* batches"),
            ({"total_steps": 0}, "total_steps must be"),
            ({"total_steps": 10.5}, "10.5"),
        ],
    )
    def test_bad_values(self, options, message):
        with pytest.raises(ValueError, match=message):
            SparsityTarget(self.optimizer(), **({"total_steps": 100} | options))

    @pytest.mark.parametrize(
        "name", ["sparsity", "tail_energy", "max_dense_cost", "start", "end", "every", "lr_exponent"]
    )
    @pytest.mark.parametrize("bad", ["0.5", True, [0.5]])
    def test_what_is_no_number_is_named(self, name, bad):
        with pytest.raises(TypeError, match=rf"{name} must be a (whole )?number, got {re.escape(repr(bad))}"):
            SparsityTarget(self.optimizer(), **({"total_steps": 100} | {name: bad}))

    def test_a_second_target_takes_over_and_the_first_says_so(self):
        optimizer = self.optimizer()
        first = SparsityTarget(optimizer, 0.5, 10)
        second = SparsityTarget(optimizer, 0.9, 10)
        strengths = second.strengths()
        with pytest.raises(RuntimeError, match="another SparsityTarget was made for this optimizer"):
            first.step()
        assert second.strengths() == strengths
        second.step()
        copied, its_target = copy.deepcopy((optimizer, second))
        its_target.step()
        assert copied is not optimizer

    def test_numpys_numbers_are_numbers_and_a_checkpoint_loads_safely(self):
        optimizer = self.optimizer()
        target = SparsityTarget(
            optimizer, np.float64(0.5), np.int64(5), every=np.int32(1), lr_exponent=np.float64(0.5), end=np.float32(0.5)
        )
        schedule = StrengthSchedule(self.optimizer(), np.int64(5), warmup=np.int64(1), final=np.float64(0.1))
        optimizer.param_groups[0]["params"][0].grad = torch.ones_like(optimizer.param_groups[0]["params"][0])
        optimizer.step()
        target.step(np.float64(1.0))
        target.step(np.array([1.0]))
        schedule.step()
        for part in (optimizer, target, schedule):
            assert repr(through_file(part.state_dict())) == repr(part.state_dict())

    @pytest.mark.parametrize("wrap", [lambda base: base, L2Decay])
    def test_nothing_to_drive_names_the_way_out(self, wrap):
        with pytest.raises(ValueError, match='form="per_unit"'):
            SparsityTarget(wrap(BASES["sgd"](student().parameters())), total_steps=100)

    def test_no_optimizer(self):
        with pytest.raises(TypeError, match="optimizer instance"):
            SparsityTarget(student(), total_steps=100)

    def test_every_strength_zero(self):
        optimizer = WCR(BASES["sgd"](student().parameters()), 0.0, form="per_unit")
        with pytest.raises(ValueError, match="is 0 in every group"):
            SparsityTarget(optimizer, total_steps=100)

    def test_max_dense_cost_needs_the_loss(self):
        target = SparsityTarget(self.optimizer(), total_steps=100, max_dense_cost=0.1)
        with pytest.raises(ValueError, match=r"call step\(loss\)"):
            target.step()
        assert target.steps == 0

    @pytest.mark.parametrize(
        ("loss", "error", "message"),
        [
            (torch.ones(3), ValueError, "one number"),
            (np.ones(2), ValueError, "one number"),
            (torch.tensor(1 + 2j), TypeError, "real number"),
            (1 + 2j, TypeError, r"real number .*\(1\+2j\)"),
            ("x", TypeError, "'x'"),
            ([1.0], TypeError, r"\[1.0\]"),
        ],
    )
    def test_a_loss_that_is_not_one_real_number(self, loss, error, message):
        target = SparsityTarget(self.optimizer(), total_steps=100)
        with pytest.raises(error, match=message):
            target.step(loss)
        assert target.steps == 0
        target.step(1.0)  # nothing of it stays behind

    def test_a_refused_target_leaves_the_groups_as_they_were(self):
        optimizer = self.optimizer()
        before = copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
        with pytest.raises(ValueError, match="sparsity"):
            SparsityTarget(optimizer, 2.0, 100)
        assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == before


class TestStrengthSchedule:
    def test_warm_up_then_cosine(self):
        optimizer = WCR(BASES["sgd"](student().parameters()), 2.0)
        schedule = StrengthSchedule(optimizer, 100, warmup=10, shape="cosine")
        seen = []
        for _ in range(120):
            seen.append(optimizer.param_groups[0]["weight_concentration"])
            optimizer.step()
            schedule.step()
        assert seen[0] == 0.0
        assert seen[5] == pytest.approx(1.0)
        assert seen[10] == 2.0
        assert seen[55] == pytest.approx(1.0)
        assert seen[100] == seen[119] == 0.0

    @pytest.mark.parametrize("shape", ["constant", "linear", "cosine"])
    def test_a_warm_up_alone_keeps_its_last_factor(self, shape):
        schedule = StrengthSchedule(WCR(BASES["sgd"](student().parameters()), 1.0), 10, warmup=10, shape=shape)
        for _ in range(15):
            schedule.step()
        assert schedule.strengths() == [1.0]

    @pytest.mark.parametrize(("shape", "last"), [("constant", 1.0), ("linear", 0.25), ("cosine", 0.25)])
    def test_ends(self, shape, last):
        optimizer = WCR(BASES["sgd"](student().parameters()), 1.0)
        schedule = StrengthSchedule(optimizer, 10, shape=shape, final=0.25)
        for _ in range(10):
            schedule.step()
        assert schedule.strengths() == [last]

    def test_resume(self):
        def make():
            optimizer = WCR(BASES["sgd"](student().parameters()), 1.0)
            return optimizer, StrengthSchedule(optimizer, 50, warmup=5, shape="linear")

        first, second = make(), make()
        for _ in range(17):
            first[1].step()
        second[0].load_state_dict(through_file(first[0].state_dict()))
        second[1].load_state_dict(through_file(first[1].state_dict()))
        for _ in range(9):
            first[1].step()
            second[1].step()
        assert first[1].strengths() == second[1].strengths()

    @pytest.mark.parametrize("options", [{"warmup": 2.5}, {"warmup": True}, {"warmup": None}, {"final": None}])
    def test_what_is_no_number(self, options):
        optimizer = WCR(BASES["sgd"](student().parameters()), 1.0)
        with pytest.raises(TypeError, match=f"{next(iter(options))} must be"):
            StrengthSchedule(optimizer, 100, **options)

    def test_a_state_of_more_groups_is_refused_and_changes_nothing(self):
        def schedule(groups):
            return StrengthSchedule(WCR(BASES["sgd"]([{"params": [w]} for w in groups]), 1.0), 10, warmup=5)

        saved = schedule(torch.ones(2, 4, 4)).state_dict() | {"steps": 3}
        other = schedule(torch.ones(1, 4, 4))
        with pytest.raises(ValueError, match="2 parameter groups, and the optimizer has 1"):
            other.load_state_dict(saved)
        assert other.steps == 0
        other.step()
        assert other.strengths() == [0.2]

    @pytest.mark.parametrize(
        "options", [{"warmup": -1}, {"warmup": 101}, {"shape": "zigzag"}, {"final": -1.0}, {"total_steps": 0}]
    )
    def test_bad_values(self, options):
        optimizer = WCR(BASES["sgd"](student().parameters()), 1.0)
        with pytest.raises(ValueError, match=next(iter(options))):
            StrengthSchedule(optimizer, **({"total_steps": 100} | options))


def test_plot(tmp_path):
    _, _, target, _ = driven("sgd", steps=50, tail_energy=0.3)
    figure = target.plot(tmp_path / "target.png", accuracy=[(10, 50.0), (50, 90.0)])
    assert (tmp_path / "target.png").stat().st_size > 10_000
    assert [ax.get_ylabel() for ax in figure.axes] == [
        "tail (share of energy)",
        "strength",
        "training loss",
        "accuracy",
    ]
    assert list(figure.axes[0].lines[0].get_xdata()) == [row[0] for row in target.history]


def test_plot_before_the_first_step():
    target = SparsityTarget(WCR(BASES["sgd"](student().parameters()), form="per_unit"), total_steps=10)
    with pytest.raises(ValueError, match="nothing was measured"):
        target.plot()
