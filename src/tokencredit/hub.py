"""The Hugging Face hub, asked once whether it is there: without it nothing waits for retries, and what is in the cache
is used.
"""

from __future__ import annotations

import os
import sys
import warnings
from functools import lru_cache

SECONDS = 5.0
"""How long the hub may take to answer at all."""
OFFLINE = "HF_HUB_OFFLINE"


@lru_cache(maxsize=1)
def reachable() -> bool:
    """Whether the hub answers; asked once in a process, before anything is loaded by its hub name.

    Where it does not, this process goes on as with HF_HUB_OFFLINE=1, and a warning says so: huggingface_hub,
    transformers and datasets then look into the cache alone, in place of half a minute of retries for every file.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception as error:
        warnings.warn(
            f"{constants.ENDPOINT} cannot be reached ({type(error).__name__}: {error}): only what is in the cache"
            f" {constants.HF_HUB_CACHE} is used, as with {OFFLINE}=1",
            stacklevel=3,
        )
        _stay_offline()
        return False
    return True


def _stay_offline() -> None:
    from huggingface_hub import constants

    os.environ[OFFLINE] = "1"
    constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True


def without(what: str, instead: str) -> str:
    """What to say where something is not in the cache and the hub is not there."""
    from huggingface_hub import constants

    return (
        f"{what} is not in the cache ({constants.HF_HUB_CACHE}), and the hub cannot be reached: {instead}, or set"
        " HF_HOME to a cache that holds it"
    )
