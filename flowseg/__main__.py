"""``python -m flowseg`` is the ``flowseg`` command."""

from flowseg.cli import main

if __name__ == "__main__":
    main()
