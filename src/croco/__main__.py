"""`python -m croco` is `croco`."""

from croco.cli import main

if __name__ == "__main__":
    main()
