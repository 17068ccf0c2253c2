"""What is read off machine code, on listings whose figures can be counted by hand; and the yardstick against torch."""

from __future__ import annotations

import math
import os

import pytest
import torch

from benchmarks import static_model, yardstick

# Two loops in an outer one: that of full blocks, with a part that most iterations jump over, and a longer one.
BODY = """
.text.kernel:
        /*0000*/                   STL [R1], R2 ;
.L_x_0:
        /*0010*/                   WARPGROUP.ARRIVE ;
.L_x_1:
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0040*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0050*/                   MUFU.EX2 R3, R3 ;
        /*0060*/                   FFMA R4, R4, R5, R6 ;
        /*0070*/              @!P3 BRA `(.L_x_2) ;
        /*0080*/                   LDL R7, [R1] ;
        /*0090*/                   STG.E [R2.64], R7 ;
.L_x_2:
        /*00a0*/                   LDSM.16.M88.4 R8, [R9] ;
        /*00b0*/                   HGMMA.64x64x16.F32.BF16 R56, R88, gdesc[UR8].tnspB, R56, gsb0 ;
        /*00c0*/               @P4 BRA `(.L_x_1) ;
.L_x_3:
        /*00d0*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT, gsb0 ;
        /*00e0*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*00f0*/                   HGMMA.64x64x16.F32.BF16 R56, R88, gdesc[UR8].tnspB, R56, gsb0 ;
        /*0100*/                   ISETP.GE.AND P0, PT, R1, R2, PT ;
        /*0110*/                   FSEL R3, R3, RZ, P0 ;
        /*0120*/                   FSEL R4, R3, RZ, P0 ;
        /*0130*/                   FSEL R5, R3, RZ, P0 ;
        /*0140*/                   FSEL R5, R3, RZ, P0 ;
        /*0150*/                   FSEL R5, R3, RZ, P0 ;
        /*0160*/                   FSEL R5, R3, RZ, P0 ;
        /*0170*/              @!P0 BRA `(.L_x_3) ;
        /*0180*/               @P1 BRA `(.L_x_0) ;
        /*0190*/                   EXIT ;
.L_x_4:
        /*01a0*/                   BRA `(.L_x_4);
"""


def test_the_loop_of_full_blocks_is_the_shortest_with_products():
    instructions = static_model.parse(BODY)
    assert instructions[2] == ("HGMMA.64x64x16.F32.BF16", "R24, gdesc[UR8], RZ, !UPT", None, None)
    assert instructions[7].guard == "P3" and instructions[instructions[7].target].name == "LDSM"
    assert static_model.loops(instructions) == [(2, 12), (13, 23), (1, 24)]
    hot, other = static_model.product_loops(instructions)
    # what is jumped over is not part of it
    assert len(hot) == 9 and not {"LDL", "STG"} & {i.name for i in hot} and len(other) == 11
    assert static_model.product_flop(hot) == 3 * 2 * 64 * 64 * 16


def test_instructions_become_clocks():
    hot = static_model.product_loops(static_model.parse(BODY))[0]
    spent = static_model.clocks(hot, 8)
    assert spent["issue"] == 9 * 2 and spent["exp2"] == 8 * 2 and spent["float"] == 1 * 2 and spent["integer"] == 0
    assert spent["tensor"] == 2 * 3 * 2 * 64 * 64 * 16 / 4096
    # two products with both factors in shared memory, one with one; 512 bytes of each warp's own
    assert spent["shared"] == (2 * 2 * 16 * (2 * 128 + 64) + 8 * 512) / 128
    serial = spent["tensor"] + spent["issue"]
    assert static_model.tflops(1000, spent) == pytest.approx(0.87 * 1000 / serial * 132 * 1.755e-3)


def test_what_is_described_of_a_kernel(monkeypatch):
    monkeypatch.setattr(static_model, "run_tool", lambda *_, cubin: BODY)
    found = static_model.describe(b"", "forward", 64, 64, 16, 4)
    assert found["instructions"] == 9 and found["other_instructions"] == 11 and found["waits"] == 1
    # three products of 64 × 64 × 16 where two are asked for
    assert found["waste"] == 1.5 and found["exp2"] == 0.03
    # the store before the loops is in none of them
    assert found["local"] == 1
    # in the other loop each product is waited for
    assert found["serialised"] == 1
    assert found["bound"] == "tensor" and found["predicted"] > found["other_predicted"]
    # two groups of four warps, each with half of the tile's rows in a loop of its own
    shared = static_model.describe(b"", "forward", 128, 64, 16, 4, consumers=2)
    assert shared["instructions"] == 9 + 11 and shared["waste"] == 1.5 and shared["other_instructions"] is None
    in_groups = BODY.replace("!UPT, gsb0 ;", "!UPT ;")
    monkeypatch.setattr(static_model, "run_tool", lambda *_, cubin: in_groups)
    assert static_model.describe(b"", "forward", 64, 64, 16, 4)["serialised"] == 0
    monkeypatch.setattr(static_model, "run_tool", lambda *_, cubin: "        /*0000*/                   EXIT ;")
    assert static_model.describe(b"", "forward", 64, 64, 16, 4) == {}


def test_rates_of_passes_follow_from_those_of_kernels():
    def row(stage, form, predicted, signed=False):
        return {"head_dim": 64, "dtype": "bf16", "form": form, "stage": stage, "predicted": predicted, "signed": signed}

    joint = [row("forward", "joint", 400), row("dq", "joint", 300), row("dkv", "joint", 400)]
    slower = [row("dq", "joint", 100), row("dkv", "joint", 500, signed=True), {"signed": False}]
    found = static_model.pass_rates(joint + slower)
    assert found == [{"head_dim": 64, "dtype": "bf16", "form": "joint", "forward": 400.0, "backward": 250.0}]
    edge = [each | {"form": "edge"} for each in joint]
    # a slot's 4 · D bytes at 4.8 TB/s, spread over 1,024 keys
    stored = static_model.pass_rates(edge)[0]
    assert stored["forward"] == round(4 / (4 / 400 + 4 / 1024 / 4.8), 1) < 400
    assert stored["backward"] == round(10 / (6 / 300 + 8 / 400 + 4 / 1024 / 4.8), 1)
    walked = static_model.pass_rates([*edge, row("delta", "edge", 200)])[0]
    assert walked["forward"] == 400 and walked["backward"] == round(10 / (6 / 300 + 8 / 400 + 4 / 200), 1)
    assert static_model.pass_rates(joint[:2])[0] == {"head_dim": 64, "dtype": "bf16", "form": "joint", "forward": 400.0}


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the yardstick runs in the interpreter only")
def test_the_yardstick_is_attention():
    heads, n, dim, scale = 2, 64, 16, 0.3
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(heads, n, dim, generator=generator) for _ in range(3))
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
    out, lse = torch.empty_like(q), torch.empty(heads, n)
    sizes = dict(HEAD_DIM=dim, BLOCK_M=32, BLOCK_N=16)
    yardstick.dense_forward_kernel[n // 32, heads]((q, k, v, out, lse), n, scale * math.log2(math.e), dim, **sizes)
    logits = scale * q @ k.transpose(-1, -2)
    assert (out - wanted).abs().max() < 2e-5 and (lse * math.log(2) - logits.logsumexp(-1)).abs().max() < 2e-5
