"""What exact zeros are worth on a CUDA device: two of four weights zero, in float16.

python tests/benchmarks/zeros_on_cuda.py
"""

from statistics import median

import torch
from torch import nn

from torch_regpen import L0
from torch_regpen.groups import NM

ROUNDS, CALLS = 30, 10


def milliseconds(*functions):
    """The median time of a call of each function, run in turns."""
    times = [[] for _ in functions]
    for _ in range(ROUNDS):
        for function, of_function in zip(functions, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(CALLS):
                function()
            end.record()
            end.synchronize()
            of_function.append(start.elapsed_time(end) / CALLS)
    return [median(of_function[5:]) for of_function in times]


@torch.no_grad()
def two_of_four():
    """A Linear whose weights `L0(groups=NM(2, 4))` made zero, dense and in torch's semi-structured form."""
    print(
        "A Linear, two of four weights zero\n\n| size | batch | dense, ms | 2:4, ms | times as fast |\n"
        + "|---" * 5
        + "|"
    )
    for size in (4096, 8192):
        layer = nn.Linear(size, size, bias=False, device="cuda", dtype=torch.float16)
        L0(layer, 1.0, groups=NM(2, 4)).prox_(1.0)
        sparse = nn.Linear(size, size, bias=False, device="meta")
        sparse.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(layer.weight.detach()), requires_grad=False)
        for batch in (64, 1024, 8192):
            x = torch.randn(batch, size, device="cuda", dtype=torch.float16)
            torch.testing.assert_close(sparse(x), layer(x), rtol=1e-2, atol=1e-2)
            dense_ms, sparse_ms = milliseconds(lambda x=x, layer=layer: layer(x), lambda x=x, sparse=sparse: sparse(x))
            print(f"| {size} | {batch} | {dense_ms:.3f} | {sparse_ms:.3f} | {dense_ms / sparse_ms:.2f} |", flush=True)


if __name__ == "__main__":
    two_of_four()
