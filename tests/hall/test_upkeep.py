"""When memory is given back, by a clock and a pressure that the tests set."""

import sys
from types import SimpleNamespace

import pytest

from mlxpage import memory_pressure
from mlxpage.memory_pressure import CRITICAL, NORMAL, WARNING
from mlxpage.upkeep import Upkeep


class Machine:
    """And an engine on it that notes how it is trimmed."""

    def __init__(self):
        self.time, self.level, self.looks = 1000.0, NORMAL, 0
        self.trims: list[bool] = []
        self.engine = SimpleNamespace(
            has_work=False,
            num_steps=0,
            has_disk=False,
            scheduler=SimpleNamespace(blocks=SimpleNamespace(keeps_cached=True)),
            trim=lambda cached=False: self.trims.append(cached),
        )

    def clock(self) -> float:
        return self.time

    def pressure(self) -> int:
        self.looks += 1
        return self.level


def test_without_anything_to_do_nothing_is_ever_due():
    machine = Machine()
    assert Upkeep().run(machine.engine) is None


def test_an_idle_engine_is_trimmed_once_and_again_after_it_has_worked():
    machine = Machine()
    upkeep = Upkeep(60, clock=machine.clock)
    assert upkeep.run(machine.engine) == 60
    machine.time += 59
    assert upkeep.run(machine.engine) == 1 and not machine.trims
    machine.time += 1
    assert upkeep.run(machine.engine) is None
    machine.time += 1000
    assert upkeep.run(machine.engine) is None
    assert machine.trims == [False], "what is cached stays"
    machine.engine.has_work = True
    assert upkeep.run(machine.engine) is None
    machine.engine.has_work = False
    assert upkeep.run(machine.engine) == 60
    machine.time += 60
    upkeep.run(machine.engine)
    assert machine.trims == [False, False]


def test_an_engine_that_works_is_not_idle():
    machine = Machine()
    upkeep = Upkeep(60, clock=machine.clock)
    for _ in range(10):
        machine.engine.has_work = not machine.engine.has_work
        machine.time += 59
        upkeep.run(machine.engine)
    assert not machine.trims


def test_a_request_of_one_step_is_work_too():
    machine = Machine()
    upkeep = Upkeep(60, clock=machine.clock)
    for _ in range(10):
        machine.engine.num_steps += 1
        machine.time += 59
        assert upkeep.run(machine.engine) == 60
    assert not machine.trims
    machine.time += 60
    upkeep.run(machine.engine)
    machine.engine.num_steps += 1
    assert upkeep.run(machine.engine) == 60, "and what it left is trimmed again"


def test_pressure_takes_empty_blocks_then_cached_ones_once_each():
    machine = Machine()
    upkeep = Upkeep(pressure=machine.pressure, clock=machine.clock)
    told = []
    for level in (NORMAL, WARNING, WARNING, CRITICAL, CRITICAL, WARNING, NORMAL, CRITICAL):
        machine.level = level
        assert upkeep.run(machine.engine) == 1
        told.append((len(machine.trims), machine.engine.scheduler.blocks.keeps_cached))
        machine.time += 1
    assert machine.trims == [False, True, True]
    assert [count for count, _ in told] == [0, 1, 1, 2, 2, 2, 2, 3]
    assert [keeps for _, keeps in told] == [True, *[False] * 5, True, False]


def test_pressure_is_looked_at_once_a_second():
    machine = Machine()
    upkeep = Upkeep(pressure=machine.pressure, clock=machine.clock)
    for _ in range(30):
        upkeep.run(machine.engine)
        machine.time += 0.125
    assert machine.looks == 4


@pytest.mark.skipif(sys.platform == "darwin", reason="this Mac may be short of memory now")
def test_other_systems_are_never_short_of_memory():
    assert memory_pressure.level() == NORMAL


def test_the_level_is_read_where_macos_keeps_it(monkeypatch):
    asked = []

    def sysctlbyname(name, value, size, new, new_size):
        asked.append(name)
        value._obj.value = CRITICAL
        return 0

    library = SimpleNamespace(sysctlbyname=sysctlbyname)
    monkeypatch.setattr(memory_pressure.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(memory_pressure.sys, "platform", "darwin")
    assert memory_pressure.level() == CRITICAL
    assert asked == [b"kern.memorystatus_vm_pressure_level"]
