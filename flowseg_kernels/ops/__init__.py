"""One folder per op. Importing this package registers every op with PyTorch as torch.ops.flowseg.NAME."""

from .class_probabilities import op as _class_probabilities  # noqa: F401
from .decode_confusion import op as _decode_confusion  # noqa: F401
from .distance_correction import op as _distance_correction  # noqa: F401
from .flow_interpolate import op as _flow_interpolate  # noqa: F401
from .flow_loss import op as _flow_loss  # noqa: F401
from .nearest_centroid import op as _nearest_centroid  # noqa: F401
from .neural_field import op as _neural_field  # noqa: F401
from .top_classes import op as _top_classes  # noqa: F401
