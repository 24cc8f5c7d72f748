"""pytest on a pretended card (see card.py). What is to happen on a card:

    python -m pytest -p tests.kernels.pretended.plugin tests/kernels/pretended/rehearsal.py

The tests that need a card, as far as they go:

    python -m pytest -p tests.kernels.pretended.plugin -m gpu

Their assertions are about numbers, which are not there: one that fails is reported as skipped, and so is a gradient;
any other error is an error.
"""

from collections.abc import Iterator

import hypothesis  # noqa: F401  before the card is there, as some modules remember what they find
import pytest
import torch
import torch._dynamo
from torch._subclasses.fake_tensor import FakeTensor

from minivlm2vec.inference import fused
from tests.kernels.pretended.card import Card, NoGradients, pretend_card

_pretending = pretend_card()
_card = _pretending.__enter__()  # before conftest.py asks for a card


def _type(x: object) -> type:
    """A parameter on the card is a fake tensor; `fused.is_plain` would take it for somebody else's class."""
    return torch.nn.Parameter if isinstance(x, FakeTensor) and isinstance(x, torch.nn.Parameter) else type(x)


fused.type = _type


@pytest.fixture
def card() -> Iterator[Card]:
    _card.forget()
    _card.become((9, 0))
    with torch.no_grad():
        yield _card


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    no_numbers = call.excinfo is not None and call.excinfo.errisinstance((AssertionError, NoGradients))
    if report.failed and no_numbers and item.get_closest_marker("gpu"):
        report.outcome = "skipped"
        report.longrepr = (str(item.path), 0, f"Skipped: {call.excinfo.typename}: {call.excinfo.value}"[:300])
    return report
