"""The rules of the house, held against every file: who may include or import whom, names, sizes.

A rule is data in the tables below; a checker is a pure function from a file's path and text to
complaints, so that each is also shown a small bad file. Imports point down only: a module may
import modules of lower layers, or its own package's, and nothing beside or above itself.
"""

from __future__ import annotations

import ast
import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parent.parent
TREES = ("csrc", "offload", "perfmodel", "examples", "benchmarks", "tests")

# Lowest first; what stands on one line is beside each other. A new module gets its place here.
LAYERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "perfmodel": (
        ("units",),
        ("plan",),
        ("token_plan",),
        ("machine", "model", "endurance", "tape", "published"),
        ("shape",),
        ("maps",),
        ("attention", "perceptron"),
        ("model_configs", "layers", "memory", "timeline", "workload"),
        (
            "plain_models",
            "known_models",
            "operator_times",
            "parameters",
            "fingerprints",
            "megatron_arguments",
        ),
        ("schedules",),
        ("plan_file", "states", "network"),
        ("schema", "emit"),
        ("emit_megatron",),
        ("step_trace", "coarse_tape", "cluster", "zero_offload"),
        ("activation_step", "pipeline_step", "replays", "update_step"),
        ("layered_step",),
        ("prediction",),
        ("priced_steps", "validate", "step_timeline", "chosen_plan"),
        ("choices",),
        ("planner",),
        ("commands",),
        ("cli",),
        ("__init__",),
        ("__main__",),
    ),
    "offload": (
        ("config",),
        ("native",),
        ("device",),
        ("tiers",),
        ("activations", "optimizer", "tokens"),
        ("doctor", "report", "calibrate"),
        ("session",),
        ("integrations",),
        ("cli",),
        ("__init__",),
        ("__main__",),
    ),
}
# Besides the standard library, by module; None stands for the rest of the package.
FOREIGN: dict[str, dict[str | None, frozenset[str]]] = {
    "perfmodel": {None: frozenset()},
    "offload": {
        None: frozenset({"torch", "perfmodel"}),
        "config": frozenset({"perfmodel"}),
        "tokens": frozenset({"torch", "perfmodel", "safetensors", "liger_kernel"}),
        "integrations": frozenset({"torch", "perfmodel", "deepspeed", "megatron", "transformers"}),
    },
}

# Headers a folder of csrc may include in <>, besides the C++ standard library's (no dot in them).
LIBC = (
    r"(sys|linux|asm|net)/\w+\.h|(aio|dirent|errno|fcntl|limits|poll|pthread|sched|signal"
    r"|stdio|stdlib|string|time|unistd|cpuid|\w+intrin)\.h"
)
CUDA = r"cuda_(runtime|runtime_api|bf16|fp16)\.h"
PYBIND11 = r"pybind11/\w+\.h|structmember\.h"  # the second is Python's own
SYSTEM_HEADERS = {"core": LIBC, "cuda": CUDA, "bindings": f"{LIBC}|{PYBIND11}"}
# Whose headers a folder may include in "".
OWN_HEADERS = {"core": {"core"}, "cuda": {"cuda"}, "bindings": {"core", "cuda", "bindings"}}
# The arithmetic that both compilers compile, and what it is given.
OF_BOTH = ("adam_arithmetic", "adam_constants", "adam_versions", "attention_shape", "dtype")
FOR_BOTH_COMPILERS = {PurePosixPath(f"csrc/core/{name}.h") for name in (*OF_BOTH, "exponential")}

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 50
NAMES_THAT_SAY_NOTHING = {"util", "utils", "helper", "helpers", "manager", "common", "misc"}


def sources(*trees: str, suffixes: tuple[str, ...]) -> list[PurePosixPath]:
    """Every file under `trees` with one of `suffixes`, relative to the repository."""
    return sorted(
        PurePosixPath(path.relative_to(ROOT).as_posix())
        for tree in trees
        for path in (ROOT / tree).rglob("*")
        if path.suffix in suffixes and path.is_file()
    )


CXX = sources("csrc", suffixes=(".h", ".cuh", ".cpp", ".cu"))
PYTHON = sources("offload", "perfmodel", suffixes=(".py", ".pyi"))
ALL = [
    *map(PurePosixPath, ["setup.py"]),
    *sources(*TREES, suffixes=(".py", ".pyi", ".h", ".cuh", ".cpp", ".cu")),
]


# --- C++: what a file includes --------------------------------------------------------------------


def include_complaints(
    path: PurePosixPath, text: str, headers: set[PurePosixPath]
) -> Iterator[str]:
    """Complain about includes in `path` that its folder of csrc/ may not have."""
    folder = path.parts[1]
    if path.parts[0] != "csrc" or len(path.parts) < 3 or folder not in SYSTEM_HEADERS:
        yield f"{path}: belongs in csrc/ under one of {', '.join(SYSTEM_HEADERS)}"
        return
    for opening, name in re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', text, re.MULTILINE):
        if opening == "<":
            if not re.fullmatch(rf"\w+|{SYSTEM_HEADERS[folder]}", name):
                yield f"{path}: csrc/{folder} may not include <{name}>"
            continue
        target = PurePosixPath(posixpath.normpath(path.parent / name))
        if target not in headers:
            yield f'{path}: "{name}" is no header under csrc/; its path starts at this file'
        elif target in FOR_BOTH_COMPILERS and folder == "cuda":
            continue
        elif target.parts[1] not in OWN_HEADERS[folder]:
            yield f'{path}: csrc/{folder} may not include "{name}"'


# --- Python: what a module imports ----------------------------------------------------------------


def imported_names(path: PurePosixPath, tree: ast.AST) -> Iterator[str]:
    """Yield the dotted name of everything a file imports anywhere, relative imports resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = path.parts[: len(path.parts) - node.level] if node.level else ()
            prefix = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            yield from (f"{prefix}.{alias.name}" for alias in node.names)


def rank(package: str, part: str) -> int | None:
    """Give the layer of `package.part`, or None where the table does not know it."""
    return next((i for i, layer in enumerate(LAYERS[package]) if part in layer), None)


def import_complaints(path: PurePosixPath, text: str) -> Iterator[str]:
    """Complain about imports in `path` that point up, sideways, or outside what is allowed."""
    package, own = path.parts[0], path.with_suffix("").parts[1]
    own_rank = rank(package, own)
    if own == "_C":
        own_rank = -1
    if own_rank is None:
        yield f"{path}: {package}.{own} has no layer; give it its place in LAYERS"
        return
    foreign = FOREIGN[package].get(own, FOREIGN[package][None])
    for name in imported_names(path, ast.parse(text)):
        root, _, rest = name.partition(".")
        part = rest.partition(".")[0]
        if root != package:
            if root not in sys.stdlib_module_names and root not in foreign:
                yield f"{path}: {package}.{own} may not import {root}"
        elif part.startswith("_C"):
            if own != "native":
                yield f"{path}: only offload/native.py may import {name}"
        else:
            # A name that is no module comes out of the package's own __init__.
            target = part if rank(package, part) is not None else "__init__"
            if target != own and (rank(package, target) or 0) >= own_rank:
                yield f"{path}: imports {name}, which is not below {package}.{own}"


def device_complaints(path: PurePosixPath, text: str) -> Iterator[str]:
    """Complain where anything of offload/ but its device/ speaks to torch.cuda."""
    if path.parent == PurePosixPath("offload/device"):
        return
    tree = ast.parse(text)
    spoken = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    for name in [*spoken, *imported_names(path, tree)]:
        if f"{name}.".startswith("torch.cuda."):
            yield f"{path}: {name}: only offload/device/ may use torch.cuda"


# --- Every file: names and sizes ------------------------------------------------------------------


def name_complaints(path: PurePosixPath) -> Iterator[str]:
    """Complain about a file or folder whose name does not say what is in it."""
    for part in path.with_suffix("").parts:
        if NAMES_THAT_SAY_NOTHING & set(part.lower().split("_")):
            yield f"{path}: name it after what it holds, not {part!r}"


def size_complaints(path: PurePosixPath, text: str) -> Iterator[str]:
    """Complain about files and Python functions that have grown past the ceilings."""
    lines = len(text.splitlines())
    if lines > MAX_FILE_LINES:
        yield f"{path}: {lines} lines, more than {MAX_FILE_LINES}"
    if path.suffix != ".py" or path.parts[0] == "tests":
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                name = f"{path}:{node.lineno}: {node.name}"
                yield f"{name} has {length} lines, more than {MAX_FUNCTION_LINES}"


# --- The house keeps the rules --------------------------------------------------------------------


def read(path: PurePosixPath) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def test_the_rules_are_held_against_real_files() -> None:
    folders = {"/".join(path.parts[:2]) for path in CXX}
    assert {"csrc/core", "csrc/bindings"} <= folders
    assert {"offload/native.py", "offload/__init__.py", "perfmodel/plan.py"} <= set(
        map(str, PYTHON)
    )


@pytest.mark.parametrize("path", CXX, ids=str)
def test_cpp_includes_stay_in_their_layer(path: PurePosixPath) -> None:
    assert not list(include_complaints(path, read(path), set(CXX)))


@pytest.mark.parametrize("path", PYTHON, ids=str)
def test_imports_point_down(path: PurePosixPath) -> None:
    assert not list(import_complaints(path, read(path)))


@pytest.mark.parametrize("path", [p for p in PYTHON if p.parts[0] == "offload"], ids=str)
def test_only_device_speaks_to_cuda(path: PurePosixPath) -> None:
    assert not list(device_complaints(path, read(path)))


@pytest.mark.parametrize("path", ALL, ids=str)
def test_names_and_sizes_stay_within_the_house(path: PurePosixPath) -> None:
    assert not [*name_complaints(path), *size_complaints(path, read(path))]


def test_the_build_does_not_need_torch() -> None:
    names = imported_names(PurePosixPath("setup.py"), ast.parse((ROOT / "setup.py").read_text()))
    assert not [name for name in names if name.split(".")[0] == "torch"]


# --- The checkers see what they are for -----------------------------------------------------------

HEADERS = {
    PurePosixPath(p) for p in ("csrc/core/file.h", "csrc/cuda/kernels.h", "csrc/bindings/types.h")
}


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("csrc/core/a.cpp", "#include <pybind11/pybind11.h>"),
        ("csrc/core/a.cpp", "#include <Python.h>"),
        ("csrc/core/a.cpp", "  #  include <torch/extension.h>"),
        ("csrc/core/a.cpp", "#include <cuda_runtime.h>"),
        ("csrc/core/a.cpp", "#include <liburing.h>"),
        ("csrc/core/a.cpp", '#include "../cuda/kernels.h"'),
        ("csrc/core/a.cpp", '#include "missing.h"'),
        ("csrc/core/deeper/a.cpp", '#include "../../bindings/types.h"'),
        ("csrc/cuda/a.cu", '#include "../core/file.h"'),
        ("csrc/cuda/a.cu", "#include <ATen/ATen.h>"),
        ("csrc/cuda/a.cu", "#include <unistd.h>"),
        ("csrc/bindings/a.cpp", "#include <c10/core/Allocator.h>"),
        ("csrc/bindings/a.cpp", "#include <cuda_runtime.h>"),
        ("csrc/elsewhere/a.cpp", ""),
        ("csrc/a.cpp", ""),
    ],
)
def test_a_wrong_include_is_seen(path: str, line: str) -> None:
    assert list(include_complaints(PurePosixPath(path), f"#pragma once\n{line}\n", HEADERS))


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("csrc/core/a.cpp", '#include "file.h"\n#include <vector>\n#include <sys/mman.h>'),
        ("csrc/core/a.cpp", "#include <linux/io_uring.h>\n#include <immintrin.h>"),
        ("csrc/cuda/a.cu", '#include <cuda_bf16.h>\n#include <cstdint>\n#include "kernels.h"'),
        ("csrc/bindings/a.cpp", '#include <pybind11/stl.h>\n#include "../core/file.h"'),
        ("csrc/bindings/a.cpp", '#include "../cuda/kernels.h"\n// #include <torch/extension.h>'),
    ],
)
def test_a_right_include_is_not_complained_of(path: str, line: str) -> None:
    assert not list(include_complaints(PurePosixPath(path), line, HEADERS))


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("perfmodel/plan.py", "import torch"),
        ("perfmodel/plan.py", "from numpy import array"),
        ("perfmodel/cli.py", "import offload"),
        ("perfmodel/plan.py", "from perfmodel.machine import Machine"),
        ("perfmodel/machine.py", "from perfmodel import workload"),
        ("perfmodel/machine.py", "from . import planner"),
        ("perfmodel/schedules/activations.py", "from ..planner import plan"),
        ("perfmodel/plan.py", "def f():\n    import perfmodel.cli"),
        ("perfmodel/gossip.py", ""),
        ("offload/config.py", "import torch"),
        ("offload/native.py", "from offload.device import Copier"),
        ("offload/device.py", "from offload import _C"),
        ("offload/tiers/ssd.py", "import offload._C"),
        ("offload/tiers/ssd.py", "from .._C import Spill"),
        ("offload/tiers/ssd.py", "from offload.activations.hooks import Hooks"),
        ("offload/activations/hooks.py", "from offload.optimizer import AdamW"),
        ("offload/activations/hooks.py", "from offload import ActivationOffload"),
        ("offload/activations/hooks.py", "import offload"),
        ("offload/activations/hooks.py", "from .. import session"),
        ("offload/activations/hooks.py", "import deepspeed"),
        ("offload/session.py", "from offload.cli import main"),
        ("offload/tiers/ssd.py", "import numpy"),
        ("offload/_C.pyi", "from offload import config"),
    ],
)
def test_a_wrong_import_is_seen(path: str, line: str) -> None:
    assert list(import_complaints(PurePosixPath(path), line))


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("perfmodel/planner.py", "import json\nfrom perfmodel.schedules import activations"),
        ("perfmodel/schedules/activations.py", "from perfmodel.schedules import trace"),
        ("perfmodel/__init__.py", "from perfmodel.plan import Plan"),
        ("offload/config.py", "from perfmodel.plan import Plan"),
        ("offload/native.py", "import torch\nfrom offload import _C, config"),
        ("offload/tiers/ssd.py", "from offload import native\nfrom ..device import Copier"),
        (
            "offload/activations/hooks.py",
            "from .storage import Identity\nfrom offload.tiers import ssd",
        ),
        ("offload/integrations/zero.py", "import deepspeed"),
        ("offload/cli.py", "from offload import doctor"),
        ("offload/__init__.py", "from offload.activations import ActivationOffload"),
        ("offload/__main__.py", "from offload.cli import main"),
        ("offload/_C.pyi", "from collections.abc import Buffer"),
    ],
)
def test_a_right_import_is_not_complained_of(path: str, line: str) -> None:
    assert not list(import_complaints(PurePosixPath(path), line))


@pytest.mark.parametrize(
    "line",
    [
        "import torch.cuda",
        "from torch import cuda",
        "from torch.cuda import Stream",
        "torch.cuda.is_available()",
    ],
)
def test_cuda_outside_device_is_seen(line: str) -> None:
    assert list(device_complaints(PurePosixPath("offload/tiers/host.py"), line))
    assert not list(device_complaints(PurePosixPath("offload/device/cuda.py"), line))
    assert not list(device_complaints(PurePosixPath("offload/doctor.py"), "torch.version.cuda"))


@pytest.mark.parametrize(
    "name",
    ["offload/utils.py", "csrc/core/io_common.h", "tests/helpers/a.py", "offload/Manager.py"],
)
def test_a_name_that_says_nothing_is_seen(name: str) -> None:
    assert list(name_complaints(PurePosixPath(name)))
    assert not list(name_complaints(PurePosixPath("offload/utilisation.py")))


def test_what_grew_past_the_ceilings_is_seen() -> None:
    path = PurePosixPath("offload/a.py")
    long_file = "x = 1\n" * MAX_FILE_LINES
    assert not list(size_complaints(path, long_file))
    assert list(size_complaints(path, long_file + "x = 1\n"))
    long_function = "def f():\n" + "    pass\n" * (MAX_FUNCTION_LINES - 1)
    assert not list(size_complaints(path, long_function))
    assert list(size_complaints(path, long_function + "    pass\n"))
    assert not list(size_complaints(PurePosixPath("tests/test_a.py"), long_function + "    pass\n"))
