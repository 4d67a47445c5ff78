"""From noise, or from images, to images by way of key codes."""

from .pipeline_brics_key_code import BricsKeyCodePipeline
