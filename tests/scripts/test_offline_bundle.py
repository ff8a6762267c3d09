"""What a bundle holds, its limit, and input that is not allowed; all without a network."""

from __future__ import annotations

import argparse
import hashlib
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from helpers.wheels import write_sdist, write_wheel

from translution.planner import InputError, TranslutionError

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def order(bundle_script: ModuleType, tiny_project: Path, package_index: Path) -> Any:
    """An order for Python 3.12, whatever Python runs the tests."""
    left_out = frozenset({"numbers-lib", "core-lib", "pytest"})
    return bundle_script.Order(tiny_project, "3.12", ("train",), left_out, 2**20)


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """The wheels that are built before versions are chosen."""
    folder = tmp_path / "built"
    folder.mkdir()
    train = ["torch>=2.5", "deepspeed>=0.1", "numbers-lib>=2", "pydantic>=2.1"]
    requires = ["pydantic>=2", "packaging", *(f'{line}; extra == "train"' for line in train)]
    write_wheel(folder, "translution-scale", "0.1.0", requires)
    needs = ["torch>=2", "small-lib", "early; python_version < '3.12'", "late; python_version >= '3.12'"]
    write_wheel(folder, "deepspeed", "0.19.8", needs)
    return folder


def names(pinned: list[str]) -> set[str]:
    return {line.partition("==")[0] for line in pinned}


def test_what_the_machine_has_is_left_out_with_what_only_it_needs(
    bundle_script: ModuleType, order: Any, built: Path
) -> None:
    found = names(bundle_script.resolve(order, built))
    assert found.isdisjoint({"torch", "numbers-lib", "heavy-lib", "pytest", "other-tool"})
    assert {"translution-scale", "deepspeed", "small-lib"} < found


def test_what_the_planner_needs_is_bundled_even_if_the_machine_has_it(
    bundle_script: ModuleType, order: Any, built: Path
) -> None:
    assert {"pydantic", "packaging", "core-lib"} <= names(bundle_script.resolve(order, built))


def test_versions_are_those_of_the_constraints_and_markers_those_of_the_target(
    bundle_script: ModuleType, order: Any, built: Path
) -> None:
    pinned = bundle_script.resolve(order, built)
    assert {"small-lib==1.0", "deepspeed==0.19.8", "late==9.0"} <= set(pinned)
    assert "early" not in names(pinned)


def test_a_name_that_is_not_left_out_is_bundled_with_its_needs(
    bundle_script: ModuleType, order: Any, built: Path
) -> None:
    pinned = bundle_script.resolve(bundle_script.Order(order.project, "3.12", ("train",), frozenset(), 0), built)
    assert {"numbers-lib", "heavy-lib", "pytest"} <= names(pinned)
    assert "torch" not in names(pinned)


def test_what_the_bundle_lacks_is_what_the_machine_must_have(
    bundle_script: ModuleType, order: Any, built: Path
) -> None:
    expected = bundle_script.expected(order, built)
    assert expected.keys() == {"torch", "numbers-lib", "pydantic", "packaging", "small-lib", "late"}
    assert set(expected["torch"].split(",")) == {">=2", ">=2.5"}


def test_a_bundle_has_wheels_that_fit_every_machine_and_lists_them(made_bundle: Path) -> None:
    wheels = {path.name for path in made_bundle.glob("*.whl")}
    assert "deepspeed-0.19.8-py3-none-any.whl" in wheels
    assert "translution_scale-0.1.0-py3-none-any.whl" in wheels
    assert not {name for name in wheels if name.startswith(("torch", "numbers", "heavy", "pytest"))}
    manifest = (made_bundle / "MANIFEST").read_text().splitlines()
    assert "extras train" in manifest
    assert "expects numbers-lib>=2" in manifest
    assert {line.split()[-1] for line in manifest if line.startswith("wheel ")} == wheels
    sums = dict(reversed(line.split("  ")) for line in (made_bundle / "SHA256SUMS").read_text().splitlines())
    assert sums.keys() == {path.name for path in made_bundle.iterdir()} - {"SHA256SUMS"}
    for name, digest in sums.items():
        assert hashlib.sha256((made_bundle / name).read_bytes()).hexdigest() == digest


def test_the_project_is_built_from_its_sources_alone(made_bundle: Path, tiny_project: Path) -> None:
    with zipfile.ZipFile(made_bundle / "translution_scale-0.1.0-py3-none-any.whl") as wheel:
        assert [name for name in wheel.namelist() if name.endswith(".py")] == ["translution/planner/__init__.py"]
    assert not list(tiny_project.glob("*.egg-info"))


def test_a_wheel_with_compiled_code_is_refused(
    bundle_script: ModuleType, tiny_project: Path, package_index: Path, tmp_path: Path
) -> None:
    setup = "from setuptools import setup, Distribution\nDistribution.has_ext_modules = lambda self: True\n"
    sdist = write_sdist(tmp_path, "fast", "1.0", f"{setup}setup(name='fast', version='1.0', py_modules=['fast'])")
    with pytest.raises(TranslutionError, match=r"fast-1\.0-.*\.whl holds compiled code"):
        bundle_script._build(sdist, tiny_project / "constraints.txt", tmp_path)


def test_a_bundle_above_its_limit_is_an_error_that_names_the_largest_files(
    bundle_script: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "large.whl").write_bytes(bytes(3 * 2**20))
    (tmp_path / "small.whl").write_bytes(bytes(2**20))
    assert bundle_script.check_size(tmp_path, 4 * 2**20) == 4 * 2**20
    with pytest.raises(
        TranslutionError, match=r"has 4\.0 MiB, more than the 4 MiB .*largest: large\.whl 3\.0 MiB, small"
    ):
        bundle_script.check_size(tmp_path, 4 * 2**20 - 1)


def test_a_bundle_that_fails_leaves_the_earlier_one(
    bundle_script: ModuleType, order: Any, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle_script, "build_wheels", lambda *_: None)
    monkeypatch.setattr(bundle_script, "download", lambda *_: None)
    monkeypatch.setattr(bundle_script, "resolve", lambda *_: [])
    out = tmp_path / "offline"
    bundle_script.bundle(order, out)
    before = sorted(out.iterdir())
    small = bundle_script.Order(order.project, "3.12", ("train",), frozenset(), 10)
    with pytest.raises(TranslutionError, match="limit-mib"):
        bundle_script.bundle(small, out)
    assert sorted(out.iterdir()) == before
    assert {path.name for path in tmp_path.iterdir()} == {"built", "offline"}


def test_a_folder_with_other_files_is_not_replaced(bundle_script: ModuleType, order: Any, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(InputError, match=r"--out: .* holds other files"):
        bundle_script.bundle(order, tmp_path)
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--python", "3"], "--python: '3' is not allowed; a version such as 3.12 is"),
        (["--extras", "train,tests"], "--extras: 'tests' is not allowed; allowed, with commas between: train, dev"),
        (["--include", "torch"], "--include: torch is not allowed"),
        (["--include", "heavy-lib"], "--include: 'heavy-lib' is not allowed; the names in "),
        (["--limit-mib", "nan"], "--limit-mib: nan is not allowed; a number above 0 is"),
        (["--without", "no-file"], "--without: no-file cannot be read"),
    ],
)
def test_input_that_is_not_allowed_is_one_line(
    bundle_script: ModuleType, tiny_project: Path, names_file: Path, capsys: Captured, words: list[str], message: str
) -> None:
    assert bundle_script.main(["--project", str(tiny_project), "--without", str(names_file), *words]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {message}")
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_a_line_that_is_no_name_is_named(bundle_script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("numpy\npandas>=2\n")
    with pytest.raises(InputError, match=r"names\.txt:2: 'pandas>=2' is no package's name"):
        bundle_script.read_names(tmp_path / "names.txt")


def test_an_included_name_is_no_longer_left_out(
    bundle_script: ModuleType, tiny_project: Path, names_file: Path
) -> None:
    arguments = argparse.Namespace(
        python="3.12", project=tiny_project, extras="train", include=["Numbers.Lib"], without=names_file, limit_mib=60
    )
    assert bundle_script._order(arguments).left_out == {"core-lib", "pytest"}


def test_the_projects_own_list_is_of_names(bundle_script: ModuleType, root: Path) -> None:
    names = bundle_script.read_names(root / "scripts" / "offline_present.txt")
    assert {"torch", "numpy", "pytest"} <= names
