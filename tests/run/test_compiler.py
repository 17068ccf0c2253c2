"""Deploy: modes by region and by family, what they do to a module, exports, and the smaller plan that is left."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from canvas_engineering import (
    ATTENTION_REGISTRY,
    ActionHead,
    AttentionDispatcher,
    CanvasLayout,
    CanvasProgram,
    CanvasSchema,
    CanvasTopology,
    Connection,
    ConnectionProgram,
    IdentitySpec,
    LearnedScheduler,
    LearningSpec,
    LoopedBlockWrapper,
    RegionProgram,
    RegionScheduler,
    SemanticConditioner,
    SlotBindingModule,
    SpatiotemporalCanvas,
    create_attention,
)
from canvas_engineering.canvas.tensor import parameter_key
from canvas_engineering.compiler import CompiledProgram, ProgramCompiler
from canvas_engineering.dispatch import surviving_state
from tests import program_oracle

NAMES = ("eye.left", "belief", "memory[0]", "goal", "act")
LAYOUT = CanvasLayout(
    T=2, spatial_shape=(10,), d_model=8, regions={n: (0, 2, 2 * i, 2 * i + 2) for i, n in enumerate(NAMES)}
)


def program(connections=(), programs=None, **modes):
    """A program whose regions, by the first letters of their names, have these compile modes."""
    regions = {
        name: RegionProgram(compile_mode=mode)
        for name in NAMES
        for start, mode in modes.items()
        if name.startswith(start)
    }
    topology = CanvasTopology([Connection(*c) if isinstance(c, tuple) else c for c in connections])
    return CanvasProgram(CanvasSchema(LAYOUT, topology), regions, programs or {})


class Model(nn.Module):
    """A module for each region, under its key, and one that belongs to none."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        keys = [name.replace(".", "__").replace("[", "_").replace("]", "_") for name in NAMES]
        self.heads = nn.ModuleDict({key: nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4)) for key in keys})
        self.shared = nn.Linear(8, 8)

    def forward(self, x):
        return torch.stack([head(self.shared(x)) for head in self.heads.values()])


def trainable(module):
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def names_of(key):
    return {f"heads.{key}.{part}" for part in ("0.weight", "0.bias", "1.weight", "1.bias")}


def test_modes_go_by_region_learning_and_family(tmp_path):
    chain = CanvasTopology([Connection(a, b) for a in NAMES for b in NAMES])
    regions = {
        "eye.left": RegionProgram("observation"),
        "belief": RegionProgram("state", learning=LearningSpec(compile_mode="distill")),
        "memory[0]": RegionProgram("memory"),
        "act": RegionProgram("action", learning=LearningSpec(compile_mode="freeze"), compile_mode="constant"),
    }
    compiler = ProgramCompiler(CanvasProgram(CanvasSchema(LAYOUT, chain), regions))
    with pytest.warns(UserWarning, match="'distill' does nothing yet: 'belief'"):
        found = compiler.compile()
    assert (found.frozen_regions, found.constant_regions, found.exported_memories) == (set(), {"act"}, set())
    assert found.distill_regions == {"belief"} and found.active_regions == set(NAMES) - {"act"}
    assert found.all_regions == set(NAMES) and found.n_eliminated == 1
    assert found.active_connections == [c for c in chain.connections if "act" not in (c.src, c.dst)]
    with pytest.warns(UserWarning, match="'distill' does nothing yet"):
        families = compiler.compile(export_dir=tmp_path, family_defaults=True)
    assert families.frozen_regions == {"eye.left"} and families.exported_memories == {"memory[0]"}
    assert families.active_regions == {"eye.left", "belief", "goal"} and families.n_eliminated == 2
    assert not families.exported_paths
    # the compiled schema is what is left, as published
    assert set(families.schema.layout.regions) == families.active_regions
    assert families.schema.topology.connections == families.active_connections
    assert families.schema.layout.num_positions == LAYOUT.num_positions
    assert families.summary().splitlines() == [
        "CompiledProgram: 3 of 5 regions and 9 of 25 connections active",
        "  frozen: eye.left", "  constant: act", "  exported: memory[0]",
        "  to be distilled, which does nothing yet: they run as before: belief",
        "  fewer keys, as regions left: belief, eye.left, goal",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "mode"),
    [("observation", "freeze"), ("state", "runtime"), ("memory", "export"), ("residual", "freeze"),
     ("action", "freeze"), ("mood", "runtime")],
)  # fmt: skip
def test_every_family_has_its_default(family, mode, tmp_path):
    made = CanvasProgram(CanvasSchema(LAYOUT), {"goal": RegionProgram(family)})
    found = ProgramCompiler(made).compile(export_dir=tmp_path, family_defaults=True)
    fates = {"freeze": found.frozen_regions, "export": found.exported_memories, "constant": found.constant_regions}
    assert {fate: names for fate, names in fates.items() if names} == ({} if mode == "runtime" else {mode: {"goal"}})
    assert ("goal" in found.active_regions) is (mode != "export")


def test_family_defaults_apply_where_they_are_asked_for_and_nothing_else_is_said(tmp_path):
    pytest.importorskip("safetensors")
    families = {"eye.left": "observation", "belief": "observation", "memory[0]": "memory", "goal": "memory"}
    regions = {name: RegionProgram(family) for name, family in families.items()}
    # "runtime" of an explicit recipe is as much a choice as any other
    regions["belief"] = RegionProgram("observation", learning=LearningSpec(compile_mode="runtime"))
    regions["goal"] = RegionProgram("memory", learning=LearningSpec())
    compiler = ProgramCompiler(CanvasProgram(CanvasSchema(LAYOUT), regions))
    model = Model()
    everything = trainable(model)
    compiled = compiler.compile(model)
    assert compiled.active_regions == set(NAMES) and trainable(model) == everything
    # memory without a place to go to stays, with a module and without
    with pytest.warns(UserWarning, match=r"'memory\[0\]' would be exported"):
        assert compiler.compile(family_defaults=True).active_regions == set(NAMES)
    with pytest.warns(UserWarning, match=r"'memory\[0\]' would be exported, .* without export_dir they are kept"):
        compiled = compiler.compile(model, family_defaults=True)
    assert compiled.active_regions == set(NAMES) and not compiled.exported_memories and not compiled.exported_paths
    assert everything - trainable(model) == names_of("eye__left")
    compiled = compiler.compile(model, tmp_path, family_defaults=True)
    assert compiled.exported_memories == {"memory[0]"} == compiled.exported_paths.keys()
    assert everything - trainable(model) == names_of("eye__left") | names_of("memory_0_")
    # what is to be exported by its own mode wants a place
    regions["memory[0]"] = RegionProgram("memory", compile_mode="export")
    with pytest.raises(ValueError, match="export_dir must say where to"):
        compiler.compile(Model(), family_defaults=True)


def test_freeze_stops_gradients_and_runtime_does_not():
    model = Model()
    everything = trainable(model)
    with pytest.warns(UserWarning, match="'distill' does nothing yet: 'goal'"):
        compiled = ProgramCompiler(program(e="freeze", b="runtime", g="distill")).compile(model)
    assert everything - trainable(model) == names_of("eye__left")
    assert compiled.active_regions == set(NAMES) and not compiled.constant_buffers


def test_constants_are_buffers_of_the_same_name_and_value():
    model, x = Model().eval(), torch.randn(3, 8)
    before, expected = dict(model.state_dict()), model(x)
    before = {name: value.clone() for name, value in before.items()}
    compiled = ProgramCompiler(program(m="constant")).compile(model)
    assert set(compiled.constant_buffers) == names_of("memory_0_")
    buffers = dict(model.named_buffers())
    for name, constant in compiled.constant_buffers.items():
        assert constant is buffers[name] and torch.equal(constant, before[name]) and not constant.requires_grad
        assert not isinstance(constant, nn.Parameter)
    assert torch.equal(model(x), expected) and list(model.state_dict()) != [] and set(model.state_dict()) == set(before)
    model(x).sum().backward()
    assert not names_of("memory_0_") & {name for name, _ in model.named_parameters()}
    Model().load_state_dict(model.state_dict())


def test_shared_constants_stay_shared_and_dictionaries_of_parameters_work():
    model = Model()
    model.twin = nn.Linear(8, 4)
    model.twin.weight = model.heads["goal"][0].weight
    compiled = ProgramCompiler(program(g="constant")).compile(model)
    assert model.twin.weight is model.heads["goal"][0].weight is compiled.constant_buffers["twin.weight"]
    canvas = SpatiotemporalCanvas(LAYOUT)
    value = canvas.modality_embeddings["goal"].detach().clone()
    with pytest.warns(UserWarning, match="are left as they are: period_embedding.embedding.weight"):
        found = ProgramCompiler(program(g="constant")).compile(canvas).constant_buffers
    assert list(found) == ["modality_embeddings.goal"] and torch.equal(canvas.modality_embeddings["goal"], value)
    placed = canvas.place(canvas.create_empty(1), torch.zeros(1, 4, 8), "goal")
    torch.testing.assert_close(canvas.extract(placed, "goal")[0, 0], value + canvas.period_embedding(1))


def test_modules_may_list_their_parameters():
    class Listing(Model):
        def region_parameters(self, region):
            return {"goal": [self.shared.weight], "act": ["shared.bias"]}.get(region)

    model = Listing()
    everything = trainable(model)
    ProgramCompiler(program(g="freeze", a="freeze")).compile(model)
    assert everything - trainable(model) == names_of("goal") | names_of("act") | {"shared.weight", "shared.bias"}

    class Wrong(Model):
        def region_parameters(self, region):
            return ["nothing.weight"]

    with pytest.raises(ValueError, match=r"region_parameters\('eye.left'\) lists \['nothing.weight'\]"):
        ProgramCompiler(program(g="freeze")).compile(Wrong())


def test_a_tensor_of_several_regions_is_named_and_left_alone():
    class Torn(Model):
        def region_parameters(self, region):
            return [self.shared.weight] if region in ("goal", "act") else []

    model = Torn()
    everything = trainable(model)
    compiler = ProgramCompiler(program(g="freeze", a="constant", e="freeze"))
    with pytest.warns(UserWarning, match=r"left as they are: shared.weight \(act, goal\)"):
        compiled = compiler.compile(model)
    assert everything - trainable(model) == names_of("goal") | names_of("eye__left") | names_of("act")
    assert compiled.shared_tensors == {"shared.weight": ("act", "goal")} and not compiled.untouched_regions
    assert "shared with other regions, and left as they are: shared.weight (act, goal)" in compiled.summary()
    # a tensor under the names of two regions is shared too; of one region and of none, it is the region's
    tied = Model()
    tied.heads["act"][0].weight = tied.heads["goal"][0].weight
    tied.twin = nn.Linear(8, 4)
    tied.twin.bias = tied.heads["goal"][0].bias
    with pytest.warns(UserWarning, match=r"heads.goal.0.weight \(act, goal\), heads.act.0.weight \(act, goal\)"):
        ProgramCompiler(program(g="freeze")).compile(tied)
    assert tied.heads["goal"][0].weight.requires_grad and not tied.twin.bias.requires_grad
    # whatever their modes
    with pytest.warns(UserWarning, match=r"left as they are: heads.goal.0.weight \(act, goal\)"):
        ProgramCompiler(program(g="freeze", a="freeze")).compile(tied)
    assert tied.heads["goal"][0].weight.requires_grad


NESTED = CanvasLayout(
    T=1, spatial_shape=(8,), d_model=8,
    regions={name: (0, 1, i, i + 1) for i, name in enumerate(
        ("arm", "arm.joints", "joints", "weight", "vehicles[3]", "vehicles[3].plan", "gated", "arm.joints.left"))},
)  # fmt: skip


def frozen_by(module, region):
    """Which parameters stop training where one region of NESTED is to freeze."""
    made = CanvasProgram(CanvasSchema(NESTED), {region: RegionProgram(compile_mode="freeze")})
    before = trainable(module)
    compiled = ProgramCompiler(made).compile(module)
    assert not compiled.untouched_regions and f"frozen: {region}" in compiled.summary()
    return before - trainable(module)


def linear():
    return nn.Linear(2, 2, bias=False)


def test_names_of_modules_that_mirror_types_are_told_apart():
    def mirrored():
        joints = nn.ModuleDict({"left": linear(), "other": linear()})
        arm = nn.ModuleDict({"joints": joints, "gripper": linear()})
        return nn.ModuleDict({"arm": arm, "joints": linear()})

    # a region inside another has its own, the outer one the rest
    assert frozen_by(mirrored(), "arm") == {"arm.gripper.weight"}
    assert frozen_by(mirrored(), "arm.joints") == {"arm.joints.other.weight"}
    assert frozen_by(mirrored(), "arm.joints.left") == {"arm.joints.left.weight"}
    assert frozen_by(mirrored(), "joints") == {"joints.weight"}
    # one component, several, or some of each; list elements by number; inside other modules
    keys = {"arm__joints": linear(), "arm": linear(), "arm__joints__left": linear()}
    model = nn.ModuleDict({"net": nn.ModuleDict(keys), "arm__joints": nn.ModuleDict({"left": linear()})})
    assert frozen_by(model, "arm.joints.left") == {"net.arm__joints__left.weight", "arm__joints.left.weight"}
    assert frozen_by(model, "arm.joints") == {"net.arm__joints.weight"}
    assert frozen_by(model, "arm") == {"net.arm.weight"}
    elements = nn.ModuleList(nn.ModuleDict({"plan": linear(), "x": linear()}) for _ in range(4))
    model = nn.ModuleDict({"vehicles": elements, "vehicles_3_": nn.ModuleDict({"plan": linear()})})
    assert frozen_by(model, "vehicles[3].plan") == {"vehicles.3.plan.weight", "vehicles_3_.plan.weight"}
    assert frozen_by(model, "vehicles[3]") == {"vehicles.3.x.weight"}


def test_names_of_tensors_within_layers_are_no_regions():
    model = nn.ModuleDict({"weight": nn.Linear(2, 2), "other": nn.Linear(2, 2)})
    assert frozen_by(model, "weight") == {"weight.weight", "weight.bias"}
    layout = CanvasLayout(T=1, spatial_shape=(2,), d_model=8, regions={"gated": (0, 1, 0, 1), "slots": (0, 1, 1, 2)})
    topology = CanvasTopology([Connection("gated", "slots", fn="gated"), Connection("slots", "gated")])
    regions = {name: RegionProgram(compile_mode="freeze") for name in ("gated", "slots")}
    regions["gated"] = dataclasses.replace(regions["gated"], identity=IdentitySpec(slot_capacity=2))
    made = CanvasProgram(CanvasSchema(layout, topology), regions)
    dispatcher = AttentionDispatcher(topology, layout, 8, program=made)
    everything = trainable(dispatcher)
    with pytest.warns(UserWarning, match=r"change none of its tensors: 'slots' \(freeze\)"):
        compiled = ProgramCompiler(made).compile(dispatcher)
    bank = {name for name in everything if name.startswith("slot_modules.gated.")}
    assert everything - trainable(dispatcher) == bank and len(bank) > 4
    assert compiled.untouched_regions == {"slots"}


def test_where_nothing_belongs_to_a_region_nothing_is_called_frozen():
    topology = CanvasTopology.dense(list(NAMES))
    made = program([(c.src, c.dst) for c in topology.connections], e="freeze", a="freeze", g="constant")
    made.connections[("act", "goal")] = ConnectionProgram(write_mode="gate")
    dispatcher = AttentionDispatcher(made.schema.topology, LAYOUT, 8, program=made)
    everything = trainable(dispatcher)
    with pytest.warns(UserWarning, match=r"none of its tensors: 'eye.left' \(freeze\), 'goal' \(constant\)"):
        compiled = ProgramCompiler(made).compile(dispatcher)
    assert everything - trainable(dispatcher) == {"edge_gates"} and not compiled.constant_buffers
    lines = compiled.summary().splitlines()
    assert "  frozen: act" in lines
    assert "  nothing in the module belongs to them alone: eye.left (freeze), goal (constant)" in lines


def test_gates_and_embedding_rows_freeze_where_no_other_region_shares_them():
    def compiled_dispatcher(pairs, **modes):
        connections = [Connection(src, dst, write_mode="gate") for src, dst in pairs]
        made = program(connections, **modes)
        module = AttentionDispatcher(made.schema.topology, LAYOUT, 8, program=made)
        return module, ProgramCompiler(made).compile(module)

    with pytest.warns(UserWarning) as caught:
        module, compiled = compiled_dispatcher((("act", "goal"), ("goal", "act")), a="freeze", g="freeze")
    assert any("edge_gates (act, goal)" in str(warning.message) for warning in caught)
    assert module.edge_gates.requires_grad and compiled.untouched_regions == {"act", "goal"}
    own = (("act", "goal"), ("act", "belief"))
    module, compiled = compiled_dispatcher(own, a="freeze")
    assert not module.edge_gates.requires_grad and not compiled.shared_tensors
    module, compiled = compiled_dispatcher(own, a="constant")
    (constant,) = compiled.constant_buffers.items()
    assert constant[0] == "edge_gates" and constant[1] is module.edge_gates
    module(torch.randn(1, LAYOUT.num_positions, 8)).sum().backward()

    def conditioned(**modes):
        made = program(**modes)
        conditioner = SemanticConditioner(8, 3, {name: [1.0, 2.0, 3.0] for name in NAMES}, freeze_embeddings=False)
        module = SpatiotemporalCanvas(LAYOUT, conditioner, made)
        everything = trainable(module)
        compiled = ProgramCompiler(made).compile(module)
        return everything - trainable(module), compiled

    with pytest.warns(UserWarning) as caught:
        frozen, compiled = conditioned(e="freeze")
    shared = {"period_embedding.embedding.weight", "semantic_conditioner.residuals", "semantic_conditioner._embeddings",
              *(f"family_carrier_embedding.{table}_embedding.weight" for table in ("family", "carrier"))}  # fmt: skip
    assert not frozen and compiled.shared_tensors.keys() == shared and compiled.untouched_regions == {"eye.left"}
    assert any("semantic_conditioner.residuals" in str(warning.message) for warning in caught)
    assert all(regions == tuple(sorted(NAMES)) for regions in compiled.shared_tensors.values())
    with pytest.warns(UserWarning) as caught:
        frozen, compiled = conditioned(**{name[0]: "freeze" for name in NAMES})
    assert len(caught) == 2
    assert not frozen and compiled.shared_tensors.keys() == shared
    # regions that the conditioner knows and the program does not are others too
    conditioner = SemanticConditioner(8, 1, {**{name: [1.0] for name in NAMES}, "elsewhere": [2.0]})
    with pytest.warns(UserWarning) as caught:
        compiled = ProgramCompiler(program(**{name[0]: "freeze" for name in NAMES})).compile(conditioner)
    assert "elsewhere" in compiled.shared_tensors["residuals"] and conditioner.residuals.requires_grad
    assert len(caught) == 2


def test_compiled_modules_are_treated_as_what_they_wrap():
    connections = [Connection("act", "goal", write_mode="gate"), Connection("goal", "act")]
    made = program(connections, a="freeze")
    module = nn.ModuleDict({"attention": AttentionDispatcher(made.schema.topology, LAYOUT, 8, program=made)})
    ProgramCompiler(made).compile(torch.compile(module["attention"]))
    assert not module["attention"].edge_gates.requires_grad


def test_unknown_modes_are_refused():
    with pytest.raises(
        ValueError, match="program of region 'goal': unknown compile_mode 'melt': choose one of constant"
    ):
        ProgramCompiler(program(g="melt"))


def test_what_is_left_is_a_smaller_plan_with_the_same_outputs():
    connections = [
        ("eye.left", "eye.left"), ("belief", "eye.left"), ("belief", "belief"), ("act", "belief"),
        ("memory[0]", "belief"), ("memory[0]", "memory[0]"), ("goal", "memory[0]"), ("goal", "goal"),
    ]  # fmt: skip
    programs = {("act", "belief"): ConnectionProgram(write_mode="gate"), ("goal", "goal"): ConnectionProgram("write")}
    whole = program(connections, programs, m="export", g="constant", e="freeze")
    compiled = ProgramCompiler(whole).compile()
    left = compiled.program
    assert isinstance(compiled, CompiledProgram) and list(left.schema.layout.regions) == ["eye.left", "belief", "act"]
    assert left.schema.topology.connections == compiled.active_connections and len(compiled.active_connections) == 4
    assert list(left.connections) == [("act", "belief")] and list(left.regions) == ["eye.left"]
    assert CanvasProgram.from_dict(left.to_dict()) == left
    torch.manual_seed(0)
    full = AttentionDispatcher(whole.schema.topology, LAYOUT, 8, program=whole)
    small = AttentionDispatcher(left.schema.topology, left.schema.layout, 8, program=left)
    small.load_state_dict(full.state_dict())
    assert len(small.plan.table.weight) < len(full.plan.table.weight) and small.plan.table.pairs < full.plan.table.pairs
    assert small.plan.n_packed < full.plan.n_packed
    x = torch.randn(2, LAYOUT.num_positions, 8)
    surviving = torch.cat([LAYOUT.region_index(name) for name in compiled.active_regions])
    torch.testing.assert_close(small(x)[:, surviving], full(x)[:, surviving], rtol=1e-5, atol=1e-6)
    expected, _ = program_oracle.step(
        small.double(),
        x.double(),
        4,
        left.schema.layout,
        left.schema.topology,
        left,
        active_regions=compiled.active_regions,
    )
    torch.testing.assert_close(small(x.double()), expected, rtol=1e-6, atol=1e-6)


def test_constant_regions_can_stay_readable():
    connections = [
        Connection("act", "goal", write_mode="gate"), Connection("act", "memory[0]"), Connection("act", "belief"),
        Connection("goal", "goal"), Connection("goal", "act", write_mode="gate"), Connection("belief", "goal"),
        Connection("goal", "memory[0]"),
    ]  # fmt: skip
    whole = program(connections, g="constant", m="export")
    whole.regions["goal"] = dataclasses.replace(whole.regions["goal"], identity=IdentitySpec(slot_capacity=3))
    compiler = ProgramCompiler(whole)
    without = compiler.compile()
    assert without.active_regions == {"eye.left", "belief", "act"} == set(without.schema.layout.regions)
    assert without.active_connections == connections[2:3] and without.summary().splitlines()[1:] == [
        "  constant: goal", "  exported: memory[0]", "  fewer keys, as regions left: act, belief",
    ]  # fmt: skip
    kept = compiler.compile(keep_constant=True)
    assert kept.active_regions == {"eye.left", "belief", "act", "goal"} == set(kept.schema.layout.regions)
    # who reads it still does; what it reads itself is over
    assert kept.active_connections == [connections[0], connections[2], connections[5]]
    assert kept.constant_regions == {"goal"} and kept.n_eliminated == 1 and kept.gates == (True, False)
    assert kept.summary().splitlines()[1:] == [
        "  constant, and still keys: goal", "  exported: memory[0]", "  fewer keys, as regions left: act",
    ]  # fmt: skip
    torch.manual_seed(0)
    full = AttentionDispatcher(whole.schema.topology, LAYOUT, 8, program=whole)
    torch.nn.init.normal_(full.edge_gates)
    small = AttentionDispatcher(kept.schema.topology, kept.schema.layout, 8, program=kept.program)
    small.load_state_dict(surviving_state(small, full.state_dict(), kept))
    x = torch.randn(2, LAYOUT.num_positions, 8)
    belief, goal = (LAYOUT.region_index(name) for name in ("belief", "goal"))
    # belief reads goal through its slots, as in the whole program
    torch.testing.assert_close(small(x)[:, belief], full(x)[:, belief])
    assert not torch.equal(small(x)[:, belief], x[:, belief]) and torch.equal(small(x)[:, goal], x[:, goal])
    bank = {f"slot_modules.goal.{name}" for name, _ in small.slot_modules["goal"].named_parameters()}
    done = ProgramCompiler(kept.program).compile(small, keep_constant=True)
    assert done.constant_buffers.keys() == bank and not any(name in bank for name, _ in small.named_parameters())
    torch.testing.assert_close(small(x)[:, belief], full(x)[:, belief])


def test_programs_of_regions_that_the_layout_lacks_are_ignored():
    ghosts = program([("act", "belief")])
    ghosts.regions["ghost"] = RegionProgram(compile_mode="export")
    with pytest.warns(UserWarning, match="1 of 1 region programs are for regions that the layout does not have.*ghost"):
        compiled = ProgramCompiler(ghosts).compile()
    assert compiled.all_regions == compiled.active_regions == set(NAMES) and not compiled.exported_memories
    assert "ghost" in compiled.program.regions  # a scheduler of its own may follow its clock


def test_nothing_to_eliminate_leaves_the_program_as_it_is():
    whole = program([("act", "belief")])
    compiled = ProgramCompiler(whole).compile()
    assert compiled.program == whole and compiled.n_eliminated == 0


def test_a_checkpoint_of_the_whole_model_goes_into_the_smaller_one():
    connections = [
        Connection("eye.left", "memory[0]", write_mode="gate"), Connection("belief", "eye.left"),
        Connection("belief", "act", fn="linear_attention"), Connection("act", "memory[0]", fn="cosine_attention"),
        Connection("act", "belief"), Connection("belief", "goal", write_mode="gate"), Connection("belief", "belief"),
    ]  # fmt: skip
    programs = {("act", "belief"): ConnectionProgram(write_mode="gate"), ("belief", "act"): ConnectionProgram("write")}
    whole = program(connections, programs, m="export", g="constant")
    identities = {name: IdentitySpec(slot_capacity=3) for name in ("memory[0]", "eye.left")}
    for name, identity in identities.items():
        spoken = whole.regions.get(name, RegionProgram())
        whole.regions[name] = dataclasses.replace(spoken, identity=identity)
    compiled = ProgramCompiler(whole).compile()

    class Network(nn.Module):
        def __init__(self, program):
            super().__init__()
            schema = program.schema
            self.canvas = SpatiotemporalCanvas(schema.layout)
            self.norm = nn.LayerNorm(8)
            self.blocks = nn.ModuleList(
                AttentionDispatcher(schema.topology, schema.layout, 8, program=program) for _ in range(2)
            )
            self.other = AttentionDispatcher(CanvasTopology([Connection("act", "act", fn="gated")]), schema.layout, 8)

        def forward(self, x):
            for block in self.blocks:
                x = block(self.norm(x))
            return self.other(x)

    torch.manual_seed(0)
    full, small = Network(whole), Network(compiled.program)
    for block in full.blocks:
        torch.nn.init.normal_(block.edge_gates)
    with pytest.raises(RuntimeError, match="cosine_attention"):
        small.load_state_dict(full.state_dict())
    small.load_state_dict(surviving_state(small, full.state_dict(), compiled))
    own, whole_canvas = (dict(network.canvas.modality_embeddings) for network in (small, full))
    assert own.keys() < whole_canvas.keys() and all(torch.equal(own[name], whole_canvas[name]) for name in own)
    assert compiled.gates == (False, True, False) and small.blocks[0].edge_gates.shape == (1,)
    for block, source in zip(small.blocks, full.blocks):
        # of eye.left -> memory[0], act -> belief, belief -> goal, the second survives
        assert torch.equal(block.edge_gates, source.edge_gates[1:2])
    # the whole model without the edges that deploy drops, in one step
    x = torch.randn(1, LAYOUT.num_positions, 8)
    left = compiled.program
    expected, _ = program_oracle.step(
        full.blocks[0].double(), x.double(), 4, LAYOUT,
        CanvasTopology([dataclasses.replace(c, weight=1.0 if c in left.schema.topology.connections else 0.0)
                        for c in connections]), whole,
    )  # fmt: skip
    torch.testing.assert_close(small.blocks[0].double()(x.double()), expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"blocks.0.edge_gates has the shape \(1,\); the whole program has 3 "):
        surviving_state(small, small.state_dict(), compiled)


@pytest.mark.parametrize("mode", ["constant", "export"])
def test_deploy_leaves_the_clocks_of_regions_that_stay(mode):
    """A program that deploy leaves without any region of its own is not one that fires none."""
    whole = CanvasProgram(CanvasSchema(LAYOUT, CanvasTopology([])), {"goal": RegionProgram(compile_mode=mode)})
    compiled = ProgramCompiler(whole).compile()
    for program, expected in ((whole, set(NAMES)), (compiled.program, set(NAMES) - {"goal"})):
        assert RegionScheduler(program).step(0) == expected


OURS = {
    **{fn: lambda fn=fn: create_attention(fn, 8) for fn in sorted(ATTENTION_REGISTRY)},
    "learned scheduler": lambda: LearnedScheduler(2, 3, 1),
    "slots": lambda: SlotBindingModule(8, 2),
    "loops": lambda: LoopedBlockWrapper(nn.Linear(8, 8), embed_dim=8),
    "action head": lambda: ActionHead(8, 4),
    "canvas": lambda: SpatiotemporalCanvas(LAYOUT),
    "conditioner": lambda: SemanticConditioner(8, 2, {"a": [1.0, 0.0]}),
}


@pytest.mark.parametrize("name", OURS)
def test_parts_of_our_modules_have_no_names_of_regions(name):
    module = nn.ModuleDict({"held": OURS[name]()})
    own = {parameter_key(region) for region in LAYOUT.regions}
    inner = {part for path, _ in module.named_parameters() for part in path.split(".")[1:]} - own
    for part in sorted(inner):
        layout = CanvasLayout(T=1, d_model=8, spatial_shape=(4,), regions={part: (0, 1, 0, 2)})
        schema = CanvasSchema(layout, CanvasTopology([]))
        with pytest.warns(UserWarning, match="nothing in the module belongs to these regions alone"):
            frozen = {part: RegionProgram(compile_mode="freeze")}
            compiled = ProgramCompiler(CanvasProgram(schema, frozen)).compile(module)
        assert compiled.untouched_regions == {part} and "frozen" not in compiled.summary()
        assert trainable(module) == {path for path, _ in module.named_parameters()}


def test_users_modules_inside_of_ours_have_names():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.goal, self.loop = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.loop(self.goal(x))

    block = LoopedBlockWrapper(Inner(), embed_dim=8)
    freeze = {name: RegionProgram(compile_mode="freeze") for name in ("goal", "loop")}
    layout = CanvasLayout(T=1, d_model=8, spatial_shape=(4,), regions={"goal": (0, 1, 0, 1), "loop": (0, 1, 1, 2)})
    ProgramCompiler(CanvasProgram(CanvasSchema(layout, CanvasTopology([])), freeze)).compile(block)
    frozen = {path for path, parameter in block.named_parameters() if not parameter.requires_grad}
    assert frozen == {f"original.{layer}.{part}" for layer in ("goal", "loop") for part in ("weight", "bias")}


def test_buffers_alone_are_not_frozen():
    module = nn.Module()
    module.goal = nn.Module()
    module.goal.register_buffer("table", torch.ones(3))
    for mode in ("freeze", "constant"):
        made = CanvasProgram(CanvasSchema(LAYOUT, CanvasTopology([])), {"goal": RegionProgram(compile_mode=mode)})
        with pytest.warns(UserWarning, match="nothing in the module belongs"):
            assert ProgramCompiler(made).compile(module).untouched_regions == {"goal"}
