"""Find the packages: setuptools cannot be told by pyproject.toml alone that the repository root is a package."""

from setuptools import find_packages, setup

FOLDERS = ["exporter", "engines", "runtime", "benchmarks", "cli"]
NOT_SHIPPED = ["benchmarks.shapes.training"]  # how the shapes model was trained; run it from a checkout

patterns = [pattern for name in FOLDERS for pattern in (name, f"{name}.*")]
found = find_packages(".", include=patterns, exclude=NOT_SHIPPED)
setup(
    script_name="setup.py",  # so that this file stays out of the package
    packages=["offcut", *(f"offcut.{name}" for name in sorted(found))],
)
