"""Names of the data sets, apart from their table in ``flowseg.data.catalog``: reading them imports no PyTorch."""

DATA_NAMES = ("digits", "paints", "camvid", "ade20k", "cocostuff", "cityscapes", "voc", "folder")
