"""What is written and where, and the questions to the GPU, which a stand-in for NVIDIA's library answers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from llmtk_plugin_system_metrics import GIB, Gpu, SystemMetrics, find_gpu, summed_up

from llmtk import Run

ROWS = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(16)]


class Nvml:
    """Has one GPU, which is busier and fuller each time that it is asked."""

    class NVMLError(Exception):
        pass

    def __init__(self, uuid: str = "GPU-1234", broken: bool = False) -> None:
        self.uuid, self.broken, self.looks = uuid, broken, 0

    def nvmlInit(self) -> None:
        if self.broken:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != self.uuid:
            raise self.NVMLError("Not Found")
        return "the handle"

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        assert handle == "the handle"
        self.looks += 1
        return SimpleNamespace(gpu=10 * self.looks, memory=3)

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        assert handle == "the handle"
        return SimpleNamespace(total=80 * GIB, free=60 * GIB, used=self.looks * GIB)


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    """Put a stand-in in the library's place, and a device of its UUID in torch's."""
    fake: Any = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    properties = SimpleNamespace(uuid="1234")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return fake  # type: ignore[no-any-return]


def run_on(kind: str, said: list[str] | None = None) -> Any:
    return SimpleNamespace(device=torch.device(kind), notify=(said if said is not None else []).append)


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def make(folder: Path, **options: Any) -> Run:
    keys = {"max_steps": 4, "per_device_train_batch_size": 4, "bf16": False, "logging_steps": 2}
    plugins = {"system-metrics": options}
    return Run("sft", model="builtin", data=ROWS, train=keys, plugins=plugins, output_dir=str(folder))


def test_timings_have_the_machines_memory_and_metrics_do_not(tmp_path: Path) -> None:
    make(tmp_path, every=0).train()
    timings = lines(tmp_path, "timings")
    assert len(timings) == 2
    for line in timings:
        assert 0.05 < line["system-metrics/process_memory_gib"] <= psutil.virtual_memory().total / GIB
        assert 0 < line["system-metrics/machine_memory_gib"] <= psutil.virtual_memory().total / GIB
        assert not any("gpu" in name for name in line if name.startswith("system-metrics/"))
        assert line["tokens_per_second"] > 0
    assert "system-metrics" not in (tmp_path / "metrics.jsonl").read_text()


def test_a_line_has_the_mean_use_and_the_most_memory_since_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmtk_plugin_system_metrics.find_gpu", lambda run: Gpu(Nvml(), "GPU-1234"))
    make(tmp_path, every=0).train()
    names = ("system-metrics/gpu_utilisation", "system-metrics/gpu_memory_gib")
    found = [[line[name] for name in names] for line in lines(tmp_path, "timings")]
    assert found == [[25, 3], [45, 5]], "looks 2 and 3, then 4 and 5: the first was made as the run began"


def test_it_looks_no_oftener_than_it_is_told(tmp_path: Path) -> None:
    run = make(tmp_path, every=3600)
    plugin: Any = run.manager.get_plugin("system-metrics")
    run.train()
    assert plugin.seen == []
    assert len([line for line in lines(tmp_path, "timings") if "system-metrics/process_memory_gib" in line]) == 2


def test_the_gpu_is_found_by_its_uuid(nvml: Nvml) -> None:
    gpu = find_gpu(run_on("cuda"))
    assert gpu is not None
    assert gpu.look() == {"gpu_utilisation": 20.0, "gpu_memory_gib": 2.0}


@pytest.mark.parametrize(
    ("nvml_has", "told"), [({"broken": True}, "Driver Not Loaded"), ({"uuid": "MIG"}, "Not Found")]
)
def test_a_gpu_that_cannot_be_asked_is_left_out(nvml: Nvml, nvml_has: dict[str, Any], told: str) -> None:
    vars(nvml).update(nvml_has)
    said: list[str] = []
    assert find_gpu(run_on("cuda", said)) is None
    assert said == [f"system-metrics: the GPU cannot be asked, so its figures are left out: {told}"]


def test_a_gpu_that_stops_telling_is_left_out_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Lost(Nvml):
        def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
            if self.looks > 2:
                raise self.NVMLError("GPU is lost")
            return super().nvmlDeviceGetMemoryInfo(handle)

    monkeypatch.setattr("llmtk_plugin_system_metrics.find_gpu", lambda run: Gpu(Lost(), "GPU-1234"))
    assert make(tmp_path, every=0).train().steps == 4
    first, second = lines(tmp_path, "timings")
    assert first["system-metrics/gpu_utilisation"] == 20
    assert "system-metrics/gpu_utilisation" not in second
    assert second["system-metrics/process_memory_gib"] > 0
    assert capsys.readouterr().out.count("its figures are left out: GPU is lost") == 1


def test_a_cpu_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert find_gpu(run_on("cpu")) is None


def test_the_installed_library_has_what_is_asked() -> None:
    import pynvml

    for name in (name for name in vars(Nvml) if name.startswith("nvml")):
        assert callable(getattr(pynvml, name))
    assert issubclass(pynvml.NVMLError, Exception)


def test_several_ranks_have_figures_each() -> None:
    plugin = SystemMetrics(SystemMetrics.Options())
    ranks = [{"process_memory_gib": 1.0}, {"process_memory_gib": 2.0}]
    run: Any = SimpleNamespace(gather=lambda mine: ranks)
    step: Any = None
    assert plugin.extra_timings(run, step) == {"rank0/process_memory_gib": 1.0, "rank1/process_memory_gib": 2.0}


def test_looks_are_summed_up() -> None:
    looks = [{"gpu_utilisation": 10.0, "gpu_memory_gib": 3.0}, {"gpu_utilisation": 30.0, "gpu_memory_gib": 2.0}]
    assert summed_up(looks) == {"gpu_utilisation": 20.0, "gpu_memory_gib": 3.0}
