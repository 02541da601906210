"""Licences: spelt as SPDX does, and told apart by whether they allow every use."""

from __future__ import annotations

import pytest

from d2ls_infer.licence import SPDX, is_restricted, spdx_of


@pytest.mark.parametrize("known", SPDX)
def test_identifier_is_known_however_it_is_spelt(known: str) -> None:
    for text in (known, known.lower(), known.replace("-", " "), known.replace("-", "_").upper()):
        assert spdx_of(text) == known


@pytest.mark.parametrize("text", ["", "unknown", "research use only (ISPRS benchmark)", "LicenseRef-mine", "CC-BY-3.0"])
def test_other_terms_have_no_identifier(text: str) -> None:
    assert spdx_of(text) is None


@pytest.mark.parametrize(
    ("text", "restricted"),
    [
        ("Apache-2.0", False), ("CC-BY-4.0", False), ("CC0-1.0", False), ("unknown", False), ("public domain", False),
        ("CC-BY-NC-SA-4.0", True), ("CC BY-NC 4.0", True), ("research use only (ISPRS benchmark)", True),
        ("for non-commercial use", True), ("noncommercial", True), ("Academic use", True),
    ],
)  # fmt: skip
def test_terms_that_keep_uses_out_are_told_apart(text: str, restricted: bool) -> None:
    assert is_restricted(text) == restricted
