"""The build backend that pyproject.toml names: that of setuptools, with the modules of this folder on the path."""

from setuptools.build_meta import *  # noqa: F403
from setuptools.build_meta import (  # noqa: F401
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
