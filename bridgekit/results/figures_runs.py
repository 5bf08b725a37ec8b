"""Old name of `plots.load_curve`, with its old column."""

from bridgekit.results.plots import load_curve


def curve_from_metrics(metrics):
    return load_curve(metrics).rename(columns={"point": "accuracy"})
