"""Names at their old place."""

from kd_jax.evals import plots


def save(found, path):
    """Writes a PNG of the panels beside each other."""
    plots.save(plots.sheet(found), path)
