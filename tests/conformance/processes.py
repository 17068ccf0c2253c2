"""A model on two processes over gloo, under DistributedDataParallel and under FSDP2, against the same model alone.

Each process takes steps of gradient descent on arguments of its own. What it must give is what one process gives that
holds a replica for each rank: the outputs of its own replica, the mean of all replicas' gradients, and, of tensors that
a forward updates, those of its own replica.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tests.conformance.modes import check, fresh, mode
from tests.conformance.subjects import SUBJECTS, Subject

WORLD, RATE, SECONDS = 2, 0.05, 300

# of each rank, of each step: the arguments of the model's forward
Arguments = list[list[tuple]]


@dataclasses.dataclass(frozen=True)
class Task:
    """A model that every process can build.

    Args:
        factory: "module:function", a function that returns a module, its parameters drawn from a fixed seed, and its
            Arguments; the module's forward returns one tensor.
        args: of that function.
        units: names of submodules that FSDP2 shards by themselves.
        budget: of relative errors.
    """

    factory: str
    args: tuple = ()
    units: tuple[str, ...] = ()
    budget: float = 1e-5

    def make(self) -> tuple[nn.Module, Arguments]:
        module, _, name = self.factory.partition(":")
        return getattr(importlib.import_module(module), name)(*self.args)


def split(x: torch.Tensor, steps: int = 2) -> Arguments:
    """Arguments of a module of one tensor (batch, …): each rank takes its share of the batch, in every step."""
    return [[(part,)] * steps for part in x.chunk(WORLD)]


def ddp(*tasks: Task, folder: Path) -> list[int]:
    """Raises unless each task's model, built alike on both processes, is right under DistributedDataParallel.

    Starting two processes takes longer than most tasks do. Arguments, Returns, Raises: as of `run`.
    """
    return run(_steps, tasks, _under_ddp, folder=folder)


def fsdp2(*tasks: Task, folder: Path) -> list[int]:
    """Raises unless each task's model is right under FSDP2, from its usual start: meta, fully_shard, to_empty, load."""
    return run(_steps, tasks, _under_fsdp2, folder=folder)


def run(
    check: Callable[..., None], *args: Any, folder: Path, seconds: float = SECONDS, world: int = WORLD
) -> list[int]:
    """Calls ``check(rank, *args)`` in as many processes as there are ranks, with a process group between them.

    Args:
        check: a function of a module, that raises where it finds a fault.
        args: its further arguments, picklable.
        folder: an empty one, through which the processes meet.
        seconds: after which processes that wait for each other are ended.
        world: their number.

    Returns:
        their exit codes, all 0.

    Raises:
        AssertionError: they did not finish in time.
        torch.multiprocessing.ProcessRaisedException: what a process raised.
    """
    processes = torch.multiprocessing.spawn(_process, (check, args, str(folder), seconds, world), world, join=False)
    end = time.monotonic() + seconds
    try:
        while not processes.join(timeout=1.0):
            assert time.monotonic() < end, f"{world} processes did not finish within {seconds} s: one waits"
        return [process.exitcode for process in processes.processes]
    finally:
        for process in processes.processes:
            if process.is_alive():
                process.kill()
                process.join()


def _process(rank: int, check: Callable[..., None], args: tuple, folder: str, seconds: float, world: int) -> None:
    torch.set_num_threads(1)
    meeting = (Path(folder) / "meeting").absolute().as_uri()
    dist.init_process_group("gloo", meeting, timedelta(seconds=seconds), rank=rank, world_size=world)
    try:
        check(rank, *args)
    finally:
        dist.destroy_process_group()


def _steps(rank: int, tasks: tuple[Task, ...], under: Callable[[Task], nn.Module]) -> None:
    for task in tasks:
        try:
            _check(rank, task, under(task))
        except Exception as error:
            raise AssertionError(f"rank {rank}: {task}: {type(error).__name__}: {error}") from error


def _check(rank: int, task: Task, model: nn.Module) -> None:
    replicas = [task.make() for _ in range(WORLD)]
    arguments = replicas[rank][1]
    replicas = [replica for replica, _ in replicas]
    for step in range(len(arguments[rank])):
        expected = [_backward(replica, given[step]) for replica, given in zip(replicas, arguments)]
        means = _mean_gradients(replicas)
        _close(_backward(model, arguments[rank][step]), expected[rank], f"output of step {step}", task.budget)
        found = {_name(name): p for name, p in model.named_parameters() if p.requires_grad}
        assert found.keys() == means.keys(), sorted(found.keys() ^ means.keys())
        largest = max((mean.abs().max().item() for mean in means.values()), default=0.0)
        for name, mean in means.items():
            gradient = _whole(found[name].grad)
            _close(gradient, mean, f"gradient of {name} in step {step}", task.budget, 0.01 * largest)
        for module in (model, *replicas):
            torch.optim.SGD(module.parameters(), lr=RATE).step()
    state = {_name(name): value for name, value in model.state_dict().items()}
    for name, value in replicas[rank].state_dict().items():
        _close(_whole(state[name]), value, f"{name} after the last step", task.budget)


def _backward(module: nn.Module, arguments: tuple) -> torch.Tensor:
    module.zero_grad()
    out = module(*arguments)
    out.square().mean().backward()
    return out.detach()


def _mean_gradients(replicas: list[nn.Module]) -> dict[str, torch.Tensor]:
    """By name, which then every replica has; a parameter that no output depends on has a gradient of zero."""
    means = {}
    for parameters in zip(*(replica.named_parameters() for replica in replicas)):
        name, first = parameters[0]
        if not first.requires_grad:
            continue
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for _, p in parameters]
        means[name] = torch.stack(gradients).mean(0)
        for _, parameter in parameters:
            parameter.grad = means[name].clone()
    return means


def _close(found: torch.Tensor, expected: torch.Tensor, what: str, budget: float, floor: float = 0.0) -> None:
    assert found.shape == expected.shape, f"{what}: {tuple(found.shape)} instead of {tuple(expected.shape)}"
    if not expected.numel():
        return
    found, expected = found.double(), expected.double()
    scale = max(expected.abs().max().item(), floor) or 1.0
    error = (found - expected).abs().max().item() / scale
    assert error <= budget, f"{what} is off by {error:.2e}"


def _name(name: str) -> str:
    return name.removeprefix("module.")


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    assert tensor is not None, "a parameter without a gradient"
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _under_ddp(task: Task) -> nn.Module:
    return DistributedDataParallel(task.make()[0])


def _under_fsdp2(task: Task) -> nn.Module:
    whole = task.make()[0]
    with torch.device("meta"):
        model = task.make()[0]
    mesh = init_device_mesh("cpu", (WORLD,))
    for name in task.units:
        fully_shard(model.get_submodule(name), mesh=mesh)
    fully_shard(model, mesh=mesh)
    # fresh memory then holds NaN, and the largest integers
    torch.use_deterministic_algorithms(True)
    model.to_empty(device="cpu")
    torch.use_deterministic_algorithms(False)
    set_model_state_dict(model, whole.state_dict(), options=StateDictOptions(full_state_dict=True))
    return model


# -- columns of the matrix ---------------------------------------------------------------------------------------------


def of_subject(name: str) -> tuple[nn.Module, Arguments]:
    """A subject's module, and a batch of two for each rank."""
    subject = SUBJECTS[name]
    return subject.build("ranks").double(), split(subject.inputs(4).double())


def _on_two_processes(subject: Subject, under: Callable[..., list[int]]) -> None:
    # the replicas that the processes are held to are right
    check(subject, subject.build(fresh()))
    with tempfile.TemporaryDirectory() as folder:
        under(Task(f"{__name__}:{of_subject.__name__}", (subject.name,)), folder=Path(folder))


mode("DistributedDataParallel, 2 processes")(functools.partial(_on_two_processes, under=ddp))
mode("FSDP2, 2 processes, from meta")(functools.partial(_on_two_processes, under=fsdp2))
