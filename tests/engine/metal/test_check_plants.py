"""The checkers name every planted fault, at its line, and say nothing once it is taken out."""

from functools import cache
from typing import Any

import pytest

from engine.metal import library as metal
from tests.engine.metal.check_plants import KERNELS, PLANTS, Plant, expected_lines, launch

FAULTY = [plant for plant in PLANTS if not plant.clean]
FILES = sorted({plant.file for plant in PLANTS})


@cache
def library(file: str, fixed: bool) -> Any:
    made = metal.compile(KERNELS / f"{file}.metal", checked=True, defines={"FIXED": 1} if fixed else {})
    made.build(made.kernels)
    return made


@pytest.mark.parametrize("plant", FAULTY, ids=lambda plant: plant.kernel)
def test_reports_the_planted_fault(plant: Plant) -> None:
    faults = launch(library(plant.file, False), plant).faults
    assert {fault.kind for fault in faults} - plant.also == {plant.kind}, [fault.message for fault in faults]
    fault = next(fault for fault in faults if fault.kind == plant.kind)
    assert fault.line in expected_lines(plant)
    assert fault.kernel == plant.kernel
    assert fault.message
    if plant.space:
        assert fault.address_space == plant.space
    if plant.buffer is not None:
        assert fault.buffer == plant.buffer
    if plant.offset is not None:
        assert fault.offset == plant.offset
    if plant.size is not None:
        assert fault.size == plant.size
    if plant.where is not None:
        assert (fault.thread, fault.threadgroup) == ((plant.where[0], 0, 0), (plant.where[1], 0, 0))


@pytest.mark.parametrize("plant", [plant for plant in PLANTS if plant.file == "alignment"], ids=lambda p: p.kernel)
def test_reports_it_at_every_launch(plant: Plant) -> None:
    for _ in range(2):
        assert plant.kind in {fault.kind for fault in launch(library(plant.file, False), plant).faults}


@pytest.mark.parametrize("plant", FAULTY, ids=lambda plant: plant.kernel)
def test_reports_it_under_other_schedules(plant: Plant) -> None:
    for seed in (1, 2):
        faults = launch(library(plant.file, False), plant, schedule_seed=seed).faults
        assert plant.kind in {fault.kind for fault in faults}
        assert any(fault.line in expected_lines(plant) for fault in faults if fault.kind == plant.kind)


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.kernel)
def test_says_nothing_without_the_fault(plant: Plant) -> None:
    for seed in (None, 1, 2, 3):
        assert launch(library(plant.file, True), plant, schedule_seed=seed).faults == ()


@pytest.mark.parametrize("plant", [plant for plant in PLANTS if plant.clean], ids=lambda plant: plant.kernel)
def test_says_nothing_about_what_is_no_fault(plant: Plant) -> None:
    assert launch(library(plant.file, False), plant).faults == ()


def test_every_kernel_is_planted_once() -> None:
    planted = [plant.kernel for plant in PLANTS]
    assert sorted(planted) == sorted(name for file in FILES for name in library(file, False).kernels)
