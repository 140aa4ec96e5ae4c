"""Checks jobs that come through the API, as `python -m jobs submit` does, in a process of its own.

Reading rows with a tokenizer takes seconds of a core, and libraries that the gateway can do without; there it would
hold up every stream. A replica is started when somebody submits, and goes when nobody has for a while.
"""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import dataclass

import ray

from cluster.embedded_ray import find_embedded
from cluster.ray_runtime import LOCAL_CLUSTER, cluster_name, use_own_ray
from cluster.settings import Settings
from jobs.admitted import Admitted
from jobs.estimate import Memory, memory_of_a_rank
from jobs.spec import JobSpec, SpecError

log = logging.getLogger("ray.serve.lora")


@dataclass(frozen=True)
class Admission:
    """What was found: `problems`, one sentence each, or the job; which cluster it is for; for a dry run, its memory."""

    problems: tuple[str, ...]
    admitted: Admitted | None
    cluster: str
    memory: Memory | None = None


class AdmissionServer:
    """A Serve deployment with one job at a time."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        if settings.cluster is None:
            use_own_ray()

    async def admit(self, spec: JobSpec, tenant: str, dry_run: bool) -> Admission:
        """Check a job, and store its rows; of a dry run, find out what it takes, too."""
        return await asyncio.to_thread(self._admit, spec, tenant, dry_run)

    def _admit(self, spec: JobSpec, tenant: str, dry_run: bool) -> Admission:
        from jobs.admission import admit

        settings = self._settings.model_copy(update={"tenant": tenant})
        try:
            admitted = admit(spec, settings, self._workers())
        except SpecError as error:
            return Admission(tuple(error.problems), None, self._cluster())
        device = "cuda" if self._on_gpus() else "cpu"
        memory = memory_of_a_rank(spec, settings, admitted, device) if dry_run else None
        return Admission((), admitted, self._cluster(), memory)

    def _cluster(self) -> str:
        """Return the name that the cluster's scheduler knows it by: a laptop's has none of its own."""
        embedded = find_embedded(self._settings) if self._settings.cluster is None else None
        if embedded is not None and embedded.gcs_address == os.environ.get("RAY_ADDRESS"):
            return LOCAL_CLUSTER
        return cluster_name(self._settings)

    def _workers(self) -> int | None:
        """Return how many ranks there may ever be; None where jobs run on another cluster that does not say."""
        if self._settings.cluster is not None:
            return self._settings.max_workers
        resources = ray.cluster_resources()
        return max(int(resources.get("GPU", 0) or resources.get("CPU", 0)), self._settings.max_workers or 0)

    def _on_gpus(self) -> bool:
        """Return whether ranks get GPUs: of another cluster settings have to say."""
        here = self._settings.cluster is None and bool(ray.cluster_resources().get("GPU"))
        return here or "gpus_per_rank" in self._settings.model_fields_set
