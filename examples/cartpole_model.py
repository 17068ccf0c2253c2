"""The demo's canvas and the small transformer on it.

The canvas holds 16 frames at 25 frames per second: video in 2 x 2 patches, the four state variables as fast
proprioception, one action, and a summary that ticks every fourth frame. The first half of the window is observed. In
its second half, video and proprioception hold the last observed frame, and the model predicts what to change; all 16
actions are known, as they are for a plan.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

if not __package__:  # run as a file, whose folder has no package `examples`
    sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("", "kernels")]

from canvas_engineering import CanvasLayout, CanvasTopology, Connection, RegionSpec, SpatiotemporalCanvas, TemporalFill
from examples.cartpole_data import HEIGHT, WIDTH

FRAMES, OBSERVED = 16, 8
PATCH = 2
ROWS, COLUMNS = HEIGHT // PATCH, WIDTH // PATCH
SUMMARY_PERIOD = 4

Attention = Callable[[CanvasTopology, CanvasLayout, int, int], nn.Module]


def declare(d_model: int) -> tuple[CanvasLayout, CanvasTopology]:
    """Returns the layout and the topology."""
    proprioception, summary = ROWS, ROWS + 1
    layout = CanvasLayout(
        T=FRAMES,
        d_model=d_model,
        spatial_shape=(ROWS + 2, COLUMNS),
        t_current=OBSERVED,
        regions={
            "video": RegionSpec((0, FRAMES, 0, ROWS, 0, COLUMNS)),
            "proprioception": RegionSpec((0, FRAMES, proprioception, proprioception + 1, 0, 1)),
            "action": RegionSpec((0, FRAMES, proprioception, proprioception + 1, 1, 2), is_output=False),
            "summary": RegionSpec(
                (0, FRAMES // SUMMARY_PERIOD, summary, summary + 1, 0, COLUMNS), period=SUMMARY_PERIOD, is_output=False
            ),
        },
    )
    now = {"t_src": 0, "t_dst": 0}
    topology = CanvasTopology(
        [
            Connection("video", "video", **now),
            Connection("video", "video", t_src=0, t_dst=-1),
            Connection("video", "proprioception", **now),
            Connection("video", "summary", **now, temporal_fill=TemporalFill.HOLD),
            Connection("proprioception", "proprioception"),
            Connection("proprioception", "proprioception", t_src=0, t_dst=-OBSERVED),
            # What happened since that frame: a connection, and so a softmax, per action. Outputs add up, as pushes do.
            *(Connection("proprioception", "action", t_src=0, t_dst=-k) for k in range(1, OBSERVED + 1)),
            Connection("proprioception", "video", **now),
            Connection("proprioception", "summary", **now, temporal_fill=TemporalFill.INTERPOLATE),
            Connection("summary", "summary"),
            Connection("summary", "proprioception"),
            Connection("summary", "video", **now, temporal_fill=TemporalFill.HOLD),
        ]
    )
    return layout, topology


class Block(nn.Module):
    """Pre-norm residual block: attention along the topology, then an MLP on every position."""

    def __init__(self, d_model: int, attention: nn.Module):
        super().__init__()
        self.attention_norm = nn.LayerNorm(d_model)
        self.attention = attention
        self.mlp_norm = nn.LayerNorm(d_model)
        self.mlp = nn.Sequential(nn.Linear(d_model, 4 * d_model), nn.GELU(), nn.Linear(4 * d_model, d_model))

    def forward(self, x: Tensor) -> Tensor:
        # Only positions that attend to something change: actions and empty positions come back as they were.
        x = self.attention(self.attention_norm(x), add_to=x)
        return x + self.mlp(self.mlp_norm(x))


class WorldModel(nn.Module):
    """Predicts the second half of a window from its first half and all of its actions.

    ``attention(topology, layout, d_model, n_heads)`` builds each block's attention, so that the same model can be timed
    on another one. Decoders start at zero and predict the change since the last observed frame: an untrained model
    *is* the persistence baseline, and whatever it is better by it has learned.
    """

    def __init__(self, attention: Attention, d_model: int = 64, n_heads: int = 4, n_blocks: int = 3):
        super().__init__()
        self.size = (d_model, n_heads, n_blocks)
        layout, topology = declare(d_model)
        self.canvas = SpatiotemporalCanvas(layout)
        self.blocks = nn.ModuleList(
            Block(d_model, attention(topology, layout, d_model, n_heads)) for _ in range(n_blocks)
        )
        self.encode_patch = nn.Linear(PATCH * PATCH, d_model)
        self.encode_state = nn.Linear(4, d_model)
        self.encode_action = nn.Embedding(2, d_model)
        self.decode_patch = nn.Sequential(nn.LayerNorm(d_model), nn.Linear(d_model, PATCH * PATCH))
        self.decode_state = nn.Sequential(nn.LayerNorm(d_model), nn.Linear(d_model, 4))
        for decoder in (self.decode_patch, self.decode_state):
            nn.init.zeros_(decoder[-1].weight)
            nn.init.zeros_(decoder[-1].bias)

    def forward(self, video: Tensor, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """video (B, 16, 16, 24) in [0, 1], states (B, 16, 4) standardised, actions (B, 16) in {0, 1}.

        Returns the predicted second half of both: (B, 8, 16, 24) and (B, 8, 4). What video and states hold there is
        not looked at.
        """
        batch = video.shape[0]
        patches = rearrange(video, "b t (row p) (column q) -> b t row column (p q)", p=PATCH, q=PATCH)
        x = self.canvas.create_empty(batch)
        x = self.add(x, "video", self.encode_patch(hold_present(patches)))
        x = self.add(x, "proprioception", self.encode_state(hold_present(states)))
        x = self.add(x, "action", self.encode_action(actions))
        for block in self.blocks:
            x = block(x)

        patches = self.decode_patch(self.canvas.extract(x, "video"))
        pixels = rearrange(patches, "b (t row column) (p q) -> b t (row p) (column q)", t=FRAMES, row=ROWS, p=PATCH)
        change = self.decode_state(self.canvas.extract(x, "proprioception"))
        last_video, last_states = video[:, OBSERVED - 1, None], states[:, OBSERVED - 1, None]
        return last_video + pixels[:, OBSERVED:], last_states + change[:, OBSERVED:]

    def add(self, x: Tensor, name: str, embeddings: Tensor) -> Tensor:
        """Place embeddings (B, frames, …, d_model) in a region, on top of each position's place in space and time."""
        return self.canvas.place(x, self.canvas.extract(x, name) + embeddings.flatten(1, -2), name)


def hold_present(x: Tensor) -> Tensor:
    """(B, 16, …) with every frame after the observed ones replaced by the last one observed."""
    future = x[:, OBSERVED - 1, None].expand_as(x[:, OBSERVED:])
    return torch.cat([x[:, :OBSERVED], future], dim=1)
