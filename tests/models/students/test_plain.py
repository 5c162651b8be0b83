"""A student as a torch module: the same function, there and back, in every kind, and in fewer bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lichen.core import tree as trees
from lichen.core.errors import LichenError
from lichen.core.tree import Tree
from lichen.models.students.plain import code_of, parts_of, to_plain, to_student
from lichen.models.students.rounded import restore_state, round_state
from lichen.models.students.student import Student
from lichen.models.students.students import ImageCNN, ImageMLP, TextCNN, TwoLayerTransformer

STUDENTS: dict[str, tuple[str, Student]] = {
    "mlp": ("image-mlp", ImageMLP(12, hidden=(5,), classes=3)),
    "deep mlp": ("image-mlp", ImageMLP(12, hidden=(5, 4, 6), classes=2)),
    "linear": ("image-mlp", ImageMLP(12, hidden=(), classes=2)),
    "cnn": ("image-cnn", ImageCNN(8, width=3, classes=4)),
    "cnn of odd side and colours": ("image-cnn", ImageCNN(7, channels=3, width=2, classes=2)),
    "text cnn": ("text-cnn", TextCNN(11, width=4, classes=3)),
    "transformer": ("transformer", TwoLayerTransformer(11, width=8, classes=3, max_length=9)),
}


def drawn(student: Student) -> Tree:
    """Tensors with no two alike, so that an exchanged row or axis would be seen."""
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(shape, generator=generator) for name, shape in student.shapes().items()}


def batch_of(student: Student) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(7)
    if student.row_shape:
        return (torch.randn(6, *student.row_shape, generator=generator),)
    ids_BT = torch.randint(11, (6, 7), generator=generator)
    length_B = torch.tensor([7, 1, 2, 3, 5, 6])
    return ids_BT, (torch.arange(7) < length_B[:, None]).long()


def module_of(kind: str, student: Student, state: Tree) -> Any:
    scope: dict[str, Any] = {"torch": torch}
    exec(code_of(kind, student.shapes(), student.row_shape), scope)
    scope["model"].load_state_dict(state)
    return scope["model"].eval()


@pytest.mark.parametrize("name", STUDENTS)
def test_the_module_computes_what_the_student_computes(name: str) -> None:
    kind, student = STUDENTS[name]
    tree, inputs = drawn(student), batch_of(student)
    parts = parts_of(kind, student.shapes(), student.row_shape)
    module = module_of(kind, student, to_plain(parts, tree))
    batch = {key: x[None] for key, x in zip(student.inputs, inputs, strict=True)} | {"active_C": torch.ones(1).bool()}
    expected_BK = student.logits(trees.broadcast(tree, 1), {}, batch)[0]
    with torch.no_grad():
        torch.testing.assert_close(module(*inputs), expected_BK, rtol=1e-4, atol=1e-4)
    assert float(expected_BK.std(0).min()) > 0.05, "rows that all answer alike would show nothing"
    back = to_student(parts, to_plain(parts, tree))
    assert back.keys() == tree.keys()
    assert all(torch.equal(back[key], x) for key, x in tree.items())


@pytest.mark.parametrize("name", STUDENTS)
def test_int8_is_off_by_half_a_step_at_most_and_f16_by_a_rounding(name: str) -> None:
    kind, student = STUDENTS[name]
    state = to_plain(parts_of(kind, student.shapes(), student.row_shape), drawn(student))
    eighth, half = round_state(state, "int8"), round_state(state, "f16")
    assert restore_state(eighth).keys() == restore_state(half).keys() == state.keys()
    for key, x in state.items():
        y = restore_state(eighth)[key]
        if x.dim() < 2:
            assert torch.equal(x, y)
            continue
        step_F = x.flatten(1).abs().amax(1) / 127
        assert eighth[key].dtype == torch.int8
        assert bool(((x - y).flatten(1).abs() <= 0.501 * step_F[:, None]).all())
        assert torch.equal(restore_state(half)[key], x.half().float())
    assert round_state(state, "f32").keys() == state.keys()


def test_what_cannot_be_rounded_or_is_of_another_kind_is_refused() -> None:
    with pytest.raises(LichenError, match="tensor 'w' holds numbers that are not finite"):
        round_state({"w": torch.tensor([[1.0, float("nan")]])}, "f32")
    assert not bool(restore_state(round_state({"w": torch.tensor([[1e30]])}, "f16"))["w"].isfinite()), (
        "the gate sees it"
    )
    mlp = STUDENTS["mlp"][1]
    for kind, shapes in (
        ("image-cnn", mlp.shapes()),
        ("text-cnn", mlp.shapes()),
        ("transformer", mlp.shapes()),
        ("image-mlp", STUDENTS["cnn"][1].shapes()),
        ("image-mlp", {**mlp.shapes(), "control.layer0.weight": (5, 12)}),
    ):
        with pytest.raises(LichenError, match="not those of a student"):
            parts_of(kind, shapes, (1, 8, 8))
