"""Checkpoints on disk: whole or named as damaged, whenever the process dies; optimizer state back to the bit."""

from __future__ import annotations

import json
import os
import pathlib
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from llmtk import CheckpointError
from llmtk.training import checkpoints

FILES = {"weights.safetensors": 900, "state.json": 40, "rank-0.json": 3, "rank-0.safetensors": 1}


def write(folder, step, mark=0):
    """Write a checkpoint of a few files, the way that a run does."""
    aside = checkpoints.begin(folder, step)
    for name, size in FILES.items():
        (aside / name).write_bytes(bytes((index + step + mark) % 251 for index in range(size)))
    path = checkpoints.path_of(folder, step)
    checkpoints.commit(aside, path)
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def never(message):
    raise AssertionError(message)


def test_a_fresh_checkpoint_is_sound(tmp_path):
    path = write(tmp_path, 7)
    assert path.name == "checkpoint-000007"
    assert names(tmp_path) == ["checkpoint-000007"]
    assert checkpoints.verify(path) is None
    manifest = json.loads((path / "manifest.json").read_text())
    assert {name: entry["size"] for name, entry in manifest["files"].items()} == FILES


@pytest.mark.parametrize("file", [*FILES, "manifest.json"])
def test_every_damage_is_named(tmp_path, file):
    path = write(tmp_path, 1)
    data = (path / file).read_bytes()
    for position in {0, len(data) // 3, len(data) // 2, len(data) - 1}:
        flipped = bytearray(data)
        flipped[position] ^= 1
        (path / file).write_bytes(flipped)
        assert checkpoints.verify(path) is not None, position
        if file != "manifest.json":
            assert checkpoints.verify(path) == f"{file} is damaged: its SHA-256 differs from the manifest's"
    for size in {0, len(data) // 2, len(data) - 2} - {-1}:
        (path / file).write_bytes(data[:size])
        assert file in checkpoints.verify(path)
    (path / file).write_bytes(data + b"more")
    assert file in checkpoints.verify(path)
    (path / file).unlink()
    assert file in checkpoints.verify(path)
    (path / file).write_bytes(data)
    assert checkpoints.verify(path) is None


@pytest.mark.parametrize("manifest", ["[]", "{}", '{"files": []}', '{"files": {"a": 1}}', "null", "\xff"])
def test_a_manifest_of_another_shape_is_no_crash(tmp_path, manifest):
    path = write(tmp_path, 1)
    (path / "manifest.json").write_text(manifest, encoding="latin-1")
    assert checkpoints.verify(path) is not None


def test_the_newest_sound_one_is_taken_and_damaged_ones_named(tmp_path):
    for step in (2, 10, 100):
        write(tmp_path, step)
    said = []
    assert checkpoints.newest_sound(tmp_path, never).name == "checkpoint-000100"
    (tmp_path / "checkpoint-000100" / "weights.safetensors").write_bytes(b"")
    (tmp_path / "checkpoint-000010" / "manifest.json").unlink()
    assert checkpoints.newest_sound(tmp_path, said.append).name == "checkpoint-000002"
    assert ["checkpoint-000100" in said[0], "weights" in said[0], "checkpoint-000010" in said[1]] == [True] * 3
    shutil.rmtree(tmp_path / "checkpoint-000002")
    assert checkpoints.newest_sound(tmp_path, said.append) is None
    assert checkpoints.newest_sound(tmp_path / "nowhere", never) is None


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (999999, 1000000, 5):
        write(tmp_path, step)
    assert [step for step, _ in checkpoints.list_checkpoints(tmp_path)] == [5, 999999, 1000000]


class Killed(BaseException):
    """Stands for the end of the process."""


def kill_at(patch, count):
    """Let the process die at its n-th call that changes the disk."""
    left = [count]

    def deadly(real):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return real(*args, **kwargs)

        return call

    for owner, name in ((pathlib.Path, "rename"), (shutil, "rmtree"), (os, "fsync"), (pathlib.Path, "mkdir")):
        patch.setattr(owner, name, deadly(getattr(owner, name)))
    patch.setattr(pathlib.Path, "write_bytes", deadly(pathlib.Path.write_bytes))
    patch.setattr(pathlib.Path, "write_text", deadly(pathlib.Path.write_text))
    return left


@pytest.mark.parametrize("step", [3, 2])
def test_whenever_the_process_dies_a_sound_checkpoint_stands(tmp_path, step):
    """While the checkpoint of step 3 is written beside those of 1 and 2, or that of 2 anew, and the oldest removed."""
    finished = False
    deaths = 0
    while not finished:
        folder = tmp_path / str(deaths)
        for before in (1, 2):
            write(folder, before)
        old = (folder / "checkpoint-000002" / "state.json").read_bytes()
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, deaths)
            try:
                write(folder, step, mark=50)
                checkpoints.prune(folder, 1, set())
                finished = True
            except Killed:
                pass
        newest = checkpoints.newest_sound(folder, never)
        assert newest is not None
        assert newest.name in ("checkpoint-000002", "checkpoint-000003")
        if finished:
            assert names(folder) == [f"checkpoint-{step:06d}"]
            assert (newest / "state.json").read_bytes() != old
        # The next write clears what is left, and leaves nothing half done.
        write(folder, 4)
        checkpoints.prune(folder, 1, set())
        assert names(folder) == ["checkpoint-000004"]
        deaths += 1
    assert deaths > 10


def test_a_replaced_checkpoint_is_the_old_or_the_new_one_whole(tmp_path):
    write(tmp_path, 2)
    (tmp_path / "checkpoint-000002").rename(tmp_path / f"{checkpoints.REPLACED}checkpoint-000002")
    (tmp_path / ".writing-000002").mkdir()
    assert checkpoints.list_checkpoints(tmp_path) == []
    assert checkpoints.newest_sound(tmp_path, never).name == "checkpoint-000002"


@pytest.mark.parametrize(
    ("keep", "protected", "left"),
    [(None, 1, [1, 2, 3, 4]), (9, 1, [1, 2, 3, 4]), (2, 1, [1, 3, 4]), (1, 2, [2, 4]), (1, 4, [4]), (1, None, [4])],
)
def test_pruning_keeps_the_newest_and_the_best(tmp_path, keep, protected, left):
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    checkpoints.prune(tmp_path, keep, {checkpoints.path_of(tmp_path, protected)} if protected else set())
    assert names(tmp_path) == [f"checkpoint-{step:06d}" for step in left]


def test_checkpoints_after_the_one_gone_on_from_are_removed(tmp_path):
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    assert [path.name[-1] for path in checkpoints.remove_later(tmp_path, 2)] == ["3", "4"]
    assert names(tmp_path) == ["checkpoint-000001", "checkpoint-000002"]


# Weights and optimizer state


class Net(nn.Module):
    """Two parameters of other types, a tied one, a frozen one and buffers."""

    def __init__(self, seed=0, names=("first", "second")):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, dtype in zip(names, (torch.bfloat16, torch.float32), strict=True):
            self.register_parameter(name, nn.Parameter(torch.randn(3, 2, generator=generator).to(dtype)))
        self.tied = getattr(self, names[0])
        self.frozen = nn.Parameter(torch.full((2,), float(seed)), requires_grad=False)
        self.register_buffer("seen", torch.tensor(seed))
        self.register_buffer("scratch", torch.tensor(seed), persistent=False)


def trained(parameters) -> list[nn.Parameter]:
    return [p for p in parameters if p.requires_grad]


def step(optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
    optimizer.step()


def test_weights_come_back_but_for_what_is_frozen(tmp_path):
    first, second = Net(1), Net(2)
    checkpoints.save_weights(tmp_path / "w", first)
    assert set(load_file(tmp_path / "w")) == {"first", "second", "seen"}
    checkpoints.load_weights(tmp_path / "w", second)
    for name in ("first", "second", "seen"):
        assert torch.equal(getattr(second, name), getattr(first, name))
    assert second.tied is second.first
    assert (second.frozen[0], second.scratch) == (2, 2)


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_go_on_to_the_bit(tmp_path, name):
    net, again = Net(1), Net(1)
    one = OPTIMIZERS[name]([{"params": [net.first]}, {"params": [net.second], "weight_decay": 0.0}])
    two = OPTIMIZERS[name]([{"params": [again.first]}, {"params": [again.second]}])
    for seed in range(3):
        step(one, seed)
    one.param_groups[0]["lr"] = 0.07
    saved = json.loads(json.dumps(checkpoints.save_optimizer(tmp_path / "o", net, one)))
    checkpoints.save_weights(tmp_path / "w", net)
    checkpoints.load_weights(tmp_path / "w", again)
    checkpoints.load_optimizer(tmp_path / "o", again, two, saved)
    assert type(two.param_groups[0].get("betas", ())) is tuple

    def settings(optimizer):
        return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]

    assert settings(one) == settings(two)
    for mine, other in ((net.first, again.first), (net.second, again.second)):
        for key, value in one.state[mine].items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == two.state[other][key].dtype
                assert torch.equal(value, two.state[other][key])
            else:
                assert value == two.state[other][key]
    for seed in range(3, 6):
        step(one, seed)
        step(two, seed)
    assert torch.equal(net.first, again.first)
    assert torch.equal(net.second, again.second)


def test_state_in_another_type_than_the_parameters_is_not_cast(tmp_path):
    """torch's own load_state_dict would make it bfloat16 here."""
    net, again = Net(1), Net(1)
    one, two = torch.optim.AdamW([net.first], lr=0.1), torch.optim.AdamW([again.first], lr=0.1)
    state = {
        "exp_avg": torch.tensor([[1 + 2**-20]]),
        "codes": torch.tensor([7], dtype=torch.uint8),
        "step": torch.tensor(3.0),
    }
    one.state[net.first] = {**state, "plain": 0.5}
    saved = checkpoints.save_optimizer(tmp_path / "o", net, one)
    checkpoints.load_optimizer(tmp_path / "o", again, two, json.loads(json.dumps(saved)))
    for key, value in state.items():
        assert two.state[again.first][key].dtype == value.dtype
        assert torch.equal(two.state[again.first][key], value)
    assert two.state[again.first]["plain"] == 0.5


def test_state_goes_by_name_not_by_order(tmp_path):
    net, again = Net(1), Net(1)
    one = torch.optim.SGD(trained([net.first, net.second]), lr=0.1, momentum=0.9)
    step(one, 0)
    saved = checkpoints.save_optimizer(tmp_path / "o", net, one)
    two = torch.optim.SGD(trained([again.second, again.first]), lr=0.1, momentum=0.9)
    with pytest.raises(CheckpointError, match="does not fit the optimizer: its parameter groups hold other parameters"):
        checkpoints.load_optimizer(tmp_path / "o", again, two, saved)


def change_shape(net):
    net.second = nn.Parameter(torch.zeros(2, 3))


def change_dtype(net):
    net.second = nn.Parameter(net.second.data.double())


def freeze(net):
    net.second.requires_grad_(False)


def add(net):
    net.third = nn.Parameter(torch.zeros(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_shape, r"second is torch.float32 \(3, 2\), the model's is torch.float32 \(2, 3\)"),
        (change_dtype, r"second is torch.float32 \(3, 2\), the model's is torch.float64 \(3, 2\)"),
        (freeze, r"has \['second'\] \(1\) that the model lacks"),
        (add, r"it lacks \['third'\] \(1 in all\)"),
    ],
)
def test_weights_of_another_model_are_refused_and_change_nothing(tmp_path, change, message):
    checkpoints.save_weights(tmp_path / "w", Net(1))
    other = Net(2)
    change(other)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        checkpoints.load_weights(tmp_path / "w", other)
    assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())


# Plugins' state


def test_a_plugins_state_is_parted_and_comes_back(tmp_path):
    shared = torch.arange(6.0)
    state = {"mean": shared[:3], "rest": shared[3:], "count": 3, "names": ["a", None], "best": float("nan"), "on": True}
    tensors, rest = checkpoints.split_state(state, "ema")
    checkpoints.save_rank(tmp_path, 0, tensors, rest)
    tensors, rest = checkpoints.load_rank(tmp_path, 0)
    assert torch.equal(tensors["mean"], shared[:3])
    assert torch.equal(tensors["rest"], shared[3:])
    assert rest.pop("best") != state.pop("best")
    assert rest == {"count": 3, "names": ["a", None], "on": True}
    assert (tmp_path / "rank-0.safetensors").stat().st_size < 400  # the slices alone, not what they were cut from


@pytest.mark.parametrize(
    "value", [object(), (1, 2), {1: "a"}, {"a": torch.ones(1)}, {2}, b"a", [float("nan"), (1, 2)], lambda: 0]
)
def test_what_would_not_come_back_the_same_is_refused_with_the_plugins_name(value):
    with pytest.raises(CheckpointError, match="ema: checkpoint state is tensors and JSON"):
        checkpoints.split_state({"fine": 1, "bad": value}, "ema")


def test_damaged_json_is_an_error_that_names_the_file(tmp_path):
    for text in ("", "[1]", "{"):
        (tmp_path / "state.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"state\.json"):
            checkpoints.read_json(tmp_path / "state.json")
