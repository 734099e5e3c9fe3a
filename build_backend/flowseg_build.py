"""In-tree build backend: setuptools, with the torch of the environment that is being installed into within reach.

pip builds in an isolated environment but with the interpreter of the target environment, so the target's site-packages can be
put on the path: the kernels are then compiled against the torch that is already there and no second one is downloaded.
"""

import sys
import sysconfig

for _key in ("purelib", "platlib"):
    _path = sysconfig.get_paths()[_key]
    if _path not in sys.path:
        sys.path.append(_path)  # last: the isolated environment's own packages win

from setuptools.build_meta import *  # noqa: E402, F403
from setuptools.build_meta import (  # noqa: E402, F401
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
