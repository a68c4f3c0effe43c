"""The memory fence."""

from __future__ import annotations

import importlib.util
import platform

import pytest
from vhost_device_console.worker.virtqueue import fence


def test_a_fence_never_waits() -> None:
    for _ in range(1000):
        fence.full()


@pytest.mark.parametrize(
    ("machine", "weak"), [("x86_64", False), ("i686", False), ("aarch64", True), ("riscv64", True)]
)
def test_only_x86_keeps_loads_and_stores_in_order(
    machine: str, weak: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    spec = importlib.util.spec_from_file_location("fence_elsewhere", fence.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert weak is module.WEAKLY_ORDERED
