"""The pictures of docs/gallery.md, and that page: ``make gallery``.

Each picture is drawn by the lines that stand below it: this file runs the page's own text. ``python -m scripts.gallery
--hero`` draws README's picture, which is a file of the repository, again.
"""

from __future__ import annotations

import sys
import textwrap
from io import BytesIO
from pathlib import Path

import matplotlib

matplotlib.use("agg")

from canvas_engineering import draw
from canvas_engineering.files import replace_file

DOCS = Path(__file__).resolve().parent.parent / "docs"
CASES: list[tuple[str, str, str]] = [
    (
        "robot",
        "A robot's canvas: camera, actions, a reward at the end, a plan at a quarter of the rate",
        """
        from canvas_engineering import CanvasLayout, RegionSpec, draw

        layout = CanvasLayout(T=8, d_model=64, spatial_shape=(10, 8), regions={
            "camera": (0, 8, 0, 6, 0, 8), "action": (0, 8, 6, 7, 0, 2), "reward": (7, 8, 7, 8, 0, 2),
            "plan": RegionSpec((0, 2, 8, 10, 0, 8), period=4),
        })
        figure = draw.volume_figure(layout)
        """,
    ),
    (
        "computer",
        "An agent at a computer, from examples/define_canvas.py",
        """
        from canvas_engineering import draw
        from examples.define_canvas import computer

        figure = draw.volume_figure(computer().layout)
        """,
    ),
    (
        "team",
        "Two robots and the task that they share",
        """
        from canvas_engineering import draw
        from examples.define_canvas import team

        figure = draw.layout_figure(team().layout)
        """,
    ),
    (
        "constructors",
        "Topologies by constructor: a hub and its spokes (others: dense, isolated, causal_chain, causal_temporal)",
        """
        from canvas_engineering import CanvasTopology, draw

        topology = CanvasTopology.hub_spoke("task", ["arm_1", "arm_2", "camera", "goal"])
        figure = draw.topology_figure(topology)
        """,
    ),
    (
        "causal",
        "causal_temporal: each region attends to its own frame, and to the frame before of all",
        """
        from canvas_engineering import CanvasTopology, draw

        figure = draw.topology_figure(CanvasTopology.causal_temporal(["camera", "action", "plan"]))
        """,
    ),
    *(
        (
            f"fill_{fill}",
            f"Temporal fill: {what}",
            f"""
        from canvas_engineering import CanvasLayout, Connection, RegionSpec, draw

        regions = {{"camera": (0, 9, 0, 4), "plan": RegionSpec((0, 3, 4, 5), period=4)}}
        layout = CanvasLayout(T=9, d_model=8, spatial_shape=(5,), regions=regions)
        figure = draw.frames_figure(layout, Connection("camera", "plan", t_src=0, t_dst=0, temporal_fill="{fill}"))
        """,
        )
        for fill, what in (
            ("drop", "frames that the plan does not have are left out"),
            ("hold", "the latest earlier frame is held (the default)"),
            ("interpolate", "the frames before and after, by distance"),
        )
    ),
    (
        "surgical",
        "Coarse-graining: a surgical robot's arms meet through coarse fields",
        """
        from canvas_engineering import draw
        from examples.surgical_robot import declare

        figure = draw.topology_figure(declare().topology)
        """,
    ),
    (
        "fleet",
        "Coarse-graining: three vehicles and their dispatcher, as a block table",
        """
        from canvas_engineering import compile_attention, draw
        from examples.fleet import declare

        bound = declare(3, T=2, d_model=64)
        figure = draw.plan_figure(compile_attention(bound.layout, bound.topology))
        """,
    ),
    (
        "cogvideox",
        "CogVideoX, 49 frames of 480 × 720: each frame attends to itself, the frame before and the text",
        """
        from canvas_engineering import CanvasAttnProcessor, cogvideox_layout, draw, window_topology

        config = {"num_attention_heads": 30, "attention_head_dim": 64, "patch_size": 2, "patch_size_t": None,
                  "temporal_compression_ratio": 4, "max_text_seq_length": 226}
        layout = cogvideox_layout(config, 480, 720, 49)
        figure = draw.plan_figure(CanvasAttnProcessor(layout, window_topology(past=1)).plan)
        """,
    ),
    *(
        (
            f"topology_{name}",
            f"Video topologies: {title}",
            f"""
        from canvas_engineering import draw, video_layout
        from canvas_engineering.models import topologies
        from canvas_engineering.models.tokens import token_plan

        config = {{"_class_name": "WanTransformer3DModel", "patch_size": (1, 2, 2), "in_channels": 16,
                  "num_attention_heads": 12, "attention_head_dim": 128}}
        layout = video_layout(config, 192, 256, 33)   # 9 × 12 × 16 tokens
        layout, topology = topologies.{name}(layout{arguments})
        figure = draw.plan_figure(token_plan(layout, topology, ("video",)))
        """,
        )
        for name, arguments, title in (
            ("window", ", past=2, future=1", "window, a frame attends to two before and one after it"),
            ("previous_frame", "", "previous_frame, a frame attends to itself and the one before"),
            ("spatial_tiles", ", 4, 4", "spatial_tiles, a tile attends to itself in all frames"),
            ("sliding_tiles", ", (3, 4, 4), (1, 1, 1)", "sliding_tiles (STA), a tile attends to the tiles around it"),
            ("radial", ", 4, 4", "radial, the window around a tile halves as frames get more distant"),
            ("first_frame_and_text_global", "", "first_frame_and_text_global, the first frame is global"),
            ("block_causal", ", 3", "block_causal, blocks of three frames attend to what came before"),
        )
    ),
    (
        "distances",
        "Transfer distances between what regions mean (the embeddings here are made by hand)",
        """
        from canvas_engineering import CanvasLayout, RegionSpec, draw

        meanings = {"camera": (1, 0, 0.1), "depth": (0.9, 0.1, 0.2), "joints": (0, 1, 0.1), "gripper": (0.1, 0.9, 0.3)}
        layout = CanvasLayout(T=1, d_model=8, spatial_shape=(4,), regions={
            name: RegionSpec((0, 1, i, i + 1), semantic_embedding=vector, embedding_model="by hand")
            for i, (name, vector) in enumerate(meanings.items())
        })
        figure = draw.distance_figure(layout)
        """,
    ),
    (
        "alignment",
        "Two agents' schemas, aligned by meaning",
        """
        from canvas_engineering import CanvasLayout, CanvasSchema, RegionSpec, draw


        def agent(**meanings):
            return CanvasSchema(CanvasLayout(T=1, d_model=8, spatial_shape=(8,), regions={
                name: RegionSpec((0, 1, i, i + 1), semantic_embedding=vector, embedding_model="by hand")
                for i, (name, vector) in enumerate(meanings.items())
            }))


        arm = agent(camera=(1, 0, 0.1), joints=(0, 1, 0.1), force=(0.1, 0.5, 1))
        hand = agent(rgb=(0.9, 0.1, 0.1), fingers=(0.1, 1, 0.2), touch=(0, 0.4, 1), goal=(0.5, 0.5, 0.5))
        figure = draw.alignment_figure(arm, hand)
        """,
    ),
    (
        "loops",
        "A looped block: its output moves away from the stock block's as the gates of its loops open in training",
        """
        import torch
        from canvas_engineering import LoopedBlockWrapper
        from matplotlib.figure import Figure

        torch.manual_seed(0)
        block = LoopedBlockWrapper(torch.nn.Linear(16, 16), max_loops=3, embed_dim=16)
        block.set_loops(3)
        x, target, shares = torch.randn(64, 16), torch.randn(64, 16), []
        optimizer = torch.optim.Adam([p for name, p in block.named_parameters() if "loop" in name], 0.05)
        for _ in range(60):
            optimizer.zero_grad()
            (block(x) - target).square().mean().backward()
            optimizer.step()
            shares.append(block.loop_gate.detach().flatten().tanh().tolist())
        figure = Figure(figsize=(6, 3), layout="constrained")
        axes = figure.subplots()
        axes.plot(shares, label=[f"loop {i + 1}" for i in range(3)])
        axes.set(xlabel="training step", ylabel="tanh(gate): share of each loop")
        axes.legend()
        """,
    ),
]
TURNING = ("robot", 24)
"""Which layout also turns, in how many pictures."""


def run(code: str) -> dict:
    """The names that a case's lines leave."""
    names: dict = {}
    exec(compile(code, "docs/gallery.md", "exec"), names)
    return names


def picture(figure, crop: str | None = "tight", dpi: int = 90) -> bytes:
    """A figure as PNG."""
    file = BytesIO()
    figure.savefig(file, format="png", dpi=dpi, bbox_inches=crop)
    return file.getvalue()


def turning(layout, count: int) -> bytes:
    """The layout from all sides, as an animated GIF."""
    from PIL import Image

    views = (picture(draw.volume_figure(layout, azimuth=-60 + 360 * i / count), None) for i in range(count))
    first, *rest = (Image.open(BytesIO(view)).convert("P", palette=Image.Palette.ADAPTIVE) for view in views)
    file = BytesIO()
    first.save(file, format="GIF", save_all=True, append_images=rest, duration=120, loop=0)
    return file.getvalue()


def hero() -> bytes:
    """README's picture: the demo's canvas, its topology and its block table, side by side."""
    from PIL import Image

    from canvas_engineering import compile_attention
    from examples.cartpole_model import declare

    layout, topology = declare(96)
    plan = compile_attention(layout, topology)
    volume, pairs, table = draw.volume_figure(layout), draw.topology_figure(topology), draw.plan_figure(plan)
    volume.axes[0].set_title(f"{len(layout.regions)} regions on frames × rows × columns", fontsize=10)
    # the topology beside it names the connections; the table takes the colour of the region that is attended to
    table.axes[0].get_legend().remove()
    colours = dict(zip(layout.regions, matplotlib.colormaps["tab20"].colors))
    table.axes[0].collections[0].set_facecolor([colours[plan.connections[i].dst] for i in plan.table.edge.tolist()])
    title = table.axes[0].get_title().replace("form, ", "form\n")
    table.axes[0].set_title(f"{title}\ncoloured by key/value region", fontsize=9)
    sizes = {volume: (5.6, 4.4), pairs: (5.4, 4.6), table: (4.6, 4.6)}
    panels = []
    for figure, inches in sizes.items():
        figure.set_size_inches(inches)
        panels.append(Image.open(BytesIO(picture(figure, dpi=150))).convert("RGB"))
    height = max(panel.height for panel in panels)
    sheet = Image.new("RGB", (sum(panel.width for panel in panels) + 40, height), "white")
    left = 0
    for panel in panels:
        sheet.paste(panel, (left, (height - panel.height) // 2))
        left += panel.width + 20
    file = BytesIO()
    sheet.save(file, format="PNG", optimize=True)
    return file.getvalue()


def main(folder: Path = DOCS) -> None:
    """Draws all pictures into ``folder/gallery`` and writes ``folder/gallery.md``."""
    (folder / "gallery").mkdir(parents=True, exist_ok=True)
    page = ["# Gallery", "", "Written by `make gallery`, which runs the lines below each picture.", ""]
    for name, title, text in CASES:
        code = textwrap.dedent(text).strip()
        names = run(code)
        replace_file(folder / "gallery" / f"{name}.png", picture(names["figure"]))
        page += [f"## {title}", "", f"![{title}](gallery/{name}.png)", ""]
        if name == TURNING[0]:
            replace_file(folder / "gallery" / f"{name}.gif", turning(names["layout"], TURNING[1]))
            page += [f"![The same, turning](gallery/{name}.gif)", ""]
        page += ["```python", code, "```", ""]
    replace_file(folder / "gallery.md", "\n".join(page).encode())


if __name__ == "__main__":
    if sys.argv[1:] == ["--hero"]:
        replace_file(DOCS / "hero.png", hero())
    else:
        main(*map(Path, sys.argv[1:]))
