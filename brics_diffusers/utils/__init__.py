"""Files on disk, loading of weights, reports, plots: what knows nothing of BRICS."""
