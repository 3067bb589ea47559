"""Which weights are regularized and pruned: one rule, checked on the layers and wrappers that people have."""

import copy
import math
import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from wcr_optim.parameters import param_groups, prunable_weights

GIVEN = {"weight_decay": 0.01, "weight_concentration": 0.1}


class Vision(nn.Module):
    """Everything that two dimensions and more can be besides a weight."""

    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 8))
        self.relative_position_bias_table = nn.Parameter(torch.zeros(9, 2))
        self.logit_scale = nn.Parameter(torch.zeros(2, 1, 1))
        self.patch_embed = nn.Conv2d(3, 8, 4)
        self.attention = nn.MultiheadAttention(8, 2, add_bias_kv=True)
        self.other = nn.MultiheadAttention(8, 2, kdim=4, vdim=4)
        self.norm = nn.LayerNorm((5, 8))
        self.groups = nn.GroupNorm(2, 8)
        self.batch = nn.BatchNorm2d(8)
        self.rms = nn.RMSNorm(8)
        self.experts = nn.Parameter(torch.zeros(2, 8, 8))
        self.head = nn.Linear(8, 3)


def small():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))


def names_of(groups, model):
    """The names in every group, by its strengths."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        ({key: value for key, value in group.items() if key != "params"}, {names[id(p)] for p in group["params"]})
        for group in groups
    ]


def test_groups_of_a_small_network():
    model = small()
    regularized, rest = param_groups(model, **GIVEN)
    assert [id(p) for p in regularized["params"]] == [id(model[0].weight), id(model[2].weight)]
    assert {key: regularized[key] for key in GIVEN} == GIVEN
    assert [id(p) for p in rest["params"]] == [id(p) for p in model.parameters() if p.ndim == 1]
    assert {key: rest[key] for key in GIVEN} == dict.fromkeys(GIVEN, 0.0)


def test_the_groups_serve_torch_optimizers():
    model = small()
    for kind in (torch.optim.SGD, torch.optim.AdamW):
        optimizer = kind(param_groups(model, **GIVEN), lr=0.1)
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]
        assert [group["weight_concentration"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_only_weights_of_linear_maps_are_selected():
    assert list(prunable_weights(Vision())) == [
        "experts",
        "patch_embed.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "other.q_proj_weight",
        "other.k_proj_weight",
        "other.v_proj_weight",
        "other.out_proj.weight",
        "head.weight",
    ]


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_weights_are_selected(cell):
    model = cell(3, 4, num_layers=2, bidirectional=True)
    assert set(prunable_weights(model)) == {name for name, _ in model.named_parameters() if "weight" in name}


def test_regularized_are_exactly_the_prunable_ones():
    for model in (small(), Vision(), nn.LSTM(3, 4), nn.Transformer(8, 2, 1, 1, 16, batch_first=True)):
        regularized = param_groups(model)[0]["params"]
        assert [id(p) for p in regularized] == [id(p) for p in prunable_weights(model).values()]


def test_every_trainable_parameter_is_in_one_group():
    model = Vision()
    model.head.weight.requires_grad_(False)
    members = [id(p) for group in param_groups(model) for p in group["params"]]
    assert sorted(members) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_frozen_weights_are_pruned_but_not_regularized():
    model = small()
    model[0].weight.requires_grad_(False)
    assert "0.weight" in prunable_weights(model)
    assert id(model[0].weight) not in {id(p) for group in param_groups(model) for p in group["params"]}


def test_no_empty_group():
    assert [set(group) for group in param_groups(nn.Linear(2, 2, bias=False))] == [{"params", *GIVEN}]
    (only,) = param_groups(nn.LayerNorm(3), **GIVEN)
    assert only["weight_concentration"] == only["weight_decay"] == 0.0


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="no trainable parameter"):
        param_groups(nn.ReLU())
    with pytest.raises(ValueError, match="no trainable parameter"):
        param_groups(nn.Linear(2, 2).requires_grad_(False))


@pytest.mark.parametrize("option", list(GIVEN))
@pytest.mark.parametrize("value", [-1e-3, math.nan, math.inf])
def test_strengths_are_validated(option, value):
    with pytest.raises(ValueError, match=f"{option} must be a finite number of at least 0, got {value!r}"):
        param_groups(small(), **{option: value})


# ------------------------------------------------------------------------------------------------- shared parameters


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.first = nn.Linear(4, 4)
        self.second = self.first
        self.third = nn.Linear(4, 4)
        self.third.weight = self.first.weight
        self.lm_head = nn.Linear(4, 5, bias=False)
        self.lm_head.weight = self.embed.weight


def test_shared_weights_count_once_and_a_tied_head_is_an_embedding():
    model = Tied()
    assert list(prunable_weights(model)) == ["first.weight"]
    members = [id(p) for group in param_groups(model) for p in group["params"]]
    assert len(members) == len(set(members)) == len(list(model.parameters()))


@pytest.mark.parametrize("alias", ["first", "second", "third", "third.weight"])
def test_excluding_one_owner_excludes_the_tensor(alias):
    assert "first.weight" not in prunable_weights(Tied(), exclude=(alias,))


def test_two_parameters_in_the_same_memory_count_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[2].weight.data = model[0].weight.data
    assert list(prunable_weights(model)) == ["0.weight", "1.weight"]
    members = [id(p) for group in param_groups(model) for p in group["params"]]
    assert sorted(members) == sorted(id(p) for p in model.parameters())


def test_untied_after_a_deep_copy_of_one_side():
    model = Tied()
    model.lm_head = copy.deepcopy(model.lm_head)
    assert list(prunable_weights(model)) == ["first.weight", "lm_head.weight"]


# --------------------------------------------------------------------------------------------------- exclude, include


def layered():
    return nn.ModuleDict({name: nn.Linear(2, 2) for name in ("layer1", "layer10", "head")})


def test_names_are_whole_components():
    assert list(prunable_weights(layered(), exclude="layer1")) == ["layer10.weight", "head.weight"]


@pytest.mark.parametrize(
    "entry",
    [
        "head",
        "head.weight",
        re.compile(r"^head\."),
        lambda model: model["head"],
        lambda model: model["head"].weight,
    ],
)
def test_every_form_of_exclude(entry):
    model = layered()
    entry = entry(model) if callable(entry) else entry
    for exclude in (entry, [entry]):
        assert list(prunable_weights(model, exclude)) == ["layer1.weight", "layer10.weight"]
        regularized, rest = param_groups(model, exclude=exclude)
        assert len(regularized["params"]) == 2
        assert any(p is model["head"].weight for p in rest["params"])


def test_types_exclude_what_lies_below_them():
    model = nn.Sequential(nn.Linear(4, 4), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True))
    assert list(prunable_weights(model, exclude=nn.TransformerEncoderLayer)) == ["0.weight"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("heat", "'heat'"),
        ("layer", "names are given in full, as in 'layer1', 'layer1.bias', 'layer1.weight'"),
        (re.compile("conv"), "re.compile('conv')"),
        (nn.Conv2d, "torch.nn.modules.conv.Conv2d"),
        (nn.Linear(2, 2), "an instance of Linear"),
        (nn.Parameter(torch.zeros(2, 3)), "a parameter of shape (2, 3)"),
    ],
)
@pytest.mark.parametrize("option", ["exclude", "include"])
def test_an_entry_that_matches_nothing_is_named(option, entry, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        prunable_weights(layered(), **{option: entry})
    assert str(error.value).startswith(f"{option} matches nothing in the model")


@pytest.mark.parametrize("entry", [3, None, torch.float32])
def test_an_entry_of_no_known_form(entry):
    with pytest.raises(TypeError, match="exclude takes names"):
        prunable_weights(layered(), exclude=[entry])


def test_a_module_without_parameters_may_be_excluded():
    assert list(prunable_weights(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), exclude="1")) == ["0.weight"]


def test_include_restricts():
    model = layered()
    assert list(prunable_weights(model, include=["layer10", re.compile("head")])) == ["layer10.weight", "head.weight"]
    assert list(prunable_weights(model, exclude="head", include=["layer10", "head"])) == ["layer10.weight"]


def test_include_brings_in_an_embedding_only_by_its_own_name():
    model = nn.Sequential(nn.ModuleDict({"embed": nn.Embedding(4, 2), "proj": nn.Linear(2, 2)}))
    assert list(prunable_weights(model, include="0")) == ["0.proj.weight"]
    for entry in ("0.embed", nn.Embedding, model[0]["embed"], model[0]["embed"].weight):
        assert list(prunable_weights(model, include=entry)) == ["0.embed.weight"]


# ------------------------------------------------------------------------------------------- wrappers around the model


def compiled(model):
    return torch.compile(model, backend="eager")


def test_wrappers_are_looked_through():
    model = small()
    expected = {name: id(p) for name, p in prunable_weights(model).items()}
    for wrapped in (compiled(model), nn.DataParallel(model), compiled(nn.DataParallel(model))):
        assert {name: id(p) for name, p in prunable_weights(wrapped, exclude=()).items()} == expected
        assert len(param_groups(wrapped)[0]["params"]) == 2


def test_names_of_parts_that_are_compiled_on_their_own():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].compile(backend="eager")
    assert list(prunable_weights(model)) == ["0.weight", "1.weight"]
    model[0] = compiled(model[0])
    assert list(prunable_weights(model)) == ["0._orig_mod.weight", "1.weight"]
    assert prunable_weights(model).keys() <= model.state_dict().keys()


# ------------------------------------------------------------------------------------------------ what cannot be pruned


def lora_of_peft():
    layer = nn.Module()
    layer.base_layer = nn.Linear(4, 4)
    layer.lora_A = nn.ModuleDict({"default": nn.Linear(4, 2, bias=False)})
    layer.lora_B = nn.ModuleDict({"default": nn.Linear(2, 4, bias=False)})
    return layer


def lora_of_loralib():
    layer = nn.Linear(4, 4)
    layer.lora_A = nn.Parameter(torch.zeros(2, 4))
    layer.lora_B = nn.Parameter(torch.zeros(4, 2))
    return layer


def lora_of_torchtune():
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.zeros(4, 4))
    layer.lora_a = nn.Linear(4, 2, bias=False)
    layer.lora_b = nn.Linear(2, 4, bias=False)
    return layer


def lora_of_diffusers():
    layer = nn.Module()
    layer.linear = nn.Linear(4, 4)
    layer.lora = nn.Module()
    layer.lora.lora_down = nn.Linear(4, 2, bias=False)
    layer.lora.lora_up = nn.Linear(2, 4, bias=False)
    return layer


def pruned_by_torch():
    return prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5)


def weight_normed_by_hooks():
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(nn.Linear(4, 4))


REFUSED = {
    "lazy": (lambda: nn.LazyLinear(3), "run one batch through the model first"),
    "complex": (lambda: nn.Linear(2, 2, dtype=torch.complex64), "is complex"),
    "meta": (lambda: nn.Linear(2, 2, device="meta"), "meta device"),
    "float8": (lambda: nn.Linear(2, 2).to(torch.float8_e4m3fn), "prune before quantizing"),
    "parametrized": (lambda: parametrizations.weight_norm(nn.Linear(4, 4)), "remove_parametrizations"),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(4, 4)), "remove_parametrizations"),
    "old weight norm": (weight_normed_by_hooks, "remove_weight_norm"),
    "old spectral norm": (lambda: nn.utils.spectral_norm(nn.Linear(4, 4)), "remove_spectral_norm"),
    "pruned by torch": (pruned_by_torch, "from_torch_prune"),
    "lora of peft": (lora_of_peft, "merge the adapter first"),
    "lora of loralib": (lora_of_loralib, "merge the adapter first"),
    "lora of torchtune": (lora_of_torchtune, "merge the adapter first"),
    "lora of diffusers": (lora_of_diffusers, "merge the adapter first"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_has_no_magnitude_of_its_own_is_refused(case):
    make, message = REFUSED[case]
    model = nn.Sequential(make(), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        prunable_weights(model)
    assert str(error.value).startswith("0.")
    (advice,) = re.findall(r"exclude=\['(.*)'\]", str(error.value)) or ["0"]
    assert list(prunable_weights(model, exclude=advice)) == ["1.weight"]
    if any(parameter.requires_grad for parameter in model[0].parameters()):
        with pytest.raises(ValueError, match=re.escape(message)):
            param_groups(model)
    assert list(prunable_weights(model, exclude="0")) == ["1.weight"]


def test_the_way_out_works():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), pruned_by_torch())
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    prune.remove(model[1], "weight")
    assert list(prunable_weights(model)) == ["0.weight", "1.weight"]


def test_names_that_only_resemble_an_adapter():
    model = nn.ModuleDict({"flora": nn.Linear(2, 2), "explora_tion": nn.Linear(2, 2), "lorax": nn.Linear(2, 2)})
    assert len(prunable_weights(model)) == 3


@pytest.mark.parametrize(
    "part", [lambda w: w[:4], lambda w: w[2:5], lambda w: w.t(), lambda w: w[:, :3], lambda w: w.view(4, 12)]
)
@pytest.mark.parametrize("first", ["whole", "part"])
def test_weights_that_overlap_in_memory_are_refused(part, first):
    whole = nn.Parameter(torch.randn(6, 8))
    names = ["whole", "part"] if first == "whole" else ["part", "whole"]
    held = {"whole": whole, "part": nn.Parameter(part(whole.data))}
    model = nn.Module()
    for name in names:
        model.register_parameter(name, held[name])
    for select in (prunable_weights, param_groups):
        with pytest.raises(ValueError, match="overlap in memory without being equal") as error:
            select(model)
        assert re.search(r"\bwhole\b.*\bpart\b|\bpart\b.*\bwhole\b", str(error.value))
        with pytest.raises(ValueError, match="overlap in memory"):
            select(model, exclude="part")
    assert not prunable_weights(model, exclude=names)


def test_parts_of_one_memory_side_by_side_are_no_overlap():
    whole = torch.randn(6, 8)
    model = nn.Module()
    model.left, model.right = nn.Parameter(whole[:, :4]), nn.Parameter(whole[:, 4:])
    other = torch.randn(5, 4)
    model.upper, model.lower = nn.Parameter(other[:2]), nn.Parameter(other[2:])
    assert list(prunable_weights(model)) == ["left", "right", "upper", "lower"]


def test_integer_weights_are_refused_as_quantized():
    model = nn.Linear(2, 2)
    model.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"weight has dtype torch\.int8: prune before quantizing"):
        prunable_weights(model)
    assert len(param_groups(model)) == 1  # frozen, so that training has nothing to do with it


def test_sparse_weights_are_refused():
    model = nn.Linear(2, 2)
    model.weight = nn.Parameter(torch.eye(2).to_sparse())
    with pytest.raises(ValueError, match="stored sparse"):
        prunable_weights(model)


def test_torchscript_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(nn.Linear(2, 2))
        part = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.ReLU()))
        both = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="TorchScript"):
        prunable_weights(scripted)
    assert list(prunable_weights(part)) == ["0.weight"], "it holds nothing"
    with pytest.raises(ValueError, match=r"1\.weight is of a TorchScript .*exclude=\['1'\]"):
        prunable_weights(both)
    assert list(prunable_weights(both, exclude="1")) == ["0.weight"]


@pytest.mark.filterwarnings("ignore")
def test_exported_modules_are_refused():
    program = torch.export.export(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4)), (torch.tensor([1]),))
    for module in (program.module(), torch.export.unflatten(program)):
        with pytest.raises(ValueError, match=r"0\.weight is of a TorchScript or exported module"):
            prunable_weights(module)
        with pytest.raises(ValueError, match="exported module"):
            param_groups(module)
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4)))
    assert list(prunable_weights(traced)) == ["1.weight"], "whose layers are what they were"


@pytest.mark.filterwarnings("ignore")
def test_quantized_layers_of_torch_are_refused():
    if not torch.backends.quantized.supported_engines:
        pytest.skip("torch was built without quantized kernels")
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4)), {nn.Linear})
    with pytest.raises(ValueError, match="0 is quantized: prune before quantizing"):
        prunable_weights(model)
    assert all(name.startswith("1.") for name in prunable_weights(model, exclude="0"))
    fused = nn.Sequential(nn.Linear(4, 4), torch.ao.nn.intrinsic.quantized.LinearReLU(4, 4))
    with pytest.raises(ValueError, match=r"1 is quantized.*exclude=\['1'\]"):
        prunable_weights(fused)
    assert list(prunable_weights(fused, exclude="1")) == ["0.weight"]


def test_an_error_leaves_the_model_alone():
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ValueError, match="has no shape yet"):
        param_groups(model)
    model(torch.zeros(1, 2))
    assert list(prunable_weights(model)) == ["0.weight"]
