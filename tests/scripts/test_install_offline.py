"""The installer of a bundle: what it leaves, and damaged bundles; all without a network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.wheels import make_environment

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tests' Python with pip alone: a machine without torch."""
    base = Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}"
    return make_environment(tmp_path_factory.mktemp("python"), base if base.exists() else Path(sys.executable))


@pytest.fixture
def bundle(made_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the bundle, to damage."""
    return Path(shutil.copytree(made_bundle, tmp_path / "bundle"))


def install(bundle: Path, *words: object, **more: str) -> subprocess.CompletedProcess[str]:
    """Run the bundle's installer where every index that pip might ask is out of reach."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
    environment["PIP_INDEX_URL"] = "http://127.0.0.1:9/simple"
    # A path relative to the folder above, as a person types it.
    command = ["sh", str(Path(bundle.name, "install_offline.sh")), *map(str, words)]
    return subprocess.run(command, env=environment | more, cwd=bundle.parent, capture_output=True, text=True)


def assert_refused(result: subprocess.CompletedProcess[str], message: str) -> None:
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    assert message in result.stderr
    assert result.stdout == ""


def test_the_packages_are_installed_and_what_is_missing_is_named(
    bundle: Path, bare_python: Path, tmp_path: Path
) -> None:
    target = tmp_path / "the user's site"
    first = install(bundle, "--python", bare_python, "--target", target)
    assert first.returncode == 0, first.stderr
    versions, note, source = first.stdout.splitlines()
    assert versions == "translution-scale 0.1.0, deepspeed 0.19.8, pydantic 2.2"
    assert note.startswith("note: this machine lacks numbers-lib, torch;")
    line = source.removeprefix("in each shell: ")
    (target / "left_from_before.py").touch()
    program = (
        "import translution.planner as p, deepspeed, os; print(p.__file__, deepspeed.__file__, os.environ['PATH'])"
    )
    typed = f'{line}; "{bare_python}" -c "{program}"'
    printed = subprocess.run(["sh", "-c", typed], check=True, capture_output=True, text=True).stdout
    assert printed.startswith(f"{target}/translution/planner/__init__.py {target}/deepspeed.py {target}/bin:")

    # With CDPATH, cd prints the folder that it finds.
    again = install(bundle, "--python", bare_python, "--target", target.name, CDPATH=str(tmp_path))
    assert again.returncode == 0, again.stderr
    assert again.stdout == first.stdout
    assert not (target / "left_from_before.py").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", target.name}


def test_without_a_target_the_packages_are_next_to_the_bundle(bundle: Path, bare_python: Path, tmp_path: Path) -> None:
    assert install(bundle, "--python", bare_python).returncode == 0
    assert (tmp_path / "offline-site" / "env.sh").exists()


def test_a_flipped_byte_is_noticed(bundle: Path, bare_python: Path, tmp_path: Path) -> None:
    wheel = next(bundle.glob("small_lib-*.whl"))
    content = bytearray(wheel.read_bytes())
    content[len(content) // 2] ^= 1
    wheel.write_bytes(content)
    result = install(bundle, "--python", bare_python, "--target", tmp_path / "site")
    assert_refused(result, f"damaged or missing: {wheel.name};")
    assert not (tmp_path / "site").exists()


def test_a_missing_wheel_is_named(bundle: Path, bare_python: Path) -> None:
    next(bundle.glob("small_lib-*.whl")).unlink()
    assert_refused(install(bundle, "--python", bare_python), "damaged or missing: small_lib-1.0-py3-none-any.whl;")


def test_a_wheel_that_is_not_listed_is_refused(bundle: Path, bare_python: Path) -> None:
    shutil.copy(next(bundle.glob("small_lib-*.whl")), bundle / "torch-1.0-py3-none-any.whl")
    assert_refused(install(bundle, "--python", bare_python), "torch-1.0-py3-none-any.whl: not in SHA256SUMS")


def test_damaged_checksums_are_refused(bundle: Path, bare_python: Path) -> None:
    (bundle / "SHA256SUMS").write_text("nothing\n")
    assert_refused(install(bundle, "--python", bare_python), "SHA256SUMS: damaged")


def test_a_missing_bundle_is_one_line(tmp_path: Path) -> None:
    shutil.copy(ROOT / "scripts" / "install_offline.sh", tmp_path)
    assert_refused(install(tmp_path), f"no bundle in {tmp_path}")


def test_in_a_repository_the_bundle_is_the_one_that_make_writes(
    made_bundle: Path, bare_python: Path, tmp_path: Path
) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "pyproject.toml").touch()
    shutil.copy(ROOT / "scripts" / "install_offline.sh", tmp_path / "scripts")
    assert_refused(install(tmp_path / "scripts"), f"no bundle in {tmp_path}/build/offline")
    shutil.copytree(made_bundle, tmp_path / "build" / "offline")
    assert install(tmp_path / "scripts", "--python", bare_python).returncode == 0
    assert (tmp_path / "build" / "offline-site" / "env.sh").exists()


def test_a_python_that_does_not_fit_is_named(bundle: Path, bare_python: Path) -> None:
    assert_refused(install(bundle, "--python", "/no/python"), "--python: /no/python is not found")
    manifest = (bundle / "MANIFEST").read_text()
    other = manifest.replace(manifest.splitlines()[0], "python 3.99")
    (bundle / "MANIFEST").write_text(other)
    sums = (bundle / "SHA256SUMS").read_text().splitlines()
    digest = subprocess.run(["sha256sum", "MANIFEST"], cwd=bundle, check=True, capture_output=True, text=True).stdout
    (bundle / "SHA256SUMS").write_text("\n".join([line for line in sums if "MANIFEST" not in line]) + f"\n{digest}")
    assert_refused(install(bundle, "--python", bare_python), "the bundle is for Python 3.99")


def test_a_folder_with_other_files_is_not_replaced(bundle: Path, bare_python: Path, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "thesis.tex").touch()
    result = install(bundle, "--python", bare_python, "--target", tmp_path / "site")
    assert_refused(result, "holds other files")
    assert (tmp_path / "site" / "thesis.tex").exists()


def test_a_folder_that_pythonpath_cannot_hold_is_refused(bundle: Path, bare_python: Path, tmp_path: Path) -> None:
    result = install(bundle, "--python", bare_python, "--target", tmp_path / "a:b")
    assert_refused(result, "a colon is not allowed")


@pytest.mark.parametrize("words", [["--force"], ["--target"], ["--target", ""]])
def test_options_that_are_not_allowed_are_one_line(bundle: Path, words: list[str]) -> None:
    assert_refused(install(bundle, *words), words[0])


def test_a_planner_that_cannot_be_imported_is_an_error(bundle: Path, bare_python: Path, tmp_path: Path) -> None:
    """Without checksums no such bundle exists; the machine's Python may still refuse a package."""
    target = tmp_path / "site"
    assert install(bundle, "--python", bare_python, "--target", target).returncode == 0
    (target / "translution" / "planner" / "__init__.py").write_text("raise ImportError('a\\nb')")
    command = [str(bare_python), str(bundle / "offline_check.py"), str(target), "train"]
    environment = {**os.environ, "PYTHONPATH": str(target)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == "error: translution.planner cannot be imported: b; missing: numbers-lib, torch\n"
