"""Licences of weights: how SPDX spells them, and which of them do not allow every use."""

from __future__ import annotations

import re

SPDX = (
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "CC0-1.0",
    "CC-BY-4.0",
    "CC-BY-SA-4.0",
    "CC-BY-ND-4.0",
    "CC-BY-NC-4.0",
    "CC-BY-NC-SA-4.0",
    "CC-BY-NC-ND-4.0",
    "GPL-3.0-only",
    "MIT",
    "ODbL-1.0",
)
"""Identifiers of licences that weights and imagery come under; more are at https://spdx.org/licenses."""


def spdx_of(licence: str) -> str | None:
    """The identifier that a text means, however it is spelt: "CC BY 4.0" -> "CC-BY-4.0". None for other terms."""
    return {bare(known): known for known in SPDX}.get(bare(licence))


def bare(text: str) -> str:
    """Letters and digits alone, in lower case."""
    return re.sub(r"[^a-z0-9]", "", text.lower())


def is_restricted(licence: str) -> bool:
    """Whether the terms keep some uses out: research only, or nothing commercial."""
    return bool(re.search(r"research|academic|non-?\s?commercial|\bnc\b", licence, re.IGNORECASE))
