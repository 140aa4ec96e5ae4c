"""The Serve application: an `AdapterServer` for each base model, and the gateway on top. `serve run deploy.app:app`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve import Application, Deployment
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.schema import LoggingConfig

from cluster.ray_runtime import SERVE_TRANSPORT
from cluster.settings import Settings, load_settings
from deploy.api.admission_server import AdmissionServer
from deploy.api.gateway import Gateway
from deploy.serving.server import AdapterServer

_DRAIN_SECONDS = 60.0  # in which open streams finish
_CHECKED_IN_LINE = 64  # jobs that wait to be checked; the next is told to come back
_ADMISSION_IDLE_SECONDS = 300.0  # without a job to check, before that process goes
_UPSCALE_SECONDS = 5.0  # of too many requests before another replica is started; the first one is started at once


def build_app(settings: Settings) -> Application:
    """Serve every base in `settings.base_models`. Replicas ask for no CPUs, which training needs all of."""
    deployment: Deployment = serve.deployment(
        max_ongoing_requests=settings.max_ongoing_requests,
        max_queued_requests=settings.max_queued_requests,
        request_router_config=RequestRouterConfig(
            request_router_class="deploy.serving.adapter_router.AdapterRouter",  # type: ignore[arg-type]  # as Ray has it
            request_router_kwargs={"share": settings.target_ongoing_requests},
        ),
        ray_actor_options=_actor_options(_resources(settings)),
        graceful_shutdown_timeout_s=_DRAIN_SECONDS,
        logging_config=_logging(settings),
        **_replicas(settings),
    )(AdapterServer)
    without_database = settings.model_copy(update={"database_url": ""})  # which is no business of a replica
    servers = {
        name: deployment.options(name=f"AdapterServer-{name}").bind(name, without_database)
        for name in settings.base_models
    }
    # The gateway takes all that servers may have and a few more, so that they say who has to come back.
    of_a_base = settings.max_replicas * settings.max_ongoing_requests + settings.max_queued_requests
    gateway: Deployment = serve.deployment(
        max_ongoing_requests=1024 + 2 * of_a_base * len(servers),
        ray_actor_options=_actor_options({"label_selector": settings.gateway_labels}),
        graceful_shutdown_timeout_s=_DRAIN_SECONDS,
        logging_config=_logging(settings),
    )(Gateway)
    admission: Deployment = serve.deployment(
        max_ongoing_requests=1,  # a job's rows may take much of a node's memory
        max_queued_requests=_CHECKED_IN_LINE,
        ray_actor_options={"num_cpus": 0},
        autoscaling_config=AutoscalingConfig(
            min_replicas=0, max_replicas=1, target_ongoing_requests=1, downscale_delay_s=_ADMISSION_IDLE_SECONDS
        ),
    )(AdmissionServer)
    return gateway.bind(settings, servers, admission.bind(without_database))


def _logging(settings: Settings) -> LoggingConfig:
    """Return how Serve writes logs: as the other processes do."""
    return LoggingConfig(encoding="JSON" if settings.log_format == "json" else "TEXT")


def _replicas(settings: Settings) -> dict[str, Any]:
    """Return how many replicas a base has: as many as its requests need, or always the same."""
    if settings.min_replicas == settings.max_replicas:
        return {"num_replicas": settings.max_replicas}
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=settings.min_replicas,
            max_replicas=settings.max_replicas,
            target_ongoing_requests=settings.target_ongoing_requests,
            upscale_delay_s=_UPSCALE_SECONDS,
            downscale_delay_s=settings.replica_idle_seconds,
        )
    }


def _actor_options(resources: dict[str, Any]) -> dict[str, Any]:
    return {"num_cpus": 0, **resources, "runtime_env": {"env_vars": SERVE_TRANSPORT}}


def _resources(settings: Settings) -> dict[str, Any]:
    """Return a share of a GPU where there are GPUs, or where one is set: the nodes that have them may not be up yet."""
    if "gpus_per_replica" in settings.model_fields_set or _has_gpus():
        return {"num_gpus": settings.gpus_per_replica}
    return {}


def _has_gpus() -> bool:
    """Return the cluster's, or before there is one (`serve run` imports this file first) those of this machine that Ray
    sees: a replica that asked for one that is hidden would wait for ever.
    """
    if ray.is_initialized():
        return bool(ray.cluster_resources().get("GPU"))
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles")
    return not hidden and any(Path("/dev").glob("nvidia[0-9]*"))


# For the Ray that `serve run` starts after it has imported this; one that is there already has its own environment.
os.environ.setdefault("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "deploy.proxy:middlewares")

app = build_app(load_settings())
