"""The figures in README's prose, which no benchmark writes."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("rich", reason="benchmarks print their tables with rich")

from benchmarks import cases, cogvideox, readme
from canvas_engineering.plan import compile_attention
from examples import cartpole_model

TEXT = " ".join(readme.README.read_text().split())


def stated(pattern: str) -> list[float]:
    """The numbers that README states, once, where the pattern has {}."""
    found = re.findall(re.escape(pattern).replace(r"\{\}", r"([\d,.]*\d)"), TEXT)
    assert len(found) == 1, f"README says {pattern!r} {len(found)} times"
    return [float(number.replace(",", "")) for number in found[0]]


def test_the_picture_is_of_the_demos_table():
    plan = compile_attention(*cartpole_model.declare(96))
    rectangles, percent = stated("The compiled table of the demo's canvas: {} rectangles, {} % of all pairs")
    assert rectangles == len(plan.table.weight) and percent == round(100 * plan.density, 1)


def test_attention_of_cogvideox_is_the_stated_share_of_a_block():
    """Counted by torch in diffusers' own block on 49 frames of 480 × 720: batched products are attention's."""
    name = "diffusers.models.transformers.cogvideox_transformer_3d"
    module = pytest.importorskip(name, reason="CogVideoX's block is diffusers'")
    shares = []
    for heads in (30, 48):  # of 2B, of 5B
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            width, embedding = 64 * heads, 512
            block = module.CogVideoXBlock(width, heads, 64, embedding)
            block(torch.empty(1, 13 * 30 * 45, width), torch.empty(1, 226, width), torch.empty(1, embedding))
        counts = counter.get_flop_counts()["Global"]
        shares.append(counts[torch.ops.aten.bmm] / sum(counts.values()))
    percents = stated("Attention is {} % (2B) or {} % (5B) of a block's arithmetic")
    assert percents == [round(100 * share) for share in shares]
    gains = stated("however sparse the topology, a whole step gains at most {} or {} times")
    assert gains == [round(1 / (1 - share), 1) for share in shares]


def test_the_snippet_on_cogvideox_says_what_its_plan_is():
    plan, _ = cogvideox.plan_of(480, 720, 49, 226)
    tokens, percent = stated("print(blocks[0].attn1.processor.plan) # {} tokens, {} % of all pairs")
    assert tokens == plan.n_positions and percent == round(100 * plan.density)


def test_heads_are_those_of_the_cases_in_the_table():
    heads = {case.name: case.heads for case in cases.CPU if case.name in readme.WORDS}
    usual, dim, computer_use, video = stated("batch 1, {} heads of {} (computer use {}, CogVideoX {})")
    expected = {name: video if name.startswith("cogvideox") else usual for name in heads} | {
        "computer_use": computer_use
    }
    assert heads == expected
    assert {(case.batch, case.head_dim) for case in cases.CPU if case.name in readme.WORDS} == {(1, dim)}


def test_the_single_case_is_one_test():
    (case,) = re.findall(r'`pytest "(benchmarks/[^"]+)"` times one contestant', TEXT)
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", case]
    done = subprocess.run(command, cwd=readme.README.parent, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1].startswith("1 test collected"), done.stdout + done.stderr
