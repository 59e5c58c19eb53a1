"""The tiny models cover every family that the installed mlx-lm has."""

from families import zoo
from families.configs import KNOWN, VARIANTS


def test_every_family_has_a_tiny_config():
    new = sorted(set(zoo.FAMILIES) - KNOWN)
    assert not new, f"mlx-lm has new families: add a tiny config of {new} to {zoo.CONFIGS}"
    gone = sorted(KNOWN - set(zoo.FAMILIES))
    assert not gone, f"mlx-lm has no {gone} any more: take them out of {zoo.CONFIGS}"
    assert {family for family, _ in VARIANTS.values()} <= KNOWN


def test_families_are_modules_that_hold_a_model_and_how_to_read_its_config():
    assert len(zoo.FAMILIES) > 100
    # One of its own, one that takes another's class, one that has both from elsewhere.
    assert {"llama", "solar_open", "smollm3"} <= set(zoo.FAMILIES)
    assert not {"base", "cache", "rope_utils", "mla", "ssm", "switch_layers"} & set(zoo.FAMILIES)


def test_other_names_of_a_family_lead_to_one_that_is_covered():
    from mlx_lm.utils import MODEL_REMAPPING

    assert set(MODEL_REMAPPING.values()) <= KNOWN
