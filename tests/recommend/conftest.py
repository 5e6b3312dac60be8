"""Recommenders where every list can be worked out on paper."""

from __future__ import annotations

import pytest
from support.paper_recommender import IMAGES, TEXTS, make_recommender

from hellm.data import ItemFeatures
from hellm.models.graph.content import ItemContent
from hellm.recommend import Recommender


@pytest.fixture
def recommender() -> Recommender:
    return make_recommender()


@pytest.fixture
def content() -> ItemContent:
    """Two nearest per item and modality, itself included."""
    return ItemContent.of({"text": ItemFeatures.from_values(TEXTS), "image": ItemFeatures.from_values(IMAGES)}, k=2)
