"""A world model that thinks when it is surprised: ``python examples/belief_world.py``.

A cart (gymnasium's CartPole) whose motor changes strength now and then, unseen. The model predicts how the state will
change; for that it must infer the motor's strength from recent transitions. They lie in a memory region, which a belief
region digests: nearly all of the attention. Both are scheduled by an event clock: they update when the prediction
error, a running average, is high, or after so many steps of silence. Between updates the prediction attends to the
belief as it stands. Printed are how many region updates that skips, and errors and times with and without it, step by
step in turns over the same simulated motion.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, replace

import gymnasium
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from canvas_engineering import (
    AttentionDispatcher,
    BoundSchema,
    CanvasProgram,
    ClockMaxSilence,
    ClockSpec,
    ConnectionProgram,
    ConnectivityPolicy,
    Field,
    RegionScheduler,
    ResidualAccumulator,
    ResidualSpec,
    clock_on,
    compile_program,
)

TOKENS, D_MODEL, HEADS, BLOCKS = 4, 32, 4, 2
WINDOW, TIMES = 24, 30
FORCES = (3.0, 30.0)
CHANGE_EVERY, SILENCE = 60, 40
THOUGHT = ("memory", "belief")


class World:
    """Field by field: what was seen lately, what is made of it, and the moment."""

    def __init__(self, window: int, tokens: int) -> None:
        self.belief = Field(2, 8, family="state", tags=("belief",))
        self.memory = Field(window, tokens, family="memory")
        self.error = Field(1, 4, family="residual")
        self.moment = Field(1, 2, family="observation")
        self.action = Field(1, 1, family="action")


def declare(window: int, tokens: int = TOKENS) -> tuple[BoundSchema, CanvasProgram]:
    """The canvas of so many transitions, at so many positions each, and how its edges behave: everything goes through
    the belief; errors correct it behind a learned gate while there are any to speak of, and the action is what the
    belief makes of it."""
    bound, program = compile_program(World(window, tokens), d_model=D_MODEL, connectivity=ConnectivityPolicy("star"))
    program.connections["belief", "error"] = ConnectionProgram("correct", "moment.prediction > 0.05", "gate")
    program.connections["action", "belief"] = ConnectionProgram("act")
    return bound, program


def scheduled(program: CanvasProgram, threshold: float) -> CanvasProgram:
    """The program with the memory and the belief on a clock that prediction errors above ``threshold`` fire."""
    clock = ClockSpec(expr=ClockMaxSilence(clock_on("moment.prediction", gt=threshold), SILENCE))
    clocked = {name: replace(program.regions[name], clock=clock) for name in THOUGHT}
    return CanvasProgram(program.schema, {**program.regions, **clocked}, program.connections)


# -- data


def record(steps: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """States (steps, 4), actions (steps, 1) of ±1, and changes of state (steps, 4), under random actions and a motor
    whose strength changes every `CHANGE_EVERY` steps or so."""
    rng = np.random.default_rng(seed)
    env = gymnasium.make("CartPole-v1")
    state, _ = env.reset(seed=seed)
    states, actions, changes = np.empty((steps, 4)), np.empty((steps, 1)), np.empty((steps, 4))
    env.unwrapped.force_mag = rng.uniform(*FORCES)
    for t in range(steps):
        if rng.random() < 1 / CHANGE_EVERY:
            env.unwrapped.force_mag = rng.uniform(*FORCES)
        action = int(rng.integers(2))
        following, _, ended, cut, _ = env.step(action)
        states[t], actions[t], changes[t] = state, 2 * action - 1, following - state
        state = env.reset()[0] if ended or cut else following
    env.close()
    return states.astype(np.float32), actions.astype(np.float32), changes.astype(np.float32)


@dataclass
class Motion:
    """Recorded motion in units of its own spread, and the last ``window`` transitions before each step."""

    states: torch.Tensor
    actions: torch.Tensor
    changes: torch.Tensor
    window: int

    @classmethod
    def of(cls, steps: int, seed: int, window: int, like: tuple[np.ndarray, np.ndarray] | None = None):
        states, actions, changes = record(steps, seed)
        spread = (states.std(0), changes.std(0)) if like is None else like
        tensors = (states / spread[0], actions, changes / spread[1])
        return cls(*map(torch.from_numpy, tensors), window), spread

    def before(self, t: torch.Tensor) -> torch.Tensor:
        """(n, window, 9): state, action and change in its direction, of the transitions before steps ``t`` (n,)."""
        every = torch.cat([self.states, self.actions, self.actions * self.changes], 1)
        return every[t[:, None] + torch.arange(-self.window, 0)]


# -- model


class Thinker(nn.Module):
    """A canvas transformer whose memory and belief may rest: what does not update keeps its canvas."""

    def __init__(self, bound: BoundSchema, program: CanvasProgram, window: int):
        super().__init__()
        topology, layout = bound.topology, bound.layout
        tokens = layout.region_numel("memory") // window
        self.summary = ResidualAccumulator(["moment"], ResidualSpec(decay=0.5))
        self.norms = nn.ModuleList(nn.LayerNorm(D_MODEL) for _ in range(BLOCKS))
        options = {"program": program, "residual_accumulator": self.summary}
        self.blocks = nn.ModuleList(
            AttentionDispatcher(topology, layout, D_MODEL, HEADS, **options) for _ in range(BLOCKS)
        )
        self.transition = nn.Linear(9, tokens * D_MODEL)
        self.place = nn.Parameter(0.02 * torch.randn(window * tokens, D_MODEL))
        self.belief = nn.Parameter(0.02 * torch.randn(layout.region_numel("belief"), D_MODEL))
        self.moment, self.error = nn.Linear(5, 2 * D_MODEL), nn.Linear(4, 4 * D_MODEL)
        self.action = nn.Linear(1, D_MODEL)
        self.head = nn.Sequential(nn.Linear(2 * D_MODEL + 5, 64), nn.GELU(), nn.Linear(64, 8))
        self.rows = {name: layout.region_index(name) for name in bound.field_names}
        self.n_positions = layout.num_positions
        self.seconds = 0.0

    def empty(self, batch: int) -> torch.Tensor:
        return torch.zeros(batch, self.n_positions, D_MODEL)

    def forward(self, canvas, active, window, state, action, error):
        """(canvas, predicted change (B, 4)) after a step in which the regions ``active`` (names, or None) update."""
        given = torch.cat([state, action], 1)
        written = {
            "moment": self.moment(given).unflatten(1, (2, -1)),
            "error": self.error(error).unflatten(1, (4, -1)),
            "action": self.action(action).unflatten(1, (1, -1)),
        }
        if active is None or "memory" in active:
            written["memory"] = self.transition(window).unflatten(2, (-1, D_MODEL)).flatten(1, 2) + self.place
        if active is None or "belief" in active:
            written["belief"] = self.belief.expand(len(state), -1, -1)
        for name, content in written.items():
            canvas = canvas.index_copy(1, self.rows[name], content)
        for norm, block in zip(self.norms, self.blocks):
            normed = norm(canvas)
            start = time.perf_counter()
            canvas = block(normed, active, add_to=canvas)
            self.seconds += time.perf_counter() - start
        seen = canvas.index_select(1, self.rows["moment"]).flatten(1)
        drift, push = self.head(torch.cat([seen, given], 1)).chunk(2, 1)
        return canvas, drift + action * push


def enlarged(model: Thinker, window: int, times: int) -> Thinker:
    """The same function on a canvas with every position of the memory ``times`` over: of equal keys, attention takes
    the mean. It stands for a memory as large as a camera's would be, without the hours that training one takes."""
    bound, program = declare(window, TOKENS * times)
    found, state = Thinker(bound, program, window), model.state_dict()
    state["place"] = state["place"].repeat_interleave(times, 0)
    for name in ("transition.weight", "transition.bias"):
        by_token = state[name].unflatten(0, (TOKENS, D_MODEL))
        state[name] = by_token.repeat_interleave(times, 0).flatten(0, 1)
    found.load_state_dict(state)
    return found


def train(model: Thinker, motion: Motion, steps: int, batch: int = 16) -> None:
    """Predictions with a fresh belief, with one that is some steps old, and with one that errors correct."""
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=max(steps, 1))
    generator = torch.Generator().manual_seed(0)
    resting = {"error", "moment", "action"}
    for _ in range(steps):
        t = torch.randint(motion.window, len(motion.states) - 8, (batch,), generator=generator)
        canvas, error, losses = model.empty(batch), torch.zeros(batch, 4), []
        for ahead, active in ((0, None), (3, resting), (4, None)):
            now = t + ahead
            window = motion.before(now) if active is None else None
            canvas, found = model(canvas, active, window, motion.states[now], motion.actions[now], error)
            error = (found - motion.changes[now]).detach()
            model.summary.update("moment", error)
            # a sudden end of an episode is no motion: large errors count linearly
            losses.append(F.smooth_l1_loss(found, motion.changes[now], beta=0.3))
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()
        schedule.step()


# -- with and without skipping


@dataclass
class Run:
    """One way of scheduling, along a motion: what it saw, and what it cost."""

    model: Thinker
    scheduler: RegionScheduler | None
    canvas: torch.Tensor
    error: torch.Tensor
    summary: torch.Tensor
    updates: int = 0
    attention_seconds: float = 0.0
    step_seconds: float = 0.0

    @classmethod
    def of(cls, model: Thinker, program: CanvasProgram | None) -> Run:
        scheduler = None if program is None else RegionScheduler(program)
        return cls(model, scheduler, model.empty(1), torch.zeros(1, 4), torch.zeros_like(model.summary.values))

    def step(self, motion: Motion, t: int) -> float:
        """Squared error of the prediction at step ``t``."""
        model, now = self.model, torch.tensor([t])
        model.summary.values.copy_(self.summary)
        model.seconds, start = 0.0, time.perf_counter()
        names = set(model.rows)
        active = names if self.scheduler is None else self.scheduler.step(t, model.summary.summaries())
        window = motion.before(now) if active & set(THOUGHT) else None
        self.canvas, found = model(self.canvas, active, window, motion.states[now], motion.actions[now], self.error)
        self.error = found - motion.changes[now]
        model.summary.update("moment", self.error)
        self.step_seconds += time.perf_counter() - start
        self.attention_seconds += model.seconds
        self.updates += len(active & set(THOUGHT))
        self.summary = model.summary.summary_tensor()
        return self.error.square().mean().item()


@torch.no_grad()
def compare(model: Thinker, motion: Motion, programs: dict[str, CanvasProgram | None]) -> dict[str, tuple[Run, list]]:
    """Every way of scheduling along the motion, taking turns at each step: runs and squared errors by name."""
    model.eval()
    runs = {name: (Run.of(model, program), []) for name, program in programs.items()}
    for t in range(motion.window, len(motion.states)):
        for run, errors in runs.values():
            errors.append(run.step(motion, t))
    return runs


@torch.no_grad()
def typical_error(model: Thinker, motion: Motion, quantile: float) -> float:
    """The error summary that is not exceeded at ``quantile`` of all steps while everything updates."""
    run, found = Run.of(model, None), []
    for t in range(motion.window, len(motion.states)):
        run.step(motion, t)
        found.append(run.summary.item())
    return float(np.quantile(found, quantile))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("belief_world", description=__doc__)
    parser.add_argument("--steps", type=int, default=200, help="of training")
    parser.add_argument("--window", type=int, default=WINDOW, help="transitions in the memory")
    parser.add_argument("--times", type=int, default=TIMES, help="copies of the memory's positions when comparing")
    parser.add_argument("--length", type=int, default=200, help="steps of motion to compare on")
    parser.add_argument("--threads", type=int, default=1, help="more wait for each other in steps as short as a rest's")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    bound, program = declare(options.window)
    motion, spread = Motion.of(8_000, 0, options.window)
    model = Thinker(bound, program, options.window)
    train(model, motion, options.steps)
    model = enlarged(model, options.window, options.times)
    bound, program = declare(options.window, TOKENS * options.times)
    print(f"{program.summary()}\n{bound.summary()}\n{model.blocks[0].plan.summary()}")
    quiet, _ = Motion.of(options.window + max(20, options.length // 4), 1, options.window, spread)
    threshold = typical_error(model.eval(), quiet, 0.85)
    stream, _ = Motion.of(options.window + options.length, 2, options.window, spread)
    ways = {"always": None, "when surprised": scheduled(program, threshold), "once": scheduled(program, 1e9)}
    runs = compare(model, stream, ways)
    possible = options.length * len(THOUGHT)
    print(f"the clock fires above an error of {threshold:.3f}, or after {SILENCE} steps")
    for name, (run, errors) in runs.items():
        print(
            f"{name:>15}: {possible - run.updates:4d} of {possible} updates of {' and '.join(THOUGHT)} skipped, error "
            f"{np.median(errors) ** 0.5:.3f}, attention {1e3 * run.attention_seconds / options.length:.2f} ms of "
            f"{1e3 * run.step_seconds / options.length:.2f} ms a step"
        )
    (always, _), (surprised, _) = runs["always"], runs["when surprised"]
    cut = 1 - surprised.attention_seconds / always.attention_seconds
    print(f"skipping {1 - surprised.updates / possible:.0%} of the updates cuts the time of attention by {cut:.0%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
