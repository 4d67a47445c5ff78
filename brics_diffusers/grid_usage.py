"""How much of the feature grids is in use."""

import torch

from .models.feature_grids import FeatureGrids


class GridUsage:
    r"""
    Remembers which entries of the grids ever received a gradient.

    Args:
        grids ([`FeatureGrids`]): The grids that are trained.
    """

    def __init__(self, grids: FeatureGrids):
        self.entries = grids.entries
        self.hit = torch.zeros(grids.entries.shape[:2], dtype=torch.bool, device=grids.entries.device)

    @torch.no_grad()
    def update(self, optimizer: torch.optim.Optimizer) -> float:
        r"""
        Reads Adam's second moments, which are above zero for a long while after a gradient: every ten steps are
        enough.

        Args:
            optimizer (`torch.optim.Optimizer`): Adam, after a step.

        Returns:
            `float`: Share of the entries that ever received a gradient.
        """
        moments = optimizer.state.get(self.entries, {}).get("exp_avg_sq")
        if moments is not None:
            self.hit |= (moments > 0).any(dim=-1)
        return self.hit.float().mean().item()

    def state_dict(self) -> dict:
        """Which entries were reached."""
        return {"hit": self.hit}

    def load_state_dict(self, state: dict) -> None:
        """Goes on from a `state_dict`."""
        self.hit.copy_(state["hit"])
