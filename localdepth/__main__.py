"""``python -m localdepth`` is the ``localdepth`` command."""

from localdepth.cli import main

if __name__ == "__main__":
    main()
