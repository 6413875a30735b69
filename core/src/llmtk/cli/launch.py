"""`llmtk launch`."""

from __future__ import annotations

import os
import shlex
import sys

import click

from llmtk.errors import ConfigurationError
from llmtk.ports import LOCAL, check_port, free_port

PORT = 29500


@click.command("launch", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option(
    "-n", "--processes", type=click.IntRange(1), help="Processes of all machines. By default one for each GPU."
)
@click.option("--machines", type=click.IntRange(1), default=1, help="Machines. The command is given on each.")
@click.option("--machine-rank", type=click.IntRange(0), default=0, help="Which of the machines this is, from 0.")
@click.option("--main-address", metavar="HOST", help="Address of machine 0.")
@click.option("--main-port", type=click.IntRange(1, 65535), help=f"Its port: {PORT}, or on one machine a free one.")
@click.option("--dry-run", is_flag=True, help="Print the command, and run nothing.")
@click.argument("words", nargs=-1, metavar="[STAGE] [CONFIG.yaml] [KEY=VALUE]...")
def command(
    processes: int | None,
    machines: int,
    machine_rank: int,
    main_address: str | None,
    main_port: int | None,
    dry_run: bool,
    words: tuple[str, ...],
) -> None:
    """Train as `llmtk run` does, in several processes: llmtk launch -n 2 sft config.yaml

    Options of this command stand before the first word; what follows is for `llmtk run`. The processes are started by
    Accelerate's launcher, by the command that is printed.
    """
    from llmtk.cli import run

    processes = processes or _gpus() * machines
    _check_machines(processes, machines, machine_rank, main_address)
    run.made(**run.command.make_context("llmtk run", list(words)).params)  # a mistake is told here, once
    check_gpus(processes // machines)
    port = main_port or (PORT if machines > 1 else free_port())
    if machine_rank == 0:
        check_port("", port, "--main-port")
    started = [*launcher(processes, machines, machine_rank, main_address or LOCAL, port), "llmtk", "run", *words]
    click.echo(shlex.join(started))
    sys.stdout.flush()
    if not dry_run:
        os.execv(sys.executable, started)


def launcher(processes: int, machines: int, machine_rank: int, address: str, port: int) -> list[str]:
    """Return the words of a command that starts a module in several processes; its name and arguments follow."""
    several = ["--multi_gpu"] if processes > 1 else []  # without GPUs too: Accelerate starts one process otherwise
    where = {
        "--num_processes": processes,
        "--num_machines": machines,
        "--machine_rank": machine_rank,
        "--main_process_ip": address,
        "--main_process_port": port,
        # The run chooses its precision itself; Accelerate asks for these where they are not given.
        "--mixed_precision": "no",
        "--dynamo_backend": "no",
    }
    options = [str(word) for option in where.items() for word in option]
    return [sys.executable, "-m", "accelerate.commands.launch", *several, *options, "--module"]


def _check_machines(processes: int, machines: int, machine_rank: int, main_address: str | None) -> None:
    if processes % machines:
        raise ConfigurationError(
            f"-n {processes}: {machines} machines cannot share them equally. Change one of the two"
        )
    if machine_rank >= machines:
        raise ConfigurationError(f"--machine-rank {machine_rank}: of {machines} machines the last is {machines - 1}")
    if machines > 1 and main_address is None:
        raise ConfigurationError("--main-address is missing: give that of machine 0, the same on each machine")
    if machines == 1 and main_address is not None:
        raise ConfigurationError("--main-address is for several machines: give --machines, or leave it out")


def _gpus() -> int:
    import torch

    if count := torch.cuda.device_count():
        return count
    raise ConfigurationError("-n is missing: this machine has no GPU to count. Say how many processes: -n 2")


def check_gpus(wanted: int) -> None:
    """Refuse more processes than this machine has GPUs, if it has any. ConfigurationError."""
    import torch

    if 0 < (count := torch.cuda.device_count()) < wanted:
        raise ConfigurationError(
            f"-n: {wanted} processes on this machine, which has {count} GPU{'s' * (count > 1)}. Give fewer, or train "
            "without GPUs: CUDA_VISIBLE_DEVICES= in front of the command"
        )
