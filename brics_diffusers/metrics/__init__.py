"""How good reconstructions and samples are, and the networks whose features that is measured with.

Nothing of training, the hub or commands.
"""
