import pytest
import torch
from hypothesis import settings

settings.register_profile("same every time", derandomize=True, deadline=None, max_examples=50, database=None)
settings.load_profile("same every time")


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
