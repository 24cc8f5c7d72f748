"""A slice of `python -m tests.support.fuzz_configs`, which runs 2,000."""

from tests.support.fuzz_configs import fuzz


def test_no_damaged_checkpoint_ends_in_anothers_exception():
    found = fuzz(30, seed=1)
    print(found)
    assert not found.failures, "\n".join(found.failures)
    assert {"embed: read", "embed: CheckpointError", "info: CheckpointError", "fingerprint: CheckpointError"} <= {
        *found.outcomes
    }
