"""What is printed about a GPU that cannot be used. No test needs one."""

import pytest
import torch

from engine.settings import amp_dtype
from utils.distributed import select_device
from utils.errors import UserError
from utils.gpu import check_bf16, driver_version, gpu_fault, kernel_fault, no_gpu_fault

# torch.cuda.get_arch_list() of torch for CUDA 13.0 on Linux, and of an older one.
CUDA_13 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
CUDA_11 = ("sm_37", "sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86")


def test_nothing_is_printed_without_any_sign_of_a_gpu():
    assert no_gpu_fault(None, "") == ""


@pytest.mark.parametrize(
    ("torch_cuda", "driver", "parts"),
    [
        (None, "550.54.14", ["CPU build", "550.54.14", "CUDA build"]),
        ("13.0", "", ["CUDA 13.0", "580 or later", "no driver is found", "--gpus all"]),
        ("13.0", "535.129.03", ["CUDA 13.0", "580 or later", "535.129.03", "older CUDA"]),
        ("12.6", "470.82.01", ["CUDA 12.6", "525 or later", "470.82.01", "Update"]),
        ("12.6", "535.129.03", ["CUDA 12.6", "535.129.03", "CUDA_VISIBLE_DEVICES"]),
        ("14.1", "535.129.03", ["CUDA 14.1", "580 or later", "Update"]),
    ],
)
def test_no_usable_driver_gives_the_versions_and_the_cure(torch_cuda, driver, parts):
    fault = no_gpu_fault(torch_cuda, driver)
    for part in parts:
        assert part in fault


@pytest.mark.parametrize(
    ("capability", "archs"),
    [
        ((7, 5), CUDA_13),
        ((8, 9), CUDA_13),  # kernels for 8.6 run on every later 8.x
        ((9, 0), CUDA_13),
        ((9, 0), ("sm_80", "sm_90a")),
        ((12, 1), CUDA_13),
        ((9, 0), (*CUDA_11, "compute_86")),  # compiled by the driver
        ((9, 0), ()),  # a build that does not list them
        ((9, 0), ("gfx90a", "gfx942")),  # ROCm's
    ],
)
def test_a_gpu_with_kernels_has_no_fault(capability, archs):
    assert kernel_fault(capability, archs, "2.11.0") == ""


@pytest.mark.parametrize(
    ("capability", "archs", "cure"),
    [
        ((6, 1), CUDA_13, "older CUDA"),
        ((7, 0), CUDA_13, "older CUDA"),  # kernels for 7.5 do not run on 7.0
        ((9, 0), CUDA_11, "newer version"),
        ((11, 0), (*CUDA_13, "compute_120"), "newer version"),
    ],
)
def test_a_gpu_without_kernels_is_named_with_what_torch_has_and_the_cure(capability, archs, cure):
    fault = kernel_fault(capability, archs, "2.11.0+cu130")
    for part in (".".join(map(str, capability)), "2.11.0+cu130", archs[0], cure):
        assert part in fault


def test_bf16_before_ampere_is_one_error_that_names_fp16():
    with pytest.raises(UserError, match=r"bf16.* 7\.5.*--amp fp16"):
        check_bf16((7, 5))
    check_bf16((8, 0))
    check_bf16((12, 0))


@pytest.mark.cuda
def test_this_machines_gpu_is_usable_and_its_driver_is_found():
    assert gpu_fault(0) == ""
    assert int(driver_version().split(".")[0]) >= 450
    native = torch.cuda.get_device_capability() >= (8, 0)
    if native:
        assert amp_dtype("bf16", torch.device("cuda", 0)) == torch.bfloat16


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_cuda_build_without_a_gpu_falls_back_to_the_cpu_with_one_warning(capsys):
    assert select_device("") == torch.device("cpu")
    errors = capsys.readouterr().err
    assert errors.count("warning: the CPU is used: ") == bool(gpu_fault(0))
    assert torch.version.cuda is None or f"CUDA {torch.version.cuda}" in errors


def test_the_cpu_that_was_asked_for_has_no_warning(capsys):
    select_device("cpu")
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(torch.version.cuda is None or torch.cuda.is_available(), reason="see above")
def test_a_gpu_that_was_asked_for_is_an_error_with_the_same_reason():
    with pytest.raises(UserError) as error:
        select_device("cuda")
    assert gpu_fault(0) in str(error.value)
    assert "--device cpu" in str(error.value)
