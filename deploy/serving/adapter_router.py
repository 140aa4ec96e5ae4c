"""Which replica of a base answers a request: the one that is the home of its adapter, or has it in memory next.

    replicas of an adapter, best first = sorted by hash(digest, replica)        the same in every process

So an adapter is in the memory of as few replicas as its requests need, a burst for a cold one loads it once, and when
a replica comes or goes only its own adapters move; nobody has to know who holds what. A replica that has its share of
requests is passed over while another has not.
"""

from __future__ import annotations

import hashlib
import random
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica


class AdapterRouter(RequestRouter):
    """Routes by `digest` of the first argument (`GenerateRequest`, `Publication`); what has none goes to the less busy
    of two.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        """Take `share`, the requests of a replica from which on it has its share."""
        self._share: float = kwargs["share"]

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return groups of replicas in the order in which they are tried; of a group, the least busy one is taken."""
        digest = pending_request and getattr(pending_request.args[0], "digest", None)
        if not digest:
            return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]
        homes = sorted(candidate_replicas, key=lambda replica: _score(digest, replica), reverse=True)
        return [[replica] for replica in sorted(homes, key=self._has_its_share)]

    def _has_its_share(self, replica: RunningReplica) -> bool:
        return (self._replica_queue_len_cache.get(replica.replica_id) or 0) >= self._share


def _score(digest: str, replica: RunningReplica) -> bytes:
    return hashlib.blake2b(f"{digest} {replica.replica_id.unique_id}".encode(), digest_size=8).digest()
