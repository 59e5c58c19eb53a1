"""`python -m mlxpage` and the command `mlxpage`."""

from mlxpage.cli import main

if __name__ == "__main__":
    main()
