"""Settings shared by all tests."""

from hypothesis import settings

settings.register_profile("deterministic", deadline=None, derandomize=True, database=None, max_examples=40)
settings.load_profile("deterministic")
