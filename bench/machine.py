"""What a bench ran on: the card, its driver and its clock, torch and Triton, the commit."""

import datetime
import platform
import statistics
import subprocess
import threading
from pathlib import Path

import torch

CLOCK_SECONDS = 0.05  # between two samples of the clock


def describe_machine(device: torch.device) -> dict[str, str]:
    cuda = device.type == "cuda"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M"),
        "gpu": torch.cuda.get_device_name(device) if cuda else f"CPU {platform.machine()}",
        "driver": nvidia_smi("driver_version", uuid(device)) if cuda else "",
        "torch": torch.__version__,
        "triton": triton_version(),
        "cudnn": str(torch.backends.cudnn.version() or "") if cuda else "",
        "commit": commit(),
    }


def triton_version() -> str:
    try:
        import triton
    except ImportError:
        return ""
    return triton.__version__


def commit() -> str:
    """Of the working tree, with a + if it has changes; empty outside git."""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=10", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def uuid(device: torch.device) -> str:
    """As nvidia-smi writes it: its indices know nothing of CUDA_VISIBLE_DEVICES."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def nvidia_smi(query: str, gpu: str) -> str:
    """What it says of the card with this UUID; empty where it says nothing."""
    command = ["nvidia-smi", f"--id={gpu}", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else ""


class Clock:
    """The device's SM clock in MHz, sampled by a thread while the block runs: after it the card has nothing to do, and
    clocks fall or rise at once. Nothing on a CPU."""

    def __init__(self, device: torch.device):
        self.samples: list[float] = []
        self._over = threading.Event()
        self._thread = None
        if device.type == "cuda":
            self._thread = threading.Thread(target=self._sample, args=(uuid(device),), daemon=True)

    def __enter__(self) -> "Clock":
        if self._thread:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread:
            self._thread.join()

    def _sample(self, gpu: str) -> None:
        while not self._over.is_set():
            reading = nvidia_smi("clocks.sm", gpu)
            if reading.replace(".", "", 1).isdigit() and not self._over.is_set():  # one that ended within the block
                self.samples.append(float(reading))
            self._over.wait(CLOCK_SECONDS)

    def median(self) -> str:
        return f"{statistics.median(self.samples):.0f}" if self.samples else ""

    def lowest(self) -> str:
        return f"{min(self.samples):.0f}" if self.samples else ""
