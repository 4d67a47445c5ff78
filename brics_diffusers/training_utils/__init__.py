"""What the training scripts are made of: flags, losses, optimizers, learning rates, checkpoints, log."""
