"""Units whose size a normalization layer hides: they are found, and do not fall far behind their layer."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from wcr_optim import SAM, SSAM, WCR, SparsityTarget, param_groups
from wcr_optim.invariance import STEPS, ScaleInvariance, lift_units_
from wcr_optim.target import LEAST_ENERGY


def normed(seed=0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3),  # with a bias, which BatchNorm takes away again
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 16, 3),
    )


def images(step, size=32):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, 1, 6, 6, generator=generator)
    return x, (x[:, 0, 2, 2] > 0).long() + (x[:, 0, 3, 3] > 0).long()


def gradients(net, step):
    x, y = images(step)
    net.zero_grad()
    loss = nn.functional.cross_entropy(net(x), y)
    loss.backward()
    return loss


def found(net, dtype=None, steps=STEPS):
    """Name the weights that are found invariant."""
    invariance = ScaleInvariance()
    for step in range(steps):
        gradients(net, step)
        invariance.observe((name, p) for name, p in net.named_parameters())
    return {name for name, _ in net.named_parameters() if invariance.holds(name)}


def train(net, optimizer, steps, target=None, first=0):
    for step in range(first, first + steps):
        loss = gradients(net, step)
        optimizer.step()
        if target is not None:
            target.step(loss)


def energies(w):
    return w.detach().double().square().flatten(1).sum(1)


class TestFinding:
    def test_convolutions_before_batchnorm_and_nothing_else(self):
        assert found(normed()) == {"0.weight", "3.weight"}

    def test_nothing_before_enough_gradients_were_seen(self):
        assert found(normed(), steps=STEPS - 1) == set()

    def test_nothing_in_a_network_without_normalization(self):
        torch.manual_seed(0)
        assert found(nn.Sequential(nn.Flatten(), nn.Linear(36, 20), nn.ReLU(), nn.Linear(20, 3))) == set()

    def test_a_norm_over_several_units_hides_none_of_them(self):
        torch.manual_seed(0)
        groups = nn.Sequential(nn.Conv2d(1, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3))
        assert found(groups) == set()
        layer = nn.Sequential(nn.Flatten(), nn.Linear(36, 20), nn.LayerNorm(20), nn.Linear(20, 3))
        assert found(layer) == set()

    def test_statistics_that_do_not_follow_hide_nothing(self):
        net = normed()
        net[1].eval()
        assert found(net) == {"3.weight"}

    def test_channels_last_and_low_precision(self):
        assert found(normed().to(memory_format=torch.channels_last)) == {"0.weight", "3.weight"}
        net = normed()
        invariance = ScaleInvariance()
        for step in range(STEPS):
            gradients(net, step)
            narrow = [(name, nn.Parameter(p.detach().bfloat16())) for name, p in net.named_parameters()]
            for (_, q), p in zip(narrow, net.parameters(), strict=True):
                q.grad = p.grad.bfloat16()
            invariance.observe(narrow)
        assert {name for name, _ in net.named_parameters() if invariance.holds(name)} == {"0.weight", "3.weight"}

    @pytest.mark.parametrize("kind", ["none", "zero", "nan", "empty", "sparse"])
    def test_gradients_that_tell_nothing_find_nothing(self, kind):
        w = nn.Parameter(torch.randn(0, 3) if kind == "empty" else torch.randn(5, 3))
        grads = {
            "none": None,
            "zero": torch.zeros_like(w),
            "nan": torch.full_like(w, torch.nan),
            "empty": torch.zeros_like(w),
            "sparse": torch.ones(5, 3).to_sparse(),
        }
        w.grad = grads[kind]
        invariance = ScaleInvariance()
        for _ in range(STEPS):
            invariance.observe([("w", w)])
        assert not invariance.holds("w")

    def test_the_sums_are_those_of_the_formula(self):
        w = nn.Parameter(torch.randn(6, 4, 3, dtype=torch.float64))
        w.grad = torch.randn_like(w)
        invariance = ScaleInvariance()
        invariance.observe([("w", w)])
        rows = list(zip(w.detach().flatten(1), w.grad.flatten(1), strict=True))
        aligned = sum((a @ b).item() ** 2 for a, b in rows) * 12
        both = sum((a @ a).item() * (b @ b).item() for a, b in rows)
        assert invariance.state_dict()["sums"] == [["w", [pytest.approx(aligned), pytest.approx(both)]]]


class TestLifting:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_agrees_with_the_formula_row_by_row(self, dtype):
        generator = torch.Generator().manual_seed(0)
        sizes = torch.logspace(-3, 1, 9).view(-1, 1, 1, 1)
        w = (torch.randn(9, 4, 3, 3, generator=generator) * sizes).to(dtype).to(memory_format=torch.channels_last)
        w[4] = 0
        v = torch.randn(3, 7, generator=generator).to(dtype)
        expected = []
        for x in (w, v):
            rows, mean = [row.double() for row in x], energies(x).mean()
            rows = [
                row * max(1.0, (0.25 * mean / row.square().sum()).sqrt().item()) if row.any() else row for row in rows
            ]
            expected.append(torch.stack(rows))
        lift_units_([w, v], 0.25)
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
        torch.testing.assert_close(w.double(), expected[0], rtol=tolerance, atol=0)
        torch.testing.assert_close(v.double(), expected[1], rtol=tolerance, atol=0)

    def test_leaves_a_layer_with_nan_or_infinity_as_it_was(self):
        for bad in (torch.nan, torch.inf):
            w = torch.randn(4, 5)
            w[0] *= 1e-3
            w[1, 1] = bad
            before = w.clone()
            lift_units_([w], 0.25)
            torch.testing.assert_close(w, before, rtol=0, atol=0, equal_nan=True)

    def test_nothing_to_lift(self):
        lift_units_([], 0.25)
        lift_units_([torch.zeros(0, 4), torch.zeros(3, 0), torch.zeros(2, 2)], 0.25)

    def test_the_network_computes_what_it_did(self):
        net = normed().double()
        with torch.no_grad():
            net[0].weight[:4] *= 0.1
            net[3].weight[:4] *= 0.1
            x = images(0)[0].double()
            before = net(x)
            lift_units_([net[0].weight, net[3].weight], 0.25)
            assert energies(net[0].weight).min() > 0.2 * energies(net[0].weight).mean()
            torch.testing.assert_close(net(x), before, rtol=0, atol=5e-2)  # BatchNorm's eps sees the size a little


def adam(net, form="per_unit", lr=1e-2):
    return WCR(torch.optim.AdamW(param_groups(net), lr=lr), form=form)


class TestInATarget:
    def test_no_unit_falls_far_behind_its_layer(self):
        """A unit that begins far behind is brought up where that changes nothing, and left where it would."""
        net = normed()
        with torch.no_grad():
            net[3].weight[0] *= 0.03
            net[7].weight[0] *= 0.03
        start = energies(net[7].weight)[0]
        optimizer = adam(net, lr=1e-4)
        target = SparsityTarget(optimizer, 0.5, 30, lr_exponent=0)
        train(net, optimizer, 10, target)
        assert energies(net[3].weight)[0] > 0.9 * LEAST_ENERGY * energies(net[3].weight).mean()
        assert energies(net[7].weight)[0] < 2 * start

    def test_units_of_other_forms_are_left_to_compete(self):
        net = normed()
        with torch.no_grad():
            net[3].weight[0] *= 0.03
        optimizer = adam(net, form="scale_free", lr=1e-4)
        train(net, optimizer, 10, SparsityTarget(optimizer, 0.5, 30))
        assert energies(net[3].weight)[0] < 0.01 * energies(net[3].weight).mean()

    @pytest.mark.parametrize("wrap", [SAM, SSAM])
    def test_around_sharpness_aware_optimizers(self, wrap):
        net = normed()
        with torch.no_grad():
            net[3].weight[0] *= 0.03
        optimizer = WCR(wrap(torch.optim.SGD(param_groups(net), lr=1e-3), rho=0.05), form="per_unit")
        target = SparsityTarget(optimizer, 0.5, 30)
        for step in range(12):
            optimizer.step(lambda step=step: gradients(net, step))
            target.step()
        optimizer.eval()
        assert energies(net[3].weight)[0] > 0.9 * LEAST_ENERGY * energies(net[3].weight).mean()
        optimizer.train()
        assert all(p.isfinite().all() for p in net.parameters())

    @pytest.mark.parametrize("stop", [1, STEPS - 1, STEPS, 20])
    def test_resuming_goes_on_bit_for_bit(self, stop):
        def begin():
            net = normed()
            optimizer = adam(net)
            return net, optimizer, SparsityTarget(optimizer, 0.9, 80)

        net, optimizer, target = begin()
        train(net, optimizer, stop, target)
        file = io.BytesIO()
        torch.save([net.state_dict(), optimizer.state_dict(), target.state_dict()], file)
        train(net, optimizer, 40 - stop, target, first=stop)
        file.seek(0)
        again, resumed, follower = begin()
        saved = torch.load(file, weights_only=True)
        again.load_state_dict(saved[0])
        resumed.load_state_dict(saved[1])
        follower.load_state_dict(saved[2])
        train(again, resumed, 40 - stop, follower, first=stop)
        for a, b in zip(net.parameters(), again.parameters(), strict=True):
            assert torch.equal(a, b)
        assert follower.state_dict() == target.state_dict()

    def test_a_state_of_an_earlier_version_loads(self):
        net = normed()
        optimizer = adam(net)
        target = SparsityTarget(optimizer, 0.9, 40)
        train(net, optimizer, 3, target)
        old = {key: value for key, value in target.state_dict().items() if key != "invariance"}
        target.load_state_dict(old)
        train(net, optimizer, 8, target, first=3)
        assert target.steps == 11

    def test_copies_of_the_optimizer_do_not_take_the_target_along(self):
        net = normed()
        optimizer = adam(net)
        target = SparsityTarget(optimizer, 0.9, 40)
        train(net, optimizer, 1, target)
        assert pickle.loads(pickle.dumps(optimizer)).before_update is None
        assert copy.deepcopy(optimizer).before_update is None
        assert optimizer.before_update is not None

    def test_parameters_added_later_are_looked_at_too(self):
        net = normed()
        optimizer = WCR(torch.optim.SGD([net[0].weight], lr=1e-3), form="per_unit")
        target = SparsityTarget(optimizer, 0.5, 30)
        train(net, optimizer, 5, target)
        optimizer.add_param_group({"params": [net[3].weight]})
        with torch.no_grad():
            net[3].weight[0] *= 0.03
        train(net, optimizer, 10, target, first=5)
        assert energies(net[3].weight)[0] > 0.9 * LEAST_ENERGY * energies(net[3].weight).mean()
