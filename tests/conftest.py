"""Settings of the whole suite: one thread, so that two workers share two cores and bits repeat."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from hypothesis import settings

settings.register_profile(
    "lichen", deadline=None, max_examples=50, derandomize=True
)  # timed tests lie on busy machines
settings.load_profile("lichen")
