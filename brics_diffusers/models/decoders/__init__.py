"""From looked-up features to an image: per-group MLPs and the style decoder, without the lookup."""
