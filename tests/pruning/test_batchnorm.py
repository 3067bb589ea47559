"""Running statistics estimated anew: the exact mean over the batches, and everything else as before."""

import copy

import pytest
import torch
from networks import ResNet
from torch import nn
from torch.nn.functional import dropout

from wcr_optim.pruning import recalibrate_batchnorm


def batches(count=4, size=6):
    return [torch.randn(size, 3, 16, 16) + index for index in range(count)]


def flags(model):
    return [module.training for module in model.modules()]


def momenta(model):
    return [module.momentum for module in model.modules() if hasattr(module, "momentum")]


def statistics(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


NORMS = {
    "1d": (lambda **o: nn.BatchNorm1d(5, **o), (7, 5)),
    "2d": (lambda **o: nn.BatchNorm2d(5, **o), (7, 5, 3, 4)),
    "3d": (lambda **o: nn.BatchNorm3d(5, **o), (7, 5, 2, 3, 4)),
    "instance": (lambda **o: nn.InstanceNorm2d(5, track_running_stats=True, **o), (7, 5, 3, 4)),
}


@pytest.mark.parametrize("momentum", [0.1, None, 1.0, 0.0])
@pytest.mark.parametrize("kind", list(NORMS))
def test_the_mean_over_the_batches(kind, momentum):
    make, shape = NORMS[kind]
    norm = make(momentum=momentum).double()
    norm.running_mean.fill_(5)
    data = [torch.randn(shape, dtype=torch.float64) * (i + 1) + i for i in range(5)]
    recalibrate_batchnorm(norm, data)
    over = [dim for dim in range(len(shape)) if dim != 1]
    if kind == "instance":  # the mean over the batch of each sample's statistics
        means = [x.mean(over[1:]).mean(0) for x in data]
        variances = [x.var(over[1:]).mean(0) for x in data]
    else:
        means, variances = [x.mean(over) for x in data], [x.var(over) for x in data]
    torch.testing.assert_close(norm.running_mean, torch.stack(means).mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(norm.running_var, torch.stack(variances).mean(0), rtol=1e-12, atol=1e-12)
    assert norm.momentum == momentum
    assert int(norm.num_batches_tracked) == 5


def test_equals_torchs_cumulative_average():
    model, other = ResNet(), None
    other = copy.deepcopy(model)
    recalibrate_batchnorm(model, batches())
    for module in other.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    other.train()
    other.dropout.eval()
    torch.manual_seed(0)
    for batch in (torch.randn(6, 3, 16, 16) + index for index in range(4)):
        with torch.no_grad():
            other(batch)
    torch.manual_seed(0)
    recalibrate_batchnorm(model, batches())
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, dict(other.named_buffers())[name], rtol=1e-5, atol=1e-6)


def test_a_layer_that_runs_twice_counts_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            return self.norm(self.norm(x) * 2 + 1)

    model = Twice().double()
    data = [torch.randn(9, 3, dtype=torch.float64) for _ in range(3)]
    recalibrate_batchnorm(model, data)
    means = [x.mean(0) for x in data] + [torch.ones(3, dtype=torch.float64)] * 3
    torch.testing.assert_close(model.norm.running_mean, torch.stack(means).mean(0), rtol=1e-10, atol=1e-10)
    assert int(model.norm.num_batches_tracked) == 6


@pytest.mark.parametrize("training", [True, False])
def test_everything_else_is_as_before(training):
    model = ResNet().train(training)
    model.stages[1].eval()
    model.stages[2][0].bn1.momentum = None
    before = flags(model), momenta(model), [p.detach().clone() for p in model.parameters()]
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    state = torch.get_rng_state()
    recalibrate_batchnorm(model, [torch.zeros(2, 3, 16, 16)] * 2)
    assert torch.equal(state, torch.get_rng_state())  # no dropout was drawn
    assert flags(model) == before[0]
    assert momenta(model) == before[1]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before[2], strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks


def test_buffers_stay_the_same_objects():
    model = ResNet()
    before = {name: buffer.data_ptr() for name, buffer in model.named_buffers()}
    recalibrate_batchnorm(model, batches(1))
    assert {name: buffer.data_ptr() for name, buffer in model.named_buffers()} == before


def test_no_gradients_and_no_dropout():
    seen = []

    class Probe(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            seen.append((torch.is_grad_enabled(), self.training, self.norm.training))
            return self.norm(dropout(x, 0.9, self.training))

    recalibrate_batchnorm(Probe().train(), [torch.randn(4, 3)])
    assert seen == [(False, False, True)]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_brings_the_old_statistics_back(error):
    model = ResNet().train()
    recalibrate_batchnorm(model, batches())
    before = statistics(model), flags(model), momenta(model)

    def interrupted():
        yield batches(1)[0]
        raise error

    with pytest.raises(error):
        recalibrate_batchnorm(model, interrupted())
    assert_same(statistics(model), before[0])
    assert (flags(model), momenta(model)) == before[1:]


def test_no_batches_are_an_error():
    model = ResNet()
    before = statistics(model)
    exhausted = iter(batches(1))
    next(exhausted)
    for nothing in ([], exhausted):
        with pytest.raises(ValueError, match="no batches"):
            recalibrate_batchnorm(model, nothing)
    assert_same(statistics(model), before)


@pytest.mark.parametrize(
    "model", [nn.Linear(2, 2), nn.LayerNorm(2), nn.InstanceNorm1d(2), nn.BatchNorm1d(2, track_running_stats=False)]
)
def test_without_running_statistics_the_batches_are_not_even_looked_at(model):
    def untouchable():
        raise AssertionError("looked at")
        yield

    recalibrate_batchnorm(model, untouchable())


def test_layers_out_of_reach_keep_theirs():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.auxiliary = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x):
            return self.auxiliary(self.main(x)) if self.training else self.main(x)

    model = Auxiliary()
    model.auxiliary.running_mean.fill_(7)
    model.auxiliary.num_batches_tracked.fill_(9)
    before = {name: value for name, value in statistics(model).items() if name.startswith("auxiliary")}
    recalibrate_batchnorm(model, [torch.randn(4, 3)])
    after = {name: value for name, value in statistics(model).items() if name.startswith("auxiliary")}
    assert_same(after, before)
    assert int(model.main.num_batches_tracked) == 1


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_statistics_that_are_not_finite_are_replaced(wrong):
    model, x = nn.BatchNorm1d(3), torch.randn(8, 3)
    model.running_mean.fill_(wrong)
    model.running_var.fill_(wrong)
    recalibrate_batchnorm(model, [x])
    torch.testing.assert_close(model.running_mean, x.mean(0))
    torch.testing.assert_close(model.running_var, x.var(0))


def test_a_forward_that_goes_to_evaluation_mode_is_an_error():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model(torch.randn(16, 3))
    before = statistics(model)

    def forward(model, batch):
        return model.eval()(batch)

    with pytest.raises(ValueError, match="no statistics were estimated"):
        recalibrate_batchnorm(model, [torch.randn(16, 3)], forward)
    assert_same(statistics(model), before)


def test_a_layer_that_the_model_keeps_in_evaluation_mode_runs_with_its_own_statistics():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen, self.norm = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x):
            self.frozen.eval()
            return self.norm(self.frozen(x))

    model, x = Frozen(), 3 * torch.randn(64, 3) + 5
    model.frozen(x)
    before = model.frozen.running_mean.clone()
    recalibrate_batchnorm(model, [x])
    assert torch.equal(model.frozen.running_mean, before)
    torch.testing.assert_close(model.norm.running_mean, model.frozen.eval()(x).mean(0))


def test_a_data_loader_draws_no_number_of_the_training():
    data = torch.utils.data.TensorDataset(torch.randn(12, 3))
    before = torch.get_rng_state()
    recalibrate_batchnorm(Keywords(), torch.utils.data.DataLoader(data, batch_size=4, shuffle=True))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["script", "export"])
def test_layers_that_have_lost_their_types_are_refused(kind):
    model, x = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval(), torch.randn(5, 3)
    hidden = torch.jit.script(model) if kind == "script" else torch.export.export(model, (x,)).module()
    with pytest.raises(ValueError, match="hides what its layers are"):
        recalibrate_batchnorm(hidden, [x])


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x, scale=1.0):
        return self.norm(x * scale)


def test_forms_of_batches():
    x = torch.randn(5, 3)
    labels = torch.zeros(5)
    for batch in (x, (x, labels), [x, labels], {"x": x}, {"x": x / 2, "scale": 2.0}):
        model = Keywords()
        recalibrate_batchnorm(model, [batch])
        torch.testing.assert_close(model.norm.running_mean, x.mean(0))
    model = Keywords()
    recalibrate_batchnorm(model, [{"image": x, "label": 3}], forward=lambda net, batch: net(batch["image"], scale=2.0))
    torch.testing.assert_close(model.norm.running_mean, 2 * x.mean(0))


def test_a_data_loader():
    data = torch.utils.data.TensorDataset(torch.randn(12, 3), torch.zeros(12))
    model = Keywords()
    recalibrate_batchnorm(model, torch.utils.data.DataLoader(data, batch_size=4))
    assert int(model.norm.num_batches_tracked) == 3


def test_compiled_and_wrapped_models():
    x = [torch.randn(5, 3) + i for i in range(3)]
    plain = Keywords()
    recalibrate_batchnorm(plain, x)
    inner = Keywords()
    compiled = torch.compile(inner, backend="eager")
    with torch.no_grad():
        compiled(x[0])  # compiled before the statistics are estimated
    inner.norm.reset_running_stats()
    recalibrate_batchnorm(compiled, x)
    assert_same(statistics(inner), statistics(plain))
    wrapped = nn.DataParallel(Keywords())
    recalibrate_batchnorm(wrapped, x)
    assert_same(statistics(wrapped.module), statistics(plain))


def compiled_layer(model):
    model[0][0].compile(backend="eager")


def compiled_block(model):
    model[0].compile(backend="eager")


def compiled_child(model):
    model[0] = torch.compile(model[0], backend="eager")


@pytest.mark.parametrize("compiled", [compiled_layer, compiled_block, compiled_child])
@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.InstanceNorm1d])
def test_parts_compiled_on_their_own(kind, compiled):
    x = [torch.randn(5, 3, 7) + i for i in range(3)]

    def network():
        return nn.Sequential(nn.Sequential(kind(3, track_running_stats=True), nn.ReLU()), nn.ReLU())

    plain, model = network(), network()
    compiled(model)
    with torch.no_grad():
        model(x[0])
        model.eval()(x[0])
    recalibrate_batchnorm(plain, x)
    recalibrate_batchnorm(model, x)
    assert list(statistics(model).values())
    for found, expected in zip(statistics(model).values(), statistics(plain).values(), strict=True):
        assert torch.equal(found, expected)


def test_lazy_layers_are_refused():
    with pytest.raises(ValueError, match="LazyBatchNorm1d is not initialized yet"):
        recalibrate_batchnorm(nn.LazyBatchNorm1d(), [torch.randn(3, 2)])


def test_overridden_train_and_eval_are_not_called():
    class Frozen(Keywords):
        def train(self, mode=True):
            raise AssertionError("train() may merge adapters or keep norms frozen")

    model = Frozen.__new__(Frozen)
    Keywords.__init__(model)
    recalibrate_batchnorm(model, [torch.randn(4, 3)])
    assert int(model.norm.num_batches_tracked) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.InstanceNorm1d])
def test_many_batches_in_low_precision(kind, dtype):
    norm = kind(2, track_running_stats=True).to(dtype)
    rare = torch.tensor([[1.0, -1.0], [3.0, 1.0]], dtype=dtype).view(1, 2, 2).expand(4, 2, 2)
    # In the first half the means are 0 and 2, in the other one 2 and 4, all of them exact in either dtype.
    data = [rare.clone()] * 1200 + [rare + 2] * 1200
    recalibrate_batchnorm(norm, data)
    assert norm.running_mean.tolist() == [1.0, 3.0]
    one = kind(2, track_running_stats=True).to(dtype)
    recalibrate_batchnorm(one, data[:1])
    assert torch.equal(norm.running_var, one.running_var)
    assert int(norm.num_batches_tracked) == 2400
