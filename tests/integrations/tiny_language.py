"""A Llama-shaped model of a few thousand weights, text for it, and the loop that every framework is compared with."""

import torch
from torch import nn

TOKENS, CONTEXT, BATCH = 32, 12, 4


def network(tied=False, dropout=0.0):
    """The same weights at every call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=TOKENS,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        attention_dropout=dropout,
        tie_word_embeddings=tied,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def text(examples=48, seed=1):
    """Counting with a few steps of surprise: something that such a model can learn."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(TOKENS, (examples, 1), generator=generator)
    steps = torch.randint(1, 3, (examples, 1), generator=generator)
    noise = (torch.rand(examples, CONTEXT, generator=generator) < 0.1).long()
    rows = (starts + steps * torch.arange(CONTEXT) + noise) % TOKENS
    return [{"input_ids": row, "labels": row.clone()} for row in rows]


def batches(data, steps, size=BATCH):
    """The batches of a run without shuffling, epoch after epoch; a last incomplete batch is one too."""
    epoch = [data[first : first + size] for first in range(0, len(data), size)]
    for step in range(steps):
        rows = epoch[step % len(epoch)]
        yield {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def plain_loop(model, optimizer, micro_batches, scheduler=None, target=None, accumulate=1, clip=None, autocast=False):
    """Train as a loop without a framework does; return the loss of every step, as the Trainer defines it."""
    model.train()
    if hasattr(optimizer, "train"):
        optimizer.train()
    losses = []
    micro_batches = list(micro_batches)
    for first in range(0, len(micro_batches), accumulate):
        together = micro_batches[first : first + accumulate]
        items = sum(batch["labels"][:, 1:].numel() for batch in together)
        optimizer.zero_grad()
        parts = []
        for batch in together:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(**batch, num_items_in_batch=torch.tensor(items)).loss
            loss.backward()
            parts.append(loss.detach())
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        total = torch.stack(parts).sum()
        if target is not None:
            target.step(total)
        if scheduler is not None:
            scheduler.step()
        losses.append(total.item())
    return losses


def arguments(folder, **changes):
    """Arguments of a Trainer on this machine's CPU that logs every step and shuffles nothing."""
    from transformers import TrainingArguments

    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "dataloader_pin_memory": False,  # torch warns where there is no accelerator
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": 16,
        "max_steps": 12,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        "max_grad_norm": 0.0,
    }
    return TrainingArguments(**{**defaults, **changes})


def logged(trainer, key):
    """The values of a key in the Trainer's log."""
    return [row[key] for row in trainer.state.log_history if key in row]
