"""Hugging Face's Trainer: a tiny Llama-shaped model that is trained for pruning, beside one that is not.

Reads bytes of the Python standard library's source, so nothing is downloaded; half a minute on a CPU. Needs
transformers and accelerate.
"""

import inspect
import math
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import wcr_optim
from wcr_optim.integrations.transformers import (
    ConcentrationCallback,
    PrunedEvaluationCallback,
    SparsityTargetCallback,
    grouped,
)

STEPS, CONTEXT = 200, 64
SPARSITIES = (0.5, 0.7, 0.9)
TRAINING_MODULES, TEST_MODULES = ("argparse", "ast", "difflib", "doctest", "pdb", "typing"), ("shutil", "tarfile")


def windows(modules):
    """Return source code cut into windows of bytes."""
    text = "".join(inspect.getsource(__import__(module)) for module in modules).encode()
    rows = torch.tensor(list(text)).unfold(0, CONTEXT, CONTEXT)
    return [{"input_ids": row, "labels": row} for row in rows]


def train(folder, concentrate):
    """Train with the Trainer; return its last evaluation."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            use_cache=False,
        )
    )
    trainer = Trainer(
        model,
        TrainingArguments(
            folder,
            max_steps=STEPS,
            per_device_train_batch_size=8,
            per_device_eval_batch_size=64,
            lr_scheduler_type="cosine",
            warmup_steps=20,
            logging_steps=100,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=windows(TRAINING_MODULES),
        eval_dataset=windows(TEST_MODULES)[:256],
        # The groups of param_groups: norms and embeddings stay out, and so does lm_head.
        optimizer_cls_and_kwargs=grouped(
            wcr_optim.AdamW,
            lr=3e-3,
            weight_decay=0.1,
            weight_concentration=1.0 if concentrate else 0.0,
            form="per_unit",
        ),
        callbacks=[SparsityTargetCallback(sparsity=0.9)] if concentrate else None,
    )
    trainer.add_callback(ConcentrationCallback(trainer))
    trainer.add_callback(PrunedEvaluationCallback(trainer, SPARSITIES))
    trainer.train()
    return trainer.evaluate()


def main():
    """Train both models, and print the bits that each needs per byte, pruned once and never retrained."""
    names = ["eval_loss", *(f"eval_loss_at_{sparsity:g}" for sparsity in SPARSITIES)]
    with tempfile.TemporaryDirectory() as folder:
        rows = {name: train(folder, concentrate) for name, concentrate in (("AdamW", False), ("AdamW + WCR", True))}
    print("bits per byte of test files, after one-shot pruning to a sparsity of")
    print(f"{'':14}" + "".join(f"{100 * sparsity:8g} %" for sparsity in (0, *SPARSITIES)))
    for name, metrics in rows.items():
        print(f"{name:14}" + "".join(f"{metrics[key] / math.log(2):10.2f}" for key in names))


if __name__ == "__main__":
    main()
