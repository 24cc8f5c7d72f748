"""pytest on a pretended card (see pretend_card.py):

    python -m pytest -p tests.kernels.pretended tests/kernels/rehearsal.py     what is to happen on a card
    python -m pytest -p tests.kernels.pretended -m gpu                 the tests that need a card, as far as they go

Assertions of the latter are about numbers, which are not there: that one fails is reported as skipped, like a gradient;
any other error is an error.
"""

from collections.abc import Iterator

import hypothesis  # noqa: F401  before the card is there, as some modules remember what they find
import pytest
import torch
import torch._dynamo

from tests.kernels.pretend_card import Card, NoGradients, pretend_card

_pretending = pretend_card()
_card = _pretending.__enter__()  # before conftest.py asks for a card


@pytest.fixture
def card() -> Iterator[Card]:
    _card.forget()
    _card.capability = (9, 0)
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
