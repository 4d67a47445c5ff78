"""Feature grids and the lookup in them: its definition, and fast implementations for CPU and GPU.

Nothing of the encoder or of decoders.
"""
