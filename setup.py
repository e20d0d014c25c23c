"""Builds the wheel; pyproject.toml says the rest. It cannot say that configs/ and the locks, which
lie at the top of a checkout, go inside the package (finrepro.PROJECT is where they are found).
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["finrepro*"]), "finrepro.configs", "finrepro.requirements"],
    package_dir={"finrepro.configs": "configs", "finrepro.requirements": "requirements"},
    package_data={
        "finrepro": ["py.typed", "**/*.json"],
        "finrepro.configs": ["**/*.yaml", "**/*.json"],
        "finrepro.data": ["embedded/**"],
        "finrepro.requirements": ["*.lock"],
    },
    include_package_data=False,
)
