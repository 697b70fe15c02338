"""The one thing that pyproject.toml cannot say: found packages next to a folder installed under another name."""

from setuptools import find_namespace_packages, setup

setup(  # folders of data (the zoo's pipelines, the recipes' prompts) count as packages too, hence the namespaces
    packages=[*find_namespace_packages(include=["rlalign", "rlalign.*"], exclude=["*.__pycache__"]), "rlalign_rewards"],
    package_dir={"rlalign_rewards": "rewards"},  # a package called rewards would clash with users' own folders
)
