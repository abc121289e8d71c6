"""Fixtures for the tests of `blipfit.runtime`."""

import pytest
import torch

from blipfit.runtime import attention


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers in every test."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture
def batched_shapes(monkeypatch) -> list[torch.Size]:
    """Shapes of the queries whose attention was computed as batched products."""
    shapes, apply = [], attention._Attention.apply

    def record(query, *rest):
        shapes.append(query.shape)
        return apply(query, *rest)

    monkeypatch.setattr(attention._Attention, "apply", record)
    return shapes
