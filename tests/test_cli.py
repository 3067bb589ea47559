"""The command line: what it prints and writes, and that it runs nothing it reads."""

import json
import os
import pickle
import subprocess
import sys
import warnings
import zipfile

import pytest
import safetensors.torch
import torch
from torch import nn

from wcr_optim import cli
from wcr_optim.checkpoints import prunable_names, read_checkpoint
from wcr_optim.pruning import sparse_file
from wcr_optim.pruning.sparse_file import is_sparse_file, read_sparse, save_sparse


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(20, 16)
        self.conv = nn.Conv1d(16, 16, 3)
        self.norm = nn.BatchNorm1d(16)
        self.fc = nn.Linear(16, 40)
        self.head = nn.Linear(40, 16)
        self.again = nn.Linear(40, 16)
        self.again.weight = self.head.weight


WEIGHTS = ["conv.weight", "fc.weight", "head.weight"]
TOTAL = 16 * 16 * 3 + 16 * 40 + 40 * 16


@pytest.fixture
def state():
    return Net().state_dict()


@pytest.fixture
def checkpoint(tmp_path, state):
    path = tmp_path / "net.pt"
    torch.save({"epoch": 3, "model": state, "optimizer": {"state": {}, "lr": 0.1}}, path)
    return path


def run(capsys, *arguments):
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def run_json(capsys, *arguments):
    code, out, err = run(capsys, *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def refused(capsys, *arguments):
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert "Traceback" not in err
    return err


# ------------------------------------------------------------------------------------------------------ commands


def test_inspect_lists_every_tensor(capsys, checkpoint, state):
    result = run_json(capsys, "inspect", checkpoint)
    rows = {row["name"]: row for row in result["tensors"]}
    assert list(rows) == list(state)
    assert [name for name, row in rows.items() if row["prunable"]] == WEIGHTS
    assert rows["again.weight"]["same_as"] == "head.weight"
    assert rows["fc.weight"]["shape"] == [40, 16]
    assert rows["fc.weight"]["dtype"] == "float32"
    assert rows["fc.weight"]["sparsity"] == 0
    assert rows["norm.num_batches_tracked"]["sparsity"] == 1
    fc = state["fc.weight"].double().square().flatten().sort(descending=True).values
    assert rows["fc.weight"]["top_energy"] == pytest.approx(float(fc[:32].sum() / fc.sum()))
    assert 0 < rows["fc.weight"]["lossless_sparsity"] < 0.5
    total = result["total"]
    assert total["prunable"] == TOTAL
    assert total["elements"] == sum(tensor.numel() for name, tensor in state.items() if name != "again.weight")
    assert total["dense_bytes"] == sum(row.get("dense_bytes", 0) for row in rows.values())


def test_inspect_of_a_file_without_weights(capsys, tmp_path):
    torch.save({"bias": torch.tensor([1.0, 0.0])}, tmp_path / "x.pt")
    total = run_json(capsys, "inspect", tmp_path / "x.pt")["total"]
    assert (total["prunable"], total["sparsity_of_prunable"], total["sparsity"]) == (0, 0, 0.5)
    assert not {"top_energy", "lossless_sparsity"} & total.keys()
    code, out, _ = run(capsys, "inspect", tmp_path / "x.pt")
    assert code == 0
    (line,) = [line for line in out.splitlines() if line.startswith("prunable weights")]
    assert line.split() == ["prunable", "weights", "0", "0.0%"]


@pytest.mark.parametrize("value", ["NaN", "inf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inspect_of_weights_that_are_not_finite(capsys, checkpoint, state, value, dtype):
    sound = run_json(capsys, "inspect", checkpoint)
    state["fc.weight"] = state["fc.weight"].to(dtype)
    state["fc.weight"][0, :2] = torch.tensor([-float(value), 0.0])
    torch.save(state, checkpoint)
    result = run_json(capsys, "inspect", checkpoint)
    for row, before in zip(result["tensors"], sound["tensors"], strict=True):
        if row["name"] != "fc.weight":
            assert row == before
    (row,) = [row for row in result["tensors"] if row["name"] == "fc.weight"]
    assert row["energy"] == value
    assert row["sparsity"] == pytest.approx(1 / 640)
    assert row["prunable"]
    assert "top_energy" not in row
    total = result["total"]
    assert (total["prunable"], total["energy"]) == (TOTAL, value)
    assert total["sparsity_of_prunable"] == pytest.approx(1 / TOTAL)
    code, out, _ = run(capsys, "inspect", checkpoint)
    assert code == 0
    assert out.count(value) == 4


def test_inspect_knows_every_dtype(capsys, tmp_path):
    tensors = {name: torch.tensor([[0, 1, 2, 0]]).to(dtype) for name, dtype in sparse_file._DTYPES.items()}
    save_sparse(tensors, tmp_path / "all.safetensors")
    for row in run_json(capsys, "inspect", tmp_path / "all.safetensors")["tensors"]:
        assert row["dtype"] == row["name"]
        assert row["sparsity"] == (0.0 if row["name"] == "float8_e8m0fnu" else 0.5), "powers of two have no zero"
    run_json(capsys, "expand", tmp_path / "all.safetensors", "-o", tmp_path / "dense.safetensors")
    assert same(safetensors.torch.load_file(tmp_path / "dense.safetensors"), tensors)


def wide(tensor):
    return tensor.to(torch.complex128)


def same(a, b):
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(wide(a[name]), wide(b[name])) for name in a
    )


def test_inspect_prints_a_table(capsys, checkpoint):
    code, out, err = run(capsys, "inspect", checkpoint)
    assert code == 0
    assert "read 'model', left out epoch, optimizer" in err
    lines = out.splitlines()
    assert lines[0].split() == "tensor shape dtype sparsity top 5 % lossless dense sparse".split()  # noqa: SIM905
    (fc,) = [line for line in lines if line.startswith("fc.weight")]
    assert fc.split()[1:6] == ["40", "x", "16", "float32", "0.0%"]
    assert any(line.startswith("again.weight = head.weight") for line in lines)
    assert any(line.startswith("prunable weights") for line in lines)
    assert max(map(len, lines)) < 120


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("source", [".pt", ".safetensors"])
def test_prune_writes_exactly_the_largest_weights(capsys, tmp_path, state, scope, source):
    path = tmp_path / f"net{source}"
    if source == ".pt":
        torch.save(state, path)
    else:
        safetensors.torch.save_file({name: tensor.clone() for name, tensor in state.items()}, path)
        del state["again.weight"]  # dense safetensors know no ties: there it is a weight of its own
    result = run_json(capsys, "prune", path, "--sparsity", 0.9, "--scope", scope, "--exclude", "^again")
    output = tmp_path / "net.pruned.safetensors"
    assert result["output"] == str(output)
    assert is_sparse_file(output)
    pruned = read_sparse(output)
    expected = {name: state[name] for name in (WEIGHTS if source == ".safetensors" else WEIGHTS[:2])}
    for group in [list(expected)] if scope == "global" else [[name] for name in expected]:
        before = torch.cat([expected[name].flatten() for name in group])
        after = torch.cat([pruned[name].flatten() for name in group])
        count = round(0.9 * before.numel())
        smallest = before.abs().argsort()[:count]
        assert torch.equal(after, before.index_fill(0, smallest, 0.0))
    for name, tensor in state.items():
        if name not in expected:
            assert torch.equal(pruned[name], tensor)
    assert result["kept"] == sum(layer["kept"] for layer in result["layers"])
    assert "embed_tokens.weight" in result["left_dense"]


def test_prune_keeps_ties_and_reports(capsys, checkpoint, tmp_path, state):
    code, out, _ = run(capsys, "prune", checkpoint, "--sparsity", "0.95", "-o", tmp_path / "small.safetensors")
    assert code == 0
    pruned = read_sparse(tmp_path / "small.safetensors")
    assert list(pruned) == list(state)
    assert pruned["again.weight"].data_ptr() == pruned["head.weight"].data_ptr()
    kept = sum(int(pruned[name].count_nonzero()) for name in WEIGHTS)
    assert kept == TOTAL - round(0.95 * TOTAL)
    lines = out.splitlines()
    (line,) = [line for line in lines if line.startswith("prunable weights")]
    assert line.split()[2:] == [f"{TOTAL:,}", f"{kept:,}", f"{1 - kept / TOTAL:.2%}"]
    assert "left dense: embed_tokens.weight" in lines
    assert "small.safetensors" in lines[-1]


def test_layers_that_lose_every_weight_are_named(capsys, tmp_path):
    torch.save({"a.weight": torch.ones(4, 4), "b.weight": torch.full((4, 4), 0.1)}, tmp_path / "x.pt")
    _, out, _ = run(capsys, "prune", tmp_path / "x.pt", "--sparsity", "0.5")
    assert "b.weight  (lost every weight)" in out
    assert "a.weight  (lost" not in out


def test_there_and_back(capsys, checkpoint, tmp_path, state):
    sparse, dense = tmp_path / "sparse.safetensors", tmp_path / "dense.safetensors"
    run_json(capsys, "prune", checkpoint, "--sparsity", "0.9", "-o", sparse)
    result = run_json(capsys, "expand", sparse, "-o", dense)
    assert result["tensors"] == len(state)
    expanded = safetensors.torch.load_file(dense)
    assert all(torch.equal(expanded[name], tensor) for name, tensor in read_sparse(sparse).items())
    with safetensors.safe_open(dense, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    direct = tmp_path / "direct.safetensors"
    run_json(capsys, "prune", checkpoint, "--sparsity", "0.9", "-o", direct, "--dense")
    assert direct.read_bytes() == dense.read_bytes()
    again = tmp_path / "again.safetensors"
    run_json(capsys, "prune", sparse, "--sparsity", "0.9", "-o", again)
    assert all(
        torch.equal(a, b) for a, b in zip(read_sparse(again).values(), read_sparse(sparse).values(), strict=True)
    )


def test_help_and_version(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert "nothing in it is ever executed" in out
    assert run(capsys, "--version")[0] == 0


def test_as_a_program(checkpoint):
    command = [sys.executable, "-m", "wcr_optim.cli", "inspect", str(checkpoint), "--json"]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(finished.stdout)["total"]["prunable"] == TOTAL
    # A reader that goes away early is no error.
    with subprocess.Popen(command[:-1], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert "Error" not in process.stderr.read()


# ---------------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 1},
        lambda state: {"state": {"model": state}},
        lambda state: {"weights": state, "lr": 0.1},
        lambda state: {"model": state, "ema": state},
        lambda state: {"model": state, "optimizer": {}, "best_val_loss": torch.tensor(1.5), "rng": torch.ones(9)},
    ],
)
def test_state_dicts_are_found(tmp_path, state, wrap, suffix):
    torch.save(wrap(state), tmp_path / f"x{suffix}")
    found, _ = read_checkpoint(tmp_path / f"x{suffix}")
    assert list(found) == list(state)
    assert found["again.weight"].data_ptr() == found["head.weight"].data_ptr()


def test_several_state_dicts_need_a_choice(capsys, tmp_path, state):
    path = tmp_path / "gan.pt"
    torch.save({"generator": state, "discriminator": {"w": torch.ones(2, 2)}}, path)
    assert "several, generator, discriminator; choose one with --key" in refused(capsys, "inspect", path)
    assert run_json(capsys, "inspect", path, "--key", "discriminator")["total"]["elements"] == 4
    assert "its entries are generator, discriminator" in refused(capsys, "inspect", path, "--key", "critic")
    torch.save({"model": {"encoder": state, "decoder": {"w": torch.ones(2, 2)}}}, path)
    assert "several, model.encoder, model.decoder; choose one with --key" in refused(capsys, "inspect", path)
    assert run_json(capsys, "inspect", path, "--key", "model.decoder")["total"]["elements"] == 4
    assert "gan.pt: model' has no state dict 'critic'" in refused(capsys, "inspect", path, "--key", "model.critic")


def test_what_is_no_tensor_is_left_out_with_a_notice(tmp_path):
    torch.save({"w": torch.ones(2, 2), "epoch": 3, "name": "x"}, tmp_path / "x.pt")
    found, notices = read_checkpoint(tmp_path / "x.pt")
    assert list(found) == ["w"]
    assert notices == ["left out: epoch, name"]


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"echo executed > '{self.path}'",)


@pytest.mark.parametrize("command", [["inspect"], ["prune", "--sparsity", "0.5"], ["expand", "-o", "out.safetensors"]])
@pytest.mark.parametrize("form", ["torch", "legacy", "pickle", "safetensors"])
def test_a_pickle_is_never_executed(capsys, tmp_path, monkeypatch, command, form):
    monkeypatch.chdir(tmp_path)
    proof = tmp_path / "executed"
    path = tmp_path / ("model.safetensors" if form == "safetensors" else "model.pt")
    content = {"state_dict": {"w": torch.ones(3, 3)}, "extra": Malicious(proof)}
    if form in ("torch", "legacy"):
        torch.save(content, path, _use_new_zipfile_serialization=form == "torch")
    else:
        path.write_bytes(pickle.dumps(content["extra"]))
    err = refused(capsys, command[0], path, *command[1:])
    assert not proof.exists()
    assert not (tmp_path / "out.safetensors").exists()
    if form in ("torch", "legacy"):
        assert "only running its code could rebuild; none was run" in err
        assert "system" in err
    assert "weights_only" not in err  # torch's message recommends to turn the protection off
    # The file is what it is meant to be: loading it without protection does run the command.
    if form == "torch":
        torch.load(path, weights_only=False)
        assert proof.exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04", b"\x80\x02}q\x00.", os.urandom(300)])
@pytest.mark.parametrize("suffix", [".pt", ".bin", ".safetensors"])
def test_damaged_files_give_an_error(capsys, tmp_path, content, suffix):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    assert str(path) in refused(capsys, "inspect", path)


def test_truncated_files_give_an_error(capsys, tmp_path, state):
    torch.save(state, tmp_path / "x.pt")
    save_sparse(state, tmp_path / "x.safetensors")
    for path in (tmp_path / "x.pt", tmp_path / "x.safetensors"):
        whole = path.read_bytes()
        for cut in range(0, len(whole), len(whole) // 7):
            path.write_bytes(whole[:cut])
            refused(capsys, "inspect", path)


def test_other_contents_are_refused(capsys, tmp_path):
    for content, message in {
        "a list": ([torch.ones(2)], "holds a list, not a state dict"),
        "nothing": ({}, "it holds an empty dict"),
        "no tensors": ({"epoch": 3}, "it holds none, but epoch"),
        "a sparse tensor": ({"w": torch.eye(3).to_sparse()}, "'w' cannot be stored: layout torch.sparse_coo"),
    }.values():
        torch.save(content, tmp_path / "x.pt")
        assert message in refused(capsys, "inspect", tmp_path / "x.pt")
    torch.save({"b": torch.ones(3)}, tmp_path / "x.pt")
    assert "no weights to prune" in refused(capsys, "prune", tmp_path / "x.pt", "--sparsity", "0.5")
    torch.save({"w": torch.full((2, 2), float("nan"))}, tmp_path / "x.pt")
    assert "w holds NaN" in refused(capsys, "prune", tmp_path / "x.pt", "--sparsity", "0.5")


def factors():
    old_style = nn.utils.spectral_norm(nn.Linear(6, 4))
    old_style(torch.ones(1, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        old_norm = nn.utils.weight_norm(nn.Conv1d(4, 6, 3))
    return {
        "torch.nn.utils.prune.remove": nn.utils.prune.l1_unstructured(nn.Linear(6, 4), "weight", 2),
        "torch.nn.utils.remove_spectral_norm": old_style,
        "torch.nn.utils.remove_weight_norm": old_norm,
        "torch.nn.utils.parametrize.remove_parametrizations": nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)),
    }


@pytest.mark.parametrize("advice", factors())
def test_what_a_weight_is_computed_from_is_not_pruned(capsys, tmp_path, advice):
    model = nn.Sequential(factors()[advice], nn.Linear(4, 4))
    torch.save(model.state_dict(), tmp_path / "x.pt")
    assert advice in refused(capsys, "prune", tmp_path / "x.pt", "--sparsity", "0.5")
    rows = run_json(capsys, "inspect", tmp_path / "x.pt")["tensors"]
    assert [row["name"] for row in rows if row["prunable"]] == ["1.weight"]
    found = run_json(capsys, "prune", tmp_path / "x.pt", "--sparsity", "0.5", "--exclude", r"^0\.")
    assert [layer["name"] for layer in found["layers"]] == ["1.weight"]


def test_two_weights_called_g_and_v_are_no_weight_norm():
    state = {"w_g": torch.ones(4, 4), "w_v": torch.ones(4, 4)}
    assert prunable_names(state) == ["w_g", "w_v"]


@pytest.mark.parametrize("command", [["expand"], ["prune", "--sparsity", "0.5", "--dense"]])
def test_a_name_that_safetensors_keeps_for_itself_is_refused_before_anything_is_written(capsys, tmp_path, command):
    path = tmp_path / "x.safetensors"
    save_sparse({"__metadata__": torch.ones(4, 4), "w": torch.eye(4)}, path)
    before = path.read_bytes()
    assert "'__metadata__'" in refused(capsys, *command, path, "-o", path, "--force")
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [
        {"w": torch.zeros(1, 1).expand(2**20, 2**20)},
        dict.fromkeys(map(str, range(300)), torch.zeros(2**10, 1).expand(2**10, 2**10)),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "expand"])
def test_a_file_that_claims_more_than_it_stores_is_refused(capsys, tmp_path, command, content):
    torch.save(content, tmp_path / "x.pt")
    output = ["-o", tmp_path / "out.safetensors"] if command == "expand" else []
    assert "bytes and its tensors claim" in refused(capsys, command, tmp_path / "x.pt", *output)
    assert os.listdir(tmp_path) == ["x.pt"]


@pytest.mark.parametrize("command", ["inspect", "expand"])
def test_a_compressed_file_is_refused_before_it_takes_memory(capsys, tmp_path, monkeypatch, command):
    torch.save({"w": torch.zeros(2**16)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "x.pt", "w", 8) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    monkeypatch.setattr(torch, "load", None)
    output = ["-o", tmp_path / "out.safetensors"] if command == "expand" else []
    assert "entries claim" in refused(capsys, command, tmp_path / "x.pt", *output)
    assert not (tmp_path / "out.safetensors").exists()


def test_views_of_moderate_size_are_read(tmp_path):
    view = torch.arange(64.0).expand(64, 64)
    torch.save({"view": view, "other": view}, tmp_path / "x.pt")
    state, _ = read_checkpoint(tmp_path / "x.pt")
    assert same(state, {"view": view, "other": view})


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: ...")])
def test_too_little_memory_is_an_error_of_its_own(capsys, checkpoint, monkeypatch, error):
    def fails(*_):
        raise error

    monkeypatch.setattr(cli, "read_checkpoint", fails)
    assert "does not fit into the memory" in refused(capsys, "inspect", checkpoint)


def test_defects_are_not_taken_for_little_memory(checkpoint, monkeypatch):
    def fails(*_):
        raise RuntimeError("a defect")

    monkeypatch.setattr(cli, "read_checkpoint", fails)
    with pytest.raises(RuntimeError, match="a defect"):
        cli.main(["inspect", str(checkpoint)])


def test_lazily_negated_tensors_are_read(capsys, tmp_path):
    weight = torch.randn(4, 4)
    torch.save({"w": torch._neg_view(weight)}, tmp_path / "x.pt")
    run_json(capsys, "inspect", tmp_path / "x.pt")
    run_json(capsys, "expand", tmp_path / "x.pt", "-o", tmp_path / "out.safetensors")
    assert torch.equal(safetensors.torch.load_file(tmp_path / "out.safetensors")["w"], -weight)
    save_sparse({"w": torch._neg_view(weight)}, tmp_path / "sparse.safetensors")
    assert torch.equal(read_sparse(tmp_path / "sparse.safetensors")["w"], -weight)


# --------------------------------------------------------------------------------------------------- what is asked


def test_nothing_is_overwritten_without_force(capsys, checkpoint, tmp_path):
    output = tmp_path / "out.safetensors"
    output.write_bytes(b"precious")
    for command in (["prune", checkpoint, "--sparsity", "0.5"], ["expand", checkpoint]):
        assert "exists; use --force" in refused(capsys, *command, "-o", output)
        assert output.read_bytes() == b"precious"
    run_json(capsys, "prune", checkpoint, "--sparsity", "0.5", "-o", output, "--force")
    before = read_sparse(output)
    result = run_json(capsys, "expand", output, "-o", output, "--force")  # onto itself
    assert result["output_bytes"] > result["file_bytes"]
    assert all(torch.equal(before[name], t) for name, t in safetensors.torch.load_file(output).items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prune", "net.pt", "--sparsity", "95"], r"sparsity must lie in [0, 1], got 95.0"),
        (["prune", "net.pt", "--sparsity", "nan"], r"sparsity must lie in [0, 1], got nan"),
        (["prune", "net.pt", "--sparsity", "0.5", "--exclude", "("], "exclude is not a regular expression: '('"),
        (["prune", "net.pt", "--sparsity", "0.5", "--exclude", "classifier"], "exclude matches no name: 'classifier'"),
        (["prune", "net.pt", "--sparsity", "0.5", "--exclude", "weight"], "no weights to prune"),
        (["prune", "net.pt", "--sparsity", "0.5", "-o", "out.pt"], "has to be a .safetensors file, got 'out.pt'"),
        (["prune", "net.pt", "--sparsity", "0.5", "-o", "no/out.safetensors"], "there is no folder 'no'"),
        (["prune", "net.pt"], "required: --sparsity"),
        (["expand", "net.pt"], "required: -o/--output"),
        (["inspect", "nowhere.pt"], "nowhere.pt"),
        (["inspect", "nowhere.safetensors"], "nowhere.safetensors"),
        (["inspect", "net.onnx"], "the suffix has to be one of .safetensors, .pt, .pth, .bin"),
        (["inspect", "folder.pt"], "'folder.pt' is not a regular file"),
        (["squash", "net.pt"], "invalid choice: 'squash'"),
        ([], "required"),
    ],
)
def test_errors_say_what_to_do(capsys, checkpoint, monkeypatch, arguments, message):
    monkeypatch.chdir(checkpoint.parent)
    (checkpoint.parent / "folder.pt").mkdir()
    before = sorted(os.listdir())
    assert message in refused(capsys, *arguments)
    assert sorted(os.listdir()) == before


def test_a_missing_package_is_named(capsys, checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert "pip install 'wcr_optim[files]'" in refused(capsys, "prune", checkpoint, "--sparsity", "0.5")


# ----------------------------------------------------------------------------------------------- what is a weight


def names(*dense, weights=()):
    state = {name: torch.ones(4, 4) for name in (*dense, *weights)}
    assert prunable_names(state) == list(weights)


def test_names_of_what_stays_dense():
    names(
        "model.embed_tokens.weight",
        "embeddings.word_embeddings.weight",
        "transformer.wte.weight",
        "transformer.wpe.weight",
        "shared.weight",
        "tok_emb.weight",
        "pos_embed",
        "cls_token",
        "pos_encoder.pe",
        "encoder.relative_attention_bias.weight",
        "attn.relative_position_bias_table",
        "attn.bias",
        "attn.bias_k",
        "layers.0.attn_mask",
        "norm1.weight",
        "final_layer_norm.weight",
        "fc.weight_scale",
        "q_proj.lora_A.default.weight",
        "q_proj.lora_B.default.weight",
        "q_proj.lora_a.weight",
        "to_q.lora.down.weight",
        weights=(
            "lm_head.weight",
            "patch_embed.proj.weight",
            "attn.in_proj_weight",
            "lstm.weight_ih_l0",
            "h.0.attn.c_attn.weight",
            "features.0.weight",
            "token_mixer.fc1.weight",
            "w",
        ),
    )


def test_only_floating_matrices_are_weights():
    state = {
        "vector": torch.ones(4),
        "index": torch.ones(4, 4, dtype=torch.int64),
        "quantized": torch.ones(4, 4).to(torch.float8_e4m3fn),
        "empty": torch.ones(4, 0),
        "half": torch.ones(4, 4).bfloat16(),
    }
    assert prunable_names(state) == ["half"]


def test_a_weight_tied_to_an_embedding_stays_dense():
    weight = torch.ones(4, 4)
    assert prunable_names({"lm_head.weight": weight, "wte.weight": weight, "fc.weight": weight.clone()}) == [
        "fc.weight"
    ]
    assert prunable_names({"a.weight": weight, "b.weight": weight}) == ["a.weight"]
    assert prunable_names({"a.weight": weight, "b.weight": weight}, exclude=["^b"]) == []


def test_names_agree_with_modules():
    transformers = pytest.importorskip("transformers")
    from wcr_optim.parameters import prunable_weights

    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    for model in (
        Net(),
        nn.Transformer(16, 2, 1, 1, 32, batch_first=True),
        nn.LSTM(8, 8, bidirectional=True),
        transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32, bos_token_id=0, eos_token_id=1)
        ),
        transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, **small)),
        transformers.BertModel(transformers.BertConfig(vocab_size=32, **small)),
    ):
        assert prunable_names(model.state_dict()) == list(prunable_weights(model))
