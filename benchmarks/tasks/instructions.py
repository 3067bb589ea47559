"""Fine-tuning of a causal language model from the hub, on instructions or on questions of common sense.

The model is $WCR_OPTIM_MODEL, a folder that `save_pretrained` wrote (tokenizer included) or a name on the hub. Data
come as `benchmarks.tasks.hub` says, from the folders `instructions` and `commonsense` of $WCR_OPTIM_DATA or the hub.

instructions: rows of instruction, input (may be missing) and output, as in Alpaca; measured in bits per byte of the
answers, so that models with other tokenizers compare.
commonsense: rows of question, choices and answerKey, as in CommonsenseQA; measured by the share of questions whose
right choice has the highest likelihood per byte.

Only the answers count in the loss. Embeddings and the output layer stay dense.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.tasks import Task, epochs, hub

MODEL = "WCR_OPTIM_MODEL"
"""Environment variable: folder or hub name of the model that is fine-tuned."""

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M"
SOURCES = {"instructions": "tatsu-lab/alpaca", "commonsense": "tau/commonsense_qa"}
TOKENS = 512  # of an example; longer ones lose the end of the answer, then the beginning of the prompt
BATCH = 16
EPOCHS = 3
EVALUATED = 512  # examples of a split that are measured
SHARPNESS_TOKENS = 2048  # padding counted
IGNORED = -100  # in place of the tokens that are not predicted

Batch = dict[str, Tensor]


class Example(NamedTuple):
    """A prompt, the possible answers to it, and which of them is right."""

    prompt: str
    answers: tuple[str, ...]
    right: int = 0


class Encoded(NamedTuple):
    """Tokens of a prompt and an answer, how many of them are the prompt's, and the bytes of the answer's tokens."""

    tokens: tuple[int, ...]
    prompt: int
    size: int


def instruction(row: Mapping[str, Any]) -> Example:
    """Lay out a row of instruction, input and output."""
    given = f"\nInput: {row['input']}" if _is_there(row.get("input")) else ""
    return Example(f"Instruction: {row['instruction']}{given}\nAnswer:", (f" {row['output']}",))


def question(row: Mapping[str, Any]) -> Example:
    """Lay out a row of question, choices and answerKey.

    Raises:
        ValueError: If choices are no lists label and text of one length, or answerKey is none of the labels.

    """
    choices, key = row["choices"], row["answerKey"]
    if not isinstance(choices, Mapping) or not {"label", "text"} <= choices.keys():
        raise ValueError(f"choices must be label and text, a list each, as in CommonsenseQA, got {choices!r}")
    labels, texts = choices["label"], choices["text"]
    if len(labels) != len(texts):
        raise ValueError(f"choices must have as many labels as texts, got {labels!r} and {texts!r}")
    if key not in labels:
        raise ValueError(f"answerKey must be one of the labels {labels!r}, got {key!r}")
    answers = tuple(f" {text}" for text in texts)
    return Example(f"Question: {row['question']}\nAnswer:", answers, labels.index(key))


def _is_there(value: object) -> bool:
    return value is not None and value != ""  # 0 is an answer, too


LAYOUTS: dict[str, tuple[Callable[[Mapping[str, Any]], Example], tuple[str, ...]]] = {
    "instructions": (instruction, ("instruction", "output")),
    "commonsense": (question, ("question", "choices", "answerKey")),
}


def load(name: str) -> dict[str, list[Example]]:
    """Load the examples of each split; rows without an answer are left out.

    Raises:
        ValueError: If a column is missing, a split has no answers, or a row is not as it should be.

    """
    layout, columns = LAYOUTS[name]
    found = hub.load(name, SOURCES[name])
    for column in columns:
        hub.column(found["train"], column)
    answered = _answered(found, columns[-1])
    if not answered["test"]:
        # CommonsenseQA keeps its test answers to itself: what it calls validation is the test then.
        found = hub.with_all_splits({"train": found["train"], "test": found["validation"]}, name)
        answered = _answered(found, columns[-1])
    empty = [split for split, rows in answered.items() if not rows]
    if empty:
        raise ValueError(f"{name}: no row of {', '.join(empty)} has an answer in the column {columns[-1]}")
    examples: dict[str, list[Example]] = {}
    for split, rows in answered.items():
        examples[split] = []
        for place, row in rows.items():
            try:
                examples[split].append(layout(row))
            except ValueError as error:
                raise ValueError(f"{name} {split}: row {place}, {str(row[columns[0]])[:60]!r}: {error}") from error
    return examples


def _answered(found: Mapping[str, Iterable[Mapping[str, Any]]], column: str) -> dict[str, dict[int, Mapping[str, Any]]]:
    """Return the rows that have something in a column, by split and place."""
    return {
        split: {place: row for place, row in enumerate(rows) if _is_there(row[column])} for split, rows in found.items()
    }


def source() -> str:
    """Return the folder or hub name of the model."""
    return os.environ.get(MODEL) or DEFAULT_MODEL


def pretrained(kind: str) -> Any:
    """Load what a class of `transformers` makes of the model's folder or hub name.

    Args:
        kind: Name of the class, such as AutoTokenizer.

    Raises:
        ImportError: If transformers is not installed.
        FileNotFoundError: If the model can be had neither from a folder nor from the hub.

    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError("fine-tuning needs transformers: pip install 'wcr_optim[bench]'") from error
    try:
        return getattr(transformers, kind).from_pretrained(source())
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"no model at {source()!r} ({str(error).splitlines()[0]}); set {MODEL} to a folder with a model and its "
            "tokenizer as save_pretrained writes them, or to a name on the hub where there is a network"
        ) from error


def encoded(tokenizer: Any, example: Example, answer: int) -> Encoded:
    """Turn a prompt and one of its answers into at most TOKENS tokens, the last of which ends the text."""
    prompt = tokenizer(example.prompt, add_special_tokens=True)["input_ids"]
    text = example.answers[answer]
    tail = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(tail) > TOKENS // 2:
        tail = tail[: TOKENS // 2]
        text = tokenizer.decode(tail)  # bits are counted for what is left, and so must bytes be
    if tokenizer.eos_token_id is not None:
        tail = [*tail, tokenizer.eos_token_id]
    prompt = prompt[-(TOKENS - len(tail)) :]
    return Encoded((*prompt, *tail), len(prompt), len(text.encode()))


def collated(rows: Sequence[Encoded]) -> Batch:
    """Pad rows on the right: input_ids, attention_mask, and labels of the answers only, shape (rows, longest)."""
    longest = max(len(row.tokens) for row in rows)
    batch = {
        "input_ids": torch.zeros(len(rows), longest, dtype=torch.long),
        "attention_mask": torch.zeros(len(rows), longest, dtype=torch.long),
        "labels": torch.full((len(rows), longest), IGNORED),
    }
    for place, row in enumerate(rows):
        tokens = torch.tensor(row.tokens)
        batch["input_ids"][place, : len(tokens)] = tokens
        batch["attention_mask"][place, : len(tokens)] = 1
        batch["labels"][place, row.prompt : len(tokens)] = tokens[row.prompt :]
    return batch


def token_losses(network: nn.Module, batch: Batch) -> Tensor:
    """Return the negative log-likelihood of each token but the first, in nats, 0 where it is not predicted."""
    logits = network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    targets = batch["labels"][:, 1:]
    flat = cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return flat.view(targets.shape)


def loss(network: nn.Module, batch: Batch) -> Tensor:
    """Return the mean negative log-likelihood of the answers' tokens, in nats."""
    return token_losses(network, batch).sum() / (batch["labels"][:, 1:] != IGNORED).sum()


@torch.no_grad()
def answer_losses(network: nn.Module, rows: Sequence[Encoded], batch: int = 32) -> Tensor:
    """Return the negative log-likelihood of each row's answer, in nats."""
    device = next(network.parameters()).device
    found = []
    for start in range(0, len(rows), batch):
        part = {name: tensor.to(device) for name, tensor in collated(rows[start : start + batch]).items()}
        found.append(token_losses(network, part).sum(1).cpu())
    return torch.cat(found)


def bits_per_byte(network: nn.Module, rows: Sequence[Encoded]) -> float:
    """Return bits per byte of the answers."""
    return answer_losses(network, rows).sum().item() / math.log(2) / sum(row.size for row in rows)


def accuracy(network: nn.Module, questions: Sequence[Sequence[Encoded]], right: Sequence[int]) -> float:
    """Return the share of questions whose right answer has the highest likelihood per byte, in percent."""
    rows = [row for answers in questions for row in answers]
    per_byte = answer_losses(network, rows) / torch.tensor([row.size for row in rows])
    chosen = [int(part.argmin()) for part in per_byte.split([len(answers) for answers in questions])]
    return 100 * sum(a == b for a, b in zip(chosen, right, strict=True)) / len(right)


def output_layer() -> tuple[str, ...]:
    """Return the name of the layer that makes logits; nothing where it is tied to the embeddings, dense anyway."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):  # names only: no weights are read
        network = AutoModelForCausalLM.from_config(pretrained("AutoConfig"))
    layer, embeddings = network.get_output_embeddings(), network.get_input_embeddings()
    if layer is None or layer.weight is embeddings.weight:
        return ()
    return tuple(name for name, module in network.named_modules() if module is layer)


def model_hash() -> str:
    """Return a hash of the model: of its folder's files, or of its name and revision on the hub."""
    folder = Path(source())
    if not folder.is_dir():
        config = pretrained("AutoConfig")
        return hashlib.sha256(f"{source()} {getattr(config, '_commit_hash', None)}".encode()).hexdigest()
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            for chunk in iter(partial(file.read, 1 << 20), b""):
                digest.update(chunk)
    return digest.hexdigest()


def _sharpness_batch(rows: Sequence[Encoded]) -> Batch:
    """Return as many examples of a drawn batch as have SHARPNESS_TOKENS tokens, padding counted, at least one."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = [rows[order[0]]]
    for place in order[1:]:
        longest = max(len(row.tokens) for row in (*chosen, rows[place]))
        if (len(chosen) + 1) * longest > SHARPNESS_TOKENS:
            break
        chosen.append(rows[place])
    return collated(chosen)


def _batches(rows: Sequence[Encoded], batch: int, seed: int, steps: int) -> Iterator[Batch]:
    places = torch.arange(len(rows))
    for chosen, _ in epochs(places, places, min(batch, len(rows)), seed, steps):
        yield collated([rows[place] for place in chosen.tolist()])


def _task(name: str) -> Task:
    examples = load(name)
    tokenizer = pretrained("AutoTokenizer")
    train = [encoded(tokenizer, example, example.right) for example in examples["train"]]
    measured = {split: examples[split][:EVALUATED] for split in hub.SPLITS}
    answers = {
        split: [[encoded(tokenizer, example, k) for k in range(len(example.answers))] for example in some]
        for split, some in measured.items()
    }

    def model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        network: nn.Module = pretrained("AutoModelForCausalLM")
        return network.float()  # whatever the checkpoint's dtype: small steps are lost in bfloat16

    def evaluate(network: nn.Module, split: str) -> float:
        if name == "commonsense":
            return accuracy(network, answers[split], [example.right for example in measured[split]])
        return bits_per_byte(network, [rows[0] for rows in answers[split]])

    return Task(
        name=name,
        suite="language",
        metric="accuracy" if name == "commonsense" else "bits_per_byte",
        best=max if name == "commonsense" else min,
        steps=EPOCHS * max(1, len(train) // BATCH),
        model=model,
        batches=lambda seed, steps, scale: _batches(train, BATCH * scale, seed, steps),
        loss=loss,
        evaluate=evaluate,
        exclude=output_layer(),
        sharpness_batch=lambda: _sharpness_batch(train),
        goals=(0.5, 0.7, 0.8),
        tolerance=0.5 if name == "commonsense" else 0.05,
        lr={"adamw": 2e-5},
        weight_decay={"adamw": 1e-2},
        data=f"{SOURCES[name] if hub.local(name) is None else name + ', a folder'}; model {source()}",
        data_hash=hashlib.sha256(f"{examples} {model_hash()}".encode()).hexdigest()[:12],
    )


TASKS: dict[str, Callable[[], Task]] = {name: partial(_task, name) for name in SOURCES}
