import pytest
from drawing import KINDS, OTHERS, make

from unclip.pipelines.base import UnCLIPBase


def name(kind: tuple) -> str:
    return f"{kind[0]}-{kind[1].__name__}"


@pytest.fixture(params=KINDS, ids=name)
def pipe(request, tmp_path) -> UnCLIPBase:
    """The deprecated classes' successors."""
    return make(*request.param, tmp_path)


@pytest.fixture(params=KINDS + OTHERS, ids=name)
def every(request, tmp_path) -> UnCLIPBase:
    """Each of the pipelines."""
    return make(*request.param, tmp_path)
