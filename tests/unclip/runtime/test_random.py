"""Counter-based random numbers: the same in any split and on any device, uniform, normal and independent."""

import math
from itertools import combinations
from statistics import NormalDist

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from unclip.runtime.random import SCALARS, Stream, integers, normal, scalars, uniform

MAKERS = {
    "uniform": lambda i: uniform(5, Stream.SCENE_PLACE, i, 3, 7),
    "normal": lambda i: normal(5, Stream.NOISE, i, 3, 7),
    "integers": lambda i: integers(5, Stream.SCENE_BACKGROUND, i, 3, 7, below=21),
    "scalars": lambda i: scalars(5, i),
}
GOLDEN_INTEGERS = [[1373756116, 489746837, 880232480], [325706920, 918987924, 1913142524]]
GOLDEN_UNIFORMS = [1380745, 13161620]  # of 2^24
GOLDEN_NORMALS = [[889928, -1422505, 603531], [-3795789, 110176, 8242165]]  # of 2^22
examples = st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=8).map(torch.tensor)
made = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def kolmogorov_smirnov(probabilities: Tensor) -> float:
    """sqrt(n) times the largest distance of the numbers' distribution from uniform: above 1.95 once in a thousand times."""
    at = probabilities.double().flatten().sort().values
    n = len(at)
    grid = torch.arange(n, dtype=torch.float64) / n
    return float(torch.maximum(grid + 1 / n - at, at - grid).max()) * math.sqrt(n)


def correlation(a: Tensor, b: Tensor) -> float:
    """sqrt(n) times the correlation of two rows of numbers: standard normal if they are independent."""
    a, b = (x.double().flatten() - x.double().mean() for x in (a, b))
    return float((a * b).mean() / (a.std() * b.std())) * math.sqrt(a.numel())


# ---------------------------------------------------------------------------------------------- determinism


def test_the_numbers_are_these():
    """Training runs are resumed by them: a change of one bit changes every run."""
    indices = torch.tensor([0, 2**40])
    assert integers(0, Stream.NOISE, indices, 3, below=2**31).tolist() == GOLDEN_INTEGERS
    assert uniform(-1, Stream.TIMESTEP, indices).mul(2**24).tolist() == GOLDEN_UNIFORMS
    assert normal(2**70, Stream.NOISE, indices, 3).mul(2**22).tolist() == GOLDEN_NORMALS


@made
@given(examples, st.data())
def test_any_split_gives_an_example_the_same_numbers(make, indices, data):
    whole = make(indices)
    at = data.draw(st.lists(st.integers(0, len(indices) - 1), min_size=1))
    assert torch.equal(make(indices[at]), whole[at])
    assert torch.equal(make(indices[at[0]]), whole[at[0]])  # one by one, without a batch's dimension


def test_an_element_does_not_depend_on_how_many_there_are():
    indices = torch.arange(4)
    assert torch.equal(normal(1, 0, indices, 100)[:, :7], normal(1, 0, indices, 7))
    assert torch.equal(normal(1, 0, indices, 4, 5).flatten(1), normal(1, 0, indices, 20))
    assert torch.equal(uniform(1, 0, indices), uniform(1, 0, indices, 3)[:, 0])


def test_scalars_are_the_first_streams():
    indices = torch.tensor([0, 1, 2**33, 5])
    columns = scalars(9, indices)
    assert columns.shape == (4, SCALARS)
    for stream in range(SCALARS):
        assert torch.equal(columns[:, stream], uniform(9, stream, indices))


def make_all(indices: Tensor) -> dict[str, Tensor]:
    return {name: make(indices) for name, make in MAKERS.items()}


def test_a_compiled_graph_makes_the_same_numbers():
    compiled = torch.compile(make_all, fullgraph=True)
    for indices in (torch.tensor([0, 3, 2**45, -7]), torch.arange(4)):
        found = compiled(indices)
        assert all(torch.equal(found[name], numbers) for name, numbers in make_all(indices).items())


@made
def test_nothing_is_read_back_to_the_host(make):
    assert make(torch.arange(4, device="meta")).is_meta  # which has no values to read


@pytest.mark.gpu
def test_a_gpu_makes_the_same_numbers():
    indices = torch.arange(1000) * 12345678901
    wanted = make_all(indices)
    for make in (make_all, torch.compile(make_all, fullgraph=True)):
        found = make(indices.cuda())
        assert all(torch.equal(found[name].cpu(), numbers) for name, numbers in wanted.items())


# ---------------------------------------------------------------------------------------------- distributions

NEIGHBOURS = torch.arange(2000)


def test_uniforms_are_uniform():
    numbers = uniform(0, Stream.TIMESTEP, NEIGHBOURS, 500)
    assert numbers.dtype == torch.float32
    assert numbers.min() >= 0 and numbers.max() < 1
    assert kolmogorov_smirnov(numbers) < 1.95
    assert kolmogorov_smirnov(uniform(0, Stream.TIMESTEP, torch.arange(1_000_000))) < 1.95
    assert kolmogorov_smirnov(scalars(0, torch.arange(100_000))) < 1.95


def test_normals_are_normal():
    numbers = normal(0, Stream.NOISE, NEIGHBOURS, 1000).double()
    assert kolmogorov_smirnov(torch.special.ndtr(numbers)) < 1.95
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs((numbers**power).mean() - moment) < 4 * math.sqrt(variance / numbers.numel())
    for far in (2, 3, 4, 4.5):
        expected = NormalDist().cdf(-far) * numbers.numel()
        for side in (numbers, -numbers):
            assert abs((side > far).sum() - expected) < 4 * math.sqrt(expected)


@pytest.mark.parametrize("below", [1, 2, 21, 1000])
def test_integers_are_alike_often(below):
    numbers = integers(0, Stream.SCENE_BACKGROUND, NEIGHBOURS, 100, below=below)
    counts = numbers.flatten().bincount(minlength=below)
    assert len(counts) == below
    expected = numbers.numel() / below
    chi_square = float(((counts - expected) ** 2).sum() / expected)
    assert abs(chi_square - (below - 1)) <= 4 * math.sqrt(2 * (below - 1))


def test_integers_below_the_largest_number_fill_all_bits():
    numbers = integers(0, 0, NEIGHBOURS, 100, below=2**31)
    for bit in range(31):
        ones = int((numbers >> bit & 1).sum())
        assert abs(ones - numbers.numel() / 2) < 4 * math.sqrt(numbers.numel()) / 2


@pytest.mark.parametrize("below", [0, -3, 2**31 + 1])
def test_integers_of_no_range_are_refused(below):
    with pytest.raises(ValueError, match=rf"from 1 to 2\^31, got {below}"):
        integers(0, 0, NEIGHBOURS, below=below)


# ---------------------------------------------------------------------------------------------- independence


@pytest.mark.parametrize("make", [normal, uniform])
def test_neighbours_are_independent(make):
    numbers = make(3, Stream.NOISE, NEIGHBOURS, 512)
    shifted = (numbers[1:], numbers[:-1]), (numbers[2:], numbers[:-2]), (numbers[:, 1:], numbers[:, :-1])
    other_ways = make(4, Stream.NOISE, NEIGHBOURS, 512), make(3, Stream.EMBEDDING_NOISE, NEIGHBOURS, 512)
    far = make(3, Stream.NOISE, NEIGHBOURS + 2**32, 512)
    for a, b in (*shifted, *((numbers, other) for other in (*other_ways, far))):
        assert abs(correlation(a, b)) < 4
        assert abs(correlation(a.abs() - a.abs().mean(), b.abs() - b.abs().mean())) < 4


def test_streams_are_independent():
    of_stream = [uniform(0, stream, torch.arange(50_000)) for stream in Stream]
    found = torch.tensor([correlation(a, b) for a, b in combinations(of_stream, 2)])
    assert found.abs().max() < 4.5
    assert abs(found.std() - 1) < 0.2


def test_no_number_comes_again_too_often():
    """Birthdays: of 2^20 numbers of 31 bits, about 2^40 / 2^32 = 256 are seen before."""
    numbers = integers(1, Stream.NOISE, torch.arange(1024), 1024, below=2**31).flatten()
    assert abs(numbers.numel() - len(numbers.unique()) - 256) < 4 * 16
