"""What all plots begin with. matplotlib is needed for plots alone."""

COLORS = ("#2a78b5", "#d9822b", "#4a9e5c", "#b5467c")


def new_figure(columns: int = 1, rows: int = 1, width: float = 5.0, height: float = 3.6):
    """
    An empty matplotlib figure without global state, of plots of `width` x `height` inches, and its axes as an array
    (rows, columns); an `ImportError` if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib; install it with `pip install brics-diffusers[metrics]`.") from error
    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)
