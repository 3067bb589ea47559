"""Train PyTorch networks that survive one-shot pruning.

Weight concentration as a decoupled step inside ``optimizer.step()``, around any optimizer.
"""

__version__ = "0.1.0"
