"""From noise, or from images, to images by way of key codes, without anything that trains or measures."""

from .pipeline_brics_key_code import BricsKeyCodePipeline
