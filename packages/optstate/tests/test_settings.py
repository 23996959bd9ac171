"""Settings reject what they cannot mean, and ``--out`` means one picture."""

from pathlib import Path

import pytest

from optstate.demo.settings import Settings, picture_path


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("batch", 0),
        ("context", 1),
        ("width", 0),
        ("width", 48),
        ("depth", 0),
        ("evaluations", 0),
        ("validation_batches", 0),
        ("seed", -1),
        ("lr", float("inf")),
    ],
)
def test_a_bad_number_is_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}={value}: must be"):
        Settings(**{name: value})


def test_picture_path(tmp_path: Path) -> None:
    assert picture_path(tmp_path) == tmp_path / "demo.png"
    assert picture_path(Path("new/folder")) == Path("new/folder/demo.png")
    assert picture_path(Path("new/curve.PNG")) == Path("new/curve.PNG")
    with pytest.raises(ValueError, match=r"ending in \.png"):
        picture_path(Path("curve.svg"))
