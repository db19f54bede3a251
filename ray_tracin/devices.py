"""What a process computes on: the GPU that it sees, or its CPU, and how much of a GPU is its own."""

import socket

import torch

from ray_tracin.runs import Run

SHARED_MEMORY = 0.95
"""Of a GPU's memory that workers have for tensors, where several are on it; CUDA itself takes some for each of them."""


def pick_device(run: Run) -> torch.device:
    """What a worker computes on: what ``resources.device`` names; ``auto`` is a GPU where there is one.

    Raises:
        ValueError: a GPU is asked for and there is none.
    """
    device = device_here(run)
    if run.config.resources.device == "cuda" and device.type == "cpu":
        raise ValueError(
            f"expected a GPU on {socket.gethostname()} (resources.device is cuda, or auto where Ray has GPUs), and "
            f"PyTorch {torch.__version__} sees none there: set resources.device=cpu, or give it a PyTorch for its GPU"
        )
    return device


def device_here(run: Run) -> torch.device:
    """What a command computes on by itself: a GPU where there is one and ``resources.device`` allows it, or the CPU.

    A run that was made on GPUs can be looked at and asked without one.
    """
    allowed = run.config.resources.device != "cpu"
    return torch.device("cuda" if allowed and torch.cuda.is_available() else "cpu")


def device_name(run: Run) -> str:
    """``cpu``, or the name of the GPU that work is done on here."""
    return torch.cuda.get_device_name() if device_here(run).type == "cuda" else "cpu"


def keep_to_share(run: Run) -> None:
    """Where several workers are on a GPU: no more of its memory than this one's share, which the others would lack."""
    share = run.config.resources.gpus_per_worker
    if share < 1 and device_here(run).type == "cuda":
        torch.cuda.set_per_process_memory_fraction(SHARED_MEMORY * share)
