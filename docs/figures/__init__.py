"""The pictures of docs/method.md, drawn from our own ops: `python -m docs.figures [NAME ...]`."""
