"""What a WeightLogger writes, read back from the files of TensorBoard."""

import pytest
import torch

from torch_regpen.tensorboard import WeightLogger

pytest.importorskip("tensorboard")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter


class Board:
    """A writer, and what is on the board."""

    def __init__(self, path):
        self.path = str(path)
        self.writer = SummaryWriter(self.path)

    def read(self):
        self.writer.flush()
        return EventAccumulator(self.path, size_guidance={"scalars": 0, "histograms": 0}).Reload()

    def tags(self):
        tags = self.read().Tags()
        return set(tags["scalars"]) | set(tags["histograms"])

    def steps(self, tag):
        return [event.step for event in self.read().Scalars(tag)]

    def scalar(self, tag):
        return self.read().Scalars(tag)[-1].value

    def histogram(self, name="w"):
        return self.read().Histograms(f"weights/{name}")[-1].histogram_value

    def bins(self, name="w"):
        """(left, right, count) of each bin that is not empty."""
        histogram = self.histogram(name)
        limits = histogram.bucket_limit
        pairs = zip([histogram.min, *limits[:-1]], limits, histogram.bucket, strict=True)
        return [(left, right, count) for left, right, count in pairs if count]


def log(board, source, loss=None, **kw):
    WeightLogger(board.writer, source, **kw).step(loss=loss)


def normal(*shape, scale=0.1, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale
