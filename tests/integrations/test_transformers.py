"""Hugging Face's Trainer with the optimizers and callbacks of this package; the real one, nothing stands in for it."""

import copy
import importlib
import json
import math
import os
import pickle
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import assert_same
from tiny_language import arguments, batches, logged, network, plain_loop, text
from torch.optim.lr_scheduler import LambdaLR

import wcr_optim
from wcr_optim import SAM, SSAM, WCR, HoyerDecay, L1Decay, SparsityTarget, metrics, param_groups, pruning

transformers = pytest.importorskip("transformers")
from transformers import Trainer, TrainerCallback  # noqa: E402

from wcr_optim.integrations.transformers import (  # noqa: E402
    ConcentrationCallback,
    PrunedEvaluationCallback,
    SparsityTargetCallback,
    TrueWeightsCallback,
    grouped,
    last_checkpoint,
)

STEPS = 12


def adamw(groups, lr=3e-3, **options):
    return torch.optim.AdamW(groups, lr=lr, **options)


def sgd(groups, lr=0.05):
    return torch.optim.SGD(groups, lr=lr, momentum=0.9)


def driven(groups):
    return WCR(adamw(groups), form="scale_free")


def groups_of(model, strength=1e-2):
    return param_groups(model, weight_decay=0.1, weight_concentration=strength, exclude="lm_head")


def linear(optimizer, steps=STEPS):
    return LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))


def trainer_of(folder, model, optimizer=None, scheduler=None, data=None, callbacks=None, pair=None, **changes):
    return Trainer(
        model,
        arguments(folder, **changes),
        train_dataset=data or text(),
        eval_dataset=text(16, seed=2),
        optimizers=(optimizer, scheduler),
        optimizer_cls_and_kwargs=pair,
        callbacks=callbacks,
    )


WRAPPED = {
    "wcr": lambda groups: WCR(adamw(groups)),
    "scale_free": lambda groups: WCR(sgd(groups), form="scale_free"),
    "hoyer_l1": lambda groups: HoyerDecay(L1Decay(adamw(groups), 1e-3), 1e-3),
    "ssam": lambda groups: WCR(SSAM(sgd(groups))),
    "drop_in": lambda groups: wcr_optim.AdamW(groups, lr=3e-3),
    "drop_in_fused": lambda groups: wcr_optim.AdamW(groups, lr=3e-3, fused=True),
}


class TestAgainstAPlainLoop:
    @pytest.mark.parametrize("make", WRAPPED)
    def test_weights_and_losses_bit_for_bit(self, make, tmp_path):
        plain, framed = network(), network()
        optimizer = WRAPPED[make](groups_of(plain))
        losses = plain_loop(plain, optimizer, batches(text(), STEPS), linear(optimizer))
        trainer = trainer_of(
            tmp_path, framed, WRAPPED[make](groups_of(framed)), lr_scheduler_type="linear", max_steps=STEPS
        )
        trainer.train()
        assert_same(plain, framed)
        assert logged(trainer, "loss") == losses

    @pytest.mark.parametrize("size", [48, 46], ids=["full", "a_smaller_last_batch"])
    @pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
    def test_accumulation_clipping_and_mixed_precision(self, size, bf16, tmp_path):
        data = text(size)
        plain, framed = network(), network()
        optimizer = driven(groups_of(plain))
        plain_loop(plain, optimizer, batches(data, 2 * STEPS), linear(optimizer), accumulate=2, clip=0.5, autocast=bf16)
        trainer = trainer_of(
            tmp_path,
            framed,
            driven(groups_of(framed)),
            data=data,
            lr_scheduler_type="linear",
            max_grad_norm=0.5,
            gradient_accumulation_steps=2,
            bf16=bf16,
        )
        trainer.train()
        assert_same(plain, framed)
        assert max(logged(trainer, "grad_norm")) > 0.5, "nothing was clipped"

    def test_a_scheduler_of_ones_own(self, tmp_path):
        plain, framed = network(), network()
        for model in (plain, framed):
            optimizer = driven(groups_of(model))
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
            if model is plain:
                plain_loop(model, optimizer, batches(text(), STEPS), scheduler)
            else:
                trainer_of(tmp_path, model, optimizer, scheduler).train()
        assert_same(plain, framed)

    def test_weights_in_bfloat16(self, tmp_path):
        plain, framed = network().bfloat16(), network().bfloat16()
        optimizer = driven(groups_of(plain))
        plain_loop(plain, optimizer, batches(text(), STEPS), linear(optimizer))
        trainer_of(tmp_path, framed, driven(groups_of(framed))).train()
        assert_same(plain, framed)


class TestGroups:
    def test_the_trainers_own_groups_regularize_every_matrix(self, tmp_path):
        """What `grouped` is for: the pair works as it is, and takes embeddings and lm_head along."""
        pair = (wcr_optim.AdamW, {"lr": 3e-3, "weight_concentration": 1e-2})
        trainer = trainer_of(tmp_path, network(), pair=pair, max_steps=1)
        trainer.train()
        groups = trainer.optimizer.param_groups
        assert [group["weight_concentration"] for group in groups] == [1e-2, 1e-2]
        model = trainer.model
        assert any(p is model.get_input_embeddings().weight for p in groups[0]["params"])
        assert all(p.ndim == 1 for p in groups[1]["params"]), "norms, which no penalty of concentration touches"

    @pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
    def test_grouped_regularizes_what_is_pruned(self, tied, tmp_path):
        trainer = trainer_of(tmp_path, network(tied), pair=grouped(wcr_optim.AdamW, lr=3e-3, weight_decay=0.1))
        trainer.train()
        model = trainer.model
        regularized, rest = trainer.optimizer.param_groups
        assert (regularized["weight_concentration"], rest["weight_concentration"]) == (1e-3, 0.0)
        assert (regularized["weight_decay"], rest["weight_decay"], regularized["betas"]) == (0.1, 0.0, (0.9, 0.999))
        names = {p: name for name, p in model.named_parameters()}
        expected = pruning.prunable_weights(model, () if tied else "lm_head")
        assert [names[p] for p in regularized["params"]] == list(expected)
        assert all(re.search(r"layers\.\d\.(self_attn|mlp)\..*_proj\.weight", name) for name in expected)

    def test_grouped_is_a_loop_with_param_groups(self, tmp_path):
        plain, framed = network(), network()
        optimizer = WCR(SSAM(sgd(param_groups(plain, 0.1, 1e-2, exclude="lm_head"))))
        plain_loop(plain, optimizer, batches(text(), STEPS), linear(optimizer))
        pair = grouped(
            lambda groups, lr: WCR(SSAM(sgd(groups, lr))), lr=0.05, weight_decay=0.1, weight_concentration=1e-2
        )
        trainer_of(tmp_path, framed, pair=pair).train()
        assert_same(plain, framed)

    def test_grouped_serves_several_models(self, tmp_path):
        pair = grouped(wcr_optim.AdamW, lr=3e-3)
        trainer = Trainer(
            args=arguments(tmp_path),
            train_dataset=text(),
            model_init=lambda: network(),
            optimizer_cls_and_kwargs=pair,
        )
        trainer.train()
        first = trainer.model
        trainer.train()
        assert trainer.model is not first
        assert_same(first, trainer.model)

    def test_selections(self, tmp_path):
        pair = grouped(wcr_optim.AdamW, lr=3e-3, exclude=())
        trainer = trainer_of(tmp_path, network(), pair=pair, max_steps=1)
        trainer.train()
        assert any(p is trainer.model.lm_head.weight for p in trainer.optimizer.param_groups[0]["params"])
        pair = grouped(wcr_optim.AdamW, lr=3e-3, include=re.compile("mlp"))
        trainer = trainer_of(tmp_path, network(), pair=pair, max_steps=1)
        trainer.train()
        assert len(trainer.optimizer.param_groups[0]["params"]) == 6

    def test_earlier_versions_are_told(self):
        factory, options = grouped(wcr_optim.AdamW, lr=1e-3)
        with pytest.raises(RuntimeError, match="update it to version 5"):
            factory([{"params": list(network().parameters())}], **options)


def test_without_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "wcr_optim.integrations.transformers")
    with pytest.raises(ImportError, match=r"pip install 'wcr_optim\[transformers\]'"):
        importlib.import_module("wcr_optim.integrations.transformers")


class TestSparsityTarget:
    def test_drives_as_in_a_plain_loop(self, tmp_path):
        plain, framed = network(), network()
        optimizer = driven(groups_of(plain))
        options = {"sparsity": 0.8, "tail_energy": 0.05, "every": 1, "total_steps": 40, "max_dense_cost": 1.0}
        target = SparsityTarget(optimizer, **options)
        plain_loop(plain, optimizer, batches(text(), 2 * STEPS), linear(optimizer), target, accumulate=2)
        callback = SparsityTargetCallback(**options)
        trainer = trainer_of(
            tmp_path, framed, driven(groups_of(framed)), callbacks=[callback], gradient_accumulation_steps=2
        )
        trainer.train()
        assert callback.target.history == target.history
        assert len({row[3] for row in target.history}) > 3, "the strength moved"
        assert_same(plain, framed)

    def test_compiled_and_copied_models(self, tmp_path):
        """The loss is read from the model that trains, whatever runs it, and not from copies of it."""

        class Copies(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                copy.deepcopy(kwargs["model"])(**next(batches(text(), 1)))

        histories = []
        for changes in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
            model = network()
            callback = SparsityTargetCallback(0.5, tail_energy=0.5, every=1)
            trainer_of(tmp_path, model, driven(groups_of(model)), callbacks=[callback, Copies()], **changes).train()
            histories.append(callback.target.history)
        # A compiled graph may sum in another order, which differs from processor to processor.
        torch.testing.assert_close(torch.tensor(histories[0]), torch.tensor(histories[1]), rtol=1e-4, atol=0)
        assert all(math.isfinite(smooth) for *_, smooth in histories[0])

    def test_a_model_is_pickled_while_it_trains(self, tmp_path):
        class Pickles(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                self.model = pickle.loads(pickle.dumps(kwargs["model"]))

        pickles, callback = Pickles(), SparsityTargetCallback(0.5)
        model = network()
        trainer_of(tmp_path, model, driven(groups_of(model)), callbacks=[callback, pickles]).train()
        assert_same(pickles.model, model)
        pickles.model(**next(batches(text(), 1)))

    def test_reaches_its_goal_without_a_warning(self, tmp_path):
        model, steps = network(), 80
        callback = SparsityTargetCallback(sparsity=0.5, tail_energy=1e-2)
        trainer_of(
            tmp_path, model, driven(groups_of(model)), callbacks=[callback], max_steps=steps, logging_steps=steps
        ).train()
        assert callback.target.history[0][1] > 5e-2
        assert callback.target.last_tail < 1.5e-2
        assert callback.target.total_steps == steps

    @pytest.mark.parametrize("restore", [False, True], ids=["default", "restore_callback_states"])
    def test_resumes_bit_for_bit_from_a_folder(self, restore, tmp_path):
        def run(folder, **resume):
            model = network(dropout=0.1)
            callback = SparsityTargetCallback(sparsity=0.8, tail_energy=0.05, every=1, total_steps=40)
            trainer = trainer_of(
                folder,
                model,
                driven(groups_of(model)),
                callbacks=[callback],
                save_strategy="steps",
                save_steps=5,
                train_sampling_strategy="random",
                restore_callback_states_from_checkpoint=restore,
            )
            trainer.train(**resume)
            return trainer

        straight = run(tmp_path)
        resumed = run(tmp_path / "other", resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
        assert_same(straight.model, resumed.model)
        targets = [
            next(c.target for c in trainer.callback_handler.callbacks if isinstance(c, SparsityTargetCallback))
            for trainer in (straight, resumed)
        ]
        assert str(targets[0].history) == str(targets[1].history)
        assert len(targets[0].history) == STEPS
        saved = json.loads((tmp_path / "checkpoint-5" / "trainer_state.json").read_text(), parse_constant=pytest.fail)
        assert json.loads(saved["stateful_callbacks"]["SparsityTargetCallback"]["attributes"]["saved"])["steps"] == 5

    def test_joins_a_run_that_began_without_it(self, tmp_path):
        model = network()
        trainer = trainer_of(tmp_path, model, driven(groups_of(model)), save_strategy="steps", save_steps=5)
        trainer.train()
        model = network()
        callback = SparsityTargetCallback(sparsity=0.1, tail_energy=0.5)
        trainer = trainer_of(
            tmp_path, model, driven(groups_of(model)), callbacks=[callback], save_strategy="steps", save_steps=5
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
        assert (callback.target.steps, callback.target.total_steps) == (STEPS - 5, STEPS - 5)

    def test_a_second_training_starts_anew(self, tmp_path):
        model = network()
        callback = SparsityTargetCallback(sparsity=0.1, tail_energy=0.5)
        trainer = trainer_of(tmp_path, model, driven(groups_of(model)), callbacks=[callback])
        trainer.train()
        first = callback.target
        trainer.train()
        assert callback.target is not first
        assert callback.target.steps == STEPS
        assert not model._forward_hooks

    def test_what_it_refuses(self, tmp_path):
        with pytest.raises(TypeError, match="tail"):
            SparsityTargetCallback(tail=1)
        model = network()
        trainer = trainer_of(tmp_path, model, adamw(model.parameters()), callbacks=[SparsityTargetCallback(0.9)])
        with pytest.raises(ValueError, match="AdamW has no decoupled penalty"):
            trainer.train()
        callback = SparsityTargetCallback(0.5, max_dense_cost=0.1)
        trainer = trainer_of(
            tmp_path, model, driven(groups_of(model)), callbacks=[callback], label_smoothing_factor=0.1
        )
        with pytest.raises(ValueError, match="label smoothing"):
            trainer.train()


class TestConcentration:
    def test_logs_beside_the_loss(self, tmp_path):
        model = network()
        optimizer = driven(groups_of(model, 1.0))
        first = metrics.optimizer_concentration(optimizer)
        trainer = trainer_of(
            tmp_path, model, optimizer, logging_steps=4, callbacks=[SparsityTargetCallback(0.1, tail_energy=0.5)]
        )
        trainer.add_callback(ConcentrationCallback(trainer))
        trainer.train()
        last = metrics.optimizer_concentration(optimizer)
        assert [row["step"] for row in trainer.state.log_history if "concentration/mean" in row] == [4, 8, 12]
        assert logged(trainer, "concentration/mean")[-1] == pytest.approx(last.mean().item(), rel=1e-12)
        assert logged(trainer, "concentration/min")[-1] == last.min().item()
        assert logged(trainer, "concentration/max")[-1] == last.max().item()
        assert last.mean() > first.mean()
        assert len(logged(trainer, "sparsity_target/strength")) == 3

    @pytest.mark.parametrize("every", [None, 3])
    def test_training_is_the_same_with_and_without(self, every, tmp_path):
        models = [network(dropout=0.2), network(dropout=0.2)]
        for model in models:
            trainer = trainer_of(tmp_path, model, driven(groups_of(model)), eval_strategy="steps", eval_steps=3)
            if model is models[0]:
                trainer.add_callback(ConcentrationCallback(trainer, every))
                trainer.add_callback(PrunedEvaluationCallback(trainer, [0.5]))
            trainer.train()
            losses = logged(trainer, "loss")
            assert len(losses) == STEPS
        assert_same(*models)

    def test_tensorboard(self, tmp_path):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        model = network()
        trainer = trainer_of(
            tmp_path, model, driven(groups_of(model)), report_to="tensorboard", eval_strategy="steps", eval_steps=6
        )
        trainer.add_callback(ConcentrationCallback(trainer, every=5))
        trainer.add_callback(PrunedEvaluationCallback(trainer, sparsities=[0.9]))
        trainer.train()
        (events,) = tmp_path.rglob("events.out.tfevents.*")
        written = EventAccumulator(str(events)).Reload()
        assert [event.step for event in written.Scalars("train/concentration/mean")] == [5, 10]
        assert [event.step for event in written.Scalars("eval/loss_at_0.9")] == [6, 12]

    def test_what_it_refuses(self, tmp_path):
        model = network()
        trainer = trainer_of(tmp_path, model, adamw(model.parameters()))
        with pytest.raises(ValueError, match="every must be at least 1, got 0"):
            ConcentrationCallback(trainer, 0)
        trainer.add_callback(ConcentrationCallback(trainer))
        with pytest.raises(ValueError, match="AdamW has no decoupled penalty"):
            trainer.train()


class TestPrunedEvaluation:
    def test_metrics_are_those_of_the_pruned_model_and_the_weights_come_back(self, tmp_path):
        model = network()
        trainer = trainer_of(tmp_path, model)
        trainer.add_callback(PrunedEvaluationCallback(trainer, sparsities=(0.5, 0.9)))
        before = {name: p.clone() for name, p in model.named_parameters()}
        found = trainer.evaluate()
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        assert {"eval_loss", "eval_loss_at_0.5", "eval_loss_at_0.9"} <= found.keys()
        assert not any("preparation" in key and "_at_" in key for key in found)
        for sparsity in (0.5, 0.9):
            copy = network()
            pruning.apply_(copy, pruning.magnitude_masks(copy, sparsity, exclude="lm_head"))
            by_hand = Trainer(copy, arguments(tmp_path), eval_dataset=text(16, seed=2)).evaluate()
            assert found[f"eval_loss_at_{sparsity}"] == by_hand["eval_loss"]

    def test_random_numbers_go_on_as_without_it(self, tmp_path):
        def drawing(rows):
            random.random(), np.random.rand(), torch.rand(1)
            return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

        following = []
        for sparsities in ([], [0.5, 0.9]):
            trainer = trainer_of(tmp_path, network())
            trainer.data_collator = drawing
            if sparsities:
                trainer.add_callback(PrunedEvaluationCallback(trainer, sparsities))
            transformers.set_seed(0)
            trainer.evaluate()
            following.append((random.random(), np.random.rand(), torch.rand(1).item()))
        assert following[0] == following[1]

    def test_own_metrics_several_data_sets_and_the_best_model(self, tmp_path):
        def accuracy(prediction):
            hits = prediction.predictions.argmax(-1)[:, :-1] == prediction.label_ids[:, 1:]
            return {"accuracy": float(hits.mean())}

        model = network()
        trainer = Trainer(
            model,
            arguments(
                tmp_path,
                eval_strategy="steps",
                eval_steps=4,
                save_strategy="best",
                load_best_model_at_end=True,
                metric_for_best_model="eval_b_loss_at_0.9",
                greater_is_better=False,  # the Trainer guesses so only of names that end in "loss"
            ),
            train_dataset=text(),
            eval_dataset={"a": text(8, seed=3), "b": text(8, seed=4)},
            compute_metrics=accuracy,
            optimizers=(driven(groups_of(model)), None),
        )
        trainer.add_callback(PrunedEvaluationCallback(trainer, sparsities=[0.9]))
        trainer.train()
        for key in ("eval_a_accuracy_at_0.9", "eval_b_accuracy_at_0.9", "eval_a_loss_at_0.9"):
            assert len(logged(trainer, key)) == 3
        assert trainer.state.best_metric == min(logged(trainer, "eval_b_loss_at_0.9"))

    def test_names_of_metrics_that_look_like_the_trainers(self, tmp_path):
        def own(_):
            return {"total_runtime": 1.0, "mask_loss": 2.0}

        trainer = trainer_of(tmp_path, network())
        trainer.compute_metrics = own
        trainer.add_callback(PrunedEvaluationCallback(trainer, [0.5]))
        found = trainer.evaluate(metric_key_prefix="held_out")
        names = {"held_out_loss", "held_out_total_runtime", "held_out_mask_loss"}
        assert {key for key in found if "_at_" in key} == {f"{name}_at_0.5" for name in names}

    @pytest.mark.parametrize("loss", [True, False])
    def test_an_evaluation_without_speed(self, loss, tmp_path):
        class Own(Trainer):
            def evaluate(self, *_, **__):
                metrics = self.evaluation_loop(self.get_eval_dataloader(), "Own").metrics if loss else {"score": 1.0}
                self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
                return metrics

        trainer = Own(network(), arguments(tmp_path), eval_dataset=text(16, seed=2))
        trainer.add_callback(PrunedEvaluationCallback(trainer, [0.5]))
        assert ("eval_loss_at_0.5" if loss else "score_at_0.5") in trainer.evaluate()

    def test_keys_to_ignore(self, tmp_path):
        model = network()
        model.config.output_hidden_states = True

        def shape(predictions):
            assert isinstance(predictions.predictions, np.ndarray)
            return {"largest": float(predictions.predictions.max())}

        trainer = trainer_of(tmp_path, model, eval_strategy="steps", eval_steps=5)
        trainer.compute_metrics = shape
        trainer.add_callback(PrunedEvaluationCallback(trainer, [0.0, 0.5]))
        trainer.train(ignore_keys_for_eval=["hidden_states"])
        assert logged(trainer, "eval_largest_at_0") == logged(trainer, "eval_largest")

    def test_an_evaluation_of_ones_own_that_makes_its_metrics_itself(self, tmp_path):
        told = []

        class Answers(Trainer):
            def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
                loader, metrics = self.get_eval_dataloader(eval_dataset), self.compute_metrics
                self.compute_metrics = None
                try:
                    output = self.evaluation_loop(loader, "Own", False, metric_key_prefix=metric_key_prefix)
                finally:
                    self.compute_metrics = metrics
                found = {f"{metric_key_prefix}_{k}": v for k, v in metrics(output.predictions.argmax(-1)).items()}
                self.log(found)
                self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
                return found

        class Told(TrainerCallback):
            def on_evaluate(self, args, state, control, metrics, **kwargs):
                told.append(set(metrics) - {"epoch"})

        trainer = Answers(network(), arguments(tmp_path), eval_dataset=text(16, seed=2))
        trainer.compute_metrics = lambda tokens: {"mean": float(tokens.mean())}
        trainer.add_callback(PrunedEvaluationCallback(trainer, [0.0, 0.5]))
        trainer.add_callback(Told())
        found = trainer.evaluate()
        assert found["eval_mean_at_0"] == found["eval_mean"]
        assert told == [{"eval_mean", "eval_mean_at_0", "eval_mean_at_0.5"}]
        assert trainer.evaluate(metric_key_prefix="test")["test_mean_at_0"] == found["eval_mean"]

    def test_ssam_is_evaluated_at_its_true_weights_and_trains_on(self, tmp_path):
        plain, framed = network(), network()
        optimizer = WCR(SSAM(sgd(groups_of(plain))))
        losses = plain_loop(plain, optimizer, batches(text(), STEPS), linear(optimizer))
        optimizer.eval()
        trainer = trainer_of(tmp_path, framed, WCR(SSAM(sgd(groups_of(framed)))), eval_strategy="steps", eval_steps=5)
        trainer.add_callback(PrunedEvaluationCallback(trainer, sparsities=[0.5]))
        trainer.train()
        trainer.optimizer.eval()
        assert_same(plain, framed)
        assert logged(trainer, "loss") == losses
        assert trainer.evaluate()["eval_loss"] == logged(trainer, "eval_loss")[-1]

    def test_progress_bars_are_closed(self, tmp_path, capfd):
        trainer = trainer_of(tmp_path, network(), disable_tqdm=False)
        trainer.add_callback(PrunedEvaluationCallback(trainer, sparsities=[0.5, 0.9]))
        trainer.evaluate()
        bars = [c for c in trainer.callback_handler.callbacks if isinstance(c, transformers.ProgressCallback)]
        assert [bar.prediction_bar for bar in bars] == [None]

    def test_what_it_refuses(self, tmp_path):
        trainer = trainer_of(tmp_path, network())
        with pytest.raises(ValueError, match="at least one sparsity"):
            PrunedEvaluationCallback(trainer, [])
        with pytest.raises(ValueError, match=r"got 1\.5"):
            PrunedEvaluationCallback(trainer, [1.5])
        with pytest.raises(ValueError, match="exclude matches nothing"):
            PrunedEvaluationCallback(trainer, [0.5], exclude="head")
        with pytest.raises(TypeError, match=r"got 0\.9; for one sparsity write \(0\.9,\)"):
            PrunedEvaluationCallback(trainer, 0.9)


class TestSharpness:
    def test_two_passes_are_refused_before_any_weight_changes(self, tmp_path):
        model = network()
        trainer = trainer_of(tmp_path, model, WCR(SAM(sgd(groups_of(model)))))
        with pytest.raises(RuntimeError, match=r"SAM.step\(\) without a closure .*call step\(closure\)"):
            trainer.train()
        assert_same(model, network())

    def test_ssam_saves_and_ends_with_the_true_weights(self, tmp_path):
        from transformers import AutoModelForCausalLM

        plain, framed = network(), network()
        optimizer = WCR(SSAM(sgd(groups_of(plain))))
        scheduler = linear(optimizer)
        seen = {}
        for step, batch in enumerate(batches(text(), STEPS), start=1):
            plain_loop(plain, optimizer, [batch], scheduler)
            with optimizer.true_weights():
                seen[step] = {name: p.clone() for name, p in plain.named_parameters()}
        trainer = trainer_of(
            tmp_path,
            framed,
            WCR(SSAM(sgd(groups_of(framed)))),
            callbacks=[TrueWeightsCallback()],
            save_strategy="steps",
            save_steps=5,
        )
        trainer.train()
        assert all(torch.equal(p, seen[STEPS][name]) for name, p in framed.named_parameters())
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-5")
        assert all(torch.equal(p, seen[5][name]) for name, p in saved.named_parameters())
        assert not torch.equal(next(plain.parameters()), next(framed.parameters())), "perturbed between steps"

    def test_ssam_ends_with_the_best_model(self, tmp_path):
        model = network()
        trainer = trainer_of(
            tmp_path,
            model,
            WCR(SSAM(sgd(groups_of(model), lr=0.5))),
            callbacks=[TrueWeightsCallback()],
            eval_strategy="steps",
            eval_steps=3,
            save_strategy="steps",
            save_steps=3,
            load_best_model_at_end=True,
        )
        trainer.train()
        losses = logged(trainer, "eval_loss")
        assert trainer.state.best_global_step == 3 * (1 + losses.index(min(losses)))
        best = transformers.AutoModelForCausalLM.from_pretrained(trainer.state.best_model_checkpoint)
        assert_same(model, best)
        assert trainer.evaluate()["eval_loss"] == min(losses)

    def test_ssam_resumes_from_either_kind_of_folder(self, tmp_path):
        def run(folder, callbacks, **resume):
            model = network()
            trainer = trainer_of(
                folder,
                model,
                WCR(SSAM(sgd(groups_of(model)))),
                callbacks=callbacks,
                save_strategy="steps",
                save_steps=5,
            )
            trainer.train(**resume)
            trainer.optimizer.eval()
            return model

        straight = run(tmp_path / "plain", None)
        assert_same(straight, run(tmp_path / "true", [TrueWeightsCallback()]))
        for kind in ("plain", "true"):
            folder = str(tmp_path / kind / "checkpoint-5")
            assert_same(straight, run(tmp_path / "resumed", None, resume_from_checkpoint=folder))


def killed_run(folder, kill_at=None, resume=None):
    """A run with everything that has a state: random order, dropout, moments, a schedule, a target, perturbations."""
    model = network(dropout=0.1)
    groups = param_groups(model, weight_decay=0.1, weight_concentration=1e-2, exclude="lm_head")
    optimizer = WCR(SSAM(adamw(groups)), form="scale_free")
    trainer = trainer_of(
        folder,
        model,
        optimizer,
        callbacks=[
            SparsityTargetCallback(sparsity=0.8, tail_energy=0.05, every=2, total_steps=40),
            TrueWeightsCallback(),
        ],
        train_sampling_strategy="random",
        gradient_accumulation_steps=2,
        lr_scheduler_type="cosine",
        max_grad_norm=1.0,
        save_strategy="steps",
        save_steps=3,
    )

    def power_cut(*_):
        if trainer.state.global_step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    optimizer.register_state_dict_post_hook(power_cut)  # when a checkpoint has its weights and nothing else yet
    trainer.train(resume_from_checkpoint=resume)
    return model


def test_a_run_killed_while_it_saves_ends_bit_identical_to_the_undisturbed_one(tmp_path):
    straight = killed_run(tmp_path / "straight")
    run, here = tmp_path / "run", Path(__file__).parent
    code = (
        "import sys, torch; torch.set_num_threads(1); sys.path[:0] = sys.argv[2:]; "
        "from test_transformers import killed_run; killed_run(sys.argv[1], kill_at=9)"
    )
    paths = [str(run), str(here), str(here.parent), str(here.parent.parent)]
    killed = subprocess.run([sys.executable, "-W", "error", "-c", code, *paths], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert sorted(folder.name for folder in run.iterdir()) == ["checkpoint-3", "checkpoint-6", "checkpoint-9"]
    assert (run / "checkpoint-9" / "model.safetensors").exists()
    assert last_checkpoint(run) == str(run / "checkpoint-6")
    assert_same(straight, killed_run(run, resume=last_checkpoint(run)))


def test_the_last_checkpoint(tmp_path):
    assert last_checkpoint(tmp_path / "nowhere") is None
    for step, content in ((9, "{}"), (10, "{}"), (11, "{"), (12, None), ("best", "{}")):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if content is not None:
            (folder / "trainer_state.json").write_text(content)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
