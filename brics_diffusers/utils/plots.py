"""What all plots begin with. matplotlib is needed for plots alone."""

COLORS = ("#2a78b5", "#d9822b", "#4a9e5c", "#b5467c")


def new_figure(columns: int = 1, rows: int = 1, width: float = 5.0, height: float = 3.6):
    r"""
    An empty matplotlib figure without global state.

    Args:
        columns (`int`, defaults to 1): Plots side by side.
        rows (`int`, defaults to 1): Plots above one another.
        width (`float`, defaults to 5.0): Width of one plot in inches.
        height (`float`, defaults to 3.6): Height of one plot in inches.

    Returns:
        `tuple`: `matplotlib.figure.Figure`, and its axes as an array (rows, columns).

    Raises:
        `ImportError`: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib; install it with `pip install brics-diffusers[metrics]`.") from error
    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)
