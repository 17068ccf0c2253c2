"""Exported regions: files that are whole, checked and frozen."""

from __future__ import annotations

import builtins
import hashlib
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from canvas_engineering import (
    AttentionDispatcher,
    CanvasLayout,
    CanvasProgram,
    CanvasSchema,
    CanvasTopology,
    Connection,
    IdentitySpec,
    RegionProgram,
)
from canvas_engineering import compiler as compiler_module
from canvas_engineering.compiler import ProgramCompiler, load_exported
from tests.run.test_compiler import LAYOUT, Model, names_of, program, trainable


def test_exports_are_written_whole_checked_and_frozen(tmp_path):
    pytest.importorskip("safetensors")
    model = Model()
    everything, state = trainable(model), {name: value.clone() for name, value in model.state_dict().items()}
    compiled = ProgramCompiler(program(m="export", e="export")).compile(model, tmp_path / "out")
    assert set(compiled.exported_paths) == {"memory[0]", "eye.left"} == compiled.exported_memories
    assert everything - trainable(model) == names_of("memory_0_") | names_of("eye__left")
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    manifest = json.loads((tmp_path / "out/eye.left.json").read_text())
    other = json.loads((tmp_path / "out/memory[0].json").read_text())
    assert files == ["eye.left.json", manifest["file"], "memory[0].json", other["file"]]
    for region, key in (("memory[0]", "memory_0_"), ("eye.left", "eye__left")):
        loaded = load_exported(compiled.exported_paths[region])
        path = f"heads.{key}."
        wanted = {name.removeprefix(path): value for name, value in state.items() if name.startswith(path)}
        # buffers too: a batch norm is nothing without its statistics
        assert set(loaded) == set(wanted) and len(wanted) == 7
        assert all(
            torch.equal(loaded[name], value) and loaded[name].dtype == value.dtype for name, value in wanted.items()
        )
        fresh = Model()
        torch.nn.init.zeros_(fresh.heads[key][0].weight)
        fresh.heads[key].load_state_dict(loaded)
        assert torch.equal(fresh.heads[key][0].weight, model.heads[key][0].weight)
    assert manifest["region"] == "eye.left" and manifest["program_version"] == "2.0.0"
    content = (tmp_path / "out" / manifest["file"]).read_bytes()
    assert manifest["sha256"] == hashlib.sha256(content).hexdigest()
    assert manifest["file"] == f"eye.left@{manifest['sha256'][:16]}.safetensors"
    assert manifest["tensors"]["heads.eye__left.0.weight"] == {"dtype": "float32", "shape": [4, 8]}


def test_a_damaged_export_is_not_loaded(tmp_path):
    pytest.importorskip("safetensors")
    compiled = ProgramCompiler(program(m="export")).compile(Model(), tmp_path)
    path, manifest_path = Path(compiled.exported_paths["memory[0]"]), tmp_path / "memory[0].json"
    whole, manifest = path.read_bytes(), json.loads(manifest_path.read_text())
    content = bytearray(whole)
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"memory\[0\]@\w{16}.safetensors has the checksum \w{64}, its manifest says"):
        load_exported(path)
    # one bit is as much a change as nonsense that the manifest vouches for
    path.write_bytes(b"nonsense")
    checksum = hashlib.sha256(b"nonsense").hexdigest()
    manifest_path.write_text(json.dumps({**manifest, "sha256": checksum}))
    with pytest.raises(ValueError, match="holds no tensors"):
        load_exported(path)
    path.write_bytes(whole)
    lacking = dict(list(manifest["tensors"].items())[1:])
    for wrong, message in (
        ({**manifest, "tensors": lacking}, "holds .* its manifest says"),
        ({**manifest, "tensors": []}, r"no manifest of an exported region: wrong are \['tensors'\]"),
        ({**manifest, "region": 3}, r"wrong are \['region'\]"),
        ({**manifest, "file": "../elsewhere.safetensors"}, r"wrong are \['file'\]"),
        ({**manifest, "submodules": "heads"}, r"wrong are \['submodules'\]"),
        ([], r"wrong are \['region', 'file', 'sha256', 'tensors'\]"),
    ):
        manifest_path.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=message):
            load_exported(path)
    manifest_path.write_text("{")
    with pytest.raises(ValueError, match=r"memory\[0\].json is no manifest"):
        load_exported(path)
    manifest_path.unlink()
    with pytest.raises(FileNotFoundError):
        load_exported(path)


def test_exports_of_several_submodules_load_into_each(tmp_path):
    pytest.importorskip("safetensors")

    def model():
        layers = {"enc": nn.ModuleDict({"memory_0_": nn.Linear(2, 2)}), "memory": nn.ModuleList([nn.Linear(3, 3)])}
        tokens = nn.ParameterDict({"memory_0_": torch.randn(2), "act": torch.ones(1)})
        return nn.ModuleDict({**layers, "tokens": tokens})

    source, target = model(), model()
    path = ProgramCompiler(program(m="export")).compile(source, tmp_path).exported_paths["memory[0]"]
    names = {"enc.memory_0_.weight", "enc.memory_0_.bias", "memory.0.weight", "memory.0.bias", "tokens.memory_0_"}
    assert load_exported(path).keys() == load_exported(path, "").keys() == names
    target.load_state_dict(load_exported(path), strict=False)
    assert all(torch.equal(target.state_dict()[name], source.state_dict()[name]) for name in names)
    again = model()
    again["memory"][0].load_state_dict(load_exported(path, "memory.0"))
    again["enc"]["memory_0_"].load_state_dict(load_exported(path, "enc.memory_0_"))
    assert torch.equal(again["enc"]["memory_0_"].weight, source["enc"]["memory_0_"].weight)
    assert load_exported(path, "tokens").keys() == {"memory_0_"}
    with pytest.raises(KeyError, match=r"no tensors of region 'memory\[0\]' came from 'dec'; they came from \['enc"):
        load_exported(path, "dec")
    # an export that does not say where its tensors came from
    manifest_path = tmp_path / "memory[0].json"
    manifest = json.loads(manifest_path.read_text())
    del manifest["submodules"]
    manifest_path.write_text(json.dumps(manifest))
    assert load_exported(path).keys() == names


def test_a_slot_bank_goes_from_dispatcher_to_file_and_back(tmp_path):
    pytest.importorskip("safetensors")
    regions = {"memory[0]": RegionProgram(compile_mode="export", identity=IdentitySpec(slot_capacity=3))}
    topology = CanvasTopology([Connection("act", "memory[0]"), Connection("memory[0]", "act")])
    made = CanvasProgram(CanvasSchema(LAYOUT, topology), regions)
    first, second = (AttentionDispatcher(topology, LAYOUT, 8, program=made) for _ in range(2))
    path = ProgramCompiler(made).compile(first, tmp_path).exported_paths["memory[0]"]
    second.slot_modules["memory_0_"].load_state_dict(load_exported(path))
    assert torch.equal(second.slot_modules["memory_0_"].slots, first.slot_modules["memory_0_"].slots)
    assert not any(p.requires_grad for p in first.slot_modules.parameters())
    assert all(p.requires_grad for p in first.fn_modules.parameters())


@pytest.mark.parametrize("crash", ["before", "between", "cleaning"])
def test_a_crash_while_exporting_again_leaves_an_export_that_loads(tmp_path, monkeypatch, crash):
    pytest.importorskip("safetensors")
    compiler, old, new = ProgramCompiler(program(m="export")), Model(), Model()
    torch.nn.init.ones_(new.heads["memory_0_"][0].weight)
    first = compiler.compile(old, tmp_path).exported_paths["memory[0]"]
    real, calls = compiler_module.replace_file, []

    def crashing(path, content):
        calls.append(path)
        if len(calls) == (1 if crash == "before" else 2):
            raise KeyboardInterrupt
        real(path, content)

    def not_removed(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if crash == "cleaning":
            patch.setattr(Path, "unlink", not_removed)
        else:
            patch.setattr(compiler_module, "replace_file", crashing)
        with pytest.raises(KeyboardInterrupt):
            compiler.compile(new, tmp_path)
    # the manifest decides: old until it is renamed, new from then on, by whatever path
    present, name = new if crash == "cleaning" else old, "0.weight"
    for path in (first, tmp_path / "memory[0].json"):
        assert torch.equal(load_exported(path)[name], present.heads["memory_0_"][0].weight)
    last = compiler.compile(new, tmp_path).exported_paths["memory[0]"]
    assert torch.equal(load_exported(last)[name], new.heads["memory_0_"][0].weight)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memory[0].json", Path(last).name]
    # the same again is the same file
    assert compiler.compile(new, tmp_path).exported_paths["memory[0]"] == last and load_exported(last)


def test_names_of_any_kind_become_files(tmp_path):
    pytest.importorskip("safetensors")
    names = {"a/../b c": "a%2F..%2Fb%20c", "a": "a", "a@b": "a%40b"}
    layout = CanvasLayout(
        T=1, spatial_shape=(3,), d_model=8, regions={name: (0, 1, i, i + 1) for i, name in enumerate(names)}
    )
    made = CanvasProgram(CanvasSchema(layout), {name: RegionProgram(compile_mode="export") for name in names})
    for _ in range(2):
        with pytest.warns(UserWarning, match="belongs to these regions alone"):
            paths = ProgramCompiler(made).compile(nn.Linear(2, 2), tmp_path).exported_paths
        found = sorted(path.name for path in tmp_path.iterdir())
        assert found == sorted([f"{stem}.json" for stem in names.values()] + [Path(p).name for p in paths.values()])
        for name, stem in names.items():
            assert Path(paths[name]).name.startswith(f"{stem}@") and load_exported(paths[name]) == {}


def test_an_export_wants_a_place_and_safetensors(tmp_path, monkeypatch):
    model = Model()
    everything = trainable(model)
    with pytest.raises(ValueError, match=r"regions \['memory\[0\]'\] are to be exported: export_dir"):
        ProgramCompiler(program(m="export", e="freeze")).compile(model)
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("safetensors"):
            raise ImportError("No module named 'safetensors'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="safetensors"):
        ProgramCompiler(program(m="export", e="freeze")).compile(model, tmp_path)
    assert trainable(model) == everything
