"""Run a command in several processes of this machine, with torchrun's own machinery:
`python -m ...elastic COUNT COMMAND`.

`torchrun` itself exits with 1 whatever its processes return; here their exit code is kept.
"""

from __future__ import annotations

import logging
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from cm3leon.types import AGAIN


def run(count: int, command: list[str]) -> int:
    """Exit code of the process that failed first, or 0."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "cm3leon.run", *command)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code >= 0 else 128 - code  # a signal's number, as shells report it
    except SignalException:
        return AGAIN  # the signal was passed on, and a checkpoint is written
    return 0


if __name__ == "__main__":
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    sys.exit(run(int(sys.argv[1]), sys.argv[2:]))
