"""SAM and weight concentration under automatic mixed precision, with a GradScaler and gradient clipping.

float16 on a CUDA device, bfloat16 on a CPU; needs scikit-learn for its digits. A quarter of a minute on a CPU.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from wcr_optim import SAM, WCR, param_groups, pruning

EPOCHS, BATCH = 5, 64
SPARSITIES = [0.0, 0.8, 0.9, 0.95]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float16 if DEVICE == "cuda" else torch.bfloat16


def network():
    """Return a small convolutional network with BatchNorm, which SAM has to treat with care."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 64, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(64 * 16, 10)),
    ).to(DEVICE)


def main():
    """Train, prune to several sparsities and print the accuracy at each."""
    images, labels = load_digits(return_X_y=True)
    torch.manual_seed(0)
    order = torch.randperm(len(images))
    x = torch.tensor(images[order], dtype=torch.float32, device=DEVICE).view(-1, 1, 8, 8) / 16
    y = torch.tensor(labels[order], device=DEVICE)
    x, y, test_x, test_y = x[:1350], y[:1350], x[1350:], y[1350:]

    model = network()
    base = torch.optim.SGD(param_groups(model, 5e-4, weight_concentration=2e-3), lr=0.1, momentum=0.9)
    optimizer = WCR(SAM(base, rho=0.05, model=model), form="scale_free")  # model=: statistics of the clean pass only
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    scaler = torch.amp.GradScaler(DEVICE)

    for _ in range(EPOCHS):
        for batch in torch.randperm(len(x)).split(BATCH):

            def closure(batch=batch):
                optimizer.zero_grad()
                with torch.autocast(DEVICE, DTYPE):
                    loss = cross_entropy(model(x[batch]), y[batch])
                scaler.scale(loss).backward()
                return loss

            loss = optimizer.gather(closure)  # both passes; the weights are back where they were
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            scaler.step(optimizer)  # not taken if either pass overflowed
            scaler.update()
        scheduler.step()

    @torch.no_grad()
    def accuracy(model):
        return 100 * (model(test_x).argmax(1) == test_y).float().mean().item()

    result = pruning.sweep(model, accuracy, SPARSITIES, calibration=list(x.split(BATCH)))
    print(f"SAM + WCR in {DTYPE} on {DEVICE}: last loss {loss.item():.4f}, loss scale {scaler.get_scale():g}")
    for row in result.rows:
        print(f"{100 * row.sparsity:4g} % pruned: {row.metrics['score']:.1f} % of the test images right")


if __name__ == "__main__":
    main()
