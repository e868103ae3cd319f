"""A tree with arrays comes back from its file as it was, or the file is refused by name."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanoslime.storage.array_file import read_tree, write_tree
from nanoslime.types import RunError


@dataclass(frozen=True, slots=True)
class Leaf:
    values: list[float]
    array: np.ndarray | None
    place: tuple[int, int] = (0, 1)


@pytest.mark.parametrize(
    "tree",
    [
        [],
        {},
        [1, 2, -3],
        [2**63 - 1, -(2**63)],
        [2**63, -1],
        [2**70],
        [1, 2.5],
        [1, True],
        [True, False],
        [0.1 + 0.2, -1 / 3, float("inf")],
        [1, "2", None],
        [[1, 2], [3.5], []],
        {"label": ["4", 2], "nested": {"a": [{"b": [7]}]}, "text": "line\nand\u2028 \x00é"},
    ],
)
def test_numbers_texts_and_lists_come_back_with_their_types(tmp_path: Path, tree: Any) -> None:
    write_tree(tmp_path / "file.npz", tree)
    assert repr(read_tree(tmp_path / "file.npz", "a tree", type(tree))) == repr(tree)


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.int16, np.int32, np.float16, np.float32])
@pytest.mark.parametrize("shape", [(0,), (5,), (3, 2), (2, 3, 4), (0, 3)])
def test_arrays_come_back_bit_for_bit(tmp_path: Path, shape: tuple[int, ...], dtype: Any) -> None:
    array = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    write_tree(tmp_path / "file.npz", {"one": array, "others": [array[:1], array[::-1]]})
    read = read_tree(tmp_path / "file.npz", "a tree", dict[str, Any])
    pairs = zip([array, array[:1], array[::-1]], [read["one"], *read["others"]], strict=True)
    for mine, theirs in pairs:
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        assert mine.tobytes() == theirs.tobytes()


def test_a_dataclass_comes_back_and_nan_stays_in_a_list_of_numbers(tmp_path: Path) -> None:
    write_tree(tmp_path / "file.npz", [Leaf([1.0, float("nan")], np.arange(3)), Leaf([], None)])
    first, second = read_tree(tmp_path / "file.npz", "leaves", list[Leaf])
    assert first.values[0] == 1.0 and np.isnan(first.values[1])
    assert first.array is not None and first.array.tolist() == [0, 1, 2]
    assert second == Leaf([], None)


def test_what_is_no_json_and_no_array_of_numbers_becomes_its_text(tmp_path: Path) -> None:
    tree = {"scalar": np.array(3), "texts": np.array(["a"]), "path": Path("x")}
    write_tree(tmp_path / "file.npz", tree)
    read = read_tree(tmp_path / "file.npz", "a tree", dict[str, Any])
    assert read == {"scalar": "3", "texts": "['a']", "path": "x"}


def test_a_file_of_another_type_is_refused_by_name(tmp_path: Path) -> None:
    write_tree(tmp_path / "file.npz", [{"values": ["one"], "array": None}])
    with pytest.raises(RunError, match=r"file\.npz is not a list of leaves: .*values") as refused:
        read_tree(tmp_path / "file.npz", "a list of leaves", list[Leaf])
    assert "\n" not in str(refused.value)
    with pytest.raises(RunError, match=r"none\.npz is not a list of leaves"):
        read_tree(tmp_path / "none.npz", "a list of leaves", list[Leaf])
