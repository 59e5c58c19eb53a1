"""`python -m mlxpage` and the command `mlxpage`."""

from mlxpage.cli.main import main

if __name__ == "__main__":
    main()
