"""The family by its definition, written for reading: rho of each kind, and the elements of each group of a tensor."""

import math

import torch
from torch import nn

from torch_regpen import L0, L1, L2, MCP, SCAD, ElasticNet, LHalf, LogSum, Penalty
from torch_regpen.groups import Blocks, Heads, SingularValues

RATIO = 0.3
KNEE = 0.4
A = 3.0
EPS = 0.15
CAP = 0.35


class Capped(Penalty):
    """`lam * sum min(|w|, cap)` (Zhang 2010): a kind as a user would write it."""

    def __init__(self, params, lam, *, cap=CAP, **kw):
        self.cap = cap
        super().__init__(params, lam, **kw)

    def rho(self, u):
        return u.clamp_max(self.cap)

    def rho_grad(self, u):
        return (u < self.cap).to(u.dtype)

    def rho_prox(self, u, t):
        t = torch.as_tensor(t)
        jump = torch.where(t < 2 * self.cap, self.cap + t / 2, (2 * t * self.cap).sqrt())
        return torch.where(u <= jump, (u - t).clamp_min(0), u)


KINDS = {
    "L1": L1,
    "L2": L2,
    "ElasticNet": lambda params, lam, **kw: ElasticNet(params, lam, l1_ratio=RATIO, **kw),
    "MCP": lambda params, lam, **kw: MCP(params, lam, knee=KNEE, **kw),
    "SCAD": lambda params, lam, **kw: SCAD(params, lam, knee=KNEE, a=A, **kw),
    "LogSum": lambda params, lam, **kw: LogSum(params, lam, eps=EPS, **kw),
    "LHalf": LHalf,
    "L0": L0,
    "Capped": Capped,
}
CONVEX = ["L1", "L2", "ElasticNet"]


def pieces(u, *limits_and_values):
    """The value of the first limit that `u` does not exceed, else the last value."""
    *cases, last = limits_and_values
    out = torch.as_tensor(last, dtype=u.dtype).expand(u.shape)
    for limit, value in reversed(cases):
        out = torch.where(u <= limit, value, out)
    return out


def mcp(u, knee=KNEE):
    return pieces(u, (knee, u - u**2 / (2 * knee)), knee / 2)


def scad(u, knee=KNEE, a=A):
    k = knee / a
    middle = (2 * knee * u - u**2 - k**2) / (2 * (a - 1) * k)
    return pieces(u, (k, u), (knee, middle), k * (a + 1) / 2)


def log_sum(u, eps=EPS):
    return eps * torch.log1p(u / eps)


RHO = {
    "L1": lambda u: u,
    "L2": lambda u: u**2,
    "ElasticNet": lambda u: RATIO * u + (1 - RATIO) * u**2,
    "MCP": mcp,
    "SCAD": scad,
    "LogSum": log_sum,
    "LHalf": lambda u: u**0.5,
    "L0": lambda u: (u > 0) + 0 * u,
    "Capped": lambda u: u.clamp_max(CAP),
}

GROUPS = {
    "elements": None,
    "output": "output",
    "input": "input",
    "last dim": -1,
    "tensor": "tensor",
    "blocks": Blocks(6),
    "heads": Heads(2),
    "heads of dim 1": Heads(3, dim=-1),
    "singular values": SingularValues(),
}
GROUPED = [name for name in GROUPS if name not in ("elements", "singular values")]


def members(w, groups):
    """The elements of each group of `w`, flat; not of singular values."""
    if groups is None:
        return list(w.flatten())
    if groups == "tensor":
        return [w.flatten()]
    if isinstance(groups, Blocks):
        flat = w.flatten()
        return [flat[i : i + groups.k] for i in range(0, len(flat), groups.k)]
    if isinstance(groups, Heads):
        return [head.flatten() for head in w.chunk(groups.n, groups.dim or 0)]
    dim = {"output": 0, "input": 1}.get(groups, groups)
    return [part.flatten() for part in w.unbind(dim)]


def size(w):
    """The norm of some elements; of none that differ from zero it has gradient zero."""
    square = (w * w.conj()).real.sum()
    return square.sqrt() if square > 0 else 0 * square


def magnitudes(w, groups, scale=True):
    """The magnitude of each group, and how often each counts."""
    if isinstance(groups, SingularValues):
        return torch.linalg.svdvals(w.flatten(1)), 1
    parts = members(w, groups)
    n = parts[0].numel() if scale else 1
    return torch.stack([size(part) / math.sqrt(n) for part in parts]), n


def omega(kind, w, groups, scale=True):
    """`sum_g n_g * rho(u_g)`."""
    u, n = magnitudes(w, groups, scale)
    return n * RHO[kind](u).sum()


def least(objective, low, high, points=801, rounds=4):
    """The least value of `objective` from `low` to `high`, for each of many rows, on a grid that closes in on it."""
    steps = torch.linspace(0, 1, points, dtype=torch.float64)
    found = torch.full_like(low, math.inf)
    first, last = low, high
    for _ in range(rounds):
        grid = first[:, None] + (last - first)[:, None] * steps
        values = objective(grid)
        found = torch.minimum(found, values.amin(1))
        best = grid.gather(1, values.argmin(1, keepdim=True))[:, 0]
        width = 2 * (last - first) / points
        first, last = torch.maximum(best - width, low), torch.minimum(best + width, high)
    return found


def value_of(make, w, **kw):
    """`Omega(w)` of the penalty that `make` makes."""
    return make([nn.Parameter(w)], 1.0, **kw)().detach()


def proxed(make, w, t, **kw):
    """`prox(w, t)` of the penalty that `make` makes."""
    p = nn.Parameter(w.clone(memory_format=torch.preserve_format))
    make([p], 1.0, **kw).prox_(t)
    return p.detach()


class Case:
    """A kind over groups with its options: how to make the penalty, and its definition."""

    def __init__(self, kind, name, option="plain"):
        self.kind, self.name = kind, name
        self.groups = GROUPS[name]
        self.scale = option != "unscaled"
        self.center = 0.3 * torch.randn(4, 6, dtype=torch.float64) if option == "moved" else None
        self.factors = None
        if option == "moved" and name != "singular values":
            u, _ = magnitudes(torch.ones(4, 6, dtype=torch.float64), self.groups, self.scale)
            self.factors = 2 * torch.rand(len(u), dtype=torch.float64)

    def weight(self):
        """A weight of which the first element, and all of the first groups, have not moved from the center."""
        w = torch.randn(4, 6, dtype=torch.float64)
        w[:3] = 0 if self.name in ("output", "heads", "blocks", "singular values") else w[:3]
        w[:, :3] = 0 if self.name in ("input", "last dim", "heads of dim 1") else w[:, :3]
        w[0, 0] = 0
        return w if self.center is None else w + self.center

    def penalty(self, w, lam):
        """The penalty on the parameter `w`."""
        kw = {"groups": self.groups, "scale": self.scale}
        if self.center is not None:
            kw["center"] = {"w": self.center}
        if self.factors is not None:
            kw["weights"] = {"w": self.factors if self.groups is not None else self.factors.view(4, 6)}
        return KINDS[self.kind]([("w", w)], lam, **kw)

    def offset(self, w):
        return w if self.center is None else w - self.center

    def omega(self, w):
        """The definition."""
        u, n = magnitudes(self.offset(w), self.groups, self.scale)
        terms = n * RHO[self.kind](u)
        return (terms if self.factors is None else self.factors * terms).sum()
