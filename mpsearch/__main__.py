"""`python -m mpsearch` is `mpsearch`."""

from mpsearch.cli import main

if __name__ == "__main__":
    main()
