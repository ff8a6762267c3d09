"""List what the packages in a folder need and this Python does not have.

    PYTHONPATH=FOLDER python offline_check.py FOLDER [EXTRA ...]

install_offline.sh runs it after installing, on a machine that need not have this repository. It prints the versions,
and one line that names every missing package. The exit status is 1 if the planner cannot be imported.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

PROJECT = "translution-scale"
SHOWN = (PROJECT, "deepspeed", "pydantic", "torch")
"""Distributions whose versions are printed."""


def requirements(
    distributions: Iterable[metadata.Distribution], extras: Sequence[str], environment: Mapping[str, str]
) -> dict[str, SpecifierSet]:
    """Return what distributions need where the markers' variables are `environment`: versions by package.

    Args:
        distributions: installed ones, or wheels.
        extras: extras of the project; those of other packages are not considered.
        environment: variables of markers, such as `python_version` (PEP 508).
    """
    found: dict[str, SpecifierSet] = {}
    for distribution in distributions:
        asked = ["", *extras] if canonicalize_name(distribution.metadata["Name"]) == PROJECT else [""]
        for requirement in map(Requirement, distribution.requires or []):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({**environment, "extra": extra}) for extra in asked):
                name = canonicalize_name(requirement.name)
                found[name] = found.get(name, SpecifierSet()) & requirement.specifier
    return dict(sorted(found.items()))


def unmet(needed: Mapping[str, SpecifierSet]) -> dict[str, str]:
    """Return the packages that this Python lacks, or has in a version that does not fit: a text for each."""
    texts = {}
    for name, versions in needed.items():
        version = installed(name)
        if version is None:
            texts[name] = name
        elif not versions.contains(version, prereleases=True):
            texts[name] = f"{name}{versions} (found: {version})"
    return texts


def installed(name: str) -> str | None:
    """Return the version of a package that this Python finds; None if there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def main(arguments: Sequence[str]) -> int:
    """Check the folder that is the first argument, with the extras that follow; return the exit status."""
    folder, *extras = arguments
    missing = unmet(requirements(metadata.distributions(path=[folder]), extras, default_environment()))
    listed = ", ".join(missing.values())
    modules = ["translution.planner", "pydantic"]
    if installed("deepspeed") and "torch" not in missing:
        modules.append("deepspeed")  # imports torch
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # a package of the machine may raise anything when it is imported
            text = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            print(f"error: {module} cannot be imported: {text}; missing: {listed or 'nothing'}", file=sys.stderr)
            return 1
    print(", ".join(f"{name} {installed(name)}" for name in SHOWN if installed(name)))
    if missing:
        print(f"note: this machine lacks {listed}; what needs them does not run")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
