"""Graft loops onto a video model and train them: ``python examples/quickstart.py`` (extra ``cogvideox``)."""

from __future__ import annotations

import argparse

import torch
from diffusers import CogVideoXTransformer3DModel

from canvas_engineering import CurriculumScheduler, graft_looped_blocks


def train(steps: int = 12) -> list[float]:
    """The loss of every step. The model is small and random, and so are its clips: weights of a real one come by
    ``CogVideoXTransformer3DModel.from_pretrained("THUDM/CogVideoX-2b", subfolder="transformer")``."""
    torch.manual_seed(0)
    transformer = CogVideoXTransformer3DModel(
        num_layers=2, num_attention_heads=2, attention_head_dim=16, text_embed_dim=64, max_text_seq_length=16
    )
    blocks, action_head = graft_looped_blocks(transformer, max_loops=3, action_dim=7, freeze="full")
    parameters = [p for module in (transformer, action_head) for p in module.parameters() if p.requires_grad]
    print(f"{sum(p.numel() for p in parameters):,} parameters train")
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    curriculum, losses = CurriculumScheduler(max_loops=3, total_steps=steps), []
    video, text = torch.randn(2, 5, 16, 8, 12), torch.randn(2, 16, 64)  # (clips, frames, channels, rows, columns)
    actions = torch.randn(2, 7)
    for step in range(steps):
        loops = curriculum.step(blocks, step)
        noise = transformer(video, text, timestep=torch.tensor([500, 500])).sample
        loss = (action_head(noise) - actions).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        print(f"step {step}: {loops} loops, loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12)
    train(parser.parse_args().steps)
