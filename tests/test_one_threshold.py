"""Units whose size a normalization layer hides get one threshold, and each keeps its energy."""

import copy
import itertools
import math
import warnings

import pytest
import torch
from normed_network import energies, gradients, layers_of, normed, shrunk, train
from target_reference import plain_tail
from torch import nn

from wcr_optim import SAM, WCR, SparsityTarget, compiled, param_groups
from wcr_optim.decoupled import Decoupled
from wcr_optim.invariance import invariant_units, one_threshold
from wcr_optim.moments import Moments
from wcr_optim.penalties import PerUnit
from wcr_optim.units import shrink_keeping_energy_, unit_moments

needs_compiler = pytest.mark.skipif(compiled.why_not() is not None, reason=str(compiled.why_not()))


def slow_threshold(thresholds, lengths, sizes, m):
    """The geometric mean, weight by weight, as the docstring has it."""
    ratios = [t / s for t, s, n in zip(thresholds, lengths, sizes, strict=True) for _ in range(n) if t > 0]
    mean = torch.tensor(ratios, dtype=torch.float64).log().mean().exp()
    return [
        min(float(s * mean), float(top)) if t > 0 else 0.0 for t, s, top in zip(thresholds, lengths, m, strict=True)
    ]


def slow_step(w, threshold, cutoff=math.inf):
    """Shrink one row, sparing what is large, and give it its energy back."""
    x = torch.where(w.abs() < cutoff, w.sign() * (w.abs() - threshold).clamp(min=0), w)
    return x * min((w.square().sum() / x.square().sum()).sqrt().item(), 1.1)


class TestWhoIsMeant:
    def test_layers_before_batchnorm_as_a_whole_and_no_others(self):
        for seed in range(5):
            net = normed(seed)
            gradients(net, seed)
            layers = layers_of(net)
            assert invariant_units(layers, unit_moments(layers)).layers.tolist() == [True, True, False]

    @pytest.mark.parametrize("rows", [1, 2, 7, 8])
    def test_few_rows_are_no_proof(self, rows):
        w = nn.Parameter(torch.tensor([[1.0, 0.0]]).repeat(rows, 1))
        w.grad = torch.tensor([[0.0, 1.0]]).repeat(rows, 1)
        assert invariant_units([w], unit_moments([w])).layers.tolist() == [rows >= 8]

    def test_no_layer_without_gradients_or_elements(self):
        layers = [nn.Parameter(torch.zeros(s)) for s in ((0, 4), (3, 0), (2, 2))] + [nn.Parameter(torch.randn(4, 3))]
        for w in layers[:3]:
            w.grad = torch.ones_like(w)
        assert invariant_units(layers, unit_moments(layers)).layers.tolist() == [False] * 4


class TestThreshold:
    def test_is_the_geometric_mean_over_all_weights(self):
        generator = torch.Generator().manual_seed(0)
        layers = [torch.randn(s, generator=generator, dtype=torch.float64) for s in ((5, 7), (4, 2, 3), (3, 1))]
        layers[1][2] = 0
        units = unit_moments(layers)
        lengths = torch.tensor([1e-3] * 5 + [2e-3] * 4 + [1e-3] * 3, dtype=torch.float64)
        _, own = PerUnit().flow(units, lengths)
        assert (own > 0).tolist() == [True] * 5 + [True, True, False, True] + [False] * 3  # rows of one have no spread
        found = one_threshold(layers, units, own, lengths)
        expected = slow_threshold(own, lengths, [7] * 5 + [6] * 4 + [1] * 3, 0.5 * units.q / units.mu)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
        assert found[5] == pytest.approx(2 * found[0].item(), rel=1e-12)  # what groups are given stays a ratio

    def test_is_bounded_where_a_unit_is_small(self):
        w = torch.randn(6, 50, dtype=torch.float64)
        w[0] *= 1e-6
        units = unit_moments([w])
        lengths = torch.full((6,), 1e-1, dtype=torch.float64)
        _, own = PerUnit().flow(units, lengths)
        found = one_threshold([w], units, own, lengths)
        assert found[0] == 0.5 * units.q[0] / units.mu[0] < found[1]

    def test_stays_zero_where_there_is_nothing_to_drive(self):
        w = torch.stack([torch.zeros(4), torch.ones(4), torch.full((4,), torch.nan), torch.full((4,), torch.inf)])
        units = unit_moments([w])
        lengths = torch.ones(4, dtype=torch.float64)
        _, own = PerUnit().flow(units, lengths)
        assert not one_threshold([w], units, own, lengths).any()


class TestShrink:
    @pytest.mark.parametrize("backend", ["eager", pytest.param("compiled", marks=needs_compiler)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("cutoff", [math.inf, 1.0, 0.3, 0.0])
    def test_is_the_obvious_one_row_by_row(self, dtype, cutoff, backend):
        torch.manual_seed(0)
        layers = [
            torch.randn(6, 40, dtype=dtype),
            torch.randn(5, 3, 3, 3, dtype=dtype).to(memory_format=torch.channels_last),
        ]
        layers[0][:, ::5] = 1.0  # at a cutoff
        before = [w.clone() for w in layers]
        units = unit_moments(layers)
        threshold, lift = (
            torch.linspace(0, 0.8, 11, dtype=torch.float64),
            torch.linspace(1, 1.1, 11, dtype=torch.float64),
        )
        shrink_keeping_energy_(layers, units, threshold, lift, cutoff=cutoff, backend=backend)
        rows = [row for w in before for row in w]
        for row, now, t, factor in zip(rows, [r for w in layers for r in w], threshold, lift, strict=True):
            torch.testing.assert_close(now, slow_step(row, t.item(), cutoff) * factor.item())

    @pytest.mark.parametrize("backend", ["eager", pytest.param("compiled", marks=needs_compiler)])
    def test_nothing_above_the_cutoff_shrinks_and_what_is_not_finite_stays(self, backend):
        w = torch.randn(3, 40)
        w[1, 3], w[2, 5] = torch.nan, torch.inf
        before, thresholds = w.clone(), torch.full((3,), 0.2, dtype=torch.float64)
        shrink_keeping_energy_(
            [w], unit_moments([w]), thresholds, torch.ones_like(thresholds), cutoff=0.5, backend=backend
        )
        large, small = before[0].abs() >= 0.5, before[0].abs() < 0.2
        assert (w[0][large].abs() >= before[0][large].abs()).all()
        assert not w[0][small].any()
        assert w[1, 3].isnan()
        assert w[2, 5] == torch.inf

    @pytest.mark.parametrize("backend", ["eager", pytest.param("compiled", marks=needs_compiler)])
    @pytest.mark.parametrize("cutoff", [math.inf, 0.5])
    def test_a_threshold_of_nan_does_not_pass_for_one_that_takes_all(self, cutoff, backend):
        w = torch.randn(2, 40)
        thresholds = torch.tensor([0.1, torch.nan], dtype=torch.float64)
        shrink_keeping_energy_(
            [w], unit_moments([w]), thresholds, torch.ones_like(thresholds), cutoff=cutoff, backend=backend
        )
        assert w[0].isfinite().all()
        assert w[1].isnan().all()

    def test_leaves_alone_what_has_no_threshold(self):
        w = torch.stack([torch.zeros(4), torch.ones(4), torch.full((4,), torch.nan), torch.full((4,), torch.inf)])
        before = w.clone()
        zeros = torch.zeros(4, dtype=torch.float64)
        shrink_keeping_energy_([w], unit_moments([w]), zeros, zeros + 1)
        assert torch.equal(w.nan_to_num(7.0), before.nan_to_num(7.0))

    @pytest.mark.parametrize("backend", ["eager", pytest.param("compiled", marks=needs_compiler)])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_leaves_alone_to_the_bit_what_has_no_threshold(self, dtype, backend):
        w = torch.randn(600, 37, dtype=dtype)
        before, zeros = w.clone(), torch.zeros(600, dtype=torch.float64)
        shrink_keeping_energy_([w], unit_moments([w]), zeros, zeros + 1, backend=backend)
        assert torch.equal(w, before)

    @pytest.mark.parametrize("backend", ["eager", pytest.param("compiled", marks=needs_compiler)])
    @pytest.mark.parametrize("cutoff", [math.inf, 0.5])
    def test_narrow_weights_keep_their_energy_through_many_steps(self, cutoff, backend):
        torch.manual_seed(0)
        w = torch.randn(8, 2000).to(torch.bfloat16)
        start = energies(w)
        for step in range(300):
            units = unit_moments([w])
            threshold = torch.full((8,), 1e-4, dtype=torch.float64)
            shrink_keeping_energy_(
                [w], units, threshold, torch.ones_like(threshold), cutoff=cutoff, seed=step, backend=backend
            )
        assert ((energies(w) / start) - 1).abs().max() < 0.02
        assert (w == 0).float().mean() > 0.01


class TestStep:
    @pytest.mark.parametrize("lift", [False, True])
    def test_alike_layers_take_one_threshold_and_others_their_own(self, lift):
        net = shrunk(normed().double())
        gradients(net, 0)
        twin = copy.deepcopy(net)
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            q.grad = p.grad.clone()
        optimizers = []
        for model in (net, twin):
            groups = param_groups(model, weight_decay=0.0, weight_concentration=0.5)
            optimizers.append(WCR(torch.optim.SGD(groups, lr=1e-2), form="per_unit"))
            optimizers[-1].lift_units = lift
        optimizers[0].scale_invariant = [(0, 0), (0, 1)]
        before = [w.detach().clone() for w in layers_of(net)]
        units = unit_moments(before)
        lengths = torch.full((31,), 5e-3, dtype=torch.float64)
        _, own = PerUnit().flow(units, lengths)
        pair = Moments(*(x[:28] for x in units))
        common = one_threshold(before[:2], pair, own[:28], lengths[:28])
        assert common.unique().numel() < own[:28].unique().numel()
        factor = invariant_units(layers_of(net), units).lifts if lift else torch.ones(31)
        for optimizer in optimizers:
            optimizer.step()
        for w, b, t, f in zip(
            layers_of(net)[:2], before[:2], common.split([12, 16]), factor[:28].split([12, 16]), strict=True
        ):
            expected = torch.stack([slow_step(r, x.item()) * y.item() for r, x, y in zip(b, t, f, strict=True)])
            torch.testing.assert_close(w.detach(), expected - 1e-2 * w.grad)
        assert torch.equal(net[7].weight, twin[7].weight)
        assert not torch.equal(net[3].weight, twin[3].weight)

    def test_a_compiled_step_gives_every_unit_its_own(self):
        torch._dynamo.reset()  # steps compiled in other tests count towards one limit, beyond which nothing is compiled
        nets = [normed(), normed()]
        for net, alike in zip(nets, ([(0, 0), (0, 1)], []), strict=True):
            optimizer = WCR(torch.optim.SGD(param_groups(net, weight_concentration=0.5), lr=1e-2), form="per_unit")
            optimizer.scale_invariant = alike
            gradients(net, 0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                torch.compile(optimizer.step, backend="eager")()
        for a, b in zip(*(net.parameters() for net in nets), strict=True):
            assert torch.equal(a, b)

    def test_narrow_layers_draw_by_the_step(self):
        finals = []
        for _ in range(2):
            net = normed().to(torch.bfloat16)
            optimizer = WCR(torch.optim.SGD(param_groups(net), lr=1e-2), 1e-3, form="per_unit")
            optimizer.scale_invariant = [(0, 0), (0, 1)]
            train(net, optimizer, 5)
            finals.append([p.detach() for p in net.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*finals, strict=True))


def driven(net):
    optimizer = WCR(torch.optim.AdamW(param_groups(net), lr=1e-3), form="per_unit")
    return optimizer, SparsityTarget(optimizer, 0.5, 100, every=5)


class TestInATarget:
    def run(self, make, steps=12, form="per_unit", **options):
        net = normed()
        optimizer = WCR(make(param_groups(net)), form=form)
        target = SparsityTarget(optimizer, 0.5, 100, every=5, **options)
        seen = []
        for step in range(steps):
            train(net, optimizer, 1, target, first=step)
            seen.append(sorted(optimizer.scale_invariant))
        assert (optimizer.cutoff < math.inf) == target._one_threshold
        return seen

    @pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.SGD])
    def test_layers_are_alike_from_the_measurement_after_they_were_seen(self, base):
        seen = self.run(lambda groups: base(groups, lr=1e-3))
        assert seen == [[]] * 9 + [[(0, 0), (0, 1)]] * 3

    @pytest.mark.parametrize(
        ("make", "options"),
        [
            (lambda groups: torch.optim.AdamW(groups, lr=1e-3), {"scope": "layer"}),
            (lambda groups: torch.optim.AdamW(groups, lr=1e-3), {"form": "scale_free"}),
        ],
        ids=["layer", "scale_free"],
    )
    def test_not_with_goals_of_their_own_nor_in_other_forms(self, make, options):
        assert self.run(make, **options) == [[]] * 12

    def test_the_threshold_spares_what_pruning_will_keep(self):
        net = normed()
        optimizer, target = driven(net)
        assert optimizer.cutoff == math.inf
        train(net, optimizer, 9, target)
        train(net, optimizer, 1, target, first=9)  # the last of these steps measures
        magnitudes = torch.cat([w.detach().abs().flatten() for w in layers_of(net)])
        assert optimizer.cutoff == pytest.approx(2 * magnitudes.quantile(0.5).item(), rel=1e-2)
        before = [w.detach().clone() for w in layers_of(net)]
        gradients(net, 10)
        for group in optimizer.param_groups:
            group["lr"] = 1e-30  # the penalty alone, by way of its strength
        optimizer.param_groups[0]["weight_concentration"] *= 1e27
        optimizer.step()
        for w, then in list(zip(layers_of(net), before, strict=True))[:2]:
            spared = then.abs() >= optimizer.cutoff
            assert (w[spared].abs() >= then[spared].abs()).all()
            assert (w[~spared].abs() < then[~spared].abs()).all()

    def test_the_cutoff_is_part_of_the_state_and_forgotten_by_another_target(self):
        net = normed()
        optimizer, target = driven(net)
        train(net, optimizer, 7, target)
        cutoff, state = optimizer.cutoff, target.state_dict()
        resumed = SparsityTarget(optimizer, 0.5, 100, every=5)
        assert optimizer.cutoff == math.inf
        resumed.load_state_dict(state)
        assert optimizer.cutoff == cutoff < math.inf

    def test_a_target_without_it_takes_none_from_a_state(self):
        net = normed()
        optimizer, target = driven(net)
        train(net, optimizer, 12, target)
        state = target.state_dict()
        layerwise = WCR(torch.optim.AdamW(param_groups(net), lr=1e-3), form="scale_free")
        SparsityTarget(layerwise, 0.5, 100, every=5).load_state_dict(state)
        assert not layerwise.scale_invariant
        assert layerwise.cutoff == math.inf

    def test_weights_that_are_not_finite_leave_the_cutoff_as_it_was(self):
        net = normed()
        optimizer = WCR(torch.optim.AdamW(param_groups(net), lr=1e-3), form="per_unit")
        target = SparsityTarget(optimizer, 0.5, 100, every=1)
        train(net, optimizer, 2, target)
        cutoff = optimizer.cutoff
        with torch.no_grad():
            layers_of(net)[0][0, 0] = torch.inf
        target.step(1.0)
        assert optimizer.cutoff == cutoff

    def test_a_norm_that_is_frozen_is_noticed(self):
        net = normed()
        optimizer, target = driven(net)
        train(net, optimizer, 10, target)
        net[1].eval()
        train(net, optimizer, 5, target, first=10)
        assert optimizer.scale_invariant == [(0, 1)]

    def test_what_another_target_said_is_forgotten(self):
        net = normed()
        optimizer = WCR(torch.optim.AdamW(param_groups(net), lr=1e-3), form="per_unit")
        train(net, optimizer, 12, SparsityTarget(optimizer, 0.5, 100, every=5))
        assert optimizer.scale_invariant
        SparsityTarget(optimizer, 0.5, 100, scope="layer")
        assert not optimizer.scale_invariant

    def test_only_the_last_look_is_kept(self):
        net = normed()
        optimizer = WCR(torch.optim.AdamW(param_groups(net), lr=1e-3), form="per_unit")
        for step in range(3):
            optimizer.lift_units = True
            train(net, optimizer, 1, first=step)
        ((places, hidden),) = optimizer.seen_invariant
        assert places == [(0, 0), (0, 1), (0, 2)]
        assert hidden.tolist() == [True, True, False]

    def test_of_several_wrappers_the_driven_one_knows(self):
        net = normed()
        optimizer = WCR(SAM(torch.optim.AdamW(param_groups(net), lr=1e-3)), form="per_unit")
        target = SparsityTarget(optimizer, 0.5, 100, every=5)
        train(net, optimizer, 12, target, closure=True)  # its gradients belong to other weights
        assert isinstance(optimizer, Decoupled)
        assert (0, 2) not in optimizer.scale_invariant

    def test_a_state_from_before_there_was_this_goes_on(self):
        net = normed()
        optimizer, target = driven(net)
        train(net, optimizer, 7, target)
        state = target.state_dict()
        assert [place[:2] for place in state["seen_invariant"]] == [[0, 0], [0, 1], [0, 2]]
        for key in ("scale_invariant", "seen_invariant", "cutoff"):
            del state[key]
        target.load_state_dict(state)
        train(net, optimizer, 8, target, first=7)
        assert sorted(optimizer.scale_invariant) == [(0, 0), (0, 1)]


class TestTheTailFallsOn:
    """Around Adam, where most weights are in layers whose kept weights are spared, and nobody said how deep it goes."""

    def at(self, share, places, base=torch.optim.AdamW, **options):
        """Return the wanted tail after a share of a run that began with one of 0.5."""
        optimizer = WCR(base(param_groups(normed()), lr=1e-3), form="per_unit")
        target = SparsityTarget(optimizer, 0.5, 1000, **options)
        target._find_loops()
        optimizer.scale_invariant, target.steps = places, round(1000 * share)
        return target.path(0.5)

    @pytest.mark.parametrize(
        ("places", "options", "goal"),
        [
            ([(0, 0), (0, 1)], {}, 1e-4),
            ([(0, 1)], {}, 1e-4),  # two thirds of the weights
            ([(0, 0)], {}, 3e-3),  # a twentieth
            ([], {}, 3e-3),
            ([(0, 0), (0, 1)], {"tail_energy": 3e-3}, 3e-3),
            ([(0, 0), (0, 1)], {"tail_energy": 1e-5}, 1e-5),
            ([(0, 0), (0, 1)], {"end": 0.95}, 3e-3),
        ],
    )
    def test_to_where(self, places, options, goal):
        end, by_then = options.get("end", 0.4), options.get("tail_energy", 3e-3)
        assert self.at(end / 2, places, **options) == pytest.approx(math.sqrt(0.5 * by_then))
        assert self.at(end, places, **options) == pytest.approx(by_then)
        if end < 0.9:
            assert self.at((end + 0.9) / 2, places, **options) == pytest.approx(math.sqrt(by_then * goal))
        assert self.at(1.0, places, **options) == pytest.approx(goal)
        assert self.at(1.5, places, **options) == pytest.approx(goal)  # held for as long as training goes on

    def test_not_around_sgd(self):
        for share in (0.4, 0.65, 1.0):
            assert self.at(share, [(0, 0), (0, 1)], torch.optim.SGD) == pytest.approx(1e-3)

    @pytest.mark.parametrize("tail_energy", [None, 3e-3])
    def test_in_training(self, tail_energy):
        net = normed()
        optimizer = WCR(torch.optim.AdamW(param_groups(net), lr=1e-2), form="per_unit")
        train(net, optimizer, 300, SparsityTarget(optimizer, 0.8, 300, tail_energy))
        tail = plain_tail(layers_of(net), 0.8)
        assert tail < 1.5e-4 if tail_energy is None else 1e-3 < tail < 4.5e-3

    @pytest.mark.parametrize("cut", [150, 151])  # after a measurement, and between two of them
    def test_resumed_on_its_way_bit_for_bit(self, cut):
        def begun():
            net = normed()
            optimizer = WCR(torch.optim.AdamW(param_groups(net), lr=1e-2), form="per_unit")
            return net, optimizer, SparsityTarget(optimizer, 0.8, 200)

        net, optimizer, target = begun()
        train(net, optimizer, cut, target)
        states = [copy.deepcopy(x.state_dict()) for x in (net, optimizer, target)]
        resumed = begun()
        for x, state in zip(resumed, states, strict=True):
            x.load_state_dict(state)
        assert resumed[2].path(0.5) == target.path(0.5) < 1e-3
        for x in ((net, optimizer, target), resumed):
            train(*x[:2], 200 - cut, x[2], first=cut)
        assert target.last_tail == resumed[2].last_tail < 3e-4
        assert all(map(torch.equal, layers_of(net), layers_of(resumed[0])))

    def test_it_does_not_climb_back_where_layers_are_taken_for_followed_at_one_measurement_and_not_at_the_next(self):
        def begun():
            torch.manual_seed(1)
            net = nn.Sequential(
                nn.Conv2d(1, 8, 3, bias=False),
                nn.BatchNorm2d(8),
                nn.ReLU(),
                nn.Conv2d(8, 16, 3, bias=False),
                nn.BatchNorm2d(16),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(2),
                nn.Flatten(),
                nn.Linear(64, 5),
            )
            optimizer = WCR(SAM(torch.optim.AdamW(param_groups(net), lr=3e-3), model=net), form="per_unit")
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
            return net, optimizer, schedule, SparsityTarget(optimizer, 0.9, 300)

        def go_on(run, steps):
            net, optimizer, schedule, target = run
            taken = []
            for step in steps:
                chosen = torch.randint(0, 512, (32,), generator=torch.Generator().manual_seed(1000 + step))

                def closure(chosen=chosen):
                    optimizer.zero_grad()
                    loss = nn.functional.cross_entropy(net(images[chosen]), labels[chosen])
                    loss.backward()
                    return loss

                target.step(optimizer.step(closure))
                schedule.step()
                taken.append(len(optimizer.scale_invariant))
            return taken

        generator = torch.Generator().manual_seed(1)
        images = torch.randn(512, 1, 8, 8, generator=generator)
        labels = (images.flatten(1) @ torch.randn(64, 5, generator=generator)).argmax(1)
        run = begun()
        taken = go_on(run, range(157))  # past one that falls on and one that would not
        states = [copy.deepcopy(x.state_dict()) for x in run]
        taken += go_on(run, range(157, 300))
        assert len(set(taken[150:])) > 1
        wanted = [row[2] for row in run[-1].history]
        assert all(after <= before for before, after in itertools.pairwise(wanted))
        assert wanted[-1] < 3e-4
        resumed = begun()
        for x, state in zip(resumed, states, strict=True):
            x.load_state_dict(state)
        go_on(resumed, range(157, 300))
        assert [row[2] for row in resumed[-1].history] == wanted
        assert all(map(torch.equal, layers_of(run[0]), layers_of(resumed[0])))

    def test_the_plots_goal_is_the_one_at_the_end_of_its_path(self):
        labels = []
        for tail_energy in (None, 3e-3):
            net = normed()
            optimizer = WCR(torch.optim.AdamW(param_groups(net), lr=1e-2), form="per_unit")
            target = SparsityTarget(optimizer, 0.8, 100, tail_energy)
            train(net, optimizer, 100, target)
            labels += [line.get_label() for line in target.plot().axes[0].lines if "goal" in line.get_label()]
        assert labels == ["goal 0.0001", "goal 0.003"]
