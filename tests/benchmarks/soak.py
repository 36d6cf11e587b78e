"""Random lives of an optimizer with a penalty, beside a plain loop that is written from the formulas.

Each sequence draws a mode, a kind, an optimizer and 40 events: steps, exceptions in hooks and closures, checkpoints
saved and loaded into new objects, deep copies, frozen and unfrozen zeros, new lambdas and learning rates, a layer that
is replaced, another number of threads. After each event all weights have to be those of the plain loop.

    python tests/benchmarks/soak.py --sequences 2000
"""

import argparse
import copy
import io
import random

import torch
from torch import nn

from torch_regpen import L0, L1, L2, GroupLasso, RegularizedOptimizer

EVENTS = 40
TOLERANCE = 1e-9
CAP = 10  # of the optimizer's own step, the most that one step shrinks an element under Adam

KINDS = {"L1": L1, "L2": L2, "L0": L0, "GroupLasso": GroupLasso}
MODES = {
    "coupled": ("L1", "L2", "GroupLasso"),
    "decoupled": ("L1", "L2", "GroupLasso"),
    "proximal": ("L1", "L2", "L0", "GroupLasso"),
    "dual": ("L1", "L2", "L0", "GroupLasso"),
}
OPTIMIZERS = {
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.05),
    "momentum": lambda ps: torch.optim.SGD(ps, lr=0.02, momentum=0.9),
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=0.02, weight_decay=0.01),
}


class Interruption(Exception):  # noqa: N818  no error: it is planned
    """What a hook or a closure raises."""


def network():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def row_norms(w):
    return w.norm(dim=1, keepdim=True) / w.shape[1] ** 0.5


def subgradient(kind, w):
    if kind == "L1":
        return w.sign()
    if kind == "L2":
        return 2 * w
    u = row_norms(w)
    return torch.where(u > 0, w / u, torch.zeros_like(w))


def prox(kind, w, t):
    if kind == "L1":
        return w.sign() * (w.abs() - t).clamp_min(0)
    if kind == "L2":
        return w / (1 + 2 * t)
    if kind == "L0":
        return torch.where(w.abs() <= (2 * t) ** 0.5, torch.zeros_like(w), w)
    u = row_norms(w)
    return torch.where(u > t, w * (1 - t / u), torch.zeros_like(w))


class Plain:
    """The loop by the formulas: torch's own optimizer, then the penalty, one parameter at a time."""

    def __init__(self, model, make, kind, mode, lam):
        self.model = copy.deepcopy(model)
        self.optimizer = make(self.model.parameters())
        self.kind, self.mode, self.lam = kind, mode, lam
        self.gaps, self.sums, self.held = {}, {}, {}
        self.frozen = False

    def weights(self):
        return [module.weight for module in self.model if isinstance(module, nn.Linear)]

    def group_of(self, w):
        return next(g for g in self.optimizer.param_groups if any(p is w for p in g["params"]))

    def s(self, w):
        """The optimizer's own step for a unit gradient."""
        group, state = self.group_of(w), self.optimizer.state[w]
        if "betas" not in group:
            return torch.tensor(group["lr"] / (1 - group["momentum"]), dtype=w.dtype)
        v_hat = state["exp_avg_sq"] / (1 - group["betas"][1] ** state["step"].item())
        return group["lr"] / (v_hat.sqrt() + group["eps"])

    def step(self, grads):
        on = [] if self.frozen else [w for w in self.weights() if self.lam > 0]
        for p, g in zip(self.model.parameters(), grads, strict=True):
            p.grad = g.clone()
        with torch.no_grad():
            for w, mask in self.held.items():
                w.grad[mask] = 0
            for w in on:
                lr = self.group_of(w)["lr"]
                if self.mode == "coupled":
                    w.grad += self.lam * subgradient(self.kind, w)
                elif self.mode == "decoupled":
                    moved = w - lr * self.lam * subgradient(self.kind, w)
                    if self.kind == "GroupLasso":
                        moved = torch.where(row_norms(w) > lr * self.lam, moved, torch.zeros_like(w))
                    w.copy_(torch.where(moved * w < 0, torch.zeros_like(w), moved))
            self.optimizer.step()
            for w in on:
                if self.mode in ("proximal", "dual"):
                    self.shrink(w)
            if self.mode == "dual" and not self.frozen and self.lam == 0:
                self.gaps, self.sums = {}, {}
            for w, mask in self.held.items():
                w[mask] = 0

    def shrink(self, w):
        s = self.s(w)
        cap = CAP * self.group_of(w)["lr"] if s.ndim else torch.inf
        if self.mode == "proximal":
            new = prox(self.kind, w, s * self.lam)
            w.copy_(torch.minimum(torch.maximum(new, w - cap), w + cap))
            return
        latent = w + self.gaps.get(w, torch.zeros_like(w))
        if s.ndim:  # L1 only: no step adds more to the threshold than the cap
            s = s.clamp_max(cap / self.lam)
        self.sums[w] = self.sums.get(w, 0) + s
        w.copy_(prox(self.kind, latent, self.sums[w] * self.lam))
        self.gaps[w] = latent - w

    def freeze(self):
        self.frozen = True
        for w in self.weights():
            mask = self.held[w] = w.detach() == 0
            for value in self.optimizer.state[w].values():
                if isinstance(value, torch.Tensor) and value.shape == w.shape:
                    value[mask] = 0

    def unfreeze(self):
        self.frozen, self.held = False, {}


class Life:
    """The library's objects, and the plain loop beside them."""

    def __init__(self, draw):
        self.draw = draw
        self.mode = draw.choice(list(MODES))
        self.name = draw.choice(list(OPTIMIZERS))
        # Under Adam the prox of groups is a search, and that of L0 is capped: not part of this plain loop.
        kinds = MODES[self.mode] if self.name != "AdamW" or "al" not in self.mode else ("L1",)
        self.kind = draw.choice(kinds)
        torch.manual_seed(draw.randrange(1 << 30))
        self.model = network()
        self.penalty = KINDS[self.kind](self.model, draw.choice([0.001, 0.01, 0.1]))
        self.optimizer = self.wrapped(self.model, self.penalty)
        self.plain = Plain(self.model, OPTIMIZERS[self.name], self.kind, self.mode, self.penalty.lam)
        self.steps = 0

    def wrapped(self, model, penalty):
        return RegularizedOptimizer(OPTIMIZERS[self.name](model.parameters()), penalty, self.mode)

    def gradients(self):
        self.steps += 1
        generator = torch.Generator().manual_seed(self.steps)
        return [torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.3 for p in self.model.parameters()]

    def set(self, grads):
        for p, g in zip(self.model.parameters(), grads, strict=True):
            p.grad = g.clone()

    def step(self):
        grads = self.gradients()
        self.set(grads)
        self.optimizer.step()
        self.plain.step(grads)

    def step_with_a_closure(self):
        grads = self.gradients()

        def closure():
            self.set(grads)
            return torch.zeros((), dtype=torch.float64)

        self.optimizer.step(closure)
        self.plain.step(grads)

    def interrupted(self):
        where = self.draw.choice(["pre", "inner pre", "closure", "post", "inner post"])
        grads = self.gradients()
        self.set(grads)

        def fail(*_):
            raise Interruption

        target = self.optimizer.optimizer if "inner" in where else self.optimizer
        handle = None
        if "pre" in where:
            handle = target.register_step_pre_hook(fail)
        elif "post" in where:
            handle = target.register_step_post_hook(fail)
        try:
            self.optimizer.step(fail if where == "closure" else None)
        except Interruption:
            pass
        else:
            raise AssertionError("the exception was swallowed")
        if handle is not None:
            handle.remove()
        if "post" in where:
            self.plain.step(grads)
        elif self.mode == "decoupled" and where == "inner pre" and not self.plain.frozen:
            # The decay comes before the update and is done. The plain loop takes the weights as they are.
            self.adopt()

    def adopt(self):
        with torch.no_grad():
            for p, q in zip(self.plain.model.parameters(), self.model.parameters(), strict=True):
                p.copy_(q)

    def saved_and_loaded(self):
        file = io.BytesIO()
        torch.save([x.state_dict() for x in (self.model, self.penalty, self.optimizer)], file)
        file.seek(0)
        model_state, penalty_state, optimizer_state = torch.load(file, weights_only=True)
        groups = self.optimizer.param_groups
        self.model = network()
        self.penalty = KINDS[self.kind](self.model, 1.0)
        inner = OPTIMIZERS[self.name](self.model[0].parameters())
        if len(groups) == 1:
            inner = OPTIMIZERS[self.name](self.model.parameters())
        else:
            inner.add_param_group({"params": list(self.model[2].parameters())})
        self.model.load_state_dict(model_state)
        self.penalty.load_state_dict(penalty_state)
        self.optimizer = RegularizedOptimizer(inner, self.penalty, self.mode)
        self.optimizer.load_state_dict(optimizer_state)

    def copied(self):
        self.model, self.penalty, self.optimizer = copy.deepcopy((self.model, self.penalty, self.optimizer))

    def new_lambda(self):
        self.penalty.lam = self.plain.lam = self.draw.choice([0.0, 0.001, 0.01, 0.1])

    def new_learning_rate(self):
        lr = self.draw.choice([0.0, 0.005, 0.02, 0.05])
        for group in (*self.optimizer.param_groups, *self.plain.optimizer.param_groups):
            group["lr"] = lr

    def frozen(self):
        if self.steps and all(self.plain.optimizer.state.get(w) for w in self.plain.weights()):
            self.optimizer.freeze_zeros()
            self.plain.freeze()

    def unfrozen(self):
        self.optimizer.unfreeze_zeros()
        self.plain.unfreeze()

    def replaced(self):
        """The last layer is a new one, in a parameter group of its own."""
        if self.plain.frozen:
            return
        layer = nn.Linear(6, 3).double()
        for model, optimizer in ((self.model, self.optimizer.optimizer), (self.plain.model, self.plain.optimizer)):
            old = set(model[2].parameters())
            model[2] = copy.deepcopy(layer)
            lr = optimizer.param_groups[0]["lr"]
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if p not in old]
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
            for p in old:
                optimizer.state.pop(p, None)
            optimizer.add_param_group({"params": list(model[2].parameters()), "lr": lr})

    def another_number_of_threads(self):
        torch.set_num_threads(self.draw.choice([1, 2]))

    def difference(self):
        pairs = zip(self.model.parameters(), self.plain.model.parameters(), strict=True)
        return max(((p - q).abs().max() / (1 + q.abs().max())).item() for p, q in pairs)


OFTEN = 6  # of events, a plain step
RARE = (
    *(Life.step_with_a_closure, Life.interrupted, Life.saved_and_loaded, Life.copied, Life.new_lambda),
    *(Life.new_learning_rate, Life.frozen, Life.unfrozen, Life.replaced, Life.another_number_of_threads),
)


def live(seed):
    """The first event after which the two differ, or None."""
    draw = random.Random(seed)
    life = Life(draw)
    done = []
    for _ in range(EVENTS):
        event = draw.choice([Life.step] * OFTEN + list(RARE))
        event(life)
        done.append(event.__name__)
        difference = life.difference()
        if not difference <= TOLERANCE:
            return f"{seed}: {life.mode} {life.kind} {life.name}, off by {difference:.1e} after {', '.join(done)}"
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sequences", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="the seed of the first sequence")
    arguments = parser.parse_args()
    seeds = range(arguments.first, arguments.first + arguments.sequences)
    differing = [found for found in map(live, seeds) if found is not None]
    print(*differing, sep="\n")
    print(f"{len(seeds)} sequences, {len(differing)} differences")


if __name__ == "__main__":
    main()
