"""Units whose size a normalization layer hides: they are known by their gradients, and do not fall far behind."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from normed_network import energies, gradients, images, matrices, normed, shrunk, train
from torch import nn

from wcr_optim import SSAM, WCR, AdamW, SparsityTarget, param_groups
from wcr_optim.invariance import LEAST_ENERGY, MOST_LIFT, invariant_units
from wcr_optim.units import unit_moments


def lifted(net, seed=0):
    """Name the weights of which rows would be lifted, with how many."""
    gradients(net, seed)
    layers = matrices(net)
    factors = invariant_units(list(layers.values()), unit_moments(list(layers.values()))).lifts
    counts = [int((part > 1).sum()) for part in torch.split(factors, [len(w) for w in layers.values()])]
    return {name: count for name, count in zip(layers, counts, strict=True) if count}


class TestWhoIsMeant:
    def test_small_units_before_batchnorm_and_nobody_else(self):
        assert lifted(normed()) == {}
        assert lifted(shrunk(normed())) == {"0.weight": 6, "3.weight": 8}

    def test_a_step_within_autocast_sees_the_same(self):
        """The square of a small gradient is zero in half precision."""
        net = shrunk(normed())
        gradients(net, 0)
        layers = list(matrices(net).values())
        for p in layers:
            p.grad *= 1e-5
        with torch.autocast("cpu", torch.float16):
            factors = torch.split(invariant_units(layers, unit_moments(layers)).lifts, [12, 16, 3])
        assert [int((part > 1).sum()) for part in factors] == [6, 8, 0]

    def test_nobody_in_a_network_without_normalization(self):
        for seed in range(20):
            torch.manual_seed(seed)
            assert (
                lifted(shrunk(nn.Sequential(nn.Flatten(), nn.Linear(36, 20), nn.ReLU(), nn.Linear(20, 3))), seed) == {}
            )

    def test_a_norm_over_several_units_hides_none_of_them(self):
        for seed in range(10):
            torch.manual_seed(seed)
            groups = nn.Sequential(nn.Conv2d(1, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3))
            assert lifted(shrunk(groups), seed) == {}
            layer = nn.Sequential(nn.Flatten(), nn.Linear(36, 20), nn.LayerNorm(20), nn.Linear(20, 3))
            assert lifted(shrunk(layer), seed) == {}

    def test_statistics_that_stand_still_hide_nothing(self):
        net = shrunk(normed())
        net[1].eval()
        assert lifted(net) == {"3.weight": 8}

    def test_nor_does_a_norm_that_sees_part_of_the_units(self):
        class Part(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.norm, self.last = nn.Linear(36, 40), nn.BatchNorm1d(32), nn.Linear(40, 3)

            def forward(self, x):
                z = self.first(x.flatten(1))
                return self.last(torch.cat([self.norm(z[:, :32]), z[:, 32:]], 1))

        for seed in range(10):
            torch.manual_seed(seed)
            assert lifted(shrunk(Part()), seed) == {}

    def test_units_that_the_norms_eps_holds_down_stay_there(self):
        """They add almost nothing to the layer's sums: only their own row tells."""
        net = normed().double()
        with torch.no_grad():
            net[3].weight[:4] *= 1e-4
        assert lifted(net) == {}

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_in_other_precisions_and_memory_formats(self, dtype):
        net = shrunk(normed()).to(memory_format=torch.channels_last)
        gradients(net, 0)
        layers = []
        for p in matrices(net).values():
            layers.append(nn.Parameter(p.detach().to(dtype)))
            layers[-1].grad = p.grad.to(dtype)
        factors = torch.split(invariant_units(layers, unit_moments(layers)).lifts, [12, 16, 3])
        assert [int((part > 1).sum()) for part in factors] == [6, 8, 0]

    @pytest.mark.parametrize("kind", ["none", "zero", "nan", "inf", "sparse"])
    def test_gradients_that_tell_nothing_lift_nothing(self, kind):
        w = nn.Parameter(torch.randn(5, 3))
        grads = {
            "none": None,
            "zero": torch.zeros_like(w),
            "nan": torch.full_like(w, torch.nan),
            "inf": torch.full_like(w, torch.inf),
            "sparse": torch.ones(5, 3).to_sparse(),
        }
        w.grad = grads[kind]
        assert (invariant_units([w], unit_moments([w])).lifts == 1).all()

    def test_weights_without_elements_or_of_zeros_or_nan(self):
        layers = [nn.Parameter(torch.zeros(s)) for s in ((0, 4), (3, 0), (2, 2), (4, 3), (1, 3))]
        with torch.no_grad():
            layers[3][0] = torch.nan
        for w in layers:
            w.grad = torch.ones_like(w)
        assert (invariant_units(layers, unit_moments(layers)).lifts == 1).all()


def test_factors_are_those_of_the_formula_row_by_row():
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(9, 4, 3, generator=generator, dtype=torch.float64) * torch.logspace(-1, 0.5, 9).view(-1, 1, 1)
    g = torch.randn(9, 4, 3, generator=generator, dtype=torch.float64)
    along = (w * g).sum((1, 2), keepdim=True) / w.square().sum((1, 2), keepdim=True)
    p = nn.Parameter(w)
    p.grad = g - along * w
    p.grad[1] = g[1]  # which no norm follows
    for row in range(9):
        least = (LEAST_ENERGY * energies(w).mean() / energies(w)[row]).sqrt().item()
        expected = 1.0 if row == 1 else min(max(least, 1.0), MOST_LIFT)
        assert invariant_units([p], unit_moments([p])).lifts[row].item() == pytest.approx(expected, rel=1e-12)
    assert invariant_units([p], unit_moments([p])).lifts.max() == MOST_LIFT
    p.grad = g
    assert (invariant_units([p], unit_moments([p])).lifts == 1).all()


def adam(net, form="per_unit", lr=1e-4):
    return WCR(torch.optim.AdamW(param_groups(net), lr=lr), form=form)


class TestInATarget:
    @pytest.mark.parametrize("make", ["wrapped", "fused"])
    def test_units_that_fell_behind_come_back_where_that_changes_nothing(self, make):
        net = shrunk(normed())
        start = energies(net[7].weight)[0]
        drop_in = lambda: AdamW(param_groups(net), lr=1e-4, form="per_unit", fused=True)  # noqa: E731
        optimizer = adam(net) if make == "wrapped" else drop_in()
        train(net, optimizer, 20, SparsityTarget(optimizer, 0.5, 100, lr_exponent=0))
        for layer in (0, 3):
            share = energies(net[layer].weight) / energies(net[layer].weight).mean()
            assert share.min() > 0.9 * LEAST_ENERGY
        assert energies(net[7].weight)[0] < 2 * start

    def test_little_by_little_after_each_measurement(self):
        net = shrunk(normed())
        optimizer = adam(net, lr=1e-6)
        target = SparsityTarget(optimizer, 0.5, 100, every=5, lr_exponent=0)
        grown = []
        for step in range(12):
            before = energies(net[3].weight)[0]
            train(net, optimizer, 1, target, first=step)
            grown.append((energies(net[3].weight)[0] / before).sqrt().item())
        assert [round(g, 2) for g in grown] == [1.0] * 5 + [1.1] + [1.0] * 4 + [1.1] + [1.0]

    def test_a_step_of_length_0_such_as_a_checkpoint_loaders_probe_forgets_nothing(self):
        net = shrunk(normed())
        optimizer = adam(net)
        optimizer.lift_units, optimizer.seen_invariant = True, [([(0, 0)], torch.tensor([True]))]
        optimizer.param_groups[0]["lr"] = 0.0
        train(net, optimizer, 1)
        assert optimizer.lift_units
        assert [places for places, _ in optimizer.seen_invariant] == [[(0, 0)]]

    def test_what_the_network_computes_stays(self):
        """The step that lifts and the same step without: their networks agree, but for eps."""
        nets = [shrunk(normed()).double() for _ in range(2)]
        for net, lift in zip(nets, (True, False), strict=True):
            optimizer = adam(net, lr=1e-9)
            optimizer.lift_units = lift
            train(net, optimizer, 1)
            assert not optimizer.lift_units
        assert energies(nets[0][3].weight)[0] > 1.2 * energies(nets[1][3].weight)[0]
        x = images(0)[0].double()
        torch.testing.assert_close(nets[0](x), nets[1](x), rtol=0, atol=2e-3)

    def test_units_of_other_forms_are_left_to_compete(self):
        net = shrunk(normed())
        optimizer = adam(net, form="scale_free")
        train(net, optimizer, 20, SparsityTarget(optimizer, 0.5, 100))
        assert energies(net[3].weight)[0] < 0.2 * energies(net[3].weight).mean()

    @pytest.mark.parametrize("closure", [False, True])
    @pytest.mark.parametrize("inner", [False, True])
    def test_around_and_inside_ssam(self, closure, inner):
        """SSAM would warn of weights that others have written; its gradients show some of the units."""
        net = shrunk(normed())
        base = torch.optim.SGD(param_groups(net), lr=1e-3)
        optimizer = SSAM(WCR(base, form="per_unit")) if inner else WCR(SSAM(base), form="per_unit")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train(net, optimizer, 20, SparsityTarget(optimizer, 0.5, 100), closure=closure)
        optimizer.eval()
        assert all(p.isfinite().all() for p in net.parameters())

    def test_zeros_of_masks_stay_zero(self):
        net = shrunk(normed())
        with torch.no_grad():
            for w in (net[0].weight, net[3].weight):
                w[:, :, 0] = 0
        optimizer = WCR(torch.optim.SGD(param_groups(net), lr=0.0), form="per_unit")
        optimizer.lift_units = True
        train(net, optimizer, 1)
        assert not net[3].weight[:, :, 0].any()

    @pytest.mark.parametrize("stop", [1, 5, 6, 20])
    def test_resuming_goes_on_bit_for_bit(self, stop):
        def begin():
            net = shrunk(normed())
            optimizer = adam(net, lr=1e-2)
            return net, optimizer, SparsityTarget(optimizer, 0.9, 80, every=5)

        net, optimizer, target = begin()
        train(net, optimizer, stop, target)
        file = io.BytesIO()
        torch.save([net.state_dict(), optimizer.state_dict(), target.state_dict()], file)
        train(net, optimizer, 40 - stop, target, first=stop)
        file.seek(0)
        again, resumed, follower = begin()
        saved = torch.load(file, weights_only=True)
        again.load_state_dict(saved[0])
        follower.load_state_dict(saved[2])
        resumed.load_state_dict(saved[1])
        train(again, resumed, 40 - stop, follower, first=stop)
        for a, b in zip(net.parameters(), again.parameters(), strict=True):
            assert torch.equal(a, b)
        assert follower.state_dict() == target.state_dict()

    def test_copies_go_on_alike(self):
        net = shrunk(normed())
        optimizer = adam(net)
        target = SparsityTarget(optimizer, 0.5, 100, every=5)
        train(net, optimizer, 5, target)
        assert pickle.loads(pickle.dumps(optimizer)).lift_units
        other = copy.deepcopy((net, optimizer, target))
        for copied in ((net, optimizer, target), other):
            train(copied[0], copied[1], 10, copied[2], first=5)
        for a, b in zip(net.parameters(), other[0].parameters(), strict=True):
            assert torch.equal(a, b)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_a_compiled_step_leaves_units_as_they_are(self):
        net = shrunk(normed())
        optimizer = WCR(torch.optim.SGD(param_groups(net), lr=1e-4), form="per_unit")
        optimizer.lift_units = True
        before = energies(net[3].weight)
        gradients(net, 0)
        torch.compile(optimizer.step, backend="eager")()
        assert (energies(net[3].weight) / before).max() < 1.05
