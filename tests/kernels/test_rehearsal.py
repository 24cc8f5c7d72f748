"""On a machine without a card: what is to happen on one, on a pretended one (pretended/card.py)."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.helpers import compiling_environment

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card: pytest -m gpu")


def pytest_on_a_pretended_card(arguments: tuple[str, ...]) -> str:
    command = [sys.executable, "-m", "pytest", "-p", "tests.kernels.pretended.plugin", "-q", "--tb=short", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=compiling_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return f"{done.stdout}\nexit status {done.returncode}"


REHEARSAL = "tests/kernels/pretended/rehearsal.py"


def test_rehearsal():
    report = pytest_on_a_pretended_card((REHEARSAL,))
    assert report.endswith("exit status 0") and " passed" in report, report[-8000:]


@pytest.mark.slow
def test_more_of_the_rehearsal():
    report = pytest_on_a_pretended_card(("-m", "slow", REHEARSAL))
    assert report.endswith("exit status 0") and " passed" in report, report[-8000:]


@pytest.mark.slow
def test_tests_that_need_a_card_run_as_far_as_their_numbers():
    report = pytest_on_a_pretended_card(("-m", "gpu", "tests"))
    assert report.endswith("exit status 0"), report[-8000:]
    assert int(re.search(r"(\d+) passed", report)[1]) > 200, report[-8000:]
