"""Names of the user's own code: found, or refused, without importing it."""

import sys

import pytest

from nanoslime.plugins import resolve
from tools.submit.plugins import check_importable

TABLE = {"known": "nanoslime.plugins:target"}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that cannot be imported, in a directory beside Python's path."""
    inner = tmp_path / "here" / "my_pkg" / "inner"
    inner.mkdir(parents=True)
    (tmp_path / "here" / "my_pkg" / "__init__.py").write_text("raise SystemExit('imported')")
    (inner / "algorithm.py").write_text("import no_such_torch\n")
    return str(tmp_path / "here")


@pytest.mark.parametrize(
    "name", ["known", "my_pkg:A", "my_pkg.inner.algorithm:A", "json.tool:main"]
)
def test_a_module_is_found_without_importing_it(package, name):
    check_importable(name, TABLE, "algorithm.name", [package])
    assert not [module for module in sys.modules if module.startswith("my_pkg")]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("my_pkg.inner.algoritm:A", "algorithm.name='my_pkg.inner.algoritm:A': there is no module"),
        ("my_pkg.outer.algorithm:A", "there is no module my_pkg.outer;"),
        ("my_pkg.inner.algorithm.more:A", "there is no module my_pkg.inner.algorithm.more;"),
        ("no_such_pkg.a:A", "there is no module no_such_pkg;"),
        (":A", "algorithm.name=':A' is unknown; choose one of known, or \"package.module:name\""),
        ("my_pkg:", "is unknown"),
        ("my_pkg..inner.algorithm:A", "is unknown"),
        (".my_pkg:A", "is unknown"),
        ("my_pkg.inner.algorithm:A B", "is unknown"),
        ("unknown", "algorithm.name='unknown' is unknown; choose one of known"),
    ],
)
def test_a_missing_module_is_named(package, name, says):
    with pytest.raises(ValueError, match=says):
        check_importable(name, TABLE, "algorithm.name", [package])


def test_without_the_directory_the_package_is_not_found(package):
    with pytest.raises(ValueError, match="there is no module my_pkg; start in the directory"):
        check_importable("my_pkg:A", TABLE, "algorithm.name")


def test_a_name_is_resolved_by_the_table_or_as_it_is():
    assert resolve("known", TABLE, "x") is resolve("nanoslime.plugins:target", {}, "x")
