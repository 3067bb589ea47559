"""What the drop-ins take because torch's optimizers take it."""

import pytest
import torch
from reference import assert_same, small_net, through_file, train

from wcr_optim import SGD, WCR, AdamW


@pytest.mark.parametrize(("ours", "theirs"), [(SGD, torch.optim.SGD), (AdamW, torch.optim.AdamW)])
def test_a_group_without_parameters_is_no_error(ours, theirs):
    """Training frameworks make one for the biases and norms that a low-rank adapter has not."""
    net, expected = small_net(), small_net()
    optimizer = ours([{"params": list(net.parameters())}, {"params": [], "weight_decay": 0.0}], lr=1e-2)
    reference = theirs([{"params": list(expected.parameters())}, {"params": [], "weight_decay": 0.0}], lr=1e-2)
    train(net, optimizer, range(5))
    train(expected, reference, range(5))
    assert_same(net, expected)
    optimizer.load_state_dict(through_file(optimizer.state_dict()))
    optimizer.add_param_group({"params": []})
    optimizer.param_groups[0]["weight_concentration"] = 1e-2
    train(net, optimizer, range(5, 8))
    assert [len(group["params"]) for group in optimizer.param_groups] == [6, 0, 0]
    with pytest.raises(ValueError, match="has no parameters"):
        WCR(theirs([{"params": list(net.parameters())}, {"params": []}], lr=1e-2))
