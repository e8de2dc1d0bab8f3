"""Builds `offload._C`, the native core. Everything else about the package is in pyproject.toml."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

SOURCES = sorted(map(str, [*Path("csrc/core").glob("*.cpp"), *Path("csrc/bindings").glob("*.cpp")]))
# What every object file is built from besides its own source: a changed header or flag rebuilds.
SHARED = ["setup.py", *sorted(map(str, Path("csrc").rglob("*.h")))]
# Fixed, so that a rebuild after one edit compiles one file; named after those whose headers the
# objects contain.
OBJECTS = f"build/ext/{sys.implementation.cache_tag}-pybind11-{pybind11.__version__}"


def is_stale(object_file: str, source: str) -> bool:
    """Say whether `object_file` is missing or older than anything it was compiled from."""
    try:
        built = os.stat(object_file).st_mtime
    except FileNotFoundError:
        return True
    return any(os.stat(path).st_mtime > built for path in (source, *SHARED))


# The kernels are a library of their own, which needs no Python and brings CUDA's runtime along.
KERNELS = sorted(map(str, Path("csrc/cuda").glob("*.cu")))
ARCHITECTURES = [
    *("-gencode", "arch=compute_80,code=sm_80"),
    *("-gencode", "arch=compute_90,code=[sm_90,compute_90]"),
]


class BuildAll(build_ext):
    """Builds the native core, and where nvcc is the CUDA kernels beside it."""

    def run(self):
        """Build what is not up to date."""
        super().run()
        nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
        target = Path(self.get_ext_fullpath("offload._C")).with_name("_cuda_kernels.so")
        if nvcc is None or not any(is_stale(str(target), source) for source in KERNELS):
            return
        command = [nvcc, "--threads", "0", "-std=c++20", "-O3", "-fmad=false"]
        command += ["-shared", "-Xcompiler", "-fPIC"]
        # To its place at once: a library that a process has loaded must not change under it.
        part = target.with_suffix(".part")
        done = subprocess.run([*command, *ARCHITECTURES, *KERNELS, "-o", str(part)], check=False)
        if done.returncode:
            lost = "AdamW will not take parameters on a GPU, attention of blocks be PyTorch's there"
            print(f"{nvcc} failed: {lost}", file=sys.stderr)
        else:
            part.replace(target)


ParallelCompile(needs_recompile=is_stale).install()

setup(
    ext_modules=[
        Pybind11Extension(
            "offload._C",
            SOURCES,
            depends=SHARED,
            cxx_std=20,
            extra_compile_args=[
                *("-O3", "-Wall", "-Wextra", "-pthread"),
                # The interpreter's own flags switch assert() off, and ours stay on.
                "-UNDEBUG",
                # The optimizer's arithmetic is fused where it says so and nowhere else; roots and
                # choices may become vectors, since nobody asks for errno or traps.
                *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
            ],
            extra_link_args=["-pthread"],
        )
    ],
    cmdclass={"build_ext": BuildAll},
    options={"build_ext": {"build_temp": OBJECTS}},
)
