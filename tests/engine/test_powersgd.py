"""PowerSGD on replicas in one process: full rank, low rank, error feedback, and what is not finite."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable

import pytest
import torch
from support.processes import HANG_SECONDS
from torch import Tensor

from dalle_scale.engine.powersgd import PowerSGD, orthonormal, pays


class Replicas:
    """As many threads as machines, whose collectives meet at a barrier."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._barrier = threading.Barrier(count, timeout=HANG_SECONDS)
        self._slots: list[list[Tensor]] = [[] for _ in range(count)]

    def run(self, work: Callable[[int], None]) -> None:
        errors: list[BaseException] = []

        def guarded(index: int) -> None:
            try:
                work(index)
            except BaseException as error:
                errors.append(error)
                self._barrier.abort()

        threads = [threading.Thread(target=guarded, args=(index,)) for index in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    def mean(self, index: int, tensors: list[Tensor]) -> None:
        self._slots[index] = [tensor.clone() for tensor in tensors]
        self._barrier.wait()
        means = [torch.stack(same).mean(dim=0) for same in zip(*self._slots, strict=True)]
        self._barrier.wait()
        for tensor, mean in zip(tensors, means, strict=True):
            tensor.copy_(mean)

    def all(self, index: int, flag: Tensor) -> Tensor:
        value = [flag.float()]
        self.mean(index, value)
        return value[0] == 1


def averaged(compressors: list[PowerSGD], gradients: list[list[Tensor]], scale: float = 1.0) -> list[list[Tensor]]:
    """What each replica's gradients become, which were multiplied by `scale`."""
    replicas, found = Replicas(len(compressors)), [[matrix.clone() for matrix in row] for row in gradients]

    def work(index: int) -> None:
        compressors[index].average(
            found[index],
            [scale] * len(found[index]),
            lambda tensors: replicas.mean(index, tensors),
            lambda flag: replicas.all(index, flag),
        )

    replicas.run(work)
    return found


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["random", "low rank", "ill-conditioned", "zero"])
def test_bases_are_orthonormal(kind: str) -> None:
    matrix = random(40, 8)
    if kind == "low rank":
        matrix = random(40, 2) @ random(2, 8, seed=1)
    if kind == "ill-conditioned":
        matrix = matrix * torch.logspace(0, -12, 8)
    basis = orthonormal(matrix * (kind != "zero"))
    torch.testing.assert_close(basis.T @ basis, torch.eye(8), rtol=0, atol=1e-5)
    if kind == "random":  # and span what they should
        torch.testing.assert_close(basis @ (basis.T @ matrix), matrix, rtol=1e-4, atol=1e-4)


def test_full_rank_is_the_exact_mean_and_leaves_nothing_behind() -> None:
    gradients = [[random(6, 10, seed=index), random(6, 6, seed=10 + index)] for index in range(3)]
    compressors = [PowerSGD(6, seed=5) for _ in range(3)]
    expected = [torch.stack(same).mean(dim=0) for same in zip(*gradients, strict=True)]
    for row in averaged(compressors, gradients):
        for matrix, mean in zip(row, expected, strict=True):
            torch.testing.assert_close(matrix, mean, rtol=1e-4, atol=1e-5)
    left_behind = torch.stack([compressor.errors[0] for compressor in compressors])
    torch.testing.assert_close(left_behind.mean(dim=0), torch.zeros(6, 10), rtol=0, atol=1e-5)


def test_replicas_agree_to_the_bit_and_the_best_directions_are_kept() -> None:
    signal = random(30, 2) @ random(2, 50, seed=1)
    gradients = [[signal + 0.01 * random(30, 50, seed=2 + index)] for index in range(4)]
    compressors = [PowerSGD(4, seed=5) for _ in range(4)]
    found = averaged(compressors, gradients)
    assert all(torch.equal(row[0], found[0][0]) for row in found)
    assert float((found[0][0] - signal).norm() / signal.norm()) < 0.02
    assert int(torch.linalg.matrix_rank(found[0][0])) <= 4


def test_what_is_left_out_comes_later() -> None:
    """The sum of what was sent and of the mean error is the sum of all means: nothing is lost over many steps."""
    compressors = [PowerSGD(1, seed=3) for _ in range(2)]
    sketches, sent, total = None, torch.zeros(8, 12), torch.zeros(8, 12)
    for update in range(20):
        gradients = [[random(8, 12, seed=100 * update + index)] for index in range(2)]
        total += (gradients[0][0] + gradients[1][0]) / 2
        sent += averaged(compressors, gradients)[0][0]
        sketches = sketches if sketches is not None else compressors[0]._sketches[0].clone()
    error = (compressors[0].errors[0] + compressors[1].errors[0]) / 2
    torch.testing.assert_close(sent + error, total, rtol=1e-4, atol=1e-3)
    assert torch.equal(compressors[0]._sketches[0], sketches) and torch.equal(compressors[1]._sketches[0], sketches)


def test_errors_stay_bounded() -> None:
    """A constant of rank 8 under noise, through a window of rank 1. (Without noise a fixed Q would always look in the
    same direction, since what is left behind is orthogonal to it.)"""
    compressors, sizes = [PowerSGD(1, seed=3) for _ in range(2)], []
    for update in range(400):
        row = [[random(8, 12) + random(8, 12, seed=1 + 2 * update + index)] for index in range(2)]
        averaged(compressors, row)
        sizes.append(float(compressors[0].errors[0].norm()))
    assert max(sizes[200:]) < 1.5 * max(sizes[:200]) and max(sizes) < 0.1 * 400 * float(random(8, 12).norm())


def test_gradients_with_their_errors_are_not_held_all_at_once() -> None:
    """Eight matrices and eight errors last; beside them is at most one matrix in the making."""
    shape, alive = (37, 53), []

    def all_reduce(tensors: list[Tensor]) -> None:
        alive.append(sum(type(found) is Tensor and found.shape == shape for found in gc.get_objects()))

    PowerSGD(2, seed=0).average([random(*shape) for _ in range(8)], [1.0] * 8, all_reduce, lambda flag: flag)
    assert len(alive) == 2 and max(alive) <= 17


def test_a_rank_without_matrices_answers_as_often_as_the_others() -> None:
    """At ZeRO 1 and 2 a rank may hold none; what is finite is asked of all ranks of the job."""
    asked: list[list[bool]] = [[], []]
    for answers, matrices in zip(asked, ([], [random(6, 6)]), strict=True):
        note = lambda flag, answers=answers: answers.append(bool(flag)) or flag  # noqa: E731
        PowerSGD(2, seed=0).average(matrices, [1.0] * len(matrices), lambda tensors: None, note)
    assert asked[0] == asked[1] == [True, True]


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_stops_all_and_keeps_errors(value: float) -> None:
    compressors = [PowerSGD(2, seed=1) for _ in range(2)]
    averaged(compressors, [[random(6, 6, seed=index), random(5, 9, seed=index)] for index in range(2)])
    before = [error.clone() for compressor in compressors for error in compressor.errors]
    broken = [[random(6, 6), random(5, 9)] for _ in range(2)]
    broken[1][1][2, 3] = value
    for row in averaged(compressors, broken):
        assert not any(bool(matrix.isfinite().any()) for matrix in row)
    after = [error for compressor in compressors for error in compressor.errors]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_16_bit_gradients() -> None:
    gradients = [[random(6, 10, seed=index).bfloat16()] for index in range(2)]
    [[first], [second]] = averaged([PowerSGD(6, seed=1) for _ in range(2)], gradients)
    assert first.dtype == torch.bfloat16 and torch.equal(first, second)
    torch.testing.assert_close(
        first.float(), (gradients[0][0].float() + gradients[1][0].float()) / 2, rtol=0.02, atol=0.02
    )


def test_scales_may_change_from_update_to_update() -> None:
    """What is left behind has no scale; powers of two are exact."""
    plain, scaled = ([PowerSGD(2, seed=1) for _ in range(2)] for _ in range(2))
    for update, scale in enumerate((2.0**10, 2.0**-3, 1.0)):
        gradients = [[random(6, 10, seed=10 * update + index)] for index in range(2)]
        want = averaged(plain, gradients)
        got = averaged(scaled, [[matrix * scale for matrix in row] for row in gradients], scale)
        assert all(torch.equal(b[0], a[0] * scale) for a, b in zip(want, got, strict=True))
        assert torch.equal(plain[0].errors[0], scaled[0].errors[0])


def test_where_it_pays() -> None:
    """The first is an attention matrix of the 12 billion, d = 3968, as 8 GPUs hold it, at rank 112."""
    assert pays(496, 3968, 112) and not pays(10, 10, 5) and pays(10, 10, 4)
