"""Maps the kernel folders into the package; everything else is in pyproject.toml.

The top-level ``kernels/`` is no package (Hugging Face's library has that import name): only its
``triton/`` folder is installed, as ``fastvit.triton``.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["fastvit", "fastvit.*"]), "fastvit.triton"],
    package_dir={"fastvit.triton": "kernels/triton"},
    package_data={"fastvit": ["py.typed"], "fastvit.triton": ["tables/*.json"]},
)
