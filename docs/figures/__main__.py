"""Draw the named pictures, by default all."""

import sys

from . import convergence, correction, decoding, paints, path

DRAWN = {
    "path": path.draw,
    "correction": correction.draw,
    "decoding": decoding.draw,
    "convergence": convergence.draw,
    "paints": paints.draw,
}

for name in sys.argv[1:] or DRAWN:
    DRAWN[name]()
