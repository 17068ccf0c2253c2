"""Every argument of every declaration: what is not meant is refused, with a ValueError that says what was given."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import canvas_engineering as ce
from canvas_engineering import clock_ir
from canvas_engineering.checked import shown
from canvas_engineering.cogvideox import CanvasAttnProcessor, LoopedCogVideoXBlock

LOOP: list = []
LOOP.append(LOOP)
RING: dict = {}
RING["a"] = RING
# no argument of any kind below means one of these
NOTHING = {
    "object": object(),
    "class": int,
    "complex": 1j,
    "function": len,
    "list in itself": LOOP,
    "parameter": nn.Parameter(torch.tensor(1.0)),
    "bool tensor": torch.tensor(True),
    "bytes": b"ab",
}
NUMBERS = {"1.5": 1.5, "nan": math.nan, "inf": math.inf, "10**30": 10**30, "-10**5000": -(10**5000), "-1": -1}
BOOLS = {"True": True, "np.True_": np.True_}
SEVERAL = {"ragged": [[1, 2], [3]], "array": np.array([1.5, 2]), "tensor": torch.tensor([0.5, 2.0]), "set": {1.5}}
NOT_INT = NOTHING | BOOLS | SEVERAL | NUMBERS | {"str": "2", "dict in itself": RING}
ANY_INT = {name: value for name, value in NOT_INT.items() if name != "-1"}
NOT_NUMBER = NOTHING | BOOLS | SEVERAL | {name: NUMBERS[name] for name in ("nan", "inf", "-10**5000")}
NOT_NUMBER |= {"str": "2", "dict in itself": RING}
NOT_SHARE = NOT_NUMBER | {"1.0": 1.0, "-0.1": -0.1}
NOT_STRING = NOTHING | BOOLS | SEVERAL | NUMBERS | {"dict in itself": RING}
NOT_NAME = NOT_STRING | {"empty": ""}
NOT_STRINGS = NOT_STRING | {"str": "ab"}
NOT_NAMES = {name: value for name, value in NOT_STRINGS.items() if name != "dict in itself"} | {"empty one": ["a", ""]}
NOT_BOOL = NOTHING | SEVERAL | NUMBERS | {"str": "no", "dict in itself": RING, "0": 0, "None": None}
NOT_INTS = NOTHING | BOOLS | SEVERAL | NUMBERS | {"str": "12", "dict in itself": RING}
NOT_OURS = NOTHING | BOOLS | SEVERAL | NUMBERS | {"str": "a", "dict in itself": RING}


def layout() -> ce.CanvasLayout:
    return ce.CanvasLayout(T=2, spatial_shape=(2,), d_model=8, regions={"a": (0, 2, 0, 1), "b": (0, 2, 1, 2)})


def program() -> ce.CanvasProgram:
    return ce.CanvasProgram(ce.CanvasSchema(layout(), ce.CanvasTopology.dense(["a", "b"])), {"a": ce.RegionProgram()})


def typed() -> SimpleNamespace:
    return SimpleNamespace(x=ce.Field(2, 2))


def graft(**options: Any) -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), 1)
    ce.graft_looped_blocks(model, **{"block_attr": "layers", "loops": 1, **options})


def dispatcher(**options: Any) -> ce.AttentionDispatcher:
    given = {"topology": ce.CanvasTopology.dense(["a"]), "layout": layout(), "d_model": 8}
    return ce.AttentionDispatcher(**{**given, **options})


def compiled(**options: Any) -> ce.AttentionPlan:
    return ce.compile_attention(layout(), ce.CanvasTopology.dense(["a"]), **options)


def attention(**options: Any) -> torch.Tensor:
    q = torch.randn(1, 1, 4, 4)
    return ce.canvas_attention(q, q, q, compiled(), **options)


on_event = {"source": "a.b", "gt": 1}
# (what is made, its other arguments, kind by argument); a kind that ends in "?" may be None too
DECLARATIONS = [
    (
        ce.RegionSpec,
        {"bounds": (0, 1, 0, 1)},
        "bounds:ints period:int is_output:bool loss_weight:number semantic_type:string? embedding_model:string "
        "default_attn:string carrier:string",
    ),
    (
        ce.CanvasLayout,
        {"T": 2, "d_model": 8, "spatial_shape": (2,)},
        "T:int d_model:int spatial_shape:ints t_current:int H:int? W:int? regions:ours",
    ),
    (ce.CanvasLayout, {"T": 2, "d_model": 8, "H": 2, "W": 2}, "T:int d_model:int H:int W:int?"),
    (
        ce.Connection,
        {"src": "a", "dst": "b"},
        "src:name dst:name weight:number t_src:signed? t_dst:signed? fn:name? operator:name write_mode:name "
        "temporal_fill:name interpolation_order:int mask:ours?",
    ),
    (ce.CanvasTopology, {}, "connections:ours"),
    (ce.CanvasTopology.dense, {}, "regions:names"),
    (ce.CanvasTopology.isolated, {}, "regions:names"),
    (ce.CanvasTopology.causal_chain, {}, "regions:names"),
    (ce.CanvasTopology.hub_spoke, {"hub": "a", "spokes": ["b"]}, "hub:name spokes:names bidirectional:bool"),
    (ce.CanvasTopology.causal_temporal, {"regions": ["a"]}, "regions:names layout:ours? temporal_fill:name"),
    (ce.MaskSpec, {"kind": "tile"}, "kind:name tile_h:int tile_w:int tile_shape:ints?"),
    (ce.MaskSpec, {"kind": "sparse", "pattern": ((True,),)}, "pattern:ours?"),
    (ce.rect_cover, {"mask": torch.ones(2, 2, dtype=torch.bool)}, "min_area:int"),
    (
        ce.mask_to_index_pairs,
        {"mask_spec": ce.MaskSpec(), "layout": layout(), "src": "a", "dst": "a"},
        "mask_spec:ours layout:ours",
    ),
    (ce.CanvasSchema, {"layout": layout()}, "layout:ours topology:ours? version:string"),
    (ce.CanvasProgram, {"schema": program().schema}, "schema:ours version:name"),
    (
        ce.ClockSpec,
        {},
        "domain:string mode:string period:int event_source:string? event_threshold:number cooldown:int "
        "max_silence:int? max_inner_steps:int? expr:ours?",
    ),
    (ce.ConstraintSpec, {}, "equivariance:string? conservation:string? causal_direction:string? monotonicity:string?"),
    (
        ce.RegionProgram,
        {},
        "family:string tags:strings carrier:string clock:ours? learning:ours? compile_mode:string constraints:ours? "
        "identity:ours?",
    ),
    (ce.ConnectionProgram, {}, "operator:string trigger:string? write_mode:string mask_spec:ours?"),
    (ce.LearningSpec, {}, "mode:string losses:strings compile_mode:string"),
    (ce.default_learning, {}, "family:string"),
    (ce.IdentitySpec, {}, "mode:string slot_capacity:int binding_fn:string birth_death:bool"),
    (ce.SlotBindingModule, {"d_model": 8, "n_slots": 2}, "d_model:int n_slots:int n_heads:int birth_death:bool"),
    (
        ce.CortexSpec,
        {"name": "c"},
        "name:name bounds:ints tile:ints local_backend:name shared_cache:bool isolated:bool",
    ),
    (ce.ResidualSpec, {}, "reduce:name decay:number"),
    (ce.ResidualAccumulator, {"region_names": ["a"]}, "region_names:names spec:ours?"),
    (clock_ir.Periodic, {}, "period:int domain:string"),
    (clock_ir.OnEvent, on_event, "source:name gt:number lt:number? domain:string"),
    (clock_ir.BoundaryExpr, {}, "name:string"),
    (clock_ir.And, {"left": clock_ir.Periodic(), "right": clock_ir.Periodic()}, "left:ours right:ours"),
    (clock_ir.Not, {}, "child:ours"),
    (clock_ir.Cooldown, {"child": clock_ir.Periodic()}, "child:ours steps:int"),
    (clock_ir.MaxSilence, {"child": clock_ir.Periodic()}, "child:ours steps:int"),
    (clock_ir.ClockExpr.from_dict, {}, "d:ours"),
    (ce.RegionScheduler, {}, "program:ours"),
    (ce.DeviceScheduler, {"program": program()}, "program:ours accumulator:ours?"),
    (
        ce.LearnedScheduler,
        {"n_regions": 2, "summary_dim": 2, "max_active": 1},
        "n_regions:int summary_dim:int? max_active:int temperature:number",
    ),
    (
        ce.HybridScheduler,
        {"program": program(), "learned_regions": ["a"]},
        "program:ours learned_regions:names max_active:int?",
    ),
    (ce.CurriculumScheduler, {}, "max_loops:int warmup_fraction:number"),
    (ce.SharpeningSchedule, {}, "max_loops:int beta_min:number beta_max:number schedule:name"),
    (ce.ActionHead, {}, "latent_channels:int action_dim:int hidden_dim:int?"),
    (
        ce.LoopedBlockWrapper,
        {"original": nn.Linear(4, 4), "embed_dim": 4},
        "original:ours block_idx:signed max_loops:int embed_dim:int gate_init_bias:number "
        "use_gradient_checkpointing:bool gate:name",
    ),
    (graft, {}, "max_loops:int inner_dim:int? action_dim:int latent_channels:int loops:int? freeze:name packed:bool?"),
    (
        ce.Field,
        {},
        "h:int w:int period:int is_output:bool loss_weight:number attn:name semantic_type:string? temporal_extent:int? "
        "family:string? tags:strings carrier:string? spatial_shape:ints?",
    ),
    (ce.ConnectivityPolicy, {}, "intra:name array_element:name temporal:name"),
    (
        ce.compile_schema,
        {"root": typed()},
        "T:int spatial_shape:ints? d_model:int connectivity:ours? layout_strategy:name t_current:int H:int? W:int?",
    ),
    (ce.compile_program, {"root": typed()}, "T:int d_model:int connectivity:ours? layout_strategy:name"),
    (
        ce.SemanticConditioner,
        {"d_model": 4, "embed_dim": 1, "region_embeddings": {"a": (1.0,)}},
        "d_model:int embed_dim:int region_embeddings:ours freeze_embeddings:bool learn_residuals:bool "
        "projector_bias:bool",
    ),
    (ce.SpatiotemporalCanvas, {}, "layout:ours"),
    (ce.SpatiotemporalCanvas, {"layout": layout()}, "semantic_conditioner:ours? program:ours?"),
    (ce.SinusoidalPositionalEncodingND, {"d_model": 8}, "d_model:int max_T:int max_spatial:ints"),
    (ce.PeriodEmbedding, {"d_model": 8}, "d_model:int n_buckets:int max_period:int"),
    (ce.FamilyCarrierEmbedding, {}, "d_model:int"),
    (ce.ProgramCompiler, {}, "program:ours"),
    (ce.window_topology, {}, "past:int future:int"),
    (ce.tile_topology, {"rows": 1, "columns": 1}, "rows:int columns:int"),
    (ce.PixelBox, {}, "frames:ints? rows:ints? columns:ints?"),
    (ce.validate_constraints, {}, "program:ours"),
    (ce.evaluate_trigger, {"trigger": None, "summaries": None}, "trigger:string?"),
    (ce.CanvasTopology().to_attention_mask, {}, "layout:ours"),
    *(
        (cls, {"d_model": 8}, "d_model:int n_heads:int dropout:share")
        for cls in dict.fromkeys(ce.ATTENTION_REGISTRY.values())
    ),
    (ce.create_attention, {"d_model": 8}, "fn_name:name"),
    (ce.register_attention, {"cls": ce.CrossAttention}, "name:name"),
    (ce.LocalAttention, {"d_model": 8}, "window_size:int?"),
    (ce.SparseAttention, {"d_model": 8}, "top_k:int"),
    (ce.PerceiverAttention, {"d_model": 8}, "n_latents:int"),
    (ce.RandomFixedAttention, {"d_model": 8}, "n_random:int seed:signed?"),
    (ce.MixtureAttention, {"d_model": 8}, "n_experts:int top_k_experts:int"),
    (ce.MambaAttention, {"d_model": 8}, "state_size:int dt_rank:int"),
    (ce.HyenaAttention, {"d_model": 8}, "order:int max_len:int"),
    (
        dispatcher,
        {},
        "topology:ours layout:ours d_model:int n_heads:int dropout:share skip_temporal:bool residual_accumulator:ours? "
        "program:ours? cortex:ours? backend:name",
    ),
    (compiled, {}, "program:ours? cortex:ours? normalize:name dense_in_time:bool"),
    (attention, {}, "dropout_p:share gain:ours? active:ours? row_scale:ours? backend:name packed:bool activation:name"),
    (attention, {}, "key_mask:ours?"),
    (graft, {}, "sharpening:ours? layout:ours? topology:ours? measure_on:ours? backend:name gate:name block_attr:name"),
    (CanvasAttnProcessor, {}, "layout:ours? topology:ours? backend:name packed:bool"),
    (LoopedCogVideoXBlock, {"block_idx": 0, "max_loops": 2, "inner_dim": 8}, "original_block:ours"),
    (ce.cogvideox_layout, {"height": 16, "width": 16, "num_frames": 1}, "config:ours"),
    (ce.video_layout, {"height": 16, "width": 16, "num_frames": 1}, "model_or_config:ours"),
    (ce.set_canvas_attention, {"layout": None, "topology": None}, "transformer:ours"),
    (ce.RegionScheduler(program()).step, {}, "external_t:signed"),
    (ce.RegionScheduler(program()).step, {"external_t": 0}, "boundary:string?"),
    (ce.DeviceScheduler(program()).step, {"external_t": 0}, "boundary:string?"),
    (ce.PeriodEmbedding(8).bucket, {}, "period:signed"),
    (ce.SinusoidalPositionalEncodingND(8), {"T": 1, "spatial_shape": (1, 1)}, "T:int spatial_shape:ints"),
    (layout().region_indices_at_t, {"name": "a"}, "t_abs:signed"),
]
KINDS = {
    "int": NOT_INT,
    "signed": ANY_INT,
    "ints": NOT_INTS,
    "number": NOT_NUMBER,
    "share": NOT_SHARE,
    "bool": NOT_BOOL,
    "string": NOT_STRING,
    "strings": NOT_STRINGS,
    "name": NOT_NAME,
    "names": NOT_NAMES,
    "ours": NOT_OURS,
}
CASES = [
    pytest.param(made, others, argument, kind, id=f"{getattr(made, '__qualname__', 'encoding')}-{argument}-{kind}")
    for made, others, arguments in DECLARATIONS
    for argument, _, kind in (pair.partition(":") for pair in arguments.split())
]


@pytest.mark.parametrize("made, others, argument, kind", CASES)
def test_what_is_not_meant_is_refused_at_once(made, others, argument, kind):
    wrong = KINDS[kind.rstrip("?")] | {"None": None}
    if kind.endswith("?"):
        del wrong["None"]
    if argument == "connections":
        wrong = {name: value for name, value in wrong.items() if name != "list in itself"} | {"of itself": [LOOP]}
    for name, value in wrong.items():
        began = time.process_time()
        try:
            given = made(**{**others, argument: value})
        except ValueError as error:
            assert 10 < len(str(error)) < 2000, f"{name}: {error}"
        else:
            pytest.fail(f"{name} is taken for {argument}: {shown(given)}")
        assert time.process_time() - began < 1, name


def reads(fn: str) -> list:
    """One read of a function, with each of its three inputs to be given."""
    module, x = ce.create_attention(fn, 8), torch.zeros(1, 2, 8)
    given = {"queries": x, "keys": x, "values": x}
    return [pytest.param(module, given, argument, id=f"{fn}-{argument}") for argument in given]


def takers_of_tensors() -> list:
    canvas, rows, q = ce.SpatiotemporalCanvas(layout()), torch.zeros(1, 2, 8), torch.zeros(1, 1, 4, 4)
    whole = torch.zeros(1, 4, 8)
    conditioner = ce.SemanticConditioner(8, 1, {"a": (1.0,)})
    qkv = {"q": q, "k": q, "v": q, "plan": compiled()}
    looped = ce.LoopedBlockWrapper(nn.Linear(8, 8), embed_dim=8)
    takers = [
        (dispatcher(), {"x": whole, "add_to": whole}, "x add_to"),
        (ce.canvas_attention, qkv, "q k v"),
        (canvas.place, {"canvas": whole, "embeddings": rows, "region_name": "a"}, "canvas embeddings"),
        (canvas.extract, {"canvas": whole, "region_name": "a"}, "canvas"),
        (conditioner.condition_canvas, {"canvas": whole, "layout": layout()}, "canvas"),
        (ce.SlotBindingModule(8, 2), {"observations": rows}, "observations"),
        (ce.SlotBindingModule(8, 2, birth_death=True).alive_mask, {"observations": rows}, "observations"),
        (ce.ActionHead(8), {"noise_pred": torch.zeros(1, 2, 8)}, "noise_pred"),
        (looped, {"hidden_states": rows}, "hidden_states"),
        (ce.LearnedScheduler(2, 2, 1), {"summaries": torch.zeros(2)}, "summaries"),
    ]
    return [
        pytest.param(taker, given, argument, id=f"{getattr(taker, '__name__', type(taker).__name__)}-{argument}")
        for taker, given, arguments in takers
        for argument in arguments.split()
    ]


READS = [case for fn in sorted(set(ce.ATTENTION_REGISTRY) - {"self_attention"}) for case in reads(fn)]


@pytest.mark.parametrize("taker, given, argument", [*takers_of_tensors(), *READS])
def test_what_is_no_tensor_of_floats_is_refused(taker, given, argument):
    taker(**given)
    right = given[argument]
    for wrong in (right.numpy(), right.tolist(), right.int(), right.bool(), "abc", 1.0):
        with pytest.raises(ValueError, match=rf"{argument}\b.* must be .*(tensor|float)"):
            taker(**{**given, argument: wrong})


def test_errors_that_are_no_tensors_are_refused():
    with pytest.raises(ValueError, match="error must be a tensor, got a ndarray"):
        ce.ResidualAccumulator(["a"]).update("a", np.ones(3))


@pytest.mark.parametrize("summaries", ["abc", 5, [("a", {})], np.zeros(2)])
def test_summaries_are_a_mapping(summaries):
    hybrid = ce.HybridScheduler(program(), ["a"], summary_dim=1)
    for scheduler in (hybrid, ce.RegionScheduler(program())):
        with pytest.raises(ValueError, match="summaries must be a Mapping, or None, got"):
            scheduler.step(0, summaries)


@pytest.mark.parametrize("wrong", [5, 1.5, {"a": 1}.values(), [["a"]], [1], "", [""], np.zeros((2, 2))])
def test_active_regions_are_names(wrong):
    with pytest.raises((ValueError, KeyError), match="active_regions"):
        dispatcher()(torch.zeros(1, 4, 8), wrong)


@pytest.mark.parametrize(
    "two", [np.int64(2), np.uint8(2), np.array(2), torch.tensor(2)], ids=lambda two: type(two).__name__
)
def test_integers_of_other_libraries_become_plain_ints(two):
    made = [
        (ce.RegionSpec((0, two, 0, two), period=two), ce.RegionSpec((0, 2, 0, 2), period=2)),
        (
            ce.Connection("a", "b", two, two, two, interpolation_order=two),
            ce.Connection("a", "b", 2.0, 2, 2, interpolation_order=2),
        ),
        (ce.MaskSpec("tile", two, two, (two,)), ce.MaskSpec("tile", 2, 2, (2,))),
        (ce.Field(two, two, two, loss_weight=two), ce.Field(2, 2, 2, loss_weight=2.0)),
        (ce.ClockSpec(period=two, cooldown=two, max_silence=two), ce.ClockSpec(period=2, cooldown=2, max_silence=2)),
        (ce.IdentitySpec(slot_capacity=two), ce.IdentitySpec(slot_capacity=2)),
        (ce.CortexSpec("c", (0, two, 0, two), (two,)), ce.CortexSpec("c", (0, 2, 0, 2), (2,))),
        (ce.SharpeningSchedule(two, 1, two), ce.SharpeningSchedule(2, 1.0, 2.0)),
    ]
    for given, plain in made:
        assert given == plain and repr(given) == repr(plain)
    canvas = ce.CanvasLayout(T=two, H=two, W=two, d_model=two, regions={"a": (0, two, 0, 1, 0, two)})
    found = ce.CanvasSchema(canvas, ce.CanvasTopology([ce.Connection("a", "a", t_src=two)])).to_dict()
    assert ce.CanvasSchema.from_dict(json.loads(json.dumps(found))).layout == canvas


def test_a_generator_is_taken_once():
    assert ce.RegionProgram(tags=(tag for tag in "ab")).tags == ("a", "b")
    assert ce.ResidualAccumulator(name for name in "ba").region_names == ["a", "b"]
    assert ce.CanvasTopology.dense(name for name in "ab") == ce.CanvasTopology.dense(["a", "b"])


def test_a_canvas_of_more_positions_than_an_index_counts_is_refused():
    with pytest.raises(
        ValueError, match=r"T=100000 frames of \(100000, 100000\) has 10+ positions: it may have up to 2"
    ):
        ce.CanvasLayout(T=100_000, spatial_shape=(100_000, 100_000), d_model=8)


# -- what nests -------------------------------------------------------------------------------------------------------


def nested_clock(levels: int) -> dict:
    clock: dict = {"type": "periodic"}
    for _ in range(levels - 1):
        clock = {"type": "not", "child": clock}
    return clock


def with_clock(clock: dict) -> dict:
    return {**program().to_dict(), "region_programs": {"a": {"clock": {"expr": clock}}}}


def test_the_deepest_clock_works_and_comes_back_from_json(tmp_path):
    made = ce.CanvasProgram.from_dict(with_clock(nested_clock(100)))
    made.to_json(tmp_path / "deep.json")
    assert ce.CanvasProgram.from_json(tmp_path / "deep.json") == made
    assert len(list(made.regions["a"].clock.expr.nodes())) == 100
    host, device = ce.RegionScheduler(made), ce.DeviceScheduler(made)
    assert host.step(0) == {"b"} and device.step(0).tolist() == [0.0, 1.0]


def test_clocks_that_are_too_deep_or_too_many_are_refused():
    with pytest.raises(ValueError, match=r"program of region 'a', clock: .* more than 100 levels"):
        ce.CanvasProgram.from_dict(with_clock(nested_clock(1000)))
    ring = nested_clock(2)
    ring["child"] = ring
    with pytest.raises(ValueError, match="or holds itself"):
        clock_ir.ClockExpr.from_dict(ring)
    clock: clock_ir.ClockExpr = clock_ir.periodic()
    with pytest.raises(
        ValueError, match="101 levels and 101 nodes: it may have 100 and 10000; join many clocks in pairs"
    ):
        for _ in range(1000):
            clock = clock_ir.Not(clock)
    twice: clock_ir.ClockExpr = clock_ir.periodic()
    with pytest.raises(ValueError, match="14 levels and 16383 nodes"):
        for _ in range(40):
            twice = clock_ir.And(twice, twice)
    shared: dict = {"type": "periodic"}
    for _ in range(40):
        shared = {"type": "and", "left": shared, "right": shared}
    with pytest.raises(ValueError, match="14 levels and 16383 nodes"):
        clock_ir.ClockExpr.from_dict(shared)
    with pytest.raises(ValueError, match=r"no value lies above gt=2\.0 and below lt=1\.0"):
        clock_ir.on("a.b", gt=2, lt=1)


BROKEN = {
    "levels": ("[" * 1000 + "]" * 1000, "nested more than 120 levels"),
    "levels of dicts": ('{"layout":' * 2000 + "1" + "}" * 2000, "nested more than 120 levels"),
    "metadata of 119 levels": (
        json.dumps({**program().to_dict(), "metadata": {"a": json.loads("[" * 118 + "]" * 118)}}),
        "metadata is nested more than 100 levels",
    ),
    "NaN": ('{"layout": NaN}', "JSON has no NaN"),
    "no text": (b"\xff\xfe\xfa", "codec can't decode|Expecting value"),
    "nothing": ("", "Expecting value"),
    "many digits": (json.dumps(program().to_dict()).replace('"T": 2', '"T": 1' + "0" * 400), "T must be below"),
    "infinite": (json.dumps(program().to_dict()).replace('"T": 2', '"T": 1e999'), "T must be an int, got inf"),
    "list": ("[]", "a schema must be a dict"),
}


@pytest.mark.parametrize("text, message", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("kind", [ce.CanvasSchema, ce.CanvasProgram])
def test_files_that_are_none_are_named(tmp_path, text, message, kind):
    path = tmp_path / "broken.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=rf"broken\.json: .*({message})"):
        kind.from_json(path)


@pytest.mark.parametrize("metadata", ["abc", 5, False, [["a", "b"]], 0, ""])
def test_metadata_is_a_dict(metadata):
    with pytest.raises(ValueError, match="metadata must be a dict, got"):
        ce.CanvasSchema.from_dict({**program().schema.to_dict(), "metadata": metadata})


def test_metadata_that_holds_itself_is_refused(tmp_path):
    with pytest.raises(ValueError, match="metadata is nested more than 100 levels deep, or holds itself"):
        ce.CanvasSchema(layout(), metadata=RING)
    schema = ce.CanvasSchema(layout())
    schema.metadata["me"] = LOOP
    with pytest.raises(ValueError, match=r"metadata is nested .* or holds itself"):
        schema.to_json(tmp_path / "schema.json")
    assert not list(tmp_path.iterdir())


@dataclass
class Record:
    x: ce.Field = ce.Field(2, 2)
    child: Any = None


def test_types_that_hold_themselves_or_are_too_deep_are_refused():
    deep = Record()
    for _ in range(1000):
        deep = Record(child=deep)
    own = Record()
    own.child = [own]
    for root in (deep, Record(child=LOOP), Record(child=RING), Record(child=[RING])):
        with pytest.raises(ValueError, match="lies more than 100 levels deep: a type cannot hold itself"):
            ce.compile_schema(root)
    with pytest.raises(ValueError, match="a type cannot hold itself"):
        ce.compile_schema(own)
    allowed = Record()
    for _ in range(99):
        allowed = Record(child=allowed)
    assert len(ce.compile_schema(allowed).field_names) == 199


def test_a_value_is_shown_whatever_it_is():
    class Rude:
        def __repr__(self):
            raise RuntimeError("no")

    assert "Rude" in shown(Rude()) and shown(LOOP) == "[[[[[...]]]]]" and shown(10**5000) == "an int of 16610 bits"
    deep = Record()
    for _ in range(3000):
        deep = Record(child=deep)
    assert "Record" in shown(deep) and len(shown(deep)) < 100
    assert len(shown("a" * 10**6)) < 300 and len(shown(list(range(10**5)))) < 100
