"""How the threads of torch's CPU operations wait for each other."""

import os
from collections.abc import MutableMapping

_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def let_threads_sleep(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let OpenMP's threads sleep while they wait for each other, in this process and those that it starts.

    By default they spin. Next to other busy processes they may then spin away the time slices that the thread they wait
    for needs. The results do not depend on it.

    It has an effect only before torch is imported, which reads the variable once. A variable of the user's own stays.

    Args:
        environment: Variables of this process.
    """
    if not any(name in environment for name in _SETTINGS):
        environment["OMP_WAIT_POLICY"] = "passive"
