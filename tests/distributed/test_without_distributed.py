"""On a build of PyTorch without torch.distributed all works but sharding, of which there is none."""

import subprocess
import sys

BLOCK = """
import sys
import torch
torch.distributed.is_available = lambda: False
sys.modules["torch.distributed.tensor"] = None
"""

USE = """
from torch import nn
from torch_regpen import L1, GroupLasso, RegularizedOptimizer
from torch_regpen.distributed import shards
from torch_regpen.export import dead_units, prune_masks, sparse_state_dict
from torch_regpen.path import lam_max
from torch_regpen.report import report
from torch_regpen.inspect.histogram import histogram_counts

model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(8, 4)
penalty = L1(model, 0.1) + GroupLasso(model, 10.0)
optimizer = RegularizedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), penalty, "proximal")
assert penalty().item() > 0
penalty().backward()
model[0].weight.grad.zero_()  # a gradient of the penalty would undo what the prox does
for _ in range(50):
    optimizer.step()
assert (model[0].weight == 0).all()
assert penalty.stationarity() < 100
assert "12/12" in penalty.summary()
assert dead_units(model) == {"0.weight": [0, 1, 2]}
assert histogram_counts(model[0].weight)[0] == 12
assert lam_max(penalty.penalties[0], lambda: model(x).square().sum()) > 0
torch.save(sparse_state_dict(model), sys.argv[1])
assert "3/3" in report(sys.argv[1])
assert prune_masks(model).keys() == {"0.weight"}
assert not isinstance(model[0].bias, shards.DTensor)
print("done")
"""


def test_all_but_sharding_works_without_torch_distributed(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", BLOCK + USE, str(tmp_path / "model.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "done\n", done.stderr
