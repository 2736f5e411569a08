"""Settings shared by all tests."""

import torch
from hypothesis import settings

# The suite runs in parallel processes: threads of torch that wait for each other on busy cores cost a factor of ten.
torch.set_num_threads(1)

settings.register_profile("deterministic", deadline=None, derandomize=True, database=None, max_examples=40)
settings.load_profile("deterministic")
