"""Cortices: registration and assignment."""

from __future__ import annotations

import pytest

from canvas_engineering.cortex import CortexRegistry, CortexSpec


def registry():
    made = CortexRegistry()
    made.register(CortexSpec("visual"))
    made.register(CortexSpec("motor", local_backend="gated"))
    for region, cortex in (("eye.left", "visual"), ("arm", "motor"), ("eye", "visual")):
        made.assign(region, cortex)
    return made


def test_regions_belong_to_one_cortex():
    made = registry()
    assert made.regions_in("visual") == ["eye", "eye.left"] and made.cortex_names == ["motor", "visual"]
    assert (made.n_cortices, made.n_assigned) == (2, 3)
    assert made.cortex_for("arm").local_backend == "gated" and made.cortex_for("leg") is None
    assert made.same_cortex("eye", "eye.left") and not made.same_cortex("eye", "arm")
    assert not made.same_cortex("leg", "foot"), "two regions in no cortex share none"
    made.assign("arm", "motor")
    made.unassign("arm")
    made.assign("arm", "visual")
    assert made.same_cortex("arm", "eye")


def test_unregistering_drops_assignments():
    made = registry()
    made.unregister("visual")
    assert made.n_assigned == 1 and made.cortex_for("eye") is None and made.cortex_names == ["motor"]


def test_summary_lists_cortices():
    assert registry().summary().splitlines() == [
        "CortexRegistry: 2 cortices, 3 regions assigned",
        "  motor: gated, arm",
        "  visual: local_attention, eye, eye.left",
    ]


def test_mistakes_are_named():
    made = registry()
    with pytest.raises(ValueError, match="cortex 'visual' is registered already"):
        made.register(CortexSpec("visual"))
    with pytest.raises(ValueError, match="region 'eye' is in cortex 'visual': unassign it before it goes to 'motor'"):
        made.assign("eye", "motor")
    for ask in (lambda: made.assign("eye", "x"), lambda: made.regions_in("x"), lambda: made.unregister("x")):
        with pytest.raises(KeyError, match=r"no cortex 'x'; registered are \['motor', 'visual'\]"):
            ask()
    with pytest.raises(KeyError, match="region 'leg' is in no cortex"):
        made.unassign("leg")
    with pytest.raises(ValueError, match=r"cortex 'c': bounds must be pairs .* got \(0, 1, 3, 2\)"):
        CortexSpec("c", bounds=(0, 1, 3, 2))
    with pytest.raises(ValueError, match="cortex 'c': every tile size must be at least 1, got 0"):
        CortexSpec("c", tile=(4, 0))
    with pytest.raises(ValueError, match="cortex 'c': local_backend must name an attention function, got ''"):
        CortexSpec("c", local_backend="")
