"""Copies to the host wait for the device that makes them."""

import pytest
import torch

from minivlm2vec.transfer import HostCopy
from tests.support.two_cards import OnCard, two_cards


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_a_copy_is_waited_for_on_its_own_device(device):
    values = torch.arange(12.0).view(3, 4)
    with two_cards():
        copy = HostCopy(OnCard(values.clone(), device))
        early = copy._host.clone()
        arrived = copy.wait()
    assert early.isnan().all(), "the stand-in must show what was not waited for"
    assert torch.equal(arrived, values)


def test_on_the_cpu_nothing_is_copied():
    values = torch.arange(3.0)
    assert HostCopy(values).wait() is values
