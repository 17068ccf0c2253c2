"""CanvasModel: coders that are inverse in layout, losses of what is unknown alone, flow matching that learns."""

from __future__ import annotations

import pytest
import torch

from canvas_engineering import CanvasLayout, CanvasTopology, RegionSpec
from examples.canvas_model import CanvasModel, Coder

T, KNOWN = 4, {"camera": 1, "action": 0}
SHAPES = {"camera": (3, 4, 6), "action": (2,)}


TOPOLOGY = CanvasTopology.dense(["camera", "action"])


def layout(carrier="deterministic"):
    regions = {"camera": (0, T, 0, 2, 0, 3), "action": RegionSpec((0, T, 2, 3, 0, 2), carrier=carrier, loss_weight=2.0)}
    return CanvasLayout(T=T, d_model=32, spatial_shape=(3, 3), regions=regions, t_current=2)


def model(carrier="deterministic", depth=1):
    torch.manual_seed(0)
    canvas = layout(carrier)
    net = CanvasModel(canvas, TOPOLOGY, SHAPES, KNOWN, SHAPES, depth)
    for coder in net.coders.values():  # which start at nothing: the last known frame is what is predicted
        torch.nn.init.normal_(coder.out.weight, std=0.1)
    return net


def clips(count=3):
    generator = torch.Generator().manual_seed(1)
    clip = {name: torch.randn(count, T, *shape, generator=generator) for name, shape in SHAPES.items()}
    return clip, {name: torch.ones(count, T, dtype=torch.bool) for name in SHAPES}


def test_patches_are_encoded_and_decoded_in_one_order():
    coder = Coder("camera", layout(), SHAPES["camera"])
    size = coder.into.in_features
    with torch.no_grad():  # the identity on the first channels of a position
        coder.into.weight.copy_(torch.eye(32, size))
        coder.out.weight.copy_(torch.eye(size, 32))
        coder.into.bias.zero_()
        coder.out.bias.zero_()
    values = clips()[0]["camera"]
    encoded = coder.encode(values)
    assert encoded.shape == (3, T, 6, 32)
    # position (0, 1) holds columns 2 and 3 of the first two rows
    torch.testing.assert_close(encoded[0, 0, 1, :size], values[0, 0, :, 0:2, 2:4].flatten())
    torch.testing.assert_close(coder.decode(encoded.flatten(1, 2)), values)
    with pytest.raises(ValueError, match=r"\[2, 3\] cells cannot hold 5 × 6 pixels"):
        Coder("camera", layout(), (3, 5, 6))


def test_what_is_known_enters_and_what_is_not_does_not():
    net, (clip, mask) = model(), clips()
    _, errors = net.loss(clip, mask)
    other = {name: x.clone() for name, x in clip.items()}
    other["camera"][:, 2:] += 1.0  # unknown: an input that must not matter
    t = torch.zeros(3)
    for name, found in net(other, {}, t).items():
        torch.testing.assert_close(found, net(clip, {}, t)[name])
    other["camera"][:, 1] += 1.0
    assert not torch.allclose(net(other, {}, t)["action"], net(clip, {}, t)["action"])
    found = net(clip, {}, t)
    expected = (found["action"] - clip["action"])[:, 1:].square().mean()
    assert errors["action"] == pytest.approx(expected.item(), rel=1e-5)
    total, _ = net.loss(clip, mask)
    assert total.item() == pytest.approx(errors["camera"] + 2 * errors["action"], rel=1e-5)
    mask["action"][:, 2:] = False  # no samples there
    _, errors = net.loss(clip, mask)
    assert errors["action"] == pytest.approx((found["action"] - clip["action"])[:, 1].square().mean().item(), rel=1e-5)
    filled = net.predict(clip)
    torch.testing.assert_close(filled["camera"][:, :2], clip["camera"][:, :2])
    torch.testing.assert_close(filled["action"][:, 1:], found["action"][:, 1:])


def test_flow_matching_learns_a_distribution_that_regression_would_average():
    """Actions are +1 or −1 by a coin: samples lie near one of them, not at their mean."""
    net = model("diffusive")
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(2)

    def coins(count):
        sign = torch.randint(0, 2, (count, 1, 1), generator=generator) * 2.0 - 1.0
        return {"camera": torch.zeros(count, T, *SHAPES["camera"]), "action": sign.expand(-1, T, 2) * torch.ones(T, 2)}

    mask = {name: torch.ones(64, T, dtype=torch.bool) for name in SHAPES}
    for _ in range(250):
        clip = coins(64)
        clip["action"][:, 0] = 0.0  # the known frame does not tell
        optimizer.zero_grad()
        net.loss(clip, mask)[0].backward()
        optimizer.step()
    clip = coins(128)
    clip["action"][:, 0] = 0.0
    samples = net.predict(clip, steps=16)["action"][:, 1:]
    assert samples.abs().mean() > 0.6
    share = (samples.mean((1, 2)) > 0).float().mean()
    assert 0.2 < share < 0.8


def test_a_new_model_repeats_the_last_known_frame_of_what_is_held():
    canvas = layout()
    net, (clip, _) = CanvasModel(canvas, TOPOLOGY, SHAPES, KNOWN, ["camera"], 1), clips()
    filled = net.predict(clip)
    torch.testing.assert_close(filled["camera"][:, 2:], clip["camera"][:, 1:2].expand(-1, 2, -1, -1, -1))
    torch.testing.assert_close(filled["action"][:, 1:], torch.zeros_like(clip["action"][:, 1:]))  # not held
