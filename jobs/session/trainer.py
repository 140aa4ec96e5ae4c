"""How the ranks of a session are started: Ray Train's run, with as little as it can do without.

On a laptop each process that has to import a library first makes a session seconds later. Ray's backend for torch has
the driver import torch, then the controller, then all ranks before any of them may go on; here only an address is left
with the ranks, and they join there by themselves (`collectives.py`). The controller would wait for an actor that is to
ask an autoscaler for what the placement group asks of it anyway, and start another one for Ray's data sets.
"""

from __future__ import annotations

import os
from typing import Any

from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

NOT_NEEDED = (DatasetsCallback, PlacementGroupCleanerCallback)
"""Each starts an actor. That of the second is there to remove the placement group of a run in somebody else's process,
which for one in a Ray job of its own Ray does; after a run that was killed it stayed for minutes, with 200 MB.
"""


class SessionTrainer(DataParallelTrainer):
    """Ray Train's run of a session, nothing of which outlives its Ray job."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, backend_config=Rendezvous(), **options)

    def _create_default_callbacks(self) -> list[Any]:
        return [one for one in super()._create_default_callbacks() if not isinstance(one, NOT_NEEDED)]

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        gang = Gang(self.scaling_config)  # type: ignore[arg-type]  # mypy sees V1's
        return super()._initialize_and_run_controller(**options | {"scaling_policy": gang})


class Gang(FixedScalingPolicy):
    """So many workers as were asked for, all at once: what an autoscaler sees of them is their placement group."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Ask nobody."""

    def _maybe_send_resource_request(self) -> None:
        """Ask nobody."""


class Rendezvous(BackendConfig):
    """The ranks meet at an address of rank 0's node."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _LeaveAddress


class _LeaveAddress(Backend):
    share_cuda_visible_devices = True  # as NCCL wants it

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        address, port = worker_group.execute_single(0, get_address_and_port)
        worker_group.execute(_remember, {"MASTER_ADDR": address, "MASTER_PORT": str(port)})


def _remember(variables: dict[str, str]) -> None:
    os.environ.update(variables)
