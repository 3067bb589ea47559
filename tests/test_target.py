"""SparsityTarget: its measurement against a sort, control of small networks, resume bit for bit, what is refused."""

import copy
import itertools
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import assert_same, through_file
from torch import nn

from wcr_optim import SAM, WCR, Decoupled, HoyerDecay, L1Decay, L2Decay, SparsityTarget, StrengthSchedule, param_groups
from wcr_optim.penalties import ScaleFree
from wcr_optim.tail import tail_energies
from wcr_optim.trend import LossTrend


def plain_tail(tensors, sparsity: float) -> float:
    """Sort all weights, square, sum."""
    m = torch.cat([w.detach().double().abs().reshape(-1) for w in tensors]).sort().values.square()
    return (m[: round(sparsity * m.numel())].sum() / m.sum()).item()


def measured_tail(tensors, sparsity: float) -> float:
    pruned, total = tail_energies([tensors], sparsity)[0].tolist()
    return pruned / total


class TestTail:
    @settings(max_examples=40, deadline=None)
    @given(
        seed=st.integers(0, 2**16),
        sparsity=st.sampled_from([0.3, 0.5, 0.8, 0.9, 0.95, 0.98]),
        power=st.sampled_from([1, 2, 4]),
        scale=st.sampled_from([1e-12, 1e-3, 1.0, 1e6]),
    )
    def test_within_one_percent_of_a_sort(self, seed, sparsity, power, scale):
        generator = torch.Generator().manual_seed(seed)
        shapes = [(40, 50), (3, 7, 5, 5), (4000,)]
        tensors = [scale * torch.randn(s, generator=generator).pow(power) * (i + 1) for i, s in enumerate(shapes)]
        assert measured_tail(tensors, sparsity) == pytest.approx(plain_tail(tensors, sparsity), rel=0.01)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_dtypes_strides_and_several_chunks(self, dtype):
        w = torch.randn(900, 700).to(dtype).t()[:, ::2]
        big = torch.randn(2**19 + 7).to(dtype)
        assert measured_tail([w, big], 0.9) == pytest.approx(plain_tail([w, big], 0.9), rel=0.01)

    def test_mostly_zeros_and_ties(self):
        w = torch.zeros(1000)
        w[:30] = 1.0
        assert measured_tail([w], 0.98) == pytest.approx(10 / 30, rel=1e-6)
        assert 0.0 <= measured_tail([w], 0.5) < 1e-30

    def test_sets_are_ranked_apart(self):
        a, b = torch.randn(500), 100 * torch.randn(300)
        energies = tail_energies([[a], [b]], 0.9)
        for (pruned, total), w in zip(energies.tolist(), (a, b), strict=True):
            assert pruned / total == pytest.approx(plain_tail([w], 0.9), rel=0.01)
            assert total == pytest.approx(w.double().square().sum().item(), rel=0.01)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_what_is_not_finite_shows(self, bad):
        w = torch.randn(100)
        w[3] = bad
        assert not math.isfinite(tail_energies([[w]], 0.5)[0, 1].item())


# A task on which pruning matters: few of many inputs count.
def teacher_batch(step: int, inputs: int = 32, size: int = 64):
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(size, inputs, generator=generator)
    return x, (x[:, :3].sum(1, keepdim=True) * x[:, 3:4].sign())


def student(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))


BASES = {
    "sgd": lambda groups, lr=0.05: torch.optim.SGD(groups, lr=lr, momentum=0.9),
    "adamw": lambda groups, lr=3e-3: torch.optim.AdamW(groups, lr=lr),
}


def fit(net, optimizer, target, steps, scheduler=None, first=0) -> float:
    loss = torch.tensor(math.nan)
    for step in range(first, first + steps):
        x, y = teacher_batch(step)
        optimizer.zero_grad()
        loss = (net(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        if target is not None:
            target.step(loss)
        if scheduler is not None:
            scheduler.step()
    return loss.item()


def weights_of(optimizer):
    return [p for p in optimizer.param_groups[0]["params"] if p.ndim > 1]


def driven(base="sgd", wrap=lambda b: WCR(b, form="scale_free"), steps=300, seed=0, lr=None, **options):
    """Train with a target and a cosine schedule; return network, optimizer, target and the last loss."""
    net = student(seed)
    groups = param_groups(net)
    optimizer = wrap(BASES[base](groups) if lr is None else BASES[base](groups, lr))
    for group in optimizer.param_groups[1:]:
        group[optimizer.param_groups[0].get("option", getattr(optimizer, "penalty", ScaleFree()).option)] = 0.0
    target = SparsityTarget(optimizer, **({"sparsity": 0.9, "total_steps": steps} | options))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    loss = fit(net, optimizer, target, steps, scheduler)
    return net, optimizer, target, loss


class TestControl:
    @pytest.mark.parametrize("base", BASES)
    @pytest.mark.parametrize("form", ["scale_free", "relative"])
    def test_reaches_the_goal_by_three_quarters_and_stays(self, base, form):
        _, optimizer, target, _ = driven(base, lambda b: WCR(b, form=form))
        by_step = {row[0]: row for row in target.history}
        assert by_step[225][1] <= 1.5 * target.tail_energy
        assert plain_tail(weights_of(optimizer), 0.9) <= 1.2 * target.tail_energy
        assert target.last_tail == pytest.approx(plain_tail(weights_of(optimizer), 0.9), rel=0.02)

    @pytest.mark.parametrize("base", BASES)
    def test_follows_its_path(self, base):
        _, _, target, _ = driven(base)
        errors = [abs(math.log(tail / wanted)) for _, tail, wanted, _, _ in target.history]
        assert max(errors) < 1.5
        assert max(errors[50:]) < 0.5

    def test_prunes_better_than_without(self):
        plain = student()
        optimizer = BASES["sgd"](param_groups(plain))
        fit(plain, optimizer, None, 300, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300))
        net, *_ = driven("sgd")
        losses = []
        for each in (plain, net):
            pruned = copy.deepcopy(each)
            matrices = [p for p in pruned.parameters() if p.ndim > 1]
            cut = torch.cat([w.detach().abs().flatten() for w in matrices]).quantile(0.9)
            with torch.no_grad():
                for w in matrices:
                    w[w.abs() < cut] = 0
                x, y = teacher_batch(10**6)
                losses.append((pruned(x) - y).square().mean().item())
        assert losses[1] < 0.7 * losses[0]

    @pytest.mark.parametrize("factor", [0.1, 10.0])
    def test_any_learning_rate(self, factor):
        _, _, target, loss = driven("adamw", lr=3e-3 * factor)
        assert target.last_tail < 1.5 * target.tail_energy
        assert math.isfinite(loss)

    def test_the_strength_given_does_not_matter(self):
        tails = []
        for strength in (1e-6, 1.0):
            net = student()
            optimizer = WCR(BASES["sgd"](param_groups(net, weight_concentration=strength)), form="scale_free")
            target = SparsityTarget(optimizer, 0.9, 150)
            fit(net, optimizer, target, 150)
            tails.append(target.last_tail)
        assert max(tails) < 1.5 * 3e-3

    def test_a_step_changes_the_strength_by_a_bounded_factor(self):
        _, _, target, _ = driven("sgd")
        strengths = [row[3] for row in target.history]
        ratios = [b / a for a, b in itertools.pairwise(strengths)]
        assert max(ratios) < 1.66
        assert min(ratios) > 1 / 1.66

    def test_a_warm_up_of_the_learning_rate_does_not_multiply_the_step(self):
        net = student()
        optimizer = WCR(BASES["sgd"](param_groups(net)), form="scale_free")
        target = SparsityTarget(optimizer, 0.9, 300)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1e-3, total_iters=60)
        lengths = []
        for step in range(60):
            fit(net, optimizer, target, 1, scheduler, first=step)
            lengths.append(optimizer.param_groups[0]["lr"] * target.strengths()[0])
        assert max(lengths[:10]) < 20 * lengths[0]

    def test_a_learning_rate_that_starts_at_zero(self):
        net = student()
        optimizer = WCR(BASES["sgd"](param_groups(net)), form="scale_free")
        target = SparsityTarget(optimizer, 0.9, 200)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / 20, 1))
        fit(net, optimizer, target, 200, scheduler)
        assert target.last_tail < 1.5 * target.tail_energy

    def test_goes_on_past_total_steps(self):
        net = student()
        optimizer = WCR(BASES["sgd"](param_groups(net)), form="scale_free")
        target = SparsityTarget(optimizer, 0.9, 120)
        fit(net, optimizer, target, 200)
        assert target.last_tail < 2 * target.tail_energy

    def test_a_goal_that_is_met_already_leaves_the_strength_at_its_floor(self):
        net = student()
        optimizer = WCR(BASES["sgd"](param_groups(net)), form="scale_free")
        target = SparsityTarget(optimizer, 0.5, 100, tail_energy=0.9)
        before = plain_tail(weights_of(optimizer), 0.5)
        fit(net, optimizer, target, 100)
        assert before < 0.9
        assert target.strengths()[0] == pytest.approx(target._loops[0].first_level * 0.1)

    def test_a_tail_of_zero_is_no_error(self):
        net = student()
        with torch.no_grad():
            for p in net.parameters():
                p[p.abs() < p.abs().flatten().quantile(0.97)] = 0
        optimizer = WCR(BASES["sgd"](param_groups(net), lr=0.0), form="scale_free")
        optimizer.param_groups[0]["lr"] = 1e-12
        target = SparsityTarget(optimizer, 0.9, 10)
        fit(net, optimizer, target, 10)
        assert target.last_tail < 1e-6

    def test_weights_that_overflow_for_a_moment_change_nothing(self):
        net = student()
        optimizer = WCR(BASES["sgd"](param_groups(net)), form="scale_free")
        target = SparsityTarget(optimizer, 0.9, 100, every=1)
        fit(net, optimizer, target, 5)
        before, weight = target.strengths(), net[0].weight.detach().clone()
        with torch.no_grad():
            net[0].weight[0, 0] = math.inf
        target.step()
        assert target.strengths() == before
        with torch.no_grad():
            net[0].weight.copy_(weight)
        fit(net, optimizer, target, 5)
        assert target.strengths() != before


class TestItDoesNotKill:
    @pytest.mark.parametrize("base", BASES)
    def test_l1(self, base):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # reaching the goal is not what is asked here
            net, optimizer, *_ = driven(base, L1Decay, sparsity=0.98)
        x, y = teacher_batch(10**6)
        assert (net(x) - y).square().mean().item() < 0.9 * y.square().mean().item()
        for w in weights_of(optimizer):
            assert w.square().sum() > 1e-3

    @pytest.mark.parametrize("base", BASES)
    def test_naive_l1_does(self, base):
        """What the test above is about: a strength that grows while the tail is above its goal takes every weight."""
        net = student()
        optimizer = L1Decay(BASES[base](param_groups(net)), 1e-4)
        for step in range(300):
            fit(net, optimizer, None, 1, first=step)
            if step % 3 == 2 and plain_tail(weights_of(optimizer), 0.98) > 3e-3:
                for group in optimizer.param_groups:
                    group["l1_decay"] *= 1.65
        x, y = teacher_batch(10**6)
        assert (net(x) - y).square().mean().item() > 0.95 * y.square().mean().item()

    def test_a_goal_out_of_reach_says_how_far_it_got_and_why(self):
        with pytest.warns(UserWarning, match=r"would still take .* wanted 0.003: .*") as caught:
            _, _, target, _ = driven("adamw", L1Decay, sparsity=0.98, steps=60, tail_energy=3e-3)
        assert any(f"{target.last_tail:.3g}" in str(w.message) for w in caught)

    def test_the_preprints_form_saturates_and_says_so(self):
        with (
            pytest.warns(UserWarning, match="mean magnitude"),
            pytest.warns(UserWarning, match="would still take"),
        ):
            _, _, target, loss = driven("sgd", WCR)
        assert math.isfinite(loss)
        assert target.last_tail > 10 * target.tail_energy

    def test_max_dense_cost_gives_up_the_tail_and_not_the_loss(self):
        """Fine-tuning: the network has learned, then concentrates as far as the allowed cost."""
        trained = student()
        optimizer = BASES["adamw"](param_groups(trained))
        fit(trained, optimizer, None, 400, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400))
        tails, losses = [], []
        for cost in (None, 0.05):
            net = copy.deepcopy(trained)
            optimizer = WCR(BASES["adamw"](param_groups(net), lr=1e-3), form="scale_free")
            target = SparsityTarget(optimizer, 0.98, 300, max_dense_cost=cost)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                fit(net, optimizer, target, 300, first=400)
            x, y = teacher_batch(10**6, size=1000)
            losses.append((net(x) - y).square().mean().item())
            tails.append(target.last_tail)
            if cost is not None:
                assert any("max_dense_cost" in str(warning.message) for warning in caught)
        assert tails[1] > tails[0]
        assert losses[1] < 0.8 * losses[0]

    def test_the_automatic_stop(self):
        """The loss is told to have lost all that was gained: the strength must fall whatever the tail says."""
        net = student()
        optimizer = WCR(BASES["sgd"](param_groups(net)), form="scale_free")
        target = SparsityTarget(optimizer, 0.98, 400, every=1)
        fit(net, optimizer, target, 20)
        for step in range(100):
            fit(net, optimizer, None, 1, first=step)
            target.step(2.0 - step / 100)
        high = target.strengths()[0]
        for step in range(30):
            fit(net, optimizer, None, 1, first=step)
            target.step(20.0)
        assert target.strengths()[0] < high / 100
        assert "training loss" in target._loops[0].obstacle


class TestResume:
    @pytest.mark.parametrize("base", BASES)
    @pytest.mark.parametrize("scope", ["global", "layer"])
    @pytest.mark.parametrize("cut", [1, 50])
    def test_bit_for_bit(self, base, scope, cut):
        def make():
            net = student()
            optimizer = WCR(BASES[base](param_groups(net)), form="scale_free")
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 90)
            target = SparsityTarget(optimizer, 0.9, 90, scope=scope, max_dense_cost=1.0)
            return net, optimizer, target, scheduler

        straight = make()
        first, second = make(), make()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            fit(*straight[:3], 90, straight[3])
            fit(*first[:3], cut, first[3])
            saved = through_file([part.state_dict() for part in first])
            for part, state in zip(second, saved, strict=True):
                part.load_state_dict(state)
            fit(*second[:3], 90 - cut, second[3], first=cut)
        assert_same(straight[0], second[0])
        assert repr(straight[2].state_dict()) == repr(second[2].state_dict())
        assert straight[1].param_groups[0]["weight_concentration"] == second[1].param_groups[0]["weight_concentration"]

    def test_the_order_of_loading_does_not_matter(self):
        _, optimizer, target, _ = driven("sgd", steps=50, tail_energy=0.3)
        states = optimizer.state_dict(), target.state_dict()
        fresh = WCR(BASES["sgd"](param_groups(student())), form="scale_free")
        other = SparsityTarget(fresh, 0.9, 50)
        other.load_state_dict(states[1])
        fresh.load_state_dict(states[0])
        assert other.strengths() == target.strengths()


class TestGroups:
    def test_ratios_between_groups_are_kept_and_zero_stays_zero(self):
        net = student()
        groups = [
            {"params": [net[0].weight], "weight_concentration": 1e-3},
            {"params": [net[2].weight], "weight_concentration": 5e-4},
            {"params": [net[4].weight, net[0].bias], "weight_concentration": 0.0},
        ]
        optimizer = WCR(BASES["sgd"](groups), form="scale_free")
        target = SparsityTarget(optimizer, 0.9, 100, tail_energy=0.1)
        fit(net, optimizer, target, 100)
        a, b, c = target.strengths()
        assert b == pytest.approx(a / 2)
        assert c == 0.0
        assert target.last_tail == pytest.approx(plain_tail([net[0].weight, net[2].weight], 0.9), rel=0.02)

    def test_layer_scope_gives_each_group_its_own_strength(self):
        net = student()
        groups = [{"params": [net[0].weight]}, {"params": [net[2].weight]}]
        optimizer = WCR(BASES["sgd"](groups), form="scale_free")
        target = SparsityTarget(optimizer, 0.9, 300, scope="layer")
        fit(net, optimizer, target, 300, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300))
        assert target.strengths()[0] != target.strengths()[1]
        for layer in (net[0], net[2]):
            assert plain_tail([layer.weight], 0.9) < 1.5 * target.tail_energy

    def test_parameters_added_later_are_driven_too(self):
        net, extra = student(), nn.Linear(1, 64, bias=False)
        optimizer = WCR(BASES["sgd"](param_groups(net)), form="scale_free")
        target = SparsityTarget(optimizer, 0.9, 300)
        fit(net, optimizer, target, 60)
        optimizer.add_param_group({"params": extra.parameters()})
        fit(net, optimizer, target, 5, first=60)
        assert target.strengths()[-1] == target.strengths()[0]
        fit(net, optimizer, target, 235, first=65)
        assert target.last_tail == pytest.approx(plain_tail([*weights_of(optimizer), extra.weight], 0.9), rel=0.02)

    def test_frozen_weights_and_biases_are_not_measured(self):
        net = student()
        net[2].weight.requires_grad_(False)
        optimizer = WCR(BASES["sgd"]([{"params": net.parameters()}]), form="scale_free")
        target = SparsityTarget(optimizer, 0.9, 100, every=1)
        fit(net, optimizer, target, 1)
        assert target.last_tail == pytest.approx(plain_tail([net[0].weight, net[4].weight], 0.9), rel=0.02)

    def test_a_strength_that_is_a_tensor_is_written_in_place(self):
        strength = torch.tensor(1e-3)
        net = student()
        optimizer = WCR(BASES["sgd"]([{"params": net.parameters()}]), strength, form="scale_free")
        target = SparsityTarget(optimizer, 0.9, 100, every=1)
        fit(net, optimizer, target, 3)
        assert optimizer.param_groups[0]["weight_concentration"] is strength
        assert strength.item() == pytest.approx(target._loops[0].level)

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda base: WCR(SAM(base), form="scale_free"),
            lambda base: SAM(WCR(base, form="scale_free")),
            lambda base: L2Decay(WCR(base, form="scale_free"), 1e-3),
            lambda base: HoyerDecay(base),
            lambda base: Decoupled(base, ScaleFree(), 1e-3),
        ],
    )
    def test_any_place_in_the_chain(self, wrap):
        net = student()
        optimizer = wrap(BASES["sgd"]([{"params": net.parameters()}]))
        target = SparsityTarget(optimizer, 0.9, 100, every=1)
        first = None
        for step in range(20):
            x, y = teacher_batch(step)

            def closure(x=x, y=y):
                optimizer.zero_grad()
                loss = (net(x) - y).square().mean()
                loss.backward()
                return loss

            target.step(optimizer.step(closure))
            first = first or target.strengths()[0]
        assert target.strengths()[0] > first


class TestRefusals:
    def optimizer(self):
        return WCR(BASES["sgd"](student().parameters()), form="scale_free")

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
            ({"total_steps": None}, "epochs \\* batches"),
            ({"total_steps": 0}, "total_steps must be"),
            ({"total_steps": 10.5}, "10.5"),
        ],
    )
    def test_bad_values(self, options, message):
        with pytest.raises(ValueError, match=message):
            SparsityTarget(self.optimizer(), **({"total_steps": 100} | options))

    @pytest.mark.parametrize("wrap", [lambda base: base, L2Decay])
    def test_nothing_to_drive_names_the_way_out(self, wrap):
        with pytest.raises(ValueError, match='form="scale_free"'):
            SparsityTarget(wrap(BASES["sgd"](student().parameters())), total_steps=100)

    def test_no_optimizer(self):
        with pytest.raises(TypeError, match="optimizer instance"):
            SparsityTarget(student(), total_steps=100)

    def test_every_strength_zero(self):
        optimizer = WCR(BASES["sgd"](student().parameters()), 0.0, form="scale_free")
        with pytest.raises(ValueError, match="is 0 in every group"):
            SparsityTarget(optimizer, total_steps=100)

    def test_max_dense_cost_needs_the_loss(self):
        target = SparsityTarget(self.optimizer(), total_steps=100, max_dense_cost=0.1)
        with pytest.raises(ValueError, match=r"call step\(loss\)"):
            target.step()
        assert target.steps == 0

    def test_a_loss_of_several_numbers(self):
        target = SparsityTarget(self.optimizer(), total_steps=100)
        with pytest.raises(ValueError, match="one number"):
            target.step(torch.ones(3))
        assert target.steps == 0

    def test_a_refused_target_leaves_the_groups_as_they_were(self):
        optimizer = self.optimizer()
        before = copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
        with pytest.raises(ValueError, match="sparsity"):
            SparsityTarget(optimizer, 2.0, 100)
        assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == before


class TestLossTrend:
    def test_noise_is_no_cost_and_a_rise_is(self):
        trend = LossTrend()
        generator = torch.Generator().manual_seed(0)
        costs = [trend.update(1.0 + 0.05 * torch.randn((), generator=generator).item()) for _ in range(200)]
        assert max(costs) < 0.05
        for _ in range(30):
            cost = trend.update(1.5)
        assert 0.3 < cost < 0.6

    def test_windows_average_and_stay_on_their_device(self):
        trend = LossTrend()
        for loss in (1.0, torch.tensor(2.0), torch.tensor([[6.0]], requires_grad=True)):
            trend.add(loss)
        assert trend.window(torch.device("cpu"), torch.float64).item() == 3.0
        assert math.isnan(trend.window(torch.device("cpu"), torch.float64).item())


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
    target = SparsityTarget(WCR(BASES["sgd"](student().parameters()), form="scale_free"), total_steps=10)
    with pytest.raises(ValueError, match="nothing was measured"):
        target.plot()
