"""The meter on fakes: memory, processor time, and energy counters that wrap, refuse, or go away."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from saec.evaluate.energy import CounterUnavailable, Estimate, Nvml, Rapl
from saec.evaluate.meter import Meter, ProcessUse, mwh_per_correct, own_use


def domain(root: Path, folder: str, name: str, energy_uj: int, span: int = 1_000_000) -> Path:
    (root / folder).mkdir(parents=True)
    (root / folder / "name").write_text(name + "\n")
    (root / folder / "max_energy_range_uj").write_text(f"{span}\n")
    (root / folder / "energy_uj").write_text(f"{energy_uj}\n")
    return root / folder / "energy_uj"


class FakeNvml:
    """The few calls of pynvml that the probe makes; two boards."""

    class NVMLError(Exception):
        pass

    def __init__(self, *, energy_counter: bool = True, utilisation: bool = True, boards: int = 2) -> None:
        self.energy_counter, self.utilisation, self.boards = energy_counter, utilisation, boards
        self.energy_mj = [10_000, 20_000]

    def nvmlInit(self) -> None:
        if self.boards < 0:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetCount(self) -> int:
        return self.boards

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetTotalEnergyConsumption(self, device: int) -> int:
        if not self.energy_counter:
            raise self.NVMLError("Not Supported")
        return self.energy_mj[device]

    def nvmlDeviceGetPowerUsage(self, device: int) -> int:
        return [100_000, 50_000][device]

    def nvmlDeviceGetUtilizationRates(self, device: int) -> SimpleNamespace:
        if not self.utilisation:
            raise self.NVMLError("Not Supported")
        return SimpleNamespace(gpu=[80, 40][device])

    def nvmlDeviceGetMemoryInfo(self, device: int) -> SimpleNamespace:
        return SimpleNamespace(used=[3_000_000_000, 1_000_000_000][device])


def test_the_meter_reports_mean_and_peak_memory_and_processor_time() -> None:
    uses = iter([ProcessUse(100_000_000, 5.0), ProcessUse(300_000_000, 6.5)])
    clock = iter([10.0, 10.0, 12.0])
    with Meter(probes=(), interval_s=60, use=lambda: next(uses), clock=lambda: next(clock)) as meter:
        pass
    reading = meter.reading()
    assert (reading.wall_s, reading.cpu_s, reading.samples) == (2.0, 1.5, 2)
    assert (reading.rss_mean_mb, reading.rss_peak_mb) == (200.0, 300.0)


def test_the_meter_samples_while_the_work_runs() -> None:
    with Meter(probes=(), interval_s=0.005, use=lambda: ProcessUse(1, 0.0)) as meter:
        time.sleep(0.1)
    assert meter.reading().samples >= 5


def test_memory_and_time_of_child_processes_count() -> None:
    before = own_use()
    code = "x = bytearray(60_000_000); print(sum(range(3_000_000)) > 0, flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    child.stdout.readline()
    during = own_use()
    child.communicate("\n")
    after = own_use()
    assert during.rss - before.rss > 50_000_000
    assert before.cpu_s < during.cpu_s <= after.cpu_s  # an ended child's time stays in the account


def test_without_a_counter_energy_is_unavailable_and_not_zero(tmp_path: Path) -> None:
    with Meter(probes=[Nvml(FakeNvml(boards=-1)), Rapl(tmp_path)], interval_s=60) as meter:
        pass
    energy = meter.reading().energy
    assert (energy.status, energy.joules) == ("unavailable", None)
    assert "Driver Not Loaded" in energy.detail and "no RAPL counters" in energy.detail


def test_rapl_adds_packages_and_memory_and_skips_what_is_inside_them(tmp_path: Path) -> None:
    package = domain(tmp_path, "intel-rapl:0", "package-0", 100)
    core = domain(tmp_path, "intel-rapl:0:0", "core", 100)
    dram = domain(tmp_path, "intel-rapl:0:1", "dram", 100)
    psys = domain(tmp_path, "intel-rapl:1", "psys", 100)
    mmio = domain(tmp_path, "intel-rapl-mmio:0", "package-0", 100)
    probe = Rapl(tmp_path)
    probe.start()
    for counter, now in [(package, 500_100), (core, 90_100), (dram, 250_100), (psys, 900_100), (mmio, 500_100)]:
        counter.write_text(f"{now}\n")
    probe.sample(1.0)
    assert probe.joules() == pytest.approx(0.75)


def test_a_rapl_counter_that_wraps_around_loses_nothing(tmp_path: Path) -> None:
    counter = domain(tmp_path, "intel-rapl:0", "package-0", 900_000, span=1_000_000)
    probe = Rapl(tmp_path)
    probe.start()
    for now in (990_000, 40_000, 300_000, 10_000):  # +90,000 +50,000 +260,000 +710,000 µJ, two wraps
        counter.write_text(f"{now}\n")
        probe.sample(0.2)
    assert probe.joules() == pytest.approx(1.11)


def test_a_rapl_counter_without_permission_is_unavailable_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    domain(tmp_path, "intel-rapl:0", "package-0", 1)
    plain = Path.read_text

    def guarded(path: Path, encoding: str | None = None, errors: str | None = None) -> str:
        if path.name == "energy_uj":  # root may read everything, so the denial is played
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path, encoding, errors)

    monkeypatch.setattr(Path, "read_text", guarded)
    with pytest.raises(CounterUnavailable, match=r"no permission to read .*energy_uj"):
        Rapl(tmp_path).start()


def test_a_counter_that_goes_away_during_the_run_gives_no_figure(tmp_path: Path) -> None:
    counter = domain(tmp_path, "intel-rapl:0", "package-0", 1)
    with Meter(probes=[Rapl(tmp_path)], interval_s=60) as meter:
        counter.unlink()
    reading = meter.reading()
    assert (reading.energy.status, reading.energy.joules) == ("unavailable", None)
    assert "went away" in reading.problems[0]


def test_nvml_reads_the_energy_counter_utilisation_and_power() -> None:
    driver = FakeNvml()
    clock = itertools.count()
    with Meter(probes=[Nvml(driver)], interval_s=60, clock=lambda: float(next(clock))) as meter:
        driver.energy_mj = [12_000, 20_500]
    reading = meter.reading()
    assert (reading.energy.status, reading.energy.joules) == ("measured", 2.5)
    assert reading.energy.detail == "GPU boards"
    assert (reading.gpu_utilisation, reading.gpu_w, reading.gpu_peak_mb) == (60.0, 150.0, 4000.0)


def test_nvml_integrates_power_on_boards_without_an_energy_counter() -> None:
    probe = Nvml(FakeNvml(energy_counter=False, utilisation=False))
    probe.start()
    for elapsed_s in (0.0, 0.2, 0.5):
        probe.sample(elapsed_s)
    assert probe.joules() == pytest.approx(150 * 0.5)
    assert probe.samples[-1].utilisation is None


def test_nvml_without_a_board_or_a_driver_says_so() -> None:
    with pytest.raises(CounterUnavailable, match="no NVIDIA GPU"):
        Nvml(FakeNvml(boards=0)).start()
    with pytest.raises(CounterUnavailable, match="Driver Not Loaded"):
        Nvml(FakeNvml(boards=-1)).start()


def test_nvml_without_its_package_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(CounterUnavailable, match="nvidia-ml-py is not installed"):
        Nvml().start()


def test_an_estimate_is_labelled_as_one_even_beside_a_real_counter(tmp_path: Path) -> None:
    domain(tmp_path, "intel-rapl:0", "package-0", 1)
    clock = iter([0.0, 0.0, 4.0])
    with Meter(probes=[Estimate(15.0), Rapl(tmp_path)], interval_s=60, clock=lambda: next(clock)) as meter:
        pass
    energy = meter.reading().energy
    assert (energy.status, energy.joules) == ("estimated", 60.0)
    assert "stated by the user" in energy.detail


def test_energy_per_correct_decision_follows_the_papers_formula() -> None:
    # SAEC §6, MVTec: 108.5 W × 172.8 s over 85.11 % of 967 parts = 6.33 mWh (the paper prints 6.09).
    assert mwh_per_correct(108.5 * 172.8, 823) == pytest.approx(6.33, abs=0.005)
    assert mwh_per_correct(None, 10) is None and mwh_per_correct(5.0, 0) is None and mwh_per_correct(5.0, None) is None
