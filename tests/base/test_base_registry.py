import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_recipes.base.errors import UserError
from qlora_recipes.base.registry import Registry

SHAPES = Registry[Callable[[], int]]("shape", "shapes_of_a_test")
MODULE = """
from test_base_registry import SHAPES

@SHAPES.register("square")
def corners():
    return 4

SHAPES.add("triangle", lambda: 3)
"""


@pytest.fixture(autouse=True)
def shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that adds two shapes once it is imported."""
    (tmp_path / "shapes_of_a_test.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "test_base_registry", sys.modules[__name__])


def test_the_modules_of_a_registry_are_imported_at_the_first_look_up():
    assert "shapes_of_a_test" not in sys.modules
    assert SHAPES["square"]() == 4
    assert "shapes_of_a_test" in sys.modules
    assert SHAPES.names() == ["square", "triangle"]
    assert SHAPES.find("triangle", "--shape")() == 3


@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        ("circle", "", "no shape is called circle; the shapes are square, triangle"),
        ("triangel", "--shape", "--shape triangel: no shape is called triangel; did you mean triangle?"),
    ],
)
def test_an_unknown_name_is_refused_with_the_known_ones(name, option, message):
    with pytest.raises(UserError) as error:
        SHAPES.find(name, option)
    assert str(error.value) == message


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match=r"^two shapes are called square$"):
        SHAPES.add("square", lambda: 5)
