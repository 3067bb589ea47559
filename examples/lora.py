"""PEFT: fine-tune with low-rank adapters, merge them, prune once; and what a penalty on the adapters can do for that.

A tiny Llama-shaped model is trained on some files of the Python standard library, then fine-tuned on others in three
ways. Nothing is downloaded; half a minute on a CPU. Needs transformers, accelerate and peft.
"""

import copy
import inspect
import math
import tempfile
from importlib import import_module

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from wcr_optim import WCR, param_groups
from wcr_optim.integrations.transformers import PrunedEvaluationCallback, SparsityTargetCallback

CONTEXT, SPARSITIES = 64, (0.7, 0.9)
FIRST = ("argparse", "ast", "difflib", "doctest", "pdb", "typing")
THEN = ("asyncio.base_events", "unittest.mock", "unittest.case", "email.message", "http.client")
TEST = ("asyncio.streams", "http.server", "email.header")


def windows(modules):
    """Return source code cut into windows of bytes."""
    text = "".join(inspect.getsource(import_module(module)) for module in modules).encode()
    rows = torch.tensor(list(text)).unfold(0, CONTEXT, CONTEXT)
    return [{"input_ids": row, "labels": row} for row in rows]


def train(model, optimizer, modules, steps, callbacks=()):
    """Train with the Trainer."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=8,
            lr_scheduler_type="cosine",
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        rows = windows(modules)
        Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None), callbacks=list(callbacks)).train()


def bits(model):
    """Return bits per byte of the test files at every sparsity, pruned once."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_eval_batch_size=64,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = Trainer(model, arguments, eval_dataset=windows(TEST)[:256])
        trainer.add_callback(PrunedEvaluationCallback(trainer, SPARSITIES))
        found = trainer.evaluate()
    return [found[key] / math.log(2) for key in ("eval_loss", *(f"eval_loss_at_{s:g}" for s in SPARSITIES))]


def with_adapters(model, strength):
    """Fine-tune adapters, with a penalty on their factors if its strength is not 0, and merge them."""
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    factors = [p for p in adapted.parameters() if p.requires_grad]
    train(adapted, WCR(torch.optim.AdamW(factors, lr=3e-3), strength, form="scale_free"), THEN, 100)
    return adapted.merge_and_unload()


def with_all_weights(model):
    """Fine-tune everything, and drive the weights to where pruning takes little."""
    groups = param_groups(model, weight_decay=0.1, exclude="lm_head")
    optimizer = WCR(torch.optim.AdamW(groups, lr=1e-3), form="per_unit")
    train(model, optimizer, THEN, 100, [SparsityTargetCallback(sparsity=0.8)])
    return model


def main():
    """Fine-tune in three ways, and print what is left of each after pruning."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=256, max_position_embeddings=CONTEXT, use_cache=False, **sizes)
    start = LlamaForCausalLM(config)
    train(start, torch.optim.AdamW(start.parameters(), lr=3e-3, weight_decay=0.1), FIRST, 200)
    rows = {
        "not fine-tuned": bits(start),
        "adapters": bits(with_adapters(copy.deepcopy(start), 0.0)),
        "adapters + WCR": bits(with_adapters(copy.deepcopy(start), 1e-2)),
        "all weights + WCR": bits(with_all_weights(copy.deepcopy(start))),
    }
    print("bits per byte of test files, after one-shot pruning to a sparsity of")
    print(f"{'':19}" + "".join(f"{100 * sparsity:8g} %" for sparsity in (0, *SPARSITIES)))
    for name, values in rows.items():
        print(f"{name:19}" + "".join(f"{value:10.2f}" for value in values))


if __name__ == "__main__":
    main()
