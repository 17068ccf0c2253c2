"""Dispatchers with random parameters, and their steps by the oracle."""

from __future__ import annotations

import torch
from torch import nn

from canvas_engineering import AttentionDispatcher
from tests import family_oracle, oracle


def randomised(layout, topology, seed=1, d_model=None, n_heads=2, **options) -> AttentionDispatcher:
    """A dispatcher in float64 with parameters of N(0, 0.5²); what starts far from 0 stays around there."""
    torch.manual_seed(seed)
    dispatcher = AttentionDispatcher(topology, layout, d_model or layout.d_model, n_heads=n_heads, **options)
    for name, parameter in dispatcher.named_parameters():
        nn.init.normal_(parameter, mean=3.0 if name.endswith("temperature") else 0.0, std=0.5)
    return dispatcher.double()


def heads_of(dispatcher: AttentionDispatcher) -> int:
    """The heads of the functions that have any; rwkv alone knows them by its parameters."""
    modules = list(dispatcher.fn_modules.modules())
    known = [module.n_heads for module in modules if hasattr(module, "n_heads")]
    return next(iter([*known, *(len(module.bonus) for module in modules if hasattr(module, "bonus"))]), 1)


def oracle_step(dispatcher, x, active=None, context=None) -> torch.Tensor:
    """What a step computes, by ``family_oracle.step``."""
    return family_oracle.step(
        dispatcher.topology,
        oracle.reads(dispatcher.layout, dispatcher.topology),
        dispatcher.plan.fns,
        {fn: {**dict(m.named_buffers()), **dict(m.named_parameters())} for fn, m in dispatcher.fn_modules.items()},
        x,
        heads_of(dispatcher),
        gates=dispatcher.edge_gates,
        active=active,
        context=context,
    )
