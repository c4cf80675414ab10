import pytest
from drawing import KINDS, make

from unclip.pipelines.base import UnCLIPBase


@pytest.fixture(params=KINDS, ids=lambda k: f"{k[0]}-{k[1].__name__}")
def pipe(request, tmp_path) -> UnCLIPBase:
    return make(*request.param, tmp_path)
