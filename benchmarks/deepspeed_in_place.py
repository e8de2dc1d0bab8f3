"""Puts our `initialize` in the place of DeepSpeed's, for tests that DeepSpeed wrote for its own."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["REFUSED", "put_in_place", "pytest_addoption", "pytest_collection_modifyitems"]

OWN_CLASS = ("TestConfigOptimizer",)
"""Tests that assert which class of DeepSpeed's own the optimizer is, which a section replaces."""
REFUSED = "refused: "
"""How the reason begins for which a test is skipped whose config cannot go with the section."""


def put_in_place(section: Mapping[str, Any] | None) -> None:
    """Have `deepspeed.initialize` be ours, with `section` in each config; None: leave it stock.

    With `{"host": true}` it is stock too, on the host as ours needs it. The section's optimizer
    goes only where the config has an AdamW and no optimizer is handed over, since it takes that
    one's place. A test is skipped whose config is refused.
    """
    import deepspeed  # noqa: PLC0415 - optional, and only where its tests run
    import deepspeed.ops  # noqa: PLC0415

    # Would be compiled for minutes at once, to add up among ranks of one machine.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if section is not None and section.get("host"):
        deepspeed.initialize = _on_host(deepspeed.initialize)
    elif section is not None:
        deepspeed.initialize = _with_section(deepspeed.initialize, section)


def _on_host(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Return stock's `initialize`, whose config has torch's AdamW over partitions on the host."""
    signature = inspect.signature(stock)

    @functools.wraps(stock)
    def on_host(*args: Any, **named: Any) -> Any:
        given = signature.bind(*args, **named).arguments
        config = given.get("config") or given.get("config_params")
        if not isinstance(config, dict):
            return stock(*args, **named)
        zero = config.get("zero_optimization") or {}
        kind = (config.get("optimizer") or {}).get("type", "")
        if zero.get("stage") and kind.lower() in ("adam", "adamw"):
            for key in ("cpu_offload", "cpu_offload_use_pin_memory"):
                zero.pop(key, None)
            zero.setdefault("offload_optimizer", {"device": "cpu"})
            config["zero_allow_untested_optimizer"] = True
            config["zero_force_ds_cpu_optimizer"] = False
            config["optimizer"].setdefault("params", {})["torch_adam"] = True
        return stock(*args, **named)

    return on_host


def _with_section(stock: Callable[..., Any], section: Mapping[str, Any]) -> Callable[..., Any]:
    """Return our `initialize`, which adds the section to what it is given."""
    import deepspeed  # noqa: PLC0415

    from offload.integrations.deepspeed import initialize  # noqa: PLC0415 - imports deepspeed
    from offload.integrations.deepspeed_config import read_config, split  # noqa: PLC0415

    signature = inspect.signature(initialize)

    @functools.wraps(stock)
    def ours(*args: Any, **named: Any) -> Any:
        import pytest  # noqa: PLC0415 - a test calls this

        given = signature.bind(*args, **named).arguments
        in_args = getattr(given.get("args"), "deepspeed_config", None)
        config = given.get("config") or given.get("config_params") or in_args
        found = read_config(config)
        if found is None:
            return stock(*args, **named)
        has_client = given.get("optimizer") is not None
        caller = inspect.currentframe()
        asking = type(caller.f_back.f_locals.get("self")) if caller and caller.f_back else None
        if "optimizer" in section and asking is not None and asking.__name__ in OWN_CLASS:
            pytest.skip(f"{REFUSED}the test asserts that the optimizer is DeepSpeed's own")
        found["offload"] = dict(section)
        kind = (found.get("optimizer") or {}).get("type", "")
        if has_client or kind.lower() not in ("adam", "adamw"):
            found["offload"].pop("optimizer", None)
        try:
            split(json.loads(json.dumps(found)), has_client=has_client)
        except ValueError as error:
            pytest.skip(f"{REFUSED}{error}")
        given.pop("config_params", None)
        if in_args is not None:
            given["args"].deepspeed_config = None
        deepspeed.initialize = stock  # which ours calls
        try:
            return initialize(**{**given, "config": found})
        finally:
            deepspeed.initialize = ours

    return ours


def pytest_addoption(parser: Any) -> None:
    """Take `--every N`, as a plugin of pytest's."""
    parser.addoption("--every", type=int, default=1, metavar="N", help="run each Nth test (1)")


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Leave the first of every N tests, the same ones each time."""
    items[:] = items[:: config.getoption("--every")]
