"""Lists the C functions of the stable ABI that a torch wheel declares and exports: python -m tests.packaging.shim WHEEL

Use the wheel for macOS, which is small and has every name in full in its libraries: pip download --no-deps --only-binary=:all:
--platform macosx_11_0_arm64 --python-version 3.11 torch==2.10.0. The functions of CUDA are listed if they are declared.
"""

import re
import sys
import zipfile

HEADERS = ("torch/include/torch/csrc/inductor/aoti_torch/c/shim.h", "torch/include/torch/csrc/stable/c/shim.h")


def names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        declared = set(re.findall(rb"\b((?:aoti_torch|torch)_\w+)\s*\(", b"".join(map(archive.read, HEADERS))))
        library = archive.read("torch/lib/libtorch_cpu.dylib")
    exported = set(re.findall(rb"\0_((?:aoti_torch|torch)_\w+)(?=\0)", library))
    return sorted(name.decode() for name in declared if name in exported or b"cuda" in name)


if __name__ == "__main__":
    print("\n".join(names(sys.argv[1])))
