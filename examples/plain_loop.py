"""A plain training loop: momentum SGD, with and without weight concentration, pruned once and never retrained.

Needs scikit-learn for its 1,797 real images of handwritten digits; about ten seconds on a CPU.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from wcr_optim import WCR, param_groups, pruning

EPOCHS, BATCH = 20, 64
SPARSITIES = [0.0, 0.8, 0.9, 0.95, 0.98]


def images_and_labels():
    """Return training images and labels, then those of the test."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(images[order], dtype=torch.float32) / 16, torch.tensor(labels[order])
    return x[:1350], y[:1350], x[1350:], y[1350:]


def train(x, y, concentrate):
    """Train a network; weight concentration is the one line that differs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    groups = param_groups(model, weight_decay=5e-4, weight_concentration=1e-3)
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    if concentrate:
        optimizer = WCR(optimizer, form="scale_free")
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
        scheduler.step()
    return model


def main():
    """Train both networks and print their accuracy at every sparsity."""
    x, y, test_x, test_y = images_and_labels()

    @torch.no_grad()
    def accuracy(model):
        return 100 * (model(test_x).argmax(1) == test_y).float().mean().item()

    print("test accuracy in percent, after one-shot pruning to a sparsity of")
    print(f"{'':12}" + "".join(f"{100 * sparsity:8g} %" for sparsity in SPARSITIES))
    for name, concentrate in (("SGD", False), ("SGD + WCR", True)):
        result = pruning.sweep(train(x, y, concentrate), accuracy, SPARSITIES)
        print(f"{name:12}" + "".join(f"{value:10.1f}" for value in result.values()))


if __name__ == "__main__":
    main()
