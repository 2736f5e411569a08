"""The benchmark: optimizers on small tasks at equal gradient evaluations, each at the best of its rates."""
