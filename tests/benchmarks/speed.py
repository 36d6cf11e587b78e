"""What a penalty costs, beside what else does its job: the idiom, weight_decay, torchao's PruneOptimizer, the memory.

One process and one thread; jobs interleaved, medians of the ratios over the rounds, in processor time (on CUDA: between
events). The models are shapes alone: G is GPT-2 small, R is ResNet-50, S is 2,000 small tensors, V is ViT-S/16, W is
one matrix of 8192 x 4096. Penalties on groups take the tensors with 2 dimensions or more.

    python tests/benchmarks/speed.py                         # torchao is left out where it is not installed
    python tests/benchmarks/speed.py --only prox_ --models RV
    python tests/benchmarks/speed.py --kernels               # only: steps with compile=True beside the eager ones
    python tests/benchmarks/speed.py --compile --models R    # the compiled step too, which takes minutes to compile
    python tests/benchmarks/speed.py --device cuda
    python tests/benchmarks/speed.py --denormals             # instead: which ways leave denormal weights
"""

import argparse
import random
import re
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from torch_regpen import L1, L2, GroupLasso, Penalty, RegularizedOptimizer

LAM, LR = 1e-6, 1e-5  # small: the weights stay what they are
Shapes = list[tuple[int, ...]]
Job = Callable[[], object]


def gpt2_small() -> Shapes:
    shapes: Shapes = [(50257, 768), (1024, 768)]
    for _ in range(12):
        shapes += [(768,), (768,), (768, 2304), (2304,), (768, 768), (768,)]
        shapes += [(768,), (768,), (768, 3072), (3072,), (3072, 768), (768,)]
    return [*shapes, (768,), (768,)]


def resnet50() -> Shapes:
    shapes: Shapes = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for conv in ((width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)):
                shapes += [conv, conv[:1], conv[:1]]
            if block == 0:
                shapes += [(4 * width, inputs, 1, 1), (4 * width,), (4 * width,)]
            inputs = 4 * width
    return [*shapes, (1000, inputs), (1000,)]


def small_tensors() -> Shapes:
    sizes = random.Random(0)
    return [(sizes.randint(64, 1024),) for _ in range(2000)]


def vit_small() -> Shapes:
    shapes: Shapes = [(1, 1, 384), (1, 197, 384), (384, 3, 16, 16), (384,)]
    for _ in range(12):
        shapes += [(384,), (384,), (1152, 384), (1152,), (384, 384), (384,)]
        shapes += [(384,), (384,), (1536, 384), (1536,), (384, 1536), (384,)]
    return [*shapes, (384,), (384,), (1000, 384), (1000,)]


MODELS: dict[str, Callable[[], Shapes]] = {
    "G": gpt2_small,
    "R": resnet50,
    "S": small_tensors,
    "V": vit_small,
    "W": lambda: [(8192, 4096)],
}


class Row(NamedTuple):
    """The time of one job over that of another.

    Attributes:
        name: of what is measured.
        measure: what the figure says.
        over: the job above.
        under: the job below.
    """

    name: str
    measure: str
    over: str
    under: str


FASTER, COST, SHARE = "faster than the idiom", "plain steps", "of in-place bandwidth"
TORCHAO, DECAY = "faster than torchao", "steps with weight_decay"
MODES = {  # that have a prox
    "proximal, euclidean": ("proximal", "euclidean"),
    "proximal, Adam's metric": ("proximal", "auto"),
    "dual, euclidean": ("dual", "euclidean"),
    "dual, Adam's metric": ("dual", "auto"),
}


KERNELS = {  # those of torch.compile
    "coupled": ("coupled", "auto"),
    "proximal, Adam's metric": ("proximal", "auto"),
    "dual, euclidean": ("dual", "euclidean"),
    "dual, Adam's metric": ("dual", "auto"),
}


def rows() -> Iterator[Row]:
    for kind in ("L1", "L2"):
        yield Row(f"{kind} in the loss, forward and backward", FASTER, f"idiom {kind}", f"loss {kind}")
    for way in ("add_grad_", "add_grad_(return_value=True)"):
        for kind in ("L1", "L2"):
            yield Row(f"`{way}` {kind}", FASTER, f"idiom {kind}", f"{way} {kind}")
    yield Row("`prox_` L1", SHARE, "in place", "prox_ L1")
    yield Row("`prox_` L1", "faster than `softshrink` in a loop", "softshrink", "prox_ L1")
    for groups in ("output", "input"):
        yield Row(f"`prox_` group lasso, {groups}", SHARE, "in place", f"prox_ {groups}")
    for kind in ("L1", "L2"):
        yield Row(f"AdamW, {kind} coupled", COST, f"coupled {kind}", "plain")
    yield Row("AdamW, L2 coupled", DECAY, "coupled L2", "weight_decay")
    yield Row("AdamW, L2 decoupled", COST, "decoupled L2", "plain")
    yield Row("AdamW, L2 decoupled", DECAY, "decoupled L2", "weight_decay")
    for kind, peer in (("L1", "torchao elements"), ("rows", "torchao rows")):
        for mode in MODES:
            name = f"AdamW, {'group lasso' if kind == 'rows' else kind} {mode}"
            yield Row(name, COST, f"{mode} {kind}", "plain")
            if "euclidean" in mode:  # the only step that torchao's knows
                yield Row(name, TORCHAO, peer, f"{mode} {kind}")
    for kind, what in (("L1", "L1"), ("rows", "group lasso")):
        for mode in KERNELS:
            for way in ("eager", "kernels"):
                if (kind, mode) != ("rows", "coupled"):
                    yield Row(f"{way}: AdamW, {what} {mode}", COST, f"{way} {mode} {kind}", "plain")
    yield Row("kernels: L1 in the loss", FASTER, "idiom L1", "kernels loss L1")
    for name, metric in (("euclidean", "euclidean"), ("Adam's metric", "auto")):
        yield Row(
            f"compiled AdamW, L1 proximal, {name}", "compiled plain steps", f"compiled {metric}", "compiled plain"
        )
        yield Row(f"compiled fused AdamW, L1 proximal, {name}", COST, f"compiled fused {metric}", "plain")


MEMORY = {
    "loss L1": "L1 in the loss, forward and backward",
    "loss L2": "L2 in the loss, forward and backward",
    "add_grad_ L1": "`add_grad_` L1",
    "prox_ L1": "`prox_` L1",
    "prox_ output": "`prox_` group lasso, output",
    "proximal, Adam's metric L1": "AdamW, L1 proximal, Adam's metric",
}


def jobs(ws: list[nn.Parameter], wanted: set[str]) -> dict[str, Job]:
    """Those of the jobs on these weights, whose gradients are there, that are wanted and possible."""
    matrices = [w for w in ws if w.ndim > 1]
    euclidean, adamw = (torch.optim.AdamW(ws, lr=LR, weight_decay=0, fused=True) for _ in range(2))

    def idiom(power: int) -> None:
        (LAM * sum(w.abs().sum() if power == 1 else w.pow(2).sum() for w in ws)).backward()

    @torch.no_grad()
    def softshrink() -> None:
        for w in ws:
            w.copy_(nn.functional.softshrink(w, LR * LAM))

    def weight_decay() -> None:
        adamw.param_groups[0]["weight_decay"] = LAM
        adamw.step()
        adamw.param_groups[0]["weight_decay"] = 0

    def regularized(penalty: Penalty, mode: str, metric: str = "auto") -> Job:
        optimizer = adamw if metric == "auto" else euclidean  # the dual mode keeps other states in each
        return RegularizedOptimizer(optimizer, penalty, mode, metric=metric).step

    def side_by_side(penalty: Penalty, name: str) -> dict[str, Job]:
        found: dict[str, Job] = {}
        for mode, (how, metric) in KERNELS.items():
            for way in ("eager", "kernels"):
                own = torch.optim.AdamW(ws, lr=LR, weight_decay=0, fused=True)
                compile = way == "kernels"
                step = RegularizedOptimizer(own, penalty, how, metric=metric, compile=compile).step
                found[f"{way} {mode} {name}"] = step
        return found

    def compiled(metric: str | None, fused: bool) -> Job:
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(ws, lr=LR, weight_decay=0, fused=fused or None)
        if metric is not None:
            optimizer = RegularizedOptimizer(optimizer, L1(ws, LAM), "proximal", metric=metric)
        return torch.compile(optimizer.step)

    found: dict[str, Job] = {
        "in place": make_in_place(sum(w.numel() for w in ws), ws[0].device) if "in place" in wanted else adamw.step,
        "softshrink": softshrink,
        "plain": adamw.step,
        "weight_decay": weight_decay,
    }
    for kind, power in ((L1, 1), (L2, 2)):
        name, penalty = kind.__name__, kind(ws, LAM)
        found |= {
            f"idiom {name}": lambda power=power: idiom(power),
            f"loss {name}": lambda penalty=penalty: penalty().backward(),
            f"add_grad_ {name}": penalty.add_grad_,
            f"add_grad_(return_value=True) {name}": lambda penalty=penalty: penalty.add_grad_(return_value=True),
            f"prox_ {name}": lambda penalty=penalty: penalty.prox_(LR),
            f"coupled {name}": regularized(penalty, "coupled"),
            f"decoupled {name}": regularized(penalty, "decoupled"),
        }
        found |= {f"{mode} {name}": regularized(penalty, *arguments) for mode, arguments in MODES.items()}
    if matrices:
        lasso = {groups: GroupLasso(matrices, LAM, groups=groups) for groups in ("output", "input")}
        found |= {f"prox_ {groups}": lambda penalty=penalty: penalty.prox_(LR) for groups, penalty in lasso.items()}
        found |= {f"{mode} rows": regularized(lasso["output"], *arguments) for mode, arguments in MODES.items()}
    if any(name.startswith("kernels") for name in wanted):
        found |= side_by_side(L1(ws, LAM), "L1")
        found |= side_by_side(GroupLasso(matrices, LAM), "rows") if matrices else {}
        value = L1(ws, LAM)
        value.compile()
        found["kernels loss L1"] = lambda: value().backward()
    if any("compiled" in name for name in wanted):
        found["compiled plain"] = compiled(None, False)
        for metric in ("euclidean", "auto"):
            found |= {f"compiled {'fused ' * fused}{metric}": compiled(metric, fused) for fused in (False, True)}
    try:
        found["torchao elements"] = torchao(ws, [], "ElemGrouper", "ProxLasso")
        if matrices:
            rest = [w for w in ws if w.ndim == 1]
            found["torchao rows"] = torchao(matrices, rest, "Dim0Grouper", "ProxGroupLasso")
    except ImportError:
        pass
    return {name: job for name, job in found.items() if name in wanted}


def make_in_place(size: int, device: torch.device) -> Job:
    flat = torch.randn(size, device=device)
    return lambda: flat.mul_(-1)


def torchao(pruned: list[nn.Parameter], rest: list[nn.Parameter], grouper: str, prox: str) -> Job:
    from torchao.prototype.pat.optim import PruneOptimizer

    groups = [{"params": pruned, "group_type": grouper, "prox_type": prox, "reg_lambda": LAM}, {"params": rest}]
    return PruneOptimizer(torch.optim.AdamW([g for g in groups if g["params"]], lr=LR, weight_decay=0, fused=True)).step


def seconds(job: Job, device: str) -> float:
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        job()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    begin = time.process_time()
    job()
    return time.process_time() - begin


def interleaved(todo: dict[str, Job], repeats: int, device: str) -> dict[str, list[float]]:
    """The seconds that each job took in each round; after some rounds that warm up, two seconds at least."""
    for job in todo.values():
        job()
        job()
    taken: dict[str, list[float]] = {name: [] for name in todo}
    begin, rounds = time.perf_counter(), 0
    while rounds < repeats or time.perf_counter() < begin + 2:
        rounds += 1
        for name, job in todo.items():
            taken[name].append(seconds(job, device))
    return taken


def peak(job: Job, device: str) -> int:
    """The most bytes that a job has at once, beyond what was there before."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        job()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        job()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@torch.no_grad()
def errors(ws: list[nn.Parameter], dtype: torch.dtype) -> str:
    """How far the values of L1 and L2, and of their idioms, are from the sum in float64, the worse of the two."""
    stored = [w.to(dtype) for w in ws]
    ours, theirs = [], []
    for kind, power in ((L1, 1), (L2, 2)):
        exact = sum(w.double().abs().pow(power).sum() for w in stored)
        ours.append(float(abs(kind(stored, 1.0)().double() / exact - 1)))
        theirs.append(float(abs(sum(w.abs().pow(power).sum() for w in stored).double() / exact - 1)))
    return f"{max(ours):.0e}, {max(theirs):.0e}"


def column(shapes: Shapes, args: argparse.Namespace) -> dict[tuple[str, str], str]:
    """The figures of one model, by row."""
    torch.manual_seed(0)
    ws = [nn.Parameter(0.02 * torch.randn(shape, device=args.device)) for shape in shapes]
    for w in ws:
        w.grad = 1e-3 * torch.randn_like(w)
    size = sum(w.nbytes for w in ws)
    figures = {("the parameters", "MiB, in tensors"): f"{size / 2**20:.0f}, {len(ws)}"}
    chosen = [
        row
        for row in rows()
        if re.search(args.only, row.name)
        and (args.compile or "compiled" not in row.name)
        and args.kernels == row.name.startswith(("eager:", "kernels:"))
    ]
    memory = {job: name for job, name in MEMORY.items() if re.search(args.only, name) and not args.kernels}
    todo = jobs(ws, {job for row in chosen for job in (row.over, row.under)} | set(memory))
    taken = interleaved(todo, args.repeats, args.device)
    for row in chosen:
        if row.over in taken and row.under in taken:
            pairs = zip(taken[row.over], taken[row.under], strict=True)
            figures[row.name, row.measure] = f"{median(over / under for over, under in pairs):.2f}"
    for job, name in memory.items():
        if job in todo:
            figures[name, "MiB at the peak"] = f"{peak(todo[job], args.device) / 2**20:.1f}"
    if re.search(args.only, "value") and not args.kernels:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            figures[f"value in {str(dtype)[6:]}", "relative error, and the idiom's"] = errors(ws, dtype)
    return figures


def denormals(steps: int) -> None:
    """Trains a network half of whose inputs are always 0, and prints how many weights end up denormal."""
    optimizers = {
        "SGD": lambda params: torch.optim.SGD(params, lr=0.1),
        "Adam": lambda params: torch.optim.Adam(params, lr=1e-3),
    }
    ways = [(L2, 0.05, way) for way in ("in the loss", "coupled")]
    ways += [(L1, 1e-3, way) for way in ("in the loss", "coupled", "proximal")]
    print(f"| {steps} steps | | zero % | denormal % | forward pass, times that without them |\n|---|---|---|---|---|")
    for name, make in optimizers.items():
        for kind, lam, way in ways:
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
            penalty, plain = kind(model, lam), make(model.parameters())
            optimizer = plain if way == "in the loss" else RegularizedOptimizer(plain, penalty, way)
            x = torch.randn(64, 256)
            x[:, ::2] = 0
            y = torch.randint(10, (64,))
            for _ in range(steps):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x), y)
                (loss + penalty() if way == "in the loss" else loss).backward()
                optimizer.step()
            forward = partial(model, torch.randn(64, 256))
            w = model[0].weight.detach()
            small = w.abs() < torch.finfo(w.dtype).tiny
            shares = (f"{100 * float(mask.float().mean()):.1f}" for mask in (w == 0, small & (w != 0)))
            as_is = median(seconds(forward, "cpu") for _ in range(99))
            w.masked_fill_(small, 0)
            flushed = median(seconds(forward, "cpu") for _ in range(99))
            print(f"| {name} | {kind.__name__} {way} | {' | '.join(shares)} | {as_is / flushed:.1f} |", flush=True)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", default="", help="the rows whose name matches this regular expression")
    parser.add_argument("--models", default="GRSVW")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--denormals", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.denormals:
        denormals(12_000)
        return
    warnings.simplefilter("ignore")  # one penalty is in the loss and in optimizers here
    columns = {name: column(MODELS[name](), args) for name in args.models}
    print("| | | " + " | ".join(columns) + " |\n|---|---|" + "---|" * len(columns))
    for name, measure in dict.fromkeys(key for figures in columns.values() for key in figures):
        cells = (figures.get((name, measure), "") for figures in columns.values())
        print(f"| {name} | {measure} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
