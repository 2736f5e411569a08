"""Second-order training for PyTorch from the differences between data-parallel replicas."""
