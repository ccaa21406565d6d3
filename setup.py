"""Maps the kernel folders into the package; everything else is in pyproject.toml.

The top-level ``kernels/`` is no package (Hugging Face's library has that import name): only its
``triton/`` folder is installed, as ``fastvit.triton``.

Nothing here imports torch, so a build needs no torch, no nvcc and no GPU.
"""

from setuptools import find_packages, setup

# Says which build this is: there are no CUDA sources yet, so there is one kind. (pip shows it with -v.)
print("fastvit: pure-Python build (Triton kernels and the reference; no CUDA extension)")

setup(
    packages=[*find_packages(include=["fastvit", "fastvit.*"]), "fastvit.triton"],
    package_dir={"fastvit.triton": "kernels/triton"},
    package_data={"fastvit": ["py.typed"], "fastvit.triton": ["tables/*.json", "tables/measured/*.json"]},
)
