"""What goes from token to token: a loop in order carries it, and all else is parallel."""

from __future__ import annotations

import numpy as np

import sapper as sp
from sapper import Tensor, each, exp, f32, sigmoid, span, tanh, tiles, where, whole, zeros

from . import Example, empty, normal

B, C, D, E, H, I, N, T = sp.dims("B C D E H I N T")
CHUNK = 64


@sp.kernel
def recurrence(a: Tensor[f32, T, C], b: Tensor[f32, T, C], y: Tensor[f32, T, C]):
    """h = a h + b, in each channel."""
    for c in tiles(C):
        h = zeros(c, dtype=f32)
        for t in range(T):
            h = a[t, c] * h + b[t, c]
            y[t, c] = h


@sp.kernel
def selective_scan(
    x: Tensor[f32, T, C], step: Tensor[f32, T, C], a: Tensor[f32, C, N], b: Tensor[f32, T, N], out: Tensor[f32, T, N],
    y: Tensor[f32, T, C],
):
    """A state of N numbers for each channel (Mamba, arXiv:2312.00752, section 3)."""
    for c in tiles(C):
        n = whole(N)
        h = zeros(c, n, dtype=f32)
        for t in range(T):
            h = h * exp(step[t, c] * a[c, n]) + step[t, c] * x[t, c] * b[t, n]
            y[t, c] = sum(h * out[t, n], over=n)


@sp.kernel
def linear_attention(
    q: Tensor[f32, H, T, D], k: Tensor[f32, H, T, D], v: Tensor[f32, H, T, E], y: Tensor[f32, H, T, E],
):
    """Causal, without softmax, by chunks: what came before is a matrix, what is inside a masked product."""
    for h in each(H):
        d, e = whole(D), whole(E)
        state = zeros(d, e, dtype=f32)
        for chunk in range(T // CHUNK):
            i, j = whole(span(chunk * CHUNK, chunk * CHUNK + CHUNK)), whole(span(chunk * CHUNK, chunk * CHUNK + CHUNK))
            weight = where(j <= i, q[h, i, d] @ k[h, j, d], 0.0)
            y[h, i, e] = q[h, i, d] @ state + weight @ v[h, j, e]
            state += k[h, j, d] @ v[h, j, e]


@sp.kernel
def lstm_cell(
    x: Tensor[f32, B, I], h: Tensor[f32, B, H], c: Tensor[f32, B, H], w: Tensor[f32, 4, I, H], u: Tensor[f32, 4, H, H],
    bias: Tensor[f32, 4, H], h_next: Tensor[f32, B, H], c_next: Tensor[f32, B, H],
):
    for b, n in tiles(B, H):
        i, g = whole(I), whole(H)
        start = x[b, i] @ w[0, i, n] + h[b, g] @ u[0, g, n] + bias[0, n]
        forget = x[b, i] @ w[1, i, n] + h[b, g] @ u[1, g, n] + bias[1, n]
        cell = x[b, i] @ w[2, i, n] + h[b, g] @ u[2, g, n] + bias[2, n]
        out = x[b, i] @ w[3, i, n] + h[b, g] @ u[3, g, n] + bias[3, n]
        state = sigmoid(forget) * c[b, n] + sigmoid(start) * tanh(cell)
        c_next[b, n] = state
        h_next[b, n] = sigmoid(out) * tanh(state)


@sp.kernel
def gru(x: Tensor[f32, T, B, 3, H], u: Tensor[f32, 3, H, H], y: Tensor[f32, T, B, H]):
    """All tokens; x: what the inputs give to the three gates. A token reads what the one before it has written."""
    for b in tiles(B):
        h, g = whole(H), whole(H)
        for t in range(T):
            if t == 0:
                y[t, b, h] = (1.0 - sigmoid(x[t, b, 0, h])) * tanh(x[t, b, 2, h])
            else:
                before = y[t - 1, b, g]
                keep = sigmoid(x[t, b, 0, h] + before @ u[0, g, h])
                reset = sigmoid(x[t, b, 1, h] + before @ u[1, g, h])
                new = tanh(x[t, b, 2, h] + reset * (before @ u[2, g, h]))
                y[t, b, h] = (1.0 - keep) * new + keep * y[t - 1, b, h]


@sp.kernel
def delta_rule(
    q: Tensor[f32, T, H, D], k: Tensor[f32, T, H, D], v: Tensor[f32, T, H, E], rate: Tensor[f32, T, H],
    fade: Tensor[f32, T, H], y: Tensor[f32, T, H, E],
):
    """A state that fades, and in which what a key finds moves towards its value (Gated DeltaNet, arXiv:2412.06464)."""
    for h in each(H):
        for e in tiles(E):
            d = whole(D)
            state = zeros(d, e, dtype=f32)
            for t in range(T):
                state = state * exp(fade[t, h])
                state = state + k[t, h, d] * (rate[t, h] * (v[t, h, e] - k[t, h, d] @ state))
                y[t, h, e] = q[t, h, d] @ state


def _recurrence_reference(a, b):
    y = np.empty_like(b)
    h = np.zeros(b.shape[1], np.float32)
    for t in range(len(b)):
        y[t] = h = a[t] * h + b[t]
    return (y,)


def _scan_reference(x, step, a, b, out):
    y = np.empty_like(x)
    h = np.zeros(a.shape, np.float32)
    for t in range(len(x)):
        h = h * np.exp(step[t][:, None] * a) + (step[t] * x[t])[:, None] * b[t]
        y[t] = h @ out[t]
    return (y,)


def _attention_reference(q, k, v):
    return (np.tril(q @ k.transpose(0, 2, 1)) @ v,)


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _lstm_reference(x, h, c, w, u, bias):
    start, forget, cell, out = (x @ w[n] + h @ u[n] + bias[n] for n in range(4))
    state = _sigmoid(forget) * c + _sigmoid(start) * np.tanh(cell)
    return _sigmoid(out) * np.tanh(state), state


def _gru_reference(x, u):
    h = np.zeros((x.shape[1], x.shape[3]), np.float32)
    y = []
    for token in x:
        keep, reset = (_sigmoid(token[:, n] + h @ u[n]) for n in range(2))
        h = (1 - keep) * np.tanh(token[:, 2] + reset * (h @ u[2])) + keep * h
        y.append(h)
    return (np.stack(y),)


def _delta_reference(q, k, v, rate, fade):
    state, y = np.zeros((q.shape[1], q.shape[2], v.shape[2]), np.float32), np.empty_like(v)
    for t in range(len(q)):
        state = state * np.exp(fade[t])[:, None, None]
        wanted = rate[t][:, None] * (v[t] - np.einsum("hd,hde->he", k[t], state))
        state = state + k[t][:, :, None] * wanted[:, None]
        y[t] = np.einsum("hd,hde->he", q[t], state)
    return (y,)


def _torch_recurrence(a, b):
    import torch

    y, h = torch.empty_like(b), torch.zeros_like(b[0])
    for t in range(len(b)):
        y[t] = h = torch.addcmul(b[t], a[t], h)
    return y


def _torch_scan(x, step, a, b, out):
    import torch

    y, h = torch.empty_like(x), torch.zeros_like(a)
    for t in range(len(x)):
        h = h * torch.exp(step[t][:, None] * a) + (step[t] * x[t])[:, None] * b[t]
        y[t] = h @ out[t]
    return y


def _torch_lstm(x, h, c, w, u, bias):
    import torch

    start, forget, cell, out = (torch.addmm(bias[n], x, w[n]).addmm_(h, u[n]) for n in range(4))
    state = torch.sigmoid(forget) * c + torch.sigmoid(start) * torch.tanh(cell)
    return torch.sigmoid(out) * torch.tanh(state), state


def _torch_delta(q, k, v, rate, fade):
    import torch

    state, y = q.new_zeros(q.shape[1], q.shape[2], v.shape[2]), torch.empty_like(v)
    for t in range(len(q)):
        state = state * torch.exp(fade[t])[:, None, None]
        wanted = rate[t][:, None] * (v[t] - (k[t][:, None] @ state)[:, 0])
        state = torch.baddbmm(state, k[t][:, :, None], wanted[:, None])
        y[t] = (q[t][:, None] @ state)[:, 0]
    return y


def _torch_gru(x, u):
    import torch

    h, y = torch.zeros_like(x[0, :, 0]), []
    for token in x:
        keep, reset = (torch.sigmoid(torch.addmm(token[:, n], h, u[n])) for n in range(2))
        h = (1 - keep) * torch.tanh(token[:, 2] + reset * (h @ u[2])) + keep * h
        y.append(h)
    return torch.stack(y)


EXAMPLES = [
    Example(recurrence, lambda random, s: (
        random.random((s["T"], s["C"]), np.float32), normal(random, s["T"], s["C"]), empty(s["T"], s["C"])),
        _recurrence_reference, {"T": 1024, "C": 1024}, {"T": 7, "C": 85}, _torch_recurrence),
    Example(selective_scan, lambda random, s: (
        normal(random, s["T"], s["C"]), random.random((s["T"], s["C"]), np.float32),
        -random.random((s["C"], s["N"]), np.float32), normal(random, s["T"], s["N"]), normal(random, s["T"], s["N"]),
        empty(s["T"], s["C"])),
        _scan_reference, {"T": 256, "C": 256, "N": 16}, {"T": 5, "C": 19, "N": 16}, _torch_scan),
    Example(linear_attention, lambda random, s: (
        *(normal(random, s["H"], s["T"], s[n]) for n in "DDE"), empty(s["H"], s["T"], s["E"])),
        _attention_reference, {"H": 8, "T": 512, "D": 64, "E": 64}, {"H": 2, "T": 128, "D": 13, "E": 21},
        lambda q, k, v: (q @ k.transpose(1, 2)).tril() @ v),
    Example(lstm_cell, lambda random, s: (
        normal(random, s["B"], s["I"]), normal(random, s["B"], s["H"]), normal(random, s["B"], s["H"]),
        0.05 * normal(random, 4, s["I"], s["H"]), 0.05 * normal(random, 4, s["H"], s["H"]), normal(random, 4, s["H"]),
        empty(s["B"], s["H"]), empty(s["B"], s["H"])),
        _lstm_reference, {"B": 64, "I": 256, "H": 256}, {"B": 5, "I": 9, "H": 37}, _torch_lstm, results=2),
    Example(gru, lambda random, s: (
        normal(random, s["T"], s["B"], 3, s["H"]), 0.1 * normal(random, 3, s["H"], s["H"]),
        empty(s["T"], s["B"], s["H"])),
        _gru_reference, {"T": 32, "B": 16, "H": 128}, {"T": 4, "B": 3, "H": 21}, _torch_gru),
    Example(delta_rule, lambda random, s: (
        *(normal(random, s["T"], s["H"], s["D"]) / np.float32(s["D"]) ** 0.5 for _ in range(2)),
        normal(random, s["T"], s["H"], s["E"]), random.random((s["T"], s["H"]), np.float32),
        -random.random((s["T"], s["H"]), np.float32), empty(s["T"], s["H"], s["E"])),
        _delta_reference, {"T": 256, "H": 4, "D": 64, "E": 64}, {"T": 5, "H": 2, "D": 13, "E": 21}, _torch_delta),
]
