"""One thread, no network, the same examples in every run."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile(
    "tokencredit",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=30,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.load_profile("tokencredit")
