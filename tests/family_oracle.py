"""What each attention function gives for one read, in plain float64 and plain loops, from the published equations.

It reads tensors by their names in a state dict, and nothing of the library.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F

WORD = (1 << 64) - 1


def oracle(fn, state_dict, x_q, x_k, n_heads=1, **context) -> torch.Tensor:
    """Output (B, n, d) in float64 of function `fn` for queries x_q (B, n, d) over keys = values x_k (B, m, d).

    `state_dict` holds the module's parameters by name; where they require grad, so does the result. `context` are the
    constructor arguments that no tensor's shape tells, published values by default: top_k=8, window_size=8,
    n_random=8, top_k_experts=2, max_len=4096; or ``seen``, bool (n, m), for windows. Rows without a key are 0.
    """
    parameters = {name: t.double() if t.is_floating_point() else t for name, t in state_dict.items()}
    return FUNCTIONS[fn](parameters, x_q.double(), x_k.double(), n_heads, **context)


def seen_pairs(fn, queries, keys, shape=(), window_size=None):
    """bool (n, m): which keys each query of a read sees, both given by position on a canvas of ``shape``, frames first;
    None where all see all. Without a shape they are counted in order."""
    if isinstance(FUNCTIONS[fn], functools.partial):
        window_size = FUNCTIONS[fn].keywords["window_size"]
    elif FUNCTIONS[fn] is not local:
        return None
    slots = max(keys) >= math.prod(shape)
    if window_size is None and not slots and len(shape) > 2:
        window_size = (1, *[8] * (len(shape) - 1))
    if isinstance(window_size, tuple) and not slots:
        return grid_window(queries, keys, shape, window_size)
    if isinstance(window_size, tuple):
        window_size = window_size[-1]
    return window(len(queries), len(keys), 8 if window_size is None else window_size)


def _part(parameters, prefix):
    return {name[len(prefix) :]: t for name, t in parameters.items() if name.startswith(prefix)}


def _linear(parameters, name, x):
    out = x @ parameters[f"{name}.weight"].T
    return out + parameters[f"{name}.bias"] if f"{name}.bias" in parameters else out


def _heads(x, n_heads):
    return torch.stack(x.chunk(n_heads, dim=-1), 1)  # [B, h, n, d/h]


def _merge(x):
    return torch.cat(list(x.unbind(1)), dim=-1)


def _qkv(p, x_q, x_k, n_heads):
    return (_heads(_linear(p, name, x), n_heads) for name, x in (("q_proj", x_q), ("k_proj", x_k), ("v_proj", x_k)))


# -- over all keys -----------------------------------------------------------------------------------------------------


def cross(p, x_q, x_k, n_heads, seen=None):
    """`seen`: bool (n, m) or (B, h, n, m), the pairs that count; rows without any give 0, before and after out_proj."""
    q, k, v = _qkv(p, x_q, x_k, n_heads)
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if seen is None:
        return _linear(p, "out_proj", _merge(logits.softmax(-1) @ v))
    seen = seen.expand(logits.shape)
    any_key = seen.any(-1, keepdim=True)
    weights = logits.masked_fill(~seen & any_key, -math.inf).softmax(-1)
    out = _linear(p, "out_proj", _merge(weights @ v))
    return torch.where(any_key[:, 0], out, torch.zeros_like(out))


def cosine(p, x_q, x_k, n_heads):
    q, k, v = _qkv(p, x_q, x_k, n_heads)
    q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    return _linear(p, "out_proj", _merge((p["temperature"] * (q @ k.transpose(-1, -2))).softmax(-1) @ v))


def sigmoid(p, x_q, x_k, n_heads):
    q, k, v = _qkv(p, x_q, x_k, n_heads)
    weights = torch.sigmoid(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]))
    return _linear(p, "out_proj", _merge(weights @ v))


def linear(p, x_q, x_k, n_heads):
    q, k, v = _qkv(p, x_q, x_k, n_heads)
    q, k = (F.elu(x) + 1 for x in (q, k))
    weights = q @ k.transpose(-1, -2)
    return _linear(p, "out_proj", _merge((weights @ v) / (weights.sum(-1, keepdim=True) + 1e-6)))


def sparse(p, x_q, x_k, n_heads, top_k=8):
    q, k, _ = _qkv(p, x_q, x_k, n_heads)
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    threshold = logits.sort(dim=-1, descending=True).values[..., min(top_k, x_k.shape[1]) - 1]
    return cross(p, x_q, x_k, n_heads, logits >= threshold[..., None])


def gated(p, x_q, x_k, n_heads):
    return torch.sigmoid(p["gate"]) * cross(_part(p, "cross_attn."), x_q, x_k, n_heads)


def pooling(p, x_q, x_k, n_heads):
    return _linear(p, "proj", x_k.mean(1, keepdim=True)).expand(-1, x_q.shape[1], -1)


def copy(p, x_q, x_k, n_heads):
    rows = [x_k[:, i] if i < x_k.shape[1] else torch.zeros_like(x_q[:, 0]) for i in range(x_q.shape[1])]
    return torch.stack(rows, 1)


def perceiver(p, x_q, x_k, n_heads):
    latents = p["latents"].expand(len(x_k), -1, -1)
    compressed = cross(_part(p, "compress."), latents, x_k, n_heads)
    return cross(_part(p, "readout."), x_q, compressed, n_heads)


def mixture(p, x_q, x_k, n_heads, top_k_experts=2):
    m = x_k.shape[1]
    router = _linear(p, "router", x_q)  # [B, n, E]
    n_experts = router.shape[-1]
    size = max(1, m // n_experts)
    starts = [min(e * size, m) for e in range(n_experts)]
    stops = [min((e + 1) * size, m) for e in range(n_experts - 1)] + [m]
    filled = [e for e in range(n_experts) if starts[e] < stops[e]]
    outputs = {e: cross(_part(p, f"experts.{e}."), x_q, x_k[:, starts[e] : stops[e]], n_heads) for e in filled}
    rows = []
    for b in range(len(x_q)):
        for i in range(x_q.shape[1]):
            ranked = sorted(filled, key=lambda e: -router[b, i, e].item())[:top_k_experts]
            share = router[b, i, ranked].softmax(-1)
            rows.append(sum(share[place] * outputs[e][b, i] for place, e in enumerate(ranked)))
    return torch.stack(rows).reshape(x_q.shape)


# -- over some keys ----------------------------------------------------------------------------------------------------


def window(n, m, window_size=8):
    """bool (n, m): |i − floor(j·n/m)| ≤ W // 2."""
    return torch.tensor([[abs(i - j * n // m) <= window_size // 2 for j in range(m)] for i in range(n)])


def grid_window(queries, keys, shape, sizes):
    """bool (n, m): on every axis |j − floor(i·m/n)| ≤ size // 2, the query at i of n and the key at j of m there; both
    are counted in the smallest box that holds their side of the read."""

    def places(positions):
        points = [[position // math.prod(shape[axis + 1 :]) % shape[axis] for axis in range(len(shape))]
                  for position in positions]  # fmt: skip
        low = [min(column) for column in zip(*points)]
        extent = [max(column) + 1 - first for column, first in zip(zip(*points), low)]
        return [[value - first for value, first in zip(point, low)] for point in points], extent

    (q_points, n), (k_points, m) = places(queries), places(keys)
    axes = range(len(shape))
    return torch.tensor(
        [[all(abs(j[a] - i[a] * m[a] // n[a]) <= sizes[a] // 2 for a in axes) for j in k_points] for i in q_points]
    )


def local(p, x_q, x_k, n_heads, window_size=8, seen=None):
    return cross(p, x_q, x_k, n_heads, window(x_q.shape[1], x_k.shape[1], window_size) if seen is None else seen)


def _mix(word):
    """splitmix64: the word after `word`, scrambled."""
    word = (word + 0x9E3779B97F4A7C15) & WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & WORD
    return word ^ (word >> 31)


def draws(seed, query, m, n_random=8):
    """The set of keys that a query sees: Floyd's choice of min(n_random, m) among m, by scrambled counters."""
    chosen = set()
    state = _mix(_mix(_mix(seed & WORD) ^ query) ^ m)
    for last in range(m - min(n_random, m), m):
        drawn = _mix(state ^ last) % (last + 1)
        chosen.add(last if drawn in chosen else drawn)
    return chosen


def random_fixed(p, x_q, x_k, n_heads, n_random=8):
    n, m = x_q.shape[1], x_k.shape[1]
    keys = [draws(int(p["seed"]), i, m, n_random) for i in range(n)]
    return cross(p, x_q, x_k, n_heads, torch.tensor([[j in row for j in range(m)] for row in keys]))


# -- along the keys ----------------------------------------------------------------------------------------------------


def mamba(p, x_q, x_k, n_heads):
    u, z = _linear(p, "in_proj", x_k).chunk(2, dim=-1)
    d, state = p["A_log"].shape
    dt, b, c = _linear(p, "x_proj", u).split([p["dt_proj.weight"].shape[1], state, state], dim=-1)
    dt = F.softplus(_linear(p, "dt_proj", dt))
    h, rows = u.new_zeros(len(u), d, state), []
    for t in range(u.shape[1]):
        h = torch.exp(-torch.exp(p["A_log"]) * dt[:, t, :, None]) * h
        h = h + dt[:, t, :, None] * b[:, t, None, :] * u[:, t, :, None]
        rows.append((h * c[:, t, None, :]).sum(-1) + p["D"] * u[:, t])
    y = torch.stack(rows, 1) * F.silu(z)
    queries = F.layer_norm(x_q, (d,), p["norm.weight"], p["norm.bias"])
    return _linear(p, "out_proj", (queries @ y.transpose(-1, -2) / math.sqrt(d)).softmax(-1) @ y)


def rwkv(p, x_q, x_k, n_heads):
    k, v = (_heads(_linear(p, name, x_k), n_heads) for name in ("k_proj", "v_proj"))
    a = torch.exp(k.clamp(-10, 10))
    keep, bonus = torch.exp(-torch.exp(p["decay"])), torch.exp(p["bonus"])
    total, mass, rows = torch.zeros_like(a[:, :, 0]), torch.zeros_like(a[:, :, 0]), []
    for t in range(x_k.shape[1]):
        own = a[:, :, t]
        rows.append((total + bonus * own * v[:, :, t]) / (mass + bonus * own + 1e-6))
        total, mass = total * keep + own * v[:, :, t], mass * keep + own
    y = torch.stack([rows[min(i, len(rows) - 1)] for i in range(x_q.shape[1])], 2)
    return _linear(p, "out_proj", torch.sigmoid(_linear(p, "r_proj", x_q)) * _merge(y))


def hyena(p, x_q, x_k, n_heads, max_len=4096):
    n, m = x_q.shape[1], x_k.shape[1]
    if m != n:
        # adaptive average: row i is the mean of keys floor(i·m/n) … ceil((i+1)·m/n) − 1
        x_k = torch.stack([x_k[:, i * m // n : -(-(i + 1) * m // n)].mean(1) for i in range(n)], 1)
    order = sum(name.startswith("filter_params.") for name in p)
    v, *gates = _linear(p, "in_proj", x_k).chunk(order + 1, dim=-1)
    length = 1 << (n - 1).bit_length()
    bins = length // 2 + 1
    for o in range(order):
        spectrum = torch.view_as_complex(p[f"filter_params.{o}"].contiguous())  # [d, max_len/2 + 1]
        if bins > spectrum.shape[1]:
            place = torch.arange(bins, dtype=torch.float64) * (spectrum.shape[1] - 1) / (bins - 1)
            low = place.floor().long().clamp(max=spectrum.shape[1] - 2)
            spectrum = spectrum[:, low] * (1 - (place - low)) + spectrum[:, low + 1] * (place - low)
        gate = torch.sigmoid(_linear(p, f"gates.{o}", gates[o]))
        wave = torch.fft.rfft((v * gate).transpose(1, 2), n=length) * spectrum[:, :bins]
        v = torch.fft.irfft(wave, n=length)[..., :n].transpose(1, 2)
    return _linear(p, "out_proj", v)


FUNCTIONS = {
    "cross_attention": cross,
    "self_attention": cross,
    "cogvideox": cross,
    "cosine_attention": cosine,
    "sigmoid_attention": sigmoid,
    "linear_attention": linear,
    "sparse_attention": sparse,
    "local_attention": local,
    "random_fixed": random_fixed,
    "gated": gated,
    "pooling": pooling,
    "pooling_attention": pooling,
    "copy": copy,
    "perceiver": perceiver,
    "mixture": mixture,
    "mamba": mamba,
    "rwkv": rwkv,
    "hyena": hyena,
}


# -- many reads --------------------------------------------------------------------------------------------------------


def step(topology, reads, fns, state_dicts, x, n_heads, gates=None, active=None, context=None):
    """A dispatcher's step in float64: Σ_r a_r f_r(i) / Σ_r w_r, and x itself where nothing is read.

    `reads` are those of `tests.oracle.reads`; `fns` the function of each connection; `state_dicts` by function; `gates`
    a logit for each connection of write mode "gate", in order; `active` per connection; `context` constructor arguments
    by function.
    """
    x = x.double()
    modes = [c.write_mode for c in topology.connections]
    gated = [i for i, mode in enumerate(modes) if mode == "gate"]
    live = []
    for read in reads:
        if active is not None and not active[read.connection]:
            continue
        fn = fns[read.connection]
        options = (context or {}).get(fn, {})
        # under a pattern of pairs queries have keys of their own
        for keys in set(read.keys.values()):
            queries, keys = sorted(query for query, own in read.keys.items() if own == keys), sorted(keys)
            seen = seen_pairs(fn, queries, keys, read.shape, options.get("window_size"))
            some = [True] * len(queries) if seen is None else seen.any(1).tolist()
            live.append((read, fn, queries, keys, some, options if seen is None else {"seen": seen}))
    replaced = {
        i for read, _, queries, _, some, _ in live if modes[read.connection] == "replace"
        for i, one in zip(queries, some) if one
    }  # fmt: skip
    total, weight = torch.zeros_like(x), torch.zeros(x.shape[1], dtype=torch.float64)
    for read, fn, queries, keys, some, options in live:
        out = oracle(fn, state_dicts.get(fn, {}), x[:, queries], x[:, keys], n_heads, **options)
        share = read.weight
        if read.connection in gated:
            share = share * torch.sigmoid(gates[gated.index(read.connection)].double())
        mine = modes[read.connection] == "replace"
        kept = [place for place, i in enumerate(queries) if some[place] and (mine or i not in replaced)]
        rows = torch.tensor([queries[place] for place in kept], dtype=torch.int64)
        total = total.index_add(1, rows, share * out[:, kept])
        weight[rows] += read.weight
    return torch.where(weight[:, None] > 0, total / weight.clamp_min(1e-300)[:, None], x)
