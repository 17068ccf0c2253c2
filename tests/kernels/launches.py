"""Host time of a call on Triton with every launch a stub: ``python -m tests.kernels.launches`` (no GPU is needed).

Printed as a ratio to a bare autograd function that launches as many stubs in the same process. Both are the least of
many short runs, so that other work on the machine counts little.
"""

from __future__ import annotations

import os
import timeit
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import cases
from canvas_engineering.attention import canvas_attention
from canvas_engineering.plan import compile_attention
from canvas_kernels.triton_ops import launch, steps

NO_LAUNCH = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "promote_types"}

class TorchLaunches(TorchDispatchMode):
    """Counts torch's operators that launch something, also those inside of the project's own."""

    def __init__(self, counts: Counter) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace == "canvas_kernels":
            with self:
                return func._op_dk(torch._C.DispatchKey.CPU, *args)
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        self.counts[name] += not view and name not in NO_LAUNCH
        return func(*args, **(kwargs or {}))


class Stub:
    """Stands for a kernel: ``note`` gets its name at each launch."""

    def __init__(self, name: str, note) -> None:
        self.call = lambda *args, **options: note(name)

    def __getitem__(self, grid):
        return self.call


def stub_kernels(note, replace=setattr) -> None:
    """Puts a stub in place of every Triton kernel, and sm_90 for this machine; ``replace`` sets an attribute."""
    replace(launch, "arch_of", lambda device: "sm_90")
    for module in (launch, steps):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            replace(module, name, Stub(name, note))


def inputs(plan, edge: bool = True, packed: bool = False, head_dim: int = 64) -> tuple[dict, dict, torch.Tensor]:
    """Leaves q, k, v and gain and other options of a call over a plan, and the gradient of its result."""
    q, k, v, grad = torch.randn(4, 2, 2, plan.n_packed if packed else plan.n_positions, head_dim)
    leaves, options = {"q": q, "k": k, "v": v}, {"backend": "triton", "packed": packed}
    if edge:
        leaves["gain"], options["active"] = torch.ones(plan.n_connections), torch.ones(plan.n_connections)
    return {name: x.requires_grad_() for name, x in leaves.items()}, options, grad


def bare(forward: int, backward: int) -> type[torch.autograd.Function]:
    """An autograd function of q, k, v and gain that launches as many stubs."""
    stub = Stub("", lambda name: None)

    class Bare(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *leaves):
            out, lse = torch.empty_like(leaves[0]), torch.empty(leaves[0].shape[:3])
            for _ in range(forward):
                stub[1,](*leaves, out, lse)
            ctx.save_for_backward(*leaves, out, lse)
            return out

        @staticmethod
        def backward(ctx, grad):
            gradients = [torch.empty_like(x) for x in ctx.saved_tensors[:4]]
            for _ in range(backward):
                stub[1,](grad, *ctx.saved_tensors, *gradients)
            return tuple(gradients)

    return Bare


def main() -> None:
    """Prints launches and host time of the robot canvas with gains and activity."""
    # or tensors on a CPU are refused; nothing is interpreted
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    counts, launches = Counter(), []
    stub_kernels(lambda name: counts.update((name,)))
    plan = compile_attention(*cases.robot())
    leaves, options, grad = inputs(plan)
    tensors = list(leaves.values())

    def calls(attend) -> list:
        out = attend()
        return [attend, lambda: torch.autograd.grad(out, tensors, grad, retain_graph=True)]

    own = calls(lambda: canvas_attention(**leaves, plan=plan, **options))
    for call in own:
        counts.clear()
        with TorchLaunches(counts):
            call()
        launches.append(counts.total())
    yardstick = bare(*launches)
    for name, count, *both in zip(("forward", "backward"), launches, own, calls(lambda: yardstick.apply(*tensors))):
        a, b = (1e5 * min(timeit.repeat(call, repeat=200, number=10)) for call in both)
        print(f"{name}: {count} launches, {a:.0f} µs, bare autograd function {b:.0f} µs, ratio {a / b:.1f}")


if __name__ == "__main__":
    main()
