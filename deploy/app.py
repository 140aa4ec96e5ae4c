"""The Serve application: an `AdapterServer` for each base model, and the gateway on top. `serve run deploy.app:app`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve import Application, Deployment

from cluster.settings import Settings, load_settings
from deploy.api.gateway import Gateway
from deploy.serving.server import AdapterServer

_ONGOING = 64  # a replica decodes 32 of them at a time; the others wait in its line
_QUEUED = 256  # more than that and callers are told to come back (429)
_GATEWAY_ONGOING = 1024


def build_app(settings: Settings) -> Application:
    """Serve every base in `settings.base_models`. Replicas ask for no CPUs, which training needs all of."""
    deployment: Deployment = serve.deployment(
        max_ongoing_requests=_ONGOING,
        max_queued_requests=_QUEUED,
        ray_actor_options=_resources(settings),
        graceful_shutdown_timeout_s=60,  # open streams finish
    )(AdapterServer)
    servers = {
        name: deployment.options(name=f"AdapterServer-{name}").bind(name, settings) for name in settings.base_models
    }
    gateway: Deployment = serve.deployment(
        max_ongoing_requests=_GATEWAY_ONGOING, ray_actor_options={"num_cpus": 0}, graceful_shutdown_timeout_s=60
    )(Gateway)
    return gateway.bind(settings, servers)


def _resources(settings: Settings) -> dict[str, Any]:
    """Return a share of a GPU where there are GPUs, or where one is set: the nodes that have them may not be up yet."""
    if "gpus_per_replica" in settings.model_fields_set or _has_gpus():
        return {"num_cpus": 0, "num_gpus": settings.gpus_per_replica}
    return {"num_cpus": 0}


def _has_gpus() -> bool:
    """Return the cluster's, or before there is one (`serve run` imports this file first) those of this machine that Ray
    sees: a replica that asked for one that is hidden would wait for ever.
    """
    if ray.is_initialized():
        return bool(ray.cluster_resources().get("GPU"))
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles")
    return not hidden and any(Path("/dev").glob("nvidia[0-9]*"))


app = build_app(load_settings())
