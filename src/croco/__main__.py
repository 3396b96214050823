"""`python -m croco` is `croco`."""

from croco.cli.main import main

if __name__ == "__main__":
    main()
