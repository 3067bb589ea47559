"""PEFT: adapters trained with and without a penalty, merged, then pruned."""

import re

import pytest
import torch
from reference import assert_same
from tiny_language import arguments, batches, logged, network, plain_loop, text

import wcr_optim
from wcr_optim import WCR, metrics, param_groups, pruning

pytest.importorskip("peft")
from peft import LoraConfig, get_peft_model
from transformers import Trainer

from wcr_optim.integrations.transformers import PrunedEvaluationCallback, SparsityTargetCallback, grouped

# peft 0.21 asks transformers 5.23 for an attribute by the name that it is losing in version 6.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

STEPS = 12
LORA = re.compile("lora_")


def adapted():
    model = get_peft_model(
        network(),
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"),
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if LORA.search(name):  # the B of a new adapter is zero, and then nothing could be concentrated
                p.copy_(torch.randn(p.shape, generator=generator) / 10)
    return model


def trainer_of(folder, model, optimizer=None, pair=None, callbacks=None, **changes):
    return Trainer(
        model,
        arguments(folder, label_names=["labels"], **changes),
        train_dataset=text(),
        eval_dataset=text(16, seed=2),
        optimizers=(optimizer, None),
        optimizer_cls_and_kwargs=pair,
        callbacks=callbacks,
    )


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def test_param_groups_says_what_pruning_an_adapted_model_would_mean():
    with pytest.raises(ValueError, match=r"low-rank adapter.*merge_and_unload\(\).*exclude="):
        param_groups(adapted())
    (group,) = param_groups(adapted(), exclude=LORA)
    assert len(group["params"]) == 2 * 2 * 3
    assert group["weight_concentration"] == 0.0


@pytest.mark.parametrize("regularized", [False, True])
def test_train_merge_prune(regularized, tmp_path):
    plain, framed = adapted(), adapted()
    make = {
        False: lambda model: WCR(torch.optim.AdamW(param_groups(model, exclude=LORA), lr=1e-2)),
        True: lambda model: WCR(torch.optim.AdamW(trainable(model), lr=1e-2), 1.0, form="scale_free"),
    }[regularized]
    optimizer = make(plain)
    before = metrics.optimizer_concentration(optimizer).mean()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    losses = plain_loop(plain, optimizer, batches(text(), STEPS), scheduler)
    trainer = trainer_of(tmp_path, framed, make(framed))
    trainer.train()
    assert_same(plain, framed)
    assert logged(trainer, "loss") == losses
    base = dict(network().named_parameters())
    for name, p in framed.named_parameters():
        if not LORA.search(name):
            plain_name = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(p, base[plain_name]), "the base is frozen"
    rise = metrics.optimizer_concentration(optimizer).mean() - before
    assert rise > 0.2 if regularized else rise < 0.1

    batch = next(batches(text(16, seed=2), 1, size=16))
    framed.eval()
    with torch.no_grad():
        expected = framed(**batch).logits
        merged = framed.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-5)
        masks = pruning.magnitude_masks(merged, 0.5, exclude="lm_head")
        pruning.apply_(merged, masks)
        weights = pruning.prunable_weights(merged, "lm_head")
        assert sum((w == 0).sum().item() for w in weights.values()) == round(
            0.5 * sum(w.numel() for w in weights.values())
        )
        assert torch.isfinite(merged(**batch).loss)
    pruning.save_sparse(merged, tmp_path / "merged.safetensors")
    fresh = network()
    pruning.load_sparse(fresh, tmp_path / "merged.safetensors")
    assert_same(merged, fresh)


def test_pairs_that_the_trainer_makes_optimizers_of(tmp_path):
    pair = (wcr_optim.AdamW, {"lr": 1e-2, "weight_concentration": 1e-2})
    trainer = trainer_of(tmp_path, adapted(), pair=pair, max_steps=2)
    trainer.train()
    assert len(metrics.optimizer_concentration(trainer.optimizer)) == 2 * 2 * 3, "the factors, and no frozen weight"
    trainer = trainer_of(tmp_path, adapted(), pair=grouped(wcr_optim.AdamW, lr=1e-2, exclude=LORA), max_steps=2)
    trainer.train()
    assert [group["weight_concentration"] for group in trainer.optimizer.param_groups] == [0.0]


def test_resumes_bit_for_bit_from_an_adapters_folder(tmp_path):
    def run(folder, **resume):
        model = adapted()
        optimizer = WCR(torch.optim.AdamW(trainable(model), lr=1e-2), form="scale_free")
        callback = SparsityTargetCallback(0.5, tail_energy=0.1, every=1, total_steps=40)
        trainer = trainer_of(folder, model, optimizer, callbacks=[callback], save_strategy="steps", save_steps=5)
        trainer.train(**resume)
        return model

    straight = run(tmp_path / "straight")
    folder = tmp_path / "straight" / "checkpoint-5"
    assert (folder / "adapter_model.safetensors").exists()
    assert_same(straight, run(tmp_path / "resumed", resume_from_checkpoint=str(folder)))


def test_pruned_evaluation_asks_for_the_merged_model(tmp_path):
    with pytest.raises(ValueError, match="merge the adapter first"):
        PrunedEvaluationCallback(trainer_of(tmp_path, adapted()), [0.5])
