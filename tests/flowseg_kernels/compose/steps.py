"""A module that calls every op, its inputs, and a recorder of op calls."""

import torch

import flowseg_kernels as fk

OPS = ("flow_interpolate", "flow_loss", "distance_correction", "nearest_centroid", "decode_confusion", "neural_field")


class EveryOp(torch.nn.Module):
    """All six ops in one forward, with a neural field as the network."""

    def __init__(self, codes, patch_size=4, patch_chunk=None):
        super().__init__()
        self.codes, self.patch_size = codes, patch_size
        self.features = torch.nn.Conv2d(3, 6, patch_size, patch_size)
        self.field = fk.NeuralFieldDecoder(
            6, hidden=8, depth=1, patch_size=patch_size, max_freqs=2, patch_chunk=patch_chunk
        )
        torch.nn.init.normal_(self.field.final_layer.linear.weight, std=0.5)
        self.loss = fk.FlowLoss(codes, reduction="sum")

    def predict(self, source, labels, t):
        x_t = fk.flow_interpolate(source, labels, t, self.codes)
        return self.field(x_t, self.features(x_t).flatten(2).transpose(1, 2))

    def forward(self, source, labels, t):
        prediction = self.predict(source, labels, t)
        loss = self.loss(prediction, source, labels, t)
        correction = fk.distance_correction(prediction, labels, self.codes)
        decoded, margin = fk.nearest_centroid(prediction, self.codes, return_margin=True)
        return loss, correction, decoded, margin, fk.decode_confusion(prediction, labels, self.codes)


def batch(codes, images=2, height=8, width=12):
    labels = torch.randint(0, codes.num_classes, (images, height, width))
    labels[:, 0] = 255
    return torch.rand(images, 3, height, width) * 2 - 1, labels, torch.rand(images)


def called(monkeypatch, names=OPS):
    """A list to which each op call adds the op's name, on any backend."""
    from flowseg_kernels.runtime.backend import OPS as TABLE

    calls = []
    for name in names:
        for key, chosen in list(TABLE[name].items()):

            def run(*args, _run=chosen.run, _name=name):
                calls.append(_name)
                return _run(*args)

            monkeypatch.setitem(TABLE[name], key, type(chosen)(run, chosen.why_not))
    return calls
