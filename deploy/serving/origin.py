"""What a published adapter was trained on, against what it would be served on."""

from __future__ import annotations

from cluster.registry import AdapterVersion


def origin_problem(version: AdapterVersion, base: str, fingerprint: str, template: str) -> str | None:
    """Say why a version must not answer on the base of this name, whose weights have this fingerprint and whose
    tokenizer and chat template have this hash; None where it is their own.
    """
    what = f"{version.base}:{version.name}@{version.version}"
    trained_on = version.manifest.get("base_fingerprint")
    if trained_on != fingerprint:
        return (
            f"{what} was trained on another base (weights {str(trained_on)[:16]}) than {base} is here"
            f" ({fingerprint[:16]}); train it again on this one, or serve the other"
        )
    if version.manifest.get("tokenizer", template) != template:
        return (
            f"{what} was trained with another tokenizer or chat template than the one of {base};"
            " train it again with this one"
        )
    return None
