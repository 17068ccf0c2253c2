"""Every feature of diffusers on every model, as docs/model_features.md has it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models import features
from tests.video_models import TINY

pytestmark = pytest.mark.filterwarnings(
    "ignore:attention computes .* of all token pairs",  # a graft says so, rightly
    "ignore:In CPU autocast, but the target dtype",  # Mochi's own
    "ignore:The .grad attribute of a Tensor that is not a leaf",  # torch.compile's own
)


@pytest.mark.parametrize("title", features.FEATURES)
@pytest.mark.parametrize("name", TINY)
def test_features_hold_or_are_refused_by_name(name, title):
    refused = features.refusal(name, title)
    if refused is None:
        features.FEATURES[title](name)
        return
    with pytest.raises((ValueError, AttributeError), match=refused[0]):
        features.FEATURES[title](name)


def test_the_page_says_what_the_tests_hold():
    page = (Path(__file__).parents[2] / features.PATH).read_text()
    assert page == features.document(), "python -m tests.models.features"


def test_refusals_are_of_features_that_there_are():
    titles = {key if isinstance(key, str) else key[1] for key in features.REFUSALS}
    assert titles <= set(features.FEATURES)
