"""What goes on inside a trained model: use of the grids, statistics of key codes, noise levels, cost.

Nothing of training, the hub or commands.
"""
