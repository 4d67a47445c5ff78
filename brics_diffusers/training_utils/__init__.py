"""What the training scripts are made of: flags, losses, optimizers, learning rates, checkpoints, log.

The loops themselves are in `training/`.
"""
