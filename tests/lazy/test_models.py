"""Models of transformers with lazy heads: the same loss and gradients, without logits."""

from __future__ import annotations

import pytest

transformers = pytest.importorskip("transformers")

from . import families  # noqa: E402

FEW = {
    "causal": ("llama", "gpt2", "gemma2", "cohere", "granite", "opt", "mixtral", "mamba", "bloom"),
    "masked": ("bert", "albert"),
    "sequence to sequence": ("bart", "t5"),
    "vision and speech": ("llava", "whisper"),
}
ALL = [(kind, family) for kind in families.KINDS for family, _ in families.families(kind)]


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        pytest.param(*each, marks=() if each[1] in FEW[each[0]] else pytest.mark.nightly)
        for each in ALL
    ],
)
def test_a_step_without_logits(kind: str, family: str) -> None:
    name = dict(families.families(kind))[family]
    try:
        with families.quiet():
            found = families.compare(family, name)
    except families.CannotBuild as why:
        assert family not in FEW[kind], why
        pytest.skip(str(why))
    assert found.fused, found.why
    assert found.loss < 1e-6 and found.gradient < 2e-5
    assert found.bytes[1] < found.bytes[0] / 4
