"""The house: import directions, names, kernel conventions, and examples that run."""

from __future__ import annotations

import ast
import doctest
import graphlib
import importlib
import importlib.resources
import importlib.util
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import canvas_engineering

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("canvas_engineering", "kernels")
MAX_LINES = 600
PUBLIC_NAMES = json.loads(Path(__file__).with_name("public_names.json").read_text())

# Down the list only. Modules of one layer may import each other.
LAYERS = {
    "declare": "version notices checked notebook files derived_buffers canvas connectivity masks schema types semantic "
    "program learning clock_ir cortex identity",
    "plan": "plan parallel compiler region_parameters",
    "run": "attention dispatch distributed scheduling clock_formulas residuals",
    "graft": "data looped_block models cogvideox graft curriculum sharpening action_heads checkpoint",
    "look": "draw explore doctor __main__",
}
# attention alone executes tables. plan builds them, orders rows and sums weights; dispatch moves rows into that order.
KERNEL_PARTS = {
    "plan": ("block_table.", "ranges.", "triton_ops.tiling.", "triton_ops.configs.", "derived.", "packing."),
    "parallel": ("block_table.BlockTable", "derived.", "packing.", "ranges."),
    "dispatch": ("derived.real_tensors", "packing.", "block_table.row_sums", "block_table.touched"),
    "identity": ("torch_ops.dense.",),
}
LAYER_OF = {module: level for level, modules in enumerate(LAYERS.values()) for module in modules.split()}


# -- files ------------------------------------------------------------------------------------------------------------


def modules_of(*packages: str) -> list[Path]:
    """Source files of the packages, tracked or not: a new file obeys the rules before it is committed."""
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def test_what_ci_calls_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    called = set(re.search(r"for target in ([a-z -]+);", (ROOT / ".ci/run").read_text()).group(1).split())
    assert {"lint", "test", "aot", "demo"} <= called <= targets


def test_the_folder_of_kernels_is_no_package():
    # A package called `kernels` would shadow the one that diffusers and transformers look for.
    assert not (ROOT / "kernels/__init__.py").exists()
    assert (ROOT / "kernels/canvas_kernels/__init__.py").exists()


@pytest.mark.parametrize("package", ["canvas_engineering", "canvas_kernels"])
def test_type_checkers_believe_the_packages(package):
    assert (importlib.resources.files(package) / "py.typed").is_file()


def test_modules_are_short():
    lengths = {path: len(path.read_text().splitlines()) for path in modules_of(*PACKAGES)}
    long = {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n > MAX_LINES}
    assert not long, f"over {MAX_LINES} lines: {long}"
    assert len(lengths) > 10


# -- imports ----------------------------------------------------------------------------------------------------------


def imports_of(path: Path, source: str | None = None) -> list[tuple[int, str]]:
    """(line, dotted name) of every import in a file, inside functions too; relative ones made absolute.

    ``from a.b import c`` gives a.b.c, so that a submodule is told from its package.
    """
    base = ROOT / "kernels" if path.is_relative_to(ROOT / "kernels") else ROOT
    package = path.relative_to(base).parent.parts
    found = []
    for node in ast.walk(ast.parse(path.read_text() if source is None else source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package[: len(package) - node.level + 1] if node.level else ()
            parts = (*parts, *(node.module.split(".") if node.module else ()))
            found += [(node.lineno, ".".join((*parts, alias.name))) for alias in node.names]
    return found


def misdirected(path: Path, source: str | None = None) -> list[str]:
    """Imports of a file of canvas_engineering that do not go down the list of layers."""
    own = path.relative_to(ROOT / "canvas_engineering").with_suffix("").parts[0]
    wrong = []
    for line, name in imports_of(path, source):
        top, *rest = name.split(".")
        if top == "canvas_kernels":
            if own != "attention" and not ".".join(rest).startswith(KERNEL_PARTS.get(own, ())):
                wrong.append(f"{own}:{line} imports {name}; only attention executes, others take {KERNEL_PARTS}")
        elif top == "canvas_engineering" and own != "__init__":
            if not rest or rest[0] not in LAYER_OF:
                if LAYER_OF[own] < LAYER_OF["draw"]:
                    wrong.append(f"{own}:{line} imports {name} from the package's root, which holds every layer")
            elif LAYER_OF[rest[0]] > LAYER_OF[own]:
                wrong.append(f"{own}:{line} imports {name}, which is further down the list")
        elif top in ("benchmarks", "examples", "tests"):
            wrong.append(f"{own}:{line} imports {name}")
    return wrong


def test_every_module_has_a_layer():
    package = ROOT / "canvas_engineering"
    names = {path.relative_to(package).with_suffix("").parts[0] for path in modules_of("canvas_engineering")}
    assert names - {"__init__"} <= set(LAYER_OF)


def test_imports_never_run_up_the_layers():
    wrong = [fault for path in modules_of("canvas_engineering") for fault in misdirected(path)]
    assert not wrong, "\n".join(wrong)


def test_kernels_know_nothing_of_canvases():
    outward = ("canvas_engineering", "benchmarks", "examples", "tests")
    wrong = [
        f"{path.name}:{line} imports {name}"
        for path in modules_of("kernels")
        for line, name in imports_of(path)
        if name.split(".")[0] in outward
    ]
    assert not wrong, "\n".join(wrong)


def test_backends_of_the_kernels_know_nothing_of_each_other():
    barred = {
        "torch_ops": ("canvas_kernels.triton_ops", "triton"),
        "triton_ops": "canvas_kernels.torch_ops",
        "canvas_kernels": "triton",
    }
    wrong = [
        f"{path.parent.name}/{path.name}:{line} imports {name}"
        for path in modules_of("kernels")
        for line, name in imports_of(path)
        if name.startswith(barred[path.parent.name])
    ]
    assert not wrong, "\n".join(wrong)
    assert {path.parent.name for path in modules_of("kernels")} == set(barred)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("canvas.py", "from canvas_engineering.plan import compile_attention"),
        ("canvas.py", "def f():\n    from .dispatch import AttentionDispatcher"),
        ("plan/ordering.py", "from ..attention import canvas_attention"),
        ("plan/ordering.py", "import canvas_engineering"),
        ("plan/ordering.py", "from canvas_kernels.ops import attend"),
        ("dispatch.py", "def f():\n    import canvas_kernels"),
        ("dispatch.py", "from canvas_engineering import CanvasLayout"),
        ("graft.py", "from examples.plain_attention import PerEdgeLoop"),
    ],
)
def test_a_misdirected_import_is_seen(module, source):
    assert len(misdirected(ROOT / "canvas_engineering" / module, source)) == 1


def module_graph(paths: list[Path]) -> dict[str, set[str]]:
    """Modules and what they import when they are imported: imports inside of functions do not count."""
    graph = {module_name(path): set() for path in paths}
    for path in paths:
        imports = [node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        for _, name in imports_of(path, ast.unparse(ast.Module(imports, []))):
            target = name if name in graph else name.rpartition(".")[0]
            if target in graph and target != module_name(path):
                graph[module_name(path)].add(target)
    return graph


def test_the_house_has_no_circle():
    graph = module_graph(modules_of(*PACKAGES))
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(graph) > 100
    graph["canvas_kernels.block_table"].add("canvas_engineering.dispatch")
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("package", ["attention", "canvas", "data", "parallel", "plan", "program"])
def test_packages_only_export(package):
    body = ast.parse((ROOT / "canvas_engineering" / package / "__init__.py").read_text()).body
    assert all(isinstance(node, (ast.Expr, ast.Import, ast.ImportFrom, ast.Assign)) for node in body)


def test_imports_down_the_layers_are_allowed():
    source = "from canvas_kernels.block_table import BlockTable\nfrom ..masks import MaskSpec\nfrom .tables import x"
    assert misdirected(ROOT / "canvas_engineering/plan/tables.py", source) == []


TORCH_ONLY = """
import sys

class Blocker:
    names = set(sys.argv[1].split(","))
    finders = list(sys.meta_path)

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            return None
        specs = (finder.find_spec(name, path, target) for finder in self.finders)
        return next((spec for spec in specs if spec is not None), None)

sys.meta_path[:] = [Blocker()]
import importlib
import pkgutil

import torch

import canvas_engineering

for module in pkgutil.walk_packages(canvas_engineering.__path__, "canvas_engineering."):
    importlib.import_module(module.name)
loaded = Blocker.names & {name.split(".")[0] for name in sys.modules}
assert not loaded, loaded

layout = canvas_engineering.CanvasLayout(T=2, d_model=8, spatial_shape=(2, 2), regions={"a": (0, 2, 0, 2, 0, 2)})
dispatcher = canvas_engineering.AttentionDispatcher(
    canvas_engineering.CanvasTopology.causal_temporal(["a"]), layout, d_model=8, n_heads=2
)
out = dispatcher(torch.randn(1, 8, 8, requires_grad=True))
out.sum().backward()
assert torch.isfinite(dispatcher.fn_modules["cross_attention"].q_proj.weight.grad).all()
print("trained without", sorted(Blocker.names))
"""

OPTIONAL = (
    "triton,diffusers,transformers,accelerate,safetensors,pydantic,typer,rich,matplotlib,gymnasium,pygame,pytest,hypothesis"
)


def fresh_process(code: str, *arguments: str) -> subprocess.CompletedProcess:
    path = f"{ROOT}:{ROOT / 'kernels'}"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": str(Path.home())},
        capture_output=True,
        text=True,
        check=False,
    )


def test_torch_is_all_that_importing_and_training_need():
    done = fresh_process(TORCH_ONLY, OPTIONAL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("trained without")


def test_the_blocker_blocks():
    done = fresh_process(TORCH_ONLY, "einops,torch")
    assert done.returncode != 0
    assert "No module named 'torch'" in done.stderr


# -- names ------------------------------------------------------------------------------------------------------------


def public_names() -> dict[str, list[str]]:
    """``__all__`` of every module that has one, sorted."""
    found = {}
    for path in modules_of(*PACKAGES):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and any(getattr(t, "id", None) == "__all__" for t in node.targets):
                found[module_name(path)] = sorted(ast.literal_eval(node.value))
    return dict(sorted(found.items()))


def module_name(path: Path) -> str:
    base = ROOT / "kernels" if path.is_relative_to(ROOT / "kernels") else ROOT
    parts = path.relative_to(base).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_public_names_are_frozen():
    # After a deliberate change: python -m tests.house.test_house, and say it in the commit.
    assert public_names() == PUBLIC_NAMES


def test_public_names_exist():
    for module, names in PUBLIC_NAMES.items():
        missing = [name for name in names if not hasattr(importlib.import_module(module), name)]
        assert not missing, f"{module}.__all__ names {missing}, which it does not have"


# -- kernels ----------------------------------------------------------------------------------------------------------


def jit_functions(tree: ast.AST) -> list[ast.FunctionDef]:
    """Functions decorated with triton.jit, bare or called."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return [f for f in functions if any(re.match(r"(triton\.)?jit\b", ast.unparse(d)) for d in f.decorator_list)]


def kernel_faults(tree: ast.AST) -> list[str]:
    """What a tree's jit functions do against the conventions: UPPER iff constexpr; pointers end in _ptr, those to a
    program's own head or segment in _base."""
    faults = []
    for function in jit_functions(tree):
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        for argument in arguments:
            constexpr = argument.annotation is not None and "constexpr" in ast.unparse(argument.annotation)
            if constexpr != argument.arg.isupper():
                faults.append(f"{function.name}: {argument.arg} is {'' if constexpr else 'not '}constexpr")
        for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
            if re.fullmatch(r"tl\.(load|store|atomic_\w+)", ast.unparse(call.func)) and call.args:
                pointer = call.args[0]
                while isinstance(pointer, ast.BinOp):
                    pointer = pointer.left
                if isinstance(pointer, ast.Name) and not re.search(r"_(ptrs?|base)$", pointer.id):
                    faults.append(f"{function.name}:{call.lineno} uses {pointer.id} as a pointer")
    return faults


def test_kernels_keep_their_conventions():
    trees = {path.name: ast.parse(path.read_text()) for path in modules_of("kernels")}
    faults = [f"{name}: {fault}" for name, tree in trees.items() for fault in kernel_faults(tree)]
    assert not faults, "\n".join(faults)
    assert sum(len(jit_functions(tree)) for tree in trees.values()) >= 3


def test_no_kernel_uses_what_the_house_avoids():
    for path in modules_of("kernels"):
        text = path.read_text()
        assert "make_block_ptr" not in text and "triton.autotune" not in text, path.name


@pytest.mark.parametrize(
    "source",
    [
        "@triton.jit\ndef f(q_ptr, block: tl.constexpr):\n    tl.load(q_ptr + 1)",
        "@triton.jit\ndef f(q_ptr, BLOCK):\n    tl.load(q_ptr)",
        "@triton.jit(noinline=True)\ndef f(q, n):\n    tl.load(q + n * 2)",
        "@jit\ndef f(q_ptr, n):\n    rows = q_ptr + n\n    tl.store(rows, n)",
    ],
)
def test_a_broken_kernel_convention_is_seen(source):
    assert len(kernel_faults(ast.parse(source))) == 1


# -- examples and tests -----------------------------------------------------------------------------------------------


def importable_modules() -> list[str]:
    return [module_name(path) for path in modules_of(*PACKAGES)]


@pytest.mark.parametrize("name", importable_modules())
def test_documented_examples_run(name):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as cause:
        if cause.name != "triton":
            raise
        pytest.skip("triton is not installed")
    if ">>> from diffusers" in inspect.getsource(module):
        pytest.importorskip("diffusers", reason="examples of this module graft onto diffusers' models")
    failures = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert failures.failed == 0


def test_every_public_function_and_class_has_an_example():
    """They run beside, module by module."""
    public = (getattr(canvas_engineering, name) for name in PUBLIC_NAMES["canvas_engineering"])
    documented = [item for item in public if callable(item)]
    assert len(documented) > 90
    without = [item.__name__ for item in documented if ">>>" not in (inspect.getdoc(item) or "")]
    assert not without, f"these have no example in their docstrings: {without}"


def test_every_public_name_has_a_page():
    pages = "".join(path.read_text() for path in (ROOT / "docs/api").glob("*.md"))
    named = re.findall(r"^::: canvas_engineering\.(\w+)$", pages, re.MULTILINE)
    assert sorted(named) == sorted(PUBLIC_NAMES["canvas_engineering"])


PAGES = {"README.md": False, "docs/howto.md": False, "docs/models.md": False, "docs/tutorial.md": True}
"""Pages whose code runs: whether a block goes on from the one before."""


@pytest.mark.filterwarnings("ignore:attention computes .* of all token pairs")  # a graft says so, rightly
@pytest.mark.parametrize("page", PAGES)
def test_code_on_pages_runs_and_prints_what_they_say(page, tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks:
        if "diffusers" in block and importlib.util.find_spec("diffusers") is None:
            continue  # an extra, which its example needs
        names = names if PAGES[page] and names else {"__name__": "__main__"}
        exec(compile(block, page, "exec"), names)
        printed, said = capsys.readouterr().out.splitlines(), re.findall(r"^#> (.*)$", block, re.MULTILINE)
        assert printed == said or not said


def test_links_between_files_lead_somewhere():
    """Those outside of the site, whose build follows its own."""
    pages = [*ROOT.glob("*.md"), *ROOT.glob(".github/**/*.md"), *ROOT.glob("*/README.md"), ROOT / "benchmarks/LOG.md"]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())]
    near = [(page, link) for page, link in links if "://" not in link and not link.startswith("mailto:")]
    assert len(near) > 10
    generated = ("docs/gallery.md", "docs/gallery/")  # `make gallery` draws them
    broken = [
        f"{page.name}: {link}"
        for page, link in near
        if not (page.parent / link).exists() and not link.startswith(generated)
    ]
    assert not broken, broken


CHECKS = re.compile(r"(^|[._])(raises|warns|assert\w*|check\w*|expect\w*|deprecated_call|opcheck)$")


def checks_something(function: ast.FunctionDef, helpers: dict[str, ast.FunctionDef]) -> bool:
    """Whether a test can fail on its own account: it asserts, or calls what does, its file's helpers included."""
    calls = [ast.unparse(node.func) for node in ast.walk(function) if isinstance(node, ast.Call)]
    others = {name: helper for name, helper in helpers.items() if helper is not function}
    return (
        any(isinstance(node, ast.Assert) for node in ast.walk(function))
        or any(CHECKS.search(call) for call in calls)
        or any(call in others and checks_something(others[call], others) for call in calls)
    )


def idle_tests(tree: ast.Module) -> list[str]:
    """Names of a file's tests that check nothing."""
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    tests = [node for name, node in functions.items() if name.startswith("test_")]
    return [test.name for test in tests if not checks_something(test, functions)]


def test_every_test_can_fail():
    files = {path.name: ast.parse(path.read_text()) for path in (ROOT / "tests").rglob("test_*.py")}
    idle = [f"{name}::{test}" for name, tree in files.items() for test in idle_tests(tree)]
    assert not idle, f"these tests check nothing: {idle}"
    assert len(files) > 5


def test_an_idle_test_is_seen():
    source = """
def helper(): torch.testing.assert_close(1, 1)
def test_helped(): helper()
def test_raises():
    with pytest.raises(ValueError, match="x"): run()
def test_idle(): run()
"""
    assert idle_tests(ast.parse(source)) == ["test_idle"]


if __name__ == "__main__":
    lines = (f" {json.dumps(module)}: {json.dumps(names)}" for module, names in public_names().items())
    Path(__file__).with_name("public_names.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
