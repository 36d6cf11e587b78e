"""The penalties and their definition: each kind, each grouping, and what they are written out as formulas."""

import math

import torch
from torch import nn

from torch_regpen import (
    L0,
    L1,
    L2,
    MCP,
    SCAD,
    ElasticNet,
    GroupLasso,
    LHalf,
    LogSum,
    NuclearNorm,
    Orthogonal,
    Penalty,
    SparseGroupLasso,
)
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
        t = torch.as_tensor(t, dtype=u.dtype)
        jump = torch.where(t < 2 * self.cap, self.cap + t / 2, (2 * t * self.cap).sqrt())
        return torch.where(u <= jump, (u - t).clamp_min(0), u)


# The kinds, over elements or any groups.
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

# The convex ones and the group lasso, for what does not depend on the kind any further.
BASIC = {**{kind: KINDS[kind] for kind in CONVEX}, "GroupLasso": GroupLasso}

# The classes as they are, with their default arguments.
CLASSES = [L0, L1, L2, MCP, SCAD, ElasticNet, LHalf, LogSum, GroupLasso, NuclearNorm, SparseGroupLasso, Orthogonal]

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


# rho of each kind


def piecewise(u, *limits_and_values):
    """The value of the first limit that `u` does not exceed, else the last value."""
    *cases, last = limits_and_values
    out = torch.as_tensor(last, dtype=u.dtype).expand(u.shape)
    for limit, value in reversed(cases):
        out = torch.where(u <= limit, value, out)
    return out


def mcp(u, knee=KNEE):
    return piecewise(u, (knee, u - u**2 / (2 * knee)), knee / 2)


def scad(u, knee=KNEE, a=A):
    k = knee / a
    middle = (2 * knee * u - u**2 - k**2) / (2 * (a - 1) * k)
    return piecewise(u, (k, u), (knee, middle), k * (a + 1) / 2)


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


# Omega of whole tensors, for the basic kinds


def squares(w):
    return (w * w.conj()).real.sum()


def group_lasso(w, dim=0):
    return sum(math.sqrt(g.numel()) * squares(g).sqrt() for g in w.unbind(dim))


OMEGA = {
    "L1": lambda w: w.abs().sum(),
    "L2": squares,
    "ElasticNet": lambda w: RATIO * w.abs().sum() + (1 - RATIO) * squares(w),
    "GroupLasso": group_lasso,
}


def total_omega(kind, tensors):
    return sum(OMEGA[kind](w) for w in tensors)


# Omega of each kind over each grouping


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
    square = squares(w)
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


# Penalties on a network, each beside its formula for one weight, as a user would write it in the loss


def l1(*weights):
    return sum(w.abs().sum() for w in weights)


def l2(w):
    return w.square().sum()


def rows(w):
    return w.shape[1] ** 0.5 * w.norm(dim=1).sum()


def columns(w):
    return w.shape[0] ** 0.5 * w.norm(dim=0).sum()


FORMULAS = {
    "L1": (lambda model: L1(model, 0.03), lambda w: 0.03 * l1(w)),
    "L2": (lambda model: L2(model, 0.03), lambda w: 0.03 * l2(w)),
    "ElasticNet": (
        lambda model: ElasticNet(model, 0.03, l1_ratio=0.7),
        lambda w: 0.03 * (0.7 * l1(w) + 0.3 * l2(w)),
    ),
    "GroupLasso": (lambda model: GroupLasso(model, 0.02), lambda w: 0.02 * rows(w)),
    "GroupLasso-input": (lambda model: GroupLasso(model, 0.02, groups="input"), lambda w: 0.02 * columns(w)),
    "L1+L2": (lambda model: L1(model, 0.02) + L2(model, 0.01), lambda w: 0.02 * l1(w) + 0.01 * l2(w)),
    "L1+GroupLasso": (lambda model: L1(model, 0.02) + GroupLasso(model, 0.01), lambda w: 0.02 * l1(w) + 0.01 * rows(w)),
    "list": (
        lambda model: [GroupLasso(model, 0.01), L2(model, 0.03), L1(model, 0.02)],
        lambda w: 0.02 * l1(w) + 0.01 * rows(w) + 0.03 * l2(w),
    ),
}


# Penalties on any model: a kind, a grouping or an option each


def constant_center(model):
    return {name: torch.full(p.shape, 0.1, dtype=p.dtype) for name, p in model.named_parameters()}


def increasing_weights(model, by_row=False):
    """From 0.5 to 2, one for each element or each row of each matrix."""
    return {
        name: torch.linspace(0.5, 2.0, len(p) if by_row else p.numel(), dtype=p.dtype).view(
            len(p) if by_row else p.shape
        )
        for name, p in model.named_parameters()
        if p.ndim > 1
    }


VARIANTS = {
    "L1": L1,
    "L2": L2,
    "ElasticNet": KINDS["ElasticNet"],
    "MCP": KINDS["MCP"],
    "SCAD": KINDS["SCAD"],
    "LogSum": KINDS["LogSum"],
    "LHalf": LHalf,
    "L0": L0,
    "Capped": Capped,
    "positive": lambda m, lam: L1(m, lam, positive=True),
    "rows": GroupLasso,
    "columns": lambda m, lam: GroupLasso(m, lam, groups="input"),
    "tensors": lambda m, lam: GroupLasso(m, lam, groups="tensor", select="all"),
    "unscaled rows": lambda m, lam: L1(m, lam, groups="output", scale=False),
    "unscaled columns of LogSum": lambda m, lam: LogSum(m, lam, groups="input", scale=False),
    "sparse rows": SparseGroupLasso,
    "sparse columns": lambda m, lam: SparseGroupLasso(m, lam, groups="input"),
    "columns of MCP": lambda m, lam: MCP(m, lam, groups="input"),
    "rows of L0": lambda m, lam: L0(m, lam, groups="output"),
    "tensors of L0": lambda m, lam: L0(m, lam, groups="tensor"),
    "tensors of L2": lambda m, lam: L2(m, lam, groups="tensor"),
    "blocks": lambda m, lam: GroupLasso(m, lam, groups=Blocks(3)),
    "heads": lambda m, lam: GroupLasso(m, lam, groups=Heads(3), select="*weight"),
    "singular values": NuclearNorm,
    "L1 + L2": lambda m, lam: L1(m, lam) + L2(m, lam / 5),
    "elementwise sum": lambda m, lam: L1(m, lam) + L2(m, 3 * lam) + ElasticNet(m, lam),
    "rows, elements and squares": lambda m, lam: L1(m, lam) + GroupLasso(m, 2 * lam) + L2(m, lam),
    "columns, elements and all squares": lambda m, lam: (
        L1(m, lam) + GroupLasso(m, lam, groups="input") + L2(m, lam, select="all")
    ),
    "initial center": lambda m, lam: L1(m, lam, center="initial"),
    "center": lambda m, lam: L1(m, lam, center=constant_center(m)),
    "columns around a center": lambda m, lam: GroupLasso(m, lam, groups="input", center=constant_center(m)),
    "weights": lambda m, lam: L1(m, lam, weights=increasing_weights(m)),
    "weights of rows": lambda m, lam: GroupLasso(m, lam, weights=increasing_weights(m, by_row=True)),
}
# Those whose prox takes one step for a whole tensor, and none for each coordinate.
ONE_STEP = {"rows of L0", "tensors of L0", "columns of MCP", "unscaled columns of LogSum", "singular values"}
