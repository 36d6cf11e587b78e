import pytest
from helpers.ranks import failures_on


@pytest.fixture(scope="module")
def failures(request, tmp_path_factory):
    """What each check of the module failed with, by the number of processes and by its name."""
    return {
        world: failures_on(world, checks, tmp_path_factory.mktemp("ranks"))
        for world, checks in request.module.CHECKS.items()
    }
