"""Energy counters behind one protocol. A figure without a counter is "unavailable", never 0 and never a guess.

NVML counts the GPU boards, RAPL the processor packages and their memory; neither sees the rest of the machine, so a
reading always says what it covers. :class:`Estimate` exists for those who ask for it and is labelled so everywhere.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

RAPL_ROOT = Path("/sys/class/powercap")


class CounterUnavailable(Exception):
    """A probe has no counter to read on this machine; the text says why."""


class EnergyProbe(Protocol):
    """Something that knows how much energy was used since :meth:`start`."""

    name: str
    covers: str
    kind: Literal["measured", "estimated"]

    def start(self) -> None:
        """Open the counter. Raises :class:`CounterUnavailable`."""
        ...

    def sample(self, elapsed_s: float) -> None:
        """Read the counter, ``elapsed_s`` after the start. Raises :class:`CounterUnavailable` when it went away."""
        ...

    def joules(self) -> float:
        """Energy from the start to the last sample, J."""
        ...


@dataclass(slots=True)
class Estimate:
    """A constant power that the user states, for machines without a counter. Always labelled "estimated"."""

    watts: float
    name: str = "estimate"
    covers: str = "a constant power stated by the user"
    kind: Literal["measured", "estimated"] = "estimated"
    _elapsed_s: float = 0.0

    def start(self) -> None:
        """Begin at zero."""
        self._elapsed_s = 0.0

    def sample(self, elapsed_s: float) -> None:
        """Remember the time."""
        self._elapsed_s = elapsed_s

    def joules(self) -> float:
        """Power × time."""
        return self.watts * self._elapsed_s


@dataclass(slots=True)
class _Counter:
    """One RAPL domain: a counter in µJ that starts again at 0 once it passes ``span``."""

    path: Path
    span: int
    last: int
    total: int = 0

    def advance(self) -> None:
        now = int(self.path.read_text(encoding="ascii"))
        # Sampled every 0.2 s and wrapping after minutes at the earliest, it can have wrapped at most once.
        self.total += now - self.last if now >= self.last else self.span - self.last + now
        self.last = now


@dataclass(slots=True)
class Rapl:
    """Intel and AMD processor packages through the kernel's powercap files (Linux Power Capping Framework).

    Top-level ``package`` domains and their ``dram`` children are added up; ``core``, ``uncore`` and ``psys`` are left
    out because they are inside a package or contain it.
    """

    root: Path = RAPL_ROOT
    name: str = "rapl"
    covers: str = "processor packages and their memory"
    kind: Literal["measured", "estimated"] = "measured"
    _counters: list[_Counter] = field(default_factory=list)

    def start(self) -> None:
        """Open all domains."""
        self._counters = []
        try:
            for folder in sorted(self.root.glob("intel-rapl:*")):
                domain = (folder / "name").read_text(encoding="ascii").strip()
                if domain.startswith("package") or domain == "dram":
                    span = int((folder / "max_energy_range_uj").read_text(encoding="ascii"))
                    now = int((folder / "energy_uj").read_text(encoding="ascii"))
                    self._counters.append(_Counter(folder / "energy_uj", span, now))
        except PermissionError as error:
            raise CounterUnavailable(f"no permission to read {error.filename}") from None
        except (OSError, ValueError) as error:
            raise CounterUnavailable(f"cannot read the RAPL counters ({error})") from None
        if not self._counters:
            raise CounterUnavailable(f"no RAPL counters under {self.root}")

    def sample(self, elapsed_s: float) -> None:
        """Advance all counters."""
        try:
            for counter in self._counters:
                counter.advance()
        except (OSError, ValueError) as error:
            raise CounterUnavailable(f"a RAPL counter went away ({error})") from None

    def joules(self) -> float:
        """Sum over the domains."""
        return sum(counter.total for counter in self._counters) / 1e6


@dataclass(frozen=True, slots=True)
class GpuSample:
    """One reading of all GPUs: mean utilisation in percent, summed power in W and memory in use in bytes; ``None``
    where not supported."""

    utilisation: float | None
    watts: float | None
    memory: float | None = None


@dataclass(slots=True)
class Nvml:
    """NVIDIA boards. Uses the driver's energy counter (Volta and later), else integrates the power readings.

    ``module`` is the ``pynvml`` module (package nvidia-ml-py); ``None`` imports it.
    """

    module: Any = None
    name: str = "nvml"
    covers: str = "GPU boards"
    kind: Literal["measured", "estimated"] = "measured"
    samples: list[GpuSample] = field(default_factory=list)
    _devices: Sequence[Any] = ()
    _begin_mj: list[int] | None = None
    _joules: float = 0.0
    _then_s: float = 0.0

    def start(self) -> None:
        """Open the driver and note the counters."""
        if self.module is None:
            try:
                self.module = importlib.import_module("pynvml")
            except ImportError:
                raise CounterUnavailable("nvidia-ml-py is not installed") from None
        try:
            self.module.nvmlInit()
            count = self.module.nvmlDeviceGetCount()
            self._devices = [self.module.nvmlDeviceGetHandleByIndex(i) for i in range(count)]
        except self.module.NVMLError as error:
            raise CounterUnavailable(f"no NVIDIA driver ({error})") from None
        if not self._devices:
            raise CounterUnavailable("no NVIDIA GPU")
        self.samples, self._joules, self._then_s = [], 0.0, 0.0
        self._begin_mj = self._energy_mj()

    def sample(self, elapsed_s: float) -> None:
        """Note utilisation, power and memory; advance the energy."""
        watts = self._sum(lambda d: self.module.nvmlDeviceGetPowerUsage(d) / 1000)
        load = self._sum(lambda d: self.module.nvmlDeviceGetUtilizationRates(d).gpu / len(self._devices))
        memory = self._sum(lambda d: self.module.nvmlDeviceGetMemoryInfo(d).used)
        self.samples.append(GpuSample(load, watts, memory))
        now_mj = self._energy_mj() if self._begin_mj is not None else None
        if now_mj is not None and self._begin_mj is not None:
            self._joules = sum(b - a for a, b in zip(self._begin_mj, now_mj, strict=True)) / 1000
        elif watts is not None:
            self._joules += watts * (elapsed_s - self._then_s)
        else:
            raise CounterUnavailable("the GPU reports neither energy nor power")
        self._then_s = elapsed_s

    def joules(self) -> float:
        """Energy of all boards."""
        return self._joules

    def _energy_mj(self) -> list[int] | None:
        try:
            return [self.module.nvmlDeviceGetTotalEnergyConsumption(d) for d in self._devices]
        except self.module.NVMLError:
            return None  # older boards have no counter; the power readings take its place

    def _sum(self, read: Any) -> float | None:
        try:
            return float(sum(read(d) for d in self._devices))
        except self.module.NVMLError:
            return None  # e.g. utilisation under MIG: reported as not measured
