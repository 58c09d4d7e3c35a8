"""Why a GPU cannot be used, and the cure. The functions take plain values, not a GPU."""

import re
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from utils.errors import UserError

OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}  # by CUDA's major version: NVIDIA's release notes
INSTALL = "Install a CUDA build of torch: https://pytorch.org/get-started/locally."
AMPERE = (8, 0)  # compute capability of the first GPUs with bfloat16


def gpu_fault(index: int) -> str:
    """Why this machine's GPU cannot be used, and the cure; "" if it can or there is none."""
    if not torch.cuda.is_available():
        return no_gpu_fault(torch.version.cuda, driver_version())
    if index >= torch.cuda.device_count() or torch.version.cuda is None:  # None: ROCm
        return ""
    archs = torch.cuda.get_arch_list()
    return kernel_fault(torch.cuda.get_device_capability(index), archs, torch.__version__)


def no_gpu_fault(torch_cuda: str | None, driver: str) -> str:
    """Why torch sees no GPU, and the cure; "" without any sign that there should be one.

    Args:
        torch_cuda: torch.version.cuda; None for a build without CUDA.
        driver: Version of the NVIDIA driver; "" if there is none.
    """
    if torch_cuda is None and not driver:
        return ""
    if torch_cuda is None:
        return f"this torch is a CPU build, but NVIDIA driver {driver} is here. {INSTALL}"
    newest = max(OLDEST_DRIVER.values())
    needed = OLDEST_DRIVER.get(int(torch_cuda.split(".")[0]), newest)
    built = f"this torch is built for CUDA {torch_cuda} and needs NVIDIA driver {needed} or later"
    if not driver:
        return f"{built}; no driver is found. Install it; start a container with --gpus all."
    if int(driver.split(".")[0]) < needed:
        return f"{built}; driver {driver} is here. Update it, or install torch for an older CUDA."
    return f"{built}; {driver} is here, but no GPU. Check nvidia-smi and CUDA_VISIBLE_DEVICES."


def kernel_fault(capability: tuple[int, int], archs: Sequence[str], torch_version: str) -> str:
    """Why torch has no kernels for a GPU, and the cure; "" if it has.

    Args:
        capability: Of the GPU, as (7, 5).
        archs: torch.cuda.get_arch_list(), as sm_75 (kernels for 7.5 and later 7.x) and
            compute_90 (code that the driver compiles for 9.0 and all later GPUs).
        torch_version: With its CUDA version, as 2.11.0+cu130.
    """
    known = [re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", arch) for arch in archs]
    kernels = [(match[1], (int(match[2]), int(match[3]))) for match in known if match]
    if not kernels or any(_runs_on(capability, kind, arch) for kind, arch in kernels):
        return ""
    oldest = min(arch for _, arch in kernels)
    cure = "for an older CUDA" if capability < oldest else "of a newer version"
    return (
        f"torch {torch_version} has no kernels for this GPU of compute capability "
        f"{capability[0]}.{capability[1]}, only {' '.join(archs)}. Install a torch {cure}: "
        "https://pytorch.org/get-started/locally."
    )


def _runs_on(capability: tuple[int, int], kind: str, arch: tuple[int, int]) -> bool:
    """Whether code for `arch` runs on the GPU: kernels (sm) within a major version only."""
    return arch <= capability and (kind == "compute" or arch[0] == capability[0])


def check_bf16(capability: tuple[int, int]) -> None:
    """Raise UserError for a GPU, given by its compute capability, that has no bfloat16."""
    if capability < AMPERE:
        raise UserError(
            f"amp 'bf16' needs a GPU of compute capability 8.0 (Ampere) or later; this one has "
            f"{capability[0]}.{capability[1]}. Use --amp fp16."
        )


def driver_version() -> str:
    """Version of the NVIDIA driver; "" if none is found."""
    text = ""
    with suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    if not text:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with suppress(OSError, subprocess.TimeoutExpired):
            text = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    found = re.search(r"\d+\.\d[.\d]*", text)
    return found.group() if found else ""
