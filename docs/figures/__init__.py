"""The pictures of docs/method.md, computed by our ops: `python -m docs.figures [NAME ...]`."""
