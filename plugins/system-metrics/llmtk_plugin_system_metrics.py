"""How busy the GPU is, and how full it and the machine are, beside the speed that the core writes.

None of it comes out the same twice, so it stands in timings.jsonl and never in metrics.jsonl. The plugin looks after
optimizer steps, and tells when a line is due: of utilisation the mean since the last line, of memory the largest.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import psutil
import torch
from pydantic import Field

from llmtk import RunView, Section, hookimpl
from llmtk.training.events import Plan, StepReport

GIB = 2**30
LEFT_OUT = "system-metrics: the GPU cannot be asked, so its figures are left out: {}"


class SystemMetrics:
    """Looks at the machine as the run goes on."""

    class Options(Section):
        """How often it looks."""

        every: float = Field(1.0, ge=0)
        """Seconds between two looks, at least."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.process = psutil.Process()
        self.gpu: Gpu | None = None
        self.looked = -float("inf")
        self.seen: list[dict[str, float]] = []

    @hookimpl
    def run_started(self, run: RunView, plan: Plan) -> None:
        self.gpu = find_gpu(run)

    @hookimpl
    def after_update(self, run: RunView, step: StepReport) -> None:
        now = time.monotonic()
        if now - self.looked >= self.options.every:
            self.looked = now
            self.seen.append(self._look(run))

    @hookimpl
    def extra_timings(self, run: RunView, step: StepReport) -> Mapping[str, float]:
        figures = summed_up(self.seen or [self._look(run)])
        self.seen = []
        everyone = run.gather(figures)
        if len(everyone) == 1:
            return figures
        return {f"rank{rank}/{name}": value for rank, theirs in enumerate(everyone) for name, value in theirs.items()}

    def _look(self, run: RunView) -> dict[str, float]:
        machine = psutil.virtual_memory()
        return {
            **self._look_at_gpu(run),
            "process_memory_gib": self.process.memory_info().rss / GIB,
            "machine_memory_gib": (machine.total - machine.available) / GIB,
        }

    def _look_at_gpu(self, run: RunView) -> dict[str, float]:
        if self.gpu is None:
            return {}
        try:
            return self.gpu.look()
        except self.gpu.failure as error:  # a driver that hangs up must not take the run along
            run.notify(LEFT_OUT.format(error))
            self.gpu = None
            return {}


class Gpu:
    """One device, as NVIDIA's management library sees it; `nvml` is the module `pynvml`."""

    def __init__(self, nvml: Any, uuid: str) -> None:
        self._nvml = nvml
        self.failure: type[Exception] = nvml.NVMLError
        nvml.nvmlInit()
        self._handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        self.look()  # a device may be known, and not tell

    def look(self) -> dict[str, float]:
        """Return utilisation in percent, over the library's last period (at most a second), and memory in GiB."""
        return {
            "gpu_utilisation": float(self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu),
            "gpu_memory_gib": self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used / GIB,
        }


def find_gpu(run: RunView) -> Gpu | None:
    """Return the device that this rank computes on; None where it is no CUDA device, or cannot be asked."""
    if run.device.type != "cuda":
        return None
    import pynvml

    try:
        # By its UUID: the library numbers all devices of the machine, torch those that CUDA_VISIBLE_DEVICES leaves.
        return Gpu(pynvml, f"GPU-{torch.cuda.get_device_properties(run.device).uuid}")
    except pynvml.NVMLError as error:
        run.notify(LEFT_OUT.format(error))
        return None


def summed_up(looks: list[dict[str, float]]) -> dict[str, float]:
    """Return of each figure the mean, or of memory the largest, over those looks that have it, of one or more."""
    names = dict.fromkeys(name for look in looks for name in look)
    by_name = {name: [look[name] for look in looks if name in look] for name in names}
    return {name: max(values) if "memory" in name else sum(values) / len(values) for name, values in by_name.items()}
