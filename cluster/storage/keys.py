"""Where everything lies in storage: every path is spelled here and nowhere else.

    datasets/<sha256>                                      rows as they were submitted
    files/<tenant>/<file id><suffix>                       what was uploaded
    uploads/<tenant>/<upload id>/<part id>                 parts of what is being uploaded
    examples/<sha256>                                      what they became
    init_adapters/<digest>/<file>                          adapters to start from
    jobs/<id>/spec.json, result.json                       the second record of a job
    jobs/<id>/logs/<attempt>-<piece>.jsonl                 its log, in pieces
    jobs/<id>/checkpoints/<attempt>-<step>/state           one checkpoint, which counts once COMMITTED lies beside it
    adapters/<tenant>/<base>/<name>/<version>/<file>       published; the manifest is what makes it exist
    numbers/<tenant>/<base>/<name>/<number>.json           the version that a number means, for ever
    aliases/<tenant>/<base>/<name>/<alias>.json            the version that an alias names
    published/<tenant>.json                                which name changed its meaning last

Names that users choose (tenant, base, adapter) are percent-encoded, so that any name is one part of a key, on any file
system.
"""

from __future__ import annotations

import re
from urllib.parse import quote, unquote


def dataset_key(sha256: str) -> str:
    return f"datasets/{sha256}"


def file_key(tenant: str, file_id: str, suffix: str) -> str:
    """The suffix says what kind of file it is to who reads it."""
    return f"files/{_part(tenant)}/{file_id}{suffix}"


def upload_prefix(tenant: str, upload_id: str) -> str:
    return f"uploads/{_part(tenant)}/{upload_id}/"


def upload_part_key(tenant: str, upload_id: str, part_id: str) -> str:
    return f"{upload_prefix(tenant, upload_id)}{part_id}"


def examples_key(sha256: str) -> str:
    """Name what the rows of a job became."""
    return f"examples/{sha256}"


def init_adapter_key(digest: str, file: str) -> str:
    return f"init_adapters/{digest}/{file}"


def job_spec_key(job_id: str) -> str:
    return f"jobs/{job_id}/spec.json"


def job_result_key(job_id: str) -> str:
    return f"jobs/{job_id}/result.json"


def job_prefix(job_id: str) -> str:
    """Below it are a job's records, log and checkpoints."""
    return f"jobs/{job_id}/"


def job_logs_prefix(job_id: str) -> str:
    return f"jobs/{job_id}/logs/"


def job_log_key(job_id: str, attempt: int, piece: int) -> str:
    """Name a piece of a job's log; in the order of their names they are in the order of time."""
    return f"{job_logs_prefix(job_id)}{attempt:06d}-{piece:06d}.jsonl"


def all_jobs_prefix() -> str:
    """Below it are the records and checkpoints of every job: see `job_of_checkpoint`."""
    return "jobs/"


def checkpoints_prefix(job_id: str) -> str:
    return f"jobs/{job_id}/checkpoints/"


def checkpoint_state_key(job_id: str, attempt: int, step: int) -> str:
    return f"{checkpoints_prefix(job_id)}{attempt}-{step}/state"


def checkpoint_marker_key(job_id: str, attempt: int, step: int) -> str:
    """Name what is written last: a checkpoint counts once this exists."""
    return f"{checkpoints_prefix(job_id)}{attempt}-{step}/COMMITTED"


def committed_checkpoint(key: str) -> tuple[int, int] | None:
    """Return (attempt, step) if the key is a checkpoint's marker, else None: the inverse of `checkpoint_marker_key`."""
    match = re.fullmatch(r"jobs/[^/]+/checkpoints/(\d+)-(\d+)/COMMITTED", key)
    return (int(match[1]), int(match[2])) if match else None


def job_of_checkpoint(key: str) -> str | None:
    """Return the job's id if the key is of one of its checkpoints."""
    match = re.fullmatch(r"jobs/([^/]+)/checkpoints/.+", key)
    return match[1] if match else None


def all_adapters_prefix() -> str:
    """Below it are the versions of every tenant: see `owner_of_version`."""
    return "adapters/"


def adapters_prefix(tenant: str) -> str:
    return f"{all_adapters_prefix()}{_part(tenant)}/"


def owner_of_version(key: str) -> tuple[str, str, str]:
    """Return (tenant, base, name) of a file of a version."""
    tenant, base, name = map(_name, key.split("/")[1:4])
    return tenant, base, name


def adapter_versions_prefix(tenant: str, base: str, name: str) -> str:
    return f"{adapters_prefix(tenant)}{_part(base)}/{_part(name)}/"


def adapter_prefix(tenant: str, base: str, name: str, version: str) -> str:
    return f"{adapter_versions_prefix(tenant, base, name)}{_part(version)}/"


def numbers_prefix(tenant: str, base: str, name: str) -> str:
    return f"numbers/{_part(tenant)}/{_part(base)}/{_part(name)}/"


def number_key(tenant: str, base: str, name: str, number: int) -> str:
    return f"{numbers_prefix(tenant, base, name)}{number}.json"


def number_of_key(key: str) -> int:
    """Return the number: the inverse of `number_key`."""
    return int(key.rpartition("/")[2].removesuffix(".json"))


def aliases_prefix(tenant: str) -> str:
    """Aliases lie beside the adapters: listing a tenant's adapters does not list the files of every version."""
    return f"aliases/{_part(tenant)}/"


def adapter_aliases_prefix(tenant: str, base: str, name: str) -> str:
    return f"{aliases_prefix(tenant)}{_part(base)}/{_part(name)}/"


def alias_key(tenant: str, base: str, name: str, alias: str) -> str:
    return f"{adapter_aliases_prefix(tenant, base, name)}{_part(alias)}.json"


def last_published_key(tenant: str) -> str:
    """Name what changes whenever a name comes to mean something else, so that who waits for that reads nothing else."""
    return f"published/{_part(tenant)}.json"


def adapter_of_alias(key: str) -> tuple[str, str, str]:
    """Return (base, name, alias): the inverse of `alias_key`."""
    _, _, base, name, file = key.split("/")
    return _name(base), _name(name), _name(file.removesuffix(".json"))


def _part(name: str) -> str:
    quoted = quote(name, safe="", errors="surrogatepass")  # JSON can hold half a surrogate pair
    return f"%2E{quoted[1:]}" if quoted.startswith(".") else quoted


def _name(part: str) -> str:
    return unquote(part, errors="surrogatepass")
