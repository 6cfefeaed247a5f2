# SPDX-License-Identifier: Apache-2.0
"""Maps the folder ``integrations/`` to the package ``segkern.integrations``; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

integrations = ["segkern.integrations", *(f"segkern.integrations.{name}" for name in find_packages("integrations"))]

setup(
    packages=[*find_packages(include=["segkern", "segkern.*"]), *integrations],
    package_dir={"segkern.integrations": "integrations"},
)
