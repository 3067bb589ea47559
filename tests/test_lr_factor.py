"""A group's base_lr_factor: the base updates with lr times it, and nobody else sees anything but lr."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from reference import assert_same, small_net, through_file, train
from target_reference import BASES, density, driven, student

from wcr_optim import SAM, SSAM, WCR, AdamW, L1Decay, L2Decay, SparsityTarget, param_groups
from wcr_optim.wrapper import LR_FACTOR

CHAINS = {
    "WCR": lambda base: WCR(base, 1e-3),
    "L2(WCR)": lambda base: L2Decay(WCR(base, 1e-3), 1e-2),
    "WCR(SAM)": lambda base: WCR(SAM(base), 1e-3),
    "SSAM(WCR)": lambda base: SSAM(WCR(base, 1e-3)),
}


def sgd(net, lr=0.1):
    return torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)


class TestUpdate:
    @pytest.mark.parametrize("chain", CHAINS)
    @pytest.mark.parametrize("kind", [float, torch.tensor])
    def test_is_the_bases_lr_and_not_the_penaltys(self, chain, kind):
        """The twin has the larger lr, and strengths that take it out of the penalties' steps again."""
        wide, twin = small_net(), small_net()
        optimizer, other = CHAINS[chain](sgd(wide)), CHAINS[chain](sgd(twin, lr=0.4))
        optimizer.param_groups[0][LR_FACTOR] = kind(4.0)
        for option in ("weight_concentration", "l2_decay"):
            if option in other.param_groups[0]:
                other.param_groups[0][option] /= 4
        train(wide, optimizer, range(5), closure=True)
        train(twin, other, range(5), closure=True)
        for p, q in zip(wide.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
        assert optimizer.param_groups[0]["lr"] == 0.1

    def test_only_its_own_group(self):
        net = small_net()
        groups = [{"params": [net[0].weight], LR_FACTOR: 3.0}, {"params": [net[3].weight]}]
        optimizer = L1Decay(torch.optim.SGD(groups, lr=0.1), 0.0)
        before = [net[0].weight.clone(), net[3].weight.clone()]
        for w in before:
            w.grad = torch.ones_like(w)
        net[0].weight.grad, net[3].weight.grad = (w.grad for w in before)
        optimizer.step()
        torch.testing.assert_close(before[0] - net[0].weight, torch.full_like(before[0], 0.3))
        torch.testing.assert_close(before[1] - net[3].weight, torch.full_like(before[1], 0.1))

    def test_an_lr_that_is_a_tensor_stays_the_same_tensor(self):
        net = small_net()
        optimizer = WCR(torch.optim.SGD(net.parameters(), lr=torch.tensor(0.1)))
        lr = optimizer.param_groups[0]["lr"]
        optimizer.param_groups[0][LR_FACTOR] = 2.0
        train(net, optimizer, range(2))
        assert optimizer.param_groups[0]["lr"] is lr
        assert lr.item() == pytest.approx(0.1)

    def test_in_a_fused_step(self):
        unfused, fused = small_net(), small_net()
        for net, options in ((unfused, {}), (fused, {"fused": True})):
            optimizer = AdamW(net.parameters(), lr=1e-2, weight_concentration=1e-3, **options)
            optimizer.backend = "compiled" if options else "eager"
            optimizer.param_groups[0][LR_FACTOR] = 5.0
            train(net, optimizer, range(5))
        for p, q in zip(unfused.parameters(), fused.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)

    def test_lbfgs(self):
        wide, twin = small_net(), small_net()
        for net, lr, factor in ((wide, 0.1, 3.0), (twin, 0.3, 1.0)):
            optimizer = L1Decay(torch.optim.LBFGS(net.parameters(), lr=lr, max_iter=3), 0.0)
            optimizer.param_groups[0][LR_FACTOR] = factor
            train(net, optimizer, range(3), closure=True)
        for p, q in zip(wide.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)

    def test_a_failed_step_leaves_the_lr(self):
        net = small_net()
        optimizer = WCR(sgd(net))
        optimizer.param_groups[0][LR_FACTOR] = 2.0
        net[0].weight.grad = torch.ones_like(net[0].weight)

        def fail(*_):
            raise RuntimeError("no")

        optimizer.base.register_step_pre_hook(fail)
        with pytest.raises(RuntimeError, match="no"):
            optimizer.step()
        assert optimizer.param_groups[0]["lr"] == 0.1

    @pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
    def test_bad_values_are_refused_before_anything_changes(self, bad):
        net, before = small_net(), small_net()
        optimizer = WCR(sgd(net))
        net[0].weight.grad = torch.ones_like(net[0].weight)
        optimizer.param_groups[0][LR_FACTOR] = bad
        with pytest.raises(ValueError, match="base_lr_factor must be finite"):
            optimizer.step()
        assert_same(net, before)

    @pytest.mark.parametrize("bad", [None, "2", True])
    def test_no_numbers_are_refused(self, bad):
        optimizer = WCR(sgd(small_net()))
        optimizer.param_groups[0][LR_FACTOR] = bad
        with pytest.raises(TypeError, match=r"base_lr_factor must be a number, got .* in param_groups\[0\]"):
            optimizer.step()

    @pytest.mark.parametrize("base", ["AdamW", "Muon", "Adafactor"])
    def test_a_decay_by_lr_is_as_without_it(self, base):
        decays = []
        for factor in (1.0, 8.0, torch.tensor(8.0)):
            w = torch.nn.Parameter(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
            optimizer = WCR(getattr(torch.optim, base)([w], lr=1e-2, weight_decay=0.5), 0.0)
            optimizer.param_groups[0][LR_FACTOR] = factor
            w.grad = torch.zeros_like(w)
            before = w.detach().clone()
            optimizer.step()
            decays.append(before - w.detach())
            assert optimizer.param_groups[0]["weight_decay"] == 0.5
        for decay in decays[1:]:
            torch.testing.assert_close(decays[0], decay)
        assert decays[0].abs().min() > 0

    def test_a_scheduler_in_a_hook_of_the_base_is_heeded(self):
        net = small_net()
        optimizer = WCR(sgd(net))
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer.base, 0.5)
        optimizer.base.register_step_post_hook(lambda *_: schedule.step())
        optimizer.param_groups[0][LR_FACTOR] = 4.0
        train(net, optimizer, range(3))
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 8)

    def test_a_base_that_replaces_its_groups(self):
        class Rebinding(torch.optim.SGD):
            def step(self, closure=None):
                super().step(closure)
                self.param_groups = [dict(group) for group in self.param_groups]

        net = small_net()
        optimizer = WCR(Rebinding(net.parameters(), lr=0.1))
        optimizer.param_groups[0][LR_FACTOR] = 4.0
        train(net, optimizer, range(3))
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)

    def test_numpy_numbers_become_ones_that_a_safe_checkpoint_holds(self):
        optimizer = WCR(sgd(small_net()))
        optimizer.param_groups[0][LR_FACTOR] = np.float64(2.0)
        train(small_net(), optimizer, range(0))
        optimizer.step()
        assert type(through_file(optimizer.state_dict())["param_groups"][0][LR_FACTOR]) is float

    def test_checkpoints_keep_it_and_older_ones_do_not_take_it_away(self):
        net = small_net()
        optimizer, older = WCR(sgd(net)), WCR(sgd(net)).state_dict()
        optimizer.param_groups[0][LR_FACTOR] = 2.0
        fresh = WCR(sgd(small_net()))
        fresh.load_state_dict(through_file(optimizer.state_dict()))
        assert fresh.param_groups[0][LR_FACTOR] == 2.0
        optimizer.load_state_dict(older)
        assert optimizer.param_groups[0][LR_FACTOR] == 2.0


class TestSparsityTarget:
    @pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
    @pytest.mark.parametrize(("losses", "most"), [("falling", 1.0), ("standing", 0.5), ("none", 0.5)])
    def test_follows_the_density_beyond_its_root_only_while_the_loss_falls(self, exponent, losses, most):
        net = student()
        optimizer = WCR(BASES["adamw"](param_groups(net)), form="per_unit")
        target = SparsityTarget(optimizer, 0.9, 50, tail_energy=0.1, every=1, lr_exponent=exponent)
        weights = [w for w in optimizer.param_groups[0]["params"] if w.ndim > 1]
        given = {"falling": [9.0 - 0.1 * step for step in range(20)], "standing": [9.0] * 20, "none": [None] * 20}
        target.step(given[losses][0])
        first = min(density(weights), 2 / math.pi)
        assert target.lr_factors() == [1.0, 1.0]
        with torch.no_grad():
            for w in weights:
                w.copy_(w.abs().pow(3) * w.sign())
        for loss in given[losses][1:]:
            target.step(loss)
        expected = (first / density(weights)) ** min(exponent, most)
        assert target.lr_factors()[0] == pytest.approx(expected, rel=1e-5)
        assert target.lr_factors()[1] == 1.0, "what is not driven keeps its lr"
        assert exponent == 0.0 or expected > 1.5 ** min(exponent, most)

    def test_is_bounded_by_the_wanted_sparsity_and_never_below_one(self):
        net = student()
        optimizer = WCR(BASES["adamw"](param_groups(net)), form="per_unit")
        target = SparsityTarget(optimizer, 0.5, 50, tail_energy=0.1, every=1)
        target.step(9.0)
        with torch.no_grad():
            for p in net.parameters():
                p.zero_().view(-1)[0] = 1.0
        for step in range(20):
            target.step(8.0 - 0.1 * step)
        assert target.lr_factors()[0] == 2.0
        with torch.no_grad():
            for p in net.parameters():
                p.fill_(1.0)
        target.step(1.0)
        assert target.lr_factors()[0] == 1.0

    @pytest.mark.parametrize("seed", range(4))
    def test_moves_as_the_rule_says_step_by_step(self, seed):
        """The factor of every measurement beside the rule, written out."""
        net = student()
        optimizer = WCR(BASES["adamw"](param_groups(net)), form="per_unit")
        target = SparsityTarget(optimizer, 0.9, 200, tail_energy=0.1, every=1)
        weights = [w for w in optimizer.param_groups[0]["params"] if w.ndim > 1]
        losses = np.random.default_rng(seed).normal(np.linspace(3, 2, 60), 0.1).tolist() + [2.2] * 20
        smooth, factor, kinds = [losses[0]], 1.0, set()
        target.step(losses[0])
        first = min(density(weights), 2 / math.pi)
        with torch.no_grad():
            for w in weights:
                w.copy_(w.abs().pow(9) * w.sign())
        lost = min(first / density(weights), 1 / (1 - 0.9))
        for loss in losses[1:]:
            smooth.append(smooth[-1] + 0.2 * (loss - smooth[-1]))
            falling = len(smooth) > 3 and smooth[-1] < smooth[-4]
            if falling:
                factor = min(lost, 1.1 * factor)
            else:
                factor = max(min(lost, 0.9 * factor), min(math.sqrt(lost), 1.1 * factor))
            kinds.add((falling, factor == lost, factor == math.sqrt(lost)))
            target.step(loss)
            assert target.lr_factors()[0] == pytest.approx(factor, rel=1e-5)
        assert lost > 3.0
        assert {(True, False, False), (False, False, False), (False, False, True)} <= kinds

    def test_falls_to_1_where_the_loss_is_bad_and_comes_back(self):
        net = student()
        optimizer = WCR(BASES["adamw"](param_groups(net)), form="per_unit")
        target = SparsityTarget(optimizer, 0.9, 200, tail_energy=0.1, every=1)
        target.step(2.0)
        with torch.no_grad():
            for p in net.parameters():
                p.copy_(p.abs().pow(9) * p.sign())
        factors = []
        for loss in [2.0 - 0.02 * k for k in range(40)] + [9.0] * 12 + [0.5] * 60:
            target.step(loss)
            factors.append(target.lr_factors()[0])
        assert factors[39] > 3.0
        assert factors[51] == 1.0
        assert max(factors[52:]) == pytest.approx(factors[39]), "while the loss comes back down"
        assert max(b / a for a, b in itertools.pairwise(factors)) < 1.11, "never by much at once"

    def test_the_last_few_measurements_decide_after_a_resume_too(self):
        def begin():
            net = student()
            optimizer = WCR(BASES["adamw"](param_groups(net)), form="per_unit")
            return net, SparsityTarget(optimizer, 0.9, 200, tail_energy=0.1, every=1)

        def concentrate(net):
            with torch.no_grad():
                for p in net.parameters():
                    p.copy_(p.abs().pow(3) * p.sign())

        losses = [3.0, 2.9, 2.8, 3.1, 2.7, 3.0, 2.6, 2.5, 2.6, 2.4, 2.7, 2.9]
        found = []
        for stop in (None, 2, 5, 9):
            net, target = begin()
            for step, loss in enumerate(losses):
                if step == 1:
                    concentrate(net)
                if step == stop:
                    saved, weights = target.state_dict(), copy.deepcopy(net.state_dict())
                    net, target = begin()
                    net.load_state_dict(weights)
                    target.load_state_dict(saved)
                target.step(loss)
            found.append(target.lr_factors())
        assert found[0][0] > 1.0
        assert all(other == found[0] for other in found)

    def test_weights_that_are_all_zero_or_nan_change_nothing(self):
        net = student()
        optimizer = WCR(BASES["adamw"](param_groups(net)), form="per_unit")
        target = SparsityTarget(optimizer, 0.9, 50, every=1)
        target.step()
        for value in (0.0, math.nan):
            with torch.no_grad():
                for p in net.parameters():
                    p.fill_(value)
            target.step()
            assert target.lr_factors() == [1.0, 1.0]

    def test_the_default_asks_what_kind_of_updates_the_base_makes(self):
        def defaults(base, wrap=lambda base: base):
            target = SparsityTarget(WCR(wrap(base(student().parameters(), lr=1e-3)), form="per_unit"), total_steps=10)
            return target.lr_exponent, target.tail_energy

        plain, normalized = (0.25, 1e-3), (1.0, 3e-3)
        assert defaults(torch.optim.SGD) == defaults(torch.optim.SGD, SAM) == defaults(torch.optim.ASGD) == plain
        assert defaults(torch.optim.AdamW) == defaults(torch.optim.RMSprop, SAM) == normalized
        assert defaults(torch.optim.LBFGS) == (0.0, 3e-3)

    def test_a_tail_energy_that_is_given_is_taken_around_any_base(self):
        for base in BASES.values():
            target = SparsityTarget(
                WCR(base(student().parameters()), form="per_unit"), total_steps=10, tail_energy=2e-3
            )
            assert target.tail_energy == 2e-3

    def test_exponent_0_touches_nothing(self):
        optimizer = WCR(BASES["adamw"](param_groups(student())), form="per_unit")
        target = SparsityTarget(optimizer, 0.9, 50, every=1, lr_exponent=0.0)
        assert LR_FACTOR not in optimizer.param_groups[0]
        optimizer.param_groups[0][LR_FACTOR] = 0.5
        target.step()
        assert target.lr_factors()[0] == 0.5

    def test_resumed_with_exponent_0_nothing_stays_raised(self):
        _, optimizer, target, _ = driven("adamw", steps=60, tail_energy=0.1)
        assert target.lr_factors()[0] > 1.0
        state = target.state_dict()
        resumed = SparsityTarget(optimizer, 0.9, 60, lr_exponent=0.0)
        resumed.load_state_dict(state)
        assert set(resumed.lr_factors()) == {1.0}
        optimizer.param_groups[0][LR_FACTOR] = 3.0  # as the optimizer's own state has it, loaded after this one
        resumed.step()
        assert set(resumed.lr_factors()) == {1.0}
        optimizer.param_groups[0][LR_FACTOR] = 0.5  # one's own
        own = SparsityTarget(optimizer, 0.9, 60, lr_exponent=0.0)
        resumed_own = SparsityTarget(optimizer, 0.9, 60, lr_exponent=0.0)
        resumed_own.load_state_dict(own.state_dict())
        assert resumed_own.lr_factors()[0] == 0.5

    def test_a_new_target_starts_at_1(self):
        _, optimizer, target, _ = driven("adamw", steps=60, tail_energy=0.1)
        assert target.lr_factors()[0] > 1.0
        assert SparsityTarget(optimizer, 0.9, 60).lr_factors()[0] == 1.0

    def test_weights_that_start_alike_have_not_lost_what_they_then_differ_by(self):
        net = student()
        with torch.no_grad():
            for p in net.parameters():
                p.fill_(1e-3)
        optimizer = WCR(BASES["adamw"](param_groups(net)), form="per_unit")
        target = SparsityTarget(optimizer, 0.9, 50, every=1)
        target.step()
        torch.manual_seed(0)
        with torch.no_grad():
            for p in net.parameters():
                p.normal_()
        for _ in range(5):
            target.step()
        assert target.lr_factors()[0] == pytest.approx(1.0, abs=0.02)

    def test_schedulers_and_logs_see_the_lr_as_it_was(self):
        _, optimizer, target, _ = driven("adamw", steps=60, tail_energy=0.1)
        plain = BASES["adamw"](student().parameters())
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(plain, 60)
        for _ in range(60):
            plain.step()
            schedule.step()
        assert target.lr_factors()[0] > 1.0
        assert optimizer.param_groups[0]["lr"] == plain.param_groups[0]["lr"]

    def test_adam_learns_what_it_could_not_with_the_few_weights_that_stay(self):
        losses = [sum(driven("adamw", seed=seed, lr_exponent=e)[3] for seed in (0, 1)) for e in (0.0, 1.0)]
        assert losses[1] < losses[0] / 2

    @pytest.mark.parametrize("bad", [-0.1, 1.5, math.nan])
    def test_bad_exponents(self, bad):
        optimizer = WCR(BASES["sgd"](param_groups(student())), form="per_unit")
        with pytest.raises(ValueError, match="lr_exponent must lie in"):
            SparsityTarget(optimizer, total_steps=10, lr_exponent=bad)
        assert LR_FACTOR not in optimizer.param_groups[0]
