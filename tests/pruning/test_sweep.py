"""Many sparsities in one call: the masks of magnitude_masks each time, and the model as before at the end."""

import builtins
import copy
import csv
import math
import sys

import pytest
import torch
from networks import ResNet
from torch import nn

from wcr_optim.pruning import SweepResult, SweepRow, apply_, magnitude_masks, recalibrate_batchnorm, sweep

SPARSITIES = [0.9, 0, 0.5, 0.5, 1.0, 0.99]


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_as_before(model, before):
    assert list(model.state_dict()) == list(before)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def network():
    model = ResNet()
    for x in (torch.randn(4, 3, 16, 16) for _ in range(2)):
        model(x)
    model.stages[0].eval()
    return model


def output(x):
    return lambda model: float(model(x).detach().double().sum())


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_equals_masks_applied_one_by_one(scope, calibrated):
    model = network()
    before, flags = state(model), [module.training for module in model.modules()]
    x = torch.randn(5, 3, 16, 16)
    calibration = [torch.randn(6, 3, 16, 16) for _ in range(2)] if calibrated else None
    result = sweep(model, output(x), SPARSITIES, scope, calibration)
    assert_as_before(model, before)
    assert [module.training for module in model.modules()] == flags
    assert result.sparsities == SPARSITIES
    assert result.recalibrated is calibrated
    for row in result.rows:
        pruned = copy.deepcopy(model).eval()
        masks = magnitude_masks(pruned, row.sparsity, scope)
        apply_(pruned, masks)
        if calibrated:
            recalibrate_batchnorm(pruned, calibration)
        assert row.metrics == {"score": output(x)(pruned)}
        assert (row.pruned, row.total) == (masks.total - masks.kept, masks.total)


def test_evaluation_sees_exact_zeros_in_evaluation_mode():
    model = network().train()
    seen = []

    def evaluate(pruned):
        weights = torch.cat([p.detach().view(-1) for p in pruned.parameters() if p.ndim > 1])
        seen.append(int((weights == 0).sum()))
        assert not any(module.training for module in pruned.modules())
        pruned.train()  # whatever an evaluation does to the flags
        return 0.0

    result = sweep(model, evaluate, [0.3, 0.97])
    assert seen == [row.pruned for row in result.rows]
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("calibrated", [False, True])
def test_an_exception_leaves_the_model_as_before(error, calibrated):
    model = network()
    before, flags = state(model), [module.training for module in model.modules()]
    calls = []

    def evaluate(pruned):
        calls.append(1)
        if len(calls) == 2:
            raise error
        return 0.0

    with pytest.raises(error):
        sweep(model, evaluate, [0.5, 0.9, 0.95], calibration=[torch.randn(2, 3, 16, 16)] if calibrated else None)
    assert_as_before(model, before)
    assert [module.training for module in model.modules()] == flags


def test_failing_calibration_leaves_the_model_as_before():
    model = network()
    before = state(model)
    with pytest.raises(ValueError, match="no batches"):
        sweep(model, output(torch.zeros(1, 3, 16, 16)), [0.5], calibration=[])
    assert_as_before(model, before)


def test_an_iterator_serves_every_sparsity():
    model = network()
    batches = [torch.randn(3, 3, 16, 16) for _ in range(2)]
    x = torch.randn(2, 3, 16, 16)
    once = sweep(model, output(x), [0.2, 0.8], calibration=iter(batches))
    assert once == sweep(model, output(x), [0.2, 0.8], calibration=batches)


def test_weights_that_evaluation_spoils_come_back():
    model = network()
    before = state(model)

    def spoil(pruned):
        score = float(pruned.fc.weight.detach().abs().sum())
        with torch.no_grad():
            pruned.fc.weight.fill_(math.nan)
        return score

    result = sweep(model, spoil, [0.0, 0.0, 0.5])
    assert_as_before(model, before)
    assert result.values()[0] == result.values()[1] > result.values()[2]


def test_a_selection_of_layers():
    model = network()
    result = sweep(model, lambda pruned: float((pruned.fc.weight == 0).sum()), [0.5], exclude=["fc", "conv1"])
    assert result.values() == [0.0]
    result = sweep(model, lambda pruned: float((pruned.fc.weight == 0).sum()), [0.5], include=["fc"])
    assert result.values() == [model.fc.weight.numel() / 2]
    assert result.rows[0].total == model.fc.weight.numel()


def test_a_compiled_model():
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
    x = torch.randn(3, 6)
    compiled = torch.compile(model, backend="eager")
    assert sweep(compiled, output(x), [0, 0.5]).values() == pytest.approx(sweep(model, output(x), [0, 0.5]).values())


@pytest.mark.parametrize(("sparsities", "message"), [([], "at least one"), ([0.5, 1.5], "got 1.5"), ([-1], "got -1")])
def test_sparsities_are_validated_before_anything_runs(sparsities, message):
    with pytest.raises(ValueError, match=message):
        sweep(network(), lambda model: pytest.fail("evaluated"), sparsities)
    with pytest.raises(ValueError, match="scope must be"):
        sweep(network(), lambda model: pytest.fail("evaluated"), [0.5], "row")


# ------------------------------------------------------------------------------------------------------------ results


def example():
    rows = (
        SweepRow(0.0, 0, 1000, {"accuracy": 0.987654321, "loss": 0.1}),
        SweepRow(0.955, 955, 1000, {"accuracy": 0.5}),
    )
    return SweepResult(rows, "global", False)


def test_metrics_by_name():
    model = nn.Linear(3, 3)
    result = sweep(model, lambda m: {"accuracy": torch.tensor(0.5), "loss": 1}, [0, 0.5])
    assert result.metrics == ["accuracy", "loss"]
    assert result.values() == result.values("accuracy") == [0.5, 0.5]
    assert result.values("loss") == [1.0, 1.0]
    assert {type(value) for row in result.rows for value in row.metrics.values()} == {float}
    with pytest.raises(KeyError):
        result.values("recall")


def test_table():
    lines = example().table().splitlines()
    assert lines == [
        "sparsity   kept  accuracy  loss",
        "     0 %  1,000    0.9877   0.1",
        "  95.5 %     45       0.5",
    ]
    assert str(example()) == example().table()


def test_csv(tmp_path):
    path = tmp_path / "result.csv"
    example().to_csv(path)
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0] == {"sparsity": "0.0", "pruned": "0", "total": "1000", "accuracy": "0.987654321", "loss": "0.1"}
    assert rows[1]["loss"] == ""
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.csv"]


def test_a_failed_csv_leaves_the_old_file(tmp_path):
    path = tmp_path / "missing" / "result.csv"
    with pytest.raises(FileNotFoundError):
        example().to_csv(path)
    assert list(tmp_path.iterdir()) == []


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    path = tmp_path / "result.png"
    axes = example().plot(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert axes.get_ylabel() == "accuracy"
    given = Figure().add_subplot()
    assert sweep(nn.Linear(3, 3), lambda m: 1.0, [0, 0.5]).plot(given, label="mine") is given
    assert given.get_lines()[0].get_label() == "mine"


def test_progress(capsys, monkeypatch):
    pytest.importorskip("tqdm")
    sweep(nn.Linear(3, 3), lambda m: 0.0, [0, 0.5])
    assert capsys.readouterr().err == ""
    sweep(nn.Linear(3, 3), lambda m: 0.0, [0, 0.5], progress=True)
    assert "sweep: 100%" in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    sweep(nn.Linear(3, 3), lambda m: 0.0, [0, 0.5], progress=False)
    sweep(nn.Linear(3, 3), lambda m: 0.0, [0, 0.5])  # done before the bar would appear
    assert "sweep" not in capsys.readouterr().err


def test_progress_without_tqdm(monkeypatch):
    imported = builtins.__import__

    def without_tqdm(name, *args, **kwargs):
        if name == "tqdm":
            raise ImportError("No module named 'tqdm'")
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_tqdm)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert sweep(nn.Linear(3, 3), lambda m: 0.0, [0]).values() == [0.0]
    with pytest.raises(ImportError, match=r"pip install 'wcr_optim\[bench\]'"):
        sweep(nn.Linear(3, 3), lambda m: 0.0, [0], progress=True)


def test_statistics_that_evaluation_estimates_do_not_leak():
    model = network()
    before = state(model)
    seen = []

    def evaluate(pruned):
        seen.append(copy.deepcopy([buffer for name, buffer in pruned.named_buffers()]))
        recalibrate_batchnorm(pruned, [torch.randn(3, 3, 16, 16)])
        return 0.0

    sweep(model, evaluate, [0.5, 0.9])
    assert_as_before(model, before)
    assert all(torch.equal(first, second) for first, second in zip(*seen, strict=True))


def test_metrics_with_a_graph():
    model = network()
    x = torch.randn(2, 3, 16, 16)
    (expected,) = sweep(model, lambda pruned: float(pruned(x).mean().detach()), [0.5]).values()
    for form in (lambda loss: loss, lambda loss: {"loss": loss}):
        (value,) = sweep(model, lambda pruned, form=form: form(pruned(x).mean()), [0.5]).values()
        assert value == expected


def test_a_single_sparsity_is_asked_for_as_a_list():
    with pytest.raises(TypeError, match=r"sparsities must be a sequence of numbers, got 0\.5"):
        sweep(network(), lambda pruned: 0.0, 0.5)


@pytest.mark.parametrize("found", [None, (0.5, 0.6), {"loss": 0.5, "accuracy": None}, {"logits": torch.ones(2)}])
def test_what_is_no_number_is_named(found):
    model = network()
    before = state(model)
    name = "score" if not isinstance(found, dict) else list(found)[-1]
    with pytest.raises(TypeError, match=rf"evaluate returned .* for '{name}' at sparsity 0\.5: it has to return a"):
        sweep(model, lambda pruned: found, [0.5])
    assert_as_before(model, before)


def test_no_metrics_are_an_error():
    model = network()
    before = state(model)
    with pytest.raises(ValueError, match=r"evaluate returned no metrics at sparsity 0\.5"):
        sweep(model, lambda pruned: {}, [0.5])
    assert_as_before(model, before)
