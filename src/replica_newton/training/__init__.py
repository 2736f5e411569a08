"""Training: data sets, the reference network, the loop, checkpoints and metrics."""
