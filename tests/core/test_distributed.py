"""What torchrun started: shares, devices, and exchange between two real processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minivlm2vec.distributed import Ranks

ROOT = Path(__file__).parents[2]


def ranks(monkeypatch, rank: int = 0, world: int = 1, local_world: int | None = None, gpus: int = 0) -> Ranks:
    """As one of `world` processes, without starting any."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr("minivlm2vec.distributed._new_group", lambda: None)
    local_world = local_world or world
    settings = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank % local_world, "LOCAL_WORLD_SIZE": local_world}
    for name, value in settings.items():
        monkeypatch.setenv(name, str(value))
    return Ranks()


def test_without_torchrun_there_is_one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    x = torch.ones(2, 3, requires_grad=True)
    with Ranks() as one:
        one.barrier()
        assert (one.rank, one.world, one.first) == (0, 1, True)
        assert one.share([1, 2, 3]) == [1, 2, 3] and one.agree(b"ab") == b"ab" and one.largest(7) == 7
        assert one.gather(x) is x
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("n", [0, 1, 5, 12])
def test_shares_are_runs_that_make_up_the_whole(monkeypatch, n):
    shares = [ranks(monkeypatch, rank, 3).share(range(n)) for rank in range(3)]
    assert [i for share in shares for i in share] == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(
    ("wanted", "world", "gpus", "expected"),
    [
        (None, 1, 4, None),
        (None, 2, 0, None),
        (None, 2, 4, "cuda:1"),
        (None, 2, 1, "cuda:0"),
        ("cuda", 2, 4, "cuda:1"),
        ("cuda", 2, 0, "cuda"),
        (torch.device("cuda"), 2, 4, "cuda:1"),
        ("cpu", 2, 4, "cpu"),
        ("cuda:3", 2, 4, "cuda:3"),
        (torch.device("cuda", 0), 2, 4, "cuda:0"),
    ],
)
def test_an_explicit_device_wins(monkeypatch, wanted, world, gpus, expected):
    assert ranks(monkeypatch, world - 1, world, gpus=gpus).device(wanted) == expected


@pytest.mark.parametrize("wanted, current", [(None, "cuda:1"), ("cuda", "cuda:1"), ("cuda:3", "cuda:3"), ("cpu", None)])
def test_a_ranks_gpu_is_its_current_device(monkeypatch, wanted, current):
    """Else events and copies that name no device are those of the first GPU, in every process."""
    made, chosen = ranks(monkeypatch, 1, 2, gpus=4), []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(str(device)))
    made.device(wanted)
    assert chosen == ([current] if current else [])


def test_one_gpu_for_two_exclusive_ranks_is_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"device cuda:0 is one GPU for the 2 processes.*leave the device out"):
        ranks(monkeypatch, 1, 2, gpus=4).device("cuda:0", exclusive=True)
    for wanted, expected in ((None, "cuda:1"), ("cuda", "cuda:1"), ("cpu", "cpu")):
        assert ranks(monkeypatch, 1, 2, gpus=4).device(wanted, exclusive=True) == expected
    one_on_each_machine = ranks(monkeypatch, 1, 2, local_world=1, gpus=4)
    assert one_on_each_machine.device("cuda:2", exclusive=True) == "cuda:2"


SCRIPT = """
import torch
from minivlm2vec.distributed import Ranks

for turn in range(2):  # a second one in the same processes
    with Ranks() as ranks:
        assert (ranks.world, ranks.local_world, ranks.first) == (2, 2, ranks.rank == 0)
        assert ranks.agree(bytes([ranks.rank, 5 + turn])) == bytes([0, 5 + turn])
        assert ranks.largest(10 * ranks.rank + turn) == 10 + turn
        x = torch.full((1 + ranks.rank, 2), float(ranks.rank), requires_grad=True)
        rows = ranks.gather(x)
        assert rows.tolist() == [[0, 0], [1, 1], [1, 1]]
        (rows * torch.tensor([[1.0], [2.0], [3.0]])).sum().backward()
        assert x.grad.tolist() == ([[1, 1]] if ranks.rank == 0 else [[2, 2], [3, 3]])
        ranks.barrier()
print("well")
"""


def test_two_processes_exchange(tmp_path):
    done = torchrun(tmp_path, SCRIPT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("well") == 2 and "destroy_process_group" not in done.stderr


LEAVING = """
from minivlm2vec.distributed import Ranks

ranks = Ranks()
if ranks.first:
    try:
        ranks.barrier()
    except RuntimeError:
        print("it is gone")
"""


def test_a_rank_that_is_gone_is_not_waited_for(tmp_path):
    """The timeout is a year, but a closed connection is seen at once."""
    done = torchrun(tmp_path, LEAVING)
    assert "it is gone" in done.stdout, done.stderr[-3000:]


def torchrun(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    (folder / "script.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "script.py"]
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=120)
