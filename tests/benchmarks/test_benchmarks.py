"""The benchmarks of accuracy and of the rotation's theory, run small, and what they are made of."""

import math
import random
import re

import numpy as np
import pytest
import torch
from problems import gaussian, generator, sylvester

import accuracy
import rotation
from lib import baselines
from rhtcomm.rotation import hadamard
from theory import errors, inputs, laws

Table = dict[str, list[str]]


def tables_after(text: str, title: str) -> list[Table]:
    """The tables under a title: cells by the first one, or first two where rows share it."""
    _, found, rest = text.partition(title)
    assert found, title
    tables = []
    for block in re.findall(r"(?:^\|.*\n)+", rest, flags=re.MULTILINE):
        rows = [
            [cell.strip() for cell in line.strip("|\n").split("|")] for line in block.split("\n")
        ]
        rows = [row for row in rows if len(row) > 1][2:]
        shared = len({row[0] for row in rows}) < len(rows)
        tables.append({" ".join(row[: 1 + shared]): row[1 + shared :] for row in rows})
    return tables


@pytest.fixture(scope="module")
def theory(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("rotation")
    text = str(rotation.main(["--quick", "--out", str(folder)]))
    assert (folder / "rotation.md").read_text() == text
    assert (folder / "rotation.png").stat().st_size > 10_000
    return text


@pytest.mark.parametrize("metric", ["Kolmogorov", "1-Wasserstein"])
def test_two_transforms_approach_the_gaussian_and_one_does_not(theory: str, metric: str) -> None:
    one, two, three = tables_after(theory, f"{metric} distance, k = 1")[:3]
    stuck = {"Kolmogorov": "0.34", "1-Wasserstein": "0.54"}[metric]  # Phi(1) - 1/2; of +-1
    assert one["one-hot"] == [*[stuck] * 6, "0.00"]
    assert float(two["one-hot"][-1]) == pytest.approx(-0.5, abs=0.01)
    for table in (two, three):
        slopes = [float(row[-1]) for row in table.values() if row[-1]]
        assert len(slopes) >= 5
        assert max(slopes) < -0.48


def test_covariances_need_three_transforms(theory: str) -> None:
    *_, two, three, unconditional = tables_after(theory, "## Covariances")[:4]
    assert two["two-hot"][:-1] == ["1.000"] * 6
    assert two["(1, .6, .3, 0, ...)"][:-1] == [f"{1.2 / 1.45:.3f}"] * 6  # 2 * 1 * .6 / |x|^2
    for row in three.values():
        assert -0.6 < float(row[-1]) < -0.3
    # Plain covariance for k = 1, 2, 3, then that of squares; E z^4 - 1 = 2 - 2 sum u^4 = 2 - 4/d.
    assert [float(cell) for cell in unconditional["two-hot"]] == pytest.approx(
        [1, 0, 0, 1, 2 - 4 / 256, 0], abs=0.1
    )


def test_errors_match_a_dense_rotation_at_the_promised_count(theory: str) -> None:
    one_shot, averaged = tables_after(theory, "## Errors of quantizers")[:2]
    promised = {name: row for name, row in one_shot.items() if "**" in name}
    assert len(promised) == 12
    for name, row in promised.items():
        ratios = torch.tensor([float(cell) for cell in row[1:-1]])
        # 2^17 coordinates, an error with a kurtosis up to 300, and lattices at d = 256.
        assert abs(ratios.median() - 1) < 0.08, name
        bias = torch.tensor([float(cell) for cell in averaged[name][1:-1]])
        assert abs(bias.median() - 1) < 0.1, name
    three = 1 + list(inputs.inputs(16)).index("(1, .6, .3, 0, ...)")
    assert float(one_shot["VectorQuantizer, b = 2 2"][three]) > 1.15
    assert float(averaged["VectorQuantizer, b = 2 2"][three]) > 1.5
    assert float(averaged["DRIVE 1"][three]) > 100
    drive = tables_after(theory, "DRIVE on (1, .6, .3, 0, ...)")[0]
    assert drive["1"] == ["0.4500", "450"]
    assert float(drive["2"][1]) == pytest.approx(0.571, rel=0.1)


def test_distance_from_normal_by_quadrature() -> None:
    values = np.array([-1.3, -0.2, 0.1, 0.1, 2.0])
    x = np.linspace(-9, 9, 1_800_001)
    normal = torch.special.ndtr(torch.from_numpy(x)).numpy()
    gap = np.abs((values[:, None] <= x).mean(axis=0) - normal)
    expected = (gap.max(), gap.sum() * (x[1] - x[0]))
    assert laws.distance_from_normal(values) == pytest.approx(expected, abs=2e-5)
    weighted = laws.distance_from_normal(
        np.array([-1.3, -0.2, 0.1, 2.0]), np.array([1.0, 1.0, 2.0, 1.0])
    )
    assert weighted == pytest.approx(laws.distance_from_normal(values), abs=1e-12)


@pytest.mark.parametrize("size", [16, 256, 2048])
def test_sampling_uses_the_transform_of_the_package(size: int) -> None:
    x = gaussian(4 * size).view(4, size)
    assert torch.allclose(inputs.hadamard(x), hadamard(x) * size**-0.5, atol=1e-5)
    eye = torch.eye(size)
    first, *_ = inputs.rotated(eye[3], 8, seed=0)
    signs = first[:, :1] * size**0.5
    column = torch.from_numpy(sylvester(size)[3]).float() * size**0.5
    assert torch.allclose(first * size**0.5, signs * column * column[0], atol=1e-5)


def test_dense_rotations_are_orthogonal_and_all_different() -> None:
    dense = errors.DenseRotations(32, 40)
    x = gaussian(32)
    y = dense.forward(x)
    assert y.shape == (40, 32)
    assert torch.allclose(dense.inverse(y), x.expand(40, -1), atol=1e-5)
    assert (torch.cdist(y, y) + 100 * torch.eye(40)).min() > 1


@pytest.fixture(scope="module")
def accuracies(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("accuracy")
    text = str(accuracy.main(["--quick", "--out", str(folder)]))
    assert (folder / "accuracy.md").read_text() == text
    assert (folder / "accuracy.png").stat().st_size > 10_000
    return text


def test_errors_and_wire_lengths_are_those_of_the_quantizers(accuracies: str) -> None:
    points, *equal, promises = tables_after(accuracies, "## Error of one sender")
    for name, bits, expected in (
        ("Eden, b = 2", 2 + (128 + 16 * 32) / 65536, 0.1331),
        ("QuicFL, b = 4", 4 + (128 + 16 * 32) / 65536, 0.011587),
        ("uniform, one RHT, b = 3", 3 + 16 * 64 / 65536, 0.183),
        ("QSGD, max norm, b = 5", 5 + 128 * 32 / 65536, 0.00795),
        ("Lattice, b = 4", 683 * 32 / 4096 + 16 * 32 / 65536, 0.0216),
        ("TernGrad, no clipping", (8 * 13108 + 16 * 32) / 65536, 2.1),
    ):
        wire, gaussian_error, *_ = points[name]
        assert float(wire.split(" ")[0]) == pytest.approx(bits, abs=6e-4), name
        assert float(gaussian_error.split(" ")[0]) == pytest.approx(expected, rel=0.06), name
    for name in ("QuicFL, b = 8", "Eden, b = 8", "Lattice, b = 8"):
        cells = [float(cell.split(" ")[0]) for cell in points[name][1:]]
        assert cells == pytest.approx([cells[0]] * len(cells), rel=0.3), name
    for table in equal:
        best = table["VectorQuantizer"]
        for name in ("Eden", "QuicFL", "uniform, one RHT", "QSGD, 2-norm", "QSGD, max norm"):
            pairs = zip(table[name], best, strict=True)
            assert all(float(other) > float(own) for other, own in pairs), name
    for bits, least in (("1", 16), ("2", 18), ("4", 10)):
        *_, exact_off_by, _, _, vector_against_eden = promises[bits]
        assert abs(float(exact_off_by.rstrip("%"))) < 3
        assert float(vector_against_eden.rstrip("%")) < -least


@pytest.mark.parametrize("method", ["uniform", "qsgd", "qsgd_elias", "terngrad"])
def test_baselines_are_unbiased(method: str) -> None:
    x, draws, source = gaussian(600, 5) * torch.linspace(0.1, 3, 600), 2000, generator(6)
    x[7] = 0
    quantize = {
        "uniform": lambda: baselines.uniform(x, 2, 256, source),
        "qsgd": lambda: baselines.qsgd(x, 3, 2, source),
        "qsgd_elias": lambda: baselines.qsgd_elias(x, 4, source),
        "terngrad": lambda: baselines.terngrad(x, 256, math.inf, source),
    }[method]
    estimates = torch.stack([quantize()[0] for _ in range(draws)])
    # The sum of 600 squared errors of means: its standard error is near 8% of it.
    squared = (estimates.mean(dim=0) - x).square().sum()
    assert 0.7 < squared / (estimates.var(dim=0).sum() / draws) < 1.3


def omega(n: int) -> str:
    code = "0"
    while n > 1:
        code = f"{n:b}{code}"
        n = len(f"{n:b}") - 1
    return code


def test_elias_length_is_that_of_the_written_code() -> None:
    assert [omega(n) for n in (1, 2, 8, 17)] == ["0", "100", "1110000", "10100100010"]
    x = torch.zeros(700)
    picked = random.Random(3).sample(range(700), 40)
    x[picked] = gaussian(40)
    estimate, length = baselines.qsgd_elias(x, 16, generator(1))
    message = ""
    for row in estimate.split(512):
        scale = float(x[:512].norm() if len(row) == 512 else x[512:].norm())
        last = -1
        for column in row.nonzero().flatten().tolist():
            level = round(abs(float(row[column])) / scale * 16)
            message += omega(column - last) + "-" + omega(level)
            last = column
    assert length == len(message) + 2 * 32
