"""Packages are found, not listed. Links are not kept in a source distribution, so that the two
folders that stand at the top of the repository are named: pyproject.toml says where they lie.
(Where a checkout has no links, as on Windows, they are installed from there all the same.)"""

from setuptools import find_packages, setup

MAPPED = {"spacompiler.passes", "spacompiler.models_zoo"}

setup(packages=sorted({*find_packages(include=["spacompiler", "spacompiler.*"]), *MAPPED}))
