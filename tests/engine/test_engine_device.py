"""Devices: what is here works, what isn't says why and what to ask for instead."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

import engine
from engine import DeviceError
from engine.device import NAMES, devices, select
from tests.engine.tiny import make_checkpoint


def test_every_device_is_described_and_the_cpu_is_always_there() -> None:
    found = devices()
    assert tuple(found) == NAMES
    assert found["cpu"].available
    for device in found.values():
        assert device.detail
        assert "\n" not in device.detail


def test_absent_devices_are_refused_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: False)
    for name, reason in {"metal": "Apple Silicon", "cuda": r"pip install 'mlx\[cuda\]'"}.items():
        with pytest.raises(DeviceError, match=rf"device '{name}' can't be used: .*{reason}.*; available here: cpu"):
            engine.load(make_checkpoint(tmp_path / name), device=name)
    assert select("auto").name == "cpu"


def test_unknown_devices_are_refused() -> None:
    with pytest.raises(DeviceError, match="device 'npu' is unknown; ask for auto, metal, cuda, cpu"):
        select("npu")


def test_selecting_sets_mlxs_default_device() -> None:
    assert select("cpu").handle == mx.default_device()
