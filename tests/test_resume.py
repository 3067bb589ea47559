"""Resume is bit-exact: 20 steps, save, load into fresh objects, 20 more, equal to 40 in one go."""

import pytest
import torch
from reference import assert_same, small_net, through_file, train
from torch.optim import lr_scheduler

from wcr_optim import WCR, AdamW, HoyerDecay, L1Decay, L2Decay

OPT = torch.optim
BASES = {
    "sgd": lambda p: OPT.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adamw": lambda p: OPT.AdamW(p, lr=1e-2),
    "adamw_fused": lambda p: OPT.AdamW(p, lr=1e-2, fused=True),
    "adamw_amsgrad": lambda p: OPT.AdamW(p, lr=1e-2, amsgrad=True),
    "rmsprop": lambda p: OPT.RMSprop(p, lr=1e-2, momentum=0.9, centered=True),
    "nadam": lambda p: OPT.NAdam(p, lr=1e-2),
    "radam": lambda p: OPT.RAdam(p, lr=1e-2),
    "adafactor": lambda p: OPT.Adafactor(p, lr=1e-2),
    "adagrad": lambda p: OPT.Adagrad(p, lr=1e-2),
    "adadelta": lambda p: OPT.Adadelta(p, lr=0.5),
    "lbfgs": lambda p: OPT.LBFGS(p, lr=0.05, max_iter=2),
}
WRAPPERS = {
    "inverse_variance": lambda base: WCR(base, 1e-2),
    "scale_free": lambda base: WCR(base, 1e-2, form="scale_free"),
    "l1": lambda base: L1Decay(base, 1e-3),
    "l2": lambda base: L2Decay(base, 1e-2),
    "hoyer": lambda base: HoyerDecay(base, 1e-3),
    "nested": lambda base: L1Decay(WCR(base, 1e-2), 1e-3),
}


def halves(make, dtype=torch.float32, bare=None, closure=False):
    """Run 40 steps in one go and in two halves with a checkpoint between; `bare` makes what writes the checkpoint."""
    straight, resumed = small_net(dtype), small_net(dtype)
    opt = make(straight.parameters())
    scheduler = lr_scheduler.CosineAnnealingLR(opt, 40)
    if bare is None:
        train(straight, opt, range(20), scheduler, closure)
        saved = {"net": straight.state_dict(), "opt": opt.state_dict(), "scheduler": scheduler.state_dict()}
    else:
        first = bare(straight.parameters())
        train(straight, first, range(20), lr_scheduler.CosineAnnealingLR(first, 40), closure)
        saved = {"net": straight.state_dict(), "opt": first.state_dict(), "scheduler": scheduler.state_dict()}
    saved = through_file(saved)

    fresh = make(resumed.parameters())
    fresh_scheduler = lr_scheduler.CosineAnnealingLR(fresh, 40)
    resumed.load_state_dict(saved["net"])
    fresh.load_state_dict(saved["opt"])
    fresh_scheduler.load_state_dict(saved["scheduler"])
    if bare is not None:  # the undisturbed run goes on with the same base's state, moved by hand
        opt.base.state, opt.base.param_groups = first.state, first.param_groups
    train(straight, opt, range(20, 40), scheduler, closure)
    train(resumed, fresh, range(20, 40), fresh_scheduler, closure)
    assert_same(straight, resumed)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_resume(base, wrapper):
    halves(lambda p: WRAPPERS[wrapper](BASES[base](p)), closure=base == "lbfgs")


@pytest.mark.parametrize("base", [b for b in BASES if b != "lbfgs"])
def test_resume_from_a_bare_bases_checkpoint(base):
    halves(lambda p: WCR(BASES[base](p), 1e-2), bare=BASES[base])


def test_first_step_after_a_bare_lbfgs_checkpoint_is_regularized():
    straight, resumed = small_net(), small_net()
    bare = BASES["lbfgs"](straight.parameters())
    train(straight, bare, range(5), closure=True)
    saved = through_file({"net": straight.state_dict(), "opt": bare.state_dict()})
    opt = WCR(BASES["lbfgs"](resumed.parameters()), 1e-2)
    resumed.load_state_dict(saved["net"])
    opt.load_state_dict(saved["opt"])
    train(straight, bare, [5], closure=True)
    train(resumed, opt, [5], closure=True)
    assert not torch.equal(straight[0].weight, resumed[0].weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_resume_repeats_the_draws_of_stochastic_rounding(dtype, wrapper):
    halves(lambda p: WRAPPERS[wrapper](OPT.SGD(p, lr=0.05, momentum=0.9)), dtype=dtype)


def test_resume_of_a_drop_in_with_groups_of_their_own_strength():
    def make(params):
        params = list(params)
        groups = [{"params": params[:3], "weight_concentration": 0.1}, {"params": params[3:]}]
        return AdamW(groups, lr=1e-2, weight_concentration=1e-3, form="scale_free")

    halves(make)


def test_a_changed_strength_is_part_of_the_checkpoint():
    net, other = small_net(), small_net()
    opt = WCR(BASES["sgd"](net.parameters()), 1e-3)
    opt.param_groups[0]["weight_concentration"] = 0.5
    fresh = WCR(BASES["sgd"](other.parameters()), 1e-3)
    fresh.load_state_dict(through_file(opt.state_dict()))
    assert fresh.param_groups[0]["weight_concentration"] == 0.5
