import pytest
import torch

from brics_diffusers.grid_usage import GridUsage
from brics_diffusers.models.feature_grids import FeatureGrids


def test_counts_entries_that_ever_had_a_gradient():
    grids = FeatureGrids(2, num_levels=2, min_resolution=2, max_resolution=4)
    usage = GridUsage(grids)
    optimizer = torch.optim.Adam(grids.parameters(), betas=(0.9, 0.99))
    assert usage.update(optimizer) == 0
    reached = torch.zeros(grids.entries.shape[:2], dtype=torch.bool)
    for key in (0.1, 0.9):
        grids(torch.full((1, 2, 3, 3), key)).sum().backward()
        reached |= (grids.entries.grad != 0).any(dim=-1)
        optimizer.step()
        optimizer.zero_grad()
        share = usage.update(optimizer)
    assert share == pytest.approx(reached.float().mean().item()) and 0 < share < 1
    # What was reached once stays counted when its moment is forgotten, and through a checkpoint.
    optimizer.state.clear()
    restored = GridUsage(grids)
    restored.load_state_dict(usage.state_dict())
    assert restored.update(optimizer) == pytest.approx(share)
