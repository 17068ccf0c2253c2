"""The columns of the matrix: each mode runs one subject and raises unless its numbers are those of the oracle.

A mode is a function of a subject, listed in ``MODES`` under its name in the table. Modes of several processes have
files of their own; they register themselves with :func:`mode` in the same way.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import io
import itertools
import pickle
from collections.abc import Callable, Iterator

import torch
import torch.autograd.forward_ad as forward_ad
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import checkpoint

from tests.conformance.subjects import N_POSITIONS, Subject, rows_of

BUDGET = 1e-5
# of a step in 16 bits, as a multiple of the rounding of one number
ROUNDINGS = 16
COMPILER = "aot_eager"
MODES: dict[str, Callable[[Subject], None]] = {}
_numbers = itertools.count()


def mode(name: str):
    """Registers a function of a subject under its name in the table."""

    def register(function):
        MODES[name] = function
        return function

    return register


def fresh() -> str:
    """A tag that no declaration of this process has yet, so that nothing of its plan is made before the mode is on."""
    return str(next(_numbers))


# -- what is right ----------------------------------------------------------------------------------------------------


def loss(out: torch.Tensor) -> torch.Tensor:
    """A sum of squares that weighs each number of a batch entry otherwise."""
    weights = torch.linspace(0.5, 1.5, out.shape[-2:].numel(), dtype=out.dtype).reshape(out.shape[-2:])
    return (weights * out.square()).sum() / 2


def gradients(out: torch.Tensor, x: torch.Tensor, module: torch.nn.Module, penalty=False) -> dict[str, torch.Tensor]:
    """Gradients of the loss, or of the squares of its gradient in x, in x and every parameter."""
    inputs, value = {"x": x, **dict(module.named_parameters())}, loss(out)
    if penalty:
        (first,) = torch.autograd.grad(value, x, create_graph=True)
        value = first.square().sum()
    found = torch.autograd.grad(value, list(inputs.values()), allow_unused=True)
    return {name: torch.zeros_like(t) if g is None else g for (name, t), g in zip(inputs.items(), found)}


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the oracle gives of a subject: its output, and gradients by name."""

    out: torch.Tensor
    gradients: dict[str, torch.Tensor]


@functools.cache
def answer(subject: Subject, batch: int = 2, penalty: bool = False) -> Answer:
    """The oracle's numbers in float64, whatever mode asks for them."""
    with torch.inference_mode(False), torch.enable_grad():
        return _answer(subject, batch, penalty)


def _answer(subject: Subject, batch: int, penalty: bool) -> Answer:
    module, x = subject.build("oracle").double(), subject.inputs(batch).double().requires_grad_()
    out = subject.oracle(module, x)
    return Answer(out.detach(), gradients(out, x, module, penalty))


@functools.cache
def derivative(subject: Subject, with_parameters: bool) -> torch.Tensor:
    """The output's derivative along :func:`directions`, from two evaluations of the oracle in float64."""
    module, x = subject.build("oracle").double(), subject.inputs().double()
    along_x, along = directions(subject, module)
    step, ends = 1e-6, []
    for sign in (1, -1):
        moved = copy.deepcopy(module)
        with torch.no_grad():
            for name, parameter in moved.named_parameters():
                if with_parameters:
                    parameter.add_(sign * step * along[name])
            ends.append(subject.oracle(moved, x + sign * step * along_x))
    return (ends[0] - ends[1]) / (2 * step)


def directions(subject: Subject, module: torch.nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Tangents of x and of every parameter, in the parameters' dtype."""
    generator = torch.Generator().manual_seed(3)
    dtype = next((p.dtype for p in module.parameters()), torch.float32)
    along_x = torch.randn(subject.inputs().shape, generator=generator)
    return along_x.to(dtype), {
        name: torch.randn(p.shape, generator=generator).to(dtype) for name, p in module.named_parameters()
    }


def close(found: torch.Tensor, expected: torch.Tensor, what: str, budget: float = BUDGET, floor: float = 0.0) -> None:
    """AssertionError unless max |difference| ≤ budget · max(max |expected|, floor)."""
    assert type(found) in (torch.Tensor, torch.nn.Parameter), f"{what} is a {type(found).__name__}"
    assert found.shape == expected.shape, f"{what} is {tuple(found.shape)}, expected {tuple(expected.shape)}"
    if expected.numel():
        error = (found.detach().double() - expected).abs().max().item()
        scale = max(expected.abs().max().item(), floor)
        assert error <= budget * scale, f"{what}: error {error:.3g}, {error / scale:.2g} of the largest"


def close_all(found: dict, expected: dict, budget: float = BUDGET, floor: float = 0.01) -> None:
    """:func:`close` for gradients by name; those below ``floor`` of the largest of all are held to that."""
    largest = max(value.abs().max().item() for value in expected.values())
    for name, value in expected.items():
        close(found[name], value, f"the gradient of {name}", budget, floor * largest)


def check(subject: Subject, call, module=None, batch=2, budget=BUDGET) -> None:
    """Output and gradients of one call against the oracle; ``module`` has its parameters, by default ``call``."""
    x = subject.inputs(batch).requires_grad_()
    out, expected = call(x), answer(subject, batch)
    close(out, expected.out, "the output", budget)
    close_all(gradients(out, x, call if module is None else module), expected.gradients, budget)


# -- eager and compiled -----------------------------------------------------------------------------------------------


@mode("eager")
def eager(subject: Subject) -> None:
    check(subject, subject.build(fresh()))


@mode("batch of 0")
def empty_batch(subject: Subject) -> None:
    module, x = subject.build(fresh()), subject.inputs(0).requires_grad_()
    out = module(x)
    assert out.shape == answer(subject).out[:0].shape, out.shape
    assert not any(gradient.any() for gradient in gradients(out, x, module).values())


@mode("tensors of any strides")
def strided(subject: Subject) -> None:
    """The batch is innermost in memory, in x and in the gradient of the output."""
    module = subject.build(fresh())

    def turned(x):
        return x.transpose(0, -1).contiguous().transpose(0, -1)

    check(subject, lambda x: turned(module(turned(x))), module)


@mode("NaN where nobody attends to")
def isolated(subject: Subject) -> None:
    """Unused positions and, where regions can be inactive, c, which attends to itself alone, are NaN or infinite."""
    module, clean = subject.build(fresh()), subject.inputs()
    rows = torch.tensor(rows_of("a", "b") if subject.takes_active else rows_of("a", "b", "c"))
    kept = torch.zeros(N_POSITIONS, 1, dtype=torch.bool).index_fill(0, rows, True)
    # the loops' parameters move every row of a model, whoever attends to it
    own = {name: p for name, p in module.named_parameters() if ".loop." not in name}
    faults, results = torch.tensor([[float("nan")], [float("inf")]]).repeat(N_POSITIONS // 2, 1), []
    for x in (clean, torch.where(kept, clean, faults)):
        x.requires_grad_()
        out = torch.where(kept, module(x, ["a", "b"]) if subject.takes_active else module(x), 0.0)
        found = torch.autograd.grad(loss(out), [x, *own.values()], allow_unused=True)
        close(out[..., rows, :], answer(subject).out[..., rows, :], "the output")
        close(found[0][..., rows, :], answer(subject).gradients["x"][..., rows, :], "the gradient of x")
        results.append({name: g for name, g in zip(own, found[1:]) if g is not None})
    if own:
        close_all(results[1], {name: g.double() for name, g in results[0].items()})


@contextlib.contextmanager
def compiled(function) -> Iterator[Callable]:
    """``function``, compiled whole, with nothing left of earlier compilations or of this one."""
    torch._dynamo.reset()
    try:
        yield torch.compile(function, fullgraph=True, backend=COMPILER)
    finally:
        torch._dynamo.reset()


@mode("torch.compile, dynamic batch")
def compile_dynamic(subject: Subject) -> None:
    module = subject.build(fresh())
    with compiled(module) as call:

        def any_batch(x):
            torch._dynamo.mark_dynamic(x, 0)
            return call(x)

        check(subject, any_batch, module)
        with torch.compiler.set_stance("fail_on_recompile"):
            check(subject, any_batch, module, batch=3)


@mode("torch.compile under inference_mode")
def compile_inference(subject: Subject) -> None:
    module = subject.build(fresh())
    with compiled(module) as call, torch.inference_mode():
        close(call(subject.inputs()), answer(subject).out, "the output")
    check(subject, module)


@mode("torch.compile of func.grad")
def compile_func_grad(subject: Subject) -> None:
    with compiled(torch.func.grad(_loss_of(module := subject.build(fresh())), argnums=(0, 1))) as call:
        in_parameters, in_x = call(*_arguments(subject, module))
    close_all({"x": in_x, **in_parameters}, answer(subject).gradients)


@mode("torch.compile, dropout")
def compile_dropout(subject: Subject) -> None:
    module, direction = subject.build(fresh(), dropout=0.5).double(), directions(subject, subject.build("oracle"))[0]
    x, direction = subject.inputs().double().requires_grad_(), direction.double()

    def seeded(x):
        torch.manual_seed(7)
        return call(x)

    with compiled(module) as call:
        out = seeded(x)
        (gradient,) = torch.autograd.grad(loss(out), x)
        assert torch.equal(out, seeded(x))
        assert subject.drops != torch.equal(out, call(x)), "another draw drops the same weights, or some are dropped"
        with torch.no_grad():
            ends = [loss(seeded(x + sign * 1e-6 * direction)) for sign in (1, -1)]
    close((gradient * direction).sum(), (ends[0] - ends[1]) / 2e-6, "the derivative under one draw")
    close(module.eval()(x), answer(subject).out, "the output in eval")


# -- export, fake and meta tensors ------------------------------------------------------------------------------------


@mode("torch.export, twice, dynamic batch")
def export(subject: Subject) -> None:
    module = subject.build(fresh()).eval()
    for strict in (True, False):
        torch._dynamo.reset()
        shapes = ({0: torch.export.Dim("batch", min=2, max=64)},)
        program = torch.export.export(module, (subject.inputs(),), dynamic_shapes=shapes, strict=strict)
        check(subject, program.module(), batch=3)
    check(subject, module)


@mode("FakeTensorMode")
def fake(subject: Subject) -> None:
    tag, shape = fresh(), answer(subject).out.shape
    # what fake tensors find made by nobody, and then what real ones made
    for _ in range(2):
        with FakeTensorMode():
            x = torch.empty(2, *subject.shape, requires_grad=True)
            out = subject.build(tag)(x)
            assert isinstance(out, FakeTensor) and out.shape == shape, out
            loss(out).backward()
            assert isinstance(x.grad, FakeTensor)
        check(subject, subject.build(tag))


@mode("meta, to_empty, strict load")
def meta(subject: Subject) -> None:
    tag = fresh()
    with torch.device("meta"):
        module = subject.build(tag, drawn=False)
    with filled_memory():
        module.to_empty(device="cpu")
    module.load_state_dict(subject.build("oracle").state_dict(), strict=True)
    check(subject, module)


@contextlib.contextmanager
def filled_memory() -> Iterator[None]:
    """Deterministic algorithms, with NaN or the largest number in memory that nobody has written to."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@mode("deterministic algorithms, filled memory")
def deterministic(subject: Subject) -> None:
    with filled_memory():
        module = subject.build(fresh())
        check(subject, module)
        x = subject.inputs().requires_grad_()
        first, second = (gradients(module(x), x, module) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@mode("inference_mode, then training")
def inference(subject: Subject) -> None:
    for built_inside in (True, False):
        with torch.inference_mode(built_inside):
            module = subject.build(fresh())
        with torch.inference_mode():
            close(module(subject.inputs()), answer(subject).out, "the output")
        check(subject, module)


# -- transforms -------------------------------------------------------------------------------------------------------


def _functional(module):
    """(parameters, x) → output, as torch.func wants it."""
    return lambda parameters, x: torch.func.functional_call(module, parameters, (x,))


def _loss_of(module):
    call = _functional(module)
    return lambda parameters, x: loss(call(parameters, x))


def _arguments(subject: Subject, module):
    return {name: parameter.detach() for name, parameter in module.named_parameters()}, subject.inputs()


@mode("func.grad")
def func_grad(subject: Subject) -> None:
    module = subject.build(fresh())
    in_parameters, in_x = torch.func.grad(_loss_of(module), argnums=(0, 1))(*_arguments(subject, module))
    close_all({"x": in_x, **in_parameters}, answer(subject).gradients)


@mode("func.vjp")
def func_vjp(subject: Subject) -> None:
    module = subject.build(fresh())
    parameters, x = _arguments(subject, module)
    out, pull = torch.func.vjp(_functional(module), parameters, x)
    close(out, answer(subject).out, "the output")
    (upstream,) = torch.autograd.grad(loss(leaf := out.detach().requires_grad_()), leaf)
    in_parameters, in_x = pull(upstream)
    close_all({"x": in_x, **in_parameters}, answer(subject).gradients)


@mode("func.vmap, and of func.grad")
def func_vmap(subject: Subject) -> None:
    module, expected = subject.build(fresh()), answer(subject)
    parameters, x = _arguments(subject, module)
    samples = (parameters, x[:, None])
    close(torch.func.vmap(_functional(module), (None, 0))(*samples)[:, 0], expected.out, "the output")
    each = torch.func.vmap(torch.func.grad(_loss_of(module), argnums=(0, 1)), (None, 0))
    in_parameters, in_x = each(*samples)
    close_all({"x": in_x[:, 0], **{name: g.sum(0) for name, g in in_parameters.items()}}, expected.gradients)


@mode("func.jvp")
def func_jvp(subject: Subject) -> None:
    module = subject.build(fresh())
    parameters, x = _arguments(subject, module)
    along_x, along = directions(subject, module)
    out, tangent = torch.func.jvp(_functional(module), (parameters, x), (along, along_x))
    close(out, answer(subject).out, "the output")
    close(tangent, derivative(subject, True), "the tangent")


@mode("dual numbers")
def dual(subject: Subject) -> None:
    module = subject.build(fresh())
    for grad in (False, True):
        with torch.set_grad_enabled(grad), forward_ad.dual_level():
            found = forward_ad.unpack_dual(
                module(forward_ad.make_dual(subject.inputs(), directions(subject, module)[0]))
            )
            assert found.tangent is not None, "the tangent is dropped"
            close(found.primal, answer(subject).out, "the output")
            close(found.tangent, derivative(subject, False), "the tangent")


@mode("double backward")
def double_backward(subject: Subject) -> None:
    module, x = subject.build(fresh()).double(), subject.inputs().double().requires_grad_()
    close_all(gradients(module(x), x, module, penalty=True), answer(subject, penalty=True).gradients)


# -- training ---------------------------------------------------------------------------------------------------------


@mode("checkpoint, reentrant")
def checkpoint_reentrant(subject: Subject) -> None:
    module, x = subject.build(fresh()), subject.inputs().requires_grad_()
    out = checkpoint(module, x, use_reentrant=True)
    close(out, answer(subject).out, "the output")
    loss(out).backward()
    inputs = {"x": x, **dict(module.named_parameters())}
    found = {name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in inputs.items()}
    close_all(found, answer(subject).gradients)


@mode("checkpoint, not reentrant")
def checkpoint_not_reentrant(subject: Subject) -> None:
    module = subject.build(fresh())
    check(subject, lambda x: checkpoint(module, x, use_reentrant=False), module)


def _autocast(subject: Subject, dtype: torch.dtype) -> None:
    """A scaled step of descent moves every parameter by its gradient, within the roundings of ``dtype``."""
    module, x, expected = subject.build(fresh()), subject.inputs().requires_grad_(), answer(subject)
    budget, scaler = ROUNDINGS * torch.finfo(dtype).eps, torch.amp.GradScaler("cpu", init_scale=16.0)
    with torch.autocast("cpu", dtype):
        out = module(x)
    close(out.float(), expected.out, "the output", budget)
    scaler.scale(loss(out.float())).backward()
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    if before:
        scaler.step(torch.optim.SGD(module.parameters(), lr=1.0))
        scaler.update()
    found = {"x": x.grad / 16.0, **{name: before[name] - p.detach() for name, p in module.named_parameters()}}
    close_all(found, expected.gradients, budget, floor=1.0)


mode("autocast to bfloat16")(functools.partial(_autocast, dtype=torch.bfloat16))
mode("autocast to float16, GradScaler")(functools.partial(_autocast, dtype=torch.float16))


# -- copies -----------------------------------------------------------------------------------------------------------


def _copied(subject: Subject, copied: Callable[[torch.nn.Module, Subject], torch.nn.Module]) -> None:
    """A copy of a module that has run has its numbers, and parameters of its own."""
    module = subject.build(fresh())
    module(subject.inputs())
    other = copied(module, subject)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    check(subject, other)


def _loaded(module: torch.nn.Module, subject: Subject) -> torch.nn.Module:
    file, other = io.BytesIO(), subject.build(fresh(), drawn=False)
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    return other


mode("deepcopy")(functools.partial(_copied, copied=lambda module, subject: copy.deepcopy(module)))
mode("pickle")(functools.partial(_copied, copied=lambda module, subject: pickle.loads(pickle.dumps(module))))
mode("state dict, weights_only")(functools.partial(_copied, copied=_loaded))
