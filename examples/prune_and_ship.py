"""From training to a small file: train for a sparsity, prune once, save sparse, load into a fresh model, measure.

Needs scikit-learn (its digits) and safetensors; about half a minute on a CPU.
"""

import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from wcr_optim import WCR, SparsityTarget, metrics, param_groups, pruning

SPARSITY, EPOCHS, BATCH = 0.95, 15, 64


def network():
    """Return a small convolutional network with BatchNorm."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(64 * 16, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


def train(model, x, y):
    """Train a model whose weights are to survive pruning; no strength is given, the target finds it."""
    optimizer = torch.optim.SGD(param_groups(model, weight_decay=5e-4), lr=0.1, momentum=0.9)
    optimizer = WCR(optimizer, form="per_unit")
    steps = EPOCHS * -(-len(x) // BATCH)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    target = SparsityTarget(optimizer, SPARSITY, steps)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            loss = cross_entropy(model(x[batch]), y[batch])
            loss.backward()
            optimizer.step()
            target.step(loss)
            scheduler.step()


def main():
    """Go all the way, and print sizes and accuracies."""
    images, labels = load_digits(return_X_y=True)
    torch.manual_seed(0)
    order = torch.randperm(len(images))
    x = torch.tensor(images[order], dtype=torch.float32).view(-1, 1, 8, 8) / 16
    y = torch.tensor(labels[order])
    x, y, test_x, test_y = x[:1350], y[:1350], x[1350:], y[1350:]

    @torch.no_grad()
    def accuracy(model):
        return 100 * (model.eval()(test_x).argmax(1) == test_y).float().mean().item()

    model = network()
    train(model, x, y)
    dense = accuracy(model)
    print(metrics.concentration(model), end="\n\n")

    masks = pruning.magnitude_masks(model, SPARSITY)
    pruning.apply_(model, masks)
    pruning.recalibrate_batchnorm(model, x.split(BATCH))
    print(pruning.report(model, masks), end="\n\n")

    with tempfile.TemporaryDirectory() as folder:
        path, dense_path = Path(folder, "sparse.safetensors"), Path(folder, "dense.pt")
        pruning.save_sparse(model, path)
        torch.save(model.state_dict(), dense_path)
        fresh = network()
        pruning.load_sparse(fresh, path)
        sizes = path.stat().st_size, dense_path.stat().st_size
    same = all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), fresh.state_dict().values(), strict=True))
    print(f"accuracy: dense {dense:.1f} %, {100 * SPARSITY:g} % pruned and loaded again {accuracy(fresh):.1f} %")
    print(f"on disk: {sizes[0]:,} bytes for {sizes[1]:,} dense, {100 * sizes[0] / sizes[1]:.1f} %")
    print(f"loaded bit for bit: {same}")


if __name__ == "__main__":
    main()
