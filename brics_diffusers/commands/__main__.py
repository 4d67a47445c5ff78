"""For `accelerate launch -m brics_diffusers.commands` and `python -m brics_diffusers.commands`."""

from . import main


main()
