"""`python -m brics_diffusers.commands`, which `accelerate launch -m` can start on several processes."""

from . import main


main()
