"""A training run: flags, losses, optimizers, averaged weights, checkpoints, log and record; models know none of it."""
