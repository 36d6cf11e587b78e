"""Scalar penalties: each class defines one function `rho(u)` of magnitudes `u >= 0` by three methods.

- `rho(u)` returns the value.
- `rho_grad(u)` returns the derivative; at 0 it is the right derivative, which may be infinite.
- `rho_prox(u, t)` returns `argmin_{v >= 0} 1/2 (v - u)^2 + t * rho(v)`. `t` is a float or a tensor that broadcasts
  to `u`.

All methods are elementwise. The penalty classes inherit from these classes; `torch_regpen.functional` also uses them.

Example:
    >>> import torch
    >>> from torch_regpen.scalar import ScalarL0
    >>> ScalarL0().rho_prox(torch.tensor([0.5, 3.0]), t=0.5)
    tensor([0., 3.])
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["ScalarElasticNet", "ScalarL0", "ScalarLHalf", "ScalarLogSum", "ScalarMCP", "ScalarSCAD", "Threshold"]

Threshold = float | Tensor


class ScalarElasticNet:
    """`rho(u) = a*u + b*u^2` (Zou and Hastie 2005); L1 has `(a, b) = (1, 0)`, L2 has `(0, 1)`.

    Args:
        linear: `a`, 0 or more.
        quadratic: `b`, 0 or more.
    """

    coefficients: tuple[float, float]

    def __init__(self, linear: float, quadratic: float) -> None:
        self.coefficients = linear, quadratic

    def rho(self, u: Tensor) -> Tensor:
        """`a*u + b*u^2`. A term whose coefficient is 0 is left out, because 0 times infinity is NaN."""
        linear, quadratic = self.coefficients
        if not quadratic:
            return linear * u
        return linear * u + quadratic * u.square() if linear else quadratic * u.square()

    def rho_grad(self, u: Tensor) -> Tensor:
        """`a + 2*b*u`."""
        linear, quadratic = self.coefficients
        return linear + 2 * quadratic * u

    def rho_prox(self, u: Tensor, t: Threshold) -> Tensor:
        """`max(u - t*a, 0) / (1 + 2*t*b)`."""
        linear, quadratic = self.coefficients
        shrunk = (u - t * linear).clamp_min(0) if linear else u
        return shrunk / (1 + 2 * t * quadratic) if quadratic else shrunk


class ScalarMCP:
    """`rho(u) = u - u^2/(2*knee)` up to the knee, then `knee/2` (Zhang 2010).

    Args:
        knee: the magnitude above which `rho` is constant, in units of the weights; more than 0.

    Raises:
        ValueError: `knee` is not positive and finite.
    """

    def __init__(self, knee: float) -> None:
        self.knee = _more_than("knee", knee, 0)

    def rho(self, u: Tensor) -> Tensor:
        """`u - u^2/(2*knee)` up to the knee, then `knee/2`."""
        u = u.clamp_max(self.knee)
        return u - u.square() / (2 * self.knee)

    def rho_grad(self, u: Tensor) -> Tensor:
        """`1 - u/knee` up to the knee, then 0."""
        return (1 - u / self.knee).clamp_min(0)

    def rho_prox(self, u: Tensor, t: Threshold) -> Tensor:
        """Firm threshold if `t < knee`, else hard threshold at `sqrt(t*knee)`; at the jump it returns 0."""
        t, knee = _as_tensor_like(t, u), self.knee
        firm = torch.where(u <= knee, _ratio((u - t).clamp_min(0), 1 - t / knee).clamp_max(knee), u)
        hard = u.masked_fill(u <= (t * knee).sqrt(), 0)
        return torch.where(t < knee, firm, hard)


class ScalarSCAD:
    """`rho(u) = u` up to `knee/a`, then a parabola whose slope falls to 0 at the knee, then constant (Fan and Li 2001).

    Args:
        knee: the magnitude above which `rho` is constant, in units of the weights; more than 0.
        a: the ratio of the knee to the magnitude at which the slope begins to fall; more than 1.

    Raises:
        ValueError: `knee` or `a` is out of range.
    """

    def __init__(self, knee: float, a: float = 3.7) -> None:
        self.knee = _more_than("knee", knee, 0)
        self.a = _more_than("a", a, 1)

    def rho(self, u: Tensor) -> Tensor:
        """`u` up to `k = knee/a`; `(2*knee*u - u^2 - k^2) / (2*(a-1)*k)` up to the knee; then `k*(a+1)/2`."""
        knee, a, k = self.knee, self.a, self.knee / self.a
        u = u.clamp_max(knee)
        return torch.where(u <= k, u, (2 * knee * u - u.square() - k * k) / (2 * (a - 1) * k))

    def rho_grad(self, u: Tensor) -> Tensor:
        """1 up to `knee/a`, then linear down to 0 at the knee."""
        return ((self.knee - u) / ((self.a - 1) * self.knee / self.a)).clamp(0, 1)

    def rho_prox(self, u: Tensor, t: Threshold) -> Tensor:
        """With `k = knee/a`, for `t < (a-1)*k`: soft threshold up to `k + t`, `u` above the knee, a line between.

        For larger `t` the prox jumps from the soft threshold to `u`. The jump is at `((a+1)*k + t) / 2` if
        `t < (a+1)*k`, else at `sqrt((a+1)*k*t)`. At the jump it returns the lower value.
        """
        t, knee, a, k = _as_tensor_like(t, u), self.knee, self.a, self.knee / self.a
        slope = t / ((a - 1) * k)
        soft = (u - t).clamp_min(0)
        line = _ratio(u - slope * knee, 1 - slope).clamp(k, knee)
        jump = torch.where(t < (a + 1) * k, ((a + 1) * k + t) / 2, ((a + 1) * k * t).sqrt())
        continuous = torch.where(u <= k + t, soft, torch.where(u <= knee, line, u))
        return torch.where(slope < 1, continuous, torch.where(u <= jump, soft, u))


class ScalarLogSum:
    """`rho(u) = eps*log(1 + u/eps)` (Candes, Wakin and Boyd 2008).

    Args:
        eps: the magnitude at which the slope has fallen to 1/2, in units of the weights; more than 0.

    Raises:
        ValueError: `eps` is not positive and finite.
    """

    def __init__(self, eps: float) -> None:
        self.eps = _more_than("eps", eps, 0)

    def rho(self, u: Tensor) -> Tensor:
        """`eps*log(1 + u/eps)`."""
        return self.eps * (u / self.eps).log1p()

    def rho_grad(self, u: Tensor) -> Tensor:
        """`1 / (1 + u/eps)`."""
        return 1 / (1 + u / self.eps)

    def rho_prox(self, u: Tensor, t: Threshold) -> Tensor:
        """The larger root of `(v - u)*(v + eps) + t*eps = 0` if its objective is below that of 0, else 0."""
        eps = self.eps
        total = u + eps
        root = total * (1 - 4 * (eps / total) * (t / total)).clamp_min(0).sqrt()  # written so that no square overflows
        # (u - eps + root) / 2, in a form that avoids cancellation if u < eps
        v = torch.where(u < eps, 2 * eps * (u - t) / (eps - u + root), (u - eps + root) / 2).clamp_min(0)
        return v.masked_fill(0.5 * v - u + t * self.rho(v) / v >= 0, 0)


class ScalarLHalf:
    """`rho(u) = u^0.5` (Xu, Chang, Xu and Zhang 2012)."""

    def rho(self, u: Tensor) -> Tensor:
        """`u^0.5`, with gradient 0 at 0."""
        zero = u == 0
        return u.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)

    def rho_grad(self, u: Tensor) -> Tensor:
        """`0.5 * u^-0.5`, infinite at 0."""
        return 0.5 * u.rsqrt()

    def rho_prox(self, u: Tensor, t: Threshold) -> Tensor:
        """Half threshold: if `u > 1.5 * t^(2/3)`, the square of the largest root of `s^3 - u*s + t/2 = 0`; else 0."""
        t = _as_tensor_like(t, u)
        threshold = 1.5 * t.pow(2 / 3)
        angle = (-(threshold / u).pow(1.5) / math.sqrt(2)).clamp(-1, 1).acos() / 3
        return (4 / 3 * u * angle.cos().square()).masked_fill(u <= threshold, 0)


class ScalarL0:
    """`rho(u) = 1` if `u > 0`, else 0 (Blumensath and Davies 2008)."""

    def rho(self, u: Tensor) -> Tensor:
        """1 if `u > 0`, else 0. NaN stays NaN."""
        return torch.where(u.isnan(), u, (u != 0).to(u.dtype))

    def rho_grad(self, u: Tensor) -> Tensor:
        """0 for `u > 0`; infinite at 0, where every number is a subgradient."""
        return torch.where(u == 0, torch.inf, 0 * u)

    def rho_prox(self, u: Tensor, t: Threshold) -> Tensor:
        """Hard threshold at `sqrt(2*t)`; at the jump it returns 0."""
        return u.masked_fill(u <= (2 * _as_tensor_like(t, u)).sqrt(), 0)


def _as_tensor_like(t: Threshold, u: Tensor) -> Tensor:
    """`t` as a tensor with the dtype and device of `u`, without synchronizing with the device."""
    return torch.as_tensor(t, dtype=u.dtype).to(u.device, non_blocking=True)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return numerator / denominator.clamp_min(torch.finfo(denominator.dtype).tiny)


def _more_than(name: str, value: float, bound: float) -> float:
    if not bound < value < math.inf:
        raise ValueError(f"{name} must be more than {bound} and finite, not {value}")
    return float(value)
