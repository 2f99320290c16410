"""`python -m multum` is `multum`."""

from .cli import main

if __name__ == "__main__":
    main()
