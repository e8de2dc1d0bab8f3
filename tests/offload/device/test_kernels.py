"""The library of CUDA kernels: built where nvcc is, told apart where it does not fit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import offload
from offload.device.kernels import LIBRARY, Kernels
from offload.device.updates import Arrays
from offload.native import AdamSettings

SETTINGS = AdamSettings(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)
built = pytest.mark.skipif(not LIBRARY.exists(), reason="the CUDA kernels are not built here")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_where_nvcc_is_the_kernels_are_built() -> None:
    assert LIBRARY.exists()
    Kernels()


@built
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_cudas_own_error_is_named() -> None:
    row = torch.zeros(4)
    with pytest.raises(RuntimeError, match=r"an update of 4 parameters: cudaError\w+ \(\d+\)"):
        Kernels().update(SETTINGS, 1, Arrays(row, row, row, row, None), clip=1.0, stream=0)


def test_a_missing_library_says_how_it_comes_to_be(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match="which is built where nvcc is found"):
        Kernels(tmp_path / "none.so")


def test_parameters_of_another_device_are_refused() -> None:
    host, other = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2).to("meta"))
    with pytest.raises(ValueError, match="is on meta, and others are on cpu"):
        offload.AdamW([host, other])


@built
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", [{}, {"placement": "device"}, {"update_schedule": "device"}])
def test_on_a_gpu_the_bits_are_the_hosts(dtype: torch.dtype, settings: dict[str, str]) -> None:
    def trained(device: str, **chosen: str) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        params = [
            torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype).to(device))
            for shape in ((333, 7), (10_000,), (5,), (256, 256))
        ]
        optimizer = offload.AdamW(params, subgroup_params=3000, max_norm=1.0, **chosen)
        for _ in range(4):
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator).to(dtype).to(device)
            optimizer.step()
        states = optimizer.state_dict()["state"]
        optimizer.close()
        moments = [states[number]["exp_avg_sq"] for number in range(len(params))]
        return [each.detach().cpu() for each in (*params, *moments)]

    assert all(map(torch.equal, trained("cuda", **settings), trained("cpu")))


@built
def test_arrays_that_do_not_fit_are_refused_before_a_kernel_sees_them() -> None:
    row, kernels = torch.zeros(4), Kernels()
    for arrays, said in (
        (Arrays(row, row, row[:3], row, None), "exp_avg has 3 elements, but grad 4"),
        (Arrays(row, row, row, row, torch.zeros(8)[::2]), "param is on cpu with strides"),
        (Arrays(row, row.double(), row, row, None), "master_param is float64"),
    ):
        with pytest.raises(ValueError, match=said):
            kernels.update(SETTINGS, 1, arrays, clip=1.0, stream=0)
