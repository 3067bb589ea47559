"""Mixed precision with torch's own GradScaler, on the CPU: overflow in either pass loses nothing."""

import contextlib
import copy
import functools

import pytest
import torch
from sharpness_reference import OPTIMIZERS, TWO_PASS, assert_close, assert_same, base_of, batch, groups, net, train

from wcr_optim import WCR
from wcr_optim.sharpness import SAM, SSAM, CrAM, SparseSAM

ALL = sorted(OPTIMIZERS)


class Trainer:
    """The loops that the docstrings show, with an overflow in chosen passes of chosen steps."""

    def __init__(
        self, name, outer=True, way="closure", init_scale=2.0**10, dtype=torch.float16, base="adamw", **options
    ):
        self.model = net(torch.float32)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=1000)
        base = base_of(groups(self.model), base)
        options = {"scaler": self.scaler} if name in TWO_PASS else {}
        inner = OPTIMIZERS[name](base, **options)
        self.opt = WCR(inner, 1e-2) if outer else inner
        self.way, self.dtype, self.passes = way, dtype, 0
        self.clipped = None

    def backward(self, step, overflow):
        self.passes += 1
        self.opt.zero_grad()
        x, y = batch(step, torch.float32)
        with torch.autocast("cpu", self.dtype):
            loss = (self.model(x) - y).float().square().mean()
        factor = 1e30 if self.passes in overflow else 1.0  # the gradients of the first layers overflow in float16
        self.scaler.scale(loss * factor).backward()
        return loss

    def step(self, step, overflow=()):
        self.passes = 0
        if self.way == "closure":
            self.opt.gather(lambda: self.backward(step, overflow))
        else:
            self.backward(step, overflow)
            if self.way == "manual":
                self.opt.first_step()
                self.backward(step, overflow)
                self.opt.gather()
        if self.clipped is not None:
            self.scaler.unscale_(self.opt)
            self.clipped.append(torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.5))
        self.scaler.step(self.opt)
        self.scaler.update()

    def everything(self):
        """The true weights, SSAM's perturbed ones, and all else that the optimizer knows."""
        with self.opt.true_weights():
            weights = [p.detach().clone() for p in self.model.parameters()]
            state = copy.deepcopy(self.opt.state_dict())
            self.opt.train()
            perturbed = [p.detach().clone() for p in self.model.parameters()]
            self.opt.eval()
        for values in state["state"].values():
            values.pop("ssam", None)  # which differs by rounding, and makes the same perturbed weights
        return weights, perturbed, state


WAYS = [*((name, way) for name in TWO_PASS for way in ("closure", "manual")), ("ssam", "closure"), ("ssam", "plain")]


@pytest.mark.parametrize(
    ("name", "way", "failing"), [(name, way, k) for name, way in WAYS for k in ((1,) if name == "ssam" else (1, 2))]
)
@pytest.mark.parametrize("outer", [True, False])
def test_overflow_skips_the_step_and_loses_nothing(name, way, failing, outer):
    trainer, twin = (Trainer(name, outer, way) for _ in range(2))
    for step in range(3):
        trainer.step(step)
        twin.step(step)
    before = trainer.everything()
    trainer.step(3, overflow=(failing,))
    assert_same(trainer.everything(), before)
    assert trainer.scaler.get_scale() == 2.0**9
    assert twin.scaler.get_scale() == 2.0**10
    twin.scaler.update(2.0**9)  # what the skipped step did is all that it did
    for step in range(3, 6):
        trainer.step(step)
        twin.step(step)
    assert_same(trainer.everything(), twin.everything())


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_a_scale_far_too_high_is_lowered_until_steps_succeed(name, way):
    """As at the start of a training: real overflow in float16, in both passes, several times."""
    trainer = Trainer(name, way=way, init_scale=2.0**40)
    start = trainer.everything()[0]
    skipped = 0
    while trainer.scaler.get_scale() > 2.0**4:
        scale = trainer.scaler.get_scale()
        trainer.step(0)
        if trainer.scaler.get_scale() == scale:
            break
        skipped += 1
        assert_same(trainer.everything()[0], start)
    assert skipped > 5
    for step in range(1, 5):
        trainer.step(step)
    weights, *_ = trainer.everything()
    assert all(w.isfinite().all() for w in weights)
    assert not torch.equal(weights[0], start[0])


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_the_scale_does_not_matter(name, way):
    """Scaled by 2^12 in float32, where nothing is lost, and not at all."""
    scaled = Trainer(name, way=way, init_scale=2.0**12, dtype=torch.bfloat16, base="sgd")
    plain = Trainer(name, way=way, init_scale=1.0, dtype=torch.bfloat16, base="sgd")
    for step in range(10):
        scaled.step(step)
        plain.step(step)
    for p, q in zip(scaled.everything()[0], plain.everything()[0], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_clipping_after_unscaling(name, way):
    trainer = Trainer(name, way=way, init_scale=2.0**12, dtype=torch.bfloat16)
    trainer.clipped = []
    plain = Trainer(name, way=way, init_scale=1.0, dtype=torch.bfloat16)
    plain.clipped = []
    for step in range(5):
        trainer.step(step)
        plain.step(step)
    torch.testing.assert_close(torch.stack(trainer.clipped), torch.stack(plain.clipped), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_a_disabled_scaler_changes_nothing(name):
    model, twin = net(), net()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    options = {"scaler": scaler} if name in TWO_PASS else {}
    optimizer, plain = OPTIMIZERS[name](base_of(groups(model)), **options), OPTIMIZERS[name](base_of(groups(twin)))
    for step in range(5):
        x, y = batch(step)

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            scaler.scale(loss).backward()
            return loss

        optimizer.gather(closure)
        scaler.step(optimizer)
        scaler.update()
        train(twin, plain, [step])
    assert_close(model, twin, 0.0)


@pytest.mark.parametrize("name", ALL)
def test_bfloat16_autocast(name):
    """No scaler: closures as ever, the loss falls."""
    model = net(torch.float32)
    optimizer = WCR(OPTIMIZERS[name](base_of(groups(model), "adamw")), 1e-4)
    x, y = batch(0, torch.float32)
    losses = []

    def closure():
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = (model(x) - y).float().square().mean()
        loss.backward()
        return loss

    for _ in range(60):
        losses.append(optimizer.step(closure).item())
    assert losses[-1] < 0.75 * losses[0]


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("make", [SAM, SparseSAM, CrAM])
def test_a_step_inside_an_autocast_region_sees_the_moved_weights(make, by_hand):
    """Autocast keeps its copies of the weights for the length of a region, one that is not enabled too."""
    inside, outside = [], []
    for losses, around_step in ((inside, True), (outside, False)):
        torch.manual_seed(0)
        model = net(torch.float32)
        optimizer = make(base_of(model.parameters()), rho=0.5)
        x, y = batch(0, torch.float32)

        def closure():
            optimizer.zero_grad()  # noqa: B023
            with torch.autocast("cpu", torch.bfloat16):
                loss = (model(x) - y).float().square().mean()  # noqa: B023
            loss.backward()
            losses.append(loss.item())  # noqa: B023
            return loss

        with torch.autocast("cpu", torch.bfloat16) if around_step else contextlib.nullcontext():
            for _ in range(2):
                if by_hand:
                    closure()
                    optimizer.first_step()
                    closure()
                    optimizer.second_step()
                else:
                    optimizer.step(closure)
                torch.clear_autocast_cache()  # of the base's own update no wrapper can know
    assert inside == outside
    assert inside[0] != inside[1]


def test_ssam_inside_an_autocast_region_sees_the_weights_that_are_in_place():
    inside, outside = [], []
    for losses, around in ((inside, True), (outside, False)):
        torch.manual_seed(0)
        model = net(torch.float32)
        optimizer = SSAM(torch.optim.SGD(model.parameters(), lr=0.0), rho=0.5)
        x, y = batch(0, torch.float32)

        def forward():
            with torch.autocast("cpu", torch.bfloat16):
                loss = (model(x) - y).float().square().mean()  # noqa: B023
            losses.append(loss.item())  # noqa: B023
            return loss

        def closure():
            optimizer.zero_grad()  # noqa: B023
            loss = forward()
            loss.backward()
            return loss

        with torch.autocast("cpu", torch.bfloat16) if around else contextlib.nullcontext():
            optimizer.step(closure)  # at w, without a perturbation yet
            optimizer.step(closure)  # at w + e
            forward()  # at w
            optimizer.train()
            forward()  # at w + e
            optimizer.eval()
            forward()  # at w
    assert inside == outside
    at_w, moved, *between = inside
    assert between[0] == between[2] == at_w
    assert at_w not in (moved, between[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_asam_of_narrow_weights_is_computed_in_float32(dtype):
    """2 ** -6 * 1e-6 is no number in float16, and the norm of 64 times 10,000 none either."""
    w, b = (
        torch.nn.Parameter(torch.full((64, 64), 2.0**-6, dtype=dtype)),
        torch.nn.Parameter(torch.zeros(64, dtype=dtype)),
    )
    optimizer = SAM(torch.optim.SGD([w], lr=0.0), rho=0.5, adaptive=True)
    w.grad = torch.full_like(w, 1e-6)
    before = w.detach().clone()
    optimizer.first_step()
    moved = ((w.detach().float() - before.float()) / before.float()).norm()
    assert moved.item() == pytest.approx(0.5, rel=0.01)  # one weight moves by 2 ** -7 of itself
    optimizer = SAM(torch.optim.SGD([b], lr=0.0), rho=0.5, adaptive=True)
    b.grad = torch.full_like(b, 1e4)
    optimizer.first_step()
    torch.testing.assert_close(b.detach(), torch.full_like(b, 0.5 / 8))


@pytest.mark.parametrize("make", [SAM, SparseSAM])
@pytest.mark.parametrize("size", [0.0, 1e-7])
def test_the_smallest_gradients_of_float16_weights(make, size):
    w = torch.nn.Parameter(torch.ones(8, 8, dtype=torch.float16))
    optimizer = make(torch.optim.SGD([w], lr=0.1), rho=2.0, **({"sparsity": 0.0} if make is SparseSAM else {}))
    w.grad = torch.full_like(w, size)
    optimizer.first_step()
    moved = w.detach() - 1
    expected = 2.0 * size / (8 * w.grad[0, 0].item() + 1e-12) if size else 0.0
    assert moved.isfinite().all()
    torch.testing.assert_close(moved, torch.full_like(w, expected), rtol=0.2, atol=0.0)


@pytest.mark.parametrize("make", [SAM, SparseSAM, CrAM])
@pytest.mark.parametrize("way", ["second_step", "step", "scaler"])
@pytest.mark.parametrize("outer", [False, True])
def test_a_step_between_the_passes_refuses_scaled_gradients(make, way, outer):
    model = net(torch.float32)
    scaler = torch.amp.GradScaler("cpu")
    optimizer = make(base_of(model.parameters()), scaler=scaler)
    optimizer = WCR(optimizer, 1e-2) if outer else optimizer
    x, y = batch(0, torch.float32)
    before = [p.detach().clone() for p in model.parameters()]
    scaler.scale((model(x) - y).square().mean()).backward()
    optimizer.first_step()
    step = functools.partial(scaler.step, optimizer) if way == "scaler" else getattr(optimizer, way)
    with pytest.raises(RuntimeError, match=r"call gather\(\), then scaler.step"):
        step()
    optimizer.gather()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("make", [SAM, SparseSAM, CrAM])
@pytest.mark.parametrize("outer", [False, True])
def test_step_with_a_closure_refuses_scaled_gradients(make, outer):
    model = net(torch.float32)
    scaler = torch.amp.GradScaler("cpu")
    optimizer = make(base_of(model.parameters()), scaler=scaler)
    optimizer = WCR(optimizer, 1e-2) if outer else optimizer

    def closure():
        raise AssertionError("refused before it runs")

    with pytest.raises(RuntimeError, match=r"call gather\(closure\), then scaler.step"):
        optimizer.step(closure)
